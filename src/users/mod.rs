//! Users: the master data.
//!
//! Promise: a change that was answered is kept, together with the event that tells it; two changes of one user both happen,
//! one on top of the other, or one is refused by its condition.
//! Not here, on purpose: the broker, the relay, and any knowledge of who listens.

mod change;
mod http;
mod model;
mod reader;
mod store;
mod writer;

pub use change::{Change, Changed, Refusal, Verb};
pub use http::routes;
pub use model::{Record, Tombstone, User, UserId, Version};
pub use store::{BY_KEY, KEEP, LIST, READ};

use std::sync::Arc;

use sqlx::PgPool;

use crate::{
    db::{self, Db, Trouble},
    json::Fault,
    lifecycle::Roles,
    outbox::Bell,
    profile::{Fields, Profile, Schema},
};
use change::Plan;
use reader::{ReadError, Reader};
use writer::{Answer, WriteError, Writer};

/// The verbs of the master data. Cheap to clone; the writer and reader tasks end when the last clone is gone.
#[derive(Clone)]
pub struct Users {
    schema: Arc<Schema>,
    reader: Reader,
    /// For many at once, on a line of its own: however many wait there, one user is read, and changed, without delay.
    batches: Reader,
    writer: Writer,
    queries: PgPool,
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the change was refused")]
    Refused(Refusal),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the query failed")]
    Query(#[from] Trouble),
}

impl Users {
    /// Starts the writer and the reader on `roles`.
    pub fn open(db: &Db, queries: PgPool, schema: Arc<Schema>, bell: Bell, roles: &Roles) -> Self {
        let (reader, reading) = Reader::new(db.line("reader", BY_KEY));
        let (batches, batching) = Reader::new(db.line("batch reader", BY_KEY));
        let (writer, writing) = Writer::new(db.line("writer", BY_KEY), schema.clone(), bell);
        roles.spawn("reader", reading);
        roles.spawn("batch reader", batching);
        roles.spawn("writer", writing);
        Self { schema, reader, batches, writer, queries }
    }

    /// A profile of these fields, if the deployment's schema admits it.
    pub fn admit(&self, fields: &Fields) -> Result<Profile, Vec<Fault>> {
        self.schema.admit(fields)
    }

    /// The latest state of a user; `None` for an id that nobody ever had.
    pub async fn get(&self, id: UserId) -> Result<Option<Record>, Error> {
        Ok(self.reader.read(id).await?)
    }

    /// The latest state of each of these users, in their order.
    pub async fn get_many(&self, ids: &[UserId]) -> Result<Vec<Option<Record>>, Error> {
        Ok(self.batches.read_many(ids).await?)
    }

    /// Up to `limit` living users in order of id, past `after`.
    pub async fn list(&self, after: UserId, limit: i64) -> Result<Vec<User>, Error> {
        let queries = self.queries.clone();
        Ok(db::ask(async move { store::list(&queries, after, limit).await }).await?)
    }

    /// Makes a change happen, on top of whatever others do to the same user at the same time.
    pub async fn change(&self, change: Change) -> Result<Changed, Error> {
        // A new user under an id of ours meets nobody: no need to look.
        let mut before = match change.verb {
            Verb::Create(_) => None,
            _ => self.get(change.id).await?,
        };
        loop {
            let step = match change.plan(before.as_ref(), &self.schema).map_err(Error::Refused)? {
                Plan::Nothing(record) => return Ok(Changed::nothing(record)),
                Plan::Write(step) => step,
            };
            match self.writer.write(change.clone(), step).await? {
                Answer::Done(changed) => return Ok(changed),
                Answer::Refused(refusal) => return Err(Error::Refused(refusal)),
                Answer::Moved(now) => before = now,
            }
        }
    }
}
