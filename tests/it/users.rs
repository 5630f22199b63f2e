//! Users: what a client may ask, and what it hears.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::clients::{NewClient, Scope};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

use crate::house::{Answer, House, eventually, file, http_with, new_client};

const NOBODY: [&str; 0] = [];

fn time(of: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(of.as_str().unwrap(), &Rfc3339).unwrap()
}

fn user(house: &House, method: Method, id: &Uuid) -> RequestBuilder {
    house.request(method, &format!("/v1/users/{id}"))
}

fn put(house: &House, id: &Uuid, profile: Value) -> RequestBuilder {
    user(house, Method::PUT, id).json(&json!({ "profile": profile }))
}

async fn get(house: &House, id: &Uuid, tags: &str) -> Answer {
    Answer::to(user(house, Method::GET, id).header("if-none-match", tags)).await
}

#[sqlx::test]
async fn an_amended_user_is_told_once(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title]"]);
}

#[sqlx::test]
async fn a_new_user_is_answered_as_it_will_be_read(db: PgPool) {
    let house = House::open(db).await;
    let profile = json!({ "first_name": "Ana", "phone": ["1", 2.5, true], "social": { "x": { "~/": null } } });
    let created = house.create(profile.clone()).await;
    assert_eq!(created.status, 201, "{created:?}");
    let id: Uuid = created.body["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(created.headers["location"], format!("/v1/users/{id}"));
    assert_eq!(created.etag.as_deref(), Some("\"1\""));
    let names: Vec<&String> = created.body.as_object().unwrap().keys().collect();
    assert_eq!(names, ["created_at", "id", "profile", "updated_at", "version"]);
    assert_eq!((&created.body["version"], &created.body["profile"]), (&json!(1), &profile));
    let age = OffsetDateTime::now_utc() - time(&created.body["created_at"]);
    assert!(age.abs() < time::Duration::minutes(1), "{age}");
    assert_eq!(created.body["updated_at"], created.body["created_at"]);

    let read = house.get(&id).await;
    assert_eq!((read.status.as_u16(), read.etag, &read.body), (200, created.etag, &created.body));
    assert_eq!(read.headers["cache-control"], "private, no-cache");
    let head = Answer::to(user(&house, Method::HEAD, &id)).await;
    assert_eq!((head.status.as_u16(), head.etag.as_deref()), (200, Some("\"1\"")));
}

#[sqlx::test]
async fn an_amendment_is_answered_with_the_new_record(db: PgPool) {
    let house = House::open(db).await;
    let before = house.create(json!({ "first_name": "Ana", "nickname": "A", "social": { "x": "a", "y": "b" } })).await;
    let ana = before.body["id"].as_str().unwrap().parse().unwrap();
    let patch =
        json!({ "job_title": "Editor", "nickname": null, "social": { "y": null, "z": "c" }, "first_name": "Ana" });
    let amended = house.amend(&ana, patch).await;
    assert_eq!((amended.status.as_u16(), amended.etag.as_deref()), (200, Some("\"2\"")));
    assert_eq!(
        amended.body["profile"],
        json!({ "first_name": "Ana", "job_title": "Editor", "social": { "x": "a", "z": "c" } })
    );
    assert_eq!(amended.body["created_at"], before.body["created_at"]);
    assert!(time(&amended.body["updated_at"]) > time(&before.body["updated_at"]));
    assert_eq!(house.get(&ana).await.body, amended.body);
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title,nickname,social]"]);
}

#[sqlx::test]
async fn a_patch_that_changes_nothing_tells_nobody(db: PgPool) {
    let house = House::open(db).await;
    let before = house.create(json!({ "first_name": "Ana", "district": 1, "social": { "x": "a" } })).await;
    let ana = before.body["id"].as_str().unwrap().parse().unwrap();
    let spelt_otherwise = r#"{"profile":{"social":{"\u0078":"a"},"district":1.0,"first_name":"\u0041na"}}"#;
    for patch in ["{\"profile\":{}}", r#"{"profile":{"nickname":null,"social":{"q":null}}}"#, spelt_otherwise] {
        let same = Answer::to(house.patch(&ana, json!({})).body(patch)).await;
        assert_eq!((same.status.as_u16(), &same.body), (200, &before.body), "{patch}");
    }
    let same = house.put(&ana, before.body["profile"].clone()).await;
    assert_eq!((same.status.as_u16(), &same.body), (200, &before.body));
    house.amend(&ana, json!({ "first_name": "Anna" })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[first_name]"]);
}

#[sqlx::test]
async fn a_replacement_names_what_came_what_went_and_what_differs(db: PgPool) {
    let house = House::open(db).await;
    let ana = Uuid::new_v4();
    let created = house.put(&ana, json!({ "first_name": "Ana", "nickname": "A", "city": "Riga" })).await;
    assert_eq!((created.status.as_u16(), created.version()), (201, 1));
    assert_eq!(created.headers["location"], format!("/v1/users/{ana}"));
    let replaced = house.put(&ana, json!({ "first_name": "Ana", "city": "Oslo", "email": "a@b" })).await;
    assert_eq!((replaced.status.as_u16(), replaced.etag.as_deref()), (200, Some("\"2\"")));
    assert!(!replaced.headers.contains_key("location"), "{replaced:?}");
    assert_eq!(replaced.body["profile"], json!({ "first_name": "Ana", "city": "Oslo", "email": "a@b" }));
    assert_eq!(replaced.body["created_at"], created.body["created_at"]);
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city,email,nickname]"]);
}

#[sqlx::test]
async fn a_deleted_user_is_gone_for_good(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    for _ in 0..2 {
        let deleted = house.delete(&ana).await;
        assert_eq!((deleted.status.as_u16(), &deleted.body), (204, &Value::Null));
    }
    for gone in [
        house.get(&ana).await,
        house.amend(&ana, json!({ "job_title": "Editor" })).await,
        house.put(&ana, json!({ "first_name": "Ana" })).await,
        Answer::to(put(&house, &ana, json!({})).header("if-none-match", "*")).await,
        get(&house, &ana, "\"2\"").await,
    ] {
        assert_eq!(gone.refusal(410), "user_deleted");
        assert_eq!(gone.version(), 2);
        let age = OffsetDateTime::now_utc() - time(&gone.body["deleted_at"]);
        assert!(age.abs() < time::Duration::minutes(1), "{age}");
    }
    assert_eq!(house.told(&ana).await, ["user.created", "user.deleted"]);
}

#[sqlx::test]
async fn nobody_is_found_under_an_id_that_nobody_had(db: PgPool) {
    let house = House::open(db).await;
    let nobody = Uuid::new_v4();
    let asked = [house.get(&nobody).await, house.amend(&nobody, json!({})).await, house.delete(&nobody).await];
    for missing in asked {
        assert_eq!(missing.refusal(404), "user_not_found");
    }
    assert_eq!(house.told(&nobody).await, NOBODY);
}

#[sqlx::test]
async fn a_client_that_holds_the_version_is_not_sent_it_again(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "first_name": "Anna" })).await.ok();
    for held in ["\"2\"", "W/\"2\"", "\"1\", \"2\"", "*", "\"a,b\" , W/\"2\""] {
        let answer = get(&house, &ana, held).await;
        assert_eq!((answer.status.as_u16(), answer.etag.as_deref()), (304, Some("\"2\"")), "{held}");
        assert_eq!(answer.body, Value::Null, "{held}");
    }
    for other in ["\"1\"", "\"02\"", "\"3\", \"1\"", "\"\"", "W/\"22\""] {
        assert_eq!(get(&house, &ana, other).await.status, 200, "{other}");
    }
    for (wanted, status) in [("\"2\"", 200), ("*", 200), ("\"1\", \"3\"", 412), ("W/\"2\"", 412)] {
        let answer = Answer::to(user(&house, Method::GET, &ana).header("if-match", wanted)).await;
        assert_eq!(answer.status, status, "{wanted}");
    }
}

/// What a client may see of a record is a representation of its own: a copy of it is not the latest when the client comes to see more.
#[sqlx::test]
async fn a_client_that_comes_to_see_more_is_sent_it_anew(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana", "city": "Riga" })).await;
    let fields = |names: &[&str]| Some(names.iter().map(|name| name.parse().unwrap()).collect());
    let scopes = [Scope::ReadUsers, Scope::WriteUsers];
    let client = NewClient { fields: fields(&["city"]), ..NewClient::named("crm", scopes).unwrap() };
    let crm = new_client(&house.db, client).await;
    let ask = async |held: &str| {
        let request = http_with(&crm).get(format!("{}/v1/users/{ana}", house.service.url));
        Answer::to(request.header("if-none-match", held)).await
    };
    let first = ask("\"1\"").await.ok();
    assert_eq!(first.body["profile"], json!({ "city": "Riga" }));
    let tag = first.etag.unwrap();
    assert_eq!(ask(&tag).await.status, 304);
    // Who changes the user says which version that was, in either form.
    for (tag, version) in [(tag.clone(), 2), ("\"2\"".to_owned(), 3)] {
        let request = http_with(&crm).patch(format!("{}/v1/users/{ana}", house.service.url));
        let body = json!({ "profile": { "city": version.to_string() } }).to_string();
        let request = request.header("content-type", "application/merge-patch+json").header("if-match", tag);
        assert_eq!(Answer::to(request.body(body)).await.ok().version(), version);
    }
    let held = ask("\"1\"").await.ok().etag.unwrap();
    assert_eq!(ask(&held).await.status, 304);
    let more = vec!["city".to_owned(), "first_name".to_owned()];
    sqlx::query("update clients set fields = $1 where name = 'crm'").bind(more).execute(&house.db).await.unwrap();
    eventually("the longer list to be known", async || match ask(&held).await {
        answer if answer.status == 200 => {
            assert_eq!(answer.body["profile"], json!({ "first_name": "Ana", "city": "3" }));
            Ok(())
        }
        answer => Err(answer),
    })
    .await;
}

#[sqlx::test]
async fn a_condition_that_does_not_hold_changes_nothing(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "first_name": "Anna" })).await.ok();
    let stale = [
        ("if-match", "\"1\""),
        ("if-match", "W/\"2\""),
        ("if-match", "\"1\", \"3\""),
        ("if-match", "\"two\""),
        ("if-none-match", "*"),
    ];
    for (name, value) in stale {
        for request in [
            house.patch(&ana, json!({ "first_name": "Eve" })),
            put(&house, &ana, json!({ "first_name": "Eve" })),
            user(&house, Method::DELETE, &ana),
        ] {
            let refused = Answer::to(request.header(name, value)).await;
            assert_eq!((refused.refusal(412), refused.version()), ("version_mismatch", 2), "{name}: {value}");
            let detail = refused.body["detail"].as_str().unwrap();
            assert!(detail.starts_with("the user is at version 2"), "{name}: {value}: {detail}");
        }
    }
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[first_name]"]);

    let nobody = Uuid::new_v4();
    for value in ["\"1\"", "*"] {
        let refused = Answer::to(put(&house, &nobody, json!({})).header("if-match", value)).await;
        assert_eq!((refused.refusal(412), refused.body.get("version")), ("version_mismatch", None), "{value}");
        assert!(refused.body["detail"].as_str().unwrap().starts_with("nobody has this id"), "{refused:?}");
    }
    assert_eq!(house.get(&nobody).await.refusal(404), "user_not_found");
}

#[sqlx::test]
async fn a_condition_that_holds_lets_the_change_through(db: PgPool) {
    let house = House::open(db).await;
    let ana = Uuid::new_v4();
    let created = Answer::to(put(&house, &ana, json!({ "city": "0" })).header("if-none-match", "*")).await;
    assert_eq!(created.status, 201);
    for (step, held) in ["\"1\"", "\"7\", \"2\"", "*", "W/\"4\", \"4\""].into_iter().enumerate() {
        let request = house.patch(&ana, json!({ "city": (step + 1).to_string() })).header("if-match", held);
        assert_eq!(Answer::to(request).await.ok().version(), step as i64 + 2, "{held}");
    }
    // A list may come in several lines (RFC 9110, section 5.3).
    let replace = put(&house, &ana, json!({})).header("if-match", "\"9\"").header("if-match", "\"5\"");
    assert_eq!(Answer::to(replace).await.ok().version(), 6);
    let read = user(&house, Method::GET, &ana).header("if-none-match", "\"9\"").header("if-none-match", "\"6\"");
    assert_eq!(Answer::to(read).await.status, 304);
    let deleted = Answer::to(user(&house, Method::DELETE, &ana).header("if-match", "\"6\"")).await;
    assert_eq!(deleted.status, 204);
}

#[sqlx::test]
async fn a_state_older_than_asked_for_is_never_answered(db: PgPool) {
    let house = House::open(db).await;
    let at_least = async |id: &Uuid, version: i64| house.page(&format!("/v1/users/{id}?min_version={version}")).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(at_least(&ana, 1).await.ok().version(), 1);
    let early = at_least(&ana, 2).await;
    assert_eq!((early.refusal(503), early.version()), ("not_yet_visible", 1));
    assert_eq!(early.headers["retry-after"], "1");
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    for version in [1, 2] {
        assert_eq!(at_least(&ana, version).await.ok().version(), 2);
    }
    house.delete(&ana).await;
    assert_eq!(at_least(&ana, 3).await.refusal(410), "user_deleted");
    assert_eq!(at_least(&ana, 4).await.refusal(503), "not_yet_visible");
    // An id that is not there yet may still come.
    assert_eq!(at_least(&Uuid::new_v4(), 1).await.refusal(503), "not_yet_visible");
}

#[sqlx::test]
async fn pages_show_every_living_user_once(db: PgPool) {
    let house = House::open(db).await;
    let mut users = vec![];
    for city in 0..11 {
        users.push(house.user(json!({ "city": city.to_string() })).await);
    }
    for index in [10, 5, 4, 0] {
        house.delete(&users.remove(index)).await;
    }
    // An id of the client's own takes its place in the order.
    let first = Uuid::from_u128(1);
    house.put(&first, json!({})).await.ok();
    users.insert(0, first);

    let (mut seen, mut lengths, mut path) = (vec![], vec![], "/v1/users?limit=3".to_owned());
    loop {
        let page = house.page(&path).await.ok();
        let ids = page.body["users"].as_array().unwrap().iter().map(|user| user["id"].as_str().unwrap().to_owned());
        lengths.push(ids.len());
        seen.extend(ids);
        let Some(next) = page.body["next"].as_str() else { break };
        path = format!("/v1/users?limit=3&after={next}");
    }
    assert_eq!(seen, users.iter().map(Uuid::to_string).collect::<Vec<_>>());
    assert_eq!(lengths, [3, 3, 2]);

    let all = house.page("/v1/users").await.ok();
    assert_eq!((all.body["users"].as_array().unwrap().len(), &all.body["next"]), (8, &Value::Null));
    assert_eq!(all.body["users"][0], house.get(&first).await.body);
    // A page that ends with the last user has no next one.
    assert_eq!(house.page("/v1/users?limit=8").await.ok().body["next"], Value::Null);
}

#[sqlx::test]
async fn a_page_goes_on_past_a_user_that_was_deleted_meanwhile(db: PgPool) {
    let house = House::open(db).await;
    let mut users = vec![];
    for _ in 0..3 {
        users.push(house.user(json!({})).await);
    }
    let page = house.page("/v1/users?limit=2").await.ok();
    house.delete(&users[1]).await;
    let rest = house.page(&format!("/v1/users?after={}", page.body["next"].as_str().unwrap())).await.ok();
    assert_eq!(rest.body["users"], json!([house.get(&users[2]).await.body]));
}

#[sqlx::test]
async fn the_deployments_own_schema_decides(db: PgPool) {
    let schema = file(
        r#"{ "type": "object", "additionalProperties": false, "required": ["badge"],
             "properties": { "badge": { "type": "string", "pattern": "^[0-9]+$" }, "shoe_size": { "type": "number" } } }"#,
    );
    let house = House::with(db, &[("TIDINGS_PROFILE_SCHEMA", schema.to_str().unwrap())]).await;
    let ana = house.user(json!({ "badge": "7", "shoe_size": 38.5 })).await;
    for (patch, pointer, code) in [
        (json!({ "badge": "x" }), "/profile/badge", "pattern"),
        (json!({ "badge": null }), "/profile/badge", "required"),
        (json!({ "first_name": "Ana" }), "/profile/first_name", "unknown_field"),
    ] {
        let refused = house.amend(&ana, patch).await;
        assert_eq!(refused.refusal(422), "profile_invalid");
        assert_eq!(
            (&refused.body["errors"][0]["pointer"], &refused.body["errors"][0]["code"]),
            (&json!(pointer), &json!(code))
        );
    }
    house.amend(&ana, json!({ "shoe_size": 39 })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[shoe_size]"]);
}
