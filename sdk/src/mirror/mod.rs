//! Mirror: a full copy of the living users in the consumer's own Postgres.
//!
//! Promise: a state is never replaced by an older one, and a deleted user never comes back, whatever the order in which news arrives,
//! unless the owner itself was set back; a missed one is found by [`Mirror::verify`] and mended by [`Mirror::repair`].
//! Not here, on purpose: a connection of its own. What is applied is applied in the consumer's transaction, beside whatever else the
//! consumer derives from it.

mod catch_up;
mod keeper;
mod store;
mod verify;

pub use catch_up::CaughtUp;
pub use keeper::Keeper;
pub use verify::Difference;

use std::collections::BTreeSet;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use store::State;

use crate::{
    envelope::FieldName,
    owner::{FetchError, Latest, Owner, User},
    subscription::SubscriptionName,
};

/// Receipts under way at the same time.
const RECEIPTS: usize = 16;

/// A mirror in the tables `tidings_users` and `tidings_cursor` of the schema that the connection looks into.
#[derive(Debug, Clone, Default)]
pub struct Mirror {
    fields: Option<BTreeSet<FieldName>>,
    confirming: Option<SubscriptionName>,
}

/// Why a mirror could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error("the mirror's database failed")]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// What became of a state that was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    Written,
    /// This version or a later one was there already.
    Old,
}

impl Mirror {
    /// A mirror of whole profiles.
    pub fn new() -> Self {
        Self::default()
    }

    /// A mirror of these fields and no others: what an application does not need it should not hold.
    #[must_use]
    pub fn of(fields: impl IntoIterator<Item = FieldName>) -> Self {
        Self { fields: Some(fields.into_iter().collect()), confirming: None }
    }

    /// Tells the owner, for this subscription, of deletions that catching up and repairing have applied to users that were held. Those that
    /// come as notices the consumer confirms by itself.
    #[must_use]
    pub fn confirming(mut self, subscription: SubscriptionName) -> Self {
        self.confirming = Some(subscription);
        self
    }

    /// An outage is an error, and to be tried again; a refusal has been told and is nothing to stop for.
    async fn confirm(&self, owner: &Owner, users: impl Iterator<Item = Uuid>) -> Result<(), FetchError> {
        let Some(subscription) = &self.confirming else { return Ok(()) };
        let receipts = users.map(async |user| match owner.confirm_deletion(user, subscription).await {
            Ok(_) => Ok(()),
            // A key that is refused here is refused everywhere, and about to be replaced.
            Err(outage @ (FetchError::Unavailable(_) | FetchError::Denied { status: 401, .. })) => Err(outage),
            Err(refusal) => {
                tracing::warn!(%subscription, user_id = %user, "a deletion is done and cannot be confirmed: {refusal}");
                Ok(())
            }
        });
        stream::iter(receipts).buffer_unordered(RECEIPTS).try_collect().await
    }

    /// Creates the tables where they are missing. Safe to call at every start, from several processes. If the mirror was one of other fields
    /// before, catching up fetches everybody anew; processes that still hold it to the old ones have to be gone by then.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn prepare(&self, pool: &PgPool) -> sqlx::Result<()> {
        store::create(pool).await?;
        store::note_fields(pool, self.fields.as_ref()).await
    }

    /// Applies a state, within the caller's transaction if there is one. A deletion is final, and applied whatever version is held of the living user.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn apply(&self, connection: &mut PgConnection, latest: &Latest) -> sqlx::Result<Applied> {
        self.apply_over(connection, latest, None).await
    }

    /// The same, and also over `held`, the [`Mirror::version`] from before `latest` was fetched, even if that is as new or newer: for what a
    /// backfill brings, since the owner may have been restored. What came meanwhile is not written over.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn apply_over(
        &self,
        connection: &mut PgConnection,
        latest: &Latest,
        held: Option<i64>,
    ) -> sqlx::Result<Applied> {
        let written = store::keep_over(connection, self.state(latest), held).await?;
        Ok(if written == 1 { Applied::Written } else { Applied::Old })
    }

    /// The version held of a user, of a deleted one too.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn version(&self, connection: &mut PgConnection, user: Uuid) -> sqlx::Result<Option<i64>> {
        Ok(store::held(connection, &[user]).await?.remove(&user))
    }

    fn state(&self, latest: &Latest) -> State {
        let profile = match latest {
            Latest::Living(user) => Some(self.kept(user)),
            Latest::Gone(_) => None,
        };
        State { id: latest.id(), version: latest.version(), profile }
    }

    /// What of the profile is kept.
    fn kept(&self, user: &User) -> Map<String, Value> {
        let Some(fields) = &self.fields else { return user.profile.clone() };
        let wanted = fields.iter().filter_map(|field| user.profile.get_key_value(field.as_str()));
        wanted.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// The copy of a living user.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn get(&self, connection: &mut PgConnection, user: Uuid) -> sqlx::Result<Option<Copy>> {
        store::get(connection, user).await
    }
}

/// A mirror's copy of a living user.
#[derive(Clone, PartialEq)]
pub struct Copy {
    pub version: i64,
    pub profile: Map<String, Value>,
}
