//! Tail: news on the terminal, for people who look and for scripts that try things out.
//!
//! Promise: what it declares at the broker is private and goes with it.
//! Not here, on purpose: a durable subscription. What happens while it does not run, it does not see.

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::Context;
use futures_util::StreamExt;
use lapin::{
    Channel, Consumer, ExchangeKind,
    options::{
        BasicConsumeOptions, ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde::Serialize;
use tidings_sdk::{
    envelope::{FieldName, Notice, field_header},
    subscription::BindingKey,
};
use time::OffsetDateTime;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    broker::{Broker, request},
    telemetry::with_causes,
};

/// Before the next try when the broker was lost.
const PAUSE: Duration = Duration::from_secs(1);

/// What to listen for.
pub struct Wanted {
    pub keys: Vec<BindingKey>,
    pub fields: Vec<FieldName>,
}

/// A notice, as a line shows it.
#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    user_id: Uuid,
    version: i64,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    changed_fields: &'a [FieldName],
    message_id: Uuid,
    #[serde(with = "time::serde::rfc3339")]
    occurred_at: OffsetDateTime,
    routing_key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
}

/// Prints until `stop`, or until nobody reads any more.
///
/// # Errors
/// When the broker cannot be reached at the first try. A broker that is lost later is tried for again.
pub async fn run(broker: &Broker, wanted: &Wanted, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut first = true;
    loop {
        let outcome = match stop.run_until_cancelled(session(broker, wanted)).await {
            None => return Ok(()),
            Some(outcome) => outcome,
        };
        match outcome {
            Err(Ended::NobodyReads) => return Ok(()),
            Err(Ended::NeverBegan(error)) if first => return Err(error),
            // Said once, when it was lost.
            Err(Ended::NeverBegan(_)) => {}
            Err(Ended::Lost(error)) => {
                let causes = with_causes(&error);
                eprintln!("tidings tail: {causes}; what happens until the broker is back will not be shown");
            }
            Ok(never) => match never {},
        }
        first = false;
        if stop.run_until_cancelled(sleep(PAUSE)).await.is_none() {
            return Ok(());
        }
    }
}

/// How a session ends; it has no other end.
enum Ended {
    NeverBegan(anyhow::Error),
    Lost(anyhow::Error),
    NobodyReads,
}

async fn session(broker: &Broker, wanted: &Wanted) -> Result<std::convert::Infallible, Ended> {
    // Kept until the end: dropping it closes the connection.
    let connection = broker.session("tail").await.map_err(Ended::NeverBegan)?;
    let channel = broker.channel_with_exchange(&connection).await.map_err(Ended::NeverBegan)?;
    let mut news = listen(broker, &channel, wanted).await.map_err(Ended::NeverBegan)?;
    eprintln!("tidings tail: listening; Ctrl-C ends it");
    while let Some(delivery) = news.next().await {
        let delivery = delivery.context("the connection to the broker is lost").map_err(Ended::Lost)?;
        match Notice::from_message(&delivery.properties, &delivery.data) {
            Ok(notice) => print(&notice, delivery.routing_key.as_str()).map_err(|_| Ended::NobodyReads)?,
            Err(error) => eprintln!("tidings tail: a message that is none of ours: {error}"),
        }
    }
    Err(Ended::Lost(anyhow::anyhow!("the queue is gone")))
}

fn print(notice: &Notice, routing_key: &str) -> io::Result<()> {
    let line = Line {
        event: notice.event.name(),
        user_id: notice.user_id,
        version: notice.version,
        changed_fields: notice.event.changed_fields(),
        message_id: notice.message_id,
        occurred_at: notice.occurred_at,
        routing_key,
        traceparent: notice.traceparent.map(|trace| trace.to_string()),
    };
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &line)?;
    out.write_all(b"\n")?;
    out.flush()
}

async fn listen(broker: &Broker, channel: &Channel, wanted: &Wanted) -> anyhow::Result<Consumer> {
    let name: ShortString = format!("tidings.tail.{}", Uuid::new_v4()).into();
    let private = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    request(channel.queue_declare(name.clone(), private, FieldTable::default())).await?;
    tracing::debug!(queue = %name, "declared");
    if !wanted.fields.is_empty() {
        bind_fields(broker, channel, &name, &wanted.fields).await?;
    }
    let keys: Vec<&str> = match wanted.keys.is_empty() && wanted.fields.is_empty() {
        true => vec!["#"],
        false => wanted.keys.iter().map(BindingKey::as_str).collect(),
    };
    for key in keys {
        let key = if key == "#" { key.to_owned() } else { broker.prefixed(key) };
        let bound = channel.queue_bind(
            name.clone(),
            broker.exchange().into(),
            key.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        request(bound).await?;
    }
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    request(channel.basic_consume(name.clone(), name, options, FieldTable::default())).await
}

/// A headers exchange of our own behind the topic exchange: the broker then wakes us for these fields alone. It goes when the
/// queue, its only binding, goes.
async fn bind_fields(
    broker: &Broker,
    channel: &Channel,
    name: &ShortString,
    fields: &[FieldName],
) -> anyhow::Result<()> {
    let private = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
    request(channel.exchange_declare(name.clone(), ExchangeKind::Headers, private, FieldTable::default())).await?;
    let mut any = FieldTable::default();
    any.insert("x-match".into(), AMQPValue::LongString("any".into()));
    for field in fields {
        any.insert(field_header(field).into(), AMQPValue::Boolean(true));
    }
    request(channel.queue_bind(name.clone(), name.clone(), "".into(), QueueBindOptions::default(), any)).await?;
    let updates = broker.prefixed("profile.updated").into();
    let (exchange, options) = (broker.exchange().into(), ExchangeBindOptions::default());
    request(channel.exchange_bind(name.clone(), exchange, updates, options, FieldTable::default())).await
}
