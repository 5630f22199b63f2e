//! Topology: what a subscription is made of at the broker.
//!
//! Promise: declared anew, everything stays as it is; the owner's registry and a consumer that declares for itself make the same.
//! It works on RabbitMQ 3.10 to 4.x, and needs no right on any name but the subscription's own and on the owner's exchange.
//! Not here, on purpose: connections. A channel comes from whoever has one, and is spent when the broker refuses something.
//!
//! ```text
//!  owner's topic exchange ──keys──▶┌─────────────┐
//!        │ profile.updated         │ queue NAME  │──rejected──┐
//!        ▼                         └─────────────┘            │
//!  headers exchange NAME.fields ──field.x──▲ ▲                │
//!                                       work │                ▼
//!  direct exchange NAME ─────────────────────┘     dead ─▶ queue NAME.dead
//!        └── retry.MS ─▶ queue NAME.retry.MS ──after MS──▶ exchange NAME, work
//! ```

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::try_join;
use lapin::{
    Channel, ExchangeKind,
    options::{
        ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use tokio::time::timeout;

use crate::{
    envelope::{FieldName, field_header},
    subscription::{BindingKey, Subscription, SubscriptionName},
};

/// How long a message waits before its second attempt, its third, and so on; after the last it is a dead letter.
pub const RETRY_DELAYS: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60), Duration::from_secs(600)];

/// Routing key of the subscription's own exchange: to its queue.
pub const WORK: &str = "work";
/// Routing key of the subscription's own exchange: to its dead letters.
pub const DEAD: &str = "dead";

/// Header of a message that tells a state, not a change; its value is the id of the backfill that it belongs to.
pub const BACKFILL: &str = "tidings-backfill";
/// Header of a message that was put back from the dead letters: how often so far.
pub const REDRIVEN: &str = "tidings-redriven";
/// Header of a deletion that was handled and could not be confirmed to the owner yet: how often that was tried. Heeded only in messages
/// that come through the subscription's own exchange, to which nobody else may write.
pub const RECEIPT_OWED: &str = "tidings-receipt-owed";

/// For one request to the broker.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Redeliveries after which the broker takes a message out of the queue by itself. RabbitMQ 4 would do so after 20, which a consumer
/// that crashes reaches for messages that did nothing wrong; without any limit one that crashes its consumer is redelivered for ever.
const DELIVERY_LIMIT: i32 = 1_000;
/// Dead letters may be looked at as often as anybody likes.
const LOOK_LIMIT: i32 = 1_000_000;

/// The owner's topic exchange, and the words that a deployment puts before every routing key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub exchange: String,
    pub prefix: Option<String>,
}

impl Source {
    /// A binding key of this contract, behind the deployment's prefix if there is one.
    pub fn prefixed(&self, key: &str) -> String {
        match &self.prefix {
            Some(prefix) => format!("{prefix}.{key}"),
            None => key.to_owned(),
        }
    }
}

/// Whether this can stand before a routing key: words with dots between them, none of which a topic exchange takes for a pattern.
pub fn are_words(prefix: &str) -> bool {
    prefix.split('.').all(|word| !word.is_empty() && !word.contains(['*', '#']))
}

/// Why the broker does not have what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Arguments of a queue cannot be changed, and one that is another connection's alone stays so: somebody has to delete it, or choose
    /// another name.
    #[error("{0:?} exists at the broker with other properties; delete it there, or choose another name")]
    Differs(String),
    #[error("{0:?} does not exist at the broker")]
    Missing(String),
    #[error("the broker's user may not configure, bind or read {0:?}")]
    Forbidden(String),
    #[error("the broker did not answer within {REQUEST_DEADLINE:?}")]
    Silent,
    #[error("the broker failed")]
    Broken(#[source] lapin::Error),
}

/// Names of the parts.
impl SubscriptionName {
    /// The queue of what is to be handled. The direct exchange has this name too.
    pub fn queue(&self) -> &str {
        self.as_str()
    }

    pub fn dead_queue(&self) -> String {
        format!("{self}.dead")
    }

    /// There only while a consumer in another language has everybody still to read. Nothing of this SDK declares it.
    pub fn resync_queue(&self) -> String {
        format!("{self}.resync")
    }

    pub fn fields_exchange(&self) -> String {
        format!("{self}.fields")
    }

    pub fn retry_queue(&self, delay: Duration) -> String {
        format!("{self}.{}", retry_key(delay))
    }
}

/// Routing key of the subscription's own exchange: back to its queue after this time.
pub fn retry_key(delay: Duration) -> String {
    format!("retry.{}", delay.as_millis())
}

/// Declares all parts of a subscription and binds them. From then on no news is missed.
///
/// # Errors
/// When the broker refuses or does not answer; the channel is spent then.
pub async fn declare(
    channel: &Channel,
    source: &Source,
    subscription: &Subscription,
    retry_delays: &[Duration],
) -> Result<(), Error> {
    declare_over(channel, source, subscription, retry_delays, &BTreeSet::new()).await
}

/// The same over parts that are there: one of them that is gone after all is not made anew as if nothing had happened.
///
/// # Errors
/// [`Error::Missing`] for such a one; and when the broker refuses or does not answer. The channel is spent then.
pub async fn declare_over(
    channel: &Channel,
    source: &Source,
    subscription: &Subscription,
    retry_delays: &[Duration],
    there: &BTreeSet<String>,
) -> Result<(), Error> {
    let name = &subscription.name;
    declare_exchange(channel, name.as_str(), ExchangeKind::Direct).await?;
    let queue = async |queue: &str, arguments, key: &str| {
        let declared = declare_queue(channel, queue, arguments);
        let bound = bind_queue(channel, queue, name.as_str(), key, FieldTable::default());
        have(declared, bound, there.contains(queue)).await
    };
    for delay in retry_delays {
        queue(&name.retry_queue(*delay), retry_arguments(name, *delay), &retry_key(*delay)).await?;
    }
    queue(&name.dead_queue(), quorum(LOOK_LIMIT), DEAD).await?;
    queue(name.queue(), work_arguments(name), WORK).await?;
    bind(channel, source, subscription, there).await
}

/// Has a part that is declared and bound. Where it is there both are asked at once: if it is gone, the broker closes the channel over the
/// binding, and hears nothing of the declaration.
async fn have(
    declared: impl Future<Output = Result<(), Error>>,
    bound: impl Future<Output = Result<(), Error>>,
    is_there: bool,
) -> Result<(), Error> {
    if is_there {
        return try_join(bound, declared).await.map(drop);
    }
    declared.await?;
    bound.await
}

/// Binds the queue to what wakes the subscription.
async fn bind(
    channel: &Channel,
    source: &Source,
    subscription: &Subscription,
    there: &BTreeSet<String>,
) -> Result<(), Error> {
    let name = &subscription.name;
    for key in &subscription.keys {
        let key = source.prefixed(key.as_str());
        bind_queue(channel, name.queue(), &source.exchange, &key, FieldTable::default()).await?;
    }
    if subscription.fields.is_empty() {
        return Ok(());
    }
    let fields = name.fields_exchange();
    let declared = declare_exchange(channel, &fields, ExchangeKind::Headers);
    have(declared, bind_exchange(channel, &fields, source), there.contains(&fields)).await?;
    for field in &subscription.fields {
        bind_queue(channel, name.queue(), &fields, "", field_arguments(field)).await?;
    }
    Ok(())
}

/// Unbinds what no longer wakes the subscription. What was never bound stays so.
///
/// # Errors
/// When the broker refuses or does not answer; the channel is spent then.
pub async fn unbind(
    channel: &Channel,
    source: &Source,
    name: &SubscriptionName,
    keys: &BTreeSet<BindingKey>,
    fields: &BTreeSet<FieldName>,
) -> Result<(), Error> {
    for key in keys {
        let key = source.prefixed(key.as_str()).into();
        let unbound =
            channel.queue_unbind(name.queue().into(), source.exchange.as_str().into(), key, FieldTable::default());
        answer(name.queue(), unbound).await?;
    }
    for field in fields {
        let (queue, exchange) = (name.queue().into(), name.fields_exchange().into());
        let unbound = channel.queue_unbind(queue, exchange, "".into(), field_arguments(field));
        answer(name.queue(), unbound).await?;
    }
    Ok(())
}

/// Deletes all parts of a subscription with what lies in them. What is not there is no error.
///
/// # Errors
/// When the broker refuses or does not answer; the channel is spent then.
pub async fn delete(channel: &Channel, name: &SubscriptionName, retry_delays: &[Duration]) -> Result<(), Error> {
    for exchange in [name.fields_exchange(), name.as_str().to_owned()] {
        let deleted = channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default());
        answer(&exchange, deleted).await?;
    }
    let retries = retry_delays.iter().map(|delay| name.retry_queue(*delay));
    for queue in retries.chain([name.queue().to_owned(), name.dead_queue(), name.resync_queue()]) {
        let deleted = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
        answer(&queue, deleted).await?;
    }
    Ok(())
}

/// What a queue holds, as far as AMQP tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Messages that wait; those that a consumer holds unacknowledged are not among them.
    pub ready: u32,
    pub consumers: u32,
}

/// Looks at a queue without touching it.
///
/// # Errors
/// [`Error::Missing`] when there is no such queue; the channel is spent after any error.
pub async fn depth(channel: &Channel, queue: &str) -> Result<Depth, Error> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let queue = answer(queue, channel.queue_declare(queue.into(), passive, FieldTable::default())).await?;
    Ok(Depth { ready: queue.message_count(), consumers: queue.consumer_count() })
}

/// Whether there is such an exchange.
///
/// # Errors
/// When the broker refuses the question or does not answer; the channel is spent after any error, and when there is none.
pub async fn has_exchange(channel: &Channel, exchange: &str) -> Result<bool, Error> {
    let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
    let asked = channel.exchange_declare(exchange.into(), ExchangeKind::Topic, passive, FieldTable::default());
    match answer(exchange, asked).await {
        Ok(()) => Ok(true),
        Err(Error::Missing(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn declare_exchange(channel: &Channel, name: &str, kind: ExchangeKind) -> Result<(), Error> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    answer(name, channel.exchange_declare(name.into(), kind, durable, FieldTable::default())).await
}

async fn declare_queue(channel: &Channel, name: &str, arguments: FieldTable) -> Result<(), Error> {
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    answer(name, channel.queue_declare(name.into(), durable, arguments)).await.map(drop)
}

/// Of updates alone.
async fn bind_exchange(channel: &Channel, exchange: &str, source: &Source) -> Result<(), Error> {
    let updates = source.prefixed("profile.updated").into();
    let (to, from) = (exchange.into(), source.exchange.as_str().into());
    let bound = channel.exchange_bind(to, from, updates, ExchangeBindOptions::default(), FieldTable::default());
    answer(&source.exchange, bound).await
}

async fn bind_queue(
    channel: &Channel,
    queue: &str,
    exchange: &str,
    key: &str,
    arguments: FieldTable,
) -> Result<(), Error> {
    let bound = channel.queue_bind(queue.into(), exchange.into(), key.into(), QueueBindOptions::default(), arguments);
    answer(exchange, bound).await
}

fn quorum(delivery_limit: i32) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(delivery_limit));
    arguments
}

fn work_arguments(name: &SubscriptionName) -> FieldTable {
    let mut arguments = quorum(DELIVERY_LIMIT);
    arguments.insert("x-dead-letter-exchange".into(), text(name.as_str()));
    arguments.insert("x-dead-letter-routing-key".into(), text(DEAD));
    arguments
}

fn retry_arguments(name: &SubscriptionName, delay: Duration) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(i32::try_from(delay.as_millis()).unwrap_or(i32::MAX)));
    arguments.insert("x-dead-letter-exchange".into(), text(name.as_str()));
    arguments.insert("x-dead-letter-routing-key".into(), text(WORK));
    // A message on its way back is kept until the work queue has confirmed it; the strategy demands this overflow.
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

/// One binding a field: a field more or less leaves the others as they are.
fn field_arguments(field: &FieldName) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-match".into(), text("any"));
    arguments.insert(field_header(field).into(), AMQPValue::Boolean(true));
    arguments
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// The broker's answer about `subject`, within the deadline.
async fn answer<T>(subject: &str, request: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
    let refused = match timeout(REQUEST_DEADLINE, request).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(refused)) => refused,
        Err(_) => return Err(Error::Silent),
    };
    let subject = subject.to_owned();
    Err(match refusal(&refused) {
        Some(AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::RESOURCELOCKED) => Error::Differs(subject),
        Some(AMQPSoftError::NOTFOUND) => Error::Missing(subject),
        Some(AMQPSoftError::ACCESSREFUSED) => Error::Forbidden(subject),
        _ => Error::Broken(refused),
    })
}

fn refusal(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(refusal) => Some(refusal.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}
