//! An upgrade: the version before is at work while this one migrates, beside it, and after it.

use std::{fs, path::PathBuf, time::Duration};

use sqlx::PgPool;

use crate::{
    house::{House, database_url, env, eventually, program},
    load::{self, Load},
    relay::leads,
    rights,
};

/// A table of some size: what rewrites or locks it shows.
const USERS: i32 = 200_000;
/// The longest that a change may take meanwhile.
const HELD_UP: Duration = Duration::from_secs(1);
/// Nobody has a key that both versions know how to write.
const WITHOUT_KEYS: (&str, &str) = ("TIDINGS_INSECURE_NO_AUTH", "true");

/// The checkout of the version before, which is built.
fn before() -> PathBuf {
    env("TIDINGS_BEFORE").into()
}

async fn many_users(db: &PgPool) {
    let seeded = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 1, '{\"first_name\":\"Ana\"}', now(), now()
          from generate_series(1, $1)
    ";
    sqlx::query(seeded).bind(USERS).execute(db).await.unwrap();
}

/// Nobody was told of them.
async fn without_the_many(db: &PgPool) {
    let untold = "delete from users where id not in (select user_id from shadow)";
    assert_eq!(sqlx::query(untold).execute(db).await.unwrap().rows_affected(), USERS as u64);
}

/// As docs/deploy.md has it: migrate, rights, this version beside the one before, which leaves then; and back again.
#[sqlx::test(migrations = false)]
#[ignore = "needs a build of another version: ./dev upgrade"]
async fn from_one_version_to_the_next_and_back_no_change_fails_or_waits_and_none_is_lost(db: PgPool) {
    let binary = before().join("target/debug/tidings");
    let at_database = [("DATABASE_URL".to_owned(), database_url(&db))];
    let migrated = program(&binary, &["migrate"], &at_database).output().await.unwrap();
    assert!(migrated.status.success(), "{migrated:?}");
    rights::grant_as(&db, &fs::read_to_string(before().join("deploy/postgres-grants.sql")).unwrap()).await;
    many_users(&db).await;
    let mut house = House::of_build(&binary, db, &env("AMQP_URL"), &[WITHOUT_KEYS]).await;
    load::watch(&house.db).await;
    let users = load::users(&house, 40).await;
    let at_before = Load::on(&house, &users, 4);
    at_before.goes_on(100).await;

    // Whom nobody else changes: what takes long there waits for the upgrade, and for no other change.
    let ana = load::users(&house, 1).await;
    let alone = Load::on(&house, &ana, 1);
    house.migrate().await;
    rights::grant(&house.db).await;
    let next = house.another(&["serve"]).await;
    let slowest = alone.slowest();
    let mut answered = alone.end_well().await;

    let at_next = Load::at(&next.url, &users, 4);
    let alone = Load::at(&next.url, &ana, 1);
    at_next.goes_on(100).await;
    at_before.goes_on(100).await;
    answered.extend(at_before.end_well().await);
    house.service.signal("-TERM").await;
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    at_next.goes_on(100).await;
    eventually("this version to lead", async || if leads(&next).await { Ok(()) } else { Err(()) }).await;

    house.start_build(&binary).await;
    let at_before = Load::on(&house, &users, 4);
    at_before.goes_on(100).await;
    let slowest = [slowest, alone.slowest()];
    answered.extend(alone.end_well().await);
    answered.extend(at_before.end_well().await);
    answered.extend(at_next.end_well().await);
    without_the_many(&house.db).await;
    assert_eq!(load::all_told(&house, &answered).await, 0, "messages that came twice");
    let slowest = slowest.map(|of| of.so_far());
    eprintln!("{} changes, the slowest {slowest:.0?}: until this version serves, and from then on", answered.len());
    assert!(slowest.iter().all(|took| *took < HELD_UP), "a change took {slowest:?}");
}
