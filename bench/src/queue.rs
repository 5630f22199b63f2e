//! Queue: where messages arrive, and how many have.
//!
//! Promise: what is counted is in the queue, or was delivered from it; whoever published it has no say.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, ExchangeKind,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{DEADLINE, house::House};

/// Between two looks at how many have arrived.
const LOOK: Duration = Duration::from_millis(50);
/// For the next message, while some are still to come.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a consumer has in hand at most, and how many it acknowledges at once.
const PREFETCH: u16 = 2_000;
const ACK_EVERY: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Quorum,
    Classic,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

/// A queue of our own, and whoever reads from it.
pub struct Queue {
    connection: Connection,
    channel: Channel,
    name: String,
    reader: Option<Reader>,
}

/// How many had arrived, and when. The first entry is the last look before anything arrived.
pub type Arrivals = Vec<Arrived>;
pub type Arrived = (Duration, u64);

impl Queue {
    /// Bound for everything that goes through the exchange of the house.
    pub async fn bound(house: &House, kind: Kind) -> anyhow::Result<Self> {
        let connection = house.connect_broker().await?;
        let channel = connection.create_channel().await?;
        let name = format!("{}.{}", house.exchange, kind.name());
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let exchange: ShortString = house.exchange.as_str().into();
        channel.exchange_declare(exchange.clone(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.name().into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(name.as_str().into(), durable, arguments).await?;
        let options = QueueBindOptions::default();
        channel.queue_bind(name.as_str().into(), exchange, "#".into(), options, FieldTable::default()).await?;
        Ok(Self { connection, channel, name, reader: None })
    }

    /// One that is there, and stays.
    pub async fn of(house: &House, name: &str) -> anyhow::Result<Self> {
        let connection = house.connect_broker().await?;
        let channel = connection.create_channel().await?;
        Ok(Self { connection, channel, name: name.to_owned(), reader: None })
    }

    /// Begins to read, and to count who is told of: users 0 to `users` - 1.
    pub async fn read(&mut self, house: &House, users: u64) -> anyhow::Result<()> {
        self.reader = Some(Reader::start(house, &self.name, users).await?);
        Ok(())
    }

    /// How many have arrived.
    async fn arrived(&self) -> anyhow::Result<u64> {
        if let Some(reader) = &self.reader {
            ensure!(!reader.task.is_finished(), "the consumer was thrown out");
            return Ok(reader.delivered.load(Ordering::Relaxed));
        }
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let look = self.channel.queue_declare(self.name.as_str().into(), passive, FieldTable::default());
        Ok(timeout(DEADLINE, look).await.context("the broker does not answer")??.message_count().into())
    }

    /// Watches until so many have arrived.
    pub async fn await_all(&self, count: u64) -> anyhow::Result<Arrivals> {
        let (began, mut moved) = (Instant::now(), Instant::now());
        let mut arrivals: Arrivals = vec![(Duration::ZERO, 0)];
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            looks.tick().await;
            let (at, arrived) = (began.elapsed(), self.arrived().await?);
            let last = arrivals.last().map_or(0, |(_, arrived)| *arrived);
            if arrived > last {
                moved = Instant::now();
                arrivals.push((at, arrived));
            } else if last == 0 {
                arrivals = vec![(at, 0)];
            }
            if arrived >= count {
                return Ok(arrivals);
            }
            ensure!(moved.elapsed() < PATIENCE, "{arrived} of {count} have arrived, and no more come");
        }
    }

    /// Ends the reader and empties the queue.
    ///
    /// # Errors
    /// When there was a reader, and a user of whom he was not told.
    pub async fn clear(&mut self) -> anyhow::Result<()> {
        if let Some(reader) = self.reader.take() {
            reader.end().await?;
        }
        self.channel.queue_purge(self.name.as_str().into(), QueuePurgeOptions::default()).await?;
        Ok(())
    }

    pub async fn delete(mut self) -> anyhow::Result<()> {
        self.clear().await?;
        self.channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default()).await?;
        Ok(self.connection.close(200, "bye".into()).await?)
    }
}

/// Takes and acknowledges.
struct Reader {
    connection: Connection,
    delivered: Arc<AtomicU64>,
    /// Of users who were never heard of.
    strangers: Arc<AtomicU64>,
    task: JoinHandle<lapin::Result<()>>,
}

impl Reader {
    async fn start(house: &House, queue: &str, users: u64) -> anyhow::Result<Self> {
        let connection = house.connect_broker().await?;
        let channel = connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let mut messages = channel.basic_consume(queue.into(), "bench".into(), options, FieldTable::default()).await?;
        let (delivered, strangers) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(users)));
        let (count, left) = (delivered.clone(), strangers.clone());
        let task = tokio::spawn(async move {
            let mut is_known = vec![false; usize::try_from(users).unwrap_or_default()];
            while let Some(message) = messages.next().await {
                let message = message?;
                let known = user_of(&message.data).and_then(|user| is_known.get_mut(user));
                if known.is_some_and(|known| !std::mem::replace(known, true)) {
                    left.fetch_sub(1, Ordering::Relaxed);
                }
                if (count.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(ACK_EVERY) {
                    message.acker.ack(BasicAckOptions { multiple: true }).await?;
                }
            }
            // The channel keeps the consumer alive.
            drop(channel);
            Ok(())
        });
        Ok(Self { connection, delivered, strangers, task })
    }

    async fn end(self) -> anyhow::Result<()> {
        self.task.abort();
        self.connection.close(200, "bye".into()).await?;
        let strangers = self.strangers.load(Ordering::Relaxed);
        ensure!(strangers == 0, "of {strangers} users nothing was told");
        Ok(())
    }
}

/// The number of the user that a body speaks of. As little work as can be: the consumer shares the cores.
fn user_of(body: &[u8]) -> Option<usize> {
    let text = body.strip_prefix(br#"{"user_id":""#)?.get(24..36)?;
    usize::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

/// Messages a second, from the first to the last.
pub fn per_second(arrivals: &[Arrived]) -> f64 {
    match arrivals {
        [(began, first), .., (ended, last)] => (last - first) as f64 / (*ended - *began).as_secs_f64(),
        _ => f64::NAN,
    }
}

/// The first tenth of all messages, and the last.
pub fn tenths(arrivals: &[Arrived]) -> (&[Arrived], &[Arrived]) {
    let tenth = arrivals.last().map_or(0, |(_, arrived)| *arrived) / 10;
    let first = arrivals.partition_point(|(_, arrived)| *arrived < tenth);
    let last = arrivals.partition_point(|(_, arrived)| *arrived <= 9 * tenth);
    (&arrivals[..arrivals.len().min(first + 1)], &arrivals[last.saturating_sub(1)..])
}

/// Messages a second, second by second.
pub fn by_second(arrivals: &[Arrived]) -> Vec<(f64, f64)> {
    let began = arrivals.first().map(|(at, _)| *at).unwrap_or_default();
    let mut points = vec![];
    let mut from = 0;
    for (place, (at, arrived)) in arrivals.iter().enumerate() {
        let (since, before) = arrivals[from];
        if *at - since >= Duration::from_secs(1) {
            points.push(((*at - began).as_secs_f64(), (arrived - before) as f64 / (*at - since).as_secs_f64()));
            from = place;
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publishers::change;

    #[test]
    fn a_user_is_recognised() {
        let (_, body) = change(0xabc);
        assert_eq!(user_of(&body), Some(0xabc));
        assert_eq!(user_of(b"{}"), None);
    }

    #[test]
    fn tenths_are_of_the_messages_and_not_of_the_time() {
        let at = Duration::from_secs;
        // Ten a second at first, then one a second.
        let arrivals: Vec<_> = (0..=9).map(|n| (at(n), 10 * n)).chain((10..=19).map(|n| (at(n), 81 + n))).collect();
        let (first, last) = tenths(&arrivals);
        assert_eq!((per_second(first), per_second(last)), (10.0, 1.0));
        assert_eq!(by_second(&arrivals)[0], (1.0, 10.0));
    }
}
