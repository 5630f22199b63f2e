//! Catching up: from the place where this mirror last was to now, or from the beginning.

use std::collections::HashSet;

use futures_util::{StreamExt, stream};
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    Mirror, MirrorError,
    store::{self, State, Step},
};
use crate::owner::{Change, Changes, Cursor, FetchError, Latest, Owner, State::Deleted};

/// Fetches under way at the same time; they are gathered into few requests.
const FETCHES: usize = 500;

/// What catching up came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CaughtUp {
    /// Users that the owner named as changed.
    pub told: u64,
    /// Users whose copy was written.
    pub written: u64,
    /// Not everything that was committed by then has come: a transaction of the owner's that is open holds changes back, or somebody
    /// could not be shown. To be called again in a while; consuming need not wait for that.
    pub is_behind: bool,
}

/// A walk through the feed.
struct Pass {
    /// The place that is kept in the mirror, as far as this pass knows: the next one starts there.
    kept: Option<Cursor>,
    /// Whom the owner could not show. Nobody moves past them.
    unseen: Vec<Uuid>,
}

impl Mirror {
    /// Applies every change since this mirror last caught up; everything, the first time. It can be broken off at any moment and
    /// goes on where it was. A user whom the owner cannot show holds up nobody: he is told to the log, and asked for again the next time.
    ///
    /// After a restore or a failover of the owner everybody is fetched again, each taken as he is, and forgotten who is not shown any more.
    ///
    /// # Errors
    /// When the owner does not answer or the mirror's database fails; what was done by then stays done.
    pub async fn catch_up(&self, pool: &PgPool, owner: &Owner) -> Result<CaughtUp, MirrorError> {
        let mut pass = Pass::begin(pool).await?;
        let (mut done, mut cursor) = (CaughtUp::default(), pass.kept.clone());
        loop {
            let page = match (owner.changes(cursor.as_ref()).await, &cursor) {
                // Another database than the one we know: its versions may have run backwards.
                (Err(FetchError::Refused { status: 410, .. }), Some(_)) => {
                    tracing::warn!("the owner has another history than this mirror: everybody is fetched anew");
                    store::begin_anew(pool, pass.kept.as_ref()).await?;
                    // Of this history nobody has been asked for yet.
                    pass = Pass::begin(pool).await?;
                    cursor = pass.kept.clone();
                    continue;
                }
                (page, _) => page?,
            };
            done.told += page.changes.len() as u64;
            done.written += self.take(pool, owner, &page, &mut pass).await?;
            if !page.more {
                if !page.held_back {
                    store::end_anew(pool, &pass.unseen, pass.kept.as_ref()).await?;
                }
                done.is_behind = page.held_back || !pass.unseen.is_empty();
                return Ok(done);
            }
            cursor = Some(page.next);
        }
    }

    /// Applies a page, and moves the cursor with it, but not past anybody unseen. How many copies were written.
    async fn take(&self, pool: &PgPool, owner: &Owner, page: &Changes, pass: &mut Pass) -> Result<u64, MirrorError> {
        let users: Vec<Uuid> = page.changes.iter().map(|change| change.user_id).collect();
        let held = store::held(pool, &users).await?;
        let news =
            page.changes.iter().filter(|change| held.get(&change.user_id).is_none_or(|held| *held < change.version));
        let latest = fetch_all(owner, news.copied().collect(), &mut pass.unseen).await?;
        let step = pass.unseen.is_empty().then_some(Step { from: pass.kept.as_ref(), to: &page.next });
        let states = self.states(page, &latest);
        let gone = page.changes.iter().filter(|change| change.state == Deleted && held.contains_key(&change.user_id));
        let gone: Vec<Uuid> = gone.map(|change| change.user_id).collect();
        let written = if gone.is_empty() || self.confirming.is_none() {
            store::keep(&mut *pool.acquire().await?, states, step).await?
        } else {
            // Before the cursor moves on: who is cut off here sees the page again, and confirms it again.
            let written = store::keep(&mut *pool.acquire().await?, states, None).await?;
            self.confirm(owner, gone.into_iter()).await?;
            store::keep(&mut *pool.acquire().await?, vec![], step).await?;
            written
        };
        if step.is_some() {
            pass.kept = Some(page.next.clone());
        }
        Ok(written)
    }

    /// What was fetched of a page, and who is deleted by the word of the page itself. The owner takes a fetch for a sign that a deletion is
    /// known; to do it, the page is enough.
    fn states(&self, page: &Changes, latest: &[Latest]) -> Vec<State> {
        let shown: HashSet<Uuid> = latest.iter().map(Latest::id).collect();
        let deleted = page.changes.iter().filter(|change| change.state == Deleted && !shown.contains(&change.user_id));
        latest.iter().map(|latest| self.state(latest)).chain(deleted.map(State::tombstone)).collect()
    }
}

impl Pass {
    async fn begin(pool: &PgPool) -> sqlx::Result<Self> {
        Ok(Self { kept: store::cursor(pool).await?, unseen: vec![] })
    }
}

/// The latest state of each of these whom the owner can show; the others are `unseen`, unless there is nothing of them to be seen.
async fn fetch_all(owner: &Owner, changes: Vec<Change>, unseen: &mut Vec<Uuid>) -> Result<Vec<Latest>, FetchError> {
    let fetch = async |change: Change| (change, owner.latest(change.user_id, change.version).await);
    let mut fetched = stream::iter(changes.into_iter().map(fetch)).buffered(FETCHES);
    let mut found = vec![];
    while let Some((Change { user_id: user, state, .. }, latest)) = fetched.next().await {
        match latest {
            Ok(latest) => found.push(latest),
            Err(outage) if outage.is_outage() => return Err(outage),
            Err(_) if state == Deleted => {}
            Err(refusal) => {
                tracing::warn!(user_id = %user, "a user is passed over for now: {refusal}");
                unseen.push(user);
            }
        }
    }
    Ok(found)
}
