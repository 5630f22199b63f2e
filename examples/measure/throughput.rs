//! As much as goes: closed loops at the service, and pgbench with the same statements at the same server.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use reqwest::Url;
use sqlx::postgres::PgConnectOptions;
use tokio::{process::Command, task::JoinSet};
use uuid::Uuid;

use crate::{
    Settings,
    figures::Round,
    house::{PROFILE, user, user_in_sql},
    http::{self, Client},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Patch,
    Get,
}

/// Every connection asks again as soon as it was answered. Each has users of its own, so that nobody waits for a row.
pub async fn service(settings: &Settings, address: SocketAddr, kind: Kind, seconds: u64) -> anyhow::Result<Round> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut connections = JoinSet::new();
    for connection in 0..settings.connections {
        let (connections_in_all, own) = (settings.connections, settings.users_per_connection());
        let mut client = Client::connect(address).await?;
        connections.spawn(async move {
            let (mut latencies_ms, mut dice) = (vec![], Uuid::new_v4().as_u64_pair().0);
            while Instant::now() < end {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let user = user(connection + connections_in_all * ((dice >> 33) % own));
                let request = match kind {
                    Kind::Patch => http::patch(user, dice % 10_000_000_000),
                    Kind::Get => http::get(user),
                };
                let began = Instant::now();
                client.ask(&request).await?;
                latencies_ms.push(began.elapsed().as_secs_f64() * 1e3);
            }
            anyhow::Ok(latencies_ms)
        });
    }
    let mut latencies_ms = vec![];
    while let Some(connection) = connections.join_next().await {
        latencies_ms.extend(connection??);
    }
    Ok(Round { per_second: latencies_ms.len() as f64 / seconds as f64, latencies_ms })
}

pub struct Pgbench {
    program: PathBuf,
    options: PgConnectOptions,
    password: String,
    /// For scripts and logs.
    folder: PathBuf,
}

impl Pgbench {
    pub fn new(database: &Url) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("tidings-measure-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let password = database.password().unwrap_or_default().to_owned();
        Ok(Self { program: find_pgbench()?, options: database.as_str().parse()?, password, folder })
    }

    pub async fn run(&self, settings: &Settings, kind: Kind, seconds: u64) -> anyhow::Result<Round> {
        let script = self.folder.join("script.sql");
        std::fs::write(&script, self::script(kind))?;
        let output = Command::new(&self.program)
            .args(["--no-vacuum", "--protocol=prepared", "--jobs=2", "--log", "--log-prefix=round"])
            .args([format!("--client={}", settings.connections), format!("--time={seconds}")])
            .args([format!("--define=clients={}", settings.connections)])
            .args([format!("--define=own={}", settings.users_per_connection()), format!("--define=profile={PROFILE}")])
            .arg(format!("--file={}", script.display()))
            .current_dir(&self.folder)
            .env("PGHOST", self.options.get_host())
            .env("PGPORT", self.options.get_port().to_string())
            .env("PGUSER", self.options.get_username())
            .env("PGDATABASE", self.options.get_database().unwrap_or_default())
            .env("PGPASSWORD", &self.password)
            // As the service has it: planning anew would cost more than running.
            .env("PGOPTIONS", "-c plan_cache_mode=force_generic_plan")
            .stdin(Stdio::null())
            .output()
            .await?;
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "pgbench failed: {errors}");
        let per_second = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
        Ok(Round { per_second: per_second.context("pgbench told no rate")?, latencies_ms: self.take_logs()? })
    }

    /// One line a transaction; the third column is what it took.
    fn take_logs(&self) -> anyhow::Result<Vec<f64>> {
        let mut latencies_ms = vec![];
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("round.")) {
                let log = std::fs::read_to_string(&path)?;
                let took_us = log.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<f64>().ok());
                latencies_ms.extend(took_us.map(|us| us / 1e3));
                std::fs::remove_file(path)?;
            }
        }
        Ok(latencies_ms)
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        // Scripts and logs in the temporary folder; the machine clears up what we cannot.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn script(kind: Kind) -> String {
    let user = user_in_sql(":n::bigint");
    let statement = match kind {
        Kind::Patch => format!(
            "with changed as (
  update users set version = version + 1, profile = :profile::json, updated_at = now()
   where id = {user} and deleted_at is null
  returning id, version
)
insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
select gen_random_uuid(), 'profile.updated', id, version, '[\"job_title\"]',
       '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00'
  from changed;"
        ),
        Kind::Get => {
            format!("select id, version, profile, created_at, updated_at, deleted_at from users where id = {user};")
        }
    };
    format!("\\set n :client_id + :clients * random(0, :own - 1)\n{statement}\n")
}

/// In the path, or where Debian keeps it.
fn find_pgbench() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join("pgbench"));
    let versions = std::fs::read_dir(Path::new("/usr/lib/postgresql")).into_iter().flatten().flatten();
    let installed = versions.map(|version| version.path().join("bin/pgbench"));
    in_path
        .chain(installed)
        .find(|program| program.exists())
        .context("there is no pgbench\nhint: it comes with Postgres (Debian: postgresql-contrib or postgresql)")
}
