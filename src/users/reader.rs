//! Gathered reads: one task reads for everybody.
//!
//! Promise: a read answers with a state no older than the moment it was asked for.
//! Not here, on purpose: a cache.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    model::{Record, UserId},
    store,
};
use crate::db::{Line, Trouble};

/// Ids in one statement.
const BATCH: usize = 256;
/// Reads that may wait before new ones are turned away.
const QUEUE: usize = 4096;

/// Why a read has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    #[error("too many reads are waiting")]
    Overloaded,
    #[error("the users could not be read")]
    Failed(#[source] Arc<Trouble>),
}

type Answer = Result<Option<Record>, ReadError>;

/// Hands reads to the reader task.
#[derive(Clone)]
pub struct Reader {
    queue: mpsc::Sender<(UserId, oneshot::Sender<Answer>)>,
}

impl Reader {
    /// The handle, and the task's body. The task ends when the last handle is gone.
    pub fn new(line: Line) -> (Self, impl Future<Output = ()>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self { queue: sender }, run(line, queue))
    }

    /// The latest state of a user; `None` for an id that nobody ever had.
    pub async fn read(&self, id: UserId) -> Answer {
        let (answer, heard) = oneshot::channel();
        self.queue.try_send((id, answer)).map_err(|_| ReadError::Overloaded)?;
        heard.await.map_err(|_| ReadError::Overloaded)?
    }

    /// The latest state of each of these users, in their order. All of them get a place in the queue, or none.
    pub async fn read_many(&self, ids: &[UserId]) -> Result<Vec<Option<Record>>, ReadError> {
        let places = self.queue.try_reserve_many(ids.len()).map_err(|_| ReadError::Overloaded)?;
        let ask = |(place, id): (mpsc::Permit<'_, _>, &UserId)| {
            let (answer, heard) = oneshot::channel();
            place.send((*id, answer));
            heard
        };
        let waiting: Vec<oneshot::Receiver<Answer>> = places.zip(ids).map(ask).collect();
        let mut records = Vec::with_capacity(ids.len());
        for heard in waiting {
            records.push(heard.await.map_err(|_| ReadError::Overloaded)??);
        }
        Ok(records)
    }
}

async fn run(mut line: Line, mut queue: mpsc::Receiver<(UserId, oneshot::Sender<Answer>)>) {
    let mut asked = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut asked, BATCH).await > 0 {
        // Who hung up is not read for.
        asked.retain(|(_, answer)| !answer.is_closed());
        if asked.is_empty() {
            continue;
        }
        let ids: HashSet<UserId> = asked.iter().map(|(id, _)| *id).collect();
        let ids: Vec<UserId> = ids.into_iter().collect();
        let found = read(&mut line, &ids).await;
        for (id, answer) in asked.drain(..) {
            // The caller may have hung up.
            let _ = answer.send(found.as_ref().map(|found| found.get(&id).cloned()).map_err(Clone::clone));
        }
    }
    line.hang_up().await;
}

async fn read(line: &mut Line, ids: &[UserId]) -> Result<HashMap<UserId, Record>, ReadError> {
    // A read that failed because the connection was lost is worth one more try on a new one.
    let outcome = match line.run(async |connection| store::read(connection, ids).await).await {
        Err(Trouble::Broken(_)) => line.run(async |connection| store::read(connection, ids).await).await,
        outcome => outcome,
    };
    match outcome {
        Ok(records) => Ok(records.into_iter().map(|record| (record.id(), record)).collect()),
        Err(trouble) => {
            tracing::warn!(users = ids.len(), "a batch of reads failed: {}", trouble.report());
            Err(ReadError::Failed(trouble.into()))
        }
    }
}
