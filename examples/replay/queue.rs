//! The consumer's queue: durable, its own, bound for everything.
//!
//! Promise: news that comes while nobody is connected waits in it.
//! Not here, on purpose: what a message means.

use std::time::Duration;

use anyhow::Context;
use lapin::{
    Channel, Connection, ConnectionProperties, Consumer,
    options::{BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tidings_sdk::topology;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// The library waits for a silent peer for ever.
const DEADLINE: Duration = Duration::from_secs(10);
const HEARTBEAT_S: u16 = 10;
/// Between two looks for the exchange.
const PAUSE: Duration = Duration::from_millis(500);
/// Messages that may be with us unacknowledged: enough to keep every fetcher busy.
const PREFETCH: u16 = 512;
/// Should this program die without a farewell, the broker clears up after it.
const EXPIRES_MS: i32 = 3_600_000;

pub struct Queue {
    uri: AMQPUri,
    exchange: String,
    pub name: String,
}

/// One connection, and what arrives on it.
pub struct Session {
    pub news: Consumer,
    connection: Connection,
}

impl Queue {
    pub fn new(url: &str, exchange: &str) -> anyhow::Result<Self> {
        // Not repeated: it holds a password.
        let mut uri: AMQPUri = url.parse().map_err(|_| anyhow::anyhow!("expected amqp://USER:PASSWORD@HOST/VHOST"))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        let name = format!("tidings.replay.{}", Uuid::new_v4());
        Ok(Self { uri, exchange: exchange.to_owned(), name })
    }

    /// Connects, and declares the queue if it is not there yet. The exchange is waited for.
    pub async fn open(&self) -> anyhow::Result<Session> {
        timeout(DEADLINE, async {
            self.await_exchange().await?;
            let connection = self.connect().await?;
            let channel = connection.create_channel().await?;
            self.declare(&channel).await?;
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let news = channel.basic_consume(self.name.as_str().into(), "".into(), options, FieldTable::default());
            Ok(Session { news: news.await?, connection })
        })
        .await
        .with_context(|| format!("no answer in time, or no exchange {:?}", self.exchange))?
    }

    /// The service makes it, which may not have come so far yet. Whoever made it in its place would hide from it what was lost.
    async fn await_exchange(&self) -> anyhow::Result<()> {
        loop {
            let connection = self.connect().await?;
            // Until the connection is closed: a channel that was dropped is in its way (lapin 4.12).
            let channel = connection.create_channel().await?;
            if topology::has_exchange(&channel, &self.exchange).await? {
                return Ok(connection.close(200, "bye".into()).await?);
            }
            sleep(PAUSE).await;
        }
    }

    /// Takes the queue away for good.
    pub async fn delete(&self) -> anyhow::Result<()> {
        timeout(DEADLINE, async {
            let connection = self.connect().await?;
            let channel = connection.create_channel().await?;
            channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default()).await?;
            Ok(connection.close(200, "bye".into()).await?)
        })
        .await
        .context("no answer in time")?
    }

    async fn connect(&self) -> lapin::Result<Connection> {
        let properties = ConnectionProperties::default().with_connection_name("tidings replay".into());
        Connection::connect_uri(self.uri.clone(), properties).await
    }

    async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        let (exchange, name) = (self.exchange.as_str(), self.name.as_str());
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-expires".into(), AMQPValue::LongInt(EXPIRES_MS));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(name.into(), durable, arguments).await?;
        let options = QueueBindOptions::default();
        channel.queue_bind(name.into(), exchange.into(), "#".into(), options, FieldTable::default()).await
    }
}

impl Session {
    pub async fn close(self) {
        // Gone either way.
        let _ = timeout(DEADLINE, self.connection.close(200, "bye".into())).await;
    }
}
