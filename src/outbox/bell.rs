//! The bell: rung after a commit, heard by the relay.
//!
//! Promise: none. A ring is a hint that saves waiting; the table is the truth, and the relay polls it anyway.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{PgPool, postgres::PgListener};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::db::Line;

/// The Postgres channel of the hint. Its payload is empty.
const CHANNEL: &str = "tidings_outbox";
pub const HINT: &str = "notify tidings_outbox";
/// Between two hints to other processes: a `NOTIFY` takes a lock that is global to the server, so many commits share one.
const HINT_INTERVAL: Duration = Duration::from_millis(20);
/// Before listening anew after the connection was lost.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone, Default)]
pub struct Bell(Arc<Inner>);

#[derive(Default)]
struct Inner {
    here: Notify,
    elsewhere: Notify,
    /// Whether the relay of this process is the one that carries events.
    led_here: AtomicBool,
}

impl Bell {
    /// After a commit: wakes the relay, here or in another process.
    pub fn ring(&self) {
        self.0.here.notify_one();
        if !self.0.led_here.load(Ordering::Relaxed) {
            self.0.elsewhere.notify_one();
        }
    }

    /// Returns at the next ring, or at once when one was missed.
    pub async fn rung(&self) {
        self.0.here.notified().await;
    }

    /// Says whether the relay of this process carries the events; then nobody else needs a hint.
    pub fn lead_here(&self, leads: bool) {
        self.0.led_here.store(leads, Ordering::Relaxed);
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
    pub async fn listen(self, pool: PgPool, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let heard = stop.run_until_cancelled(self.listen_once(&pool)).await;
            if let Some(Err(error)) = heard {
                tracing::debug!(%error, "not listening for hints, the relay polls meanwhile");
                let _ = stop.run_until_cancelled(sleep(PAUSE)).await;
            }
        }
        pool.close().await;
    }

    async fn listen_once(&self, pool: &PgPool) -> sqlx::Result<()> {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.listen(CHANNEL).await?;
        loop {
            // What was rung while nobody listened is found by looking once.
            self.0.here.notify_one();
            // `None`: the connection was lost and will be made anew.
            listener.try_recv().await?;
        }
    }
}
