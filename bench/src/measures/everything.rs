//! Everything: writers at full load, the relay that tells what they do, and a consumer that fetches whoever it hears of, all at once.
//!
//! The limit is the same load on the service alone: no relay, no consumer. The rest shares the cores with it, so that something is
//! left of the rate and no more. It must not fall behind: when the writers end, outbox and consumer are nearly done.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::time::sleep;

use crate::{
    application::Application,
    contest::Contest,
    house::House,
    load::{Ask, Load},
    memory::Watch,
    report::{Findings, Goal, Row},
    scratch::Scratch,
    service::{Relay, Service},
    settings::Settings,
};

const CONNECTIONS: u64 = 32;
/// For outbox and consumer to come to an end, however late.
const PATIENCE: Duration = Duration::from_secs(300);
/// A sixtieth of what the goal allows.
const LOOK_EVERY: Duration = Duration::from_millis(30);

pub fn turns(_: &Settings) -> u64 {
    3
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let (alone, settings) = (Contest::open(house, "everything_alone").await?, &house.settings);
    let all = All::open(house).await?;
    let case = |what| format!("{CONNECTIONS} connections, {what}");
    let mut rate = Row::new(case("relay and consumer on"), "1/s").limit("PATCH alone").goal(Goal::RatioAtLeast(0.5));
    let mut told = Row::new(case("outbox empty after the end"), "s").goal(Goal::AtMost(2.0));
    let mut done = Row::new(case("consumer done after the end"), "s").goal(Goal::AtMost(2.0));
    alone.ask(CONNECTIONS, settings.time(), Ask::Patch).await?;
    all.round(settings).await?;
    let watch = Watch::start(&all.service);
    for round in 1..=settings.rounds {
        eprintln!("bench: everything, round {round} of {}", settings.rounds);
        let limit = alone.ask(CONNECTIONS, settings.time(), Ask::Patch).await?;
        let outcome = all.round(settings).await?;
        rate.add(outcome.per_second, limit.per_second);
        told.service.push(outcome.told_s);
        done.service.push(outcome.done_s);
    }
    let memory = watch.rows("the service");
    all.application.close(house).await?;
    Ok(Findings { rows: [rate, told, done].into_iter().chain(memory).collect(), ..Findings::default() })
}

struct All {
    database: Scratch,
    service: Service,
    application: Application,
}

struct Outcome {
    per_second: f64,
    /// Both after the writers ended.
    told_s: f64,
    done_s: f64,
}

impl All {
    async fn open(house: &House) -> anyhow::Result<Self> {
        let database = house.database("everything").await?;
        let service = house.serve(&database, Relay::Here).await?;
        Ok(Self { application: Application::start(house, &service)?, database, service })
    }

    async fn round(&self, settings: &Settings) -> anyhow::Result<Outcome> {
        let done_before = self.application.done();
        let (users, time) = (settings.users, settings.time());
        let load =
            Load { addresses: vec![self.service.address], connections: CONNECTIONS, users, ask: Ask::Patch, time };
        let round = load.run().await?;
        let ended = Instant::now();
        self.database.settle().await.context("with everything on")?;
        let told_s = ended.elapsed().as_secs_f64();
        while self.application.done() < done_before + round.latencies_ms.count() {
            ensure!(ended.elapsed() < PATIENCE, "the consumer does not get to the end of its queue");
            sleep(LOOK_EVERY).await;
        }
        Ok(Outcome { per_second: round.per_second, told_s, done_s: ended.elapsed().as_secs_f64() })
    }
}
