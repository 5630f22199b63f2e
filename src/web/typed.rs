//! From a JSON document to a type, with the place of each fault when it does not fit.
//!
//! Promise: faults are named by JSON pointer (RFC 6901), up to ten at once, and no value is repeated: serde's own words would quote it, and
//! speak of Rust. Serde ends at the first fault; so it reads once more, with something that fits in that place, until it finds none.
//! Not here, on purpose: what a value has to say beyond its type.

use std::{
    collections::HashSet,
    fmt::{self, Display},
};

use serde::{
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess, SeqAccess,
        Unexpected, Visitor, value::StrDeserializer,
    },
    forward_to_deserialize_any,
};
use serde_json::{Map, Value};

use crate::json::{Fault, step};

/// Faults of one document. Each costs another reading of it.
const MAX_FAULTS: usize = 10;

/// Reads `document` as a `T`.
///
/// # Errors
/// Every [`Fault`] when it is none, or the first [`MAX_FAULTS`].
pub fn typed<T: DeserializeOwned>(document: &Value) -> Result<T, Vec<Fault>> {
    let (mut faults, mut named) = (vec![], HashSet::new());
    loop {
        let read = T::deserialize(Node::new(Some(document), String::new(), &named));
        match read {
            Ok(read) if faults.is_empty() => return Ok(read),
            // What is named once more is of a type that nothing stands in for.
            Err(Misfit(fault)) if faults.len() < MAX_FAULTS && named.insert(fault.pointer.clone()) => {
                faults.push(fault);
            }
            _ => return Err(faults),
        }
    }
}

/// A value of the document, and where it stands.
struct Node<'a> {
    /// `None` where a fault is named: something of the type that is expected stands in for it, so that the others are found.
    value: Option<&'a Value>,
    /// Written out once a fault is named: most documents have none.
    pointer: String,
    /// Where faults are.
    named: &'a HashSet<String>,
}

impl<'a> Node<'a> {
    fn new(value: Option<&'a Value>, pointer: String, named: &'a HashSet<String>) -> Self {
        let value = value.filter(|_| !named.contains(&pointer));
        Self { value, pointer, named }
    }

    fn child(&self, value: Option<&'a Value>, pointer: impl FnOnce(&str) -> String) -> Self {
        let pointer = if self.named.is_empty() { String::new() } else { pointer(&self.pointer) };
        Self::new(value, pointer, self.named)
    }

    /// The members of an object of these fields: without those that are named as unknown, and with those that are named as missing.
    fn members(&self, object: &'a Map<String, Value>, fields: &[&'a str]) -> Members<'a> {
        let member = |name: &'a str, value| (name, self.child(value, |parent| step(parent, name)));
        let there = object.iter().map(|(name, value)| member(name.as_str(), Some(value)));
        let there = there.filter(|(name, node)| node.value.is_some() || fields.contains(name));
        let absent = fields.iter().filter(|name| !object.contains_key(**name)).map(|&name| member(name, None));
        let absent = absent.filter(|(_, node)| self.named.contains(&node.pointer));
        let members: Vec<_> = there.chain(absent).collect();
        Members { members: members.into_iter(), current: None }
    }
}

/// A fault on its way up: each level puts its own step before the pointer.
#[derive(Debug)]
struct Misfit(Fault);

impl Misfit {
    fn below(self, name: &str) -> Self {
        Self(self.0.below(&step("", name)))
    }
}

impl Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl std::error::Error for Misfit {}

impl Error for Misfit {
    fn custom<T: Display>(_words: T) -> Self {
        Self(Fault::new("", "value", "is not a value that can be taken here"))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(Fault::new("", "type", must_be(expected)))
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(Fault::new("", "value", must_be(expected)))
    }

    fn invalid_length(_: usize, expected: &dyn Expected) -> Self {
        Self(Fault::new("", "length", must_be(expected)))
    }

    fn unknown_variant(_: &str, expected: &'static [&'static str]) -> Self {
        Self(Fault::new("", "value", format!("must be one of {}", expected.join(", "))))
    }

    fn unknown_field(name: &str, expected: &'static [&'static str]) -> Self {
        Self(Fault::new(step("", name), "unknown_member", format!("the members are {}", expected.join(", "))))
    }

    fn missing_field(name: &'static str) -> Self {
        Self(Fault::new(step("", name), "required", "must be present"))
    }
}

/// What serde expects, in words of JSON. Numbers of a type of ours are `i64` or `u64`: no integer that passed `json` is beyond these, so
/// that a narrower range is the feature's to tell.
fn must_be(expected: &dyn Expected) -> String {
    let expected = expected.to_string();
    let words = match &*expected {
        "u64" => "a whole number from 0",
        "i64" => "a whole number",
        "a sequence" => "an array",
        "a boolean" => "true or false",
        structure if structure.starts_with("struct ") => "an object",
        other => other,
    };
    format!("must be {words}")
}

impl<'de> Deserializer<'de> for Node<'_> {
    type Error = Misfit;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.value {
            None | Some(Value::Null) => visitor.visit_unit(),
            Some(Value::Bool(value)) => visitor.visit_bool(*value),
            Some(Value::Number(number)) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), ..) => visitor.visit_u64(number),
                (None, Some(number), _) => visitor.visit_i64(number),
                (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
            },
            Some(Value::String(text)) => visitor.visit_str(text),
            Some(Value::Array(items)) => visitor.visit_seq(Items { array: &self, items: items.iter(), place: 0 }),
            Some(Value::Object(object)) => visitor.visit_map(self.members(object, &[])),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.value {
            None | Some(Value::Null) => visitor.visit_none(),
            Some(_) => visitor.visit_some(self),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.value {
            None => visitor.visit_str(""),
            Some(_) => self.deserialize_any(visitor),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.value {
            None => visitor.visit_seq(Items { array: &self, items: [].iter(), place: 0 }),
            Some(_) => self.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        match self.value {
            Some(Value::Object(object)) => visitor.visit_map(self.members(object, fields)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Misfit> {
        visitor.visit_newtype_struct(self)
    }

    /// Enums are names here; one with contents is tagged by a member and does not come this way.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        match self.value {
            Some(Value::String(name)) => {
                let name: StrDeserializer<'_, Misfit> = name.as_str().into_deserializer();
                visitor.visit_enum(name)
            }
            _ => Err(Misfit::invalid_type(Unexpected::Other("no name"), &"a string")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str bytes byte_buf unit unit_struct tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items<'a> {
    array: &'a Node<'a>,
    items: std::slice::Iter<'a, Value>,
    place: usize,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Misfit;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Misfit> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let place = self.place;
        self.place += 1;
        let item = self.array.child(Some(item), |parent| format!("{parent}/{place}"));
        seed.deserialize(item).map(Some).map_err(|misfit| misfit.below(&place.to_string()))
    }
}

struct Members<'a> {
    members: std::vec::IntoIter<(&'a str, Node<'a>)>,
    current: Option<(&'a str, Node<'a>)>,
}

impl<'de> MapAccess<'de> for Members<'_> {
    type Error = Misfit;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Misfit> {
        self.current = self.members.next();
        let Some(&(name, _)) = self.current.as_ref() else { return Ok(None) };
        let name: StrDeserializer<'_, Misfit> = name.into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Misfit> {
        let (name, value) = self.current.take().expect("serde asks for a key before its value");
        seed.deserialize(value).map_err(|misfit| misfit.below(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Order {
        names: Vec<String>,
        size: Option<u64>,
        place: Option<i64>,
        is_gift: Option<bool>,
        colour: Option<Colour>,
        inner: Option<Box<Order>>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Colour {
        Red,
    }

    #[test]
    fn a_document_that_fits_is_taken() {
        let (names, colour) = (vec!["a".into()], Some(Colour::Red));
        let order = Order { names, size: Some(7), place: None, is_gift: None, colour, inner: None };
        let document = json!({ "names": ["a"], "size": 7, "colour": "red", "inner": null });
        assert_eq!(typed::<Order>(&document), Ok(order));
    }

    fn places(document: &Value) -> Vec<(String, String)> {
        let faults = typed::<Order>(document).unwrap_err();
        let mut places: Vec<_> = faults.into_iter().map(|fault| (fault.pointer, fault.code)).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let inner = json!({ "names": 1, "b": 0, "inner": {} });
        let document = json!({
            "names": ["a", 7, true], "size": "x", "place": 1, "is_gift": "x", "colour": "blue", "inner": inner, "a/b": 1, "c": [2],
        });
        let expected = [
            ("/a~1b", "unknown_member"),
            ("/c", "unknown_member"),
            ("/colour", "value"),
            ("/inner/b", "unknown_member"),
            ("/inner/inner/names", "required"),
            ("/inner/names", "type"),
            ("/is_gift", "type"),
            ("/names/1", "type"),
            ("/names/2", "type"),
            ("/size", "type"),
        ];
        assert_eq!(places(&document), expected.map(|(pointer, code)| (pointer.to_owned(), code.to_owned())));
        let unknown: Map<String, Value> = (0..3 * MAX_FAULTS).map(|n| (format!("f{n}"), json!(n))).collect();
        assert_eq!(places(&unknown.into()).len(), MAX_FAULTS);
    }

    #[test]
    fn a_fault_has_its_place_and_no_value() {
        for (document, pointer, code, detail) in [
            (json!({}), "/names", "required", "must be present"),
            (json!([]), "", "length", "must be an object"),
            (json!("canary"), "", "type", "must be an object"),
            (json!({ "names": "canary" }), "/names", "type", "must be an array"),
            (json!({ "names": ["a", 7] }), "/names/1", "type", "must be a string"),
            (json!({ "names": [], "size": -1 }), "/size", "value", "must be a whole number from 0"),
            (json!({ "names": [], "size": "canary" }), "/size", "type", "must be a whole number from 0"),
            (json!({ "names": [], "place": 0.5 }), "/place", "type", "must be a whole number"),
            (json!({ "names": [], "is_gift": 1 }), "/is_gift", "type", "must be true or false"),
            (json!({ "names": [], "colour": "canary" }), "/colour", "value", "must be one of red"),
            (json!({ "names": [], "colour": 7 }), "/colour", "type", "must be a string"),
            (json!({ "names": [], "inner": { "names": "canary" } }), "/inner/names", "type", "must be an array"),
            (
                json!({ "names": [], "a/canary": 1 }),
                "/a~1canary",
                "unknown_member",
                "the members are names, size, place, is_gift, colour, inner",
            ),
        ] {
            let faults = typed::<Order>(&document).unwrap_err();
            assert_eq!(faults, [Fault::new(pointer, code, detail)], "{document}");
        }
    }
}
