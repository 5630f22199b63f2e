//! What must hold for any input, however it came about: the fuzz targets look for one that breaks it, and the test chapter `fuzzed` holds
//! the committed seeds against it.
//!
//! Promise: a property says more than "no panic": what is read is written back as it was, or compared with a plain definition of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::{extract::FromRequestParts, http::Request};
use futures_util::FutureExt;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use tidings::{
    clients::Key,
    feed, json,
    profile::{self, Schema},
    web::{self, IdempotencyKey, Precondition, ReadCondition},
};
use tidings_sdk::{
    envelope::{FieldName, Notice},
    letter::Letter,
};

pub type Property = fn(&[u8]);

/// Every property by the name of its target and of its folder of seeds.
pub const ALL: [(&str, Property); 7] = [
    ("notice", notice),
    ("letter", letter),
    ("merge_patch", merge_patch),
    ("cursor", cursor),
    ("key", key),
    ("conditions", conditions),
    ("document", document),
];

/// The lines of an input. Text, so that a seed can be read and written by people.
fn lines<const N: usize>(input: &[u8]) -> Option<[&[u8]; N]> {
    input.splitn(N, |byte| *byte == b'\n').collect::<Vec<_>>().try_into().ok()
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).into_owned()
}

/// `l7` is a long integer, `s7` a string and so on: every type of AMQP that a header may have.
fn amqp(line: &[u8]) -> AMQPValue {
    let line = text(line);
    let (kind, rest) = line.split_at_checked(1).unwrap_or(("s", &line));
    let number: i64 = rest.parse().unwrap_or_default();
    match kind {
        "l" => AMQPValue::LongLongInt(number),
        "i" => AMQPValue::LongInt(number as i32),
        "I" => AMQPValue::LongUInt(number as u32),
        "h" => AMQPValue::ShortInt(number as i16),
        "H" => AMQPValue::ShortUInt(number as u16),
        "b" => AMQPValue::ShortShortInt(number as i8),
        "B" => AMQPValue::ShortShortUInt(number as u8),
        "t" => AMQPValue::Boolean(number % 2 == 1),
        "d" => AMQPValue::Double(number as f64),
        "T" => AMQPValue::Timestamp(number as u64),
        "v" => AMQPValue::Void,
        "F" => AMQPValue::FieldTable(BTreeMap::from([("x".into(), AMQPValue::LongLongInt(number))]).into()),
        "A" => AMQPValue::FieldArray(vec![AMQPValue::LongLongInt(number)].into()),
        _ => AMQPValue::LongString(rest.into()),
    }
}

/// A message that is read as a notice is written as the same notice.
pub fn notice(input: &[u8]) {
    let Some([kind, id, version, time, trace, timestamp, body]) = lines(input) else { return };
    // Cut as text: a byte that is none becomes three.
    let short = |line: &[u8]| {
        let mut text = text(line);
        text.truncate(text.floor_char_boundary(255));
        text
    };
    let mut headers = FieldTable::default();
    for (name, line) in [("version", version), ("cloudEvents_time", time), ("traceparent", trace)] {
        if !line.is_empty() {
            headers.insert(name.into(), amqp(line));
        }
    }
    let mut properties = BasicProperties::default().with_headers(headers);
    if !kind.is_empty() {
        properties = properties.with_type(short(kind).into());
    }
    if !id.is_empty() {
        properties = properties.with_message_id(short(id).into());
    }
    if let Ok(seconds) = text(timestamp).parse() {
        properties = properties.with_timestamp(seconds);
    }
    let Ok(read) = Notice::from_message(&properties, body) else { return };
    assert!(read.version > 0);
    let (properties, body) = read.to_message("urn:tidings:fuzz");
    let again = Notice::from_message(&properties, &body).expect("what we write we can read");
    assert_eq!(again, read);
    assert_eq!(again.to_message("urn:tidings:fuzz").1, body);
}

/// What a dead letter says of itself is read back as it was written, over whatever was there.
pub fn letter(input: &[u8]) {
    let Some([attempts, reason, failed_at, death]) = lines(input) else { return };
    let mut headers = FieldTable::default();
    let names = ["tidings-attempts", "tidings-reason", "tidings-failed-at", "x-first-death-reason"];
    for (name, line) in names.into_iter().zip([attempts, reason, failed_at, death]) {
        if !line.is_empty() {
            headers.insert(name.into(), amqp(line));
        }
    }
    let Some(read) = Letter::read(Some(&headers)) else { return };
    read.write(&mut headers);
    let again = Letter::read(Some(&headers)).expect("what we write we can read");
    assert_eq!((again.reason, again.attempts), (read.reason, read.attempts.min(i32::MAX as u32)));
    // A time that is none leaves the one before.
    assert!(read.failed_at.is_none() || again.failed_at == read.failed_at);
}

/// Merging is what RFC 7396 defines, and the changed fields are those that differ.
pub fn merge_patch(input: &[u8]) {
    let Some([before, patch]) = lines(input) else { return };
    let (Some(before), Some(patch)) = (object(before), object(patch)) else { return };
    let mut after = before.clone();
    let changed = profile::amend(&mut after, &patch);
    assert_eq!(Value::Object(after.clone()), defined(Value::Object(before.clone()), &Value::Object(patch.clone())));
    assert_eq!(changed, profile::changed_fields(&before, &after));
    let named = |name: &&String| name.parse::<FieldName>().is_ok();
    let differing: BTreeSet<&String> =
        before.keys().chain(after.keys()).filter(named).filter(|name| before.get(*name) != after.get(*name)).collect();
    assert_eq!(changed.iter().map(FieldName::as_str).collect::<Vec<_>>(), differing.into_iter().collect::<Vec<_>>());
    assert_eq!(profile::amend(&mut after, &patch), [], "the same patch again changes nothing");
}

fn object(text: &[u8]) -> Option<Map<String, Value>> {
    match json::parse(text) {
        Ok(Value::Object(members)) => Some(members),
        _ => None,
    }
}

/// `MergePatch` as RFC 7396, section 2 spells it.
fn defined(target: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut target = match target {
        Value::Object(target) => target,
        _ => Map::new(),
    };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            let old = target.remove(name).unwrap_or(Value::Null);
            target.insert(name.clone(), defined(old, value));
        }
    }
    Value::Object(target)
}

/// What is taken for a cursor, an id or a duration is written as it was sent: there is one spelling of each.
pub fn cursor(input: &[u8]) {
    let Ok(sent) = str::from_utf8(input) else { return };
    if let Ok(last) = web::read_cursor(sent) {
        assert_eq!(web::cursor(last), sent);
    }
    if let Some(place) = feed::Cursor::from_text(sent) {
        assert_eq!(place.to_text(), sent);
        assert!(place.place.xid >= 0);
    }
    if let Some(web::Id(id)) = web::Id::from_text(sent) {
        assert_eq!(id.to_string(), sent.to_ascii_lowercase());
    }
    if let Ok(time) = tidings::config::duration(sent) {
        assert!(time >= Duration::from_secs(1));
    }
}

/// What is taken for a key has the one form of a key, and shows nothing of its secret.
pub fn key(input: &[u8]) {
    let Ok(sent) = str::from_utf8(input) else { return };
    let Ok(key) = sent.parse::<Key>() else { return };
    let parts: Vec<&str> = sent.split('_').collect();
    assert_eq!((parts.len(), parts[0], parts[1]), (3, "tdg", key.id.as_str()));
    let is_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    assert!(parts[1].len() == 16 && parts[2].len() == 64 && is_hex(parts[1]) && is_hex(parts[2]));
    assert!(Key::is_meant(sent));
    // The id is for everybody, and may by chance be a part of the secret.
    let shown = format!("{key:?} {:?}", key.id).replace(parts[1], "");
    assert!(!shown.contains(&parts[2][..16]) && !shown.contains(&parts[2][48..]));
}

/// Whatever stands in `If-Match`, `If-None-Match` and `Idempotency-Key`: a key is taken out of its header, versions that are taken from it stand in it, and a list of our own tags is read as
/// it was written.
pub fn conditions(input: &[u8]) {
    let Some([if_match, if_none_match, idempotency_key]) = lines(input) else { return };
    let mut request = Request::builder();
    let headers = [("if-match", if_match), ("if-none-match", if_none_match), ("idempotency-key", idempotency_key)];
    for (name, line) in headers {
        if !line.is_empty() {
            request = request.header(name, line);
        }
    }
    let Ok(request) = request.body(()) else { return };
    let (mut parts, ()) = request.into_parts();
    let precondition = Precondition::from_request_parts(&mut parts, &()).now_or_never().expect("it waits for nothing");
    let held = ReadCondition::from_request_parts(&mut parts, &()).now_or_never().expect("it waits for nothing");
    assert!(held.is_err() || !if_none_match.is_empty() || !held.is_ok_and(|held| held.holds(1, None)));
    let key = IdempotencyKey::from_request_parts(&mut parts, &()).now_or_never().expect("it waits for nothing");
    if let Ok(IdempotencyKey(Some(key))) = key {
        assert!(text(idempotency_key).contains(&key) && (1..=255).contains(&key.len()));
    }
    let Ok(precondition) = precondition else { return };
    match &precondition {
        Precondition::None => assert!(precondition.allows(None) && precondition.allows(Some(1))),
        Precondition::Exists => assert!(!precondition.allows(None) && precondition.allows(Some(1))),
        Precondition::Absent => assert!(precondition.allows(None) && !precondition.allows(Some(1))),
        Precondition::VersionIn(versions) => {
            assert!(!precondition.allows(None));
            let tags: Vec<String> = versions.iter().map(|version| format!("\"{version}\"")).collect();
            // What its client sees may stand behind a version.
            let stands =
                |version: &i64| ["\"", "-"].iter().any(|end| text(if_match).contains(&format!("\"{version}{end}")));
            assert!(versions.iter().all(stands), "{tags:?}");
            if !tags.is_empty() {
                let request =
                    Request::builder().header("if-match", tags.join(", ")).body(()).expect("digits and quotes");
                let (mut parts, ()) = request.into_parts();
                let again = Precondition::from_request_parts(&mut parts, &()).now_or_never();
                assert_eq!(again.and_then(Result::ok), Some(precondition));
            }
        }
    }
}

/// A document that passes the door is one document: what is written of it is read as the same. What is refused is not repeated.
pub fn document(input: &[u8]) {
    let document = match json::parse(input) {
        Ok(document) => document,
        Err(json::Rejected::Malformed { line, .. }) => return assert!(line <= input.len() + 1),
        Err(json::Rejected::Faulty(faults)) => {
            assert!((1..=50).contains(&faults.len()) && serde_json::from_slice::<IgnoredAny>(input).is_ok());
            return;
        }
    };
    let written = serde_json::to_vec(&document).expect("a document is JSON");
    assert_eq!(json::parse(&written).as_ref(), Ok(&document));
    assert!(depth(&document) <= json::MAX_DEPTH && !holds_nul(&document));
    let Value::Object(fields) = document else { return };
    match schema().admit(fields.clone()) {
        Ok(kept) => assert_eq!(kept.fields(), fields),
        Err(faults) => {
            let told: String = faults.iter().map(|fault| format!("{} {}\n", fault.code, fault.detail)).collect();
            assert!(!told.contains(CANARY), "a value is repeated in {told}");
        }
    }
}

fn schema() -> &'static Schema {
    static SCHEMA: std::sync::OnceLock<Schema> = std::sync::OnceLock::new();
    SCHEMA.get_or_init(|| Schema::load(None).expect("the built-in schema is one"))
}

/// Seeds have it as a value; no word of ours contains it.
const CANARY: &str = "canary";

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(holds_nul),
        Value::Object(members) => members.iter().any(|(name, member)| name.contains('\0') || holds_nul(member)),
        _ => false,
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or_default(),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or_default(),
        _ => 1,
    }
}
