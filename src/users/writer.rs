//! Group commit: one task writes for everybody.
//!
//! Promise: each caller hears of his own change; one that fails does not fail its neighbours.
//! Not here, on purpose: a timer. A batch is what came in while the last one was under way.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{mpsc, oneshot};

use super::{
    batch::{Answer, Order, pile_up},
    change::{Change, Step},
    model::UserId,
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
    queue: mpsc::Sender<Order<Caller>>,
}

type Caller = oneshot::Sender<Result<Answer, WriteError>>;

impl Writer {
    /// The handle, and the task's body. The task ends when the last handle is gone and every change it was handed has its answer.
    pub fn new(line: Line, schema: Arc<Schema>, bell: Bell) -> (Self, impl Future<Output = ()>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self { queue: sender }, Task { line, schema, bell }.run(queue))
    }

    /// Writes `step`, which is what `change` makes of the state its caller read.
    pub async fn write(&self, change: Arc<Change>, step: Step) -> Result<Answer, WriteError> {
        let (answer, heard) = oneshot::channel();
        self.queue.try_send(Order { change, step, caller: answer }).map_err(|_| WriteError::Overloaded)?;
        heard.await.map_err(|_| WriteError::Overloaded)?
    }
}

struct Task {
    line: Line,
    schema: Arc<Schema>,
    bell: Bell,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Order<Caller>>) {
        let mut orders = Vec::with_capacity(BATCH);
        while queue.recv_many(&mut orders, BATCH).await > 0 {
            let (mut stacks, promises) = pile_up(orders.drain(..), &self.schema);
            let outcome = self.keep(&mut stacks).await;
            self.bell.ring();
            for promise in promises {
                let outcome = outcome[&promise.user].clone();
                // The caller may have hung up; what was written stays written.
                let _ = promise.caller.send(outcome.map(|kept| promise.if_kept.given(kept, promise.renames)));
            }
        }
        self.line.hang_up().await;
    }

    /// Writes the whole batch, or else each user on its own: what the database refuses in one must not cost the others.
    async fn keep(&mut self, stacks: &mut [Stack]) -> HashMap<UserId, Result<Kept, WriteError>> {
        if stacks.len() == 1 {
            let alone = self.keep_alone(stacks).await;
            return with_ids(stacks, alone);
        }
        match self.keep_at_once(stacks).await {
            Err(Trouble::Refused { .. }) => {
                let mut outcome = HashMap::with_capacity(stacks.len());
                for stack in stacks.chunks_mut(1) {
                    let alone = self.keep_alone(stack).await;
                    outcome.extend(with_ids(stack, alone));
                }
                outcome
            }
            whole => with_ids(stacks, whole.map_err(WriteError::from)),
        }
    }

    /// Who lost a race for something unique finds, a moment later, that it is taken.
    async fn keep_alone(&mut self, stack: &mut [Stack]) -> Result<Vec<Kept>, WriteError> {
        match self.keep_at_once(stack).await {
            Err(trouble) if trouble.broke(store::IDEMPOTENCY_KEYS) => Ok(vec![Kept::Repeated]),
            Err(trouble) if lost_a_race(&trouble) => Ok(self.keep_at_once(stack).await?),
            outcome => Ok(outcome?),
        }
    }

    async fn keep_at_once(&mut self, stacks: &mut [Stack]) -> Result<Vec<Kept>, Trouble> {
        let outcome = self.line.run(async |connection| store::keep(connection, stacks).await).await;
        match &outcome {
            Err(trouble) if lost_a_race(trouble) => {
                tracing::debug!(users = stacks.len(), "a batch of changes is written one by one: {}", trouble.report());
            }
            Err(trouble) => {
                tracing::warn!(users = stacks.len(), "a batch of changes failed: {}", trouble.report());
            }
            Ok(_) => {}
        }
        outcome
    }
}

/// Somebody else committed, or is in the same batch with, what may be there once.
fn lost_a_race(trouble: &Trouble) -> bool {
    trouble.broke(store::EXTERNAL_IDS) || trouble.broke(store::IDEMPOTENCY_KEYS)
}

impl From<Trouble> for WriteError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Broken(_) => Self::Unknown(trouble.into()),
            Trouble::Unreachable(_) | Trouble::Refused { .. } => Self::NotWritten(trouble.into()),
        }
    }
}

fn with_ids(stacks: &[Stack], whole: Result<Vec<Kept>, WriteError>) -> HashMap<UserId, Result<Kept, WriteError>> {
    let ids = stacks.iter().map(Stack::id);
    match whole {
        Ok(kept) => ids.zip(kept.into_iter().map(Ok)).collect(),
        Err(error) => ids.map(|id| (id, Err(error.clone()))).collect(),
    }
}
