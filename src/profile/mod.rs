//! Profile: what the deployment lets be said about a user, and which fields a change really changed.
//!
//! Promise: a [`Profile`] in hand was admitted by the schema (or read back from where such a one was kept).
//! Not here, on purpose: users, storage, and messages that repeat a value: a fault names the place and the rule.

mod field_set;
mod schema;

pub use field_set::FieldSet;
pub use schema::{Schema, TOO_LARGE};

use std::{fmt, sync::Arc};

use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use tidings_sdk::envelope::FieldName;

/// What is told when a user's external id changes: it stands beside the profile and has a name among its fields.
pub const EXTERNAL_ID: &str = "external_id";

/// The members of a profile, by name.
pub type Fields = Map<String, Value>;

/// A user's profile as JSON text: kept, read and sent as it is, and parsed only by those who amend it.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Profile(Arc<RawValue>);

impl Profile {
    /// A profile as it was kept.
    pub fn from_kept(text: Box<RawValue>) -> Self {
        Self(text.into())
    }

    /// Of a JSON object.
    fn from_instance(instance: &impl Serialize) -> Self {
        Self(serde_json::value::to_raw_value(instance).expect("a map with string keys is always JSON").into())
    }

    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// The part of it whose fields are wanted.
    #[must_use]
    pub fn only(&self, wanted: impl Fn(&str) -> bool) -> Self {
        let mut fields = self.fields();
        fields.retain(|name, _| wanted(name));
        Self::from_instance(&fields)
    }

    pub fn fields(&self) -> Fields {
        serde_json::from_str(self.as_str()).expect("a constraint holds that a kept profile is a JSON object")
    }
}

/// Says nothing: a profile must not reach a log by way of `{:?}`.
impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Profile(..)")
    }
}

/// Merges `patch` into `fields` (RFC 7396). The fields whose value differs afterwards, in order of name.
pub fn amend(fields: &mut Fields, patch: &Fields) -> Vec<FieldName> {
    let mut changed = vec![];
    for (name, wish) in patch {
        let before = fields.remove(name);
        let after = (!wish.is_null()).then(|| {
            let mut after = before.clone().unwrap_or_default();
            json_patch::merge(&mut after, wish);
            after
        });
        // Schemas declare only names that may travel. Another one was put into the table by hand, and cannot be told.
        changed.extend((after != before).then(|| name.parse().ok()).flatten());
        fields.extend(after.map(|after| (name.clone(), after)));
    }
    changed
}

/// The top-level fields whose value differs, in order of name; those that came and those that went included.
pub fn changed_fields(before: &Fields, after: &Fields) -> Vec<FieldName> {
    let gone = before.keys().filter(|name| !after.contains_key(*name));
    let differs = after.iter().filter(|(name, value)| before.get(*name) != Some(value)).map(|(name, _)| name);
    // A name that cannot travel is left out, as in `amend`.
    let mut names: Vec<FieldName> = gone.chain(differs).filter_map(|name| name.parse().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_patch_merges_as_rfc_7396_says() {
        let mut profile = fields(json!({ "a": "b", "c": { "d": "e", "f": "g" }, "h": [1, 2] }));
        amend(&mut profile, &fields(json!({ "a": "z", "c": { "f": null }, "h": [3], "i": { "j": null } })));
        assert_eq!(profile, fields(json!({ "a": "z", "c": { "d": "e" }, "h": [3], "i": {} })));
    }

    #[test]
    fn changed_is_what_differs_and_not_what_was_sent() {
        let before =
            fields(json!({ "first_name": "Ana", "job_title": "Author", "phone": "1", "social": { "x": "a" } }));
        let changed = |patch: Value| {
            let mut after = before.clone();
            let changed = amend(&mut after, &fields(patch));
            assert_eq!(changed, changed_fields(&before, &after));
            changed.iter().map(FieldName::to_string).collect::<Vec<_>>()
        };
        assert_eq!(changed(json!({ "job_title": "Editor", "first_name": "Ana" })), ["job_title"]);
        assert_eq!(changed(json!({ "phone": null, "email": "a@b", "nickname": null })), ["email", "phone"]);
        assert_eq!(changed(json!({ "social": { "x": "a" } })), [""; 0]);
        assert_eq!(changed(json!({ "social": { "y": "b" } })), ["social"]);
    }

    #[test]
    fn a_profile_keeps_its_values_out_of_debug_output() {
        let profile = Profile::from_instance(&json!({ "first_name": "Ana" }));
        assert_eq!(format!("{profile:?}"), "Profile(..)");
    }
}
