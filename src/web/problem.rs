//! Refusals: RFC 9457 problem details.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::manners::request_id;
use crate::json::Fault;

/// A refusal. `code` is for programs and never changes; `detail` is for people and holds no value of a profile.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    errors: Vec<Fault>,
    version: Option<i64>,
    deleted_at: Option<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), errors: vec![], version: None, deleted_at: None, headers: vec![] }
    }

    pub fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    /// Not now: the client may try again.
    pub fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, detail).with_header(header::RETRY_AFTER, "1")
    }

    /// Our own fault. The client gets fixed words; the log has the cause.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the service failed; its log has the cause under this request id",
        )
    }

    #[must_use]
    pub fn with_errors(mut self, errors: Vec<Fault>) -> Self {
        self.errors = errors;
        self
    }

    /// The version that is there, or was.
    #[must_use]
    pub fn with_version(mut self, version: Option<i64>) -> Self {
        self.version = version;
        self
    }

    #[must_use]
    pub fn with_deleted_at(mut self, deleted_at: String) -> Self {
        self.deleted_at = Some(deleted_at);
        self
    }

    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }
}

/// Problem details (RFC 9457).
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    #[serde(rename = "type")]
    #[schema(example = "urn:tidings:problem:profile_invalid")]
    kind: String,
    #[schema(example = "Unprocessable Content")]
    title: String,
    #[schema(example = 422)]
    status: u16,
    /// For people.
    #[schema(example = "the profile breaks the schema in 1 place")]
    detail: String,
    /// For programs; never changes.
    #[schema(example = "profile_invalid")]
    code: String,
    /// Names this request in the service's log.
    #[schema(example = "6f3c1c1e-3c9d-4f3e-9b5a-1d2c3b4a5f60")]
    request_id: String,
    /// One entry per fault in the request body.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<Fault>,
    /// With `user_deleted`, `version_mismatch` and `not_yet_visible`: the version that is there, or was.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = i64, required = false)]
    version: Option<i64>,
    /// With `user_deleted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, format = DateTime, required = false)]
    deleted_at: Option<String>,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = ProblemBody {
            kind: format!("urn:tidings:problem:{}", self.code),
            title: title(self.status),
            status: self.status.as_u16(),
            detail: self.detail,
            code: self.code.to_owned(),
            request_id: request_id(),
            errors: self.errors,
            version: self.version,
            deleted_at: self.deleted_at,
        };
        let body = serde_json::to_vec(&body).expect("strings and numbers are always JSON");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.extend(self.headers);
        response
    }
}

/// The names of RFC 9110 where the library still has older ones.
fn title(status: StatusCode) -> String {
    match status {
        StatusCode::UNPROCESSABLE_ENTITY => "Unprocessable Content",
        StatusCode::PAYLOAD_TOO_LARGE => "Content Too Large",
        other => other.canonical_reason().unwrap_or("Refused"),
    }
    .to_owned()
}

/// The refusals that any route may answer with, for the OpenAPI document.
#[derive(utoipa::IntoResponses)]
pub enum Refusals {
    /// Malformed: `malformed_json`, `malformed_body`, `invalid_user_id`, `invalid_bucket`, `invalid_subscription_name`, `invalid_query`,
    /// `invalid_header`, `invalid_cursor`.
    #[response(status = 400, content_type = "application/problem+json")]
    BadRequest(ProblemBody),
    /// `method_not_allowed`; `Allow` names the methods there are.
    #[response(status = 405, content_type = "application/problem+json")]
    MethodNotAllowed(ProblemBody),
    /// `body_timeout`: the request body did not arrive in time.
    #[response(status = 408, content_type = "application/problem+json")]
    RequestTimeout(ProblemBody),
    /// `internal`: the service failed.
    #[response(status = 500, content_type = "application/problem+json")]
    Internal(ProblemBody),
    /// Not now, see `Retry-After`: `database_unavailable`, `overloaded`, `not_yet_visible`, `deadline_exceeded`; for subscriptions
    /// also `broker_unavailable`, `broker_refused`, `no_broker_here`, `subscription_busy`. After `outcome_unknown` a change may have
    /// been made: read before you repeat it.
    #[response(status = 503, content_type = "application/problem+json")]
    Unavailable(ProblemBody),
}
