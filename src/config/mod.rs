//! Config: the command line and the environment.
//!
//! Promise: everything that is wrong is named at start, all at once, with what would be right.
//! Not here, on purpose: secrets on the command line, where every user of the machine could read them.

mod clients;
mod deletions;
mod faults;
mod import;
mod servers;
mod serving;
mod subscriptions;

pub use clients::{Client, ClientAction, ClientCreate, ClientList, ClientRevoke, ClientRotate};
pub use deletions::{DeletionsAction, DeletionsOverdue, DeletionsServers, DeletionsShow};
pub use faults::{Faults, WrongSettings, duration};
pub use import::{Import, ImportSettings, Input};
pub use servers::{Amqp, Api, DEFAULT_EXCHANGE, Database, Exchange, ManagementApi};
pub use serving::{Connections, Erasure, Jwt, Limits, Listen, Watched, Watching};
pub use subscriptions::{
    BackfillAction, BackfillOf, BackfillResume, BackfillStart, DeadLettersAction, DeadLettersList, DeadLettersPurge,
    DeadLettersRedrive, Subscription, SubscriptionAction, SubscriptionDelete, SubscriptionList, SubscriptionPut,
    SubscriptionRecovered, SubscriptionServers, SubscriptionShow, SubscriptionView,
};

use std::{
    collections::HashSet,
    ffi::OsStr,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, value_parser};
use tidings_sdk::{envelope::FieldName, subscription::BindingKey};

use crate::{
    profile::Schema,
    telemetry::{self, LogFormat, Writing},
};
use deletions::DELETIONS_HELP;
use faults::{named, path, switch};
use import::{IMPORT_HELP, NAMESPACE};
use servers::{API_KEY, MANAGEMENT_URL};

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
    /// Listens, brings the database's schema up to date, and prints one ready line. SIGTERM or Ctrl-C finishes what is under way,
    /// within 20 s; a second one leaves at once.
    #[command(after_help = SERVE_HELP)]
    Serve(Box<Serve>),
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

/// No line of an example is wider than a terminal mostly is: clap would break it, and what is pasted would be two commands.
const SERVE_HELP: &str = "\
Examples:
  DATABASE_URL=postgres://tidings@localhost/tidings AMQP_URL=amqp://localhost \\
    tidings serve
  DATABASE_URL_FILE=/run/secrets/db AMQP_URL_FILE=/run/secrets/amqp \\
    tidings serve --listen 0.0.0.0:8080
  tidings serve --no-relay      # and `tidings relay` elsewhere";

const TAIL_HELP: &str = "\
Examples:
  tidings tail                                  # everything
  tidings tail user.created user.deleted        # two routing keys
  tidings tail 'user.*'                         # a pattern of a topic exchange
  tidings tail --fields job_title,company       # only changes of these fields
  tidings tail --fields job_title user.deleted  # the same, and deletions";

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
    /// How to log: text, for people, or json, an object a line, for machines.
    #[arg(long, env = "TIDINGS_LOG_FORMAT", default_value = "text", global = true, value_name = "FORMAT")]
    pub log_format: String,
}

impl LogSettings {
    /// Starts the log; in text, where it is not known how.
    pub fn start(&self, writing: Writing, faults: &mut Faults) {
        let format = faults.note("TIDINGS_LOG_FORMAT", LogFormat::from_str(&self.log_format));
        faults.note("TIDINGS_LOG", telemetry::start(&self.log, format.unwrap_or(LogFormat::Text), writing));
    }
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
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE", value_parser = path())]
    pub profile_schema: Option<PathBuf>,
    #[command(flatten)]
    pub watching: Watching,
    #[command(flatten)]
    pub management: ManagementApi,
    #[command(flatten)]
    pub erasure: Erasure,
    #[command(flatten)]
    pub limits: Limits,
    /// Leave the relaying to `tidings relay` elsewhere; then no broker is needed here.
    #[arg(long, env = "TIDINGS_NO_RELAY", action = ArgAction::SetTrue, value_parser = value_parser!(String))]
    no_relay: String,
    /// Take no change of a living user without If-Match: 428 otherwise.
    #[arg(long, env = "TIDINGS_REQUIRE_IF_MATCH", action = ArgAction::SetTrue, value_parser = value_parser!(String))]
    require_if_match: String,
    /// Ask nobody for a key. Only on a loopback address, where none but users of this machine can reach it.
    #[arg(long, env = "TIDINGS_INSECURE_NO_AUTH", action = ArgAction::SetTrue, value_parser = value_parser!(String))]
    insecure_no_auth: String,
    #[command(flatten)]
    pub jwt: Jwt,
    /// Do not migrate at start; run `tidings migrate` before.
    #[arg(long, env = "TIDINGS_NO_MIGRATE", action = ArgAction::SetTrue, value_parser = value_parser!(String))]
    no_migrate: String,
}

impl Serve {
    /// Whether whoever asks may; noted as a fault where others could ask.
    pub fn asks_nobody(&self, address: Option<SocketAddr>, faults: &mut Faults) -> bool {
        let asks_nobody = faults.note("TIDINGS_INSECURE_NO_AUTH", switch(&self.insecure_no_auth)).unwrap_or_default();
        if asks_nobody && address.is_some_and(|address| !address.ip().is_loopback()) {
            let rule = "only with a loopback address in TIDINGS_LISTEN, such as 127.0.0.1:8080";
            faults.note::<(), _>("TIDINGS_INSECURE_NO_AUTH", Err(rule));
        }
        asks_nobody
    }

    /// Whether it relays too. Who meant to say so and failed mostly wants no broker, and is not told that none is named; only what is wrong
    /// with one that is.
    pub fn relays(&self, faults: &mut Faults) -> bool {
        let no_relay = faults.note("TIDINGS_NO_RELAY", switch(&self.no_relay));
        no_relay.map_or_else(|| self.amqp.exchange.is_set(), |no_relay| !no_relay)
    }

    pub fn requires_if_match(&self, faults: &mut Faults) -> bool {
        faults.note("TIDINGS_REQUIRE_IF_MATCH", switch(&self.require_if_match)).unwrap_or_default()
    }

    pub fn migrates(&self, faults: &mut Faults) -> bool {
        faults.note("TIDINGS_NO_MIGRATE", switch(&self.no_migrate)).is_some_and(|no_migrate| !no_migrate)
    }
}

/// The profile schema in `file`, or the built-in one.
pub fn schema(file: Option<&Path>, faults: &mut Faults) -> Option<Schema> {
    let file = faults.note("TIDINGS_PROFILE_SCHEMA", file.map(named).transpose())?;
    faults.note("TIDINGS_PROFILE_SCHEMA", Schema::load(file))
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
    pub connections: Connections,
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
    keys: Vec<String>,
    /// Only profile.updated, and only when one of these fields changed.
    #[arg(long, value_name = "FIELD", value_delimiter = ',')]
    fields: Vec<String>,
    #[command(flatten)]
    pub amqp: Amqp,
}

impl Tail {
    /// Those of some notice: for another it would listen for ever.
    pub fn keys(&self, faults: &mut Faults) -> Vec<BindingKey> {
        self.keys.iter().filter_map(|key| faults.note("KEY", key.parse())).collect()
    }

    pub fn fields(&self, faults: &mut Faults) -> Vec<FieldName> {
        self.fields.iter().filter_map(|name| faults.note("--fields", FieldName::from_str(name))).collect()
    }
}

const AUDIT_HELP: &str = "\
Examples:
  tidings audit-leaks                # tables, and what is published within 10 s
  tidings audit-leaks --file /var/log/tidings.log --metrics 127.0.0.1:8080
  journalctl -u tidings | tidings audit-leaks --no-broker --file -
  tidings audit-leaks --peek orders  # costs each message in it a delivery";

#[derive(Debug, Args)]
pub struct AuditLeaks {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub exchange: Exchange,
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

/// The environment variables that look like settings of ours and are none: a misspelt one would silently be without effect.
pub fn unknown_settings() -> Vec<String> {
    let command = Cli::command();
    let commands = command.get_subcommands().chain([&command]);
    let known: HashSet<&OsStr> =
        commands.flat_map(|command| command.get_arguments().filter_map(|arg| arg.get_env())).collect();
    // Kubernetes describes a service called "tidings" to its pods in variables of these names.
    let kubernetes = |name: &str| ["TIDINGS_PORT", "TIDINGS_SERVICE_"].iter().any(|prefix| name.starts_with(prefix));
    let known = |name: &str| [MANAGEMENT_URL, API_KEY, NAMESPACE].contains(&name) || known.contains(OsStr::new(name));
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with("TIDINGS_") && !kubernetes(name) && !known(name)).collect()
}
