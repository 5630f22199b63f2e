//! Request bodies: an object, as it is or as a type of ours.

use std::time::Duration;

use axum::{
    body::{Bytes, HttpBody, to_bytes},
    extract::{FromRequest, Request},
    http::{HeaderMap, HeaderName, header},
};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    Code, Problem, Refuses,
    places::{ClientsTurn, Place},
    refuses,
    typed::typed,
};
use crate::json::{self, Fault, MAX_DEPTH, Rejected};

pub const LIMIT_BYTES: usize = 64 * 1024;
/// A body that is too large is thrown away up to here, so that its client hears the refusal.
const DRAIN_BYTES: usize = 1024 * 1024;
/// For the whole body: a client that trickles is cut off.
const DEADLINE: Duration = Duration::from_secs(15);
const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

// None of these has a Debug: what holds values must not find its way into a log.

/// The object in an `application/json` body. Let `T` deny unknown fields: a misspelt member must not be silently without effect.
/// Bodies that are long lists may set a limit of their own.
pub struct Body<T, const LIMIT: usize = LIMIT_BYTES>(pub T);

/// The members of an `application/json` body. One that holds documents may be deeper by the levels around them.
pub struct Document<const LIMIT: usize = LIMIT_BYTES, const LEVELS_AROUND: usize = 0>(pub Map<String, Value>);

/// The members of an `application/merge-patch+json` body (RFC 7396).
pub struct MergePatch(pub Map<String, Value>);

impl<S: Sync, T: DeserializeOwned, const LIMIT: usize> FromRequest<S> for Body<T, LIMIT> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), JSON, header::ACCEPT)?;
        let members = object(&read(request, LIMIT).await?, MAX_DEPTH)?;
        typed(&Value::Object(members)).map(Self).map_err(body_invalid)
    }
}

impl<S: Sync, const LIMIT: usize, const LEVELS_AROUND: usize> FromRequest<S> for Document<LIMIT, LEVELS_AROUND> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), JSON, header::ACCEPT)?;
        Ok(Self(object(&read(request, LIMIT).await?, MAX_DEPTH + LEVELS_AROUND)?))
    }
}

impl<S: Sync> FromRequest<S> for MergePatch {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_media_type(request.headers(), MERGE_PATCH, HeaderName::from_static("accept-patch"))?;
        Ok(Self(object(&read(request, LIMIT_BYTES).await?, MAX_DEPTH)?))
    }
}

/// A body as bytes, and as JSON.
struct Bytewise;

refuses!(
    Bytewise => [InvalidHeader, BodyTimeout, MalformedBody, MalformedJson, PayloadTooLarge, UnsupportedMediaType, UnacceptableJson, BodyInvalid];
);

impl<T, const LIMIT: usize> Refuses for Body<T, LIMIT> {
    fn codes() -> Vec<Code> {
        Bytewise::codes()
    }
}

impl<const LIMIT: usize, const LEVELS_AROUND: usize> Refuses for Document<LIMIT, LEVELS_AROUND> {
    fn codes() -> Vec<Code> {
        Bytewise::codes()
    }
}

impl Refuses for MergePatch {
    fn codes() -> Vec<Code> {
        Bytewise::codes()
    }
}

/// RFC 9110, section 15.5.16, and RFC 5789, section 3.1: the answer names what would be right.
fn check_media_type(headers: &HeaderMap, expected: &'static str, answer_in: HeaderName) -> Result<(), Problem> {
    let unsupported =
        |detail: String| Problem::new(Code::UnsupportedMediaType, detail).with_header(answer_in.clone(), expected);
    let mut given = headers.get_all(header::CONTENT_TYPE).iter();
    let first = given.next().and_then(|value| value.to_str().ok()).unwrap_or_default();
    if given.next().is_some() {
        return Err(Problem::new(Code::InvalidHeader, "content-type: expected once"));
    }
    let mut parts = parts(first);
    if !parts.next().is_some_and(|essence| essence.eq_ignore_ascii_case(expected)) {
        return Err(unsupported(format!("send the body as {expected}")));
    }
    let mut charsets = parts.filter_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then(|| value.replace(['"', '\\'], ""))
    });
    if charsets.any(|charset| !charset.trim().eq_ignore_ascii_case("utf-8")) {
        return Err(unsupported("send the body in UTF-8".to_owned()));
    }
    // hyper takes away the chunks, and whatever else was done to a body stays.
    for (name, plain) in [(header::CONTENT_ENCODING, "identity"), (header::TRANSFER_ENCODING, "chunked")] {
        if headers.get_all(&name).iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(plain.as_bytes())) {
            return Err(unsupported(format!("send the body without {name}, or with {plain}")));
        }
    }
    Ok(())
}

/// A media type and its parameters, as semicolons part them, of which those in quotes part nothing (RFC 9110, section 5.6.6).
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let parted = text.split(move |c| {
        is_quoted ^= c == '"' && !is_escaped;
        is_escaped = is_quoted && c == '\\' && !is_escaped;
        c == ';' && !is_quoted
    });
    parted.map(str::trim)
}

async fn read(request: Request, limit_bytes: usize) -> Result<Bytes, Problem> {
    let too_large = || Problem::new(Code::PayloadTooLarge, format!("the body has more than {limit_bytes} bytes"));
    let announced = request.body().size_hint();
    let waits = request.headers().contains_key(header::EXPECT);
    // Who announces too much is not asked to send it (`Expect: 100-continue`), nor waited for when it is far too much.
    if announced.lower() > if waits { limit_bytes } else { DRAIN_BYTES } as u64 {
        return Err(too_large());
    }
    let is_large = limit_bytes > LIMIT_BYTES && announced.upper().is_none_or(|bytes| bytes > LIMIT_BYTES as u64);
    if is_large && let Some(place) = request.extensions().get::<Place>() {
        place.large_body()?;
    }
    let clients_turn = ClientsTurn::of(request.extensions());
    let came = timeout(DEADLINE, whole(request.into_body(), limit_bytes)).await;
    clients_turn.end()?;
    match came {
        Ok(Ok(Some(body))) => Ok(body),
        Ok(Ok(None)) => Err(too_large()),
        Ok(Err(_)) => Err(Code::MalformedBody.into()),
        Err(_) => Err(Problem::new(Code::BodyTimeout, format!("the body did not arrive within {DEADLINE:?}"))),
    }
}

/// The body; `None` when it has more than `limit_bytes`. Of such a one the rest is taken off the line and thrown away: who is still writing
/// when the connection ends hears of that, and not of the refusal.
async fn whole(body: axum::body::Body, limit_bytes: usize) -> Result<Option<Bytes>, axum::Error> {
    if body.size_hint().upper().is_some_and(|upper| upper <= limit_bytes as u64) {
        return to_bytes(body, limit_bytes).await.map(Some);
    }
    let (mut kept, mut came_bytes, mut chunks) = (vec![], 0, body.into_data_stream());
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        came_bytes += chunk.len();
        if came_bytes <= limit_bytes {
            kept.extend_from_slice(&chunk);
        } else if came_bytes > DRAIN_BYTES {
            break;
        }
    }
    Ok((came_bytes <= limit_bytes).then(|| kept.into()))
}

/// The object that a body is.
fn object(body: &[u8], max_depth: usize) -> Result<Map<String, Value>, Problem> {
    match json::parse_to(max_depth, body) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err(body_invalid(vec![Fault::new("", "type", "must be an object")])),
        Err(Rejected::Malformed { line, column }) => Err(Problem::new(
            Code::MalformedJson,
            format!(
                "the body is not JSON, or has a number that no double holds, or half of a surrogate pair: \
                 see line {line}, column {column}"
            ),
        )),
        Err(Rejected::Faulty(faults)) => Err(Problem::from(Code::UnacceptableJson).with_errors(faults)),
    }
}

/// The body is JSON, and not what the route takes.
pub fn body_invalid(faults: Vec<Fault>) -> Problem {
    Problem::from(Code::BodyInvalid).with_errors(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_are_compared_as_media_types() {
        let check = |content_type: &str| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type.parse().unwrap())]);
            check_media_type(&headers, JSON, header::ACCEPT).is_ok()
        };
        assert!(check("application/json") && check("Application/JSON ; charset=\"UTF-8\""));
        for utf_8 in
            ["; charset=utf-8;", ";;charset=utf-8 ;v=1", "; v=1", "; v=\"a;charset=latin1\"", "; v=\"\\\";charset=x\""]
        {
            assert!(check(&format!("application/json{utf_8}")), "{utf_8}");
        }
        for other in [
            "; v=1; charset=latin1",
            "; v=\"\\\\\";charset=latin1",
            ";charset=utf-8;charset=latin1",
            ";CHARSET=\"utf-16\";",
        ] {
            assert!(!check(&format!("application/json{other}")), "{other}");
        }
        assert!(!check("text/json") && !check("application/json; charset=latin1") && !check("application/jsonp"));
    }
}
