//! Messages: what is published meanwhile, and, where an operator insists, what lies in a queue.

use std::time::Duration;

use anyhow::{Context, anyhow};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection,
    options::{BasicConsumeOptions, BasicGetOptions, BasicNackOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{
    needles::Needles,
    report::{Found, Report},
};
use crate::broker::{Broker, request};

/// Messages taken out of one queue, at most.
const MOST_PEEKED: u64 = 1_000;

/// Listens on a queue of its own that goes with it: nobody else's message is touched.
pub async fn listen(broker: &Broker, needles: &Needles, how_long: Duration, report: &mut Report) -> anyhow::Result<()> {
    let connection = broker.connect("audit-leaks").await?;
    let channel = request(connection.create_channel()).await?;
    let name = format!("tidings.audit-leaks.{}", Uuid::new_v4());
    let private = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    request(channel.queue_declare(name.as_str().into(), private, FieldTable::default())).await?;
    let (exchange, all) = (broker.exchange().into(), "#".into());
    let bound =
        channel.queue_bind(name.as_str().into(), exchange, all, QueueBindOptions::default(), FieldTable::default());
    request(bound).await.with_context(|| format!("there is no listening to exchange {:?}", broker.exchange()))?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consumer = channel.basic_consume(name.as_str().into(), "".into(), options, FieldTable::default());
    let mut news = request(consumer).await?;
    eprintln!("listening to what is published for {how_long:?}");
    let (end, mut count, mut found) = (Instant::now() + how_long, 0, Found::default());
    let heard = loop {
        let Ok(delivery) = timeout_at(end, news.next()).await else { break Ok(()) };
        let Some(delivery) = delivery else { break Err(anyhow!("the queue is gone")) };
        let delivery = match delivery.context("the connection to the broker is lost") {
            Ok(delivery) => delivery,
            lost => break lost.map(drop),
        };
        count += 1;
        let routing_key = delivery.routing_key.as_str();
        look(needles, "message", &delivery.properties, routing_key, &delivery.data, &mut found);
    };
    report.scanned(format!("exchange {}, messages within {how_long:?}", broker.exchange()), count, found, None);
    close(&connection).await;
    heard
}

/// Takes messages out of a queue and puts them back.
pub async fn peek(broker: &Broker, needles: &Needles, queue: &str, report: &mut Report) -> anyhow::Result<()> {
    eprintln!(
        "peeking into {queue}: each message counts as delivered once more, and comes marked as redelivered; a broker that limits \
         deliveries (RabbitMQ 4: 20) drops a message, or sets it aside, that was looked at too often"
    );
    let connection = broker.connect("audit-leaks peek").await?;
    let channel = request(connection.create_channel()).await?;
    let (mut count, mut found) = (0, Found::default());
    let taken = take(&channel, needles, queue, &mut count, &mut found).await;
    let but = (count == MOST_PEEKED).then(|| format!("and no more than the first {MOST_PEEKED}"));
    report.scanned(format!("queue {queue}, messages"), count, found, but);
    taken?;
    // All at once, and only now: what was put back would be taken out again.
    let all = BasicNackOptions { multiple: true, requeue: true };
    if count > 0 {
        request(channel.basic_nack(0, all)).await?;
    }
    // What was not put back by then, the broker puts back.
    close(&connection).await;
    Ok(())
}

async fn take(
    channel: &Channel,
    needles: &Needles,
    queue: &str,
    count: &mut u64,
    found: &mut Found,
) -> anyhow::Result<()> {
    while *count < MOST_PEEKED {
        let got = request(channel.basic_get(queue.into(), BasicGetOptions { no_ack: false })).await;
        let Some(message) = got.with_context(|| format!("queue {queue:?} cannot be looked into"))? else { break };
        *count += 1;
        let (properties, data) = (&message.delivery.properties, &message.delivery.data);
        let routing_key = message.delivery.routing_key.as_str();
        look(needles, &format!("queue {queue}, message"), properties, routing_key, data, found);
    }
    Ok(())
}

fn look(needles: &Needles, place: &str, properties: &BasicProperties, key: &str, body: &[u8], found: &mut Found) {
    // Headers and all else, whatever type it has.
    let around = format!("{properties:?} {key}");
    let origins = [needles.found_in(around.as_bytes()), needles.found_in(body)].concat();
    // An id that is none may be the leak.
    let id =
        tidings_sdk::envelope::message_id(properties).map_or_else(|| "without an id".to_owned(), |id| id.to_string());
    found.note(format!("{place} {id}"), &origins);
}

async fn close(connection: &Connection) {
    // Gone either way; saying goodbye spares the broker a warning in its log.
    let _ = tokio::time::timeout(Duration::from_secs(1), connection.close(200, "bye".into())).await;
}
