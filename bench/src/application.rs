//! Application: a consumer in this process that fetches whoever it hears of, by the SDK, which asks for many at once
//! (`POST /v1/users:batchGet`). It does nothing with what it gets.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tidings_sdk::{
    consumer::{Consumer, Dropped, Failure, Handler, News, Observer, StartError},
    envelope::Event,
    owner::Owner,
    subscription::{Subscription, SubscriptionName},
    topology::{self, RETRY_DELAYS, Source},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{DEADLINE, house::House, http::KEY, service::Service};

/// As many as are fetched at once.
const CONCURRENCY: usize = 500;
const PREFETCH: u16 = 1000;

pub struct Application {
    name: SubscriptionName,
    /// Messages that need no more work.
    done: Arc<AtomicU64>,
    stop: CancellationToken,
    running: JoinHandle<Result<(), StartError>>,
}

struct Fetches;

impl Handler for Fetches {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        news.latest().await?;
        Ok(())
    }
}

struct Count(Arc<AtomicU64>);

impl Observer for Count {
    fn handled(&self, _: &Event, notices: usize, _: Duration, _: Duration) {
        self.0.fetch_add(notices as u64, Ordering::Relaxed);
    }

    fn dropped(&self, _: Dropped) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Application {
    pub fn start(house: &House, service: &Service) -> anyhow::Result<Self> {
        let owner = Owner::at(&format!("http://{}", service.address))?.with_key(&KEY.1)?;
        let name: SubscriptionName = format!("bench-{}", Uuid::new_v4()).parse()?;
        let mut subscription = Subscription::new(name.clone());
        subscription.keys.insert("#".parse()?);
        let (done, stop) = (Arc::<AtomicU64>::default(), CancellationToken::new());
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let consumer = Consumer::new(house.amqp_url.as_str(), source, subscription, owner)?
            .prefetch(PREFETCH)
            .concurrency(CONCURRENCY)
            .observe(Count(done.clone()));
        let running = tokio::spawn(consumer.run(Fetches, stop.clone()));
        Ok(Self { name, done, stop, running })
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends it, and takes its queues away.
    pub async fn close(self, house: &House) -> anyhow::Result<()> {
        self.stop.cancel();
        timeout(DEADLINE * 3, self.running).await.context("the consumer does not end")???;
        let connection = house.connect_broker().await?;
        // Kept until the connection is closed: one that is let go of closes itself, and is in the way of that.
        let channel = connection.create_channel().await?;
        topology::delete(&channel, &self.name, &RETRY_DELAYS).await?;
        Ok(connection.close(200, "bye".into()).await?)
    }
}
