//! The facts about a dead letter, free of any I/O.

use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable},
};
use tidings_sdk::{
    envelope::{self, Notice},
    letter::{Letter, Reason},
    topology::{BACKFILL, REDRIVEN},
};
use time::OffsetDateTime;
use uuid::Uuid;

/// Order in which letters came; a letter that comes again gets a new one.
pub type Place = i64;

/// A message that could not be handled.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// 0 before it is kept.
    pub place: Place,
    pub message_id: Uuid,
    /// `None` when the message was no notice; nothing else is known of it, and it cannot be redriven.
    pub notice: Option<Notice>,
    /// The backfill that told it, if one did: then it counts whatever its version is.
    pub backfill: Option<Uuid>,
    pub reason: Reason,
    pub attempts: i32,
    pub failed_at: Option<OffsetDateTime>,
    pub redriven: i32,
    pub size_bytes: i64,
    /// Since it failed last, or came here when nobody said when that was.
    pub age_s: i64,
}

/// Which letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    These(Vec<Uuid>),
    Reason(Reason),
    All,
}

/// What a request to redrive did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redriven {
    pub redriven: u64,
    pub left: i64,
    pub not_redrivable: i64,
}

/// Selected letters that are still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub struct Left {
    pub redrivable: i64,
    pub not_redrivable: i64,
}

impl DeadLetter {
    /// What is to be kept of a message in a dead-letter queue.
    pub fn open(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let headers = properties.headers().as_ref();
        let notice = Notice::from_message(properties, &delivery.data).ok();
        let letter = Letter::read(headers);
        let reason = match (&notice, letter) {
            (None, _) => Reason::Malformed,
            (Some(_), Some(letter)) => letter.reason,
            // Whoever put it here said nothing.
            (Some(_), None) => Reason::Other,
        };
        Self {
            place: 0,
            message_id: envelope::message_id(properties).unwrap_or_else(Uuid::new_v4),
            notice,
            backfill: headers.and_then(backfill),
            reason,
            attempts: letter.map_or(0, |letter| i32::try_from(letter.attempts).unwrap_or(i32::MAX)),
            failed_at: letter.and_then(|letter| letter.failed_at),
            redriven: headers.map_or(0, times_redriven),
            size_bytes: i64::try_from(delivery.data.len()).unwrap_or(i64::MAX),
            age_s: 0,
        }
    }
}

fn backfill(headers: &FieldTable) -> Option<Uuid> {
    match headers.inner().get(BACKFILL) {
        Some(AMQPValue::LongString(id)) => Uuid::try_parse_ascii(id.as_bytes()).ok(),
        _ => None,
    }
}

fn times_redriven(headers: &FieldTable) -> i32 {
    match headers.inner().get(REDRIVEN) {
        Some(AMQPValue::LongInt(times)) => (*times).max(0),
        // Clients that republish a message may widen the integer.
        Some(AMQPValue::LongLongInt(times)) => i32::try_from((*times).max(0)).unwrap_or(i32::MAX),
        _ => 0,
    }
}
