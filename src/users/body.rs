//! Request bodies of the master data: `{"external_id": .., "profile": {..}}`, whole or as a patch.
//!
//! Promise: every fault has its place, and no value is repeated.
//! Not here, on purpose: the profile's schema. A profile is judged once it is known what it comes to.

use axum::extract::{FromRequest, Request};
use serde_json::{Map, Value};

use super::{ExternalId, change::Naming};
use crate::{
    json::{Fault, step},
    profile::{EXTERNAL_ID, Fields},
    web::{self, Problem, body_invalid},
};

const PROFILE: &str = "profile";

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

impl web::Refuses for Document {
    fn codes() -> Vec<web::Code> {
        web::Document::codes()
    }
}

impl web::Refuses for Patch {
    fn codes() -> Vec<web::Code> {
        web::MergePatch::codes()
    }
}

impl<S: Send + Sync> FromRequest<S> for Document {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let web::Document(members) = web::Document::from_request(request, state).await?;
        let (profile, external_id) = read(members, |_| true).map_err(body_invalid)?;
        Ok(Self { profile, external_id })
    }
}

impl<S: Send + Sync> FromRequest<S> for Patch {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let web::MergePatch(members) = web::MergePatch::from_request(request, state).await?;
        let (profile, external_id) = read(members, |naming| *naming == Naming::Stays).map_err(body_invalid)?;
        Ok(Self { profile, external_id })
    }
}

/// What the members of a body say, and nothing but what we know; or all that is wrong with them.
fn read(mut members: Map<String, Value>, needs_profile: fn(&Naming) -> bool) -> Result<(Fields, Naming), Vec<Fault>> {
    let (profile, external_id) = (members.remove(PROFILE), members.remove(EXTERNAL_ID));
    let unknown = "a body has the members \"external_id\" and \"profile\" and no other";
    let mut faults: Vec<Fault> =
        members.keys().map(|name| Fault::new(step("", name), "unknown_member", unknown)).collect();
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
        let faults = read(body.as_object().unwrap().clone(), needs_profile).err().unwrap_or_default();
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
