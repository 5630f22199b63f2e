//! Group commit: one task writes for many callers: one for those who change a user, others for requests that change many.
//!
//! Promise: each caller hears of his own change; one that fails does not fail its neighbours; and who has left before his change was
//! begun has changed nothing.
//! A batch is what came in while the last one was under way. A small one waits for those who still read what their change will be
//! planned on: two batches of half the size cost more, and what the second one read of a user in the first would be out of date.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout},
};

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
pub const BATCH: usize = 128;
/// Changes that may wait before new ones are turned away. At 5,000 changes/s it is emptied in a fifth of a second.
const QUEUE: usize = 1024;
/// A batch of so many waits for nobody: what it costs apart from its changes is shared by enough, and the time is better used when
/// the next one comes in while this one is written.
const ENOUGH: usize = 16;
/// How long a smaller one waits at most for who is on his way. A read takes a fraction of it; one that does not must hold up nobody.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long the users of a batch that was refused are tried one by one. Where many of them wait for a lock, each takes a second, and
/// others stand behind them.
const SORTING_OUT: Duration = Duration::from_secs(3);

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
    coming: Arc<Coming>,
}

/// Changes that still read what they will be planned on.
#[derive(Default)]
struct Coming {
    count: AtomicUsize,
    arrival: Notify,
}

impl Coming {
    fn is_nobody(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Adds them to a batch that would be small without them, and whoever stands in the queue while it has room.
    async fn join<T>(&self, queue: &mut mpsc::Receiver<T>, batch: &mut Vec<T>) {
        let all_here = async {
            while !self.is_nobody() && batch.len() + queue.len() < ENOUGH {
                self.arrival.notified().await;
            }
        };
        // Who is not here by then comes with the next one.
        let _ = timeout(PATIENCE, all_here).await;
        while batch.len() < BATCH
            && let Ok(order) = queue.try_recv()
        {
            batch.push(order);
        }
    }
}

/// A change that is on its way to the writer. To be dropped when it is in the queue, or came to nothing.
pub struct OnItsWay(Arc<Coming>);

impl OnItsWay {
    fn new(coming: &Arc<Coming>) -> Self {
        coming.count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(coming))
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Release);
        self.0.arrival.notify_one();
    }
}

type Caller = oneshot::Sender<Result<Answer, WriteError>>;

impl Writer {
    /// The handle, and the task's body. The task ends when the last handle is gone and every change it was handed has its answer.
    pub fn new(line: Line, schema: Arc<Schema>, bell: Bell) -> (Self, impl Future<Output = ()>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let coming = Arc::<Coming>::default();
        (Self { queue: sender, coming: Arc::clone(&coming) }, Task { line, schema, bell, coming }.run(queue))
    }

    /// Announces a change: a batch that is about to be written waits for it, within bounds.
    pub fn announce(&self) -> OnItsWay {
        OnItsWay::new(&self.coming)
    }

    /// Writes `step`, which is what `change` makes of the state its caller read, and was announced if it was.
    pub async fn write(
        &self,
        change: Arc<Change>,
        step: Step,
        on_its_way: Option<OnItsWay>,
    ) -> Result<Answer, WriteError> {
        let (answer, heard) = oneshot::channel();
        self.queue.try_send(Order { change, step, caller: answer }).map_err(|_| WriteError::Overloaded)?;
        drop(on_its_way);
        heard.await.map_err(|_| WriteError::Overloaded)?
    }
}

struct Task {
    line: Line,
    schema: Arc<Schema>,
    bell: Bell,
    coming: Arc<Coming>,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Order<Caller>>) {
        let mut orders = Vec::with_capacity(BATCH);
        while queue.recv_many(&mut orders, BATCH).await > 0 {
            self.coming.join(&mut queue, &mut orders).await;
            // Who has left, or was told that there is no answer in time, does not expect to be written any more.
            orders.retain(|order| !order.caller.is_closed());
            if orders.is_empty() {
                continue;
            }
            let (mut stacks, promises) = pile_up(orders.drain(..), &self.schema);
            let outcome = self.keep(&mut stacks).await;
            for promise in promises {
                let outcome = outcome[&promise.user].clone();
                // The caller may have hung up; what was written stays written.
                let _ = promise.caller.send(outcome.map(|kept| promise.if_kept.given(kept, promise.renames)));
            }
        }
        self.line.hang_up().await;
    }

    /// Writes the whole batch, or else each user on its own: what the database refuses in one must not cost the others. What it
    /// refuses to everybody costs all of them, at once.
    async fn keep(&mut self, stacks: &mut [Stack]) -> HashMap<UserId, Result<Kept, WriteError>> {
        if stacks.len() == 1 {
            let alone = self.keep_alone(stacks).await;
            return with_ids(stacks, alone);
        }
        match self.keep_at_once(stacks).await {
            Err(trouble) if may_be_of_one(&trouble) => self.keep_one_by_one(stacks, trouble).await,
            whole => with_ids(stacks, whole.map_err(WriteError::from)),
        }
    }

    /// Of `stacks`, which were refused together, nothing is written. Nor is it of those whose turn does not come in time.
    async fn keep_one_by_one(
        &mut self,
        stacks: &mut [Stack],
        together: Trouble,
    ) -> HashMap<UserId, Result<Kept, WriteError>> {
        let (until, together) = (Instant::now() + SORTING_OUT, WriteError::from(together));
        let mut outcome = HashMap::with_capacity(stacks.len());
        for stack in stacks.chunks_mut(1) {
            let alone = if Instant::now() < until { self.keep_alone(stack).await } else { Err(together.clone()) };
            outcome.extend(with_ids(stack, alone));
        }
        outcome
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
        match outcome {
            Ok(written) => {
                self.bell.hand_over(written.told);
                Ok(written.kept)
            }
            Err(trouble) if lost_a_race(&trouble) => {
                tracing::debug!(users = stacks.len(), "a batch of changes is written one by one: {}", trouble.report());
                Err(trouble)
            }
            Err(trouble) => {
                // It may be written nevertheless.
                self.bell.ring();
                tracing::warn!(users = stacks.len(), "a batch of changes failed: {}", trouble.report());
                Err(trouble)
            }
        }
    }
}

/// Somebody else committed, or is in the same batch with, what may be there once.
fn lost_a_race(trouble: &Trouble) -> bool {
    trouble.broke(store::EXTERNAL_IDS) || trouble.broke(store::IDEMPOTENCY_KEYS)
}

/// Whether one user of a batch can be to blame for its refusal: not for what holds for all of them, which is a database that is read-only
/// (class 25), has no room (53), is stopped or too slow (57, which has the statement's timeout), or is broken (58).
fn may_be_of_one(trouble: &Trouble) -> bool {
    matches!(trouble, Trouble::Refused { code, .. } if !["25", "53", "57", "58"].iter().any(|class| code.starts_with(class)))
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

#[cfg(test)]
mod tests {
    use tokio::{task::yield_now, time::Instant};

    use super::*;

    struct Batch {
        coming: Arc<Coming>,
        sender: mpsc::Sender<u8>,
        batch: tokio::task::JoinHandle<(Vec<u8>, Duration)>,
    }

    /// A batch of one, which is about to be written, and waits for those whom `announced` gives.
    async fn batch(announced: usize) -> (Batch, Vec<OnItsWay>) {
        let (sender, mut queue) = mpsc::channel(QUEUE);
        let coming = Arc::<Coming>::default();
        let announced = (0..announced).map(|_| OnItsWay::new(&coming)).collect();
        let here = Arc::clone(&coming);
        let batch = tokio::spawn(async move {
            let (mut batch, began) = (vec![0], Instant::now());
            here.join(&mut queue, &mut batch).await;
            (batch, began.elapsed())
        });
        yield_now().await;
        (Batch { coming, sender, batch }, announced)
    }

    #[test]
    fn what_is_refused_to_everybody_is_not_tried_for_each() {
        let may_be_of_one = |code: &str| may_be_of_one(&Trouble::Refused { code: code.to_owned(), constraint: None });
        // Something that is there once, data, a row that is locked, two who wait for each other.
        assert!(["23505", "22P05", "55P03", "40P01"].into_iter().all(may_be_of_one));
        // Read-only, no room, too slow, a broken file.
        assert!(!["25006", "53100", "57014", "58030"].into_iter().any(may_be_of_one));
        assert!(!super::may_be_of_one(&Trouble::Broken(anyhow::anyhow!("silence"))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_goes_without_delay_when_nobody_is_on_his_way() {
        let (alone, _) = batch(0).await;
        assert!(alone.batch.is_finished());
        assert_eq!(alone.batch.await.unwrap(), (vec![0], Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_takes_along_who_is_on_his_way_and_who_sets_out_meanwhile() {
        let (two, mut announced) = batch(2).await;
        announced.push(OnItsWay::new(&two.coming));
        for (place, on_its_way) in announced.into_iter().enumerate() {
            assert!(!two.batch.is_finished());
            // The one in the middle comes to nothing.
            if place != 1 {
                two.sender.send(place as u8 + 1).await.unwrap();
            }
            drop(on_its_way);
            yield_now().await;
        }
        assert_eq!(two.batch.await.unwrap(), (vec![0, 1, 3], Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_arrives_holds_a_batch_up_for_a_moment() {
        let (late, _never) = batch(1).await;
        late.sender.send(1).await.unwrap();
        let (batch, waited) = late.batch.await.unwrap();
        assert_eq!(batch, [0, 1]);
        assert!(waited >= PATIENCE && waited < 2 * PATIENCE, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_of_enough_waits_for_nobody_and_none_is_too_large() {
        for (orders, size) in [(ENOUGH - 1, ENOUGH), (BATCH + 1, BATCH)] {
            let (large, _never) = batch(1).await;
            for order in 0..orders {
                large.sender.send(order as u8).await.unwrap();
            }
            drop(OnItsWay::new(&large.coming));
            let (batch, waited) = large.batch.await.unwrap();
            assert_eq!((batch.len(), waited), (size, Duration::ZERO));
        }
    }
}
