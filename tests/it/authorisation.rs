//! Authorisation: who gets in where, for every route and every kind of caller, compared with `docs/authorisation.md`.
//!
//! Promise: a route that is added, or that changes whom it lets in, fails here until the committed matrix says so too.

use std::{fmt::Write, fs, path::Path};

use reqwest::{Client, Method, StatusCode};

use sqlx::PgPool;
use tidings::{
    app,
    clients::{NewClient, Scope},
};
use uuid::Uuid;

use crate::house::{House, http_with, new_client};

const MATRIX: &str = "docs/authorisation.md";

const HEAD: &str = "\
# Authorisation matrix

Who gets in where: `yes`, or the status that refuses. Written and compared by the test `authorisation::the_matrix_is_as_committed`, which
asks the running service as each of these callers. A caller that gets in may still be refused for what it asks: a client with a field list
sees and writes these fields alone ([access](access.md)), and a subscription that another client stands for is not there for it.

";

/// Routes that the OpenAPI document does not describe.
const FILES: [&str; 1] = ["/docs/"];

/// Kinds of caller, each with its key; none for who brings none.
async fn callers(house: &House) -> Vec<(String, Option<String>)> {
    let mut callers = vec![
        ("no key".to_owned(), None),
        ("unknown key".to_owned(), Some(format!("tdg_{}_{}", "0".repeat(16), "0".repeat(64)))),
    ];
    for (name, scopes) in [
        ("revoked", vec![Scope::Admin]),
        ("expired", vec![Scope::Admin]),
        ("users:read", vec![Scope::ReadUsers]),
        ("users:write", vec![Scope::WriteUsers]),
        ("subscriptions", vec![Scope::Subscriptions]),
        ("admin", vec![Scope::Admin]),
    ] {
        let client = NewClient::named(&name.replace(':', "-"), scopes).unwrap();
        callers.push((name.to_owned(), Some(new_client(&house.db, client).await)));
    }
    for ended in [
        "update client_keys set revoked_at = now() where client = 'revoked'",
        "update client_keys set expires_at = now() where client = 'expired'",
    ] {
        assert_eq!(sqlx::query(ended).execute(&house.db).await.unwrap().rows_affected(), 1);
    }
    callers
}

/// Every operation of the document, with the scope that it says it demands.
fn operations() -> Vec<(Method, String, Option<String>)> {
    let document = serde_json::to_value(app::document()).unwrap();
    let everywhere = document["security"].clone();
    let mut operations = vec![];
    for (path, route) in document["paths"].as_object().unwrap() {
        for (method, operation) in
            route.as_object().unwrap().iter().filter(|(_, operation)| operation["responses"].is_object())
        {
            let security = operation.get("security").unwrap_or(&everywhere);
            let scope = security[0]["key"][0].as_str().map(str::to_owned);
            operations.push((method.to_uppercase().parse().unwrap(), path.clone(), scope));
        }
    }
    operations.extend(FILES.map(|path| (Method::GET, path.to_owned(), None)));
    operations
}

/// The path with something in the place of each parameter that is well-formed and that nobody has.
fn spelt_out(template: &str) -> String {
    let part = |part: &str| match part.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
        Some(("name", rest)) => format!("nobody.here{rest}"),
        Some(("bucket", rest)) => format!("0{rest}"),
        Some((_, rest)) => format!("{}{rest}", Uuid::new_v4()),
        None => part.to_owned(),
    };
    template.split('/').map(part).collect::<Vec<_>>().join("/")
}

async fn gets_in(house: &House, method: &Method, path: &str, key: Option<&str>) -> String {
    let client = key.map_or_else(Client::new, http_with);
    let mut request = client.request(method.clone(), format!("{}{}", house.service.url, spelt_out(path)));
    if matches!(*method, Method::POST | Method::PUT | Method::PATCH) {
        let media_type = if *method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        request = request.header("content-type", media_type).body("{}");
    }
    let answer = request.send().await.unwrap();
    match answer.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => answer.status().as_u16().to_string(),
        status if status.is_server_error() => panic!("{method} {path}: {status}"),
        _ => "yes".to_owned(),
    }
}

#[sqlx::test]
async fn the_matrix_is_as_committed(db: PgPool) {
    let house = House::open(db).await;
    let callers = callers(&house).await;
    let mut matrix = HEAD.to_owned();
    let names: Vec<&str> = callers.iter().map(|(name, _)| name.as_str()).collect();
    writeln!(matrix, "| route | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len())).unwrap();
    let mut guarded = 0;
    for (method, path, scope) in operations() {
        let mut row = vec![];
        for (_, key) in &callers {
            row.push(gets_in(&house, &method, &path, key.as_deref()).await);
        }
        writeln!(matrix, "| `{method} {path}` | {} |", row.join(" | ")).unwrap();
        // Whatever the matrix says: nothing under /v1 is open, and a route lets in whom its description names.
        assert_eq!(scope.is_some(), path.starts_with("/v1/"), "{method} {path}");
        guarded += usize::from(scope.is_some());
        for ((name, _), cell) in callers.iter().zip(&row) {
            let expected = match (&scope, name.as_str()) {
                (None, _) | (Some(_), "admin") => "yes",
                (Some(_), "no key" | "unknown key" | "revoked" | "expired") => "401",
                (Some(scope), name) if scope == name => "yes",
                _ => "403",
            };
            assert_eq!(cell, expected, "{method} {path} as {name}");
        }
    }
    assert!(guarded > 15, "{matrix}");
    let committed = fs::read_to_string(MATRIX).unwrap_or_default();
    if committed != matrix {
        let now = Path::new(env!("CARGO_TARGET_TMPDIR")).join("authorisation.md");
        fs::write(&now, &matrix).unwrap();
        panic!("{MATRIX} is not what the service does; if it should be: cp {} {MATRIX}", now.display());
    }
}

#[test]
fn parameters_are_spelt_out() {
    assert_eq!(spelt_out("/v1/subscriptions/{name}/backfill:pause"), "/v1/subscriptions/nobody.here/backfill:pause");
    assert!(!spelt_out("/v1/users/{id}").contains(['{', '}']));
}
