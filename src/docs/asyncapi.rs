//! AsyncAPI: what this owner tells, and how it is sent.
//!
//! Promise: every property, header and member in the document was read from a message that `sdk::envelope` wrote.
//! Not here, on purpose: what a consumer does with it; docs/consuming says that.

use lapin::{BasicProperties, types::AMQPValue};
use serde_json::{Map, Value, json};
use tidings_sdk::{
    envelope::{Event, FieldName, Notice},
    topology::{self, Source},
};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::broker;

/// The document for an owner that publishes there, in the virtual host that a broker begins with.
///
/// # Errors
/// When it cannot be written as YAML.
pub fn asyncapi(source: &Source) -> anyhow::Result<String> {
    asyncapi_at(broker::DEFAULT_VHOST, source)
}

/// The same in another virtual host.
///
/// # Errors
/// When it cannot be written as YAML.
pub fn asyncapi_at(vhost: &str, source: &Source) -> anyhow::Result<String> {
    Ok(yaml_serde::to_string(&document_at(vhost, source))?)
}

pub fn document(source: &Source) -> Value {
    document_at(broker::DEFAULT_VHOST, source)
}

fn document_at(vhost: &str, source: &Source) -> Value {
    let notices = samples();
    let names: Vec<&str> = notices.iter().map(|notice| notice.event.name()).collect();
    let messages: Map<String, Value> =
        notices.iter().map(|notice| (key(notice.event.name()), message(notice, source))).collect();
    let mut channels: Map<String, Value> = names.iter().map(|name| (key(name), channel(name, vhost, source))).collect();
    channels.insert("again".to_owned(), again(&names, vhost));
    let mut operations: Map<String, Value> =
        names.iter().map(|name| (format!("tell-{}", key(name)), operation(&key(name), &[name]))).collect();
    operations.insert("tell-again".to_owned(), operation("again", &names));
    json!({
        "asyncapi": "3.0.0",
        "id": "urn:tidings:asyncapi",
        "info": {
            "title": "tidings",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The owner of user master data tells that a user changed, never what to: fetch the latest record over \
                            REST (openapi.yaml). Told at least once, in no order that could be relied on. Headers and members may be \
                            added: ignore those you do not know.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "defaultContentType": "application/json",
        "servers": { "broker": {
            "host": "127.0.0.1:5672",
            "protocol": "amqp",
            "protocolVersion": "0.9.1",
            "description": "RabbitMQ, wherever the deployment has it; over TLS it is `amqps`",
            "security": [{ "$ref": "#/components/securitySchemes/login" }],
        } },
        "channels": channels,
        "operations": operations,
        "components": {
            "securitySchemes": { "login": {
                "type": "userPassword",
                "description": "A user of the broker with rights for its own queues alone",
            } },
            "messages": messages,
        },
    })
}

/// One notice of each kind.
fn samples() -> Vec<Notice> {
    let fields: Vec<FieldName> = ["company", "job_title"].iter().filter_map(|name| name.parse().ok()).collect();
    let events = Event::NAMES.iter().filter_map(|name| Event::from_name(name, fields.clone()));
    (1..)
        .zip(events)
        .map(|(version, event)| Notice {
            message_id: Uuid::from_u128(0x0193_a2b4_8f00_7abc_8def_0000_0000_0000 + version as u128),
            user_id: Uuid::from_u128(0x0193_a2b4_7c1e_7d53_9a51_2f5d_8c0e_4b6a),
            version,
            event,
            // 24 November 2026, 9:30.
            occurred_at: OffsetDateTime::UNIX_EPOCH + Duration::microseconds(1_795_512_600_123_456),
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
        })
        .collect()
}

/// `profile.updated` as a name inside the document.
fn key(name: &str) -> String {
    name.replace('.', "-")
}

fn reference(channel: &str, name: &str) -> Value {
    json!({ "$ref": format!("#/channels/{channel}/messages/{}", key(name)) })
}

fn channel(name: &str, vhost: &str, source: &Source) -> Value {
    json!({
        "address": source.prefixed(name),
        "title": name,
        "description": "Bind a queue of your own to the exchange by this routing key.",
        "servers": [{ "$ref": "#/servers/broker" }],
        "messages": { key(name): { "$ref": format!("#/components/messages/{}", key(name)) } },
        "bindings": exchange(&source.exchange, "topic", vhost),
    })
}

/// The way to one subscription alone.
fn again(names: &[&str], vhost: &str) -> Value {
    let messages: Map<String, Value> = names
        .iter()
        .map(|name| (key(name), json!({ "$ref": format!("#/components/messages/{}", key(name)) })))
        .collect();
    json!({
        "address": topology::WORK,
        "title": "To one subscription alone",
        "description": "Backfills, and dead letters that are put back, come through the subscription's own exchange. It has the \
                        subscription's name, which stands here as NAME, and leads to its queue.",
        "servers": [{ "$ref": "#/servers/broker" }],
        "messages": messages,
        "bindings": exchange("NAME", "direct", vhost),
    })
}

fn exchange(name: &str, kind: &str, vhost: &str) -> Value {
    json!({ "amqp": {
        "is": "routingKey",
        "exchange": { "name": name, "type": kind, "durable": true, "autoDelete": false, "vhost": vhost },
        "bindingVersion": "0.3.0",
    } })
}

fn operation(channel: &str, names: &[&str]) -> Value {
    let delivery_mode = samples()[0].to_message("").0.delivery_mode().unwrap_or_default();
    json!({
        "action": "send",
        "summary": "Sent after the change is committed, again and again until the broker confirms it.",
        "channel": { "$ref": format!("#/channels/{channel}") },
        "messages": names.iter().map(|name| reference(channel, name)).collect::<Vec<_>>(),
        "bindings": { "amqp": {
            "deliveryMode": delivery_mode,
            "mandatory": broker::PUBLISHED.mandatory,
            "timestamp": true,
            "bindingVersion": "0.3.0",
        } },
    })
}

fn message(notice: &Notice, source: &Source) -> Value {
    let (properties, body) = notice.to_message(&broker::cloudevents_source(&source.exchange));
    let seen = Seen::of(&properties, &body).unwrap_or_default();
    let name = notice.event.name();
    json!({
        "name": name,
        "title": name,
        "summary": match notice.event {
            Event::Created => "A user is there who was not.",
            Event::Updated { .. } => "Profile fields have other values than before.",
            Event::Deleted => "A user is gone for good.",
        },
        "contentType": properties.content_type().as_ref().map(ToString::to_string),
        "headers": headers(&seen.headers),
        "payload": payload(&seen.payload),
        "x-amqp-properties": amqp_properties(&seen.properties),
        "bindings": { "amqp": { "messageType": name, "bindingVersion": "0.3.0" } },
        "examples": [{ "name": key(name), "headers": seen.headers, "payload": seen.payload }],
    })
}

/// A message as JSON sees it: what the schemas in this document are about.
#[derive(Debug, Default)]
pub struct Seen {
    pub properties: Value,
    pub headers: Value,
    pub payload: Value,
}

impl Seen {
    /// `None` when the body is no JSON.
    pub fn of(properties: &BasicProperties, body: &[u8]) -> Option<Self> {
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
        let mut seen = json!({
            "message_id": text(properties.message_id()),
            "type": text(properties.kind()),
            "content_type": text(properties.content_type()),
            "content_encoding": text(properties.content_encoding()),
            "timestamp": properties.timestamp(),
            "app_id": text(properties.app_id()),
            "delivery_mode": properties.delivery_mode(),
            "correlation_id": text(properties.correlation_id()),
            "reply_to": text(properties.reply_to()),
            "expiration": text(properties.expiration()),
            "user_id": text(properties.user_id()),
            "cluster_id": text(properties.cluster_id()),
            "priority": properties.priority(),
        });
        // What is not set is not sent.
        seen.as_object_mut()?.retain(|_, value| !value.is_null());
        let headers = properties.headers().as_ref().map(lapin::types::FieldTable::inner);
        let headers = headers.into_iter().flatten().map(|(name, value)| (name.to_string(), json_of(value)));
        Some(Self { properties: seen, headers: headers.collect(), payload: serde_json::from_slice(body).ok()? })
    }
}

fn json_of(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(value) => json!(value),
        AMQPValue::LongLongInt(value) => json!(value),
        AMQPValue::LongInt(value) => json!(value),
        AMQPValue::LongString(value) => json!(value.to_string()),
        // None of ours; no schema of ours admits it.
        _ => Value::Null,
    }
}

/// The schema of an object with these members; `facts` knows more of each than its type.
fn object(sample: &Value, optional: &[&str], facts: impl Fn(&str, &Value) -> Value) -> Value {
    let members = sample.as_object().into_iter().flatten();
    let required = members.clone().map(|(name, _)| name).filter(|name| !optional.contains(&name.as_str()));
    json!({
        "type": "object",
        "required": required.collect::<Vec<_>>(),
        "properties": members.map(|(name, value)| (name.clone(), facts(name, value))).collect::<Map<_, _>>(),
    })
}

/// A JSON Schema of this value's type, with what else is known of it.
fn typed(value: &Value, more: &Value) -> Value {
    let kind = match value {
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Null | Value::Object(_) => "object",
    };
    let mut schema = json!({ "type": kind });
    if let (Some(schema), Some(more)) = (schema.as_object_mut(), more.as_object()) {
        schema.extend(more.clone());
    }
    schema
}

fn amqp_properties(sample: &Value) -> Value {
    object(sample, &[], |name, value| {
        let more = match name {
            "message_id" => {
                json!({ "format": "uuid", "description": "The same on every resend: drop duplicates by it" })
            }
            "timestamp" => json!({ "minimum": 0, "description": "When the change was made, in seconds since 1970" }),
            // The rest is the same in every message of this kind.
            _ => json!({ "const": value }),
        };
        typed(value, &more)
    })
}

fn headers(sample: &Value) -> Value {
    // One header per changed field is a pattern, not a member.
    let mut fixed = sample.clone();
    if let Some(fixed) = fixed.as_object_mut() {
        fixed.retain(|name, _| !name.starts_with(FIELD));
    }
    let mut schema = object(&fixed, &["traceparent"], |name, value| {
        let more = match name {
            "version" => json!({ "format": "int64", "minimum": 1,
                "description": "The version that this change made: fetch the user with this as min_version" }),
            "traceparent" => json!({ "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
                "description": "W3C trace context of the request that made the change, or a new one; none in a backfill" }),
            "cloudEvents_id" => json!({ "format": "uuid", "description": "The message_id" }),
            "cloudEvents_source" => json!({ "format": "uri-reference", "const": value,
                "description": "Which owner of master data speaks" }),
            "cloudEvents_subject" => json!({ "format": "uuid", "description": "The user's id" }),
            "cloudEvents_time" => json!({ "format": "date-time", "description": "When the change was made" }),
            _ => json!({ "const": value }),
        };
        typed(value, &more)
    });
    if sample.as_object().is_some_and(|members| members.keys().any(|name| name.starts_with(FIELD))) {
        schema["patternProperties"] =
            json!({ format!("^field\\.{FIELD_NAME}$"): { "type": "boolean", "const": true } });
    }
    schema["properties"][topology::BACKFILL] = json!({ "type": "string", "format": "uuid",
        "description": "Only to one subscription alone: it tells a state, not a change, and this is the id of its backfill" });
    schema["properties"][topology::REDRIVEN] = json!({ "type": "integer", "minimum": 1,
        "description": "Only to one subscription alone: how often it was put back from the dead letters" });
    if sample["cloudEvents_type"] == json!(Event::Deleted.name()) {
        schema["properties"][topology::RECEIPT_OWED] = json!({ "type": "integer", "minimum": 1, "description": "Only to one subscription alone, \
            from its own consumer: it has handled the deletion and could not confirm it yet; how often that was tried" });
    }
    schema
}

const FIELD: &str = "field.";
/// What [`FieldName`] takes.
const FIELD_NAME: &str = "[A-Za-z_][A-Za-z0-9_-]{0,63}";

fn payload(sample: &Value) -> Value {
    object(sample, &[], |name, value| {
        let more = match name {
            "user_id" => json!({ "format": "uuid", "description": "Whose record to fetch" }),
            "changed_fields" => json!({ "items": { "type": "string", "pattern": format!("^{FIELD_NAME}$") },
                "uniqueItems": true, "description": "Names of top-level profile fields, never a value. Empty only in a \
                    backfill to a subscription that names no fields: any of them may be news" }),
            _ => json!({}),
        };
        typed(value, &more)
    })
}

#[cfg(test)]
mod tests {
    use tidings_sdk::envelope;

    use super::*;

    #[test]
    fn what_a_field_header_is_called_is_what_the_pattern_says() {
        let name: FieldName = "job_title".parse().unwrap();
        assert_eq!(envelope::field_header(&name), format!("{FIELD}job_title"));
    }

    #[test]
    fn every_exchange_is_in_the_virtual_host_of_the_deployment() {
        let source = Source { exchange: "masterdata".to_owned(), prefix: None };
        for (document, vhost) in [(document(&source), "/"), (document_at("user data", &source), "user data")] {
            let channels = document["channels"].as_object().unwrap();
            assert_eq!(channels.len(), Event::NAMES.len() + 1);
            for channel in channels.values() {
                assert_eq!(channel["bindings"]["amqp"]["exchange"]["vhost"], vhost);
            }
        }
    }

    #[test]
    fn every_message_and_its_example_is_in_the_document() {
        let document = document(&Source { exchange: "masterdata".to_owned(), prefix: Some("eu".to_owned()) });
        for name in Event::NAMES {
            let message = &document["components"]["messages"][key(name)];
            let example = &message["examples"][0];
            for (part, schema) in [("headers", &message["headers"]), ("payload", &message["payload"])] {
                jsonschema::validate(schema, &example[part]).unwrap();
            }
            assert_eq!(document["channels"][key(name)]["address"], format!("eu.{name}"));
        }
    }
}
