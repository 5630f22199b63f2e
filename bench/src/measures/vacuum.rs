//! Vacuum: what the outbox's autovacuum settings are worth, under a load that writes and tells for minutes.
//!
//! Every event leaves a dead row. The settings of the migrations and one choice that goes further stand beside those that Postgres has by
//! itself: how many dead rows and how much table there come to be, how fast changes are made meanwhile, how long the slowest takes, and
//! how fast a backlog drains from the table as the load left it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use crate::{
    house::House,
    load::{Ask, Load},
    publishers::fill_outbox,
    queue::{Kind, Queue, per_second},
    report::{Curve, Findings, Row},
    scratch::Scratch,
    service::Relay,
    settings::Settings,
};

const CONNECTIONS: u64 = 32;
const BACKLOG: u64 = 50_000;
/// The load lasts so many times `--seconds`: with the usual five, over two rounds of the launcher, which comes once a minute.
const TIMES: u32 = 30;

const BY_ITSELF: &str = "
alter table outbox reset (
  autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold, autovacuum_vacuum_insert_scale_factor,
  autovacuum_vacuum_insert_threshold, autovacuum_analyze_scale_factor, autovacuum_analyze_threshold, autovacuum_vacuum_cost_delay,
  vacuum_truncate
)";
/// At every round of the launcher, and without the lock that giving empty pages back takes.
const FURTHER: &str = "alter table outbox set (autovacuum_vacuum_threshold = 1000, vacuum_truncate = off)";

/// Name, and what makes it so.
const CHOICES: [(&str, &str); 3] = [("defaults", BY_ITSELF), ("as migrated", "select"), ("further", FURTHER)];

pub fn turns(_: &Settings) -> u64 {
    CHOICES.len() as u64 * (u64::from(TIMES) + 6)
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let mut rounds: Vec<[Outcome; 3]> = vec![];
    let mut curves = vec![];
    for round in 1..=house.settings.rounds {
        let mut outcomes = vec![];
        for (name, sql) in CHOICES {
            eprintln!("bench: vacuum, round {round} of {}, {name}", house.settings.rounds);
            let (outcome, samples) = take(house, sql).await?;
            curves.retain(|curve: &Curve| curve.name != name);
            curves.push(curve(name, "dead rows", "rows", samples.iter().map(|sample| (sample.at, sample.dead))));
            curves.push(curve(name, "table and index", "MiB", samples.iter().map(|sample| (sample.at, sample.mib))));
            outcomes.push(outcome);
        }
        rounds.extend(<[Outcome; 3]>::try_from(outcomes).ok());
    }
    Ok(Findings { rows: rows(&rounds), curves })
}

fn curve(choice: &str, what: &str, unit: &str, points: impl Iterator<Item = (Duration, f64)>) -> Curve {
    let points = points.map(|(at, value)| (at.as_secs_f64(), value)).collect();
    let [of, name, x_unit, y_unit] = [what, choice, "s", unit].map(str::to_owned);
    Curve { of, name, is_limit: choice == CHOICES[0].0, x_unit, y_unit, points }
}

/// What one choice came to in one round.
struct Outcome {
    dead_rows: f64,
    mib: f64,
    changes_per_s: f64,
    p99_ms: f64,
    slowest_ms: f64,
    drained_per_s: f64,
}

type Figure = fn(&Outcome) -> f64;

/// The table at one moment.
#[derive(Clone, Copy)]
struct Sample {
    at: Duration,
    dead: f64,
    mib: f64,
}

async fn take(house: &House, sql: &str) -> anyhow::Result<(Outcome, Vec<Sample>)> {
    let database = house.database("vacuum").await?;
    database.run(sql).await?;
    let mut queue = Queue::bound(house, Kind::Classic).await?;
    queue.read(house, 0).await?;
    let service = house.serve(&database, Relay::Here).await?;
    let watch = Watch::start(&database).await?;
    let (users, time) = (house.settings.users, house.settings.time() * TIMES);
    let load = Load { addresses: vec![service.address], connections: CONNECTIONS, users, ask: Ask::Patch, time };
    let round = load.run().await?;
    database.settle().await?;
    let samples = watch.end();
    drop(service);
    queue.clear().await?;
    database.run(&fill_outbox(BACKLOG)).await?;
    let service = house.serve(&database, Relay::Here).await?;
    let drained = queue.await_all(BACKLOG).await?;
    database.settle().await?;
    drop(service);
    queue.delete().await?;
    database.drop_it().await;
    let most = |of: fn(&Sample) -> f64| samples.iter().map(of).fold(0.0, f64::max);
    let outcome = Outcome {
        dead_rows: most(|sample| sample.dead),
        mib: most(|sample| sample.mib),
        changes_per_s: round.per_second,
        p99_ms: round.latencies_ms.quantile(0.99),
        slowest_ms: round.latencies_ms.quantile(1.0),
        drained_per_s: per_second(&drained),
    };
    Ok((outcome, samples))
}

fn rows(rounds: &[[Outcome; 3]]) -> Vec<Row> {
    let figures: [(&str, &str, Figure); 6] = [
        ("dead rows at most", "rows", |outcome| outcome.dead_rows),
        ("table and index at most", "MiB", |outcome| outcome.mib),
        ("changes", "1/s", |outcome| outcome.changes_per_s),
        ("changes, p99", "ms", |outcome| outcome.p99_ms),
        ("changes, the slowest", "ms", |outcome| outcome.slowest_ms),
        ("drain of what comes after", "1/s", |outcome| outcome.drained_per_s),
    ];
    let mut rows = vec![];
    for (choice, (name, _)) in CHOICES.iter().enumerate().skip(1) {
        for (what, unit, figure) in figures {
            let mut row = Row::new(format!("{name}: {what}"), unit).limit(CHOICES[0].0);
            rounds.iter().for_each(|round| row.add(figure(&round[choice]), figure(&round[0])));
            rows.push(row);
        }
    }
    rows
}

/// Looks once a second until it is ended.
struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    looking: JoinHandle<sqlx::Result<()>>,
}

const LOOK: &str = "
select n_dead_tup::float8, (pg_relation_size('outbox') + pg_relation_size('outbox_pkey')) / 1048576.0::float8
  from pg_stat_user_tables
 where relname = 'outbox'
";

impl Watch {
    async fn start(database: &Scratch) -> anyhow::Result<Self> {
        let (samples, began) = (Arc::<Mutex<Vec<Sample>>>::default(), Instant::now());
        let (mut connection, seen) = (database.connect().await?, samples.clone());
        let looking = tokio::spawn(async move {
            let mut pace = interval(Duration::from_secs(1));
            pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                pace.tick().await;
                let (dead, mib) = sqlx::query_as(LOOK).fetch_one(&mut connection).await?;
                let sample = Sample { at: began.elapsed(), dead, mib };
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            }
        });
        Ok(Self { samples, looking })
    }

    fn end(self) -> Vec<Sample> {
        self.looking.abort();
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
