//! Feed: what changed, and whether two copies are the same. For those who poll, and for those who would rather check.
//!
//! Promise: who follows the feed learns of every user's latest version, however late its transaction commits; users whose
//! versions differ are found by their digests.
//! Not here, on purpose: profiles, which are fetched; versions that were passed over; the broker.

mod cursor;
mod http;
mod store;

pub use http::routes;
pub use store::{BUCKET, EPOCH, IN_ORDER, LIVING, PAGE, RESTAMP, STRANGERS};

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;
use sqlx::{Connection, PgPool};
use tidings_sdk::digest::{self, Digest};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    db::{self, Db, Trouble},
    users::{UserId, Version},
    web::{LineFull, Turns},
};
pub use cursor::Cursor;
use cursor::Place;

/// Users who are read and added up at once for a digest: some milliseconds.
const CHUNK: usize = 2_000;
/// Digests of one client that may wait for their turn. Each that has begun holds a megabyte or two.
const LINE_LIMIT: usize = 8;

/// The questions that can be asked. Cheap to clone.
#[derive(Clone)]
pub struct Feed {
    /// Its own: pollers and digests must not keep the operator's questions waiting.
    queries: PgPool,
    digesting: Turns,
}

/// That a user changed, and what it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Change {
    pub user_id: UserId,
    /// The latest version; those before it are passed over.
    #[schema(value_type = i64, minimum = 1, example = 7)]
    pub version: Version,
    pub state: State,
    /// When this version was made. Not the order of the feed.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ChangeState)]
pub enum State {
    Living,
    Deleted,
}

/// Changes in order, and where they end.
struct Page {
    changes: Vec<Change>,
    next: Cursor,
    more: bool,
    is_held_back: bool,
}

/// What users come to, by bucket; empty buckets left out.
struct Sum {
    digests: BTreeMap<u32, Digest>,
    /// The last of them, if there are others past it.
    next: Option<Uuid>,
}

/// A living user, by its version alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
pub struct Entry {
    #[schema(value_type = UserId)]
    pub id: Uuid,
    #[schema(minimum = 1, example = 7)]
    pub version: Version,
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the cursor belongs to another history of the database")]
    Expired,
    #[error("too many digests of this client are under way")]
    Overloaded,
    #[error("the query failed")]
    Query(#[from] Trouble),
}

impl Feed {
    pub fn open(db: &Db) -> Self {
        Self { queries: db.pool("feed", 4, IN_ORDER), digesting: Turns::new(1, LINE_LIMIT) }
    }

    pub async fn close(self) {
        db::close(&self.queries).await;
    }

    /// Up to `limit` changes past `after`; from the very first user without it.
    async fn changes(&self, after: Option<Cursor>, limit: usize) -> Result<Page, Error> {
        let queries = self.queries.clone();
        db::ask(async move {
            // One session, so one history: whoever is promoted meanwhile ends it. And one moment: what is not held back is in the page.
            let mut moment = queries.begin_with(store::ONE_MOMENT).await?;
            let now = store::epoch(&mut moment).await?;
            if after.is_some_and(|cursor| cursor.epoch != now.epoch || cursor.place.xid >= now.next_xid) {
                return Ok(Err(Error::Expired));
            }
            let after = after.map_or(Place::default(), |cursor| cursor.place);
            // One more than asked for tells whether there is another page.
            let mut found = store::page(&mut moment, after, limit + 1).await?;
            moment.commit().await?;
            let more = found.len() > limit;
            found.truncate(limit);
            let place = found.last().map_or(after, |(place, _)| *place);
            let changes = found.into_iter().map(|(_, change)| change).collect();
            let next = Cursor { epoch: now.epoch, place };
            Ok(Ok(Page { changes, next, more, is_held_back: now.is_held_back }))
        })
        .await?
    }

    /// What up to `limit` living users past `after` come to. Not one moment's picture: it takes a while, and changes go on.
    async fn digest(&self, client: &Arc<str>, buckets: u32, after: Option<Uuid>, limit: usize) -> Result<Sum, Error> {
        let mut digests = BTreeMap::<u32, Digest>::new();
        let (mut after, mut left) = (after.unwrap_or_default(), limit);
        loop {
            let size = left.min(CHUNK);
            // A turn for each chunk, as all of them may take half a minute: nobody waits behind another's whole digest.
            let turn = self.digesting.take(client).await.map_err(|LineFull| Error::Overloaded)?;
            // A task for each chunk: when the client hangs up, what is under way ends in order, and the turn with it; nothing follows.
            // One more than asked for tells whether there are others.
            let queries = self.queries.clone();
            let read = async move {
                let _turn = turn;
                store::living(&queries, after, size as i64 + 1).await
            };
            let mut users = db::ask(read).await?;
            let more = users.len() > size;
            users.truncate(size);
            for Entry { id, version } in &users {
                digests.entry(digest::bucket(*id, buckets)).or_default().add(*id, *version);
            }
            left -= users.len();
            let next = users.last().filter(|_| more).map(|user| user.id);
            match next {
                Some(last) if left > 0 => after = last,
                _ => return Ok(Sum { digests, next }),
            }
        }
    }

    /// Up to `limit` living users of a bucket, past `after`.
    async fn bucket(&self, bucket: u32, buckets: u32, after: Option<Uuid>, limit: i64) -> Result<Vec<Entry>, Error> {
        let queries = self.queries.clone();
        let width = digest::MAX_BUCKETS / buckets;
        let (first, end) = (bucket * width, (bucket + 1) * width);
        let after = after.map_or((first, Uuid::nil()), |id| (digest::bucket(id, digest::MAX_BUCKETS), id));
        Ok(db::ask(async move { store::bucket(&queries, after, end, limit).await }).await?)
    }
}

/// Gives users whose transactions lie in this database's future a place in its present; how many.
///
/// A dump that was read into a new cluster brings along numbers of transactions that the new one will only come to much later:
/// the feed would not show these users until then.
///
/// # Errors
/// When the database cannot be reached, or does not let itself be changed.
pub async fn restamp(db: &Db) -> anyhow::Result<u64> {
    let mut connection = db.maintenance("restamp").await?;
    if !store::has_strangers(&mut connection).await.map_err(Trouble::from)? {
        connection.close().await?;
        return Ok(0);
    }
    let mut transaction = connection.begin().await?;
    let restamped = store::restamp(&mut transaction).await.map_err(Trouble::from)?;
    transaction.commit().await?;
    connection.close().await?;
    tracing::info!(users = restamped, "a restored database: its users have new places in the feed");
    Ok(restamped)
}
