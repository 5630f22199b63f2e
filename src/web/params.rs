//! Path and query parameters.

use std::fmt::Display;

use axum::{
    extract::{FromRequestParts, Path, Query, RawPathParams},
    http::request::Parts,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tidings_sdk::subscription::SubscriptionName;
use utoipa::{
    IntoParams,
    openapi::path::{Parameter, ParameterIn},
};
use uuid::Uuid;

use super::{Code, Problem, Refuses, refuses};
use crate::json::Fault;

/// A user's id in the path.
#[derive(Debug, Clone, Copy)]
pub struct Id(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let invalid = || Code::InvalidUserId.into();
        let Path(text) = Path::<String>::from_request_parts(parts, state).await.map_err(|_| invalid())?;
        Self::from_text(&text).ok_or_else(invalid)
    }
}

impl Id {
    /// Nobody has the nil UUID.
    pub fn from_text(text: &str) -> Option<Self> {
        uuid(text).filter(|id| !id.is_nil()).map(Self)
    }

    /// Those in the array at `pointer`; or what is wrong with each that is none.
    pub fn in_array(texts: &[String], pointer: &str) -> Result<Vec<Uuid>, Vec<Fault>> {
        all(texts, pointer, |text| Self::from_text(text).map(|Self(id)| id))
    }
}

/// One spelling per id: neither braces, URNs nor bare hex.
fn uuid(text: &str) -> Option<Uuid> {
    Some(text).filter(|text| text.len() == 36)?.parse().ok()
}

fn all(texts: &[String], pointer: &str, read: fn(&str) -> Option<Uuid>) -> Result<Vec<Uuid>, Vec<Fault>> {
    let (mut ids, mut faults) = (vec![], vec![]);
    for (place, text) in texts.iter().enumerate() {
        match read(text) {
            Some(id) => ids.push(id),
            None => faults.push(Fault::new(format!("{pointer}/{place}"), "format", "must be a UUID")),
        }
    }
    if faults.is_empty() { Ok(ids) } else { Err(faults) }
}

/// A subscription's name: a lowercase letter, then lowercase letters, digits, `.`, `_` and `-`.
#[derive(Debug, Clone, utoipa::ToSchema)]
#[schema(as = SubscriptionName, value_type = String, example = "orders",
         pattern = r"^(?!amq\.)(?!.*\.(dead|fields|resync)$)(?!.*\.retry\.[0-9]+$)[a-z][a-z0-9._-]{0,99}$")]
pub struct Name(pub SubscriptionName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let text = path_param(parts, state, "name").await.unwrap_or_default();
        text.parse().map(Self).map_err(|error: tidings_sdk::subscription::InvalidName| {
            Problem::new(Code::InvalidSubscriptionName, error.to_string())
        })
    }
}

/// A message's id in the path, as `{message_id}`. Who publishes chooses it, so it may be nil.
#[derive(Debug, Clone, Copy)]
pub struct MessageId(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for MessageId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let text = path_param(parts, state, "message_id").await.unwrap_or_default();
        uuid(&text).map(Self).ok_or_else(|| Code::InvalidMessageId.into())
    }
}

impl MessageId {
    /// Those in the array at `pointer`; or what is wrong with each that is none.
    pub fn in_array(texts: &[String], pointer: &str) -> Result<Vec<Uuid>, Vec<Fault>> {
        all(texts, pointer, uuid)
    }
}

async fn path_param<S: Send + Sync>(parts: &mut Parts, state: &S, name: &str) -> Option<String> {
    let params = RawPathParams::from_request_parts(parts, state).await.ok()?;
    params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

/// The query string. A parameter we do not know is refused: a misspelt one must not be silently without effect.
#[derive(Debug, Clone, Copy)]
pub struct Params<T>(pub T);

/// A route that takes no parameters: a condition put there by mistake must not be silently without effect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

impl IntoParams for NoParams {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        vec![]
    }
}

/// A cursor among the parameters, for the document.
pub struct Cursor;

refuses!(
    Cursor => [InvalidCursor];
    Id => [InvalidUserId];
    Name => [InvalidSubscriptionName];
    MessageId => [InvalidMessageId];
);

impl<T> Refuses for Params<T> {
    fn codes() -> Vec<Code> {
        vec![Code::InvalidQuery]
    }
}

impl<S: Send + Sync, T: DeserializeOwned + IntoParams> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        // Decoded as it comes it would have other characters in place of those, and ask for something else.
        if percent_decode_str(parts.uri.query().unwrap_or_default()).decode_utf8().is_err() {
            return Err(Problem::new(Code::InvalidQuery, "the query is not UTF-8"));
        }
        let Query(params) = Query::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            Problem::new(Code::InvalidQuery, without_values(&rejection.body_text(), &T::into_params(|| None)))
        })?;
        Ok(Self(params))
    }
}

/// What is wrong with a query, without what stands in it: a name that nobody knows may be a value in the wrong place. Nor with words of
/// the libraries, which speak of types of ours. What would be right is what the document says of `known`.
fn without_values(words: &str, known: &[Parameter]) -> String {
    // axum's own words come first. What follows them may hold the same, by the client.
    let words = words.strip_prefix("Failed to deserialize query string: ").unwrap_or(words);
    for (kind, said) in
        [("unknown field `", "there is no such parameter"), ("unknown variant `", "there is no such choice")]
    {
        if let Some((_, rest)) = words.split_once(kind) {
            // What may stand there comes last.
            let expected = rest.rfind("`, expected").filter(|_| !rest.ends_with("`, there are no fields"));
            return format!("{said}: {}", expected.map_or("none is taken here", |at| &rest[at + 3..]));
        }
    }
    if let Some((_, rest)) = words.split_once("missing field `") {
        let name = rest.trim_end_matches('`');
        return format!("{name} has to be there{}", choices(&schema(name, known)));
    }
    if let Some((_, rest)) = words.split_once("duplicate field `") {
        return format!("{} may be there once", rest.trim_end_matches('`'));
    }
    // All others are numbers: texts are taken as they are.
    let (name, _) = words.split_once(": ").unwrap_or(("a parameter", ""));
    format!("{name} is a number{}", range(&schema(name, known)))
}

/// What the document says of a parameter; null when it says nothing.
fn schema(name: &str, known: &[Parameter]) -> Value {
    let schema = known.iter().find(|parameter| parameter.name == name).and_then(|found| found.schema.as_ref());
    serde_json::to_value(schema).unwrap_or_default()
}

fn choices(schema: &Value) -> String {
    let choices: Vec<&str> = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if choices.is_empty() { String::new() } else { format!(": expected `{}`", choices.join("`, `")) }
}

/// The numbers that a parameter may be: in a range, or some of one.
fn range(schema: &Value) -> String {
    let some = schema["enum"].as_array();
    let min = some.and_then(|some| some.first()).unwrap_or(&schema["minimum"]).as_u64();
    let max = some.and_then(|some| some.last()).unwrap_or(&schema["maximum"]).as_u64();
    // Without a largest one it is a version.
    let max = max.unwrap_or(i64::MAX.unsigned_abs());
    min.map_or_else(|| ", in its range".to_owned(), |min| format!(" from {min} to {max}"))
}

/// How much a page may hold: what was asked for, if it is within bounds.
pub fn page_limit<T>(asked: Option<T>, default: T, max: T) -> Result<T, Problem>
where
    T: Copy + PartialOrd + Display + From<u8>,
{
    let limit = asked.unwrap_or(default);
    if (T::from(1)..=max).contains(&limit) {
        Ok(limit)
    } else {
        Err(Problem::new(Code::InvalidQuery, format!("limit is a number from 1 to {max}")))
    }
}

/// Where a page ended, for the next one. Opaque to the client.
pub fn cursor(last: Uuid) -> String {
    URL_SAFE_NO_PAD.encode(last)
}

pub fn read_cursor(text: &str) -> Result<Uuid, Problem> {
    URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| Uuid::from_slice(&bytes).ok()).ok_or_else(invalid_cursor)
}

/// What was sent as a cursor is none.
pub fn invalid_cursor() -> Problem {
    Code::InvalidCursor.into()
}

#[cfg(test)]
mod tests {
    use utoipa::openapi::{ObjectBuilder, path::ParameterBuilder};

    use super::*;

    fn known(name: &str, schema: ObjectBuilder) -> Parameter {
        ParameterBuilder::new().name(name).schema(Some(schema)).build()
    }

    #[test]
    fn what_is_wrong_with_a_query_is_said_without_what_stands_in_it() {
        let known = [
            known("limit", ObjectBuilder::new().minimum(Some(1)).maximum(Some(500))),
            known("min_version", ObjectBuilder::new().minimum(Some(1))),
            known("buckets", ObjectBuilder::new().enum_values(Some([1, 2, 4]))),
            known("state", ObjectBuilder::new().enum_values(Some(["overdue"]))),
            known("after", ObjectBuilder::new()),
        ];
        for (words, said) in [
            (
                "Failed to deserialize query string: unknown field `Ana`, expected `limit` or `after`",
                "there is no such parameter: expected `limit` or `after`",
            ),
            (
                "Failed to deserialize query string: state: unknown variant `x`, expected y`, expected `overdue`",
                "there is no such choice: expected `overdue`",
            ),
            (
                "Failed to deserialize query string: Ana: unknown field `Ana`, there are no fields",
                "there is no such parameter: none is taken here",
            ),
            (
                "Failed to deserialize query string: query string: Ana: unknown field `query string: Ana`, there are no fields",
                "there is no such parameter: none is taken here",
            ),
            (
                "Failed to deserialize query string: unknown field `Ana`, expected Ana`, there are no fields",
                "there is no such parameter: none is taken here",
            ),
            ("Failed to deserialize query string: missing field `state`", "state has to be there: expected `overdue`"),
            ("Failed to deserialize query string: missing field `after`", "after has to be there"),
            ("Failed to deserialize query string: duplicate field `limit`", "limit may be there once"),
            (
                "Failed to deserialize query string: limit: invalid digit found in string",
                "limit is a number from 1 to 500",
            ),
            (
                "Failed to deserialize query string: min_version: number too large to fit in target type",
                "min_version is a number from 1 to 9223372036854775807",
            ),
            (
                "Failed to deserialize query string: buckets: invalid digit found in string",
                "buckets is a number from 1 to 4",
            ),
            (
                "Failed to deserialize query string: after: invalid digit found in string",
                "after is a number, in its range",
            ),
        ] {
            assert_eq!(without_values(words, &known), said);
        }
    }
}
