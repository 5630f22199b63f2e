//! From a change to the consumer who hears of it, at a steady rate: an open loop, which does not wait for answers.
//!
//! The limit is the same message published straight to the same queue, without a database and without confirms.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, ConnectionProperties, Consumer, ExchangeKind,
    options::{
        BasicConsumeOptions, BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::FieldTable,
};
use tidings_sdk::envelope::{Event, Notice};
use time::OffsetDateTime;
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};
use uuid::Uuid;

use crate::{
    Settings,
    http::{self, Client},
};

/// For the last messages to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// Milliseconds, one per change.
#[derive(Default)]
pub struct Latencies {
    /// From the request to its answer.
    pub answer_ms: Vec<f64>,
    /// From the request to the message's arrival.
    pub request_ms: Vec<f64>,
    /// From the database's time of the change to the message's arrival.
    pub commit_ms: Vec<f64>,
    /// From the answer to the message's arrival; less than nothing when the message was first.
    pub answered_ms: Vec<f64>,
    /// From publishing without an outbox to the message's arrival.
    pub direct_ms: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Arrival {
    at: Instant,
    since_commit_ms: f64,
}

/// A consumer in this process, and a publisher beside it.
pub struct Listener {
    exchange: String,
    publisher: Channel,
    /// By user: each is changed once.
    arrivals: Arc<Mutex<HashMap<Uuid, Arrival>>>,
    /// Dropping one closes it.
    connections: [Connection; 2],
    next_user: u64,
}

impl Listener {
    pub async fn open(amqp_url: &str, exchange: &str) -> anyhow::Result<Self> {
        let connections = [connect(amqp_url).await?, connect(amqp_url).await?];
        let (publisher, channel) = (connections[0].create_channel().await?, connections[1].create_channel().await?);
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        let private = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let queue = channel.queue_declare("".into(), private, FieldTable::default()).await?.name().clone();
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.clone(), exchange.into(), "#".into(), options, FieldTable::default()).await?;
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let news = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
        let arrivals = Arc::default();
        tokio::spawn(hear(news, Arc::clone(&arrivals)));
        Ok(Self { exchange: exchange.to_owned(), publisher, arrivals, connections, next_user: 0 })
    }

    /// Takes the exchange away, which is ours alone.
    pub async fn close(self) -> anyhow::Result<()> {
        self.publisher.exchange_delete(self.exchange.into(), ExchangeDeleteOptions::default()).await?;
        for connection in self.connections {
            connection.close(200, "bye".into()).await?;
        }
        Ok(())
    }

    /// Amends one user after the other at the service.
    pub async fn service(
        &mut self,
        settings: &Settings,
        address: SocketAddr,
        into: &mut Latencies,
    ) -> anyhow::Result<()> {
        let idle: Arc<Mutex<Vec<Client>>> = Arc::default();
        let mut changes = JoinSet::new();
        let mut beat = interval(Duration::from_secs(1) / settings.rate);
        for _ in 0..u64::from(settings.rate) * settings.seconds {
            beat.tick().await;
            let user = crate::house::user(self.next_user);
            let (idle, count) = (idle.clone(), self.next_user);
            self.next_user += 1;
            changes.spawn(async move {
                let began = Instant::now();
                let spare = lock(&idle).pop();
                let mut client = match spare {
                    Some(client) => client,
                    None => Client::connect(address).await?,
                };
                client.ask(&http::patch(user, count)).await?;
                let answered = Instant::now();
                lock(&idle).push(client);
                anyhow::Ok((user, began, answered))
            });
        }
        for change in changes.join_all().await {
            let (user, began, answered) = change?;
            let arrival = self.arrival(user).await?;
            into.answer_ms.push(between_ms(began, answered));
            into.request_ms.push(between_ms(began, arrival.at));
            into.answered_ms.push(between_ms(answered, arrival.at));
            into.commit_ms.push(arrival.since_commit_ms);
        }
        Ok(())
    }

    /// Publishes the messages that the service would.
    pub async fn direct(&mut self, settings: &Settings, into: &mut Latencies) -> anyhow::Result<()> {
        let mut published = vec![];
        let mut beat = interval(Duration::from_secs(1) / settings.rate);
        for _ in 0..u64::from(settings.rate) * settings.seconds {
            beat.tick().await;
            let user = Uuid::new_v4();
            let (properties, body) = notice(user)?.to_message("urn:tidings:measure");
            let (exchange, key) = (self.exchange.as_str().into(), "profile.updated".into());
            published.push((user, Instant::now()));
            self.publisher.basic_publish(exchange, key, BasicPublishOptions::default(), &body, properties).await?;
        }
        for (user, began) in published {
            into.direct_ms.push(between_ms(began, self.arrival(user).await?.at));
        }
        Ok(())
    }

    async fn arrival(&self, user: Uuid) -> anyhow::Result<Arrival> {
        let began = Instant::now();
        loop {
            if let Some(arrival) = lock(&self.arrivals).get(&user) {
                return Ok(*arrival);
            }
            ensure!(began.elapsed() < PATIENCE, "a change was answered and not told within {PATIENCE:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn connect(amqp_url: &str) -> anyhow::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name("tidings measure".into());
    Connection::connect(amqp_url, properties).await.context("the broker cannot be reached")
}

async fn hear(mut news: Consumer, arrivals: Arc<Mutex<HashMap<Uuid, Arrival>>>) {
    while let Some(Ok(delivery)) = news.next().await {
        let (at, now) = (Instant::now(), OffsetDateTime::now_utc());
        if let Ok(notice) = Notice::from_message(&delivery.properties, &delivery.data) {
            let since_commit_ms = (now - notice.occurred_at).as_seconds_f64() * 1e3;
            lock(&arrivals).insert(notice.user_id, Arrival { at, since_commit_ms });
        }
    }
}

fn notice(user_id: Uuid) -> anyhow::Result<Notice> {
    Ok(Notice {
        message_id: Uuid::new_v4(),
        user_id,
        version: 2,
        event: Event::Updated { changed_fields: vec!["job_title".parse()?] },
        occurred_at: OffsetDateTime::now_utc(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".parse().ok(),
    })
}

/// Negative when `end` was first.
fn between_ms(begin: Instant, end: Instant) -> f64 {
    end.saturating_duration_since(begin).as_secs_f64() * 1e3 - begin.saturating_duration_since(end).as_secs_f64() * 1e3
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
