//! A client, what it may do, and which fields it may see and write. No I/O.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};
use tidings_sdk::{
    envelope::{Event, FieldName},
    subscription::{BindingKey, SubscriptionName},
};
use time::OffsetDateTime;

use super::KeyId;
use crate::{
    profile::{FieldSet, Profile},
    web::{Rate, View},
};

/// What a client may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    ReadUsers,
    WriteUsers,
    /// Register, change, delete and look after subscriptions of its own.
    Subscriptions,
    /// Everything, for every client.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 4] = [Self::ReadUsers, Self::WriteUsers, Self::Subscriptions, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadUsers => "users:read",
            Self::WriteUsers => "users:write",
            Self::Subscriptions => "subscriptions",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a scope is users:read, users:write, subscriptions or admin")]
pub struct InvalidScope;

impl FromStr for Scope {
    type Err = InvalidScope;

    fn from_str(text: &str) -> Result<Self, InvalidScope> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or(InvalidScope)
    }
}

/// The fields that a subscription declares: what wakes it is what its client reads. Who is woken by every change reads every field.
pub fn declared(keys: &[BindingKey], fields: BTreeSet<FieldName>) -> FieldSet {
    let updated = Event::Updated { changed_fields: vec![] };
    if keys.iter().any(|key| key.matches(updated.name())) { FieldSet::All } else { FieldSet::of(Some(fields)) }
}

/// Who asks: a client with a valid key or token. Cheap to clone; holds no secret.
#[derive(Debug, Clone)]
pub struct Caller(Arc<Facts>);

#[derive(Debug, Clone)]
pub struct Facts {
    /// The client's name.
    pub client: Arc<str>,
    /// The key it came with; `None` for a token of somebody else's making.
    pub key: Option<KeyId>,
    pub scopes: BTreeSet<Scope>,
    /// The fields that it may see.
    pub reads: FieldSet,
    /// The fields that it may write.
    pub writes: FieldSet,
    /// The fields that its subscriptions may declare: all it may ever come to read.
    pub may_declare: FieldSet,
    /// The subscriptions that it stands for.
    pub subscriptions: BTreeSet<SubscriptionName>,
    /// How often it may ask. `None`: as often as everybody.
    pub rate: Option<Rate>,
}

impl std::ops::Deref for Caller {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.0
    }
}

impl From<Facts> for Caller {
    fn from(facts: Facts) -> Self {
        Self(Arc::new(facts))
    }
}

impl Caller {
    /// Whoever asks, on a machine that nobody else can reach.
    pub fn anonymous() -> Self {
        Facts {
            client: "anonymous".into(),
            key: None,
            scopes: BTreeSet::from([Scope::Admin]),
            reads: FieldSet::All,
            writes: FieldSet::All,
            may_declare: FieldSet::All,
            subscriptions: BTreeSet::new(),
            rate: None,
        }
        .into()
    }

    /// The same caller, with no more scopes than these.
    #[must_use]
    pub fn limited_to(&self, scopes: &[String]) -> Self {
        let scopes = scopes.iter().filter_map(|scope| scope.parse().ok()).filter(|scope| self.may(*scope)).collect();
        Facts { scopes, ..(*self.0).clone() }.into()
    }

    pub fn may(&self, scope: Scope) -> bool {
        self.is_admin() || self.scopes.contains(&scope)
    }

    pub fn is_admin(&self) -> bool {
        self.scopes.contains(&Scope::Admin)
    }

    /// Whether it may see this field of a user.
    pub fn sees_field(&self, name: &str) -> bool {
        self.may(Scope::ReadUsers) && self.reads.has(name)
    }

    /// What it may see of a profile: of its own change too, nothing without the right to read.
    #[must_use]
    pub fn sees(&self, profile: Profile) -> Profile {
        self.seen().part_of(profile)
    }

    /// Names what it may see of a user, if that is not everything.
    pub fn view(&self) -> Option<View> {
        let FieldSet::Only(fields) = self.seen() else { return None };
        // No name has a space.
        let names = fields.iter().map(FieldName::as_str).collect::<Vec<_>>().join(" ");
        let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(names));
        Some(View(u32::from_be_bytes([a, b, c, d])))
    }

    /// The fields that go away when a document of its does not have them: what it may write, but nothing that it reads around.
    pub fn replaces(&self) -> FieldSet {
        if self.may(Scope::ReadUsers) { self.writes.and(&self.reads) } else { self.writes.clone() }
    }

    fn seen(&self) -> FieldSet {
        if self.may(Scope::ReadUsers) { self.reads.clone() } else { FieldSet::none() }
    }
}

/// Of a client: a lowercase letter or digit, then also `.`, `_` and `-`; at most 100 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a client's name is a lowercase letter or digit, followed by more of them, '.', '_' and '-', at most 100 bytes"
)]
pub struct InvalidName;

const MAX_NAME_BYTES: usize = 100;

/// A client that is to be.
#[derive(Debug, Clone)]
pub struct NewClient {
    pub name: String,
    pub scopes: BTreeSet<Scope>,
    /// `None`: every field.
    pub fields: Option<BTreeSet<FieldName>>,
    /// `None`: as `fields`.
    pub write_fields: Option<BTreeSet<FieldName>>,
    pub purpose: Option<String>,
    /// `None`: as often as everybody.
    pub rate: Option<Rate>,
    /// Whether a token of the identity provider may name it.
    pub takes_tokens: bool,
}

impl NewClient {
    /// A client with this one scope, for every field.
    ///
    /// # Errors
    /// When `name` is none.
    pub fn named(name: &str, scopes: impl IntoIterator<Item = Scope>) -> Result<Self, InvalidName> {
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let goes_on_well =
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'));
        if !starts_well || !goes_on_well || name.len() > MAX_NAME_BYTES {
            return Err(InvalidName);
        }
        let scopes = scopes.into_iter().collect();
        let (fields, write_fields, purpose, rate) = (None, None, None, None);
        Ok(Self { name: name.to_owned(), scopes, fields, write_fields, purpose, rate, takes_tokens: false })
    }
}

/// A client as it is kept, for those who look after them.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Client {
    pub name: String,
    pub scopes: Vec<String>,
    pub fields: Option<Vec<String>>,
    pub write_fields: Option<Vec<String>>,
    pub purpose: Option<String>,
    pub rate_limit: Option<String>,
    pub takes_tokens: bool,
    pub subscriptions: Vec<String>,
    pub created_at: OffsetDateTime,
    pub revoked_at: Option<OffsetDateTime>,
}

impl Client {
    /// Without lists that are without effect: to an administrator none applies, though some were made with one.
    #[must_use]
    pub fn effective(self) -> Self {
        let is_admin = self.scopes.iter().any(|scope| scope == Scope::Admin.as_str());
        if is_admin { Self { fields: None, write_fields: None, ..self } } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(names: &[&str]) -> FieldSet {
        FieldSet::of(Some(names.iter().map(|name| name.parse().unwrap()).collect()))
    }

    #[test]
    fn what_wakes_a_subscription_is_what_it_declares() {
        let fields: BTreeSet<FieldName> = ["city".parse().unwrap()].into();
        let keys = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<BindingKey>>();
        assert_eq!(declared(&keys(&["user.deleted"]), fields.clone()), only(&["city"]));
        assert_eq!(declared(&[], BTreeSet::new()), FieldSet::none());
        for everything in ["profile.updated", "#", "*.updated"] {
            assert_eq!(declared(&keys(&["user.deleted", everything]), fields.clone()), FieldSet::All, "{everything}");
        }
    }

    #[test]
    fn a_client_has_a_name_that_a_header_and_a_log_can_hold() {
        assert!(NewClient::named("team-orders.v2", [Scope::ReadUsers]).is_ok());
        for wrong in ["", "Orders", "-orders", "or ders", "örders", &"a".repeat(101)] {
            assert!(NewClient::named(wrong, [Scope::ReadUsers]).is_err(), "{wrong}");
        }
    }
}
