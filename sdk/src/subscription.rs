//! Subscription: who listens, and to what.
//!
//! Promise: what parses can be declared, and can be woken by some notice.
//! Not here, on purpose: the broker. What a subscription is made of there is in [`crate::topology`].

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::envelope::{Event, FieldName};

/// An application that listens: its name, and what wakes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub name: SubscriptionName,
    /// Kinds of notice that wake it.
    pub keys: BTreeSet<BindingKey>,
    /// Fields whose change wakes it, without being woken for every `profile.updated`.
    pub fields: BTreeSet<FieldName>,
}

impl Subscription {
    /// A subscription that nothing wakes yet.
    pub fn new(name: SubscriptionName) -> Self {
        Self { name, keys: BTreeSet::new(), fields: BTreeSet::new() }
    }

    /// Whether this event wakes it.
    pub fn wants(&self, event: &Event) -> bool {
        self.keys.iter().any(|key| key.matches(event.name()))
            || event.changed_fields().iter().any(|field| self.fields.contains(field))
    }
}

/// The name of a subscription, of its queue, and the beginning of every other name it has at the broker.
///
/// A lowercase letter, then lowercase letters, digits, `.`, `_` and `-`; at most 100 bytes. Not `amq.`, which is the broker's, and
/// not an ending that stands for a part of a subscription.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SubscriptionName(String);

impl SubscriptionName {
    pub const MAX_BYTES: usize = 100;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a string is no name of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a subscription's name is a lowercase letter followed by lowercase letters, digits, '.', '_' and '-', at most {} bytes; it does \
     not begin with \"amq.\", nor end in \".dead\", \".fields\", \".resync\" or \".retry.\" and a number",
    SubscriptionName::MAX_BYTES
)]
pub struct InvalidName;

impl FromStr for SubscriptionName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.starts_with("amq.");
        let goes_on_well =
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'));
        let is_a_part = [".dead", ".fields", ".resync"].iter().any(|part| name.ends_with(part)) || is_retry(name);
        if starts_well && goes_on_well && !is_a_part && name.len() <= Self::MAX_BYTES {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidName)
        }
    }
}

fn is_retry(name: &str) -> bool {
    let last = name.rsplit_once(".retry.").map(|(_, last)| last);
    last.is_some_and(|last| !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}

impl TryFrom<String> for SubscriptionName {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<SubscriptionName> for String {
    fn from(name: SubscriptionName) -> Self {
        name.0
    }
}

impl fmt::Display for SubscriptionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A pattern of the topic exchange that some notice's routing key matches: `user.deleted`, `user.*`, `#`.
///
/// Without the deployment's prefix, which is put before it when it is bound.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BindingKey(String);

impl BindingKey {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a message with this routing key would be routed by it.
    pub fn matches(&self, routing_key: &str) -> bool {
        matches(&words(&self.0), &words(routing_key))
    }
}

fn words(key: &str) -> Vec<&str> {
    key.split('.').collect()
}

/// As a topic exchange matches: `*` is one word, `#` is any number of them.
fn matches(pattern: &[&str], key: &[&str]) -> bool {
    match pattern {
        [] => key.is_empty(),
        ["#", rest @ ..] => (0..=key.len()).any(|skipped| matches(rest, &key[skipped..])),
        [word, rest @ ..] => {
            key.split_first().is_some_and(|(first, key)| (*word == "*" || word == first) && matches(rest, key))
        }
    }
}

/// Why a string is no binding key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no notice has such a routing key: the keys are user.created, profile.updated and user.deleted, or a pattern of them such as user.* or #"
)]
pub struct UnknownKey;

impl FromStr for BindingKey {
    type Err = UnknownKey;

    fn from_str(key: &str) -> Result<Self, Self::Err> {
        let pattern = words(key);
        // A pattern of our three names needs no more words than this, and each further # doubles the work of matching.
        let is_short = pattern.len() <= 4;
        if is_short && Event::NAMES.iter().any(|name| matches(&pattern, &words(name))) {
            Ok(Self(key.to_owned()))
        } else {
            Err(UnknownKey)
        }
    }
}

impl TryFrom<String> for BindingKey {
    type Error = UnknownKey;

    fn try_from(key: String) -> Result<Self, Self::Error> {
        key.parse()
    }
}

impl From<BindingKey> for String {
    fn from(key: BindingKey) -> Self {
        key.0
    }
}

impl fmt::Display for BindingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(key: &str) -> Vec<&'static str> {
        let key: BindingKey = key.parse().unwrap();
        Event::NAMES.into_iter().filter(|name| key.matches(name)).collect()
    }

    #[test]
    fn keys_match_as_a_topic_exchange_matches() {
        assert_eq!(matched("#"), Event::NAMES);
        assert_eq!(matched("*.*"), Event::NAMES);
        assert_eq!(matched("user.*"), ["user.created", "user.deleted"]);
        assert_eq!(matched("#.deleted"), ["user.deleted"]);
        assert_eq!(matched("user.#.deleted"), ["user.deleted"]);
        assert_eq!(matched("profile.updated"), ["profile.updated"]);
    }

    #[test]
    fn a_key_that_nothing_matches_is_refused() {
        for wrong in ["", "user", "user.renamed", "user.*.*", "USER.deleted", "user.deleted ", "#.#.#.#.#.#"] {
            assert_eq!(wrong.parse::<BindingKey>(), Err(UnknownKey), "{wrong}");
        }
    }

    #[test]
    fn a_name_stands_for_itself_and_no_part_of_another() {
        for right in ["orders", "o", "eu.orders-2", "billing_retry", "a.retry.x"] {
            assert!(right.parse::<SubscriptionName>().is_ok(), "{right}");
        }
        let parts = ["orders.dead", "orders.fields", "orders.resync", "orders.retry.1000"];
        for wrong in ["", "Orders", "2nd", "amq.orders", "a b", "ö"].into_iter().chain(parts) {
            assert_eq!(wrong.parse::<SubscriptionName>(), Err(InvalidName), "{wrong}");
        }
        assert!("x".repeat(101).parse::<SubscriptionName>().is_err());
    }

    #[test]
    fn a_field_wakes_without_every_update_waking() {
        let mut orders = Subscription::new("orders".parse().unwrap());
        orders.keys.insert("user.deleted".parse().unwrap());
        orders.fields.insert("address".parse().unwrap());
        let updated = |field: &str| Event::Updated { changed_fields: vec![field.parse().unwrap()] };
        assert!(orders.wants(&Event::Deleted) && orders.wants(&updated("address")));
        assert!(!orders.wants(&Event::Created) && !orders.wants(&updated("city")));
    }
}
