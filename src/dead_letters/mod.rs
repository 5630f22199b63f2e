//! Dead letters: what a subscription could not handle, and what becomes of it.
//!
//! Promise: a letter leaves the broker only when it is kept here, and leaves here only when it is in the subscription's queue again,
//! confirmed, or when somebody drops it by name.
//! Not here, on purpose: bodies and foreign headers, which may hold anybody's data; deciding that a fault is mended.

mod collector;
pub mod command;
mod http;
mod model;
mod store;

pub use collector::Collector;
pub use http::{Redrive, routes};
pub use model::{DeadLetter, Left, Redriven, Selection};
pub use store::{
    COUNT, COUNTS, DROP, FORGET, KEEP, KNOWN, LAST_PLACE, LEFT, NAMES, PAGE, PURGE, REASONS, TAKE, counts,
};

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use lapin::{Connection, types::AMQPValue};
use sqlx::PgPool;
use tidings_sdk::{letter::Reason, subscription::SubscriptionName, topology};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    broker::{Broker, Outcome, Parcel, Post, request},
    db::{self, Trouble},
};
use model::Place;

/// Letters in one request to redrive.
const REDRIVE_AT_MOST: usize = 1_000;
/// Letters under way at once; what a crash redrives twice.
const CHUNK: usize = 200;
/// For the confirms of a chunk. A broker in an alarm gives none.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// Rows in one statement that deletes.
const PURGE_CHUNK: i64 = 5_000;

/// The verbs of dead letters. Cheap to clone.
#[derive(Clone)]
pub struct DeadLetters {
    queries: PgPool,
    /// `None` in an instance that has no broker.
    broker: Option<Broker>,
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no subscription of this name")]
    NoSubscription,
    #[error("there is no such dead letter")]
    NoLetter,
    #[error("the subscription's queue or exchange is not at the broker; it has to be declared again first")]
    QueueLost,
    #[error("this instance has no broker")]
    NoBroker,
    #[error("the broker does not take messages")]
    Broker(#[source] anyhow::Error),
    #[error("the query failed")]
    Query(#[from] Trouble),
}

/// A page of letters.
#[derive(Debug)]
pub struct Page {
    pub letters: Vec<DeadLetter>,
    /// Where the next page begins.
    pub next: Option<Place>,
    pub by_reason: BTreeMap<String, i64>,
}

impl DeadLetters {
    pub fn new(queries: PgPool, broker: Option<Broker>) -> Self {
        Self { queries, broker }
    }

    /// Up to `limit` letters past `after`, in the order in which they came.
    pub async fn list(
        &self,
        name: &SubscriptionName,
        after: Place,
        limit: i64,
        reason: Option<Reason>,
    ) -> Result<Page, Error> {
        self.must_know(name).await?;
        let (queries, of) = (self.queries.clone(), name.clone());
        let by_reason = db::ask(async move { store::by_reason(&queries, &of).await }).await?;
        let (queries, of) = (self.queries.clone(), name.clone());
        // One more than asked for tells whether there is a next page.
        let mut letters = db::ask(async move { store::page(&queries, &of, after, reason, limit + 1).await }).await?;
        let is_last = letters.len() as i64 <= limit;
        letters.truncate(limit as usize);
        let next = letters.last().filter(|_| !is_last).map(|letter| letter.place);
        Ok(Page { letters, next, by_reason })
    }

    /// How many letters there are of this reason, or of any.
    pub async fn count(&self, name: &SubscriptionName, reason: Option<Reason>) -> Result<i64, Error> {
        self.must_know(name).await?;
        let (queries, of) = (self.queries.clone(), name.clone());
        let by_reason = db::ask(async move { store::by_reason(&queries, &of).await }).await?;
        let counted = by_reason.iter().filter(|(name, _)| reason.is_none_or(|reason| reason.as_str() == *name));
        Ok(counted.map(|(_, count)| count).sum())
    }

    /// The place of the latest letter: what comes later is left alone by a redrive or purge up to it.
    pub async fn last_place(&self, name: &SubscriptionName) -> Result<Place, Error> {
        self.must_know(name).await?;
        let (queries, of) = (self.queries.clone(), name.clone());
        Ok(db::ask(async move { store::last_place(&queries, &of).await }).await?)
    }

    /// Puts up to a thousand of the selected letters back into the subscription's queue, and those alone that came up to `up_to`:
    /// a letter that fails again at once is not redriven for ever.
    pub async fn redrive(
        &self,
        name: &SubscriptionName,
        selection: &Selection,
        up_to: Place,
    ) -> Result<Redriven, Error> {
        let broker = self.broker.clone().ok_or(Error::NoBroker)?;
        self.must_know(name).await?;
        let errand =
            Errand { queries: self.queries.clone(), broker, name: name.clone(), selection: selection.clone(), up_to };
        // In a task of its own: a client that hangs up must not come between a confirm and its row.
        let done = tokio::spawn(errand.run()).await;
        done.map_err(|panicked| Trouble::Broken(panicked.into()))?
    }

    /// Drops letters that came up to `up_to`, of this reason or of any; how many there were.
    pub async fn purge(&self, name: &SubscriptionName, reason: Option<Reason>, up_to: Place) -> Result<u64, Error> {
        let mut purged = 0;
        loop {
            let (queries, of) = (self.queries.clone(), name.clone());
            let dropped = db::ask(async move { store::purge(&queries, &of, reason, up_to, PURGE_CHUNK).await }).await?;
            purged += dropped;
            if dropped < PURGE_CHUNK as u64 {
                return Ok(purged);
            }
        }
    }

    /// Drops one letter.
    pub async fn forget(&self, name: &SubscriptionName, message_id: Uuid) -> Result<(), Error> {
        self.must_know(name).await?;
        let (queries, of) = (self.queries.clone(), name.clone());
        let dropped = db::ask(async move { store::forget(&queries, &of, message_id).await }).await?;
        if dropped { Ok(()) } else { Err(Error::NoLetter) }
    }

    async fn must_know(&self, name: &SubscriptionName) -> Result<(), Error> {
        let (queries, of) = (self.queries.clone(), name.clone());
        let known = db::ask(async move { store::is_known(&queries, &of).await }).await?;
        if known { Ok(()) } else { Err(Error::NoSubscription) }
    }
}

/// One request to redrive, on its way.
struct Errand {
    queries: PgPool,
    broker: Broker,
    name: SubscriptionName,
    selection: Selection,
    up_to: Place,
}

impl Errand {
    async fn run(self) -> Result<Redriven, Error> {
        let connection = self.broker.connect("redrive").await.map_err(Error::Broker)?;
        let outcome = self.carry(&connection).await;
        // Gone either way; saying goodbye spares the broker a warning in its log.
        let _ = timeout(CLOSE_DEADLINE, connection.close(200, "bye".into())).await;
        let redriven = outcome?;
        let Left { redrivable: left, not_redrivable } = self.left().await?;
        Ok(Redriven { redriven, left, not_redrivable })
    }

    async fn carry(&self, connection: &Connection) -> Result<u64, Error> {
        self.must_have_queue(connection).await?;
        let post = Post::open(connection).await.map_err(Error::Broker)?;
        let (mut redriven, mut past, mut room) = (0, 0, REDRIVE_AT_MOST);
        loop {
            let letters = self.take(past, room.min(CHUNK)).await?;
            let Some(last) = letters.last() else { return Ok(redriven) };
            (past, room) = (last.place, room - letters.len());
            redriven += self.carry_chunk(&post, &letters).await?;
        }
    }

    /// Sends a chunk and forgets what arrived.
    async fn carry_chunk(&self, post: &Post, letters: &[DeadLetter]) -> Result<u64, Error> {
        let parcels = letters.iter().filter_map(|letter| self.parcel(letter)).collect();
        let sent = timeout(CONFIRM_DEADLINE, post.send(&self.name, parcels)).await;
        let sent = sent.context("the broker confirmed nothing in good time").map_err(Error::Broker)?;
        let outcomes = sent.map_err(|error| broken(error.into()))?;
        let with_outcome = letters.iter().zip(&outcomes);
        let arrived: Vec<Place> =
            with_outcome.filter(|(_, outcome)| **outcome == Outcome::Routed).map(|(letter, _)| letter.place).collect();
        let queries = self.queries.clone();
        let (name, count) = (self.name.clone(), arrived.len() as u64);
        db::ask(async move { store::forget_redriven(&queries, &name, &arrived).await }).await?;
        if outcomes.contains(&Outcome::Unroutable) { Err(Error::QueueLost) } else { Ok(count) }
    }

    fn parcel(&self, letter: &DeadLetter) -> Option<Parcel> {
        // Without the headers of its failures: its attempts start anew.
        let times = AMQPValue::LongInt(letter.redriven.saturating_add(1));
        let of_backfill = letter.backfill.map(|id| (topology::BACKFILL, AMQPValue::LongString(id.to_string().into())));
        let why = of_backfill.into_iter().chain([(topology::REDRIVEN, times)]);
        Some(Parcel::new(letter.notice.as_ref()?, &self.broker, why))
    }

    async fn take(&self, past: Place, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let (queries, name, selection) = (self.queries.clone(), self.name.clone(), self.selection.clone());
        let up_to = self.up_to;
        Ok(db::ask(async move { store::take(&queries, &name, &selection, past, up_to, limit as i64).await }).await?)
    }

    async fn left(&self) -> Result<Left, Error> {
        let (queries, name, selection) = (self.queries.clone(), self.name.clone(), self.selection.clone());
        let up_to = self.up_to;
        Ok(db::ask(async move { store::left(&queries, &name, &selection, up_to).await }).await?)
    }

    async fn must_have_queue(&self, connection: &Connection) -> Result<(), Error> {
        let channel = request(connection.create_channel()).await.map_err(Error::Broker)?;
        match topology::depth(&channel, self.name.queue()).await {
            Ok(_) => Ok(()),
            Err(topology::Error::Missing(_)) => Err(Error::QueueLost),
            Err(error) => Err(Error::Broker(error.into())),
        }
    }
}

/// What a broken channel says: the exchange is gone, or the broker.
fn broken(error: anyhow::Error) -> Error {
    if crate::broker::is_missing(&error) { Error::QueueLost } else { Error::Broker(error) }
}
