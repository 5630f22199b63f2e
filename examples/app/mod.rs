//! What the example applications have in common: where things are, and how to leave.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use anyhow::Context;
use sqlx::{PgPool, postgres::PgPoolOptions};
use tidings_sdk::{consumer::Consumer, owner::Owner, subscription::Subscription, topology::Source, trust::Trust};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn setting(name: &str) -> anyhow::Result<String> {
    std::env::var(name)
        .with_context(|| format!("{name} is not set; `./dev app NAME ..` sets it for the servers of ./dev run"))
}

/// The owner of the users, `TIDINGS_URL` (which `TIDINGS_CA_FILE` may help to know), asked with the key `TIDINGS_API_KEY`, or the one in the file `TIDINGS_API_KEY_FILE`, which can be
/// replaced meanwhile.
pub fn owner() -> anyhow::Result<Owner> {
    let owner = Owner::at(&setting("TIDINGS_URL")?).context("TIDINGS_URL")?.trusting(&trust("TIDINGS_CA_FILE")?)?;
    if let Some(file) = std::env::var_os("TIDINGS_API_KEY_FILE") {
        return owner.with_key_file(file).context("TIDINGS_API_KEY_FILE");
    }
    owner.with_key(&setting("TIDINGS_API_KEY")?).context("TIDINGS_API_KEY")
}

/// The certificate authorities in the file of this setting, where there is one.
fn trust(setting: &'static str) -> anyhow::Result<Trust> {
    std::env::var_os(setting).map_or_else(|| Ok(Trust::default()), |file| Trust::in_file(file).context(setting))
}

/// The application's own database, `APP_DATABASE_URL`, with its tables.
pub async fn database(tables: &'static str) -> anyhow::Result<PgPool> {
    let url = setting("APP_DATABASE_URL")?;
    let options = PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(3));
    let pool = options.connect(&url).await.context("APP_DATABASE_URL cannot be reached")?;
    sqlx::raw_sql(tables).execute(&pool).await.context("the tables cannot be created")?;
    Ok(pool)
}

/// What wakes an application. `TIDINGS_SUBSCRIPTION` gives it another name, for a second instance that is to hear everything too.
pub fn subscription(name: &str, keys: &[&str], fields: &[&str]) -> anyhow::Result<Subscription> {
    let name = std::env::var("TIDINGS_SUBSCRIPTION").unwrap_or_else(|_| name.to_owned());
    let mut subscription = Subscription::new(name.parse().context("TIDINGS_SUBSCRIPTION")?);
    for key in keys {
        subscription.keys.insert(key.parse()?);
    }
    for field in fields {
        subscription.fields.insert(field.parse()?);
    }
    Ok(subscription)
}

/// A consumer of the broker at `AMQP_URL`, which `AMQP_CA_FILE` may help to know.
pub fn consumer(subscription: Subscription, owner: Owner) -> anyhow::Result<Consumer> {
    let exchange = std::env::var("TIDINGS_EXCHANGE").unwrap_or_else(|_| "masterdata".to_owned());
    let source = Source { exchange, prefix: std::env::var("TIDINGS_ROUTING_KEY_PREFIX").ok() };
    Ok(Consumer::new(&setting("AMQP_URL")?, source, subscription, owner)?.trusting(trust("AMQP_CA_FILE")?))
}

/// Cancelled by SIGTERM or Ctrl-C.
pub fn stop() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}

/// Says what goes on, on stderr; in colours to who reads it there.
pub fn log() {
    let log = tracing_subscriber::fmt().with_writer(stderr).with_ansi(stderr().is_terminal());
    log.with_env_filter("info,lapin=off").init();
}
