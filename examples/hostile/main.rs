//! Treats the service as badly as a client can, and sees whether anybody else notices.
//!
//! ```sh
//! ./dev hostile
//! ```
//!
//! It makes a database on the server of `DATABASE_URL`, starts a service on it with the limits it comes with, and then, one after the
//! other: clients who send their headers a byte a second, or their bodies; who ask and do not read; who connect and say nothing; and
//! a million requests that are wrong in all the ways there are. Meanwhile healthy clients ask at a steady pace. All of it stays on the
//! loopback addresses of this machine and ends by itself.
//!
//! How to read the table: the 99th percentile of the healthy clients stands beside that of the quiet seconds before and after, in the
//! same run. The attackers run at the lowest priority, as they would have machines of their own; what they cost the service they cost
//! it, what they cost the machine they do not. Memory is the service's resident set. It exits 1 when anything was not as it should be.

mod attack;
mod corpus;
mod healthy;
#[path = "../../bench/src/http.rs"]
#[expect(dead_code, reason = "shared with bench, which needs all of it")]
mod http;
mod observe;
#[path = "../../bench/src/scratch.rs"]
#[expect(dead_code, reason = "shared with bench, which needs all of it")]
mod scratch;
mod service;

use std::{
    collections::BTreeMap,
    io::{Write, stdout},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{Parser, value_parser};
use reqwest::Url;
use tidings::telemetry::with_causes;
use tokio::{process::Command, signal::ctrl_c, time::sleep};

use crate::{
    attack::{Attack, Kind},
    healthy::{Healthy, Seen},
    observe::Observed,
    scratch::Scratch,
    service::Service,
};

/// Treat the service as badly as a client can, and see whether anybody else notices.
#[derive(Parser)]
struct Settings {
    /// A Postgres on which a database may be created.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pg_url: Option<Url>,
    #[arg(long, env = "AMQP_URL", hide_env_values = true)]
    amqp_url: Option<String>,
    /// Hostile requests.
    #[arg(long, default_value_t = 1_000_000, value_parser = value_parser!(u64).range(1..=100_000_000))]
    requests: u64,
    /// For each kind of slowness.
    #[arg(long, default_value_t = 40, value_parser = value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Connections that say nothing; there is room for 10,000.
    #[arg(long, default_value_t = 12_000)]
    idle: usize,
    /// Of each quiet time between.
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u64).range(1..=600))]
    quiet_seconds: u64,
    /// Only these attacks, and not all one after the other.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Be an attacker: for the program's own use.
    #[arg(long, hide = true, value_enum)]
    attack: Option<Kind>,
    #[arg(long, hide = true)]
    at: Option<std::net::SocketAddr>,
    #[arg(long, hide = true, default_value = "", env = "HOSTILE_KEY", hide_env_values = true)]
    key: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    let outcome = match (settings.attack, settings.at) {
        (Some(kind), Some(at)) => attack::run(&Attack::new(kind, at, &settings)).await.map(|()| true),
        _ => besiege(&settings).await,
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

async fn besiege(settings: &Settings) -> anyhow::Result<bool> {
    let pg_url = settings.pg_url.as_ref().context("DATABASE_URL is not set; ./dev hostile sets it")?;
    let amqp_url = settings.amqp_url.as_ref().context("AMQP_URL is not set; ./dev hostile sets it")?;
    let scratch = Scratch::create(pg_url, "hostile").await?;
    let outcome = tokio::select! {
        outcome = siege(settings, &scratch, amqp_url) => outcome,
        _ = ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    scratch.drop_it().await;
    outcome
}

const USERS: u64 = 2000;
/// The service has closed what it closes by then: the longest of its deadlines, and something for a busy machine.
const AFTERWARDS: Duration = Duration::from_secs(45);

async fn siege(settings: &Settings, scratch: &Scratch, amqp_url: &str) -> anyhow::Result<bool> {
    let service = Service::start(scratch, amqp_url).await?;
    let pid = service.pid;
    scratch.seed(USERS).await?;
    let mut table = Table::new();
    let healthy = Healthy::start(service.address, USERS);
    sleep(Duration::from_secs(3)).await;
    drop(healthy.take());
    let at_first = Observed::of(pid)?;
    table.quiet("quiet", settings.quiet_seconds, &healthy).await;
    for kind in Kind::ALL.into_iter().filter(|kind| settings.only.is_empty() || settings.only.contains(kind)) {
        eprintln!("hostile: {kind}");
        let attackers = attackers(settings, kind, &service);
        let (told, memory) = tokio::join!(attackers, observe::highest(pid, &healthy));
        let (told, (seen, highest_kib)) = (told?, memory?);
        table.besieged(kind, seen, highest_kib, Observed::of(pid)?, told);
        table.quiet("quiet", settings.quiet_seconds, &healthy).await;
    }
    healthy.stop().await;
    eprintln!("hostile: waiting for what is left to end");
    sleep(AFTERWARDS).await;
    let at_last = Observed::of(pid)?;
    let open = observe::open_transactions(scratch).await?;
    scratch.settle().await?;
    let metrics = observe::metrics(service.address).await?;
    table.finish(at_first, at_last, open, &metrics)
}

/// A process of attackers, at the lowest priority; what it counted.
async fn attackers(settings: &Settings, kind: Kind, service: &Service) -> anyhow::Result<BTreeMap<String, u64>> {
    let done = observe::Done::new();
    let output = Command::new("nice")
        .args(["-n", "19"])
        .arg(std::env::current_exe()?)
        .args(["--attack", &kind.to_string(), "--at", &service.address.to_string()])
        .args(["--requests", &settings.requests.to_string(), "--seconds", &settings.seconds.to_string()])
        .args(["--idle", &settings.idle.to_string()])
        .env("HOSTILE_KEY", &service::HOSTILE_KEY.1)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()?
        .wait_with_output()
        .await?;
    drop(done);
    anyhow::ensure!(output.status.success(), "the attackers did not come through");
    serde_json::from_slice(&output.stdout).context("the attackers' report")
}

struct Table {
    out: std::io::Stdout,
    quiet: Vec<Seen>,
    wrong: Vec<String>,
    besieged: Vec<(Kind, Seen)>,
}

impl Table {
    fn new() -> Self {
        Self { out: stdout(), quiet: vec![], wrong: vec![], besieged: vec![] }
    }

    async fn quiet(&mut self, what: &str, seconds: u64, healthy: &Healthy) {
        sleep(Duration::from_secs(seconds)).await;
        let seen = healthy.take();
        self.line(&format!("{what:<14} {}", seen.figures()));
        self.quiet.push(seen);
    }

    fn besieged(&mut self, kind: Kind, seen: Seen, highest_kib: u64, after: Observed, told: BTreeMap<String, u64>) {
        let memory = format!("memory at most {} MiB, then {} MiB", highest_kib / 1024, after.memory_kib / 1024);
        self.line(&format!("{:<14} {}, {memory}", kind.to_string(), seen.figures()));
        let told_so: Vec<String> = told.iter().map(|(what, count)| format!("{what} {count}")).collect();
        self.line(&format!("{:<14}   attackers: {}", "", told_so.join(", ")));
        for (what, count) in told.iter().filter(|(what, _)| what.starts_with("WRONG")) {
            self.wrong.push(format!("{kind}: {what} {count} times"));
        }
        if seen.failed > 0 {
            self.wrong.push(format!("{kind}: {} requests of healthy clients failed", seen.failed));
        }
        self.besieged.push((kind, seen));
    }

    fn finish(&mut self, first: Observed, last: Observed, open: i64, metrics: &[String]) -> anyhow::Result<bool> {
        let normal = Seen::of_all(&self.quiet);
        self.line(&format!("\n{:<14} {}", "all quiet", normal.figures()));
        for (kind, seen) in std::mem::take(&mut self.besieged) {
            let ratio = seen.p99() / normal.p99();
            self.line(&format!("{:<14} p99 {ratio:.2} of normal", kind.to_string()));
            if ratio > 2.0 {
                self.wrong.push(format!("{kind}: the healthy clients' p99 is {ratio:.2} of the normal one"));
            }
        }
        self.line(&format!("\nbefore: {first}\nafter:  {last}; {open} open transactions"));
        for metric in metrics {
            self.line(metric);
        }
        if last.descriptors > first.descriptors + 8 {
            self.wrong.push("descriptors stay open".to_owned());
        }
        if last.memory_kib > first.memory_kib + MEMORY_KIB {
            self.wrong.push("memory is not given back".to_owned());
        }
        if open > 0 {
            self.wrong.push("transactions stay open".to_owned());
        }
        for wrong in std::mem::take(&mut self.wrong) {
            self.line(&format!("WRONG: {wrong}"));
            self.wrong.push(wrong);
        }
        self.line(if self.wrong.is_empty() { "all as it should be" } else { "not as it should be" });
        Ok(self.wrong.is_empty())
    }

    fn line(&mut self, text: &str) {
        // A reader who has gone misses the rest.
        let _ = writeln!(self.out, "{text}");
    }
}

/// What the allocator may keep for the next time, after tens of thousands of connections at once.
const MEMORY_KIB: u64 = 192 * 1024;
