//! Relay: any number of them, one leads; what it owes outlives it.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool, Postgres, pool::PoolConnection};
use uuid::Uuid;

use crate::{
    house::{House, Service, eventually},
    load::{self, Load},
    sessions,
};

/// A House whose service leaves the telling to these relays.
async fn with_relays(db: PgPool, count: usize) -> (House, Vec<Service>) {
    let house = House::with(db, &[("TIDINGS_NO_RELAY", "true")]).await;
    let mut relays = vec![];
    for _ in 0..count {
        relays.push(house.another(&["relay"]).await);
    }
    (house, relays)
}

pub async fn leads(relay: &Service) -> bool {
    measures(relay, "tidings_relay_leading 1").await
}

/// Whether this line is among its metrics.
pub async fn measures(relay: &Service, line: &str) -> bool {
    let text = reqwest::get(format!("{}/metrics", relay.url)).await.unwrap().text().await.unwrap();
    text.lines().any(|measured| measured == line)
}

/// The relays that say they lead; only when it is exactly one, its place.
pub async fn leader(relays: &[Service]) -> usize {
    eventually("one leader", async || {
        let mut leading = vec![];
        for (place, relay) in relays.iter().enumerate() {
            if leads(relay).await {
                leading.push(place);
            }
        }
        if let [one] = leading[..] { Ok(one) } else { Err(leading) }
    })
    .await
}

/// From the answer to a change until it was heard.
async fn latency(house: &House) -> Duration {
    let before = house.audit.heard().len();
    house.user(json!({ "first_name": "Ana" })).await;
    let answered = Instant::now();
    load::heard(house, before + 1).await;
    answered.elapsed()
}

#[sqlx::test]
async fn three_relays_in_fair_weather_tell_everything_once(db: PgPool) {
    let house = House::open(db).await;
    let relays = [house.another(&["relay"]).await, house.another(&["relay"]).await];
    load::watch(&house.db).await;
    let users = load::users(&house, 40).await;
    let load = Load::on(&house, &users, 16);
    load.goes_on(2_000).await;
    let answered = load.end().await;
    assert_eq!(load::all_told(&house, &answered).await, 0, "duplicates");
    let leading = [leads(&house.service).await, leads(&relays[0]).await, leads(&relays[1]).await];
    assert_eq!(leading.iter().filter(|leads| **leads).count(), 1, "{leading:?}");
}

#[sqlx::test]
async fn another_relay_takes_over_from_one_that_was_killed(db: PgPool) {
    let (house, mut relays) = with_relays(db, 3).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 4);
    while relays.len() > 1 {
        load.goes_on(50).await;
        let leading = leader(&relays).await;
        relays.remove(leading).kill().await;
    }
    leader(&relays).await;
    load.goes_on(50).await;
    let answered = load.end().await;
    load::all_told(&house, &answered).await;
}

#[sqlx::test]
async fn another_relay_takes_over_from_one_that_is_frozen_and_the_late_one_does_no_harm(db: PgPool) {
    let (house, mut relays) = with_relays(db, 2).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let leading = leader(&relays).await;
    let late = relays.remove(leading);
    let load = Load::on(&house, &users, 2);
    load.goes_on(50).await;
    late.signal("-STOP").await;
    let frozen = Instant::now();
    leader(&relays).await;
    assert!(frozen.elapsed() < Duration::from_secs(15), "{:?}", frozen.elapsed());
    load.goes_on(50).await;
    late.signal("-CONT").await;
    eventually("the late one to notice", async || if leads(&late).await { Err(()) } else { Ok(()) }).await;
    load.goes_on(50).await;
    let answered = load.end().await;
    load::all_told(&house, &answered).await;
    relays.push(late);
    leader(&relays).await;
}

#[sqlx::test]
async fn a_relay_that_lost_its_lead_claims_nothing_more(db: PgPool) {
    let (house, relays) = with_relays(db, 2).await;
    leader(&relays).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    house.settle().await;
    // One leads, and the other asks twice a second whether it may.
    assert!(sessions::terminate(&house.db, "tidings relay leader").await > 0);
    let load = Load::on(&house, &users, 4);
    load.goes_on(100).await;
    leader(&relays).await;
    let before = load.end().await;
    let duplicates = load::all_told(&house, &before).await;
    let load = Load::on(&house, &users, 4);
    load.goes_on(300).await;
    let after = load.end().await;
    assert_eq!(load::all_told(&house, &after).await, duplicates, "no new ones");
}

#[sqlx::test]
async fn a_relay_elsewhere_is_woken_by_a_hint(db: PgPool) {
    let (house, relays) = with_relays(db, 1).await;
    leader(&relays).await;
    let mut latencies = vec![];
    for _ in 0..21 {
        latencies.push(latency(&house).await);
    }
    latencies.sort();
    assert!(latencies[10] < Duration::from_millis(200), "polling alone needs 500 ms: {latencies:?}");
}

/// A relay that sees an empty table tells it nevertheless.
#[sqlx::test]
async fn what_is_committed_beside_the_relay_is_told_without_being_read(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    house.settle().await;
    let hidden_from_the_leader = "
        create policy add on outbox for insert with check (true);
        create policy see on outbox for select
          using (current_setting('application_name') not in ('tidings relay leader', 'tidings relay sweep'));
        create policy settle on outbox for delete using (true);
        alter table outbox enable row level security;
    ";
    sqlx::raw_sql(hidden_from_the_leader).execute(&house.db).await.unwrap();
    for city in ["Riga", "Oslo", "Bern"] {
        house.amend(&ana, json!({ "city": city })).await.ok();
    }
    let told = house.told(&ana).await;
    assert_eq!(told, ["user.created", "profile.updated[city]", "profile.updated[city]", "profile.updated[city]"]);
}

/// Sweeps wait until what is returned unlocks them, and the leader's session sees only events of which `visible` holds.
async fn with_slow_sweeps(house: &House, visible: &str) -> PoolConnection<Postgres> {
    let policies = format!(
        "create function slowly() returns boolean language plpgsql set lock_timeout = 0 as
           $$ begin perform pg_advisory_xact_lock_shared(1); return true; end $$;
         create policy add on outbox for insert with check (true);
         create policy see on outbox for select using (
           case current_setting('application_name')
             when 'tidings relay leader' then {visible}
             when 'tidings relay sweep' then slowly()
             else true
           end);
         create policy settle on outbox for delete using (true);
         alter table outbox enable row level security;"
    );
    sqlx::raw_sql(AssertSqlSafe(policies)).execute(&house.db).await.unwrap();
    let mut holder = house.db.acquire().await.unwrap();
    sqlx::query("select pg_advisory_lock(1)").execute(&mut *holder).await.unwrap();
    holder
}

async fn unlock(mut holder: PoolConnection<Postgres>) {
    sqlx::query("select pg_advisory_unlock(1)").execute(&mut *holder).await.unwrap();
}

#[sqlx::test]
async fn a_sweep_holds_up_nobody_and_what_it_finds_is_told_too(db: PgPool) {
    let house = House::open(db).await;
    let holder = with_slow_sweeps(&house, "traceparent <> ''").await;
    let (unseen, transaction) = load::open_change(&house.db).await;
    transaction.commit().await.unwrap();
    let ana = house.user(json!({})).await;
    let sweep = sessions::blocked(&house.db, "tidings relay sweep").await;
    for city in ["Riga", "Oslo", "Bern"] {
        house.amend(&ana, json!({ "city": city })).await.ok();
    }
    load::heard(&house, 4).await;
    assert_eq!(sessions::blocked(&house.db, "tidings relay sweep").await, sweep);
    unlock(holder).await;
    assert_eq!(house.told(&unseen).await, ["user.created"]);
    assert_eq!(house.audit.heard().len(), 5, "each once");
}

/// Whoever takes his place in the outbox first may commit last.
#[sqlx::test]
async fn while_a_sweep_is_under_way_the_events_of_one_user_leave_in_order(db: PgPool) {
    let house = House::open(db).await;
    // From now on it leads, and knows what it skips.
    house.user(json!({})).await;
    load::heard(&house, 1).await;
    sqlx::raw_sql("create table unseen (id uuid); grant select on unseen to public").execute(&house.db).await.unwrap();
    let holder = with_slow_sweeps(&house, "not exists (select from unseen where id = user_id)").await;
    let (unseen, mut transaction) = load::open_change(&house.db).await;
    sqlx::query("insert into unseen values ($1)").bind(unseen).execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let (ana, transaction) = load::open_change(&house.db).await;
    house.user(json!({})).await;
    load::heard(&house, 2).await;
    sessions::blocked(&house.db, "tidings relay sweep").await;
    transaction.commit().await.unwrap();
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    let versions = || -> Vec<i64> {
        house.audit.heard().iter().filter(|notice| notice.user_id == ana).map(|notice| notice.version).collect()
    };
    eventually("the amendment to be told", async || match versions() {
        told if told.contains(&2) => Ok(()),
        other => Err(other),
    })
    .await;
    unlock(holder).await;
    house.told(&unseen).await;
    assert_eq!(versions(), [1, 2]);
}

/// Only the sweep sees one of the events, and fails as long as there is an obstacle.
#[sqlx::test]
async fn a_sweep_that_fails_is_tried_again_and_holds_up_nobody(db: PgPool) {
    let house = House::open(db).await;
    let policies = "
        create table obstacle ();
        create function over_it() returns boolean language plpgsql as $$
        begin
          if to_regclass('obstacle') is not null then
            raise exception 'cannot get over it';
          end if;
          return true;
        end $$;
        create policy add on outbox for insert with check (true);
        create policy see on outbox for select using (
          case current_setting('application_name')
            when 'tidings relay leader' then traceparent <> ''
            when 'tidings relay sweep' then over_it()
            else true
          end);
        create policy settle on outbox for delete using (true);
        alter table outbox enable row level security;
    ";
    sqlx::raw_sql(policies).execute(&house.db).await.unwrap();
    let (unseen, transaction) = load::open_change(&house.db).await;
    transaction.commit().await.unwrap();
    let ana = house.user(json!({})).await;
    eventually("a sweep that failed", async || {
        let log = house.service.log();
        if log.contains("the outbox was not swept") { Ok(()) } else { Err(log) }
    })
    .await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    load::heard(&house, 2).await;
    sqlx::query("drop table obstacle").execute(&house.db).await.unwrap();
    assert_eq!(house.told(&unseen).await, ["user.created"]);
    assert_eq!(house.audit.heard().len(), 3, "each once");
    let log = house.service.log();
    assert!(!log.contains("session is over"), "{log}");
}

#[sqlx::test]
async fn a_relay_that_hears_no_hint_finds_the_event_by_polling(db: PgPool) {
    let (house, relays) = with_relays(db, 1).await;
    leader(&relays).await;
    let (ana, transaction) = load::open_change(&house.db).await;
    transaction.commit().await.unwrap();
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn a_relay_that_lost_its_ear_goes_on_and_listens_again(db: PgPool) {
    let (house, relays) = with_relays(db, 1).await;
    leader(&relays).await;
    latency(&house).await;
    eventually("an ear to cut off", async || match sessions::terminate(&house.db, "tidings listener").await {
        0 => Err(()),
        _ => Ok(()),
    })
    .await;
    let bea = house.user(json!({ "first_name": "Bea" })).await;
    assert_eq!(house.told(&bea).await, ["user.created"]);
    eventually("an ear", async || {
        let names = sessions::names(&house.db).await;
        if names.iter().any(|name| name == "tidings listener") { Ok(()) } else { Err(names) }
    })
    .await;
}

#[sqlx::test]
async fn a_relay_that_went_deaf_listens_again(db: PgPool) {
    let (house, relays) = with_relays(db, 1).await;
    leader(&relays).await;
    let ears = async || sessions::processes(&house.db, "tidings listener").await;
    let deaf = eventually("an ear", async || Some(ears().await).filter(|ears| !ears.is_empty()).ok_or(())).await;
    house.postgres.silence();
    eventually("another ear", async || match ears().await {
        now if now.iter().any(|ear| !deaf.contains(ear)) => Ok(()),
        now => Err(now),
    })
    .await;
}

#[sqlx::test]
async fn a_backlog_is_told_once_each_and_in_order(db: PgPool) {
    let house = House::open(db).await;
    let events = load::backlog(&house.db, 20_000).await;
    house.settle().await;
    assert!(load::heard_ids(&house) == events, "the order of the outbox, each once");
    assert_eq!(house.metric(r#"tidings_publish_results_total{result="routed"}"#).await, 20_000.0);
}

#[sqlx::test]
async fn a_relay_that_is_asked_to_leave_hands_over_in_order(db: PgPool) {
    let mut house = House::open(db).await;
    load::ready(&house).await;
    // Until it is asked to leave it cannot get further than the window of what is unconfirmed.
    house.broker.hold_answers();
    let mut events = load::heard_ids(&house);
    let ready = events.len();
    events.extend(load::backlog(&house.db, 30_000).await);
    load::heard(&house, ready + 500).await;
    house.service.signal("-TERM").await;
    let asked = Instant::now();
    eventually("it to leave", async || {
        let log = house.service.log();
        if log.contains("leaving: finishing") { Ok(()) } else { Err(log) }
    })
    .await;
    house.broker.up();
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert!(house.pending().await > 0, "it left in the middle of the backlog");
    house.restart().await;
    house.settle().await;
    assert!(load::heard_ids(&house) == events, "the order of the outbox, each once");
}

#[sqlx::test]
async fn no_transaction_is_open_while_the_broker_is_waited_for(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    house.broker.hold_answers();
    load::users(&house, 10).await;
    load::heard(&house, 10).await;
    let heard = Instant::now();
    sessions::none_in_transaction(&house.db).await;
    // Later it would only be because the connection to the broker was given up.
    assert!(heard.elapsed() < Duration::from_secs(5), "{:?}", heard.elapsed());
    assert_eq!(house.pending().await, 10, "the confirms were still held");
}

#[sqlx::test]
async fn a_leader_says_that_it_lives_while_the_broker_is_waited_for(db: PgPool) {
    const LEADER: &str = "tidings relay leader";
    let house = House::open(db).await;
    sessions::asked(&house.db, LEADER, "from outbox").await;
    house.broker.hold_answers();
    // Nothing is to be told: what it waits for is whether the exchange is still there.
    sessions::asked(&house.db, LEADER, "pg_sequence_last_value").await;
}

#[sqlx::test]
async fn a_database_that_comes_back_is_read_on(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 4).await;
    let load = Load::on(&house, &users, 4);
    for _ in 0..3 {
        load.goes_on(50).await;
        house.postgres.down();
        eventually("an unready instance", async || {
            let ready = house.page("/readyz").await;
            if ready.status == 503 { Ok(()) } else { Err(ready) }
        })
        .await;
        house.postgres.up();
    }
    load.goes_on(50).await;
    let answered = load.end().await;
    load::ready(&house).await;
    load::all_told(&house, &answered).await;
}

#[sqlx::test]
async fn a_frozen_network_to_the_database_delays_the_telling_and_no_more(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    load::users(&house, 2).await;
    house.settle().await;
    house.postgres.freeze();
    let never: Uuid = Uuid::new_v4();
    let asked = house.get(&never).await;
    assert_eq!(asked.refusal(503), "database_unavailable");
    house.postgres.up();
    load::users(&house, 2).await;
    assert_eq!(load::all_told(&house, &[]).await, 0, "duplicates");
}

#[sqlx::test]
async fn an_outbox_that_cannot_be_read_is_no_fault_of_the_broker(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let mut held = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table outbox in access exclusive mode").execute(&mut *held).await.unwrap();
    // In the pause between two sessions too.
    eventually("the database to be named, session after session", async || {
        let ready = house.page("/readyz").await;
        let is_named = ready.body["database"].as_str().unwrap().contains("the outbox cannot be reached");
        if is_named {
            assert_eq!((&ready.body["status"], &ready.body["broker"]), (&json!("degraded"), &json!("ok")));
            assert_eq!(house.metric("tidings_broker_connected").await, 1.0);
        }
        let log = house.service.log();
        if is_named && log.matches("the relay's session is over").count() >= 2 { Ok(()) } else { Err((ready, log)) }
    })
    .await;
    held.rollback().await.unwrap();
    load::ready(&house).await;
}
