//! House: what every measure works in. Servers, a stock of users to copy databases from, services on them.
//!
//! Promise: what was made on the servers is taken away again, also after an error or Ctrl-C.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use anyhow::Context;
use lapin::{Connection, ConnectionProperties, options::ExchangeDeleteOptions};
use tokio::time::timeout;
use url::Url;
use uuid::Uuid;

use crate::{
    DEADLINE,
    scratch::{self, Scratch},
    service::{Deployment, Relay, Service},
    settings::Settings,
};

const SCHEMA: &str = include_str!("../profile.schema.json");

pub struct House {
    pub settings: Settings,
    pub pg_url: Url,
    pub amqp_url: Url,
    /// Ours alone; the services make it.
    pub exchange: String,
    binary: PathBuf,
    /// A file of [`SCHEMA`].
    schema: PathBuf,
    /// Databases that are still there, by their purpose.
    made: Mutex<Vec<Scratch>>,
    /// With `settings.users` users. Databases are copied from it, which takes a tenth of the time.
    stock: tokio::sync::OnceCell<Scratch>,
}

impl House {
    pub fn open(settings: Settings) -> anyhow::Result<Self> {
        let (pg_url, amqp_url) =
            settings.servers.both().map(|(pg_url, amqp_url)| (pg_url.clone(), amqp_url.clone()))?;
        let schema = std::env::temp_dir().join(format!("tidings-bench-{}.json", Uuid::new_v4()));
        fs::write(&schema, SCHEMA).context("the temporary folder cannot be written to")?;
        let exchange = format!("tidings.bench.{}", Uuid::new_v4());
        let binary = scratch::binary()?;
        Ok(Self {
            settings,
            pg_url,
            amqp_url,
            exchange,
            binary,
            schema,
            made: Mutex::default(),
            stock: Default::default(),
        })
    }

    /// A database of its own for one purpose, with the users of the settings.
    pub async fn database(&self, purpose: &str) -> anyhow::Result<Scratch> {
        let stock = self.stock.get_or_try_init(|| self.fill_stock()).await?;
        let copy = stock.copy(&format!("bench_{purpose}")).await?;
        self.remember(&copy);
        Ok(copy)
    }

    /// With the schema and nobody in it.
    pub async fn empty_database(&self, purpose: &str) -> anyhow::Result<Scratch> {
        let scratch = Scratch::create(&self.pg_url, &format!("bench_{purpose}")).await?;
        self.remember(&scratch);
        self.deployment().migrate(&scratch).await?;
        Ok(scratch)
    }

    async fn fill_stock(&self) -> anyhow::Result<Scratch> {
        eprintln!("bench: {} users are being made", self.settings.users);
        let stock = self.empty_database("stock").await?;
        stock.seed(self.settings.users).await?;
        Ok(stock)
    }

    pub async fn serve(&self, database: &Scratch, relay: Relay) -> anyhow::Result<Service> {
        self.deployment().serve(database, relay).await
    }

    pub fn deployment(&self) -> Deployment<'_> {
        Deployment { binary: &self.binary, amqp_url: &self.amqp_url, exchange: &self.exchange, schema: &self.schema }
    }

    fn remember(&self, scratch: &Scratch) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(scratch.clone());
    }

    /// Drops the databases that were made, but for the stock. For after each measure.
    pub async fn clear(&self) {
        let stock = self.stock.get();
        self.drop_databases(|made| stock.is_none_or(|stock| made.url != stock.url)).await;
    }

    /// Leaves nothing behind.
    pub async fn leave(&self) {
        self.drop_databases(|_| true).await;
        if let Err(error) = self.delete_exchange().await {
            eprintln!("bench: exchange {} stays behind: {error:#}", self.exchange);
        }
        // The machine clears up what we cannot.
        let _ = fs::remove_file(&self.schema);
    }

    async fn drop_databases(&self, which: impl Fn(&Scratch) -> bool) {
        let gone: Vec<Scratch> = {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            let (gone, kept) = made.drain(..).partition(which);
            *made = kept;
            gone
        };
        for scratch in gone {
            scratch.drop_it().await;
        }
    }

    pub async fn connect_broker(&self) -> anyhow::Result<Connection> {
        let properties = ConnectionProperties::default().with_connection_name("tidings bench".into());
        let connected = timeout(DEADLINE, Connection::connect(self.amqp_url.as_str(), properties)).await;
        connected.context("the broker does not answer")?.context("the broker cannot be reached")
    }

    async fn delete_exchange(&self) -> anyhow::Result<()> {
        let connection = self.connect_broker().await?;
        let channel = connection.create_channel().await?;
        channel.exchange_delete(self.exchange.as_str().into(), ExchangeDeleteOptions::default()).await?;
        Ok(connection.close(200, "bye".into()).await?)
    }
}
