//! Subscriptions: who registers misses nothing, and nothing goes that somebody may still want.

use std::{
    collections::BTreeSet,
    future::IntoFuture,
    pin::pin,
    sync::{Arc, Mutex},
};

use axum::{Router, extract::Request};
use futures_util::{
    StreamExt,
    future::{Either, join_all, select},
    stream::FuturesUnordered,
};
use lapin::{
    options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::FieldTable,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool};
use tidings_sdk::{
    envelope::Notice,
    topology::{self, Depth, RETRY_DELAYS},
};
use tokio::{net::TcpListener, time::timeout};
use uuid::Uuid;

use crate::{
    clients::client,
    house::{self, Answer, House, PATIENCE, Service, database_url, env, eventually, tidings},
    hurt::HurtBroker,
    registry::{Admin, SELDOM, parts, unique, wish},
    subscribed::Subscribed,
};

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
    let misshapen: &[(Value, &[(&str, &str)])] = &[
        (json!([]), &[("", "type")]),
        (json!({}), &[("/owner", "required"), ("/purpose", "required")]),
        (with("routing_keys", json!("user.deleted")), &[("/routing_keys", "type")]),
        (with("colour", json!("red")), &[("/colour", "unknown_member")]),
        (
            json!({ "owner": 5, "purpose": 6, "fields": ["city", 7, true], "expires_after_s": "1d" }),
            &[
                ("/expires_after_s", "type"),
                ("/fields/1", "type"),
                ("/fields/2", "type"),
                ("/owner", "type"),
                ("/purpose", "type"),
            ],
        ),
        (
            json!({ "owner": 5, "colour": "red" }),
            &[("/colour", "unknown_member"), ("/owner", "type"), ("/purpose", "required")],
        ),
    ];
    for (wrong, expected) in misshapen {
        let refused = house.register(&orders, wrong).await;
        assert_eq!(refused.refusal(422), "body_invalid", "{wrong}");
        let faults = refused.body["errors"].as_array().unwrap().iter();
        let mut named: Vec<_> =
            faults.map(|fault| (fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap())).collect();
        named.sort_unstable();
        assert_eq!(named, *expected, "{wrong}");
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

/// What is wrong in itself is told at once, however many wait for the registry.
#[sqlx::test]
async fn a_registration_that_cannot_be_taken_waits_for_no_turn(db: PgPool) {
    let house = House::open(db).await;
    let crowded = Subscribed::to(&house, "crowded", &["#"], &[]).await;
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    let mut held = holder.begin().await.unwrap();
    sqlx::query("lock table dead_letters").execute(&mut *held).await.unwrap();
    let letters = crowded.path("dead-letters");
    let mut crowd: FuturesUnordered<_> = (0..100).map(|_| Answer::to(house.request(Method::GET, &letters))).collect();
    let refused = async {
        eventually("a line", async || match house.metric("tidings_requests_under_way").await {
            60.0.. => Ok(()),
            fewer => Err(fewer),
        })
        .await;
        house.register("orders", &wish(&[], &[])).await
    };
    let (mut refused, mut had_a_turn) = (pin!(refused), 0);
    let refused = loop {
        match select(crowd.next(), refused.as_mut()).await {
            Either::Left(_) => had_a_turn += 1,
            Either::Right((refused, _)) => break refused,
        }
    };
    assert!(had_a_turn < 30, "of those who came before it {had_a_turn}");
    assert_eq!(refused.refusal(422), "subscription_invalid");
    drop(crowd);
    held.rollback().await.unwrap();
    crowded.end().await;
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
