//! Where the servers are: Postgres, RabbitMQ, and for clients of the API the service itself.
//!
//! Every setting arrives as text, so that all faults are found before any is reported.

use std::path::{Path, PathBuf};

use clap::Args;
use lapin::uri::AMQPUri;
use secrecy::{ExposeSecret, SecretString};
use tidings_sdk::{topology::Source, trust::Trust};

use super::faults::{Faults, Secret, named, path};
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
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", value_parser = path())]
    pub database_url_file: Option<PathBuf>,
}

impl Database {
    pub fn open(&self, faults: &mut Faults) -> Option<Db> {
        Secret { name: "DATABASE_URL", file: self.database_url_file.as_ref() }.parse(faults, Db::new)
    }
}

pub const DEFAULT_EXCHANGE: &str = "masterdata";

/// An exchange, and the broker where it is.
#[derive(Debug, Args)]
pub struct Exchange {
    /// File that holds the URL of the broker. The URL itself is given by AMQP_URL only.
    #[arg(long, env = "AMQP_URL_FILE", value_name = "FILE", value_parser = path())]
    pub amqp_url_file: Option<PathBuf>,
    /// File of the certificate authorities (PEM) by which a broker at an amqps:// address, and its management API at https://, are
    /// known, beside those of this machine.
    #[arg(long, env = "AMQP_CA_FILE", value_name = "FILE", value_parser = path())]
    pub amqp_ca_file: Option<PathBuf>,
    /// Topic exchange that is published to.
    #[arg(long, env = "TIDINGS_EXCHANGE", default_value = DEFAULT_EXCHANGE, value_name = "NAME")]
    pub exchange: String,
}

impl Exchange {
    /// Without the words before its routing keys: for who listens to all of them.
    pub fn open(&self, faults: &mut Faults) -> Option<Broker> {
        let uri = self.url().parse(faults, broker::parse_url);
        let trust = trust("AMQP_CA_FILE", self.amqp_ca_file.as_deref(), faults);
        let exchange = self.name(faults);
        Some(Broker::new(uri?, trust?, exchange?))
    }

    /// Whether it is said where the broker is.
    pub fn is_set(&self) -> bool {
        self.url().is_set()
    }

    fn url(&self) -> Secret<'_> {
        Secret { name: "AMQP_URL", file: self.amqp_url_file.as_ref() }
    }

    fn name(&self, faults: &mut Faults) -> Option<String> {
        faults.note("TIDINGS_EXCHANGE", broker::parse_exchange(&self.exchange))
    }
}

#[derive(Debug, Args)]
pub struct Amqp {
    #[command(flatten)]
    pub exchange: Exchange,
    /// File that holds the URL of the broker with another user, for all but publishing to the exchange: declaring, reading dead letters,
    /// backfilling. The URL itself is given by AMQP_REGISTRY_URL only. Without either, the user of AMQP_URL does it all.
    #[arg(long, env = "AMQP_REGISTRY_URL_FILE", value_name = "FILE", value_parser = path())]
    pub amqp_registry_url_file: Option<PathBuf>,
    /// Words before every routing key: PREFIX.user.deleted.
    #[arg(long, env = "TIDINGS_ROUTING_KEY_PREFIX", value_name = "PREFIX")]
    pub routing_key_prefix: Option<String>,
}

const REGISTRY_URL: &str = "AMQP_REGISTRY_URL";

impl Amqp {
    pub fn open(&self, faults: &mut Faults) -> Option<Broker> {
        let broker = self.exchange.open(faults);
        let registry = Secret { name: REGISTRY_URL, file: self.amqp_registry_url_file.as_ref() };
        let registry = registry.parse_if_set(faults, broker::parse_url);
        let prefix = self.prefix(faults);
        let broker = broker?.with_prefix(prefix?);
        Some(match registry? {
            Some(uri) => broker.with_registry(uri),
            None => broker,
        })
    }

    /// What is published to, wherever the broker is.
    pub fn source(&self, faults: &mut Faults) -> Option<Source> {
        let (exchange, prefix) = (self.exchange.name(faults), self.prefix(faults));
        Some(Source { exchange: exchange?, prefix: prefix? })
    }

    fn prefix(&self, faults: &mut Faults) -> Option<Option<String>> {
        let prefix = self.routing_key_prefix.as_deref().map(broker::parse_prefix).transpose();
        faults.note("TIDINGS_ROUTING_KEY_PREFIX", prefix)
    }
}

/// Whose word is believed, beside those whom this machine believes.
fn trust(setting: &str, file: Option<&Path>, faults: &mut Faults) -> Option<Trust> {
    let Some(file) = file else { return Some(Trust::default()) };
    let file = faults.note(setting, named(file))?;
    faults.note(setting, Trust::in_file(file))
}

/// The broker's management API, which is asked for what AMQP does not tell.
#[derive(Debug, Args)]
pub struct ManagementApi {
    /// File that holds the URL of the broker's management API, https://USER:PASSWORD@HOST:15671. The URL itself is given by
    /// TIDINGS_RABBITMQ_MANAGEMENT_URL only. Without either, unacknowledged messages and unregistered queues are not told.
    #[arg(long, env = "TIDINGS_RABBITMQ_MANAGEMENT_URL_FILE", value_name = "FILE", value_parser = path())]
    pub rabbitmq_management_url_file: Option<PathBuf>,
}

pub(super) const MANAGEMENT_URL: &str = "TIDINGS_RABBITMQ_MANAGEMENT_URL";

impl ManagementApi {
    /// `None` when it is not set up.
    pub fn open(&self, broker: &Broker, faults: &mut Faults) -> Option<Management> {
        let url = Secret { name: MANAGEMENT_URL, file: self.rabbitmq_management_url_file.as_ref() };
        url.parse_if_set(faults, |url| Management::new(url, broker)).flatten()
    }

    /// Notes what is wrong with it where the broker's own settings are wrong: it is told with them.
    pub fn check(&self, faults: &mut Faults) {
        self.open(&Broker::new(AMQPUri::default(), Trust::default(), DEFAULT_EXCHANGE.to_owned()), faults);
    }
}

/// The API, for commands that are its clients.
#[derive(Debug, Args)]
pub struct Api {
    /// Address of the service.
    #[arg(long = "url", env = "TIDINGS_URL", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub url: String,
    /// File that holds the key to it. The key itself is given by TIDINGS_API_KEY only.
    #[arg(long, env = "TIDINGS_API_KEY_FILE", value_name = "FILE", value_parser = path())]
    pub api_key_file: Option<PathBuf>,
    /// PEM file of the certification authorities to trust at an https URL, beside those of this machine.
    #[arg(long, env = "TIDINGS_CA_FILE", value_name = "FILE", value_parser = path())]
    pub ca_file: Option<PathBuf>,
}

pub(super) const API_KEY: &str = "TIDINGS_API_KEY";

impl Api {
    /// Where it is, in one spelling.
    pub fn address(&self, faults: &mut Faults) -> Option<String> {
        faults.note("TIDINGS_URL", import::address(&self.url))
    }

    pub fn trust(&self, faults: &mut Faults) -> Option<Trust> {
        trust("TIDINGS_CA_FILE", self.ca_file.as_deref(), faults)
    }

    /// `None` when none is set: a service without keys wants none.
    pub fn key(&self, faults: &mut Faults) -> Option<SecretString> {
        let is_one = |key: &SecretString| key.expose_secret().bytes().all(|byte| byte.is_ascii_graphic());
        let parse = |key: &SecretString| is_one(key).then(|| key.clone()).ok_or("holds characters that no key has");
        self.secret().parse_if_set(faults, parse).flatten()
    }

    /// The setting that the key comes from.
    pub fn key_setting(&self) -> String {
        self.secret().setting()
    }

    fn secret(&self) -> Secret<'_> {
        Secret { name: API_KEY, file: self.api_key_file.as_ref() }
    }
}
