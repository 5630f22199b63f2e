//! Statements: every SQL constant is good SQL on the migrated schema.

use sqlx::{Executor, PgPool, SqlSafeStr, Statement};
use tidings::{backfill, dead_letters, outbox, relay, users};

#[sqlx::test]
async fn every_statement_can_be_prepared(db: PgPool) {
    // With how many columns each gives back.
    let statements = [
        (users::KEEP, 8),
        (users::READ, 6),
        (users::LIST, 6),
        (outbox::CLAIM, 8),
        (outbox::SWEEP, 8),
        (outbox::SETTLE, 0),
        (outbox::LAG, 2),
        (outbox::LAST_ID, 1),
        (relay::TRY_LEAD, 1),
        (dead_letters::COUNTS, 2),
        (dead_letters::DROP, 0),
        (dead_letters::FORGET, 0),
        (dead_letters::KEEP, 0),
        (dead_letters::KNOWN, 1),
        (dead_letters::LAST_PLACE, 1),
        (dead_letters::LEFT, 2),
        (dead_letters::NAMES, 1),
        (dead_letters::PAGE, 14),
        (dead_letters::PURGE, 0),
        (dead_letters::REASONS, 2),
        (dead_letters::TAKE, 14),
        (backfill::FIND, 12),
        (backfill::FINISH, 0),
        (backfill::KNOWN, 1),
        (backfill::MOVE_ON, 0),
        (backfill::RUNNING, 11),
        (backfill::START, 1),
        (backfill::THESE, 4),
        (backfill::TURN, 1),
        (backfill::WAIT, 0),
        (backfill::WALK, 4),
    ];
    let mut connection = db.acquire().await.unwrap();
    for (sql, columns) in statements {
        let prepared = connection.prepare(sql.into_sql_str()).await;
        let prepared = prepared.unwrap_or_else(|error| panic!("{error}: {sql}"));
        assert_eq!(prepared.columns().len(), columns, "{sql}");
    }
    assert!(connection.prepare("select nickname from users".into_sql_str()).await.is_err(), "the check can fail");
}

/// The settings of the hot sessions must have the planner find rows by key, in a table of any size.
#[sqlx::test]
async fn users_are_found_by_key(db: PgPool) {
    let mut connection = db.acquire().await.unwrap();
    for (name, value) in users::BY_KEY {
        sqlx::query("select set_config($1, $2, false)").bind(name).bind(value).execute(&mut *connection).await.unwrap();
    }
    let ids: &str = "'{00000000-0000-0000-0000-000000000001}'::uuid[]";
    let explain = format!("explain {}", users::READ.replace("$1", ids));
    let plan: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).fetch_all(&mut *connection).await.unwrap();
    assert!(plan.join("\n").contains("users_pkey"), "{plan:#?}");
}
