//! Mirror: a consumer's copy in a database of its own, asked for by the library that Rust consumers use.

use std::{
    future::pending,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Json, Router, extract::Request, response::IntoResponse};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{FutureExt, future::join_all};
use reqwest::{
    StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::json;
use sqlx::PgPool;
use tidings_sdk::{
    cache::Cache,
    mirror::{Applied, Mirror},
    owner::{FetchError, Fetched, Latest, Owner},
};
use tokio::{net::TcpListener, sync::Semaphore};
use uuid::Uuid;

use crate::{
    house::{House, env, eventually, owner_at},
    load::{self, Load},
    proxy::Proxy,
    sdk::Listener,
};

fn owner(house: &House) -> Owner {
    owner_at(&house.service.url)
}

/// A mirror of this House's users, in the same database: its tables have names of their own.
async fn mirror(house: &House) -> Mirror {
    let mirror = Mirror::new();
    mirror.prepare(&house.db).await.unwrap();
    mirror.prepare(&house.db).await.unwrap();
    mirror
}

/// Catches up with everything that is committed by now: users that were told, and copies that were written.
async fn caught_up(house: &House, mirror: &Mirror, owner: &Owner) -> (u64, u64) {
    house.feed_is_clear().await;
    let done = mirror.catch_up(&house.db, owner).await.unwrap();
    (done.told, done.written)
}

/// How many users differ from their copies, deletions included.
async fn differing(db: &PgPool) -> i64 {
    let differing = "
        select count(*) from users full join tidings_users as copy using (id)
         where users.version is distinct from copy.version
            or users.profile::jsonb is distinct from copy.profile
    ";
    sqlx::query_scalar(differing).fetch_one(db).await.unwrap()
}

#[sqlx::test]
async fn what_is_asked_for_is_answered_as_it_is(db: PgPool) {
    let house = House::open(db).await;
    let owner = owner(&house);
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let latest = owner.latest(ana, 1).await.unwrap();
    assert_eq!((latest.id(), latest.version()), (ana, 1));
    assert_eq!(latest.living().unwrap().text("first_name"), Some("Ana"));
    assert_eq!(owner.get(ana, 1, Some(1)).await.unwrap(), Fetched::Unchanged);
    house.delete(&ana).await.ok();
    assert!(matches!(owner.latest(ana, 2).await, Ok(Latest::Gone(tombstone)) if tombstone.version == 2));
    let impatient = owner.patience(Duration::from_millis(200));
    assert_eq!(impatient.latest(Uuid::new_v4(), 1).await, Err(FetchError::UnknownUser));
}

/// What is asked for at the same time is fetched together: far fewer requests than users, and everybody gets his own.
#[sqlx::test]
async fn many_are_fetched_in_few_requests(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await;
    let owner = owner(&house);
    // More than go into one request.
    let users = load::users(&house, 1_200).await;
    let before = requests(&house).await;
    let latest = futures_util::future::try_join_all(users.iter().map(|user| owner.latest(*user, 1))).await.unwrap();
    assert!(latest.iter().map(Latest::id).eq(users.iter().copied()));
    let sent = requests(&house).await - before;
    assert!(sent <= 10, "{sent} requests for 1,200 users");
}

async fn requests(house: &House) -> usize {
    house.log_so_far().await.lines().filter(|line| line.contains("answered") && line.contains("/v1/")).count()
}

/// Waits until the service has answered one question more than `before`.
async fn an_answer_is_under_way(house: &House, before: usize) {
    eventually("the question to be answered, and the answer to be under way", async || {
        match requests(house).await - before {
            1 => Ok(()),
            answered => Err(answered),
        }
    })
    .await;
}

/// Asked for a version that cannot be seen yet, the owner says so until it can.
#[sqlx::test]
async fn never_a_state_older_than_the_notice(db: PgPool) {
    let house = House::open(db).await;
    let owner = owner(&house);
    let [ana, bo] = [house.user(json!({})).await, house.user(json!({})).await];
    let early = tokio::spawn({
        let owner = owner.clone();
        async move { owner.latest(ana, 2).await }
    });
    let impatient = owner.clone().patience(Duration::from_millis(200));
    assert!(matches!(impatient.latest(ana, 2).await, Err(FetchError::NotYetVisible)));
    let hasty = owner.clone().patience(Duration::from_millis(600));
    assert!(hasty.latest(bo, 1).await.is_ok(), "who asks for her waits, and nobody else");
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    assert_eq!(early.await.unwrap().unwrap().version(), 2);
}

/// An owner that is well and has nothing new enough does not turn into an outage, which would be waited out, by a try that is cut short.
#[tokio::test]
async fn who_said_that_nothing_newer_is_there_is_believed_although_he_falls_silent() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let answer = move |request: Request| {
        let (path, counted) = (request.uri().path().to_owned(), counted.clone());
        async move {
            if path == "/v1/users:batchGet" {
                return Json(json!({ "results": [] })).into_response();
            }
            if counted.fetch_add(1, Ordering::SeqCst) == 0 {
                return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "code": "not_yet_visible" }))).into_response();
            }
            pending().await
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    let ana = Uuid::new_v4();
    let outcome = owner_at(&url).patience(Duration::from_secs(1)).get(ana, 2, None).await;
    assert_eq!(outcome, Err(FetchError::NotYetVisible));
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[sqlx::test]
async fn a_mirror_catches_up_from_where_it_was(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let users = load::users(&house, 1_200).await;
    house.delete(&users[0]).await.ok();
    let first = caught_up(&house, &mirror, &owner).await;
    assert_eq!((first, differing(&house.db).await), ((1_200, 1_200), 0));
    house.amend(&users[1], json!({ "city": "Riga" })).await.ok();
    house.delete(&users[2]).await.ok();
    let second = caught_up(&house, &mirror, &owner).await;
    assert_eq!((second, differing(&house.db).await), ((2, 2), 0));
    // News that came by message in between is not fetched again.
    house.amend(&users[3], json!({ "city": "Oslo" })).await.ok();
    let told = owner.latest(users[3], 2).await.unwrap();
    mirror.apply(&mut house.db.acquire().await.unwrap(), &told).await.unwrap();
    let third = caught_up(&house, &mirror, &owner).await;
    assert_eq!(third, (1, 0));
}

/// What ANALYZE keeps for the planner would stay when a user is forgotten.
#[sqlx::test]
async fn the_planner_keeps_nothing_of_a_copy_and_nothing_of_before(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    for _ in 0..4 {
        house.user(json!({ "nickname": "planned" })).await;
    }
    caught_up(&house, &mirror, &owner).await;
    let kept = async || -> i64 {
        sqlx::raw_sql("analyze tidings_users").execute(&house.db).await.unwrap();
        let kept =
            "select count(*) from pg_stats where tablename = 'tidings_users' and pg_stats::text like '%planned%'";
        sqlx::query_scalar(kept).fetch_one(&house.db).await.unwrap()
    };
    assert_eq!(kept().await, 0);
    // As a mirror of before has it, and one on which the application has built a view.
    let as_before = "alter table tidings_users alter column profile set statistics -1";
    sqlx::raw_sql(as_before).execute(&house.db).await.unwrap();
    assert_eq!(kept().await, 1);
    mirror.prepare(&house.db).await.unwrap();
    assert_eq!(kept().await, 0);
    sqlx::raw_sql(as_before).execute(&house.db).await.unwrap();
    sqlx::raw_sql("create view nicknames as select profile from tidings_users").execute(&house.db).await.unwrap();
    mirror.prepare(&house.db).await.unwrap();
    assert_eq!(differing(&house.db).await, 0);
}

/// The cursor stands for what is held: it does not move on with what could not be kept.
#[sqlx::test]
async fn a_page_that_could_not_be_kept_comes_again(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    load::users(&house, 3).await;
    house.feed_is_clear().await;
    let full = "
        create function is_full() returns trigger language plpgsql as $$ begin raise exception 'full'; end $$;
        create trigger is_full before insert on tidings_users for each row execute function is_full();
    ";
    sqlx::raw_sql(full).execute(&house.db).await.unwrap();
    assert!(mirror.catch_up(&house.db, &owner).await.is_err());
    sqlx::raw_sql("drop trigger is_full on tidings_users").execute(&house.db).await.unwrap();
    assert_eq!(caught_up(&house, &mirror, &owner).await, (3, 3));
    assert_eq!(differing(&house.db).await, 0);
}

/// While everything moves, catching up again and again ends level as soon as it stands still.
#[sqlx::test]
async fn a_mirror_that_catches_up_under_load_skips_nobody(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let users = load::users(&house, 40).await;
    let load = Load::on(&house, &users, 8);
    for _ in 0..20 {
        load.goes_on(20).await;
        mirror.catch_up(&house.db, &owner).await.unwrap();
    }
    load.end_well().await;
    caught_up(&house, &mirror, &owner).await;
    assert_eq!(differing(&house.db).await, 0);
}

#[sqlx::test]
async fn a_mirror_never_takes_a_step_back(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let mut connection = house.db.acquire().await.unwrap();
    let ana = house.user(json!({ "city": "Riga" })).await;
    let first = owner.latest(ana, 1).await.unwrap();
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    let second = owner.latest(ana, 2).await.unwrap();
    house.delete(&ana).await.ok();
    let gone = owner.latest(ana, 3).await.unwrap();
    assert_eq!(mirror.apply(&mut connection, &second).await.unwrap(), Applied::Written);
    assert_eq!(mirror.apply(&mut connection, &first).await.unwrap(), Applied::Old);
    assert_eq!(mirror.get(&mut connection, ana).await.unwrap().unwrap().profile["city"], "Oslo");
    assert_eq!(mirror.apply(&mut connection, &gone).await.unwrap(), Applied::Written);
    assert_eq!(mirror.apply(&mut connection, &second).await.unwrap(), Applied::Old, "nobody is brought back to life");
    assert!(mirror.get(&mut connection, ana).await.unwrap().is_none());
}

/// A deletion is final: one at a version below what is held comes from an owner that was set back.
#[sqlx::test]
async fn a_deletion_is_taken_over_whatever_is_held(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let mut connection = house.db.acquire().await.unwrap();
    let ana = house.user(json!({})).await;
    mirror.apply(&mut connection, &owner.latest(ana, 1).await.unwrap()).await.unwrap();
    sqlx::query("update tidings_users set version = 9").execute(&house.db).await.unwrap();
    house.delete(&ana).await.ok();
    let gone = owner.latest(ana, 2).await.unwrap();
    assert_eq!(mirror.apply(&mut connection, &gone).await.unwrap(), Applied::Written);
    assert!(mirror.get(&mut connection, ana).await.unwrap().is_none());
    assert_eq!(mirror.apply(&mut connection, &gone).await.unwrap(), Applied::Old, "once");
}

/// Two processes of an application handle one user at the same time, and the one that asked first hears last: what it brings is old.
#[sqlx::test]
async fn an_answer_that_was_long_under_way_does_not_take_a_mirror_back(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await;
    let (fast, mirror) = (owner(&house), mirror(&house).await);
    let line = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let slow = owner_at(&format!("http://{}", line.address()));
    let ana = house.user(json!({ "city": "Riga" })).await;
    let before = requests(&house).await;
    line.hold_answers();
    let first = tokio::spawn(async move { slow.latest(ana, 1).await.unwrap() });
    an_answer_is_under_way(&house, before).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    let mut connection = house.db.acquire().await.unwrap();
    let second = fast.latest(ana, 2).await.unwrap();
    assert_eq!(mirror.apply(&mut connection, &second).await.unwrap(), Applied::Written);
    line.up();
    let first = first.await.unwrap();
    assert_eq!(first.version(), 1);
    assert_eq!(mirror.apply(&mut connection, &first).await.unwrap(), Applied::Old);
    assert_eq!(mirror.get(&mut connection, ana).await.unwrap().unwrap().profile["city"], "Oslo");
}

/// What an application does not need it does not hold.
#[sqlx::test]
async fn a_mirror_of_some_fields_holds_no_others(db: PgPool) {
    let house = House::open(db).await;
    let owner = owner(&house);
    let mirror = Mirror::of(["city".parse().unwrap()]);
    mirror.prepare(&house.db).await.unwrap();
    let ana = house.user(json!({ "first_name": "Ana", "city": "Riga" })).await;
    caught_up(&house, &mirror, &owner).await;
    let copy = mirror.get(&mut house.db.acquire().await.unwrap(), ana).await.unwrap().unwrap();
    assert_eq!(serde_json::Value::Object(copy.profile), json!({ "city": "Riga" }));
}

/// What it needs from now on it gets of everybody, and what it needs no more it gives up, although no version tells of it.
#[sqlx::test]
async fn a_mirror_of_other_fields_than_before_begins_anew(db: PgPool) {
    let house = House::open(db).await;
    let owner = owner(&house);
    let ana = house.user(json!({ "first_name": "Ana", "city": "Riga" })).await;
    let held = async |fields: &[&str]| {
        let mirror = Mirror::of(fields.iter().map(|field| field.parse().unwrap()));
        mirror.prepare(&house.db).await.unwrap();
        let (told, _) = caught_up(&house, &mirror, &owner).await;
        let copy = mirror.get(&mut house.db.acquire().await.unwrap(), ana).await.unwrap().unwrap();
        (told, serde_json::Value::Object(copy.profile))
    };
    assert_eq!(held(&["city"]).await, (1, json!({ "city": "Riga" })));
    assert_eq!(held(&["first_name", "city"]).await, (1, json!({ "city": "Riga", "first_name": "Ana" })));
    assert_eq!(held(&["city", "first_name"]).await.0, 0, "the same as before");
    assert_eq!(held(&["first_name"]).await, (1, json!({ "first_name": "Ana" })));
    let whole = mirror(&house).await;
    caught_up(&house, &whole, &owner).await;
    assert_eq!(differing(&house.db).await, 0);
    assert_eq!(caught_up(&house, &mirror(&house).await, &owner).await, (0, 0), "the same as before");
    // One that was made before it was noted is what it is.
    sqlx::query("update tidings_cursor set fields = null").execute(&house.db).await.unwrap();
    assert_eq!(caught_up(&house, &mirror(&house).await, &owner).await, (0, 0));
}

#[sqlx::test]
async fn a_mirror_finds_what_is_missing_stale_or_a_ghost_and_mends_it(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let users = load::users(&house, 700).await;
    caught_up(&house, &mirror, &owner).await;
    assert!(mirror.verify(&house.db, &owner).await.unwrap().is_none());
    house.delete(&users[5]).await.ok();
    let [missing, old, ahead, buried, buried_as_new, deleted] =
        [users[0], users[1], users[2], users[3], users[4], users[5]];
    let invented = Uuid::new_v4();
    for (falsify, user) in [
        ("delete from tidings_users where id = $1", missing),
        ("update tidings_users set version = 0 where id = $1", old),
        // As after a restore of the owner from a backup.
        ("update tidings_users set version = 9 where id = $1", ahead),
        ("update tidings_users set version = 9, profile = null where id = $1", buried),
        ("update tidings_users set profile = null where id = $1", buried_as_new),
        ("insert into tidings_users values ($1, 3, '{}')", invented),
    ] {
        sqlx::query(falsify).bind(user).execute(&house.db).await.unwrap();
    }
    let found = mirror.verify(&house.db, &owner).await.unwrap();
    let sorted = |users: &[Uuid]| {
        let mut users = users.to_vec();
        users.sort_unstable();
        users
    };
    assert_eq!(sorted(&found.missing), sorted(&[missing, buried, buried_as_new]));
    assert_eq!(sorted(&found.stale), sorted(&[old, ahead]));
    assert_eq!(sorted(&found.ghosts), sorted(&[deleted, invented]));
    mirror.repair(&house.db, &owner, &found).await.unwrap();
    assert!(mirror.verify(&house.db, &owner).await.unwrap().is_none());
    assert_eq!(differing(&house.db).await, 0);
}

/// The place of this mirror, in another history.
pub async fn foreign_cursor(db: &PgPool) -> String {
    let cursor: String = sqlx::query_scalar("select cursor from tidings_cursor").fetch_one(db).await.unwrap();
    let mut bytes = URL_SAFE_NO_PAD.decode(cursor).unwrap();
    // The timeline.
    bytes[12] ^= 1;
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Another history has other versions: each is taken as it is, even one below what is held, and whoever is not shown is forgotten.
#[sqlx::test]
async fn a_mirror_of_another_history_begins_anew(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let users = load::users(&house, 20).await;
    house.delete(&users[2]).await.ok();
    caught_up(&house, &mirror, &owner).await;
    let (ahead, buried, invented) = (users[0], users[1], Uuid::new_v4());
    for (falsify, user) in [
        (r#"update tidings_users set version = 9, profile = '{"city":"Riga"}' where id = $1"#, ahead),
        ("update tidings_users set version = 9, profile = null where id = $1", buried),
        ("insert into tidings_users values ($1, 3, '{}')", invented),
    ] {
        sqlx::query(falsify).bind(user).execute(&house.db).await.unwrap();
    }
    assert_eq!(caught_up(&house, &mirror, &owner).await, (0, 0), "nobody was told of");
    let foreign = foreign_cursor(&house.db).await;
    sqlx::query("update tidings_cursor set cursor = $1").bind(foreign).execute(&house.db).await.unwrap();
    caught_up(&house, &mirror, &owner).await;
    assert_eq!(differing(&house.db).await, 0);
    assert!(mirror.verify(&house.db, &owner).await.unwrap().is_none());
    // And from there on as before.
    house.amend(&users[3], json!({ "city": "Oslo" })).await.ok();
    assert_eq!(caught_up(&house, &mirror, &owner).await, (1, 1));
}

/// It is noticed by a mirror that listens all the while, and that hears nothing: what it misses was told as what it had already.
#[sqlx::test]
async fn another_history_is_noticed_while_listening(db: PgPool) {
    let house = House::open(db).await;
    let (owner, mirror) = (owner(&house), mirror(&house).await);
    let ana = house.user(json!({ "city": "Oslo" })).await;
    house.feed_is_clear().await;
    let keeper = mirror.clone().keeper(house.db.clone(), owner).check_every(Duration::from_millis(20));
    let listener = Listener::with(&house, &env("AMQP_URL"), |consumer| consumer.catch_up(keeper)).await;
    let foreign = foreign_cursor(&house.db).await;
    let other = r#"update tidings_users set profile = '{"city":"Riga"}' where id = $1"#;
    sqlx::query(other).bind(ana).execute(&house.db).await.unwrap();
    eventually("the lost state to give way", async || {
        // A look that is under way may put its own place over this one.
        let set_back = "update tidings_cursor set cursor = $1 where not is_anew";
        sqlx::query(set_back).bind(&foreign).execute(&house.db).await.unwrap();
        match differing(&house.db).await {
            0 => Ok(()),
            differing => Err(differing),
        }
    })
    .await;
    listener.end().await;
}

/// A pass that was under way when the mirror went back to the beginning neither moves it on nor forgets those who have yet to be shown.
#[sqlx::test]
async fn a_pass_from_before_a_new_beginning_does_not_end_it(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await;
    let fast = owner(&house);
    let (before, after) = (Mirror::of(["city".parse().unwrap()]), Mirror::new());
    before.prepare(&house.db).await.unwrap();
    load::users(&house, 5).await;
    caught_up(&house, &before, &fast).await;
    let line = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let slow = owner_at(&format!("http://{}", line.address()));
    let asked = requests(&house).await;
    line.hold_answers();
    let db = house.db.clone();
    let pass = tokio::spawn(async move { before.catch_up(&db, &slow).await.unwrap() });
    eventually("its question to be answered, and the answer to be under way", async || {
        match requests(&house).await - asked {
            1 => Ok(()),
            answered => Err(answered),
        }
    })
    .await;
    after.prepare(&house.db).await.unwrap();
    line.up();
    pass.await.unwrap();
    let living = "select count(*) from tidings_users where profile is not null";
    assert_eq!(sqlx::query_scalar::<_, i64>(living).fetch_one(&house.db).await.unwrap(), 5);
    assert_eq!(caught_up(&house, &after, &fast).await, (5, 5));
    assert_eq!(differing(&house.db).await, 0);
}

/// An owner that is set back while it is asked: it cannot show the user whom its first page tells of, and then has another history, without
/// anybody; its URL.
async fn set_back_meanwhile(user: Uuid) -> String {
    let pages = Arc::<AtomicUsize>::default();
    let answer = move |request: Request| {
        let is_first = request.uri().path() == "/v1/changes" && pages.fetch_add(1, Ordering::SeqCst) == 0;
        let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
        async move {
            let page = |changes, next, more| json!({ "changes": changes, "next": next, "more": more }).to_string();
            let (status, said) = match &*path {
                "/v1/changes" if is_first => {
                    let told = json!([{ "user_id": user, "version": 2, "state": "living" }]);
                    (StatusCode::OK, page(told, "later", true))
                }
                "/v1/changes" if query.contains("after=") => {
                    (StatusCode::GONE, r#"{"code":"cursor_expired"}"#.to_owned())
                }
                "/v1/changes" => (StatusCode::OK, page(json!([]), "anew", false)),
                _ => (StatusCode::INTERNAL_SERVER_ERROR, r#"{"code":"internal"}"#.to_owned()),
            };
            (status, [(CONTENT_TYPE, "application/json")], said)
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    url
}

/// Who could not be shown before the owner was set back is forgotten like everybody whom it does not show afterwards.
#[sqlx::test]
async fn who_could_not_be_shown_in_one_history_is_not_spared_in_the_next(db: PgPool) {
    let (mirror, ana) = (Mirror::new(), Uuid::new_v4());
    mirror.prepare(&db).await.unwrap();
    sqlx::query("insert into tidings_users values ($1, 1, '{}')").bind(ana).execute(&db).await.unwrap();
    sqlx::query("update tidings_cursor set cursor = 'before'").execute(&db).await.unwrap();
    let owner = owner_at(&set_back_meanwhile(ana).await);
    let done = mirror.catch_up(&db, &owner).await.unwrap();
    assert_eq!((done.told, done.written, done.is_behind), (1, 0, false));
    assert!(mirror.get(&mut db.acquire().await.unwrap(), ana).await.unwrap().is_none());
}

/// What a stand-in for the owner was asked, and how many single questions it had open at once.
#[derive(Clone, Default)]
struct Asked {
    requests: Arc<Mutex<Vec<(String, Instant)>>>,
    open: Arc<AtomicUsize>,
    most_open: Arc<AtomicUsize>,
}

/// An owner that answers a gathered question with this, and a single one with 500 once there is a permit; its URL.
async fn stand_in(asked: &Asked, gate: &Arc<Semaphore>, gathered: (StatusCode, Option<&'static str>)) -> String {
    let (asked, gate) = (asked.clone(), gate.clone());
    let answer = move |request: Request| {
        let (asked, gate, (status, after)) = (asked.clone(), gate.clone(), gathered);
        let said = r#"{"code":"internal"}"#;
        async move {
            let path = request.uri().path().to_owned();
            let is_gathered = path == "/v1/users:batchGet";
            asked.requests.lock().unwrap().push((path, Instant::now()));
            if is_gathered {
                return (status, after.map(|after| [(RETRY_AFTER, after)]), said).into_response();
            }
            asked.most_open.fetch_max(asked.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            gate.acquire().await.unwrap().forget();
            asked.open.fetch_sub(1, Ordering::SeqCst);
            (StatusCode::INTERNAL_SERVER_ERROR, said).into_response()
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    url
}

/// An owner that asks to be left alone is left alone by all who asked together, for as long as it says.
#[tokio::test]
async fn a_refusal_of_all_is_not_answered_with_a_question_for_each() {
    let (asked, gate) = (Asked::default(), Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)));
    let url = stand_in(&asked, &gate, (StatusCode::TOO_MANY_REQUESTS, Some("1"))).await;
    let owner = owner_at(&url).patience(Duration::from_millis(1_500));
    let outcomes = join_all((0..100).map(|_| owner.latest(Uuid::new_v4(), 1))).await;
    for outcome in outcomes {
        assert!(matches!(outcome, Err(FetchError::Unavailable(_))), "{outcome:?}");
    }
    let requests = asked.requests.lock().unwrap().clone();
    assert!(requests.iter().all(|(path, _)| path == "/v1/users:batchGet"), "{requests:?}");
    assert!(requests.len() <= 6, "{requests:?}");
    // Two go on at once: the third is one of them again.
    assert!(requests[2].1 - requests[0].1 >= Duration::from_secs(1), "{requests:?}");
}

/// For longer than anybody's patience, too: until then it is not asked by this client, and nobody waits for it in vain.
#[tokio::test]
async fn an_owner_is_left_alone_for_longer_than_patience_lasts() {
    let (asked, gate) = (Asked::default(), Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)));
    let url = stand_in(&asked, &gate, (StatusCode::SERVICE_UNAVAILABLE, Some("5"))).await;
    let owner = owner_at(&url).patience(Duration::from_millis(300));
    let more_patient = owner.clone().patience(Duration::from_millis(600));
    let another = owner_at(&url).patience(Duration::from_millis(300));
    let sent = || asked.requests.lock().unwrap().len();
    let asks = async |owner: &Owner| {
        let outcome = owner.latest(Uuid::new_v4(), 1).await;
        assert!(matches!(outcome, Err(FetchError::Unavailable(_))), "{outcome:?}");
    };
    for _ in 0..10 {
        asks(&owner).await;
        asks(&more_patient).await;
        assert_eq!(sent(), 1);
    }
    asks(&another).await;
    assert_eq!(sent(), 2, "another client has a rate of its own");
    eventually("it to be asked again", async || {
        asks(&owner).await;
        if sent() == 3 { Ok(()) } else { Err(sent()) }
    })
    .await;
    let requests = asked.requests.lock().unwrap().clone();
    assert!(requests[2].1 - requests[0].1 >= Duration::from_secs(5), "{requests:?}");
}

/// When the owner fails at somebody among those who are asked for together, they are asked for alone, and few at a time.
#[tokio::test]
async fn those_who_are_asked_for_alone_are_asked_for_few_at_a_time() {
    let (asked, gate) = (Asked::default(), Arc::new(Semaphore::new(0)));
    let url = stand_in(&asked, &gate, (StatusCode::INTERNAL_SERVER_ERROR, None)).await;
    let owner = owner_at(&url);
    let asking = tokio::spawn(async move { join_all((0..100).map(|_| owner.latest(Uuid::new_v4(), 1))).await });
    eventually("single questions", async || match asked.open.load(Ordering::SeqCst) {
        open if open >= 8 => Ok(()),
        open => Err(open),
    })
    .await;
    gate.add_permits(1_000);
    let outcomes = asking.await.unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(FetchError::Refused { status: 500, .. }))));
    assert_eq!(asked.most_open.load(Ordering::SeqCst), 8);
}

/// Who asks behind more than one request holds, all of whom hung up while they waited, is not forgotten with them.
#[sqlx::test]
async fn who_asks_behind_many_who_hung_up_is_answered(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await;
    let line = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let owner = owner_at(&format!("http://{}", line.address()));
    let ana = house.user(json!({})).await;
    line.hold_answers();
    // As many requests as go on at once.
    for _ in 0..2 {
        let (before, owner) = (requests(&house).await, owner.clone());
        tokio::spawn(async move { owner.latest(ana, 1).await });
        an_answer_is_under_way(&house, before).await;
    }
    for _ in 0..500 {
        assert!(owner.latest(Uuid::new_v4(), 1).now_or_never().is_none());
    }
    let mut asked = pin!(owner.latest(ana, 1));
    assert!(asked.as_mut().now_or_never().is_none());
    line.up();
    assert_eq!(asked.await.unwrap().version(), 1);
}

#[sqlx::test]
async fn a_cache_gives_out_nothing_older_than_the_last_notice(db: PgPool) {
    let house = House::open(db).await;
    let cache = Cache::new(owner(&house), 100);
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(cache.get(ana).await.unwrap().version(), 1);
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    assert_eq!(cache.get(ana).await.unwrap().version(), 1, "nobody has told the cache yet");
    cache.invalidate(ana, 2);
    assert_eq!(cache.get(ana).await.unwrap().version(), 2);
}

/// Who asked before the notice is not given what was true before it, nor is anybody after him.
#[sqlx::test]
async fn a_cache_gives_out_nothing_that_was_under_way_when_the_notice_came(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await;
    let line = Proxy::before(house.service.url.strip_prefix("http://").unwrap().parse().unwrap()).await;
    let cache = Cache::new(owner_at(&format!("http://{}", line.address())), 100);
    let ana = house.user(json!({ "city": "Riga" })).await;
    let before = requests(&house).await;
    line.hold_answers();
    let asking = cache.clone();
    let asked = tokio::spawn(async move { asking.get(ana).await.unwrap() });
    an_answer_is_under_way(&house, before).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    cache.invalidate(ana, 2);
    line.up();
    assert_eq!(asked.await.unwrap().version(), 2);
    assert_eq!(cache.get(ana).await.unwrap().version(), 2);
}
