//! Deletes confirmed events while the next ones are on their way.

use std::time::{Duration, Instant};

use tokio::{task::JoinHandle, time::sleep_until};

use crate::{
    db::{Line, Trouble},
    outbox::{self, OutboxId},
};

/// Between two deletions of a few events: one costs the database about as much as a change, whatever it deletes.
const REST: Duration = Duration::from_millis(20);
/// That many are deleted without a rest.
const MANY: usize = 200;

/// One deletion at a time, in a task of its own: waiting for it never holds up the publishing, and giving up the wait never harms
/// the connection.
pub(super) struct Settler {
    state: State,
    rests_until: Instant,
}

enum State {
    Idle(Box<Line>),
    Busy(JoinHandle<(Box<Line>, Settled)>),
    /// Only while changing from one to the other.
    Between,
}

/// The events of one deletion, and whether it happened.
pub(super) struct Settled {
    pub(super) ids: Vec<OutboxId>,
    pub(super) outcome: Result<(), Trouble>,
}

impl Settler {
    pub(super) fn new(line: Line) -> Self {
        Self { state: State::Idle(Box::new(line)), rests_until: Instant::now() }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle(_))
    }

    /// Whether so many confirmed events are worth a deletion now.
    pub(super) fn is_worth(&self, confirmed: usize) -> bool {
        confirmed >= MANY || Instant::now() >= self.rests_until
    }

    /// Waits for the deletion under way or, if there is none, for the end of the rest. Cancel safe.
    pub(super) async fn done_or_rested(&mut self) -> Option<Settled> {
        if self.is_idle() {
            sleep_until(self.rests_until.into()).await;
            return None;
        }
        Some(self.done().await)
    }

    /// Starts deleting, if nothing is being deleted and there is something to delete; takes what it deletes out of `confirmed`.
    pub(super) fn start(&mut self, confirmed: &mut Vec<OutboxId>) {
        if confirmed.is_empty() {
            return;
        }
        self.state = match std::mem::replace(&mut self.state, State::Between) {
            State::Idle(line) => {
                self.rests_until = Instant::now() + REST;
                State::Busy(tokio::spawn(settle(line, std::mem::take(confirmed))))
            }
            busy => busy,
        };
    }

    /// Waits for the deletion under way; for ever when there is none. Cancel safe.
    pub(super) async fn done(&mut self) -> Settled {
        let State::Busy(task) = &mut self.state else { return std::future::pending().await };
        let (line, settled) = task.await.expect("deleting does not panic, and nobody aborts it");
        self.state = State::Idle(line);
        settled
    }

    pub(super) async fn hang_up(mut self) {
        if let State::Idle(line) = &mut self.state {
            line.hang_up().await;
        }
    }
}

async fn settle(mut line: Box<Line>, ids: Vec<OutboxId>) -> (Box<Line>, Settled) {
    let outcome = line.run(async |connection| outbox::settle(connection, &ids).await).await;
    (line, Settled { ids, outcome })
}
