//! The bell: rung after a commit, heard by the relay.
//!
//! Promise: what is handed over is committed, and at that place of the outbox. Not that all of it is: a ring is a hint that saves
//! waiting, what is handed over saves reading too; the table is the truth, and the relay polls it anyway.

use std::{
    io::ErrorKind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::{PgPool, postgres::PgListener};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::Entry;
use crate::db::{self, Db, Line};

/// The Postgres channel of the hint. Its payload is empty.
const CHANNEL: &str = "tidings_outbox";
pub const HINT: &str = "notify tidings_outbox";
/// Between two hints to other processes: a `NOTIFY` takes a lock that is global to the server, so many commits share one.
const HINT_INTERVAL: Duration = Duration::from_millis(20);
/// Without a ring for so long, the connection is asked whether it still stands.
const QUIET: Duration = Duration::from_secs(10);
/// Before listening anew after the connection was lost.
const PAUSE: Duration = Duration::from_secs(1);
/// Events that wait for the relay here; it reads the others from the table. No more than it claims at once: that much room it has.
pub const AT_HAND: usize = 500;

#[derive(Clone, Default)]
pub struct Bell(Arc<Inner>);

#[derive(Default)]
struct Inner {
    here: Notify,
    elsewhere: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whether the relay of this process is the one that carries events.
    led_here: bool,
    heard: Heard,
}

/// What a relay hears when the bell rings.
#[derive(Debug, Default)]
pub struct Heard {
    /// Committed events.
    pub handed_over: Vec<Entry>,
    /// Whether there may be others in the table.
    pub look: bool,
}

impl Heard {
    fn add(&mut self, committed: Vec<Entry>) {
        if self.handed_over.len() + committed.len() <= AT_HAND {
            self.handed_over.extend(committed);
        } else {
            self.look = true;
        }
    }
}

impl Bell {
    /// When something may have been committed: wakes the relay, here or in another process.
    pub fn ring(&self) {
        self.tell(|heard| heard.look = true);
    }

    /// After a commit: wakes the relay with what was committed.
    pub fn hand_over(&self, committed: Vec<Entry>) {
        if !committed.is_empty() {
            self.tell(|heard| heard.add(committed));
        }
    }

    fn tell(&self, what: impl FnOnce(&mut Heard)) {
        if !self.tell_here(what) {
            self.0.elsewhere.notify_one();
        }
    }

    /// Wakes the relay here; false if it leads not.
    fn tell_here(&self, what: impl FnOnce(&mut Heard)) -> bool {
        let mut state = self.state();
        if state.led_here {
            what(&mut state.heard);
            self.0.here.notify_one();
        }
        state.led_here
    }

    /// Returns at the next ring, or at once when one was missed. Cancel safe.
    pub async fn rung(&self) -> Heard {
        self.0.here.notified().await;
        std::mem::take(&mut self.state().heard)
    }

    /// Says whether the relay of this process carries the events; then nobody else needs a hint.
    pub fn lead_here(&self, leads: bool) {
        *self.state() = State { led_here: leads, heard: Heard::default() };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes rings on to other processes until `stop`.
    pub async fn pass_on(self, mut line: Line, stop: CancellationToken) {
        while let Some(()) = stop.run_until_cancelled(self.0.elsewhere.notified()).await {
            let passed = line.run(async |connection| sqlx::query(HINT).execute(connection).await).await;
            if let Err(trouble) = passed {
                tracing::debug!(
                    "a hint was not passed on, the relay will find the event by polling: {}",
                    trouble.report()
                );
            }
            sleep(HINT_INTERVAL).await;
        }
        line.hang_up().await;
    }

    /// Rings here when another process rang, until `stop`.
    pub async fn listen(self, db: Db, stop: CancellationToken) {
        while !stop.is_cancelled() {
            // Another one each time: a session that went deaf keeps its place in the pool.
            let pool = db.listener_pool();
            let heard = stop.run_until_cancelled(Box::pin(self.listen_once(&pool))).await;
            db::close(&pool).await;
            if let Some(Err(error)) = heard {
                tracing::debug!(%error, "not listening for hints, the relay polls meanwhile");
                let _ = stop.run_until_cancelled(sleep(PAUSE)).await;
            }
        }
    }

    async fn listen_once(&self, pool: &PgPool) -> sqlx::Result<()> {
        let mut listener = PgListener::connect_with(pool).await?;
        within(listener.listen(CHANNEL)).await?;
        loop {
            // What was rung while nobody listened is found by looking once.
            self.tell_here(|heard| heard.look = true);
            loop {
                match timeout(QUIET, listener.try_recv()).await {
                    // `None`: the connection was lost and will be made anew.
                    Ok(rung) => break drop(rung?),
                    Err(_) => within(sqlx::query("select").execute(&mut listener)).await.map(drop)?,
                }
            }
        }
    }
}

/// Within a deadline: a session that a silent network took away does not break.
async fn within<T>(asked: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(db::ANSWER_DEADLINE, asked).await.map_err(|_| sqlx::Error::Io(ErrorKind::TimedOut.into()))?
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tidings_sdk::envelope::{Event, Notice};
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;

    fn committed(count: usize) -> Vec<Entry> {
        let notice = Notice {
            message_id: Uuid::nil(),
            user_id: Uuid::nil(),
            version: 1,
            event: Event::Created,
            occurred_at: OffsetDateTime::UNIX_EPOCH,
            traceparent: None,
        };
        (1..).map(|id| Entry { id, notice: notice.clone() }).take(count).collect()
    }

    /// How many were handed over, and whether to look.
    fn heard(bell: &Bell) -> Option<(usize, bool)> {
        bell.rung().now_or_never().map(|heard| (heard.handed_over.len(), heard.look))
    }

    #[test]
    fn what_is_committed_is_handed_over_to_the_relay_that_leads_here() {
        let bell = Bell::default();
        bell.hand_over(committed(1));
        assert_eq!(heard(&bell), None, "it leads elsewhere");
        bell.lead_here(true);
        bell.hand_over(committed(1));
        bell.hand_over(committed(2));
        assert_eq!(heard(&bell), Some((3, false)));
        bell.hand_over(vec![]);
        assert_eq!(heard(&bell), None, "a batch that came to nothing");
        bell.hand_over(committed(1));
        bell.ring();
        assert_eq!(heard(&bell), Some((1, true)));
        bell.hand_over(committed(1));
        bell.lead_here(false);
        bell.lead_here(true);
        assert_eq!(heard(&bell), Some((0, false)), "another lead, another story");
    }

    #[test]
    fn what_is_too_much_to_be_kept_is_to_be_read() {
        let bell = Bell::default();
        bell.lead_here(true);
        bell.hand_over(committed(AT_HAND));
        bell.hand_over(committed(1));
        assert_eq!(heard(&bell), Some((AT_HAND, true)));
    }

    #[test]
    fn who_leads_elsewhere_gets_a_hint() {
        let bell = Bell::default();
        let passed_on = |bell: &Bell| bell.0.elsewhere.notified().now_or_never().is_some();
        bell.hand_over(committed(1));
        assert!(passed_on(&bell));
        bell.lead_here(true);
        bell.hand_over(committed(1));
        bell.ring();
        assert!(!passed_on(&bell));
    }
}
