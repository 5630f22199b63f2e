//! Owner: asks the owner of the master data for the latest record.
//!
//! Promise: never a state older than the one asked for; an outage is told apart from a refusal; every request has a deadline.
//! Not here, on purpose: a cache. What was fetched is the caller's to keep.

mod feed;
mod gather;
mod http;

pub use feed::{Change, Changes, Cursor, Held, State};
pub use http::{Connections, FetchError, InvalidKey, InvalidUrl, KeyFileError, connections};

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::{
    StatusCode,
    header::{HeaderName, IF_NONE_MATCH},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    subscription::SubscriptionName,
    trace::Traceparent,
    trust::{InvalidCa, Trust},
};
use gather::Gatherer;
use http::{Ask, Http, SOMEBODY_ELSE};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What is known of a user, as of now.
#[derive(Debug, Clone, PartialEq)]
pub enum Latest {
    Living(User),
    Gone(Tombstone),
}

impl Latest {
    pub fn id(&self) -> Uuid {
        match self {
            Self::Living(user) => user.id,
            Self::Gone(tombstone) => tombstone.id,
        }
    }

    pub fn version(&self) -> i64 {
        match self {
            Self::Living(user) => user.version,
            Self::Gone(tombstone) => tombstone.version,
        }
    }

    /// The user, if there still is one.
    pub fn living(self) -> Option<User> {
        match self {
            Self::Living(user) => Some(user),
            Self::Gone(_) => None,
        }
    }
}

/// A living user.
#[derive(Clone, PartialEq, Deserialize)]
pub struct User {
    pub id: Uuid,
    pub version: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// The id that other systems know the user by, if there is one.
    pub external_id: Option<String>,
    pub profile: Map<String, Value>,
}

impl User {
    /// A field of the profile that holds text.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.profile.get(field)?.as_str()
    }
}

/// Names the user and shows nothing of the profile: what is printed ends in a log.
impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("id", &self.id).field("version", &self.version).finish_non_exhaustive()
    }
}

/// What stays of a deleted user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Tombstone {
    pub id: Uuid,
    pub version: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub deleted_at: OffsetDateTime,
}

/// What became of a conditional request.
#[derive(Debug, Clone, PartialEq)]
pub enum Fetched {
    New(Latest),
    /// The version that the caller holds is still the latest.
    Unchanged,
}

/// What became of a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Receipt {
    Kept,
    /// There is nothing to confirm: the user lives, or nobody ever had the id.
    Unwanted,
    /// The subscription is not registered with this owner, or the client that this key is of does not stand for it: nothing was kept.
    UnknownSubscription,
}

/// The owner, by its URL. Cheap to clone; clones share connections, and gather what they ask for at the same time.
#[derive(Clone)]
pub struct Owner {
    http: Arc<Http>,
    gatherer: Gatherer,
    trace: Option<Traceparent>,
}

/// Shows no address, which may hold a password.
impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owner")
    }
}

impl Owner {
    /// The owner at this address, such as `http://127.0.0.1:8080`. Nothing is sent yet.
    ///
    /// # Errors
    /// When `url` is no http or https URL.
    pub fn at(url: &str) -> Result<Self, InvalidUrl> {
        let http = Arc::new(Http::at(url)?);
        Ok(Self { gatherer: Gatherer::new(http.clone()), http, trace: None })
    }

    /// Trusts these certificate authorities at an `https` address, beside those of this machine.
    ///
    /// # Errors
    /// When their file cannot be read any more.
    pub fn trusting(self, trust: &Trust) -> Result<Self, InvalidCa> {
        let http = Arc::new(self.http.trusting(trust)?);
        Ok(Self { gatherer: Gatherer::new(http.clone()), http, trace: self.trace })
    }

    /// The same owner, asked with this key.
    ///
    /// # Errors
    /// When `key` cannot be one.
    pub fn with_key(self, key: &str) -> Result<Self, InvalidKey> {
        let http = Arc::new(self.http.with_key(key)?);
        Ok(Self { gatherer: Gatherer::new(http.clone()), http, trace: self.trace })
    }

    /// The same owner, asked with the key in this file. When it is refused the file is read again: a new key takes effect without a
    /// restart.
    ///
    /// # Errors
    /// When the file cannot be read now, or holds no key.
    pub fn with_key_file(self, file: impl AsRef<Path>) -> Result<Self, KeyFileError> {
        let http = Arc::new(self.http.with_key_file(file.as_ref())?);
        Ok(Self { gatherer: Gatherer::new(http.clone()), http, trace: self.trace })
    }

    /// What the owner says against the key, asked once, or that its URL leads elsewhere. `None` when it says nothing: the key is good, or there is
    /// none, or the owner is away.
    pub(crate) async fn objection(&self) -> Option<FetchError> {
        if !self.http.has_key() {
            return None;
        }
        let answer = self.http.ask_once(Ask::get("/v1/users?limit=1".to_owned())).await?;
        (answer.is_denial() || answer.status.is_redirection()).then(|| answer.refusal())
    }

    /// How long an outage of the owner is waited out for one question; 10 s unless told otherwise. What has not been answered by then
    /// fails with [`FetchError::Unavailable`].
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        let http = Arc::new(self.http.with_patience(patience));
        Self { gatherer: Gatherer::new(http.clone()), http, trace: self.trace }
    }

    /// The same owner, with patience for so long at most.
    pub(crate) fn patience_within(&self, bound: Duration) -> Self {
        if self.http.patience() <= bound { self.clone() } else { self.clone().patience(bound) }
    }

    /// The same owner, asked as part of this trace.
    #[must_use]
    pub fn within(&self, trace: Traceparent) -> Self {
        Self { trace: Some(trace), ..self.clone() }
    }

    /// The latest record of a user, of this version or a later one. What is asked for at the same time is fetched together.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn latest(&self, user: Uuid, at_least: i64) -> Result<Latest, FetchError> {
        // Gathered answers may be too old, or none: then the user is asked for alone, as the last word.
        let _turn = match self.gatherer.ask(user, self.trace, self.http.end()).await {
            Ok(Some(latest)) if latest.version() >= at_least => return Ok(latest),
            Ok(_) => None,
            Err(outage) if outage.is_outage() => return Err(outage),
            Err(_) => Some(self.gatherer.turn_alone(self.http.end()).await?),
        };
        self.alone(user, at_least).await
    }

    async fn alone(&self, user: Uuid, at_least: i64) -> Result<Latest, FetchError> {
        match self.get(user, at_least, None).await {
            Ok(Fetched::New(latest)) => Ok(latest),
            Ok(Fetched::Unchanged) => Err(FetchError::Malformed),
            // Somebody whom the owner does not know at all is not waited for as somebody who is late.
            Err(FetchError::NotYetVisible) if self.knows(user).await == Ok(false) => Err(FetchError::UnknownUser),
            Err(error) => Err(error),
        }
    }

    async fn knows(&self, user: Uuid) -> Result<bool, FetchError> {
        let answer = self.http.ask(Ask::get(format!("/v1/users/{user}"))).await?;
        Ok(!answer.is_unknown_user())
    }

    /// The record of a user, of version `at_least` or a later one, unless `held` is the latest.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn get(&self, user: Uuid, at_least: i64, held: Option<i64>) -> Result<Fetched, FetchError> {
        let ask = Ask::get(format!("/v1/users/{user}?min_version={}", at_least.max(1)))
            .with(IF_NONE_MATCH, held.map(|version| format!("\"{version}\"")))
            .with(TRACEPARENT, self.trace.map(|trace| trace.to_string()));
        let answer = self.http.ask(ask).await?;
        let latest = match answer.status {
            StatusCode::OK => Latest::Living(answer.read()?),
            StatusCode::NOT_MODIFIED => return Ok(Fetched::Unchanged),
            _ if answer.is_deleted_user() => Latest::Gone(answer.read::<Gone>()?.of(user)),
            _ if answer.is_unknown_user() => return Err(FetchError::UnknownUser),
            // Of whom an owner says neither: the address is another service's.
            StatusCode::GONE | StatusCode::NOT_FOUND => return Err(FetchError::Unavailable(SOMEBODY_ELSE)),
            _ => return Err(answer.refusal()),
        };
        // The owner promised; whoever stands between may not have.
        if latest.version() < at_least { Err(FetchError::Malformed) } else { Ok(Fetched::New(latest)) }
    }
}

impl Owner {
    /// Says for a subscription that it is done with the deletion of a user: what it held of him is gone. It may be said again.
    ///
    /// # Errors
    /// [`FetchError`]; then it has to be said again.
    pub async fn confirm_deletion(&self, user: Uuid, subscription: &SubscriptionName) -> Result<Receipt, FetchError> {
        let ask = Ask::post(&format!("/v1/deletions/{user}/receipts"), &json!({ "subscription": subscription }))
            .with(TRACEPARENT, self.trace.map(|trace| trace.to_string()));
        let answer = self.http.ask(ask).await?;
        match (answer.status, answer.code().as_str()) {
            (status, _) if status.is_success() => Ok(Receipt::Kept),
            (StatusCode::NOT_FOUND, "user_not_found") | (StatusCode::CONFLICT, "user_not_deleted") => {
                Ok(Receipt::Unwanted)
            }
            (StatusCode::NOT_FOUND, "subscription_not_found") => {
                tell_unknown(subscription);
                Ok(Receipt::UnknownSubscription)
            }
            // Not the owner's own word: the address is wrong, or somebody stands between.
            _ => Err(answer.refusal()),
        }
    }
}

/// Once in a process: it is so for each deletion.
fn tell_unknown(subscription: &SubscriptionName) {
    static TOLD: Mutex<BTreeSet<SubscriptionName>> = Mutex::new(BTreeSet::new());
    if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(subscription.clone()) {
        tracing::warn!(
            %subscription,
            "the owner keeps no receipts for this subscription: it is not registered, or the key's client does not stand for it"
        );
    }
}

/// What a 410 says of the user.
#[derive(Deserialize)]
struct Gone {
    version: i64,
    #[serde(with = "time::serde::rfc3339")]
    deleted_at: OffsetDateTime,
}

impl Gone {
    fn of(self, id: Uuid) -> Tombstone {
        Tombstone { id, version: self.version, deleted_at: self.deleted_at }
    }
}
