//! Database: how this service reaches Postgres.
//!
//! Promise: every connection has deadlines on both sides, and none is handed on in an unknown state.
//! Not here, on purpose: SQL of a feature, and a pool behind request handlers. A handler's future dies with its
//! client, and a pool then lends out what it left behind; work on a [`Line`] runs in the task that owns it.

use std::{net::IpAddr, time::Duration};

use anyhow::Context;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool, Row,
    error::DatabaseError,
    migrate::{Migrate, MigrateError, Migrator},
    postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions, PgSeverity, PgSslMode},
};
use tokio::time::timeout;
use url::Url;

use crate::telemetry::with_causes;

mod rights;
mod server_log;

pub use rights::{API_ROLE, LACKING, RELAY_ROLE};
pub use server_log::SETTINGS as SERVER_LOG_SETTINGS;

/// Until a new connection stands. An API that cannot have one in this time says 503 rather than wait on.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Until a statement has answered, seen from here: past the server's own `statement_timeout`, so that it only fires on a
/// network that swallows packets.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(8);

/// For a connection that comes back, to its pool or after a refusal, to show that it lives. What was still under way on it the server
/// has ended by then.
const RETURN_DEADLINE: Duration = Duration::from_secs(1);

/// The manners of every session, whatever role and database say.
const MANNERS: [(&str, &str); 5] = [
    ("statement_timeout", "5s"),
    // Rows are locked for milliseconds, by another instance's batch. Longer is somebody's forgotten transaction, and only the
    // changes of that one row should fail for it.
    ("lock_timeout", "1s"),
    ("idle_in_transaction_session_timeout", "10s"),
    // Sessions rest for as long as nobody asks. A leader sets its own.
    ("idle_session_timeout", "0"),
    // Names mean our tables, never something put before them.
    ("search_path", "public,pg_temp"),
];

/// The server's side of a connection on which nothing is said, in seconds (and milliseconds, the last). A firewall or balancer forgets one
/// after some minutes, the quickest in use after four, and swallows what is said on it then: a sign of life each minute keeps it. A peer
/// that is gone without a word is let go within a minute and a half, with its locks. Linux goes by the last alone if it is shorter than
/// the others together, and would then end a session for one lost packet. No part of this holds on a unix socket, or has to.
const SIGNS_OF_LIFE: [(&str, &str); 4] = [
    ("tcp_keepalives_idle", "60"),
    ("tcp_keepalives_interval", "10"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "90000"),
];

/// For sessions whose commits nobody has to find again after a failover: they wait for no synchronous standby.
pub const LOCALLY: [(&str, &str); 1] = [("synchronous_commit", "local")];

/// Who waits for a lock on a table holds up every statement behind it.
const TABLE_PATIENCE: &str = "5s";

/// How long a session waits for locks from now on.
pub const SET_LOCK_TIMEOUT: &str = "select set_config('lock_timeout', $1, false)";

/// The versions of the schema that were applied.
pub const APPLIED: &str = "
select version
  from _sqlx_migrations
 order by version
";

/// What a crash of the server would take with it: commits that were not on the disk yet, or a page that was torn as it was written.
pub const FORGETS: &str = "
select name
  from pg_settings
 where name in ('fsync', 'full_page_writes', 'synchronous_commit')
   and setting = 'off'
 order by name
";

/// Which of these settings a session has otherwise.
pub const OTHERWISE: &str = "
select name
  from unnest($1::text[], $2::text[]) as wanted (name, value)
 where current_setting(name) <> value
 order by name
";

/// Whether the server only follows another one (a standby).
pub const FOLLOWS: &str = "select pg_is_in_recovery()";

/// How many sessions of this one's purpose have been waiting, for longer than a statement may take, for a standby to confirm a commit
/// (`synchronous_standby_names`). The server waits for ever, and does not notice that nobody waits for it any more.
pub const WAITING_FOR_A_STANDBY: &str = "
select count(*)
  from pg_stat_activity
 where wait_event = 'SyncRep'
   and query_start < clock_timestamp() - interval '5 s'
   and application_name = current_setting('application_name')
   and datname = current_database()
";

/// Whether the session is in no transaction, which would have begun with an earlier statement.
pub const IS_FREE: &str = "select now() = statement_timestamp()";

/// Where the database is, and the manners of every session there.
#[derive(Clone)]
pub struct Db {
    options: PgConnectOptions,
}

/// Why a statement has no result.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// No connection: nothing was sent. Nobody is there, or nobody is let in.
    #[error("no connection to the database")]
    Unreachable(#[source] anyhow::Error),
    /// The database refused the statement and rolled it back. The SQLSTATE and the constraint's name are all we keep of it: message
    /// and detail of a database error quote the row, and with it a user's values.
    #[error("the database refused a statement (SQLSTATE {code})")]
    Refused { code: String, constraint: Option<String> },
    /// The connection broke, or fell silent, while the statement was under way: it may have been committed.
    #[error("the connection to the database broke before it answered")]
    Broken(#[source] anyhow::Error),
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(refusal) => {
                let code = refusal.code().unwrap_or_default().into_owned();
                if ends_in_doubt(&code, ends_the_session(&*refusal)) {
                    Self::Broken(anyhow::anyhow!("the database ended the session (SQLSTATE {code})"))
                } else if is_about_connecting(&code) {
                    Self::Unreachable(turned_away(&*refusal))
                } else {
                    Self::Refused { code, constraint: refusal.constraint().map(str::to_owned) }
                }
            }
            sqlx::Error::PoolTimedOut => Self::Unreachable(error.into()),
            other => Self::Broken(other.into()),
        }
    }
}

/// Whether a refusal is of no statement but of who asks (class 28), or for what database (3D): a pool dials when it is asked.
fn is_about_connecting(code: &str) -> bool {
    code.starts_with("28") || code.starts_with("3D")
}

/// Why the database lets nobody in. Its words name a role, a database or an address, and no row is at hand that they could quote.
fn turned_away(refusal: &dyn DatabaseError) -> anyhow::Error {
    anyhow::anyhow!("{} (SQLSTATE {})", refusal.message(), refusal.code().unwrap_or_default())
}

fn ends_the_session(refusal: &dyn DatabaseError) -> bool {
    let refusal = refusal.try_downcast_ref::<PgDatabaseError>();
    refusal.is_some_and(|refusal| matches!(refusal.severity(), PgSeverity::Fatal | PgSeverity::Panic))
}

/// Whether a session ended with this refusal, and a commit that was under way may have been made: on a disk that fails (58030) or is full
/// (53100) it is in the log already, and stands after the recovery. Poolers do not always say that the session is over: classes 57P
/// (shutdown, crash, terminated) and 08 (connection) mean it.
fn ends_in_doubt(code: &str, ends_the_session: bool) -> bool {
    // Who said nothing for too long was not listened to any more, and who was not let in (class 28, 3D, 53300) said nothing.
    let nothing_was_done = ["25P03", "57P05", "28", "3D", "53300"].iter().any(|class| code.starts_with(class));
    let is_over = ends_the_session || code.starts_with("57P") || code.starts_with("08");
    is_over && !nothing_was_done
}

/// The SQLSTATE of a statement that waited in vain for a lock.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// And of one for which the session's role lacks a right.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

fn is_of_a_lock(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(DatabaseError::code).is_some_and(|code| code == LOCK_NOT_AVAILABLE)
}

impl Trouble {
    /// What is wrong, with its causes, for the log. Holds no user's value.
    pub fn report(&self) -> String {
        match self {
            Self::Unreachable(cause) | Self::Broken(cause) => format!("{self}: {}", with_causes(cause)),
            Self::Refused { constraint: Some(constraint), .. } => format!("{self}: {constraint}"),
            Self::Refused { constraint: None, .. } => self.to_string(),
        }
    }

    /// Of a refusal that is mostly a step of an upgrade that was left out: that step.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            // What is asked for is not there.
            Self::Refused { code, .. } if code == "42P01" || code == "42703" => Some(MIGRATE),
            Self::Refused { code, .. } if code == INSUFFICIENT_PRIVILEGE => Some(GRANT),
            _ => None,
        }
    }

    /// What can be done about it by the operator whose command it ended.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Refused { code, .. } if code == INSUFFICIENT_PRIVILEGE => {
                "this role may not: `tidings client` is for tidings_owner, other commands are for tidings_api; deploy/postgres-grants.sql \
                 gives their rights, after each migration"
            }
            _ => "is the database up, and migrated? `tidings migrate`",
        }
    }

    /// Whether the statement waited in vain for what somebody else holds: a table, or a row.
    pub fn is_of_a_lock(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == LOCK_NOT_AVAILABLE)
    }

    /// Whether the statement broke this constraint.
    pub fn broke(&self, name: &str) -> bool {
        matches!(self, Self::Refused { constraint: Some(constraint), .. } if constraint == name)
    }
}

/// Runs a query outside the hot paths in a task of its own, within the deadline: a client that hangs up must not take a borrowed
/// connection down with it.
pub async fn ask<T: Send + 'static>(
    query: impl Future<Output = sqlx::Result<T>> + Send + 'static,
) -> Result<T, Trouble> {
    match tokio::spawn(timeout(ANSWER_DEADLINE, query)).await {
        Ok(Ok(outcome)) => Ok(outcome?),
        Ok(Err(_)) => Err(Trouble::Broken(anyhow::anyhow!("no answer within {ANSWER_DEADLINE:?}"))),
        Err(panicked) => Err(Trouble::Broken(panicked.into())),
    }
}

impl Db {
    /// # Errors
    /// When `url` is no Postgres URL. The URL is not repeated: it holds a password.
    pub fn new(url: &SecretString) -> anyhow::Result<Self> {
        let url = url.expose_secret();
        // sqlx would take a URL of any scheme, and what belongs to another database, for one of Postgres.
        let is_ours = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
        let options: Option<PgConnectOptions> = url.parse().ok().filter(|_| is_ours);
        let options = options.context(
            "expected postgres://USER:PASSWORD@HOST/DATABASE, and for TLS ?sslmode=verify-full&sslrootcert=FILE behind it",
        )?;
        Ok(Self {
            options: options
                .application_name("tidings")
                .options(MANNERS)
                .options(SIGNS_OF_LIFE)
                .disable_statement_logging(),
        })
    }

    /// Whether what is said travels in the clear, or to whoever claims to be the database, beyond this machine.
    pub fn is_overheard(&self) -> bool {
        let stays_here = self.options.get_socket().is_some() || is_loopback(self.options.get_host());
        !stays_here && !matches!(self.options.get_ssl_mode(), PgSslMode::VerifyFull)
    }

    /// A line of this purpose's own; `settings` are session settings on top of the common ones.
    pub fn line<const N: usize>(&self, purpose: &str, settings: [(&str, &str); N]) -> Line {
        let options = self.options.clone().application_name(&format!("tidings {purpose}")).options(settings);
        Line { options, connection: None }
    }

    /// A small pool for queries outside the hot paths (list, health, metrics), each in a task of its own; `settings` as for a line.
    pub fn pool<const N: usize>(&self, purpose: &str, connections: u32, settings: [(&str, &str); N]) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .min_connections(0)
            .acquire_timeout(CONNECT_DEADLINE)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    refuse_useless(connection, i64::from(connections)).await?;
                    refuse_forgetful(connection).await
                })
            })
            // The pool asks whoever comes back whether it lives, and keeps its place for it however long it says nothing: on a network
            // that swallows packets a quarter of an hour. So it is asked here first, within a deadline; an error drops it at once.
            .after_release(|connection, _| {
                Box::pin(async move {
                    let free = timeout(RETURN_DEADLINE, is_free(connection)).await;
                    free.unwrap_or(Err(sqlx::Error::PoolTimedOut))
                })
            })
            .connect_lazy_with(self.options.clone().application_name(&format!("tidings {purpose}")).options(settings))
    }

    /// Options for a session that sqlx manages itself (LISTEN).
    pub fn listener_pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(CONNECT_DEADLINE)
            .connect_lazy_with(self.options.clone().application_name("tidings listener"))
    }

    /// Brings the schema up to this binary's. Safe from several instances at once: one migrates, and the others wait for it.
    ///
    /// # Errors
    /// A [`Trouble`] when the database cannot be reached, or somebody holds a table for longer than a session's patience.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        let mut connection = self.maintenance("migrate").await?;
        wait_for_turn(&mut connection).await.context("the lock of the migrations cannot be had")?;
        migrations().run(&mut connection).await.map_err(not_migrated)?;
        Ok(connection.close().await?)
    }

    /// Refuses a database on which a step of the upgrade to this binary was left out: statements on what is not there, or not allowed, would
    /// fail one after the other. `acts_as`: the roles whose rights this process needs.
    ///
    /// # Errors
    /// When a migration or a right is missing, or the database does not tell.
    pub async fn check_upgraded(&self, acts_as: &[&str]) -> anyhow::Result<()> {
        let mut connection = self.maintenance("schema check").await?;
        let applied: Vec<i64> =
            sqlx::query_scalar(APPLIED).fetch_all(&mut connection).await.map_err(Trouble::from).map_err(explained)?;
        let missing = migrations().iter().filter(|migration| !applied.contains(&migration.version)).count();
        anyhow::ensure!(missing == 0, "the database lacks {missing} of this version's migrations\n{MIGRATE}");
        let lacking =
            rights::lacking(&mut connection, acts_as).await.map_err(Trouble::from).map_err(explained)?.join(", ");
        anyhow::ensure!(lacking.is_empty(), "the database does not give this process {lacking}\n{GRANT}");
        Ok(connection.close().await?)
    }

    /// A connection for work on the whole database, which takes as long as it takes.
    pub async fn maintenance(&self, purpose: &str) -> Result<PgConnection, Trouble> {
        let options = self
            .options
            .clone()
            .application_name(&format!("tidings {purpose}"))
            .options([("statement_timeout", "0"), ("lock_timeout", TABLE_PATIENCE)]);
        connect(&options).await
    }

    /// What the server would write into its log of users' values, a line for each setting. Nothing when it cannot be asked.
    pub async fn told_to_the_log(&self) -> Vec<String> {
        let look = async {
            let mut connection = connect(&self.options).await?;
            let found = server_log::tells(&mut connection).await.map_err(Trouble::from)?;
            // Whoever looked has seen it; the session ends either way.
            drop(connection.close().await);
            Ok::<_, Trouble>(found)
        };
        look.await.unwrap_or_default()
    }

    /// Refuses a database that forgets what it acknowledged, or whose sessions have other manners than ours: on those no deadline holds, and
    /// a leader that is frozen is never replaced.
    ///
    /// # Errors
    /// When `fsync`, `full_page_writes` or `synchronous_commit` is off, a setting of a session does not arrive, or the database cannot be
    /// reached.
    pub async fn check_durability(&self) -> anyhow::Result<()> {
        let mut connection = connect(&self.options).await?;
        if let Some(forgets) = forgets(&mut connection).await.map_err(Trouble::from)? {
            anyhow::bail!("{forgets}");
        }
        let (names, values) = MANNERS.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
        let otherwise: Vec<String> = sqlx::query_scalar(OTHERWISE)
            .bind(names)
            .bind(values)
            .fetch_all(&mut connection)
            .await
            .map_err(Trouble::from)?;
        anyhow::ensure!(
            otherwise.is_empty(),
            "the sessions of the database do not take {}\nhint: a pooler before it ignores the startup parameter `options`; connect directly",
            otherwise.join(", ")
        );
        Ok(connection.close().await?)
    }
}

/// This version's. What a later one added is no obstacle: it only adds, so that the version before goes on beside it, and after a rollback.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!();
    migrations.set_ignore_missing(true);
    migrations
}

/// Takes the advisory lock that sqlx takes for migrations, which a session may hold twice, for as long as this session lives. Whoever has it
/// may migrate for hours; the patience of a session is for tables.
async fn wait_for_turn(connection: &mut PgConnection) -> Result<(), MigrateError> {
    sqlx::query(SET_LOCK_TIMEOUT).bind("0").execute(&mut *connection).await?;
    {
        let mut turn = connection.lock();
        match timeout(Duration::from_secs(1), &mut turn).await {
            Ok(taken) => taken?,
            Err(_) => {
                tracing::warn!("another instance migrates the database: waiting for it");
                turn.await?;
            }
        }
    }
    sqlx::query(SET_LOCK_TIMEOUT).bind(TABLE_PATIENCE).execute(connection).await?;
    Ok(())
}

/// A table that somebody holds is trouble that passes; a migration that fails otherwise fails for good.
fn not_migrated(error: MigrateError) -> anyhow::Error {
    use sqlx::Error::Database;
    match error {
        MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _) if is_of_a_lock(&cause) => {
            Trouble::from(cause).into()
        }
        // Also on a schema that is up to date: the table of the migrations would be made if there were none.
        MigrateError::Execute(Database(refusal)) | MigrateError::ExecuteMigration(Database(refusal), _)
            if refusal.code().is_some_and(|code| code == INSUFFICIENT_PRIVILEGE) =>
        {
            anyhow::anyhow!("the migrations did not complete: {}\n{LEAVE_TO_THE_OWNER}", turned_away(&*refusal))
        }
        error => anyhow::Error::from(error).context("the migrations did not complete"),
    }
}

const MIGRATE: &str = "hint: `tidings migrate` as the owner of the tables, then deploy/postgres-grants.sql";
const LEAVE_TO_THE_OWNER: &str =
    "hint: `tidings migrate` is for tidings_owner; with TIDINGS_NO_MIGRATE=true `serve` leaves the schema as it is";
const GRANT: &str = "hint: this role lacks rights; deploy/postgres-grants.sql gives them, after each migration";

/// A refusal that is mostly a step of an upgrade that was left out, with that step.
pub fn explained(trouble: Trouble) -> anyhow::Error {
    match trouble.hint() {
        Some(hint) => anyhow::anyhow!("{}\n{hint}", trouble.report()),
        None => trouble.into(),
    }
}

/// Ends a pool, within bounds: a server that does not answer holds up no leaving.
pub async fn close(pool: &PgPool) {
    let _ = timeout(RETURN_DEADLINE, pool.close()).await;
}

/// Whether a host is this machine.
pub fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Whether what is said at this URL travels in the clear, to somewhere else than this machine.
pub fn is_overheard(url: &Url) -> bool {
    url.scheme() == "http" && !url.host_str().is_some_and(is_loopback)
}

/// For what is asked or done once.
async fn connect(options: &PgConnectOptions) -> Result<PgConnection, Trouble> {
    dial(async {
        let mut connection = options.connect().await?;
        refuse_useless(&mut connection, 1).await?;
        Ok(connection)
    })
    .await
}

/// For a service, which goes on for as long as the session does.
async fn connect_to_serve(options: &PgConnectOptions) -> Result<PgConnection, Trouble> {
    dial(async {
        let mut connection = options.connect().await?;
        refuse_useless(&mut connection, 1).await?;
        refuse_forgetful(&mut connection).await?;
        Ok(connection)
    })
    .await
}

async fn dial(dialled: impl Future<Output = sqlx::Result<PgConnection>>) -> Result<PgConnection, Trouble> {
    // In a box: it is large and rare, and part of each statement's future.
    match timeout(CONNECT_DEADLINE, Box::pin(dialled)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(sqlx::Error::Database(refusal))) => Err(Trouble::Unreachable(turned_away(&*refusal))),
        Ok(Err(error)) => Err(Trouble::Unreachable(error.into())),
        Err(_) => Err(Trouble::Unreachable(anyhow::anyhow!("no answer within {CONNECT_DEADLINE:?}"))),
    }
}

/// Why what a session is told to keep may be gone after a crash, if it may.
async fn forgets(connection: &mut PgConnection) -> sqlx::Result<Option<String>> {
    let off: Vec<String> = sqlx::query_scalar(FORGETS).persistent(false).fetch_all(connection).await?;
    let names = off.join(" and ");
    Ok((!off.is_empty()).then(|| {
        format!(
            "the database has {names} off, so a crash would lose changes that were answered; turn it on for this role and server"
        )
    }))
}

/// Refuses a server that forgets what it acknowledges. At the start it was not so; but settings change, and after a failover they are another
/// server's.
async fn refuse_forgetful(connection: &mut PgConnection) -> sqlx::Result<()> {
    forgets(connection).await?.map_or(Ok(()), |forgets| Err(sqlx::Error::Configuration(forgets.into())))
}

/// Refuses a server whose answers are old, or that keeps nothing while so many of this purpose's sessions wait: ended by us they would be
/// committed without the standby, and followed by more they would use up the server's connections.
async fn refuse_useless(connection: &mut PgConnection, waiting: i64) -> sqlx::Result<()> {
    // While a failover goes on, the address may still lead to the server that led before.
    let follows: bool = sqlx::query_scalar(FOLLOWS).persistent(false).fetch_one(&mut *connection).await?;
    if follows {
        return Err(sqlx::Error::Configuration("the database server only follows another one (a standby)".into()));
    }
    let now_waiting: i64 = sqlx::query_scalar(WAITING_FOR_A_STANDBY).persistent(false).fetch_one(connection).await?;
    if now_waiting >= waiting {
        return Err(sqlx::Error::Configuration(
            "commits wait for a synchronous standby that does not confirm them".into(),
        ));
    }
    Ok(())
}

/// Whether a session that comes back is in no transaction: sqlx (0.9) hands on what a BEGIN left that was given up at the deadline.
async fn is_free(connection: &mut PgConnection) -> sqlx::Result<bool> {
    // As a plain query: one with parameters consists of several, and each has a time of its own.
    sqlx::raw_sql(IS_FREE).fetch_one(connection).await?.try_get(0)
}

/// One connection that one task owns, dialled when it is first needed and again after it was lost.
pub struct Line {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
}

impl Line {
    /// Runs `work` on the connection, within the deadline.
    ///
    /// After anything but success, or a refusal that a repetition may not meet, the connection is dropped and never reused.
    pub async fn run<T>(&mut self, work: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>) -> Result<T, Trouble> {
        // Taken out while in use: when this future is dropped or fails, the connection goes with it.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect_to_serve(&self.options).await?,
        };
        let outcome = match timeout(ANSWER_DEADLINE, work(&mut connection)).await {
            Ok(outcome) => outcome.map_err(Trouble::from),
            Err(_) => Err(Trouble::Broken(anyhow::anyhow!("no answer within {ANSWER_DEADLINE:?}"))),
        };
        let keeps = match &outcome {
            Ok(_) => true,
            Err(Trouble::Refused { code, .. }) => !is_stuck(code) && settles(&mut connection).await,
            Err(_) => false,
        };
        self.connection = keeps.then_some(connection);
        outcome
    }

    /// Like [`Line::run`], but only on the connection that is already there: what the session holds (a lock) is part of the work.
    pub async fn run_in_session<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>,
    ) -> Result<T, Trouble> {
        if self.connection.is_none() {
            return Err(Trouble::Unreachable(anyhow::anyhow!("the session is over")));
        }
        self.run(work).await
    }

    /// Ends the session in order, so that its locks go at once.
    pub async fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            // The session ends either way; saying goodbye only makes it sooner.
            let _ = timeout(Duration::from_secs(1), connection.close()).await;
        }
    }
}

/// Whether a session that was refused with this code would be refused for ever, where a new one may not be: a migration ran under it
/// ("cached plan must not change result type", 0A000), it is read-only, or in a transaction that has failed or was given up (class 25).
fn is_stuck(code: &str) -> bool {
    code == "0A000" || code.starts_with("25")
}

/// Has what a refused transaction holds rolled back now, and not when the session is next used. Whether that was done.
async fn settles(connection: &mut PgConnection) -> bool {
    matches!(timeout(RETURN_DEADLINE, connection.ping()).await, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// What a statement comes to that a server answers with this severity and SQLSTATE.
    async fn answered(severity: &str, code: &str) -> Trouble {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://x@{}/x?sslmode=disable", listener.local_addr().unwrap());
        let error = format!("S{severity}\0V{severity}\0C{code}\0Mno\0\0");
        let server = async {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut said = [0; 1024];
            assert!(client.read(&mut said).await.unwrap() > 0, "the startup message");
            // Let in without a password, and idle.
            client.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
            assert!(client.read(&mut said).await.unwrap() > 0, "the statement");
            client
                .write_all(&[b"E", &(error.len() as u32 + 4).to_be_bytes()[..], error.as_bytes()].concat())
                .await
                .unwrap();
            client.write_all(b"Z\0\0\0\x05I").await.unwrap();
        };
        let statement = async {
            let mut connection = PgConnection::connect(&url).await.unwrap();
            sqlx::raw_sql("commit").execute(&mut connection).await.unwrap_err().into()
        };
        tokio::join!(server, statement).1
    }

    #[tokio::test]
    async fn a_commit_that_ended_the_session_may_have_been_made() {
        for severity in ["FATAL", "PANIC"] {
            let trouble = answered(severity, "58030").await;
            assert!(matches!(trouble, Trouble::Broken(_)), "{severity}: {trouble:?}");
        }
        let trouble = answered("ERROR", "58030").await;
        assert!(matches!(&trouble, Trouble::Refused { code, .. } if code == "58030"), "{trouble:?}");
    }

    #[test]
    fn not_every_end_of_a_session_leaves_a_commit_in_doubt() {
        // A disk that failed or was full in the middle of a commit, a shutdown, a pooler that lost its server.
        for (code, is_fatal) in [("58030", true), ("53100", true), ("57P01", true), ("08006", false)] {
            assert!(ends_in_doubt(code, is_fatal), "{code}");
        }
        // The same in a session that goes on; silence for too long, in a transaction or outside; not let in.
        for (code, is_fatal) in [("58030", false), ("53100", false), ("25P03", true), ("57P05", true), ("28P01", true)]
        {
            assert!(!ends_in_doubt(code, is_fatal), "{code}");
        }
    }

    #[test]
    fn who_may_listen_is_told_by_the_address() {
        let is_overheard = |url: &str| Db::new(&url.into()).unwrap().is_overheard();
        for here in
            ["postgres://localhost/x", "postgres://127.0.0.2/x", "postgres://[::1]/x", "postgres:///x?host=/run"]
        {
            assert!(!is_overheard(here), "{here}");
        }
        for mode in ["disable", "prefer", "require", "verify-ca"] {
            assert!(is_overheard(&format!("postgres://db/x?sslmode={mode}")), "{mode}");
        }
        assert!(is_overheard("postgres://db/x?sslrootcert=/ca.pem"), "a certificate that nobody checks");
        assert!(!is_overheard("postgres://db/x?sslmode=verify-full"));
    }

    #[test]
    fn a_url_in_the_clear_is_overheard_beyond_this_machine() {
        let is_overheard = |url: &str| is_overheard(&url.parse().unwrap());
        for alone in ["http://127.0.0.1:15672", "http://[::1]/", "http://localhost", "https://broker:15671"] {
            assert!(!is_overheard(alone), "{alone}");
        }
        for heard in ["http://broker:15672", "http://10.0.0.1"] {
            assert!(is_overheard(heard), "{heard}");
        }
    }
}
