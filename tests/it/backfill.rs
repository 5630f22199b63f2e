//! Backfill: one subscription is told of every user, and nobody else hears of it or waits for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use lapin::{
    message::Delivery,
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, describe, env, eventually, tidings},
    hurt::HurtBroker,
    rights,
    subscribed::{Consumer, Subscribed, header, notice},
};

async fn start(house: &House, orders: &Subscribed, asked: Value) -> Answer {
    Answer::to(house.request(Method::POST, &orders.path("backfill")).json(&asked)).await
}

async fn act(house: &House, orders: &Subscribed, action: &str) -> Answer {
    Answer::to(house.request(Method::POST, &orders.path(&format!("backfill:{action}")))).await
}

async fn show(house: &House, orders: &Subscribed) -> Value {
    house.page(&orders.path("backfill")).await.ok().body
}

async fn await_state(house: &House, orders: &Subscribed, state: &str) -> Value {
    eventually(state, async || {
        let now = show(house, orders).await;
        if now["state"] == state { Ok(now) } else { Err(now) }
    })
    .await
}

async fn await_wait(house: &House, orders: &Subscribed, why: &str) -> Value {
    eventually(why, async || {
        let now = show(house, orders).await;
        if now["state"] == "waiting" && now["waiting_for"] == why { Ok(now) } else { Err(now) }
    })
    .await
}

/// So many users, without telling anybody.
async fn users(house: &House, count: i32) -> BTreeSet<Uuid> {
    let insert = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 1 + n % 3, '{}', now(), now() from generate_series(1, $1) as n
        returning id
    ";
    let users: Vec<Uuid> = sqlx::query_scalar(insert).bind(count).fetch_all(&house.db).await.unwrap();
    users.into_iter().collect()
}

/// User by user, what was told.
fn told(messages: &[Delivery]) -> BTreeMap<Uuid, Vec<String>> {
    let mut told = BTreeMap::<Uuid, Vec<String>>::new();
    for message in messages.iter().map(notice) {
        told.entry(message.user_id).or_default().push(describe(&message));
    }
    told
}

#[sqlx::test]
async fn everybody_is_told_as_if_they_had_just_changed_and_nobody_else_hears_of_it(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    let eve = house.user(json!({})).await;
    house.delete(&eve).await;
    house.settle().await;
    let heard = house.audit.heard().len();
    // Joined late: all of this was before its time.
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let other = Subscribed::to(&house, "other", &["#"], &[]).await;
    let started = start(&house, &orders, json!({ "users": "all" })).await;
    assert_eq!(started.status, 202, "{started:?}");
    assert_eq!(started.headers["location"], orders.path("backfill"));
    let done = await_state(&house, &orders, "done").await;
    let counts = ["sent", "skipped", "total", "progress", "eta_s"].map(|name| done[name].clone());
    assert_eq!(counts, [json!(2), json!(0), json!(2), json!(1.0), Value::Null], "{done}");
    assert!(done["finished_at"].is_string(), "{done}");

    let messages = orders.take().await;
    assert_eq!(
        told(&messages),
        BTreeMap::from([(ana, vec!["user.created".to_owned()]), (eve, vec!["user.deleted".to_owned()]),])
    );
    for message in &messages {
        let told = notice(message);
        let id: Uuid = done["id"].as_str().unwrap().parse().unwrap();
        assert_eq!(header(message, "tidings-backfill").unwrap(), id.to_string());
        assert_eq!(told.version, 2);
        assert_eq!(told.message_id, Uuid::new_v5(&id, format!("{}/2", told.user_id).as_bytes()));
        assert_eq!(message.properties.delivery_mode(), &Some(2));
        assert_eq!((message.exchange.as_str(), message.routing_key.as_str()), (orders.name.as_str(), "work"));
        let at = "select coalesce(updated_at, deleted_at) from users where id = $1";
        let at: time::OffsetDateTime = sqlx::query_scalar(at).bind(told.user_id).fetch_one(&house.db).await.unwrap();
        assert_eq!(told.occurred_at, at);
    }
    house.settle().await;
    assert_eq!((house.audit.heard().len(), other.waiting().await), (heard, 0));

    // Another one tells the same under other ids.
    start(&house, &orders, json!({ "users": "all" })).await.ok();
    orders.await_waiting(2).await;
    let again = orders.take().await;
    assert_eq!(told(&again), told(&messages));
    assert_ne!(notice(&again[0]).message_id, notice(&messages[0]).message_id);
    orders.end().await;
    other.end().await;
}

#[sqlx::test]
async fn a_subscription_is_told_what_it_wants_to_know(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let eve = house.user(json!({})).await;
    house.delete(&eve).await;
    house.settle().await;
    for (keys, fields, of_ana, of_eve) in [
        (&["user.deleted"][..], &["city", "email"][..], Some("profile.updated[city,email]"), Some("user.deleted")),
        (&["profile.updated"], &[], Some("profile.updated"), None),
        (&["user.created"], &[], Some("user.created"), None),
        (&["user.deleted"], &[], None, Some("user.deleted")),
    ] {
        let orders = Subscribed::to(&house, "orders", keys, fields).await;
        start(&house, &orders, json!({ "users": "all" })).await.ok();
        let done = await_state(&house, &orders, "done").await;
        let expected: BTreeMap<Uuid, Vec<String>> = [(ana, of_ana), (eve, of_eve)]
            .into_iter()
            .filter_map(|(user, told)| Some((user, vec![told?.to_owned()])))
            .collect();
        assert_eq!(told(&orders.take().await), expected, "{keys:?} {fields:?}");
        assert_eq!(done["sent"], expected.len(), "{done}");
        assert_eq!(done["skipped"], 2 - expected.len(), "{done}");
        sqlx::query("delete from subscriptions").execute(&house.db).await.unwrap();
        orders.end().await;
    }
}

#[sqlx::test]
async fn only_those_who_were_asked_for_are_told(db: PgPool) {
    let house = House::open(db).await;
    let all: Vec<Uuid> = users(&house, 500).await.into_iter().collect();
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let mut asked = all[100..400].to_vec();
    asked.extend([all[100], Uuid::new_v4()]);
    start(&house, &orders, json!({ "user_ids": asked })).await.ok();
    let done = await_state(&house, &orders, "done").await;
    assert_eq!((&done["sent"], &done["skipped"]), (&json!(300), &json!(1)), "{done}");
    let heard: BTreeSet<Uuid> = told(&orders.take().await).into_keys().collect();
    assert_eq!(heard, all[100..400].iter().copied().collect());

    let old = "update users set updated_at = '2020-01-01T00:00:00Z' where id = any($1)";
    sqlx::query(old).bind(&all[..450]).execute(&house.db).await.unwrap();
    start(&house, &orders, json!({ "changed_since": "2020-01-01T00:00:01Z" })).await.ok();
    let done = await_state(&house, &orders, "done").await;
    assert_eq!((&done["sent"], &done["skipped"]), (&json!(50), &json!(450)), "{done}");
    let heard: BTreeSet<Uuid> = told(&orders.take().await).into_keys().collect();
    assert_eq!(heard, all[450..].iter().copied().collect());

    // Ten thousand ids fit into a request.
    let many: Vec<Uuid> = (0..10_000).map(|_| Uuid::new_v4()).collect();
    start(&house, &orders, json!({ "user_ids": many })).await.ok();
    let done = await_state(&house, &orders, "done").await;
    assert_eq!((&done["sent"], &done["skipped"]), (&json!(0), &json!(10_000)), "{done}");
    orders.end().await;
}

/// Killed twice in the middle: everybody is told, and at most a page of them twice each time.
#[sqlx::test]
async fn a_kill_in_the_middle_costs_nobody_the_news(db: PgPool) {
    let mut house = House::open(db).await;
    let all = users(&house, 6_000).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 2_500, "max_waiting": 100_000 })).await.ok();
    for reached in [1_500, 4_000] {
        eventually("messages in the queue", async || match orders.waiting().await {
            waiting if waiting >= reached => Ok(()),
            waiting => Err(waiting),
        })
        .await;
        house.service.kill().await;
        assert!(orders.waiting().await < 6_000, "it was killed in the middle");
        house.restart().await;
    }
    let done = await_state(&house, &orders, "done").await;
    assert_eq!(done["sent"], 6_000, "{done}");
    let messages = orders.take().await;
    let told = told(&messages);
    assert_eq!(told.keys().copied().collect::<BTreeSet<_>>(), all);
    assert!(messages.len() <= 6_000 + 2 * 1_000, "{}", messages.len());
    let ids: BTreeSet<Uuid> = messages.iter().map(|message| notice(message).message_id).collect();
    assert_eq!(ids.len(), 6_000, "a resend has the same id");
    house.settle().await;
    assert!(house.audit.heard().is_empty());
    orders.end().await;
}

/// As a runner that was frozen does when it thaws: its successor is further by then.
#[sqlx::test]
async fn a_runner_that_was_overtaken_does_not_turn_its_successor_back(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 200).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 1 })).await.ok();
    eventually("a beginning", async || match orders.waiting().await {
        0 => Err(0),
        waiting => Ok(waiting),
    })
    .await;
    let overtake = sqlx::query("update backfills set cursor = $1").bind(all.last().unwrap());
    assert_eq!(overtake.execute(&house.db).await.unwrap().rows_affected(), 1);
    house.logs(&["somebody else carries this backfill on"]).await;
    let done = await_state(&house, &orders, "done").await;
    assert!(done["sent"].as_i64().unwrap() < 200, "{done}");
    orders.end().await;
}

/// Who comes since is told by the news: nobody is told twice, and no walk goes on for ever behind those who come.
#[sqlx::test]
async fn a_walk_ends_with_those_who_were_there_when_it_began(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 5).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 1 })).await.ok();
    act(&house, &orders, "pause").await.ok();
    stopped(&house).await;
    let last = Uuid::max();
    house.put(&last, json!({})).await.ok();
    house.settle().await;
    act(&house, &orders, "resume?rate_per_s=20000").await.ok();
    assert_eq!(await_state(&house, &orders, "done").await["sent"], 5);
    let told = told(&orders.take().await);
    assert_eq!(told[&last], ["user.created"]);
    assert!(told.into_keys().eq(all.into_iter().chain([last])));
    orders.end().await;
}

/// Nobody consumes: the queue takes `max_waiting`, and what happens now is right behind them.
#[sqlx::test]
async fn news_does_not_wait_behind_a_backfill(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 3_000).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let other = Subscribed::to(&house, "other", &["#"], &[]).await;
    let everything = json!({ "users": "all", "rate_per_s": 50_000, "max_waiting": 50 });
    start(&house, &orders, everything).await.ok();
    let waiting = await_wait(&house, &orders, "room").await;
    assert_eq!((&waiting["sent"], orders.waiting().await), (&json!(50), 50), "{waiting}");
    let began = Instant::now();
    let ana = house.user(json!({ "city": "Riga" })).await;
    other.await_waiting(1).await;
    orders.await_waiting(51).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let taken = orders.take().await;
    let ahead = taken.iter().position(|message| notice(message).user_id == ana);
    assert_eq!(ahead, Some(50));

    // With a consumer it flows, and still never puts more than so many before the news.
    let consumer = Consumer::of(&orders).await;
    let watched = eventually("the end", async || {
        let ready = orders.waiting().await;
        assert!(ready <= 50, "{ready}");
        let now = show(&house, &orders).await;
        if now["state"] == "done" { Ok(now) } else { Err(now) }
    })
    .await;
    assert_eq!(watched["sent"], 3_000, "{watched}");
    eventually("all to be handled", async || {
        // The others, and the news, were taken out before.
        let handled = taken.len() + consumer.handled().len();
        if handled == 3_001 { Ok(()) } else { Err(handled) }
    })
    .await;
    orders.end().await;
    other.end().await;
}

#[sqlx::test]
async fn it_can_be_paused_resumed_faster_and_cancelled(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 2_000).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 100 })).await.ok();
    eventually("a beginning", async || match orders.waiting().await {
        0 => Err(0),
        waiting => Ok(waiting),
    })
    .await;
    let began = Instant::now();
    assert_eq!(act(&house, &orders, "pause").await.ok().body["state"], "paused");
    stopped(&house).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let paused = show(&house, &orders).await;
    assert_eq!(paused["state"], "paused");
    assert_eq!(paused["sent"], orders.waiting().await, "all that was sent is noted, and nothing else was sent");
    assert!(paused["sent"].as_i64().unwrap() < 500 && paused["eta_s"].as_i64().unwrap() >= 15, "{paused}");
    assert_eq!(act(&house, &orders, "pause").await.ok().body["state"], "paused", "again is no fault");

    let resumed = act(&house, &orders, "resume?rate_per_s=20000").await.ok().body;
    assert_eq!((&resumed["state"], &resumed["rate_per_s"]), (&json!("running"), &json!(20_000)));
    let done = await_state(&house, &orders, "done").await;
    assert_eq!(done["sent"], 2_000);
    let messages = orders.take().await;
    assert_eq!(messages.len(), 2_000, "nobody was told twice");
    assert_eq!(told(&messages).into_keys().collect::<BTreeSet<_>>(), all);

    start(&house, &orders, json!({ "users": "all", "rate_per_s": 100 })).await.ok();
    eventually("a beginning", async || match orders.waiting().await {
        0 => Err(0),
        waiting => Ok(waiting),
    })
    .await;
    let began = Instant::now();
    let cancelled = act(&house, &orders, "cancel").await.ok().body;
    assert_eq!((&cancelled["state"], cancelled["finished_at"].is_string()), (&json!("cancelled"), true));
    stopped(&house).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let sent = show(&house, &orders).await["sent"].clone();
    assert_eq!(sent, orders.waiting().await);
    for action in ["pause", "resume"] {
        assert_eq!(act(&house, &orders, action).await.refusal(409), "backfill_over", "{action}");
    }
    assert_eq!(act(&house, &orders, "cancel").await.ok().body["finished_at"], cancelled["finished_at"]);
    orders.end().await;
}

/// Waits until no backfill walks.
async fn stopped(house: &House) {
    eventually("the walk to end", async || {
        let names = crate::sessions::names(&house.db).await;
        if names.contains(&"tidings backfill walk".to_owned()) { Err(names) } else { Ok(()) }
    })
    .await;
}

/// The outbox lags, for a queue somewhere refuses: what is owed goes first.
#[sqlx::test]
async fn a_backfill_waits_while_news_is_held_up(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 100).await;
    let orders = Subscribed::to(&house, "orders", &["user.deleted"], &["city"]).await;
    let full = format!("{}.full", house.exchange);
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    orders.channel.queue_declare(full.as_str().into(), QueueDeclareOptions::default(), arguments).await.unwrap();
    house::bind(&orders.channel, &full, &house.exchange, "user.created").await;
    for _ in 0..2 {
        house.user(json!({})).await;
    }
    eventually("a refusal", async || match house.pending().await {
        1 => Ok(()),
        pending => Err(pending),
    })
    .await;
    sqlx::query("update outbox set occurred_at = now() - interval '1 minute'").execute(&house.db).await.unwrap();
    start(&house, &orders, json!({ "users": "all" })).await.ok();
    let waiting = await_wait(&house, &orders, "news").await;
    assert_eq!((&waiting["sent"], orders.waiting().await), (&json!(0), 0), "{waiting}");
    orders.channel.queue_delete(full.into(), QueueDeleteOptions::default()).await.unwrap();
    let done = await_state(&house, &orders, "done").await;
    assert_eq!(done["sent"], 102, "{done}");
    orders.end().await;
}

#[sqlx::test]
async fn it_goes_on_when_the_queue_or_the_broker_is_back(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 1_500).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    orders.undeclare().await;
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 500 })).await.ok();
    await_wait(&house, &orders, "queue").await;
    orders.declare().await;
    eventually("messages", async || match orders.waiting().await {
        0 => Err(0),
        waiting => Ok(waiting),
    })
    .await;
    house.broker.down();
    await_wait(&house, &orders, "broker").await;
    house.broker.up();
    let done = await_state(&house, &orders, "done").await;
    assert_eq!(done["sent"], 1_500, "{done}");
    let messages = orders.take().await;
    assert_eq!(told(&messages).into_keys().collect::<BTreeSet<_>>(), all);
    assert!(messages.len() <= 1_700, "at most a chunk was sent twice: {}", messages.len());
    orders.end().await;
}

/// Each look at a queue that is not there costs the number of a channel, of which there are four here.
#[sqlx::test]
async fn it_goes_on_although_looks_for_its_queue_have_used_up_the_connection(db: PgPool) {
    let [_, (setting, url)] = rights::at_broker(&env("AMQP_URL"));
    let url = format!("{url}?channel_max=4");
    let house = House::with(db, &[(setting, &url), ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "60s")]).await;
    users(&house, 100).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    orders.undeclare().await;
    start(&house, &orders, json!({ "users": "all" })).await.ok();
    eventually("a connection that is used up", async || {
        let log = house.service.log();
        let is_its = |line: &str| line.contains("backfill") && line.contains("too many channels of the connection");
        if log.lines().any(is_its) { Ok(()) } else { Err(log) }
    })
    .await;
    orders.declare().await;
    assert_eq!(await_state(&house, &orders, "done").await["sent"], 100);
    orders.end().await;
}

#[sqlx::test]
async fn what_it_waits_for_is_told_when_it_is_another_thing(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    users(&house, 100).await;
    let mut all = vec![];
    for number in 0..2 {
        let orders = Subscribed::at(&house, &broker.amqp_url, &format!("orders-{number}"), &["#"], &[]).await;
        start(&house, &orders, json!({ "users": "all", "max_waiting": 10 })).await.ok();
        await_wait(&house, &orders, "room").await;
        all.push(orders);
    }
    house.broker.down();
    await_wait(&house, &all[0], "broker").await;
    house.broker.up();
    await_wait(&house, &all[0], "room").await;
    broker.alarm().await;
    assert_eq!(all[0].take().await.len(), 10);
    // It sends into the alarm, and the connection is blocked: of that one and of whoever begins now.
    await_wait(&house, &all[0], "broker").await;
    act(&house, &all[1], "cancel").await.ok();
    start(&house, &all[1], json!({ "users": "all" })).await.ok();
    await_wait(&house, &all[1], "broker").await;
    broker.end_alarm().await;
    await_wait(&house, &all[0], "room").await;
    assert_eq!(await_state(&house, &all[1], "done").await["sent"], 100);
    let log = house.service.log();
    assert!(!log.contains("no answer within"), "{log}");
    for orders in all {
        orders.end().await;
    }
}

/// Whatever it is told meanwhile: another rate, or a pause so short that it hears nothing of it.
#[sqlx::test]
async fn one_that_waits_says_so_until_it_goes_on(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 100).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    start(&house, &orders, json!({ "users": "all", "max_waiting": 10 })).await.ok();
    await_wait(&house, &orders, "room").await;
    act(&house, &orders, "resume?rate_per_s=500").await.ok();
    assert_eq!(await_wait(&house, &orders, "room").await["rate_per_s"], 500);
    let paused = act(&house, &orders, "pause").await.ok().body;
    assert_eq!((&paused["state"], &paused["waiting_for"]), (&json!("paused"), &Value::Null));
    act(&house, &orders, "resume").await.ok();
    await_wait(&house, &orders, "room").await;
    let _consumer = Consumer::of(&orders).await;
    let done = await_state(&house, &orders, "done").await;
    assert_eq!((&done["sent"], &done["waiting_for"]), (&json!(100), &Value::Null));
    orders.end().await;
}

/// A queue that loses its binding would swallow everything.
#[sqlx::test]
async fn what_does_not_arrive_does_not_count_as_told(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 100).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let (queue, exchange) = (orders.name.queue(), orders.name.as_str());
    let unbound = orders.channel.queue_unbind(queue.into(), exchange.into(), "work".into(), FieldTable::default());
    unbound.await.unwrap();
    start(&house, &orders, json!({ "users": "all" })).await.ok();
    eventually("a complaint", async || {
        let log = house.service.log();
        if log.contains("the subscription's queue is gone") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(show(&house, &orders).await["sent"], 0);
    orders.declare().await;
    assert_eq!(await_state(&house, &orders, "done").await["sent"], 100);
    // Some twice, where the binding came back in the middle of a chunk.
    assert_eq!(told(&orders.take().await).into_keys().collect::<BTreeSet<_>>(), all);
    orders.end().await;
}

#[sqlx::test]
async fn several_go_on_side_by_side_and_the_fifth_has_its_turn(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 300).await;
    let mut all = vec![];
    for number in 0..5 {
        let orders = Subscribed::to(&house, &format!("orders-{number}"), &["#"], &[]).await;
        start(&house, &orders, json!({ "users": "all", "rate_per_s": 60 })).await.ok();
        all.push(orders);
    }
    await_wait(&house, &all[4], "turn").await;
    for orders in &all[..4] {
        let now = show(&house, orders).await;
        assert_ne!(now["state"], "waiting", "{now}");
    }
    for orders in all {
        assert_eq!(await_state(&house, &orders, "done").await["sent"], 300);
        orders.await_waiting(300).await;
        orders.end().await;
    }
}

/// Nobody consumes from four queues. Whoever comes after them has his turn, and they have theirs again.
#[sqlx::test]
async fn who_cannot_go_on_keeps_nobody_from_his_turn(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 100).await;
    let mut unattended = vec![];
    for number in 0..4 {
        let orders = Subscribed::to(&house, &format!("orders-{number}"), &["#"], &[]).await;
        start(&house, &orders, json!({ "users": "all", "max_waiting": 10 })).await.ok();
        await_wait(&house, &orders, "room").await;
        unattended.push(orders);
    }
    let attended = Subscribed::to(&house, "attended", &["#"], &[]).await;
    start(&house, &attended, json!({ "users": "all" })).await.ok();
    await_state(&house, &attended, "done").await;
    attended.await_waiting(100).await;
    attended.end().await;
    for orders in unattended {
        let consumer = Consumer::of(&orders).await;
        let done = await_state(&house, &orders, "done").await;
        assert_eq!(done["sent"], 100, "{done}");
        eventually("all to be handled", async || match consumer.handled().len() {
            100 => Ok(()),
            handled => Err(handled),
        })
        .await;
        orders.end().await;
    }
}

/// Four are slow, as they were asked to be. Whoever comes after them has his turn, they have theirs again, and tell nobody twice.
#[sqlx::test]
async fn who_is_slow_keeps_nobody_from_his_turn(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 1_000).await;
    let sends_more_than = async |orders: &Subscribed, before: i64| {
        eventually("it to go on", async || match show(&house, orders).await["sent"].as_i64().unwrap() {
            sent if sent > before => Ok(()),
            sent => Err(sent),
        })
        .await;
    };
    let mut slow = vec![];
    for number in 0..4 {
        let orders = Subscribed::to(&house, &format!("slow-{number}"), &["#"], &[]).await;
        start(&house, &orders, json!({ "users": "all", "rate_per_s": 1 })).await.ok();
        slow.push(orders);
    }
    for orders in &slow {
        sends_more_than(orders, 0).await;
    }
    let quick = Subscribed::to(&house, "quick", &["#"], &[]).await;
    start(&house, &quick, json!({ "users": "all" })).await.ok();
    assert_eq!(await_state(&house, &quick, "done").await["sent"], 1_000);
    quick.end().await;
    for orders in &slow {
        let sent = show(&house, orders).await["sent"].as_i64().unwrap();
        sends_more_than(orders, sent).await;
    }
    for orders in &slow {
        act(&house, orders, "cancel").await.ok();
    }
    stopped(&house).await;
    for orders in slow {
        let messages = orders.take().await;
        assert_eq!(show(&house, &orders).await["sent"], messages.len(), "all that was sent is noted");
        assert_eq!(told(&messages).len(), messages.len(), "somebody was told twice");
        orders.end().await;
    }
}

#[sqlx::test]
async fn what_cannot_be_done_is_refused(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 100).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let unknown = "/v1/subscriptions/nobody/backfill";
    assert_eq!(house.page(unknown).await.refusal(404), "subscription_not_found");
    assert_eq!(house.page("/v1/subscriptions/No/backfill").await.refusal(400), "invalid_subscription_name");
    let nobodys = house.request(Method::POST, unknown).json(&json!({ "users": "all" }));
    assert_eq!(Answer::to(nobodys).await.refusal(404), "subscription_not_found");
    assert_eq!(house.page(&orders.path("backfill")).await.refusal(404), "backfill_not_found");
    for action in ["pause", "resume", "cancel"] {
        assert_eq!(act(&house, &orders, action).await.refusal(404), "backfill_not_found", "{action}");
    }
    let id = Uuid::new_v4();
    for (wrong, pointer) in [
        (json!({}), ""),
        (json!({ "users": "some" }), "/users"),
        (json!({ "users": "all", "user_ids": [Uuid::new_v4()] }), ""),
        (json!({ "user_ids": [] }), "/user_ids"),
        (json!({ "user_ids": vec![Uuid::new_v4(); 10_001] }), "/user_ids"),
        (json!({ "user_ids": ["7"] }), "/user_ids/0"),
        (json!({ "user_ids": [id, id.simple().to_string()] }), "/user_ids/1"),
        (json!({ "user_ids": [id, id.urn().to_string()] }), "/user_ids/1"),
        (json!({ "user_ids": [id, id.braced().to_string()] }), "/user_ids/1"),
        (json!({ "user_ids": [id, Uuid::nil()] }), "/user_ids/1"),
        (json!({ "changed_since": "yesterday" }), "/changed_since"),
        (json!({ "changed_since": "0000-01-01T00:00:00+01:00" }), "/changed_since"),
        (json!({ "changed_since": "9999-12-31T23:59:59-01:00" }), "/changed_since"),
        (json!({ "users": "all", "rate_per_s": 0 }), "/rate_per_s"),
        (json!({ "users": "all", "rate_per_s": 50_001 }), "/rate_per_s"),
        (json!({ "users": "all", "rate_per_s": 5_000_000_000_u64 }), "/rate_per_s"),
        (json!({ "users": "all", "rate_per_s": "1" }), "/rate_per_s"),
        (json!({ "users": "all", "max_waiting": 0 }), "/max_waiting"),
        (json!({ "users": "all", "speed": 1 }), "/speed"),
    ] {
        let refused = start(&house, &orders, wrong.clone()).await;
        assert_eq!(refused.refusal(422), "body_invalid", "{wrong}");
        assert_eq!(refused.body["errors"][0]["pointer"], pointer, "{wrong}");
        let detail = refused.body["errors"][0]["detail"].as_str().unwrap();
        assert!(!detail.contains("i32") && !detail.contains("i64"), "{wrong}: {detail}");
    }
    let refused = start(&house, &orders, json!({ "users": "some", "rate_per_s": 0, "max_waiting": 0 })).await;
    assert_eq!(refused.refusal(422), "body_invalid");
    let pointers = [0, 1, 2].map(|n| refused.body["errors"][n]["pointer"].as_str().unwrap());
    assert_eq!(pointers, ["/rate_per_s", "/max_waiting", "/users"]);
    start(&house, &orders, json!({ "users": "all", "rate_per_s": 1 })).await.ok();
    assert_eq!(start(&house, &orders, json!({ "users": "all" })).await.refusal(409), "backfill_running");
    act(&house, &orders, "pause").await.ok();
    assert_eq!(start(&house, &orders, json!({ "users": "all" })).await.refusal(409), "backfill_running");
    assert_eq!(act(&house, &orders, "resume?rate_per_s=0").await.refusal(400), "invalid_query");
    assert_eq!(act(&house, &orders, "pause?rate_per_s=5").await.refusal(400), "invalid_query");
    act(&house, &orders, "cancel").await.ok();
    orders.end().await;
}

#[sqlx::test]
async fn operators_do_the_same_on_the_command_line(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 300).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let run = async |arguments: &[&str]| {
        let command = [&["subscription", "backfill"], arguments].concat();
        let done = tidings(&command, house.settings()).output().await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (done.status.code(), text(&done.stdout), text(&done.stderr))
    };
    let name = orders.name.as_str();
    let (code, out, talk) = run(&["start", name, "--rate", "500", "--follow"]).await;
    assert_eq!(code, Some(0), "{talk}");
    assert_eq!(out, format!("{name}: done, 100 %: 300 sent and 0 skipped of 300\n"));
    assert!(talk.contains("to go at 500/s"), "{talk}");
    orders.await_waiting(300).await;
    let some: Vec<String> = all.iter().take(2).map(Uuid::to_string).collect();
    let (code, ..) = run(&["start", name, "--user", &some.join(","), "--rate", "1", "--json"]).await;
    assert_eq!(code, Some(0));
    for (action, state) in [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled"), ("show", "cancelled")]
    {
        let (code, out, talk) = run(&[action, name, "--json"]).await;
        assert_eq!(code, Some(0), "{action}: {talk}");
        let now: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&now["state"], &now["total"]), (&json!(state), &json!(2)), "{action}");
    }
    let (code, _, talk) = run(&["resume", name]).await;
    assert_eq!((code, talk.trim()), (Some(1), "error: the backfill is over"));
    let (code, _, talk) = run(&["start", name, "--rate", "0"]).await;
    assert_eq!(code, Some(2), "{talk}");
    orders.end().await;
}
