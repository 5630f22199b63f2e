//! Needles: values to look for, and the looking. Pure.
//!
//! Promise: a value is found however it was written down: as it is, in other case, escaped for JSON or a URL, in hexadecimal, or as a list
//! of bytes.
//! Not here, on purpose: a way to print one.

use std::collections::HashMap;

use serde_json::Value;
use uuid::Uuid;

/// A shorter value stands in too many places by chance.
pub const SHORTEST_BYTES: usize = 8;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// A top-level field of the profile, or a column.
    pub field: String,
    pub user_id: Uuid,
}

/// Values to look for. Shows none of them.
#[derive(Default)]
pub struct Needles {
    origins: Vec<Origin>,
    /// Spellings by their first eight bytes, each with its value's place in `origins`.
    by_start: HashMap<[u8; SHORTEST_BYTES], Vec<(Vec<u8>, usize)>>,
}

impl Needles {
    /// Takes the texts of a user's row, as far as they are distinctive.
    pub fn take(&mut self, user_id: Uuid, row: &Value, most: usize) {
        let Some(columns) = row.as_object() else { return };
        for (column, value) in columns {
            match value {
                Value::Object(fields) if column == "profile" => {
                    fields.iter().for_each(|(field, value)| self.take_all(user_id, field, value, most));
                }
                value if column == "external_id" => self.take_all(user_id, column, value, most),
                // Ids, versions and times stand elsewhere by right.
                _ => {}
            }
        }
    }

    pub fn len(&self) -> usize {
        self.origins.len()
    }

    pub fn is_empty(&self) -> bool {
        self.origins.is_empty()
    }

    pub fn origins(&self) -> &[Origin] {
        &self.origins
    }

    fn take_all(&mut self, user_id: Uuid, field: &str, value: &Value, most: usize) {
        match value {
            Value::String(text) if is_distinctive(text) && self.len() < most => self.add(user_id, field, text),
            Value::Array(items) => items.iter().for_each(|item| self.take_all(user_id, field, item, most)),
            Value::Object(members) => members.values().for_each(|member| self.take_all(user_id, field, member, most)),
            _ => {}
        }
    }

    fn add(&mut self, user_id: Uuid, field: &str, text: &str) {
        let place = self.origins.len();
        self.origins.push(Origin { field: field.to_owned(), user_id });
        // Behind an escape nobody sees that it is the same letter in other case.
        let cases = [text.to_owned(), text.to_lowercase(), text.to_uppercase()];
        for spelling in cases.iter().flat_map(|text| spellings(text)) {
            let Some(start) = spelling.first_chunk() else { continue };
            let others = self.by_start.entry(*start).or_default();
            if !others.iter().any(|(other, _)| *other == spelling) {
                others.push((spelling, place));
            }
        }
    }

    /// Where the values in `text` come from.
    pub fn found_in(&self, text: &[u8]) -> Vec<&Origin> {
        let text = folded(&String::from_utf8_lossy(text));
        let mut found: Vec<usize> = vec![];
        for (at, start) in text.windows(SHORTEST_BYTES).enumerate() {
            let Some(spellings) = self.by_start.get(start) else { continue };
            let here = spellings.iter().filter(|(spelling, _)| text[at..].starts_with(spelling));
            found.extend(here.map(|(_, place)| *place));
        }
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(|place| &self.origins[place]).collect()
    }
}

/// Long enough, and not of digits and their punctuation alone, as every time and date in a log is.
fn is_distinctive(text: &str) -> bool {
    text.len() >= SHORTEST_BYTES && text.chars().any(char::is_alphabetic)
}

/// What differs by case alone is the same here. By way of the upper case: a letter may have two lower ones (σ and ς), or become several (ß
/// and SS).
fn folded(text: &str) -> Vec<u8> {
    let folded: String = text.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect();
    folded.into_bytes()
}

/// How a value may have been written down.
fn spellings(text: &str) -> Vec<Vec<u8>> {
    let quoted = Value::from(text).to_string();
    let escaped: String =
        text.chars().flat_map(|c| if c.is_ascii() { vec![c] } else { c.escape_unicode().collect() }).collect();
    let ascii: String = text
        .encode_utf16()
        .map(|unit| match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
            _ => format!("\\u{unit:04x}"),
        })
        .collect();
    let in_url: String = text
        .bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02x}")
            }
        })
        .collect();
    let in_form = in_url.replace("%20", "+");
    let hex: String = text.bytes().map(|b| format!("{b:02x}")).collect();
    let bytes: Vec<String> = text.bytes().map(|b| b.to_string()).collect();
    let quoted = quoted[1..quoted.len() - 1].to_owned();
    let all = [text.to_owned(), quoted, escaped, ascii, in_url, in_form, hex, bytes.join(", ")];
    all.iter().map(|spelling| folded(spelling)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn needles(row: &Value) -> Needles {
        let mut needles = Needles::default();
        needles.take(Uuid::from_u128(1), row, 100);
        needles
    }

    #[test]
    fn what_is_looked_for_is_distinctive_and_personal() {
        let row = json!({
            "id": "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a", "version": 7, "created_at": "2026-11-24T06:00:00Z", "external_id": "staff-00042",
            "profile": { "first_name": "Ana", "full_name": "Ana Ozola-Berg", "birthday": "1990-12-31", "address": [{ "street": "Long Lane 12" }],
                         "term": 20_261_124 },
        });
        let needles = needles(&row);
        let mut fields: Vec<&str> = needles.origins().iter().map(|origin| origin.field.as_str()).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["address", "external_id", "full_name"]);
    }

    #[test]
    fn a_value_is_found_however_it_was_written_down() {
        let value = "Zoë \"Zo\" Ozola";
        let needles = needles(&json!({ "profile": { "full_name": value } }));
        let spelt = [
            value.to_owned(),
            value.to_uppercase(),
            format!("{value:?}"),
            json!({ "said": value }).to_string(),
            "x Zo\\u00eb \"Zo\" Ozola".to_owned(),
            "/v1/users?q=Zo%C3%AB%20%22Zo%22%20Ozola&limit=1".to_owned(),
            "q=Zo%C3%AB+%22Zo%22+Ozola".to_owned(),
            "\\x5A6FC3AB20225A6F22204F7A6F6C61".to_owned(),
            format!("{:?}", value.as_bytes()),
        ];
        for text in &spelt {
            assert_eq!(needles.found_in(text.as_bytes()).len(), 1, "{text}");
        }
        let among_bytes = [&[0xc3, 0xff, 0][..], value.as_bytes(), &[0xc3]].concat();
        assert_eq!(needles.found_in(&among_bytes).len(), 1, "not all of it is text");
        for other in ["", "Zoë", "Zoë \"Zo\" Berzina", "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a"] {
            assert_eq!(needles.found_in(other.as_bytes()).len(), 0, "{other}");
        }
    }

    #[test]
    fn every_letter_is_found_in_other_case_and_not_ascii_alone() {
        let value = "Zoë Bērziņa Straße Ανδρέας";
        let needles = needles(&json!({ "profile": { "full_name": value } }));
        let (upper, lower) = (value.to_uppercase(), value.to_lowercase());
        let mixed = "zoË bĒRziŅa StrASSe ΑΝΔΡέας".to_owned();
        let hex = |text: &str| text.bytes().map(|b| format!("{b:02X}")).collect::<String>();
        let escaped =
            "ZO\\u00CB B\\u0112RZI\\u0145A STRASSE \\u0391\\u039d\\u0394\\u03a1\\u0388\\u0391\\u03a3".to_owned();
        let in_url =
            "zo%C3%AB%20b%C4%93rzi%C5%86a%20stra%C3%9Fe%20%CE%B1%CE%BD%CE%B4%CF%81%CE%AD%CE%B1%CF%82".to_owned();
        for text in [hex(&upper), format!("{:?}", lower.as_bytes()), upper, lower, mixed, escaped, in_url] {
            assert_eq!(needles.found_in(text.as_bytes()).len(), 1, "{text}");
        }
        assert_eq!(needles.found_in("Zoe Berzina Strasse Ανδρέας".as_bytes()).len(), 0);
    }

    #[test]
    fn no_more_is_taken_than_was_asked_for() {
        let mut needles = Needles::default();
        needles.take(Uuid::from_u128(1), &json!({ "profile": { "x": ["value number one", "value number two"] } }), 1);
        assert_eq!(needles.len(), 1);
    }
}
