//! Bench: measures what the service does beside what its servers allow. `./dev bench --help` tells how to read it.
//!
//! Promise: a figure never stands without its limit from the same round, where there is one; a goal that is missed is shown as missed.
//! Not here, on purpose: the measures themselves, one file each in `measures`.

mod application;
mod contest;
mod direct;
mod figures;
mod house;
mod http;
mod listener;
mod load;
mod machine;
mod measures;
mod memory;
mod pace;
mod pgbench;
mod plot;
mod publishers;
mod queue;
mod report;
mod results;
mod scratch;
mod service;
mod settings;
mod table;

use std::{
    io::{Write, stdout},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Parser;
use tidings::telemetry::with_causes;
use time::OffsetDateTime;
use tokio::signal::ctrl_c;

use crate::{
    house::House,
    machine::{Machine, load},
    measures::{ALL, Measure},
    results::{Judged, Results},
    settings::{Command, Settings},
};

/// For a server to answer.
pub const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    let outcome = match settings.command {
        Some(Command::List) => list(&settings),
        Some(Command::Plot) => plot::write(Path::new("."), &settings.results),
        None => measure(settings).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

fn list(settings: &Settings) -> anyhow::Result<()> {
    for measure in ALL {
        writeln!(stdout(), "{:<12} {:>4} min  {}", measure.name, minutes(measure.takes(settings)), measure.about)?;
    }
    Ok(())
}

async fn measure(settings: Settings) -> anyhow::Result<()> {
    let chosen = chosen(&settings)?;
    let takes = chosen.iter().map(|measure| measure.takes(&settings)).sum();
    let names: Vec<&str> = chosen.iter().map(|measure| measure.name).collect();
    eprintln!("bench: {}; about {} minutes", names.join(", "), minutes(takes));
    let house = House::open(settings)?;
    let outcome = tokio::select! {
        outcome = take_all(&house, &chosen) => outcome,
        _ = ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    house.leave().await;
    outcome
}

fn chosen(settings: &Settings) -> anyhow::Result<Vec<&'static Measure>> {
    let names = || ALL.iter().map(|measure| measure.name);
    if let Some(stranger) = settings.only.iter().find(|only| !names().any(|name| name == *only)) {
        let names: Vec<_> = names().collect();
        anyhow::bail!("there is no measure {stranger}\nhint: {}", names.join(", "));
    }
    let is_chosen =
        |measure: &&Measure| settings.only.is_empty() || settings.only.iter().any(|only| only == measure.name);
    Ok(ALL.iter().filter(is_chosen).collect())
}

async fn take_all(house: &House, chosen: &[&Measure]) -> anyhow::Result<()> {
    let machine = Machine::look(&house.pg_url, &house.amqp_url, &house.settings.commit).await?;
    let mut missed = 0;
    for measure in chosen {
        eprintln!("bench: {}", measure.name);
        let results = take(house, measure, &machine).await.with_context(|| format!("measure {}", measure.name));
        house.clear().await;
        let results = results?;
        missed += results.rows.iter().filter(|row| row.is_met == Some(false)).count();
        table::print(&mut stdout().lock(), &results)?;
        results.keep(&house.settings.results)?;
    }
    eprintln!("bench: goals missed: {missed}");
    Ok(())
}

async fn take(house: &House, measure: &Measure, machine: &Machine) -> anyhow::Result<Results> {
    let load_before = load();
    let findings = (measure.run)(house).await?;
    ensure!(!findings.rows.is_empty(), "nothing was found");
    let machine = Machine { load_before, load_after: load(), ..machine.clone() };
    let Settings { users, rounds, seconds, .. } = house.settings;
    let (measure, taken_at) = (measure.name.to_owned(), OffsetDateTime::now_utc());
    let rows = findings.rows.into_iter().map(Judged::from).collect();
    Ok(Results { measure, taken_at, machine, users, rounds, seconds, rows, curves: findings.curves })
}

/// Rounded up.
fn minutes(time: Duration) -> u64 {
    time.as_secs().div_ceil(60)
}
