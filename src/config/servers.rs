//! Where the servers are: Postgres, RabbitMQ, and for clients of the API the service itself.
//!
//! Every setting arrives as text, so that all faults are found before any is reported.

use std::path::PathBuf;

use clap::Args;
use lapin::uri::AMQPUri;
use secrecy::{ExposeSecret, SecretString};
use tidings_sdk::{topology::Source, trust::Trust};

use super::faults::{Faults, secret};
use crate::{
    broker::{self, Broker},
    db::Db,
    import,
    subscriptions::Management,
};

#[derive(Debug, Args)]
pub struct Database {
    /// File that holds the URL of the database. The URL itself is given by DATABASE_URL only: the command line is no place for a
    /// password.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE")]
    pub database_url_file: Option<PathBuf>,
}

impl Database {
    pub fn open(&self, faults: &mut Faults) -> Option<Db> {
        let url = faults.note("DATABASE_URL", secret("DATABASE_URL", self.database_url_file.as_ref()))?;
        faults.note("DATABASE_URL", Db::new(&url))
    }
}

pub const DEFAULT_EXCHANGE: &str = "masterdata";

#[derive(Debug, Args)]
pub struct Amqp {
    /// File that holds the URL of the broker. The URL itself is given by AMQP_URL only.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE")]
    pub amqp_url_file: Option<PathBuf>,
    /// File that holds the URL of the broker with another user, for all but publishing to the exchange: declaring, reading dead letters,
    /// backfilling. The URL itself is given by AMQP_REGISTRY_URL only. Without either, the user of AMQP_URL does it all.
    #[arg(long, env = "AMQP_REGISTRY_URL_FILE", value_name = "FILE")]
    pub amqp_registry_url_file: Option<PathBuf>,
    /// File of the certificate authorities (PEM) by which a broker at an amqps:// address, and its management API at https://, are
    /// known, beside those of this machine.
    #[arg(long, env = "AMQP_CA_FILE", value_name = "FILE")]
    pub amqp_ca_file: Option<PathBuf>,
    /// Topic exchange to publish to.
    #[arg(long, env = "TIDINGS_EXCHANGE", default_value = DEFAULT_EXCHANGE, value_name = "NAME")]
    pub exchange: String,
    /// Words before every routing key: PREFIX.user.deleted.
    #[arg(long, env = "TIDINGS_ROUTING_KEY_PREFIX", value_name = "PREFIX")]
    pub routing_key_prefix: Option<String>,
}

const REGISTRY_URL: &str = "AMQP_REGISTRY_URL";

impl Amqp {
    pub fn open(&self, faults: &mut Faults) -> Option<Broker> {
        let url = faults.note("AMQP_URL", secret("AMQP_URL", self.amqp_url_file.as_ref()));
        let uri = url.and_then(|url| faults.note("AMQP_URL", broker::parse_url(&url)));
        let trust = self.amqp_ca_file.as_ref().map_or_else(|| Ok(Trust::default()), Trust::in_file);
        let trust = faults.note("AMQP_CA_FILE", trust);
        let registry = faults.note(REGISTRY_URL, self.registry());
        let Source { exchange, prefix } = self.source(faults)?;
        let broker = Broker::new(uri?, trust?, exchange, prefix);
        Some(match registry? {
            Some(uri) => broker.with_registry(uri),
            None => broker,
        })
    }

    /// What is published to, wherever the broker is.
    pub fn source(&self, faults: &mut Faults) -> Option<Source> {
        let exchange = faults.note("TIDINGS_EXCHANGE", broker::parse_exchange(&self.exchange));
        let prefix = self.routing_key_prefix.as_deref().map(broker::parse_prefix).transpose();
        let prefix = faults.note("TIDINGS_ROUTING_KEY_PREFIX", prefix);
        Some(Source { exchange: exchange?, prefix: prefix? })
    }

    fn registry(&self) -> anyhow::Result<Option<AMQPUri>> {
        let file = self.amqp_registry_url_file.as_ref();
        if file.is_none() && std::env::var_os(REGISTRY_URL).is_none() {
            return Ok(None);
        }
        let url = secret(REGISTRY_URL, file).map_err(anyhow::Error::msg)?;
        broker::parse_url(&url).map(Some)
    }
}

/// The broker's management API, which is asked for what AMQP does not tell.
#[derive(Debug, Args)]
pub struct ManagementApi {
    /// File that holds the URL of the broker's management API, https://USER:PASSWORD@HOST:15671. The URL itself is given by
    /// TIDINGS_RABBITMQ_MANAGEMENT_URL only. Without either, unacknowledged messages and unregistered queues are not told.
    #[arg(long, env = "TIDINGS_RABBITMQ_MANAGEMENT_URL_FILE", value_name = "FILE")]
    pub rabbitmq_management_url_file: Option<PathBuf>,
}

pub(super) const MANAGEMENT_URL: &str = "TIDINGS_RABBITMQ_MANAGEMENT_URL";

impl ManagementApi {
    /// `None` when it is not set up.
    pub fn open(&self, broker: &Broker, faults: &mut Faults) -> Option<Management> {
        let (file, is_set) = (&self.rabbitmq_management_url_file, std::env::var_os(MANAGEMENT_URL).is_some());
        if file.is_none() && !is_set {
            return None;
        }
        let url = faults.note(MANAGEMENT_URL, secret(MANAGEMENT_URL, file.as_ref()))?;
        faults.note(MANAGEMENT_URL, Management::new(&url, broker))
    }
}

/// The API, for commands that are its clients.
#[derive(Debug, Args)]
pub struct Api {
    /// Address of the service.
    #[arg(long = "url", env = "TIDINGS_URL", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub url: String,
    /// File that holds the key to it. The key itself is given by TIDINGS_API_KEY only.
    #[arg(long, env = "TIDINGS_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// PEM file of the certification authorities to trust at an https URL, beside those of this machine.
    #[arg(long, env = "TIDINGS_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}

pub(super) const API_KEY: &str = "TIDINGS_API_KEY";

impl Api {
    /// Where it is, in one spelling.
    pub fn address(&self, faults: &mut Faults) -> Option<String> {
        faults.note("TIDINGS_URL", import::address(&self.url))
    }

    pub fn trust(&self, faults: &mut Faults) -> Option<Trust> {
        let trust = self.ca_file.as_ref().map_or_else(|| Ok(Trust::default()), Trust::in_file);
        faults.note("TIDINGS_CA_FILE", trust)
    }

    /// `None` when none is set: a service without keys wants none.
    pub fn key(&self, faults: &mut Faults) -> Option<SecretString> {
        if self.api_key_file.is_none() && std::env::var_os(API_KEY).is_none() {
            return None;
        }
        let key = secret(API_KEY, self.api_key_file.as_ref());
        let is_one = |key: &SecretString| key.expose_secret().bytes().all(|byte| byte.is_ascii_graphic());
        let key =
            key.and_then(|key| if is_one(&key) { Ok(key) } else { Err("holds characters that no key has".to_owned()) });
        faults.note(API_KEY, key)
    }
}
