//! Broker: whatever happens to it, changes are taken, and told when it is well again.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use lapin::{
    BasicProperties, Channel, Connection, ExchangeKind,
    options::{
        BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::json;
use sqlx::PgPool;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    house::{House, bind, connect, declare, env, eventually},
    hurt::{HurtBroker, silence},
    load::{self, Load},
    relay, rights, sessions,
    subscribed::Subscribed,
};

/// Somebody with every right at the broker.
struct Admin {
    connection: Connection,
    channel: Channel,
}

impl Admin {
    async fn at(amqp_url: &str) -> Self {
        let connection = connect(amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self { connection, channel }
    }

    async fn delete_exchange(&self, exchange: &str) {
        self.channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
    }

    async fn unbind(&self, house: &House, key: &str) {
        let (queue, exchange) = (house.audit.queue.as_str().into(), house.exchange.as_str().into());
        self.channel.queue_unbind(queue, exchange, key.into(), FieldTable::default()).await.unwrap();
    }

    /// The listener hears these routing keys, and no others.
    async fn narrow(&self, house: &House, keys: &[&str]) {
        for key in keys {
            bind(&self.channel, &house.audit.queue, &house.exchange, key).await;
        }
        self.unbind(house, "#").await;
    }

    async fn queue(&self, name: &str, arguments: &[(&str, AMQPValue)]) {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        self.channel.queue_declare(name.into(), durable, table).await.unwrap();
    }

    /// A queue that goes with the connection.
    async fn queue_of_its_own(&self, name: &str) {
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        self.channel.queue_declare(name.into(), exclusive, FieldTable::default()).await.unwrap();
    }

    /// Whether the broker is in an alarm, which it says to who publishes; from then on nothing is sent.
    async fn is_held_back(&self) -> bool {
        let (properties, nobody) = (BasicProperties::default(), "nobody");
        let sent =
            self.channel.basic_publish("".into(), nobody.into(), BasicPublishOptions::default(), &[], properties);
        drop(timeout(Duration::from_millis(100), sent).await);
        self.connection.status().blocked()
    }

    /// A queue that has all it takes, one event, and refuses what comes after.
    async fn full_queue(&self, house: &House) -> String {
        let full = format!("{}.full", house.exchange);
        self.queue(&full, &[("x-max-length", AMQPValue::LongInt(1)), ("x-overflow", text("reject-publish"))]).await;
        bind(&self.channel, &full, &house.exchange, "#").await;
        house.user(json!({ "first_name": "Ana" })).await;
        house.settle().await;
        full
    }

    async fn delete_queue(&self, name: &str) {
        self.channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.unwrap();
    }
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

async fn results(house: &House) -> [f64; 3] {
    [
        house.metric(r#"tidings_publish_results_total{result="routed"}"#).await,
        house.metric(r#"tidings_publish_results_total{result="unroutable"}"#).await,
        house.metric(r#"tidings_publish_results_total{result="refused"}"#).await,
    ]
}

#[sqlx::test]
async fn what_nobody_is_bound_for_is_counted_one_by_one_and_not_sent_again(db: PgPool) {
    let house = House::open(db).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    admin.narrow(&house, &["user.created", "profile.updated"]).await;
    house.broker.down();
    let events = load::backlog(&house.db, 3_000).await;
    house.broker.up();
    house.settle().await;
    assert_eq!(results(&house).await, [2_000.0, 1_000.0, 0.0]);
    let bound: Vec<_> =
        events.iter().enumerate().filter(|(place, _)| place % 3 != 2).map(|(_, event)| *event).collect();
    assert!(load::heard_ids(&house) == bound, "each once, in order");
}

#[sqlx::test]
async fn what_is_unroutable_is_told_apart_although_queues_confirm_at_different_speeds(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "info,tidings::relay=debug,lapin=off")]).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    // A quorum queue confirms later than a classic one, so that confirms overtake each other.
    let quorum = format!("{}.quorum", house.exchange);
    admin.queue(&quorum, &[("x-queue-type", text("quorum"))]).await;
    bind(&admin.channel, &quorum, &house.exchange, "user.created").await;
    admin.narrow(&house, &["profile.updated"]).await;
    house.broker.down();
    let events = load::backlog(&house.db, 3_000).await;
    house.broker.up();
    house.settle().await;
    assert_eq!(results(&house).await, [2_000.0, 1_000.0, 0.0]);
    assert_eq!(house.audit.heard().len(), 1_000);
    // Not only how many: which. A return that is credited to the confirm it came with would name others.
    let unbound: HashSet<String> = events.iter().skip(2).step_by(3).map(Uuid::to_string).collect();
    let named = eventually("a line for each", async || {
        let log = house.service.log();
        let lines = log.lines().filter(|line| line.contains("nobody is bound"));
        let named: HashSet<String> =
            lines.filter_map(|line| line.split("message_id=").nth(1)).map(str::to_owned).collect();
        if named.len() >= 1_000 { Ok(named) } else { Err(named.len()) }
    })
    .await;
    assert_eq!(named, unbound, "each unroutable message, and no other");
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let kept = admin.channel.queue_declare(quorum.as_str().into(), passive, FieldTable::default()).await.unwrap();
    assert_eq!(kept.message_count(), 1_000);
    admin.delete_queue(&quorum).await;
}

#[sqlx::test]
async fn a_broker_that_cannot_be_reached_is_caught_up_with(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 4);
    for _ in 0..5 {
        house.broker.down();
        load::degraded(&house).await;
        load.goes_on(50).await;
        house.broker.up();
        load::ready(&house).await;
        load.goes_on(50).await;
    }
    let answered = load.end_well().await;
    load::all_told(&house, &answered).await;
}

/// What a connection is given by its heartbeats, and a little.
const HEARD_DEAD: Duration = Duration::from_secs(28);

/// Waits until the connection was given up, in time. That nothing is confirmed is said long before, and is not enough: a session whose
/// connection is dead would go on.
async fn given_up(house: &House, since: Instant) {
    house.logs(&["the relay's session is over"]).await;
    assert!(since.elapsed() < HEARD_DEAD, "{:?}", since.elapsed());
}

#[sqlx::test]
async fn a_half_open_connection_is_noticed(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    load::ready(&house).await;
    house.broker.hold_answers();
    let cut = Instant::now();
    let users = load::users(&house, 3).await;
    given_up(&house, cut).await;
    load::degraded(&house).await;
    house.amend(&users[0], json!({ "job_title": "Editor" })).await.ok();
    house.broker.up();
    load::ready(&house).await;
    let duplicates = load::all_told(&house, &[]).await;
    assert!(duplicates <= 3, "{duplicates}");
}

/// One that leads asks now and then whether the exchange is still there; one that stands by has its heartbeats alone.
#[sqlx::test]
async fn a_silent_network_is_noticed_although_nothing_is_said(db: PgPool) {
    let house = House::open(db).await;
    eventually("a leader", async || if relay::leads(&house.service).await { Ok(()) } else { Err(()) }).await;
    let standby = house.another(&["relay"]).await;
    let is_connected = async |connected: u8| {
        let is_so = relay::measures(&standby, &format!("tidings_broker_connected {connected}")).await;
        if is_so { Ok(()) } else { Err(standby.log()) }
    };
    eventually("one that stands by", async || is_connected(1).await).await;
    house.broker.freeze();
    let frozen = Instant::now();
    eventually("it to notice", async || is_connected(0).await).await;
    assert!(frozen.elapsed() < HEARD_DEAD, "{:?}", frozen.elapsed());
    load::degraded(&house).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.broker.up();
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn an_exchange_that_was_deleted_under_load_is_declared_again(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 4);
    load.goes_on(50).await;
    admin.delete_exchange(&house.exchange).await;
    eventually("the new exchange, to which nobody is bound", async || match results(&house).await {
        [_, unroutable, _] if unroutable > 0.0 => Ok(()),
        others => Err(others),
    })
    .await;
    bind(&admin.channel, &house.audit.queue, &house.exchange, "#").await;
    load.goes_on(50).await;
    load.end_well().await;
    house.settle().await;
    let [routed, unroutable, _] = results(&house).await;
    let (committed, told) = (load::committed(&house.db).await, load::told(&house));
    let untold = committed.difference(&told).count();
    assert!(untold > 0 && untold as f64 <= unroutable, "{untold} untold, {unroutable} counted as unroutable");
    assert!(house.audit.heard().len() as f64 >= routed, "{routed} counted as routed");
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(house.told(&ana).await, ["user.created"], "who is bound again hears again");
}

/// Waits until so many were told that nobody was bound for.
async fn reached_nobody(house: &House, told: i32) {
    eventually("one that reached nobody", async || match results(house).await {
        [_, unroutable, _] if unroutable >= f64::from(told) => Ok(()),
        others => Err(others),
    })
    .await;
}

/// The question whether the exchange is ours takes a channel each time, and one of them was closed by an error.
#[sqlx::test]
async fn a_channel_does_not_end_the_session_by_the_error_of_an_earlier_one(db: PgPool) {
    let [_, (setting, url)] = rights::at_broker(&env("AMQP_URL"));
    let house = House::with(db, &[(setting, &format!("{url}?channel_max=8"))]).await;
    load::ready(&house).await;
    Admin::at(&env("AMQP_URL")).await.delete_exchange(&house.exchange).await;
    let lost = async || house.service.log().matches("session is over").count();
    let mut before = None;
    for told in 1..=20 {
        house.user(json!({})).await;
        reached_nobody(&house, told).await;
        assert_eq!(lost().await, *before.get_or_insert(lost().await), "{}", house.service.log());
    }
}

/// Nor by those of a user who may not declare, each of which would close a channel.
#[sqlx::test]
async fn who_may_not_declare_is_not_refused_again_and_again(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    drop(broker.try_ctl(&["add_user", "narrow", "secret"]).await);
    broker.ctl(&["set_permissions", "narrow", "^$", ".*", "^$"]).await;
    let url = format!("{}?channel_max=8", broker.amqp_url.replace("guest:guest", "narrow:secret"));
    let house = House::at(db, &broker.amqp_url, &[("AMQP_URL", &url), ("AMQP_REGISTRY_URL", &url)]).await;
    load::ready(&house).await;
    Admin::at(&broker.amqp_url).await.unbind(&house, "#").await;
    for told in 1..=20 {
        house.user(json!({})).await;
        reached_nobody(&house, told).await;
    }
    let log = house.service.log();
    assert!(!log.contains("session is over"), "{log}");
}

#[sqlx::test]
async fn an_exchange_of_another_type_is_named_and_nothing_counts_as_published(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    house.broker.down();
    admin.delete_exchange(&house.exchange).await;
    let (fanout, durable) = (ExchangeKind::Fanout, ExchangeDeclareOptions { durable: true, ..Default::default() });
    admin
        .channel
        .exchange_declare(house.exchange.as_str().into(), fanout, durable, FieldTable::default())
        .await
        .unwrap();
    bind(&admin.channel, &house.audit.queue, &house.exchange, "").await;
    house.broker.up();
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    load::degraded_by(&house, &house.exchange).await;
    assert_eq!((house.pending().await, results(&house).await), (1, [0.0; 3]));
    // Made right while the relay is away, so that the listener is bound before the first message.
    house.broker.down();
    admin.delete_exchange(&house.exchange).await;
    declare(&admin.channel, &house.exchange).await;
    bind(&admin.channel, &house.audit.queue, &house.exchange, "#").await;
    house.broker.up();
    load::ready(&house).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

/// As above, under the eyes of a relay that stays connected: a direct exchange takes every message, confirms it, and routes none.
#[sqlx::test]
async fn an_exchange_that_is_swapped_under_the_relay_swallows_nothing(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    admin.delete_exchange(&house.exchange).await;
    let (direct, durable) = (ExchangeKind::Direct, ExchangeDeclareOptions { durable: true, ..Default::default() });
    admin
        .channel
        .exchange_declare(house.exchange.as_str().into(), direct, durable, FieldTable::default())
        .await
        .unwrap();
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    load::degraded_by(&house, &house.exchange).await;
    assert_eq!((house.pending().await, results(&house).await), (1, [0.0; 3]));
    house.broker.down();
    admin.delete_exchange(&house.exchange).await;
    declare(&admin.channel, &house.exchange).await;
    bind(&admin.channel, &house.audit.queue, &house.exchange, "#").await;
    house.broker.up();
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn a_full_queue_is_tried_again_ever_more_rarely_and_the_others_hear_nevertheless(db: PgPool) {
    let house = House::open(db).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    let full = admin.full_queue(&house).await;
    let began = Instant::now();
    let bea = house.user(json!({ "first_name": "Bea" })).await;
    load::heard(&house, 2).await;
    eventually("three refusals", async || match results(&house).await {
        [1.0, 0.0, refused] if refused >= 3.0 => Ok(()),
        others => Err(others),
    })
    .await;
    // After one second, and after two more.
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(house.pending().await, 1, "what was refused is still owed");
    admin.channel.queue_purge(full.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
    let told = house.told(&bea).await;
    assert!(told.len() >= 4, "one message a try: {told:?}");
    assert_eq!(results(&house).await[0], 2.0);
    admin.delete_queue(&full).await;
}

#[sqlx::test]
async fn a_standstill_for_too_many_refusals_is_owned_up_to_until_it_is_over(db: PgPool) {
    let house = House::open(db).await;
    let admin = Admin::at(&env("AMQP_URL")).await;
    let full = admin.full_queue(&house).await;
    load::ready(&house).await;
    load::backlog(&house.db, 10_000).await;
    let reason = load::degraded(&house).await;
    assert!(reason.contains("nothing new is told"), "{reason}");
    admin.delete_queue(&full).await;
    load::ready(&house).await;
    house.settle().await;
    eventually("its beginning and its end in the log, once each", async || {
        let log = house.service.log();
        let told = ["nothing new is told until", "news is told again"].map(|text| log.matches(text).count());
        if told == [1, 1] { Ok(()) } else { Err(log) }
    })
    .await;
}

/// The broker takes what is sent, for the other queues too, and confirms none of it.
#[sqlx::test]
async fn a_queue_that_is_silent_is_owned_up_to_until_it_answers(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    load::ready(&house).await;
    silence(orders.name.queue(), true).await;
    let began = Instant::now();
    let ana = house.user(json!({})).await;
    let reason = load::degraded(&house).await;
    assert!(reason.contains("confirms nothing"), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(house.metric(r#"tidings_relay_stalled{reason="unconfirmed"}"#).await, 1.0);
    silence(orders.name.queue(), false).await;
    load::ready(&house).await;
    assert_eq!(house.metric(r#"tidings_relay_stalled{reason="unconfirmed"}"#).await, 0.0);
    assert_eq!(house.told(&ana).await, ["user.created"]);
    orders.end().await;
}

/// The headers of a wide event travel in one frame: one that is too small would end each session at its first such event.
#[sqlx::test]
async fn a_connection_with_frames_too_small_for_an_event_is_refused(db: PgPool) {
    let url = format!("{}?frame_max=8192", env("AMQP_URL"));
    let house = House::with(db, &[("AMQP_URL", &url)]).await;
    load::degraded_by(&house, "frame_max").await;
}

/// A channel keeps what it knows of a queue: that it has no leader, say. docs/scaling.md has such a case.
#[sqlx::test]
async fn what_one_channel_was_refused_is_tried_on_another(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    let admin = Admin::at(&broker.amqp_url).await;
    let full = admin.full_queue(&house).await;
    // Nobody else asks that broker for confirms.
    let relays = async || -> Vec<String> {
        let channels = broker.try_ctl(&["list_channels", "pid", "confirm"]).await.unwrap();
        channels.lines().filter(|line| line.ends_with("true")).map(str::to_owned).collect()
    };
    let before = relays().await;
    assert_eq!(before.len(), 1, "{before:?}");
    house.user(json!({ "first_name": "Bea" })).await;
    eventually("another channel, and that alone", async || match relays().await {
        now if now.len() == 1 && now != before => Ok(()),
        now => Err(now),
    })
    .await;
    admin.channel.queue_purge(full.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
    house.settle().await;
    assert_eq!(results(&house).await[0], 2.0);
    admin.delete_queue(&full).await;
}

#[sqlx::test]
async fn a_broker_that_was_stopped_or_killed_is_caught_up_with_when_it_is_back(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 4);
    load.goes_on(50).await;
    broker.stop().await;
    load::degraded(&house).await;
    load.goes_on(50).await;
    broker.start().await;
    load::ready(&house).await;
    load.goes_on(50).await;
    broker.kill().await;
    load::degraded(&house).await;
    load.goes_on(50).await;
    broker.start().await;
    load::ready(&house).await;
    load.goes_on(50).await;
    let answered = load.end_well().await;
    load::all_told(&house, &answered).await;
}

#[sqlx::test]
async fn a_frozen_broker_is_noticed_and_caught_up_with_when_it_thaws(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 2);
    load.goes_on(50).await;
    broker.freeze().await;
    let frozen = Instant::now();
    given_up(&house, frozen).await;
    load::degraded(&house).await;
    load.goes_on(50).await;
    broker.thaw().await;
    load::ready(&house).await;
    load.goes_on(50).await;
    let answered = load.end_well().await;
    load::all_told(&house, &answered).await;
}

#[sqlx::test]
async fn a_memory_alarm_holds_the_telling_back_and_nothing_else(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    house.settle().await;
    broker.alarm().await;
    let load = Load::on(&house, &users, 2);
    let reason = load::degraded(&house).await;
    assert!(reason.contains("hold back"), "{reason}");
    // Longer than a connection may be silent, and than nothing may be confirmed without a word, when there is no alarm. That the session
    // is not given up after two minutes either is a unit test's, of `relay::drain`.
    let began = Instant::now();
    while began.elapsed() < HEARD_DEAD {
        load.goes_on(10).await;
    }
    assert_eq!(house.metric(r#"tidings_relay_stalled{reason="unconfirmed"}"#).await, 0.0);
    let answered = load.end_well().await;
    assert!(house.pending().await > 0);
    broker.end_alarm().await;
    load::ready(&house).await;
    assert_eq!(load::all_told(&house, &answered).await, 0, "duplicates");
}

/// What is said to have reached nobody while the broker is in an alarm waits to be believed.
#[sqlx::test]
async fn what_nobody_is_bound_for_does_not_end_the_session_in_an_alarm(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    load::ready(&house).await;
    let admin = Admin::at(&broker.amqp_url).await;
    admin.unbind(&house, "#").await;
    let now = format!("{}.now", house.exchange);
    broker.alarm_at(&now).await;
    // The answers come when the alarm is there, and what it says behind them.
    house.broker.hold_answers();
    load::users(&house, 3).await;
    admin.queue_of_its_own(&now).await;
    eventually("the alarm", async || if admin.is_held_back().await { Ok(()) } else { Err(()) }).await;
    load::users(&house, 3).await;
    house.broker.up();
    let reason = load::degraded(&house).await;
    assert!(reason.contains("hold back"), "{reason}");
    // Longer than an answer is waited for.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(12) {
        house.user(json!({})).await;
    }
    broker.end_alarm().await;
    load::ready(&house).await;
    house.settle().await;
    let log = house.service.log();
    assert!(!log.contains("session is over"), "{log}");
}

/// The question whether the exchange is ours lies unread behind what was published before.
#[sqlx::test]
async fn an_alarm_that_begins_while_the_exchange_is_vouched_for_does_not_end_the_session(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    load::ready(&house).await;
    let admin = Admin::at(&broker.amqp_url).await;
    admin.narrow(&house, &["user.created"]).await;
    let ana = house.user(json!({})).await;
    house.settle().await;
    // One that reaches nobody, and one by which is heard that the broker has had it.
    house.broker.hold_answers();
    house.delete(&ana).await.ok();
    house.user(json!({})).await;
    load::heard(&house, 2).await;
    house.broker.freeze();
    house.user(json!({})).await;
    broker.alarm().await;
    house.broker.hold_requests();
    sessions::silent(&house.db, "tidings relay leader").await;
    house.broker.up();
    eventually("a relay that waits", async || {
        let reason = load::degraded(&house).await;
        if reason.contains("hold back") { Ok(()) } else { Err(reason) }
    })
    .await;
    broker.end_alarm().await;
    load::ready(&house).await;
    house.settle().await;
    let log = house.service.log();
    assert!(!log.contains("session is over"), "{log}");
}

#[sqlx::test]
async fn a_memory_alarm_does_not_hold_up_the_leaving(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let mut house = House::at(db, &broker.amqp_url, &[]).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    house.settle().await;
    broker.alarm().await;
    for user in &users {
        house.amend(user, json!({ "job_title": "Editor" })).await.ok();
    }
    load::degraded(&house).await;
    house.service.signal("-TERM").await;
    let asked = Instant::now();
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert_eq!(house.pending().await, 8);
    broker.end_alarm().await;
    house.restart().await;
    load::all_told(&house, &[]).await;
}

/// Whoever has a connection to it says goodbye, and waits for no answer.
#[sqlx::test]
async fn a_frozen_broker_does_not_hold_up_the_leaving(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let mut house = House::at(db, &broker.amqp_url, &[]).await;
    load::ready(&house).await;
    let orders = Subscribed::at(&house, &broker.amqp_url, "orders", &["#"], &[]).await;
    let seen = house.page("/v1/subscriptions").await.ok().body;
    assert_eq!(seen["subscriptions"][0]["queue"]["consumers"], 0, "{seen}");
    broker.freeze().await;
    house.service.signal("-TERM").await;
    let asked = Instant::now();
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    broker.thaw().await;
    orders.end().await;
}

#[sqlx::test]
async fn the_least_rights_suffice_and_a_relay_without_any_recovers_when_it_gets_them(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    drop(broker.try_ctl(&["add_user", "narrow", "secret"]).await);
    broker.ctl(&["clear_permissions", "narrow"]).await;
    let url = broker.amqp_url.replace("guest:guest", "narrow:secret");
    let house = House::at(db, &broker.amqp_url, &[("AMQP_URL", &url)]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    load::degraded(&house).await;
    let only_ours = format!("^{}$", house.exchange.replace('.', "\\."));
    let grant = ["set_permissions", "narrow", "^$", &only_ours, "^$"];
    broker.ctl(&grant).await;
    load::ready(&house).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);

    broker.ctl(&["clear_permissions", "narrow"]).await;
    // RabbitMQ remembers for a while what a channel was once allowed.
    broker.ctl(&["close_all_user_connections", "narrow", "revoked"]).await;
    load::degraded(&house).await;
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    assert_eq!(house.pending().await, 1);
    broker.ctl(&grant).await;
    load::ready(&house).await;
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title]"]);
}
