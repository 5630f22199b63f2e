//! From a JSON document to a type, with the place of the fault when it does not fit.
//!
//! Promise: a fault is named by JSON pointer (RFC 6901), and no value is repeated: serde's own words would quote it, and speak of Rust.
//! Not here, on purpose: more than one fault. Serde ends at the first.

use std::fmt::{self, Display};

use serde::{
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, Expected, IntoDeserializer, MapAccess,
        SeqAccess, Unexpected, Visitor, value::StringDeserializer,
    },
    forward_to_deserialize_any,
};
use serde_json::{Map, Value};

use crate::json::{Fault, step};

/// Reads `document` as a `T`.
///
/// # Errors
/// The first [`Fault`] when it is none.
pub fn typed<T: DeserializeOwned>(document: Value) -> Result<T, Fault> {
    T::deserialize(Node(document)).map_err(|misfit| misfit.0)
}

struct Node(Value);

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

impl<'de> Deserializer<'de> for Node {
    type Error = Misfit;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), ..) => visitor.visit_u64(number),
                (None, Some(number), _) => visitor.visit_i64(number),
                (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Array(items) => visitor.visit_seq(Items { items: items.into_iter(), place: 0 }),
            Value::Object(members) => visitor.visit_map(Members { members: members.into_iter(), current: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
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
        match self.0 {
            Value::String(name) => visitor.visit_enum(Name(name)),
            _ => Err(Misfit::invalid_type(Unexpected::Other("no name"), &"a string")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct Items {
    items: std::vec::IntoIter<Value>,
    place: usize,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Misfit;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Misfit> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let item = seed.deserialize(Node(item)).map_err(|misfit| misfit.below(&self.place.to_string()))?;
        self.place += 1;
        Ok(Some(item))
    }
}

struct Members {
    members: <Map<String, Value> as IntoIterator>::IntoIter,
    current: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Members {
    type Error = Misfit;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Misfit> {
        self.current = self.members.next();
        let Some((name, _)) = &self.current else { return Ok(None) };
        let name: StringDeserializer<Misfit> = name.clone().into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Misfit> {
        let (name, value) = self.current.take().expect("serde asks for a key before its value");
        seed.deserialize(Node(value)).map_err(|misfit| misfit.below(&name))
    }
}

struct Name(String);

impl<'de> EnumAccess<'de> for Name {
    type Error = Misfit;
    type Variant = <StringDeserializer<Misfit> as EnumAccess<'de>>::Variant;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self::Variant), Misfit> {
        let name: StringDeserializer<Misfit> = self.0.into_deserializer();
        name.variant_seed(seed)
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
        assert_eq!(typed::<Order>(document), Ok(order));
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
            let fault = typed::<Order>(document.clone()).unwrap_err();
            assert_eq!(fault, Fault::new(pointer, code, detail), "{document}");
        }
    }
}
