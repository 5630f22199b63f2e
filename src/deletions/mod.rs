//! Deletions: that everybody who was told of a user's deletion has said to be done with it.
//!
//! Promise: who has to confirm is fixed when the user is deleted; a receipt is kept once however often it comes; who is late is seen.
//! Not here, on purpose: personal data, which is gone: an id, a subscription's name, a time and a word how. And any part in deleting:
//! a deletion never waits for a receipt.

pub mod command;
mod http;
mod model;
mod recorder;
mod reminder;
mod store;

pub use http::{observing, routes};
pub use model::{Confirmation, Deletion, How, Lateness, Overdue, Place, Recorded, State};
pub use recorder::Recorder;
pub use reminder::Reminder;
pub use store::{
    BY_INDEX, DUTY, FIND, IS_LATE, LATE, LATENESS, LOOKED, LOOKED_AT, OVERDUE, RECORD, RELEASE, is_late, settle_duty,
};

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tidings_sdk::subscription::SubscriptionName;
use uuid::Uuid;

use crate::{
    db::{self, Db, Trouble},
    lifecycle::Roles,
};
use store::Found;

/// What is known of deletions. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    queries: PgPool,
    deadline: Duration,
}

/// The verbs of deletions. Cheap to clone; the recorder task ends when the last clone is gone.
#[derive(Clone)]
pub struct Deletions {
    ledger: Ledger,
    recorder: Recorder,
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nobody ever had this id")]
    UnknownUser,
    #[error("this user lives, at version {0}")]
    Living(i64),
    #[error("there is no such subscription")]
    UnknownSubscription,
    #[error("too many receipts are waiting")]
    Overloaded,
    #[error("the receipt could not be kept")]
    Record(#[source] Arc<Trouble>),
    #[error("the query failed")]
    Query(#[from] Trouble),
}

impl Ledger {
    /// `deadline`: how long after a deletion its confirmations may take.
    pub fn new(db: &Db, deadline: Duration) -> Self {
        Self { queries: db.pool("deletions", 4, BY_INDEX), deadline }
    }

    pub async fn close(&self) {
        db::close(&self.queries).await;
    }

    /// A deletion, with everybody who has to confirm it or has.
    pub async fn find(&self, user_id: Uuid) -> Result<Deletion, Error> {
        let (queries, deadline) = (self.queries.clone(), self.deadline);
        match db::ask(async move { store::find(&queries, user_id, deadline).await }).await? {
            Found::Deletion(deletion) => Ok(deletion),
            Found::Living(version) => Err(Error::Living(version)),
            Found::Nobody => Err(Error::UnknownUser),
        }
    }

    /// Up to `limit` deletions past `after` that somebody is late with, the oldest first.
    pub async fn overdue(&self, after: Place, limit: i64) -> Result<Vec<Overdue>, Error> {
        let (queries, deadline) = (self.queries.clone(), self.deadline);
        Ok(db::ask(async move { store::overdue(&queries, after, deadline, limit).await }).await?)
    }

    /// How late each subscription is.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn lateness(&self) -> Result<Vec<Lateness>, Trouble> {
        let (queries, deadline) = (self.queries.clone(), self.deadline);
        db::ask(async move { store::lateness(&queries, deadline).await }).await
    }
}

impl Deletions {
    /// Starts the recorder on `roles`.
    pub fn open(db: &Db, ledger: Ledger, roles: &Roles) -> Self {
        let (recorder, recording) = Recorder::new(db.line("deletions recorder", BY_INDEX));
        roles.spawn("deletions recorder", recording);
        Self { ledger, recorder }
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Keeps a subscription's word that it is done with a deletion; said by this client, which must stand for it, or by an administrator.
    pub async fn confirm(
        &self,
        user_id: Uuid,
        subscription: SubscriptionName,
        client: Option<Arc<str>>,
    ) -> Result<(), Error> {
        match self.recorder.confirm(user_id, subscription, client).await? {
            Recorded::Kept => Ok(()),
            Recorded::UnknownUser => Err(Error::UnknownUser),
            Recorded::Living(version) => Err(Error::Living(version)),
            Recorded::UnknownSubscription => Err(Error::UnknownSubscription),
        }
    }
}
