//! Latency: from a change to the consumer who hears of it, at a steady rate: an open loop, which does not wait for answers.
//!
//! The limit is the same change made the same way by a program without an outbox, which publishes right after its commit
//! ([`Direct`]). Both are counted from the database's time of the change, which is when its transaction began: the commit, the way to
//! the broker and the way to the consumer are in both. The rows "from the start" count from the moment at which the request was due;
//! of the service that has HTTP in it, of the limit it has not, and no goal stands there.
//!
//! Consumer and generator are in one process, beside the service on the same cores. A change is of a user of its own.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, ensure};
use tokio::{
    sync::{Semaphore, mpsc::UnboundedReceiver},
    task::JoinSet,
};
use uuid::Uuid;

use crate::{
    direct::Direct,
    figures::Latencies,
    house::House,
    http::{Client, Request},
    listener::{Arrival, Listener},
    load::Dice,
    memory::Watch,
    pace::{Due, pace},
    report::{Findings, Goal, Row},
    scratch::user,
    service::Relay,
    settings::Settings,
};

const RATES: [u64; 3] = [100, 1000, 5000];
/// At which rounds take longer, so that a thousandth of them is a number.
const SLOW: u64 = 100;
const SLOW_FACTOR: u64 = 4;
/// When the service does not keep up, clients wait, and are counted as having waited.
const MOST_CONNECTIONS: usize = 512;
const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

pub fn turns(_: &Settings) -> u64 {
    2 * (SLOW_FACTOR + 2)
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let settings = &house.settings;
    let most = RATES.iter().map(|rate| changes(*rate, settings.seconds)).max().unwrap_or_default();
    ensure!(settings.users >= most, "each change has a user of its own\nhint: --users {most}");
    let database = house.database("latency").await?;
    let service = house.serve(&database, Relay::Here).await?;
    let listener = Listener::open(house).await?;
    let mut contest = Contest { address: service.address, direct: Direct::open(house, &database).await?, listener };
    let mut cases: Vec<Case> = RATES.iter().map(|rate| Case::new(*rate)).collect();
    for rate in RATES {
        contest.round(rate, rate).await?;
    }
    let watch = Watch::start(&service);
    for round in 1..=settings.rounds {
        eprintln!("bench: latency, round {round} of {}", settings.rounds);
        for case in &mut cases {
            let (service, limit) = contest.round(case.rate, changes(case.rate, settings.seconds)).await?;
            case.add(&service, &limit);
        }
    }
    contest.direct.close().await?;
    contest.listener.close().await?;
    let rows = cases.into_iter().flat_map(Case::rows).chain(watch.rows("the service")).collect();
    Ok(Findings { rows, ..Findings::default() })
}

fn changes(rate: u64, seconds: u64) -> u64 {
    rate * seconds * if rate <= SLOW { SLOW_FACTOR } else { 1 }
}

struct Contest {
    address: SocketAddr,
    direct: Direct,
    listener: Listener,
}

/// What one side needed in one round.
struct Times {
    from_change: Latencies,
    from_start: Latencies,
}

impl Contest {
    async fn round(&mut self, rate: u64, count: u64) -> anyhow::Result<(Times, Times)> {
        let asked = ask(self.address, pace(rate, count)).await?;
        let service = times(&asked, &self.listener.take(asked.len()).await?)?;
        let published = self.direct.run(pace(rate, count)).await?;
        let limit = times(&published, &self.listener.take(published.len()).await?)?;
        Ok((service, limit))
    }
}

fn times(dues: &[(Uuid, Instant)], arrivals: &HashMap<Uuid, Arrival>) -> anyhow::Result<Times> {
    let (mut from_change, mut from_start) = (vec![], vec![]);
    for (user, due) in dues {
        let arrival = arrivals.get(user).context("a user was told of whom nobody changed")?;
        from_change.push(arrival.since_change_ms);
        from_start.push(arrival.at.saturating_duration_since(*due).as_secs_f64() * 1e3);
    }
    Ok(Times { from_change: Latencies::of(from_change), from_start: Latencies::of(from_start) })
}

/// Amends one user for each that is due, at the service; who was amended, and when that was due.
async fn ask(address: SocketAddr, mut dues: UnboundedReceiver<Due>) -> anyhow::Result<Vec<(Uuid, Instant)>> {
    // Each in its turn: one that is left alone for ten seconds is let go of.
    let (idle, places) = (Arc::<Mutex<VecDeque<Client>>>::default(), Arc::new(Semaphore::new(MOST_CONNECTIONS)));
    let (mut changes, mut dice) = (JoinSet::new(), Dice::new());
    while let Some((number, due)) = dues.recv().await {
        let (idle, place, count) = (idle.clone(), places.clone().acquire_owned().await?, dice.roll());
        changes.spawn(async move {
            let spare = idle.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let mut client = match spare {
                Some(client) => client,
                None => Client::connect(address).await?,
            };
            client.ask(Request::patch().of(user(number), count)).await?;
            idle.lock().unwrap_or_else(PoisonError::into_inner).push_back(client);
            drop(place);
            anyhow::Ok((user(number), due))
        });
    }
    changes.join_all().await.into_iter().collect()
}

/// One rate.
struct Case {
    rate: u64,
    from_change: [Row; 3],
    from_start: [Row; 3],
}

impl Case {
    fn new(rate: u64) -> Self {
        let row = |from: &str, what| Row::new(format!("{rate}/s{from}, {what}"), "ms").limit("no outbox");
        let [p50, p99, p999] = QUANTILES.map(|(name, _)| row("", name));
        let from_change = [p50.goal(Goal::RatioAtMost(1.5)), p99.goal(Goal::RatioAtMost(2.0)), p999];
        Self { rate, from_change, from_start: QUANTILES.map(|(name, _)| row(", from the start", name)) }
    }

    fn add(&mut self, service: &Times, limit: &Times) {
        for (row, (_, share)) in self.from_change.iter_mut().zip(QUANTILES) {
            row.add(service.from_change.quantile(share), limit.from_change.quantile(share));
        }
        for (row, (_, share)) in self.from_start.iter_mut().zip(QUANTILES) {
            row.add(service.from_start.quantile(share), limit.from_start.quantile(share));
        }
    }

    fn rows(self) -> impl Iterator<Item = Row> {
        self.from_change.into_iter().chain(self.from_start)
    }
}
