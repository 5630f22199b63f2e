//! JSON at the door: RFC 8259 text that is also I-JSON (RFC 7493), so that every reader of it sees the same document.
//!
//! Promise: what passes has unique names, none that Rust readers take for something else, no NUL, numbers that a double holds exactly
//! enough, and at most so many levels, usually [`MAX_DEPTH`]; what does not pass is named by JSON pointer (RFC 6901), all faults at once, and no value is repeated. What ends the reading
//! is named by line and column alone: text that is not JSON, and two things that are, a number that no double holds (`1e400`) and half of a
//! surrogate pair (`"\ud83d"`).
//! Not here, on purpose: what a document must contain. That is the profile schema's business.

use std::{cell::RefCell, fmt};

use serde::{
    Deserialize, Serialize,
    de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// Levels of nesting, the document itself being the first.
pub const MAX_DEPTH: usize = 32;
/// Faults named in one answer; a document with more has been described well enough.
pub const MAX_FAULTS: usize = 50;
/// Characters of each text in a fault, at most: fifty times a name of 64 KiB would be an answer of megabytes.
pub const LONGEST_TEXT: usize = 500;
/// What the names begin with by which serde_json marks values of its own. A Rust reader takes an object that has one for such a value:
/// reads another document, or none.
const RESERVED: &str = "$serde_json::private::";
/// 2^53 - 1: beyond it neighbours share a double, and JavaScript readers would see another number (RFC 7493, section 2.2).
const MAX_INTEGER: f64 = 9_007_199_254_740_991.0;

/// One thing wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Fault {
    /// Where, as a JSON pointer (RFC 6901) into the request body.
    #[schema(example = "/profile/birthday")]
    pub pointer: String,
    /// What, as a stable code.
    #[schema(example = "type")]
    pub code: String,
    /// What, for people.
    #[schema(example = "must be a string")]
    pub detail: String,
}

impl Fault {
    pub fn new(pointer: impl Into<String>, code: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), code: code.into(), detail: detail.into() }
    }

    /// The same with a bounded size: a place repeats names that somebody chose.
    #[must_use]
    pub fn bounded(self) -> Self {
        let Self { pointer, code, detail } = self;
        Self { pointer: cut(pointer), code: cut(code), detail: cut(detail) }
    }

    /// The same in a document in which what was looked at stands at `pointer`.
    #[must_use]
    pub fn below(self, pointer: &str) -> Self {
        Self { pointer: format!("{pointer}{}", self.pointer), ..self }
    }
}

/// The first [`LONGEST_TEXT`] characters; what is left out is told by `…`.
pub fn cut(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(LONGEST_TEXT) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Why a body is not a document we take.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Not JSON at all, or JSON that no Rust value holds; where the text stops making sense.
    Malformed { line: usize, column: usize },
    /// JSON, but with parts that some reader would misread.
    Faulty(Vec<Fault>),
}

/// Reads a document of at most [`MAX_DEPTH`] levels.
///
/// # Errors
/// [`Rejected`] when it is not JSON, or not I-JSON.
pub fn parse(text: &[u8]) -> Result<Value, Rejected> {
    parse_to(MAX_DEPTH, text)
}

/// Reads a document of at most `max_depth` levels.
///
/// # Errors
/// [`Rejected`] when it is not JSON, or not I-JSON.
pub fn parse_to(max_depth: usize, text: &[u8]) -> Result<Value, Rejected> {
    let faults = RefCell::new(Vec::new());
    let mut reader = serde_json::Deserializer::from_slice(text);
    let document = Node { faults: &faults, place: Place::Root, levels: max_depth }
        .deserialize(&mut reader)
        .and_then(|document| reader.end().map(|()| document))
        .map_err(|error| Rejected::Malformed { line: error.line(), column: error.column() })?;
    let faults = faults.into_inner();
    if faults.is_empty() { Ok(document) } else { Err(Rejected::Faulty(faults)) }
}

/// `pointer` one step further, escaped as RFC 6901 asks.
pub fn step(pointer: &str, name: &str) -> String {
    format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// Where a value stands. Written out only for who has to be told: most documents have no fault.
#[derive(Clone, Copy)]
enum Place<'a> {
    Root,
    Member(&'a Place<'a>, &'a str),
    Item(&'a Place<'a>, usize),
}

impl Place<'_> {
    fn pointer(&self) -> String {
        match self {
            Self::Root => String::new(),
            Self::Member(parent, name) => step(&parent.pointer(), name),
            Self::Item(parent, number) => format!("{}/{number}", parent.pointer()),
        }
    }
}

/// A value somewhere in the document: reads on after a fault, so that all of them are found.
struct Node<'a> {
    faults: &'a RefCell<Vec<Fault>>,
    place: Place<'a>,
    /// How many there may be, this one included.
    levels: usize,
}

impl Node<'_> {
    fn fault(&self, code: &str, detail: &str) {
        let mut faults = self.faults.borrow_mut();
        if faults.len() < MAX_FAULTS {
            faults.push(Fault::new(self.place.pointer(), code, detail));
        }
    }

    fn child<'a>(&'a self, place: Place<'a>) -> Node<'a> {
        Node { faults: self.faults, place, levels: self.levels.saturating_sub(1) }
    }

    fn too_deep(&self) -> bool {
        let too_deep = self.levels == 0;
        if too_deep {
            self.fault("too_deep", "nested deeper than 32 levels");
        }
        too_deep
    }

    fn check_text(&self, text: &str) {
        if text.contains('\0') {
            self.fault("nul_character", "contains the character U+0000, which Postgres cannot store");
        }
    }

    fn check_name(&self, name: &str) {
        self.check_text(name);
        if name.starts_with(RESERVED) {
            self.fault("reserved_name", "names that begin like this are read as something else in Rust");
        }
    }

    fn check_integer(&self, in_range: bool) {
        if !in_range {
            self.fault(
                "number_out_of_range",
                "an integer beyond 2^53 - 1 is read differently by different languages; send it as a string",
            );
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.check_integer(value.unsigned_abs() <= MAX_INTEGER as u64);
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.check_integer(value <= MAX_INTEGER as u64);
        Ok(value.into())
    }

    /// Also called for integers too large for 64 bits. `1.0` and `1` are one number and get one spelling, so that writing the
    /// other is no change.
    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        if value.fract() != 0.0 {
            return Ok(Number::from_f64(value).map_or(Value::Null, Value::Number));
        }
        self.check_integer(value.abs() <= MAX_INTEGER);
        Ok((value as i64).into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.check_text(value);
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        if self.too_deep() {
            while items.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        while let Some(item) = items.next_element_seed(self.child(Place::Item(&self.place, array.len())))? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        if self.too_deep() {
            while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        while let Some(name) = members.next_key::<String>()? {
            let child = self.child(Place::Member(&self.place, &name));
            child.check_name(&name);
            if object.contains_key(&name) {
                child.fault("duplicate_key", "this name occurs twice in its object");
            }
            let value = members.next_value_seed(child)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn faults(text: &str) -> Vec<(String, String)> {
        match parse(text.as_bytes()) {
            Err(Rejected::Faulty(faults)) => faults.into_iter().map(|fault| (fault.pointer, fault.code)).collect(),
            other => panic!("expected faults, got {other:?}"),
        }
    }

    #[test]
    fn a_plain_document_passes_unchanged() {
        let document = json!({ "a": [1, -2, 0.5, "x", true, null], "b": { "c~/": {} } });
        assert_eq!(parse(document.to_string().as_bytes()), Ok(document));
    }

    #[test]
    fn one_number_has_one_spelling() {
        assert_eq!(parse(b"[1.0, 1e2, -0.0]"), Ok(json!([1, 100, 0])));
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let text = r#"{"a":1,"a":2,"b/c":"\u0000","n":[9007199254740992,18446744073709551616,1e300]}"#;
        let code = |pointer: &str, code: &str| (pointer.to_owned(), code.to_owned());
        assert_eq!(
            faults(text),
            [
                code("/a", "duplicate_key"),
                code("/b~1c", "nul_character"),
                code("/n/0", "number_out_of_range"),
                code("/n/1", "number_out_of_range"),
                code("/n/2", "number_out_of_range"),
            ]
        );
    }

    /// serde_json itself reads them as JSON inside of a string, and fails where it is none.
    #[test]
    fn an_object_that_rust_would_misread_is_refused() {
        let raw = |text: &str| json!({ "a": { "$serde_json::private::RawValue": text } }).to_string();
        assert_ne!(serde_json::from_str::<Value>(&raw("1")).unwrap().to_string(), raw("1"));
        assert!(serde_json::from_str::<Value>(&raw("x")).is_err());
        for text in ["1", "x"] {
            let place = "/a/$serde_json::private::RawValue".to_owned();
            assert_eq!(faults(&raw(text)), [(place, "reserved_name".to_owned())]);
        }
    }

    #[test]
    fn nesting_has_a_bottom() {
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(parse(nested(MAX_DEPTH).as_bytes()).is_ok());
        assert_eq!(faults(&nested(MAX_DEPTH + 1)).len(), 1);
        // Far past any stack, and still an answer.
        assert!(parse(nested(100_000).as_bytes()).is_err());
    }

    #[test]
    fn what_is_not_json_says_where() {
        for text in [r#"{"a":}"#, "", "{} {}", r#""\ud800""#, "\u{feff}{}", "{'a':1}", "NaN"] {
            assert!(matches!(parse(text.as_bytes()), Err(Rejected::Malformed { .. })), "{text}");
        }
        assert!(matches!(parse(&[b'"', 0xff, b'"']), Err(Rejected::Malformed { .. })));
    }
}
