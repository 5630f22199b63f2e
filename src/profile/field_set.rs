//! Which fields: every one, or those of a list.

use std::{collections::BTreeSet, sync::Arc};

use tidings_sdk::envelope::FieldName;

use super::{Fields, Profile};

/// Every field, or some of them. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FieldSet {
    All,
    Only(Arc<BTreeSet<FieldName>>),
}

impl FieldSet {
    pub fn none() -> Self {
        Self::Only(Arc::default())
    }

    /// Of a list that may be missing, which then stands for every field.
    pub fn of(list: Option<BTreeSet<FieldName>>) -> Self {
        list.map_or(Self::All, |fields| Self::Only(Arc::new(fields)))
    }

    pub fn has(&self, field: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(fields) => fields.iter().any(|one| one.as_str() == field),
        }
    }

    pub fn is_all(&self) -> bool {
        *self == Self::All
    }

    /// What is in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::All, rest) | (rest, Self::All) => rest.clone(),
            (Self::Only(these), Self::Only(those)) => {
                Self::Only(Arc::new(these.intersection(those).cloned().collect()))
            }
        }
    }

    /// What is in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::Only(these), Self::Only(those)) => Self::Only(Arc::new(these.union(those).cloned().collect())),
        }
    }

    /// The part of a profile that is in these fields.
    #[must_use]
    pub fn part_of(&self, profile: Profile) -> Profile {
        match self {
            Self::All => profile,
            Self::Only(_) => profile.only(|name| self.has(name)),
        }
    }

    /// Those names in `fields` that are not in this set.
    pub fn strangers<'f>(&self, fields: &'f Fields) -> Vec<&'f str> {
        fields.keys().map(String::as_str).filter(|name| !self.has(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(names: &[&str]) -> FieldSet {
        FieldSet::of(Some(names.iter().map(|name| name.parse().unwrap()).collect()))
    }

    #[test]
    fn sets_of_fields_meet_and_join() {
        assert_eq!(only(&["a", "b"]).and(&only(&["b", "c"])), only(&["b"]));
        assert_eq!(only(&["a"]).or(&only(&["c"])), only(&["a", "c"]));
        assert_eq!(FieldSet::All.and(&only(&["a"])), only(&["a"]));
        assert_eq!(only(&["a"]).or(&FieldSet::All), FieldSet::All);
        assert!(
            only(&["a"]).has("a") && !only(&["a"]).has("b") && FieldSet::All.has("b") && !FieldSet::none().has("a")
        );
    }
}
