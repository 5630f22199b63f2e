//! External ids: other systems' names for users. One living user has each, whoever claims it at the same time.

use futures_util::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    feed,
    house::{Answer, House, http},
    sessions,
};

const NOBODY: [Value; 0] = [];

async fn post(house: &House, external_id: &str) -> Answer {
    let body = json!({ "external_id": external_id, "profile": { "city": external_id } });
    Answer::to(house.request(Method::POST, "/v1/users").json(&body)).await
}

async fn user(house: &House, external_id: &str) -> Uuid {
    post(house, external_id).await.ok().body["id"].as_str().unwrap().parse().unwrap()
}

/// A patch of more than the profile.
fn patch(house: &House, user: &Uuid, body: &Value) -> RequestBuilder {
    house.patch(user, json!({})).body(body.to_string())
}

async fn name(house: &House, user: &Uuid, external_id: Value) -> Answer {
    Answer::to(patch(house, user, &json!({ "external_id": external_id }))).await
}

async fn put(house: &House, user: &Uuid, body: Value) -> Answer {
    Answer::to(house.request(Method::PUT, &format!("/v1/users/{user}")).json(&body)).await
}

/// The page of whoever has this external id.
async fn find(house: &House, external_id: &str) -> Vec<Value> {
    let page = house.page(&format!("/v1/users?external_id={external_id}")).await.ok();
    assert_eq!(page.body["next"], Value::Null);
    page.body["users"].as_array().unwrap().clone()
}

#[sqlx::test]
async fn it_comes_and_stays_and_changes_and_goes(db: PgPool) {
    let house = House::open(db).await;
    let ana = user(&house, "E-1").await;
    let bea = house.user(json!({})).await;
    assert_eq!(house.get(&ana).await.body["external_id"], "E-1");
    assert!(house.get(&bea).await.body.get("external_id").is_none(), "absent when there is none");
    // What does not speak of it leaves it alone.
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    house.put(&ana, json!({ "city": "Riga" })).await.ok();
    assert_eq!(name(&house, &ana, json!("E-1")).await.ok().version(), 3, "the same again is no change");
    assert_eq!(find(&house, "E-1").await, [house.get(&ana).await.body]);

    let renamed = name(&house, &ana, json!("E-2")).await.ok();
    assert_eq!((renamed.version(), &renamed.body["external_id"]), (4, &json!("E-2")));
    let both = json!({ "external_id": "e-2", "profile": { "nickname": "A", "city": null } });
    assert_eq!(Answer::to(patch(&house, &ana, &both)).await.ok().body["external_id"], "e-2");
    assert!(name(&house, &ana, Value::Null).await.ok().body.get("external_id").is_none());
    let replaced = put(&house, &ana, json!({ "external_id": "E-3", "profile": { "nickname": "A" } })).await.ok();
    assert_eq!(replaced.body["external_id"], "E-3");
    for gone in ["E-1", "E-2", "e-2", "E-4"] {
        assert_eq!(find(&house, gone).await, NOBODY, "{gone}");
    }

    let listed = house.page("/v1/users").await.ok();
    assert_eq!(listed.body["users"][0], replaced.body);
    let many = house.request(Method::POST, "/v1/users:batchGet").json(&json!({ "ids": [ana, bea] }));
    let many = Answer::to(many).await.ok();
    assert_eq!(many.body["results"][0]["user"], replaced.body);
    assert!(many.body["results"][1]["user"].get("external_id").is_none());
    assert_eq!(
        house.told(&ana).await,
        [
            "user.created",
            "profile.updated[city]",
            "profile.updated[city]",
            "profile.updated[external_id]",
            "profile.updated[city,external_id,nickname]",
            "profile.updated[external_id]",
            "profile.updated[external_id]",
        ]
    );
    assert!(house.audit.raw().iter().any(|message| message.contains("field.external_id")));
}

#[sqlx::test]
async fn one_living_user_has_it(db: PgPool) {
    let house = House::open(db).await;
    let ana = user(&house, "E-1").await;
    let bea = house.user(json!({})).await;
    let new = Uuid::new_v4();
    let taken = json!({ "external_id": "E-1", "profile": {} });
    for refused in [
        post(&house, "E-1").await,
        put(&house, &new, taken.clone()).await,
        put(&house, &bea, taken.clone()).await,
        Answer::to(patch(&house, &bea, &taken)).await,
    ] {
        assert_eq!(refused.refusal(409), "external_id_taken");
    }
    assert_eq!(house.get(&new).await.refusal(404), "user_not_found");
    house.delete(&ana).await.ok();
    assert_eq!(find(&house, "E-1").await, NOBODY);
    assert_eq!(name(&house, &bea, json!("E-1")).await.ok().version(), 2);
    assert_eq!(house.told(&bea).await, ["user.created", "profile.updated[external_id]"]);
    assert_eq!(house.pending().await, 0);
    assert!(!house.service.log().contains("WARN"), "{}", house.service.log());
}

#[sqlx::test]
async fn of_many_who_claim_it_at_once_one_has_it_and_their_neighbours_are_unharmed(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    for round in 0..10 {
        let (claimed, bea) = (format!("E-{round}"), house.user(json!({})).await);
        let there = async |external_id: &str| {
            let body = json!({ "external_id": external_id, "profile": {} });
            Answer::to(http().post(format!("{}/v1/users", other.url)).json(&body)).await
        };
        let claims = join_all((0..40).map(async |n| match n % 4 {
            // Half of them on the other instance in every second round.
            0 => name(&house, &bea, json!(claimed)).await,
            1 | 2 if round % 2 == 0 => there(&claimed).await,
            _ => post(&house, &claimed).await,
        }));
        let neighbours = join_all((0..40).map(async |n| post(&house, &format!("N-{round}-{n}")).await));
        let (claims, neighbours) = tokio::join!(claims, neighbours);
        assert!(neighbours.iter().all(|answer| answer.status == 201), "{neighbours:?}");
        let (done, refused): (Vec<_>, Vec<_>) = claims.into_iter().partition(|answer| answer.status.is_success());
        let holder = &find(&house, &claimed).await[0];
        assert!(done.iter().all(|answer| answer.body["id"] == holder["id"]), "{done:?}");
        // Bea is named ten times, and a new user once.
        assert!(done.len() == 10 || done.len() == 1, "{}", done.len());
        assert!(refused.iter().all(|answer| answer.refusal(409) == "external_id_taken"));
    }
}

/// Another instance is about to commit the same claim: who waited for it hears the same as who came later.
#[sqlx::test]
async fn who_waits_for_a_claim_that_is_committed_hears_that_it_is_taken(db: PgPool) {
    let house = House::open(db).await;
    let mut open = house.db.begin().await.unwrap();
    let claim = "
        insert into users (id, version, profile, external_id, created_at, updated_at)
        values (gen_random_uuid(), 1, '{}', 'E-1', now(), now())
    ";
    sqlx::query(claim).execute(&mut *open).await.unwrap();
    let (waited, ()) = tokio::join!(post(&house, "E-1"), async {
        sessions::blocked(&house.db, "tidings writer").await;
        open.commit().await.unwrap();
    });
    assert_eq!(waited.refusal(409), "external_id_taken");
}

/// Changes that are stacked in one batch: the one whose external id is taken fails alone, and no answer shows one that never was.
#[sqlx::test]
async fn a_taken_one_fails_its_own_change_and_no_other_of_the_same_user(db: PgPool) {
    let house = House::open(db).await;
    user(&house, "E-0").await;
    for round in 0..20 {
        let ana = house.user(json!({})).await;
        let free = format!("E-{}", round + 1);
        let (city, taken, nickname, named, gone) = tokio::join!(
            house.amend(&ana, json!({ "city": "Riga" })),
            name(&house, &ana, json!("E-0")),
            house.amend(&ana, json!({ "nickname": "A" })),
            name(&house, &ana, json!(free)),
            name(&house, &ana, Value::Null),
        );
        assert_eq!(taken.refusal(409), "external_id_taken");
        for done in [city, nickname, gone] {
            assert_ne!(done.ok().body["external_id"], "E-0");
        }
        assert_eq!(named.ok().body["external_id"], json!(free));
        let now = house.get(&ana).await;
        assert_eq!(now.body["profile"], json!({ "city": "Riga", "nickname": "A" }));
        let told = house.told(&ana).await;
        assert_eq!(told.len() as i64, now.version(), "{told:?}");
    }
}

#[sqlx::test]
async fn it_costs_an_amendment_no_index(db: PgPool) {
    let house = House::open(db).await;
    let ana = user(&house, "E-1").await;
    feed::amendments_rewrite_no_index(&house, &ana).await;
}

#[sqlx::test]
async fn one_that_cannot_be_is_refused_with_its_place(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    for (wrong, code) in [
        (json!(7), "type"),
        (json!(["E"]), "type"),
        (json!(""), "length"),
        (json!("E".repeat(201)), "length"),
        (json!(" E"), "unprintable"),
        (json!("E\n"), "unprintable"),
        (json!("E\u{200b}"), "unprintable"),
    ] {
        let body = json!({ "external_id": wrong, "profile": {} });
        for refused in [put(&house, &ana, body.clone()).await, Answer::to(patch(&house, &ana, &body)).await] {
            assert_eq!(refused.refusal(422), "body_invalid", "{wrong}");
            let fault = &refused.body["errors"][0];
            assert_eq!((&fault["pointer"], &fault["code"]), (&json!("/external_id"), &json!(code)), "{wrong}");
        }
    }
    assert_eq!(Answer::to(patch(&house, &ana, &json!({}))).await.refusal(422), "body_invalid");
    name(&house, &ana, json!("é".repeat(200))).await.ok();
    for query in [
        "external_id=",
        "external_id=%0A",
        "external_id=E&limit=1",
        "external_id=E&after=x",
        "external_id=E&external_id=F",
    ] {
        assert_eq!(house.page(&format!("/v1/users?{query}")).await.refusal(400), "invalid_query", "{query}");
    }
    house.postgres.down();
    assert_eq!(house.page("/v1/users?external_id=E").await.refusal(503), "database_unavailable");
}
