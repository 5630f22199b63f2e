//! Management: what only RabbitMQ's management API tells. Optional.
//!
//! Promise: without it, or when it does not answer, everything else goes on and these figures are missing.
//! Not here, on purpose: messages, and anything that changes the broker.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, header::AUTHORIZATION};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tidings_sdk::{subscription::SubscriptionName, trust::Connector};
use time::OffsetDateTime;
use tokio::time::timeout;
use url::Url;

use super::model::Registered;
use crate::{broker::Broker, db::is_overheard, telemetry::with_causes};

/// For one question: nobody waits for a broker that is busy with itself.
const DEADLINE: Duration = Duration::from_secs(3);
/// A queue or a binding is told in about 200 bytes.
const ANSWER_LIMIT_BYTES: usize = 64 * 1024 * 1024;

#[derive(Clone)]
pub struct Management {
    http: Client<Connector, Empty<Bytes>>,
    /// Without user and password.
    url: Url,
    login: SecretString,
    vhost: String,
    exchange: String,
}

/// What the API tells of all queues.
#[derive(Debug, Clone, Default)]
pub struct Queues(HashMap<String, Queue>);

/// How many ways lead from our exchange to each queue that hears it.
#[derive(Debug, Clone, Default)]
pub struct Ways(HashMap<String, u32>);

/// What the API tells of a queue: little of a new one, and of any where the broker is told to gather no metrics.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct Queue {
    #[serde(rename = "messages_ready")]
    pub ready: Option<u64>,
    #[serde(rename = "messages_unacknowledged")]
    pub unacknowledged: Option<u64>,
    pub consumers: Option<u64>,
    #[serde(default, rename = "head_message_timestamp", deserialize_with = "seconds")]
    pub head_message_at: Option<OffsetDateTime>,
}

/// A queue that hears our exchange and that nobody registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Unregistered {
    #[schema(example = "somebody.elses")]
    pub queue: String,
    /// Messages that wait in it; null when the broker does not tell.
    #[schema(required = true, example = 12)]
    pub ready: Option<u64>,
    /// Null when the broker does not tell.
    #[schema(required = true, example = 1)]
    pub consumers: Option<u64>,
    /// Ways from our exchange to it.
    #[schema(example = 1)]
    pub bindings: u32,
}

#[derive(Deserialize)]
struct NamedQueue {
    name: String,
    #[serde(flatten)]
    queue: Queue,
}

#[derive(Deserialize)]
struct Binding {
    source: String,
    destination: String,
    destination_type: String,
}

impl Management {
    /// The API of this broker, known at an `https` address by whom the broker is known by.
    ///
    /// # Errors
    /// When `url` is no HTTP URL. The URL is not repeated: it holds a password.
    pub fn new(url: &SecretString, broker: &Broker) -> anyhow::Result<Self> {
        const WRONG: &str = "expected https://USER:PASSWORD@HOST:15671, or http://..:15672 without TLS";
        let mut url: Url = url.expose_secret().parse().map_err(|_| anyhow::anyhow!(WRONG))?;
        ensure!(matches!(url.scheme(), "http" | "https") && url.has_host(), WRONG);
        let part = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (user, password) = (part(url.username()), part(url.password().unwrap_or_default()));
        let login = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
        let cleared = url.set_username("").and_then(|()| url.set_password(None));
        cleared.map_err(|()| anyhow::anyhow!(WRONG))?;
        let http = Client::builder(TokioExecutor::new()).build(broker.trust().for_http(DEADLINE)?);
        let (vhost, exchange) = (broker.vhost().to_owned(), broker.exchange().to_owned());
        Ok(Self { http, url, login: login.into(), vhost, exchange })
    }

    /// Whether user and password travel in the clear, to somewhere else than this machine.
    pub fn is_overheard(&self) -> bool {
        is_overheard(&self.url)
    }

    /// One queue; `None` when there is no such queue, or the API does not tell, which the log says.
    pub async fn queue(&self, name: &SubscriptionName) -> Option<Queue> {
        told(self.ask(self.queues_path(&[name.queue()]))).await.flatten()
    }

    /// All queues; `None` when the API does not tell, which the log says.
    pub async fn queues(&self) -> Option<Queues> {
        told(self.all_queues()).await
    }

    /// The ways from our exchange; `None` when the API does not tell, which the log says.
    pub async fn ways(&self) -> Option<Ways> {
        told(self.all_ways()).await
    }

    async fn all_queues(&self) -> anyhow::Result<Queues> {
        let queues: Vec<NamedQueue> = self.ask_for_all(self.queues_path(&[])).await?;
        Ok(Queues(queues.into_iter().map(|named| (named.name, named.queue)).collect()))
    }

    /// All bindings are asked for at once: exchange by exchange the answers would be of different moments, and long in coming.
    async fn all_ways(&self) -> anyhow::Result<Ways> {
        let mut url = self.path(&["bindings", &self.vhost]);
        url.query_pairs_mut().append_pair("columns", "source,destination,destination_type");
        Ok(ways(&self.exchange, &self.ask_for_all(url).await?))
    }

    fn queues_path(&self, steps: &[&str]) -> Url {
        const COLUMNS: &str = "name,messages_ready,messages_unacknowledged,consumers,head_message_timestamp";
        let mut url = self.path(&[&["queues", self.vhost.as_str()], steps].concat());
        url.query_pairs_mut().append_pair("columns", COLUMNS);
        url
    }

    fn path(&self, steps: &[&str]) -> Url {
        let mut url = self.url.clone();
        url.path_segments_mut().expect("an HTTP URL has a path").pop_if_empty().push("api").extend(steps);
        url
    }

    async fn ask_for_all<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<Vec<T>> {
        self.ask(url).await?.context("it knows of no such virtual host")
    }

    /// `None` when there is no such thing.
    async fn ask<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<Option<T>> {
        let request = Request::get(url.as_str()).header(AUTHORIZATION, self.login.expose_secret());
        let request = request.body(Empty::new()).map_err(|_| anyhow::anyhow!("its login cannot be written"))?;
        let response = self.http.request(request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        ensure!(response.status().is_success(), "it answers {}", response.status());
        let body = Limited::new(response.into_body(), ANSWER_LIMIT_BYTES).collect().await;
        let body = body.map_err(|_| anyhow::anyhow!("its answer broke off"))?.to_bytes();
        serde_json::from_slice(&body).map(Some).ok().context("its answer cannot be read")
    }
}

/// From an exchange, and from exchanges bound behind it.
fn ways(exchange: &str, bindings: &[Binding]) -> Ways {
    let mut from: HashMap<&str, Vec<&Binding>> = HashMap::new();
    for binding in bindings {
        from.entry(&binding.source).or_default().push(binding);
    }
    let (mut ways, mut next) = (HashMap::new(), vec![exchange]);
    while let Some(exchange) = next.pop() {
        // Taken out: an exchange that several ways lead to is gone through once.
        for binding in from.remove(exchange).unwrap_or_default() {
            if binding.destination_type == "queue" {
                *ways.entry(binding.destination.clone()).or_default() += 1;
            } else {
                next.push(&binding.destination);
            }
        }
    }
    Ways(ways)
}

/// Within the deadline.
async fn told<T>(answer: impl Future<Output = anyhow::Result<T>>) -> Option<T> {
    let late = |_| Err(anyhow::anyhow!("no answer within {DEADLINE:?}"));
    let answer = timeout(DEADLINE, answer).await.unwrap_or_else(late);
    answer
        .inspect_err(|error| tracing::warn!("the broker's management API does not answer: {}", with_causes(error)))
        .ok()
}

impl Queues {
    pub fn get(&self, name: &SubscriptionName) -> Option<&Queue> {
        self.0.get(name.queue())
    }

    /// Queues to which `ways` lead and that are none of these.
    pub fn unregistered(&self, ways: &Ways, registered: &[Registered]) -> Vec<Unregistered> {
        let is_registered = |queue: &str| registered.iter().any(|row| row.name().queue() == queue);
        let mut found: Vec<Unregistered> = ways
            .0
            .iter()
            .filter(|(queue, _)| !is_registered(queue))
            .map(|(queue, bindings)| {
                let Queue { ready, consumers, .. } = self.0.get(queue).copied().unwrap_or_default();
                Unregistered { queue: queue.clone(), ready, consumers, bindings: *bindings }
            })
            .collect();
        found.sort_by(|one, other| one.queue.cmp(&other.queue));
        found
    }
}

/// The API gives seconds, null, or an empty string.
fn seconds<'de, D: serde::Deserializer<'de>>(given: D) -> Result<Option<OffsetDateTime>, D::Error> {
    let given = serde_json::Value::deserialize(given)?;
    Ok(given.as_i64().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_queue_is_found_by_every_way_and_also_where_exchanges_go_round_in_circles() {
        let binding = |(source, destination_type, destination): (&str, &str, &str)| Binding {
            source: source.to_owned(),
            destination: destination.to_owned(),
            destination_type: destination_type.to_owned(),
        };
        let bindings = [
            ("ours", "queue", "orders"),
            ("ours", "queue", "orders"),
            ("ours", "exchange", "one"),
            ("ours", "exchange", "other"),
            ("one", "exchange", "other"),
            ("other", "exchange", "one"),
            ("other", "queue", "billing"),
            ("theirs", "exchange", "ours"),
            ("theirs", "queue", "orders"),
        ];
        let Ways(found) = ways("ours", &bindings.map(binding));
        assert_eq!(found, [("orders".to_owned(), 2), ("billing".to_owned(), 1)].into());
    }

    #[test]
    fn what_the_broker_does_not_tell_is_not_zero() {
        let told = json!([{ "name": "new" }, { "name": "old", "messages_ready": 0, "consumers": 2, "head_message_timestamp": "" }]);
        let told: Vec<NamedQueue> = serde_json::from_value(told).unwrap();
        let queues = Queues(told.into_iter().map(|named| (named.name, named.queue)).collect());
        let ways = Ways(["new", "old"].map(|queue| (queue.to_owned(), 1)).into());
        let figures = queues.unregistered(&ways, &[]);
        let figures: Vec<_> = figures.iter().map(|found| (found.ready, found.consumers)).collect();
        assert_eq!(figures, [(None, None), (Some(0), Some(2))]);
    }
}
