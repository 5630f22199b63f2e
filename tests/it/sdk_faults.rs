//! SDK under faults: a handler that fails, a broker in an alarm, an owner that answers 500, messages made to harm.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, body::to_bytes, extract::Request};
use lapin::{
    BasicProperties,
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use reqwest::StatusCode;
use serde_json::json;
use sqlx::PgPool;
use tidings_sdk::{
    cache::Cache,
    consumer::{CatchUp, Consumer, Dropped, Failure, Gap, Handler, News, Observer},
    envelope::{Event, Notice},
    letter::{Letter, Reason},
    mirror::{Keeper, Mirror},
    owner::{FetchError, Owner, Receipt},
    subscription::Subscription,
    topology::{self, Depth, Source},
};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    house::{self, House, PATIENCE, connect, env, eventually, owner_at},
    hurt::HurtBroker,
    load,
    mirror::foreign_cursor,
    proxy::Proxy,
    sdk::{Curse, Diary, Listener, SOON, consumer, notice, said, subscription, updated},
};

/// Counts what was dropped, and why.
#[derive(Clone, Debug, Default)]
struct Drops(Arc<Mutex<Vec<Dropped>>>);

impl Observer for Drops {
    fn dropped(&self, why: Dropped) {
        self.0.lock().unwrap().push(why);
    }
}

impl Drops {
    async fn are(&self, expected: &[Dropped]) {
        eventually("what is dropped", async || {
            let dropped = self.0.lock().unwrap().clone();
            if dropped == expected { Ok(()) } else { Err(dropped) }
        })
        .await;
    }
}

pub async fn begun(diary: &Diary, calls: usize) {
    eventually("calls to begin", async || match diary.begun.load(Ordering::SeqCst) {
        begun if begun == calls => Ok(()),
        begun => Err(begun),
    })
    .await;
}

/// Waits until nothing lies in the queue that was not handed out.
pub async fn handed_out(listener: &Listener) {
    eventually("the queue to be handed out", async || {
        match listener.depth(listener.subscription.name.queue()).await.unwrap().ready {
            0 => Ok(()),
            ready => Err(ready),
        }
    })
    .await;
}

/// Waits until nobody consumes from a queue, and so many messages lie in it.
async fn gives_back(amqp_url: &str, queue: &str, messages: RangeInclusive<u32>) {
    let connection = connect(amqp_url).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    eventually("what was not done to go back", async || match topology::depth(&channel, queue).await.unwrap() {
        Depth { ready, consumers: 0 } if messages.contains(&ready) => Ok(()),
        depth => Err(depth),
    })
    .await;
}

fn letter(dead: &lapin::message::BasicGetMessage) -> Letter {
    Letter::read(dead.delivery.properties.headers().as_ref()).unwrap()
}

/// This notice as the message of a backfill.
fn backfilled(notice: &Notice) -> (BasicProperties, Vec<u8>) {
    let (properties, body) = notice.to_message("urn:test");
    let mut headers = properties.headers().clone().unwrap();
    headers.insert(topology::BACKFILL.into(), AMQPValue::LongString(Uuid::new_v4().to_string().into()));
    (properties.with_headers(headers), body)
}

/// A way to the broker that a test can cut; its URL.
async fn line() -> (Proxy, String) {
    let authority = env("AMQP_URL").split_once('@').unwrap().1.split('/').next().unwrap().to_owned();
    let line = Proxy::before(authority.parse().unwrap()).await;
    let through = env("AMQP_URL").replace(&authority, &line.address().to_string());
    (line, through)
}

pub const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// What stands before the owner and answers 500 to whatever is about this user, if there is one; its URL.
pub async fn curse_before(owner: &str, cursed: &Arc<Mutex<Option<Uuid>>>) -> String {
    let cursed = cursed.clone();
    stand_before(owner, move |path, body| {
        let cursed = (*cursed.lock().unwrap())?.to_string();
        let is_about = path.contains(&cursed) || body.contains(&cursed);
        is_about.then_some((StatusCode::INTERNAL_SERVER_ERROR, r#"{"code":"internal"}"#))
    })
    .await
}

/// What stands before the owner, and passes on what it does not answer itself, by path and body; its URL.
pub async fn stand_before(
    owner: &str,
    answers: impl Fn(&str, &str) -> Option<(StatusCode, &'static str)> + Send + Sync + 'static,
) -> String {
    let (owner, http, answers) = (owner.to_owned(), house::http(), Arc::new(answers));
    let answer = move |request: Request| {
        let (owner, http, answers) = (owner.clone(), http.clone(), answers.clone());
        async move {
            let (head, body) = request.into_parts();
            let (path, body) = (head.uri.to_string(), to_bytes(body, usize::MAX).await.unwrap());
            if let Some((status, said)) = answers(&path, &String::from_utf8_lossy(&body)) {
                return (status, JSON, said.into());
            }
            let passed_on = http.request(head.method, format!("{owner}{path}")).body(body);
            let answer = passed_on.header("content-type", "application/json").send().await.unwrap();
            (answer.status(), JSON, answer.bytes().await.unwrap())
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    url
}

/// What could not be done is not made old by the news that came after it: it is told together with that.
#[sqlx::test]
async fn what_failed_is_told_with_the_next_news_of_that_user(db: PgPool) {
    let house = House::open(db).await;
    let (drops, later) = (Drops::default(), [Duration::from_secs(4)]);
    let watched = drops.clone();
    let listener =
        Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.retry_delays(later).observe(watched)).await;
    let ana = Uuid::new_v4();
    listener.diary.curse(ana, Curse::Fails);
    house.put(&ana, json!({})).await.ok();
    let retry = listener.subscription.name.retry_queue(later[0]);
    eventually("the failed attempt to be parked", async || match listener.depth(&retry).await.unwrap().ready {
        1 => Ok(()),
        ready => Err(ready),
    })
    .await;
    listener.diary.cursed.lock().unwrap().clear();
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    assert_eq!(said(&listener.called(1).await), ["2 created"], "not only updated");
    drops.are(&[Dropped::Old]).await;
    assert_eq!(listener.diary.calls().len(), 1, "what came back from waiting was done already");
    let (channel, name) = (listener.channel.clone(), listener.subscription.name.clone());
    listener.leave().await;
    topology::delete(&channel, &name, &later).await.unwrap();
}

/// Nor by what another process did meanwhile, which knew nothing of it.
#[sqlx::test]
async fn what_failed_in_a_process_that_is_gone_is_tried_again_by_the_next(db: PgPool) {
    let house = House::open(db).await;
    let later = [Duration::from_secs(4)];
    let first = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.retry_delays(later)).await;
    let ana = Uuid::new_v4();
    first.diary.curse(ana, Curse::Fails);
    house.put(&ana, json!({})).await.ok();
    let retry = first.subscription.name.retry_queue(later[0]);
    eventually("the failed attempt to be parked", async || match first.depth(&retry).await.unwrap().ready {
        1 => Ok(()),
        ready => Err(ready),
    })
    .await;
    first.leave().await;
    let second = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.retry_delays(later)).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    assert_eq!(said(&second.called(2).await), ["2 updated[city]", "1 created"]);
    let (channel, name) = (second.channel.clone(), second.subscription.name.clone());
    second.leave().await;
    topology::delete(&channel, &name, &later).await.unwrap();
}

#[sqlx::test]
async fn a_failed_attempt_waits_as_long_as_it_says_at_the_broker(db: PgPool) {
    let house = House::open(db).await;
    let waits = [Duration::from_millis(700), Duration::from_millis(900)];
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.retry_delays(waits)).await;
    let cursed = Uuid::new_v4();
    listener.diary.curse(cursed, Curse::Fails);
    let began = Instant::now();
    listener.tell(&notice(cursed, 1, Event::Created)).await;
    assert_eq!(letter(&listener.dead_letter().await).attempts, 3);
    assert!(began.elapsed() >= waits[0] + waits[1], "{:?}", began.elapsed());
    let (channel, name) = (listener.channel.clone(), listener.subscription.name.clone());
    listener.leave().await;
    topology::delete(&channel, &name, &waits).await.unwrap();
}

/// The same message several times is one attempt, and one dead letter.
#[sqlx::test]
async fn duplicates_that_wait_together_fail_together(db: PgPool) {
    let house = House::open(db).await;
    let drops = Drops::default();
    let watched = drops.clone();
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.concurrency(1).observe(watched)).await;
    let gate = listener.diary.gate.clone();
    gate.forget_permits(Semaphore::MAX_PERMITS);
    house.user(json!({})).await;
    begun(&listener.diary, 1).await;
    let cursed = Uuid::new_v4();
    listener.diary.curse(cursed, Curse::Fails);
    let told = notice(cursed, 1, Event::Created);
    for _ in 0..5 {
        listener.tell(&told).await;
    }
    handed_out(&listener).await;
    gate.add_permits(1_000);
    drops.are(&[Dropped::Duplicate; 4]).await;
    assert_eq!(letter(&listener.dead_letter().await).attempts, 3);
    begun(&listener.diary, 4).await;
    assert_eq!(listener.dead_letters().await, 0);
    listener.end().await;
}

/// Whoever made the message may not send it elsewhere, let it expire, or have it refused.
#[sqlx::test]
async fn a_dead_letter_keeps_the_notice_and_nothing_that_steers_the_broker(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let name = listener.subscription.name.clone();
    let elsewhere = format!("{name}-elsewhere");
    let (declared, bound) =
        (QueueDeclareOptions { exclusive: true, ..Default::default() }, QueueBindOptions::default());
    listener.channel.queue_declare(elsewhere.as_str().into(), declared, FieldTable::default()).await.unwrap();
    let (queue, exchange) = (elsewhere.as_str().into(), name.as_str().into());
    listener.channel.queue_bind(queue, exchange, "elsewhere".into(), bound, FieldTable::default()).await.unwrap();
    let cursed = Uuid::new_v4();
    listener.diary.curse(cursed, Curse::Fails);
    let told = notice(cursed, 3, updated("city"));
    let (properties, body) = told.to_message("urn:test");
    let mut headers = properties.headers().clone().unwrap();
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("elsewhere".into())].into()));
    headers.insert("city".into(), AMQPValue::LongString("Riga".into()));
    headers.insert(topology::REDRIVEN.into(), AMQPValue::LongInt(2));
    let hostile = properties.with_headers(headers).with_expiration("600000".into()).with_user_id("guest".into());
    listener.send(hostile.with_reply_to("elsewhere".into()), &body).await;
    let dead = listener.dead_letter().await;
    assert_eq!((letter(&dead).reason, letter(&dead).attempts), (Reason::HandlerFailed, 3));
    let kept = &dead.delivery.properties;
    assert_eq!(Notice::from_message(kept, &dead.delivery.data).unwrap(), told);
    assert_eq!((kept.expiration(), kept.user_id(), kept.reply_to()), (&None, &None, &None));
    assert!(!kept.headers().as_ref().unwrap().contains_key("city"), "{kept:?}");
    let redriven = kept.headers().as_ref().unwrap().inner().get(topology::REDRIVEN);
    assert_eq!(redriven, Some(&AMQPValue::LongInt(2)), "whoever looks at it has to know that it was put back before");
    assert_eq!(
        topology::depth(&listener.channel, &elsewhere).await.unwrap().ready,
        0,
        "nothing goes where a stranger sends it"
    );
    listener.end().await;
}

/// The owner answers 500 for one user, for ever: his news ends as a dead letter, and nobody else's.
#[sqlx::test]
async fn a_user_whom_the_owner_cannot_show_ends_as_a_dead_letter_alone(db: PgPool) {
    let mut house = House::open(db).await;
    let users = load::users(&house, 30).await;
    let cursed = users[7];
    let stand_in = curse_before(&house.service.url, &Arc::new(Mutex::new(Some(cursed)))).await;
    let direct = std::mem::replace(&mut house.service.url, stand_in);
    let listener = Listener::of(&house).await;
    house.service.url = direct;
    for user in &users {
        listener.tell(&notice(*user, 1, Event::Created)).await;
    }
    let dead = listener.dead_letter().await;
    let kept = Notice::from_message(&dead.delivery.properties, &dead.delivery.data).unwrap();
    assert_eq!((kept.user_id, letter(&dead).reason, letter(&dead).attempts), (cursed, Reason::FetchFailed, 3));
    let calls = listener.called(29).await;
    assert!(calls.iter().all(|call| call.user != cursed));
    assert_eq!(listener.dead_letters().await, 0);
    listener.end().await;
}

/// What no owner says.
const NOT_THE_OWNERS: [(u16, (&str, &str), &str); 7] = [
    (200, ("content-type", "text/html"), "<h1>Back soon</h1>"),
    (202, ("content-type", "text/plain"), ""),
    (301, ("location", "/"), ""),
    (404, ("content-type", "text/html"), "no such page"),
    (409, JSON[0], ""),
    (410, JSON[0], "{}"),
    (500, JSON[0], r#"{"error":"oops"}"#),
];

/// Somebody who says this to whatever he is asked, asked as an owner.
async fn stand_in(status: u16, header: [(&'static str, &'static str); 1], said: &'static str) -> Owner {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let owner = owner_at(&format!("http://{}", listener.local_addr().unwrap()));
    let answer = move || async move { (StatusCode::from_u16(status).unwrap(), header, said) };
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    owner.patience(Duration::from_millis(300))
}

/// A deletion is not taken for confirmed because something that is not the owner does not know the address.
#[tokio::test]
async fn only_the_owner_can_say_that_there_is_nothing_to_confirm() {
    let orders = "orders".parse().unwrap();
    let refused = |status, code: &str| Err(FetchError::Refused { status, code: code.to_owned() });
    for (status, said, expected) in [
        (404, r#"{"code":"user_not_found"}"#, Ok(Receipt::Unwanted)),
        (409, r#"{"code":"user_not_deleted"}"#, Ok(Receipt::Unwanted)),
        (404, r#"{"code":"subscription_not_found"}"#, Ok(Receipt::UnknownSubscription)),
        (404, r#"{"code":"route_not_found"}"#, refused(404, "route_not_found")),
    ] {
        let receipt = stand_in(status, JSON, said).await.confirm_deletion(Uuid::new_v4(), &orders).await;
        assert_eq!(receipt, expected, "{status} {said}");
    }
    for (status, header, said) in NOT_THE_OWNERS {
        let receipt = stand_in(status, [header], said).await.confirm_deletion(Uuid::new_v4(), &orders).await;
        assert!(matches!(receipt, Err(FetchError::Unavailable(_))), "{status} {said} {receipt:?}");
    }
}

/// A gateway's redirect or page is no answer about anybody: taken for one, it would make a dead letter of each message.
#[tokio::test]
async fn what_answers_in_the_owners_place_is_an_outage() {
    let of_another_service =
        [(404, JSON[0], r#"{"code":"route_not_found"}"#), (410, JSON[0], r#"{"code":"offer_expired"}"#)];
    for (status, header, said) in NOT_THE_OWNERS.into_iter().chain(of_another_service) {
        let outcome = stand_in(status, [header], said).await.latest(Uuid::new_v4(), 1).await;
        assert!(matches!(outcome, Err(FetchError::Unavailable(_))), "{status} {said} {outcome:?}");
    }
    let refused = FetchError::Refused { status: 500, code: "internal".to_owned() };
    for (status, said, expected) in [(500, r#"{"code":"internal"}"#, refused), (200, "{}", FetchError::Malformed)] {
        assert_eq!(stand_in(status, JSON, said).await.latest(Uuid::new_v4(), 1).await, Err(expected));
    }
}

/// From http to https, for one: nobody who begins so would ever be shown anybody.
#[tokio::test]
async fn a_consumer_does_not_begin_at_an_address_that_leads_elsewhere() {
    let owner = stand_in(301, [("location", "https://users.example.org")], "").await;
    let source = Source { exchange: "none".into(), prefix: None };
    let mut subscription = Subscription::new("none".parse().unwrap());
    subscription.keys.insert("#".parse().unwrap());
    let consumer = Consumer::new(&env("AMQP_URL"), source, subscription, owner).unwrap();
    let running = consumer.run(Diary::new(), CancellationToken::new());
    let refused = timeout(PATIENCE, running).await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("leads elsewhere: 301"), "{refused}");
}

/// Nor does he hold up a mirror: it has the others and listens, and has him as soon as he can be shown.
#[sqlx::test]
async fn a_user_whom_the_owner_cannot_show_keeps_no_mirror_from_listening(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 30).await;
    house.feed_is_clear().await;
    let cursed = Arc::new(Mutex::new(Some(users[7])));
    let owner = owner_at(&curse_before(&house.service.url, &cursed).await);
    let mirror = Mirror::new();
    mirror.prepare(&house.db).await.unwrap();
    let keeper = mirror.clone().keeper(house.db.clone(), owner.clone());
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.catch_up(keeper)).await;
    assert_eq!(mirror.verify(&house.db, &owner).await.unwrap().missing, [users[7]]);
    *cursed.lock().unwrap() = None;
    eventually("him in the mirror", async || match mirror.verify(&house.db, &owner).await.unwrap() {
        difference if difference.is_none() => Ok(()),
        difference => Err(difference),
    })
    .await;
    listener.end().await;
}

/// Nor is it kept from letting him go: of a deletion there is nothing to be shown.
#[sqlx::test]
async fn a_user_whom_the_owner_cannot_show_leaves_a_mirror_when_he_is_deleted(db: PgPool) {
    let house = House::open(db).await;
    let cursed = Arc::new(Mutex::new(None));
    let owner = owner_at(&curse_before(&house.service.url, &cursed).await);
    let mirror = Mirror::new();
    mirror.prepare(&house.db).await.unwrap();
    let ana = house.user(json!({})).await;
    house.feed_is_clear().await;
    mirror.catch_up(&house.db, &owner).await.unwrap();
    *cursed.lock().unwrap() = Some(ana);
    house.delete(&ana).await.ok();
    house.feed_is_clear().await;
    let done = mirror.catch_up(&house.db, &owner).await.unwrap();
    assert_eq!((done.told, done.written, done.is_behind), (1, 1, false));
    assert!(mirror.get(&mut house.db.acquire().await.unwrap(), ana).await.unwrap().is_none());
}

/// The other history of the owner's has him: what is held of him is not forgotten for want of a look at him.
#[sqlx::test]
async fn a_user_whom_the_owner_cannot_show_stays_in_a_mirror_that_begins_anew(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 10).await;
    house.feed_is_clear().await;
    let cursed = Arc::new(Mutex::new(None));
    let owner = owner_at(&curse_before(&house.service.url, &cursed).await);
    let mirror = Mirror::new();
    mirror.prepare(&house.db).await.unwrap();
    mirror.catch_up(&house.db, &owner).await.unwrap();
    *cursed.lock().unwrap() = Some(users[7]);
    let foreign = foreign_cursor(&house.db).await;
    sqlx::query("update tidings_cursor set cursor = $1").bind(foreign).execute(&house.db).await.unwrap();
    assert!(mirror.catch_up(&house.db, &owner).await.unwrap().is_behind);
    let mut connection = house.db.acquire().await.unwrap();
    assert!(mirror.get(&mut connection, users[7]).await.unwrap().is_some());
    *cursed.lock().unwrap() = None;
    mirror.catch_up(&house.db, &owner).await.unwrap();
    assert!(mirror.verify(&house.db, &owner).await.unwrap().is_none());
}

#[sqlx::test]
async fn a_user_whom_the_owner_cannot_show_does_not_hold_up_the_repair_of_others(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 5).await;
    let owner = owner_at(&curse_before(&house.service.url, &Arc::new(Mutex::new(Some(users[0])))).await);
    let mirror = Mirror::new();
    mirror.prepare(&house.db).await.unwrap();
    let difference = mirror.verify(&house.db, &owner).await.unwrap();
    assert_eq!(difference.missing.len(), users.len());
    mirror.repair(&house.db, &owner, &difference).await.unwrap();
    assert_eq!(mirror.verify(&house.db, &owner).await.unwrap().missing, users[..1]);
}

/// The owner was set back to an earlier state: what a backfill then tells is how it is, and what is told after it is news.
#[sqlx::test]
async fn after_a_backfill_of_a_restored_owner_news_is_news_again(db: PgPool) {
    let house = House::open(db).await;
    let drops = Drops::default();
    let watched = drops.clone();
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.observe(watched)).await;
    let ana = house.user(json!({})).await;
    let handled = async |version: i64| {
        eventually("the version to be handled", async || match listener.diary.of(&ana).last() {
            Some(call) if call.latest == Some(version) => Ok(()),
            last => Err(last.cloned()),
        })
        .await;
    };
    // One by one: who fetches the third after the first has no use for the second.
    handled(1).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    handled(2).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    handled(3).await;
    sqlx::query("update users set version = 1 where id = $1").bind(ana).execute(&house.db).await.unwrap();
    let (properties, body) = backfilled(&notice(ana, 1, Event::Created));
    listener.send(properties, &body).await;
    handled(1).await;
    house.amend(&ana, json!({ "city": "Rome" })).await.ok();
    handled(2).await;
    assert!(drops.0.lock().unwrap().iter().all(|why| *why != Dropped::Old), "{drops:?}");
    listener.end().await;
}

/// A copy and a cache.
struct Copies {
    keeper: Keeper,
    cache: Cache,
    begun: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl Handler for Copies {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.acquire().await?);
        self.cache.heed(&news);
        self.keeper.changed(news).await
    }
}

/// What a handler fetched makes notices old that wait behind it, and no call tells a cache of them: it knows all the same.
#[sqlx::test]
async fn a_cache_beside_a_handler_that_fetches_keeps_nothing_old(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner_at(&house.service.url), Mirror::new());
    mirror.prepare(&house.db).await.unwrap();
    let (cache, keeper) = (Cache::new(owner.clone(), 10), mirror.keeper(house.db.clone(), owner));
    let (begun, gate, stop) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)), CancellationToken::new());
    let copies = Copies { keeper, cache: cache.clone(), begun: begun.clone(), gate: gate.clone() };
    let (subscription, drops) = (subscription(&house), Drops::default());
    let broker = connect(&env("AMQP_URL")).await.unwrap();
    let channel = broker.create_channel().await.unwrap();
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    topology::declare(&channel, &source, &subscription, &[]).await.unwrap();
    let consumer = consumer(&house, &env("AMQP_URL"), &subscription).retry_delays([]).observe(drops.clone());
    let running = tokio::spawn(consumer.run(copies, stop.clone()));
    let ana = house.user(json!({ "city": "Riga" })).await;
    eventually("her creation to be handled", async || match begun.load(Ordering::SeqCst) {
        1 => Ok(()),
        begun => Err(begun),
    })
    .await;
    assert_eq!(cache.get(ana).await.unwrap().version(), 1);
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    house.settle().await;
    gate.add_permits(1_000);
    drops.are(&[Dropped::Old]).await;
    assert_eq!(begun.load(Ordering::SeqCst), 1, "what was fetched stands for the amendment");
    assert_eq!(cache.get(ana).await.unwrap().version(), 2);
    stop.cancel();
    running.await.unwrap().unwrap();
    topology::delete(&channel, &subscription.name, &[]).await.unwrap();
}

/// What an application holds is ahead of its restored owner, and so is what waits for it: a backfill sets right what is held, although
/// later versions of the old history wait with it.
#[sqlx::test]
async fn what_a_backfill_of_a_restored_owner_brings_is_taken_over(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner_at(&house.service.url), Mirror::new());
    mirror.prepare(&house.db).await.unwrap();
    let cache = Cache::new(owner.clone(), 10);
    let users = load::users(&house, 2).await;
    for user in &users {
        house.amend(user, json!({ "city": "Oslo" })).await.ok();
        house.amend(user, json!({ "city": "Rome" })).await.ok();
        let latest = cache.get(*user).await.unwrap();
        assert_eq!(latest.version(), 3);
        mirror.apply(&mut house.db.acquire().await.unwrap(), &latest).await.unwrap();
    }
    house.settle().await;
    let restore = r#"update users set version = 1, profile = '{"city":"Riga"}'"#;
    sqlx::query(restore).execute(&house.db).await.unwrap();

    let (subscription, source) = (subscription(&house), Source { exchange: house.exchange.clone(), prefix: None });
    let broker = connect(&env("AMQP_URL")).await.unwrap();
    let channel = broker.create_channel().await.unwrap();
    topology::declare(&channel, &source, &subscription, &[]).await.unwrap();
    let of_old = [2, 3].map(|version| notice(users[0], version, updated("city")).to_message("urn:test"));
    let anew = [users[0], users[1]].map(|user| backfilled(&notice(user, 1, Event::Created)));
    for (properties, body) in of_old.into_iter().chain(anew) {
        let queue = subscription.name.queue().into();
        channel.basic_publish("".into(), queue, Default::default(), &body, properties).await.unwrap();
    }
    let keeper = mirror.clone().keeper(house.db.clone(), owner);
    let (begun, gate, stop) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)), CancellationToken::new());
    let copies = Copies { keeper, cache: cache.clone(), begun: begun.clone(), gate: gate.clone() };
    // Whatever fails is a dead letter at once.
    let consumer = consumer(&house, &env("AMQP_URL"), &subscription).retry_delays([]);
    let running = tokio::spawn(consumer.run(copies, stop.clone()));
    // When the other user has his turn, all that was sent before has come, and waits together.
    eventually("both users' turn", async || match begun.load(Ordering::SeqCst) {
        2 => Ok(()),
        begun => Err(begun),
    })
    .await;
    gate.add_permits(1_000);
    for user in &users {
        eventually("the copy to be set right", async || {
            let copy = mirror.get(&mut house.db.acquire().await.unwrap(), *user).await.unwrap().unwrap();
            if (copy.version, &copy.profile["city"]) == (1, &json!("Riga")) { Ok(()) } else { Err(copy.version) }
        })
        .await;
    }
    assert_eq!(cache.get(users[1]).await.unwrap().version(), 1);
    stop.cancel();
    running.await.unwrap().unwrap();
    topology::delete(&broker.create_channel().await.unwrap(), &subscription.name, &[]).await.unwrap();
}

/// What unacknowledged messages a queue of this broker has, by the broker's own word.
async fn unacknowledged(broker: &HurtBroker, queue: &str) -> usize {
    let listed = broker.try_ctl(&["list_queues", "-q", "name", "messages_unacknowledged"]).await.unwrap();
    let counts: BTreeMap<&str, &str> = listed.lines().filter_map(|line| line.split_once('\t')).collect();
    counts[queue].trim().parse().unwrap()
}

/// A broker in an alarm takes no message to be parked. What was handled is acknowledged all the same, more users fail than are handled
/// at once, and nothing is there twice when the alarm is over.
#[sqlx::test]
async fn a_broker_in_an_alarm_holds_back_what_failed_and_nothing_else(db: PgPool) {
    const CURSED: usize = 24;
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    let listener = Listener::with(&house, &broker.amqp_url, |consumer| consumer.concurrency(4)).await;
    let gate = listener.diary.gate.clone();
    gate.forget_permits(Semaphore::MAX_PERMITS);
    let cursed: Vec<Uuid> = (0..CURSED).map(|_| Uuid::new_v4()).collect();
    for user in &cursed {
        listener.diary.curse(*user, Curse::Fails);
        listener.tell(&notice(*user, 1, Event::Created)).await;
    }
    load::users(&house, 20).await;
    house.settle().await;
    handed_out(&listener).await;
    broker.alarm().await;
    let alarm = Instant::now();
    gate.add_permits(10_000);
    listener.called(20).await;
    let queue = listener.subscription.name.queue();
    eventually("what was handled to be acknowledged", async || match unacknowledged(&broker, queue).await {
        CURSED => Ok(()),
        others => Err(others),
    })
    .await;
    // Longer than a confirm is waited for when there is no alarm.
    eventually("the alarm to last", async || match alarm.elapsed() {
        long if long > Duration::from_secs(12) => Ok(()),
        short => Err(short),
    })
    .await;
    broker.end_alarm().await;
    eventually("the dead letters", async || match listener.dead_letters().await {
        dead if dead as usize == CURSED => Ok(()),
        dead => Err(dead),
    })
    .await;
    assert_eq!(listener.diary.begun.load(Ordering::SeqCst), 20 + 3 * CURSED, "three attempts each, nothing twice");
    listener.end().await;
}

#[sqlx::test]
async fn an_alarm_does_not_hold_up_the_leaving(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    let bound = Duration::from_secs(2);
    let listener = Listener::with(&house, &broker.amqp_url, |consumer| consumer.farewell(bound)).await;
    listener.diary.gate.forget_permits(Semaphore::MAX_PERMITS);
    let cursed = Uuid::new_v4();
    listener.diary.curse(cursed, Curse::Fails);
    listener.tell(&notice(cursed, 1, Event::Created)).await;
    begun(&listener.diary, 1).await;
    broker.alarm().await;
    listener.diary.gate.add_permits(10);
    let Listener { stop, running, channel, subscription, .. } = listener;
    stop.cancel();
    let asked = Instant::now();
    running.await.unwrap().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    broker.end_alarm().await;
    // What was under way may have arrived as well.
    gives_back(&broker.amqp_url, subscription.name.queue(), 1..=2).await;
    topology::delete(&channel, &subscription.name, &SOON).await.unwrap();
}

/// Who waits for an outage to end does not wait for it when he is to leave.
#[sqlx::test]
async fn an_outage_of_the_owner_does_not_hold_up_the_leaving(db: PgPool) {
    let mut house = House::open(db).await;
    let real = house.service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let before = Proxy::before(real).await;
    let direct = std::mem::replace(&mut house.service.url, format!("http://{}", before.address()));
    let bound = Duration::from_secs(60);
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.farewell(bound)).await;
    house.service.url = direct;
    before.down();
    load::users(&house, 5).await;
    eventually("calls to begin again", async || match listener.diary.begun.load(Ordering::SeqCst) {
        begun if begun > 5 => Ok(()),
        begun => Err(begun),
    })
    .await;
    listener.stop.cancel();
    let asked = Instant::now();
    let Listener { running, channel, subscription, .. } = listener;
    running.await.unwrap().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    gives_back(&env("AMQP_URL"), subscription.name.queue(), 5..=5).await;
    topology::delete(&channel, &subscription.name, &SOON).await.unwrap();
}

/// Killed after its work and before the acknowledgement arrived.
#[sqlx::test]
async fn what_was_done_and_not_acknowledged_comes_again(db: PgPool) {
    let house = House::open(db).await;
    let (line, through) = line().await;
    let first = Listener::with(&house, &through, |consumer| consumer).await;
    first.diary.gate.forget_permits(Semaphore::MAX_PERMITS);
    let ana = house.user(json!({})).await;
    begun(&first.diary, 1).await;
    line.freeze();
    first.diary.gate.add_permits(10);
    first.called(1).await;
    line.down();
    first.running.abort();
    let second = Listener::of(&house).await;
    assert_eq!(second.called(1).await[0].user, ana);
    second.end().await;
}

/// Counts how often listening ended, or could not begin.
#[derive(Clone, Default)]
struct Disconnections(Arc<AtomicUsize>);

impl Observer for Disconnections {
    fn disconnected(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Gone while nobody was connected: what was told meanwhile is missing, although the queue is there.
#[sqlx::test]
async fn an_exchange_that_was_deleted_while_away_is_a_loss(db: PgPool) {
    let house = House::open(db).await;
    let (line, through) = line().await;
    let disconnections = Disconnections::default();
    let watched = disconnections.clone();
    let listener = Listener::with(&house, &through, |consumer| consumer.observe(watched)).await;
    line.down();
    listener.channel.exchange_delete(house.exchange.as_str().into(), Default::default()).await.unwrap();
    line.up();
    let before = disconnections.0.load(Ordering::SeqCst);
    // The first of the two may have begun before the line was up.
    eventually("two looks that find no exchange", async || match disconnections.0.load(Ordering::SeqCst) - before {
        0 | 1 => Err(listener.running.is_finished()),
        _ => Ok(()),
    })
    .await;
    // The first to be told of finds no exchange; the owner then makes it again.
    house.user(json!({})).await;
    eventually("the loss to be caught up with", async || {
        let gaps = listener.diary.gaps.lock().unwrap().clone();
        if gaps == [Gap::FirstStart, Gap::QueueLost] { Ok(()) } else { Err(gaps) }
    })
    .await;
    listener.listens().await;
    let bo = house.user(json!({})).await;
    eventually("news", async || match listener.diary.of(&bo).len() {
        1 => Ok(()),
        calls => Err(calls),
    })
    .await;
    listener.end().await;
}

/// Panics, then fails, then succeeds.
#[derive(Clone, Default)]
struct Stubborn(Arc<AtomicUsize>);

impl CatchUp for Stubborn {
    async fn catch_up(&self, gap: Gap) -> Result<(), Failure> {
        assert_eq!(gap, Gap::FirstStart, "it is not done until it succeeded");
        match self.0.fetch_add(1, Ordering::SeqCst) {
            0 => panic!("stubborn"),
            1 => Err(Failure::because("stubborn")),
            _ => Ok(()),
        }
    }
}

#[sqlx::test]
async fn nothing_is_consumed_before_it_was_caught_up(db: PgPool) {
    let house = House::open(db).await;
    let stubborn = Stubborn::default();
    let tries = stubborn.0.clone();
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.catch_up(stubborn)).await;
    assert_eq!(tries.load(Ordering::SeqCst), 3, "it listens now, and not earlier");
    let ana = house.user(json!({})).await;
    assert_eq!(listener.called(1).await[0].user, ana);
    listener.end().await;
}

/// Somebody deleted the queues in which what failed waits: it stays where it is.
#[sqlx::test]
async fn what_cannot_be_put_aside_is_not_acknowledged(db: PgPool) {
    let house = House::open(db).await;
    // Enough to be refused a place, and to be asked again.
    let farewell = Duration::from_secs(3);
    let first = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.farewell(farewell)).await;
    for delay in SOON {
        let retry = first.subscription.name.retry_queue(delay);
        first.channel.queue_delete(retry.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    }
    let ana = Uuid::new_v4();
    first.diary.curse(ana, Curse::Fails);
    house.put(&ana, json!({})).await.ok();
    begun(&first.diary, 1).await;
    first.stop.cancel();
    first.running.await.unwrap().unwrap();
    let second = Listener::of(&house).await;
    assert_eq!(second.called(1).await[0].user, ana);
    second.end().await;
}

/// Has looked, and is not done before the gate is open.
#[derive(Clone)]
struct Thorough {
    begun: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl CatchUp for Thorough {
    async fn catch_up(&self, _gap: Gap) -> Result<(), Failure> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.acquire().await?);
        Ok(())
    }
}

/// Bound first: between the last look and the first message there is no gap.
#[sqlx::test]
async fn what_is_told_while_it_is_caught_up_with_waits_in_the_queue(db: PgPool) {
    let house = House::open(db).await;
    let thorough = Thorough { begun: Arc::default(), gate: Arc::new(Semaphore::new(0)) };
    let (catch_up, Thorough { begun, gate }) = (thorough.clone(), thorough);
    let meanwhile = async {
        eventually("catching up to begin", async || match begun.load(Ordering::SeqCst) {
            0 => Err("not yet"),
            _ => Ok(()),
        })
        .await;
        let ana = house.user(json!({})).await;
        house.settle().await;
        gate.add_permits(1);
        ana
    };
    let amqp_url = env("AMQP_URL");
    let listening = Listener::with(&house, &amqp_url, |consumer| consumer.catch_up(catch_up));
    let (listener, ana) = tokio::join!(listening, meanwhile);
    assert_eq!(listener.called(1).await[0].user, ana);
    listener.end().await;
}
