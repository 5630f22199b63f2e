//! Operations: an upgrade that was left half done, a network that swallows packets, too many who ask how it is. What an operator is
//! told is true, and an instance that can serve is not taken for one that cannot.

use std::{
    io::{PipeReader, PipeWriter, Read, Write, pipe},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tidings::{db, outbox};
use tokio::time::timeout;

use crate::{
    house::{Answer, House, PATIENCE, Service, eventually, http, tidings},
    rights, sessions,
    subscribed::Subscribed,
};

const RULES: &str = include_str!("../../deploy/prometheus-rules.yml");

async fn run(sql: &str, on: &PgPool) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(on).await.unwrap();
}

/// What it says of itself once it has this status.
async fn ready(house: &House, status: u16) -> Answer {
    eventually(&format!("the readiness to be {status}"), async || {
        let answer = house.page("/readyz").await;
        if answer.status.as_u16() == status { Ok(answer) } else { Err(answer) }
    })
    .await
}

/// Why a process of this role does not start.
async fn refused(role: &str, house: &House) -> String {
    let ended = timeout(PATIENCE, tidings(&[role], house.settings()).output()).await;
    let output = ended.expect("it starts").unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[sqlx::test]
async fn an_instance_that_cannot_tell_who_asks_is_not_ready(db: PgPool) {
    let house = House::open(db).await;
    ready(&house, 200).await;
    run("revoke select on client_keys from tidings_test_api", &house.db).await;
    let unready = ready(&house, 503).await;
    assert!(unready.body["database"].as_str().unwrap().contains("who may ask"), "{unready:?}");
    assert_eq!(house.page("/v1/users").await.status, 503);
    run("grant select on client_keys to tidings_test_api", &house.db).await;
    ready(&house, 200).await;
    house.page("/v1/users").await.ok();
}

#[sqlx::test]
async fn a_step_of_an_upgrade_that_was_left_out_is_named_at_start(db: PgPool) {
    let house = House::open(db).await;
    let last = "(select max(version) from _sqlx_migrations)";
    run(&format!("create table held as select * from _sqlx_migrations where version = {last}"), &house.db).await;
    run(&format!("delete from _sqlx_migrations where version = {last}"), &house.db).await;
    for role in ["serve", "relay"] {
        let why = refused(role, &house).await;
        assert!(why.contains("lacks 1 of this version's migrations\nhint: `tidings migrate`"), "{role}: {why}");
    }
    run("insert into _sqlx_migrations select * from held", &house.db).await;
    for (role, table) in [("serve", "client_keys"), ("serve", "_sqlx_migrations"), ("relay", "_sqlx_migrations")] {
        run(&format!("revoke select on {table} from tidings_test_api, tidings_test_relay"), &house.db).await;
        let why = refused(role, &house).await;
        assert!(why.contains("hint: this role lacks rights; deploy/postgres-grants.sql"), "{role} {table}: {why}");
        run(&format!("grant select on {table} to tidings_test_api, tidings_test_relay"), &house.db).await;
    }
    // Migrated, and with the rights of the version before.
    run("revoke update (has_fields_exchange) on subscriptions from tidings_test_relay", &house.db).await;
    let why = refused("relay", &house).await;
    let lacking =
        "does not give this process update on subscriptions\nhint: this role lacks rights; deploy/postgres-grants.sql";
    assert!(why.contains(lacking), "{why}");
}

#[sqlx::test]
async fn a_watch_that_lost_a_right_says_what_gives_it(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s")]).await;
    run("revoke select on subscriptions from tidings_test_api, tidings_test_relay", &house.db).await;
    house.logs(&["the watch over the subscriptions begins anew", "SQLSTATE 42501", "deploy/postgres-grants.sql"]).await;
}

#[sqlx::test]
async fn a_duty_that_fails_is_shown_until_a_turn_has_lasted(db: PgPool) {
    let house = House::open(db).await;
    let shows = async |figure: u8| {
        let sample = format!(r#"tidings_duty_interrupted{{duty="deletions"}} {figure}"#);
        eventually(&sample, async || {
            let text = house.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
            if text.lines().any(|line| line == sample) { Ok(()) } else { Err(text) }
        })
        .await;
    };
    shows(0).await;
    run("revoke select on deletions_looked_at from tidings_test_api", &house.db).await;
    shows(1).await;
    run("grant select on deletions_looked_at to tidings_test_api", &house.db).await;
    let granted = Instant::now();
    shows(0).await;
    assert!(granted.elapsed() > Duration::from_secs(9), "after {:?}, and a turn has to last ten", granted.elapsed());
}

/// What is answered once it is no 503: a statement that was prepared before the schema changed may be refused.
async fn answered(what: &str, ask: impl AsyncFn() -> Answer) -> Answer {
    let answer = eventually(what, async || {
        let answer = ask().await;
        if answer.status == 503 { Err(answer) } else { Ok(answer) }
    });
    answer.await.ok()
}

/// A user's life, by every way to the tables that a later version may add to.
async fn serves(house: &House) {
    let key = uuid::Uuid::new_v4().to_string();
    let creation = || house.request(Method::POST, "/v1/users").header("idempotency-key", &key);
    let ask = async || Answer::to(creation().json(&json!({ "profile": { "first_name": "Ana" } }))).await;
    let ana: uuid::Uuid = answered("a creation", ask).await.body["id"].as_str().unwrap().parse().unwrap();
    answered("an amendment", async || house.amend(&ana, json!({ "job_title": "Editor" })).await).await;
    let read = answered("the user", async || house.get(&ana).await).await.body;
    assert_eq!(read["profile"], json!({ "first_name": "Ana", "job_title": "Editor" }));
    let listed = answered("all users", async || house.page("/v1/users").await).await.body;
    assert!(listed["users"].as_array().unwrap().contains(&read), "{read} in {listed}");
    answered("a deletion", async || house.delete(&ana).await).await;
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title]", "user.deleted"]);
}

#[sqlx::test]
async fn a_version_goes_on_beside_what_a_later_one_added(db: PgPool) {
    let mut house = House::open(db).await;
    // Its statements are prepared by now.
    serves(&house).await;
    let later = "
        alter table users add column of_later text;
        alter table outbox add column of_later text;
        alter table clients add column of_later text;
        alter table idempotency_keys add column of_later text;
        insert into _sqlx_migrations (version, description, success, checksum, execution_time)
        values (29990101000001, 'of a later version', true, '', 0)
    ";
    let mut owner = rights::session(&house.db, "owner").await;
    sqlx::raw_sql(later).execute(&mut owner).await.unwrap();
    owner.close().await.unwrap();
    house.migrate().await;
    serves(&house).await;
    house.service.kill().await;
    house.restart().await;
    serves(&house).await;
}

/// A change that first asks, over a pool, whether it was made already.
async fn create_once(house: &House) -> StatusCode {
    let request = house.request(Method::POST, "/v1/users").header("idempotency-key", uuid::Uuid::new_v4().to_string());
    request.json(&json!({ "profile": {} })).send().await.unwrap().status()
}

/// A pool asks a connection that comes back whether it lives: on a network that swallows packets it must not wait for the answer.
#[sqlx::test]
async fn connections_that_fell_silent_do_not_take_the_pools_along(db: PgPool) {
    let house = House::open(db).await;
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    sqlx::raw_sql("begin; lock table idempotency_keys in access exclusive mode").execute(&mut holder).await.unwrap();
    let is_silent = AtomicBool::new(false);
    // As many as the pool has connections, and more: each asks again until the silence, so that it meets all of them at work.
    let asking = join_all((0..8).map(async |_| {
        while !is_silent.load(Ordering::Relaxed) {
            create_once(&house).await;
        }
    }));
    let silence = async {
        sessions::all_blocked(&house.db, "tidings queries", 4).await;
        house.postgres.silence();
        is_silent.store(true, Ordering::Relaxed);
        holder.close().await.unwrap();
    };
    tokio::join!(asking, silence);
    let again = async {
        ready(&house, 200).await;
        eventually("changes with a key to be made again", async || match create_once(&house).await {
            StatusCode::CREATED => Ok(()),
            status => Err(status),
        })
        .await;
    };
    timeout(Duration::from_secs(20), again).await.expect("the pools are lost");
}

#[sqlx::test]
async fn many_who_ask_for_metrics_share_a_look_and_readiness_is_not_behind_them(db: PgPool) {
    let house = House::open(db).await;
    ready(&house, 200).await;
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    sqlx::raw_sql("begin; lock table outbox in access exclusive mode").execute(&mut holder).await.unwrap();
    let scrapes =
        join_all((0..50).map(async |_| house.request(Method::GET, "/metrics").send().await.unwrap().status()));
    let meanwhile = async {
        sessions::blocked(&house.db, "tidings metrics").await;
        assert_eq!(house.page("/readyz").await.status, 200);
        let looking = "
            select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like '%as oldest_seconds%'
        ";
        sqlx::query_scalar::<_, i64>(looking).fetch_one(&house.db).await.unwrap()
    };
    let (answers, looking) = tokio::join!(scrapes, meanwhile);
    assert!(looking <= 1, "{looking} looks for {} scrapes", answers.len());
    assert!(answers.iter().all(|status| *status == 200), "{answers:?}");
    assert_eq!(house.metric("tidings_outbox_oldest_seconds").await, -1.0, "not known, while somebody holds the table");
    holder.close().await.unwrap();
    assert_eq!(house.metric("tidings_outbox_oldest_seconds").await, 0.0);
}

/// Rows that died below the floor are not walked over.
#[sqlx::test]
async fn a_look_at_the_outbox_begins_at_its_floor(db: PgPool) {
    let house = House::open(db).await;
    house.user(json!({})).await;
    house.settle().await;
    house.broker.down();
    for _ in 0..3 {
        house.user(json!({})).await;
    }
    let (mut floor, now) = (outbox::Floor::default(), Instant::now());
    for seconds in [0, 60] {
        let lag = outbox::lag(&house.db, floor.place()).await.unwrap();
        assert_eq!(lag.pending, 3, "after {seconds} s");
        floor.note(&lag, now + Duration::from_secs(seconds));
    }
    // Nothing can come below it by now, so nobody looks there but who has never looked before.
    let first: i64 = sqlx::query_scalar("select min(id) from outbox").fetch_one(&house.db).await.unwrap();
    sqlx::query("alter table outbox alter column id set generated by default").execute(&house.db).await.unwrap();
    let put = "update outbox set id = $2 where id = $1";
    sqlx::query(put).bind(first).bind(first - 1).execute(&house.db).await.unwrap();
    let pending = async |floor: &outbox::Floor| outbox::lag(&house.db, floor.place()).await.unwrap().pending;
    assert_eq!([pending(&floor).await, pending(&outbox::Floor::default()).await], [2, 3]);
    sqlx::query(put).bind(first - 1).bind(first).execute(&house.db).await.unwrap();
    house.broker.up();
    house.settle().await;
}

#[sqlx::test]
async fn every_answer_is_counted_by_its_route_and_nobody_makes_up_names(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    house.get(&ana).await.ok();
    house.page(&format!("/v1/users/{}", uuid::Uuid::new_v4())).await.refusal(404);
    let made_up = Method::from_bytes(b"ANA").unwrap();
    assert_eq!(house.request(made_up, "/nowhere/ana").send().await.unwrap().status(), 404);
    let count = async |labels: &str| house.metric(&format!("tidings_http_requests_total{{{labels}}}")).await;
    assert_eq!(count(r#"method="POST",route="/v1/users",status="2xx""#).await, 1.0);
    assert_eq!(count(r#"method="GET",route="/v1/users/{id}",status="2xx""#).await, 1.0);
    assert_eq!(count(r#"method="GET",route="/v1/users/{id}",status="4xx""#).await, 1.0);
    assert_eq!(count(r#"method="other",route="unknown",status="4xx""#).await, 1.0);
    let problems = async |code: &str| house.metric(&format!("tidings_http_problems_total{{code=\"{code}\"}}")).await;
    assert_eq!([problems("user_not_found").await, problems("route_not_found").await], [1.0, 1.0]);
    // An alert leaves these out.
    assert_eq!(problems("not_yet_visible").await, 0.0);
    house.page(&format!("/v1/users/{ana}?min_version=2")).await.refusal(503);
    assert_eq!(problems("not_yet_visible").await, 1.0);
    let took = r#"tidings_http_request_duration_seconds_count{method="GET",route="/v1/users/{id}"}"#;
    assert_eq!(house.metric(took).await, 3.0);
}

#[sqlx::test]
async fn each_metric_that_an_alert_rests_on_is_there(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s")]).await;
    let orders = Subscribed::to(&house, "orders", &["user.deleted"], &[]).await;
    house.page("/v1/users").await.ok();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let expressions: Vec<&str> = RULES.lines().filter(|line| line.trim_start().starts_with("expr:")).collect();
    assert!(expressions.len() >= 10, "{expressions:?}");
    eventually("all of them", async || {
        let text = house.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
        for expression in &expressions {
            let label = expression.split_once(" by (").map_or("", |(_, rest)| rest.split(')').next().unwrap());
            for metric in expression.split(|c| !is_word(c)).filter(|word| word.starts_with("tidings_")) {
                let is_sample = |line: &str| {
                    let rest = line.strip_prefix(metric).filter(|rest| rest.starts_with(['{', ' ']));
                    rest.is_some_and(|rest| label.is_empty() || rest.contains(&format!("{label}=\"")))
                };
                if !text.lines().any(is_sample) {
                    return Err(format!("no {metric} by {label:?} in {text}"));
                }
            }
        }
        Ok(())
    })
    .await;
    orders.end().await;
}

/// User and password of the management API are sent every few seconds.
#[sqlx::test]
async fn a_management_api_in_the_clear_is_warned_of(db: PgPool) {
    // An address that is nobody's.
    let house = House::with(db, &[("TIDINGS_RABBITMQ_MANAGEMENT_URL", "http://monitor:s3cret@192.0.2.1:15672")]).await;
    house.logs(&["TIDINGS_RABBITMQ_MANAGEMENT_URL: the management API is on another machine"]).await;
    let log = house.service.log();
    assert!(!log.contains("s3cret"), "{log}");
}

/// The settings of a server cannot be another's for one test: the statement is asked of a list in their place.
#[sqlx::test]
async fn each_setting_that_lets_a_crash_take_changes_is_found(db: PgPool) {
    let off = "with pg_settings (name, setting) as (values
        ('fsync', 'off'), ('full_page_writes', 'off'), ('synchronous_commit', 'off'), ('autovacuum', 'off'))";
    let found: Vec<String> =
        sqlx::query_scalar(AssertSqlSafe(format!("{off} {}", db::FORGETS))).fetch_all(&db).await.unwrap();
    assert_eq!(found, ["fsync", "full_page_writes", "synchronous_commit"]);
}

/// A pipe with no room for another byte.
fn full_pipe() -> (PipeReader, PipeWriter) {
    const HOLDS_BYTES: usize = 64 * 1024;
    let (reader, mut writer) = pipe().unwrap();
    writer.write_all(&[b'\n'; HOLDS_BYTES]).unwrap();
    (reader, writer)
}

/// A service whose log nobody reads, after a request.
async fn unread(house: &House, log: PipeWriter) -> Service {
    let talkative = [house.settings(), &[("TIDINGS_LOG".to_owned(), "debug,lapin=off".to_owned())]].concat();
    let service = Service::logging_to(log, &["serve"], &talkative).await;
    assert_eq!(http().get(format!("{}/v1/users", service.url)).send().await.unwrap().status(), 200);
    service
}

#[sqlx::test]
async fn a_log_that_nobody_reads_stops_nothing(db: PgPool) {
    let house = House::open(db).await;
    let (_reader, log) = full_pipe();
    let mut service = unread(&house, log).await;
    service.signal("-TERM").await;
    assert_eq!(service.left().await, Some(0));
}

#[sqlx::test]
async fn what_was_logged_while_nobody_read_is_there_for_who_reads_later(db: PgPool) {
    let house = House::open(db).await;
    let (mut reader, log) = full_pipe();
    let mut service = unread(&house, log).await;
    let text = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    service.signal("-TERM").await;
    assert_eq!(service.left().await, Some(0));
    let text = text.join().unwrap().unwrap();
    assert!(text.contains("/v1/users") && text.contains("leaving: finishing"), "{text}");
    assert!(!text.contains("lines were dropped"), "{text}");
}
