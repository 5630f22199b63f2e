//! Deletes confirmed events while the next ones are on their way.

use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::errand::Errand;
use crate::{
    db::{Line, Trouble},
    outbox::{self, Confirmed},
};

/// Between two deletions of a few events: one costs the database about as much as a change, whatever it deletes.
const REST: Duration = Duration::from_millis(20);
/// That many are deleted without a rest.
const MANY: usize = 200;

/// One deletion at a time.
pub(super) struct Settler {
    errand: Errand<Settled>,
    /// Events of the deletion under way.
    deleting: usize,
    rests_until: Instant,
}

/// The events of one deletion, and whether it happened.
pub(super) struct Settled {
    pub(super) events: Vec<Confirmed>,
    pub(super) outcome: Result<(), Trouble>,
}

impl Settler {
    pub(super) fn new(line: Line) -> Self {
        Self { errand: Errand::new(line), deleting: 0, rests_until: Instant::now() }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.errand.is_idle()
    }

    /// Events of the deletion under way; 0 when there is none.
    pub(super) fn deleting(&self) -> usize {
        self.deleting
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
    pub(super) fn start(&mut self, confirmed: &mut Vec<Confirmed>) {
        if confirmed.is_empty() || !self.is_idle() {
            return;
        }
        self.rests_until = Instant::now() + REST;
        self.deleting = confirmed.len();
        self.errand.start(|line| settle(line, std::mem::take(confirmed)));
    }

    /// Waits for the deletion under way; for ever when there is none. Cancel safe.
    pub(super) async fn done(&mut self) -> Settled {
        let settled = self.errand.done().await;
        self.deleting = 0;
        settled
    }

    pub(super) async fn hang_up(self) {
        self.errand.hang_up().await;
    }
}

async fn settle(mut line: Box<Line>, events: Vec<Confirmed>) -> (Box<Line>, Settled) {
    let outcome = line.run(async |connection| outbox::settle(connection, &events).await).await;
    (line, Settled { events, outcome })
}
