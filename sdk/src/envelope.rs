//! Envelope: a notice, and the AMQP message that carries it.
//!
//! Promise: what [`Notice::to_message`] writes, [`Notice::from_message`] reads back; unknown members are ignored.
//! Not here, on purpose: a place for a profile value. A notice says who changed and which fields, never what to.

use std::{borrow::Cow, collections::BTreeMap, fmt, str::FromStr};

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};
use uuid::Uuid;

use crate::trace::Traceparent;

/// The `app_id` property of every message.
pub const APP_ID: &str = "tidings";
/// A body larger than this is no notice of ours: 256 field names of 64 bytes take a quarter of it.
const BODY_LIMIT_BYTES: usize = 64 * 1024;

/// That a user changed: the content of one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The same on every resend: what a consumer drops duplicates by.
    pub message_id: Uuid,
    pub user_id: Uuid,
    /// The version that this change made; the state to fetch is this one or a later one.
    pub version: i64,
    pub event: Event,
    pub occurred_at: OffsetDateTime,
    /// The trace of the request that made the change. `None` when a message came without one, or with something else in its place.
    pub traceparent: Option<Traceparent>,
}

/// What happened to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Created,
    Updated { changed_fields: Vec<FieldName> },
    Deleted,
}

impl Event {
    /// The names of all events.
    pub const NAMES: [&'static str; 3] = ["user.created", "profile.updated", "user.deleted"];

    /// The event's name: the `type` property and, behind an optional prefix, the routing key.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "user.created",
            Self::Updated { .. } => "profile.updated",
            Self::Deleted => "user.deleted",
        }
    }

    pub fn changed_fields(&self) -> &[FieldName] {
        match self {
            Self::Updated { changed_fields } => changed_fields,
            Self::Created | Self::Deleted => &[],
        }
    }

    /// The event called `name`; `None` for a name of some other publisher.
    pub fn from_name(name: &str, changed_fields: Vec<FieldName>) -> Option<Self> {
        match name {
            "user.created" => Some(Self::Created),
            "profile.updated" => Some(Self::Updated { changed_fields }),
            "user.deleted" => Some(Self::Deleted),
            _ => None,
        }
    }
}

/// The name of a top-level profile field: a letter or `_`, then letters, digits, `_` and `-`; at most 64 bytes.
///
/// The narrow alphabet keeps `field.NAME` a valid AMQP header and keeps data out of a place meant for names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct FieldName(String);

impl FieldName {
    pub const MAX_BYTES: usize = 64;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a string is no field name.
#[derive(Debug, thiserror::Error)]
#[error("a field name is a letter or _ followed by letters, digits, _ and -, at most {} bytes", FieldName::MAX_BYTES)]
pub struct InvalidFieldName;

impl FromStr for FieldName {
    type Err = InvalidFieldName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        name.to_owned().try_into()
    }
}

impl TryFrom<String> for FieldName {
    type Error = InvalidFieldName;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        let goes_on_well = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if starts_well && goes_on_well && name.len() <= Self::MAX_BYTES {
            Ok(Self(name))
        } else {
            Err(InvalidFieldName)
        }
    }
}

impl From<FieldName> for String {
    fn from(name: FieldName) -> Self {
        name.0
    }
}

impl fmt::Display for FieldName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a message is not a notice. Says what is wrong and repeats nothing of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotANotice {
    #[error("the type property is missing or names an event unknown here")]
    Event,
    #[error("the message_id property is missing or not a UUID")]
    MessageId,
    #[error("the version header is missing or not a positive integer")]
    Version,
    #[error("the timestamp property is missing or out of range")]
    Timestamp,
    #[error("the body is not a notice")]
    Body,
}

/// The body on the wire: RFC 8259 JSON, and nothing else in it.
#[derive(Serialize, Deserialize)]
struct Body<'a> {
    user_id: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changed_fields: Option<Cow<'a, [FieldName]>>,
}

impl Notice {
    /// The message to publish. `source` is the CloudEvents source: a URI reference that names this owner of the data.
    pub fn to_message(&self, source: &str) -> (BasicProperties, Vec<u8>) {
        (self.properties(source), self.body())
    }

    /// Reads a message back.
    ///
    /// # Errors
    /// [`NotANotice`] when a part of the contract is missing or malformed; such a message belongs in a dead-letter queue at once.
    pub fn from_message(properties: &BasicProperties, body: &[u8]) -> Result<Self, NotANotice> {
        if body.len() > BODY_LIMIT_BYTES {
            return Err(NotANotice::Body);
        }
        let body: Body<'_> = serde_json::from_slice(body).map_err(|_| NotANotice::Body)?;
        let changed_fields = body.changed_fields.unwrap_or_default().into_owned();
        let name = properties.kind().as_ref().ok_or(NotANotice::Event)?;
        let headers = properties.headers().as_ref();
        Ok(Self {
            message_id: message_id(properties).ok_or(NotANotice::MessageId)?,
            user_id: body.user_id,
            version: headers.and_then(version).ok_or(NotANotice::Version)?,
            event: Event::from_name(name.as_str(), changed_fields).ok_or(NotANotice::Event)?,
            occurred_at: headers
                .and_then(|headers| read_time(&text(headers, "cloudEvents_time")?))
                .or_else(|| timestamp(properties))
                .ok_or(NotANotice::Timestamp)?,
            traceparent: headers.and_then(|headers| text(headers, "traceparent")?.parse().ok()),
        })
    }

    fn body(&self) -> Vec<u8> {
        let changed_fields = match &self.event {
            Event::Updated { changed_fields } => Some(changed_fields.into()),
            Event::Created | Event::Deleted => None,
        };
        serde_json::to_vec(&Body { user_id: self.user_id, changed_fields }).expect("a UUID and names are always JSON")
    }

    fn properties(&self, source: &str) -> BasicProperties {
        let seconds = u64::try_from(self.occurred_at.unix_timestamp()).unwrap_or_default();
        let mut buffer = Uuid::encode_buffer();
        let message_id: &str = self.message_id.hyphenated().encode_lower(&mut buffer);
        BasicProperties::default()
            .with_message_id(message_id.into())
            .with_type(self.event.name().into())
            .with_content_type("application/json".into())
            .with_timestamp(seconds)
            .with_app_id(APP_ID.into())
            .with_delivery_mode(2)
            .with_headers(FieldTable::from(self.headers(source, message_id)))
    }

    fn headers(&self, source: &str, message_id: &str) -> BTreeMap<ShortString, AMQPValue> {
        let text = |value: &str| AMQPValue::LongString(value.into());
        let mut buffer = Uuid::encode_buffer();
        let user_id = self.user_id.hyphenated().encode_lower(&mut buffer);
        let time = self.occurred_at.format(&Rfc3339).expect("a timestamp of the database has a four-digit year");
        // CloudEvents 1.0, AMQP binding, binary mode: the content type is the message's own.
        let cloud_event = [
            ("cloudEvents_id".into(), text(message_id)),
            ("cloudEvents_source".into(), text(source)),
            ("cloudEvents_specversion".into(), text("1.0")),
            ("cloudEvents_subject".into(), text(user_id)),
            ("cloudEvents_time".into(), text(&time)),
            ("cloudEvents_type".into(), text(self.event.name())),
        ];
        let fields = self.event.changed_fields().iter();
        let fields = fields.map(|field| (field_header(field).into(), AMQPValue::Boolean(true)));
        let traceparent = self.traceparent.map(|trace| ("traceparent".into(), text(&trace.to_string())));
        let version = ("version".into(), AMQPValue::LongLongInt(self.version));
        // In order of name: a table is then built in one go.
        cloud_event.into_iter().chain(fields).chain(traceparent).chain([version]).collect()
    }
}

/// The header that a headers exchange matches to wake a consumer for one field alone.
pub fn field_header(field: &FieldName) -> String {
    ["field.", field.as_str()].concat()
}

/// The `message_id` of a message, if it has one of ours.
pub fn message_id(properties: &BasicProperties) -> Option<Uuid> {
    properties.message_id().as_ref()?.as_str().parse().ok()
}

/// A time that somebody else wrote (RFC 3339), in UTC; `None` where its year there has no four digits: such a time a database takes in, or does
/// not, and nobody can write it again.
pub fn read_time(text: &str) -> Option<OffsetDateTime> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?.checked_to_offset(UtcOffset::UTC)?;
    (0..=9999).contains(&time.year()).then_some(time)
}

fn version(headers: &FieldTable) -> Option<i64> {
    // Clients that republish a message may narrow the integer.
    let version = match headers.inner().get("version")? {
        AMQPValue::LongLongInt(version) => *version,
        AMQPValue::LongInt(version) => i64::from(*version),
        AMQPValue::LongUInt(version) => i64::from(*version),
        AMQPValue::ShortInt(version) => i64::from(*version),
        AMQPValue::ShortUInt(version) => i64::from(*version),
        AMQPValue::ShortShortInt(version) => i64::from(*version),
        AMQPValue::ShortShortUInt(version) => i64::from(*version),
        _ => return None,
    };
    (version > 0).then_some(version)
}

fn text(headers: &FieldTable, name: &str) -> Option<String> {
    match headers.inner().get(name)? {
        AMQPValue::LongString(value) => Some(value.to_string()),
        _ => None,
    }
}

fn timestamp(properties: &BasicProperties) -> Option<OffsetDateTime> {
    let seconds = i64::try_from((*properties.timestamp())?).ok()?;
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(event: Event) -> Notice {
        Notice {
            message_id: Uuid::from_u128(1),
            user_id: Uuid::from_u128(2),
            version: 7,
            event,
            occurred_at: OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap(),
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
        }
    }

    fn updated() -> Event {
        Event::Updated { changed_fields: vec!["job_title".parse().unwrap(), "company".parse().unwrap()] }
    }

    #[test]
    fn a_notice_survives_the_journey() {
        for event in [Event::Created, updated(), Event::Deleted] {
            let sent = notice(event);
            let (properties, body) = sent.to_message("urn:tidings:test");
            assert_eq!(Notice::from_message(&properties, &body), Ok(sent));
        }
    }

    #[test]
    fn the_bodies_are_the_contract_to_the_letter() {
        let id = "00000000-0000-0000-0000-000000000002";
        let body = |event| String::from_utf8(notice(event).body()).unwrap();
        assert_eq!(body(Event::Created), format!(r#"{{"user_id":"{id}"}}"#));
        assert_eq!(body(Event::Deleted), format!(r#"{{"user_id":"{id}"}}"#));
        assert_eq!(body(updated()), format!(r#"{{"user_id":"{id}","changed_fields":["job_title","company"]}}"#));
    }

    #[test]
    fn a_foreign_message_is_told_apart() {
        let (properties, body) = notice(Event::Created).to_message("urn:tidings:test");
        let read = |properties: BasicProperties, body: &[u8]| Notice::from_message(&properties, body).unwrap_err();
        assert_eq!(read(properties.clone(), b"not json"), NotANotice::Body);
        assert_eq!(read(properties.clone(), &vec![b' '; BODY_LIMIT_BYTES + 1]), NotANotice::Body);
        assert_eq!(read(properties.clone().with_type("user.renamed".into()), &body), NotANotice::Event);
        assert_eq!(read(properties.clone().with_message_id("7".into()), &body), NotANotice::MessageId);
        assert_eq!(read(properties.with_headers(FieldTable::default()), &body), NotANotice::Version);
    }

    #[test]
    fn a_time_that_cannot_be_written_again_is_none() {
        let written = |text| read_time(text).map(|time| time.format(&Rfc3339).unwrap());
        assert_eq!(written("2026-11-24T06:20:48+01:00").as_deref(), Some("2026-11-24T05:20:48Z"));
        assert_eq!(written("0000-01-01T00:00:00Z").as_deref(), Some("0000-01-01T00:00:00Z"));
        assert_eq!(written("9999-12-31T23:59:59Z").as_deref(), Some("9999-12-31T23:59:59Z"));
        for wrong in ["0000-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "yesterday"] {
            assert_eq!(written(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_field_name_has_no_room_for_a_value() {
        for wrong in ["", "7up", "job title", "ana@example.org", "straße", &"x".repeat(65)] {
            assert!(wrong.parse::<FieldName>().is_err(), "{wrong}");
        }
        assert!("job_title".parse::<FieldName>().is_ok());
    }
}
