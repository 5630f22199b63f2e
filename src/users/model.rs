//! The facts about a user, free of any I/O.

use std::fmt;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::profile::Profile;

/// Who: a UUID, given by this service (version 7) or by the client that created the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = Uuid, example = "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a")]
pub struct UserId(pub Uuid);

impl UserId {
    /// A new id. Ids made later sort later, so that new users land at one end of the index.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl Default for UserId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the changes of one user from 1.
pub type Version = i64;

/// A living user.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct User {
    pub id: UserId,
    /// Starts at 1 and grows by one with every change.
    #[schema(value_type = i64, minimum = 1, example = 7)]
    pub version: Version,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// What the deployment's profile schema allows.
    #[schema(value_type = std::collections::HashMap<String, serde_json::Value>,
             example = json!({ "first_name": "Ana", "job_title": "Editor" }))]
    pub profile: Profile,
}

/// What stays of a deleted user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tombstone {
    pub id: UserId,
    /// The version that the deletion made.
    pub version: Version,
    pub deleted_at: OffsetDateTime,
}

/// What is kept under an id.
#[derive(Debug, Clone)]
pub enum Record {
    Living(User),
    Deleted(Tombstone),
}

impl Record {
    pub fn id(&self) -> UserId {
        match self {
            Self::Living(user) => user.id,
            Self::Deleted(tombstone) => tombstone.id,
        }
    }

    pub fn profile(&self) -> Option<&Profile> {
        match self {
            Self::Living(user) => Some(&user.profile),
            Self::Deleted(_) => None,
        }
    }

    pub fn version(&self) -> Version {
        match self {
            Self::Living(user) => user.version,
            Self::Deleted(tombstone) => tombstone.version,
        }
    }
}
