//! Headers: what answers have beside their bodies, as far as routes have it in common.
//!
//! Promise: every header that an answer brings stands in the document, and one that is `required` there is never missing.
//! Not here, on purpose: `Location` and `ETag`, of which routes speak, and what refusals of one status have, of which `web::problem` does.

use serde_json::{Value, json};
use utoipa::openapi::{
    Header, OpenApi, Ref, RefOr,
    extensions::Extensions,
    header::HeaderBuilder,
    path::Operation,
    response::Response,
    schema::{ObjectBuilder, Type},
};

use super::examples::operations;

/// Under which routes are for clients, who may be limited.
const FOR_CLIENTS: &str = "/v1/";
/// Refusals before the key was looked at, or as it is none.
const BEFORE_THE_KEY: [&str; 2] = ["401", "414"];
/// Of what was decided under a key. All other refusals are decided anew.
const REPEATED: [&str; 7] = ["200", "201", "204", "404", "409", "410", "412"];

/// Names the headers that many answers have, once, and says which of their answers have which.
pub fn declare(api: &mut OpenApi) {
    for (path, route) in &mut api.paths.paths {
        for operation in operations(route) {
            let takes_key = takes_key(operation);
            for (status, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response {
                    require(status, response);
                    for name in common(path, status, takes_key, response) {
                        let place = Ref::new(format!("#/components/headers/{name}"));
                        response.headers.entry(name.to_owned()).or_insert(RefOr::Ref(place));
                    }
                }
            }
        }
    }
    let headers = [
        always("X-Request-Id", "Names the request in the service's log", json!("6f3c1c1e-3c9d-4f3e-9b5a-1d2c3b4a5f60")),
        always("Cache-Control", "`no-store` of a refusal; else a copy is asked about each time", json!("no-store")),
        sometimes(
            "RateLimit-Policy",
            "To a limited client: tokens at once, and seconds in which they come in",
            json!("\"client\";q=30;w=3"),
        ),
        sometimes(
            "RateLimit",
            "To a limited client: tokens that are left, and seconds until all are there again",
            json!("\"client\";r=29;t=1"),
        ),
        sometimes("Idempotency-Replayed", "`true`: this answers a repetition", json!("true")),
        sometimes(
            "Idempotency-Version",
            "With `Idempotency-Replayed`: the version that the request made or met when it was new; 0: none",
            json!(7),
        ),
        sometimes("Retry-After", "With `idempotency_key_in_flight`: seconds after which to ask again", json!("1")),
    ];
    api.components.get_or_insert_default().headers.extend(headers);
}

fn takes_key(operation: &Operation) -> bool {
    operation.parameters.iter().flatten().any(|parameter| match parameter {
        RefOr::T(parameter) => parameter.name == "Idempotency-Key",
        RefOr::Ref(_) => false,
    })
}

/// What an answer has by its kind.
fn common(path: &str, status: &str, takes_key: bool, response: &Response) -> Vec<&'static str> {
    let is_for_clients = path.starts_with(FOR_CLIENTS);
    let mut names = vec!["X-Request-Id"];
    if is_for_clients || response.content.contains_key("application/problem+json") {
        names.push("Cache-Control");
    }
    if is_for_clients && !BEFORE_THE_KEY.contains(&status) {
        names.extend(["RateLimit-Policy", "RateLimit"]);
    }
    if takes_key && REPEATED.contains(&status) {
        names.extend(["Idempotency-Replayed", "Idempotency-Version"]);
    }
    if takes_key && status == "409" {
        names.push("Retry-After");
    }
    names
}

/// What is said of one status is so for each answer of it, but for the media type that would be right: of a patch it has another header;
/// and for the challenge of 403: where a field is not for a client, no other scope would help.
fn require(status: &str, response: &mut Response) {
    for (name, header) in &mut response.headers {
        if let RefOr::T(header) = header
            && !name.starts_with("Accept")
            && status != "403"
        {
            header.extensions = Some(required());
        }
    }
}

/// utoipa has no name for it.
fn required() -> Extensions {
    Extensions::from_iter([("required", true)])
}

fn always(name: &str, what: &str, example: Value) -> (String, RefOr<Header>) {
    (name.to_owned(), described(what, example).extensions(Some(required())).build().into())
}

fn sometimes(name: &str, what: &str, example: Value) -> (String, RefOr<Header>) {
    (name.to_owned(), described(what, example).build().into())
}

fn described(what: &str, example: Value) -> HeaderBuilder {
    let kind = if example.is_string() { Type::String } else { Type::Integer };
    let schema = ObjectBuilder::new().schema_type(kind).examples([example]);
    HeaderBuilder::new().schema(Some(schema)).description(Some(what))
}
