//! Service: the release binary in a process of its own, as a deployment would run it: keys on, a schema of its own.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use tidings::clients::{self, NewClient, Scope};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use url::Url;

use crate::{http::KEY, scratch::Scratch};

const PATIENCE: Duration = Duration::from_secs(60);
/// For a command to do all it has to: the longest brings a million users in.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3600);

/// Whether the service carries what it keeps to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relay {
    Here,
    /// What pgbench does, and no more.
    Off,
}

/// What every service of a run has in common.
pub struct Deployment<'a> {
    pub binary: &'a Path,
    pub amqp_url: &'a Url,
    pub exchange: &'a str,
    pub schema: &'a Path,
}

/// A running `tidings serve`. Killed when it is dropped.
pub struct Service {
    _child: Child,
    pub pid: u32,
    pub address: SocketAddr,
}

impl Deployment<'_> {
    pub async fn serve(&self, database: &Scratch, relay: Relay) -> anyhow::Result<Service> {
        let mut child = self
            .command(database)
            .arg("serve")
            .args((relay == Relay::Off).then_some("--no-relay"))
            .env("TIDINGS_LISTEN", "127.0.0.1:0")
            // As fast as it can is more than one client may.
            .env("TIDINGS_RATE_LIMIT", "off")
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} cannot be started", self.binary.display()))?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let ready = timeout(PATIENCE, lines.next_line()).await.context("it does not get ready")??;
        let address = ready.as_deref().and_then(|line| line.rsplit_once("http://")).map(|(_, address)| address.parse());
        let (pid, address) = (child.id().context("it left, see above")?, address.context("it left, see above")??);
        admit_key(database).await?;
        Ok(Service { _child: child, pid, address })
    }

    pub async fn migrate(&self, database: &Scratch) -> anyhow::Result<()> {
        self.run(database, &["migrate"]).await
    }

    /// Another command, to its end; what it says is shown if it fails.
    pub async fn run(&self, database: &Scratch, arguments: &[&str]) -> anyhow::Result<()> {
        let output = timeout(COMMAND_DEADLINE, self.command(database).args(arguments).output()).await;
        let output = output.with_context(|| format!("{} does not end", arguments[0]))??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} failed: {said}", arguments[0]);
        Ok(())
    }

    fn command(&self, database: &Scratch) -> Command {
        let mut command = Command::new(self.binary);
        command
            .env("DATABASE_URL", database.url.as_str())
            .env("AMQP_URL", self.amqp_url.as_str())
            .env("TIDINGS_EXCHANGE", self.exchange)
            .env("TIDINGS_PROFILE_SCHEMA", self.schema)
            // For commands that are clients.
            .env("TIDINGS_API_KEY", &KEY.1)
            .kill_on_drop(true);
        command
    }
}

/// Lets the key in that the requests carry, unless it was let in before.
async fn admit_key(database: &Scratch) -> anyhow::Result<()> {
    let mut connection = database.connect().await?;
    let client = NewClient::named("bench", [Scope::ReadUsers, Scope::WriteUsers])?;
    if clients::create(&mut connection, &client).await? {
        clients::issue(&mut connection, &client.name, &KEY.0, None).await?;
    }
    Ok(sqlx::Connection::close(connection).await?)
}
