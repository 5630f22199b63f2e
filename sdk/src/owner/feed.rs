//! What the owner tells to those who ask: who changed since, and whether a copy is equal.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{FetchError, Owner, http::Ask};
use crate::digest::Digest;

/// Entries in one page of changes, as many as the owner gives.
const PAGE: u32 = 1_000;
/// Users in one page of a digest: what the owner adds up well within a request's deadline, and more where a page is long by its buckets.
const DIGEST_PAGE: RangeInclusive<u32> = 100_000..=500_000;
const USERS_FOR_A_BUCKET: u32 = 8;

/// A place in the owner's feed of changes. Opaque: it means something to the owner alone.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cursor(pub String);

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A page of the feed: each user that changed, once, with his latest version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Changes {
    pub changes: Vec<Change>,
    /// Where to go on, now or later.
    pub next: Cursor,
    /// Whether there is more already.
    pub more: bool,
    /// Whether changes that are committed wait for a transaction of the owner's that is still open. Where there is no more, and this is
    /// false, everything that was committed when it was asked for has been told.
    #[serde(default)]
    pub held_back: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Change {
    pub user_id: Uuid,
    pub version: i64,
    pub state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Living,
    Deleted,
}

/// What living users come to in each bucket, a page of them.
#[derive(Deserialize)]
struct Digests {
    digests: Vec<BucketDigest>,
    next: Option<Cursor>,
}

#[derive(Deserialize)]
struct BucketDigest {
    bucket: u32,
    count: u64,
    /// 16 hexadecimal digits.
    hash: String,
}

/// Living users of one bucket, a page of them.
#[derive(Deserialize)]
struct Bucket {
    users: Vec<Held>,
    next: Option<Cursor>,
}

/// A living user and the version that is kept of him.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Held {
    pub id: Uuid,
    pub version: i64,
}

impl Owner {
    /// A page of what changed since `after`; everybody, page by page, without one. No change is ever skipped, however late it was
    /// committed.
    ///
    /// # Errors
    /// [`FetchError::Refused`] with status 410 when the owner's database is another than the one the cursor is of (failover, restore):
    /// begin anew without one.
    pub async fn changes(&self, after: Option<&Cursor>) -> Result<Changes, FetchError> {
        let after = after.map(|Cursor(after)| format!("&after={after}")).unwrap_or_default();
        self.http.ask(Ask::get(format!("/v1/changes?limit={PAGE}{after}"))).await?.ok()
    }

    /// What the living users of each bucket come to, out of this many, a power of two. Without the empty ones.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn digest(&self, buckets: u32) -> Result<BTreeMap<u32, Digest>, FetchError> {
        let limit = buckets.saturating_mul(USERS_FOR_A_BUCKET).clamp(*DIGEST_PAGE.start(), *DIGEST_PAGE.end());
        let (mut all, mut next) = (BTreeMap::<u32, Digest>::new(), Some(None));
        while let Some(after) = next {
            let after = after.map(|Cursor(after)| format!("&after={after}")).unwrap_or_default();
            let path = format!("/v1/digest?buckets={buckets}&limit={limit}{after}");
            let page: Digests = self.http.ask(Ask::get(path)).await?.ok()?;
            for BucketDigest { bucket, count, hash } in page.digests {
                let hash = u64::from_str_radix(&hash, 16).map_err(|_| FetchError::Malformed)?;
                all.entry(bucket).or_default().merge(Digest { count, hash });
            }
            next = page.next.map(Some);
        }
        Ok(all)
    }

    /// The living users of one bucket out of this many.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn bucket(&self, bucket: u32, buckets: u32) -> Result<Vec<Held>, FetchError> {
        let (mut users, mut next) = (vec![], Some(None));
        while let Some(after) = next {
            let page: Bucket = self.bucket_page(bucket, buckets, after.as_ref()).await?;
            users.extend(page.users);
            next = page.next.map(Some);
        }
        Ok(users)
    }

    async fn bucket_page(&self, bucket: u32, buckets: u32, after: Option<&Cursor>) -> Result<Bucket, FetchError> {
        let after = after.map(|Cursor(after)| format!("&after={after}")).unwrap_or_default();
        self.http.ask(Ask::get(format!("/v1/digest/{bucket}?buckets={buckets}{after}"))).await?.ok()
    }
}
