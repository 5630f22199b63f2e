//! Verifying: finds where a mirror differs from its owner, without moving data, and mends it.

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::PgPool;
use uuid::Uuid;

use super::{Mirror, MirrorError, store};
use crate::{
    digest::{self, Digest},
    owner::{FetchError, Held, Latest, Owner},
};

/// Rows of the mirror read at a time.
const PAGE: i64 = 10_000;
/// Users in a bucket, about: what one difference costs to look at.
const USERS_PER_BUCKET: u64 = 256;

/// Where a mirror differs from its owner. News under way makes differences too: they are gone when it has arrived.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    /// The owner has them, the mirror has not.
    pub missing: Vec<Uuid>,
    /// Both have them, with different versions.
    pub stale: Vec<Uuid>,
    /// The mirror has them, the owner has not.
    pub ghosts: Vec<Uuid>,
    /// What the mirror holds of the stale and the ghosts.
    held: HashMap<Uuid, i64>,
}

impl Difference {
    pub fn is_none(&self) -> bool {
        self.missing.is_empty() && self.stale.is_empty() && self.ghosts.is_empty()
    }
}

impl Mirror {
    /// Compares the mirror with its owner by digests, bucket by bucket, and lists users only of buckets that differ.
    ///
    /// # Errors
    /// When the owner does not answer or the mirror's database fails.
    pub async fn verify(&self, pool: &PgPool, owner: &Owner) -> Result<Difference, MirrorError> {
        let buckets = buckets_for(store::count_living(pool).await?);
        let theirs = owner.digest(buckets).await?;
        let mut ours: BTreeMap<u32, Digest> = BTreeMap::new();
        each_living(pool, |id, version| ours.entry(digest::bucket(id, buckets)).or_default().add(id, version)).await?;
        let differing = differing(&theirs, &ours);
        let mut held: HashMap<u32, HashMap<Uuid, i64>> = HashMap::new();
        if !differing.is_empty() {
            each_living(pool, |id, version| {
                let bucket = digest::bucket(id, buckets);
                if differing.contains(&bucket) {
                    held.entry(bucket).or_default().insert(id, version);
                }
            })
            .await?;
        }
        let mut difference = Difference::default();
        for bucket in differing {
            let kept = owner.bucket(bucket, buckets).await?;
            difference.compare(&kept, held.remove(&bucket).unwrap_or_default());
        }
        Ok(difference)
    }

    /// Fetches what differs and applies it. A user whom the owner cannot show is told to the log and passed over.
    ///
    /// # Errors
    /// When the owner does not answer or the mirror's database fails; what was mended by then stays so.
    pub async fn repair(&self, pool: &PgPool, owner: &Owner, difference: &Difference) -> Result<(), MirrorError> {
        for user in difference.missing.iter().chain(&difference.stale).chain(&difference.ghosts) {
            let held = match difference.held.get(user) {
                Some(held) => Some(*held),
                // A tombstone may be what keeps the user out.
                None => store::held(pool, &[*user]).await?.remove(user),
            };
            let latest = match owner.latest(*user, 1).await {
                Ok(latest) => Some(latest),
                Err(FetchError::UnknownUser) => None,
                Err(outage) if outage.is_outage() => return Err(outage.into()),
                Err(refusal) => {
                    tracing::warn!(user_id = %user, "a user cannot be repaired: {refusal}");
                    continue;
                }
            };
            self.mend(pool, *user, held, latest.as_ref()).await?;
            let was_erased = held.is_some() && matches!(latest, Some(Latest::Gone(_)));
            self.confirm(owner, was_erased.then_some(*user).into_iter()).await?;
        }
        Ok(())
    }

    async fn mend(
        &self,
        pool: &PgPool,
        user: Uuid,
        held: Option<i64>,
        latest: Option<&Latest>,
    ) -> Result<(), MirrorError> {
        // What the owner never had, or what is no older than what the owner has and differs (restored from a backup), no comparison of
        // versions would ever mend.
        match (latest, held) {
            (Some(latest), held) => drop(self.apply_over(&mut *pool.acquire().await?, latest, held).await?),
            (None, Some(held)) => store::drop_at(pool, user, held).await?,
            (None, None) => {}
        }
        Ok(())
    }
}

/// A power of two.
fn buckets_for(users: u64) -> u32 {
    let wanted = (users / USERS_PER_BUCKET).clamp(1, u64::from(digest::MAX_BUCKETS));
    u32::try_from(wanted.next_power_of_two()).unwrap_or(digest::MAX_BUCKETS)
}

async fn each_living(pool: &PgPool, mut look: impl FnMut(Uuid, i64)) -> sqlx::Result<()> {
    let mut after = Uuid::nil();
    loop {
        let page = store::living(pool, after, PAGE).await?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        after = *last;
        page.into_iter().for_each(|(id, version)| look(id, version));
    }
}

/// The buckets in which the two sides are not equal.
fn differing(theirs: &BTreeMap<u32, Digest>, ours: &BTreeMap<u32, Digest>) -> HashSet<u32> {
    theirs.keys().chain(ours.keys()).copied().filter(|bucket| theirs.get(bucket) != ours.get(bucket)).collect()
}

impl Difference {
    fn compare(&mut self, kept: &[Held], mut held: HashMap<Uuid, i64>) {
        for Held { id, version } in kept {
            match held.remove(id) {
                None => self.missing.push(*id),
                Some(ours) if ours != *version => {
                    self.stale.push(*id);
                    self.held.insert(*id, ours);
                }
                Some(_) => {}
            }
        }
        self.ghosts.extend(held.keys());
        self.held.extend(held);
    }
}
