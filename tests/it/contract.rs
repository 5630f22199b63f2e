//! Contract: what the service answers and tells is what its files say.
//!
//! Promise: each answer that any chapter gets through [`Answer::to`](crate::house::Answer::to), and each message that the House's
//! listener hears, was held against the document before the chapter saw it.
//! Not here, on purpose: whether the committed files are up to date. CI compares them with what the binary prints.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use jsonschema::Validator;
use lapin::{BasicProperties, types::AMQPValue};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::{app, docs, web::Code};
use tidings_sdk::{
    envelope::{Event, Notice},
    topology::{BACKFILL, Source},
};
use uuid::Uuid;

use crate::house::{Answer, House};

/// The OpenAPI document, in which no schema admits a member that it does not name.
static OPENAPI: LazyLock<Value> = LazyLock::new(|| {
    let mut document = serde_json::to_value(app::document()).unwrap();
    close(&mut document["components"]["schemas"]);
    document
});

fn close(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            if members.get("properties").is_some_and(Value::is_object) {
                members.entry("additionalProperties").or_insert(Value::Bool(false));
            }
            members.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// A validator of one schema of a document, which may refer to others of it.
fn validator(document: &Value, schema: &Value) -> Validator {
    let whole = json!({ "allOf": [schema], "components": document["components"] });
    jsonschema::options().should_validate_formats(true).build(&whole).unwrap()
}

fn validate(document: &Value, schema: &Value, instance: &Value) -> Result<(), String> {
    validator(document, schema).validate(instance).map_err(|error| format!("at {}: {error}", error.instance_path()))
}

/// Whether the document promises this answer to a request of this method and path.
pub fn check(method: &Method, path: &str, answer: &Answer) -> Result<(), String> {
    let status = answer.status.as_u16();
    let code = answer.body["code"].as_str();
    let Some(route) = route(path) else {
        return expect(status == 404 && code == Some("route_not_found"), "the document has no such path");
    };
    let is_head = *method == Method::HEAD;
    let method = if is_head { "get" } else { &method.as_str().to_ascii_lowercase() };
    let Some(operation) = route.get(method) else {
        return expect(status == 405 && code == Some("method_not_allowed"), "the document has no such method");
    };
    let response = &operation["responses"][status.to_string()];
    expect(response.is_object(), "the document has no such status")?;
    check_headers(&response["headers"], answer)?;
    let Some(contents) = response["content"].as_object() else {
        return expect(answer.text.is_empty(), "the document has no body here");
    };
    let media_type = answer.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = media_type.split(';').next().unwrap_or_default();
    let content = contents.get(essence).ok_or("the document has another content type")?;
    if let Some(code) = code.filter(|_| essence == "application/problem+json") {
        expect(content["examples"][code].is_object(), "the document does not have this code here")?;
    }
    if is_head {
        return expect(answer.text.is_empty(), "an answer to HEAD has no body");
    }
    if !essence.ends_with("json") {
        return Ok(());
    }
    // No schema of ours admits a bare null.
    expect(!answer.body.is_null(), "the body is no JSON")?;
    validate(&OPENAPI, &content["schema"], &answer.body)
}

/// What HTTP itself has beside every body.
const OF_HTTP: [&str; 5] = ["content-type", "content-length", "transfer-encoding", "connection", "date"];

fn check_headers(described: &Value, answer: &Answer) -> Result<(), String> {
    let described = described.as_object().ok_or("the document has no headers here")?;
    for (name, header) in described {
        let shared = header["$ref"].as_str().and_then(|place| OPENAPI.pointer(place.strip_prefix('#')?));
        let is_required = shared.unwrap_or(header)["required"] == true;
        expect(!is_required || answer.headers.contains_key(name), &format!("no {name}, which the document promises"))?;
    }
    let is_described = |name: &str| described.keys().any(|known| known.eq_ignore_ascii_case(name));
    match answer.headers.keys().find(|name| !OF_HTTP.contains(&name.as_str()) && !is_described(name.as_str())) {
        Some(name) => Err(format!("{name}, of which the document does not speak")),
        None => Ok(()),
    }
}

/// The AsyncAPI document, in which no schema admits a member that it does not name.
static ASYNCAPI: LazyLock<Value> = LazyLock::new(|| {
    let mut document = docs::asyncapi_document(&Source { exchange: "masterdata".to_owned(), prefix: None });
    for message in document["components"]["messages"].as_object_mut().unwrap().values_mut() {
        // Each House has an exchange of its own.
        let source = &mut message["headers"]["properties"]["cloudEvents_source"];
        *source = json!({ "type": "string", "pattern": "^urn:tidings:" });
        close(message);
    }
    document
});

/// Of each kind of message: what properties, headers and body have to be.
static MESSAGES: LazyLock<HashMap<String, [(&str, Validator); 3]>> = LazyLock::new(|| {
    let messages = ASYNCAPI["components"]["messages"].as_object().unwrap().values();
    let part = |message: &Value, name| validator(&ASYNCAPI, &message[name]);
    let parts = |message| ["x-amqp-properties", "headers", "payload"].map(|name| (name, part(message, name)));
    messages.map(|message| (message["name"].as_str().unwrap().to_owned(), parts(message))).collect()
});

/// Whether the document promises this message. What the broker adds on its way (`x-..`) is nobody's promise.
pub fn check_message(properties: &BasicProperties, body: &[u8]) -> Result<(), String> {
    let mut seen = docs::Seen::of(properties, body).ok_or("the body is no JSON")?;
    if let Some(headers) = seen.headers.as_object_mut() {
        headers.retain(|name, _| !name.starts_with("x-"));
    }
    let kind = seen.properties["type"].as_str().and_then(|kind| MESSAGES.get(kind)).ok_or("no such kind of message")?;
    for ((part, validator), value) in kind.iter().zip([&seen.properties, &seen.headers, &seen.payload]) {
        validator.validate(value).map_err(|error| format!("{part}, at {}: {error}", error.instance_path()))?;
    }
    // What a schema of the payload alone cannot say.
    let names_none = seen.payload["changed_fields"].as_array().is_some_and(Vec::is_empty);
    expect(!names_none || seen.headers.get(BACKFILL).is_some(), "payload: no changed field, and no backfill")
}

fn expect(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

/// The document's entry for a path; one that is spelt out goes before one with parameters.
fn route(path: &str) -> Option<&'static Value> {
    let paths = OPENAPI["paths"].as_object().unwrap();
    paths.get(path).or_else(|| paths.iter().find(|(template, _)| fits(template, path)).map(|(_, route)| route))
}

fn fits(template: &str, path: &str) -> bool {
    let (wanted, given): (Vec<&str>, Vec<&str>) = (template.split('/').collect(), path.split('/').collect());
    let same = |(wanted, given): (&&str, &&str)| wanted == given || (wanted.starts_with('{') && !given.is_empty());
    wanted.len() == given.len() && wanted.iter().zip(&given).all(same)
}

#[sqlx::test]
async fn an_answer_that_the_document_does_not_promise_is_found_out(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let path = format!("/v1/users/{ana}");
    let honest = house.get(&ana).await;
    assert_eq!(check(&Method::GET, &path, &honest), Ok(()));
    let lie = |change: &dyn Fn(&mut Answer), path: &str| {
        let (status, etag, headers) = (honest.status, honest.etag.clone(), honest.headers.clone());
        let mut answer = Answer { status, etag, headers, text: honest.text.clone(), body: honest.body.clone() };
        change(&mut answer);
        check(&Method::GET, path, &answer).unwrap_err()
    };
    assert!(lie(&|_| {}, "/v1/user").contains("no such path"));
    assert!(lie(&|answer| answer.status = 202.try_into().unwrap(), &path).contains("no such status"));
    assert!(lie(&|answer| answer.body["version"] = json!("1"), &path).contains("/version"));
    assert!(lie(&|answer| answer.body["salary"] = json!(1), &path).contains("salary"));
    assert!(lie(&|answer| drop(answer.body.as_object_mut().unwrap().remove("id")), &path).contains("id"));
    assert!(lie(&|answer| drop(answer.headers.remove("etag")), &path).contains("no ETag"));
    assert!(lie(&|answer| drop(answer.headers.remove("x-request-id")), &path).contains("no X-Request-Id"));
    let salary = |answer: &mut Answer| drop(answer.headers.insert("x-salary", 1.into()));
    assert!(lie(&salary, &path).contains("x-salary"));
    let says = |status: u16, text: &'static str| {
        move |answer: &mut Answer| {
            answer.status = status.try_into().unwrap();
            (answer.text, answer.body) = (text.to_owned(), Value::Null);
        }
    };
    assert!(lie(&says(200, ""), &path).contains("no JSON"));
    assert!(lie(&says(200, "Ana"), &path).contains("no JSON"));
    assert!(lie(&says(304, "Ana"), &path).contains("no body here"));
    let mut refused = house.get(&Uuid::new_v4()).await;
    refused.body["code"] = json!("user_mislaid");
    assert!(check(&Method::GET, &path, &refused).unwrap_err().contains("this code"));
}

/// Every change that there is, and which of these headers it takes.
fn changes() -> impl Iterator<Item = (Method, &'static str, Vec<&'static str>)> {
    let paths = OPENAPI["paths"].as_object().unwrap().iter();
    let operations = paths.flat_map(|(path, route)| route.as_object().unwrap().iter().map(move |(m, o)| (path, m, o)));
    // One that only reads is a POST for its body.
    let changes = operations.filter(|(path, method, _)| *method != "get" && *path != "/v1/users:batchGet");
    changes.map(|(path, method, operation)| {
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let taken = parameters.filter_map(|parameter| parameter["name"].as_str()).collect();
        (method.to_uppercase().parse().unwrap(), path.as_str(), taken)
    })
}

#[sqlx::test]
async fn a_change_takes_no_condition_and_no_key_that_would_be_without_effect(db: PgPool) {
    let house = House::open(db).await;
    for (method, path, taken) in changes() {
        let path = path.replace("{name}", "orders");
        let path = ["{id}", "{user_id}", "{message_id}"]
            .iter()
            .fold(path, |path, name| path.replace(name, &Uuid::new_v4().to_string()));
        for (header, code) in [
            ("If-Match", "invalid_header"),
            ("If-None-Match", "invalid_header"),
            ("Idempotency-Key", "invalid_idempotency_key"),
        ] {
            if !taken.contains(&header) {
                let asked = house.request(method.clone(), &path).header(header, "\"7\"").json(&json!({}));
                assert_eq!(Answer::to(asked).await.refusal(400), code, "{method} {path} {header}");
            }
        }
    }
}

#[sqlx::test]
async fn a_copy_of_what_is_told_of_users_has_to_be_asked_about(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let one = format!("/v1/users/{ana}");
    for path in [&*one, "/v1/users", "/v1/changes", "/v1/digest", "/v1/digest/0?buckets=1", "/v1/subscriptions"] {
        assert_eq!(house.page(path).await.ok().headers["cache-control"], "private, no-cache", "{path}");
    }
    let batch = house.request(Method::POST, "/v1/users:batchGet").json(&json!({ "ids": [ana] }));
    assert_eq!(Answer::to(batch).await.ok().headers["cache-control"], "private, no-cache");
    assert_eq!(house.page("/v1/users/7").await.headers["cache-control"], "no-store");
}

#[test]
fn a_message_that_the_document_does_not_promise_is_found_out() {
    let notice = Notice {
        message_id: Uuid::new_v4(),
        user_id: Uuid::new_v4(),
        version: 7,
        event: Event::from_name("profile.updated", vec!["job_title".parse().unwrap()]).unwrap(),
        occurred_at: time::OffsetDateTime::now_utc(),
        traceparent: None,
    };
    let (properties, body) = notice.to_message("urn:tidings:test");
    assert_eq!(check_message(&properties, &body), Ok(()));
    let with = |name: &str, value: AMQPValue| {
        let mut headers = properties.headers().clone().unwrap();
        headers.insert(name.into(), value);
        check_message(&properties.clone().with_headers(headers), &body)
    };
    let text = |value: &str| AMQPValue::LongString(value.into());
    assert_eq!(with("field.city", AMQPValue::Boolean(true)), Ok(()));
    assert_eq!(with("x-delivery-count", AMQPValue::LongLongInt(1)), Ok(()));
    for (name, value) in [
        ("version", text("7")),
        ("version", AMQPValue::LongLongInt(0)),
        ("job_title", text("Editor")),
        ("field.city", text("Riga")),
        ("field.two words", AMQPValue::Boolean(true)),
        ("cloudEvents_type", text("user.created")),
        ("cloudEvents_time", text("yesterday")),
        ("traceparent", text("00-1-1-1")),
    ] {
        assert!(with(name, value.clone()).unwrap_err().starts_with("headers"), "{name} {value:?}");
    }
    for wrong in [
        json!({ "user_id": notice.user_id }),
        json!({ "user_id": notice.user_id, "changed_fields": [] }),
        json!({ "user_id": notice.user_id, "changed_fields": ["job title"] }),
        json!({ "user_id": notice.user_id, "changed_fields": ["job_title"], "job_title": "Editor" }),
        json!({ "user_id": "7", "changed_fields": ["job_title"] }),
    ] {
        let lie = check_message(&properties, wrong.to_string().as_bytes()).unwrap_err();
        assert!(lie.starts_with("payload"), "{wrong}: {lie}");
    }
    for wrong in [
        properties.clone().with_delivery_mode(1),
        properties.clone().with_priority(1),
        properties.clone().with_message_id("7".into()),
        properties.clone().with_content_type("text/plain".into()),
    ] {
        assert!(check_message(&wrong, &body).unwrap_err().starts_with("x-amqp-properties"), "{wrong:?}");
    }
    assert!(check_message(&properties.with_type("user.renamed".into()), &body).is_err());
}

/// Every file of Rust under `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// [`Answer::to`] finds out whether the route has promised it.
#[sqlx::test]
async fn a_uri_may_be_too_long_for_any_route(db: PgPool) {
    let house = House::open(db).await;
    let long = "x".repeat(8000);
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.yaml", "/asyncapi.yaml", "/v1/users", "/v1/fields"] {
        assert_eq!(house.page(&format!("{path}?{long}")).await.refusal(414), "uri_too_long", "{path}");
    }
}

#[sqlx::test]
async fn the_pages_are_all_here_and_let_nothing_else_in(db: PgPool) {
    let house = House::open(db).await;
    let page = async |path: &str| house.request(Method::GET, path).send().await.unwrap();
    let index = page("/docs").await;
    assert_eq!(index.url().path(), "/docs/");
    let headers = index.headers().clone();
    let policy = headers["content-security-policy"].to_str().unwrap();
    for rule in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.split("; ").any(|stands| stands == rule), "{policy}");
    }
    assert_eq!(
        (headers["x-content-type-options"].to_str().unwrap(), headers["referrer-policy"].to_str().unwrap()),
        ("nosniff", "no-referrer")
    );
    let text = index.text().await.unwrap();
    let files: Vec<&str> = text.split(['"']).filter(|word| word.ends_with(".js") || word.ends_with(".css")).collect();
    assert!(files.len() > 3, "{text}");
    for file in files {
        let part = page(&format!("/docs/{file}")).await;
        assert_eq!(
            (part.status().as_u16(), part.headers()["x-content-type-options"].to_str().unwrap()),
            (200, "nosniff"),
            "{file}"
        );
    }
    let start = page("/docs/swagger-initializer.js").await.text().await.unwrap();
    assert!(start.contains("/openapi.yaml") && start.contains("\"validatorUrl\": \"none\""), "{start}");
    assert_eq!(page("/docs/../Cargo.toml").await.status(), 404);
    assert_eq!(house.page("/docs/nothing.js").await.refusal(404), "route_not_found");
}

#[test]
fn every_code_is_answered_with_somewhere_and_listed_by_a_route() {
    let text: String = sources(Path::new("src")).iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let named_in_code = |code: &Code| text.contains(&format!("Code::{code:?}"));
    let listed: BTreeSet<&str> = OPENAPI["paths"]
        .as_object()
        .unwrap()
        .values()
        .flat_map(|route| route.as_object().unwrap().values())
        .flat_map(|operation| operation["responses"].as_object().unwrap().values())
        .flat_map(|response| response["content"]["application/problem+json"]["examples"].as_object())
        .flat_map(|examples| examples.keys().map(String::as_str))
        .collect();
    for code in Code::ALL {
        assert!(named_in_code(code), "nobody answers with {code:?}");
        assert_ne!(listed.contains(code.as_str()), code.is_of_no_route(), "{code:?} and the routes that list it");
        assert!(code.status().is_client_error() || code.status().is_server_error(), "{code:?}");
    }
    let codes: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(codes.len(), Code::ALL.len(), "two codes are spelt alike");
}

#[test]
fn every_example_of_a_problem_is_one() {
    let examples = OPENAPI["components"]["examples"].as_object().unwrap();
    for (code, example) in examples {
        let schema = json!({ "$ref": "#/components/schemas/Problem" });
        assert_eq!(validate(&OPENAPI, &schema, &example["value"]), Ok(()), "{code}");
        assert_eq!(example["value"]["code"], json!(code));
    }
    // Where a reader is sent for all codes he finds them, or they are named at once.
    let standards = fs::read_to_string("docs/standards.md").unwrap();
    for code in Code::ALL {
        let is_named = standards.contains(&format!("`{}`", code.as_str()));
        assert!(examples.contains_key(code.as_str()) || (code.is_of_no_route() && is_named), "{code:?}");
    }
}
