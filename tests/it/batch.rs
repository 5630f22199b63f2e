//! Many users at once: `POST /v1/users:batchGet` and `POST /v1/users:batchReplace`.

use std::{collections::BTreeSet, pin::pin};

use futures_util::future::{Either, join_all, select};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgPool};
use tidings::clients::{NewClient, Scope};
use uuid::Uuid;

use crate::{
    house::{Answer, House, http_with, new_client},
    load::{all_told, users, versions, watch},
    refusals::nested,
    sessions,
};

async fn ask(house: &House, body: &str) -> Answer {
    let request = house.request(Method::POST, "/v1/users:batchGet").header("content-type", "application/json");
    Answer::to(request.body(body.to_owned())).await
}

async fn get(house: &House, ids: &[Uuid]) -> Vec<Value> {
    let answer = ask(house, &json!({ "ids": ids }).to_string()).await.ok();
    answer.body["results"].as_array().unwrap().clone()
}

#[sqlx::test]
async fn each_id_is_answered_once_in_order_of_first_mention(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 3).await;
    let (nobody, gone) = (Uuid::new_v4(), all[1]);
    house.delete(&gone).await.ok();
    let tombstone = house.get(&gone).await.body;
    let results = get(&house, &[all[2], nobody, gone, all[2], all[0], gone]).await;
    let living = async |user: &Uuid| json!({ "state": "found", "id": user, "user": house.get(user).await.body });
    assert_eq!(
        results,
        [
            living(&all[2]).await,
            json!({ "state": "missing", "id": nobody }),
            json!({ "state": "gone", "id": gone, "version": 2, "deleted_at": tombstone["deleted_at"] }),
            living(&all[0]).await,
        ]
    );
}

#[sqlx::test]
async fn a_change_that_was_answered_is_seen_by_the_next_batch(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    for version in 2..20 {
        house.amend(&ana, json!({ "district": version })).await.ok();
        assert_eq!(get(&house, &[ana]).await[0]["user"]["version"], version);
    }
}

#[sqlx::test]
async fn a_batch_has_from_1_to_500_ids(db: PgPool) {
    let house = House::open(db).await;
    let mut ids = users(&house, 2).await;
    ids.extend((2..500).map(|_| Uuid::new_v4()));
    let results = get(&house, &ids).await;
    let of = |state: &str| results.iter().filter(|result| result["state"] == state).count();
    assert_eq!((results.len(), of("found"), of("missing")), (500, 2, 498));
    assert!(results.iter().zip(&ids).all(|(result, id)| result["id"] == json!(id)));

    ids.push(Uuid::new_v4());
    let too_many = json!({ "ids": ids }).to_string();
    let bad = format!(r#"{{"ids":["7","{}","{}","{}"]}}"#, ids[0], ids[0].simple(), Uuid::nil());
    let table: [(&str, &[(&str, &str)]); 11] = [
        (&too_many, &[("/ids", "length")]),
        (r#"{"ids":[]}"#, &[("/ids", "length")]),
        (&bad, &[("/ids/0", "format"), ("/ids/2", "format"), ("/ids/3", "format")]),
        (r#"{"ids":[7]}"#, &[("/ids/0", "type")]),
        (r#"{"ids":[7,"x",true]}"#, &[("/ids/0", "type"), ("/ids/2", "type")]),
        (r#"{"ids":"7"}"#, &[("/ids", "type")]),
        (r#"{"ids":"7","y":1}"#, &[("/ids", "type"), ("/y", "unknown_member")]),
        (r#"{"ids":null}"#, &[("/ids", "type")]),
        ("{}", &[("/ids", "required")]),
        (r#"{"ids":[],"fields/x":1}"#, &[("/fields~1x", "unknown_member")]),
        ("[]", &[("", "type")]),
    ];
    for (body, expected) in table {
        let answer = ask(&house, body).await;
        assert_eq!(answer.refusal(422), "body_invalid", "{body}");
        let faults = answer.body["errors"].as_array().unwrap();
        let faults: Vec<_> =
            faults.iter().map(|fault| (fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap())).collect();
        assert_eq!(faults, expected, "{body}");
    }
}

#[sqlx::test]
async fn a_batch_is_read_like_any_body(db: PgPool) {
    let house = House::open(db).await;
    assert_eq!(ask(&house, "{").await.refusal(400), "malformed_json");
    assert_eq!(ask(&house, r#"{"ids":[],"ids":[]}"#).await.refusal(422), "unacceptable_json");
    assert_eq!(ask(&house, &" ".repeat(65_537)).await.refusal(413), "payload_too_large");
    let untyped = house.request(Method::POST, "/v1/users:batchGet").body(r#"{"ids":[]}"#);
    let untyped = Answer::to(untyped).await;
    assert_eq!(untyped.refusal(415), "unsupported_media_type");
    assert_eq!(untyped.headers["accept"], "application/json");
    assert_eq!(house.page("/v1/users:batchGet").await.refusal(405), "method_not_allowed");
    house.postgres.down();
    let refused = ask(&house, &json!({ "ids": [Uuid::new_v4()] }).to_string()).await;
    assert_eq!(refused.refusal(503), "database_unavailable");
}

async fn replace(house: &House, body: &Value) -> Answer {
    Answer::to(house.request(Method::POST, "/v1/users:batchReplace").json(body)).await
}

async fn replaced(house: &House, entries: &[Value]) -> Vec<Value> {
    let answer = replace(house, &json!({ "users": entries })).await.ok();
    answer.body["results"].as_array().unwrap().clone()
}

/// A refusal by itself, without what names the request.
fn anonymous(problem: &Value) -> Value {
    let mut problem = problem.clone();
    problem.as_object_mut().unwrap().remove("request_id").expect("each names its request");
    problem
}

async fn put(house: &House, user: &Uuid, body: &Value) -> Answer {
    Answer::to(house.request(Method::PUT, &format!("/v1/users/{user}")).json(body)).await
}

#[sqlx::test]
async fn each_of_many_is_replaced_as_if_alone(db: PgPool) {
    let house = House::open(db).await;
    watch(&house.db).await;
    let [ana, bo, cy, eli, fay, gone, new] = std::array::from_fn(|_| Uuid::new_v4());
    for user in [bo, cy, eli, gone] {
        house.put(&user, json!({ "first_name": "A" })).await;
    }
    for (user, external_id) in [(ana, "E-1"), (fay, "E-2")] {
        put(&house, &user, &json!({ "external_id": external_id, "profile": {} })).await.ok();
    }
    house.delete(&gone).await.ok();
    let done = [
        (new, json!({ "external_id": "E-3", "profile": { "first_name": "N" } })),
        (ana, json!({ "external_id": null, "profile": { "first_name": "B" } })),
        (eli, json!({ "profile": { "first_name": "A" } })),
    ];
    let refused = [
        (gone, json!({ "profile": {} })),
        (bo, json!({ "profile": { "first_name": 7, "last_name": [] } })),
        (cy, json!({ "external_id": "E-2", "profile": {} })),
    ];
    let entries = done.iter().chain(&refused).map(|(id, body)| {
        let mut entry = body.clone();
        entry["id"] = json!(id);
        entry
    });
    let results = replaced(&house, &entries.collect::<Vec<_>>()).await;
    assert_eq!(
        results[..3],
        [
            json!({ "state": "created", "id": new, "version": 1 }),
            json!({ "state": "replaced", "id": ana, "version": 2 }),
            json!({ "state": "unchanged", "id": eli, "version": 1 }),
        ]
    );
    let kept = house.get(&new).await.ok().body;
    assert_eq!((&kept["external_id"], &kept["profile"]), (&json!("E-3"), &json!({ "first_name": "N" })));
    assert!(house.get(&ana).await.ok().body.get("external_id").is_none());
    for (result, (user, body)) in results[3..].iter().zip(&refused) {
        assert_eq!((&result["state"], &result["id"]), (&json!("refused"), &json!(user)), "{result}");
        assert_eq!(anonymous(&result["problem"]), anonymous(&put(&house, user, body).await.body));
    }
    // Exactly what was committed is told: nothing of who was so already, or was refused.
    all_told(&house, &[(new, 1), (ana, 2)]).await;
}

#[sqlx::test]
async fn one_of_many_may_say_which_version_it_replaces(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_REQUIRE_IF_MATCH", "true")]).await;
    let all = users(&house, 4).await;
    let new = Uuid::new_v4();
    let entry = |id: &Uuid, if_version: Value| json!({ "id": id, "if_version": if_version, "profile": {} });
    let results = replaced(
        &house,
        &[
            entry(&all[0], json!(1)),
            entry(&all[1], json!(2)),
            entry(&all[2], json!(0)),
            entry(&new, json!(0)),
            json!({ "id": all[3], "profile": {} }),
        ],
    )
    .await;
    let told = |result: &Value| {
        (result["state"].clone(), result["problem"]["code"].clone(), result["problem"]["version"].clone())
    };
    let refused = |code: &str, version: Value| (json!("refused"), json!(code), version);
    assert_eq!(
        results.iter().map(told).collect::<Vec<_>>(),
        [
            (json!("replaced"), Value::Null, Value::Null),
            refused("version_mismatch", json!(1)),
            refused("version_mismatch", json!(1)),
            (json!("created"), Value::Null, Value::Null),
            refused("precondition_required", Value::Null),
        ]
    );
    // What each is told to do is what can be done.
    let details: Vec<&str> = results.iter().filter_map(|result| result["problem"]["detail"].as_str()).collect();
    assert!(details[..2].iter().all(|detail| detail.contains("the user is at version 1,")), "{details:?}");
    assert!(details[2].contains("if_version"), "{details:?}");
    assert_eq!(replaced(&house, &[entry(&all[3], json!(1))]).await[0]["state"], "replaced");
}

#[sqlx::test]
async fn who_is_in_many_requests_at_once_is_changed_by_each(db: PgPool) {
    let house = House::open(db).await;
    watch(&house.db).await;
    let all = users(&house, 40).await;
    let entries = |round: usize| {
        all.iter().map(|id| json!({ "id": id, "profile": { "first_name": format!("B {round}") } })).collect::<Vec<_>>()
    };
    let rounds: Vec<Vec<Value>> = (0..12).map(entries).collect();
    let batches = join_all(rounds.iter().map(|entries| replaced(&house, entries)));
    let amendments = join_all(all.iter().map(|user| house.amend(user, json!({ "city": "Bonn" }))));
    let (batches, amendments) = tokio::join!(batches, amendments);
    assert!(batches.iter().flatten().all(|result| result["state"] == "replaced"), "{batches:?}");
    let mut answered: Vec<(Uuid, i64)> = batches
        .iter()
        .flatten()
        .map(|result| (result["id"].as_str().unwrap().parse().unwrap(), result["version"].as_i64().unwrap()))
        .collect();
    answered.extend(all.iter().zip(&amendments).map(|(user, answer)| (*user, answer.version())));
    answered.sort_unstable();
    let count = answered.len();
    answered.dedup();
    assert_eq!(answered.len(), count, "each change made a version of its own");
    assert!(versions(&house.db).await.values().all(|version| *version == 14));
    all_told(&house, &answered).await;
}

#[sqlx::test]
async fn who_is_changed_alone_does_not_wait_for_many(db: PgPool) {
    let house = House::open(db).await;
    let [ana, bo] = users(&house, 2).await[..] else { unreachable!() };
    let holder = sessions::hold(&house.db, &ana).await;
    // On every line that writes many.
    let body = json!({ "users": [{ "id": ana, "profile": {} }] });
    let (one, other) = (pin!(replace(&house, &body)), pin!(replace(&house, &body)));
    let many = select(one, other);
    let alone = async {
        sessions::all_blocked(&house.db, "tidings batch writer", 2).await;
        house.amend(&bo, json!({ "city": "Bonn" })).await.ok()
    };
    assert!(matches!(select(many, pin!(alone)).await, Either::Right(_)), "many were answered first");
    holder.close().await.unwrap();
}

#[sqlx::test]
async fn each_of_many_may_be_as_deep_as_alone(db: PgPool) {
    let house = House::open(db).await;
    let entry = |levels: usize| {
        let mut entry: Value = serde_json::from_str(&nested(levels)).unwrap();
        entry["id"] = json!(Uuid::new_v4());
        entry
    };
    assert_eq!(replaced(&house, &[entry(32)]).await[0]["state"], "created");
    let refused = replace(&house, &json!({ "users": [entry(32), entry(33)] })).await;
    assert_eq!(refused.refusal(422), "unacceptable_json");
    let place = format!("/users/1/profile{}", "/social".repeat(31));
    assert_eq!(refused.body["errors"][0]["pointer"], json!(place), "{refused:?}");
}

#[sqlx::test]
async fn a_list_of_users_is_taken_or_refused_as_a_whole(db: PgPool) {
    let house = House::open(db).await;
    let entry = |id: Uuid| json!({ "id": id, "profile": {} });
    let mut all: Vec<Value> = (0..500).map(|_| entry(Uuid::new_v4())).collect();
    let results = replaced(&house, &all).await;
    assert!(results.len() == 500 && results.iter().all(|result| result["state"] == "created"), "{results:?}");
    assert!(results.iter().zip(&all).all(|(result, entry)| result["id"] == entry["id"]));
    all.push(entry(Uuid::new_v4()));
    let once = Uuid::new_v4();
    let misshapen = json!({ "id": once, "if_version": -1, "external_id": "", "profile": [], "x": 1 });
    let table: [(Value, &[(&str, &str)]); 11] = [
        (
            json!({ "users": [entry(Uuid::new_v4()), misshapen] }),
            &[
                ("/users/1/if_version", "type"),
                ("/users/1/x", "unknown_member"),
                ("/users/1/external_id", "length"),
                ("/users/1/profile", "type"),
            ],
        ),
        (json!({ "users": [{ "id": once, "if_version": 1.5, "profile": {} }] }), &[("/users/0/if_version", "type")]),
        (json!({ "users": all }), &[("/users", "length")]),
        (json!({ "users": [] }), &[("/users", "length")]),
        (json!({ "users": {} }), &[("/users", "type")]),
        (json!({}), &[("/users", "required")]),
        (json!({ "users": [entry(once)], "ids/x": [] }), &[("/ids~1x", "unknown_member")]),
        (json!({ "users": {}, "ids/x": [] }), &[("/ids~1x", "unknown_member"), ("/users", "type")]),
        (json!({ "users": [entry(once), 7, entry(once)] }), &[("/users/1", "type"), ("/users/2/id", "duplicate")]),
        (
            json!({ "users": [{ "profile": {} }, { "id": "7", "profile": {} }] }),
            &[("/users/0/id", "required"), ("/users/1/id", "format")],
        ),
        (json!([]), &[("", "type")]),
    ];
    for (body, expected) in table {
        let answer = replace(&house, &body).await;
        assert_eq!(answer.refusal(422), "body_invalid", "{body}");
        let faults = answer.body["errors"].as_array().unwrap();
        let faults: Vec<_> =
            faults.iter().map(|fault| (fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap())).collect();
        assert_eq!(faults, expected, "{body}");
    }
    assert_eq!(house.get(&once).await.refusal(404), "user_not_found", "nothing of such a list is done");
    let unknown = replace(&house, &json!({ "users": [{ "id": once, "profile": {}, "x": 1 }] })).await;
    let detail = unknown.body["errors"][0]["detail"].as_str().unwrap();
    assert!(["id", "if_version", "external_id", "profile"].iter().all(|name| detail.contains(name)), "{detail}");

    let large = json!({ "users": [{ "id": once, "profile": { "first_name": "x".repeat(300_000) } }] });
    assert_eq!(
        replaced(&house, std::slice::from_ref(&large["users"][0])).await[0]["problem"]["code"],
        "profile_invalid"
    );
    let larger = json!({ "users": [{ "id": once, "profile": { "first_name": "x".repeat(600_000) } }] });
    assert_eq!(replace(&house, &larger).await.refusal(413), "payload_too_large");
    house.postgres.down();
    assert_eq!(replace(&house, &json!({ "users": [entry(once)] })).await.refusal(503), "database_unavailable");
}

#[sqlx::test]
async fn many_cost_a_token_each_and_are_replaced_within_the_fields_of_the_client(db: PgPool) {
    let house = House::open(db).await;
    let all = users(&house, 3).await;
    let city = BTreeSet::from(["city".parse().unwrap()]);
    let client = NewClient {
        fields: Some(city),
        rate: Some("1/100".parse().unwrap()),
        ..NewClient::named("crm", [Scope::WriteUsers]).unwrap()
    };
    let crm = http_with(&new_client(&house.db, client).await);
    let entry = |id: &Uuid, field: &str| json!({ "id": id, "profile": { field: "Bonn" } });
    let body = json!({ "users": [entry(&all[0], "city"), entry(&all[1], "first_name"), entry(&all[2], "city")] });
    let answer = Answer::to(crm.post(format!("{}/v1/users:batchReplace", house.service.url)).json(&body)).await.ok();
    let states: Vec<&Value> =
        answer.body["results"].as_array().unwrap().iter().map(|result| &result["state"]).collect();
    assert_eq!(states, ["replaced", "refused", "replaced"]);
    assert_eq!(answer.body["results"][1]["problem"]["code"], "field_forbidden");
    assert_eq!(house.get(&all[0]).await.ok().body["profile"], json!({ "first_name": "Ana 0", "city": "Bonn" }));
    let left = answer.headers["ratelimit"].to_str().unwrap();
    assert!(left.starts_with("\"client\";r=97;"), "{left}");
}
