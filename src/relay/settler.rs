//! Deletes confirmed events while the next ones are on their way.

use tokio::task::JoinHandle;

use crate::{
    db::{Line, Trouble},
    outbox::{self, OutboxId},
};

/// One deletion at a time, in a task of its own: waiting for it never holds up the publishing, and giving up the wait never harms
/// the connection.
pub(super) struct Settler(State);

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
        Self(State::Idle(Box::new(line)))
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.0, State::Idle(_))
    }

    /// Starts deleting, if nothing is being deleted and there is something to delete; takes what it deletes out of `confirmed`.
    pub(super) fn start(&mut self, confirmed: &mut Vec<OutboxId>) {
        if confirmed.is_empty() {
            return;
        }
        self.0 = match std::mem::replace(&mut self.0, State::Between) {
            State::Idle(line) => State::Busy(tokio::spawn(settle(line, std::mem::take(confirmed)))),
            busy => busy,
        };
    }

    /// Waits for the deletion under way; for ever when there is none. Cancel safe.
    pub(super) async fn done(&mut self) -> Settled {
        let State::Busy(task) = &mut self.0 else { return std::future::pending().await };
        let (line, settled) = task.await.expect("deleting does not panic, and nobody aborts it");
        self.0 = State::Idle(line);
        settled
    }

    pub(super) async fn hang_up(mut self) {
        if let State::Idle(line) = &mut self.0 {
            line.hang_up().await;
        }
    }
}

async fn settle(mut line: Box<Line>, ids: Vec<OutboxId>) -> (Box<Line>, Settled) {
    let outcome = line.run(async |connection| outbox::settle(connection, &ids).await).await;
    (line, Settled { ids, outcome })
}
