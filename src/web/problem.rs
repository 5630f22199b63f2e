//! Refusals: RFC 9457 problem details, and which route answers with which.
//!
//! Promise: what a route can be refused with, and nothing else, stands in the OpenAPI document, each such code with an example.
//! Not here, on purpose: the codes themselves (`code`) and who decides.
//!
//! To refuse for a new reason:
//! 1. Add a line to the table in `code`: meaning, name, status, code, words.
//! 2. Answer with `Code::UserNotFound.into()`, or `Problem::new(Code::InvalidQuery, "limit is ..")` where there is more to say.
//! 3. Whoever answers with it says so. An extractor: `refuses!(Id => [InvalidUserId])`. A verb's errors: a type without contents,
//!    `pub struct Reading; refuses!(Reading => [Overloaded, DatabaseUnavailable])`.
//! 4. A route lists its extractors and its verb's errors, as `responses((status = 200, ..), Refusals<(Id, Params<NoParams>, Reading)>)`.
//!
//! What every route may answer with (`uri_too_long`, `internal`, `deadline_exceeded`) is added by [`Refusals`]. Tests compare each answer that they get
//! with the document; and one finds codes that nobody answers with, or no route lists.

use std::{collections::BTreeMap, mem};

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::openapi::{
    Content, HeaderBuilder, ObjectBuilder, Ref, RefOr, ResponseBuilder,
    example::{Example, ExampleBuilder},
    response::Response as Described,
    schema::Type,
};
use uuid::Uuid;

use super::{Code, manners::request_id};
use crate::json::{Fault, MAX_FAULTS};

/// A refusal. `code` is for programs and never changes; `detail` is for people and holds no value of a profile.
#[derive(Debug)]
pub struct Problem {
    code: Code,
    detail: String,
    errors: Vec<Fault>,
    version: Option<i64>,
    deleted_at: Option<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let problem = Self { code, detail, errors: vec![], version: None, deleted_at: None, headers: vec![] };
        // Not now: the client may try again.
        let later = code.status() == StatusCode::SERVICE_UNAVAILABLE;
        if later { problem.with_header(header::RETRY_AFTER, "1") } else { problem }
    }

    #[must_use]
    pub fn with_errors(mut self, errors: Vec<Fault>) -> Self {
        self.errors = errors.into_iter().take(MAX_FAULTS).map(Fault::bounded).collect();
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
    pub fn with_header(self, name: HeaderName, value: &'static str) -> Self {
        self.with_header_value(name, HeaderValue::from_static(value))
    }

    #[must_use]
    pub fn with_header_value(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Without its headers, as a part of another answer to the same request.
    pub fn inside(self) -> ProblemBody {
        self.body(request_id())
    }

    fn body(self, request_id: String) -> ProblemBody {
        ProblemBody {
            kind: format!("urn:tidings:problem:{}", self.code.as_str()),
            title: title(self.code.status()),
            status: self.code.status().as_u16(),
            detail: self.detail,
            code: self.code.as_str().to_owned(),
            request_id,
            errors: self.errors,
            version: self.version,
            deleted_at: self.deleted_at,
        }
    }
}

/// In the code's own words.
impl From<Code> for Problem {
    fn from(code: Code) -> Self {
        Self::new(code, code.words())
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
    #[schema(example = "the profile breaks the schema, see errors")]
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

impl Problem {
    /// The whole answer as it goes over the line, for where there is no request yet that could be answered. The connection ends with it.
    pub(super) fn into_http(mut self) -> Vec<u8> {
        let (request_id, code, headers) = (Uuid::new_v4().to_string(), self.code, mem::take(&mut self.headers));
        let status = code.status();
        tracing::debug!(status = status.as_u16(), code = code.as_str(), request_id, "refused before it was a request");
        let body = serde_json::to_vec(&self.body(request_id.clone())).expect("strings and numbers are always JSON");
        let mut head = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: {PROBLEM_JSON}\r\ncache-control: no-store\r\n\
             x-request-id: {request_id}\r\ncontent-length: {}\r\n",
            body.len()
        );
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap_or_default()));
        }
        [head.as_bytes(), b"\r\n", &body].concat()
    }
}

impl IntoResponse for Problem {
    fn into_response(mut self) -> Response {
        let (code, own_headers) = (self.code, mem::take(&mut self.headers));
        let body = serde_json::to_vec(&self.body(request_id())).expect("strings and numbers are always JSON");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = code.status();
        // For those who count refusals on the way out.
        response.extensions_mut().insert(code);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.extend(own_headers);
        response
    }
}

const PROBLEM_JSON: &str = "application/problem+json";

/// The names of RFC 9110 where the library still has older ones.
fn title(status: StatusCode) -> String {
    match status {
        StatusCode::UNPROCESSABLE_ENTITY => "Unprocessable Content",
        StatusCode::PAYLOAD_TOO_LARGE => "Content Too Large",
        other => other.canonical_reason().unwrap_or("Refused"),
    }
    .to_owned()
}

/// Something that a route is made of, and the codes that it refuses with.
pub trait Refuses {
    fn codes() -> Vec<Code>;
}

/// `refuses!(Id => [InvalidUserId])`: this type refuses with these codes.
macro_rules! refuses {
    ($($type:ty => [$($code:ident),* $(,)?]);+ $(;)?) => {
        $(impl $crate::web::Refuses for $type {
            fn codes() -> Vec<$crate::web::Code> {
                vec![$($crate::web::Code::$code),*]
            }
        })+
    };
}
pub(crate) use refuses;

impl Refuses for () {
    fn codes() -> Vec<Code> {
        vec![]
    }
}

macro_rules! refuses_together {
    ($($part:ident)*) => {
        impl<$($part: Refuses),*> Refuses for ($($part,)*) {
            fn codes() -> Vec<Code> {
                [$($part::codes()),*].concat()
            }
        }
    };
}
refuses_together!(A);
refuses_together!(A B);
refuses_together!(A B C);
refuses_together!(A B C D);
refuses_together!(A B C D E);
refuses_together!(A B C D E F);
refuses_together!(A B C D E F G);
refuses_together!(A B C D E F G H);
refuses_together!(A B C D E F G H I);
refuses_together!(A B C D E F G H I J);

/// The refusals of a route that is made of `Parts`, for the OpenAPI document.
pub struct Refusals<Parts>(std::marker::PhantomData<Parts>);

impl<Parts: Refuses> utoipa::IntoResponses for Refusals<Parts> {
    fn responses() -> BTreeMap<String, RefOr<Described>> {
        let mut by_status = BTreeMap::<StatusCode, Vec<Code>>::new();
        for code in [Parts::codes(), vec![Code::UriTooLong, Code::Internal, Code::DeadlineExceeded]].concat() {
            let codes = by_status.entry(code.status()).or_default();
            if !codes.contains(&code) {
                codes.push(code);
            }
        }
        by_status.into_iter().map(|(status, codes)| (status.as_str().to_owned(), described(status, &codes))).collect()
    }
}

fn described(status: StatusCode, codes: &[Code]) -> RefOr<Described> {
    let lines: Vec<String> = codes.iter().map(|code| format!("`{}`: {}", code.as_str(), code.meaning())).collect();
    let mut content = Content::new(Some(Ref::from_schema_name("Problem")));
    let example = |code: &Code| RefOr::Ref(Ref::new(format!("#/components/examples/{}", code.as_str())));
    content.examples = codes.iter().map(|code| (code.as_str().to_owned(), example(code))).collect();
    let response = ResponseBuilder::new().description(lines.join("\n\n")).content(PROBLEM_JSON, content);
    headers(status)
        .iter()
        .fold(response, |response, (name, what)| {
            let text = ObjectBuilder::new().schema_type(Type::String);
            response.header(*name, HeaderBuilder::new().schema(Some(text)).description(Some(*what)).build())
        })
        .into()
}

/// What a refusal of this status has beside its body.
fn headers(status: StatusCode) -> &'static [(&'static str, &'static str)] {
    match status {
        StatusCode::UNAUTHORIZED => &[("WWW-Authenticate", "`Bearer`, and what is wrong with the key that was sent")],
        StatusCode::FORBIDDEN => {
            &[("WWW-Authenticate", "`Bearer`, and the scope that the key lacks, if it is refused for that")]
        }
        StatusCode::UNSUPPORTED_MEDIA_TYPE => &[
            ("Accept", "The media type that is taken, unless the body is a patch"),
            ("Accept-Patch", "The media type of a patch that is taken"),
        ],
        StatusCode::TOO_MANY_REQUESTS => &[("Retry-After", "Seconds after which there is room again")],
        StatusCode::SERVICE_UNAVAILABLE => &[("Retry-After", "Seconds after which to try again")],
        _ => &[],
    }
}

/// An example of every problem that a route answers with, by its code: the document's `components/examples`.
pub fn examples() -> impl Iterator<Item = (String, RefOr<Example>)> {
    Code::ALL.iter().filter(|code| !code.is_of_no_route()).map(|code| {
        let body = example(*code).body("6f3c1c1e-3c9d-4f3e-9b5a-1d2c3b4a5f60".to_owned());
        let body = serde_json::to_value(body).expect("strings and numbers are always JSON");
        let example = ExampleBuilder::new().summary(code.meaning()).value(Some(body));
        (code.as_str().to_owned(), example.into())
    })
}

fn example(code: Code) -> Problem {
    let fault = |pointer: &str, code: &str, detail: &str| vec![Fault::new(pointer, code, detail)];
    let problem = Problem::from(code);
    match code {
        Code::UserDeleted => problem.with_version(Some(8)).with_deleted_at("2026-11-24T09:30:00Z".to_owned()),
        Code::VersionMismatch => problem.with_version(Some(8)),
        Code::NotYetVisible | Code::UserNotDeleted => problem.with_version(Some(6)),
        Code::FieldForbidden => problem.with_errors(fault(
            "/profile/birthday",
            "field_forbidden",
            "this client may not have to do with this field",
        )),
        Code::UnacceptableJson => {
            problem.with_errors(fault("/profile/first_name", "duplicate_key", "this name occurs twice in its object"))
        }
        Code::BodyInvalid => problem.with_errors(fault("/profile", "required", "must be present")),
        Code::ProfileInvalid => {
            problem.with_errors(fault("/profile/shoe_size", "unknown_field", "the profile schema has no such field"))
        }
        Code::SubscriptionInvalid => {
            problem.with_errors(fault("/fields/0", "unknown_field", "the profile schema has no such field"))
        }
        _ => problem,
    }
}
