//! Catching up: from the place where this mirror last was to now, or from the beginning.

use futures_util::{StreamExt, TryStreamExt, stream};
use sqlx::PgPool;
use uuid::Uuid;

use super::{Mirror, MirrorError, store};
use crate::owner::{Change, Changes, FetchError, Latest, Owner, State::Deleted};

/// Fetches under way at the same time; they are gathered into few requests.
const FETCHES: usize = 500;

/// What catching up came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaughtUp {
    /// Users that the owner named as changed.
    pub told: u64,
    /// Users whose copy was written.
    pub written: u64,
}

impl Mirror {
    /// Applies every change since this mirror last caught up; everything, the first time. It can be broken off at any moment and
    /// goes on where it was.
    ///
    /// # Errors
    /// When the owner does not answer or the mirror's database fails; what was done by then stays done.
    pub async fn catch_up(&self, pool: &PgPool, owner: &Owner) -> Result<CaughtUp, MirrorError> {
        let mut cursor = store::cursor(pool).await?;
        let mut done = CaughtUp::default();
        loop {
            let page = match owner.changes(cursor.as_ref()).await {
                // Another database than the one we know: its versions may have run backwards. Begin anew.
                Err(FetchError::Refused { status: 410, .. }) if cursor.is_some() => {
                    store::forget_cursor(pool).await?;
                    cursor = None;
                    continue;
                }
                page => page?,
            };
            done.told += page.changes.len() as u64;
            done.written += self.take(pool, owner, &page).await?;
            if !page.more {
                return Ok(done);
            }
            cursor = Some(page.next);
        }
    }

    /// Applies a page, and moves the cursor with it. How many copies were written.
    async fn take(&self, pool: &PgPool, owner: &Owner, page: &Changes) -> Result<u64, MirrorError> {
        let users: Vec<Uuid> = page.changes.iter().map(|change| change.user_id).collect();
        let held = store::held(pool, &users).await?;
        let news =
            page.changes.iter().filter(|change| held.get(&change.user_id).is_none_or(|held| *held < change.version));
        let latest = fetch_all(owner, news.copied().collect()).await?;
        let states = latest.iter().map(|latest| self.state(latest)).collect();
        let gone = page.changes.iter().filter(|change| change.state == Deleted && held.contains_key(&change.user_id));
        let gone: Vec<Uuid> = gone.map(|change| change.user_id).collect();
        if gone.is_empty() || self.confirming.is_none() {
            return Ok(store::keep(&mut *pool.acquire().await?, states, Some(&page.next)).await?);
        }
        // Before the cursor moves on: who is cut off here sees the page again, and confirms it again.
        let written = store::keep(&mut *pool.acquire().await?, states, None).await?;
        self.confirm(owner, gone.into_iter()).await?;
        store::keep(&mut *pool.acquire().await?, vec![], Some(&page.next)).await?;
        Ok(written)
    }
}

/// The latest state of each of these.
async fn fetch_all(owner: &Owner, changes: Vec<Change>) -> Result<Vec<Latest>, MirrorError> {
    let fetches = changes.into_iter().map(|change| owner.latest(change.user_id, change.version));
    Ok(stream::iter(fetches).buffered(FETCHES).try_collect().await?)
}
