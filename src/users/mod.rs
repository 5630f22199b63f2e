//! Users: the master data.
//!
//! Promise: a change that was answered is kept, together with the event that tells it; two changes of one user both happen,
//! one on top of the other, or one is refused by its condition.
//! Not here, on purpose: the broker, the relay, and any knowledge of who listens.

mod batch;
mod body;
mod change;
mod http;
mod many;
mod model;
mod reader;
mod repeat;
mod store;
mod writer;

pub use batch::{Order, pile_up};
pub use body::{ENTRIES_LIMIT_BYTES, MAX_ENTRIES};
pub use change::{Change, Changed, Naming, Plan, Refusal, Step, Verb};
pub use http::{SeenGone, routes};
pub use model::{ExternalId, Record, Tombstone, User, UserId, Version};
pub use repeat::purge;
pub use store::{AMEND, BY_KEY, FIND, FORGET, KEEP, LIST, PURGE, READ, RECALL, REMEMBER};

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sqlx::PgPool;

use crate::{
    db::{self, Db, Trouble},
    lifecycle::Roles,
    outbox::Bell,
    profile::Schema,
    web::may_be_done,
};
use batch::Answer;
use reader::{ReadError, Reader};
use repeat::{Claim, Outcome, Recalled, UnderWay};
use writer::{OnItsWay, WriteError, Writer};

/// The verbs of the master data. Cheap to clone; the writer and reader tasks end when the last clone is gone.
#[derive(Clone)]
pub struct Users(Arc<Desk>);

struct Desk {
    schema: Arc<Schema>,
    reader: Reader,
    /// For many at once, on a line of its own: however many wait there, one user is read, and changed, without delay.
    batches: Reader,
    writer: Writer,
    /// The same for many who are changed at once, request by request in turn.
    batch_writers: [Writer; BATCH_WRITERS],
    batches_written: AtomicUsize,
    queries: PgPool,
    under_way: UnderWay,
    must_be_conditional: bool,
}

/// While one waits for its commit to be on disk, the other one's statement runs.
const BATCH_WRITERS: usize = 2;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Lane(usize);

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the query failed")]
    Query(#[from] Trouble),
    /// Another try of the same request may have been made.
    #[error("it cannot be told what came of the request")]
    Untold(#[source] Box<Error>),
    #[error("the same request is under way")]
    InFlight,
    #[error("the idempotency key was used for another request")]
    Reused,
}

/// What a change came to.
#[derive(Debug)]
pub struct Done {
    pub decided: Result<Changed, Refusal>,
    /// The version that the request made or met when it was made, if this is a repetition of it.
    pub replayed: Option<Version>,
}

impl Users {
    /// Starts the writers and the readers on `roles`.
    ///
    /// `must_be_conditional`: whether a living user may only be changed by who says which version he saw.
    pub fn open(
        db: &Db,
        queries: PgPool,
        schema: Arc<Schema>,
        bell: Bell,
        must_be_conditional: bool,
        roles: &Roles,
    ) -> Self {
        let (reader, reading) = Reader::new(db.line("reader", BY_KEY));
        let (batches, batching) = Reader::new(db.line("batch reader", BY_KEY));
        let writer = |purpose: &'static str| {
            let (writer, writing) = Writer::new(db.line(purpose, BY_KEY), schema.clone(), bell.clone());
            roles.spawn(purpose, writing);
            writer
        };
        let (batch_writers, writer) = (std::array::from_fn(|_| writer("batch writer")), writer("writer"));
        roles.spawn("reader", reading);
        roles.spawn("batch reader", batching);
        let under_way = UnderWay::default();
        Self(Arc::new(Desk {
            schema,
            reader,
            batches,
            writer,
            batch_writers,
            batches_written: AtomicUsize::new(0),
            queries,
            under_way,
            must_be_conditional,
        }))
    }

    /// The latest state of a user; `None` for an id that nobody ever had.
    pub async fn get(&self, id: UserId) -> Result<Option<Record>, Error> {
        Ok(self.0.reader.read(id).await?)
    }

    /// The latest state of each of these users, in their order.
    pub async fn get_many(&self, ids: &[UserId]) -> Result<Vec<Option<Record>>, Error> {
        Ok(self.0.batches.read_many(ids).await?)
    }

    /// Up to `limit` living users in order of id, past `after`.
    pub async fn list(&self, after: UserId, limit: i64) -> Result<Vec<User>, Error> {
        let queries = self.0.queries.clone();
        Ok(db::ask(async move { store::list(&queries, after, limit).await }).await?)
    }

    /// The living user whom other systems know by this id.
    pub async fn find(&self, external_id: ExternalId) -> Result<Option<User>, Error> {
        let queries = self.0.queries.clone();
        Ok(db::ask(async move { store::find(&queries, &external_id).await }).await?)
    }

    /// Makes a change happen, on top of whatever others do to the same user at the same time; once, however often it is asked for
    /// under one claim.
    pub async fn change(&self, mut change: Change) -> Result<Done, Error> {
        change.must_be_conditional = self.0.must_be_conditional;
        let change = Arc::new(change);
        let Some(claim) = change.claim.clone() else {
            let decided = self.make(&change).await?.expect("only a claim can have been made before");
            return Ok(Done { decided, replayed: None });
        };
        let _turn = self.0.under_way.enter(&claim).ok_or(Error::InFlight)?;
        loop {
            if let Some(done) = self.recall(&change, &claim).await? {
                return Ok(done);
            }
            // Repeated at the same moment on another instance: what that one came to counts.
            let Some(decided) = self.make(&change).await? else { continue };
            if decided.as_ref().is_ok_and(|changed| changed.is_written) {
                return Ok(Done { decided, replayed: None });
            }
            // Nothing was written, perhaps because another try had just done it, one that was under way when we looked.
            let is_first = match Outcome::unwritten(&decided) {
                Some((outcome, version)) => self.remember(&claim, outcome, change.id, version).await?,
                None => match self.recall(&change, &claim).await? {
                    Some(done) => return Ok(done),
                    None => true,
                },
            };
            if is_first {
                return Ok(Done { decided, replayed: None });
            }
        }
    }

    /// On which line the changes of a request for many are to be written.
    pub fn lane(&self) -> Lane {
        Lane(self.0.batches_written.fetch_add(1, Ordering::Relaxed) % BATCH_WRITERS)
    }

    /// Makes a change happen that is one of many, to a user who was read as `before`. It must have no claim.
    pub async fn change_read(
        &self,
        Lane(lane): Lane,
        mut change: Change,
        before: Option<Record>,
    ) -> Result<Result<Changed, Refusal>, Error> {
        change.must_be_conditional = self.0.must_be_conditional;
        let decided = self.make_on(&self.0.batch_writers[lane], &Arc::new(change), before, None).await?;
        Ok(decided.expect("only a claim can have been made before"))
    }

    /// False when something is remembered under this claim already.
    async fn remember(&self, claim: &Claim, outcome: Outcome, user: UserId, version: Version) -> Result<bool, Error> {
        let (queries, claim) = (self.0.queries.clone(), claim.clone());
        db::ask(async move { store::remember(&queries, &claim, outcome, user, version).await }).await.map_err(untold)
    }

    /// What a request came to that was made before; `None` when none was made under this claim.
    async fn recall(&self, change: &Change, claim: &Claim) -> Result<Option<Done>, Error> {
        let (queries, claim) = (self.0.queries.clone(), claim.clone());
        let recalled = db::ask(async move { store::recall(&queries, &claim).await }).await;
        let Some(remembered) = recalled.map_err(untold)? else { return Ok(None) };
        if !remembered.is_of(change) {
            return Err(Error::Reused);
        }
        let decided = match remembered.recalled() {
            Recalled::Final(decided) => decided,
            Recalled::Now { created } => match self.get(remembered.user_id).await.map_err(untold)? {
                Some(Record::Deleted(tombstone)) => Err(Refusal::Gone(tombstone)),
                Some(record) => Ok(Changed { record, created, is_written: false }),
                None => Err(Refusal::Missing),
            },
        };
        Ok(Some(Done { decided, replayed: Some(remembered.version) }))
    }

    /// `None` when a claim turns out to have been made at the same moment.
    async fn make(&self, change: &Arc<Change>) -> Result<Option<Result<Changed, Refusal>>, Error> {
        // A new user under an id of ours meets nobody: no need to look.
        if matches!(change.verb, Verb::Create(_)) {
            return self.make_on(&self.0.writer, change, None, None).await;
        }
        let on_its_way = self.0.writer.announce();
        let before = self.get(change.id).await?;
        self.make_on(&self.0.writer, change, before, Some(on_its_way)).await
    }

    /// The same for a user who was read as `before`.
    async fn make_on(
        &self,
        writer: &Writer,
        change: &Arc<Change>,
        mut before: Option<Record>,
        mut on_its_way: Option<OnItsWay>,
    ) -> Result<Option<Result<Changed, Refusal>>, Error> {
        loop {
            let step = match change.plan(before.as_ref(), &self.0.schema) {
                Ok(Plan::Nothing(record)) => return Ok(Some(Ok(Changed::nothing(record)))),
                Ok(Plan::Write(step)) => step,
                Err(refusal) => return Ok(Some(Err(refusal))),
            };
            may_be_done();
            match writer.write(Arc::clone(change), step, on_its_way.take()).await? {
                Answer::Done(changed) => return Ok(Some(Ok(changed))),
                Answer::Refused(refusal) => return Ok(Some(Err(refusal))),
                Answer::Moved(now) => before = now,
                Answer::Again if change.claim.is_some() => return Ok(None),
                Answer::Again => before = self.get(change.id).await?,
            }
        }
    }
}

/// Whatever kept us from telling.
fn untold(why: impl Into<Error>) -> Error {
    Error::Untold(Box::new(why.into()))
}
