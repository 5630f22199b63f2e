//! Subscriptions: who registers misses nothing, and nothing goes that somebody may still want.

use std::{
    collections::BTreeSet,
    future::IntoFuture,
    sync::{Arc, Mutex},
};

use axum::{Router, extract::Request};
use futures_util::{StreamExt, future::join_all};
use lapin::{
    Channel, Connection, Consumer,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use tidings_sdk::{
    envelope::Notice,
    topology::{self, Depth, RETRY_DELAYS},
};
use time::OffsetDateTime;
use tokio::{net::TcpListener, time::timeout};
use uuid::Uuid;

use crate::{
    clients::client,
    house::{self, Answer, House, PATIENCE, Service, database_url, env, eventually, tidings},
    hurt::HurtBroker,
};

/// Looks often enough for a test to see what comes of it.
const EVERY_SECOND: (&str, &str) = ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s");
/// The watch looks once, at its start, and then not while a test runs its few steps.
const SELDOM: (&str, &str) = ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "60s");

/// Names are the broker's, which all tests share.
fn unique(name: &str) -> String {
    format!("{name}-{}", Uuid::new_v4().simple())
}

fn wish(keys: &[&str], fields: &[&str]) -> Value {
    json!({ "routing_keys": keys, "fields": fields, "owner": "team-orders", "purpose": "cancels pending orders" })
}

impl House {
    async fn register(&self, name: &str, wish: &Value) -> Answer {
        Answer::to(self.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(wish)).await
    }

    /// Without asking the broker, which is said to have had this revision; 0: none.
    async fn has_registered(&self, name: &str, declared_revision: i64) {
        let register = "
            insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields, declared_revision)
            values ($1, '{user.created}', '{city}', 'team-orders', 'a test', '{user.created}', '{city}', $2)
        ";
        sqlx::query(register).bind(name).bind(declared_revision).execute(&self.db).await.unwrap();
    }

    async fn subscription(&self, name: &str) -> Answer {
        self.page(&format!("/v1/subscriptions/{name}")).await
    }

    async fn unsubscribe(&self, name: &str, query: &str) -> Answer {
        Answer::to(self.request(Method::DELETE, &format!("/v1/subscriptions/{name}{query}"))).await
    }

    /// Waits until the subscription is in this state; all that is told of it then.
    async fn comes_to_be(&self, name: &str, state: &str) -> Value {
        eventually(state, async || {
            let seen = self.subscription(name).await.body;
            if seen["state"] == state { Ok(seen) } else { Err(seen) }
        })
        .await
    }

    /// Waits until the watch has looked once more, beginning after this was asked.
    async fn looks_again(&self) {
        self.looks(1).await;
    }

    /// The same for so many looks; one that was under way is not counted.
    async fn looks(&self, count: u32) {
        for _ in 0..=count {
            let looked_at = async || -> Option<OffsetDateTime> {
                let when = "select looked_at from subscriptions_looked_at";
                sqlx::query_scalar(when).fetch_optional(&self.db).await.unwrap()
            };
            let before = looked_at().await;
            eventually("another look", async || if looked_at().await > before { Ok(()) } else { Err(before) }).await;
        }
    }
}

/// Somebody with every right at the broker.
struct Admin {
    connection: Connection,
}

impl Admin {
    async fn new() -> Self {
        Self::at(&env("AMQP_URL")).await
    }

    async fn at(amqp_url: &str) -> Self {
        Self { connection: house::connect(amqp_url).await.unwrap() }
    }

    /// A refusal costs a channel, so each question has its own.
    async fn channel(&self) -> Channel {
        self.connection.create_channel().await.unwrap()
    }

    /// `None` when there is no such queue.
    async fn depth(&self, queue: &str) -> Option<Depth> {
        topology::depth(&self.channel().await, queue).await.ok()
    }

    async fn delete_exchange(&self, exchange: &str) {
        let options = ExchangeDeleteOptions::default();
        self.channel().await.exchange_delete(exchange.into(), options).await.unwrap();
    }

    async fn has_exchange(&self, exchange: &str) -> bool {
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        let kind = lapin::ExchangeKind::Direct;
        self.channel().await.exchange_declare(exchange.into(), kind, passive, FieldTable::default()).await.is_ok()
    }

    async fn delete_queue(&self, queue: &str) {
        self.channel().await.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// A classic queue, as no subscription has.
    async fn classic_queue(&self, queue: &str) {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel().await.queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
    }

    /// Takes everything out of a queue: what each message says, in order.
    async fn drain(&self, queue: &str) -> Vec<Notice> {
        let channel = self.channel().await;
        let mut taken = vec![];
        while let Some(message) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap() {
            taken.push(Notice::from_message(&message.properties, &message.data).unwrap());
        }
        taken
    }

    /// Waits until all of these users and versions came; all that came.
    async fn hears_of(&self, queue: &str, users: &[(Uuid, i64)]) -> Vec<(Uuid, i64)> {
        let mut told = vec![];
        eventually("all of them to be told", async || {
            told.extend(self.drain(queue).await.into_iter().map(|notice| (notice.user_id, notice.version)));
            if users.iter().all(|user| told.contains(user)) { Ok(()) } else { Err(told.clone()) }
        })
        .await;
        told
    }

    async fn told(&self, queue: &str) -> Vec<String> {
        self.drain(queue).await.iter().map(house::describe).collect()
    }

    /// A consumer that takes nothing; it goes with its channel.
    async fn attend(&self, queue: &str) -> Attendance {
        let channel = self.channel().await;
        let consumer =
            channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
        Attendance { consumer: consumer.await.unwrap(), channel }
    }
}

struct Attendance {
    /// Cancelled when it is dropped.
    consumer: Consumer,
    channel: Channel,
}

impl Attendance {
    async fn ends(self) {
        self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default()).await.unwrap();
    }
}

/// All queues and exchanges of a subscription that are there.
async fn parts(admin: &Admin, name: &str) -> Vec<String> {
    let queues = RETRY_DELAYS.iter().map(|delay| format!("{name}.{}", topology::retry_key(*delay)));
    let mut there = vec![];
    for queue in queues.chain([name.to_owned(), format!("{name}.dead")]) {
        there.extend(admin.depth(&queue).await.map(|_| queue));
    }
    for exchange in [name.to_owned(), format!("{name}.fields")] {
        if admin.has_exchange(&exchange).await {
            there.push(format!("exchange {exchange}"));
        }
    }
    there
}

// Registering.

#[sqlx::test]
async fn who_registers_misses_nothing_and_needs_no_right_to_configure(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    let house = House::at(db, &broker.amqp_url, &[]).await;
    let orders = unique("orders");
    drop(broker.try_ctl(&["add_user", "orders", "secret"]).await);
    broker.ctl(&["set_permissions", "orders", "^$", "^$", &format!("^{orders}$")]).await;

    let registered = house.register(&orders, &wish(&["user.created"], &[])).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(registered.status, 201, "{registered:?}");
    assert_eq!(registered.headers["location"], format!("/v1/subscriptions/{orders}"));

    let consumer = Admin::at(&broker.amqp_url.replace("guest:guest", "orders:secret")).await;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let channel = consumer.channel().await;
    let mut news =
        channel.basic_consume(orders.as_str().into(), "".into(), options, FieldTable::default()).await.unwrap();
    let news = timeout(PATIENCE, news.next()).await.expect("no news").unwrap().unwrap();
    let news = Notice::from_message(&news.properties, &news.data).unwrap();
    assert_eq!((news.user_id, house::describe(&news).as_str()), (ana, "user.created"));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let declared =
        consumer.channel().await.queue_declare(unique("mine").as_str().into(), durable, FieldTable::default()).await;
    assert!(declared.is_err(), "it may configure nothing");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

#[sqlx::test]
async fn it_is_woken_by_its_keys_and_fields_and_no_longer_by_those_it_gave_up(db: PgPool) {
    let house = House::open(db).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let story = async || {
        let ana = house.user(json!({ "first_name": "Ana" })).await;
        house.amend(&ana, json!({ "address": "Here" })).await.ok();
        house.amend(&ana, json!({ "job_title": "Editor", "city": "There" })).await.ok();
        house.delete(&ana).await.ok();
        house.settle().await;
        admin.told(&orders).await
    };
    let narrow = house.register(&orders, &wish(&["user.deleted"], &["address"])).await;
    assert_eq!(narrow.status, 201, "{narrow:?}");
    assert_eq!(story().await, ["profile.updated[address]", "user.deleted"]);

    let wide = house.register(&orders, &wish(&["user.*"], &["address", "city"])).await;
    assert_eq!(wide.status, 200, "{wide:?}");
    let all = ["user.created", "profile.updated[address]", "profile.updated[city,job_title]", "user.deleted"];
    assert_eq!(story().await, all);

    let other = house.register(&orders, &wish(&["user.created"], &["city"])).await.ok();
    assert_eq!((&other.body["routing_keys"], &other.body["fields"]), (&json!(["user.created"]), &json!(["city"])));
    assert_eq!(story().await, ["user.created", "profile.updated[city,job_title]"]);

    house.register(&orders, &wish(&["user.deleted"], &[])).await.ok();
    assert_eq!(story().await, ["user.deleted"]);
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn while_it_is_changed_nothing_is_missed_that_it_wants_before_and_after(db: PgPool) {
    let house = House::open(db).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let wishes = [wish(&["profile.updated"], &[]), wish(&[], &["address"])];
    house.register(&orders, &wishes[0]).await.ok();
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let changes = async {
        for change in 0..12 {
            house.register(&orders, &wishes[(change + 1) % 2]).await.ok();
        }
    };
    let mut amended = 0;
    let amendments = async {
        loop {
            house.amend(&ana, json!({ "address": format!("No. {amended}") })).await.ok();
            amended += 1;
        }
    };
    tokio::select! {
        () = changes => {}
        () = amendments => {}
    }
    house.settle().await;
    let version = house.get(&ana).await.version();
    let heard: Vec<i64> = admin.drain(&orders).await.iter().map(|notice| notice.version).collect();
    assert!(version > 12, "hardly anything happened meanwhile: {version}");
    assert_eq!(heard, (2..=version).collect::<Vec<_>>());
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn of_many_changes_at_once_the_last_one_is_what_the_broker_has(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    let (admin, orders, http) = (Admin::new().await, unique("orders"), house::http());
    let wishes = [wish(&["user.created"], &[]), wish(&[], &["address"]), wish(&["user.deleted"], &["city"])];
    let puts = (0..9).map(|place| {
        let url = [&house.service.url, &other.url][place % 2];
        Answer::to(http.put(format!("{url}/v1/subscriptions/{orders}")).json(&wishes[place % 3]))
    });
    let answers = join_all(puts).await;
    let busy = answers.iter().filter(|answer| answer.status == 503).count();
    assert!(busy < answers.len(), "{answers:?}");
    assert!(answers.iter().all(|answer| answer.status.is_success() || answer.refusal(503) == "subscription_busy"));

    let now = house.subscription(&orders).await.body;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "address": "Here" })).await.ok();
    house.amend(&ana, json!({ "city": "There" })).await.ok();
    house.delete(&ana).await.ok();
    house.settle().await;
    let expected: &[&str] = match now["fields"][0].as_str() {
        None => &["user.created"],
        Some("address") => &["profile.updated[address]"],
        Some(_) => &["profile.updated[city]", "user.deleted"],
    };
    assert_eq!(
        (now["state"].as_str(), admin.told(&orders).await),
        (Some("active"), expected.iter().map(|one| (*one).to_owned()).collect())
    );
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn what_cannot_be_registered_is_refused_with_every_reason(db: PgPool) {
    let house = House::open(db).await;
    let orders = unique("orders");
    let with = |member: &str, value: Value| {
        let mut wish = wish(&["user.deleted"], &[]);
        wish[member] = value;
        wish
    };
    let long = "x".repeat(201);
    let faults: &[(Value, &[(&str, &str)])] = &[
        (with("routing_keys", json!(["user.renamed", "#"])), &[("/routing_keys/0", "unknown_key")]),
        (with("fields", json!(["address", "shoe_size"])), &[("/fields/1", "unknown_field")]),
        (with("fields", json!(["shoe size"])), &[("/fields/0", "unknown_field")]),
        (with("routing_keys", json!([])), &[("", "nothing_wakes_it")]),
        (with("owner", json!(" ")), &[("/owner", "text")]),
        (with("purpose", json!("two\nlines")), &[("/purpose", "text")]),
        (with("purpose", json!(long)), &[("/purpose", "text")]),
        (with("expires_after_s", json!(0)), &[("/expires_after_s", "range")]),
        (
            json!({ "routing_keys": ["x"], "fields": ["x"], "owner": "", "purpose": "" }),
            &[
                ("/routing_keys/0", "unknown_key"),
                ("/fields/0", "unknown_field"),
                ("/owner", "text"),
                ("/purpose", "text"),
            ],
        ),
    ];
    for (wish, expected) in faults {
        let refused = house.register(&orders, wish).await;
        assert_eq!(refused.refusal(422), "subscription_invalid", "{wish}");
        let named: Vec<(&str, &str)> = refused.body["errors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|fault| (fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap()))
            .collect();
        assert_eq!(named, *expected, "{wish}");
    }
    let unknown = house.register(&orders, &with("routing_keys", json!(["x"]))).await;
    assert!(
        unknown.body["errors"][0]["detail"].as_str().unwrap().contains("user.created, profile.updated"),
        "{unknown:?}"
    );
    for wrong in [json!([]), json!({}), with("routing_keys", json!("user.deleted")), with("colour", json!("red"))] {
        assert_eq!(house.register(&orders, &wrong).await.refusal(422), "body_invalid", "{wrong}");
    }
    for name in ["Orders", "orders.dead", "amq.orders", "a%20b", "a%2Fb"] {
        let refused = house.register(name, &wish(&["#"], &[])).await;
        assert_eq!(refused.refusal(400), "invalid_subscription_name", "{name}");
    }
    assert_eq!(house.subscription(&orders).await.refusal(404), "subscription_not_found");
    assert_eq!(house.unsubscribe(&orders, "").await.refusal(404), "subscription_not_found");
    assert_eq!(house.unsubscribe(&orders, "?waiting=keep").await.refusal(400), "invalid_query");
    assert_eq!(house.page("/v1/subscriptions?limit=3").await.refusal(400), "invalid_query");
    assert_eq!(house.page("/v1/subscriptions").await.ok().body["subscriptions"], json!([]));
}

#[sqlx::test]
async fn a_name_belongs_to_its_owner_and_never_to_the_exchange(db: PgPool) {
    let house = House::open(db).await;
    let orders = unique("orders");
    let mut wish = wish(&["user.deleted"], &[]);
    house.register(&orders, &wish).await.ok();
    wish["owner"] = json!("team-billing");
    wish["routing_keys"] = json!(["#"]);
    let taken = house.register(&orders, &wish).await;
    assert_eq!(taken.refusal(409), "name_taken");
    assert!(taken.body["detail"].as_str().unwrap().contains("team-orders"), "{taken:?}");
    let kept = house.subscription(&orders).await.body;
    assert_eq!((&kept["owner"], &kept["routing_keys"]), (&json!("team-orders"), &json!(["user.deleted"])));
    assert_eq!(house.register(&house.exchange, &wish).await.refusal(409), "name_taken");
    house.unsubscribe(&orders, "").await.ok();
}

/// Whoever deletes a subscription deletes its parts: one whose part is another application's is not for a client to register.
#[sqlx::test]
async fn a_name_whose_part_is_there_already_is_no_clients_to_take(db: PgPool) {
    let house = House::with(db, &[SELDOM]).await;
    let (admin, shop) = (Admin::new().await, unique("shop"));
    let key = client(&house, "create shop --scope subscriptions").await;
    let put = async || {
        let url = format!("{}/v1/subscriptions/{shop}", house.service.url);
        Answer::to(house::http_with(&key).put(url).json(&wish(&["user.deleted"], &[]))).await
    };
    let (fields, resync) = (format!("{shop}.fields"), format!("{shop}.resync"));
    house::declare(&admin.channel().await, &fields).await;
    assert_eq!(put().await.refusal(409), "name_taken");
    assert!(admin.has_exchange(&fields).await);
    admin.delete_exchange(&fields).await;
    admin.classic_queue(&resync).await;
    assert_eq!(put().await.refusal(409), "name_taken");
    admin.delete_queue(&resync).await;
    put().await.ok();
    house.unsubscribe(&shop, "").await.ok();
}

#[sqlx::test]
async fn a_queue_with_other_properties_is_named_and_nothing_is_registered_that_was_not(db: PgPool) {
    let house = House::with(db, &[SELDOM]).await;
    let (admin, orders, billing) = (Admin::new().await, unique("orders"), unique("billing"));
    admin.classic_queue(&orders).await;
    let differs = house.register(&orders, &wish(&["user.deleted"], &[])).await;
    assert_eq!(differs.refusal(409), "queue_differs");
    assert!(differs.body["detail"].as_str().unwrap().contains(&format!("{orders:?}")), "{differs:?}");
    assert_eq!(house.subscription(&orders).await.refusal(404), "subscription_not_found");
    assert_eq!(admin.depth(&orders).await, Some(Depth { ready: 0, consumers: 0 }), "it is somebody's");

    house.register(&billing, &wish(&["user.deleted"], &[])).await.ok();
    admin.delete_queue(&billing).await;
    admin.classic_queue(&billing).await;
    assert_eq!(house.register(&billing, &wish(&["#"], &[])).await.refusal(409), "queue_differs");
    assert_eq!(house.subscription(&billing).await.body["routing_keys"], json!(["user.deleted"]), "as it was");
    admin.delete_queue(&orders).await;
    house.register(&orders, &wish(&["user.deleted"], &[])).await.ok();
    for name in [&orders, &billing] {
        house.unsubscribe(name, "").await.ok();
    }
}

// Trouble.

#[sqlx::test]
async fn what_was_registered_without_a_broker_is_declared_when_there_is_one(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.broker.down();
    let registered = house.register(&orders, &wish(&["user.deleted"], &["address"])).await;
    assert_eq!(registered.refusal(503), "broker_unavailable");
    assert!(registered.headers.contains_key("retry-after"), "{registered:?}");
    let seen = house.subscription(&orders).await.ok().body;
    assert_eq!(
        (&seen["state"], &seen["declared"], &seen["queue"]),
        (&json!("undeclared"), &json!(false), &Value::Null)
    );
    assert_eq!(admin.depth(&orders).await, None);
    assert_eq!(house.unsubscribe(&orders, "").await.refusal(503), "broker_unavailable");
    house.logs(&["the subscriptions are not watched for now"]).await;
    house.broker.up();
    let healed = house.comes_to_be(&orders, "active").await;
    assert_eq!(healed["queue"]["ready"], 0, "{healed}");
    assert_eq!(parts(&admin, &orders).await.len(), 8);
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn a_broker_that_refuses_is_asked_again_until_it_grants(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    drop(broker.try_ctl(&["add_user", "registry", "secret"]).await);
    broker.ctl(&["set_permissions", "registry", "^test\\.", "^test\\.", "^$"]).await;
    let url = broker.amqp_url.replace("guest:guest", "registry:secret");
    let house = House::at(db, &broker.amqp_url, &[("AMQP_REGISTRY_URL", &url), EVERY_SECOND]).await;
    let orders = unique("orders");
    assert_eq!(house.register(&orders, &wish(&["user.deleted"], &[])).await.refusal(503), "broker_refused");
    house.comes_to_be(&orders, "undeclared").await;
    house.logs(&["WARN", &orders, "cannot be declared", "may not configure"]).await;
    // What docs/operating.md says it needs.
    let names = format!("^({orders}|{})", house.exchange.replace('.', "\\."));
    broker.ctl(&["set_permissions", "registry", &names, &names, &names]).await;
    house.comes_to_be(&orders, "active").await;
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn a_queue_that_an_admin_deleted_is_declared_again_and_said_to_be_lost(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &["address"])).await.ok();
    let ana = house.user(json!({})).await;
    house.comes_to_be(&orders, "active").await;
    admin.delete_queue(&orders).await;
    let lost = house.comes_to_be(&orders, "queue_lost").await;
    let (lost_at, missing_since) = (lost["lost_at"].as_str().unwrap(), lost["missing_since"].as_str().unwrap());
    assert!(missing_since <= lost_at && missing_since >= lost["created_at"].as_str().unwrap(), "{lost}");
    house.logs(&["WARN", &orders, "a part of it was deleted at the broker", "missing_since"]).await;
    let metric = format!("tidings_subscription_queue_lost{{subscription=\"{orders}\"}}");
    let shows = async |value: f64| {
        eventually("the metric", async || match house.metric(&metric).await {
            seen if seen == value => Ok(()),
            other => Err(other),
        })
        .await;
    };
    shows(1.0).await;
    eventually("what lay in the lost queue to be told anew", async || {
        let told = admin.drain(&orders).await;
        if told.iter().any(|notice| notice.user_id == ana) { Ok(()) } else { Err(told.len()) }
    })
    .await;
    let ben = house.user(json!({})).await;
    house.settle().await;
    assert!(admin.drain(&orders).await.iter().any(|notice| notice.user_id == ben), "it hears again");

    let again = house.register(&orders, &wish(&["user.created"], &["address"])).await.ok();
    assert_eq!(again.body["state"], "queue_lost", "a consumer that registers whenever it starts must not hide it");
    let recovered = tidings(&["subscription", "recovered", &orders], house.settings()).output().await.unwrap();
    assert!(recovered.status.success(), "{recovered:?}");
    let known = house.comes_to_be(&orders, "active").await;
    assert_eq!(known["lost_at"], lost["lost_at"], "remembered");
    shows(0.0).await;
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// What waits there for another attempt is in no other queue.
#[sqlx::test]
async fn a_queue_of_what_failed_is_not_declared_again_in_silence(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.comes_to_be(&orders, "active").await;
    let ana = house.user(json!({})).await;
    house.settle().await;
    assert_eq!(admin.drain(&orders).await.len(), 1);
    let dead = format!("{orders}.dead");
    admin.delete_queue(&dead).await;
    house.logs(&["WARN", &orders, "its queue of dead letters was deleted"]).await;
    eventually("the queue", async || admin.depth(&dead).await.ok_or(())).await;
    assert_eq!(house.subscription(&orders).await.body["lost_at"], Value::Null, "what it lost is in no notice");
    let retry = format!("{orders}.retry.600000");
    admin.delete_queue(&retry).await;
    house.looks(6).await;
    let lost = house.subscription(&orders).await.body;
    assert!(lost["lost_at"].is_string(), "not noticed in six looks: {lost}");
    house.logs(&["WARN", &retry, "a part of it was deleted"]).await;
    house.comes_to_be(&orders, "queue_lost").await;
    admin.hears_of(&orders, &[(ana, 1)]).await;
    assert!(admin.depth(&retry).await.is_some());
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// As between the watch's look and its declaration.
#[tokio::test]
async fn a_part_that_is_gone_after_all_is_not_made_anew_in_silence() {
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let exchange = format!("{orders}.source");
    let (topic, durable) = (lapin::ExchangeKind::Topic, ExchangeDeclareOptions { durable: true, ..Default::default() });
    let made =
        admin.channel().await.exchange_declare(exchange.as_str().into(), topic, durable, FieldTable::default()).await;
    made.unwrap();
    let source = topology::Source { exchange: exchange.clone(), prefix: None };
    let subscription = tidings_sdk::subscription::Subscription {
        name: orders.parse().unwrap(),
        keys: ["user.deleted".parse().unwrap()].into(),
        fields: ["city".parse().unwrap()].into(),
    };
    let name = &subscription.name;
    let retry = name.retry_queue(RETRY_DELAYS[3]);
    let there = [name.queue().to_owned(), name.dead_queue(), retry.clone(), name.fields_exchange()].into();
    topology::declare(&admin.channel().await, &source, &subscription, &RETRY_DELAYS).await.unwrap();
    let over =
        async || topology::declare_over(&admin.channel().await, &source, &subscription, &RETRY_DELAYS, &there).await;
    over().await.unwrap();
    for queue in [name.queue(), &name.dead_queue(), &retry] {
        admin.delete_queue(queue).await;
        assert!(matches!(over().await, Err(topology::Error::Missing(_))), "{queue}");
        assert_eq!(admin.depth(queue).await, None);
        topology::declare(&admin.channel().await, &source, &subscription, &RETRY_DELAYS).await.unwrap();
    }
    admin.delete_exchange(&name.fields_exchange()).await;
    assert!(matches!(over().await, Err(topology::Error::Missing(_))));
    assert!(!admin.has_exchange(&name.fields_exchange()).await);
    topology::delete(&admin.channel().await, name, &RETRY_DELAYS).await.unwrap();
    admin.delete_exchange(&exchange).await;
}

#[sqlx::test]
async fn a_loss_is_told_although_who_registers_again_is_there_before_the_watch(db: PgPool) {
    let house = House::with(db, &[SELDOM]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let first = house.register(&orders, &wish(&["user.created"], &[])).await.ok().body;
    admin.delete_queue(&orders).await;
    let again = house.register(&orders, &wish(&["user.created"], &["address"])).await.ok().body;
    assert_eq!((&again["state"], &again["declared"]), (&json!("queue_lost"), &json!(true)), "{again}");
    assert!(again["missing_since"].as_str().unwrap() <= again["lost_at"].as_str().unwrap(), "{again}");
    assert!(again["missing_since"].as_str().unwrap() >= first["updated_at"].as_str().unwrap(), "{again}");
    assert!(again["lost_at"].as_str().unwrap() <= again["updated_at"].as_str().unwrap(), "{again}");
    house.unsubscribe(&orders, "").await.ok();
}

/// However long it takes until the queue is there again: nobody is passed over who came or changed meanwhile.
#[sqlx::test]
async fn what_happens_until_a_lost_queue_is_declared_again_is_told_too(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let ana = house.user(json!({})).await;
    let obstacle = format!("{orders}.retry.600000");
    admin.classic_queue(&obstacle).await;
    house.has_registered(&orders, 1).await;
    house.logs(&["WARN", &orders, "a part of it was deleted"]).await;
    house.logs(&["WARN", &orders, "cannot be declared"]).await;
    // A walk that had begun before the queue is there would be through with everybody by then.
    house.looks_again().await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    let ben = house.user(json!({})).await;
    house.settle().await;
    admin.delete_queue(&obstacle).await;
    house.comes_to_be(&orders, "queue_lost").await;
    admin.hears_of(&orders, &[(ana, 2), (ben, 1)]).await;
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// Whoever makes it anew, nobody is bound to it until the watch has looked.
#[sqlx::test]
async fn what_is_told_to_an_exchange_that_was_made_anew_is_told_again(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders, billing) = (Admin::new().await, unique("orders"), unique("billing"));
    for name in [&orders, &billing] {
        house.register(name, &wish(&["user.created"], &[])).await.ok();
        house.comes_to_be(name, "active").await;
    }
    admin.delete_exchange(&house.exchange).await;
    let ana = house.user(json!({})).await;
    house.logs(&["WARN", "the exchange was deleted", "subscriptions=2"]).await;
    for name in [&orders, &billing] {
        house.comes_to_be(name, "queue_lost").await;
        admin.hears_of(name, &[(ana, 1)]).await;
        house.unsubscribe(name, "?waiting=discard").await.ok();
    }
}

/// Perhaps the command was given the name of another one: no subscription is marked as lost for that, and no second exchange made.
#[sqlx::test]
async fn no_command_makes_a_missing_exchange(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_NO_RELAY", "true")]).await;
    let (admin, orders, billing) = (Admin::new().await, unique("orders"), unique("billing"));
    house.has_registered(&orders, 1).await;
    admin.delete_exchange(&house.exchange).await;
    let run = async |line: &str| {
        let done = timeout(PATIENCE, tidings(&line.split(' ').collect::<Vec<_>>(), house.settings()).output()).await;
        let done = done.expect("it does not end").unwrap();
        (done.status.success(), String::from_utf8(done.stderr).unwrap())
    };
    let put = format!("subscription put {billing} --key user.deleted --owner team-billing --purpose x");
    let (show, delete) = (format!("subscription show {orders}"), format!("subscription delete {orders}"));
    for (line, may_do_without) in
        [("tail", false), ("subscription list", true), (&show, true), (&delete, false), (&put, false)]
    {
        let (is_well, talk) = run(line).await;
        assert!(is_well == may_do_without && talk.contains("is missing"), "{line}: {talk}");
        assert!(talk.contains("`tidings serve` and `tidings relay` make it"), "{line}: {talk}");
        assert!(!admin.has_exchange(&house.exchange).await, "{line}");
    }
    assert_eq!(house.subscription(&orders).await.body["lost_at"], Value::Null);
    assert_eq!(house.subscription(&billing).await.body["declared"], false);
}

/// Who declares one that was lost while he did does not know of the loss.
#[sqlx::test]
async fn a_loss_that_is_noted_meanwhile_outlives_a_declaration(db: PgPool) {
    let house = House::with(db, &[SELDOM]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    admin.delete_exchange(&house.exchange).await;
    let again = house.register(&orders, &wish(&["user.created"], &["city"])).await.ok().body;
    assert_eq!((&again["state"], &again["declared"]), (&json!("undeclared"), &json!(false)), "{again}");
    let ana = house.user(json!({})).await;
    let again = house.register(&orders, &wish(&["user.created"], &["city"])).await.ok().body;
    assert_eq!((&again["state"], &again["declared"]), (&json!("queue_lost"), &json!(true)), "{again}");
    admin.hears_of(&orders, &[(ana, 1)]).await;
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// What a backfill has told a queue is lost with it, and what it has still to tell is not all that is.
#[sqlx::test]
async fn a_backfill_that_was_under_way_begins_anew_and_tells_what_is_lost_too(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let [ana, ben] = [house.user(json!({})).await, house.user(json!({})).await];
    house.settle().await;
    // Too long ago for a repair by itself.
    sqlx::query("update users set updated_at = now() - interval '1 day'").execute(&house.db).await.unwrap();
    house.register(&orders, &wish(&["user.created"], &["city"])).await.ok();
    let backfill = format!("/v1/subscriptions/{orders}/backfill");
    let asked = house.request(Method::POST, &backfill).json(&json!({ "user_ids": [ana], "rate_per_s": 1 }));
    Answer::to(asked).await.ok();
    Answer::to(house.request(Method::POST, &format!("{backfill}:pause"))).await.ok();
    let eve = house.user(json!({})).await;
    house.settle().await;
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    let told = admin.hears_of(&orders, &[(ana, 1), (eve, 1)]).await;
    assert!(!told.contains(&(ben, 1)), "nobody asked for him");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// One connection's own queue takes a name: that subscription is told to be undeclared, and the others are watched as ever.
#[sqlx::test]
async fn a_name_that_somebody_holds_alone_keeps_the_watch_from_nobody_else(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, held, orders) = (Admin::new().await, unique("held"), unique("orders"));
    let alone = QueueDeclareOptions { exclusive: true, ..Default::default() };
    admin.channel().await.queue_declare(held.as_str().into(), alone, FieldTable::default()).await.unwrap();
    house.has_registered(&held, 0).await;
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    house.logs(&["WARN", &held, "cannot be declared", "other properties"]).await;
    house.looks_again().await;
    assert_eq!(house.subscription(&held).await.body["state"], "undeclared");
    let wish = wish(&["user.created"], &["city"]);
    assert_eq!(house.register(&held, &wish).await.refusal(409), "queue_differs");
    admin.delete_queue(&held).await;
    house.comes_to_be(&held, "active").await;
    for name in [held, orders] {
        house.unsubscribe(&name, "?waiting=discard").await.ok();
    }
}

/// Nor when its time has come, and the broker does not let it be deleted.
#[sqlx::test]
async fn one_that_expires_and_cannot_be_deleted_keeps_the_watch_from_nobody_else(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, held, later, orders) = (Admin::new().await, unique("held"), unique("later"), unique("orders"));
    let alone = QueueDeclareOptions { exclusive: true, ..Default::default() };
    admin.channel().await.queue_declare(held.as_str().into(), alone, FieldTable::default()).await.unwrap();
    house.has_registered(&held, 0).await;
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.register(&later, &wish(&["user.created"], &[])).await.ok();
    let expires = "update subscriptions set expires_after_s = 2 where name = any($1)";
    sqlx::query(expires).bind([&held, &later].map(String::as_str)).execute(&house.db).await.unwrap();
    eventually("the other to expire", async || {
        let seen = house.subscription(&later).await;
        if seen.status == 404 { Ok(()) } else { Err(seen) }
    })
    .await;
    house.logs(&["WARN", &held, "has expired and cannot be deleted", "other properties"]).await;
    house.looks_again().await;
    let ready = format!("tidings_subscription_ready{{subscription=\"{orders}\"}}");
    assert_eq!((house.metric("tidings_subscriptions_watching").await, house.metric(&ready).await), (1.0, 0.0));
    let log = house.service.log();
    assert_eq!(log.matches("has expired and cannot be deleted").count(), 1, "{log}");
    admin.delete_queue(&held).await;
    eventually("it to expire too", async || {
        let seen = house.subscription(&held).await;
        if seen.status == 404 { Ok(()) } else { Err(seen) }
    })
    .await;
    house.unsubscribe(&orders, "").await.ok();
}

/// Nor when it is the database that does not let it go.
#[sqlx::test]
async fn one_that_expires_and_stays_registered_keeps_the_watch_from_nobody_else(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (held, later, orders) = (unique("held"), unique("later"), unique("orders"));
    for name in [&held, &later, &orders] {
        house.register(name, &wish(&["user.created"], &[])).await.ok();
    }
    let hold = format!(
        "
        create function hold() returns trigger language plpgsql as $$ begin raise 'held'; end $$;
        create trigger hold before delete on subscriptions
          for each row when (old.name = '{held}') execute function hold();
        "
    );
    sqlx::raw_sql(AssertSqlSafe(hold)).execute(&house.db).await.unwrap();
    let expires = "update subscriptions set expires_after_s = 2 where name = any($1)";
    sqlx::query(expires).bind([&held, &later].map(String::as_str)).execute(&house.db).await.unwrap();
    let is_gone = async |name: &str| {
        eventually("it to expire", async || {
            let seen = house.subscription(name).await;
            if seen.status == 404 { Ok(()) } else { Err(seen) }
        })
        .await;
    };
    is_gone(&later).await;
    house.logs(&["WARN", &held, "has expired and cannot be deleted", "P0001"]).await;
    house.looks_again().await;
    assert_eq!(house.metric("tidings_subscriptions_watching").await, 1.0);
    sqlx::query("drop trigger hold on subscriptions").execute(&house.db).await.unwrap();
    is_gone(&held).await;
    house.unsubscribe(&orders, "").await.ok();
}

/// What was never at the broker cannot have been deleted there: nothing is told anew for it.
#[sqlx::test]
async fn a_first_field_that_was_registered_without_a_broker_is_no_loss(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.broker.down();
    // An application registers until it is answered.
    for _ in 0..2 {
        house.register(&orders, &wish(&["user.created"], &["city"])).await.refusal(503);
    }
    house.broker.up();
    eventually("it to be declared", async || {
        let seen = house.subscription(&orders).await.ok().body;
        if seen["declared"] == true { Ok(()) } else { Err(seen) }
    })
    .await;
    let seen = house.subscription(&orders).await.ok().body;
    assert_eq!((&seen["state"], &seen["lost_at"]), (&json!("active"), &Value::Null), "{seen}");
    let backfill = house.page(&format!("/v1/subscriptions/{orders}/backfill")).await;
    assert_eq!(backfill.refusal(404), "backfill_not_found");

    // From then on it is looked for, also while another wish waits to be declared.
    house.broker.down();
    house.register(&orders, &wish(&["user.created"], &["city", "address"])).await.refusal(503);
    admin.delete_exchange(&format!("{orders}.fields")).await;
    house.broker.up();
    house.comes_to_be(&orders, "queue_lost").await;
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// To register while the broker is away is not to have seen the queue.
#[sqlx::test]
async fn a_lost_queue_is_missing_since_it_was_seen_and_not_since_somebody_registered_again(db: PgPool) {
    let house = House::with(db, &[SELDOM]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.broker.down();
    house.register(&orders, &wish(&["user.created"], &["city"])).await.refusal(503);
    let unseen = house.subscription(&orders).await.ok().body;
    assert!(unseen["updated_at"].as_str().unwrap() > unseen["created_at"].as_str().unwrap(), "{unseen}");
    admin.delete_queue(&orders).await;
    house.broker.up();
    let lost = house.register(&orders, &wish(&["user.created"], &["city"])).await.ok().body;
    assert!(lost["missing_since"].as_str().unwrap() < unseen["updated_at"].as_str().unwrap(), "{lost}");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// Nor is to be refused a look at it, as RabbitMQ 4.3 refuses one to who has no right to the queue.
#[sqlx::test]
async fn a_lost_queue_is_missing_since_it_was_seen_and_not_since_it_was_kept_from_sight(db: PgPool) {
    let broker = HurtBroker::borrow().await;
    drop(broker.try_ctl(&["add_user", "registry", "secret"]).await);
    let may_use = async |names: &str| {
        let names = format!("^({names}|test\\.)");
        broker.ctl(&["set_permissions", "registry", &names, &names, &names]).await;
    };
    may_use("billing|orders").await;
    let url = broker.amqp_url.replace("guest:guest", "registry:secret");
    let house = House::at(db, &broker.amqp_url, &[("AMQP_REGISTRY_URL", &url), EVERY_SECOND]).await;
    let admin = Admin::at(&broker.amqp_url).await;
    let (billing, orders) = (unique("billing"), unique("orders"));
    for name in [&billing, &orders] {
        house.register(name, &wish(&["user.created"], &[])).await.ok();
    }
    house.looks_again().await;
    may_use("billing").await;
    admin.delete_queue(&orders).await;
    let gone_at: OffsetDateTime = sqlx::query_scalar("select now()").fetch_one(&house.db).await.unwrap();
    let sees = async |attended: bool| {
        eventually("the watch to see who attends", async || {
            let seen = "select unattended_since is null from subscriptions where name = $1";
            let seen: bool = sqlx::query_scalar(seen).bind(&billing).fetch_one(&house.db).await.unwrap();
            if seen == attended { Ok(()) } else { Err(seen) }
        })
        .await;
    };
    // So many looks that one began after that and was over when the next began.
    for _ in 0..2 {
        let attendance = admin.attend(&billing).await;
        sees(true).await;
        attendance.ends().await;
        sees(false).await;
    }
    may_use("billing|orders").await;
    house.comes_to_be(&orders, "queue_lost").await;
    let since = "select missing_since from subscriptions where name = $1";
    let since: OffsetDateTime = sqlx::query_scalar(since).bind(&orders).fetch_one(&house.db).await.unwrap();
    assert!(since <= gone_at, "{since} is after {gone_at}");
    for name in [&billing, &orders] {
        house.unsubscribe(name, "?waiting=discard").await.ok();
    }
}

#[sqlx::test]
async fn a_binding_or_an_exchange_that_an_admin_deleted_is_made_again(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &["address"])).await.ok();
    let channel = admin.channel().await;
    let unbound = channel.queue_unbind(
        orders.as_str().into(),
        house.exchange.as_str().into(),
        "user.created".into(),
        FieldTable::default(),
    );
    unbound.await.unwrap();
    channel.exchange_delete(format!("{orders}.fields").as_str().into(), Default::default()).await.unwrap();
    eventually("news to be heard again", async || {
        let ana = house.user(json!({})).await;
        house.amend(&ana, json!({ "address": "Here" })).await.ok();
        house.settle().await;
        let heard = admin.told(&orders).await;
        if heard == ["user.created", "profile.updated[address]"] { Ok(()) } else { Err(heard) }
    })
    .await;
    // What came while there was no exchange to choose by field is told anew.
    house.logs(&["WARN", &format!("{orders}.fields"), "a part of it was deleted"]).await;
    house.comes_to_be(&orders, "queue_lost").await;
    admin.delete_queue(&format!("{orders}.dead")).await;
    eventually("all parts", async || match parts(&admin, &orders).await {
        all if all.len() == 8 => Ok(()),
        some => Err(some),
    })
    .await;
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

#[sqlx::test]
async fn one_watch_leads_and_another_takes_over(db: PgPool) {
    let mut house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    eventually("the first to lead", async || match house.metric("tidings_subscriptions_watching").await {
        1.0 => Ok(()),
        other => Err(other),
    })
    .await;
    let second = house.another(&["relay"]).await;
    let watches = "select count(*) filter (where application_name = 'tidings subscriptions watch'), count(pg_locks.pid)
                     from pg_stat_activity left join pg_locks
                       on pg_locks.pid = pg_stat_activity.pid and locktype = 'advisory' and granted and objsubid = 1
                    where datname = current_database() and application_name = 'tidings subscriptions watch'";
    eventually("two watches, one of which leads", async || {
        let seen: (i64, i64) = sqlx::query_as(watches).fetch_one(&house.db).await.unwrap();
        if seen == (2, 1) { Ok(()) } else { Err(seen) }
    })
    .await;
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.service.kill().await;
    let metrics = async || reqwest::get(format!("{}/metrics", second.url)).await.unwrap().text().await.unwrap();
    eventually("the other to watch", async || {
        let metrics = metrics().await;
        let sees_orders = metrics.contains(&format!("tidings_subscription_ready{{subscription=\"{orders}\"}} 0"));
        if sees_orders { Ok(()) } else { Err(metrics) }
    })
    .await;
    admin.delete_queue(&orders).await;
    house.restart().await;
    house.comes_to_be(&orders, "queue_lost").await;
    house.unsubscribe(&orders, "").await.ok();
    eventually("its figures to be gone", async || {
        let metrics = metrics().await;
        if metrics.contains(&orders) { Err(metrics) } else { Ok(()) }
    })
    .await;
}

// Growing old.

#[sqlx::test]
async fn what_waits_and_who_listens_is_told(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    let seen = house.subscription(&orders).await.body;
    assert_eq!(
        seen["queue"],
        json!({ "ready": 0, "consumers": 0, "unacknowledged": null, "waiting_since": null, "head_message_at": null })
    );
    assert_eq!((&seen["dead_letters"], &seen["consumer_seen_at"]), (&json!(0), &Value::Null));
    house.user(json!({})).await;
    house.user(json!({})).await;
    let ready = format!("tidings_subscription_ready{{subscription=\"{orders}\"}}");
    eventually("the watch to see what waits", async || {
        let log = house.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
        if log.contains(&format!("{ready} 2")) { Ok(()) } else { Err(log) }
    })
    .await;
    let seen = house.subscription(&orders).await.body;
    assert_eq!((&seen["queue"]["ready"], seen["queue"]["waiting_since"].is_string()), (&json!(2), true), "{seen}");
    let since = seen["queue"]["waiting_since"].clone();
    house.user(json!({})).await;
    house.settle().await;
    let attendance = admin.attend(&orders).await;
    let seen = house.subscription(&orders).await.body;
    assert_eq!((&seen["queue"]["consumers"], seen["consumer_seen_at"].is_string()), (&json!(1), true), "{seen}");
    drop(attendance);
    let seen = eventually("the messages to be back", async || {
        let seen = house.subscription(&orders).await.body;
        if seen["queue"]["ready"] == 3 { Ok(seen) } else { Err(seen) }
    })
    .await;
    assert!(seen["queue"]["waiting_since"] == since || seen["queue"]["waiting_since"].is_string(), "{seen}");
    let waiting = house.metric(&format!("tidings_subscription_waiting_seconds{{subscription=\"{orders}\"}}")).await;
    assert!(waiting >= 0.0, "{waiting}");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

#[sqlx::test]
async fn one_that_nobody_attends_is_idle_until_somebody_does(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND, ("TIDINGS_SUBSCRIPTION_IDLE_AFTER", "2s")]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let registered = house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    assert_eq!(registered.body["state"], "active");
    house.comes_to_be(&orders, "idle").await;
    house.logs(&["WARN", &orders, "team-orders", "idle: nobody listens"]).await;
    let idle = format!("tidings_subscription_idle{{subscription=\"{orders}\"}}");
    assert_eq!(house.metric(&idle).await, 1.0);
    house.looks_again().await;
    let attendance = admin.attend(&orders).await;
    house.comes_to_be(&orders, "active").await;
    eventually("the metric", async || match house.metric(&idle).await {
        0.0 => Ok(()),
        other => Err(other),
    })
    .await;
    let warnings = house.service.log().matches("idle: nobody listens").count();
    assert_eq!(warnings, 1, "told once");
    attendance.ends().await;
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn one_expires_only_if_its_owner_said_so_and_after_a_warning(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, brief, lasting) = (Admin::new().await, unique("brief"), unique("lasting"));
    let mut wish = wish(&["user.created"], &[]);
    house.register(&lasting, &wish).await.ok();
    wish["expires_after_s"] = json!(6);
    house.register(&brief, &wish).await.ok();
    house.user(json!({})).await;
    let warned = house.comes_to_be(&brief, "expiring").await;
    assert!(warned["expires_at"].as_str().unwrap() > warned["updated_at"].as_str().unwrap(), "{warned}");
    house.logs(&["WARN", &brief, "expiring: nobody listens", "expires_at"]).await;

    let attendance = admin.attend(&brief).await;
    assert_eq!(house.comes_to_be(&brief, "active").await["expires_at"], Value::Null);
    house.logs(&[&brief, "no longer expiring"]).await;
    attendance.ends().await;
    house.comes_to_be(&brief, "expiring").await;
    eventually("the end of it", async || {
        let seen = house.subscription(&brief).await;
        if seen.status == 404 { Ok(()) } else { Err(seen) }
    })
    .await;
    house.logs(&["WARN", &brief, "expired: deleted", "ready=1"]).await;
    assert_eq!(parts(&admin, &brief).await, [""; 0]);
    let log = house.service.log();
    assert_eq!(log.matches("expiring: nobody listens").count(), 2, "{log}");
    let lasting_now = house.subscription(&lasting).await.ok().body;
    assert_eq!((&lasting_now["state"], &lasting_now["expires_at"]), (&json!("active"), &Value::Null));
    house.unsubscribe(&lasting, "?waiting=discard").await.ok();
}

// Ending.

#[sqlx::test]
async fn what_waits_is_not_deleted_unasked(db: PgPool) {
    let house = House::open(db).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    house.register(&orders, &wish(&["user.created"], &["address"])).await.ok();
    house.user(json!({})).await;
    house.settle().await;
    // As a consumer does that gives up on one message, and tries another again later.
    let channel = admin.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    for key in ["dead", "dead", "retry.600000"] {
        let published = channel.basic_publish(
            orders.as_str().into(),
            key.into(),
            BasicPublishOptions::default(),
            b"{}",
            Default::default(),
        );
        published.await.unwrap().await.unwrap();
    }
    // One that is in the collector's hand is neither in the queue nor kept.
    eventually("the dead letters to be collected", async || {
        match sqlx::query("select from dead_letters").fetch_all(&house.db).await.unwrap().len() {
            2 => Ok(()),
            kept => Err(kept),
        }
    })
    .await;
    let refused = house.unsubscribe(&orders, "").await;
    assert_eq!(refused.refusal(409), "subscription_not_empty");
    let detail = refused.body["detail"].as_str().unwrap();
    for part in ["1 messages wait", "1 are on their way back", "2 are dead letters", "waiting=discard"] {
        assert!(detail.contains(part), "no {part:?} in {detail}");
    }
    assert_eq!(house.subscription(&orders).await.body["dead_letters"], 2);
    assert_eq!(admin.drain(&orders).await.len(), 1, "the queue is as it was");
    assert_eq!(house.unsubscribe(&orders, "").await.refusal(409), "subscription_not_empty", "dead letters count");
    assert_eq!(house.unsubscribe(&orders, "?waiting=discard").await.status, 204);
    assert_eq!(parts(&admin, &orders).await, [""; 0]);
    assert_eq!(house.subscription(&orders).await.refusal(404), "subscription_not_found");
}

// Where it is told.

#[sqlx::test]
async fn queues_that_nobody_registered_are_told_with_the_management_api(db: PgPool) {
    let api = env("TIDINGS_RABBITMQ_MANAGEMENT_URL");
    let house = House::with(db, &[("TIDINGS_RABBITMQ_MANAGEMENT_URL", &api)]).await;
    let (admin, orders, stranger) = (Admin::new().await, unique("orders"), unique("stranger"));
    house.register(&orders, &wish(&["user.deleted"], &["address"])).await.ok();
    // Behind somebody's headers exchange, as an application does that declares for itself.
    let channel = admin.channel().await;
    let source = topology::Source { exchange: house.exchange.clone(), prefix: None };
    let subscription = tidings_sdk::subscription::Subscription {
        name: stranger.parse().unwrap(),
        keys: Default::default(),
        fields: ["city".parse().unwrap()].into(),
    };
    topology::declare(&channel, &source, &subscription, &RETRY_DELAYS).await.unwrap();
    let listing = house.page("/v1/subscriptions").await.ok().body;
    let names: Vec<&Value> = listing["unregistered"].as_array().unwrap().iter().map(|found| &found["queue"]).collect();
    assert_eq!(names, [&json!(stranger), &json!(house.audit.queue)].map(|name| name), "{listing}");
    assert_eq!(listing["unregistered"][0]["bindings"], 1);
    assert_eq!(listing["subscriptions"][0]["name"], json!(orders));
    // The API gathers its figures every few seconds.
    let _attendance = admin.attend(&orders).await;
    let ana = house.user(json!({})).await;
    house.delete(&ana).await.ok();
    eventually("what the consumer has in hand", async || {
        let seen = house.subscription(&orders).await.body;
        if seen["queue"]["unacknowledged"] == 1 { Ok(()) } else { Err(seen) }
    })
    .await;
    topology::delete(&channel, &subscription.name, &RETRY_DELAYS).await.unwrap();
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// Stands in for the management API; its URL, and what it was asked.
async fn management() -> (String, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let answer = {
        let asked = Arc::clone(&asked);
        async move |request: Request| {
            let path = request.uri().path().to_owned();
            let is_of_one = path.starts_with("/api/queues/%2f/") || path.starts_with("/api/queues/%2F/");
            asked.lock().unwrap().push(path);
            if is_of_one { json!({ "messages_unacknowledged": 7 }) } else { json!([]) }.to_string()
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://guest:guest@{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    (url, asked)
}

/// A broker with thousands of queues is not asked for all of them because of one.
#[sqlx::test]
async fn the_management_api_is_asked_for_no_more_than_is_told(db: PgPool) {
    let (api, asked) = management().await;
    let house = House::with(db, &[("TIDINGS_RABBITMQ_MANAGEMENT_URL", &api), SELDOM]).await;
    let orders = unique("orders");
    let was_asked = || -> Vec<String> {
        let asked: BTreeSet<String> = asked.lock().unwrap().drain(..).collect();
        asked.into_iter().map(|path| path.replace("%2f", "/").replace("%2F", "/")).collect()
    };
    house.register(&orders, &wish(&["user.deleted"], &["city"])).await.ok();
    assert_eq!(was_asked(), [format!("/api/queues///{orders}")]);
    let seen = house.subscription(&orders).await.ok().body;
    assert_eq!((&seen["queue"]["unacknowledged"], was_asked()), (&json!(7), vec![format!("/api/queues///{orders}")]));
    let listed = house.page("/v1/subscriptions").await.ok().body;
    assert_eq!((&listed["unregistered"], was_asked().len()), (&json!([]), 2), "all queues, and all bindings");
    let key = client(&house, "create crm --scope subscriptions").await;
    let listed = Answer::to(house::http_with(&key).get(format!("{}/v1/subscriptions", house.service.url))).await.ok();
    assert_eq!((&listed.body["unregistered"], was_asked()), (&Value::Null, vec!["/api/queues//".to_owned()]));
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn without_the_management_api_all_else_is_told(db: PgPool) {
    let silent = "http://guest:s3cret@127.0.0.1:9/";
    let house = House::with(db, &[("TIDINGS_RABBITMQ_MANAGEMENT_URL", silent)]).await;
    let orders = unique("orders");
    house.register(&orders, &wish(&["user.deleted"], &[])).await.ok();
    let listing = house.page("/v1/subscriptions").await.ok().body;
    assert_eq!((&listing["unregistered"], &listing["subscriptions"][0]["queue"]["ready"]), (&Value::Null, &json!(0)));
    house.logs(&["WARN", "the broker's management API does not answer"]).await;
    assert!(!house.service.log().contains("s3cret"));
    house.unsubscribe(&orders, "").await.ok();
}

#[sqlx::test]
async fn an_instance_without_a_broker_says_so(db: PgPool) {
    let settings = [("DATABASE_URL", database_url(&db)), ("TIDINGS_LISTEN", "127.0.0.1:0".to_owned())];
    let settings = settings.map(|(name, value)| (name.to_owned(), value));
    house::admit_key(&db).await;
    let service = Service::start(&["serve", "--no-relay"], &settings).await;
    let http = house::http();
    let url = format!("{}/v1/subscriptions", service.url);
    let registered = Answer::to(http.put(format!("{url}/orders")).json(&wish(&["user.deleted"], &[]))).await;
    assert_eq!(registered.refusal(503), "no_broker_here");
    assert_eq!(Answer::to(http.delete(format!("{url}/orders"))).await.refusal(503), "no_broker_here");
    assert_eq!(Answer::to(http.get(&url)).await.ok().body, json!({ "subscriptions": [], "unregistered": null }));
}

#[sqlx::test]
async fn an_operator_can_do_all_of_it_without_a_service(db: PgPool) {
    let exchange = format!("test.{}", Uuid::new_v4().simple());
    let settings = [("DATABASE_URL", database_url(&db)), ("AMQP_URL", env("AMQP_URL")), ("TIDINGS_EXCHANGE", exchange)];
    let settings = settings.map(|(name, value)| (name.to_owned(), value));
    let run = async |words: &str| {
        let words: Vec<&str> = ["subscription"].into_iter().chain(words.split(' ')).collect();
        let output = timeout(PATIENCE, tidings(&words, &settings).output()).await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let put = format!("put {orders} --key user.deleted --field address --owner team-orders --purpose x");
    let (code, out, talk) = run(&format!("{put} --expires-after 30d --json")).await;
    let put_view: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &put_view["expires_after_s"], &put_view["declared"]), (Some(0), &json!(2_592_000), &json!(true)));
    assert!(talk.contains("misses nothing from now on"), "{talk}");
    let (_, out, _) = run(&format!("show {orders} --json")).await;
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown["routing_keys"], json!(["user.deleted"]));
    let (_, out, talk) = run("list").await;
    assert!(out.starts_with("NAME") && out.contains(&orders) && talk.is_empty(), "{out}{talk}");

    for (words, code, hint) in [
        (put.replace("team-orders", "team-billing"), 1, "hint: give the same --owner"),
        (put.replace("user.deleted", "user.renamed"), 2, "  --key: no notice has such a routing key"),
        (put.replace("address", "adress"), 2, "  --field: the profile schema has no such field"),
        (put.replace(" --key user.deleted --field address", ""), 2, "  --key or --field: give at least one"),
        (format!("{put} --client nobody"), 2, "  --client: there is no such client"),
        (format!("backfill start {orders} --user x"), 2, "  --user: must be a UUID, not \"x\"\n"),
        (format!("backfill start {orders} --changed-since x"), 2, "  --changed-since: is a time such as"),
        (format!("backfill start {orders} --rate 0"), 2, "  --rate: is a number from"),
        (format!("dead-letters redrive {orders} --message x"), 2, "expected a UUID, not \"x\"\n"),
        (format!("{put} --expires-after soon"), 2, "--expires-after: expected a number and a unit"),
        ("show Orders".to_owned(), 2, "NAME: a subscription's name"),
        (format!("show {}", unique("nobody")), 1, "hint: `tidings subscription list`"),
    ] {
        let (left, out, talk) = run(&words).await;
        assert_eq!((left, out.as_str(), talk.contains(hint)), (Some(code), "", true), "{words}: {talk}");
    }
    let channel = admin.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let published = channel.basic_publish(
        orders.as_str().into(),
        "work".into(),
        BasicPublishOptions::default(),
        b"{}",
        Default::default(),
    );
    published.await.unwrap().await.unwrap();
    let (code, _, talk) = run(&format!("delete {orders}")).await;
    assert_eq!((code, talk.contains("1 ready") && talk.contains("hint: ")), (Some(1), true), "{talk}");
    let (code, _, talk) = run(&format!("delete {orders} --discard-waiting")).await;
    assert_eq!((code, talk), (Some(0), format!("{orders} is deleted\n")));
    assert_eq!(parts(&admin, &orders).await, [""; 0]);
}
