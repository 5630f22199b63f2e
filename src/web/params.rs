//! Path and query parameters.

use axum::{
    extract::{FromRequestParts, Path, Query, RawPathParams},
    http::request::Parts,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::de::DeserializeOwned;
use tidings_sdk::subscription::SubscriptionName;
use uuid::Uuid;

use super::Problem;

/// A user's id in the path.
#[derive(Debug, Clone, Copy)]
pub struct Id(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let invalid = || {
            Problem::bad_request("invalid_user_id", "a user id is a UUID such as 0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a")
        };
        let Path(text) = Path::<String>::from_request_parts(parts, state).await.map_err(|_| invalid())?;
        Self::from_text(&text).ok_or_else(invalid)
    }
}

impl Id {
    /// One spelling per user: neither braces, URNs nor bare hex.
    pub fn from_text(text: &str) -> Option<Self> {
        Some(text).filter(|text| text.len() == 36)?.parse().ok().filter(|id: &Uuid| !id.is_nil()).map(Self)
    }
}

/// A subscription's name in the path, as `{name}`.
#[derive(Debug, Clone)]
pub struct Name(pub SubscriptionName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let text = path_param(parts, state, "name").await.unwrap_or_default();
        text.parse().map(Self).map_err(|error: tidings_sdk::subscription::InvalidName| {
            Problem::bad_request("invalid_subscription_name", error.to_string())
        })
    }
}

/// A message's id in the path, as `{message_id}`.
#[derive(Debug, Clone, Copy)]
pub struct MessageId(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for MessageId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let text = path_param(parts, state, "message_id").await.unwrap_or_default();
        text.parse().map(Self).map_err(|_| Problem::bad_request("invalid_message_id", "a message id is a UUID"))
    }
}

async fn path_param<S: Send + Sync>(parts: &mut Parts, state: &S, name: &str) -> Option<String> {
    let params = RawPathParams::from_request_parts(parts, state).await.ok()?;
    params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

/// The query string. A parameter we do not know is refused: a misspelt one must not be silently without effect.
#[derive(Debug, Clone, Copy)]
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(params) = Query::<T>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Problem::bad_request("invalid_query", rejection.body_text()))?;
        Ok(Self(params))
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
    Problem::bad_request("invalid_cursor", "send back the \"next\" of an earlier page as it was")
}
