//! Pgbench: what Postgres can do when each client talks to it directly, with the same statements at the same database.
//!
//! The service can do more than that, as it gathers what comes in at the same time. Statements are prepared, and planned once, as the
//! service has them.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, ensure};
use sqlx::postgres::PgConnectOptions;
use tokio::{process::Command, time::timeout};

use crate::{
    figures::{Latencies, Round},
    scratch::{PROFILE, Scratch, user_in_sql},
};

/// Connecting is counted in its time, though not in its rate. On a busy machine a second is enough for so many clients.
const CLIENTS_PER_SECOND: u64 = 64;
/// For the last transactions.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Pgbench {
    program: PathBuf,
    options: PgConnectOptions,
    password: String,
    /// For scripts and logs.
    folder: PathBuf,
}

/// What one client does, again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// The user and the event in one statement. Each client has users of its own.
    Patch,
    /// The same, of one user.
    PatchOne,
    Get,
}

pub struct Run<'a> {
    /// With what share of all transactions each is to have.
    pub scripts: &'a [(Script, u32)],
    pub clients: u64,
    pub users: u64,
    pub seconds: u64,
}

impl Pgbench {
    pub fn new(database: &Scratch) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("tidings-pgbench-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir_all(&folder)?;
        let password = database.url.password().unwrap_or_default().to_owned();
        Ok(Self { program: find_pgbench()?, options: database.url.as_str().parse()?, password, folder })
    }

    pub async fn run(&self, run: &Run<'_>) -> anyhow::Result<Round> {
        let mut command = self.command(run);
        for (number, (script, weight)) in (0..).zip(run.scripts) {
            let file = self.folder.join(format!("{number}.sql"));
            std::fs::write(&file, script.text())?;
            command.arg(format!("--file={}@{weight}", file.display()));
        }
        let output =
            timeout(Duration::from_secs(run.seconds + run.clients / CLIENTS_PER_SECOND) + PATIENCE, command.output())
                .await;
        let output = output.context("pgbench does not end")??;
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "pgbench failed: {errors}");
        let per_second = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
        Ok(Round { per_second: per_second.context("pgbench told no rate")?, latencies_ms: self.take_logs()? })
    }

    fn command(&self, run: &Run<'_>) -> Command {
        let seconds = run.seconds + run.clients / CLIENTS_PER_SECOND;
        let mut command = Command::new(&self.program);
        command
            .args(["--no-vacuum", "--protocol=prepared", "--log", "--log-prefix=round"])
            .arg(format!("--jobs={}", run.clients.min(2)))
            .args([format!("--client={}", run.clients), format!("--time={seconds}")])
            .args([format!("--define=clients={}", run.clients), format!("--define=profile={PROFILE}")])
            .arg(format!("--define=own={}", run.users / run.clients))
            .current_dir(&self.folder)
            .env("PGHOST", self.options.get_host())
            .env("PGPORT", self.options.get_port().to_string())
            .env("PGUSER", self.options.get_username())
            .env("PGDATABASE", self.options.get_database().unwrap_or_default())
            .env("PGPASSWORD", &self.password)
            // As the service has it: planning anew would cost more than running.
            .env("PGOPTIONS", "-c plan_cache_mode=force_generic_plan")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// One line a transaction; the third column is what it took.
    fn take_logs(&self) -> anyhow::Result<Latencies> {
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
        Ok(Latencies::of(latencies_ms))
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        // Scripts and logs in the temporary folder; the machine clears up what we cannot.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Script {
    fn text(self) -> String {
        let user = user_in_sql(":n::bigint");
        let n = if self == Self::PatchOne { "0" } else { ":client_id + :clients * random(0, :own - 1)" };
        let statement = match self {
            Self::Patch | Self::PatchOne => format!(
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
            Self::Get => {
                format!("select id, version, profile, created_at, updated_at, deleted_at from users where id = {user};")
            }
        };
        format!("\\set n {n}\n{statement}\n")
    }
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
