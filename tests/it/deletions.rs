//! Deletions: who has to confirm one, who has, and who is late.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use lapin::options::QueueDeleteOptions;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::clients::{NewClient, Scope};
use tidings_sdk::{
    consumer::{Consumer, Failure, Handler, News},
    envelope::Event,
    mirror::Mirror,
    owner::{Owner, Receipt},
    subscription::Subscription,
    topology::{self, Source},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    house::{Answer, House, connect, env, eventually, http_with, new_client, owner_at, tidings},
    proxy::Proxy,
    sdk::{Diary, SOON},
    sessions,
};

/// A House that waits for receipts for a second, and for a long time.
const IMPATIENT: [(&str, &str); 1] = [("TIDINGS_ERASURE_DEADLINE", "1s")];
/// Until who is late by that is listed: seconds, on a busy machine too.
const LISTED: Duration = Duration::from_secs(10);

/// Registers a subscription of this House's; its name.
async fn register(house: &House, name: &str, keys: &[&str]) -> String {
    let name = format!("{}.{name}", house.exchange);
    let wish = json!({ "routing_keys": keys, "owner": "a-team", "purpose": "a test" });
    Answer::to(house.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(&wish)).await.ok();
    name
}

async fn unregister(house: &House, name: &str) {
    Answer::to(house.request(Method::DELETE, &format!("/v1/subscriptions/{name}?waiting=discard"))).await.ok();
}

async fn confirm(house: &House, user: &Uuid, subscription: &str) -> Answer {
    let path = format!("/v1/deletions/{user}/receipts");
    Answer::to(house.request(Method::POST, &path).json(&json!({ "subscription": subscription }))).await
}

/// A user who was deleted.
async fn deleted(house: &House) -> Uuid {
    let user = house.user(json!({})).await;
    house.delete(&user).await.ok();
    user
}

/// How everybody stands to a deletion, such as `orders receipt`, in order of their names.
async fn stand(house: &House, user: &Uuid) -> Vec<String> {
    let found = house.page(&format!("/v1/deletions/{user}")).await.ok();
    let entries = found.body["subscriptions"].as_array().unwrap().iter();
    let said = entries.map(|entry| {
        let name = entry["subscription"].as_str().unwrap().strip_prefix(&format!("{}.", house.exchange)).unwrap();
        assert_eq!(entry["confirmed_at"].is_null(), entry["how"].is_null());
        format!("{name} {}", entry["how"].as_str().unwrap_or(entry["state"].as_str().unwrap()))
    });
    said.collect()
}

async fn stands(house: &House, user: &Uuid, expected: &[&str]) {
    eventually("how they stand", async || match stand(house, user).await {
        seen if seen == expected => Ok(()),
        seen => Err(seen),
    })
    .await;
}

/// The ids of all deletions that are overdue, read in pages of this many.
async fn overdue(house: &House, limit: usize) -> Vec<(Uuid, Vec<String>)> {
    let (mut all, mut after) = (vec![], String::new());
    loop {
        let page = house.page(&format!("/v1/deletions?state=overdue&limit={limit}{after}")).await.ok().body;
        for entry in page["deletions"].as_array().unwrap() {
            let late = entry["overdue"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
            all.push((entry["user_id"].as_str().unwrap().parse().unwrap(), late.collect()));
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return all,
        }
    }
}

/// In a House that is impatient, and where they were deleted before.
async fn awaits_overdue(house: &House, users: &[Uuid]) -> Vec<(Uuid, Vec<String>)> {
    let began = Instant::now();
    let found = eventually("deletions to be overdue", async || match overdue(house, 2).await {
        found if found.iter().map(|(user, _)| user).eq(users) => Ok(found),
        found => Err(found),
    })
    .await;
    assert!(began.elapsed() < LISTED, "{:?}", began.elapsed());
    found
}

#[sqlx::test]
async fn everybody_who_was_told_confirms_and_nobody_else_has_to(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let crm = register(&house, "crm", &["user.*"]).await;
    let events = register(&house, "events", &["profile.updated", "user.created"]).await;
    let everything = register(&house, "everything", &["#"]).await;
    let ana = deleted(&house).await;
    // Who comes later has nothing of hers.
    let late = register(&house, "late", &["user.deleted"]).await;
    assert_eq!(stand(&house, &ana).await, ["crm pending", "everything pending", "orders pending"]);
    for _ in 0..2 {
        assert_eq!(confirm(&house, &ana, &orders).await.status, 204);
    }
    assert_eq!(stand(&house, &ana).await, ["crm pending", "everything pending", "orders receipt"]);
    // Nobody asked for these, and they are welcome.
    for name in [&late, &events] {
        assert_eq!(confirm(&house, &ana, name).await.status, 204);
    }
    let all = ["crm pending", "events receipt", "everything pending", "late receipt", "orders receipt"];
    assert_eq!(stand(&house, &ana).await, all);
    let body = house.page(&format!("/v1/deletions/{ana}")).await.ok().body;
    assert_eq!((&body["user_id"], &body["version"]), (&json!(ana), &json!(2)));
    let tombstone = house.get(&ana).await;
    assert_eq!(body["deleted_at"], tombstone.body["deleted_at"]);

    // Who is deleted owes nothing any more, also under the same name again; what was confirmed stays.
    unregister(&house, &everything).await;
    unregister(&house, &orders).await;
    register(&house, "everything", &["#"]).await;
    assert_eq!(stand(&house, &ana).await, ["crm pending", "events receipt", "late receipt", "orders receipt"]);
    for name in [&crm, &events, &late, &everything] {
        unregister(&house, name).await;
    }
}

#[sqlx::test]
async fn what_cannot_be_confirmed_is_refused(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let (ana, bo) = (deleted(&house).await, house.user(json!({})).await);
    let nobody = Uuid::new_v4();
    assert_eq!(confirm(&house, &nobody, &orders).await.refusal(404), "user_not_found");
    let living = confirm(&house, &bo, &orders).await;
    assert_eq!((living.refusal(409), living.version()), ("user_not_deleted", 1));
    assert_eq!(confirm(&house, &ana, "nobody.at.all").await.refusal(404), "subscription_not_found");
    assert_eq!(confirm(&house, &ana, "No Name").await.refusal(422), "body_invalid");
    assert_eq!(house.page(&format!("/v1/deletions/{nobody}")).await.refusal(404), "user_not_found");
    assert_eq!(house.page(&format!("/v1/deletions/{bo}")).await.refusal(409), "user_not_deleted");
    assert_eq!(house.page("/v1/deletions/ana").await.refusal(400), "invalid_user_id");
    for wrong in ["", "?state=pending", "?state=overdue&limit=0", "?state=overdue&x=1"] {
        assert_eq!(house.page(&format!("/v1/deletions{wrong}")).await.refusal(400), "invalid_query", "{wrong}");
    }
    assert_eq!(house.page("/v1/deletions?state=overdue&after=x").await.refusal(400), "invalid_cursor");
    assert_eq!(stand(&house, &ana).await, ["orders pending"]);
    house.postgres.down();
    assert_eq!(confirm(&house, &ana, &orders).await.refusal(503), "database_unavailable");
    house.postgres.up();
    assert_eq!(confirm(&house, &ana, &orders).await.status, 204);
    unregister(&house, &orders).await;
}

/// What was deleted while a subscription was told of deletions is owed also when it is told no more; what was deleted later is not.
#[sqlx::test]
async fn a_changed_registration_owes_what_it_was_told_of(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.created"]).await;
    let before = deleted(&house).await;
    register(&house, "orders", &["user.created", "user.deleted"]).await;
    let during = deleted(&house).await;
    register(&house, "orders", &["user.*"]).await;
    let still = deleted(&house).await;
    register(&house, "orders", &["user.created"]).await;
    let after = deleted(&house).await;
    register(&house, "orders", &["#"]).await;
    let again = deleted(&house).await;
    for (user, expected) in [
        (before, &[][..]),
        (during, &["orders pending"]),
        (still, &["orders pending"]),
        (after, &[]),
        (again, &["orders pending"]),
    ] {
        assert_eq!(stand(&house, &user).await, expected);
    }
    unregister(&house, &orders).await;
}

/// A standby that takes over may have a clock that is behind: a duty that would end before it began ends when it began.
#[sqlx::test]
async fn a_clock_that_was_set_back_keeps_nobody_from_giving_up_his_duty(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let later = "update deletion_duties set since = now() + interval '1 hour' where subscription = $1";
    sqlx::query(later).bind(&orders).execute(&house.db).await.unwrap();
    register(&house, "orders", &["user.created"]).await;
    let over = "select until = since from deletion_duties where subscription = $1";
    let over: Option<bool> = sqlx::query_scalar(over).bind(&orders).fetch_one(&house.db).await.unwrap();
    assert_eq!(over, Some(true));
    unregister(&house, &orders).await;
}

/// While the broker does not have its queue a subscription is told of nothing, and so owes nothing.
#[sqlx::test]
async fn who_is_not_declared_yet_owes_nothing(db: PgPool) {
    let house = House::open(db).await;
    house.broker.down();
    let name = format!("{}.orders", house.exchange);
    let wish = json!({ "routing_keys": ["user.deleted"], "owner": "a-team", "purpose": "a test" });
    let refused = Answer::to(house.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(&wish)).await;
    assert_eq!(refused.refusal(503), "broker_unavailable");
    let ana = deleted(&house).await;
    house.broker.up();
    register(&house, "orders", &["user.deleted"]).await;
    assert_eq!(stand(&house, &ana).await, [""; 0]);
    let bo = deleted(&house).await;
    assert_eq!(stand(&house, &bo).await, ["orders pending"]);
    unregister(&house, &name).await;
}

#[sqlx::test]
async fn who_is_late_is_listed_counted_and_told_until_they_confirm(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let (orders, crm) =
        (register(&house, "orders", &["user.deleted"]).await, register(&house, "crm", &["user.deleted"]).await);
    let mut users = vec![];
    for _ in 0..5 {
        users.push(deleted(&house).await);
    }
    confirm(&house, &users[0], &orders).await.ok();
    confirm(&house, &users[0], &crm).await.ok();
    confirm(&house, &users[1], &crm).await.ok();
    let late = awaits_overdue(&house, &users[1..]).await;
    assert_eq!(late[0].1, [orders.as_str()]);
    assert!(late[1..].iter().all(|(_, names)| *names == [crm.as_str(), orders.as_str()]), "{late:?}");
    assert_eq!(stand(&house, &users[1]).await, ["crm receipt", "orders overdue"]);
    let metric = async |name: &str, of: &str| house.metric(&format!("tidings_{name}{{subscription=\"{of}\"}}")).await;
    assert_eq!((metric("erasures_overdue", &orders).await, metric("erasures_overdue", &crm).await), (4.0, 3.0));
    assert!(metric("erasures_overdue_oldest_seconds", &orders).await >= 1.0);
    house.logs(&["deletions were not confirmed in time"]).await;

    // Better late than never.
    for user in &users[1..4] {
        confirm(&house, user, &orders).await.ok();
        confirm(&house, user, &crm).await.ok();
    }
    assert_eq!(overdue(&house, 100).await, [(users[4], vec![crm.clone(), orders.clone()])]);
    unregister(&house, &crm).await;
    assert_eq!(overdue(&house, 100).await, [(users[4], vec![orders.clone()])]);
    confirm(&house, &users[4], &orders).await.ok();
    assert_eq!(overdue(&house, 100).await, []);
    assert_eq!(metric("erasures_overdue", &orders).await, 0.0);
    assert_eq!(metric("erasures_overdue_oldest_seconds", &orders).await, 0.0);
    // What a subscription owed goes with it.
    let owed = "select count(*) from deletion_receipts where confirmed_at is null";
    eventually("nothing to be owed", async || {
        let owed: i64 = sqlx::query_scalar(owed).fetch_one(&house.db).await.unwrap();
        if owed == 0 { Ok(()) } else { Err(owed) }
    })
    .await;
    unregister(&house, &orders).await;
}

/// An instance that starts after a deletion's deadline still finds it, and one that is restarted tells nothing twice.
#[sqlx::test]
async fn a_restart_overlooks_nobody(db: PgPool) {
    let mut house = House::with(db, &IMPATIENT).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let ana = deleted(&house).await;
    awaits_overdue(&house, &[ana]).await;
    let bo = deleted(&house).await;
    house.service.kill().await;
    house.restart().await;
    awaits_overdue(&house, &[ana, bo]).await;
    confirm(&house, &ana, &orders).await.ok();
    confirm(&house, &bo, &orders).await.ok();
    assert_eq!(overdue(&house, 100).await, []);
    unregister(&house, &orders).await;
}

/// As if all that was so long ago.
async fn age(house: &House, interval: &str) {
    let mut then = house.db.begin().await.unwrap();
    for statement in [
        "update deletion_duties set since = since - $1::interval, until = until - $1::interval",
        "update users set deleted_at = deleted_at - $1::interval where deleted_at is not null",
        "update deletions_looked_at set deleted_at = deleted_at - $1::interval",
    ] {
        sqlx::query(statement).bind(interval).execute(&mut *then).await.unwrap();
    }
    then.commit().await.unwrap();
}

/// Where there are days to confirm in, most deletions are younger than that when one of them is found to be late.
#[sqlx::test]
async fn who_is_late_with_one_is_found_late_with_the_next_too(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ERASURE_DEADLINE", "1h")]).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let ana = deleted(&house).await;
    age(&house, "20 minutes").await;
    let bo = deleted(&house).await;
    age(&house, "50 minutes").await;
    awaits_overdue(&house, &[ana]).await;
    age(&house, "20 minutes").await;
    let late = eventually("both to be overdue", async || match overdue(&house, 2).await {
        found if found.iter().any(|(user, _)| *user == bo) => Ok(found),
        found => Err(found),
    })
    .await;
    assert_eq!(late.last(), Some(&(bo, vec![orders.clone()])));
    unregister(&house, &orders).await;
}

/// A deletion is dated by its beginning: later ones may have been found late when it is committed.
#[sqlx::test]
async fn who_is_late_with_a_deletion_that_took_its_time_is_found_too(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let ana = house.user(json!({})).await;
    let mut slow = house.db.begin().await.unwrap();
    let delete = "
        update users
           set version = 2, profile = null, created_at = null, updated_at = null, deleted_at = now()
         where id = $1
    ";
    assert_eq!(sqlx::query(delete).bind(ana).execute(&mut *slow).await.unwrap().rows_affected(), 1);
    let bo = deleted(&house).await;
    awaits_overdue(&house, &[bo]).await;
    slow.commit().await.unwrap();
    awaits_overdue(&house, &[ana, bo]).await;
    unregister(&house, &orders).await;
}

/// To give up listening is no confirmation of what was heard.
#[sqlx::test]
async fn who_is_told_of_deletions_no_more_is_late_with_those_that_he_was_told_of(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ERASURE_DEADLINE", "1h")]).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let ana = deleted(&house).await;
    register(&house, "orders", &["user.created"]).await;
    deleted(&house).await;
    age(&house, "2 hours").await;
    assert_eq!(awaits_overdue(&house, &[ana]).await, [(ana, vec![orders.clone()])]);
    unregister(&house, &orders).await;
}

/// Who is registered under a name of before owes nothing of what was owed under it.
#[sqlx::test]
async fn a_new_registration_is_free_of_the_debts_of_the_one_before(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let orders = register(&house, "orders", &["user.deleted"]).await;
    let ana = deleted(&house).await;
    awaits_overdue(&house, &[ana]).await;
    // There is no moment in which the name is nobody's, for who looks after the debts.
    let mut meanwhile = house.db.begin().await.unwrap();
    sqlx::query("lock table deletion_receipts in share mode").execute(&mut *meanwhile).await.unwrap();
    unregister(&house, &orders).await;
    register(&house, "orders", &["user.deleted"]).await;
    meanwhile.commit().await.unwrap();
    eventually("nothing to be owed", async || {
        let owed = "select count(*) from deletion_receipts where confirmed_at is null";
        let owed: i64 = sqlx::query_scalar(owed).fetch_one(&house.db).await.unwrap();
        if owed == 0 { Ok(()) } else { Err(owed) }
    })
    .await;
    unregister(&house, &orders).await;
}

/// As the schema is brought up to date under subscriptions that were there before.
#[sqlx::test(migrations = false)]
async fn who_was_registered_before_confirms_from_now_on(db: PgPool) {
    let migrations = sqlx::migrate!();
    let (before, rest): (Vec<_>, Vec<_>) =
        migrations.iter().partition(|migration| migration.version < 20_261_124_000_004);
    for migration in before {
        sqlx::raw_sql(sqlx::AssertSqlSafe(migration.sql.as_str().to_owned())).execute(&db).await.unwrap();
    }
    let register = "
        insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields, declared_revision)
        values ($1, $2, '{}', 'a-team', 'a test', $2, '{}', $3)
    ";
    let cases: &[(&str, &[&str], i64)] = &[
        ("a1", &["user.deleted"], 1),
        ("a2", &["user.created", "user.*"], 1),
        ("a3", &["#"], 1),
        ("a4", &["*.deleted"], 1),
        ("a5", &["#.deleted"], 1),
        ("a6", &["user.#.deleted"], 1),
        ("a7", &["user.deleted.#"], 1),
        ("b1", &["user.created", "profile.updated"], 1),
        ("b2", &["*.created"], 1),
        ("b3", &["profile.#"], 1),
        ("b4", &["user.deleted"], 0),
    ];
    for (name, keys, declared) in cases {
        let keys: Vec<&str> = keys.to_vec();
        sqlx::query(register).bind(name).bind(&keys).bind(declared).execute(&db).await.unwrap();
        let mut subscription = Subscription::new(name.parse().unwrap());
        subscription.keys = keys.iter().map(|key| key.parse().unwrap()).collect();
        let hears = subscription.wants(&Event::Deleted) && *declared > 0;
        assert_eq!(hears, name.starts_with('a'), "the case itself: {name}");
    }
    for migration in rest {
        sqlx::raw_sql(sqlx::AssertSqlSafe(migration.sql.as_str().to_owned())).execute(&db).await.unwrap();
    }
    let owing: Vec<String> =
        sqlx::query_scalar("select subscription from deletion_duties order by 1").fetch_all(&db).await.unwrap();
    assert_eq!(owing, ["a1", "a2", "a3", "a4", "a5", "a6", "a7"]);
}

async fn said(house: &House, command: &[&str]) -> (Option<i32>, String, String) {
    let output = tidings(command, house.settings()).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[sqlx::test]
async fn an_operator_sees_who_is_late(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let (orders, crm) =
        (register(&house, "orders", &["user.deleted"]).await, register(&house, "crm", &["user.deleted"]).await);
    let ana = deleted(&house).await;
    confirm(&house, &ana, &crm).await.ok();
    awaits_overdue(&house, &[ana]).await;
    let (code, out, _) = said(&house, &["deletions", "show", &ana.to_string()]).await;
    assert_eq!(code, Some(0));
    assert!(out.contains("(receipt)") && out.contains(&format!("{orders}  overdue")), "{out}");
    let (code, out, talk) = said(&house, &["deletions", "overdue"]).await;
    assert_eq!((code, out.lines().count(), talk.as_str()), (Some(0), 1, "1 deletions are overdue\n"));
    assert!(out.contains(&ana.to_string()) && out.trim_end().ends_with(&orders), "{out}");
    let (code, out, _) = said(&house, &["deletions", "overdue", "--json"]).await;
    let line: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &line["user_id"], &line["overdue"]), (Some(0), &json!(ana), &json!([orders])));
    // Not late by a longer deadline.
    let (code, out, _) = said(&house, &["deletions", "overdue", "--erasure-deadline", "1h"]).await;
    assert_eq!((code, out.as_str()), (Some(0), ""));
    let (code, _, talk) = said(&house, &["deletions", "show", &Uuid::new_v4().to_string()]).await;
    assert_eq!(code, Some(1));
    assert!(talk.contains("nobody ever had this id"), "{talk}");
    let (code, _, talk) = said(&house, &["deletions", "show", "ana", "--erasure-deadline", "soon"]).await;
    assert_eq!(code, Some(2));
    assert!(talk.contains("USER_ID") && talk.contains("TIDINGS_ERASURE_DEADLINE"), "{talk}");
    for name in [&orders, &crm] {
        unregister(&house, name).await;
    }
}

/// A registered application that handles deletions with the library.
struct Application {
    subscription: Subscription,
    diary: Diary,
    /// Deletions that the handler was called for.
    deletions: Arc<Mutex<Vec<Uuid>>>,
    stop: CancellationToken,
    running: JoinHandle<Result<(), tidings_sdk::consumer::StartError>>,
}

impl Application {
    async fn of(house: &House, url: &str, name: &str, diary: Diary, set: impl FnOnce(Consumer) -> Consumer) -> Self {
        let mut subscription = Subscription::new(name.parse().unwrap());
        subscription.keys.insert("user.*".parse().unwrap());
        let owner = owner_at(url).patience(Duration::from_millis(200));
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let consumer = Consumer::new(&env("AMQP_URL"), source, subscription.clone(), owner).unwrap();
        let (stop, deletions) = (CancellationToken::new(), Arc::default());
        let handler = Deaf { diary: diary.clone(), deletions: Arc::clone(&deletions) };
        let running = tokio::spawn(set(consumer.retry_delays(SOON)).run(handler, stop.clone()));
        Self { subscription, diary, deletions, stop, running }
    }

    async fn end(self) {
        self.stop.cancel();
        self.running.await.unwrap().unwrap();
        let connection = connect(&env("AMQP_URL")).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        topology::delete(&channel, &self.subscription.name, &SOON).await.unwrap();
    }
}

/// Does its work without asking the owner for anything.
struct Deaf {
    diary: Diary,
    deletions: Arc<Mutex<Vec<Uuid>>>,
}

impl Handler for Deaf {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        self.diary.begun.fetch_add(1, Ordering::SeqCst);
        if news.event == Event::Deleted {
            self.deletions.lock().unwrap().push(news.user_id);
        }
        if self.diary.cursed.lock().unwrap().contains_key(&news.user_id) {
            return Err(Failure::because("cursed"));
        }
        Ok(())
    }
}

#[sqlx::test]
async fn an_application_in_rust_confirms_what_its_handler_has_done(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let diary = Diary::new();
    let (ana, bo) = (house.user(json!({})).await, house.user(json!({})).await);
    diary.curse(bo, crate::sdk::Curse::Fails);
    let url = house.service.url.clone();
    // It is down: who is deleted is pending, and then overdue.
    house.delete(&ana).await.ok();
    house.delete(&bo).await.ok();
    awaits_overdue(&house, &[ana, bo]).await;
    let application = Application::of(&house, &url, &orders, diary, |consumer| consumer).await;
    stands(&house, &ana, &["orders receipt"]).await;
    // A handler that fails confirms nothing, however often it is called.
    eventually("more attempts", async || match application.diary.begun.load(Ordering::SeqCst) {
        begun if begun > 3 => Ok(()),
        begun => Err(begun),
    })
    .await;
    assert_eq!(stand(&house, &bo).await, ["orders overdue"]);
    application.end().await;
    unregister(&house, &orders).await;
}

/// An outage of the owner after the work is done: the handler is not called again, nobody waits, and when it is over the owner hears.
#[sqlx::test]
async fn an_outage_of_the_owner_costs_no_second_call_and_holds_up_nobody(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let real = house.service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let before = Proxy::before(real).await;
    let url = format!("http://{}", before.address());
    let few = |consumer: Consumer| consumer.concurrency(1).prefetch(4);
    let application = Application::of(&house, &url, &orders, Diary::new(), few).await;
    before.down();
    let mut users = vec![];
    for _ in 0..10 {
        users.push(deleted(&house).await);
    }
    users.sort_unstable();
    // More than can be in hand at once, one after the other.
    eventually("all to be handled", async || {
        let mut handled = application.deletions.lock().unwrap().clone();
        handled.sort_unstable();
        if handled == users { Ok(()) } else { Err(handled.len()) }
    })
    .await;
    let calls = application.diary.begun.load(Ordering::SeqCst);
    let later = house.user(json!({})).await;
    eventually("others to be handled meanwhile", async || match application.diary.begun.load(Ordering::SeqCst) {
        begun if begun > calls => Ok(()),
        begun => Err(begun),
    })
    .await;
    assert_eq!(application.deletions.lock().unwrap().len(), 10, "each once");
    assert_eq!(stand(&house, &users[0]).await, ["orders pending"]);
    // A crash in between forgets nothing: what is owed lies in the broker.
    application.running.abort();
    let diary = Diary::new();
    let again = Application::of(&house, &url, &orders, diary, few).await;
    before.up();
    for user in &users {
        stands(&house, user, &["orders receipt"]).await;
    }
    let twice = again.deletions.lock().unwrap().len();
    assert!(twice <= 4, "{twice} calls after the crash: what was in hand, and no more");
    house.delete(&later).await.ok();
    stands(&house, &later, &["orders receipt"]).await;
    again.end().await;
    unregister(&house, &orders).await;
}

/// An outage that lasts is asked about ever more rarely.
#[sqlx::test]
async fn what_is_owed_waits_longer_each_time(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let before = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let url = format!("http://{}", before.address());
    let delays = [SOON[0], Duration::from_secs(3_600)];
    let patient = |consumer: Consumer| consumer.retry_delays(delays);
    let application = Application::of(&house, &url, &orders, Diary::new(), patient).await;
    before.down();
    deleted(&house).await;
    let (name, connection) = (&application.subscription.name, connect(&env("AMQP_URL")).await.unwrap());
    eventually("it to wait for an hour", async || {
        let channel = connection.create_channel().await.unwrap();
        let depth = topology::depth(&channel, &name.retry_queue(delays[1])).await;
        if matches!(&depth, Ok(depth) if depth.ready == 1) { Ok(()) } else { Err(depth.map(|depth| depth.ready).ok()) }
    })
    .await;
    before.up();
    let channel = connection.create_channel().await.unwrap();
    let queue = name.retry_queue(delays[1]);
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    application.end().await;
    unregister(&house, &orders).await;
}

/// Without a queue to wait in, what is to be confirmed waits where it is.
#[sqlx::test]
async fn a_deletion_is_confirmed_after_an_outage_although_there_is_no_queue_to_wait_in(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let real = house.service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let before = Proxy::before(real).await;
    let url = format!("http://{}", before.address());
    let application = Application::of(&house, &url, &orders, Diary::new(), |consumer| consumer.retry_delays([])).await;
    before.down();
    let ana = deleted(&house).await;
    eventually("the work to be done", async || match application.deletions.lock().unwrap().len() {
        1 => Ok(()),
        handled => Err(handled),
    })
    .await;
    // Much longer than one receipt is tried for.
    let handled = Instant::now();
    eventually("the first receipt to fail", async || match handled.elapsed() {
        long if long > Duration::from_secs(1) => Ok(()),
        short => Err(short),
    })
    .await;
    assert_eq!(stand(&house, &ana).await, ["orders pending"]);
    before.up();
    stands(&house, &ana, &["orders receipt"]).await;
    application.end().await;
    unregister(&house, &orders).await;
}

#[sqlx::test]
async fn an_application_may_confirm_by_itself_or_not_at_all(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let url = house.service.url.clone();
    let application =
        Application::of(&house, &url, &orders, Diary::new(), |consumer| consumer.without_receipts()).await;
    let ana = deleted(&house).await;
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    eventually("the work to be done and acknowledged", async || {
        let depth = topology::depth(&channel, &orders).await.unwrap();
        match (application.diary.begun.load(Ordering::SeqCst), depth.ready) {
            (1.., 0) => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
    assert_eq!(stand(&house, &ana).await, ["orders pending"]);
    let (owner, name) = (owner_at(&url), orders.parse().unwrap());
    assert_eq!(owner.confirm_deletion(ana, &name).await, Ok(Receipt::Kept));
    assert_eq!(owner.confirm_deletion(Uuid::new_v4(), &name).await, Ok(Receipt::Unwanted));
    assert_eq!(stand(&house, &ana).await, ["orders receipt"]);
    application.end().await;
    unregister(&house, &orders).await;
}

/// A subscription that was registered without a client takes nobody's word but an administrator's, and who gives his hears so.
#[sqlx::test]
async fn who_does_not_stand_for_a_subscription_hears_that_his_receipt_is_not_kept(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let key = new_client(&house.db, NewClient::named("orders", [Scope::ReadUsers]).unwrap()).await;
    let (url, name) = (house.service.url.as_str(), orders.parse().unwrap());
    let (own, admin) = (Owner::at(url).unwrap().with_key(&key).unwrap(), owner_at(url));
    let (ana, bo) = (deleted(&house).await, house.user(json!({})).await);
    assert_eq!(own.confirm_deletion(ana, &name).await, Ok(Receipt::UnknownSubscription));
    assert_eq!(stand(&house, &ana).await, ["orders pending"]);
    assert_eq!(admin.confirm_deletion(bo, &name).await, Ok(Receipt::Unwanted), "he lives");
    assert_eq!(admin.confirm_deletion(ana, &name).await, Ok(Receipt::Kept));
    assert_eq!(stand(&house, &ana).await, ["orders receipt"]);
    unregister(&house, &orders).await;
}

/// Nobody but the subscription itself can have a deletion counted as handled: the mark is heeded from its own exchange alone.
#[sqlx::test]
async fn a_forged_mark_does_not_spare_the_handler(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let url = house.service.url.clone();
    let application = Application::of(&house, &url, &orders, Diary::new(), |consumer| consumer).await;
    let notice = crate::sdk::notice(Uuid::new_v4(), 2, Event::Deleted);
    let (properties, body) = notice.to_message("urn:tidings:test");
    let mut headers = properties.headers().clone().unwrap();
    headers.insert(topology::RECEIPT_OWED.into(), lapin::types::AMQPValue::LongInt(1));
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let forged = channel.basic_publish(
        house.exchange.as_str().into(),
        "user.deleted".into(),
        Default::default(),
        &body,
        properties.with_headers(headers),
    );
    forged.await.unwrap().await.unwrap();
    eventually("the handler to be called", async || match application.diary.begun.load(Ordering::SeqCst) {
        0 => Err(()),
        _ => Ok(()),
    })
    .await;
    application.end().await;
    unregister(&house, &orders).await;
}

/// Catches up until the owner has the receipt of this deletion.
async fn is_confirmed(house: &House, mirror: &Mirror, user: &Uuid) {
    let owner = owner_at(&house.service.url);
    eventually("the mirror to be told", async || {
        mirror.catch_up(&house.db, &owner).await.unwrap();
        match stand(house, user).await {
            seen if seen == ["orders receipt"] => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
}

/// What catching up and repairing take out of a mirror is confirmed too.
#[sqlx::test]
async fn a_mirror_confirms_whom_it_let_go(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let stranger = deleted(&house).await;
    let owner = owner_at(&house.service.url);
    let mirror = Mirror::new().confirming(orders.parse().unwrap());
    mirror.prepare(&house.db).await.unwrap();
    let [ana, bo] = [house.user(json!({})).await, house.user(json!({})).await];
    // The feed lags behind whoever has a transaction open on this server.
    eventually("both to be held", async || {
        mirror.catch_up(&house.db, &owner).await.unwrap();
        let mut db = house.db.acquire().await.unwrap();
        let held = [mirror.get(&mut db, ana).await.unwrap(), mirror.get(&mut db, bo).await.unwrap()];
        if held.iter().all(Option::is_some) { Ok(()) } else { Err(held.iter().flatten().count()) }
    })
    .await;
    house.delete(&ana).await.ok();
    is_confirmed(&house, &mirror, &ana).await;
    house.delete(&bo).await.ok();
    let difference = mirror.verify(&house.db, &owner).await.unwrap();
    mirror.repair(&house.db, &owner, &difference).await.unwrap();
    assert_eq!(stand(&house, &bo).await, ["orders receipt"]);
    assert_eq!(stand(&house, &stranger).await, ["orders pending"], "of whom it never held anything");
    unregister(&house, &orders).await;
}

/// What it confirms is out of it: also whom the owner deleted at a version below the one that is held, since it was set back.
#[sqlx::test]
async fn a_mirror_that_confirms_a_deletion_has_done_it(db: PgPool) {
    let house = House::open(db).await;
    let orders = register(&house, "orders", &["user.*"]).await;
    let owner = owner_at(&house.service.url);
    let mirror = Mirror::new().confirming(orders.parse().unwrap());
    mirror.prepare(&house.db).await.unwrap();
    let ana = house.user(json!({})).await;
    house.feed_is_clear().await;
    mirror.catch_up(&house.db, &owner).await.unwrap();
    let ahead = "update tidings_users set version = 9 where id = $1";
    sqlx::query(ahead).bind(ana).execute(&house.db).await.unwrap();
    house.delete(&ana).await.ok();
    is_confirmed(&house, &mirror, &ana).await;
    assert!(mirror.get(&mut house.db.acquire().await.unwrap(), ana).await.unwrap().is_none());
    unregister(&house, &orders).await;
}

/// A client with a key of its own, that registers a subscription to deletions under each of these names.
async fn client(house: &House, client: &str, names: &[&str]) -> reqwest::Client {
    let scopes = ["client", "create", client, "--scope", "users:read,subscriptions"];
    let (code, key, talk) = said(house, &scopes).await;
    assert_eq!(code, Some(0), "{talk}");
    let http = http_with(key.trim_end());
    for name in names {
        let url = format!("{}/v1/subscriptions/{}.{name}", house.service.url, house.exchange);
        let wish = json!({ "routing_keys": ["user.deleted"], "owner": "a-team", "purpose": "a test" });
        Answer::to(http.put(url).json(&wish)).await.ok();
    }
    // Within a second every instance knows for what a client stands.
    eventually("the client to be known with its subscriptions", async || {
        let url = format!("{}/v1/subscriptions", house.service.url);
        let listed = Answer::to(http.get(url)).await.ok().body;
        match listed["subscriptions"].as_array().unwrap().len() {
            seen if seen == names.len() => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
    http
}

/// Its debt would go with it.
#[sqlx::test]
async fn who_is_late_does_not_delete_his_subscription(db: PgPool) {
    let house = House::with(db, &IMPATIENT).await;
    let crm = client(&house, "crm", &["crm"]).await;
    let ana = deleted(&house).await;
    awaits_overdue(&house, &[ana]).await;
    let name = format!("{}.crm", house.exchange);
    let url = format!("{}/v1/subscriptions/{name}?waiting=discard", house.service.url);
    let delete = async || Answer::to(crm.delete(&url)).await;
    let refused = delete().await;
    assert_eq!(refused.refusal(409), "subscription_not_empty");
    assert!(refused.body["detail"].as_str().unwrap().contains("confirm"), "{refused:?}");
    assert_eq!(confirm(&house, &ana, &name).await.status, 204);
    delete().await.ok();
    // An administrator may, and the log has it.
    let crm = register(&house, "crm", &["user.deleted"]).await;
    let bo = deleted(&house).await;
    awaits_overdue(&house, &[bo]).await;
    unregister(&house, &crm).await;
    house.logs(&["while it owed confirmations"]).await;
}

/// Nor does he let it expire, which he says when to.
#[sqlx::test]
async fn who_is_late_does_not_expire(db: PgPool) {
    let house = House::with(db, &[IMPATIENT[0], ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s")]).await;
    let brief = |name: &str, expires_after_s: u32| {
        let name = format!("{}.{name}", house.exchange);
        let (keys, team) = (["user.deleted"], "team");
        let wish = json!({ "routing_keys": keys, "owner": team, "purpose": "p", "expires_after_s": expires_after_s });
        let registered = house.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(&wish);
        async { Answer::to(registered).await.ok().body["name"].as_str().unwrap().to_owned() }
    };
    let crm = brief("crm", 4).await;
    let ana = deleted(&house).await;
    awaits_overdue(&house, &[ana]).await;
    // Registered later, and for longer: when it is gone, the other one's time has long come.
    let orders = brief("orders", 6).await;
    let is_there = async |name: &str| house.page(&format!("/v1/subscriptions/{name}")).await.status == 200;
    eventually("the one that owes nothing to expire", async || if is_there(&orders).await { Err(()) } else { Ok(()) })
        .await;
    assert!(is_there(&crm).await, "{}", house.service.log());
    confirm(&house, &ana, &crm).await.ok();
    eventually("the other one to expire", async || if is_there(&crm).await { Err(()) } else { Ok(()) }).await;
}

#[sqlx::test]
async fn a_client_confirms_for_itself_and_is_seen_fetching_the_tombstone(db: PgPool) {
    let house = House::open(db).await;
    let crm = client(&house, "crm", &["crm"]).await;
    let both = client(&house, "both", &["one", "two"]).await;
    let (ana, bo) = (deleted(&house).await, deleted(&house).await);
    let url = |path: &str| format!("{}{path}", house.service.url);
    let all_pending = ["crm pending", "one pending", "two pending"];
    assert_eq!(stand(&house, &ana).await, all_pending);

    // Not for others, of whom it does not even learn that they are there.
    let receipt = async |http: &reqwest::Client, user: &Uuid, name: &str| {
        let receipt = json!({ "subscription": format!("{}.{name}", house.exchange) });
        Answer::to(http.post(url(&format!("/v1/deletions/{user}/receipts"))).json(&receipt)).await
    };
    for name in ["one", "nobody"] {
        assert_eq!(receipt(&crm, &ana, name).await.refusal(404), "subscription_not_found");
    }
    for path in [format!("/v1/deletions/{ana}"), "/v1/deletions?state=overdue".to_owned()] {
        assert_eq!(Answer::to(crm.get(url(&path))).await.refusal(403), "forbidden");
    }
    assert_eq!(stand(&house, &ana).await, all_pending);

    // One that stands for one subscription has fetched for it; of one that stands for two nobody knows for which.
    let get = async |http: &reqwest::Client, user: &Uuid| Answer::to(http.get(url(&format!("/v1/users/{user}")))).await;
    eventually("to be seen fetching", async || {
        assert_eq!(get(&both, &ana).await.refusal(410), "user_deleted");
        assert_eq!(get(&crm, &ana).await.refusal(410), "user_deleted");
        match stand(&house, &ana).await {
            seen if seen == ["crm fetched", "one pending", "two pending"] => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
    let batch = json!({ "ids": [ana, bo, Uuid::new_v4()] });
    Answer::to(crm.post(url("/v1/users:batchGet")).json(&batch)).await.ok();
    stands(&house, &bo, &["crm fetched", "one pending", "two pending"]).await;
    // A page of changes was sent; whether anybody read it is not known.
    Answer::to(both.get(url("/v1/changes"))).await.ok();

    // Its word is worth more than having been seen, and stays.
    assert_eq!(receipt(&crm, &ana, "crm").await.status, 204);
    get(&crm, &ana).await;
    assert_eq!(receipt(&both, &ana, "two").await.status, 204);
    assert_eq!(stand(&house, &ana).await, ["crm receipt", "one pending", "two receipt"]);
    for name in ["crm", "one", "two"] {
        unregister(&house, &format!("{}.{name}", house.exchange)).await;
    }
}

/// What is observed is noted when it can be: a table that cannot be written to keeps nobody waiting.
#[sqlx::test]
async fn being_observed_costs_a_client_nothing(db: PgPool) {
    let house = House::open(db).await;
    let crm = client(&house, "crm", &["crm"]).await;
    let ana = deleted(&house).await;
    let url = format!("{}/v1/users/{ana}", house.service.url);
    let mut holder = house.db.begin().await.unwrap();
    sqlx::query("lock table deletion_receipts").execute(&mut *holder).await.unwrap();
    let began = Instant::now();
    for _ in 0..30 {
        assert_eq!(Answer::to(crm.get(&url)).await.refusal(410), "user_deleted");
    }
    // Who waited for the note would wait for the lock, a second each time.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    holder.rollback().await.unwrap();
    eventually("to be seen fetching", async || {
        Answer::to(crm.get(&url)).await;
        match stand(&house, &ana).await {
            seen if seen == ["crm fetched"] => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
    unregister(&house, &format!("{}.crm", house.exchange)).await;
}

/// However many are fetched who are gone, while nothing can be noted.
#[sqlx::test]
async fn what_is_observed_takes_no_receipts_place(db: PgPool) {
    let house = House::open(db).await;
    let crm = client(&house, "crm", &["crm"]).await;
    let gone = "
        insert into users (id, version, deleted_at) select gen_random_uuid(), 2, now() from generate_series(1, 500)
        returning id
    ";
    let gone: Vec<Uuid> = sqlx::query_scalar(gone).fetch_all(&house.db).await.unwrap();
    let mut holder = house.db.begin().await.unwrap();
    sqlx::query("lock table deletion_receipts").execute(&mut *holder).await.unwrap();
    for _ in 0..12 {
        let fetch = crm.post(format!("{}/v1/users:batchGet", house.service.url)).json(&json!({ "ids": gone }));
        Answer::to(fetch).await.ok();
    }
    // It had its place: what it waited for is the table.
    let name = format!("{}.crm", house.exchange);
    assert_eq!(confirm(&house, &gone[0], &name).await.refusal(503), "database_unavailable");
    holder.rollback().await.unwrap();
    assert_eq!(confirm(&house, &gone[0], &name).await.status, 204);
    unregister(&house, &name).await;
}

/// A fetch comes once: a session that the database ended in between costs no note, and a note that is lost is counted.
#[sqlx::test]
async fn what_is_observed_outlives_its_session_or_is_counted(db: PgPool) {
    let house = House::open(db).await;
    let crm = client(&house, "crm", &["crm"]).await;
    let (ana, bo, eve) = (deleted(&house).await, deleted(&house).await, deleted(&house).await);
    let fetch = async |user: &Uuid| {
        let url = format!("{}/v1/users/{user}", house.service.url);
        assert_eq!(Answer::to(crm.get(url)).await.refusal(410), "user_deleted");
    };
    eventually("to be seen fetching", async || {
        fetch(&ana).await;
        match stand(&house, &ana).await {
            seen if seen == ["crm fetched"] => Ok(()),
            seen => Err(seen),
        }
    })
    .await;
    assert_eq!(sessions::terminate(&house.db, "tidings deletions recorder").await, 1);
    fetch(&bo).await;
    stands(&house, &bo, &["crm fetched"]).await;

    let mut holder = house.db.begin().await.unwrap();
    sqlx::query("lock table deletion_receipts").execute(&mut *holder).await.unwrap();
    fetch(&eve).await;
    eventually("the loss to be counted", async || match house.metric("tidings_erasures_not_observed_total").await {
        1.0 => Ok(()),
        lost => Err(lost),
    })
    .await;
    holder.rollback().await.unwrap();
    unregister(&house, &format!("{}.crm", house.exchange)).await;
}
