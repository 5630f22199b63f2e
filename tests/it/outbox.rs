//! Outbox: what is kept is told, and nothing else is, whenever the service or its sessions die.

use std::time::{Duration, Instant};

use reqwest::RequestBuilder;
use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::{
    house::{House, eventually},
    load::{self, Load},
    sessions,
};

/// Sends a request that nobody will answer.
fn ask(request: RequestBuilder) -> JoinHandle<reqwest::Result<reqwest::Response>> {
    tokio::spawn(request.send())
}

async fn holding(db: &PgPool, lock: &'static str) -> Transaction<'static, Postgres> {
    let mut transaction = db.begin().await.unwrap();
    sqlx::raw_sql(lock).execute(&mut *transaction).await.unwrap();
    transaction
}

#[sqlx::test]
async fn killed_before_the_row_is_written_there_is_neither_change_nor_event(db: PgPool) {
    let mut house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    let held = holding(&house.db, "select from users for update").await;
    let asked = ask(house.patch(&ana, json!({ "job_title": "Editor" })));
    sessions::blocked(&house.db, "tidings writer").await;
    house.service.kill().await;
    assert!(asked.await.unwrap().is_err(), "nobody can have answered");
    sessions::gone(&house.db).await;
    held.rollback().await.unwrap();
    house.restart().await;
    assert_eq!(house.get(&ana).await.version(), 1);
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn killed_before_the_event_is_written_there_is_neither_change_nor_event(db: PgPool) {
    let mut house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    let stumbling_block = "
        create function wait() returns trigger language plpgsql as $$
        begin
          perform pg_advisory_xact_lock(1);
          return new;
        end $$;
        create trigger wait before insert on outbox for each row execute function wait();
    ";
    sqlx::raw_sql(stumbling_block).execute(&house.db).await.unwrap();
    let held = holding(&house.db, "select pg_advisory_xact_lock(1)").await;
    let asked = ask(house.patch(&ana, json!({ "job_title": "Editor" })));
    sessions::blocked(&house.db, "tidings writer").await;
    house.service.kill().await;
    assert!(asked.await.unwrap().is_err(), "nobody can have answered");
    sessions::gone(&house.db).await;
    held.rollback().await.unwrap();
    house.restart().await;
    assert_eq!(house.get(&ana).await.version(), 1);
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn a_statement_that_outlives_its_service_leaves_both_change_and_event(db: PgPool) {
    let mut house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    let held = holding(&house.db, "select from users for update").await;
    let asked = ask(house.patch(&ana, json!({ "job_title": "Editor" })));
    sessions::blocked(&house.db, "tidings writer").await;
    house.service.kill().await;
    held.rollback().await.unwrap();
    assert!(asked.await.unwrap().is_err(), "nobody can have answered");
    house.restart().await;
    sessions::none_in_transaction(&house.db).await;
    let version = house.get(&ana).await.version();
    let told = house.told(&ana).await;
    assert_eq!(told.len() as i64, version, "both or neither: {told:?}");
}

#[sqlx::test]
async fn killed_between_commit_and_answer_the_change_is_kept_and_told(db: PgPool) {
    let mut house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    house.postgres.hold_answers();
    let asked = ask(house.request(reqwest::Method::POST, "/v1/users").json(&json!({ "profile": {} })));
    let born = "select id from users where id <> $1";
    let bea: Uuid = eventually("the commit", async || {
        let born: Option<Uuid> = sqlx::query_scalar(born).bind(ana).fetch_optional(&house.db).await.unwrap();
        born.ok_or("no row")
    })
    .await;
    house.service.kill().await;
    house.postgres.up();
    assert!(asked.await.unwrap().is_err(), "nobody can have answered");
    assert_eq!(house.audit.heard().len(), 1, "nothing was told before the kill");
    house.restart().await;
    assert_eq!(house.told(&bea).await, ["user.created"]);
}

#[sqlx::test]
async fn killed_after_the_answer_and_before_the_telling_it_is_told_at_the_next_start(db: PgPool) {
    let mut house = House::open(db).await;
    house.broker.down();
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    house.service.kill().await;
    house.broker.up();
    house.restart().await;
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title]"]);
}

#[sqlx::test]
async fn killed_before_the_confirm_the_same_messages_are_sent_again(db: PgPool) {
    let mut house = House::open(db).await;
    load::ready(&house).await;
    house.broker.hold_answers();
    load::users(&house, 10).await;
    load::heard(&house, 10).await;
    assert_eq!(house.pending().await, 10, "what is not confirmed stays");
    house.service.kill().await;
    house.broker.up();
    house.restart().await;
    house.settle().await;
    let heard = load::heard_ids(&house);
    assert_eq!(heard[..10], heard[10..], "the same message_ids, in the same order");
}

#[sqlx::test]
async fn a_kill_sends_no_more_than_the_window_twice(db: PgPool) {
    let mut house = House::open(db).await;
    load::ready(&house).await;
    house.broker.hold_answers();
    let events = load::backlog(&house.db, 5_000).await;
    load::heard(&house, 2_000).await;
    // A leader that may send no more only says that it lives.
    sessions::asked(&house.db, "tidings relay leader", "pg_sequence_last_value").await;
    house.service.kill().await;
    house.broker.up();
    house.restart().await;
    house.settle().await;
    assert_eq!(heard(&house), (events.len(), events.len() + 2_000));
}

/// How many events were heard of, and in how many messages.
fn heard(house: &House) -> (usize, usize) {
    let mut ids = load::heard_ids(house);
    let messages = ids.len();
    ids.sort();
    ids.dedup();
    (ids.len(), messages)
}

#[sqlx::test]
async fn what_is_confirmed_and_cannot_be_deleted_fills_the_window_too(db: PgPool) {
    let mut house = House::open(db).await;
    load::ready(&house).await;
    house.broker.down();
    let events = load::backlog(&house.db, 5_000).await;
    let held = holding(&house.db, "select from outbox for update").await;
    house.broker.up();
    load::heard(&house, 2_000).await;
    sessions::asked(&house.db, "tidings relay leader", "pg_sequence_last_value").await;
    house.service.kill().await;
    sessions::gone(&house.db).await;
    held.rollback().await.unwrap();
    house.restart().await;
    house.settle().await;
    assert_eq!(heard(&house), (events.len(), events.len() + 2_000));
}

#[sqlx::test]
async fn killed_between_confirm_and_settle_the_same_messages_are_sent_again(db: PgPool) {
    let mut house = House::open(db).await;
    house.broker.down();
    load::users(&house, 3).await;
    let held = holding(&house.db, "select from outbox for update").await;
    house.broker.up();
    load::heard(&house, 3).await;
    sessions::blocked(&house.db, "tidings relay settler").await;
    house.service.kill().await;
    sessions::gone(&house.db).await;
    held.rollback().await.unwrap();
    assert_eq!(house.pending().await, 3);
    house.restart().await;
    house.settle().await;
    let heard = load::heard_ids(&house);
    assert_eq!(heard[..3], heard[3..], "the same message_ids, in the same order");
}

#[sqlx::test]
async fn what_was_confirmed_and_cannot_be_settled_yet_is_not_sent_again(db: PgPool) {
    let house = House::open(db).await;
    house.broker.down();
    load::users(&house, 3).await;
    let held = holding(&house.db, "select from outbox for update").await;
    house.broker.up();
    // The session ends by the settler's lock_timeout, and so does the next.
    let reason = eventually("a relay that cannot settle", async || {
        let reason = load::degraded(&house).await;
        if reason.contains("outbox") { Ok(reason) } else { Err(reason) }
    })
    .await;
    assert!(reason.contains("55P03"), "{reason}");
    held.rollback().await.unwrap();
    load::ready(&house).await;
    house.settle().await;
    assert_eq!(house.audit.heard().len(), 3);
}

/// A standby that took over without the last of the log gives out the same ids again.
#[sqlx::test]
async fn what_has_taken_the_place_of_something_confirmed_is_told(db: PgPool) {
    let house = House::open(db).await;
    house.broker.down();
    load::users(&house, 3).await;
    let mut held = holding(&house.db, "select from outbox for update").await;
    house.broker.up();
    let reason = eventually("a relay that cannot settle", async || {
        let reason = load::degraded(&house).await;
        if reason.contains("outbox") { Ok(reason) } else { Err(reason) }
    })
    .await;
    assert!(reason.contains("55P03"), "{reason}");
    let gone = "create temporary table gone on commit drop as select * from outbox; delete from outbox";
    sqlx::raw_sql(gone).execute(&mut *held).await.unwrap();
    let in_their_place = "
        insert into outbox (id, message_id, event, user_id, version, changed_fields, traceparent) overriding system value
        select id, gen_random_uuid(), event, gen_random_uuid(), version, changed_fields, traceparent from gone
        returning message_id
    ";
    let others: Vec<Uuid> = sqlx::query_scalar(in_their_place).fetch_all(&mut *held).await.unwrap();
    held.commit().await.unwrap();
    load::ready(&house).await;
    house.settle().await;
    let heard = load::heard_ids(&house);
    assert_eq!(heard.len(), 6);
    assert!(others.len() == 3 && others.iter().all(|id| heard.contains(id)), "{heard:?}");
}

#[sqlx::test]
async fn killed_at_any_moment_under_load_it_forgets_nothing_and_makes_nothing_up(db: PgPool) {
    const ROUNDS: usize = 15;
    let mut house = House::open(db).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 12).await;
    let mut answered = vec![];
    for _ in 0..ROUNDS {
        let load = Load::on(&house, &users, 8);
        let moment = Uuid::new_v4().as_u128() % 120;
        load.goes_on(1 + moment as usize).await;
        house.service.kill().await;
        answered.extend(load.end().await);
        house.restart().await;
    }
    load::all_told(&house, &answered).await;
    assert!(answered.len() >= ROUNDS);
}

#[sqlx::test]
async fn sessions_that_are_ended_at_any_moment_cost_nothing_that_was_answered(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 12).await;
    let load = Load::on(&house, &users, 8);
    let mut ended = 0;
    for _ in 0..30 {
        load.goes_on(20).await;
        ended += sessions::terminate(&house.db, "tidings%").await;
    }
    let answered = load.end().await;
    assert!(ended >= 30, "{ended}");
    load::all_told(&house, &answered).await;
}

#[sqlx::test]
async fn a_change_that_commits_after_later_ones_were_told_is_told_soon_too(db: PgPool) {
    let house = House::open(db).await;
    for round in 0..5 {
        let (late, transaction) = load::open_change(&house.db).await;
        house.user(json!({ "first_name": "Ana" })).await;
        load::heard(&house, 2 * round + 1).await;
        transaction.commit().await.unwrap();
        let committed = Instant::now();
        assert_eq!(house.told(&late).await, ["user.created"]);
        // Five times in a row this is too soon for the sweep, which soon comes every ten seconds only.
        assert!(committed.elapsed() < Duration::from_secs(4), "round {round}: {:?}", committed.elapsed());
    }
}

#[sqlx::test]
async fn a_change_that_commits_after_the_leader_changed_is_told_too(db: PgPool) {
    let mut house = House::open(db).await;
    let (late, transaction) = load::open_change(&house.db).await;
    house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    house.service.kill().await;
    house.restart().await;
    house.user(json!({ "first_name": "Bea" })).await;
    load::heard(&house, 2).await;
    transaction.commit().await.unwrap();
    assert_eq!(house.told(&late).await, ["user.created"]);
    assert_eq!(house.audit.heard().len(), 3, "each once");
}

#[sqlx::test]
async fn a_change_that_was_rolled_back_is_not_told_and_holds_nobody_up(db: PgPool) {
    let house = House::open(db).await;
    let (never, transaction) = load::open_change(&house.db).await;
    house.user(json!({ "first_name": "Ana" })).await;
    load::heard(&house, 1).await;
    transaction.rollback().await.unwrap();
    let bea = house.user(json!({ "first_name": "Bea" })).await;
    assert_eq!(house.told(&bea).await, ["user.created"]);
    assert!(house.told(&never).await.is_empty());
    assert_eq!(house.audit.heard().len(), 2);
}

#[sqlx::test]
async fn the_events_of_one_user_leave_in_order_whoever_makes_them(db: PgPool) {
    let house = House::open(db).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 5).await;
    let load = Load::on(&house, &users, 50);
    load.goes_on(1_000).await;
    let answered = load.end().await;
    assert_eq!(load::all_told(&house, &answered).await, 0, "duplicates");
    for user in users {
        let heard = house.audit.heard();
        let versions: Vec<i64> = heard.iter().filter(|notice| notice.user_id == user).map(|n| n.version).collect();
        assert!(versions.is_sorted(), "{versions:?}");
    }
}
