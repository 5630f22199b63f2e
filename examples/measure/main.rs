//! Measures what the service does beside what its servers allow, in the same run on the same machine.
//!
//! ```sh
//! cargo build --release
//! eval "$(./dev up)"; cargo run --release --example measure
//! ```
//!
//! It makes two databases on the server of `DATABASE_URL`, with users in them, starts two services on them, takes turns, prints a
//! table and takes the databases away again.
//!
//! How to read the table: every figure has its limit beside it. For changes and reads per second the limit is pgbench with as many
//! clients and the same statement (a change updates the user and inserts the event, in one statement): what Postgres can do when
//! each client talks to it directly. The service can do more than that, as it gathers what comes in at the same time. For
//! latencies of news the limit is a message that is published straight to the consumer's queue, without a database, as a program
//! would that may lose it. Only the ratios say something about the service; the absolute figures are about the machine. The
//! clients take their share of the same cores. A median of few short rounds is good to about 10 %: if the ranges are wider, the
//! machine had something else to do, and the run is worth nothing.

mod figures;
mod house;
mod http;
mod latency;
mod throughput;

use std::{
    io::{Write, stdout},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Parser, value_parser};
use reqwest::Url;
use tidings::telemetry::with_causes;
use tokio::signal::ctrl_c;
use uuid::Uuid;

use crate::{
    figures::{Rounds, latencies, quantile},
    house::{Scratch, Service},
    latency::{Latencies, Listener},
    throughput::{Kind, Pgbench},
};

/// Measure what the service does beside what its servers allow.
#[derive(Parser)]
struct Settings {
    /// A Postgres on which databases may be created.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pg_url: Url,
    #[arg(long, env = "AMQP_URL", hide_env_values = true)]
    amqp_url: String,
    /// Connections at once.
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u64).range(1..=250))]
    connections: u64,
    /// Users in each database.
    #[arg(long, default_value_t = 20_000, value_parser = value_parser!(u64).range(1000..=10_000_000))]
    users: u64,
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u64).range(1..))]
    rounds: u64,
    /// For one contestant in one round.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u64).range(1..))]
    seconds: u64,
    /// Changes a second while latencies of news are measured.
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..=10_000))]
    rate: u32,
}

impl Settings {
    fn users_per_connection(&self) -> u64 {
        self.users / self.connections
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    match measure(&settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

async fn measure(settings: &Settings) -> anyhow::Result<()> {
    let apart = Scratch::create(&settings.pg_url, "apart").await?;
    let whole = Scratch::create(&settings.pg_url, "whole").await;
    let outcome = match &whole {
        Ok(whole) => tokio::select! {
            outcome = on(settings, &apart, whole) => outcome,
            _ = ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        },
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    apart.drop_it().await;
    if let Ok(whole) = whole {
        whole.drop_it().await;
    }
    outcome
}

/// Everything that was measured.
#[derive(Default)]
struct Results {
    /// The service without its relay: what pgbench does, and no more.
    patch_apart: Rounds,
    /// The service as it is deployed in one process, telling while it keeps.
    patch_whole: Rounds,
    patch_limit: Rounds,
    get: Rounds,
    get_limit: Rounds,
    news: Latencies,
}

async fn on(settings: &Settings, apart: &Scratch, whole: &Scratch) -> anyhow::Result<()> {
    let binary = house::binary()?;
    let exchange = format!("tidings.measure.{}", Uuid::new_v4());
    let keeping = Service::start(&binary, &apart.url, &settings.amqp_url, &exchange, false).await?;
    let telling = Service::start(&binary, &whole.url, &settings.amqp_url, &exchange, true).await?;
    apart.seed(settings.users).await?;
    whole.seed(settings.users).await?;
    let pgbench = Pgbench::new(&apart.url)?;
    let mut results = Results::default();

    // The first round is there to warm up.
    for round in 0..=settings.rounds {
        let seconds = if round == 0 { 1 } else { settings.seconds };
        eprintln!("measure: round {round} of {}", settings.rounds);
        let patch_limit = pgbench.run(settings, Kind::Patch, seconds).await.context("pgbench, changes")?;
        apart.run("truncate outbox").await?;
        let patch_apart = throughput::service(settings, keeping.address, Kind::Patch, seconds).await?;
        apart.run("truncate outbox").await?;
        let patch_whole = throughput::service(settings, telling.address, Kind::Patch, seconds).await?;
        whole.settle().await?;
        let get_limit = pgbench.run(settings, Kind::Get, seconds).await.context("pgbench, reads")?;
        let get = throughput::service(settings, keeping.address, Kind::Get, seconds).await?;
        if round > 0 {
            results.patch_limit.add(patch_limit);
            results.patch_apart.add(patch_apart);
            results.patch_whole.add(patch_whole);
            results.get_limit.add(get_limit);
            results.get.add(get);
        }
    }

    let mut listener = Listener::open(&settings.amqp_url, &exchange).await?;
    for round in 1..=settings.rounds {
        eprintln!("measure: news, round {round} of {}", settings.rounds);
        listener.service(settings, telling.address, &mut results.news).await?;
        listener.direct(settings, &mut results.news).await?;
    }
    listener.close().await?;
    report(settings, &results)
}

fn report(settings: &Settings, results: &Results) -> anyhow::Result<()> {
    let Results { patch_apart, patch_whole, patch_limit, get, get_limit, news } = results;
    let mut table = Table(stdout().lock());
    table.head(&format!("{} connections, per second", settings.connections), "pgbench")?;
    table.rates("PATCH, relay elsewhere", patch_apart, patch_limit)?;
    table.rates("PATCH, relay in the same process", patch_whole, patch_limit)?;
    table.rates("GET", get, get_limit)?;
    table.head(&format!("{} connections, p50 / p99 ms", settings.connections), "pgbench")?;
    table.latencies("PATCH, relay elsewhere", &patch_apart.latencies_ms, &patch_limit.latencies_ms)?;
    table.latencies("PATCH, relay in the same process", &patch_whole.latencies_ms, &patch_limit.latencies_ms)?;
    table.latencies("GET", &get.latencies_ms, &get_limit.latencies_ms)?;
    table.head(&format!("{} changes/s, p50 / p99 ms", settings.rate), "no outbox")?;
    table.latencies("commit to consumer", &news.commit_ms, &news.direct_ms)?;
    table.latencies("answer to consumer", &news.answered_ms, &news.direct_ms)?;
    table.latencies("request to consumer", &news.request_ms, &news.direct_ms)?;
    table.latencies("request to answer", &news.answer_ms, &news.direct_ms)
}

struct Table<W: Write>(W);

impl<W: Write> Table<W> {
    fn head(&mut self, what: &str, limit: &str) -> anyhow::Result<()> {
        self.line(what, "service", &format!("limit: {limit}"), "ratio")
    }

    fn rates(&mut self, what: &str, service: &Rounds, limit: &Rounds) -> anyhow::Result<()> {
        let ratio = service.rate() / limit.rate();
        self.line(&format!("  {what}"), &service.rates(), &limit.rates(), &format!("{ratio:.2}"))
    }

    fn latencies(&mut self, what: &str, service_ms: &[f64], limit_ms: &[f64]) -> anyhow::Result<()> {
        let ratio = |share| quantile(service_ms, share) / quantile(limit_ms, share);
        let ratios = format!("{:.2} / {:.2}", ratio(0.5), ratio(0.99));
        self.line(&format!("  {what}"), &latencies(service_ms), &latencies(limit_ms), &ratios)
    }

    fn line(&mut self, what: &str, service: &str, limit: &str, ratio: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.0, "{what:<36} {service:>24} {limit:>24} {ratio:>14}")?)
    }
}
