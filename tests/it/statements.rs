//! Statements: every SQL constant is good SQL on the migrated schema, and finds its way by index.

use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool, Postgres, Row, SqlSafeStr, Statement, pool::PoolConnection};
use tidings::{
    audit_leaks, backfill, clients, db as database, dead_letters, deletions, feed, lead, outbox, subscriptions, users,
};

use crate::load;

#[sqlx::test]
async fn every_statement_can_be_prepared(db: PgPool) {
    // With how many columns each gives back.
    let statements = [
        (users::AMEND, 3),
        (users::KEEP, 11),
        (users::READ, 7),
        (users::PURGE, 0),
        (users::FORGET, 0),
        (users::RECALL, 6),
        (users::REMEMBER, 0),
        (users::LIST, 7),
        (users::FIND, 7),
        (feed::EPOCH, 4),
        (feed::PAGE, 5),
        (feed::LIVING, 2),
        (feed::BUCKET, 2),
        (feed::STRANGERS, 1),
        (feed::RESTAMP, 0),
        (outbox::CLAIM, 8),
        (outbox::SWEEP, 8),
        (outbox::SETTLE, 0),
        (outbox::LAG, 5),
        (outbox::LAST_ID, 1),
        (clients::CLIENT_OF, 1),
        (clients::CREATE, 0),
        (clients::DECLARED, 2),
        (clients::GRANTED, 2),
        (clients::FIND, 10),
        (clients::ISSUE, 0),
        (clients::KEYS, 6),
        (clients::LIVE_KEYS, 3),
        (clients::PROCESSING, 6),
        (clients::RETIRE, 0),
        (clients::REVOKE, 0),
        (clients::REVOKE_KEY, 0),
        (clients::ROSTER, 9),
        (clients::USED, 0),
        (database::APPLIED, 1),
        (database::FORGETS, 1),
        (database::FOLLOWS, 1),
        (database::IS_FREE, 1),
        (database::LACKING, 1),
        (database::WAITING_FOR_A_STANDBY, 1),
        (database::OTHERWISE, 1),
        (database::SERVER_LOG_SETTINGS, 2),
        (database::SET_LOCK_TIMEOUT, 1),
        (lead::TRY_LEAD, 1),
        (subscriptions::FIND, 24),
        (subscriptions::PUT, 1),
        (subscriptions::MARK_DECLARED, 0),
        (subscriptions::MARK_LOST, 1),
        (subscriptions::TAKE_BACK, 0),
        (subscriptions::FORGET, 0),
        (subscriptions::OBSERVE, 0),
        (subscriptions::RECOVERED, 0),
        (subscriptions::LOOKED, 0),
        (subscriptions::SAW, 0),
        (subscriptions::LOCK, 1),
        (subscriptions::UNLOCK, 1),
        (dead_letters::COUNT, 1),
        (dead_letters::COUNTS, 2),
        (dead_letters::DROP, 0),
        (dead_letters::FORGET, 0),
        (dead_letters::KEEP, 0),
        (dead_letters::KNOWN, 1),
        (dead_letters::LAST_PLACE, 1),
        (dead_letters::LEFT, 2),
        (dead_letters::NAMES, 1),
        (dead_letters::PAGE, 15),
        (dead_letters::PURGE, 0),
        (dead_letters::REASONS, 2),
        (dead_letters::TAKE, 15),
        (audit_leaks::COLUMNS, 3),
        (audit_leaks::SAMPLE, 2),
        (audit_leaks::STATISTICS, 3),
        (deletions::DUTY, 0),
        (deletions::FIND, 6),
        (deletions::IS_LATE, 1),
        (deletions::LATE, 4),
        (deletions::LATENESS, 3),
        (deletions::LOOKED, 0),
        (deletions::LOOKED_AT, 2),
        (deletions::OVERDUE, 4),
        (deletions::RECORD, 3),
        (deletions::RELEASE, 0),
        (backfill::BEGIN_ANEW, 1),
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
    fill(db, 5000).await;
    session_as_it_is(db, settings).await
}

/// So many more users, of whom the planner knows.
async fn fill(db: &PgPool, users: i32) {
    let many = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 1, '{}', now(), now() from generate_series(1, $1)
    ";
    sqlx::query(many).bind(users).execute(db).await.unwrap();
    for sql in
        ["insert into changes select changed_xid, id from users on conflict do nothing", "analyze users, changes"]
    {
        sqlx::query(sql).execute(db).await.unwrap();
    }
}

/// A session with these settings, in a database that may have neither rows nor statistics.
async fn session_as_it_is(db: &PgPool, settings: &[(&str, &str)]) -> PoolConnection<Postgres> {
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
    let plan = explain(connection, &format!("execute asked{arguments}")).await;
    sqlx::raw_sql("deallocate asked").execute(connection).await.unwrap();
    plan
}

async fn explain(connection: &mut PgConnection, sql: &str) -> String {
    let explain = AssertSqlSafe(format!("explain (costs off) {sql}"));
    let lines = sqlx::raw_sql(explain).fetch_all(connection).await.unwrap();
    lines.iter().map(|line| line.get::<String, _>(0) + "\n").collect()
}

const ID: &str = "'00000000-0000-0000-0000-000000000001'::uuid";

/// What [`users::AMEND`] is given.
fn to_amend() -> String {
    format!(
        "array[{ID}], array[1], array[2], array['{{}}'], array[{ID}], array['x'], array[{ID}], array[2], array['[]'], array['x']"
    )
}

/// What [`users::KEEP`] is given.
fn to_keep() -> String {
    format!(
        "({}, array['E'], array[{ID}], array['E'], array['x'::bytea], array['x'::bytea], array['x'::bytea], array['changed'], \
          array[{ID}], array[2])",
        to_amend()
    )
}

/// Fails for a plan that reads a table, or an index, from end to end.
fn assert_by_key(plan: &str) {
    assert!(!plan.contains("Seq Scan"), "{plan}");
    let lines: Vec<&str> = plan.lines().map(str::trim_start).collect();
    let scans = lines.windows(2).filter(|pair| pair[0].contains("Index Scan") || pair[0].contains("Index Only Scan"));
    let without = scans.clone().filter(|pair| !pair[1].starts_with("Index Cond: ")).count();
    assert!(scans.count() > 0 && without == 0, "{plan}");
}

/// The settings of the hot sessions must keep the planner from reading anything whole, of any size: a session keeps its plan while
/// the table grows from nothing, of which there are no statistics, or from a few, of whom there are.
#[sqlx::test]
async fn users_are_found_by_key(db: PgPool) {
    for more in [0, 50, 5000] {
        if more > 0 {
            fill(&db, more).await;
        }
        let mut connection = session_as_it_is(&db, &users::BY_KEY).await;
        let amend = plan(&mut connection, users::AMEND, &format!("({})", to_amend())).await;
        let keep = plan(&mut connection, users::KEEP, &to_keep()).await;
        let read = plan(&mut connection, users::READ, &format!("(array[{ID}])")).await;
        let find = plan(&mut connection, users::FIND, "('E')").await;
        let forget = plan(&mut connection, users::FORGET, &format!("(array[{ID}])")).await;
        for plan in [&amend, &keep, &read, &find, &forget] {
            assert_by_key(plan);
        }
        for (plan, replaced) in [(amend, "kept_1"), (keep, "changed_1")] {
            let by_key = format!("Index Cond: ((xid = {replaced}.replaced_xid) AND (user_id = {replaced}.id))");
            assert!(plan.contains(&by_key), "{plan}");
        }
    }
}

/// The same of the relay's sessions, whose table is empty most of the time and holds millions after an outage.
#[sqlx::test]
async fn the_outbox_is_read_by_place(db: PgPool) {
    for more in [0, 50, 5000] {
        load::backlog(&db, more).await;
        let mut connection = session_as_it_is(&db, &outbox::BY_PLACE).await;
        for (statement, arguments) in [
            (outbox::CLAIM, "(7, 500, array[1, 2])"),
            (outbox::SWEEP, "(7, 500, array[1, 2])"),
            (outbox::SETTLE, &format!("(array[1, 2], array[{ID}, {ID}])")),
        ] {
            let plan = plan(&mut connection, statement, arguments).await;
            assert_by_key(&plan);
            assert!(!plan.contains("Bitmap"), "{plan}");
        }
    }
}

/// A page costs what is in it: it is read off an index from its place on, and nothing is sorted.
#[sqlx::test]
async fn the_feed_is_read_off_its_indexes(db: PgPool) {
    // So many, and so long, that to look at them all in order of id and sort what is found would seem cheaper for a bucket.
    let users = "
        insert into users (id, version, profile, created_at, updated_at)
        select ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 1, json_build_object('nickname', repeat('x', 370)), now(), now()
          from generate_series(1, 10000) as n
    ";
    for sql in [users, "vacuum analyze users"] {
        sqlx::query(sql).execute(&db).await.unwrap();
    }
    let mut connection = session_as_it_is(&db, &feed::IN_ORDER).await;
    let page = plan(&mut connection, feed::PAGE, &format!("(7, {ID}, 500)")).await;
    let fenced = "AND (xid < pg_snapshot_xmin(pg_current_snapshot())))";
    let condition = page.lines().find(|line| line.contains("Index Cond: ((ROW(xid, user_id) > ROW(")).unwrap_or(&page);
    assert!(condition.ends_with(fenced), "{page}");
    let bucket = plan(&mut connection, feed::BUCKET, &format!("(256, {ID}, 512, 10001)")).await;
    // The same with what is known of the numbers that are asked for.
    let known = [("$1", "512"), ("$2", ID), ("$3", "1024"), ("$4", "10001")];
    let known = known.iter().fold(feed::BUCKET.to_owned(), |sql, (place, value)| sql.replace(place, value));
    let known = explain(&mut connection, &known).await;
    for bucket in [&bucket, &known] {
        assert!(bucket.contains("users_digest") && bucket.contains("Index Cond: ((ROW("), "{bucket}");
    }
    let living = plan(&mut connection, feed::LIVING, &format!("({ID}, 2001)")).await;
    // The newest entry alone is looked at.
    let epoch = plan(&mut connection, feed::EPOCH, "").await;
    assert!(epoch.contains("Index Only Scan Backward using changes_pkey"), "{epoch}");
    for plan in [&page, &bucket, &living, &epoch, &plan(&mut connection, feed::STRANGERS, "").await] {
        assert!(!plan.contains("Sort") && !plan.contains("Seq Scan") && !plan.contains("Filter"), "{plan}");
    }
    assert!(living.contains("Index Scan using users_living"), "{living}");
}

/// Who is late is found among the late, however many the dead are.
#[sqlx::test]
async fn the_late_are_read_off_their_indexes(db: PgPool) {
    let dead = "
        insert into users (id, version, deleted_at)
        select gen_random_uuid(), 2, now() - make_interval(secs => n) from generate_series(1, 5000) as n
    ";
    let register = "
        insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields)
        values ('orders', '{#}', '{}', 'a-team', 'a test', '{#}', '{}')
    ";
    let receipts = "
        insert into deletion_receipts (user_id, subscription, deleted_at, confirmed_at, how)
        select id, 'orders', deleted_at, now(), 'receipt' from users where deleted_at is not null offset 5
    ";
    let late = "
        insert into deletion_receipts (user_id, subscription, deleted_at)
        select id, 'orders', deleted_at from users where deleted_at is not null limit 5
    ";
    let duty = "insert into deletion_duties (subscription, since) values ('orders', now() - interval '1 day')";
    for sql in
        [dead, register, duty, receipts, late, "analyze users, subscriptions, deletion_duties, deletion_receipts"]
    {
        sqlx::query(sql).execute(&db).await.unwrap();
    }
    let mut connection = session(&db, &deletions::BY_INDEX).await;
    let page = plan(&mut connection, deletions::OVERDUE, &format!("(now(), {ID}, 1, 101)")).await;
    assert!(page.contains("using deletion_receipts_late ") && page.contains("users_pkey"), "{page}");
    assert!(!page.contains("Sort"), "{page}");
    let lateness = plan(&mut connection, deletions::LATENESS, "(1, 10000)").await;
    assert_eq!(lateness.matches("using deletion_receipts_late_by_subscription").count(), 2, "{lateness}");
    let looked = plan(&mut connection, deletions::LATE, &format!("(now(), {ID}, 1, 1000)")).await;
    assert!(looked.contains("using users_deleted on users"), "{looked}");
    let release = plan(&mut connection, deletions::RELEASE, "(5000)").await;
    assert!(release.matches("using deletion_receipts_late_by_subscription").count() >= 3, "{release}");
    let find = plan(&mut connection, deletions::FIND, &format!("({ID})")).await;
    let record = plan(
        &mut connection,
        deletions::RECORD,
        &format!("(array[{ID}], array['orders'], array['receipt'], array[null]::text[])"),
    )
    .await;
    for plan in [&page, &lateness, &looked, &release, &find, &record] {
        // The duties are a handful, and the registry at most a thousand.
        let scans = plan.lines().filter(|line| line.contains("Seq Scan") && !line.contains("deletion_duties"));
        assert_eq!(scans.count(), 0, "{plan}");
    }
}

/// These keep rows apart, and nobody asks by them.
const KEYS_ALONE: [&str; 3] = ["_sqlx_migrations_pkey", "deletions_looked_at_pkey", "subscriptions_looked_at_pkey"];

/// An index makes writing dearer: each is there for a statement, which without it would read the whole table.
#[sqlx::test]
async fn every_index_is_used_by_a_statement(db: PgPool) {
    let mut connection = session(&db, &deletions::BY_INDEX).await;
    let letter = format!(
        "('orders', array[{ID}], array[{ID}], array[1], array['user.created'], array['[]'], array[now()], array['x'], array['other'], \
          array[1], array[now()], array[0], array[10], array[{ID}])"
    );
    let uses = [
        ("backfills_pkey", backfill::FIND, "('orders')"),
        ("changes_pkey", feed::PAGE, &format!("(7, {ID}, 500)")),
        ("client_keys_by_client", clients::RETIRE, "('crm', 'k', 60)"),
        ("client_keys_pkey", clients::USED, "(array['k'])"),
        ("clients_pkey", clients::GRANTED, "('crm')"),
        ("dead_letters_by_place", dead_letters::PAGE, "('orders', 0, null, 100)"),
        ("dead_letters_by_reason", dead_letters::REASONS, "('orders')"),
        ("dead_letters_pkey", dead_letters::KEEP, &letter),
        ("deletion_duties_open", deletions::DUTY, "('orders', true)"),
        ("deletion_duties_pkey", deletions::OVERDUE, &format!("(now(), {ID}, 1, 101)")),
        ("deletion_receipts_late", deletions::OVERDUE, &format!("(now(), {ID}, 1, 101)")),
        ("deletion_receipts_late_by_subscription", deletions::RELEASE, "(5000)"),
        ("deletion_receipts_pkey", deletions::FIND, &format!("({ID})")),
        ("idempotency_keys_by_age", users::PURGE, "(1000, now())"),
        ("idempotency_keys_by_user", users::FORGET, &format!("(array[{ID}])")),
        ("idempotency_keys_pkey", users::RECALL, "('x'::bytea)"),
        ("outbox_pkey", outbox::CLAIM, "(7, 500, array[1])"),
        ("subscriptions_by_client", clients::ROSTER, ""),
        ("subscriptions_pkey", subscriptions::RECOVERED, "('orders')"),
        ("users_deleted", deletions::LATE, &format!("(now(), {ID}, 1, 1000)")),
        ("users_digest", feed::BUCKET, &format!("(256, {ID}, 512, 10001)")),
        ("users_external_id", users::FIND, "('E')"),
        ("users_living", users::LIST, &format!("({ID}, 101)")),
        ("users_pkey", users::READ, &format!("(array[{ID}])")),
    ];
    for (index, sql, arguments) in uses {
        let plan = plan(&mut connection, sql, arguments).await;
        assert!(plan.split_whitespace().any(|word| word == index), "{index}: {plan}");
    }
    let all = "select relname::text from pg_class where relkind = 'i' and relnamespace = 'public'::regnamespace order by relname";
    let all: Vec<String> = sqlx::query_scalar(all).fetch_all(&db).await.unwrap();
    let mut known: Vec<&str> = uses.iter().map(|(index, ..)| *index).chain(KEYS_ALONE).collect();
    known.sort_unstable();
    assert_eq!(all, known);
}
