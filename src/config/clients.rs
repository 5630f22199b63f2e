//! `tidings client`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Database, faults::path};

#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = CLIENT_HELP)]
pub struct Client {
    #[command(subcommand)]
    pub action: ClientAction,
}

const CLIENT_HELP: &str = "\
Examples:
  tidings client create orders --scope users:read,subscriptions \\
    --field address,city --purpose 'ships what was ordered'
  KEY=$(tidings client create hr --scope users:read,users:write)
  tidings client rotate hr --overlap 2d
  tidings client revoke orders";

#[derive(Debug, Subcommand)]
pub enum ClientAction {
    /// Make a client, and print its key: the only time that it can be had.
    Create(ClientCreate),
    /// All clients, and their keys by id.
    List(ClientList),
    /// A second key for a client; the first one ends after a while.
    Rotate(ClientRotate),
    /// Refuse a client from now on, or one of its keys.
    Revoke(ClientRevoke),
}

#[derive(Debug, Args)]
pub struct ClientCreate {
    /// Name of the client, such as that of the application.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What it may do: users:read, users:write, subscriptions, admin.
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',', required = true)]
    pub scopes: Vec<String>,
    /// A field that it may read and write, and none but those named. Without any: every field.
    #[arg(long = "field", value_name = "FIELD", value_delimiter = ',')]
    pub fields: Vec<String>,
    /// A field that it may write, and none but those named, when that differs from what it may read.
    #[arg(long = "write-field", value_name = "FIELD", value_delimiter = ',')]
    pub write_fields: Vec<String>,
    /// What it needs them for, for the record of who reads what.
    #[arg(long, value_name = "TEXT")]
    pub purpose: Option<String>,
    /// Requests a second and at once, such as 100/500. Without: those of TIDINGS_RATE_LIMIT.
    #[arg(long, value_name = "PER_SECOND/BURST")]
    pub rate_limit: Option<String>,
    /// Make no key: it comes with tokens of an identity provider (`tidings serve --jwt-jwks`), which no other client can.
    #[arg(long, conflicts_with = "expires_after")]
    pub no_key: bool,
    /// Its key ends after so long, such as 90d. Without: never.
    #[arg(long, value_name = "DURATION")]
    pub expires_after: Option<String>,
    /// JSON Schema file that decides which fields there are. Without it: a built-in one.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE", value_parser = path())]
    pub profile_schema: Option<PathBuf>,
    #[command(flatten)]
    pub database: Database,
}

#[derive(Debug, Args)]
pub struct ClientList {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub database: Database,
}

#[derive(Debug, Args)]
pub struct ClientRotate {
    /// Name of the client.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The keys it has now go on for so long.
    #[arg(long, value_name = "DURATION", default_value = "1d")]
    pub overlap: String,
    /// The new key ends after so long. Without: never.
    #[arg(long, value_name = "DURATION")]
    pub expires_after: Option<String>,
    #[command(flatten)]
    pub database: Database,
}

#[derive(Debug, Args)]
pub struct ClientRevoke {
    /// Name of the client.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only this key, by its id.
    #[arg(long, value_name = "ID")]
    pub key: Option<String>,
    #[command(flatten)]
    pub database: Database,
}
