//! One request, however often it is sent: `Idempotency-Key`; and changes that have to say what they saw.

use futures_util::future::join_all;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool};
use tidings::{
    clients::{NewClient, Scope},
    users::PURGE,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    house::{Answer, House, eventually, file, http, http_with, new_client},
    sessions,
};

const KEY: &str = "idempotency-key";

fn post(house: &House, key: &str, profile: Value) -> RequestBuilder {
    house.request(Method::POST, "/v1/users").header(KEY, key).json(&json!({ "profile": profile }))
}

fn patch(house: &House, key: &str, user: &Uuid, patch: Value) -> RequestBuilder {
    house.patch(user, patch).header(KEY, key)
}

fn id(answer: &Answer) -> Uuid {
    answer.body["id"].as_str().unwrap().parse().unwrap()
}

fn is_replayed(answer: &Answer) -> bool {
    answer.headers.get("idempotency-replayed").is_some_and(|value| value == "true")
}

/// Rows of requests that are remembered.
async fn remembered(house: &House) -> i64 {
    sqlx::query_scalar("select count(*) from idempotency_keys").fetch_one(&house.db).await.unwrap()
}

#[sqlx::test]
async fn a_repetition_is_answered_alike_and_nothing_is_done_again(db: PgPool) {
    let house = House::open(db).await;
    let first = Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await.ok();
    let again = Answer::to(post(&house, "\"k1\"", json!({ "first_name": "Ana" }))).await.ok();
    assert!(!is_replayed(&first) && is_replayed(&again));
    assert_eq!((again.status, &again.body, &again.etag), (first.status, &first.body, &first.etag));
    assert_eq!(again.headers["location"], first.headers["location"]);
    let ana = id(&first);
    let put = |key: &str, profile: Value| {
        let request = house.request(Method::PUT, &format!("/v1/users/{ana}")).header(KEY, key);
        Answer::to(request.json(&json!({ "profile": profile })))
    };
    for expected in [false, true] {
        let amended = Answer::to(patch(&house, "k2", &ana, json!({ "city": "Riga" }))).await.ok();
        assert_eq!((amended.version(), is_replayed(&amended)), (2, expected));
    }
    for expected in [false, true] {
        let replaced = put("k3", json!({ "city": "Oslo" })).await.ok();
        assert_eq!((replaced.version(), is_replayed(&replaced)), (3, expected));
    }
    for expected in [false, true] {
        let nothing = Answer::to(patch(&house, "k4", &ana, json!({ "city": "Oslo" }))).await.ok();
        assert_eq!((nothing.version(), is_replayed(&nothing)), (3, expected));
    }
    // What changed nothing then would be a change now.
    house.amend(&ana, json!({ "city": "Bonn" })).await.ok();
    let nothing = Answer::to(patch(&house, "k4", &ana, json!({ "city": "Oslo" }))).await.ok();
    assert_eq!((nothing.version(), is_replayed(&nothing)), (4, true));
    let delete = || Answer::to(house.request(Method::DELETE, &format!("/v1/users/{ana}")).header(KEY, "k5"));
    let (deleted, again) = (delete().await, delete().await);
    assert_eq!((deleted.status.as_u16(), again.status.as_u16()), (204, 204));
    assert!(!is_replayed(&deleted) && is_replayed(&again));
    let tombstone = house.get(&ana).await;
    for expected in [false, true] {
        let gone = Answer::to(patch(&house, "k6", &ana, json!({ "city": "Riga" }))).await;
        assert_eq!((gone.refusal(410), is_replayed(&gone)), ("user_deleted", expected));
        assert_eq!(gone.body["deleted_at"], tombstone.body["deleted_at"]);
        assert_eq!(gone.version(), 5);
    }
    let told = [
        "user.created",
        "profile.updated[city]",
        "profile.updated[city,first_name]",
        "profile.updated[city]",
        "user.deleted",
    ];
    assert_eq!(house.told(&ana).await, told);
}

/// Values are not kept: who asks again after somebody else's change gets the user as it is now, and hears which version was his.
#[sqlx::test]
async fn a_repetition_after_further_changes_has_the_status_of_then_and_the_user_of_now(db: PgPool) {
    let house = House::open(db).await;
    let ana = id(&Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await.ok());
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    let again = Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await;
    assert_eq!((again.status.as_u16(), again.version(), again.etag.as_deref()), (201, 2, Some("\"2\"")));
    assert_eq!((again.headers["idempotency-version"].to_str().unwrap(), id(&again)), ("1", ana));
    assert_eq!(again.body["profile"]["city"], "Riga");
    house.delete(&ana).await.ok();
    let gone = Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await;
    assert_eq!((gone.refusal(410), is_replayed(&gone)), ("user_deleted", true));
}

#[sqlx::test]
async fn what_was_refused_stays_refused_and_a_faulty_body_may_be_mended(db: PgPool) {
    let house = House::open(db).await;
    let eve = Uuid::new_v4();
    let asked = || Answer::to(patch(&house, "k1", &eve, json!({ "city": "Riga" })));
    assert_eq!(asked().await.refusal(404), "user_not_found");
    house.put(&eve, json!({ "first_name": "Eve" })).await.ok();
    let again = asked().await;
    assert_eq!((again.refusal(404), is_replayed(&again)), ("user_not_found", true));
    let stale = || Answer::to(patch(&house, "k2", &eve, json!({ "city": "Riga" })).header("if-match", "\"2\""));
    assert_eq!(stale().await.refusal(412), "version_mismatch");
    house.amend(&eve, json!({ "nickname": "E" })).await.ok();
    let again = stale().await;
    assert_eq!((again.refusal(412), again.version(), is_replayed(&again)), ("version_mismatch", 1, true));

    let mend = async |profile: Value| Answer::to(post(&house, "k3", profile)).await;
    assert_eq!(mend(json!({ "shoe_size": 38 })).await.refusal(422), "profile_invalid");
    assert_eq!(mend(json!({ "first_name": "Bo" })).await.status, 201);
    assert_eq!(house.get(&eve).await.ok().version(), 2);
}

/// What was done under the schema of then is not refused by that of now.
#[sqlx::test]
async fn a_repetition_is_not_judged_by_a_schema_that_came_after_it(db: PgPool) {
    let schema_of = |badge: Value| {
        json!({ "type": "object", "additionalProperties": false, "properties": { "badge": badge } }).to_string()
    };
    let schema = file(&schema_of(json!({ "type": "string" })));
    let mut house = House::with(db, &[("TIDINGS_PROFILE_SCHEMA", schema.to_str().unwrap())]).await;
    let path = format!("/v1/users/{}", Uuid::new_v4());
    let create = async |house: &House, key: &str| Answer::to(post(house, key, json!({ "badge": "x" }))).await;
    let put = async |house: &House, key: &str| {
        let request = house.request(Method::PUT, &path).header(KEY, key);
        Answer::to(request.json(&json!({ "profile": { "badge": "x" } }))).await
    };
    let (created, replaced) = (create(&house, "k1").await.ok(), put(&house, "k2").await.ok());
    house.service.kill().await;
    std::fs::write(&schema, schema_of(json!({ "type": "string", "pattern": "^[0-9]+$" }))).unwrap();
    house.restart().await;
    for (first, again) in [(created, create(&house, "k1").await), (replaced, put(&house, "k2").await)] {
        assert_eq!((again.status.as_u16(), is_replayed(&again), &again.body), (201, true, &first.body), "{again:?}");
    }
    assert_eq!(create(&house, "k3").await.refusal(422), "profile_invalid", "a new one is judged");
    assert_eq!(put(&house, "k4").await.ok().version(), 1, "this one changes nothing");
}

#[sqlx::test]
async fn another_request_under_the_same_key_is_refused_and_another_clients_key_is_another(db: PgPool) {
    let house = House::open(db).await;
    let ana = id(&Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await.ok());
    for other in [
        post(&house, "k1", json!({ "first_name": "Bo" })),
        patch(&house, "k1", &ana, json!({ "first_name": "Ana" })),
        house.request(Method::DELETE, &format!("/v1/users/{ana}")).header(KEY, "k1"),
    ] {
        assert_eq!(Answer::to(other).await.refusal(422), "idempotency_key_reused");
    }
    assert_eq!(house.get(&ana).await.ok().version(), 1);
    let named = |external_id: &str| {
        let body = json!({ "external_id": external_id, "profile": {} });
        Answer::to(house.request(Method::POST, "/v1/users").header(KEY, "k2").json(&body))
    };
    named("E-1").await.ok();
    assert_eq!(named("E-2").await.refusal(422), "idempotency_key_reused", "nobody would be called E-2");
    let client = NewClient::named("other", [Scope::WriteUsers]).unwrap();
    let http: Client = http_with(&new_client(&house.db, client).await);
    let request = http.post(format!("{}/v1/users", house.service.url)).header(KEY, "k1");
    let created = Answer::to(request.json(&json!({ "profile": { "first_name": "Bo" } }))).await.ok();
    assert_ne!(id(&created), ana);
    for wrong in ["", "a b", &"a".repeat(256)] {
        assert_eq!(Answer::to(post(&house, wrong, json!({}))).await.refusal(400), "invalid_idempotency_key");
    }
}

/// The change is committed and nobody hears of it: the next try does.
#[sqlx::test]
async fn killed_between_commit_and_answer_the_repetition_hears_what_came_of_it(db: PgPool) {
    let mut house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.settle().await;
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select from users for update").execute(&mut holder).await.unwrap();
    let request = patch(&house, "k1", &ana, json!({ "city": "Riga" }));
    let asked = tokio::spawn(async move { request.send().await.map(drop) });
    sessions::blocked(&house.db, "tidings writer").await;
    house.postgres.hold_answers();
    sqlx::query("rollback").execute(&mut holder).await.unwrap();
    eventually("the commit", async || {
        let version: i64 = sqlx::query_scalar("select version from users").fetch_one(&house.db).await.unwrap();
        if version == 2 { Ok(()) } else { Err(version) }
    })
    .await;
    house.service.kill().await;
    house.postgres.up();
    assert!(asked.await.unwrap().is_err(), "nobody can have answered");
    house.restart().await;
    let again = Answer::to(patch(&house, "k1", &ana, json!({ "city": "Riga" }))).await.ok();
    assert_eq!((again.version(), is_replayed(&again)), (2, true));
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
}

/// The answer to the first try got lost. That nothing was changed could not be said of the second alone: it is one request.
#[sqlx::test]
async fn a_repetition_that_cannot_look_up_the_first_try_does_not_say_that_nothing_was_changed(db: PgPool) {
    // Without keys: who asks is known for a second longer than the database, and would be refused first.
    let house = House::with(db, &[("TIDINGS_INSECURE_NO_AUTH", "true")]).await;
    let create = async || Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await;
    let ana = id(&create().await.ok());
    house.postgres.down();
    assert_eq!(create().await.refusal(503), "outcome_unknown");
    house.postgres.up();
    let again = create().await.ok();
    assert_eq!((id(&again), is_replayed(&again)), (ana, true));
}

/// The first try is about to be committed when the second looks for it: what the second then meets is the work of the first, and no
/// reason to refuse it.
#[sqlx::test]
async fn who_repeats_while_the_first_try_is_committed_hears_what_that_came_to(db: PgPool) {
    let house = House::open(db).await;
    let (ana, bea) = (house.user(json!({ "first_name": "Ana" })).await, Uuid::new_v4());
    let amend = || patch(&house, "k1", &ana, json!({ "city": "Riga" })).header("if-match", "\"1\"");
    let create = || {
        let request = house.request(Method::PUT, &format!("/v1/users/{bea}")).header(KEY, "k2");
        request.header("if-none-match", "*").json(&json!({ "profile": {} }))
    };
    assert_eq!(Answer::to(amend()).await.ok().version(), 2);
    assert_eq!(Answer::to(create()).await.status, 201);
    // As if the first tries were under way: their changes can be seen, and that they were remembered cannot yet.
    let aside = "create table aside as select * from idempotency_keys; delete from idempotency_keys;";
    sqlx::raw_sql(aside).execute(&house.db).await.unwrap();
    for (request, key, status) in [(amend(), "changed", 200), (create(), "created", 201)] {
        let mut open = house.db.begin().await.unwrap();
        let commit = "insert into idempotency_keys select * from aside where outcome = $1";
        sqlx::query(commit).bind(key).execute(&mut *open).await.unwrap();
        let (again, ()) = tokio::join!(Answer::to(request), async {
            sessions::blocked(&house.db, "tidings queries").await;
            open.commit().await.unwrap();
        });
        assert_eq!((again.status.as_u16(), is_replayed(&again)), (status, true), "{again:?}");
    }
    assert_eq!(house.get(&ana).await.ok().version(), 2);
}

#[sqlx::test]
async fn while_it_is_under_way_a_repetition_is_told_so(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select from users for update").execute(&mut holder).await.unwrap();
    let first = tokio::spawn(Answer::to(patch(&house, "k1", &ana, json!({ "city": "Riga" }))));
    sessions::blocked(&house.db, "tidings writer").await;
    let second = Answer::to(patch(&house, "k1", &ana, json!({ "city": "Riga" }))).await;
    assert_eq!(
        (second.refusal(409), &second.headers["retry-after"]),
        ("idempotency_key_in_flight", &"1".parse().unwrap())
    );
    sqlx::query("rollback").execute(&mut holder).await.unwrap();
    assert_eq!(first.await.unwrap().ok().version(), 2);
    let again = Answer::to(patch(&house, "k1", &ana, json!({ "city": "Riga" }))).await.ok();
    assert!(is_replayed(&again));
}

#[sqlx::test]
async fn of_many_at_once_on_two_instances_one_is_done(db: PgPool) {
    let house = House::open(db).await;
    let second = house.another(&["serve", "--no-relay"]).await;
    let urls = [&house.service.url, &second.url];
    let http = http();
    for round in 0..20 {
        let request = |place: usize| {
            let request = http.post(format!("{}/v1/users", urls[place % 2])).header(KEY, format!("k{round}"));
            Answer::to(request.json(&json!({ "profile": { "first_name": "Ana", "district": round } })))
        };
        let answers = join_all((0..12).map(request)).await;
        let mut made = vec![];
        for answer in &answers {
            match answer.status.as_u16() {
                201 => made.push(id(answer)),
                409 => {
                    assert_eq!(answer.refusal(409), "idempotency_key_in_flight");
                    assert_eq!(answer.headers["retry-after"], "1");
                }
                other => panic!("{other}: {answer:?}"),
            }
        }
        made.dedup();
        assert_eq!(made.len(), 1, "{answers:?}");
    }
    let users: i64 = sqlx::query_scalar("select count(*) from users").fetch_one(&house.db).await.unwrap();
    assert_eq!((users, remembered(&house).await), (20, 20));
    house.settle().await;
    assert_eq!(house.audit.heard().len(), 20);
}

/// Keys of one user whose changes are written in one statement, one of them a repetition from another instance: the others are done.
#[sqlx::test]
async fn changes_of_one_user_under_many_keys_all_happen_once(db: PgPool) {
    let house = House::open(db).await;
    let second = house.another(&["serve", "--no-relay"]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let (urls, http) = ([&house.service.url, &second.url], http());
    let request = |place: usize| {
        let (http, url) = (&http, format!("{}/v1/users/{ana}", urls[place % 2]));
        async move {
            let number = place / 2;
            loop {
                let request = http.patch(&url).header(KEY, format!("n{number}"));
                let request = request.header("content-type", "application/merge-patch+json");
                let body = json!({ "profile": { "social": { format!("k{number}"): number } } }).to_string();
                let answer = Answer::to(request.body(body)).await;
                if answer.status != 409 {
                    return answer.ok();
                }
            }
        }
    };
    join_all((0..80).map(request)).await;
    let ana_now = house.get(&ana).await.ok();
    assert_eq!(ana_now.version(), 41);
    assert_eq!(ana_now.body["profile"]["social"].as_object().unwrap().len(), 40);
    assert_eq!(house.told(&ana).await.len(), 41);
}

#[sqlx::test]
async fn no_value_is_kept_and_after_a_deletion_not_even_a_hash(db: PgPool) {
    let house = House::open(db).await;
    let canary = format!("canary{}", Uuid::new_v4().simple());
    let ana = id(&Answer::to(post(&house, &canary, json!({ "first_name": canary }))).await.ok());
    Answer::to(patch(&house, "k2", &ana, json!({ "city": canary }))).await.ok();
    Answer::to(patch(&house, "k3", &ana, json!({ "city": canary }))).await.ok();
    let rows: String = sqlx::query_scalar("select string_agg(idempotency_keys::text, ' ') from idempotency_keys")
        .fetch_one(&house.db)
        .await
        .unwrap();
    let in_hex: String = canary.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(!rows.contains(&canary) && !rows.contains(&in_hex), "{rows}");
    assert!(!house.service.log().contains(&canary), "a key may be anything");
    let hashes = "select count(*) from idempotency_keys where fingerprint is not null";
    let kept: i64 = sqlx::query_scalar(hashes).fetch_one(&house.db).await.unwrap();
    assert_eq!(kept, 3);
    Answer::to(house.request(Method::DELETE, &format!("/v1/users/{ana}")).header(KEY, "k4")).await.ok();
    let kept: i64 = sqlx::query_scalar(hashes).fetch_one(&house.db).await.unwrap();
    assert_eq!((kept, remembered(&house).await), (0, 4));
    // Without the hashes: the deletion repeated is one, and a key of hers does not answer a request about somebody else.
    let again = Answer::to(house.request(Method::DELETE, &format!("/v1/users/{ana}")).header(KEY, "k4")).await;
    assert_eq!((again.status.as_u16(), is_replayed(&again)), (204, true));
    let bo = house.user(json!({})).await;
    for key in ["k2", "k4"] {
        let of_another = Answer::to(patch(&house, key, &bo, json!({ "city": "Oslo" }))).await;
        assert_eq!(of_another.refusal(422), "idempotency_key_reused", "{key}");
    }
}

/// The deletion waits for the row when a request about the user comes to nothing and is remembered.
#[sqlx::test]
async fn what_is_remembered_while_a_deletion_waits_leaves_no_hash(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let holder = sessions::hold(&house.db, &ana).await;
    let meanwhile = async {
        sessions::blocked(&house.db, "tidings writer").await;
        let release = async {
            let remembered_or_waits = "
                select exists (select from idempotency_keys)
                    or exists (select from pg_stat_activity
                                where datname = current_database() and application_name = 'tidings queries'
                                  and wait_event_type = 'Lock')
            ";
            eventually("the other request", async || {
                let is_there: bool = sqlx::query_scalar(remembered_or_waits).fetch_one(&house.db).await.unwrap();
                if is_there { Ok(()) } else { Err(()) }
            })
            .await;
            holder.close().await.unwrap();
        };
        tokio::join!(Answer::to(patch(&house, "k1", &ana, json!({ "city": "Riga" }))), release).0
    };
    let (deleted, amended) = tokio::join!(house.delete(&ana), meanwhile);
    assert_eq!((deleted.status.as_u16(), amended.status.as_u16()), (204, 200));
    let kept: Vec<Option<Vec<u8>>> =
        sqlx::query_scalar("select fingerprint from idempotency_keys").fetch_all(&house.db).await.unwrap();
    assert_eq!(kept, [None]);
}

#[sqlx::test]
async fn what_is_a_day_old_is_let_go(db: PgPool) {
    let house = House::open(db).await;
    for key in ["k1", "k2"] {
        Answer::to(post(&house, key, json!({}))).await.ok();
    }
    let age = "update idempotency_keys set kept_at = now() - interval '25 hours' where outcome = 'created' and version = 1 and
               user_id = (select min(user_id::text)::uuid from idempotency_keys)";
    assert_eq!(sqlx::query(age).execute(&house.db).await.unwrap().rows_affected(), 1);
    // Each instance looks for them as soon as it is there.
    let _another = house.another(&["serve", "--no-relay"]).await;
    eventually("the old one to be let go", async || match remembered(&house).await {
        1 => Ok(()),
        other => Err(other),
    })
    .await;
    let left = "select kept_at > now() - interval '1 hour' from idempotency_keys";
    assert!(sqlx::query_scalar::<_, bool>(left).fetch_one(&house.db).await.unwrap());
}

/// As after a restore: there is more to let go than a leaving may take.
#[sqlx::test]
async fn what_is_to_be_let_go_does_not_hold_up_the_leaving(db: PgPool) {
    let many = "
        insert into idempotency_keys (key, salt, outcome, user_id, version, kept_at)
        select sha256(n::text::bytea), decode(repeat('00', 16), 'hex'), 'missing', gen_random_uuid(), 0, now() - interval '25 hours'
          from generate_series(1, 60000) n;
        create function slowly() returns trigger language plpgsql as $$ begin perform pg_sleep(0.5); return null; end $$;
        create trigger slowly after delete on idempotency_keys execute function slowly();
    ";
    sqlx::raw_sql(many).execute(&db).await.unwrap();
    let mut house = House::open(db).await;
    eventually("some to be let go", async || match remembered(&house).await {
        60_000 => Err("none is"),
        _ => Ok(()),
    })
    .await;
    house.service.signal("-TERM").await;
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(remembered(&house).await > 0);
}

/// A clock that jumps, the database's or this machine's, lets nothing go that is younger by the other one.
#[sqlx::test]
async fn what_is_a_day_old_by_one_clock_alone_is_kept(db: PgPool) {
    let house = House::open(db).await;
    Answer::to(post(&house, "k1", json!({ "first_name": "Ana" }))).await.ok();
    // As it looks to a database whose clock is 25 hours ahead, and to one whose machine's is. The service, which purges too, sees neither.
    for (age_h, ours_h) in [(25, -25), (0, 25)] {
        let mut unseen = house.db.begin().await.unwrap();
        let aged = sqlx::query("update idempotency_keys set kept_at = now() - make_interval(hours => $1)").bind(age_h);
        assert_eq!(aged.execute(&mut *unseen).await.unwrap().rows_affected(), 1);
        let ours = OffsetDateTime::now_utc() + time::Duration::hours(ours_h);
        let purged = sqlx::query(PURGE).bind(1_000_i64).bind(ours).execute(&mut *unseen).await.unwrap();
        assert_eq!(purged.rows_affected(), 0, "{age_h} {ours_h}");
        unseen.rollback().await.unwrap();
    }
}

#[sqlx::test]
async fn a_deployment_may_demand_that_changes_say_what_they_saw(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_REQUIRE_IF_MATCH", "true")]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let path = format!("/v1/users/{ana}");
    assert_eq!(house.amend(&ana, json!({ "city": "Riga" })).await.refusal(428), "precondition_required");
    assert_eq!(house.put(&ana, json!({})).await.refusal(428), "precondition_required");
    assert_eq!(house.delete(&ana).await.refusal(428), "precondition_required");
    let with = |etag: &str| Answer::to(house.patch(&ana, json!({ "city": "Riga" })).header("if-match", etag));
    assert_eq!(with("\"7\"").await.refusal(412), "version_mismatch");
    assert_eq!(with("\"1\"").await.ok().version(), 2);
    assert_eq!(house.put(&Uuid::new_v4(), json!({})).await.status, 201, "nobody can have seen who is not there");
    assert_eq!(house.amend(&Uuid::new_v4(), json!({})).await.refusal(404), "user_not_found");
    let deleted = Answer::to(house.request(Method::DELETE, &path).header("if-match", "*")).await;
    assert_eq!(deleted.status, 204);
    assert_eq!(house.delete(&ana).await.status, 204, "again, and nothing is left to be seen");
}
