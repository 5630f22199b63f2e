//! Wrk: a second opinion on PATCH and GET at 32 connections, by a load generator that is not ours.
//!
//! It stands beside our own generator's figure of the same round. If ours were what is slow, wrk's would be higher.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use tokio::{process::Command, time::timeout};

use crate::{
    contest::Contest,
    house::House,
    http::KEY,
    load::{Ask, Dice},
    report::{Findings, Row},
    settings::Settings,
};

const CONNECTIONS: u64 = 32;
const PATIENCE: Duration = Duration::from_secs(30);
const SCRIPT: &str = include_str!("wrk.lua");

pub fn turns(_: &Settings) -> u64 {
    4
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let (contest, settings) = (Contest::open(house, "wrk").await?, &house.settings);
    let script = std::env::temp_dir().join(format!("tidings-bench-{}.lua", uuid::Uuid::new_v4()));
    std::fs::write(&script, SCRIPT)?;
    let wrk = Wrk { contest: &contest, settings, script };
    let row = |what| Row::new(format!("{CONNECTIONS} connections, {what} by wrk"), "1/s").limit("own generator");
    let mut rows = [(Ask::Patch, "PATCH", row("PATCH")), (Ask::Get, "GET", row("GET"))];
    contest.ask(CONNECTIONS, settings.time(), Ask::Mixed).await?;
    for round in 1..=settings.rounds {
        eprintln!("bench: wrk, round {round} of {}", settings.rounds);
        for (ask, method, row) in &mut rows {
            let own = contest.ask(CONNECTIONS, settings.time(), *ask).await?.per_second;
            let (per_second, requests) = wrk.run(method).await?;
            if *ask == Ask::Patch {
                contest.check_changed(requests).await?;
            }
            contest.forget().await?;
            row.add(per_second, own);
        }
    }
    Ok(Findings { rows: rows.map(|(_, _, row)| row).into(), ..Findings::default() })
}

struct Wrk<'a> {
    contest: &'a Contest,
    settings: &'a Settings,
    script: PathBuf,
}

impl Wrk<'_> {
    /// Requests a second, and how many they were.
    async fn run(&self, method: &str) -> anyhow::Result<(f64, u64)> {
        let mut command = Command::new("wrk");
        command
            .args(["--threads", "1", "--connections", &CONNECTIONS.to_string()])
            .args(["--duration", &format!("{}s", self.settings.seconds)])
            .arg("--script")
            .arg(&self.script)
            .arg(format!("http://{}", self.contest.service.address))
            .env("BENCH_METHOD", method)
            .env("BENCH_USERS", self.settings.users.to_string())
            .env("BENCH_KEY", &KEY.1)
            .env("BENCH_SEED", Dice::new().roll().to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = timeout(self.settings.time() + PATIENCE, command.output()).await.context("wrk does not end")?;
        let output = output.context("wrk cannot be started\nhint: Debian has it in the package wrk")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk failed: {}", String::from_utf8_lossy(&output.stderr));
        ensure!(!text.contains("Non-2xx"), "wrk was refused:\n{text}");
        let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok());
        let requests = text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
        rate.zip(requests).context("wrk told no rate")
    }
}

impl Drop for Wrk<'_> {
    fn drop(&mut self) {
        // The machine clears up what we cannot.
        let _ = std::fs::remove_file(&self.script);
    }
}
