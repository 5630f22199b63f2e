//! Config: the command line and the environment.
//!
//! Promise: everything that is wrong is named at start, all at once, with what would be right.
//! Not here, on purpose: secrets on the command line, where every user of the machine could read them.

use std::{collections::HashSet, ffi::OsStr, fmt, fs, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, CommandFactory, Parser, Subcommand};
use lapin::uri::AMQPUri;
use secrecy::{ExposeSecret, SecretString};
use tidings_sdk::{envelope::FieldName, topology::Source, trust::Trust};
use uuid::Uuid;

use crate::{
    broker::{self, Broker},
    clients::Tokens,
    db::Db,
    import,
    profile::Schema,
    subscriptions::Management,
    telemetry::LogFormat,
    web::{LimitSettings, Proxies},
};

/// The owner of user master data, which tells every other application that something changed.
///
/// Users are kept in Postgres and changed over REST. Each change commits an event with it, and a relay publishes the events to an
/// AMQP topic exchange: ids and names of changed fields, never a value. Consumers fetch the latest record by GET.
#[derive(Debug, Parser)]
#[command(name = "tidings", version, max_term_width = 110, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub log: LogSettings,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API, and relay what it commits.
    ///
    /// Brings the database's schema up to date, listens, and prints one ready line. SIGTERM or Ctrl-C finishes what is under way,
    /// within 20 s; a second one leaves at once.
    #[command(after_help = SERVE_HELP)]
    Serve(Serve),
    /// Relay only: carry committed events to the broker, and answer /healthz, /readyz and /metrics.
    ///
    /// Any number of relays may run: one carries the events, the others stand by.
    Relay(Relay),
    /// Bring the database's schema up to this version, and end.
    Migrate(Migrate),
    /// Print notices as they come, one JSON object a line.
    ///
    /// Listens on a private queue that goes with it: what happens while it does not run, it does not see.
    #[command(after_help = TAIL_HELP)]
    Tail(Tail),
    /// Who may ask: create and revoke clients and their keys.
    ///
    /// Works on the database directly; no service needs to run. What is changed holds on every instance within a second.
    Client(Client),
    /// Who listens to what: register, list, show and delete subscriptions.
    ///
    /// Works on the database and the broker directly; no service needs to run.
    Subscription(Subscription),
    /// Who has confirmed the deletion of a user, and who is late.
    ///
    /// Works on the database directly; no service needs to run.
    #[command(subcommand, after_help = DELETIONS_HELP)]
    Deletions(DeletionsAction),
    /// Look for users' values where none may be: in every other table, in what is published, in logs. Names places, never a value.
    ///
    /// Changes nothing. Exits 0 when nothing was found, 1 when something was or could not be looked at, 2 when a setting is wrong.
    #[command(after_help = AUDIT_HELP)]
    AuditLeaks(AuditLeaks),
    /// Load an existing user base through the API: a JSON Lines file, one user a line.
    ///
    /// Many users are sent at once. What was done stands in a journal beside the file, FILE.import: after a kill, a crash or Ctrl-C the
    /// same command goes on. Sending a line again does no harm. Exit status: 0 when every line is in, 1 when some were refused or it
    /// could not go on, 2 when a setting is wrong.
    #[command(after_help = IMPORT_HELP)]
    Import(Import),
    /// Print the OpenAPI document: what may be asked, and what is answered.
    Openapi,
    /// Print the AsyncAPI document: the messages that tell of changes.
    Asyncapi,
    /// Ask the instance on this machine whether it is alive; exit 0 when it is. For container health checks.
    Healthcheck(Healthcheck),
}

const SERVE_HELP: &str = "\
Examples:
  DATABASE_URL=postgres://tidings@localhost/tidings AMQP_URL=amqp://localhost tidings serve
  DATABASE_URL_FILE=/run/secrets/db AMQP_URL_FILE=/run/secrets/amqp tidings serve --listen 0.0.0.0:8080
  tidings serve --no-relay      # and `tidings relay` elsewhere";

const TAIL_HELP: &str = "\
Examples:
  tidings tail                                  # everything
  tidings tail user.created user.deleted        # two routing keys
  tidings tail 'user.*'                         # a pattern of the topic exchange
  tidings tail --fields job_title,company       # only changes of these fields
  tidings tail --fields job_title user.deleted  # the same, and deletions";

const IMPORT_HELP: &str = "\
A line is {\"id\": UUID, \"external_id\": TEXT, \"profile\": {..}}; id and external_id may be left out.
  with id             the user gets this id, or is replaced under it
  with external_id    the user who has it is replaced; if there is none, one is created
  with neither        a user is created, and once only as long as the journal is there

Examples:
  tidings import --dry-run users.jsonl              # what is wrong with the lines, without sending any
  tidings import users.jsonl --report refused.jsonl
  zcat users.jsonl.gz | tidings import -            # standard input has no journal
  TIDINGS_URL=https://users.example.org TIDINGS_API_KEY_FILE=/run/secrets/key tidings import users.jsonl";

#[derive(Debug, Args)]
pub struct LogSettings {
    /// What to log, in the syntax of tracing's EnvFilter. lapin and sqlx are quiet by default: what goes wrong in them is told by us,
    /// once.
    #[arg(
        long,
        env = "TIDINGS_LOG",
        default_value = "info,lapin=off,sqlx=error",
        global = true,
        value_name = "FILTER"
    )]
    pub log: String,
    /// How to log.
    #[arg(long, env = "TIDINGS_LOG_FORMAT", default_value = "text", global = true, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub amqp: Amqp,
    #[command(flatten)]
    pub listen: Listen,
    /// JSON Schema file that decides what a profile may hold. Without it: a built-in one.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE")]
    pub profile_schema: Option<PathBuf>,
    #[command(flatten)]
    pub watching: Watching,
    #[command(flatten)]
    pub erasure: Erasure,
    #[command(flatten)]
    pub limits: Limits,
    /// Leave the relaying to `tidings relay` elsewhere; then no broker is needed here.
    #[arg(long, env = "TIDINGS_NO_RELAY")]
    pub no_relay: bool,
    /// Take no change of a living user without If-Match: 428 otherwise.
    #[arg(long, env = "TIDINGS_REQUIRE_IF_MATCH")]
    pub require_if_match: bool,
    /// Ask nobody for a key. Only on a loopback address, where none but users of this machine can reach it.
    #[arg(long, env = "TIDINGS_INSECURE_NO_AUTH")]
    pub insecure_no_auth: bool,
    #[command(flatten)]
    pub jwt: Jwt,
    /// Do not migrate at start; run `tidings migrate` before.
    #[arg(long, env = "TIDINGS_NO_MIGRATE")]
    pub no_migrate: bool,
}

#[derive(Debug, Args)]
pub struct Relay {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub amqp: Amqp,
    #[command(flatten)]
    pub listen: Listen,
    #[command(flatten)]
    pub watching: Watching,
    #[command(flatten)]
    pub limits: Limits,
}

#[derive(Debug, Args)]
pub struct Migrate {
    #[command(flatten)]
    pub database: Database,
}

#[derive(Debug, Args)]
pub struct Tail {
    /// Routing keys to listen for; `*` is one word, `#` any number. Without any: everything, or nothing but --fields.
    #[arg(value_name = "KEY")]
    pub keys: Vec<String>,
    /// Only profile.updated, and only when one of these fields changed.
    #[arg(long, value_name = "FIELD", value_delimiter = ',')]
    pub fields: Vec<String>,
    #[command(flatten)]
    pub amqp: Amqp,
}

#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = CLIENT_HELP)]
pub struct Client {
    #[command(subcommand)]
    pub action: ClientAction,
}

const CLIENT_HELP: &str = "\
Examples:
  tidings client create orders --scope users:read,subscriptions --field address,city --purpose 'ships what was ordered'
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
    /// Make no key: it comes with tokens of an identity provider (`tidings serve --jwt-jwks`).
    #[arg(long, conflicts_with = "expires_after")]
    pub no_key: bool,
    /// Its key ends after so long, such as 90d. Without: never.
    #[arg(long, value_name = "DURATION")]
    pub expires_after: Option<String>,
    /// JSON Schema file that decides which fields there are. Without it: a built-in one.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE")]
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

#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = SUBSCRIPTION_HELP)]
pub struct Subscription {
    #[command(subcommand)]
    pub action: SubscriptionAction,
}

const SUBSCRIPTION_HELP: &str = "\
Examples:
  tidings subscription put orders --key user.deleted --field address --owner team-orders --purpose 'cancels pending orders'
  tidings subscription list
  tidings subscription show orders --json
  tidings subscription delete orders --discard-waiting";

#[derive(Debug, Subcommand)]
pub enum SubscriptionAction {
    /// Register a subscription, or change it: at the broker it is declared at once.
    Put(SubscriptionPut),
    /// All subscriptions.
    List(SubscriptionList),
    /// One subscription.
    Show(SubscriptionShow),
    /// Say that a subscriber whose queue was lost has been brought up to date.
    Recovered(SubscriptionRecovered),
    /// Delete a subscription, with its queue and what lies in it.
    Delete(SubscriptionDelete),
    /// What a subscription could not handle: list it, put it back, drop it.
    #[command(subcommand)]
    DeadLetters(DeadLettersAction),
    /// Tell a subscription of users as if each had just changed. A service that relays has to run.
    #[command(subcommand)]
    Backfill(BackfillAction),
}

#[derive(Debug, Subcommand)]
pub enum DeadLettersAction {
    /// Print dead letters, one a line.
    List(DeadLettersList),
    /// Put dead letters back into the queue, once what was wrong is mended.
    Redrive(DeadLettersRedrive),
    /// Drop dead letters for good.
    Purge(DeadLettersPurge),
}

#[derive(Debug, Args)]
pub struct DeadLettersList {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only letters of this reason, such as handler_failed.
    #[arg(long, value_name = "REASON")]
    pub reason: Option<String>,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct DeadLettersRedrive {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// These messages.
    #[arg(long = "message", value_name = "ID", value_delimiter = ',')]
    pub messages: Vec<String>,
    /// All of this reason.
    #[arg(long, value_name = "REASON")]
    pub reason: Option<String>,
    /// All there are now.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct DeadLettersPurge {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only letters of this reason.
    #[arg(long, value_name = "REASON")]
    pub reason: Option<String>,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Subcommand)]
pub enum BackfillAction {
    /// Start one: everybody, unless told otherwise.
    Start(BackfillStart),
    /// The one under way, or the last one.
    Show(BackfillOf),
    /// Stop sending, and stay where it is.
    Pause(BackfillOf),
    /// Go on, at another rate if one is given.
    Resume(BackfillResume),
    /// End it. What was sent stays in the queue.
    Cancel(BackfillOf),
}

#[derive(Debug, Args)]
pub struct BackfillOf {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct BackfillStart {
    #[command(flatten)]
    pub backfill: BackfillOf,
    /// This user, and none but those named.
    #[arg(long = "user", value_name = "ID", value_delimiter = ',')]
    pub users: Vec<String>,
    /// Who was changed or deleted then or later, such as 2026-11-01T00:00:00Z.
    #[arg(long, value_name = "TIME", conflicts_with = "users")]
    pub changed_since: Option<String>,
    /// Messages a second, at most.
    #[arg(long, value_name = "NUMBER")]
    pub rate: Option<i32>,
    /// Stay until it is done, and tell how far it is.
    #[arg(long)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub struct BackfillResume {
    #[command(flatten)]
    pub backfill: BackfillOf,
    /// Messages a second from now on.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(1..=50_000))]
    pub rate: Option<i32>,
}

/// What every command about subscriptions needs.
#[derive(Debug, Args)]
pub struct SubscriptionServers {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub amqp: Amqp,
    #[command(flatten)]
    pub api: ManagementApi,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SubscriptionPut {
    /// Name of the subscription, and of its queue.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// A kind of notice that wakes it: user.created, profile.updated, user.deleted, or a pattern such as user.*.
    #[arg(long = "key", value_name = "KEY", value_delimiter = ',')]
    pub keys: Vec<String>,
    /// A field whose change wakes it.
    #[arg(long = "field", value_name = "FIELD", value_delimiter = ',')]
    pub fields: Vec<String>,
    /// The team that may change it, and whom to ask.
    #[arg(long, value_name = "TEAM")]
    pub owner: String,
    /// What it is for.
    #[arg(long, value_name = "TEXT")]
    pub purpose: String,
    /// Delete it when it had no consumer for so long, such as 30d. Without: never.
    #[arg(long, value_name = "DURATION")]
    pub expires_after: Option<String>,
    /// The client that stands for it, and may read what it declares. Without: whoever did before.
    #[arg(long, value_name = "CLIENT")]
    pub client: Option<String>,
    /// JSON Schema file that decides which fields there are. Without it: a built-in one.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE")]
    pub profile_schema: Option<PathBuf>,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct SubscriptionList {
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct SubscriptionShow {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct SubscriptionRecovered {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

#[derive(Debug, Args)]
pub struct SubscriptionDelete {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Also when messages wait in it, which are lost then.
    #[arg(long)]
    pub discard_waiting: bool,
    #[command(flatten)]
    pub servers: SubscriptionServers,
}

const DELETIONS_HELP: &str = "\
Examples:
  tidings deletions show 0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a
  tidings deletions overdue --json";

#[derive(Debug, Subcommand)]
pub enum DeletionsAction {
    /// One deletion: who has confirmed it, and how.
    Show(DeletionsShow),
    /// All deletions that somebody has not confirmed in time, the oldest first, one a line.
    Overdue(DeletionsOverdue),
}

#[derive(Debug, Args)]
pub struct DeletionsShow {
    /// The user who was deleted.
    #[arg(value_name = "USER_ID")]
    pub user_id: String,
    #[command(flatten)]
    pub servers: DeletionsServers,
}

#[derive(Debug, Args)]
pub struct DeletionsOverdue {
    #[command(flatten)]
    pub servers: DeletionsServers,
}

/// What every command about deletions needs.
#[derive(Debug, Args)]
pub struct DeletionsServers {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub erasure: Erasure,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

const AUDIT_HELP: &str = "\
Examples:
  tidings audit-leaks                                       # tables, and what is published within 10 s
  tidings audit-leaks --file /var/log/tidings.log --metrics 127.0.0.1:8080
  journalctl -u tidings | tidings audit-leaks --no-broker --file -
  tidings audit-leaks --peek orders                         # costs each message in it a delivery";

#[derive(Debug, Args)]
pub struct AuditLeaks {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub amqp: Amqp,
    /// Values to look for, of living users drawn at random.
    #[arg(long, default_value = "200", value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=5_000))]
    pub values: u16,
    /// How long to listen to what is published.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub listen: String,
    /// Do not listen; then no broker is needed, unless to peek.
    #[arg(long)]
    pub no_broker: bool,
    /// A file to look through line by line, such as a log; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    pub file: Vec<String>,
    /// An instance whose metrics to look through.
    #[arg(long, value_name = "IP:PORT")]
    pub metrics: Option<String>,
    /// A queue to look into, up to 1,000 messages. Each is taken out and put back, which counts as a delivery.
    #[arg(long, value_name = "QUEUE")]
    pub peek: Vec<String>,
    /// A table that holds values by right, such as an application's own in the same database.
    #[arg(long, value_name = "TABLE")]
    pub except: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Healthcheck {
    #[command(flatten)]
    pub listen: Listen,
}

#[derive(Debug, Args)]
pub struct Import {
    /// The file, or - for standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub api: Api,
    /// Users sent at once, in up to four requests of up to 500.
    #[arg(long, default_value_t = 1000, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=2000))]
    pub concurrency: u16,
    /// Write every refused line into this file, one JSON object a line. Without: the first 20 are shown.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Begin at this line, counted from 1, whatever the journal says.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub from_line: Option<u64>,
    /// Forget the journal and begin anew. Users of lines that have neither id nor external_id are created a second time.
    #[arg(long, conflicts_with = "from_line")]
    pub restart: bool,
    /// Send nothing; say what is wrong with the lines. With TIDINGS_PROFILE_SCHEMA also what that schema would refuse.
    #[arg(long)]
    pub dry_run: bool,
    /// Make the ids of users that bring only an external_id from this UUID and the external_id. Keep it to yourself: with it, the
    /// external_id can be guessed from the id, which stands in every notice. Without: a random one per journal.
    #[arg(long, value_name = "UUID")]
    pub namespace: Option<String>,
    /// JSON Schema file that decides what a profile may hold, for --dry-run.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE")]
    pub profile_schema: Option<PathBuf>,
}

// Every setting arrives as text, so that all faults are found before any is reported.

#[derive(Debug, Args)]
pub struct Listen {
    /// Address to listen on.
    #[arg(long = "listen", env = "TIDINGS_LISTEN", default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub address: String,
}

#[derive(Debug, Args)]
pub struct Database {
    /// File that holds the URL of the database. The URL itself is given by DATABASE_URL only: the command line is no place for a
    /// password.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE")]
    pub database_url_file: Option<PathBuf>,
}

pub const DEFAULT_EXCHANGE: &str = "masterdata";

/// The API, for commands that are its clients.
#[derive(Debug, Args)]
pub struct Api {
    /// Address of the service.
    #[arg(long = "url", env = "TIDINGS_URL", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub url: String,
    /// File that holds the key to it. The key itself is given by TIDINGS_API_KEY only.
    #[arg(long, env = "TIDINGS_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// PEM file of the certification authorities to trust at an https URL, beside those of this machine.
    #[arg(long, env = "TIDINGS_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Amqp {
    /// File that holds the URL of the broker. The URL itself is given by AMQP_URL only.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE")]
    pub amqp_url_file: Option<PathBuf>,
    /// File that holds the URL of the broker with another user, for all but publishing to the exchange: declaring, reading dead letters,
    /// backfilling. The URL itself is given by AMQP_REGISTRY_URL only. Without either, the user of AMQP_URL does it all.
    #[arg(long, env = "AMQP_REGISTRY_URL_FILE", value_name = "FILE")]
    pub amqp_registry_url_file: Option<PathBuf>,
    /// File of the certificate authorities (PEM) by which a broker at an amqps:// address, and its management API at https://, are
    /// known, beside those of this machine.
    #[arg(long, env = "AMQP_CA_FILE", value_name = "FILE")]
    pub amqp_ca_file: Option<PathBuf>,
    /// Topic exchange to publish to.
    #[arg(long, env = "TIDINGS_EXCHANGE", default_value = DEFAULT_EXCHANGE, value_name = "NAME")]
    pub exchange: String,
    /// Words before every routing key: PREFIX.user.deleted.
    #[arg(long, env = "TIDINGS_ROUTING_KEY_PREFIX", value_name = "PREFIX")]
    pub routing_key_prefix: Option<String>,
}

/// Tokens of the deployment's own identity provider, taken beside keys.
#[derive(Debug, Args)]
pub struct Jwt {
    /// File with the public keys that sign tokens, a JWK set. What is in it at start counts; with it issuer and audience are needed.
    #[arg(long, env = "TIDINGS_JWT_JWKS", value_name = "FILE")]
    pub jwt_jwks: Option<PathBuf>,
    /// Who has to have made a token: its `iss`.
    #[arg(long, env = "TIDINGS_JWT_ISSUER", value_name = "TEXT")]
    pub jwt_issuer: Option<String>,
    /// For whom a token has to be made: its `aud`.
    #[arg(long, env = "TIDINGS_JWT_AUDIENCE", value_name = "TEXT")]
    pub jwt_audience: Option<String>,
    /// The claim that names the client, which has to be one of `tidings client create`.
    #[arg(long, env = "TIDINGS_JWT_CLIENT_CLAIM", default_value = "sub", value_name = "NAME")]
    pub jwt_client_claim: String,
}

impl Jwt {
    /// `None` when it is not set up.
    pub fn tokens(&self, faults: &mut Faults) -> Option<Tokens> {
        let (jwks, issuer, audience) = match (&self.jwt_jwks, &self.jwt_issuer, &self.jwt_audience) {
            (None, None, None) => return None,
            (Some(jwks), Some(issuer), Some(audience)) => (jwks, issuer, audience),
            _ => {
                let rule = "needs TIDINGS_JWT_ISSUER and TIDINGS_JWT_AUDIENCE beside it: all three or none";
                return faults.note("TIDINGS_JWT_JWKS", Err(rule));
            }
        };
        faults.note("TIDINGS_JWT_JWKS", Tokens::pinned(jwks, issuer, audience, &self.jwt_client_claim))
    }
}

/// The broker's management API, which is asked for what AMQP does not tell.
#[derive(Debug, Args)]
pub struct ManagementApi {
    /// File that holds the URL of the broker's management API, https://USER:PASSWORD@HOST:15671. The URL itself is given by
    /// TIDINGS_RABBITMQ_MANAGEMENT_URL only. Without either, unacknowledged messages and unregistered queues are not told.
    #[arg(long, env = "TIDINGS_RABBITMQ_MANAGEMENT_URL_FILE", value_name = "FILE")]
    pub rabbitmq_management_url_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Watching {
    /// A subscription without a consumer for so long is told to be idle.
    #[arg(long, env = "TIDINGS_SUBSCRIPTION_IDLE_AFTER", default_value = "7d", value_name = "DURATION")]
    pub subscription_idle_after: String,
    /// Between two looks at all subscriptions.
    #[arg(long, env = "TIDINGS_SUBSCRIPTION_CHECK_EVERY", default_value = "10s", value_name = "DURATION")]
    pub subscription_check_every: String,
    #[command(flatten)]
    pub api: ManagementApi,
}

#[derive(Debug, Args)]
pub struct Erasure {
    /// How long after a deletion those who were told of it may take to confirm it; then they are late.
    #[arg(long, env = "TIDINGS_ERASURE_DEADLINE", default_value = "24h", value_name = "DURATION")]
    pub erasure_deadline: String,
}

/// What clients may take.
#[derive(Debug, Args)]
pub struct Limits {
    /// Connections at once. Fewer if the limit of open files is lower. At the cap those are ended first that have kept us waiting
    /// longest.
    #[arg(long, env = "TIDINGS_MAX_CONNECTIONS", default_value = "10000", value_name = "NUMBER")]
    pub max_connections: String,
    /// Requests to /v1 under way at once; more are answered 503.
    #[arg(long, env = "TIDINGS_MAX_REQUESTS", default_value = "1024", value_name = "NUMBER")]
    pub max_requests: String,
    /// Requests of one client a second, and at once after a rest; or off. A client may have another (`tidings client create
    /// --rate-limit`). Counted by each instance for itself.
    #[arg(long, env = "TIDINGS_RATE_LIMIT", default_value = "5000/10000", value_name = "PER_SECOND/BURST")]
    pub rate_limit: String,
    /// Proxies whose X-Forwarded-For is believed: addresses or networks. It decides whom wrong keys are held against.
    #[arg(long, env = "TIDINGS_TRUSTED_PROXIES", value_name = "NETWORK", value_delimiter = ',')]
    pub trusted_proxies: Vec<String>,
}

/// How subscriptions are watched.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    pub idle_after: Duration,
    pub check_every: Duration,
}

/// Gathers what is wrong, so that the operator hears of everything at once.
#[derive(Debug, Default)]
pub struct Faults(Vec<String>);

/// All settings that are wrong, each with what would be right.
#[derive(Debug)]
pub struct WrongSettings(Vec<String>);

impl fmt::Display for WrongSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} setting{} wrong", if count == 1 { " is" } else { "s are" })?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for WrongSettings {}

impl Faults {
    /// `outcome`, or a fault of `setting` noted.
    pub fn note<T, E: fmt::Display>(&mut self, setting: &str, outcome: Result<T, E>) -> Option<T> {
        outcome.map_err(|error| self.0.push(format!("{setting}: {error:#}"))).ok()
    }

    /// Ends the gathering.
    ///
    /// # Errors
    /// When anything was noted.
    pub fn none(self) -> Result<(), WrongSettings> {
        if self.0.is_empty() { Ok(()) } else { Err(WrongSettings(self.0)) }
    }
}

impl Database {
    pub fn open(&self, faults: &mut Faults) -> Option<Db> {
        let url = faults.note("DATABASE_URL", secret("DATABASE_URL", self.database_url_file.as_ref()))?;
        faults.note("DATABASE_URL", Db::new(&url))
    }
}

impl Amqp {
    pub fn open(&self, faults: &mut Faults) -> Option<Broker> {
        let url = faults.note("AMQP_URL", secret("AMQP_URL", self.amqp_url_file.as_ref()));
        let uri = url.and_then(|url| faults.note("AMQP_URL", broker::parse_url(&url)));
        let trust = self.amqp_ca_file.as_ref().map_or_else(|| Ok(Trust::default()), Trust::in_file);
        let trust = faults.note("AMQP_CA_FILE", trust);
        let registry = faults.note(REGISTRY_URL, self.registry());
        let Source { exchange, prefix } = self.source(faults)?;
        let broker = Broker::new(uri?, trust?, exchange, prefix);
        Some(match registry? {
            Some(uri) => broker.with_registry(uri),
            None => broker,
        })
    }

    /// What is published to, wherever the broker is.
    pub fn source(&self, faults: &mut Faults) -> Option<Source> {
        let exchange = faults.note("TIDINGS_EXCHANGE", broker::parse_exchange(&self.exchange));
        let prefix = self.routing_key_prefix.as_deref().map(broker::parse_prefix).transpose();
        let prefix = faults.note("TIDINGS_ROUTING_KEY_PREFIX", prefix);
        Some(Source { exchange: exchange?, prefix: prefix? })
    }
}

impl Amqp {
    fn registry(&self) -> anyhow::Result<Option<AMQPUri>> {
        let file = self.amqp_registry_url_file.as_ref();
        if file.is_none() && std::env::var_os(REGISTRY_URL).is_none() {
            return Ok(None);
        }
        let url = secret(REGISTRY_URL, file).map_err(anyhow::Error::msg)?;
        broker::parse_url(&url).map(Some)
    }
}

const REGISTRY_URL: &str = "AMQP_REGISTRY_URL";

impl ManagementApi {
    /// `None` when it is not set up.
    pub fn open(&self, broker: &Broker, faults: &mut Faults) -> Option<Management> {
        let (file, is_set) = (&self.rabbitmq_management_url_file, std::env::var_os(MANAGEMENT_URL).is_some());
        if file.is_none() && !is_set {
            return None;
        }
        let url = faults.note(MANAGEMENT_URL, secret(MANAGEMENT_URL, file.as_ref()))?;
        faults.note(MANAGEMENT_URL, Management::new(&url, broker))
    }
}

impl Api {
    /// Where it is, in one spelling.
    pub fn address(&self, faults: &mut Faults) -> Option<String> {
        faults.note("TIDINGS_URL", import::address(&self.url))
    }

    pub fn trust(&self, faults: &mut Faults) -> Option<Trust> {
        let trust = self.ca_file.as_ref().map_or_else(|| Ok(Trust::default()), Trust::in_file);
        faults.note("TIDINGS_CA_FILE", trust)
    }

    /// `None` when none is set: a service without keys wants none.
    pub fn key(&self, faults: &mut Faults) -> Option<SecretString> {
        if self.api_key_file.is_none() && std::env::var_os(API_KEY).is_none() {
            return None;
        }
        let key = secret(API_KEY, self.api_key_file.as_ref());
        let is_one = |key: &SecretString| key.expose_secret().bytes().all(|byte| byte.is_ascii_graphic());
        let key =
            key.and_then(|key| if is_one(&key) { Ok(key) } else { Err("holds characters that no key has".to_owned()) });
        faults.note(API_KEY, key)
    }
}

const API_KEY: &str = "TIDINGS_API_KEY";

/// What an import needs to begin.
pub struct ImportSettings {
    pub input: Input,
    /// Of the file; unknown for standard input.
    pub size_bytes: Option<u64>,
    pub url: String,
    pub key: Option<SecretString>,
    pub trust: Trust,
    pub concurrency: usize,
    pub namespace: Option<Uuid>,
    /// For a dry run, if one was named.
    pub schema: Option<Schema>,
}

pub enum Input {
    File(PathBuf),
    Stdin,
}

impl Import {
    pub fn parse(&self, faults: &mut Faults) -> Option<ImportSettings> {
        let file = self.file().map_err(|error| format!("cannot read {}: {error}", self.file.display()));
        let file = faults.note("FILE", file);
        let (url, key) = (self.api.address(faults), self.api.key(faults));
        let trust = self.api.trust(faults);
        let namespace = self.namespace.as_deref().map(Uuid::parse_str).transpose();
        let namespace = faults.note("--namespace", namespace.map_err(|_| "expected a UUID"));
        let schema = self.profile_schema.as_deref().filter(|_| self.dry_run);
        let schema =
            schema.map(|file| faults.note("TIDINGS_PROFILE_SCHEMA", Schema::load(Some(file)))).unwrap_or_default();
        let (input, size_bytes) = file?;
        let concurrency = self.concurrency.into();
        let (url, trust, namespace) = (url?, trust?, namespace?);
        Some(ImportSettings { input, size_bytes, url, key, trust, concurrency, namespace, schema })
    }

    fn file(&self) -> std::io::Result<(Input, Option<u64>)> {
        if self.file.as_os_str() == "-" {
            return Ok((Input::Stdin, None));
        }
        let file = fs::File::open(&self.file)?.metadata()?;
        if !file.is_file() {
            return Err(std::io::Error::other("it is no file; give what is piped as -"));
        }
        Ok((Input::File(self.file.clone()), Some(file.len())))
    }
}

const MANAGEMENT_URL: &str = "TIDINGS_RABBITMQ_MANAGEMENT_URL";

impl Watching {
    pub fn parse(&self, faults: &mut Faults) -> Option<Watched> {
        let idle_after = faults.note("TIDINGS_SUBSCRIPTION_IDLE_AFTER", duration(&self.subscription_idle_after));
        // The session that leads the watch ends when nothing was said on it for two minutes.
        let in_time = duration(&self.subscription_check_every)
            .and_then(|every| if every <= LONGEST_CHECK { Ok(every) } else { Err("expected at most 60s") });
        let check_every = faults.note("TIDINGS_SUBSCRIPTION_CHECK_EVERY", in_time);
        Some(Watched { idle_after: idle_after?, check_every: check_every? })
    }

    pub fn management(&self, broker: &Broker, faults: &mut Faults) -> Option<Management> {
        self.api.open(broker, faults)
    }
}

impl Erasure {
    pub fn parse(&self, faults: &mut Faults) -> Option<Duration> {
        faults.note("TIDINGS_ERASURE_DEADLINE", duration(&self.erasure_deadline))
    }
}

const LONGEST_CHECK: Duration = Duration::from_secs(60);

impl Limits {
    pub fn parse(&self, faults: &mut Faults) -> Option<LimitSettings> {
        let connections = faults.note("TIDINGS_MAX_CONNECTIONS", number(&self.max_connections));
        let requests = faults.note("TIDINGS_MAX_REQUESTS", number(&self.max_requests));
        let rate = match self.rate_limit.as_str() {
            "off" => Some(None),
            rate => faults.note("TIDINGS_RATE_LIMIT", rate.parse().map(Some)),
        };
        let proxies = faults.note("TIDINGS_TRUSTED_PROXIES", Proxies::parse(&self.trusted_proxies));
        Some(LimitSettings { connections: connections?, requests: requests?, rate: rate?, proxies: proxies? })
    }
}

/// So many that nobody means it, and few enough for a semaphore.
const LARGEST_NUMBER: usize = 1_000_000;

fn number(text: &str) -> Result<usize, &'static str> {
    let number = text.parse().ok().filter(|number| (1..=LARGEST_NUMBER).contains(number));
    number.ok_or("expected a number from 1 to 1000000")
}

impl Listen {
    pub fn parse(&self, faults: &mut Faults) -> Option<SocketAddr> {
        let address = self.address.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:8080");
        faults.note("TIDINGS_LISTEN", address)
    }
}

impl Serve {
    /// Whether whoever asks may; noted as a fault where others could ask.
    pub fn asks_nobody(&self, address: Option<SocketAddr>, faults: &mut Faults) -> bool {
        if self.insecure_no_auth && address.is_some_and(|address| !address.ip().is_loopback()) {
            let rule = "only with a loopback address in TIDINGS_LISTEN, such as 127.0.0.1:8080";
            faults.note::<(), _>("TIDINGS_INSECURE_NO_AUTH", Err(rule));
        }
        self.insecure_no_auth
    }

    pub fn schema(&self, faults: &mut Faults) -> Option<Schema> {
        faults.note("TIDINGS_PROFILE_SCHEMA", Schema::load(self.profile_schema.as_deref()))
    }
}

/// A time such as `90s`, `10m`, `12h` or `7d`.
///
/// # Errors
/// When it is none, or nothing.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    const WRONG: &str = "expected a number and a unit, such as 30s, 10m, 12h or 7d";
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or(WRONG)?;
    let unit_s = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err(WRONG),
    };
    let number: u32 = number.parse().map_err(|_| WRONG)?;
    if number == 0 { Err(WRONG) } else { Ok(Duration::from_secs(u64::from(number) * unit_s)) }
}

impl Tail {
    pub fn fields(&self, faults: &mut Faults) -> Vec<FieldName> {
        self.fields.iter().filter_map(|name| faults.note("--fields", FieldName::from_str(name))).collect()
    }
}

/// The environment variables that look like settings of ours and are none: a misspelt one would silently be without effect.
pub fn unknown_settings() -> Vec<String> {
    let command = Cli::command();
    let commands = command.get_subcommands().chain([&command]);
    let known: HashSet<&OsStr> =
        commands.flat_map(|command| command.get_arguments().filter_map(|arg| arg.get_env())).collect();
    // Kubernetes describes a service called "tidings" to its pods in variables of these names.
    let kubernetes = |name: &str| ["TIDINGS_PORT", "TIDINGS_SERVICE_"].iter().any(|prefix| name.starts_with(prefix));
    let known = |name: &str| [MANAGEMENT_URL, API_KEY].contains(&name) || known.contains(OsStr::new(name));
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with("TIDINGS_") && !kubernetes(name) && !known(name)).collect()
}

/// A secret from its file, or else from the environment.
fn secret(name: &str, file: Option<&PathBuf>) -> Result<SecretString, String> {
    let text = match file {
        Some(file) => fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?,
        None => {
            std::env::var(name).map_err(|_| format!("is not set; set it, or {name}_FILE to a file that holds it"))?
        }
    };
    let text = text.trim();
    if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.into()) }
}
