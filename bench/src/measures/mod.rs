//! Measures: one file each, and one line in [`ALL`].
//!
//! Promise: a measure takes service and limit in turns, round by round, and judges nothing itself: its rows carry the goals.

mod backfill;
mod disturbed;
mod drain;
mod everything;
mod get;
mod growth;
mod import;
mod latency;
mod mixed;
mod patch;
mod vacuum;
mod wrk;

use std::time::Duration;

use futures_util::future::LocalBoxFuture;

use crate::{house::House, report::Findings, settings::Settings};

/// Something that can be measured.
pub struct Measure {
    pub name: &'static str,
    /// For `./dev bench list`.
    pub about: &'static str,
    /// How many times `settings.seconds` a round takes, waiting included.
    turns: fn(&Settings) -> u64,
    pub run: for<'a> fn(&'a House) -> LocalBoxFuture<'a, anyhow::Result<Findings>>,
}

#[rustfmt::skip]
pub const ALL: &[Measure] = &[
    Measure { name: "patch", about: "changes a second, and how long one takes, beside pgbench", turns: patch::turns, run: |house| Box::pin(patch::run(house)) },
    Measure { name: "get", about: "reads a second, and how long one takes, beside pgbench", turns: get::turns, run: |house| Box::pin(get::run(house)) },
    Measure { name: "mixed", about: "eight reads to two changes, beside the parts weighted and pgbench", turns: mixed::turns, run: |house| Box::pin(mixed::run(house)) },
    Measure { name: "latency", about: "from a change to the consumer who hears of it, beside publishing without an outbox", turns: latency::turns, run: |house| Box::pin(latency::run(house)) },
    Measure { name: "everything", about: "changes, relay and a consumer that fetches, all at once, beside changes alone", turns: everything::turns, run: |house| Box::pin(everything::run(house)) },
    Measure { name: "disturbed", about: "with an old snapshot, a full outbox, several instances, beside the same without", turns: disturbed::turns, run: |house| Box::pin(disturbed::run(house)) },
    Measure { name: "wrk", about: "changes and reads by wrk, beside our own generator", turns: wrk::turns, run: |house| Box::pin(wrk::run(house)) },
    Measure { name: "drain", about: "how fast a backlog gets out, beside lapin and beside a socket", turns: drain::turns, run: |house| Box::pin(drain::run(house)) },
    Measure { name: "backfill", about: "how fast a newcomer is told of everybody, beside lapin", turns: backfill::turns, run: |house| Box::pin(backfill::run(house)) },
    Measure { name: "import", about: "how fast an existing user base comes in, beside multi-row inserts", turns: import::turns, run: |house| Box::pin(import::run(house)) },
    Measure { name: "growth", about: "what a step of each kind of work costs while the tables grow", turns: growth::turns, run: |house| Box::pin(growth::run(house)) },
    Measure { name: "vacuum", about: "what the outbox's autovacuum settings are worth", turns: vacuum::turns, run: |house| Box::pin(vacuum::run(house)) },
];

/// For copies of the stock, services to start, and the warm-up.
const SET_UP: Duration = Duration::from_secs(40);

impl Measure {
    /// About so long.
    pub fn takes(&self, settings: &Settings) -> Duration {
        let round = settings.time() * u32::try_from((self.turns)(settings)).unwrap_or(u32::MAX);
        SET_UP + round * u32::try_from(settings.rounds).unwrap_or(u32::MAX)
    }
}
