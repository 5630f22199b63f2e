//! Collector: carries letters from the subscriptions' dead-letter queues to the table.
//!
//! Promise: a letter is acknowledged only when its row is committed; a crash in between brings it again, to the same row. Of no
//! subscription more than [`store::MOST`] are taken: the others stay in its queue.
//! Not here, on purpose: declaring a queue. A subscription without one has no letters yet.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::StreamExt;
use lapin::{
    Channel, Connection, Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use sqlx::PgPool;
use tidings_sdk::{letter::Reason, subscription::SubscriptionName};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{model::DeadLetter, store};
use crate::{
    broker::{self, Broker, request},
    db::{self, Db},
    lead::Duty,
    telemetry::with_causes,
};

/// Letters in one batch, and of one subscription under way at once. Their bodies lie in memory, and a consumer may have put 16 MiB into
/// each.
const BATCH: u16 = 16;
/// Between two looks for subscriptions that are new, or whose queue is back.
const LOOK: Duration = Duration::from_secs(2);
/// A mailbox that was empty for so long is opened anew. RabbitMQ 3.10 may forget to tell a consumer that its quorum queue was deleted
/// and declared again at once, and then hands it letters that never arrive; they are given back when its channel closes.
const RENEWAL: Duration = Duration::from_secs(15);
/// Between two warnings about letters of one subscription.
const QUIET: Duration = Duration::from_secs(60);
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

pub struct Collector {
    broker: Broker,
    queries: PgPool,
    /// Subscriptions whose queue could not be read, so that it is told once.
    complained: HashSet<SubscriptionName>,
    arrivals: Arrivals,
}

/// How the emptying of a mailbox ended.
type Ended = (SubscriptionName, anyhow::Result<()>);

impl Collector {
    pub fn new(db: &Db, broker: Broker) -> Self {
        Self { broker, queries: db.pool("collector", 4, []), complained: HashSet::new(), arrivals: Arrivals::default() }
    }
}

impl Duty for Collector {
    const NAME: &'static str = "dead letters";
    /// "letters" in ASCII.
    const KEY: i64 = 0x6c_65_74_74_65_72_73;

    async fn turn(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        // Where nobody is registered no connection is needed.
        while self.names().await?.is_empty() {
            if stop.run_until_cancelled(sleep(LOOK)).await.is_none() {
                return Ok(());
            }
        }
        let Some(connection) = stop.run_until_cancelled(self.broker.connect("dead letters")).await else {
            return Ok(());
        };
        let connection = connection?;
        let mut mailboxes = JoinSet::new();
        let outcome = self.collect(&connection, &mut mailboxes, stop).await;
        mailboxes.shutdown().await;
        // Perhaps another instance leads next.
        self.arrivals.tell(None);
        let _ = timeout(CLOSE_DEADLINE, connection.close(200, "bye".into())).await;
        outcome
    }
}

impl Collector {
    /// One task a subscription, each on a channel of its own: what closes one leaves the others alone.
    async fn collect(
        &mut self,
        connection: &Connection,
        mailboxes: &mut JoinSet<Ended>,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut open = HashSet::new();
        while !stop.is_cancelled() {
            ensure!(connection.status().connected(), "the connection to the broker is lost");
            for name in self.names().await? {
                if open.insert(name.clone()) {
                    let channel = broker::open(connection).await?;
                    mailboxes.spawn(empty(channel, name, self.queries.clone(), self.arrivals.clone(), stop.clone()));
                }
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(LOOK) => {}
            }
            self.arrivals.tell(Some(Instant::now()));
            while let Some(ended) = mailboxes.try_join_next() {
                let (name, outcome) = ended.context("a mailbox fell")?;
                open.remove(&name);
                self.note(name, outcome);
            }
        }
        // What is under way is finished, so that the next leader need not do it again.
        while let Some(ended) = mailboxes.join_next().await {
            ended.context("a mailbox fell")?.1?;
        }
        Ok(())
    }

    /// A mailbox that ended is tried again at the next look.
    fn note(&mut self, name: SubscriptionName, outcome: anyhow::Result<()>) {
        match outcome {
            Ok(()) => {
                self.complained.remove(&name);
            }
            Err(error) => {
                let causes = with_causes(&error);
                if self.complained.insert(name.clone()) {
                    tracing::warn!(subscription = %name, "its dead letters cannot be collected: {causes}");
                }
            }
        }
    }

    async fn names(&self) -> anyhow::Result<Vec<SubscriptionName>> {
        let queries = self.queries.clone();
        let names = db::ask(async move { store::names(&queries).await }).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

async fn empty(
    channel: Channel,
    name: SubscriptionName,
    queries: PgPool,
    arrivals: Arrivals,
    stop: CancellationToken,
) -> Ended {
    let outcome = collect_from(&channel, &name, &queries, &arrivals, &stop).await;
    // Unless it broke, it has served; else it would stay open as long as the connection.
    let _ = timeout(CLOSE_DEADLINE, channel.close(200, "bye".into())).await;
    (name, outcome)
}

async fn collect_from(
    channel: &Channel,
    name: &SubscriptionName,
    queries: &PgPool,
    arrivals: &Arrivals,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let (pool, of) = (queries.clone(), name.clone());
    let mut room = db::ask(async move { store::room(&pool, &of).await }).await?;
    ensure!(
        room > 0,
        "{} of them are kept; what came after them stays in queue {:?} until some are put back or dropped",
        store::MOST,
        name.dead_queue()
    );
    request(channel.basic_qos(BATCH, BasicQosOptions::default())).await?;
    let mut batches = listen(channel, name).await?.ready_chunks(BATCH.into());
    while room > 0
        && let Some(Ok(Some(batch))) = stop.run_until_cancelled(timeout(RENEWAL, batches.next())).await
    {
        let batch: Vec<Delivery> = batch.into_iter().collect::<Result<_, _>>().context("the channel is lost")?;
        let letters: Vec<DeadLetter> = batch.iter().map(DeadLetter::open).collect();
        let reasons: Vec<Reason> = letters.iter().map(|letter| letter.reason).collect();
        room -= letters.len() as i64;
        let (pool, of) = (queries.clone(), name.clone());
        db::ask(async move { store::keep(&pool, &of, &letters).await }).await?;
        let Some(last) = batch.last() else { continue };
        let acknowledged = request(last.ack(BasicAckOptions { multiple: true })).await?;
        ensure!(acknowledged, "the channel is lost");
        arrivals.count(name, &reasons);
        arrivals.tell(Some(Instant::now()));
    }
    Ok(())
}

/// The stream ends when the queue is deleted.
async fn listen(channel: &Channel, name: &SubscriptionName) -> anyhow::Result<Consumer> {
    let options = BasicConsumeOptions::default();
    let consumed = channel.basic_consume(name.dead_queue().into(), "".into(), options, FieldTable::default());
    request(consumed).await.with_context(|| format!("queue {:?} cannot be consumed", name.dead_queue()))
}

/// Tells of letters in the log: how many and why, and nothing of whom. Of each in the end, and of one subscription's now and then.
#[derive(Clone, Default)]
struct Arrivals(Arc<Mutex<BTreeMap<SubscriptionName, Arrived>>>);

#[derive(Default)]
struct Arrived {
    untold: BTreeMap<Reason, usize>,
    told_at: Option<Instant>,
}

impl Arrivals {
    fn count(&self, name: &SubscriptionName, reasons: &[Reason]) {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let untold = &mut arrivals.entry(name.clone()).or_default().untold;
        for reason in reasons {
            *untold.entry(*reason).or_default() += 1;
        }
    }

    /// Tells what may be told now; without a time, everything.
    fn tell(&self, now: Option<Instant>) {
        for (name, untold) in self.take(now) {
            let count: usize = untold.values().sum();
            let reasons: Vec<String> = untold.iter().map(|(reason, count)| format!("{reason}: {count}")).collect();
            let reasons = reasons.join(", ");
            tracing::warn!(subscription = %name, count, reasons, "dead letters have come");
        }
    }

    fn take(&self, now: Option<Instant>) -> Vec<(SubscriptionName, BTreeMap<Reason, usize>)> {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_quiet = |told_at: Option<Instant>| {
            now.zip(told_at).is_some_and(|(now, told_at)| now.saturating_duration_since(told_at) < QUIET)
        };
        // Of whom nothing came since, nothing has to be known.
        arrivals.retain(|_, arrived| !arrived.untold.is_empty() || is_quiet(arrived.told_at));
        let due = arrivals.iter_mut().filter(|(_, arrived)| !arrived.untold.is_empty() && !is_quiet(arrived.told_at));
        due.map(|(name, arrived)| {
            arrived.told_at = now;
            (name.clone(), std::mem::take(&mut arrived.untold))
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_the_quiet_is_told_when_it_is_over_or_with_the_turn() {
        let (arrivals, orders) = (Arrivals::default(), "orders".parse().unwrap());
        let began = Instant::now();
        let told = |now| arrivals.take(now).into_iter().map(|(_, untold)| untold).collect::<Vec<_>>();
        arrivals.count(&orders, &[Reason::Rejected]);
        assert_eq!(told(Some(began)), [BTreeMap::from([(Reason::Rejected, 1)])]);
        arrivals.count(&orders, &[Reason::Rejected, Reason::Malformed]);
        arrivals.count(&orders, &[Reason::Rejected]);
        assert_eq!(told(Some(began + QUIET / 2)), []);
        assert_eq!(told(Some(began + QUIET)), [BTreeMap::from([(Reason::Rejected, 2), (Reason::Malformed, 1)])]);
        arrivals.count(&orders, &[Reason::Rejected]);
        assert_eq!(told(None), [BTreeMap::from([(Reason::Rejected, 1)])]);
        assert_eq!(told(Some(began + 3 * QUIET)), []);
        assert!(arrivals.0.lock().unwrap().is_empty());
    }
}
