//! The feed: who polls learns of every user's latest version, in an order that skips nobody.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{StreamExt, future::join, stream};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool, migrate::Migrator};
use tidings::users::AMEND;
use uuid::Uuid;

use crate::{
    house::{Answer, House, eventually, http},
    hurt::HurtPostgres,
    load::{Load, users},
    sessions,
};

/// What is known of users: version, and whether they live.
type Mirror = BTreeMap<Uuid, (i64, bool)>;

/// A consumer that only polls.
#[derive(Default)]
struct Poller {
    cursor: Option<String>,
    mirror: Mirror,
    told: Vec<(Uuid, i64)>,
}

impl Poller {
    /// One page; whether there is another.
    async fn poll(&mut self, house: &House, limit: usize) -> bool {
        let after = self.cursor.as_ref().map(|cursor| format!("&after={cursor}")).unwrap_or_default();
        let page = house.page(&format!("/v1/changes?limit={limit}{after}")).await.ok();
        let changes = page.body["changes"].as_array().unwrap();
        assert!(changes.len() <= limit, "{page:?}");
        for change in changes {
            let (user, version) = (id(&change["user_id"]), change["version"].as_i64().unwrap());
            self.told.push((user, version));
            self.mirror.insert(user, (version, is_living(change)));
        }
        self.cursor = Some(page.body["next"].as_str().unwrap().to_owned());
        page.body["more"].as_bool().unwrap()
    }

    /// Polls without a pause until it is over.
    async fn follow(&mut self, house: &House, over: &Cell<bool>) {
        while !over.get() {
            self.poll(house, 100).await;
        }
    }

    async fn poll_all(&mut self, house: &House) {
        while self.poll(house, 3).await {}
    }

    /// Polls until the mirror is what the table is. Not at once: a transaction that is open anywhere in the cluster, in the database
    /// of another test, say, holds the feed back.
    async fn catch_up(&mut self, house: &House) {
        eventually("a mirror like the table", async || {
            self.poll_all(house).await;
            let table = table(&house.db).await;
            if self.mirror == table { Ok(()) } else { Err((self.mirror.clone(), table)) }
        })
        .await;
    }
}

fn id(of: &Value) -> Uuid {
    of.as_str().unwrap().parse().unwrap()
}

fn is_living(change: &Value) -> bool {
    match change["state"].as_str().unwrap() {
        "living" => true,
        "deleted" => false,
        other => panic!("{other}"),
    }
}

async fn table(db: &PgPool) -> Mirror {
    let rows: Vec<(Uuid, i64, bool)> =
        sqlx::query_as("select id, version, deleted_at is null from users").fetch_all(db).await.unwrap();
    rows.into_iter().map(|(id, version, is_living)| (id, (version, is_living))).collect()
}

/// Has transactions that change users end in another order than they began in, as on a busy server.
async fn commit_at_leisure(db: &PgPool) {
    let trigger = "
        create function linger() returns trigger language plpgsql as $$
          begin perform pg_sleep(random() * 0.05); return null; end
        $$;
        create trigger linger after insert on outbox for each statement execute function linger();
    ";
    sqlx::raw_sql(trigger).execute(db).await.unwrap();
}

/// Amends each of these users once, at the instance that listens there, in many small batches.
async fn amend_at(url: &str, users: &[Uuid]) {
    let http = http();
    let amend = async |user: &Uuid| {
        let request =
            http.patch(format!("{url}/v1/users/{user}")).header("content-type", "application/merge-patch+json");
        Answer::to(request.body(json!({ "profile": { "job_title": "Editor" } }).to_string())).await.ok();
    };
    stream::iter(users).map(amend).buffer_unordered(2).for_each(async |()| ()).await;
}

/// The service's own statement, in a transaction that is in the test's hands.
async fn amend_within(transaction: &mut PgConnection, user: Uuid, seen: i64) {
    let done = sqlx::query(AMEND)
        .bind(vec![user])
        .bind(vec![seen])
        .bind(vec![seen + 1])
        .bind(vec![r#"{"first_name":"Late"}"#])
        .bind(vec![Uuid::new_v4()])
        .bind(vec!["profile.updated"])
        .bind(vec![user])
        .bind(vec![seen + 1])
        .bind(vec![r#"["first_name"]"#])
        .bind(vec!["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"])
        .fetch_all(transaction)
        .await
        .unwrap();
    assert_eq!(done.len(), 1);
}

#[sqlx::test]
async fn a_full_pass_shows_every_user_once_the_living_and_the_deleted(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 7).await;
    house.amend(&all[2], json!({ "job_title": "Editor" })).await.ok();
    house.delete(&all[4]).await.ok();
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    assert_eq!(poller.told.len(), all.len(), "{:?}", poller.told);
    assert_eq!((poller.mirror[&all[2]], poller.mirror[&all[4]]), ((2, true), (2, false)));

    assert_eq!(house.page("/v1/changes?limit=6").await.ok().body["more"], true);
    let page = house.page("/v1/changes?limit=7").await.ok();
    assert_eq!(page.body["more"], false);
    let changes = page.body["changes"].as_array().unwrap();
    let of = |user: &Uuid| changes.iter().find(|change| id(&change["user_id"]) == *user).unwrap();
    assert_eq!(of(&all[2])["at"], house.get(&all[2]).await.body["updated_at"]);
    assert_eq!(of(&all[4])["at"], house.get(&all[4]).await.body["deleted_at"]);
    let names: Vec<&String> = changes[0].as_object().unwrap().keys().collect();
    assert_eq!(names, ["at", "state", "user_id", "version"]);
}

#[sqlx::test]
async fn what_changes_after_the_pass_shows_once_with_its_latest_version(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 5).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    poller.told.clear();
    for title in ["Author", "Editor", "Publisher"] {
        house.amend(&all[3], json!({ "job_title": title })).await.ok();
    }
    house.delete(&all[1]).await.ok();
    poller.catch_up(&house).await;
    assert_eq!(poller.told, [(all[3], 4), (all[1], 2)]);
    let before = poller.cursor.clone();
    assert!(!poller.poll(&house, 3).await);
    assert_eq!((poller.told.len(), poller.cursor), (2, before), "nothing came after");
}

#[sqlx::test]
async fn a_late_commit_is_never_skipped(db: PgPool) {
    let house = House::open(db).await;
    let mut all = users(&house, 3).await;
    all.sort_unstable();
    let [late, early, last] = all[..] else { unreachable!("three were made") };
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    poller.told.clear();
    // It takes its number, and its time, before the others do, and commits after them. Its id is lower than theirs, too.
    let mut open = house.db.begin().await.unwrap();
    amend_within(&mut open, late, 1).await;
    house.amend(&early, json!({ "job_title": "Editor" })).await.ok();
    house.delete(&last).await.ok();
    poller.poll_all(&house).await;
    let is_held_back = async || house.page("/v1/changes").await.ok().body["held_back"].as_bool().unwrap();
    assert!(is_held_back().await, "two changes wait for the first");
    open.commit().await.unwrap();
    poller.catch_up(&house).await;
    assert_eq!(poller.told, [(late, 2), (early, 2), (last, 2)]);
    house.feed_is_clear().await;
    assert!(!is_held_back().await, "all is shown");
}

#[sqlx::test]
async fn a_change_that_is_rolled_back_leaves_the_feed_as_it_was(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 2).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    poller.told.clear();
    let mut open = house.db.begin().await.unwrap();
    amend_within(&mut open, all[0], 1).await;
    open.rollback().await.unwrap();
    house.amend(&all[1], json!({ "job_title": "Editor" })).await.ok();
    poller.catch_up(&house).await;
    assert_eq!(poller.told, [(all[1], 2)]);
    // And nothing of it stayed behind: the next change finds the entry that it replaces.
    house.amend(&all[0], json!({ "job_title": "Editor" })).await.ok();
    let entries: i64 = sqlx::query_scalar("select count(*) from changes").fetch_one(&house.db).await.unwrap();
    assert_eq!(entries, 2);
}

#[sqlx::test]
async fn under_load_on_two_instances_a_poller_ends_with_what_the_table_has(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 40).await;
    // One instance commits one batch after the other; of two, either may be the later one.
    let second = house.another(&["serve"]).await;
    let (load, other_load) = (Load::on(&house, &all[..30], 8), Load::at(&second.url, &all[..30], 8));
    let mut poller = Poller::default();
    for doomed in &all[30..] {
        poller.poll(&house, 7).await;
        house.delete(doomed).await.ok();
        load.goes_on(50).await;
        poller.poll(&house, 7).await;
        house.user(json!({ "first_name": "New" })).await;
    }
    load.end_well().await;
    other_load.end_well().await;
    // No later change of a user covers up that one was skipped.
    let once = users(&house, 200).await;
    poller.catch_up(&house).await;
    commit_at_leisure(&house.db).await;
    let over = Cell::new(false);
    let amend = async {
        let (these, those) = once.split_at(once.len() / 2);
        join(amend_at(&house.service.url, these), amend_at(&second.url, those)).await;
        over.set(true);
    };
    join(poller.follow(&house, &over), amend).await;
    poller.catch_up(&house).await;
    let different: BTreeSet<_> = poller.told.iter().collect();
    assert_eq!(different.len(), poller.told.len(), "a version is told once");
    let entries: i64 = sqlx::query_scalar("select count(*) from changes").fetch_one(&house.db).await.unwrap();
    assert_eq!(entries, 250, "one entry per user");
}

/// The cursor with one of its bytes changed.
fn bent(cursor: &str, place: usize) -> String {
    let mut bytes = URL_SAFE_NO_PAD.decode(cursor).unwrap();
    bytes[place] ^= 1;
    URL_SAFE_NO_PAD.encode(bytes)
}

#[sqlx::test]
async fn a_cursor_of_another_history_has_expired(db: PgPool) {
    let house = House::open(db).await;
    users(&house, 1).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    let cursor = poller.cursor.unwrap();
    let with = async |cursor: &str| house.page(&format!("/v1/changes?after={cursor}")).await;
    assert_eq!(with(&cursor).await.status, 200);
    // Another cluster; another timeline; a transaction that this history has not come to: a disk was set back.
    for place in [1, 8, 9, 12, 14] {
        let refused = with(&bent(&cursor, place)).await;
        assert_eq!(refused.refusal(410), "cursor_expired", "byte {place}");
        assert!(refused.body["detail"].as_str().unwrap().contains("full pass"), "{refused:?}");
    }
    for wrong in [bent(&cursor, 0), "!".to_owned(), cursor[1..].to_owned(), String::new()] {
        assert_eq!(with(&wrong).await.refusal(400), "invalid_cursor", "{wrong}");
    }
    for query in ["limit=0", "limit=1001", "limit=-1", "limit=many", "since=7", "limit=1&limit=2"] {
        assert_eq!(house.page(&format!("/v1/changes?{query}")).await.refusal(400), "invalid_query", "{query}");
    }
}

#[tokio::test]
async fn a_cursor_ends_with_its_history() {
    let server = HurtPostgres::borrow().await;
    let mut house = House::with(server.database().await, &[]).await;
    users(&house, 1).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    let cursor = poller.cursor.take().unwrap();
    let with = async |house: &House, cursor: &str| house.page(&format!("/v1/changes?after={cursor}")).await;
    with(&house, &cursor).await.ok();

    // A failover.
    server.follow().await;
    server.lead().await;
    assert_eq!(with(&house, &cursor).await.refusal(410), "cursor_expired");
    poller.catch_up(&house).await;
    let cursor = poller.cursor.unwrap();
    with(&house, &cursor).await.ok();

    // A restore into another database of the same server.
    house.service.kill().await;
    let restored = House::with(server.copy(house.db).await, &[]).await;
    assert_eq!(with(&restored, &cursor).await.refusal(410), "cursor_expired");
}

/// Of what is not there yet either all is in the page, or it says that it is not.
#[sqlx::test]
async fn a_page_and_whether_it_is_all_are_of_one_moment(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    house.amend(&ana, json!({ "first_name": "Eve" })).await.ok();
    // Two transactions that are open: the older one stays so, the younger one changes her while the page is being read.
    let (mut older, mut younger) = (house.db.begin().await.unwrap(), house.db.begin().await.unwrap());
    sqlx::query("select pg_current_xact_id()").execute(&mut *older).await.unwrap();
    sqlx::query("lock table users").execute(&mut *younger).await.unwrap();
    let change = async {
        sessions::blocked(&house.db, "tidings feed").await;
        amend_within(&mut younger, ana, 2).await;
        younger.commit().await.unwrap();
    };
    let after = poller.cursor.clone().unwrap();
    let path = format!("/v1/changes?after={after}");
    let (page, ()) = join(house.page(&path), change).await;
    let page = page.ok();
    let shown: Vec<i64> =
        page.body["changes"].as_array().unwrap().iter().map(|change| change["version"].as_i64().unwrap()).collect();
    assert!(shown == [2] || page.body["held_back"] == true, "{page:?}");
    older.rollback().await.unwrap();
}

/// A dump read into a new cluster, whose own transactions have lower numbers.
async fn restore(db: &PgPool) {
    for sql in
        ["update users set changed_xid = '9000000000000000000'", "update changes set xid = '9000000000000000000'"]
    {
        sqlx::query(sql).execute(db).await.unwrap();
    }
}

#[sqlx::test]
async fn after_a_restore_from_a_dump_nobody_is_hidden(db: PgPool) {
    let mut house = House::open(db).await;
    let all = users(&house, 4).await;
    house.delete(&all[3]).await.ok();
    house.service.kill().await;
    restore(&house.db).await;
    house.migrate().await;
    house.restart().await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    assert_eq!(poller.told.len(), 4, "{:?}", poller.told);
    // What is restamped is found again by the change that replaces it.
    house.amend(&all[0], json!({ "job_title": "Editor" })).await.ok();
    poller.catch_up(&house).await;
    let entries: i64 = sqlx::query_scalar("select count(*) from changes").fetch_one(&house.db).await.unwrap();
    assert_eq!((poller.told.len(), entries), (5, 4));
}

#[sqlx::test(migrations = false)]
async fn users_from_before_the_feed_are_in_it(db: PgPool) {
    let migrator = Migrator::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations")).await.unwrap();
    migrator.run_to(20_261_123_000_001, &db).await.unwrap();
    let old = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 3, '{}', now(), now() from generate_series(1, 10)
    ";
    sqlx::query(old).execute(&db).await.unwrap();
    migrator.run(&db).await.unwrap();
    let house = House::open(db).await;
    let mut poller = Poller::default();
    poller.catch_up(&house).await;
    assert_eq!(poller.told.len(), 10);
    house.amend(&poller.told[0].0, json!({ "job_title": "Editor" })).await.ok();
    poller.catch_up(&house).await;
    assert_eq!(poller.told[10], (poller.told[0].0, 4));
}

/// The decision for a table beside `users` stands on this.
#[sqlx::test]
async fn an_amendment_rewrites_no_index_of_users(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    amendments_rewrite_no_index(&house, &ana).await;
}

/// Amends a user of this House, the only one that was ever amended there.
pub async fn amendments_rewrite_no_index(house: &House, user: &Uuid) {
    let hot = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'users'";
    let mut number = 0;
    // A session of Postgres 14 tells what it counted when it is next used, and not while it rests.
    let (updated, hot) = eventually("twenty updates", async || {
        number += 1;
        house.amend(user, json!({ "district": number })).await.ok();
        let seen: (i64, i64) = sqlx::query_as(hot).fetch_one(&house.db).await.unwrap();
        if seen.0 >= 20 { Ok(seen) } else { Err(seen) }
    })
    .await;
    assert_eq!(hot, updated, "an amendment wrote a row elsewhere, and with it into every index");
}

#[sqlx::test]
async fn without_its_database_the_feed_says_so(db: PgPool) {
    let house = House::open(db).await;
    house.postgres.down();
    for path in ["/v1/changes", "/v1/digest", "/v1/digest/0"] {
        let refused: Answer = house.page(path).await;
        assert_eq!(refused.refusal(503), "database_unavailable", "{path}");
        assert!(refused.headers.contains_key("retry-after"), "{path}");
    }
}
