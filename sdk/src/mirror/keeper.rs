//! Keeping a mirror level: the handler and the catching up, for a consumer that has nothing else to do with the news.

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
    consumer::{CatchUp, Failure, Gap, Handler, News},
    owner::Owner,
};

/// Between two looks at what was left behind.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Keeps a [`Mirror`] level with its owner.
#[derive(Clone)]
pub struct Keeper {
    mirror: Mirror,
    pool: PgPool,
    owner: Owner,
    /// What goes on beside consuming. It ends with the last clone.
    beside: Arc<Mutex<Option<AbortOnDropHandle<()>>>>,
}

impl Mirror {
    /// This mirror as what a consumer does: `Consumer::new(..)?.catch_up(keeper.clone()).run(keeper, stop)`.
    pub fn keeper(self, pool: PgPool, owner: Owner) -> Keeper {
        Keeper { mirror: self, pool, owner, beside: Arc::default() }
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
    /// What is left behind is caught up with beside consuming: no state replaces a newer one, whichever comes first.
    async fn catch_up(&self, gap: Gap) -> Result<(), Failure> {
        let done = self.mirror.catch_up(&self.pool, &self.owner).await?;
        tracing::info!(?gap, told = done.told, written = done.written, is_behind = done.is_behind, "caught up");
        let beside = done.is_behind.then(|| {
            let going_on = go_on(self.mirror.clone(), self.pool.clone(), self.owner.clone());
            AbortOnDropHandle::new(tokio::spawn(going_on))
        });
        *self.beside.lock().unwrap_or_else(PoisonError::into_inner) = beside;
        Ok(())
    }
}

/// Catches up until nothing is left behind.
async fn go_on(mirror: Mirror, pool: PgPool, owner: Owner) {
    let mut pauses = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE / 2)
        .with_jitter()
        .without_max_times()
        .build();
    loop {
        sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        match mirror.catch_up(&pool, &owner).await {
            Ok(done) if done.is_behind => {}
            Ok(done) => {
                tracing::info!(told = done.told, written = done.written, "caught up with what was left behind");
                return;
            }
            Err(error) => {
                tracing::warn!("catching up with what was left behind, trying again: {}", Failure::from(error).reason())
            }
        }
    }
}
