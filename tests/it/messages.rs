//! Messages: what a consumer in any language finds on the wire, to the letter.

use futures_util::StreamExt;
use lapin::{
    Channel, Connection, Consumer, ExchangeKind,
    message::Delivery,
    options::{
        BasicConsumeOptions, ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;
use uuid::Uuid;

use crate::house::{self, Answer, House, PATIENCE, bind};

/// A consumer with a private queue that trusts nothing but the protocol.
struct Ear {
    _connection: Connection,
    channel: Channel,
    queue: String,
    news: Consumer,
}

impl Ear {
    async fn open() -> Self {
        let connection = house::connect(&house::env("AMQP_URL")).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let queue = format!("test.ear.{}", Uuid::new_v4().simple());
        let private = QueueDeclareOptions { exclusive: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), private, FieldTable::default()).await.unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let news =
            channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default()).await.unwrap();
        Self { _connection: connection, channel, queue, news }
    }

    /// An ear at everything that this House tells.
    async fn at(house: &House) -> Self {
        let ear = Self::open().await;
        bind(&ear.channel, &ear.queue, &house.exchange, "#").await;
        ear
    }

    async fn next(&mut self) -> Delivery {
        timeout(PATIENCE, self.news.next()).await.expect("no message came").unwrap().unwrap()
    }
}

fn header<'a>(message: &'a Delivery, name: &str) -> &'a AMQPValue {
    let headers = message.properties.headers().as_ref().unwrap();
    headers.inner().get(name).unwrap_or_else(|| panic!("no {name} in {headers:?}"))
}

fn text(message: &Delivery, name: &str) -> String {
    match header(message, name) {
        AMQPValue::LongString(text) => text.to_string(),
        other => panic!("{name} is {other:?}"),
    }
}

const COMMON_HEADERS: [&str; 8] = [
    "cloudEvents_id",
    "cloudEvents_source",
    "cloudEvents_specversion",
    "cloudEvents_subject",
    "cloudEvents_time",
    "cloudEvents_type",
    "traceparent",
    "version",
];

/// Everything that must hold of the message called `name` about the change that made `version` of `user`.
fn check(house: &House, message: &Delivery, name: &str, user: &Uuid, version: i64, fields: &[&str]) {
    let body = if name == "profile.updated" {
        format!(r#"{{"user_id":"{user}","changed_fields":{}}}"#, json!(fields))
    } else {
        format!(r#"{{"user_id":"{user}"}}"#)
    };
    assert_eq!(String::from_utf8_lossy(&message.data), body);
    assert_eq!((message.exchange.as_str(), message.routing_key.as_str()), (&*house.exchange, name));

    let properties = &message.properties;
    let short = |text: &Option<ShortString>| text.as_ref().map(|text| text.to_string());
    let id: Uuid = short(properties.message_id()).unwrap().parse().unwrap();
    assert_eq!(short(properties.kind()).as_deref(), Some(name));
    assert_eq!(short(properties.content_type()).as_deref(), Some("application/json"));
    assert_eq!(short(properties.app_id()).as_deref(), Some("tidings"));
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!((properties.expiration(), properties.reply_to(), properties.priority()), (&None, &None, &None));

    let field_headers = fields.iter().map(|field| format!("field.{field}"));
    let mut expected: Vec<String> = COMMON_HEADERS.iter().map(ToString::to_string).chain(field_headers).collect();
    expected.sort();
    let headers = properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers.keys().map(ToString::to_string).collect::<Vec<_>>(), expected);
    for field in fields {
        assert_eq!(header(message, &format!("field.{field}")), &AMQPValue::Boolean(true));
    }
    assert_eq!(header(message, "version"), &AMQPValue::LongLongInt(version));
    assert_eq!(text(message, "cloudEvents_specversion"), "1.0");
    assert_eq!(text(message, "cloudEvents_id"), id.to_string());
    assert_eq!(text(message, "cloudEvents_source"), format!("urn:tidings:{}", house.exchange));
    assert_eq!(text(message, "cloudEvents_type"), name);
    assert_eq!(text(message, "cloudEvents_subject"), user.to_string());
    let time = OffsetDateTime::parse(&text(message, "cloudEvents_time"), &Rfc3339).unwrap();
    assert_eq!(properties.timestamp().unwrap(), time.unix_timestamp() as u64);
    assert!((OffsetDateTime::now_utc() - time).abs() < time::Duration::minutes(1), "{time}");
}

#[sqlx::test]
async fn a_message_is_the_contract_to_the_letter(db: PgPool) {
    let house = House::open(db).await;
    let mut ear = Ear::at(&house).await;
    let ana = house.user(json!({ "first_name": "Ana", "company": "A", "nickname": "A" })).await;
    check(&house, &ear.next().await, "user.created", &ana, 1, &[]);
    let patch = json!({ "job_title": "Editor", "company": "B", "nickname": null, "first_name": "Ana" });
    house.amend(&ana, patch).await.ok();
    check(&house, &ear.next().await, "profile.updated", &ana, 2, &["company", "job_title", "nickname"]);
    house.put(&ana, json!({ "first_name": "Anna", "company": "B", "job_title": "Editor" })).await.ok();
    check(&house, &ear.next().await, "profile.updated", &ana, 3, &["first_name"]);
    house.delete(&ana).await;
    check(&house, &ear.next().await, "user.deleted", &ana, 4, &[]);
}

#[sqlx::test]
async fn every_message_has_an_id_of_its_own(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    for city in ["Riga", "Oslo", "Riga"] {
        house.amend(&ana, json!({ "city": city })).await.ok();
    }
    house.settle().await;
    let mut ids: Vec<Uuid> = house.audit.heard().iter().map(|notice| notice.message_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
}

#[sqlx::test]
async fn a_message_goes_on_with_its_callers_trace(db: PgPool) {
    let house = House::open(db).await;
    let mut ear = Ear::at(&house).await;
    let callers = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let create = |trace: Option<&str>| {
        let request = house.request(Method::POST, "/v1/users").json(&json!({ "profile": {} }));
        trace.into_iter().fold(request, |request, trace| request.header("traceparent", trace))
    };
    let mut traces = vec![];
    for trace in [Some(callers), None, None, Some("not-a-trace")] {
        Answer::to(create(trace)).await.ok();
        traces.push(text(&ear.next().await, "traceparent"));
    }
    let parts: Vec<Vec<&str>> = traces.iter().map(|trace| trace.split('-').collect()).collect();
    assert_eq!((parts[0][1], parts[0][3]), ("0af7651916cd43dd8448eb211c80319c", "01"), "{traces:?}");
    assert_ne!(parts[0][2], "b7ad6b7169203331", "the span is ours");
    for part in &parts {
        assert_eq!((part[0], part[1].len(), part[2].len()), ("00", 32, 16), "{traces:?}");
    }
    // Requests without a trace are not thrown together into one.
    assert!(parts[1][1] != parts[2][1] && parts[2][1] != parts[3][1], "{traces:?}");
}

#[sqlx::test]
async fn a_prefix_stands_before_the_routing_key_alone(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ROUTING_KEY_PREFIX", "eu.prod")]).await;
    let mut ear = Ear::at(&house).await;
    let ana = house.user(json!({})).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.delete(&ana).await;
    for name in ["user.created", "profile.updated", "user.deleted"] {
        let message = ear.next().await;
        assert_eq!(message.routing_key.as_str(), format!("eu.prod.{name}"));
        assert_eq!(message.properties.kind().as_ref().unwrap().as_str(), name);
        assert_eq!(text(&message, "cloudEvents_type"), name);
    }
}

#[sqlx::test]
async fn a_queue_hears_only_the_keys_it_is_bound_for(db: PgPool) {
    let house = House::open(db).await;
    let mut ear = Ear::open().await;
    bind(&ear.channel, &ear.queue, &house.exchange, "user.*").await;
    let ana = house.user(json!({})).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.delete(&ana).await;
    for name in ["user.created", "user.deleted"] {
        assert_eq!(ear.next().await.routing_key.as_str(), name);
    }
}

#[sqlx::test]
async fn a_consumer_can_be_woken_for_one_field_alone(db: PgPool) {
    let house = House::open(db).await;
    let mut ear = Ear::open().await;
    // A headers exchange behind the topic exchange, and a binding that asks for one field.
    let by_field = format!("{}.by_field", house.exchange);
    let (name, goes_alone) = (by_field.as_str(), ExchangeDeclareOptions { auto_delete: true, ..Default::default() });
    let none = FieldTable::default;
    ear.channel.exchange_declare(name.into(), ExchangeKind::Headers, goes_alone, none()).await.unwrap();
    let (source, key, options) = (house.exchange.as_str(), "profile.updated", ExchangeBindOptions::default());
    ear.channel.exchange_bind(name.into(), source.into(), key.into(), options, none()).await.unwrap();
    let mut wanted = FieldTable::default();
    wanted.insert("x-match".into(), AMQPValue::LongString("any".into()));
    wanted.insert("field.job_title".into(), AMQPValue::Boolean(true));
    let options = QueueBindOptions::default();
    ear.channel.queue_bind(ear.queue.as_str().into(), name.into(), "".into(), options, wanted).await.unwrap();

    let ana = house.user(json!({ "job_title": "Author" })).await;
    for patch in [
        json!({ "company": "A" }),
        json!({ "job_title": "Editor" }),
        json!({ "company": "B", "city": "Riga" }),
        json!({ "company": "C", "job_title": null }),
    ] {
        house.amend(&ana, patch).await.ok();
    }
    house.delete(&ana).await;
    for (version, fields) in [(3, json!(["job_title"])), (5, json!(["company", "job_title"]))] {
        let message = ear.next().await;
        assert_eq!(header(&message, "version"), &AMQPValue::LongLongInt(version));
        let body: Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!(body["changed_fields"], fields);
    }
    assert_eq!(house.told(&ana).await.len(), 6, "all six were told, and two of them here");
}
