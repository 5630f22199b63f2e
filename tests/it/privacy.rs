//! Privacy: a profile's values are in the table `users` and in the answers to those who ask for them, and nowhere else.
//!
//! A canary, a string that is nowhere else in the world, is planted in every field by every verb, and then looked for.

use reqwest::Method;
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, postgres::PgPoolOptions};
use tokio::io::{AsyncBufReadExt, BufReader};
use uuid::Uuid;

use crate::{
    house::{Answer, House, Service, connect, eventually, file, key, tidings},
    hurt::HurtBroker,
    subscribed::{Subscribed, notice},
};

/// Everything is logged that can be.
const AT_TRACE: [(&str, &str); 1] = [("TIDINGS_LOG", "trace")];

fn canary(name: &str) -> String {
    format!("canary{name}{}", Uuid::new_v4().simple())
}

/// A profile with `value` in every field that the built-in schema has, in whatever shapes it allows.
fn full_of(value: &str) -> Value {
    let schema: Value = serde_json::from_str(include_str!("../../src/profile/default.schema.json")).unwrap();
    let fields = schema["properties"].as_object().unwrap();
    assert!(fields.len() > 20, "{fields:?}");
    let value_of = |rule: &Value| match rule["$ref"].as_str() {
        Some("#/$defs/one_or_many") => json!({ value: [value, { "x": value }] }),
        _ => json!(value),
    };
    fields.iter().map(|(name, rule)| (name.clone(), value_of(rule))).collect::<Map<_, _>>().into()
}

/// The tables of the database that hold `canary`, in any column.
async fn tables_with(db: &PgPool, canary: &str) -> Vec<String> {
    let tables: Vec<String> = sqlx::query_scalar(
        "select quote_ident(table_schema) || '.' || quote_ident(table_name)
           from information_schema.tables
          where table_schema not in ('pg_catalog', 'information_schema') and table_type = 'BASE TABLE'
          order by 1",
    )
    .fetch_all(db)
    .await
    .unwrap();
    assert!(tables.contains(&"public.outbox".to_owned()), "{tables:?}");
    let mut found = vec![];
    for table in tables {
        let rows = format!("select count(*) from {table} as kept where kept::text like '%' || $1 || '%'");
        let rows: i64 = sqlx::query_scalar(AssertSqlSafe(rows)).bind(canary).fetch_one(db).await.unwrap();
        found.extend((rows > 0).then_some(table));
    }
    found
}

/// The places outside the database where `canary` is seen, once everything was told.
async fn places_with(house: &House, canary: &str) -> Vec<&'static str> {
    house.settle().await;
    let secret = key().rsplit('_').next().unwrap().to_owned();
    let text = async |path: &str| house.request(Method::GET, path).send().await.unwrap().text().await.unwrap();
    let places = [
        ("log", house.service.log()),
        ("messages", house.audit.raw().join("\n")),
        ("metrics", text("/metrics").await),
        ("readyz", text("/readyz").await),
        // Values travel as parameters, never within a statement, where Postgres' own log and statistics would show them.
        ("statements", statements(&house.db).await),
        ("Postgres's log", postgres_log(house).await),
    ];
    for (name, text) in &places {
        assert!(text.len() > 20, "nothing in {name}: {text:?}");
        // Every request of a House carries it.
        for shape in [secret.clone(), bytes_of(&secret)] {
            assert!(!text.contains(&shape), "a key in {name}");
        }
    }
    places.into_iter().filter(|(_, text)| text.contains(canary)).map(|(name, _)| name).collect()
}

/// As `{:?}` prints bytes.
fn bytes_of(text: &str) -> String {
    format!("{:?}", text.as_bytes()).trim_matches(['[', ']']).to_owned()
}

/// The same database, of which Postgres logs all that it can, of every session whose role does not say otherwise. The roles of the
/// service do.
async fn talkative(db: PgPool) -> PgPool {
    let tell_all = "
        do $$
        declare setting text;
        begin
          foreach setting in array array['log_error_verbosity = verbose', 'log_min_error_statement = error', 'log_statement = ''all''',
            'log_min_duration_statement = 0', 'log_min_duration_sample = 0', 'log_transaction_sample_rate = 1',
            'log_parameter_max_length = -1', 'log_parameter_max_length_on_error = -1',
            -- Of each plan, but for the parameters (Postgres 16): a plan has values where it was made for them.
            'session_preload_libraries = auto_explain', 'auto_explain.log_min_duration = 0', 'auto_explain.log_parameter_max_length = 0']
          loop
            execute format('alter database %I set %s', current_database(), setting);
          end loop;
          -- The tests' own user looks for values, and so has them in what it asks.
          foreach setting in array array['log_statement = none', 'log_min_duration_statement = -1', 'log_min_duration_sample = -1',
            'log_transaction_sample_rate = 0', 'auto_explain.log_min_duration = -1']
          loop
            execute format('alter role %I in database %I set %s', current_user, current_database(), setting);
          end loop;
        end
        $$;
    ";
    sqlx::raw_sql(tell_all).execute(&db).await.unwrap();
    // Sessions have the settings that they began with.
    let options = db.connect_options();
    db.close().await;
    PgPoolOptions::new().max_connections(5).connect_with((*options).clone()).await.unwrap()
}

/// What the server of the tests has logged: it runs on this machine, and writes into a file. What a session without the settings of
/// our roles has failed at is there, value and all.
async fn postgres_log(house: &House) -> String {
    let told = canary("told");
    let mut careless = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    let fails = AssertSqlSafe(format!("select '{told}'::int"));
    sqlx::raw_sql(fails).execute(&mut careless).await.unwrap_err();
    let postmaster: String =
        sqlx::query_scalar("select pg_read_file('postmaster.pid')").fetch_one(&house.db).await.unwrap();
    let pid = postmaster.lines().next().unwrap();
    let log = std::fs::read(format!("/proc/{pid}/fd/2"));
    let log = log.unwrap_or_else(|error| panic!("the log of the server of the tests cannot be read: {error}"));
    let log = String::from_utf8_lossy(&log).into_owned();
    assert!(log.contains(&told), "the database does not tell all, so what is not in its log proves nothing");
    log
}

async fn statements(db: &PgPool) -> String {
    let running =
        "select coalesce(string_agg(query, ' '), '') from pg_stat_activity where application_name like 'tidings%'";
    sqlx::query_scalar(running).fetch_one(db).await.unwrap()
}

/// A refusal, which must not repeat the canary.
fn refused(answer: &Answer, status: u16, canary: &str) -> String {
    let said = format!("{} {:?}", answer.body, answer.headers);
    assert!(!said.contains(canary), "{said}");
    answer.refusal(status).to_owned()
}

#[sqlx::test]
async fn a_value_is_kept_with_its_user_and_nowhere_else(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let [old, new, last] = ["old", "new", "last"].map(canary);
    let ana = house.user(full_of(&old)).await;
    assert_eq!(tables_with(&house.db, &old).await, ["public.users"], "the search finds what is there");
    house.settle().await;
    let named =
        |external_id: &str| house.patch(&ana, json!({})).body(json!({ "external_id": external_id }).to_string());
    let [first, second] = ["first", "second"].map(canary);
    Answer::to(named(&first)).await.ok();
    assert_eq!(tables_with(&house.db, &first).await, ["public.users"]);
    house.page(&format!("/v1/users?external_id={first}")).await.ok();
    let taken = json!({ "external_id": first, "profile": {} });
    let taken = Answer::to(house.request(Method::POST, "/v1/users").json(&taken)).await;
    assert_eq!(refused(&taken, 409, &first), "external_id_taken");
    Answer::to(named(&second)).await.ok();
    assert_eq!(tables_with(&house.db, &first).await, [""; 0]);
    house.settle().await;

    // Held back, so that the events are seen at rest.
    house.broker.down();
    house.amend(&ana, full_of(&new)).await.ok();
    house.put(&ana, json!({ "city": last })).await.ok();
    let eve = Uuid::new_v4();
    house.put(&eve, full_of(&new)).await.ok();
    house.page("/v1/users").await.ok();
    assert_eq!(house.pending().await, 3);
    for (canary, tables) in [(&old, vec![]), (&new, vec!["public.users"]), (&last, vec!["public.users"])] {
        assert_eq!(tables_with(&house.db, canary).await, tables);
    }
    house.broker.up();
    assert_eq!(house.told(&ana).await.len(), 5);

    // Of the dead stays nothing.
    for user in [&ana, &eve] {
        house.delete(user).await.ok();
    }
    house.settle().await;
    for canary in [&old, &new, &last, &first, &second] {
        assert_eq!(tables_with(&house.db, canary).await, [""; 0]);
        assert_eq!(places_with(&house, canary).await, [""; 0]);
    }
}

#[sqlx::test]
async fn a_refusal_repeats_no_value(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let value = canary("refused");
    let ana = house.user(json!({ "city": value })).await;
    let bodies = [
        (json!({ "profile": { "first_name": value.repeat(100) } }).to_string(), 422, "profile_invalid"),
        (json!({ "profile": { "first_name": [value] } }).to_string(), 422, "profile_invalid"),
        (json!({ "profile": { "shoe_size": value } }).to_string(), 422, "profile_invalid"),
        (json!({ "profile": { "phone": vec![&value; 201] } }).to_string(), 422, "profile_invalid"),
        (json!({ "profile": value }).to_string(), 422, "body_invalid"),
        (json!({ "profile": {}, "version": value }).to_string(), 422, "body_invalid"),
        (json!(value).to_string(), 422, "body_invalid"),
        (format!(r#"{{"profile":{{"city":"{value}","city":"{value}"}}}}"#), 422, "unacceptable_json"),
        (format!(r#"{{"profile":{{"city":"{value}\u0000"}}}}"#), 422, "unacceptable_json"),
        (format!(r#"{{"profile":{{"city":"{value}}}}}"#), 400, "malformed_json"),
        (format!(r#"{{"profile":{{"city":{value}}}}}"#), 400, "malformed_json"),
        (format!(r#"{{"profile":{{"city":"{value}\ud800"}}}}"#), 400, "malformed_json"),
        (json!({ "profile": { "city": value.repeat(2000) } }).to_string(), 413, "payload_too_large"),
    ];
    for (body, status, code) in bodies {
        let shown: String = body.chars().take(80).collect();
        let post = house.request(Method::POST, "/v1/users").header("content-type", "application/json");
        assert_eq!(refused(&Answer::to(post.body(body.clone())).await, status, &value), code, "POST {shown}");
        assert_eq!(
            refused(&Answer::to(house.patch(&ana, json!({})).body(body)).await, status, &value),
            code,
            "PATCH {shown}"
        );
    }
    let stale = house.patch(&ana, json!({ "nickname": value })).header("if-match", "\"9\"");
    assert_eq!(refused(&Answer::to(stale).await, 412, &value), "version_mismatch");
    let missing = house.amend(&Uuid::new_v4(), json!({ "nickname": value })).await;
    assert_eq!(refused(&missing, 404, &value), "user_not_found");
    house.delete(&ana).await.ok();
    let gone = house.put(&ana, json!({ "nickname": value })).await;
    assert_eq!(refused(&gone, 410, &value), "user_deleted");

    house.settle().await;
    assert_eq!(tables_with(&house.db, &value).await, [""; 0]);
    assert_eq!(places_with(&house, &value).await, [""; 0]);
}

#[sqlx::test]
async fn no_trouble_brings_a_value_to_light(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let value = canary("trouble");
    let ana = house.user(full_of(&value)).await;
    let amend = async |patch: Value| refused(&house.amend(&ana, patch).await, 503, &value);

    // Postgres quotes the whole row in the error of a constraint.
    let rule = "alter table users add constraint nobody_moves check (version < 2) not valid";
    sqlx::query(rule).execute(&house.db).await.unwrap();
    assert_eq!(amend(json!({ "nickname": format!("{value}2") })).await, "database_unavailable");
    sqlx::query("alter table users drop constraint nobody_moves").execute(&house.db).await.unwrap();
    // The operator hears why.
    house.logs(&["SQLSTATE 23514"]).await;

    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select from users for update").execute(&mut holder).await.unwrap();
    assert_eq!(amend(json!({ "nickname": format!("{value}3") })).await, "database_unavailable");
    holder.close().await.unwrap();

    // A column that is not what the statement expects, as after a migration gone wrong.
    sqlx::query("alter table users rename profile to portrait").execute(&house.db).await.unwrap();
    refused(&house.get(&ana).await, 503, &value);
    refused(&house.create(full_of(&value)).await, 503, &value);
    sqlx::query("alter table users rename portrait to profile").execute(&house.db).await.unwrap();

    house.broker.down();
    house.postgres.down();
    refused(&house.create(full_of(&value)).await, 503, &value);
    refused(&house.get(&ana).await, 503, &value);
    refused(&house.page("/v1/users").await, 503, &value);
    house.postgres.up();
    // The writer may only now find out that its connection is gone.
    eventually("changes to be taken again", async || {
        let answer = house.amend(&ana, json!({ "nickname": format!("{value}4") })).await;
        if answer.status == 200 { Ok(()) } else { Err(refused(&answer, 503, &value)) }
    })
    .await;
    house.broker.up();

    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[nickname]"]);
    assert_eq!(tables_with(&house.db, &value).await, ["public.users"]);
    assert_eq!(places_with(&house, &value).await, [""; 0]);
}

/// A URL with this password in it.
fn with_password(url: &str, password: &str) -> String {
    let (head, rest) = url.split_once("://").unwrap();
    let (user, host) = rest.split_once('@').unwrap();
    let user = user.split(':').next().unwrap();
    format!("{head}://{user}:{password}@{host}")
}

#[sqlx::test]
async fn passwords_are_never_logged(db: PgPool) {
    let house = House::with(db, &AT_TRACE).await;
    let password = canary("password");
    let mut settings = house.settings().to_vec();
    for (name, value) in &mut settings {
        if ["DATABASE_URL", "AMQP_URL", "AMQP_REGISTRY_URL"].contains(&name.as_str()) {
            *value = with_password(value, &password);
        }
    }
    // The database of the tests takes any password; the broker refuses this one.
    let service = Service::start(&["serve"], &settings).await;
    let text = async |path: &str| reqwest::get(format!("{}{path}", service.url)).await.unwrap().text().await.unwrap();
    let readiness = eventually("the relay to be refused", async || {
        let readiness = text("/readyz").await;
        if readiness.contains("ACCESS_REFUSED") || readiness.contains("ACCESS-REFUSED") {
            Ok(readiness)
        } else {
            Err(readiness)
        }
    })
    .await;
    eventually("a second try", async || {
        let log = service.log();
        let tries = log.matches("the relay's session is over").count();
        if tries > 1 { Ok(()) } else { Err(tries) }
    })
    .await;
    house.postgres.down();
    text("/v1/users").await;
    house.postgres.up();
    // As text, and as the bytes that `{:?}` makes of a frame.
    let bytes = bytes_of(&password);
    for (place, text) in [("log", service.log()), ("readyz", readiness), ("metrics", text("/metrics").await)] {
        for shape in [&password, &bytes] {
            assert!(!text.contains(shape), "a password in {place}");
        }
    }
}

/// Whatever a URL or a header holds: a path is logged as its route's template, a query and headers are not logged at all.
#[sqlx::test]
async fn what_stands_in_a_url_or_a_header_is_neither_logged_nor_repeated(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let ana = house.user(json!({})).await;
    let value = canary("url");
    let paths = [
        format!("/v1/users?external_id={value}"),
        format!("/v1/users?limit={value}"),
        format!("/v1/users?after={value}"),
        format!("/v1/users?{value}=1"),
        format!("/v1/users?limit=1&{value}"),
        format!("/v1/users/{value}"),
        format!("/v1/users/{ana}?min_version={value}"),
        format!("/v1/users/{ana}/{value}"),
        format!("/v1/users/{ana}%00{value}"),
        format!("/{value}"),
        format!("/v1/changes?after={value}"),
        format!("/v1/digest?buckets={value}"),
        format!("/v1/digest/{value}"),
        format!("/v1/subscriptions/{value}"),
        format!("/v1/subscriptions/{value}!"),
        format!("/v1/subscriptions/x/dead-letters?reason={value}"),
        format!("/v1/subscriptions/x/backfill?{value}"),
        format!("/v1/deletions?state={value}"),
        format!("/v1/deletions/{value}"),
        format!("/metrics/{value}"),
    ];
    for path in paths {
        let refusal = house.page(&path).await;
        let said = format!("{} {:?}", refusal.body, refusal.headers);
        assert!(refusal.status.is_client_error() || refusal.status.is_success(), "{path}: {refusal:?}");
        assert!(!said.contains(&value), "{path} is answered {said}");
    }
    let headers =
        ["if-match", "if-none-match", "traceparent", "tracestate", "content-type", "accept", "cookie", "referer"];
    for header in
        headers.into_iter().chain(["user-agent", "authorization", "idempotency-key", "forwarded", "range", &value])
    {
        for method in [Method::GET, Method::PATCH, Method::DELETE] {
            let request = house.request(method.clone(), &format!("/v1/users/{}", Uuid::new_v4()));
            let answer = Answer::to(request.header(header, format!("Bearer {value}")).body("{}")).await;
            let said = format!("{} {:?}", answer.body, answer.headers);
            assert!(!said.contains(&value), "{method} with {header} is answered {said}");
        }
    }
    assert_eq!(places_with(&house, &value).await, [""; 0]);
    assert_eq!(tables_with(&house.db, &value).await, [""; 0]);
}

/// The columns of whose values the planner's statistics have kept some that look like `value`.
async fn statistics_with(db: &PgPool, value: &str) -> Vec<String> {
    let columns = "
        select tablename || '.' || attname
          from pg_stats
         where pg_stats::text like '%' || $1 || '%'
         order by 1
    ";
    sqlx::query_scalar(columns).bind(value).fetch_all(db).await.unwrap()
}

/// What ANALYZE keeps for the planner stays when a user goes, and is in every base backup.
#[sqlx::test]
async fn the_planner_keeps_no_value_and_none_of_before(db: PgPool) {
    const NO_STATISTICS: &str = include_str!("../../migrations/20261129000003_no_statistics_of_users.sql");
    let house = House::open(db).await;
    let value = canary("planned");
    let users = "
        insert into users (id, version, profile, external_id, created_at, updated_at)
        select gen_random_uuid(), 1, json_build_object('nickname', $1 || '-' || n % 5), $1 || '-' || n, now(), now()
          from generate_series(1, 300) as n
    ";
    sqlx::query(users).bind(&value).execute(&house.db).await.unwrap();
    let key = "
        insert into idempotency_keys (key, salt, fingerprint, outcome, user_id, version)
        select sha256(uuid_send(id)), '', sha256(uuid_send(id)), 'created', id, 1 from users
    ";
    sqlx::query(key).execute(&house.db).await.unwrap();
    let analyze = async || sqlx::raw_sql("analyze").execute(&house.db).await.unwrap();
    let fingerprints = async || -> bool {
        let kept =
            "select exists (select from pg_stats where tablename = 'idempotency_keys' and attname = 'fingerprint')";
        sqlx::query_scalar(kept).fetch_one(&house.db).await.unwrap()
    };
    analyze().await;
    assert_eq!((statistics_with(&house.db, &value).await, fingerprints().await), (vec![], false));
    let (code, report, talk) = audit(&house, &["--no-broker"]).await;
    assert!(code == Some(0) && report.contains("scanned  statistics, columns: "), "{report}{talk}");

    // As it was before: an audit finds it, and the migration takes it away.
    let as_before = "
        alter table users alter column external_id set statistics -1;
        alter table idempotency_keys alter column fingerprint set statistics -1
    ";
    sqlx::raw_sql(as_before).execute(&house.db).await.unwrap();
    analyze().await;
    let kept = vec!["users.external_id".to_owned()];
    assert_eq!((statistics_with(&house.db, &value).await, fingerprints().await), (kept, true));
    let (code, report, talk) = audit(&house, &["--no-broker"]).await;
    assert!(code == Some(1) && report.contains("FOUND    statistics of users.external_id: "), "{report}{talk}");
    assert!(!report.contains(&value), "{report}");
    sqlx::raw_sql(NO_STATISTICS).execute(&house.db).await.unwrap();
    assert_eq!((statistics_with(&house.db, &value).await, fingerprints().await), (vec![], false));
    analyze().await;
    assert_eq!((statistics_with(&house.db, &value).await, fingerprints().await), (vec![], false));
}

/// A row that a constraint rules out breaks an `expect`, whose words quote it: the client hears that we failed, the operator hears where.
#[sqlx::test]
async fn a_panic_brings_no_value_to_light(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let value = canary("panic");
    let (ana, bo) = (house.user(json!({ "city": value })).await, house.user(json!({ "city": value })).await);
    let corrupt = [
        "alter table users drop constraint users_tombstone_holds_no_data, drop constraint users_profile_check",
        "update users set profile = to_json(profile ->> 'city')",
    ];
    for sql in corrupt {
        sqlx::query(sql).execute(&house.db).await.unwrap();
    }
    let broken = house.amend(&ana, json!({ "nickname": format!("{value}2") })).await;
    assert_eq!(refused(&broken, 500, &value), "internal");
    let broken = house.put(&bo, json!({ "nickname": format!("{value}3") })).await;
    assert_eq!(refused(&broken, 500, &value), "internal");
    house.logs(&["panicked", "src/profile/mod.rs"]).await;
    house.user(json!({ "city": "Riga" })).await;
    assert_eq!(places_with(&house, &value).await, [""; 0]);
}

/// At rest in the queue of a consumer that is down, among the dead letters, and in what the broker itself has logged.
#[sqlx::test]
async fn what_waits_at_the_broker_holds_no_value(db: PgPool) {
    let hurt = HurtBroker::borrow().await;
    let house = House::at(talkative(db).await, &hurt.amqp_url, &AT_TRACE).await;
    let value = canary("queue");
    let orders = Subscribed::at(&house, &hurt.amqp_url, "orders", &["#"], &[]).await;
    let ana = house.user(full_of(&value)).await;
    house.amend(&ana, full_of(&format!("{value}2"))).await.ok();
    house.delete(&ana).await.ok();
    house.settle().await;
    orders.await_waiting(3).await;
    let waiting = orders.take().await;
    let seen =
        format!("{:?}", waiting.iter().map(|delivery| (&delivery.properties, &delivery.data)).collect::<Vec<_>>());
    assert_eq!(waiting.len(), 3);
    orders.bury_notice(&notice(&waiting[1]), tidings_sdk::letter::Reason::HandlerFailed).await;
    let listed = eventually("the dead letter to be collected", async || {
        let listed = house.page(&orders.path("dead-letters")).await.ok().body;
        if listed["total"] == 1 { Ok(listed.to_string()) } else { Err(listed) }
    })
    .await;
    let log = concat!(env!("CARGO_MANIFEST_DIR"), "/.dev/log/rabbitmq-hurt.log");
    let log = std::fs::read(log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap();
    for (place, text) in [("the queue", &seen), ("the dead letters", &listed), ("the broker's log", &log)] {
        assert!(text.len() > 100, "nothing in {place}");
        for shape in [&value, &bytes_of(&value)] {
            assert!(!text.contains(shape), "a value in {place}");
        }
    }
    assert_eq!(places_with(&house, &value).await, [""; 0]);
    orders.end().await;
}

/// Of a deleted user stay id, version and time, and who has confirmed: in all the tables there are.
#[sqlx::test]
async fn of_a_deleted_user_stays_nothing_but_the_tombstone(db: PgPool) {
    let house = House::with(talkative(db).await, &AT_TRACE).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let value = canary("deleted");
    let ana = Uuid::new_v4();
    let put = async |body: Value| {
        let request = house.request(Method::PUT, &format!("/v1/users/{ana}")).header("idempotency-key", canary("key"));
        Answer::to(request.json(&body)).await
    };
    // With an id of the client's own, where there are such.
    if put(json!({ "external_id": value, "profile": full_of(&value) })).await.status != 201 {
        assert_eq!(put(json!({ "profile": full_of(&value) })).await.status, 201);
    }
    house.amend(&ana, json!({ "city": format!("{value}2") })).await.ok();
    house.settle().await;
    orders.await_waiting(2).await;
    let told = notice(&orders.take().await[1]);
    orders.bury_notice(&told, tidings_sdk::letter::Reason::HandlerFailed).await;
    let backfill = house.request(Method::POST, &orders.path("backfill")).json(&json!({ "users": "all" }));
    Answer::to(backfill).await.ok();
    let delete = house.request(Method::DELETE, &format!("/v1/users/{ana}")).header("idempotency-key", canary("key"));
    Answer::to(delete).await.ok();
    let receipt = house.request(Method::POST, &format!("/v1/deletions/{ana}/receipts"));
    Answer::to(receipt.json(&json!({ "subscription": orders.name.as_str() }))).await.ok();
    house.settle().await;
    eventually("the dead letter to be collected", async || {
        let listed = house.page(&orders.path("dead-letters")).await.ok().body;
        if listed["total"] == 1 { Ok(()) } else { Err(listed) }
    })
    .await;
    let tombstone = "
        select array(
          select key from jsonb_each(jsonb_strip_nulls(to_jsonb(users))) as member (key, value) order by key
        ) from users where id = $1
    ";
    let columns: Vec<String> = sqlx::query_scalar(tombstone).bind(ana).fetch_one(&house.db).await.unwrap();
    assert_eq!(columns, ["changed_xid", "deleted_at", "id", "version"]);
    assert_eq!(tables_with(&house.db, &value).await, [""; 0]);
    // Where the id itself still stands: who was deleted, who has confirmed, and what could not be handled.
    let known = [
        "public.backfills",
        "public.changes",
        "public.dead_letters",
        "public.deletion_receipts",
        "public.deletions_looked_at",
        "public.users",
    ];
    let with_id = tables_with(&house.db, &ana.to_string()).await;
    assert!(
        with_id.iter().all(|table| known.contains(&table.as_str()) || table.contains("idempotency")),
        "{with_id:?}"
    );
    assert_eq!(places_with(&house, &value).await, [""; 0]);
    orders.end().await;
}

/// The settings of somebody who may read every table, make a queue of his own, and look into others'.
fn with_rights_to_listen(house: &House) -> Vec<(String, String)> {
    let other =
        house.settings().iter().filter(|(name, _)| !name.starts_with("AMQP_") && name != "DATABASE_URL").cloned();
    let (database_url, amqp_url) = (crate::house::database_url(&house.db), house.audit.amqp_url.clone());
    other.chain([("DATABASE_URL".to_owned(), database_url), ("AMQP_URL".to_owned(), amqp_url)]).collect()
}

/// What `tidings audit-leaks` says about this House.
async fn audit(house: &House, words: &[&str]) -> (Option<i32>, String, String) {
    let command = [&["audit-leaks", "--listen", "1s"], words].concat();
    let output = tidings(&command, &with_rights_to_listen(house)).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[sqlx::test]
async fn an_audit_finds_what_leaked_wherever_it_is_and_names_no_value(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["user.created"], &[]).await;
    // With a letter that is not in ASCII.
    let value = format!("{}ë", canary("leak"));
    let ana = house.user(json!({ "full_name": value, "city": "Riga" })).await;
    house.settle().await;
    let log = file(&house.service.log());
    let metrics = house.service.url.strip_prefix("http://").unwrap().to_owned();
    let places = ["--file", log.to_str().unwrap(), "--metrics", &metrics, "--peek", orders.name.as_str()];
    let (code, report, talk) = audit(&house, &places).await;
    assert_eq!(code, Some(0), "{report}{talk}");
    assert!(
        report.starts_with("looked for 1 values of 1 users\n") && report.ends_with("clean: no value was found\n"),
        "{report}"
    );
    for scanned in ["table outbox, rows", "table dead_letters, rows", "exchange ", "queue ", "metrics, lines"] {
        assert!(report.contains(&format!("scanned  {scanned}")), "{report}");
    }
    assert!(talk.contains("counts as delivered"), "it says what peeking costs: {talk}");
    orders.await_waiting(1).await;

    // Planted, one after the other, in every place it looks at.
    let leak = async |sql: &str| {
        sqlx::query(sqlx::AssertSqlSafe(sql.to_owned())).bind(&value).execute(&house.db).await.unwrap()
    };
    leak("create table notes (id bigint, words text, packed bytea)").await;
    leak("insert into notes values (1, 'said ' || upper($1), '\\xff00'::bytea || convert_to(upper($1), 'UTF8'))").await;
    leak("update subscriptions set purpose = $1").await;
    let line = format!("GET /v1/users?q={value} 200");
    let log = file(&format!("nothing\nnothing\n{line}\n"));
    let (properties, body) =
        crate::sdk::notice(ana, 1, tidings_sdk::envelope::Event::Created).to_message("urn:tidings:test");
    let id = properties.message_id().clone().unwrap();
    orders.put_into_queue(properties.with_app_id(value.as_str().into()), &body).await;
    let wrote = format!("table notes.words: 1 times, such as a value of full_name of user {ana}");
    let packed = "table notes.packed: 1 times";
    let planted = [wrote.as_str(), packed, "table subscriptions.purpose", &format!("{}:3", log.display()), id.as_str()];
    let (code, report, talk) = audit(&house, &["--file", log.to_str().unwrap(), "--peek", orders.name.as_str()]).await;
    assert_eq!(code, Some(1), "{report}{talk}");
    for place in planted {
        assert!(report.lines().any(|line| line.starts_with("FOUND") && line.contains(place)), "{place}: {report}");
    }
    assert_eq!(report.matches("FOUND").count(), planted.len(), "{report}");
    assert!(report.ends_with("LEAKS: values are where none may be\n"), "{report}");
    orders.await_waiting(2).await;
    let (code, as_json, more) = audit(&house, &["--no-broker", "--json", "--except", "notes"]).await;
    let parsed: Value = serde_json::from_str(&as_json).unwrap();
    assert_eq!((code, parsed["found"].as_array().unwrap().len()), (Some(1), 1), "{as_json}{more}");
    for said in [report, talk, as_json, more] {
        assert!(!said.to_lowercase().contains(&value), "{said}");
    }
    orders.end().await;
}

/// What was found is told, whatever could not be looked at beside it.
#[sqlx::test]
async fn an_audit_tells_what_it_found_and_what_it_could_not_look_at(db: PgPool) {
    let house = House::open(db).await;
    let value = canary("beside");
    house.user(json!({ "full_name": value })).await;
    house.settle().await;
    let (log, folder) = (file(&format!("{value}\n")), std::env::temp_dir());
    let places = ["--peek", "no-such-queue", "--file", folder.to_str().unwrap(), "--file", log.to_str().unwrap()];
    let (code, report, talk) = audit(&house, &[&places[..], &["--metrics", "127.0.0.1:1"]].concat()).await;
    assert_eq!(code, Some(1), "{report}{talk}");
    let file_name = log.display();
    for place in ["queue no-such-queue", &folder.display().to_string(), "metrics"] {
        assert!(report.contains(&format!("MISSED   {place}: ")), "{place}: {report}{talk}");
    }
    assert!(report.contains(&format!("FOUND    {file_name}:1: 1 times")), "{report}{talk}");
    assert!(report.ends_with("LEAKS: values are where none may be\n"), "{report}{talk}");
    let (_, as_json, _) = audit(&house, &[&["--no-broker", "--json"], &places[2..]].concat()).await;
    let parsed: Value = serde_json::from_str(&as_json).unwrap();
    assert_eq!(
        (&parsed["missed"][0]["place"], parsed["found"].as_array().unwrap().len()),
        (&json!(folder), 1),
        "{as_json}"
    );
    assert!(![report, talk, as_json].concat().contains(&value));
}

/// A message that leaks is seen as it passes by, and nobody else's queue is touched.
#[sqlx::test]
async fn an_audit_listens_to_what_is_published(db: PgPool) {
    let house = House::open(db).await;
    let value = canary("passing");
    let ana = house.user(json!({ "full_name": value })).await;
    house.settle().await;
    let mut command = tidings(&["audit-leaks", "--listen", "3s"], &with_rights_to_listen(&house)).spawn().unwrap();
    let mut talk = BufReader::new(command.stderr.take().unwrap()).lines();
    while !talk.next_line().await.unwrap().expect("it should listen").starts_with("listening") {}
    let leaking = crate::sdk::notice(ana, 1, tidings_sdk::envelope::Event::Created);
    let (properties, body) = leaking.to_message("urn:tidings:test");
    let connection = connect(&house.audit.amqp_url).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let published = channel.basic_publish(
        house.exchange.as_str().into(),
        "user.created".into(),
        Default::default(),
        &body,
        properties.with_reply_to(value.as_str().into()),
    );
    published.await.unwrap().await.unwrap();
    let output = command.wait_with_output().await.unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    let found = format!("FOUND    message {}", leaking.message_id);
    assert!(output.status.code() == Some(1) && report.contains(&found) && !report.contains(&value), "{report}");
    house.audit.forgive().await;
}

/// Rights to read are enough, and wrong settings are told from findings.
#[sqlx::test]
async fn an_audit_needs_no_right_to_write(db: PgPool) {
    let house = House::open(db).await;
    let (code, _, talk) = audit(&house, &[]).await;
    assert_eq!(code, Some(1));
    assert!(talk.contains("nothing to look for"), "{talk}");
    house.user(json!({ "full_name": canary("reader") })).await;
    house.settle().await;
    let reader = format!("reader_{}", Uuid::new_v4().simple());
    for sql in [
        format!("create role {reader} login"),
        format!("grant select on all tables in schema public to {reader}"),
        format!("grant usage on schema public to {reader}"),
        format!("grant connect on database \"{}\" to {reader}", house.db.connect_options().get_database().unwrap()),
    ] {
        sqlx::query(AssertSqlSafe(sql)).execute(&house.db).await.unwrap();
    }
    let mut settings = house.settings().to_vec();
    for (name, value) in &mut settings {
        if name == "DATABASE_URL" {
            let (_, host) = value.split_once('@').unwrap();
            *value = format!("postgres://{reader}@{host}");
        }
    }
    let output = tidings(&["audit-leaks", "--no-broker"], &settings).output().await.unwrap();
    let talk = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{talk}");
    // A table that it may not read does not keep it from the others.
    sqlx::query(AssertSqlSafe(format!("revoke select on clients from {reader}"))).execute(&house.db).await.unwrap();
    let output = tidings(&["audit-leaks", "--no-broker"], &settings).output().await.unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        report.contains("MISSED   table clients: ") && report.contains("scanned  table subscriptions, rows"),
        "{report}"
    );
    assert!(report.ends_with("INCOMPLETE: no value was found, and not everything could be looked at\n"), "{report}");
    for sql in [format!("drop owned by {reader}"), format!("drop role {reader}")] {
        sqlx::query(AssertSqlSafe(sql)).execute(&house.db).await.unwrap();
    }
    let wrong = ["--listen", "soon", "--file", "/no/such/file", "--metrics", "here"];
    let command = [&["audit-leaks"], &wrong[..]].concat();
    let output = tidings(&command, house.settings()).output().await.unwrap();
    let talk = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{talk}");
    assert!(["--listen", "--file", "--metrics"].iter().all(|setting| talk.contains(setting)), "{talk}");
}
