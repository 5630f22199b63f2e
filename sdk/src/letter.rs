//! Letter: what a message that could not be handled says of itself.
//!
//! Promise: how often it was tried, why it failed and when; written by a consumer, read by the owner.
//! Not here, on purpose: the words of an error, which may quote a user's data. They belong into the consumer's own log.

use std::fmt;

use lapin::types::{AMQPValue, FieldTable};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::envelope::read_time;

const ATTEMPTS: &str = "tidings-attempts";
const REASON: &str = "tidings-reason";
const FAILED_AT: &str = "tidings-failed-at";

/// Where a message stands after a failed attempt. Without these headers it was never tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Letter {
    /// Attempts that have failed so far.
    pub attempts: u32,
    /// Why the last one failed.
    pub reason: Reason,
    /// When the last one failed, by the consumer's clock.
    pub failed_at: Option<OffsetDateTime>,
}

/// Why an attempt failed. A closed list: there is no place for words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// The message is no notice, or none of a kind known to this consumer.
    Malformed,
    /// Nobody ever had the id: the notice is forged, or the consumer asks another owner than the one that spoke.
    UnknownUser,
    /// The owner answered, and not with the record.
    FetchFailed,
    /// The handler returned an error.
    HandlerFailed,
    HandlerPanicked,
    HandlerTimedOut,
    /// A consumer rejected it without saying why.
    Rejected,
    /// It was redelivered more often than the broker allows: its consumers crash.
    DeliveryLimit,
    /// Another reason of the broker's, or of a consumer newer than this library.
    Other,
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::Malformed,
        Self::UnknownUser,
        Self::FetchFailed,
        Self::HandlerFailed,
        Self::HandlerPanicked,
        Self::HandlerTimedOut,
        Self::Rejected,
        Self::DeliveryLimit,
        Self::Other,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownUser => "unknown_user",
            Self::FetchFailed => "fetch_failed",
            Self::HandlerFailed => "handler_failed",
            Self::HandlerPanicked => "handler_panicked",
            Self::HandlerTimedOut => "handler_timed_out",
            Self::Rejected => "rejected",
            Self::DeliveryLimit => "delivery_limit",
            Self::Other => "other",
        }
    }

    /// The reason of this name; [`Reason::Other`] for one that is unknown here.
    pub fn from_name(name: &str) -> Self {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name).unwrap_or(Self::Other)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Letter {
    /// What `headers` say. Where no consumer of ours wrote them, what the broker says of a message that it dead-lettered itself.
    pub fn read(headers: Option<&FieldTable>) -> Option<Self> {
        let headers = headers?;
        match text(headers, REASON) {
            Some(reason) => Some(Self {
                attempts: number(headers, ATTEMPTS).unwrap_or(1),
                reason: Reason::from_name(&reason),
                failed_at: text(headers, FAILED_AT).and_then(|at| read_time(&at)),
            }),
            None => by_broker(headers),
        }
    }

    /// Puts itself into `headers`, over what an earlier attempt wrote.
    pub fn write(&self, headers: &mut FieldTable) {
        headers.insert(ATTEMPTS.into(), AMQPValue::LongInt(i32::try_from(self.attempts).unwrap_or(i32::MAX)));
        headers.insert(REASON.into(), AMQPValue::LongString(self.reason.as_str().into()));
        let failed_at = self.failed_at.and_then(|at| at.format(&Rfc3339).ok());
        if let Some(failed_at) = failed_at {
            headers.insert(FAILED_AT.into(), AMQPValue::LongString(failed_at.into()));
        }
    }
}

/// The broker's own words: `x-first-death-reason`.
fn by_broker(headers: &FieldTable) -> Option<Letter> {
    let reason = match text(headers, "x-first-death-reason")?.as_str() {
        "rejected" => Reason::Rejected,
        "delivery_limit" => Reason::DeliveryLimit,
        _ => Reason::Other,
    };
    Some(Letter { attempts: 1, reason, failed_at: None })
}

fn text(headers: &FieldTable, name: &str) -> Option<String> {
    match headers.inner().get(name)? {
        AMQPValue::LongString(value) => Some(value.to_string()),
        _ => None,
    }
}

fn number(headers: &FieldTable, name: &str) -> Option<u32> {
    match headers.inner().get(name)? {
        AMQPValue::LongInt(value) => u32::try_from(*value).ok(),
        AMQPValue::LongLongInt(value) => u32::try_from(*value).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_survives_the_journey() {
        for reason in Reason::ALL {
            let failed_at = OffsetDateTime::from_unix_timestamp(1_700_000_000).ok();
            let letter = Letter { attempts: 3, reason, failed_at };
            let mut headers = FieldTable::default();
            letter.write(&mut headers);
            assert_eq!(Letter::read(Some(&headers)), Some(letter));
        }
        assert_eq!(Letter::read(Some(&FieldTable::default())), None);
    }

    #[test]
    fn the_broker_may_speak_instead() {
        let mut headers = FieldTable::default();
        headers.insert("x-first-death-reason".into(), AMQPValue::LongString("delivery_limit".into()));
        assert_eq!(Letter::read(Some(&headers)).map(|letter| letter.reason), Some(Reason::DeliveryLimit));
    }
}
