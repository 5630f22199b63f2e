//! Forged: messages that the owner never told, or that are not true any more. They cost an application calls and fetches, and nobody the news of
//! himself.

use std::{
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use lapin::{BasicProperties, options::ConfirmSelectOptions};
use serde_json::json;
use sqlx::PgPool;
use tidings_sdk::{
    consumer::{Consumer, Failure, Handler, News, Observer},
    envelope::{Event, Notice},
    letter::{Letter, Reason},
    topology::{self, Source},
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    house::{House, connect, env, eventually, owner_at},
    sdk::{Diary, Listener, SOON, consumer, is_attended, notice, said, subscription, updated},
    sdk_faults::{begun, stand_before},
};

/// A version that nobody ever has.
const NEVER: i64 = 1_000_000;

/// A user of whom everything was told before anybody listens.
async fn known(house: &House) -> Uuid {
    let user = house.user(json!({})).await;
    house.settle().await;
    user
}

/// One user at a time, who has begun, and is not done before the gate is open: whatever else comes waits.
async fn busy<H: Handler>(
    house: &House,
    handler: impl FnOnce(Diary) -> H,
    set: impl FnOnce(Consumer) -> Consumer,
) -> Listener {
    let (bo, diary) = (known(house).await, Diary::new());
    diary.gate.forget_permits(Semaphore::MAX_PERMITS);
    let consumer = set(consumer(house, &env("AMQP_URL"), &subscription(house))).concurrency(1);
    let listener = Listener::writing(house, diary.clone(), handler(diary), consumer).await;
    house.amend(&bo, json!({ "city": "Riga" })).await.ok();
    begun(&listener.diary, 1).await;
    listener
}

/// Hears of changes alone, and has words of its own for what goes wrong.
struct Terse(Diary);

impl Handler for Terse {
    async fn updated(&self, news: News) -> Result<(), Failure> {
        self.0.updated(news).await.map_err(|_| Failure::because("no badge today"))
    }
}

/// Waits until all that was sent before has come, whoever's turn it is: what is no notice needs none to be set aside.
async fn all_has_come(listener: &Listener) {
    listener.send(BasicProperties::default(), b"no notice").await;
    listener.dead_letter().await;
}

/// Waits for the calls that were about this user.
async fn is_told(diary: &Diary, user: &Uuid, expected: &[&str]) {
    eventually("what is told of the user", async || match said(&diary.of(user)) {
        told if told == expected => Ok(()),
        told => Err(told),
    })
    .await;
}

/// A message says that she is deleted, and the owner that she lives: she is told of as before, her deletion too, and only that is confirmed.
#[sqlx::test]
async fn a_forged_deletion_makes_nobody_deaf_to_one_who_lives(db: PgPool) {
    let mut house = House::open(db).await;
    let receipts = Arc::<AtomicUsize>::default();
    let counted = receipts.clone();
    let stand_in = stand_before(&house.service.url, move |path, _| {
        counted.fetch_add(path.ends_with("/receipts").into(), Ordering::SeqCst);
        None
    })
    .await;
    let direct = mem::replace(&mut house.service.url, stand_in);
    let listener = Listener::of(&house).await;
    house.service.url = direct;
    let ana = house.user(json!({})).await;
    listener.called(1).await;
    listener.tell(&notice(ana, 1, Event::Deleted)).await;
    listener.called(2).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    listener.called(3).await;
    house.delete(&ana).await.ok();
    let calls = listener.called(4).await;
    assert_eq!(said(&calls), ["1 created", "1 deleted", "2 updated[city]", "3 deleted"]);
    assert_eq!(calls.iter().map(|call| call.latest).collect::<Vec<_>>(), [Some(1), Some(1), Some(2), None]);
    let sent = eventually("the receipt", async || match receipts.load(Ordering::SeqCst) {
        0 => Err("none"),
        sent => Ok(sent),
    })
    .await;
    assert_eq!(sent, 1, "of one who lives no deletion is confirmed");
    listener.end().await;
}

/// One that cannot be looked into, since nobody has that version, makes none of what comes after it one more deletion.
#[sqlx::test]
async fn a_forged_deletion_that_failed_does_not_stand_for_what_comes_after_it(db: PgPool) {
    let house = House::open(db).await;
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.retry_delays([])).await;
    let ana = house.user(json!({})).await;
    listener.called(1).await;
    listener.tell(&notice(ana, NEVER, Event::Deleted)).await;
    let dead = listener.dead_letter().await;
    let letter = Letter::read(dead.delivery.properties.headers().as_ref()).unwrap();
    assert_eq!((letter.reason, letter.attempts), (Reason::FetchFailed, 1));
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    let mut told = vec!["1 created", "2 updated[city]"];
    is_told(&listener.diary, &ana, &told).await;
    house.amend(&ana, json!({ "phone": "1" })).await.ok();
    told.push("3 updated[phone]");
    is_told(&listener.diary, &ana, &told).await;
    house.delete(&ana).await.ok();
    told.push("4 deleted");
    is_told(&listener.diary, &ana, &told).await;
    let (channel, name) = (listener.channel.clone(), listener.subscription.name.clone());
    listener.leave().await;
    topology::delete(&channel, &name, &[]).await.unwrap();
}

/// A handler that has one method for a deletion and another for a change would not hear of the change otherwise.
#[sqlx::test]
async fn what_waits_with_a_forged_deletion_is_told_as_well(db: PgPool) {
    let house = House::open(db).await;
    let ana = known(&house).await;
    let listener = busy(&house, |diary| diary, |consumer| consumer).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.settle().await;
    listener.tell(&notice(ana, 2, Event::Deleted)).await;
    all_has_come(&listener).await;
    listener.diary.gate.add_permits(1_000);
    is_told(&listener.diary, &ana, &["2 deleted", "2 updated[city]"]).await;
    listener.end().await;
}

/// Nor would one that has no method for a deletion, or does not ask whether it is one.
#[sqlx::test]
async fn what_waits_with_a_forged_deletion_is_told_to_who_does_not_look_into_that(db: PgPool) {
    let house = House::open(db).await;
    let ana = known(&house).await;
    let listener = busy(&house, Terse, |consumer| consumer).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.settle().await;
    listener.tell(&notice(ana, 2, Event::Deleted)).await;
    all_has_come(&listener).await;
    listener.diary.gate.add_permits(1_000);
    is_told(&listener.diary, &ana, &["2 updated[city]"]).await;
    listener.end().await;
}

/// Of a version that nobody has nothing can be shown. What waited with it has a try of its own, whatever words the handler has for that, and also
/// where there is no other.
#[sqlx::test]
async fn a_forged_version_takes_nothing_genuine_along_to_the_dead_letters(db: PgPool) {
    let house = House::open(db).await;
    let ana = known(&house).await;
    let listener = busy(&house, Terse, |consumer| consumer.retry_delays([])).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.settle().await;
    listener.tell(&notice(ana, NEVER, updated("phone"))).await;
    all_has_come(&listener).await;
    listener.diary.gate.add_permits(1_000);
    is_told(&listener.diary, &ana, &["2 updated[city]"]).await;
    let dead = listener.dead_letter().await;
    let kept = Notice::from_message(&dead.delivery.properties, &dead.delivery.data).unwrap();
    assert_eq!((kept.user_id, kept.version), (ana, NEVER));
    let letter = Letter::read(dead.delivery.properties.headers().as_ref()).unwrap();
    assert_eq!((letter.reason, letter.attempts), (Reason::FetchFailed, 1));
    assert_eq!(listener.dead_letters().await, 0);
    let (channel, name) = (listener.channel.clone(), listener.subscription.name.clone());
    listener.leave().await;
    topology::delete(&channel, &name, &[]).await.unwrap();
}

/// How calls end, in order.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<&'static str>>>);

impl Observer for Ends {
    fn handled(&self, _event: &Event, _notices: usize, _took: Duration, _lag: Duration) {
        self.0.lock().unwrap().push("handled");
    }

    fn dead(&self, reason: Reason) {
        if reason == Reason::FetchFailed {
            self.0.lock().unwrap().push("not shown");
        }
    }
}

/// What was not shown is tried one by one: her own news does not wait behind it, and nobody else for as long as the owner is given to show it.
#[sqlx::test]
async fn forged_versions_that_come_back_hold_up_nobody(db: PgPool) {
    const FORGED: usize = 20;
    let house = House::open(db).await;
    let (ana, ends) = (known(&house).await, Ends::default());
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    let patient = Consumer::new(&env("AMQP_URL"), source, subscription(&house), owner_at(&house.service.url)).unwrap();
    let patient = patient.retry_delays([]).observe(ends.clone());
    let listener = busy(&house, |diary| diary, |_| patient).await;
    for _ in 0..FORGED {
        let (properties, body) = notice(ana, NEVER, updated("phone")).to_message("urn:test");
        let mut headers = properties.headers().clone().unwrap();
        Letter { attempts: 1, reason: Reason::FetchFailed, failed_at: None }.write(&mut headers);
        listener.send(properties.with_headers(headers), &body).await;
    }
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.user(json!({})).await;
    house.settle().await;
    all_has_come(&listener).await;
    let began = Instant::now();
    listener.diary.gate.add_permits(1_000);
    let ended = eventually("an end of all calls", async || match ends.0.lock().unwrap().clone() {
        ended if ended.len() == 3 + FORGED => Ok(ended),
        ended => Err(ended),
    })
    .await;
    assert_eq!(ended[..3], ["handled"; 3], "the busy one, her own and another's come first");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let (channel, name) = (listener.channel.clone(), listener.subscription.name.clone());
    listener.leave().await;
    topology::delete(&channel, &name, &[]).await.unwrap();
}

/// Whoever has seen a message knows its id: another one under it is no duplicate, and spares nobody the genuine one.
#[sqlx::test]
async fn a_forged_message_does_not_stand_for_the_one_whose_id_it_has(db: PgPool) {
    let house = House::open(db).await;
    let ana = known(&house).await;
    let listener = busy(&house, |diary| diary, |consumer| consumer).await;
    house.delete(&ana).await.ok();
    house.settle().await;
    let genuine = house.audit.heard().into_iter().find(|notice| notice.event == Event::Deleted).unwrap();
    let (properties, body) = Notice { version: 1, event: updated("city"), ..genuine }.to_message("urn:test");
    let mut headers = properties.headers().clone().unwrap();
    Letter { attempts: 1, reason: Reason::HandlerFailed, failed_at: None }.write(&mut headers);
    listener.send(properties.with_headers(headers), &body).await;
    all_has_come(&listener).await;
    listener.diary.gate.add_permits(1_000);
    is_told(&listener.diary, &ana, &["2 deleted"]).await;
    listener.end().await;
}

/// Does its work by what it hears, and asks nobody.
#[derive(Clone, Default)]
struct Hearsay(Arc<Mutex<Vec<String>>>);

impl Handler for Hearsay {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        self.0.lock().unwrap().push(format!("{} {}", news.version, news.event.name()));
        Ok(())
    }
}

/// A cache is emptied by whatever it hears, and asks for nothing: a message of no truth makes it deaf to none that is true.
#[sqlx::test]
async fn a_forged_version_makes_no_handler_deaf_that_does_not_fetch(db: PgPool) {
    let house = House::open(db).await;
    let (hearsay, stop, subscription) = (Hearsay::default(), CancellationToken::new(), subscription(&house));
    let running = tokio::spawn(consumer(&house, &env("AMQP_URL"), &subscription).run(hearsay.clone(), stop.clone()));
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let queue = subscription.name.queue();
    is_attended(&connection, queue).await;
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let forge = async |notice: Notice| {
        let (properties, body) = notice.to_message("urn:test");
        let sent = channel.basic_publish("".into(), queue.into(), Default::default(), &body, properties);
        assert!(sent.await.unwrap().await.unwrap().is_ack());
    };
    let hears = async |news: &str| {
        eventually("news", async || match hearsay.0.lock().unwrap().last() {
            Some(last) if last == news => Ok(()),
            last => Err(last.cloned()),
        })
        .await;
    };
    let ana = house.user(json!({})).await;
    hears("1 user.created").await;
    forge(notice(ana, NEVER, updated("city"))).await;
    hears("1000000 profile.updated").await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    hears("2 profile.updated").await;
    forge(notice(ana, NEVER, Event::Deleted)).await;
    hears("1000000 user.deleted").await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    hears("3 profile.updated").await;
    house.delete(&ana).await.ok();
    hears("4 user.deleted").await;
    stop.cancel();
    running.await.unwrap().unwrap();
    topology::delete(&channel, &subscription.name, &SOON).await.unwrap();
}
