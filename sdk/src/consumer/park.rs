//! Parking: where a message goes whose attempt has failed.
//!
//! Promise: a message is parked when the broker has confirmed that it is in a queue; until then the original stays unacknowledged.
//! Not here, on purpose: the connection that consumes. In an alarm a broker does not read from connections that publish, and would not
//! hear our acknowledgements.

use std::time::Duration;

use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::FieldTable,
    uri::AMQPUri,
};
use time::OffsetDateTime;
use tokio::{sync::Mutex, time::timeout};

use super::session::{CONNECT_DEADLINE, connect};
use crate::{
    letter::{Letter, Reason},
    subscription::SubscriptionName,
    topology::{DEAD, retry_key},
};

const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);
/// Of a message that is no notice, more than this is not kept.
const BODY_LIMIT_BYTES: usize = 64 * 1024;

pub(super) struct Parker {
    uri: AMQPUri,
    name: SubscriptionName,
    delays: Vec<Duration>,
    line: Mutex<Option<Line>>,
}

struct Line {
    channel: Channel,
    /// Dropping it would close it.
    _connection: Connection,
}

/// A message that failed, as it came.
pub(super) struct Failed {
    pub properties: BasicProperties,
    pub body: Vec<u8>,
    pub reason: Reason,
    /// Attempts before this one.
    pub attempts: u32,
}

impl Failed {
    /// What goes to the broker: the message as it was told, and what has become of it.
    fn message(&self, letter: &Letter) -> (BasicProperties, &[u8]) {
        let mut headers = match self.reason {
            // Nobody knows what is in them.
            Reason::Malformed => FieldTable::default(),
            _ => self.properties.headers().clone().unwrap_or_default(),
        };
        // The broker's own notes of earlier journeys: it would take them for a circle.
        let notes: Vec<_> = headers.inner().keys().filter(|name| name.as_str().starts_with("x-")).cloned().collect();
        let mut kept = FieldTable::default();
        for (name, value) in headers.inner().iter().filter(|(name, _)| !notes.contains(name)) {
            kept.insert(name.clone(), value.clone());
        }
        headers = kept;
        letter.write(&mut headers);
        let mut properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
        if let Some(id) = self.properties.message_id().clone() {
            properties = properties.with_message_id(id);
        }
        if let Some(kind) = self.properties.kind().clone() {
            properties = properties.with_type(kind);
        }
        if let Some(content_type) = self.properties.content_type().clone() {
            properties = properties.with_content_type(content_type);
        }
        if let Some(timestamp) = *self.properties.timestamp() {
            properties = properties.with_timestamp(timestamp);
        }
        if let Some(app_id) = self.properties.app_id().clone() {
            properties = properties.with_app_id(app_id);
        }
        (properties, if self.body.len() > BODY_LIMIT_BYTES { &[] } else { &self.body })
    }
}

impl Parker {
    pub(super) fn new(uri: AMQPUri, name: SubscriptionName, delays: Vec<Duration>) -> Self {
        Self { uri, name, delays, line: Mutex::new(None) }
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
        self.publish(&open.channel, &key, failed, &letter).await?;
        *line = Some(open);
        Ok(delay.is_none())
    }

    async fn open(&self) -> Result<Line, String> {
        let connection =
            connect(&self.uri, &format!("{} parking", self.name)).await.map_err(|error| error.to_string())?;
        let opened = timeout(CONNECT_DEADLINE, async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            lapin::Result::Ok(channel)
        });
        let channel = opened.await.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
        Ok(Line { channel, _connection: connection })
    }

    /// One at a time, so that a returned message can be no other.
    async fn publish(&self, channel: &Channel, key: &str, failed: &Failed, letter: &Letter) -> Result<(), String> {
        let (properties, body) = failed.message(letter);
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let published = async {
            channel.basic_publish(self.name.as_str().into(), key.into(), options, body, properties).await?.await
        };
        match timeout(CONFIRM_DEADLINE, published).await {
            Ok(Ok(Confirmation::Ack(None))) => Ok(()),
            Ok(Ok(Confirmation::Ack(Some(_)))) => Err(format!("there is no queue for {key:?}")),
            Ok(Ok(_)) => Err("the broker refused it".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not confirmed within {CONFIRM_DEADLINE:?}")),
        }
    }
}
