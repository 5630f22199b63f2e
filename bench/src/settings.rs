//! Settings: the command line.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, value_parser};
use url::Url;

/// Measure tidings beside what its servers allow, in the same run on the same machine.
///
/// Every figure has its limit beside it: the same work done without the service, by something that does as little as can be. The two
/// take turns, several rounds; what counts is the ratio of each round, of which the table shows the median, and the least and the
/// most. Absolute figures are about the machine. If the ranges are wide, the machine had something else to do.
///
/// Each measure replaces its own file in bench/results. `plot` makes the pictures and the table of docs/performance.md from them.
#[derive(Debug, Clone, Parser)]
#[command(name = "./dev bench", max_term_width = 110, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct Settings {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub servers: Servers,
    /// Only these; `./dev bench list` tells what each is. [default: all]
    #[arg(long, value_delimiter = ',', value_name = "MEASURE")]
    pub only: Vec<String>,
    /// In each database.
    #[arg(long, default_value_t = 1_000_000, value_parser = value_parser!(u64).range(10_000..=10_000_000))]
    pub users: u64,
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u64).range(1..=100))]
    pub rounds: u64,
    /// For one contestant in one round.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// At once, one row for each.
    #[arg(long, value_delimiter = ',', default_value = "1,32,128,512", value_parser = value_parser!(u64).range(1..=600))]
    pub connections: Vec<u64>,
    /// How long the analytics transaction of `disturbed` is held open. [default: 60, with --full 1800]
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(10..=36_000))]
    pub hold_s: Option<u64>,
    /// Events that wait when `drain` begins. [default: 200000, with --full 1000000]
    #[arg(long, value_name = "EVENTS", value_parser = value_parser!(u64).range(10_000..=10_000_000))]
    pub pending: Option<u64>,
    /// Also what takes hours and many gigabytes: ten million users, ten million pending events, half an hour's transaction.
    #[arg(long)]
    pub full: bool,
    /// Where results are kept.
    #[arg(long, default_value = "bench/results", value_name = "FOLDER", global = true)]
    pub results: PathBuf,
    /// Of tidings; `./dev bench` finds it out.
    #[arg(long, env = "BENCH_COMMIT", default_value = "unknown", hide = true)]
    pub commit: String,
}

#[derive(Debug, Clone, clap::Args)]
pub struct Servers {
    /// A Postgres on which databases may be created.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pg_url: Option<Url>,
    #[arg(long, env = "AMQP_URL", hide_env_values = true, value_name = "URL")]
    amqp_url: Option<Url>,
}

#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// What can be measured, and how long each takes.
    List,
    /// Draw docs/performance/*.svg, and write the table of docs/performance.md, from what was measured.
    Plot,
}

const EXAMPLES: &str = "\
Examples:
  ./dev bench                                     # everything, beside its goals
  ./dev bench --only patch,get --connections 32   # two measures, at 32 connections alone
  ./dev bench --only patch --users 10000 --rounds 1 --seconds 2   # a quick look; not for the record
  ./dev bench list";

const HOLD: Duration = Duration::from_secs(60);
const FULL_HOLD: Duration = Duration::from_secs(1800);
const PENDING: u64 = 200_000;
const FULL_PENDING: u64 = 1_000_000;

impl Settings {
    pub fn time(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// For which the analytics transaction is held open.
    pub fn hold(&self) -> Duration {
        self.hold_s.map_or(if self.full { FULL_HOLD } else { HOLD }, Duration::from_secs)
    }

    /// With which a drain begins.
    pub fn pending(&self) -> u64 {
        self.pending.unwrap_or(if self.full { FULL_PENDING } else { PENDING })
    }
}

impl Servers {
    /// Both addresses.
    pub fn both(&self) -> anyhow::Result<(&Url, &Url)> {
        let both = self.pg_url.as_ref().zip(self.amqp_url.as_ref());
        both.ok_or_else(|| anyhow::anyhow!("DATABASE_URL and AMQP_URL are not set\nhint: ./dev bench sets them"))
    }
}
