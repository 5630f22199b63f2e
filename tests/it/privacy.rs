//! Privacy: a profile's values are in the table `users` and in the answers to those who ask for them, and nowhere else.
//!
//! A canary, a string that is nowhere else in the world, is planted in every field by every verb, and then looked for.

use reqwest::Method;
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use uuid::Uuid;

use crate::house::{Answer, House, Service, eventually};

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

/// The places outside the database where `canary` is seen.
async fn places_with(house: &House, canary: &str) -> Vec<&'static str> {
    let text = async |path: &str| house.request(Method::GET, path).send().await.unwrap().text().await.unwrap();
    let places = [
        ("log", house.service.log()),
        ("messages", house.audit.raw().join("\n")),
        ("metrics", text("/metrics").await),
        ("readyz", text("/readyz").await),
        // Values travel as parameters, never within a statement, where Postgres' own log and statistics would show them.
        ("statements", statements(&house.db).await),
    ];
    for (name, text) in &places {
        assert!(text.len() > 20, "nothing in {name}: {text:?}");
    }
    places.into_iter().filter(|(_, text)| text.contains(canary)).map(|(name, _)| name).collect()
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
    let house = House::with(db, &AT_TRACE).await;
    let [old, new, last] = ["old", "new", "last"].map(canary);
    let ana = house.user(full_of(&old)).await;
    assert_eq!(tables_with(&house.db, &old).await, ["public.users"], "the search finds what is there");
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
    assert_eq!(house.told(&ana).await.len(), 3);

    // Of the dead stays nothing.
    for user in [&ana, &eve] {
        house.delete(user).await.ok();
    }
    house.settle().await;
    for canary in [&old, &new, &last] {
        assert_eq!(tables_with(&house.db, canary).await, [""; 0]);
        assert_eq!(places_with(&house, canary).await, [""; 0]);
    }
}

#[sqlx::test]
async fn a_refusal_repeats_no_value(db: PgPool) {
    let house = House::with(db, &AT_TRACE).await;
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
    let house = House::with(db, &AT_TRACE).await;
    let value = canary("trouble");
    let ana = house.user(full_of(&value)).await;
    let amend = async |patch: Value| refused(&house.amend(&ana, patch).await, 503, &value);

    // Postgres quotes the whole row in the error of a constraint.
    let rule = "alter table users add constraint nobody_moves check (version < 2) not valid";
    sqlx::query(rule).execute(&house.db).await.unwrap();
    assert_eq!(amend(json!({ "nickname": format!("{value}2") })).await, "database_unavailable");
    sqlx::query("alter table users drop constraint nobody_moves").execute(&house.db).await.unwrap();
    assert!(house.service.log().contains("SQLSTATE 23514"), "the operator hears why");

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
    house.amend(&ana, json!({ "nickname": format!("{value}4") })).await.ok();
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
        if name == "DATABASE_URL" || name == "AMQP_URL" {
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
    let bytes = format!("{:?}", password.as_bytes());
    for (place, text) in [("log", service.log()), ("readyz", readiness), ("metrics", text("/metrics").await)] {
        for shape in [password.as_str(), bytes.trim_matches(['[', ']'])] {
            assert!(!text.contains(shape), "a password in {place}");
        }
    }
}
