//! Scratch: a database that is made for one purpose and goes with it.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tidings::telemetry::with_causes;
use tokio::time::{sleep, timeout};
use url::Url;
use uuid::Uuid;

/// Of a profile of the usual size: what is read and rewritten.
pub const PROFILE: &str = r#"{"first_name":"Ana","last_name":"Example","email":"ana@example.org","phone":"+49 30 1234567","job_title":"Author 0000000000","company":"Example Ltd","address":"1 Example Street, 12345 Example","city":"Example","country":"DE","language":"de","timezone":"Europe/Berlin","social":{"mastodon":"@ana@example.org"}}"#;

/// For the relay to get to the end of what a measure left behind.
const PATIENCE: Duration = Duration::from_secs(120);

/// The id of the n-th user, the same in SQL and here.
pub fn user(n: u64) -> Uuid {
    Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_0000 | u128::from(n))
}

/// [`user`] in SQL; `n` is an expression of type bigint.
pub fn user_in_sql(n: &str) -> String {
    format!("('00000000-0000-4000-8000-' || lpad(to_hex({n}), 12, '0'))::uuid")
}

/// A database of our own. It stays until [`Scratch::drop_it`].
#[derive(Clone)]
pub struct Scratch {
    server: Url,
    pub url: Url,
    name: String,
}

impl Scratch {
    pub async fn create(server: &Url, purpose: &str) -> anyhow::Result<Self> {
        let scratch = Self::named(server, purpose);
        on_server(server, &format!("create database {}", scratch.name)).await?;
        Ok(scratch)
    }

    /// With everything that is in this one, to which nobody may be connected.
    pub async fn copy(&self, purpose: &str) -> anyhow::Result<Self> {
        let copy = Self::named(&self.server, purpose);
        on_server(&self.server, &format!("create database {} template {}", copy.name, self.name)).await?;
        Ok(copy)
    }

    fn named(server: &Url, purpose: &str) -> Self {
        let name = format!("tidings_{purpose}_{}", std::process::id());
        let mut url = server.clone();
        url.set_path(&name);
        Self { server: server.clone(), url, name }
    }

    pub async fn drop_it(&self) {
        let dropped = on_server(&self.server, &format!("drop database if exists {} with (force)", self.name)).await;
        if let Err(error) = dropped {
            eprintln!("database {} stays behind: {}", self.name, with_causes(&error));
        }
    }

    pub async fn run(&self, sql: &str) -> anyhow::Result<()> {
        on_server(&self.url, sql).await
    }

    pub async fn connect(&self) -> anyhow::Result<PgConnection> {
        Ok(PgConnection::connect(self.url.as_str()).await?)
    }

    /// Users 0 to `count` - 1, all with the same profile, and each with the entry in the feed that creating him makes.
    pub async fn seed(&self, count: u64) -> anyhow::Result<()> {
        self.run(&format!(
            "insert into users (id, version, profile, created_at, updated_at)
             select {}, 1, '{PROFILE}', now(), now() from generate_series(0, {count} - 1) as n",
            user_in_sql("n::bigint")
        ))
        .await?;
        self.run("insert into changes (xid, user_id) select changed_xid, id from users").await?;
        self.run("vacuum analyze users").await?;
        self.run("vacuum analyze changes").await
    }

    /// Events as changes make them, of one user after the other.
    pub async fn fill_outbox(&self, count: u64) -> anyhow::Result<()> {
        self.run(&format!(
            "insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
             select gen_random_uuid(), 'profile.updated', {}, 2, '[\"job_title\"]',
                    '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00'
               from generate_series(0, {count} - 1) as n",
            user_in_sql("n::bigint")
        ))
        .await?;
        self.run("vacuum analyze outbox").await
    }

    /// That wait to be told.
    pub async fn count_events(&self) -> anyhow::Result<u64> {
        let mut connection = self.connect().await?;
        let events: i64 = sqlx::query_scalar("select count(*) from outbox").fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(u64::try_from(events)?)
    }

    /// The last place in the outbox that was given out.
    pub async fn last_place(&self) -> anyhow::Result<i64> {
        let mut connection = self.connect().await?;
        let last = "select case when is_called then last_value else 0 end from outbox_id_seq";
        Ok(sqlx::query_scalar(last).fetch_one(&mut connection).await?)
    }

    /// Waits until everything is told.
    pub async fn settle(&self) -> anyhow::Result<()> {
        self.settle_past(0).await
    }

    /// Waits until everything past this place is told. Does not look at what was before it: dead rows cost time too, while an old
    /// snapshot keeps them.
    pub async fn settle_past(&self, place: i64) -> anyhow::Result<()> {
        let mut connection = self.connect().await?;
        // In order, so that it goes by the index.
        let next = "select 1 from outbox where id > $1 order by id limit 1";
        timeout(PATIENCE, async {
            while sqlx::query(next).bind(place).fetch_optional(&mut connection).await?.is_some() {
                sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        })
        .await
        .context("the relay does not get to the end of the outbox")?
    }
}

async fn on_server(server: &Url, sql: &str) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(server.as_str()).await.context("the database server")?;
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
    Ok(connection.close().await?)
}

/// The binary that `cargo build --release` made, beside this program or one folder up.
pub fn binary() -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let binary = here.ancestors().skip(1).take(2).map(|folder| folder.join("tidings")).find(|binary| binary.exists());
    binary.context("there is no built tidings beside this program\nhint: cargo build --release")
}
