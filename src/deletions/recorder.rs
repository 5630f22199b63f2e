//! Recorder: one task keeps the receipts of everybody.
//!
//! Promise: a receipt that was answered is kept; what is merely observed costs who is observed nothing, and is dropped rather than
//! waited for, and counted.
//! Not here, on purpose: retries, but for the one that a lost connection is worth. A receipt that could not be kept is sent again by
//! whoever sent it.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tidings_sdk::subscription::SubscriptionName;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{
    Error,
    model::{How, Recorded},
    store::{self, Asked},
};
use crate::db::{Line, Trouble};

/// Receipts in one statement.
const BATCH: usize = 500;
/// Receipts that may wait before new ones are turned away, ..
const QUEUE: usize = 4_096;
/// .. of which so many are kept free of what is merely observed.
const RESERVED: usize = QUEUE / 2;

type Answer = Result<Recorded, Arc<Trouble>>;

struct Entry {
    asked: Asked,
    /// `None`: observed, and nobody waits.
    answer: Option<oneshot::Sender<Answer>>,
}

/// Hands receipts to the recorder task.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Entry>,
    unobserved: Counter<u64, AtomicU64>,
}

impl Recorder {
    /// The handle, and the task's body. The task ends when the last handle is gone.
    pub fn new(line: Line) -> (Self, impl Future<Output = ()>) {
        let (queue, entries) = mpsc::channel(QUEUE);
        let unobserved = Counter::default();
        (Self { queue, unobserved: unobserved.clone() }, run(line, entries, unobserved))
    }

    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "erasures_not_observed",
            "Fetches that would have confirmed a deletion and were not noted: too much was waiting, or the database did not keep them",
            self.unobserved.clone(),
        );
    }

    /// Keeps a receipt.
    pub async fn confirm(
        &self,
        user_id: Uuid,
        subscription: SubscriptionName,
        client: Option<Arc<str>>,
    ) -> Result<Recorded, Error> {
        let (answer, heard) = oneshot::channel();
        let entry = Entry { asked: Asked { user_id, subscription, client, how: How::Receipt }, answer: Some(answer) };
        self.queue.try_send(entry).map_err(|_| Error::Overloaded)?;
        heard.await.map_err(|_| Error::Overloaded)?.map_err(Error::Record)
    }

    /// Notes in passing that a subscription was answered that a user is gone.
    pub fn observe(&self, user_id: Uuid, subscription: &SubscriptionName) {
        let asked = Asked { user_id, subscription: subscription.clone(), client: None, how: How::Fetched };
        let has_room = self.queue.capacity() > RESERVED;
        if !has_room || self.queue.try_send(Entry { asked, answer: None }).is_err() {
            self.unobserved.inc();
        }
    }
}

async fn run(mut line: Line, mut queue: mpsc::Receiver<Entry>, unobserved: Counter<u64, AtomicU64>) {
    let mut entries = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut entries, BATCH).await > 0 {
        match record(&mut line, &entries).await {
            Ok(recorded) => {
                for (entry, recorded) in entries.drain(..).zip(recorded) {
                    entry.say(Ok(recorded));
                }
            }
            Err(trouble) => {
                tracing::warn!(receipts = entries.len(), "receipts could not be kept: {}", trouble.report());
                unobserved.inc_by(entries.iter().filter(|entry| entry.answer.is_none()).count() as u64);
                let trouble = Arc::new(trouble);
                entries.drain(..).for_each(|entry| entry.say(Err(trouble.clone())));
            }
        }
    }
    line.hang_up().await;
}

/// Keeps them. What was perhaps kept before the connection was lost is kept once.
async fn record(line: &mut Line, entries: &[Entry]) -> Result<Vec<Recorded>, Trouble> {
    let batch = entries.iter().map(|entry| &entry.asked);
    match line.run(async |connection| store::record(connection, batch.clone()).await).await {
        Err(Trouble::Broken(_)) => line.run(async |connection| store::record(connection, batch.clone()).await).await,
        outcome => outcome,
    }
}

impl Entry {
    fn say(self, answer: Answer) {
        // The caller may have hung up.
        let _ = self.answer.map(|waiting| waiting.send(answer));
    }
}
