//! Examples: of each body that is taken or answered, put together from what the schemas say of its parts.
//!
//! Promise: a body without an example of its own gets one; it is as good as the examples at its parts, and CI validates it.
//! Not here, on purpose: examples of refusals, which `web::problem` makes from the codes.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use utoipa::openapi::{
    Content, OpenApi, RefOr, Schema,
    path::{Operation, PathItem},
};

/// Gives every body an example, and takes from parameters what utoipa makes of an `Option`: they may be absent, and are never null.
pub fn finish(api: &mut OpenApi) {
    let components = serde_json::to_value(&api.components).unwrap_or_default();
    let parts = Parts(&components["schemas"]);
    for operation in api.paths.paths.values_mut().flat_map(operations) {
        for parameter in operation.parameters.iter_mut().flatten() {
            if let RefOr::T(parameter) = parameter {
                parameter.schema = parameter.schema.take().map(never_null);
            }
        }
        if let Some(RefOr::T(body)) = &mut operation.request_body {
            body.content.values_mut().for_each(|content| parts.exemplify(content));
        }
        for response in operation.responses.responses.values_mut() {
            if let RefOr::T(response) = response {
                response.content.values_mut().for_each(|content| parts.exemplify(content));
            }
        }
    }
}

pub fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut path.get, &mut path.put, &mut path.post, &mut path.delete, &mut path.patch].into_iter().flatten()
}

fn never_null(schema: RefOr<Schema>) -> RefOr<Schema> {
    match schema {
        RefOr::T(Schema::OneOf(mut choices)) => {
            choices.items.retain(|choice| !is_null(choice));
            match choices.items.pop() {
                Some(only) if choices.items.is_empty() => only,
                last => {
                    choices.items.extend(last);
                    RefOr::T(Schema::OneOf(choices))
                }
            }
        }
        other => other,
    }
}

fn is_null(schema: &RefOr<Schema>) -> bool {
    serde_json::to_value(schema).is_ok_and(|schema| schema["type"] == "null")
}

struct Parts<'a>(&'a Value);

impl Parts<'_> {
    fn exemplify(&self, content: &mut RefOr<Content>) {
        let RefOr::T(content) = content else { return };
        if content.example.is_none() && content.examples.is_empty() {
            let schema = serde_json::to_value(&content.schema).unwrap_or_default();
            content.example = Some(self.example(&schema));
        }
    }

    fn example(&self, schema: &Value) -> Value {
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/components/schemas/")) {
            return self.example(&self.0[name]);
        }
        let given = [&schema["example"], &schema["examples"][0], &schema["default"], &schema["enum"][0]];
        if let Some(given) = given.into_iter().find(|given| !given.is_null()) {
            return given.clone();
        }
        if let Some([only]) = schema["allOf"].as_array().map(Vec::as_slice) {
            return self.example(only);
        }
        if let Some(parts) = schema["allOf"].as_array() {
            let members = parts.iter().filter_map(|part| self.example(part).as_object().cloned()).flatten();
            return Value::Object(members.collect());
        }
        // `null` stands beside what may be absent; the example shows it present.
        let choices = [&schema["oneOf"], &schema["anyOf"]].into_iter().find_map(Value::as_array);
        if let Some(choice) = choices.and_then(|choices| choices.iter().find(|choice| choice["type"] != "null")) {
            return self.example(choice);
        }
        match schema["type"].as_str() {
            Some("object") => self.object(schema),
            Some("array") => json!([self.example(&schema["items"])]),
            Some("integer") => schema["minimum"].as_i64().unwrap_or_default().into(),
            Some("number") => json!(0.5),
            Some("boolean") => json!(false),
            Some("string") => text(schema["format"].as_str()).into(),
            // One type or null: null, unless the schema has an example.
            _ => Value::Null,
        }
    }

    fn object(&self, schema: &Value) -> Value {
        let members: BTreeMap<String, Value> = serde_json::from_value(schema["properties"].clone()).unwrap_or_default();
        members.into_iter().map(|(name, part)| (name, self.example(&part))).collect::<Map<_, _>>().into()
    }
}

fn text(format: Option<&str>) -> &'static str {
    match format {
        Some("uuid") => "0193a2b4-8f00-7abc-8def-000000000001",
        Some("date-time") => "2026-11-24T09:30:00.123456Z",
        _ => "text",
    }
}
