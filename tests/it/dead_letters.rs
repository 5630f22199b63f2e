//! Dead letters: what a subscription could not handle is kept, shown, put back and dropped, and never lost.

use std::collections::BTreeSet;

use lapin::{
    BasicProperties,
    options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::{
    envelope::{Event, Notice},
    letter::Reason,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, Service, eventually, tidings},
    sessions,
    subscribed::{Consumer, Subscribed, failed, header, notice},
};

fn news(user_id: Uuid) -> Notice {
    Notice {
        message_id: Uuid::new_v4(),
        user_id,
        version: 2,
        event: Event::Updated { changed_fields: vec!["city".parse().unwrap()] },
        occurred_at: OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
    }
}

async fn list(house: &House, orders: &Subscribed, query: &str) -> Value {
    house.page(&orders.path(&format!("dead-letters{query}"))).await.ok().body
}

async fn redrive(house: &House, orders: &Subscribed, which: Value) -> Answer {
    Answer::to(house.request(Method::POST, &orders.path("dead-letters:redrive")).json(&which)).await
}

async fn delete(house: &House, path: &str) -> Answer {
    Answer::to(house.request(Method::DELETE, path)).await
}

/// Waits until so many letters are kept, and none is left in the dead-letter queue.
async fn await_letters(house: &House, orders: &Subscribed, count: i64) -> Value {
    eventually("dead letters", async || {
        let page = list(house, orders, "?limit=500").await;
        let dead = orders.waiting_dead().await;
        if page["total"] == count && dead == 0 { Ok(page) } else { Err((page["total"].clone(), dead)) }
    })
    .await
}

async fn bury(orders: &Subscribed, count: usize) -> Vec<Notice> {
    let notices: Vec<Notice> = (0..count).map(|_| news(Uuid::new_v4())).collect();
    for notice in &notices {
        orders.bury_notice(notice, Reason::HandlerFailed).await;
    }
    notices
}

fn ids<'a>(notices: impl IntoIterator<Item = &'a Notice>) -> BTreeSet<String> {
    notices.into_iter().map(|notice| notice.message_id.to_string()).collect()
}

fn listed(page: &Value) -> BTreeSet<String> {
    let letters = page["dead_letters"].as_array().unwrap().iter();
    letters.map(|letter| letter["message_id"].as_str().unwrap().to_owned()).collect()
}

#[sqlx::test]
async fn a_letter_is_kept_and_shown_with_its_reason_and_without_data(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["profile.updated"], &[]).await;
    let consumer = Consumer::of(&orders).await;
    consumer.break_down();
    let ana = house.user(json!({ "city": "Riga" })).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    let page = await_letters(&house, &orders, 1).await;
    let letter = &page["dead_letters"][0];
    house.settle().await;
    let told = house.audit.heard()[1].clone();
    assert_eq!(letter["message_id"], told.message_id.to_string());
    assert_eq!(letter["user_id"], ana.to_string());
    assert_eq!((&letter["version"], &letter["event"]), (&json!(2), &json!("profile.updated")));
    assert_eq!(letter["changed_fields"], json!(["city"]));
    assert_eq!((&letter["reason"], &letter["attempts"]), (&json!("handler_failed"), &json!(3)));
    assert!(letter["failed_at"].is_string() && letter["age_s"].as_i64().unwrap() < 60, "{letter}");
    assert_eq!((&letter["redriven"], &page["next"]), (&json!(0), &Value::Null));
    assert_eq!(page["by_reason"], json!({ "handler_failed": 1 }));
    let sample = format!("tidings_dead_letters{{subscription=\"{}\"}}", orders.name);
    assert!((house.metric(&sample).await - 1.0).abs() < f64::EPSILON);
    house.logs(&["dead letters have come", "handler_failed: 1"]).await;
    orders.end().await;
}

/// Told of now and then only, but in the end of each.
#[sqlx::test]
async fn every_letter_is_told_of_in_the_log(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let told = |log: &str| {
        let lines = log.lines().filter(|line| line.contains("dead letters have come"));
        lines
            .filter_map(|line| line.rsplit_once("handler_failed: ")?.1.trim_matches('"').parse::<usize>().ok())
            .sum::<usize>()
    };
    for count in 1..=3 {
        bury(&orders, 1).await;
        await_letters(&house, &orders, count).await;
    }
    eventually("the first letter in the log", async || match told(&house.service.log()) {
        0 => Err(()),
        _ => Ok(()),
    })
    .await;
    house.service.signal("-TERM").await;
    assert_eq!(house.service.left().await, Some(0));
    eventually("three letters in the log", async || match house.service.log() {
        log if told(&log) == 3 => Ok(()),
        log => Err(log),
    })
    .await;
    orders.end().await;
}

/// However many there are, and however large: few of them are in memory at once.
#[sqlx::test]
async fn letters_that_cannot_be_kept_yet_stay_at_the_broker(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_NO_RELAY", "true")]).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    bury(&orders, 100).await;
    let mut held = house.db.begin().await.unwrap();
    sqlx::query("lock table dead_letters").execute(&mut *held).await.unwrap();
    let relay = house.another(&["relay"]).await;
    sessions::blocked(&house.db, "tidings collector").await;
    assert!(orders.waiting_dead().await >= 80);
    held.rollback().await.unwrap();
    await_letters(&house, &orders, 100).await;
    drop(relay);
    orders.end().await;
}

/// A consumer that fails for ever, or its password in the wrong hands, fills its own queue and not the disk of the master data.
#[sqlx::test]
async fn no_more_letters_are_collected_than_there_may_be(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    house.service.kill().await;
    let fill = "
        insert into dead_letters (subscription, message_id, reason, attempts, redriven, size_bytes)
        select $1, gen_random_uuid(), 'malformed', 1, 0, 2 from generate_series(1, 100000)";
    sqlx::query(fill).bind(orders.name.as_str()).execute(&house.db).await.unwrap();
    bury(&orders, 1).await;
    house.restart().await;
    house.logs(&["100000 of them are kept", orders.name.as_str()]).await;
    let page = list(&house, &orders, "?limit=1").await;
    assert_eq!((&page["total"], orders.waiting_dead().await), (&json!(100_000), 1));
    let one = page["dead_letters"][0]["message_id"].as_str().unwrap();
    delete(&house, &orders.path(&format!("dead-letters/{one}"))).await.ok();
    await_letters(&house, &orders, 100_000).await;
    orders.end().await;
}

#[sqlx::test]
async fn letters_are_paged_and_filtered_in_the_order_in_which_they_came(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let mut sent = vec![];
    for place in 0..5 {
        let notice = news(Uuid::new_v4());
        let reason = if place == 3 { Reason::HandlerPanicked } else { Reason::FetchFailed };
        orders.bury_notice(&notice, reason).await;
        sent.push(notice.message_id.to_string());
    }
    await_letters(&house, &orders, 5).await;
    let (mut seen, mut after) = (vec![], String::new());
    loop {
        let page = list(&house, &orders, &format!("?limit=2{after}")).await;
        seen.extend(page["dead_letters"].as_array().unwrap().iter().map(|letter| letter["message_id"].clone()));
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(seen, sent);
    let panicked = list(&house, &orders, "?reason=handler_panicked").await;
    assert_eq!(listed(&panicked), BTreeSet::from([sent[3].clone()]));
    assert_eq!((&panicked["total"], &panicked["by_reason"]["fetch_failed"]), (&json!(5), &json!(4)));
    orders.end().await;
}

#[sqlx::test]
async fn what_is_no_notice_is_kept_without_its_content(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "trace")]).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let canary = format!("canary{}", Uuid::new_v4().simple());
    let mut headers = FieldTable::default();
    headers.insert("city".into(), AMQPValue::LongString(canary.as_str().into()));
    let own_id = Uuid::new_v4();
    let properties = BasicProperties::default().with_headers(headers).with_app_id(canary.as_str().into());
    let with_id = properties.clone().with_message_id(own_id.to_string().into());
    orders.bury(with_id, canary.as_bytes()).await;
    orders.bury(properties, format!("{{\"city\":\"{canary}\"}}").as_bytes()).await;
    let page = await_letters(&house, &orders, 2).await;
    assert_eq!(page["by_reason"], json!({ "malformed": 2 }));
    assert!(listed(&page).contains(&own_id.to_string()), "{page}");
    let first = &page["dead_letters"][0];
    assert_eq!(
        (&first["user_id"], &first["event"], &first["size_bytes"]),
        (&Value::Null, &Value::Null, &json!(canary.len()))
    );
    let kept: Vec<String> =
        sqlx::query_scalar("select dead_letters::text from dead_letters").fetch_all(&house.db).await.unwrap();
    assert!(kept.len() == 2 && !kept.concat().contains(&canary), "{kept:?}");
    let log = house.service.log();
    assert!(!page.to_string().contains(&canary) && !log.contains(&canary) && log.len() > 100, "{log}");

    let done = redrive(&house, &orders, json!({ "all": true })).await.ok().body;
    assert_eq!(done, json!({ "redriven": 0, "left": 0, "not_redrivable": 2 }));
    orders.end().await;
}

/// A time whose year in UTC has no four digits: no other letter has to wait behind it, and it is none of a page or a redrive.
#[sqlx::test]
async fn a_time_that_cannot_be_written_again_holds_up_no_letter(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let mut sent = vec![];
    for time in ["0000-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00"] {
        let notice = news(Uuid::new_v4());
        let (properties, body) = notice.to_message("urn:test");
        let mut headers = failed(properties.clone(), Reason::HandlerFailed).headers().clone().unwrap_or_default();
        for name in ["cloudEvents_time", "tidings-failed-at"] {
            headers.insert(name.into(), AMQPValue::LongString(time.into()));
        }
        orders.bury(properties.with_headers(headers), &body).await;
        sent.push(notice);
    }
    let page = await_letters(&house, &orders, 2).await;
    assert_eq!(listed(&page), ids(&sent));
    for letter in page["dead_letters"].as_array().unwrap() {
        assert_eq!((&letter["reason"], &letter["failed_at"]), (&json!("handler_failed"), &Value::Null), "{letter}");
    }
    let done = redrive(&house, &orders, json!({ "all": true })).await.ok().body;
    assert_eq!(done, json!({ "redriven": 2, "left": 0, "not_redrivable": 0 }));
    // What the message says of its time besides, in seconds, holds.
    assert_eq!(orders.take().await.iter().map(notice).collect::<Vec<_>>(), sent);
    orders.end().await;
}

/// A forged message must not take a real one's place.
#[sqlx::test]
async fn a_malformed_message_does_not_cover_up_a_notice_of_the_same_id(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let notice = bury(&orders, 1).await.remove(0);
    await_letters(&house, &orders, 1).await;
    let forged = BasicProperties::default().with_message_id(notice.message_id.to_string().into());
    orders.bury(forged, b"nothing").await;
    let marker = bury(&orders, 1).await.remove(0);
    let page = await_letters(&house, &orders, 2).await;
    assert_eq!(listed(&page), ids([&notice, &marker]));
    assert_eq!(page["by_reason"], json!({ "handler_failed": 2 }));
    orders.end().await;
}

#[sqlx::test]
async fn once_the_fault_is_mended_a_redrive_converges(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["user.created"], &[]).await;
    let consumer = Consumer::of(&orders).await;
    consumer.break_down();
    let mut users = BTreeSet::new();
    for _ in 0..20 {
        users.insert(house.user(json!({})).await);
    }
    await_letters(&house, &orders, 20).await;
    // Not mended yet: they come back, none is lost, and they say that they were tried again.
    let done = redrive(&house, &orders, json!({ "all": true })).await.ok().body;
    assert_eq!(done["redriven"], 20);
    let again = eventually("all letters to be back", async || {
        let page = await_letters(&house, &orders, 20).await;
        let redriven = page["dead_letters"].as_array().unwrap().iter().filter(|letter| letter["redriven"] == 1).count();
        if redriven == 20 { Ok(page) } else { Err(redriven) }
    })
    .await;
    assert_eq!(listed(&again).len(), 20);

    consumer.mend();
    let done = redrive(&house, &orders, json!({ "reason": "handler_failed" })).await.ok().body;
    assert_eq!(done, json!({ "redriven": 20, "left": 0, "not_redrivable": 0 }));
    eventually("all to be handled", async || {
        let handled: BTreeSet<Uuid> = consumer.handled().iter().map(|notice| notice.user_id).collect();
        if handled == users { Ok(()) } else { Err(handled.len()) }
    })
    .await;
    await_letters(&house, &orders, 0).await;
    orders.end().await;
}

/// The letter comes back before its row is dropped: the row must stay.
#[sqlx::test]
async fn a_letter_that_fails_again_at_once_is_not_lost(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let notices = bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    // Holds the row, so that its second arrival is kept between the confirm and the dropping.
    let mut holder = house.db.begin().await.unwrap();
    sqlx::query("select from dead_letters for update").execute(&mut *holder).await.unwrap();
    let (house, orders) = (&house, &orders);
    let redriving = redrive(house, orders, json!({ "all": true }));
    let comes_back = async {
        orders.await_waiting(1).await;
        eventually("the dropping to wait", async || {
            let waiting =
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%dead_letters%'";
            let waiting: i64 = sqlx::query_scalar(waiting).fetch_one(&house.db).await.unwrap();
            if waiting == 1 { Ok(()) } else { Err(waiting) }
        })
        .await;
        // As the collector does.
        let come_back = "update dead_letters set place = default where message_id = $1";
        sqlx::query(come_back).bind(notices[0].message_id).execute(&mut *holder).await.unwrap();
        holder.commit().await.unwrap();
    };
    let (done, ()) = tokio::join!(redriving, comes_back);
    assert_eq!(done.ok().body["redriven"], 1);
    assert_eq!(listed(&list(house, orders, "").await), ids(&notices), "it is still there");
    orders.undeclare().await;
}

#[sqlx::test]
async fn a_redriven_message_is_the_one_that_was_told_without_its_failures(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 2).await;
    await_letters(&house, &orders, 2).await;
    let done = redrive(&house, &orders, json!({ "message_ids": [sent[1].message_id, Uuid::new_v4()] })).await.ok();
    assert_eq!(done.body, json!({ "redriven": 1, "left": 0, "not_redrivable": 0 }));
    assert_eq!(listed(&list(&house, &orders, "").await), ids([&sent[0]]));
    let back = orders.take().await;
    assert_eq!(back.iter().map(notice).collect::<Vec<_>>(), [sent[1].clone()]);
    assert_eq!(back[0].properties.delivery_mode(), &Some(2));
    assert_eq!(header(&back[0], "tidings-redriven").as_deref(), Some("1"));
    assert_eq!((header(&back[0], "tidings-reason"), header(&back[0], "tidings-attempts")), (None, None));
    house.settle().await;
    assert!(house.audit.heard().is_empty(), "nobody else heard of it");
    orders.end().await;
}

/// What a backfill told counts whatever is held, after a restore of the owner for one; put back it says so still.
#[sqlx::test]
async fn a_redriven_message_of_a_backfill_is_one_still(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let (backfill, [told, hostile]) = (Uuid::new_v4(), [news(Uuid::new_v4()), news(Uuid::new_v4())]);
    orders.bury_backfilled(&told, &backfill.to_string()).await;
    orders.bury_backfilled(&hostile, "Ana").await;
    await_letters(&house, &orders, 2).await;
    redrive(&house, &orders, json!({ "all": true })).await.ok();
    let back = orders.take().await;
    assert_eq!(back.iter().map(notice).collect::<Vec<_>>(), [told, hostile]);
    assert_eq!(header(&back[0], "tidings-backfill"), Some(backfill.to_string()));
    assert_eq!(header(&back[0], "tidings-redriven").as_deref(), Some("1"));
    assert_eq!(header(&back[1], "tidings-backfill"), None, "an id, or nothing");
    orders.end().await;
}

#[sqlx::test]
async fn two_redrives_at_once_lose_nothing_and_go_a_thousand_at_a_time(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 1_100).await;
    await_letters(&house, &orders, 1_100).await;
    let (one, other) = tokio::join!(
        redrive(&house, &orders, json!({ "all": true })),
        redrive(&house, &orders, json!({ "all": true })),
    );
    for done in [one.ok().body, other.ok().body] {
        assert!(done["redriven"].as_i64().unwrap() <= 1_000, "{done}");
    }
    redrive(&house, &orders, json!({ "all": true })).await.ok();
    assert_eq!(list(&house, &orders, "").await["total"], 0);
    let back: Vec<Notice> = orders.take().await.iter().map(notice).collect();
    assert_eq!(ids(&back), ids(&sent));
    orders.end().await;
}

#[sqlx::test]
async fn letters_are_dropped_only_on_purpose(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 3).await;
    orders.bury(BasicProperties::default(), b"nothing").await;
    await_letters(&house, &orders, 4).await;
    for query in ["", "?confirm=other", "?reason=malformed"] {
        let refused = delete(&house, &orders.path(&format!("dead-letters{query}"))).await;
        assert_eq!(refused.refusal(409), "confirmation_required");
        let detail = refused.body["detail"].as_str().unwrap();
        let count = if query.contains("malformed") { "1 dead" } else { "4 dead" };
        assert!(detail.contains(count) && detail.contains(&format!("confirm={}", orders.name)), "{detail}");
    }
    assert_eq!(list(&house, &orders, "").await["total"], 4);
    let confirm = format!("dead-letters?confirm={}", orders.name);
    let purged = delete(&house, &orders.path(&format!("{confirm}&reason=malformed"))).await.ok();
    assert_eq!(purged.body, json!({ "purged": 1 }));
    let one = orders.path(&format!("dead-letters/{}", sent[1].message_id));
    assert_eq!(delete(&house, &one).await.status, 204);
    assert_eq!(delete(&house, &one).await.refusal(404), "dead_letter_not_found");
    assert_eq!(listed(&list(&house, &orders, "").await), ids([&sent[0], &sent[2]]));
    assert_eq!(delete(&house, &orders.path(&confirm)).await.ok().body, json!({ "purged": 2 }));
    assert_eq!(list(&house, &orders, "").await["total"], 0);
    orders.end().await;
}

/// Who drops thousands drops those that he has heard of: what comes meanwhile stays.
#[sqlx::test]
async fn a_letter_that_comes_while_others_are_dropped_is_kept(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    // More than go at once.
    let fill = "
        insert into dead_letters (subscription, message_id, reason, attempts, redriven, size_bytes)
        select $1, gen_random_uuid(), 'malformed', 1, 0, 2 from generate_series(1, 5000)";
    sqlx::query(fill).bind(orders.name.as_str()).execute(&house.db).await.unwrap();
    let mut holder = house.db.begin().await.unwrap();
    let hold = "select from dead_letters order by place limit 1 for update";
    sqlx::query(hold).execute(&mut *holder).await.unwrap();
    let path = orders.path(&format!("dead-letters?confirm={}", orders.name));
    let (purged, ()) = tokio::join!(delete(&house, &path), async {
        sessions::blocked(&house.db, "tidings records").await;
        let came = "
            insert into dead_letters (subscription, message_id, reason, attempts, redriven, size_bytes)
            values ($1, gen_random_uuid(), 'handler_failed', 4, 0, 2)";
        sqlx::query(came).bind(orders.name.as_str()).execute(&mut *holder).await.unwrap();
        holder.commit().await.unwrap();
    });
    assert_eq!(purged.ok().body, json!({ "purged": 5_000 }));
    assert_eq!(list(&house, &orders, "").await["by_reason"], json!({ "handler_failed": 1 }));
    orders.end().await;
}

#[sqlx::test]
async fn what_cannot_be_done_is_refused(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let unknown = "/v1/subscriptions/nobody/dead-letters";
    assert_eq!(house.page(unknown).await.refusal(404), "subscription_not_found");
    assert_eq!(delete(&house, &format!("{unknown}?confirm=nobody")).await.refusal(404), "subscription_not_found");
    assert_eq!(delete(&house, &format!("{unknown}/{}", Uuid::new_v4())).await.refusal(404), "subscription_not_found");
    let nobodys = house.request(Method::POST, &format!("{unknown}:redrive")).json(&json!({ "all": true }));
    assert_eq!(Answer::to(nobodys).await.refusal(404), "subscription_not_found");
    assert_eq!(house.page("/v1/subscriptions/Nobody/dead-letters").await.refusal(400), "invalid_subscription_name");
    let id = Uuid::new_v4();
    for wrong in ["7".to_owned(), id.simple().to_string(), id.urn().to_string(), format!("%7B{id}%7D")] {
        let refused = delete(&house, &orders.path(&format!("dead-letters/{wrong}"))).await;
        assert_eq!(refused.refusal(400), "invalid_message_id", "{wrong}");
    }
    for query in ["?limit=0", "?limit=501", "?reason=bad", "?page=1"] {
        let refused = house.page(&orders.path(&format!("dead-letters{query}"))).await;
        assert_eq!(refused.refusal(400), "invalid_query", "{query}");
    }
    assert_eq!(house.page(&orders.path("dead-letters?after=x")).await.refusal(400), "invalid_cursor");
    for wrong in [
        json!({}),
        json!({ "all": false }),
        json!({ "all": true, "reason": "malformed" }),
        json!({ "reason": "bad" }),
        json!({ "message_ids": ["7"] }),
        json!({ "message_ids": [id.simple().to_string()] }),
        json!({ "message_ids": [id, id.braced().to_string()] }),
        json!({ "message_ids": vec![Uuid::new_v4(); 1_001] }),
        json!({ "everything": true }),
    ] {
        assert_eq!(redrive(&house, &orders, wrong.clone()).await.refusal(422), "body_invalid", "{wrong}");
    }
    orders.end().await;
}

#[sqlx::test]
async fn letters_are_kept_while_the_queue_or_the_broker_is_away(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 2).await;
    await_letters(&house, &orders, 2).await;
    let all = || redrive(&house, &orders, json!({ "all": true }));
    // The queue is gone.
    orders.channel.queue_delete(orders.name.queue().into(), QueueDeleteOptions::default()).await.unwrap();
    assert_eq!(all().await.refusal(409), "queue_lost");
    orders.declare().await;
    // Its exchange is gone.
    let exchange = orders.name.as_str();
    orders.channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
    assert_eq!(all().await.refusal(409), "queue_lost");
    // The exchange is there, and leads nowhere.
    let declared = orders.channel.exchange_declare(
        exchange.into(),
        lapin::ExchangeKind::Direct,
        lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() },
        FieldTable::default(),
    );
    declared.await.unwrap();
    assert_eq!(all().await.refusal(409), "queue_lost");
    house.broker.down();
    assert_eq!(all().await.refusal(503), "broker_unavailable");
    house.broker.up();
    assert_eq!(listed(&list(&house, &orders, "").await), ids(&sent));
    orders.declare().await;
    eventually("the broker to be back", async || {
        let done = all().await;
        if done.body["redriven"] == 2 { Ok(()) } else { Err(done.body) }
    })
    .await;
    assert_eq!(orders.waiting().await, 2);
    orders.end().await;
}

/// In the place of its queue stands one that takes nothing.
#[sqlx::test]
async fn a_letter_that_is_refused_is_kept(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 2).await;
    await_letters(&house, &orders, 2).await;
    let (full, exchange) = (format!("{}.full", orders.name), orders.name.as_str());
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let mut takes_nothing = FieldTable::default();
    takes_nothing.insert("x-max-length".into(), AMQPValue::LongInt(0));
    takes_nothing.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    orders.channel.queue_declare(full.as_str().into(), exclusive, takes_nothing).await.unwrap();
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    orders.channel.queue_bind(full.as_str().into(), exchange.into(), "work".into(), options, none).await.unwrap();
    let queue = orders.name.queue();
    orders.channel.queue_unbind(queue.into(), exchange.into(), "work".into(), FieldTable::default()).await.unwrap();
    let all = || redrive(&house, &orders, json!({ "all": true }));
    assert_eq!(all().await.ok().body["redriven"], 0);
    assert_eq!(listed(&list(&house, &orders, "").await), ids(&sent));
    orders.channel.queue_delete(full.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    orders.declare().await;
    assert_eq!(all().await.ok().body["redriven"], 2);
    assert_eq!(orders.waiting().await, 2);
    orders.end().await;
}

#[sqlx::test]
async fn an_instance_without_a_broker_shows_letters_and_redrives_none(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    let api = house.another(&["serve", "--no-relay"]).await;
    let http = house::http();
    let shown = Answer::to(http.get(format!("{}{}", api.url, orders.path("dead-letters")))).await.ok();
    assert_eq!(shown.body["total"], 1);
    let redriven = http.post(format!("{}{}", api.url, orders.path("dead-letters:redrive")));
    assert_eq!(Answer::to(redriven.json(&json!({ "all": true }))).await.refusal(503), "no_broker_here");
    orders.end().await;
}

/// Killed at any moment: each letter is in the table or in the queue, and in the end once in the table.
#[sqlx::test]
async fn a_collector_that_is_killed_loses_nothing(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let mut sent = bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    for kept in [100, 300] {
        let more = tokio::join!(bury(&orders, 400), async {
            eventually("letters to be kept", async || {
                let now: i64 =
                    sqlx::query_scalar("select count(*) from dead_letters").fetch_one(&house.db).await.unwrap();
                if now >= kept { Ok(()) } else { Err(now) }
            })
            .await;
            house.service.kill().await;
        })
        .0;
        sent.extend(more);
        house.restart().await;
    }
    await_letters(&house, &orders, sent.len() as i64).await;
    let kept: Vec<Uuid> = sqlx::query_scalar("select message_id from dead_letters").fetch_all(&house.db).await.unwrap();
    assert_eq!(kept.iter().map(Uuid::to_string).collect::<BTreeSet<_>>(), ids(&sent));
    orders.end().await;
}

/// A letter is acknowledged only when it is kept: while the table cannot be written it stays with the broker.
#[sqlx::test]
async fn a_letter_is_not_acknowledged_before_it_is_kept(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let first = bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    let mut holder = house.db.begin().await.unwrap();
    sqlx::query("lock table dead_letters in exclusive mode").execute(&mut *holder).await.unwrap();
    let second = bury(&orders, 1).await;
    crate::sessions::blocked(&house.db, "tidings collector").await;
    house.service.kill().await;
    holder.rollback().await.unwrap();
    eventually("the letter to be back", async || match orders.waiting_dead().await {
        1 => Ok(()),
        other => Err(other),
    })
    .await;
    house.restart().await;
    let page = await_letters(&house, &orders, 2).await;
    assert_eq!(listed(&page), ids(first.iter().chain(&second)));
    orders.end().await;
}

#[sqlx::test]
async fn a_queue_that_is_deleted_and_declared_again_is_collected_again(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    orders.undeclare().await;
    orders.declare().await;
    bury(&orders, 1).await;
    await_letters(&house, &orders, 2).await;
    // A subscription that is new while the service runs, and the neighbour goes on.
    let bills = Subscribed::to(&house, "bills", &["#"], &[]).await;
    bury(&bills, 2).await;
    await_letters(&house, &bills, 2).await;
    // Letters go with their subscription.
    sqlx::query("delete from subscriptions where name = $1")
        .bind(bills.name.as_str())
        .execute(&house.db)
        .await
        .unwrap();
    let kept: i64 = sqlx::query_scalar("select count(*) from dead_letters").fetch_one(&house.db).await.unwrap();
    assert_eq!(kept, 2);
    orders.end().await;
    bills.end().await;
}

#[sqlx::test]
async fn another_instance_collects_when_the_leading_one_is_gone(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    bury(&orders, 1).await;
    await_letters(&house, &orders, 1).await;
    let _other: Service = house.another(&["relay"]).await;
    house.service.kill().await;
    bury(&orders, 1).await;
    eventually("the letter to be kept", async || {
        let kept: i64 = sqlx::query_scalar("select count(*) from dead_letters").fetch_one(&house.db).await.unwrap();
        if kept == 2 { Ok(()) } else { Err(kept) }
    })
    .await;
    orders.end().await;
}

#[sqlx::test]
async fn operators_do_the_same_on_the_command_line(db: PgPool) {
    let house = House::open(db).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let sent = bury(&orders, 3).await;
    await_letters(&house, &orders, 3).await;
    let name = orders.name.as_str();
    let run = async |arguments: &[&str]| {
        let command = [&["subscription", "dead-letters"], arguments].concat();
        let done = tidings(&command, house.settings()).output().await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (done.status.code(), text(&done.stdout), text(&done.stderr))
    };
    let (code, out, talk) = run(&["list", name, "--json"]).await;
    assert_eq!((code, out.lines().count()), (Some(0), 3), "{talk}");
    let first: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    assert_eq!(first["message_id"], sent[0].message_id.to_string());
    assert!(talk.contains("3 handler_failed"), "{talk}");
    let (_, out, _) = run(&["list", name]).await;
    assert!(out.contains("handler_failed, 3 attempts") && out.contains("profile.updated of"), "{out}");

    let (code, out, _) = run(&["redrive", name, "--message", &sent[0].message_id.to_string()]).await;
    assert_eq!((code, out.trim(), orders.waiting().await), (Some(0), "1", 1));
    let (code, _, talk) = run(&["purge", name]).await;
    assert_eq!(code, Some(1));
    assert!(talk.contains("2 dead letters") && talk.contains("hint: --yes"), "{talk}");
    let (code, out, _) = run(&["purge", name, "--yes"]).await;
    assert_eq!((code, out.trim()), (Some(0), "2"));
    let (code, _, talk) = run(&["redrive", name]).await;
    assert_eq!(code, Some(2), "{talk}");
    let (code, _, talk) = run(&["list", "nobody"]).await;
    assert_eq!(code, Some(1));
    assert!(talk.contains("there is no subscription of this name"), "{talk}");
    orders.end().await;
}
