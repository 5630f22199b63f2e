//! Parking: where a message goes whose attempt has failed.
//!
//! Promise: a message is parked when the broker has confirmed that it is in a queue; until then the original stays unacknowledged.
//! Not here, on purpose: the connection that consumes. In an alarm a broker does not read from connections that publish, and would not
//! hear our acknowledgements.

use std::{collections::BTreeMap, mem, pin::pin, time::Duration};

use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    message::Delivery,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use time::OffsetDateTime;
use tokio::{sync::Mutex, time::timeout};

use super::session::{Address, CONNECT_DEADLINE};
use crate::{
    envelope::{APP_ID, FieldName, message_id},
    letter::{Letter, Reason},
    subscription::SubscriptionName,
    topology::{BACKFILL, DEAD, RECEIPT_OWED, REDRIVEN, retry_key},
};

const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);
/// Of a message that is no notice, more than this is not kept.
const BODY_LIMIT_BYTES: usize = 64 * 1024;
/// Headers that travel on, beside one for each field.
const CARRIED: [&str; 10] = [
    "version",
    "traceparent",
    "cloudEvents_specversion",
    "cloudEvents_id",
    "cloudEvents_source",
    "cloudEvents_type",
    "cloudEvents_subject",
    "cloudEvents_time",
    BACKFILL,
    REDRIVEN,
];
/// All headers have to go into one frame, with room for what we add.
const FIELD_LIMIT: usize = 1_000;
const TEXT_LIMIT_BYTES: usize = 512;
const EVENT_LIMIT_BYTES: usize = 64;

pub(super) struct Parker {
    broker: Address,
    name: SubscriptionName,
    delays: Vec<Duration>,
    line: Mutex<Option<Line>>,
}

struct Line {
    channel: Channel,
    connection: Connection,
}

/// A message that failed, without whatever is no part of a notice.
pub(super) struct Failed {
    pub properties: BasicProperties,
    pub body: Vec<u8>,
    pub reason: Reason,
    /// Attempts before this one.
    pub attempts: u32,
}

impl Failed {
    /// Takes what is to be kept out of the message. A body too large for a notice is let go at once.
    pub(super) fn take(delivery: &mut Delivery, reason: Reason, attempts: u32) -> Self {
        let mut body = mem::take(&mut delivery.data);
        if body.len() > BODY_LIMIT_BYTES {
            body = vec![];
        }
        Self { properties: carried(&delivery.properties), body, reason, attempts }
    }

    /// The message as it was told, and what has become of it.
    fn properties(&self, letter: &Letter) -> BasicProperties {
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        letter.write(&mut headers);
        self.properties.clone().with_headers(headers)
    }
}

/// A deletion that was handled, and that the owner has not heard so of.
pub(super) struct Owed {
    properties: BasicProperties,
    body: Vec<u8>,
    /// How often it was put aside before.
    tries: u32,
}

impl Owed {
    /// Takes what is to be kept out of the message.
    pub(super) fn take(delivery: &mut Delivery) -> Self {
        let tries = tries(&delivery.properties).unwrap_or_default();
        Self { properties: carried(&delivery.properties), body: mem::take(&mut delivery.data), tries }
    }

    fn properties(&self) -> BasicProperties {
        let mut headers = self.properties.headers().clone().unwrap_or_default();
        let tries = i32::try_from(self.tries.saturating_add(1)).unwrap_or(i32::MAX);
        headers.insert(RECEIPT_OWED.into(), AMQPValue::LongInt(tries));
        self.properties.clone().with_headers(headers)
    }
}

/// How often a deletion that is only to be confirmed was put aside; `None` for every other message.
pub(super) fn tries(properties: &BasicProperties) -> Option<u32> {
    match properties.headers().as_ref()?.inner().get(RECEIPT_OWED)? {
        AMQPValue::LongInt(tries) => u32::try_from(*tries).ok(),
        _ => None,
    }
}

/// What a notice is made of, and nothing else. Whoever made the message may have put in what sends it elsewhere (`CC`), has the broker
/// refuse it (a foreign `user_id`), or lets it expire before anybody has looked at it.
fn carried(properties: &BasicProperties) -> BasicProperties {
    let mut kept = BasicProperties::default().with_delivery_mode(2).with_headers(headers(properties));
    if let Some(id) = message_id(properties) {
        kept = kept.with_message_id(id.to_string().into());
    }
    if let Some(kind) = properties.kind().clone().filter(|kind| could_be_event(kind.as_str())) {
        kept = kept.with_type(kind);
    }
    if let Some(timestamp) = *properties.timestamp() {
        kept = kept.with_timestamp(timestamp);
    }
    kept.with_content_type("application/json".into()).with_app_id(APP_ID.into())
}

/// Whether a later version of this contract may have an event of this name. What was put aside for not being known can then be put back.
fn could_be_event(name: &str) -> bool {
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    name.len() <= EVENT_LIMIT_BYTES && name.contains('.') && name.split('.').all(is_word)
}

fn headers(properties: &BasicProperties) -> FieldTable {
    let Some(headers) = properties.headers() else { return FieldTable::default() };
    let (known, fields): (Vec<_>, Vec<_>) =
        headers.inner().iter().partition(|(name, _)| CARRIED.contains(&name.as_str()));
    let known = known.into_iter().filter(|(_, value)| is_small(value));
    let fields = fields.into_iter().filter(|(name, value)| is_field(name.as_str(), value)).take(FIELD_LIMIT);
    known.chain(fields).map(|(name, value)| (name.clone(), value.clone())).collect::<BTreeMap<_, _>>().into()
}

fn is_field(name: &str, value: &AMQPValue) -> bool {
    let field = name.strip_prefix("field.").is_some_and(|field| field.parse::<FieldName>().is_ok());
    field && *value == AMQPValue::Boolean(true)
}

fn is_small(value: &AMQPValue) -> bool {
    match value {
        AMQPValue::LongString(text) => text.as_bytes().len() <= TEXT_LIMIT_BYTES,
        AMQPValue::FieldTable(_) | AMQPValue::FieldArray(_) | AMQPValue::ByteArray(_) => false,
        _ => true,
    }
}

impl Parker {
    pub(super) fn new(broker: Address, name: SubscriptionName, delays: Vec<Duration>) -> Self {
        Self { broker, name, delays, line: Mutex::new(None) }
    }

    /// Parks a message: for a later attempt, or for good. True when it is a dead letter now.
    ///
    /// # Errors
    /// When the broker does not take it; it has to be tried again.
    pub(super) async fn park(&self, failed: &Failed) -> Result<bool, String> {
        let attempts = failed.attempts.saturating_add(1);
        let delay = match failed.reason {
            Reason::Malformed => None,
            _ => self.delays.get(attempts as usize - 1),
        };
        let key = delay.map_or_else(|| DEAD.to_owned(), |delay| retry_key(*delay));
        let letter = Letter { attempts, reason: failed.reason, failed_at: Some(OffsetDateTime::now_utc()) };
        let mut line = self.line.lock().await;
        // Taken out while in use: after anything but success the next one begins anew.
        let open = match line.take() {
            Some(open) if open.channel.status().connected() => open,
            _ => self.open().await?,
        };
        self.publish(&open, &key, &failed.body, failed.properties(&letter)).await?;
        *line = Some(open);
        Ok(delay.is_none())
    }

    /// Whether there are queues that give back later what is put aside.
    pub(super) fn has_queues(&self) -> bool {
        !self.delays.is_empty()
    }

    /// Puts a deletion aside that was handled and is still to be confirmed. It never becomes a dead letter: there is nothing to mend.
    ///
    /// # Errors
    /// When the broker does not take it; it has to be tried again.
    pub(super) async fn owe(&self, owed: &Owed) -> Result<(), String> {
        let latest = self.delays.len().checked_sub(1).ok_or("there is no queue to wait in")?;
        let delay = self.delays[latest.min(owed.tries as usize)];
        let mut line = self.line.lock().await;
        let open = match line.take() {
            Some(open) if open.channel.status().connected() => open,
            _ => self.open().await?,
        };
        self.publish(&open, &retry_key(delay), &owed.body, owed.properties()).await?;
        *line = Some(open);
        Ok(())
    }

    async fn open(&self) -> Result<Line, String> {
        let connection =
            self.broker.connect(&format!("{} parking", self.name)).await.map_err(|error| error.to_string())?;
        let opened = timeout(CONNECT_DEADLINE, async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            lapin::Result::Ok(channel)
        });
        let channel = opened.await.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
        Ok(Line { channel, connection })
    }

    /// One at a time, so that a returned message can be no other.
    async fn publish(&self, line: &Line, key: &str, body: &[u8], properties: BasicProperties) -> Result<(), String> {
        let exchange = self.name.as_str().into();
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let mut published =
            pin!(async { line.channel.basic_publish(exchange, key.into(), options, body, properties).await?.await });
        loop {
            return match timeout(CONFIRM_DEADLINE, &mut published).await {
                Ok(Ok(Confirmation::Ack(None))) => Ok(()),
                Ok(Ok(Confirmation::Ack(Some(_)))) => Err(format!("there is no queue for {key:?}")),
                Ok(Ok(_)) => Err("the broker refused it".to_owned()),
                Ok(Err(error)) => Err(error.to_string()),
                // An alarm. What was sent is confirmed when it ends; sent again, it would be there twice.
                Err(_) if line.connection.status().blocked() => continue,
                Err(_) => Err(format!("not confirmed within {CONFIRM_DEADLINE:?}")),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::{Event, Notice};

    #[test]
    fn a_notice_travels_on_as_it_was() {
        let notice = Notice {
            message_id: uuid::Uuid::from_u128(1),
            user_id: uuid::Uuid::from_u128(2),
            version: 7,
            event: Event::Updated { changed_fields: vec!["city".parse().unwrap()] },
            occurred_at: OffsetDateTime::UNIX_EPOCH,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
        };
        let (properties, _) = notice.to_message("urn:tidings:test");
        assert_eq!(carried(&properties), properties);
        let mut headers = properties.headers().clone().unwrap();
        headers.insert(BACKFILL.into(), AMQPValue::LongString(uuid::Uuid::from_u128(3).to_string().into()));
        headers.insert(REDRIVEN.into(), AMQPValue::LongInt(2));
        let addressed = properties.with_headers(headers);
        assert_eq!(carried(&addressed), addressed);
    }

    #[test]
    fn an_event_of_a_later_contract_keeps_its_name() {
        let unknown = BasicProperties::default().with_type("user.merged".into());
        assert_eq!(carried(&unknown).kind(), unknown.kind());
        assert!(Event::NAMES.into_iter().all(could_be_event));
        for other in ["", "ana", "Ana.Silva", "user.", "user..merged", "user.merged twice", &"a.".repeat(40)] {
            assert!(!could_be_event(other), "{other}");
        }
    }

    #[test]
    fn what_is_no_part_of_a_notice_stays_behind() {
        let mut headers = FieldTable::default();
        headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("elsewhere".into())].into()));
        headers.insert("x-death".into(), AMQPValue::LongString("of old age".into()));
        headers.insert("version".into(), AMQPValue::FieldTable(FieldTable::default()));
        headers.insert("field.city".into(), AMQPValue::LongString("Riga".into()));
        headers.insert("traceparent".into(), AMQPValue::LongString("x".repeat(513).into()));
        let hostile = BasicProperties::default()
            .with_headers(headers)
            .with_expiration("1".into())
            .with_user_id("somebody".into())
            .with_reply_to("elsewhere".into())
            .with_type("Ana".into())
            .with_message_id("Ana".into());
        let plain = BasicProperties::default()
            .with_delivery_mode(2)
            .with_headers(FieldTable::default())
            .with_content_type("application/json".into())
            .with_app_id(APP_ID.into());
        assert_eq!(carried(&hostile), plain);
    }
}
