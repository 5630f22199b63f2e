//! Config: the command line and the environment.
//!
//! Promise: everything that is wrong is named at start, all at once, with what would be right.
//! Not here, on purpose: secrets on the command line, where every user of the machine could read them.

use std::{collections::HashSet, ffi::OsStr, fmt, fs, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, CommandFactory, Parser, Subcommand};
use secrecy::SecretString;
use tidings_sdk::envelope::FieldName;

use crate::{
    broker::{self, Broker},
    db::Db,
    profile::Schema,
    subscriptions::Management,
    telemetry::LogFormat,
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
    /// Who listens to what: register, list, show and delete subscriptions.
    ///
    /// Works on the database and the broker directly; no service needs to run.
    Subscription(Subscription),
    /// Print the OpenAPI document.
    Openapi,
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
    /// Leave the relaying to `tidings relay` elsewhere; then no broker is needed here.
    #[arg(long, env = "TIDINGS_NO_RELAY")]
    pub no_relay: bool,
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

#[derive(Debug, Args)]
pub struct Healthcheck {
    #[command(flatten)]
    pub listen: Listen,
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

#[derive(Debug, Args)]
pub struct Amqp {
    /// File that holds the URL of the broker. The URL itself is given by AMQP_URL only.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE")]
    pub amqp_url_file: Option<PathBuf>,
    /// Topic exchange to publish to.
    #[arg(long, env = "TIDINGS_EXCHANGE", default_value = "masterdata", value_name = "NAME")]
    pub exchange: String,
    /// Words before every routing key: PREFIX.user.deleted.
    #[arg(long, env = "TIDINGS_ROUTING_KEY_PREFIX", value_name = "PREFIX")]
    pub routing_key_prefix: Option<String>,
}

/// The broker's management API, which is asked for what AMQP does not tell.
#[derive(Debug, Args)]
pub struct ManagementApi {
    /// File that holds the URL of the broker's management API, http://USER:PASSWORD@HOST:15672. The URL itself is given by
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
        let exchange = faults.note("TIDINGS_EXCHANGE", broker::parse_exchange(&self.exchange));
        let prefix = self.routing_key_prefix.as_deref().map(broker::parse_prefix).transpose();
        let prefix = faults.note("TIDINGS_ROUTING_KEY_PREFIX", prefix);
        Some(Broker::new(uri?, exchange?, prefix?))
    }
}

impl ManagementApi {
    /// `None` when it is not set up.
    pub fn open(&self, broker: &Broker, faults: &mut Faults) -> Option<Management> {
        let (file, is_set) = (&self.rabbitmq_management_url_file, std::env::var_os(MANAGEMENT_URL).is_some());
        if file.is_none() && !is_set {
            return None;
        }
        let url = faults.note(MANAGEMENT_URL, secret(MANAGEMENT_URL, file.as_ref()))?;
        faults.note(MANAGEMENT_URL, Management::new(&url, broker.vhost(), broker.exchange()))
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

const LONGEST_CHECK: Duration = Duration::from_secs(60);

impl Listen {
    pub fn parse(&self, faults: &mut Faults) -> Option<SocketAddr> {
        let address = self.address.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:8080");
        faults.note("TIDINGS_LISTEN", address)
    }
}

impl Serve {
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
    let known = |name: &str| name == MANAGEMENT_URL || known.contains(OsStr::new(name));
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
