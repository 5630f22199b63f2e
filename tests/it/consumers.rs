//! Consumers in other languages: the contract is the protocol, and no library of ours is needed to keep up.
//!
//! Each program of `examples/consumers` goes through the same stories.

use std::{
    fs,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{net::TcpListener, time::timeout};
use uuid::Uuid;

use crate::{
    certificates::terminate,
    clients::{client, revoke},
    house::{self, House, PATIENCE, env, eventually, file, through},
    languages::{A_USER, Consumer, EVERYBODY, JAVA, Language, StandIn, compiled, forgotten, line, spawn, trusting},
    load::users,
    rights::{as_user, make_user, unmake},
    tls::TlsBroker,
};

/// How many users a program asks for at once.
const PAGE: usize = 500;

/// What no `Retry-After` may ask for: for ever, for no time at all, or for what is no number of seconds.
const NO_DELAYS: [&str; 8] =
    ["99999999999999999999", "9300000000", "10000", "-1", "0", "0.001", "Wed, 21 Oct 2065 07:28:00 GMT", "soon"];

/// What only somebody else says at a look at a user, or at everybody: a page for people, another service, a route that was retired, another address.
const NOBODYS: [(&str, u16, &str); 12] = [
    (A_USER, 200, "<html>"),
    (A_USER, 200, r#"{"version":1,"profile":"prod"}"#),
    (A_USER, 200, r#"{"version":1,"profile":[]}"#),
    (A_USER, 200, r#"{"version":"1","profile":{}}"#),
    (A_USER, 200, r#"{"version":1.5,"profile":{}}"#),
    (A_USER, 410, r#"{"code":"gone","version":1}"#),
    (A_USER, 410, r#"{"code":"user_deleted"}"#),
    (A_USER, 404, r#"{"code":"route_not_found"}"#),
    (A_USER, 302, ""),
    (EVERYBODY, 404, "<html>"),
    (EVERYBODY, 200, r#"{"users":[]}"#),
    (EVERYBODY, 200, r#"{"users":[{"id":"x"}],"next":null}"#),
];

/// What is no address of a broker: nothing, of another kind, without a host, and with a port that is none.
const NO_BROKERS: [&str; 5] = ["nonsense", "", "http://localhost", "amqp://", "amqp://badges:secret@localhost:port"];

/// A House that says of each request how it went.
async fn talkative_house(db: PgPool) -> House {
    House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await
}

/// How many reads of one user were answered with this status.
async fn reads(house: &House, status: u16) -> usize {
    let (read, status) = ("route=\"/v1/users/{id}\"", format!("status={status}"));
    let log = house.log_so_far().await;
    log.lines().filter(|line| line.contains("GET") && line.contains(read) && line.contains(&status)).count()
}

async fn is_read(house: &House, status: u16) {
    eventually("a read", async || if reads(house, status).await > 0 { Ok(()) } else { Err(house.service.log()) }).await;
}

/// Created, changed, deleted, and what happened while it was down; a duplicate and an old notice cost nothing.
async fn keeps_up(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.agrees_with_the_sdk(&house).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "first_name": "Ana" })));
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    let editor = json!({ "first_name": "Ana", "job_title": "Editor" });
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, editor));

    // A message that came already is not looked at again, and what is old is not asked for.
    house.settle().await;
    let id = house.audit.heard()[1].message_id.to_string();
    consumer.send(BasicProperties::default().with_message_id(id.into()), b"{}").await;
    consumer.forge(ana, 1).await;
    consumer.forge(ana, 2).await;
    house.delete(&ana).await;
    assert_eq!(consumer.next().await, forgotten("user.deleted", &ana));
    consumer.forge(ana, 2).await;
    let bo = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!((reads(&house, 200).await, reads(&house, 410).await), (3, 1), "{}", house.service.log());
    consumer.backfill(bo, 1).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());

    // A look that is years away is not taken at once, again and again.
    assert!(!consumer.log().contains("TimeoutOverflowWarning"), "{}", consumer.log());

    // News of while it was down waits for it. By then there is only the latest state to see, and one look is enough.
    consumer.process.kill().await.unwrap();
    let eve = house.user(json!({ "city": "Riga" })).await;
    house.amend(&eve, json!({ "city": "Oslo" })).await.ok();
    let cy = house.user(json!({})).await;
    house.settle().await;
    consumer.restart(&[]).await;
    assert_eq!(consumer.next_of(&eve).await, line("user.created", &eve, 2, json!({ "city": "Oslo" })));
    assert_eq!(consumer.next().await, line("user.created", &cy, 1, json!({})));
    consumer.end().await;
}

/// A notice may be ahead of what a consumer is shown: then it asks again until it sees that state or a later one.
async fn asks_until_it_sees(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_PATIENCE_S", "60.5")]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    consumer.forge(ana, 2).await;
    is_read(&house, 503).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    assert!(!consumer.log().contains("cannot be asked"), "to be ahead is no outage: {}", consumer.log());
    // An owner that cannot be reached is no reason to give up either, and none to be silent.
    consumer.owner.down();
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    house.settle().await;
    consumer.complains("the owner cannot be asked: ").await;
    consumer.owner.up();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Bern" })));
    // Nor is one that says itself that it is away.
    house.postgres.down();
    consumer.backfill(ana, 3).await;
    consumer.complains("the owner cannot be asked: 503").await;
    house.postgres.up();
    assert_eq!(consumer.next().await, line("user.created", &ana, 3, json!({ "city": "Bern" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.end().await;
}

/// An owner that asks for the wrong delay is asked again after a moment, and not before.
async fn waits_for_a_moment(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let owner = StandIn::saying(NO_DELAYS.map(|delay| (A_USER, (503, ("retry-after", delay), "{}"))).to_vec()).await;
    consumer.restart(&[("TIDINGS_URL", &owner.url)]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    let waited = between(&owner.looks_at(A_USER));
    let is_moment = |waited: &Duration| *waited > Duration::from_millis(950);
    assert!(waited.len() == NO_DELAYS.len() && waited.iter().all(is_moment), "{waited:?}: {}", consumer.log());
    consumer.end().await;
}

/// Whatever somebody says who stands between: nobody is forgotten for it, no message set aside, no resync taken for complete, and no redirect
/// followed. At the start a redirect is a mistake in the setting.
async fn believes_the_owner_alone(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let elsewhere = |status, body| (status, ("location", "/elsewhere"), body);
    let sent_on = StandIn::saying(vec![("/", elsewhere(302, ""))]).await;
    consumer.refuses("TIDINGS_URL", &sent_on.url, "TIDINGS_URL leads elsewhere: 302").await;
    assert!(sent_on.looks_at("/elsewhere").is_empty(), "{}", consumer.log());

    let owner = StandIn::saying(NOBODYS.map(|(path, status, body)| (path, elsewhere(status, body))).to_vec()).await;
    consumer.restart(&[("TIDINGS_URL", &owner.url)]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    let nobodys = |path| NOBODYS.iter().filter(|(of, ..)| *of == path).count();
    assert_eq!(owner.looks_at(A_USER).len(), nobodys(A_USER) + 1, "{}", consumer.log());
    consumer.lose_queue().await;
    assert_eq!(consumer.next().await, line("resync", &Uuid::from_u128(1), 1, json!({})));
    assert_eq!(owner.looks_at(EVERYBODY).len(), nobodys(EVERYBODY) + 1, "{}", consumer.log());
    assert_eq!(consumer.resyncs(), 1, "{}", consumer.log());
    for status in [200, 302, 404, 410] {
        consumer.complains(&format!("the owner cannot be asked: {status}")).await;
    }
    assert!(owner.looks_at("/elsewhere").is_empty(), "{}", consumer.log());
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.end().await;
}

fn between(times: &[Instant]) -> Vec<Duration> {
    times.windows(2).map(|two| two[1] - two[0]).collect()
}

/// Those who lost the same broker do not come back to it together: each waits for times of its own.
async fn comes_back_at_its_own_time(_: PgPool, language: Language) {
    let waited = join_all((0..5).map(|_| comes_back_after(language))).await;
    // The second pause has half a second of jitter, the third a whole one. That five lie in so small a part of both happens once in 200,000.
    let is_apart = |nth: usize, by_ms: u64| {
        let waits = || waited.iter().map(|waits| waits[nth]);
        waits().max().unwrap() - waits().min().unwrap() > Duration::from_millis(by_ms)
    };
    assert!(is_apart(1, 75) || is_apart(2, 150), "{waited:?}");
}

/// How long a process waits before it comes back to a broker that hangs up, three times.
async fn comes_back_after(language: Language) -> Vec<Duration> {
    let broker = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = [
        ("AMQP_URL", format!("amqp://{}", broker.local_addr().unwrap())),
        ("TIDINGS_URL", "http://127.0.0.1:1".to_owned()),
        ("TIDINGS_API_KEY", house::key().to_owned()),
        ("TIDINGS_QUEUE", "consumer".to_owned()),
    ];
    let (_process, _lines, log) = spawn(language, &settings.map(|(name, value)| (name.to_owned(), value)));
    let mut came = vec![];
    while came.len() < 4 {
        let knock = timeout(PATIENCE, broker.accept()).await.unwrap_or_else(|_| panic!("{}", log.lock().unwrap()));
        came.push(Instant::now());
        // Dropped with its first words unread, the connection is reset: Bunny would wait a while after an orderly end.
        knock.unwrap().0.readable().await.unwrap();
    }
    between(&came)
}

/// What is no notice: properties and body.
fn poison(user: Uuid) -> Vec<(BasicProperties, String)> {
    let good = json!({ "user_id": user }).to_string();
    let with = |version: Option<AMQPValue>| {
        let mut headers = FieldTable::default();
        if let Some(version) = version {
            headers.insert("version".into(), version);
        }
        BasicProperties::default().with_message_id(Uuid::new_v4().to_string().into()).with_headers(headers)
    };
    let seven = || with(Some(AMQPValue::LongLongInt(7)));
    vec![
        (seven(), "secret".to_owned()),
        (seven(), "[\"secret\"]".to_owned()),
        (seven(), "{}".to_owned()),
        (seven(), json!({ "user_id": 7 }).to_string()),
        (seven(), json!({ "user_id": [user] }).to_string()),
        (seven(), json!({ "user_id": "secret" }).to_string()),
        (seven(), json!({ "user_id": format!("{user}/secret") }).to_string()),
        (seven(), "[".repeat(60_000)),
        (BasicProperties::default(), good.clone()),
        (with(None), good.clone()),
        (with(Some(AMQPValue::LongString("7".into()))), good.clone()),
        (with(Some(AMQPValue::Boolean(true))), good.clone()),
        (with(Some(AMQPValue::LongLongInt(0))), good),
    ]
}

/// What can never be handled goes to the dead letters, holds nothing up, and its content is not in the log. A 404 is no deletion, and of a
/// service that knows no users not even a reason to set anything aside.
async fn sets_aside(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    for (properties, body) in poison(ana) {
        consumer.send(properties, body.as_bytes()).await;
        assert_eq!(consumer.dead_letter().await, body.as_bytes());
    }
    let refused = consumer.log().matches("set aside: not a notice").count();
    assert_eq!(refused, poison(ana).len(), "nobody was asked about it: {}", consumer.log());
    // Nobody ever had this id, and somebody will never be at this version.
    let nobody = Uuid::new_v4();
    consumer.forge(nobody, 1).await;
    consumer.forge(ana, 1_000).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    for user in [nobody, ana] {
        assert!(String::from_utf8(consumer.dead_letter().await).unwrap().contains(&user.to_string()));
    }
    // A type that it does not know is a change like any other, and a version may come in any width.
    let eve = consumer.blessed(&house).await;
    assert_eq!(consumer.next().await, line("user.blessed", &eve, 1, json!({})));
    assert!(!consumer.log().contains("secret"), "{}", consumer.log());

    // The wrong address answers 404 to everything, as in an outage. This time the queue is not its own to declare.
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    let elsewhere = format!("http://{}/elsewhere", consumer.owner.address());
    consumer.restart(&[("TIDINGS_URL", &elsewhere), ("TIDINGS_DECLARE", "no")]).await;
    consumer.listens().await;
    let bo = house.user(json!({})).await;
    consumer.complains("the owner cannot be asked: 404").await;
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty(), "somebody was forgotten");
    consumer.restart(&[]).await;
    assert_eq!(consumer.next_of(&bo).await, line("user.created", &bo, 1, json!({})));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.end().await;
}

/// A queue that is deleted under it is made anew, and what was missed is read; a broken connection is made anew and nothing was missed.
async fn heals(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    house.settle().await;
    consumer.lose_queue().await;
    assert_eq!(consumer.next().await, line("resync", &ana, 2, json!({ "city": "Oslo" })));
    consumer.listens().await;
    assert_eq!(consumer.resyncs(), 2, "at its first start, and now: {}", consumer.log());

    consumer.broker.down();
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    house.settle().await;
    consumer.broker.up();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Bern" })));
    assert_eq!(consumer.resyncs(), 2, "{}", consumer.log());
    consumer.end().await;
}

/// An exchange that is deleted takes the bindings along, and nobody is told. Who finds none reads everybody once there is one, though its
/// queue looks as if nothing was missed: at a look while it listens, as the next process, or after its connection was lost. The owner is
/// kept from the broker meanwhile, as it would make another one soon.
async fn misses_its_exchange(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    consumer.listens().await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    house.broker.down();
    consumer.lose_exchange(&house).await;
    consumer.complains("no exchange").await;
    consumer.process.kill().await.unwrap();
    // Told by an exchange to which nobody is bound.
    house.broker.up();
    let bo = house.user(json!({})).await;
    house.settle().await;
    consumer.restart(&[]).await;
    for user in [ana, bo] {
        assert_eq!(consumer.next().await, line("resync", &user, 1, json!({})));
    }
    consumer.listens().await;

    house.broker.down();
    consumer.broker.down();
    consumer.lose_exchange(&house).await;
    consumer.broker.up();
    consumer.complains("no exchange").await;
    house.broker.up();
    let cy = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("resync", &cy, 1, json!({})));
    consumer.listens().await;

    // A lost binding cannot be seen. It is made anew with the next look, and no resync is owed.
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    consumer.listens().await;
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    consumer.is_bound_for(&house, ana).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    assert_eq!(consumer.resyncs(), 0, "{}", consumer.log());
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.end().await;
}

/// Whoever is killed in the middle of a resync leaves a queue that looks as if nothing was missed. The next process reads everybody all
/// the same; the one after it has no need to.
async fn resyncs_to_the_end(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.owner.hold_answers();
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.process.kill().await.unwrap();
    consumer.owner.up();

    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("resync", &ana, 1, json!({})));
    consumer.listens().await;
    consumer.restart(&[]).await;
    let bo = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!(consumer.resyncs(), 0, "{}", consumer.log());
    consumer.end().await;
}

/// Its user at the broker needs no more than the rights of its role, also when its queue is lost.
async fn lives_with_its_rights(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    for (role, declares) in [("declaring-consumer", "yes"), ("consumer", "no")] {
        let user = format!("tidings-test-{}-{role}", consumer.name);
        make_user(&user, &[role, consumer.name.as_str()]).await;
        let url = through(&as_user(&env("AMQP_URL"), &user), &consumer.broker);
        consumer.restart(&[("AMQP_URL", &url), ("TIDINGS_DECLARE", declares)]).await;
        consumer.listens().await;
        consumer.lose_queue().await;
        if declares == "no" {
            consumer.complains("session ended").await;
            consumer.agrees_with_the_sdk(&house).await;
        }
        assert_eq!(consumer.next().await, line("resync", &ana, 1, json!({})));
        consumer.listens().await;
        assert_eq!(consumer.resyncs(), 1, "{}", consumer.log());
        consumer.ask_to_leave().await;
        assert!(consumer.leaves().await.is_empty());
        unmake("users", &user).await;
    }
    consumer.end().await;
}

/// A refused key is the end at the start. Later on it is waited for another one, which takes effect without a restart, and no message
/// is set aside for it.
async fn waits_for_a_key(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let first = client(&house, "create badges --scope users:read").await;
    let key = file(&format!("{first}\n"));
    consumer.restart(&[("TIDINGS_API_KEY_FILE", key.to_str().unwrap())]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    // A file that is not there is in the middle of being replaced.
    fs::remove_file(&key).unwrap();
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    consumer.complains("the owner cannot be asked: ").await;
    fs::write(&key, &first).unwrap();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));

    revoke(&house, "badges", &first).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    consumer.complains("the owner refuses the key: 401").await;
    let blind = client(&house, "create badges --scope users:write").await;
    fs::write(&key, &blind).unwrap();
    consumer.complains("the owner refuses the key: 403").await;
    let seeing = client(&house, "create badges.reader --scope users:read").await;
    fs::write(&key, format!("{seeing}\n")).unwrap();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Riga" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    let is_silent = |log: &str| [&first, &blind, &seeing].iter().all(|key| !log.contains(&key[21..]));
    assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());

    for (refused, status) in [(&first, 401), (&blind, 403)] {
        consumer.restart(&[("TIDINGS_API_KEY", refused)]).await;
        let left = timeout(PATIENCE, consumer.process.wait()).await.expect("it goes on").unwrap();
        assert_eq!(left.code(), Some(1), "{}", consumer.log());
        consumer.complains(&format!("the owner refuses the key: {status}")).await;
        assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());
    }

    // The end of the file that it came from is no part of it. What cannot be a key is refused, and not quoted.
    consumer.restart(&[("TIDINGS_API_KEY", &format!("{seeing}\n"))]).await;
    consumer.listens().await;
    assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());
    let broken = seeing.replacen('_', "_\n", 1);
    consumer.refuses("TIDINGS_API_KEY", &broken, "not one word of printable ASCII").await;
    assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());
    consumer.end().await;
}

/// A setting that says nothing is the end at the start, and is named. A password in it is not repeated.
async fn refuses_nonsense(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let no_number = ["soon", "-1", "NaN"].map(|it| ("TIDINGS_PATIENCE_S", it, "is not a number of seconds"));
    let no_number = no_number.into_iter().chain([("TIDINGS_CHECK_S", "often", "is not a number of seconds")]);
    let no_address = ("TIDINGS_URL", "localhost:8080", "does not begin with http:// or https://");
    let no_choice = ["false", "No"].map(|it| ("TIDINGS_DECLARE", it, "is neither yes nor no"));
    // Some say of an empty one that it is not set.
    let no_broker = NO_BROKERS.map(|it| ("AMQP_URL", it, "is not"));
    for (setting, nonsense, why) in no_number.chain([no_address]).chain(no_choice).chain(no_broker) {
        consumer.refuses(setting, nonsense, &format!("{setting} {why}")).await;
        assert!(!consumer.log().contains("secret"), "{setting}: {}", consumer.log());
    }
    if matches!(language, Language::Java) {
        // An error that is no exception is not to look like an end in order.
        let incomplete = JAVA.replace("slf4j-api", "no-such");
        consumer.refuses("CLASSPATH", &incomplete, "NoClassDefFoundError").await;
    }
    consumer.end().await;
}

/// An answer that never ends holds nobody for ever, though some of it always arrives. Who waits for one and is asked to leave, leaves; the
/// message goes back.
async fn gives_up_on_an_endless_answer(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.owner.trickle();
    let ana = house.user(json!({})).await;
    is_read(&house, 200).await;
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.owner.up();
    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.end().await;
}

/// Asked to leave in the middle of a resync, it ends with the page in hand. The next process begins anew.
async fn leaves_a_resync(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    let all = users(&house, PAGE + 1).await;
    house.settle().await;
    consumer.owner.hold_answers();
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.ask_to_leave().await;
    consumer.owner.up();
    assert_eq!(consumer.leaves().await.len(), PAGE, "{}", consumer.log());

    consumer.restart(&[]).await;
    for _ in &all {
        assert_eq!(consumer.next().await["event"], "resync");
    }
    consumer.end().await;
}

/// Asked to leave, it finishes what it has in hand; what waits behind goes back. Nothing is lost and nothing comes twice.
async fn leaves_in_order(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.owner.hold_answers();
    let users = [house.user(json!({})).await, house.user(json!({})).await];
    house.settle().await;
    is_read(&house, 200).await;
    consumer.ask_to_leave().await;
    consumer.owner.up();
    let mut handled = consumer.leaves().await;
    assert!(!handled.is_empty(), "what it had in hand was dropped: {}", consumer.log());

    consumer.restart(&[]).await;
    let last = house.user(json!({})).await;
    while !handled.contains(&line("user.created", &last, 1, json!({}))) {
        handled.push(consumer.next().await);
    }
    assert_eq!(handled, [users[0], users[1], last].map(|user| line("user.created", &user, 1, json!({}))));
    consumer.end().await;
}

/// A broker that falls silent, as when it is frozen, keeps nobody: asked once, it leaves, also in the middle of a look.
async fn leaves_a_silent_broker(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    consumer.broker.freeze();
    eventually("a look", async || if consumer.broker.has_held_back() { Ok(()) } else { Err(consumer.log()) }).await;
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.end().await;
}

/// What cannot be kept is waited for as the owner is: nothing is acknowledged, set aside or left out.
async fn waits_for_its_own_copy(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.restart_on_a_full_disk().await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    consumer.complains("is tried again").await;
    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());

    // What was missed is read again until it is kept, too.
    consumer.restart_on_a_full_disk().await;
    consumer.listens().await;
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.end().await;
}

/// Over TLS the broker is believed by its certificate alone: one of the authority that the runtime trusts, and of this host.
async fn verifies(db: PgPool, language: Language) {
    let broker = TlsBroker::borrow().await;
    let house = House::at(db, &broker.plain_url, &broker.settings()).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let owner = terminate(&broker.authority.right(), &house.service.url).await;
    let mut settings = trusting(language, &broker.authority);
    settings.extend(
        [
            ("AMQP_URL", broker.url.clone()),
            ("TIDINGS_API_KEY", house::key().to_owned()),
            ("TIDINGS_URL", format!("https://localhost:{owner}")),
            ("TIDINGS_EXCHANGE", house.exchange.clone()),
            ("TIDINGS_QUEUE", format!("{}.consumer", house.exchange)),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let [stranger, other_name, ..] = broker.authority.wrong();
    for (wrong, why) in [stranger, other_name] {
        broker.present(&wrong).await;
        let (_process, _lines, log) = spawn(language, &settings);
        eventually("two attempts that came to nothing", async || {
            let log = log.lock().unwrap().clone();
            assert!(!log.contains("news may have been missed"), "{why}: it is at work: {log}");
            if log.matches("session ended").count() > 1 { Ok(()) } else { Err(log) }
        })
        .await;
    }
    broker.present(&broker.authority.right()).await;
    let (_process, mut lines, log) = spawn(language, &settings);
    let heard = timeout(PATIENCE, lines.next_line()).await.unwrap_or_else(|_| panic!("{}", log.lock().unwrap()));
    let heard: Value = serde_json::from_str(&heard.unwrap().unwrap()).unwrap();
    assert_eq!(heard, line("resync", &ana, 1, json!({ "city": "Riga" })));
}

/// A story, once there is a program to tell it of.
async fn told(db: PgPool, language: Language, story: impl AsyncFnOnce(PgPool, Language)) {
    compiled(language).await;
    story(db, language).await;
}

/// Every language goes through every story.
macro_rules! stories {
    ($($module:ident $language:ident),+) => {$(
        mod $module {
            use sqlx::PgPool;

            use super::Language::$language;

            #[sqlx::test]
            async fn keeps_up(db: PgPool) {
                super::told(db, $language, super::keeps_up).await;
            }

            #[sqlx::test]
            async fn never_takes_an_older_state_than_it_was_told_of(db: PgPool) {
                super::told(db, $language, super::asks_until_it_sees).await;
            }

            #[sqlx::test]
            async fn waits_for_a_moment_where_it_is_asked_for_the_wrong_delay(db: PgPool) {
                super::told(db, $language, super::waits_for_a_moment).await;
            }

            #[sqlx::test]
            async fn believes_the_owner_alone(db: PgPool) {
                super::told(db, $language, super::believes_the_owner_alone).await;
            }

            #[sqlx::test]
            async fn comes_back_at_its_own_time(db: PgPool) {
                super::told(db, $language, super::comes_back_at_its_own_time).await;
            }

            #[sqlx::test]
            async fn sets_aside_what_it_can_never_handle(db: PgPool) {
                super::told(db, $language, super::sets_aside).await;
            }

            #[sqlx::test]
            async fn heals(db: PgPool) {
                super::told(db, $language, super::heals).await;
            }

            #[sqlx::test]
            async fn misses_its_exchange(db: PgPool) {
                super::told(db, $language, super::misses_its_exchange).await;
            }

            #[sqlx::test]
            async fn resyncs_to_the_end(db: PgPool) {
                super::told(db, $language, super::resyncs_to_the_end).await;
            }

            #[sqlx::test]
            async fn lives_with_its_rights(db: PgPool) {
                super::told(db, $language, super::lives_with_its_rights).await;
            }

            #[sqlx::test]
            async fn waits_for_a_key(db: PgPool) {
                super::told(db, $language, super::waits_for_a_key).await;
            }

            #[sqlx::test]
            async fn waits_for_its_own_copy(db: PgPool) {
                super::told(db, $language, super::waits_for_its_own_copy).await;
            }

            #[sqlx::test]
            async fn believes_a_broker_by_its_certificate_alone(db: PgPool) {
                super::told(db, $language, super::verifies).await;
            }

            #[sqlx::test]
            async fn refuses_nonsense(db: PgPool) {
                super::told(db, $language, super::refuses_nonsense).await;
            }

            #[sqlx::test]
            async fn gives_up_on_an_endless_answer(db: PgPool) {
                super::told(db, $language, super::gives_up_on_an_endless_answer).await;
            }

            #[sqlx::test]
            async fn leaves_in_order(db: PgPool) {
                super::told(db, $language, super::leaves_in_order).await;
            }

            #[sqlx::test]
            async fn leaves_a_resync(db: PgPool) {
                super::told(db, $language, super::leaves_a_resync).await;
            }

            #[sqlx::test]
            async fn leaves_a_silent_broker(db: PgPool) {
                super::told(db, $language, super::leaves_a_silent_broker).await;
            }
        }
    )+};
}

stories!(ruby Ruby, python Python, node Node, go Go, java Java, php Php);
