//! Request bodies of the master data: `{"external_id": .., "profile": {..}}`, whole, as a patch, or many of them.
//!
//! Promise: every fault has its place, and no value is repeated.
//! Not here, on purpose: the profile's schema. A profile is judged once it is known what it comes to.

use std::collections::HashSet;

use axum::extract::{FromRequest, Request};
use serde_json::{Map, Value};

use super::{ExternalId, UserId, change::Naming};
use crate::{
    json::{Fault, step},
    profile::{EXTERNAL_ID, Fields},
    web::{self, Id, Precondition, Problem, body_invalid},
};

const PROFILE: &str = "profile";
const USERS: &str = "users";
const ID: &str = "id";
const IF_VERSION: &str = "if_version";

/// What there may be beside each other.
const BODY: &str = "a body has the members \"external_id\" and \"profile\" and no other";
const ENTRY: &str = "an entry has the members \"id\", \"if_version\", \"external_id\" and \"profile\" and no other";

/// Users in one request.
pub const MAX_ENTRIES: usize = 500;
/// For all of them: a thousand bytes each, and room for the largest there is.
pub const ENTRIES_LIMIT_BYTES: usize = 512 * 1024;
/// The body and its list, in which an entry is what alone would be a body.
const LEVELS_AROUND_ENTRY: usize = 2;
type Entries = web::Document<ENTRIES_LIMIT_BYTES, LEVELS_AROUND_ENTRY>;

// None of these has a Debug: what holds values must not find its way into a log.

/// A whole profile, in an `application/json` body.
pub struct Document {
    pub profile: Fields,
    pub external_id: Naming,
}

/// A patch, in an `application/merge-patch+json` body (RFC 7396). One that names the user alone needs no profile.
pub struct Patch {
    pub profile: Fields,
    pub external_id: Naming,
}

/// Many whole profiles, in an `application/json` body: `{"users": [{"id": .., "if_version": .., "external_id": .., "profile": {..}}, ..]}`.
pub struct Documents(pub Vec<Entry>);

/// One of many: what is asked for one user.
pub struct Entry {
    pub id: UserId,
    pub condition: Precondition,
    pub document: Document,
}

impl web::Refuses for Document {
    fn codes() -> Vec<web::Code> {
        <web::Document>::codes()
    }
}

impl web::Refuses for Patch {
    fn codes() -> Vec<web::Code> {
        web::MergePatch::codes()
    }
}

impl web::Refuses for Documents {
    fn codes() -> Vec<web::Code> {
        Entries::codes()
    }
}

impl<S: Send + Sync> FromRequest<S> for Document {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let web::Document(members) = <web::Document>::from_request(request, state).await?;
        whole(members, BODY).map_err(body_invalid)
    }
}

impl<S: Send + Sync> FromRequest<S> for Patch {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let web::MergePatch(members) = web::MergePatch::from_request(request, state).await?;
        let (profile, external_id) = read(members, BODY, |naming| *naming == Naming::Stays).map_err(body_invalid)?;
        Ok(Self { profile, external_id })
    }
}

impl<S: Send + Sync> FromRequest<S> for Documents {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let web::Document(members) = Entries::from_request(request, state).await?;
        Ok(Self(entries(members).map_err(body_invalid)?))
    }
}

/// What is asked for each user; or all that is wrong with the list.
fn entries(mut members: Map<String, Value>) -> Result<Vec<Entry>, Vec<Fault>> {
    const OTHER: &str = "a body has the member \"users\" and no other";
    let users = members.remove(USERS);
    let mut faults: Vec<_> = members.keys().map(|name| Fault::new(step("", name), "unknown_member", OTHER)).collect();
    let users = match users {
        Some(Value::Array(users)) if (1..=MAX_ENTRIES).contains(&users.len()) => Ok(users),
        Some(Value::Array(_)) => Err(("length", format!("must be 1 to {MAX_ENTRIES} users"))),
        Some(_) => Err(("type", "must be an array".to_owned())),
        None => Err(("required", "must be present".to_owned())),
    };
    let users = users.unwrap_or_else(|(code, detail)| {
        faults.push(Fault::new(step("", USERS), code, detail));
        vec![]
    });
    let (mut entries, mut mentioned) = (vec![], HashSet::new());
    for (place, user) in users.into_iter().enumerate() {
        let entry = entry(user).and_then(|entry| match mentioned.insert(entry.id) {
            true => Ok(entry),
            false => Err(vec![Fault::new(step("", ID), "duplicate", "is that of an earlier entry")]),
        });
        match entry {
            Ok(entry) => entries.push(entry),
            Err(wrong) => faults.extend(wrong.into_iter().map(|fault| fault.below(&format!("/{USERS}/{place}")))),
        }
    }
    if faults.is_empty() { Ok(entries) } else { Err(faults) }
}

fn entry(user: Value) -> Result<Entry, Vec<Fault>> {
    let Value::Object(mut members) = user else {
        return Err(vec![Fault::new("", "type", "must be an object")]);
    };
    let mut faults = vec![];
    let id = members.remove(ID).ok_or(("required", "must be present"));
    let id = id.and_then(|id| id.as_str().and_then(Id::from_text).ok_or(("format", "must be a UUID")));
    let id = id.map_err(|(code, detail)| faults.push(Fault::new(step("", ID), code, detail)));
    let condition = match members.remove(IF_VERSION).map(|version| version.as_i64()) {
        None => Precondition::None,
        Some(Some(0)) => Precondition::Absent,
        Some(Some(version)) if version > 0 => Precondition::VersionIn(vec![version]),
        Some(_) => {
            faults.push(Fault::new(
                step("", IF_VERSION),
                "type",
                "must be a version, or 0 for a user who is not there",
            ));
            Precondition::None
        }
    };
    match (id, whole(members, ENTRY)) {
        (Ok(Id(id)), Ok(document)) if faults.is_empty() => Ok(Entry { id: UserId(id), condition, document }),
        (_, document) => {
            faults.extend(document.err().into_iter().flatten());
            Err(faults)
        }
    }
}

fn whole(members: Map<String, Value>, known: &str) -> Result<Document, Vec<Fault>> {
    let (profile, external_id) = read(members, known, |_| true)?;
    Ok(Document { profile, external_id })
}

/// What the members of a body say, and nothing but what we know, which is told to who sends others; or all that is wrong with them.
fn read(
    mut members: Map<String, Value>,
    known: &str,
    needs_profile: fn(&Naming) -> bool,
) -> Result<(Fields, Naming), Vec<Fault>> {
    let (profile, external_id) = (members.remove(PROFILE), members.remove(EXTERNAL_ID));
    let mut faults: Vec<Fault> =
        members.keys().map(|name| Fault::new(step("", name), "unknown_member", known)).collect();
    let naming = naming(external_id).unwrap_or_else(|fault| {
        faults.push(fault);
        Naming::Stays
    });
    let profile = match profile {
        Some(Value::Object(profile)) => profile,
        None if !needs_profile(&naming) => Fields::new(),
        other => {
            let (code, detail) =
                if other.is_none() { ("required", "must be present") } else { ("type", "must be an object") };
            faults.push(Fault::new(step("", PROFILE), code, detail));
            Fields::new()
        }
    };
    if faults.is_empty() { Ok((profile, naming)) } else { Err(faults) }
}

fn naming(said: Option<Value>) -> Result<Naming, Fault> {
    let fault = |code: &str, detail: String| Fault::new(step("", EXTERNAL_ID), code, detail);
    match said {
        None => Ok(Naming::Stays),
        Some(Value::Null) => Ok(Naming::Goes),
        Some(Value::String(text)) => match text.parse::<ExternalId>() {
            Ok(external_id) => Ok(Naming::Is(external_id)),
            Err(invalid) => Err(fault(invalid.code(), invalid.to_string())),
        },
        Some(_) => Err(fault("type", "must be a string or null".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn faults(body: &Value, needs_profile: fn(&Naming) -> bool) -> Vec<(String, String)> {
        let faults = read(body.as_object().unwrap().clone(), BODY, needs_profile).err().unwrap_or_default();
        faults.into_iter().map(|fault| (fault.pointer, fault.code)).collect()
    }

    fn fault(pointer: &str, code: &str) -> (String, String) {
        (pointer.to_owned(), code.to_owned())
    }

    #[test]
    fn a_body_is_a_profile_with_or_without_a_name_and_nothing_else() {
        let whole = |body| faults(&body, |_| true);
        for right in [json!({"profile": {}}), json!({"profile": {}, "external_id": "E"})] {
            assert_eq!(whole(right), []);
        }
        assert_eq!(whole(json!({})), [fault("/profile", "required")]);
        assert_eq!(
            whole(json!({"profile": null, "external_id": 7})),
            [fault("/external_id", "type"), fault("/profile", "type")]
        );
        assert_eq!(
            whole(json!({"profile": {}, "version": 3, "external_id": ""})),
            [fault("/version", "unknown_member"), fault("/external_id", "length")]
        );
        let patch = |body| faults(&body, |naming| *naming == Naming::Stays);
        assert_eq!(patch(json!({"external_id": null})), []);
        assert_eq!(patch(json!({})), [fault("/profile", "required")]);
    }
}
