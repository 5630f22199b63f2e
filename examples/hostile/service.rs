//! The service under siege: the release binary in a process of its own, with the limits that it comes with.

use std::{net::SocketAddr, process::Stdio, sync::LazyLock, time::Duration};

use anyhow::Context;
use secrecy::ExposeSecret;
use sqlx::{Connection, PgConnection};
use tidings::{
    clients::{self, Key, NewClient, Scope},
    web::Rate,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    http,
    scratch::{Scratch, binary},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// What is under siege is everything behind the rate limit.
const NO_LIMIT: &str = "1000000/1000000";

/// The key of the attackers who have one.
pub static HOSTILE_KEY: LazyLock<(Key, String)> = LazyLock::new(|| {
    let (key, text) = Key::generate().expect("the operating system has random bits");
    (key, text.expose_secret().to_owned())
});

async fn admit(connection: &mut PgConnection, name: &str, rate: Option<Rate>, key: &Key) -> anyhow::Result<()> {
    let client = NewClient { rate, ..NewClient::named(name, [Scope::ReadUsers, Scope::WriteUsers])? };
    clients::create(&mut *connection, &client).await?;
    clients::issue(connection, name, key, None).await?;
    Ok(())
}

/// Killed when it is dropped.
pub struct Service {
    _child: Child,
    pub pid: u32,
    pub address: SocketAddr,
}

impl Service {
    pub async fn start(scratch: &Scratch, amqp_url: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(binary()?)
            .arg("serve")
            .env("DATABASE_URL", scratch.url.as_str())
            .env("AMQP_URL", amqp_url)
            .env("TIDINGS_EXCHANGE", format!("tidings.hostile.{}", Uuid::new_v4()))
            .env("TIDINGS_LISTEN", "127.0.0.1:0")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("the service cannot be started")?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let ready = timeout(PATIENCE, lines.next_line()).await.context("it does not get ready")??;
        let address = ready.as_deref().and_then(|line| line.rsplit_once("http://")).map(|(_, address)| address.parse());
        let pid = child.id().context("it left, see above")?;
        let service = Self { _child: child, pid, address: address.context("it left, see above")?? };
        let mut connection = PgConnection::connect(scratch.url.as_str()).await?;
        admit(&mut connection, "healthy", None, &http::KEY.0).await?;
        admit(&mut connection, "hostile", Some(NO_LIMIT.parse().map_err(anyhow::Error::msg)?), &HOSTILE_KEY.0).await?;
        connection.close().await?;
        Ok(service)
    }
}
