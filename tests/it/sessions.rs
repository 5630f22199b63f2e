//! What Postgres says of the service's sessions, and what it may do to them.

use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use uuid::Uuid;

use crate::house::eventually;

/// A session that holds a user's row, as a forgotten transaction of an operator would: who wants to change the user waits, until it is
/// closed or his own patience ends.
pub async fn hold(db: &PgPool, user: &Uuid) -> PgConnection {
    let mut session = PgConnection::connect_with(&db.connect_options()).await.unwrap();
    sqlx::query("begin").execute(&mut session).await.unwrap();
    sqlx::query("select from users where id = $1 for update").bind(user).execute(&mut session).await.unwrap();
    session
}

/// Waits until the session of this name waits for a lock; its process.
pub async fn blocked(db: &PgPool, name: &str) -> i32 {
    all_blocked(db, name, 1).await[0]
}

/// Waits until so many sessions of this name wait for a lock; their processes.
pub async fn all_blocked(db: &PgPool, name: &str, count: usize) -> Vec<i32> {
    let sessions = "
        select pid, wait_event_type || ' ' || state from pg_stat_activity
         where datname = current_database() and application_name = $1
    ";
    eventually("sessions that wait for a lock", async || {
        let seen: Vec<(i32, Option<String>)> = sqlx::query_as(sessions).bind(name).fetch_all(db).await.unwrap();
        let waiting = seen.iter().filter(|(_, state)| state.as_deref() == Some("Lock active"));
        let waiting: Vec<i32> = waiting.map(|(process, _)| *process).collect();
        if waiting.len() >= count { Ok(waiting) } else { Err(seen) }
    })
    .await
}

/// Waits until the sessions of a service that was killed have ended. One that waits for a lock ends by its lock_timeout.
pub async fn gone(db: &PgPool) {
    eventually("the sessions of a dead service to end", async || {
        let seen = names(db).await;
        if seen.is_empty() { Ok(()) } else { Err(seen) }
    })
    .await;
}

pub async fn names(db: &PgPool) -> Vec<String> {
    let names = "
        select application_name from pg_stat_activity
         where datname = current_database() and application_name like 'tidings%'
    ";
    sqlx::query_scalar(names).fetch_all(db).await.unwrap()
}

/// What the sessions of this name are doing.
pub async fn states(db: &PgPool, name: &str) -> Vec<String> {
    let states = "select state from pg_stat_activity where datname = current_database() and application_name = $1";
    sqlx::query_scalar(states).bind(name).fetch_all(db).await.unwrap()
}

/// The sessions that begin from now on are read-only, or no longer. To be so they all have to begin anew.
pub async fn are_read_only(db: &PgPool, on: bool) {
    begin_with(db, "default_transaction_read_only", on).await;
    if on {
        terminate(db, "tidings%").await;
    }
}

/// The sessions that begin from now on have this setting on or off.
pub async fn begin_with(db: &PgPool, setting: &str, on: bool) {
    let database = db.connect_options().get_database().unwrap().to_owned();
    let alter = format!("alter database \"{database}\" set {setting} = {on}");
    sqlx::raw_sql(AssertSqlSafe(alter)).execute(db).await.unwrap();
}

/// The processes of the sessions of this name.
pub async fn processes(db: &PgPool, name: &str) -> Vec<i32> {
    let processes = "select pid from pg_stat_activity where datname = current_database() and application_name = $1";
    sqlx::query_scalar(processes).bind(name).fetch_all(db).await.unwrap()
}

/// Ends the sessions whose name matches; how many there were.
pub async fn terminate(db: &PgPool, name: &str) -> usize {
    let terminated = "
        select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name like $1
    ";
    let ended: Vec<bool> = sqlx::query_scalar(terminated).bind(name).fetch_all(db).await.unwrap();
    ended.len()
}

/// Cancels what the sessions whose name matches are at.
pub async fn cancel(db: &PgPool, name: &str) {
    let cancelled = "
        select pg_cancel_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name like $1
    ";
    sqlx::query(cancelled).bind(name).execute(db).await.unwrap();
}

/// Waits until no session is in a transaction.
pub async fn none_in_transaction(db: &PgPool) {
    let open = "
        select application_name || ': ' || state || ' in ' || query from pg_stat_activity
         where datname = current_database() and application_name like 'tidings%' and xact_start is not null
    ";
    eventually("no open transaction", async || {
        let seen: Vec<String> = sqlx::query_scalar(open).fetch_all(db).await.unwrap();
        if seen.is_empty() { Ok(()) } else { Err(seen) }
    })
    .await;
}

/// Waits until the session of this name has asked nothing for a second.
pub async fn silent(db: &PgPool, name: &str) {
    let silence = "
        select extract(epoch from clock_timestamp() - state_change)::float8 from pg_stat_activity
         where datname = current_database() and application_name = $1
    ";
    eventually("a session to be silent", async || {
        let seen: Vec<f64> = sqlx::query_scalar(silence).bind(name).fetch_all(db).await.unwrap();
        if seen.iter().any(|seconds| *seconds > 1.0) { Ok(()) } else { Err(seen) }
    })
    .await;
}

/// Waits until the last thing this session asked contains `words`.
pub async fn asked(db: &PgPool, name: &str, words: &str) {
    let last = "select query from pg_stat_activity where datname = current_database() and application_name = $1";
    eventually("a session to ask for this", async || {
        let seen: Vec<String> = sqlx::query_scalar(last).bind(name).fetch_all(db).await.unwrap();
        if seen.iter().any(|query| query.contains(words)) { Ok(()) } else { Err(seen) }
    })
    .await;
}
