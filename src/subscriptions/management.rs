//! Management: what only RabbitMQ's management API tells. Optional.
//!
//! Promise: without it, or when it does not answer, everything else goes on and these figures are missing.
//! Not here, on purpose: messages, and anything that changes the broker.

use std::{collections::HashMap, time::Duration};

use reqwest::{Client, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;

use super::model::Registered;

/// For one question: nobody waits for a broker that is busy with itself.
const DEADLINE: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub struct Management {
    http: Client,
    url: Url,
    vhost: String,
    exchange: String,
}

/// What the API tells of all queues that hear us.
#[derive(Debug, Clone, Default)]
pub struct Queues {
    by_name: HashMap<String, Queue>,
    /// Ways from our exchange to queues.
    bindings: HashMap<String, u32>,
}

/// What the API tells of a queue.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Queue {
    #[serde(default, rename = "messages_ready")]
    pub ready: u64,
    #[serde(default, rename = "messages_unacknowledged")]
    pub unacknowledged: u64,
    #[serde(default)]
    pub consumers: u64,
    #[serde(default, rename = "head_message_timestamp", deserialize_with = "seconds")]
    pub head_message_at: Option<OffsetDateTime>,
}

/// A queue that hears our exchange and that nobody registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Unregistered {
    #[schema(example = "somebody.elses")]
    pub queue: String,
    /// Messages that wait in it.
    pub ready: u64,
    pub consumers: u64,
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
    destination: String,
    destination_type: String,
}

impl Management {
    /// # Errors
    /// When `url` is no HTTP URL. The URL is not repeated: it holds a password.
    pub fn new(url: &SecretString, vhost: &str, exchange: &str) -> anyhow::Result<Self> {
        const WRONG: &str = "expected http://USER:PASSWORD@HOST:15672 (TLS is not built in)";
        let url: Url = url.expose_secret().parse().map_err(|_| anyhow::anyhow!(WRONG))?;
        anyhow::ensure!(url.scheme() == "http" && url.has_host(), WRONG);
        // The broker is asked, and not whatever stands between.
        let http = Client::builder().timeout(DEADLINE).no_proxy().build()?;
        Ok(Self { http, url, vhost: vhost.to_owned(), exchange: exchange.to_owned() })
    }

    /// All queues that hear us; `None` when the API does not tell, which the log says.
    pub async fn queues(&self) -> Option<Queues> {
        let (queues, bindings) = tokio::join!(self.all_queues(), self.bindings());
        match (queues, bindings) {
            (Ok(by_name), Ok(bindings)) => Some(Queues { by_name, bindings }),
            (Err(error), _) | (_, Err(error)) => {
                let error = anyhow::Error::from(error.without_url());
                tracing::warn!(
                    "the broker's management API does not answer: {}",
                    crate::telemetry::with_causes(&error)
                );
                None
            }
        }
    }

    async fn all_queues(&self) -> reqwest::Result<HashMap<String, Queue>> {
        const COLUMNS: &str = "name,messages_ready,messages_unacknowledged,consumers,head_message_timestamp";
        let mut url = self.path(&["queues", &self.vhost]);
        url.query_pairs_mut().append_pair("columns", COLUMNS);
        let queues: Vec<NamedQueue> = self.ask(url).await?;
        Ok(queues.into_iter().map(|named| (named.name, named.queue)).collect())
    }

    /// From our exchange, and from exchanges bound behind it: how many ways lead to each queue.
    async fn bindings(&self) -> reqwest::Result<HashMap<String, u32>> {
        let mut ways = HashMap::new();
        let mut exchanges = vec![self.exchange.clone()];
        let mut next = 0;
        while let Some(exchange) = exchanges.get(next).cloned() {
            next += 1;
            let url = self.path(&["exchanges", &self.vhost, &exchange, "bindings", "source"]);
            for binding in self.ask::<Vec<Binding>>(url).await? {
                if binding.destination_type == "queue" {
                    *ways.entry(binding.destination).or_default() += 1;
                } else if !exchanges.contains(&binding.destination) {
                    exchanges.push(binding.destination);
                }
            }
        }
        Ok(ways)
    }

    fn path(&self, steps: &[&str]) -> Url {
        let mut url = self.url.clone();
        url.path_segments_mut().expect("an HTTP URL has a path").pop_if_empty().push("api").extend(steps);
        url
    }

    async fn ask<T: DeserializeOwned>(&self, url: Url) -> reqwest::Result<T> {
        self.http.get(url).send().await?.error_for_status()?.json().await
    }
}

impl Queues {
    pub fn get(&self, name: &SubscriptionName) -> Option<&Queue> {
        self.by_name.get(name.queue())
    }

    /// Queues that hear us and are none of these.
    pub fn unregistered(&self, registered: &[Registered]) -> Vec<Unregistered> {
        let is_registered = |queue: &str| registered.iter().any(|row| row.name().queue() == queue);
        let mut found: Vec<Unregistered> = self
            .bindings
            .iter()
            .filter(|(queue, _)| !is_registered(queue))
            .map(|(queue, bindings)| {
                let told = self.by_name.get(queue);
                let (ready, consumers) = told.map_or((0, 0), |told| (told.ready, told.consumers));
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
