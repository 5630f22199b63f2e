//! Watch: what is registered comes to be declared, each for itself; who listens and what waits is seen, and only what may expires.

use lapin::{options::QueueDeclareOptions, types::FieldTable};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    house::{House, eventually},
    hurt::HurtBroker,
    registry::{Admin, EVERY_SECOND, parts, unique, wish},
    sessions,
};

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

// One keeps the others from nothing.

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

/// Nor when it is the database that refuses to note what was declared.
#[sqlx::test]
async fn one_that_the_database_refuses_keeps_the_watch_from_nobody_else(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    // In this order.
    let (admin, held, orders) = (Admin::new().await, unique("held"), unique("orders"));
    house.register(&orders, &wish(&["user.created"], &[])).await.ok();
    house.hold(&held).await;
    house.has_registered(&held, 0).await;
    house.logs(&["WARN", &held, "cannot be declared", "P0001"]).await;
    admin.delete_queue(&orders).await;
    house.comes_to_be(&orders, "queue_lost").await;
    let undeclared = format!("tidings_subscription_undeclared{{subscription=\"{held}\"}} 1");
    for sample in ["tidings_subscriptions_watching 1", &undeclared] {
        eventually(sample, async || {
            let text = house.request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
            if text.lines().any(|line| line == sample) { Ok(()) } else { Err(text) }
        })
        .await;
    }
    assert_eq!(house.subscription(&held).await.body["state"], "undeclared");
    house.let_go().await;
    house.comes_to_be(&held, "active").await;
    let log = house.service.log();
    assert_eq!(log.matches("cannot be declared").count(), 1, "told once: {log}");
    assert!(!log.contains("begins anew"), "{log}");
    for name in [held, orders] {
        house.unsubscribe(&name, "?waiting=discard").await.ok();
    }
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

/// Nobody has listened for a month but half a day, and its owner was told so: it was to expire in half a day.
async fn about_to_expire(house: &House, name: &str) -> OffsetDateTime {
    let mut wish = wish(&["user.created"], &[]);
    wish["expires_after_s"] = json!(30 * 24 * 3600);
    house.register(name, &wish).await.ok();
    house.looks_again().await;
    let ages = "
        update subscriptions
           set unattended_since = now() - interval '29 days 12 hours', expiry_warned_at = now() - interval '12 hours'
         where name = $1
        returning expiry_warned_at
    ";
    let warned_at = sqlx::query_scalar(ages).bind(name).fetch_one(&house.db).await.unwrap();
    house.comes_to_be(name, "expiring").await;
    warned_at
}

/// That it would be deleted in half a day is no warning of its being deleted now.
#[sqlx::test]
async fn a_shorter_expiry_is_warned_of_anew(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let orders = unique("orders");
    about_to_expire(&house, &orders).await;
    let mut wish = wish(&["user.created"], &[]);
    wish["expires_after_s"] = json!(3600);
    house.register(&orders, &wish).await.ok();
    house.looks(2).await;
    let now = house.comes_to_be(&orders, "expiring").await;
    let expires_at = OffsetDateTime::parse(now["expires_at"].as_str().unwrap(), &Rfc3339).unwrap();
    let notice = expires_at - OffsetDateTime::now_utc();
    assert!(notice > Duration::minutes(25), "{now}");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}

/// Nor is one that the watch had seen, and writes down when the new wish is there already.
#[sqlx::test]
async fn a_look_from_before_a_new_wish_changes_nothing_of_it(db: PgPool) {
    let house = House::with(db, &[EVERY_SECOND]).await;
    let orders = unique("orders");
    let warned_at = about_to_expire(&house, &orders).await;
    let mut put = house.db.begin().await.unwrap();
    let wish = "update subscriptions set revision = revision + 1, expires_after_s = 3600, expiry_warned_at = null where name = $1";
    sqlx::query(wish).bind(&orders).execute(&mut *put).await.unwrap();
    // What is new to the watch, so that it has something to write down.
    house.user(json!({})).await;
    sessions::blocked(&house.db, "tidings subscriptions watch").await;
    put.commit().await.unwrap();
    house.looks_again().await;
    let warned = "select expiry_warned_at from subscriptions where name = $1";
    let warned = sqlx::query_scalar(warned).bind(&orders).fetch_optional(&house.db).await.unwrap();
    let warned: Option<OffsetDateTime> = warned.expect("it is deleted unwarned");
    assert!(warned.is_none_or(|at| at > warned_at + Duration::hours(11)), "{warned:?}, and before {warned_at}");
    house.unsubscribe(&orders, "?waiting=discard").await.ok();
}
