//! SDK: a consumer in Rust, in this process, against the real broker and service.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use lapin::{
    BasicProperties, Channel, Connection,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::json;
use sqlx::PgPool;
use tidings_sdk::{
    consumer::{CatchUp, Consumer, Failure, Gap, Handler, News, Observer, StartError},
    envelope::{Event, Notice},
    letter::{Letter, Reason},
    owner::Owner,
    subscription::Subscription,
    topology::{self, Depth, RETRY_DELAYS, Source},
};
use time::OffsetDateTime;
use tokio::{sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    clients::{client, revoke},
    house::{House, connect, env, eventually, file, owner_at},
    load::{self, Load},
    proxy::Proxy,
};

pub const SOON: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(100)];

/// What a call of the handler was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub event: String,
    pub user: Uuid,
    pub version: i64,
    pub notices: usize,
    pub latest: Option<i64>,
    at: Instant,
}

/// What the handler does before it succeeds, if it does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Curse {
    Fails,
    Panics,
    Hangs,
}

#[derive(Clone)]
pub struct Diary {
    calls: Arc<Mutex<Vec<Call>>>,
    pub cursed: Arc<Mutex<BTreeMap<Uuid, Curse>>>,
    /// A call needs a permit to end.
    pub gate: Arc<Semaphore>,
    busy: Arc<Mutex<BTreeMap<Uuid, usize>>>,
    pub begun: Arc<AtomicUsize>,
    pub gaps: Arc<Mutex<Vec<Gap>>>,
}

impl Diary {
    pub fn new() -> Self {
        let gate = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        let (calls, cursed, busy, begun, gaps) = Default::default();
        Self { calls, cursed, gate, busy, begun, gaps }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub fn of(&self, user: &Uuid) -> Vec<Call> {
        self.calls().into_iter().filter(|call| call.user == *user).collect()
    }

    pub fn curse(&self, user: Uuid, curse: Curse) {
        self.cursed.lock().unwrap().insert(user, curse);
    }

    async fn note(&self, event: &str, news: News) -> Result<(), Failure> {
        {
            let mut busy = self.busy.lock().unwrap();
            let others = busy.entry(news.user_id).or_default();
            assert_eq!(*others, 0, "one user is handled twice at once");
            *others += 1;
        }
        self.begun.fetch_add(1, Ordering::SeqCst);
        let done = self.work(event, &news).await;
        *self.busy.lock().unwrap().get_mut(&news.user_id).unwrap() -= 1;
        done
    }

    async fn work(&self, event: &str, news: &News) -> Result<(), Failure> {
        drop(self.gate.acquire().await?);
        let curse = self.cursed.lock().unwrap().get(&news.user_id).copied();
        match curse {
            Some(Curse::Fails) => return Err(std::fmt::Error.into()),
            Some(Curse::Panics) => {
                // Not counted as busy any more: nobody comes back to say so.
                self.busy.lock().unwrap().insert(news.user_id, 0);
                panic!("cursed")
            }
            Some(Curse::Hangs) => {
                self.busy.lock().unwrap().insert(news.user_id, 0);
                std::future::pending().await
            }
            None => {}
        }
        let latest = news.latest().await?;
        self.calls.lock().unwrap().push(Call {
            event: event.to_owned(),
            user: news.user_id,
            version: news.version,
            notices: news.notices.len(),
            latest: latest.living().map(|user| user.version),
            at: Instant::now(),
        });
        Ok(())
    }
}

impl Handler for Diary {
    async fn created(&self, news: News) -> Result<(), Failure> {
        self.note("created", news).await
    }

    async fn updated(&self, news: News) -> Result<(), Failure> {
        let fields: Vec<&str> = news.event.changed_fields().iter().map(|field| field.as_str()).collect();
        let event = format!("updated[{}]", fields.join(","));
        self.note(&event, news).await
    }

    async fn deleted(&self, news: News) -> Result<(), Failure> {
        self.note("deleted", news).await
    }
}

impl CatchUp for Diary {
    async fn catch_up(&self, gap: Gap) -> Result<(), Failure> {
        self.gaps.lock().unwrap().push(gap);
        Ok(())
    }
}

/// A consumer that listens, and an admin who looks at its queues.
pub struct Listener {
    pub diary: Diary,
    pub subscription: Subscription,
    _connection: Connection,
    amqp_url: String,
    pub channel: Channel,
    pub stop: CancellationToken,
    pub running: JoinHandle<Result<(), StartError>>,
}

pub fn subscription(house: &House) -> Subscription {
    let mut subscription = Subscription::new(format!("{}.sdk", house.exchange).parse().unwrap());
    subscription.keys.insert("#".parse().unwrap());
    subscription
}

pub fn consumer(house: &House, amqp_url: &str, subscription: &Subscription) -> Consumer {
    let owner = owner_at(&house.service.url).patience(Duration::from_millis(300));
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    Consumer::new(amqp_url, source, subscription.clone(), owner).unwrap().retry_delays(SOON)
}

impl Listener {
    pub async fn of(house: &House) -> Self {
        Self::with(house, &env("AMQP_URL"), |consumer| consumer).await
    }

    pub async fn with(house: &House, amqp_url: &str, set: impl FnOnce(Consumer) -> Consumer) -> Self {
        Self::keeping(house, amqp_url, Diary::new(), set).await
    }

    pub async fn keeping(house: &House, amqp_url: &str, diary: Diary, set: impl FnOnce(Consumer) -> Consumer) -> Self {
        let consumer = set(consumer(house, amqp_url, &subscription(house)).catch_up(diary.clone()));
        Self::started(house, diary, consumer).await
    }

    /// A consumer that asks the owner with another key than that of all tests.
    async fn asking(house: &House, owner: Owner, set: impl FnOnce(Consumer) -> Consumer) -> Self {
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let owner = owner.patience(Duration::from_millis(300));
        let consumer = Consumer::new(&env("AMQP_URL"), source, subscription(house), owner).unwrap().retry_delays(SOON);
        let diary = Diary::new();
        let consumer = set(consumer.catch_up(diary.clone()));
        Self::started(house, diary, consumer).await
    }

    async fn started(house: &House, diary: Diary, consumer: Consumer) -> Self {
        Self::writing(house, diary.clone(), diary, consumer).await
    }

    /// A consumer whose handler writes into this diary.
    pub async fn writing(house: &House, diary: Diary, handler: impl Handler, consumer: Consumer) -> Self {
        let (subscription, stop) = (subscription(house), CancellationToken::new());
        let running = tokio::spawn(consumer.run(handler, stop.clone()));
        let connection = connect(&house.audit.amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let amqp_url = house.audit.amqp_url.clone();
        let listener = Self { diary, subscription, _connection: connection, amqp_url, channel, stop, running };
        listener.listens().await;
        listener
    }

    pub async fn depth(&self, queue: &str) -> Option<Depth> {
        // On a connection of its own: lapin may tell the next channel that the one before it asked for a queue that is not there.
        let connection = connect(&self.amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        topology::depth(&channel, queue).await.ok()
    }

    pub async fn listens(&self) {
        eventually("the consumer to listen", async || match self.depth(self.subscription.name.queue()).await {
            Some(depth) if depth.consumers == 1 => Ok(()),
            other => Err(other),
        })
        .await;
    }

    /// Waits for this many successful calls.
    pub async fn called(&self, times: usize) -> Vec<Call> {
        eventually("calls of the handler", async || {
            let calls = self.diary.calls();
            if calls.len() >= times { Ok(calls) } else { Err(calls.len()) }
        })
        .await
    }

    /// Puts a message into its queue that nobody told.
    pub async fn send(&self, properties: BasicProperties, body: &[u8]) {
        let (queue, options) = (self.subscription.name.queue().into(), BasicPublishOptions::default());
        let sent = self.channel.basic_publish("".into(), queue, options, body, properties).await.unwrap();
        assert!(sent.await.unwrap().is_ack());
    }

    pub async fn tell(&self, notice: &Notice) {
        let (properties, body) = notice.to_message("urn:test");
        self.send(properties, &body).await;
    }

    /// The next dead letter, as it lies there.
    pub async fn dead_letter(&self) -> lapin::message::BasicGetMessage {
        let dead = self.subscription.name.dead_queue();
        eventually("a dead letter", async || {
            let options = BasicGetOptions { no_ack: true };
            self.channel.basic_get(dead.as_str().into(), options).await.unwrap().ok_or("none")
        })
        .await
    }

    pub async fn dead_letters(&self) -> u32 {
        self.depth(&self.subscription.name.dead_queue()).await.unwrap().ready
    }

    /// Ends it well: everything that was handled is acknowledged.
    pub async fn end(self) {
        self.stop.cancel();
        self.running.await.unwrap().unwrap();
        topology::delete(&self.channel, &self.subscription.name, &SOON).await.unwrap();
    }
}

pub fn notice(user: Uuid, version: i64, event: Event) -> Notice {
    let occurred_at = OffsetDateTime::now_utc();
    Notice { message_id: Uuid::new_v4(), user_id: user, version, event, occurred_at, traceparent: None }
}

pub fn updated(field: &str) -> Event {
    Event::Updated { changed_fields: vec![field.parse().unwrap()] }
}

pub fn said(calls: &[Call]) -> Vec<String> {
    calls.iter().map(|call| format!("{} {}", call.version, call.event)).collect()
}

#[sqlx::test]
async fn each_kind_of_news_reaches_its_handler_once(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let ana = house.user(json!({})).await;
    listener.called(1).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    listener.called(2).await;
    house.delete(&ana).await.ok();
    let calls = listener.called(3).await;
    assert_eq!(said(&calls), ["1 created", "2 updated[city]", "3 deleted"]);
    assert_eq!(calls.iter().map(|call| call.latest).collect::<Vec<_>>(), [Some(1), Some(2), None]);
    listener.end().await;
}

/// What waits together for one user is one call, and what is older than what was handled is none.
#[sqlx::test]
async fn news_of_one_user_that_waits_together_is_one_call(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let gate = listener.diary.gate.clone();
    gate.forget_permits(Semaphore::MAX_PERMITS);
    let ana = house.user(json!({})).await;
    eventually("the first call to begin", async || match listener.diary.begun.load(Ordering::SeqCst) {
        1 => Ok(()),
        begun => Err(begun),
    })
    .await;
    for city in ["Riga", "Oslo", "Rome"] {
        house.amend(&ana, json!({ "city": city })).await.ok();
    }
    house.amend(&ana, json!({ "phone": "1" })).await.ok();
    house.settle().await;
    eventually("the queue to be handed out", async || {
        match listener.depth(listener.subscription.name.queue()).await.unwrap().ready {
            0 => Ok(()),
            ready => Err(ready),
        }
    })
    .await;
    // A user of whom nothing else waits: when he gets his turn, everything sent before was handed out.
    let bo = house.user(json!({})).await;
    eventually("the second user's call to begin", async || match listener.diary.begun.load(Ordering::SeqCst) {
        2 => Ok(()),
        begun => Err(begun),
    })
    .await;
    gate.add_permits(1000);
    eventually("both users to be done", async || {
        let versions: Vec<i64> = listener.diary.of(&ana).iter().filter_map(|call| call.latest).collect();
        if versions.last() == Some(&5) && listener.diary.of(&bo).len() == 1 { Ok(()) } else { Err(versions) }
    })
    .await;
    // The first call saw the state of version 5 already: then the four that waited are old, or they were one call.
    let calls = listener.diary.of(&ana);
    assert!(calls.len() <= 2, "{calls:?}");
    listener.end().await;
}

#[sqlx::test]
async fn different_users_are_handled_at_the_same_time_and_one_user_never(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 5).await;
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.concurrency(4).prefetch(50)).await;
    // The handler asserts that nobody is handled twice at once.
    let load = Load::on(&house, &users, 8);
    load.goes_on(300).await;
    load.end_well().await;
    house.settle().await;
    let master = load::versions(&house.db).await;
    for user in &users {
        eventually("the last state", async || {
            let seen = listener.diary.of(user).iter().filter_map(|call| call.latest).max();
            if seen == master.get(user).copied() { Ok(()) } else { Err(seen) }
        })
        .await;
    }
    assert_eq!(listener.dead_letters().await, 0, "no handler panicked");
    listener.end().await;
}

#[sqlx::test]
async fn duplicates_and_older_versions_are_dropped_and_a_deletion_never_is(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let ana = house.user(json!({})).await;
    listener.called(1).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    listener.called(2).await;
    house.settle().await;
    for notice in house.audit.heard() {
        listener.tell(&notice).await;
    }
    // News from a year ago.
    let mut old = notice(ana, 1, Event::Created);
    old.occurred_at -= time::Duration::days(365);
    listener.tell(&old).await;
    house.delete(&ana).await.ok();
    let calls = listener.called(3).await;
    assert_eq!(said(&calls), ["1 created", "2 updated[city]", "3 deleted"]);
    listener.tell(&notice(ana, 2, updated("city"))).await;
    let bo = house.user(json!({})).await;
    let calls = listener.called(4).await;
    assert_eq!(calls[3].user, bo, "nobody comes back to life");
    listener.end().await;
}

/// Fails, panics or hangs: tried as often as there are delays, then a dead letter with a reason, and nobody else is held up.
#[sqlx::test]
async fn what_cannot_be_handled_becomes_a_dead_letter_with_its_reason(db: PgPool) {
    let house = House::open(db).await;
    let deadline = Duration::from_millis(200);
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.handler_deadline(deadline)).await;
    for (curse, reason) in [
        (Curse::Fails, Reason::HandlerFailed),
        (Curse::Panics, Reason::HandlerPanicked),
        (Curse::Hangs, Reason::HandlerTimedOut),
    ] {
        let cursed = Uuid::new_v4();
        listener.diary.curse(cursed, curse);
        let told = notice(cursed, 1, Event::Created);
        listener.tell(&told).await;
        let dead = listener.dead_letter().await;
        let letter = Letter::read(dead.delivery.properties.headers().as_ref()).unwrap();
        assert_eq!((letter.reason, letter.attempts), (reason, 3));
        let kept = Notice::from_message(&dead.delivery.properties, &dead.delivery.data).unwrap();
        assert_eq!((kept.message_id, kept.user_id), (told.message_id, cursed), "it can be told again");
    }
    let forged = notice(Uuid::new_v4(), 1, Event::Created);
    listener.tell(&forged).await;
    let dead = listener.dead_letter().await;
    let letter = Letter::read(dead.delivery.properties.headers().as_ref()).unwrap();
    assert_eq!(letter.reason, Reason::UnknownUser, "a notice of somebody whom the owner does not know");
    house.user(json!({})).await;
    listener.called(1).await;
    listener.end().await;
}

/// One cursed user among a thousand.
#[sqlx::test]
async fn a_cursed_user_delays_nobody_but_himself(db: PgPool) {
    let house = House::open(db).await;
    let diary = Diary::new();
    let users = load::users(&house, 1_000).await;
    let cursed = users[500];
    diary.curse(cursed, Curse::Fails);
    let began = Instant::now();
    let listener = Listener::keeping(&house, &env("AMQP_URL"), diary, |consumer| consumer.concurrency(4)).await;
    for user in &users {
        listener.tell(&notice(*user, 1, Event::Created)).await;
    }
    house.amend(&cursed, json!({ "city": "Riga" })).await.ok();
    let calls = listener.called(999).await;
    let others = calls.iter().map(|call| call.at.duration_since(began)).max().unwrap();
    let mut dead = vec![];
    for _ in 0..2 {
        let letter = listener.dead_letter().await;
        let notice = Notice::from_message(&letter.delivery.properties, &letter.delivery.data).unwrap();
        dead.push((notice.user_id, notice.version));
    }
    dead.sort_unstable();
    assert_eq!(dead, [(cursed, 1), (cursed, 2)], "exactly his");
    assert_eq!(listener.dead_letters().await, 0);
    assert_eq!(listener.diary.calls().len(), 999, "in {others:?}");
    listener.end().await;
}

/// One whose handler never comes back, and that may go on for an hour: nobody waits for him.
#[sqlx::test]
async fn nobody_waits_for_a_user_whose_handler_hangs(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 100).await;
    let diary = Diary::new();
    diary.curse(users[0], Curse::Hangs);
    let patient = |consumer: Consumer| consumer.concurrency(2).handler_deadline(Duration::from_secs(3_600));
    let brief = |consumer: Consumer| patient(consumer).farewell(Duration::ZERO);
    let listener = Listener::keeping(&house, &env("AMQP_URL"), diary, brief).await;
    for user in &users {
        listener.tell(&notice(*user, 1, Event::Created)).await;
    }
    let calls = listener.called(99).await;
    assert!(calls.iter().all(|call| call.user != users[0]));
    listener.end().await;
}

/// An outage of the owner is nobody's fault: it is waited for, and costs no attempt.
#[sqlx::test]
async fn an_outage_of_the_owner_makes_no_dead_letters(db: PgPool) {
    let mut house = House::open(db).await;
    let real = house.service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let before = Proxy::before(real).await;
    let direct = std::mem::replace(&mut house.service.url, format!("http://{}", before.address()));
    let listener = Listener::of(&house).await;
    house.service.url = direct;
    before.down();
    let users = load::users(&house, 20).await;
    eventually("calls to begin", async || match listener.diary.begun.load(Ordering::SeqCst) {
        begun if begun > 80 => Ok(()),
        begun => Err(begun),
    })
    .await;
    before.up();
    let calls = listener.called(20).await;
    assert!(users.iter().all(|user| calls.iter().any(|call| call.user == *user)));
    assert_eq!(listener.dead_letters().await, 0);
    listener.end().await;
}

/// Attempts that were counted, dead letters included.
#[derive(Clone, Default)]
struct Attempts(Arc<Mutex<Vec<Reason>>>);

impl Observer for Attempts {
    fn failed(&self, reason: Reason, _: u32) {
        self.0.lock().unwrap().push(reason);
    }

    fn dead(&self, reason: Reason) {
        self.0.lock().unwrap().push(reason);
    }
}

/// Has words of its own for what went wrong, and loses the cause in some of them.
#[derive(Clone, Default)]
struct Wordy {
    calls: Arc<AtomicUsize>,
    done: Arc<AtomicUsize>,
}

impl Handler for Wordy {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        let words = self.calls.fetch_add(1, Ordering::SeqCst) % 3;
        let Err(error) = news.latest().await else {
            self.done.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        };
        Err(Failure::because(match words {
            0 => anyhow::Error::new(error),
            1 => anyhow::Error::new(error).context("no badge"),
            _ => anyhow::anyhow!("no badge: {error}"),
        }))
    }
}

#[sqlx::test]
async fn an_outage_of_the_owner_is_one_in_whatever_words_it_is_told(db: PgPool) {
    let mut house = House::open(db).await;
    let before = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let direct = std::mem::replace(&mut house.service.url, format!("http://{}", before.address()));
    let (attempts, wordy, stop) = (Attempts::default(), Wordy::default(), CancellationToken::new());
    let subscription = subscription(&house);
    let consumer = consumer(&house, &env("AMQP_URL"), &subscription).observe(attempts.clone());
    house.service.url = direct;
    let running = tokio::spawn(consumer.run(wordy.clone(), stop.clone()));
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    is_attended(&connection, subscription.name.queue()).await;
    before.down();
    load::users(&house, 9).await;
    let reach = async |what: &str, count: &AtomicUsize, goal: usize| {
        eventually(what, async || match count.load(Ordering::SeqCst) {
            count if count >= goal => Ok(()),
            count => Err((count, attempts.0.lock().unwrap().clone())),
        })
        .await;
    };
    reach("calls to begin again", &wordy.calls, 60).await;
    before.up();
    reach("everybody", &wordy.done, 9).await;
    assert_eq!(*attempts.0.lock().unwrap(), []);
    stop.cancel();
    running.await.unwrap().unwrap();
    topology::delete(&connection.create_channel().await.unwrap(), &subscription.name, &SOON).await.unwrap();
}

/// So is one that takes every request and answers none, although it takes longer than a handler may.
#[sqlx::test]
async fn an_owner_that_says_nothing_makes_no_dead_letters(db: PgPool) {
    let house = House::open(db).await;
    let real = house.service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let before = Proxy::before(real).await;
    let owner = owner_at(&format!("http://{}", before.address()));
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    let consumer = Consumer::new(&env("AMQP_URL"), source, subscription(&house), owner).unwrap();
    let attempts = Attempts::default();
    let bound = Duration::from_secs(3);
    let consumer = consumer.retry_delays(SOON).handler_deadline(bound).observe(attempts.clone());
    let listener = Listener::started(&house, Diary::new(), consumer).await;
    before.freeze();
    let users = load::users(&house, 20).await;
    eventually("calls to begin again", async || match listener.diary.begun.load(Ordering::SeqCst) {
        begun if begun > 40 => Ok(()),
        begun => Err(begun),
    })
    .await;
    before.up();
    let calls = listener.called(20).await;
    assert!(users.iter().all(|user| calls.iter().any(|call| call.user == *user)));
    assert_eq!(*attempts.0.lock().unwrap(), []);
    listener.end().await;
}

/// What kept it waiting, by the reason it was told.
#[derive(Clone, Default)]
struct Outages(Arc<Mutex<Vec<&'static str>>>);

impl Observer for Outages {
    fn outage(&self, why: &'static str) {
        self.0.lock().unwrap().push(why);
    }
}

impl Outages {
    /// Waits until it was told so often, which takes longer than the delays of all further attempts.
    async fn are(&self, expected: &str) {
        eventually("an outage to be told", async || {
            let told = self.0.lock().unwrap().clone();
            if told.iter().filter(|why| **why == expected).count() >= 4 { Ok(()) } else { Err(told) }
        })
        .await;
    }
}

/// A key that is revoked, or may not read, says nothing about the news: that waits, and goes on with the next key, without a restart.
#[sqlx::test]
async fn a_refused_key_makes_no_dead_letters_and_is_replaced_without_a_restart(db: PgPool) {
    let house = House::open(db).await;
    let first = client(&house, "create sdk --scope users:read").await;
    let (key, outages) = (file(&first), Outages::default());
    let owner = Owner::at(&house.service.url).unwrap().with_key_file(&key).unwrap();
    let listener = Listener::asking(&house, owner, |consumer| consumer.observe(outages.clone())).await;
    house.user(json!({})).await;
    listener.called(1).await;
    revoke(&house, "sdk", &first).await;
    let users = load::users(&house, 20).await;
    outages.are("the owner refuses the key").await;
    let blind = client(&house, "create sdk --scope users:write").await;
    fs::write(&key, &blind).unwrap();
    outages.are("the owner does not let this key read users").await;
    assert_eq!(listener.diary.calls().len(), 1);
    for retry in SOON {
        assert_eq!(listener.depth(&listener.subscription.name.retry_queue(retry)).await.unwrap().ready, 0);
    }
    let seeing = client(&house, "create sdk.reader --scope users:read").await;
    // As an editor leaves it.
    fs::write(&key, format!("{seeing}\n")).unwrap();
    let calls = listener.called(21).await;
    assert!(users.iter().all(|user| calls.iter().any(|call| call.user == *user)));
    assert_eq!(listener.dead_letters().await, 0);
    listener.end().await;
}

/// What a consumer is started with has to be right; nothing is taken from the queue before that is known.
#[sqlx::test]
async fn a_consumer_does_not_begin_with_a_refused_key(db: PgPool) {
    let house = House::open(db).await;
    let blind = client(&house, "create blind --scope users:write").await;
    let stranger = format!("tdg_{}_{}", "0".repeat(16), "0".repeat(64));
    for (key, said) in [(blind, "403 forbidden"), (stranger, "401 unauthenticated")] {
        let owner = Owner::at(&house.service.url).unwrap().with_key(&key).unwrap();
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let consumer = Consumer::new(&env("AMQP_URL"), source, subscription(&house), owner).unwrap();
        let refused = consumer.run(Diary::new(), CancellationToken::new()).await.unwrap_err().to_string();
        assert!(refused.contains(said) && refused.contains("users:read") && !refused.contains(&key), "{refused}");
    }
    let nowhere = Owner::at(&house.service.url).unwrap().with_key_file("/nowhere/key").unwrap_err();
    assert!(nowhere.to_string().contains("cannot be read"), "{nowhere}");
}

#[sqlx::test]
async fn what_is_no_notice_is_a_dead_letter_at_once_and_harms_nobody(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let (good, body) = notice(Uuid::new_v4(), 1, Event::Created).to_message("urn:test");
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    let huge = vec![b'x'; 16 * 1024 * 1024];
    let nested = {
        let mut table = FieldTable::default();
        for _ in 0..20 {
            let inner = std::mem::take(&mut table);
            table.insert("version".into(), AMQPValue::FieldTable(inner));
        }
        good.clone().with_headers(table)
    };
    let hostile: [(BasicProperties, &[u8]); 7] = [
        (good.clone(), b"not json"),
        (good.clone(), b""),
        (good.clone(), b"{\"user_id\":\"\\u0000\"}"),
        (good.clone(), &deep),
        (good.clone(), &huge),
        (BasicProperties::default(), &body),
        (nested, &body),
    ];
    for (properties, body) in hostile {
        listener.send(properties, body).await;
        let dead = listener.dead_letter().await;
        let letter = Letter::read(dead.delivery.properties.headers().as_ref()).unwrap();
        assert_eq!((letter.reason, letter.attempts), (Reason::Malformed, 1));
        assert!(dead.delivery.data.len() <= 64 * 1024);
    }
    house.user(json!({})).await;
    listener.called(1).await;
    listener.end().await;
}

#[sqlx::test]
async fn a_lost_connection_heals(db: PgPool) {
    let house = House::open(db).await;
    let authority = env("AMQP_URL").split_once('@').unwrap().1.split('/').next().unwrap().to_owned();
    let line = Proxy::before(authority.parse().unwrap()).await;
    let through = env("AMQP_URL").replace(&authority, &line.address().to_string());
    let listener = Listener::with(&house, &through, |consumer| consumer).await;
    line.down();
    let ana = house.user(json!({})).await;
    house.settle().await;
    line.up();
    assert_eq!(listener.called(1).await[0].user, ana);
    assert_eq!(*listener.diary.gaps.lock().unwrap(), [Gap::FirstStart, Gap::Reconnected]);
    listener.end().await;
}

#[sqlx::test]
async fn a_deleted_queue_is_declared_again_and_what_was_missed_is_caught_up_with(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::of(&house).await;
    let queue = listener.subscription.name.queue();
    listener.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    eventually("the loss to be noticed", async || {
        let gaps = listener.diary.gaps.lock().unwrap().clone();
        if gaps == [Gap::FirstStart, Gap::QueueLost] { Ok(()) } else { Err(gaps) }
    })
    .await;
    listener.listens().await;
    let ana = house.user(json!({})).await;
    assert_eq!(listener.called(1).await[0].user, ana);
    listener.end().await;
}

/// Deleted and declared anew by somebody else, before the consumer could notice.
#[sqlx::test]
async fn a_queue_that_is_swapped_at_once_is_listened_to(db: PgPool) {
    let house = House::open(db).await;
    let often = Duration::from_millis(300);
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.check_every(often)).await;
    let ana = house.user(json!({})).await;
    listener.called(1).await;
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    topology::delete(&listener.channel, &listener.subscription.name, &SOON).await.unwrap();
    topology::declare(&listener.channel, &source, &listener.subscription, &SOON).await.unwrap();
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    let calls = listener.called(2).await;
    assert_eq!(said(&calls), ["1 created", "2 updated[city]"]);
    listener.end().await;
}

/// Nobody is told when an exchange goes, and its bindings with it.
#[sqlx::test]
async fn a_deleted_exchange_is_noticed_and_bound_to_again(db: PgPool) {
    let house = House::open(db).await;
    let often = Duration::from_millis(50);
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.check_every(often)).await;
    listener.channel.exchange_delete(house.exchange.as_str().into(), Default::default()).await.unwrap();
    eventually("the loss to be noticed", async || {
        let gaps = listener.diary.gaps.lock().unwrap().clone();
        if gaps.contains(&Gap::QueueLost) { Ok(()) } else { Err((gaps, listener.running.is_finished())) }
    })
    .await;
    listener.listens().await;
    let ana = house.user(json!({})).await;
    assert_eq!(listener.called(1).await[0].user, ana);
    listener.end().await;
}

/// Killed after its work and before the acknowledgement: the message comes again, to whoever is there.
#[sqlx::test]
async fn what_was_not_acknowledged_comes_again(db: PgPool) {
    let house = House::open(db).await;
    let first = Listener::of(&house).await;
    first.diary.gate.forget_permits(Semaphore::MAX_PERMITS);
    let ana = house.user(json!({})).await;
    eventually("the call to begin", async || match first.diary.begun.load(Ordering::SeqCst) {
        1 => Ok(()),
        begun => Err(begun),
    })
    .await;
    first.running.abort();
    let second = Listener::of(&house).await;
    assert_eq!(second.called(1).await[0].user, ana);
    second.end().await;
}

#[sqlx::test]
async fn who_is_asked_to_leave_finishes_what_is_under_way_and_gives_back_the_rest(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.concurrency(1)).await;
    let gate = listener.diary.gate.clone();
    gate.forget_permits(Semaphore::MAX_PERMITS);
    load::users(&house, 5).await;
    house.settle().await;
    eventually("one call to begin", async || match listener.diary.begun.load(Ordering::SeqCst) {
        1 => Ok(()),
        begun => Err(begun),
    })
    .await;
    listener.stop.cancel();
    gate.add_permits(100);
    let Listener { diary, subscription, _connection: connection, channel, running, .. } = listener;
    running.await.unwrap().unwrap();
    assert_eq!(diary.calls().len(), 1);
    eventually("the rest to be back in the queue", async || {
        let looking = connection.create_channel().await.unwrap();
        match topology::depth(&looking, subscription.name.queue()).await.unwrap() {
            Depth { ready: 4, consumers: 0 } => Ok(()),
            other => Err(other),
        }
    })
    .await;
    topology::delete(&channel, &subscription.name, &SOON).await.unwrap();
}

/// Who wants to wait for ever may say so, and who wants to look all the time.
#[sqlx::test]
async fn settings_without_measure_break_nothing(db: PgPool) {
    let house = House::open(db).await;
    let (patient, hasty) = (Duration::MAX, Duration::ZERO);
    for interval in [patient, hasty] {
        let owner = owner_at(&house.service.url).patience(patient);
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let consumer = Consumer::new(&env("AMQP_URL"), source, subscription(&house), owner).unwrap();
        let consumer = consumer.retry_delays(SOON).handler_deadline(patient).check_every(interval).farewell(patient);
        let listener = Listener::started(&house, Diary::new(), consumer).await;
        house.user(json!({})).await;
        listener.called(1).await;
        listener.end().await;
    }
}

#[sqlx::test]
async fn a_consumer_that_cannot_begin_says_what_to_do(db: PgPool) {
    let house = House::open(db).await;
    let subscription = subscription(&house);
    let start = async |consumer: Consumer| {
        let began = consumer.run(Diary::new(), CancellationToken::new());
        tokio::time::timeout(Duration::from_secs(20), began).await.expect("it should not wait").unwrap_err().to_string()
    };
    let missing = start(consumer(&house, &env("AMQP_URL"), &subscription).registered()).await;
    assert!(missing.contains(subscription.name.queue()) && missing.contains("register the subscription"), "{missing}");
    let elsewhere = Source { exchange: format!("{}.misspelt", house.exchange), prefix: None };
    let owner = owner_at(&house.service.url);
    let misspelt = Consumer::new(&env("AMQP_URL"), elsewhere, subscription.clone(), owner).unwrap().retry_delays(SOON);
    let misspelt = start(misspelt).await;
    assert!(misspelt.contains(".misspelt") && misspelt.contains("check its name"), "{misspelt}");
    let wrong = env("AMQP_URL").replace("guest:guest", "guest:wrong");
    let refused = start(consumer(&house, &wrong, &subscription)).await;
    assert!(refused.contains("login"), "{refused}");
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let queue = subscription.name.queue();
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
    let differs = start(consumer(&house, &env("AMQP_URL"), &subscription)).await;
    assert!(differs.contains(queue) && differs.contains("delete it"), "{differs}");
    topology::delete(&channel, &subscription.name, &SOON).await.unwrap();
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    let owner = owner_at(&house.service.url);
    let url = Consumer::new("http://ana:s3cret@host", source, subscription, owner).err().unwrap().to_string();
    assert!(url.contains("amqp://") && !url.contains("s3cret"), "{url}");
}

/// Waits until somebody consumes from this queue.
pub async fn is_attended(connection: &Connection, queue: &str) {
    eventually("the consumer to listen", async || {
        let channel = connection.create_channel().await.unwrap();
        match topology::depth(&channel, queue).await {
            Ok(depth) if depth.consumers == 1 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// A newer build, or the registry, binds the queue for more than this build asks for: what comes of that is told, and not acknowledged
/// unseen.
#[sqlx::test]
async fn what_its_queue_is_bound_for_is_told_whatever_this_build_asks_for(db: PgPool) {
    let house = House::open(db).await;
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    for is_registered in [false, true] {
        let mut narrow = Subscription::new(format!("{}.{is_registered}", house.exchange).parse().unwrap());
        narrow.fields.insert("city".parse().unwrap());
        let mut wide = narrow.clone();
        wide.fields.insert("phone".parse().unwrap());
        let delays = if is_registered { &RETRY_DELAYS[..] } else { &SOON[..] };
        topology::declare(&channel, &source, &narrow, delays).await.unwrap();
        let consumer = consumer(&house, &env("AMQP_URL"), &narrow);
        let consumer = if is_registered { consumer.registered() } else { consumer };
        let (diary, stop) = (Diary::new(), CancellationToken::new());
        let running = tokio::spawn(consumer.run(diary.clone(), stop.clone()));
        is_attended(&connection, narrow.name.queue()).await;
        topology::declare(&channel, &source, &wide, delays).await.unwrap();
        let ana = house.user(json!({})).await;
        house.amend(&ana, json!({ "phone": "1" })).await.ok();
        eventually("the change of the phone", async || match said(&diary.of(&ana)) {
            told if told == ["2 updated[phone]"] => Ok(()),
            told => Err(told),
        })
        .await;
        stop.cancel();
        running.await.unwrap().unwrap();
        topology::delete(&channel, &narrow.name, delays).await.unwrap();
    }
}

/// Woken for fields alone: other changes do not even reach the queue.
#[sqlx::test]
async fn a_subscription_to_fields_is_woken_for_these_alone(db: PgPool) {
    let house = House::open(db).await;
    let mut fields = Subscription::new(format!("{}.fields-only", house.exchange).parse().unwrap());
    fields.fields.insert("city".parse().unwrap());
    let (diary, stop) = (Diary::new(), CancellationToken::new());
    let running = tokio::spawn(consumer(&house, &env("AMQP_URL"), &fields).run(diary.clone(), stop.clone()));
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    is_attended(&connection, fields.name.queue()).await;
    let ana = house.user(json!({})).await;
    for patch in
        [json!({ "phone": "1" }), json!({ "city": "Riga" }), json!({ "phone": "2" }), json!({ "city": "Oslo" })]
    {
        house.amend(&ana, patch).await.ok();
        house.settle().await;
    }
    eventually("the last change of the city", async || {
        let latest = diary.of(&ana).last().and_then(|call| call.latest);
        if latest == Some(5) { Ok(()) } else { Err(latest) }
    })
    .await;
    let told: Vec<i64> = diary.of(&ana).iter().map(|call| call.version).collect();
    assert_eq!(told, [3, 5]);
    stop.cancel();
    running.await.unwrap().unwrap();
    topology::delete(&connection.create_channel().await.unwrap(), &fields.name, &SOON).await.unwrap();
}

/// Counts what is fetched.
#[derive(Default)]
struct Counter {
    handled: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

impl Observer for Counter {
    fn handled(&self, _: &Event, _: usize, _: Duration, _: Duration) {
        self.handled.fetch_add(1, Ordering::SeqCst);
    }

    fn dropped(&self, _: tidings_sdk::consumer::Dropped) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// Who comes back to many changes of few users fetches each user once: what was fetched stands for everything older.
#[sqlx::test]
async fn who_comes_back_to_a_backlog_fetches_each_user_once(db: PgPool) {
    let house = House::open(db).await;
    Listener::of(&house).await.leave().await;
    let users = load::users(&house, 100).await;
    load::many_versions(&house.db, 50).await;
    house.settle().await;
    let counter = Counter::default();
    let (handled, dropped) = (counter.handled.clone(), counter.dropped.clone());
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.observe(counter)).await;
    eventually("the backlog to be gone", async || {
        match (listener.depth(listener.subscription.name.queue()).await.unwrap().ready, listener.diary.calls().len()) {
            (0, 100..) => Ok(()),
            others => Err(others),
        }
    })
    .await;
    assert_eq!(listener.diary.calls().len(), users.len(), "one call and one fetch per user");
    listener.stop.cancel();
    eventually("the end", async || if listener.running.is_finished() { Ok(()) } else { Err(()) }).await;
    assert_eq!(handled.load(Ordering::SeqCst), 100);
    assert!(dropped.load(Ordering::SeqCst) > 4_000, "{}", dropped.load(Ordering::SeqCst));
    listener.end().await;
}

impl Listener {
    /// Ends it, and leaves its queue where it is.
    pub async fn leave(self) {
        self.stop.cancel();
        self.running.await.unwrap().unwrap();
    }
}
