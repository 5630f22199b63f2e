//! A line of the file: one user. Pure.
//!
//! Promise: what is wrong with a line is told by place and rule, and no value of it is repeated.
//! Not here, on purpose: the deployment's schema. Only the service knows which one holds.

use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::{
    json::{self, Fault, MAX_FAULTS, Rejected, cut, step},
    users::ExternalId,
    web::{BODY_LIMIT_BYTES, Id},
};

/// A user as the line has it. No Debug: it holds values.
pub struct Person {
    pub id: Option<Uuid>,
    pub external_id: Option<String>,
    /// What is sent: the line without its id.
    pub body: Bytes,
}

impl Person {
    /// What alone says whom the line means.
    pub fn by_external_id(&self) -> Option<&str> {
        self.external_id.as_deref().filter(|_| self.id.is_none())
    }
}

/// Why a line was not taken, by us or by the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Of the answer; none when the line was not sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    pub code: String,
    pub detail: String,
    /// Names the request in the service's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Fault>,
}

impl Refused {
    /// One that was never sent.
    pub fn here(code: &str, detail: impl Into<String>, errors: Vec<Fault>) -> Self {
        Self { status: None, code: code.to_owned(), detail: detail.into(), request_id: None, errors }
    }

    /// The same in bounds: a place repeats names that the line chose, and an answer may hold anything.
    #[must_use]
    pub fn bounded(self) -> Self {
        let Self { status, code, detail, request_id, errors } = self;
        let errors = errors.into_iter().take(MAX_FAULTS).map(Fault::bounded).collect();
        Self { status, code: cut(code), detail: cut(detail), request_id: request_id.map(cut), errors }
    }
}

/// Reads a line.
///
/// # Errors
/// [`Refused`] when it is none that the service could take.
pub fn parse(text: &[u8]) -> Result<Person, Refused> {
    Ok(read(text)?.0)
}

/// The profile of a line, for those who check it without sending it.
///
/// # Errors
/// As [`parse`].
pub fn profile(text: &[u8]) -> Result<Map<String, Value>, Refused> {
    match read(text)?.1.remove("profile") {
        Some(Value::Object(profile)) => Ok(profile),
        _ => unreachable!("a line without a profile was refused"),
    }
}

/// The user, and the members of his body.
fn read(text: &[u8]) -> Result<(Person, Map<String, Value>), Refused> {
    let (id, members) = members(text)?;
    let external_id = members.get("external_id").and_then(Value::as_str).map(ToOwned::to_owned);
    let body = serde_json::to_vec(&members).expect("what was JSON is JSON");
    if body.len() > BODY_LIMIT_BYTES {
        // The service would hang up on it, which looks like an outage.
        let detail = format!("the user has more than {BODY_LIMIT_BYTES} bytes as JSON");
        return Err(Refused::here("payload_too_large", detail, vec![]));
    }
    Ok((Person { id, external_id, body: body.into() }, members))
}

/// The id, and the members of the body.
fn members(text: &[u8]) -> Result<(Option<Uuid>, Map<String, Value>), Refused> {
    let mut members = object(text)?;
    let id = members.remove("id");
    let mut faults: Vec<Fault> = members
        .keys()
        .filter(|name| !matches!(name.as_str(), "profile" | "external_id"))
        .map(|name| Fault::new(step("", name), "unknown_member", "a line has profile, id and external_id, no others"))
        .collect();
    match members.get("profile") {
        Some(Value::Object(_)) => {}
        Some(_) => faults.push(Fault::new("/profile", "type", "must be an object")),
        None => faults.push(Fault::new("/profile", "required", "must be present")),
    }
    match members.get("external_id") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => {
            let invalid = text.parse::<ExternalId>().err();
            faults.extend(invalid.map(|why| Fault::new("/external_id", why.code(), why.to_string())));
        }
        Some(_) => faults.push(Fault::new("/external_id", "type", "must be a string or null")),
    }
    let id = id.and_then(|id| {
        let id = id.as_str().and_then(Id::from_text);
        if id.is_none() {
            faults.push(Fault::new("/id", "format", "must be a UUID"));
        }
        id.map(|Id(id)| id)
    });
    if faults.is_empty() { Ok((id, members)) } else { Err(places("body_invalid", faults)) }
}

fn object(text: &[u8]) -> Result<Map<String, Value>, Refused> {
    match json::parse(text) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err(places("body_invalid", vec![Fault::new("", "type", "must be an object")])),
        Err(Rejected::Malformed { column, .. }) => {
            Err(Refused::here("malformed_json", format!("not JSON: see column {column}"), vec![]))
        }
        Err(Rejected::Faulty(faults)) => Err(places("unacceptable_json", faults)),
    }
}

fn places(code: &str, faults: Vec<Fault>) -> Refused {
    Refused::here(code, "the line cannot be taken, see errors", faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::LONGEST_TEXT;

    fn places(text: &str) -> Vec<String> {
        let refused = parse(text.as_bytes()).err().unwrap();
        refused.errors.iter().map(|fault| format!("{} {}", fault.pointer, fault.code)).collect()
    }

    #[test]
    fn a_line_is_sent_without_its_id() {
        let line = br#" {"id":"0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a","external_id":"E7","profile":{"a":"\u00e9"}} "#;
        let person = parse(line).unwrap();
        assert_eq!(person.id.unwrap().to_string(), "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a");
        assert_eq!(person.external_id.as_deref(), Some("E7"));
        assert_eq!(person.body, r#"{"external_id":"E7","profile":{"a":"é"}}"#);
    }

    #[test]
    fn what_is_wrong_is_named_all_at_once() {
        assert_eq!(
            places(r#"{"id":7,"external_id":7,"name":"Ana","profile":[]}"#),
            ["/name unknown_member", "/profile type", "/external_id type", "/id format"]
        );
        assert_eq!(places(r#"{"id":"00000000-0000-0000-0000-000000000000"}"#), ["/profile required", "/id format"]);
        assert_eq!(places(r#"{"profile":{"a":1,"a":2}}"#), ["/profile/a duplicate_key"]);
        assert_eq!(places("[]"), [" type"]);
        assert_eq!(places(r#"{"external_id":"","profile":{}}"#), ["/external_id length"]);
        for wrong in ["{", "Ana", "{} {}", "{'profile':{}}"] {
            assert_eq!(parse(wrong.as_bytes()).err().unwrap().code, "malformed_json", "{wrong}");
        }
        assert_eq!(parse(b"{\"profile\":{\"a\":\"\xff\"}}").err().unwrap().code, "malformed_json");
    }

    #[test]
    fn what_is_kept_of_a_refusal_is_bounded() {
        let endless = || "\u{1}".repeat(100_000);
        let faults = vec![Fault::new(endless(), endless(), endless()); 1_000];
        let mut refused = Refused::here(&endless(), endless(), faults);
        refused.request_id = Some(endless());
        let text = serde_json::to_vec(&refused.bounded()).unwrap();
        assert!(text.len() < 512 * 1024, "{}", text.len());
        let short = Refused::here("body_invalid", "é".repeat(LONGEST_TEXT), vec![Fault::new("/a", "type", "no")]);
        assert_eq!(short.clone().bounded(), short);
    }
}
