//! Patch: changes a second over real HTTP, with a key on every request and a schema that every profile is held against.
//!
//! The limit is pgbench, with as many clients and the same statement: the user updated and the event inserted. Nobody takes the events
//! away meanwhile, so the relay is off, but for one case that shows what it costs.

use crate::{
    contest::{Case, Contest, LIMIT},
    house::House,
    load::{Ask, Load},
    memory::Watch,
    pgbench::Script,
    report::{Findings, Goal, Row},
    scratch::Scratch,
    service::{Relay, Service},
    settings::Settings,
};

/// At which latencies are judged, and the hot user and the relay are looked at.
const USUAL: u64 = 32;
const PATCH: &[(Script, u32)] = &[(Script::Patch, 1)];
const PATCH_ONE: &[(Script, u32)] = &[(Script::PatchOne, 1)];

pub fn turns(settings: &Settings) -> u64 {
    // Service and limit at each number of connections and for the hot user; with the relay and without.
    2 * settings.connections.len() as u64 + 4
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let (contest, settings) = (Contest::open(house, "patch").await?, &house.settings);
    let relayed = Relayed::open(house).await?;
    let mut rows = Rows::new(settings);
    for case in &rows.cases {
        contest.warm_up(case.connections, Ask::Patch, PATCH).await?;
    }
    contest.warm_up(USUAL, Ask::PatchOne, PATCH_ONE).await?;
    relayed.ask(settings).await?;
    let watches = (Watch::start(&contest.service), Watch::start(&relayed.service));
    for round in 1..=settings.rounds {
        eprintln!("bench: patch, round {round} of {}", settings.rounds);
        rows.round(&contest, &relayed, settings).await?;
    }
    let memory = watches.0.rows("relay off").into_iter().chain(watches.1.rows("relay on"));
    Ok(Findings { rows: rows.all().chain(memory).collect(), ..Findings::default() })
}

/// The service as it is deployed in one process, telling while it keeps.
struct Relayed {
    database: Scratch,
    service: Service,
}

impl Relayed {
    async fn open(house: &House) -> anyhow::Result<Self> {
        let database = house.database("patch_relay").await?;
        Ok(Self { service: house.serve(&database, Relay::Here).await?, database })
    }

    async fn ask(&self, settings: &Settings) -> anyhow::Result<f64> {
        let (users, time) = (settings.users, settings.time());
        let load = Load { addresses: vec![self.service.address], connections: USUAL, users, ask: Ask::Patch, time };
        let round = load.run().await?;
        self.database.settle().await?;
        Ok(round.per_second)
    }
}

struct Rows {
    cases: Vec<Case>,
    p99_over_mean: Row,
    hot: Row,
    relayed: Row,
}

impl Rows {
    fn new(settings: &Settings) -> Self {
        let row = |what, unit| Row::new(format!("{USUAL} connections, {what}"), unit);
        Self {
            cases: settings.connections.iter().map(|connections| case(*connections)).collect(),
            p99_over_mean: row("p99 over its mean", "ms").limit(LIMIT).goal(Goal::RatioAtMost(1.5)),
            hot: row("one user", "1/s").limit(LIMIT),
            relayed: row("relay on", "1/s").limit("relay off"),
        }
    }

    async fn round(&mut self, contest: &Contest, relayed: &Relayed, settings: &Settings) -> anyhow::Result<()> {
        for case in &mut self.cases {
            let (service, limit) = contest.round(case.connections, settings.time(), Ask::Patch, PATCH).await?;
            case.add(&service, &limit);
            if case.connections == USUAL {
                self.p99_over_mean.add(service.latencies_ms.quantile(0.99), case.mean_ms(&limit));
            }
        }
        let (service, limit) = contest.round(USUAL, settings.time(), Ask::PatchOne, PATCH_ONE).await?;
        self.hot.add(service.per_second, limit.per_second);
        let without = contest.ask(USUAL, settings.time(), Ask::Patch).await?;
        self.relayed.add(relayed.ask(settings).await?, without.per_second);
        Ok(())
    }

    fn all(self) -> impl Iterator<Item = Row> {
        let rest = [self.p99_over_mean, self.hot, self.relayed];
        self.cases.into_iter().flat_map(Case::rows).chain(rest.into_iter().filter(|row| !row.service.is_empty()))
    }
}

fn case(connections: u64) -> Case {
    let mut case = Case::new(connections);
    match connections {
        1 => case.mean.goal = Some(Goal::RatioAtMost(1.5)),
        32 => case.rate.goal = Some(Goal::RatioAtLeast(1.25)),
        128 => case.rate.goal = Some(Goal::RatioAtLeast(2.5)),
        _ => {}
    }
    case
}
