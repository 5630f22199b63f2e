//! Losses: a queue that somebody deleted is declared again and never in silence, and told anew what it has missed.

use lapin::{options::ExchangeDeclareOptions, types::FieldTable};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::topology::{self, RETRY_DELAYS};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;

use crate::{
    house::{Answer, House, PATIENCE, eventually, tidings},
    hurt::HurtBroker,
    registry::{Admin, EVERY_SECOND, SELDOM, unique, wish},
};

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

// With the exchange.

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

// What is told anew.

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

/// The loss is of an hour, and what was under way was of days: of these the rest is still to be told.
#[sqlx::test]
async fn a_backfill_of_a_longer_time_than_the_loss_stays_one(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let [ana, ben] = [house.user(json!({})).await, house.user(json!({})).await];
    house.settle().await;
    for (user, ago) in [(ana, "1 day"), (ben, "9 days")] {
        let aged = sqlx::query("update users set updated_at = now() - $2::interval where id = $1").bind(user).bind(ago);
        aged.execute(&house.db).await.unwrap();
    }
    house.register(&orders, &wish(&["user.created"], &["city"])).await.ok();
    let backfill = format!("/v1/subscriptions/{orders}/backfill");
    let since = (OffsetDateTime::now_utc() - Duration::days(2)).format(&Rfc3339).unwrap();
    let asked = house.request(Method::POST, &backfill).json(&json!({ "changed_since": since, "rate_per_s": 1 }));
    Answer::to(asked).await.ok();
    Answer::to(house.request(Method::POST, &format!("{backfill}:pause"))).await.ok();
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    let told = admin.hears_of(&orders, &[(ana, 1)]).await;
    assert!(!told.contains(&(ben, 1)), "nobody asked for him");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// What was told shortly before the loss may have waited for another attempt, or be dated by a transaction that took its time.
#[sqlx::test]
async fn what_was_told_shortly_before_a_loss_is_told_anew_too(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, orders) = (Admin::new().await, unique("orders"));
    let [ana, ben] = [house.user(json!({})).await, house.user(json!({})).await];
    house.settle().await;
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    for (user, ago) in [(ana, "12 minutes"), (ben, "1 hour")] {
        let aged = sqlx::query("update users set updated_at = now() - $2::interval where id = $1").bind(user).bind(ago);
        aged.execute(&house.db).await.unwrap();
    }
    house.looks_again().await;
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    let told = admin.hears_of(&orders, &[(ana, 1)]).await;
    assert!(!told.contains(&(ben, 1)), "that was long before");
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
    // The other was seen all the while.
    admin.delete_queue(&billing).await;
    house.comes_to_be(&billing, "queue_lost").await;
    let since = house.missing_since(&billing).await;
    assert!(since > gone_at, "{since} is before {gone_at}");
    may_use("billing|orders").await;
    house.comes_to_be(&orders, "queue_lost").await;
    let since = house.missing_since(&orders).await;
    assert!(since <= gone_at, "{since} is after {gone_at}");
    for name in [&billing, &orders] {
        house.unsubscribe(name, "?waiting=discard").await.ok();
    }
}

/// Nor since all others were, when the loss of one cannot be noted; and these are seen on, each by itself.
#[sqlx::test]
async fn a_loss_that_cannot_be_noted_moves_no_other_and_is_not_forgotten(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let (admin, held, orders) = (Admin::new().await, unique("held"), unique("orders"));
    for name in [&held, &orders] {
        house.register(name, &wish(&["user.created"], &[])).await.ok();
    }
    house.looks_again().await;
    house.hold(&held).await;
    admin.delete_queue(&held).await;
    let gone_at: OffsetDateTime = sqlx::query_scalar("select now()").fetch_one(&house.db).await.unwrap();
    house.logs(&["WARN", &held, "cannot be declared", "P0001"]).await;
    eventually("the other to be seen later", async || {
        let seen_at = "select seen_at from subscriptions where name = $1";
        let seen_at: Option<OffsetDateTime> =
            sqlx::query_scalar(seen_at).bind(&orders).fetch_one(&house.db).await.unwrap();
        if seen_at > Some(gone_at) { Ok(()) } else { Err(seen_at) }
    })
    .await;
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    house.let_go().await;
    house.comes_to_be(&held, "queue_lost").await;
    let (held_since, orders_since) = (house.missing_since(&held).await, house.missing_since(&orders).await);
    assert!(held_since <= gone_at && gone_at < orders_since, "{held_since}, {gone_at}, {orders_since}");
    for name in [&held, &orders] {
        house.unsubscribe(name, "?waiting=discard").await.ok();
    }
}
