//! Group commit: one task writes for everybody.
//!
//! Promise: each caller hears of his own change; one that fails does not fail its neighbours.
//! Not here, on purpose: a timer. A batch is what came in while the last one was under way.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    change::{Change, Changed, Plan, Refusal, Step},
    model::{Record, UserId},
    store::{self, Kept, Stack},
};
use crate::{
    db::{Line, Trouble},
    outbox::Bell,
    profile::Schema,
};

/// Changes in one statement. Larger ones gain little and make everybody in them wait longer.
const BATCH: usize = 128;
/// Changes that may wait before new ones are turned away. At 5,000 changes/s it is emptied in a fifth of a second.
const QUEUE: usize = 1024;

/// How the answer to a change ended.
#[derive(Debug)]
pub enum Answer {
    /// Committed, together with its event; or nothing had to change.
    Done(Changed),
    /// Final for a state that is committed.
    Refused(Refusal),
    /// The state it was planned on is no more; plan again on this one.
    Moved(Option<Record>),
}

/// Why a change has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    #[error("too many changes are waiting to be written")]
    Overloaded,
    /// Nothing was written.
    #[error("the change was not written")]
    NotWritten(#[source] Arc<Trouble>),
    /// The connection broke while the change was under way: it may have been written.
    #[error("it is not known whether the change was written")]
    Unknown(#[source] Arc<Trouble>),
}

/// Hands changes to the writer task.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Order>,
}

struct Order {
    change: Change,
    step: Step,
    answer: oneshot::Sender<Result<Answer, WriteError>>,
}

impl Writer {
    /// The handle, and the task's body. The task ends when the last handle is gone and every change it was handed has its answer.
    pub fn new(line: Line, schema: Arc<Schema>, bell: Bell) -> (Self, impl Future<Output = ()>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self { queue: sender }, Task { line, schema, bell }.run(queue))
    }

    /// Writes `step`, which is what `change` makes of the state its caller read.
    pub async fn write(&self, change: Change, step: Step) -> Result<Answer, WriteError> {
        let (answer, heard) = oneshot::channel();
        self.queue.try_send(Order { change, step, answer }).map_err(|_| WriteError::Overloaded)?;
        heard.await.map_err(|_| WriteError::Overloaded)?
    }
}

struct Task {
    line: Line,
    schema: Arc<Schema>,
    bell: Bell,
}

/// What one caller will hear if the stack his change is in gets kept.
struct Promise {
    user: UserId,
    answer: oneshot::Sender<Result<Answer, WriteError>>,
    if_kept: Answer,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Order>) {
        let mut orders = Vec::with_capacity(BATCH);
        while queue.recv_many(&mut orders, BATCH).await > 0 {
            let (mut stacks, promises) = pile_up(orders.drain(..), &self.schema);
            let outcome = self.keep(&mut stacks).await;
            self.bell.ring();
            for promise in promises {
                let outcome = outcome[&promise.user].clone();
                // The caller may have hung up; what was written stays written.
                let _ = promise.answer.send(outcome.map(|kept| promise.if_kept.given(kept)));
            }
        }
        self.line.hang_up().await;
    }

    /// Writes the whole batch, or else each user on its own: what the database refuses in one must not cost the others.
    async fn keep(&mut self, stacks: &mut [Stack]) -> HashMap<UserId, Result<Kept, WriteError>> {
        match self.keep_at_once(stacks).await {
            Err(WriteError::NotWritten(trouble)) if matches!(*trouble, Trouble::Refused(_)) && stacks.len() > 1 => {
                let mut outcome = HashMap::with_capacity(stacks.len());
                for stack in stacks.chunks_mut(1) {
                    let alone = self.keep_at_once(stack).await;
                    outcome.extend(with_ids(stack, alone));
                }
                outcome
            }
            whole => with_ids(stacks, whole),
        }
    }

    async fn keep_at_once(&mut self, stacks: &mut [Stack]) -> Result<Vec<Kept>, WriteError> {
        self.line.run(async |connection| store::keep(connection, stacks).await).await.map_err(|trouble| {
            tracing::warn!(users = stacks.len(), "a batch of changes failed: {}", trouble.report());
            match trouble {
                Trouble::Broken(_) => WriteError::Unknown(trouble.into()),
                Trouble::Unreachable(_) | Trouble::Refused(_) => WriteError::NotWritten(trouble.into()),
            }
        })
    }
}

fn with_ids(stacks: &[Stack], whole: Result<Vec<Kept>, WriteError>) -> HashMap<UserId, Result<Kept, WriteError>> {
    let ids = stacks.iter().map(Stack::id);
    match whole {
        Ok(kept) => ids.zip(kept.into_iter().map(Ok)).collect(),
        Err(error) => ids.map(|id| (id, Err(error.clone()))).collect(),
    }
}

/// One stack per user. The first change of a user brings its plan; the others are planned again, on top of it.
fn pile_up(orders: impl Iterator<Item = Order>, schema: &Schema) -> (Vec<Stack>, Vec<Promise>) {
    let mut stacks: HashMap<UserId, Stack> = HashMap::new();
    let mut promises = vec![];
    for Order { change, step, answer } in orders {
        let user = change.id;
        let if_kept = match stacks.entry(user) {
            Entry::Vacant(place) => {
                let changed = Changed::from(&step);
                place.insert(Stack::new(step));
                Answer::Done(changed)
            }
            Entry::Occupied(mut stack) => match change.plan(Some(stack.get().top()), schema) {
                Ok(Plan::Write(step)) => {
                    let changed = Changed::from(&step);
                    stack.get_mut().push(step);
                    Answer::Done(changed)
                }
                Ok(Plan::Nothing(record)) => Answer::Done(Changed::nothing(record)),
                Err(refusal) => Answer::Refused(refusal),
            },
        };
        promises.push(Promise { user, answer, if_kept });
    }
    (stacks.into_values().collect(), promises)
}

impl Answer {
    /// What was to be heard if the stack was kept, now that it is known whether it was.
    fn given(self, kept: Kept) -> Self {
        match (kept, self) {
            (Kept::Moved(now), _) => Self::Moved(now),
            (Kept::Done { at }, Self::Done(Changed { record, created })) => {
                Self::Done(Changed { record: record.stamped(at), created })
            }
            (Kept::Done { at }, Self::Refused(Refusal::Gone(tombstone))) => {
                Self::Refused(Refusal::Gone(tombstone.stamped(at)))
            }
            (Kept::Done { .. }, other) => other,
        }
    }
}
