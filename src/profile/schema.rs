//! The deployment's JSON Schema: checked at start, asked at every write.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, bail, ensure};
use jsonschema::{
    ReferencingError, ValidationError, Validator,
    error::{TypeKind, ValidationErrorKind},
};
use serde_json::Value;
use tidings_sdk::envelope::FieldName;

use super::{EXTERNAL_ID, Fields, Profile};
use crate::json::{Fault, MAX_FAULTS, step};

const BUILT_IN: &str = include_str!("default.schema.json");
/// Where a profile stands in a request body.
const ROOT: &str = "/profile";
/// Field names travel as message headers, and AMQP sends a message's headers in one frame.
const MAX_FIELDS: usize = 256;

/// A request's body is limited, but amendments add up.
const MAX_PROFILE_BYTES: usize = 64 * 1024;

/// The code of the fault of a profile with more than that.
pub const TOO_LARGE: &str = "too_large";

/// What a profile may hold.
pub struct Schema {
    validator: Validator,
    names: BTreeSet<FieldName>,
}

impl Schema {
    /// The schema in `file`, or the built-in one.
    ///
    /// # Errors
    /// When the file is not a JSON Schema (draft 2020-12 unless it says otherwise), refers to another document, or leaves the set
    /// of field names open.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let Some(file) = file else { return Self::parse(BUILT_IN) };
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not a profile schema", file.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let schema: Value = serde_json::from_str(text).context("it is not JSON")?;
        let names = check_names(&schema)?;
        let validator =
            jsonschema::options().should_validate_formats(true).build(&schema).map_err(|error| refusal(&error))?;
        Ok(Self { validator, names })
    }

    /// Whether there can be news of this field.
    pub fn has(&self, field: &FieldName) -> bool {
        self.names.contains(field)
    }

    /// The fields that a profile may have, and the external id beside it; in order of name.
    pub fn names(&self) -> impl Iterator<Item = &FieldName> {
        self.names.iter()
    }

    /// A profile of these fields, if they may be one.
    ///
    /// # Errors
    /// The faults, with their places: all of them, or more than anybody reads.
    pub fn admit(&self, fields: Fields) -> Result<Profile, Vec<Fault>> {
        let instance = Value::Object(fields);
        if self.validator.is_valid(&instance) {
            let profile = Profile::from_instance(&instance);
            let fits = profile.as_str().len() <= MAX_PROFILE_BYTES;
            let too_large =
                || Fault::new(ROOT, TOO_LARGE, format!("would have more than {MAX_PROFILE_BYTES} bytes as JSON"));
            return if fits { Ok(profile) } else { Err(vec![too_large()]) };
        }
        Err(self.validator.iter_errors(&instance).flat_map(|error| explain(&error)).take(MAX_FAULTS).collect())
    }
}

/// The names of fields leave the house in messages, so the deployment lists them: a name that a client made up could be data.
fn check_names(schema: &Value) -> anyhow::Result<BTreeSet<FieldName>> {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        bail!("it needs \"properties\", an object with one schema per field");
    };
    ensure!(properties.len() <= MAX_FIELDS, "it has {} fields; at most {MAX_FIELDS} are possible", properties.len());
    let mut names = BTreeSet::from([EXTERNAL_ID.parse()?]);
    for name in properties.keys() {
        ensure!(
            name != EXTERNAL_ID,
            "\"{EXTERNAL_ID}\" is no field of a profile: every user may have one, beside the profile"
        );
        names.insert(name.parse().with_context(|| format!("field {name:?} in \"properties\""))?);
    }
    ensure!(
        schema.get("additionalProperties") == Some(&Value::Bool(false)) && schema.get("patternProperties").is_none(),
        "it needs \"additionalProperties\": false and no \"patternProperties\" at its top level, so that every field name is known"
    );
    Ok(names)
}

/// Why it is no schema. The words quote it, which is the deployment's own text and no user's.
fn refusal(error: &ValidationError<'_>) -> anyhow::Error {
    if let ValidationErrorKind::Referencing(ReferencingError::Unretrievable { uri, .. }) = error.kind() {
        return anyhow::anyhow!("it may not refer to other documents, as it does to {uri}");
    }
    anyhow::anyhow!("at {}: {error}", pointer_or_root(&error.instance_path().to_string()))
}

fn pointer_or_root(pointer: &str) -> &str {
    if pointer.is_empty() { "the top level" } else { pointer }
}

/// The faults behind one validation error, in our words: the library's own would quote the value.
fn explain(error: &ValidationError<'_>) -> Vec<Fault> {
    let place = format!("{ROOT}{}", error.instance_path());
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected }
        | ValidationErrorKind::UnevaluatedProperties { unexpected } => unexpected
            .iter()
            .take(MAX_FAULTS)
            .map(|name| Fault::new(step(&place, name), "unknown_field", "the profile schema has no such field"))
            .collect(),
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            vec![Fault::new(step(&place, name), "required", "must be present")]
        }
        kind => vec![Fault::new(place, kind.keyword(), rule(kind))],
    }
}

/// The rule that was broken, told from the schema alone.
fn rule(kind: &ValidationErrorKind) -> String {
    use ValidationErrorKind as Kind;
    match kind {
        Kind::Type { kind: TypeKind::Single(expected) } => format!("must be of type {expected}"),
        Kind::Type { kind: TypeKind::Multiple(expected) } => {
            let expected: Vec<String> = expected.iter().map(|one| one.to_string()).collect();
            format!("must be of one of the types {}", expected.join(", "))
        }
        Kind::MaxLength { limit } => format!("must have at most {limit} characters"),
        Kind::MinLength { limit } => format!("must have at least {limit} characters"),
        Kind::MaxItems { limit } => format!("must have at most {limit} items"),
        Kind::MinItems { limit } => format!("must have at least {limit} items"),
        Kind::MaxProperties { limit } => format!("must have at most {limit} members"),
        Kind::MinProperties { limit } => format!("must have at least {limit} members"),
        Kind::Maximum { limit } => format!("must be at most {limit}"),
        Kind::Minimum { limit } => format!("must be at least {limit}"),
        Kind::ExclusiveMaximum { limit } => format!("must be below {limit}"),
        Kind::ExclusiveMinimum { limit } => format!("must be above {limit}"),
        Kind::Enum { options } => format!("must be one of {options}"),
        Kind::Constant { expected_value } => format!("must be {expected_value}"),
        Kind::Pattern { pattern } => format!("must match the pattern {pattern}"),
        Kind::Format { format } => format!("must be a valid {format}"),
        Kind::UniqueItems => "must not repeat an item".to_owned(),
        _ => format!("breaks the profile schema's rule \"{}\"", kind.keyword()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn admit(schema: &Schema, profile: Value) -> Vec<(String, String)> {
        match schema.admit(profile.as_object().unwrap().clone()) {
            Ok(_) => vec![],
            Err(faults) => faults.into_iter().map(|fault| (fault.pointer, fault.code)).collect(),
        }
    }

    fn fault(pointer: &str, code: &str) -> (String, String) {
        (pointer.to_owned(), code.to_owned())
    }

    #[test]
    fn the_built_in_schema_has_the_usual_fields() {
        let schema = Schema::load(None).unwrap();
        let profile = json!({
            "first_name": "Ana", "district": 7, "social": { "x": "ana" }, "phone": ["1", "2"], "address": { "street": "A" }
        });
        assert_eq!(admit(&schema, profile), []);
    }

    #[test]
    fn every_fault_has_its_place_and_no_value() {
        let schema = Schema::load(None).unwrap();
        let profile = json!({ "first_name": 7, "shoe/size": "canary", "last_name": "canary".repeat(1000) });
        let mut found = admit(&schema, profile.clone());
        found.sort();
        assert_eq!(
            found,
            [
                fault("/profile/first_name", "type"),
                fault("/profile/last_name", "maxLength"),
                fault("/profile/shoe~1size", "unknown_field"),
            ]
        );
        let told = format!("{:?}", schema.admit(profile.as_object().unwrap().clone()).unwrap_err());
        assert!(!told.contains("canary"), "{told}");
    }

    #[test]
    fn a_profile_does_not_grow_without_bound() {
        let schema = Schema::load(None).unwrap();
        let social = |bytes: usize| json!({ "social": { "x": { "y": "a".repeat(bytes) } } });
        assert_eq!(admit(&schema, social(MAX_PROFILE_BYTES - 100)), []);
        assert_eq!(admit(&schema, social(MAX_PROFILE_BYTES)), [fault("/profile", "too_large")]);
    }

    #[test]
    fn a_schema_that_cannot_serve_is_refused_with_the_reason() {
        for (schema, reason) in [
            ("{", "it is not JSON"),
            ("{}", "\"properties\""),
            (r#"{"properties":{"a b":{}},"additionalProperties":false}"#, "field \"a b\""),
            (r#"{"properties":{"external_id":{}},"additionalProperties":false}"#, "beside the profile"),
            (r#"{"properties":{"a":{}}}"#, "\"additionalProperties\": false"),
            (r#"{"properties":{"a":{"type":"strong"}},"additionalProperties":false}"#, "/properties/a/type"),
            (
                r#"{"properties":{"a":{"$ref":"https://example.org/a"}},"additionalProperties":false}"#,
                "may not refer to other documents, as it does to https://example.org/a",
            ),
        ] {
            let error = format!("{:#}", Schema::parse(schema).err().unwrap());
            assert!(error.contains(reason), "{schema}: {error}");
        }
    }
}
