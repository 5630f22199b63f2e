//! What every request gets: an id, a trace, a deadline, a line in the log, and an answer even when we panic.

use std::{
    any::Any,
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::{
    body::HttpBody,
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use tidings_sdk::trace::Traceparent;
use tokio::time::timeout;
use uuid::Uuid;

use super::{Code, Limits, Problem};

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client may name its request, within these limits: the name goes into our log.
const REQUEST_ID_LIMIT_BYTES: usize = 64;
/// For a whole request, body included.
const DEADLINE: Duration = Duration::from_secs(30);

/// More than the 8,000 that RFC 9110, section 4.1, asks for at least is used by nobody here.
pub(super) const URI_LIMIT_BYTES: usize = 8000;

/// Refusals with a status of 500 and more that are nobody's fault.
const DELIBERATE: [Code; 2] = [Code::Overloaded, Code::NotYetVisible];

tokio::task_local! {
    static REQUEST_ID: String;
}

/// The id of the request that is being answered.
pub(super) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

/// The innermost layer around every route.
pub async fn manners(State(limits): State<Limits>, mut request: Request, next: Next) -> Response {
    let id = callers_id(request.headers()).unwrap_or_else(|| Uuid::new_v4().to_string());
    let trace = callers_trace(request.headers()).map_or_else(Traceparent::new_root, Traceparent::child);
    request.extensions_mut().insert(Trace(trace));
    let method = request.method().clone();
    // The template, not the path: ids are for the log's other fields, and metrics need few names.
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let began = Instant::now();
    let answer = REQUEST_ID.scope(id.clone(), async {
        let admitted = match limits.admit(&mut request, &route) {
            Ok(admitted) => admitted,
            Err(problem) => return problem.into_response(),
        };
        let guarded = std::panic::AssertUnwindSafe(next.run(request)).catch_unwind();
        let mut response = match timeout(DEADLINE, guarded).await {
            Ok(Ok(response)) => response,
            Ok(Err(panic)) => panicked(&*panic),
            Err(_) => Problem::new(Code::DeadlineExceeded, format!("no answer within {DEADLINE:?}")).into_response(),
        };
        if let Some((place, meter)) = admitted {
            drop(place);
            response = limits.answers.hold(response).await;
            let also = response.extensions().get().copied().unwrap_or_default();
            meter.settle(response.body().size_hint().lower(), also, response.headers_mut());
        }
        response
    });
    let mut response = answer.await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    let (status, took_ms) = (response.status().as_u16(), began.elapsed().as_millis() as u64);
    // What clients can bring about as often as they like is counted, and does not fill the log.
    let deliberate = response.extensions().get().is_some_and(|code| DELIBERATE.contains(code));
    if response.status().is_server_error() && !deliberate {
        tracing::warn!(%method, route, status, took_ms, request_id = id, "answered");
    } else {
        tracing::debug!(%method, route, status, took_ms, request_id = id, "answered");
    }
    response
}

fn callers_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(X_REQUEST_ID)?.to_str().ok()?;
    let harmless = id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    (harmless && (1..=REQUEST_ID_LIMIT_BYTES).contains(&id.len())).then(|| id.to_owned())
}

fn callers_trace(headers: &HeaderMap) -> Option<Traceparent> {
    headers.get("traceparent")?.to_str().ok()?.parse().ok()
}

/// The panic's message may quote a value: the log gets the place, from the panic hook, and not the words.
fn panicked(_words: &(dyn Any + Send)) -> Response {
    tracing::error!(request_id = request_id(), "a handler panicked");
    Problem::from(Code::Internal).into_response()
}

/// The trace that this request belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Trace(pub Traceparent);

impl<S: Sync> FromRequestParts<S> for Trace {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().copied().unwrap_or_else(|| Self(Traceparent::new_root())))
    }
}

pub async fn route_not_found() -> Problem {
    Code::RouteNotFound.into()
}

pub async fn method_not_allowed() -> Problem {
    Code::MethodNotAllowed.into()
}
