//! `tidings subscription`, with its dead letters and backfills.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Amqp, Database, ManagementApi, faults::path};

#[derive(Debug, Args)]
#[command(arg_required_else_help = true, after_help = SUBSCRIPTION_HELP)]
pub struct Subscription {
    #[command(subcommand)]
    pub action: SubscriptionAction,
}

const SUBSCRIPTION_HELP: &str = "\
Examples:
  tidings subscription put orders --key user.deleted --field address \\
    --owner team-orders --purpose 'cancels pending orders'
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

/// Where subscriptions are: registered, and declared.
#[derive(Debug, Args)]
pub struct SubscriptionServers {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub amqp: Amqp,
}

/// What a command needs that shows subscriptions.
#[derive(Debug, Args)]
pub struct SubscriptionView {
    #[command(flatten)]
    pub servers: SubscriptionServers,
    #[command(flatten)]
    pub management: ManagementApi,
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
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE", value_parser = path())]
    pub profile_schema: Option<PathBuf>,
    #[command(flatten)]
    pub view: SubscriptionView,
}

#[derive(Debug, Args)]
pub struct SubscriptionList {
    #[command(flatten)]
    pub view: SubscriptionView,
}

#[derive(Debug, Args)]
pub struct SubscriptionShow {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub view: SubscriptionView,
}

#[derive(Debug, Args)]
pub struct SubscriptionRecovered {
    /// Name of the subscription.
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub database: Database,
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
    pub database: Database,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
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
    pub database: Database,
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
    pub database: Database,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
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
