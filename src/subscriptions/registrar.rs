//! Registrar: changes of the registry, each in Postgres and at the broker.
//!
//! Promise: one change of a subscription at a time, whichever instance makes it; a registration counts as declared only when the
//! broker has said so.
//! Not here, on purpose: clients. A change runs to its end when nobody waits for it any more.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use sqlx::{Connection, PgConnection};
use tidings_sdk::{
    envelope::Event,
    subscription::{Subscription, SubscriptionName},
    topology::Depth,
};
use time::OffsetDateTime;
use tokio::{sync::Semaphore, time::timeout};

use super::{
    Error, Waiting,
    desk::{self, Desk, Look},
    model::{Registered, Registration},
    store,
};
use crate::{
    backfill,
    db::{Db, Line},
    deletions,
    telemetry::rfc3339,
};

/// Changes at the same time in one instance; each has connections of its own.
const AT_ONCE: usize = 4;
/// For its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// Settings of a session that makes one change: it waits a while for another's, and does not keep others waiting when this
/// instance freezes.
const CHANGE: [(&str, &str); 2] = [("lock_timeout", "4s"), ("idle_session_timeout", "2min")];

#[derive(Clone)]
pub struct Registrar {
    db: Db,
    desk: Desk,
    turns: Arc<Semaphore>,
}

/// What the broker has of a subscription.
#[derive(Default)]
struct Stock {
    there: BTreeSet<String>,
    /// Since when it is owed news: from a loss until it is declared again.
    owed_since: Option<OffsetDateTime>,
}

/// Whether a registration is the first under its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    Created,
    Changed,
}

impl Registrar {
    pub fn new(db: Db, desk: Desk) -> Self {
        Self { db, desk, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    pub fn desk(&self) -> &Desk {
        &self.desk
    }

    /// `by_operator`: also what another client stands for, or a queue that nobody registered.
    pub async fn put(&self, wish: Registration, by_operator: bool) -> Result<Put, Error> {
        if wish.subscription.name.as_str() == self.desk.exchange() {
            return Err(Error::NameOfExchange);
        }
        let name = wish.subscription.name.clone();
        self.in_turn(&name, async |line| self.put_in_turn(line, &wish, by_operator).await).await
    }

    async fn put_in_turn(&self, line: &mut Line, wish: &Registration, by_operator: bool) -> Result<Put, Error> {
        let name = &wish.subscription.name;
        let before = find(line, name).await?;
        let is_others = |before: &&Registered| {
            let held = &before.registration;
            held.owner != wish.owner || (!by_operator && held.client != wish.client)
        };
        if let Some(before) = before.as_ref().filter(is_others) {
            return Err(Error::Taken(before.registration.owner.clone()));
        }
        if before.is_none() && !by_operator && self.is_declared(name).await? {
            return Err(Error::Adopted);
        }
        // Before the broker gets a new queue: afterwards nobody could tell that the old one is gone.
        let stock = match &before {
            Some(before) => self.take_stock(line, before).await,
            None => Ok(Stock::default()),
        };
        let revision =
            line.run_in_session(async |db| store::put(db, wish, by_operator).await).await?.ok_or(Error::Full)?;
        let now = find(line, name).await?.ok_or(Error::NotFound)?;
        let Stock { there, owed_since } = stock?;
        match self.desk.declare(&wish.subscription, &now.bound, &there).await {
            Ok(()) => {
                note_declared(line, name, revision, owed_since).await?;
                settle_duty(line, &wish.subscription).await?;
                Ok(if before.is_some() { Put::Changed } else { Put::Created })
            }
            Err(desk::Trouble::Differs(error)) => {
                take_back(line, before.as_ref(), name, revision).await?;
                Err(Error::Differs(error))
            }
            Err(trouble) => Err(Error::Undeclared(trouble)),
        }
    }

    /// Whether the broker has its queue, or what would be deleted with it: an application that declares for itself is not to find it in
    /// another's hands.
    async fn is_declared(&self, name: &SubscriptionName) -> Result<bool, Error> {
        Ok(self.desk.look(name).await?.work.is_some() || self.desk.has_more(name).await?)
    }

    /// Declares what is registered, on a line that is somebody's own. What is registered then; `None` when it is not any more.
    pub async fn declare_again(&self, line: &mut Line, name: &SubscriptionName) -> Result<Option<Registered>, Error> {
        self.locked(line, name, async |line| {
            let Some(row) = find(line, name).await? else { return Ok(None) };
            let Stock { there, owed_since } = self.take_stock(line, &row).await?;
            self.desk.declare(&row.registration.subscription, &row.bound, &there).await.map_err(Error::Undeclared)?;
            note_declared(line, name, row.revision, owed_since).await?;
            settle_duty(line, &row.registration.subscription).await?;
            find(line, name).await
        })
        .await
    }

    /// Looks which parts are there, and notes a loss when one is gone that the broker had: the queue that is consumed from, one in which what
    /// failed waits for another attempt, or the exchange that chooses by field.
    async fn take_stock(&self, line: &mut Line, row: &Registered) -> Result<Stock, Error> {
        if row.declared_revision == 0 {
            return Ok(Stock { there: BTreeSet::new(), owed_since: row.seen.missing_since });
        }
        let parts = self.desk.parts(row.name(), row.has_fields_exchange).await.map_err(Error::Undeclared)?;
        let (there, gone): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(_, is_there)| *is_there);
        let there = there.into_iter().map(|(part, _)| part).collect();
        let dead_queue = row.name().dead_queue();
        let (dead, gone): (Vec<_>, Vec<_>) = gone.into_iter().partition(|(part, _)| *part == dead_queue);
        if !dead.is_empty() {
            tracing::warn!(
                subscription = %row.name(),
                "its queue of dead letters was deleted at the broker: declaring it again; what was not collected is lost"
            );
        }
        let Some((part, _)) = gone.first() else { return Ok(Stock { there, owed_since: None }) };
        let lost = line.run_in_session(async |db| store::mark_lost(db, row.name()).await).await?;
        if let Some(missing_since) = lost {
            tracing::warn!(
                subscription = %row.name(),
                part,
                missing_since = rfc3339(missing_since),
                "a part of it was deleted at the broker: declaring it again, and telling it anew what changed since"
            );
        }
        Ok(Stock { there, owed_since: lost })
    }

    /// Deletes a subscription; when messages wait in it, only if they may be `discarded`. What it owes of erasures goes with it, so that
    /// only an operator can delete one that is late.
    pub async fn delete(&self, name: SubscriptionName, discard: bool, by_operator: bool) -> Result<(), Error> {
        self.in_turn(&name, async |line| {
            let row = find(line, &name).await?.ok_or(Error::NotFound)?;
            if self.is_late(line, &name).await? {
                if !by_operator {
                    return Err(Error::Owing);
                }
                tracing::warn!(subscription = %name, "deleted by an administrator while it owed confirmations of deletions");
            }
            let waiting = self.waiting(&row).await?;
            if !discard && waiting != Waiting::default() {
                return Err(Error::NotEmpty(waiting));
            }
            self.remove(line, &row).await
        })
        .await
    }

    /// Deletes a subscription whose time has come, if it still has, and owes no late confirmations: it is its own client that says when it
    /// expires. What was lost with it, or `None` when it lives on.
    pub async fn expire(&self, line: &mut Line, name: &SubscriptionName) -> Result<Option<Waiting>, Error> {
        self.locked(line, name, async |line| {
            let row = find(line, name).await?.filter(|row| row.expires_at().is_some_and(|at| at <= row.as_of));
            let Some(row) = row else { return Ok(None) };
            if self.is_late(line, name).await?
                || self.desk.look(name).await?.work.is_some_and(|depth| depth.consumers > 0)
            {
                return Ok(None);
            }
            let waiting = self.waiting(&row).await?;
            self.remove(line, &row).await?;
            Ok(Some(waiting))
        })
        .await
    }

    /// Whether it has not confirmed a deletion whose deadline has passed.
    async fn is_late(&self, line: &mut Line, name: &SubscriptionName) -> Result<bool, Error> {
        Ok(line.run_in_session(async |db| deletions::is_late(db, name).await).await?)
    }

    async fn waiting(&self, row: &Registered) -> Result<Waiting, Error> {
        let name = row.name();
        let ready = |depth: Option<Depth>| depth.map_or(0, |depth| depth.ready);
        let Look { work, dead } = self.desk.look(name).await?;
        let retrying = self.desk.retrying(name).await?;
        Ok(Waiting { ready: ready(work), retrying, dead_letters: ready(dead) + row.dead_letters })
    }

    /// The broker first: a queue that nobody knows of would fill for ever.
    async fn remove(&self, line: &mut Line, row: &Registered) -> Result<(), Error> {
        self.desk.delete(row.name()).await?;
        line.run_in_session(async |db| store::forget(db, row.name(), row.revision).await).await?;
        Ok(())
    }

    /// One change, on a line of its own, when nobody else changes the same subscription.
    async fn in_turn<T>(
        &self,
        name: &SubscriptionName,
        change: impl AsyncFnOnce(&mut Line) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Ok(Ok(_turn)) = timeout(PATIENCE, self.turns.acquire()).await else { return Err(Error::Busy) };
        let mut line = self.db.line("subscriptions", CHANGE);
        let outcome = match line.run(async |db| store::lock(db, name).await).await {
            Ok(()) => change(&mut line).await,
            Err(trouble) => Err(trouble.into()),
        };
        line.hang_up().await;
        outcome
    }

    /// One change, on a line that lives on.
    async fn locked<T>(
        &self,
        line: &mut Line,
        name: &SubscriptionName,
        change: impl AsyncFnOnce(&mut Line) -> Result<T, Error>,
    ) -> Result<T, Error> {
        line.run_in_session(async |db| store::lock(db, name).await).await?;
        let outcome = change(line).await;
        // When the session is over, so is its lock.
        drop(line.run_in_session(async |db| store::unlock(db, name).await).await);
        outcome
    }
}

async fn find(line: &mut Line, name: &SubscriptionName) -> Result<Option<Registered>, Error> {
    Ok(line.run_in_session(async |db| store::find(db, Some(name)).await).await?.pop())
}

/// Notes that the broker has a revision, and begins to tell it anew what it is owed. Not earlier: of a user whom that telling has
/// passed before the queue is bound, later news would reach nobody. Both or neither, so that a crash makes both be done again.
async fn note_declared(
    line: &mut Line,
    name: &SubscriptionName,
    revision: i64,
    owed_since: Option<OffsetDateTime>,
) -> Result<(), Error> {
    let noted = async |db: &mut PgConnection| {
        let mut transaction = db.begin().await?;
        store::mark_declared(&mut transaction, name, revision, owed_since).await?;
        if let Some(since) = owed_since {
            backfill::make_good(&mut transaction, name, since).await?;
        }
        transaction.commit().await
    };
    Ok(line.run_in_session(noted).await?)
}

/// Whoever is told of deletions has to confirm them: from the moment on from which none can be missed.
async fn settle_duty(line: &mut Line, subscription: &Subscription) -> Result<(), Error> {
    let hears_deletions = subscription.wants(&Event::Deleted);
    let name = &subscription.name;
    Ok(line.run_in_session(async |db| deletions::settle_duty(db, name, hears_deletions).await).await?)
}

/// Nothing stays registered that was not before.
async fn take_back(
    line: &mut Line,
    before: Option<&Registered>,
    name: &SubscriptionName,
    revision: i64,
) -> Result<(), Error> {
    match before {
        Some(before) => line.run_in_session(async |db| store::take_back(db, before, revision).await).await?,
        None => line.run_in_session(async |db| store::forget(db, name, revision).await).await.map(drop)?,
    }
    Ok(())
}
