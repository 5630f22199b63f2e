//! Docs: the contract as files, and as pages to read, from this instance itself.
//!
//! Promise: the pages need no other host and run no script but their own. Nobody needs a key to ask for these, so the answers that
//! wait for their clients share one copy.
//! Not here, on purpose: what the contract is. The routes and the envelope say that.

mod asyncapi;
mod examples;
mod headers;

use std::{borrow::Cow, sync::Arc};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::Config;

pub use asyncapi::{Seen, asyncapi, asyncapi_at, document as asyncapi_document};
pub use examples::finish;
pub use headers::declare;

use crate::web::{Code, Problem, Refusals};

/// Both files, as they are served.
#[derive(Clone)]
pub struct Docs {
    openapi: Bytes,
    asyncapi: Bytes,
}

impl Docs {
    pub fn new(openapi: String, asyncapi: String) -> Self {
        Self { openapi: openapi.into(), asyncapi: asyncapi.into() }
    }
}

pub fn routes() -> OpenApiRouter<Docs> {
    OpenApiRouter::new().routes(routes!(openapi)).routes(routes!(messages))
}

/// The pages, which stand in no document.
pub fn pages() -> Router {
    Router::new()
        .route("/docs", get(|| async { Redirect::permanent("/docs/") }))
        .route("/docs/", get(|| page("index.html")))
        .route("/docs/{file}", get(|Path(file): Path<String>| async move { page(&file).await }))
}

const YAML: &str = "application/yaml";

/// This document.
///
/// As `tidings openapi` prints it. `GET /docs` shows it as pages.
#[utoipa::path(get, path = "/openapi.yaml", tag = "operations", operation_id = "openapi", security(()),
    responses((status = 200, description = "OpenAPI 3.1", body = Object, content_type = "application/yaml",
               example = json!({ "openapi": "3.1.0", "info": { "title": "tidings" } })), Refusals<()>))]
async fn openapi(State(docs): State<Docs>) -> Response {
    ([(header::CONTENT_TYPE, YAML)], docs.openapi).into_response()
}

/// The messages that tell of changes.
///
/// As `tidings asyncapi` prints it, with the exchange and the routing keys of this deployment.
#[utoipa::path(get, path = "/asyncapi.yaml", tag = "operations", operation_id = "asyncapi", security(()),
    responses((status = 200, description = "AsyncAPI 3.0", body = Object, content_type = "application/yaml",
               example = json!({ "asyncapi": "3.0.0", "info": { "title": "tidings" } })), Refusals<()>))]
async fn messages(State(docs): State<Docs>) -> Response {
    ([(header::CONTENT_TYPE, YAML)], docs.asyncapi).into_response()
}

/// Scripts and styles are files of ours; React sets single styles by script. Nobody frames the pages, nothing is sent elsewhere.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// A file of the pages, which are built into the binary.
async fn page(file: &str) -> Result<Response, Problem> {
    // Without a validator: it would send the document to somebody else's host.
    let config = Config::from("/openapi.yaml").use_base_layout().validator_url("none").display_operation_id(true);
    let found = utoipa_swagger_ui::serve(file, Arc::new(config)).map_err(|_| Code::Internal)?;
    let found = found.ok_or(Code::RouteNotFound)?;
    let kind = HeaderValue::from_str(&found.content_type).map_err(|_| Code::Internal)?;
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    let bytes = match found.bytes {
        Cow::Borrowed(of_binary) => Bytes::from_static(of_binary),
        Cow::Owned(made) => made.into(),
    };
    Ok((headers, bytes).into_response())
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    #[tokio::test]
    async fn however_many_ask_for_a_document_or_a_page_it_is_in_memory_once() {
        let docs = Docs::new("openapi: 3.1.0".to_owned(), "asyncapi: 3.0.0".to_owned());
        let ask = async || {
            let state = || State(docs.clone());
            let answers =
                [openapi(state()).await, messages(state()).await, page("swagger-ui-bundle.js").await.unwrap()];
            let mut bodies = vec![];
            for answer in answers {
                bodies.push(to_bytes(answer.into_body(), usize::MAX).await.unwrap());
            }
            bodies
        };
        for (one, another) in ask().await.iter().zip(&ask().await) {
            assert!(!one.is_empty() && one == another);
            assert_eq!(one.as_ptr(), another.as_ptr());
        }
    }
}
