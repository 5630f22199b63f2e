//! The facts about a user, free of any I/O.

use std::{fmt, str::FromStr};

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

/// The id that other systems know a user by: text that the client chose, compared byte by byte.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ExternalId(String);

/// Why a text is no external id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidExternalId {
    #[error("must have 1 to {} characters", ExternalId::MAX_CHARACTERS)]
    Length,
    #[error("must be printable: no control or invisible characters, no space at either end")]
    Unprintable,
}

impl InvalidExternalId {
    /// For programs.
    pub fn code(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Unprintable => "unprintable",
        }
    }
}

impl ExternalId {
    pub const MAX_CHARACTERS: usize = 200;

    /// As it was kept.
    pub fn from_kept(text: String) -> Self {
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ExternalId {
    type Err = InvalidExternalId;

    /// What nobody can see must not tell two ids apart.
    fn from_str(text: &str) -> Result<Self, InvalidExternalId> {
        if !(1..=Self::MAX_CHARACTERS).contains(&text.chars().count()) {
            return Err(InvalidExternalId::Length);
        }
        if text.trim() != text || text.chars().any(is_invisible) {
            return Err(InvalidExternalId::Unprintable);
        }
        Ok(Self(text.to_owned()))
    }
}

/// Control characters, separators of lines, and what is not shown: `Default_Ignorable_Code_Point` of Unicode 17.0
/// (DerivedCoreProperties.txt), which has all of `Bidi_Control` in it, and the marks around annotations between lines.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Says nothing: it is a user's value.
impl fmt::Debug for ExternalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExternalId(..)")
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
    /// The id that other systems know the user by; absent when there is none. No two living users have the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false, min_length = 1, max_length = 200, example = "E-123")]
    pub external_id: Option<ExternalId>,
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

    pub fn external_id(&self) -> Option<&ExternalId> {
        match self {
            Self::Living(user) => user.external_id.as_ref(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_external_id_is_what_can_be_seen() {
        let parse = |text: &str| text.parse::<ExternalId>().map(|id| id.as_str().to_owned());
        for good in ["E-123", "a b", "Ünal/7", "工号 7", &"é".repeat(200)] {
            assert_eq!(parse(good), Ok(good.to_owned()));
        }
        for wrong in ["", &"x".repeat(201)] {
            assert_eq!(parse(wrong), Err(InvalidExternalId::Length));
        }
        for wrong in
            [" ", " E", "E ", "E\u{a0}", "E\n1", "E\u{7f}", "E\u{85}1", "E\u{200b}1", "\u{202e}E", "\u{feff}E", "E\0"]
        {
            assert_eq!(parse(wrong), Err(InvalidExternalId::Unprintable), "{wrong:?}");
        }
        let unseen = "\u{34f}\u{61c}\u{115f}\u{1160}\u{17b4}\u{180b}\u{180e}\u{2066}\u{3164}\u{fe00}\u{fe0f}\u{ffa0}\u{fff9}\u{fffb}\u{1bca0}\u{1d173}\u{e0001}\u{e007f}\u{e0100}\u{e0fff}";
        for c in unseen.chars() {
            assert_eq!(parse(&format!("E{c}1")), Err(InvalidExternalId::Unprintable), "{c:?}");
        }
        assert_eq!(format!("{:?}", "E-123".parse::<ExternalId>()), "Ok(ExternalId(..))");
    }
}
