//! Statements: every SQL constant is good SQL on the migrated schema, and finds its way by index.

use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool, Postgres, Row, SqlSafeStr, Statement, pool::PoolConnection};
use tidings::{backfill, dead_letters, feed, lead, outbox, subscriptions, users};

#[sqlx::test]
async fn every_statement_can_be_prepared(db: PgPool) {
    // With how many columns each gives back.
    let statements = [
        (users::KEEP, 8),
        (users::READ, 6),
        (users::LIST, 6),
        (feed::EPOCH, 3),
        (feed::PAGE, 5),
        (feed::DIGEST, 4),
        (feed::BUCKET, 2),
        (feed::STRANGERS, 1),
        (feed::RESTAMP, 0),
        (outbox::CLAIM, 8),
        (outbox::SWEEP, 8),
        (outbox::SETTLE, 0),
        (outbox::LAG, 2),
        (outbox::LAST_ID, 1),
        (lead::TRY_LEAD, 1),
        (subscriptions::FIND, 22),
        (subscriptions::PUT, 1),
        (subscriptions::MARK_DECLARED, 0),
        (subscriptions::MARK_LOST, 1),
        (subscriptions::TAKE_BACK, 0),
        (subscriptions::FORGET, 0),
        (subscriptions::OBSERVE, 0),
        (subscriptions::RECOVERED, 0),
        (subscriptions::LOOKED, 0),
        (subscriptions::LOCK, 1),
        (subscriptions::UNLOCK, 1),
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

/// A session with these settings, in a database that holds enough for the planner to have a choice.
async fn session(db: &PgPool, settings: &[(&str, &str)]) -> PoolConnection<Postgres> {
    let many = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 1, '{}', now(), now() from generate_series(1, 5000)
    ";
    for sql in [many, "insert into changes select changed_xid, id from users", "analyze users, changes"] {
        sqlx::query(sql).execute(db).await.unwrap();
    }
    let mut connection = db.acquire().await.unwrap();
    for (name, value) in settings {
        sqlx::query("select set_config($1, $2, false)").bind(name).bind(value).execute(&mut *connection).await.unwrap();
    }
    connection
}

/// How the database goes about a statement with these arguments.
async fn plan(connection: &mut PgConnection, sql: &str, arguments: &str) -> String {
    for command in [format!("prepare asked as {sql}"), "set plan_cache_mode = force_generic_plan".to_owned()] {
        sqlx::raw_sql(AssertSqlSafe(command)).execute(&mut *connection).await.unwrap();
    }
    let explain = AssertSqlSafe(format!("explain (costs off) execute asked{arguments}"));
    let lines = sqlx::raw_sql(explain).fetch_all(&mut *connection).await.unwrap();
    sqlx::raw_sql("deallocate asked").execute(connection).await.unwrap();
    lines.iter().map(|line| line.get::<String, _>(0) + "\n").collect()
}

const ID: &str = "'00000000-0000-0000-0000-000000000001'::uuid";

/// The settings of the hot sessions must have the planner find rows by key, in a table of any size.
#[sqlx::test]
async fn users_are_found_by_key(db: PgPool) {
    let mut connection = session(&db, &users::BY_KEY).await;
    let read = plan(&mut connection, users::READ, &format!("(array[{ID}])")).await;
    assert!(read.contains("users_pkey"), "{read}");
    let arguments = format!(
        "(array[{ID}], array[1], array[2], array['{{}}'], array[{ID}], array['x'], array[{ID}], array[2], array['[]'], array['x'])"
    );
    let keep = plan(&mut connection, users::KEEP, &arguments).await;
    assert!(!keep.contains("Seq Scan"), "{keep}");
    assert!(keep.contains("Index Cond: ((xid = changed_1.replaced_xid) AND (user_id = changed_1.id))"), "{keep}");
}

/// A page costs what is in it: it is read off an index from its place on, and nothing is sorted.
#[sqlx::test]
async fn the_feed_is_read_off_its_indexes(db: PgPool) {
    let mut connection = session(&db, &feed::IN_ORDER).await;
    let page = plan(&mut connection, feed::PAGE, &format!("(7, {ID}, 500)")).await;
    let fenced = "AND (xid < pg_snapshot_xmin(pg_current_snapshot())))";
    let condition = page.lines().find(|line| line.contains("Index Cond: ((ROW(xid, user_id) > ROW(")).unwrap_or(&page);
    assert!(condition.ends_with(fenced), "{page}");
    let bucket = plan(&mut connection, feed::BUCKET, &format!("(256, {ID}, 512, 10001)")).await;
    assert!(bucket.contains("users_digest") && bucket.contains("Index Cond: ((ROW("), "{bucket}");
    for plan in [page, bucket, plan(&mut connection, feed::STRANGERS, "").await] {
        assert!(!plan.contains("Sort") && !plan.contains("Seq Scan") && !plan.contains("Filter"), "{plan}");
    }
    let digest = plan(&mut connection, feed::DIGEST, &format!("({ID}, 20000, 256)")).await;
    assert!(digest.contains("Index Scan using users_living") && !digest.contains("Seq Scan"), "{digest}");
}
