//! Request bodies: an object of a type of ours; or a profile, or a patch of one, inside `{"profile": {..}}`.

use std::time::Duration;

use axum::{
    body::{Bytes, to_bytes},
    extract::{FromRequest, Request},
    http::{HeaderMap, HeaderName, StatusCode, header},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{Problem, ProblemBody, typed::typed};
use crate::json::{self, Fault, Rejected, step};

const LIMIT_BYTES: usize = 64 * 1024;
/// For the whole body: a client that trickles is cut off.
const DEADLINE: Duration = Duration::from_secs(15);
const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

// None of these has a Debug: what holds values must not find its way into a log.

/// The object in an `application/json` body. Let `T` deny unknown fields: a misspelt member must not be silently without effect.
/// Bodies that are long lists may set a limit of their own.
pub struct Body<T, const LIMIT: usize = LIMIT_BYTES>(pub T);

/// The profile in an `application/json` body.
pub struct Document(pub Map<String, Value>);

/// The patch of a profile in an `application/merge-patch+json` body (RFC 7396).
pub struct Patch(pub Map<String, Value>);

impl<S: Sync, T: DeserializeOwned, const LIMIT: usize> FromRequest<S> for Body<T, LIMIT> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), JSON, header::ACCEPT)?;
        let members = object(&read(request, LIMIT).await?, "must be an object")?;
        typed(Value::Object(members)).map(Self).map_err(|fault| body_invalid(vec![fault]))
    }
}

impl<S: Sync> FromRequest<S> for Document {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), JSON, header::ACCEPT)?;
        Ok(Self(profile(&read(request, LIMIT_BYTES).await?)?))
    }
}

impl<S: Sync> FromRequest<S> for Patch {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), MERGE_PATCH, HeaderName::from_static("accept-patch"))?;
        Ok(Self(profile(&read(request, LIMIT_BYTES).await?)?))
    }
}

/// RFC 9110, section 15.5.16, and RFC 5789, section 3.1: the answer names what would be right.
fn check_media_type(headers: &HeaderMap, expected: &'static str, answer_in: HeaderName) -> Result<(), Problem> {
    let unsupported = |detail: String| {
        Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
            .with_header(answer_in.clone(), expected)
    };
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (essence, parameters) = given.split_once(';').unwrap_or((given, ""));
    if !essence.trim().eq_ignore_ascii_case(expected) {
        return Err(unsupported(format!("send the body as {expected}")));
    }
    let parameters = parameters.trim().to_ascii_lowercase().replace('"', "");
    if parameters.strip_prefix("charset=").is_some_and(|charset| charset != "utf-8") {
        return Err(unsupported("send the body in UTF-8".to_owned()));
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(coding) if coding != "identity" => Err(unsupported("send the body without a content coding".to_owned())),
        _ => Ok(()),
    }
}

async fn read(request: Request, limit_bytes: usize) -> Result<Bytes, Problem> {
    match timeout(DEADLINE, to_bytes(request.into_body(), limit_bytes)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) if is_too_large(&error) => Err(Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "payload_too_large",
            format!("the body has more than {limit_bytes} bytes"),
        )),
        Ok(Err(_)) => Err(Problem::bad_request("malformed_body", "the body ended before it was complete")),
        Err(_) => Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("the body did not arrive within {DEADLINE:?}"),
        )),
    }
}

fn is_too_large(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}

/// The object that a body is.
fn object(body: &[u8], otherwise: &str) -> Result<Map<String, Value>, Problem> {
    match json::parse(body) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err(body_invalid(vec![Fault::new("", "type", otherwise)])),
        Err(Rejected::Malformed { line, column }) => Err(Problem::bad_request(
            "malformed_json",
            format!("the body is not JSON: see line {line}, column {column}"),
        )),
        Err(Rejected::Faulty(faults)) => Err(unprocessable("unacceptable_json", faults)),
    }
}

/// The object under `profile`, which is all that a body holds.
fn profile(body: &[u8]) -> Result<Map<String, Value>, Problem> {
    let mut members = object(body, "must be an object with a member \"profile\"")?;
    let profile = members.remove("profile");
    let mut faults: Vec<Fault> = members
        .keys()
        .map(|name| Fault::new(step("", name), "unknown_member", "a body has the member \"profile\" and no other"))
        .collect();
    match profile {
        Some(Value::Object(profile)) if faults.is_empty() => return Ok(profile),
        Some(Value::Object(_)) => {}
        Some(_) => faults.push(Fault::new("/profile", "type", "must be an object")),
        None => faults.push(Fault::new("/profile", "required", "must be present")),
    }
    Err(body_invalid(faults))
}

/// The body is JSON, and not what the route takes.
pub fn body_invalid(faults: Vec<Fault>) -> Problem {
    unprocessable("body_invalid", faults)
}

fn unprocessable(code: &'static str, faults: Vec<Fault>) -> Problem {
    let places = if faults.len() == 1 { "1 place".to_owned() } else { format!("{} places", faults.len()) };
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        code,
        format!("the body cannot be taken: {places} to mend, see errors"),
    )
    .with_errors(faults)
}

/// Refusals of a request body.
#[derive(utoipa::IntoResponses)]
pub enum BodyRefusals {
    /// `payload_too_large`: the body has more than 64 KiB.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(ProblemBody),
    /// `unsupported_media_type`; `Accept` or `Accept-Patch` names the right one.
    #[response(status = 415, content_type = "application/problem+json")]
    UnsupportedMediaType(ProblemBody),
    /// `unacceptable_json`, `body_invalid` or `profile_invalid`; `errors` has a JSON pointer per fault.
    #[response(status = 422, content_type = "application/problem+json")]
    Unprocessable(ProblemBody),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_a_profile_and_nothing_else() {
        assert!(profile(br#"{"profile":{"a":1}}"#).is_ok());
        for wrong in ["[]", "7", "{}", r#"{"profile":7}"#, r#"{"profile":null}"#, r#"{"profile":{},"version":3}"#] {
            assert!(profile(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn media_types_are_compared_as_media_types() {
        let check = |content_type: &'static str| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type.parse().unwrap())]);
            check_media_type(&headers, JSON, header::ACCEPT).is_ok()
        };
        assert!(check("application/json") && check("Application/JSON ; charset=\"UTF-8\""));
        assert!(!check("text/json") && !check("application/json; charset=latin1") && !check("application/jsonp"));
    }
}
