//! Many users at once: `POST /v1/users:batchGet`.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    house::{Answer, House},
    load::users,
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
    let table: [(&str, &[(&str, &str)]); 9] = [
        (&too_many, &[("/ids", "length")]),
        (r#"{"ids":[]}"#, &[("/ids", "length")]),
        (&bad, &[("/ids/0", "format"), ("/ids/2", "format"), ("/ids/3", "format")]),
        (r#"{"ids":[7]}"#, &[("/ids/0", "type")]),
        (r#"{"ids":"7"}"#, &[("/ids", "type")]),
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
