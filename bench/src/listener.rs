//! Listener: a consumer in this process, which notes when it heard of whom.
//!
//! Its queue is private, in memory, and without acknowledgements: the least that a consumer can cost, for both sides.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::ensure;
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, Consumer, ExchangeKind,
    options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use tidings_sdk::envelope::Notice;
use time::OffsetDateTime;
use tokio::time::sleep;
use uuid::Uuid;

use crate::house::House;

/// For the last messages to arrive, if what sends them is behind.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
    /// The database's time of the change: when the transaction began that made it.
    pub since_change_ms: f64,
}

pub struct Listener {
    /// By user.
    arrivals: Arc<Mutex<HashMap<Uuid, Arrival>>>,
    connection: Connection,
}

impl Listener {
    pub async fn open(house: &House) -> anyhow::Result<Self> {
        let connection = house.connect_broker().await?;
        let channel = connection.create_channel().await?;
        let news = consume_all(&channel, &house.exchange).await?;
        let arrivals = Arc::default();
        tokio::spawn(hear(news, Arc::clone(&arrivals)));
        Ok(Self { arrivals, connection })
    }

    /// Whoever was heard of since this was last asked; waits until they are `count`.
    pub async fn take(&self, count: usize) -> anyhow::Result<HashMap<Uuid, Arrival>> {
        let began = Instant::now();
        while lock(&self.arrivals).len() < count {
            let heard = lock(&self.arrivals).len();
            ensure!(began.elapsed() < PATIENCE, "of {count} changes only {heard} were told within {PATIENCE:?}");
            sleep(Duration::from_millis(5)).await;
        }
        Ok(std::mem::take(&mut lock(&self.arrivals)))
    }

    pub async fn close(self) -> anyhow::Result<()> {
        Ok(self.connection.close(200, "bye".into()).await?)
    }
}

async fn consume_all(channel: &Channel, exchange: &str) -> lapin::Result<Consumer> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    let private = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), private, FieldTable::default()).await?.name().clone();
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.clone(), exchange.into(), "#".into(), options, FieldTable::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    channel.basic_consume(queue, "".into(), options, FieldTable::default()).await
}

async fn hear(mut news: Consumer, arrivals: Arc<Mutex<HashMap<Uuid, Arrival>>>) {
    while let Some(Ok(delivery)) = news.next().await {
        let (at, now) = (Instant::now(), OffsetDateTime::now_utc());
        if let Ok(notice) = Notice::from_message(&delivery.properties, &delivery.data) {
            let since_change_ms = (now - notice.occurred_at).as_seconds_f64() * 1e3;
            lock(&arrivals).insert(notice.user_id, Arrival { at, since_change_ms });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
