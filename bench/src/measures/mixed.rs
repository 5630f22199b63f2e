//! Mixed: eight reads to two changes on each connection.
//!
//! Two limits. The parts weighted: what the service did in the same round with nothing but reads, and with nothing but changes; if it
//! is slower mixed, the two are in each other's way. And pgbench, with both its scripts in the same shares.

use crate::{
    contest::{Contest, LIMIT},
    house::House,
    load::Ask,
    memory::Watch,
    pgbench::Script,
    report::{Findings, Goal, Row},
    settings::Settings,
};

const CONNECTIONS: u64 = 32;
const MIXED: &[(Script, u32)] = &[(Script::Get, 8), (Script::Patch, 2)];
const READS: f64 = 0.8;

pub fn turns(_: &Settings) -> u64 {
    4
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let (contest, settings) = (Contest::open(house, "mixed").await?, &house.settings);
    let row = |name| Row::new(format!("{CONNECTIONS} connections"), "1/s").limit(name);
    let mut beside_parts = row("parts weighted").goal(Goal::RatioAtLeast(1.0));
    let mut beside_pgbench = row(LIMIT);
    contest.warm_up(CONNECTIONS, Ask::Mixed, MIXED).await?;
    let watch = Watch::start(&contest.service);
    for round in 1..=settings.rounds {
        eprintln!("bench: mixed, round {round} of {}", settings.rounds);
        let (service, limit) = contest.round(CONNECTIONS, settings.time(), Ask::Mixed, MIXED).await?;
        let gets = contest.ask(CONNECTIONS, settings.time(), Ask::Get).await?.per_second;
        let patches = contest.ask(CONNECTIONS, settings.time(), Ask::Patch).await?.per_second;
        beside_parts.add(service.per_second, weighted(gets, patches));
        beside_pgbench.add(service.per_second, limit.per_second);
    }
    let rows = [beside_parts, beside_pgbench].into_iter().chain(watch.rows("the service")).collect();
    Ok(Findings { rows, ..Findings::default() })
}

/// The rate of a client whose requests take now as long as a read, now as long as a change.
fn weighted(gets: f64, patches: f64) -> f64 {
    1.0 / (READS / gets + (1.0 - READS) / patches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_part_weighs_by_the_time_it_takes() {
        assert!((weighted(1000.0, 1000.0) - 1000.0).abs() < 1e-6);
        // Eight reads of 1 ms and two changes of 6 ms: 20 ms for ten.
        assert!((weighted(1000.0, 1000.0 / 6.0) - 500.0).abs() < 1e-6);
    }
}
