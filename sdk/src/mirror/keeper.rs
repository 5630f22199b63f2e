//! Keeping a mirror level: the handler and the catching up, for a consumer that has nothing else to do with the news.
//!
//! Promise: another history of the owner's (a failover, a restore) is noticed while it is listened to, and not only after a lost connection:
//! its messages may look like old ones.
//! Not here, on purpose: comparing. [`Mirror::verify`] reads everybody, and is for a timer of the application's.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::Mirror;
use crate::{
    FOREVER,
    consumer::{CatchUp, Failure, Gap, Handler, News},
    owner::Owner,
};

/// Between two looks at what was left behind.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Between two looks when nothing was.
const CHECK_EVERY: Duration = Duration::from_secs(60);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// Keeps a [`Mirror`] level with its owner.
#[derive(Clone)]
pub struct Keeper {
    mirror: Mirror,
    pool: PgPool,
    owner: Owner,
    check_every: Duration,
    /// What goes on beside consuming. It ends with the last clone.
    beside: Arc<Mutex<Option<AbortOnDropHandle<()>>>>,
}

impl Mirror {
    /// This mirror as what a consumer does: `Consumer::new(..)?.catch_up(keeper.clone()).run(keeper, stop)`.
    pub fn keeper(self, pool: PgPool, owner: Owner) -> Keeper {
        Keeper { mirror: self, pool, owner, check_every: CHECK_EVERY, beside: Arc::default() }
    }
}

impl Keeper {
    /// How often the owner is asked, beside consuming, whether anything changed that was not told; a minute unless told otherwise, and never
    /// more than a hundred times a second. It costs the owner one request, and a fetch of whom the mirror does not have at that version.
    #[must_use]
    pub fn check_every(mut self, interval: Duration) -> Self {
        self.check_every = interval.clamp(SHORTEST_INTERVAL, FOREVER);
        self
    }

    /// Replaces what goes on beside consuming.
    fn put_beside(&self, beside: Option<AbortOnDropHandle<()>>) {
        *self.beside.lock().unwrap_or_else(PoisonError::into_inner) = beside;
    }
}

impl Handler for Keeper {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        let over = match news.is_backfill() {
            true => self.mirror.version(&mut *self.pool.acquire().await?, news.user_id).await?,
            false => None,
        };
        let latest = news.latest().await?;
        self.mirror.apply_over(&mut *self.pool.acquire().await?, &latest, over).await?;
        Ok(())
    }
}

impl CatchUp for Keeper {
    /// What is left behind, and what is not told, is caught up with beside consuming: no state replaces a newer one, whichever comes first.
    async fn catch_up(&self, gap: Gap) -> Result<(), Failure> {
        self.put_beside(None);
        let done = self.mirror.catch_up(&self.pool, &self.owner).await?;
        tracing::info!(?gap, told = done.told, written = done.written, is_behind = done.is_behind, "caught up");
        let Self { mirror, pool, owner, check_every, .. } = self.clone();
        let going_on = go_on(mirror, pool, owner, check_every, done.is_behind);
        self.put_beside(Some(AbortOnDropHandle::new(tokio::spawn(going_on))));
        Ok(())
    }
}

/// Catches up again and again: soon while something is left behind, and now and then when nothing is.
async fn go_on(mirror: Mirror, pool: PgPool, owner: Owner, check_every: Duration, mut is_behind: bool) {
    let mut pauses = pauses();
    loop {
        let pause = if is_behind { pauses.next().unwrap_or(LONGEST_PAUSE) } else { check_every };
        sleep(pause).await;
        let was_behind = is_behind;
        is_behind = match mirror.catch_up(&pool, &owner).await {
            Ok(done) => {
                if was_behind && !done.is_behind {
                    tracing::info!(told = done.told, written = done.written, "caught up with what was left behind");
                    pauses = self::pauses();
                }
                done.is_behind
            }
            Err(error) => {
                tracing::warn!("catching up beside consuming, trying again: {}", Failure::from(error).reason());
                true
            }
        };
    }
}

fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE / 2)
        .with_jitter()
        .without_max_times()
        .build()
}
