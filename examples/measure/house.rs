//! What is measured: the release binary in a process of its own, on a database that is made for it and goes with it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, ensure};
use reqwest::Url;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tidings::telemetry::with_causes;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::{sleep, timeout},
};
use uuid::Uuid;

/// Of a profile of the usual size: what is read and rewritten.
pub const PROFILE: &str = r#"{"first_name":"Ana","last_name":"Example","email":"ana@example.org","phone":"+49 30 1234567","job_title":"Author 0000000000","company":"Example Ltd","address":"1 Example Street, 12345 Example","city":"Example","country":"DE","language":"de","timezone":"Europe/Berlin","social":{"mastodon":"@ana@example.org"}}"#;

const PATIENCE: Duration = Duration::from_secs(60);

/// The id of the n-th user, the same in SQL and here.
pub fn user(n: u64) -> Uuid {
    Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_0000 | u128::from(n))
}

/// [`user`] in SQL; `n` is an expression of type bigint.
pub fn user_in_sql(n: &str) -> String {
    format!("('00000000-0000-4000-8000-' || lpad(to_hex({n}), 12, '0'))::uuid")
}

/// A database of our own.
pub struct Scratch {
    server: Url,
    pub url: Url,
    name: String,
}

impl Scratch {
    pub async fn create(server: &Url, purpose: &str) -> anyhow::Result<Self> {
        let name = format!("tidings_measure_{purpose}_{}", std::process::id());
        let mut url = server.clone();
        url.set_path(&name);
        let scratch = Self { server: server.clone(), url, name };
        scratch.on_server("create database").await?;
        Ok(scratch)
    }

    pub async fn drop_it(&self) {
        if let Err(error) = self.on_server("drop database if exists").await {
            eprintln!("measure: database {} stays behind: {}", self.name, with_causes(&error));
        }
    }

    async fn on_server(&self, what: &str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(self.server.as_str()).await.context("the database server")?;
        let end = if what.starts_with("drop") { " with (force)" } else { "" };
        sqlx::raw_sql(AssertSqlSafe(format!("{what} {}{end}", self.name))).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    pub async fn run(&self, sql: &str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(self.url.as_str()).await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// Users 0 to `count` - 1, all with the same profile.
    pub async fn seed(&self, count: u64) -> anyhow::Result<()> {
        self.run(&format!(
            "insert into users (id, version, profile, created_at, updated_at)
             select {}, 1, '{PROFILE}', now(), now() from generate_series(0, {count} - 1) as n",
            user_in_sql("n::bigint")
        ))
        .await?;
        self.run("vacuum analyze users").await
    }

    /// Waits until everything is told.
    pub async fn settle(&self) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(self.url.as_str()).await?;
        timeout(PATIENCE, async {
            while sqlx::query_scalar("select exists (select from outbox)").fetch_one(&mut connection).await? {
                sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        })
        .await
        .context("the relay does not get to the end of the outbox")?
    }
}

/// A running `tidings serve`. Killed when it is dropped.
pub struct Service {
    _child: Child,
    pub address: SocketAddr,
}

impl Service {
    pub async fn start(
        binary: &Path,
        database: &Url,
        amqp_url: &str,
        exchange: &str,
        relay: bool,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(binary)
            .arg("serve")
            .args((!relay).then_some("--no-relay"))
            .env("DATABASE_URL", database.as_str())
            .env("AMQP_URL", amqp_url)
            .env("TIDINGS_EXCHANGE", exchange)
            .env("TIDINGS_LISTEN", "127.0.0.1:0")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} cannot be started", binary.display()))?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let ready = timeout(PATIENCE, lines.next_line()).await.context("it does not get ready")??;
        let address = ready.as_deref().and_then(|line| line.rsplit_once("http://")).map(|(_, address)| address.parse());
        Ok(Self { _child: child, address: address.context("it left, see above")?? })
    }
}

/// The binary that `cargo build --release` made, beside this program.
pub fn binary() -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let binary = here.ancestors().nth(2).context("no folder above this program")?.join("tidings");
    ensure!(binary.exists(), "{} is not there\nhint: cargo build --release", binary.display());
    Ok(binary)
}
