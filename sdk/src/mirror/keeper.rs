//! Keeping a mirror level: the handler and the catching up, for a consumer that has nothing else to do with the news.

use sqlx::PgPool;

use super::Mirror;
use crate::{
    consumer::{CatchUp, Failure, Gap, Handler, News},
    owner::Owner,
};

/// Keeps a [`Mirror`] level with its owner.
#[derive(Clone)]
pub struct Keeper {
    mirror: Mirror,
    pool: PgPool,
    owner: Owner,
}

impl Mirror {
    /// This mirror as what a consumer does: `Consumer::new(..)?.catch_up(keeper.clone()).run(keeper, stop)`.
    pub fn keeper(self, pool: PgPool, owner: Owner) -> Keeper {
        Keeper { mirror: self, pool, owner }
    }
}

impl Handler for Keeper {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        let latest = news.latest().await?;
        self.mirror.apply(&mut *self.pool.acquire().await?, &latest).await?;
        Ok(())
    }
}

impl CatchUp for Keeper {
    async fn catch_up(&self, gap: Gap) -> Result<(), Failure> {
        let done = self.mirror.catch_up(&self.pool, &self.owner).await?;
        tracing::info!(?gap, told = done.told, written = done.written, "caught up");
        Ok(())
    }
}
