//! What every request gets: an id, a trace, a deadline, a line in the log, and an answer even when we panic.

use std::{
    any::Any,
    cell::Cell,
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::{
    body::HttpBody,
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use tidings_sdk::trace::Traceparent;
use tokio::time::timeout;
use uuid::Uuid;

use super::{Code, Limits, Place, Problem};

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client may name its request, within these limits: the name goes into our log.
const REQUEST_ID_LIMIT_BYTES: usize = 64;
/// For a whole request, body included.
const DEADLINE: Duration = Duration::from_secs(30);

/// More than the 8,000 that RFC 9110, section 4.1, asks for at least is used by nobody here.
pub(super) const URI_LIMIT_BYTES: usize = 8000;

/// Of what `/v1` answers with, unless it is a refusal: a client may keep a copy, and has to ask each time whether it is still the latest.
const NO_CACHE: HeaderValue = HeaderValue::from_static("private, no-cache");

/// Refusals with a status of 500 and more that are nobody's fault.
const DELIBERATE: [Code; 2] = [Code::Overloaded, Code::NotYetVisible];

tokio::task_local! {
    static REQUEST_ID: String;
    /// Whether what the request asks for may be done, whatever becomes of its handler.
    static MAY_BE_DONE: Cell<bool>;
}

/// The id of the request that is being answered.
pub(super) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

/// From here on what the request asks for may be done: if there is no answer in time, its client hears that the outcome is unknown.
pub fn may_be_done() {
    // There is no request where a command changes users.
    let _ = MAY_BE_DONE.try_with(|may_be| may_be.set(true));
}

fn is_perhaps_done() -> bool {
    MAY_BE_DONE.with(Cell::get)
}

/// A layer further in: what was begun is done to its end although its client hangs up; its place and its turn are kept meanwhile. Who still
/// waits for his turn has begun nothing.
pub async fn to_the_end(place: Place, request: Request, next: Next) -> Result<Response, Problem> {
    let _awaited = place.awaited();
    place.to_the_end(REQUEST_ID.scope(request_id(), next.run(request))).await
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
    let answer = async {
        let admitted = match limits.admit(&mut request, &route) {
            Ok(admitted) => admitted,
            Err(problem) => return problem.into_response(),
        };
        let guarded = std::panic::AssertUnwindSafe(next.run(request)).catch_unwind();
        let mut response = match timeout(DEADLINE, guarded).await {
            Ok(Ok(response)) => response,
            Ok(Err(panic)) => panicked(&*panic),
            Err(_) => too_late().into_response(),
        };
        if let Some((place, meter)) = admitted {
            drop(place);
            response.headers_mut().entry(header::CACHE_CONTROL).or_insert(NO_CACHE);
            response = limits.answers.hold(response, is_perhaps_done()).await;
            let also = response.extensions().get().copied().unwrap_or_default();
            meter.settle(response.body().size_hint().lower(), also, response.headers_mut());
        }
        response
    };
    let answer = MAY_BE_DONE.scope(Cell::new(false), REQUEST_ID.scope(id.clone(), answer));
    let mut response = answer.await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    let took = began.elapsed();
    limits.traffic.answered(&method, &route, &response, took);
    let (status, took_ms) = (response.status().as_u16(), took.as_millis() as u64);
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

/// Of two that are named none is: which of them it would be depends on who stands between.
fn callers_trace(headers: &HeaderMap) -> Option<Traceparent> {
    let mut named = headers.get_all("traceparent").iter();
    let (Some(trace), None) = (named.next(), named.next()) else { return None };
    trace.to_str().ok()?.parse().ok()
}

fn too_late() -> Problem {
    let late = format!("no answer within {DEADLINE:?}");
    if is_perhaps_done() {
        Problem::new(
            Code::OutcomeUnknown,
            format!("{late}: the change may have been made; with an Idempotency-Key repeat it"),
        )
    } else {
        Problem::new(Code::DeadlineExceeded, late)
    }
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

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        http::{Method, StatusCode},
        middleware::from_fn_with_state,
        routing::{get, post},
    };
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;

    use super::*;
    use crate::web::{LimitSettings, Proxies};

    /// More than the room for long answers.
    const HUGE_BYTES: usize = 300 * 1024 * 1024;

    async fn ask(limits: &Limits, method: Method, path: &str) -> Response {
        let huge = || Body::from(vec![0; HUGE_BYTES]);
        let routes = Router::new()
            .route("/v1/slow", get(std::future::pending::<()>))
            .route(
                "/v1/slow",
                post(async || {
                    may_be_done();
                    std::future::pending::<()>().await;
                }),
            )
            .route("/v1/huge", get(async move || huge()))
            .route(
                "/v1/huge",
                post(async move || {
                    may_be_done();
                    huge()
                }),
            )
            .layer(from_fn_with_state(limits.clone(), manners));
        let request = Request::builder().method(method).uri(path).header("host", "x").body(Body::empty()).unwrap();
        TowerToHyperService::new(routes).call(request).await.unwrap()
    }

    fn limits() -> Limits {
        Limits::new(LimitSettings { connections: 1, requests: 2, rate: None, proxies: Proxies::default() })
    }

    #[test]
    fn a_request_belongs_to_the_one_trace_that_it_names() {
        let [one, other] = ["0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"]
            .map(|trace| format!("00-{trace}-b7ad6b7169203331-01"));
        let named = |traces: &[&str]| {
            let trace = |trace: &&str| (HeaderName::from_static("traceparent"), trace.parse().unwrap());
            callers_trace(&traces.iter().map(trace).collect())
        };
        assert_eq!(named(&[&one]), one.parse().ok());
        for nothing in [&[][..], &["00-0af7"], &[&one, &other], &[&one, &one]] {
            assert_eq!(named(nothing), None, "{nothing:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_answer_in_time_hears_whether_something_may_be_done() {
        let limits = limits();
        for (method, code) in [(Method::GET, Code::DeadlineExceeded), (Method::POST, Code::OutcomeUnknown)] {
            let answer = ask(&limits, method, "/v1/slow").await;
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(answer.extensions().get(), Some(&code));
        }
    }

    #[tokio::test]
    async fn the_answer_to_a_change_is_given_though_there_is_no_room() {
        let limits = limits();
        assert_eq!(ask(&limits, Method::GET, "/v1/huge").await.status(), StatusCode::SERVICE_UNAVAILABLE);
        let answer = ask(&limits, Method::POST, "/v1/huge").await;
        assert_eq!((answer.status(), answer.body().size_hint().exact()), (StatusCode::OK, Some(HUGE_BYTES as u64)));
    }
}
