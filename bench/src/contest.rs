//! Contest: the service and pgbench in turns, at the same work on the same database.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    figures::Round,
    house::House,
    load::{Ask, Load},
    pgbench::{self, Pgbench, Script},
    report::Row,
    scratch::Scratch,
    service::{Relay, Service},
};

/// Before the first round, to warm up.
const WARM_UP: Duration = Duration::from_secs(2);
pub const LIMIT: &str = "pgbench";

pub struct Contest {
    database: Scratch,
    /// Without its relay: what pgbench does, and no more.
    pub service: Service,
    pgbench: Pgbench,
    users: u64,
}

impl Contest {
    pub async fn open(house: &House, purpose: &str) -> anyhow::Result<Self> {
        let database = house.database(purpose).await?;
        let service = house.serve(&database, Relay::Off).await?;
        let pgbench = Pgbench::new(&database)?;
        Ok(Self { database, service, pgbench, users: house.settings.users })
    }

    /// The service, then pgbench.
    pub async fn round(
        &self,
        connections: u64,
        time: Duration,
        ask: Ask,
        scripts: &[(Script, u32)],
    ) -> anyhow::Result<(Round, Round)> {
        let service = self.ask(connections, time, ask).await?;
        let run = pgbench::Run { scripts, clients: connections, users: self.users, seconds: time.as_secs() };
        let limit = self.pgbench.run(&run).await?;
        self.forget().await?;
        Ok((service, limit))
    }

    /// The service alone.
    pub async fn ask(&self, connections: u64, time: Duration, ask: Ask) -> anyhow::Result<Round> {
        let load = Load { addresses: vec![self.service.address], connections, users: self.users, ask, time };
        let round = load.run().await?;
        if matches!(ask, Ask::Patch | Ask::PatchOne) {
            self.check_changed(round.latencies_ms.count()).await?;
        }
        self.forget().await?;
        Ok(round)
    }

    /// Fails when not every one of so many patches made an event: one that changes nothing costs less.
    pub async fn check_changed(&self, patches: u64) -> anyhow::Result<()> {
        let events = self.database.count_events().await?;
        ensure!(events >= patches, "{patches} patches were answered, and changed something {events} times");
        Ok(())
    }

    pub async fn warm_up(&self, connections: u64, ask: Ask, scripts: &[(Script, u32)]) -> anyhow::Result<()> {
        self.round(connections, WARM_UP, ask, scripts).await.map(drop)
    }

    /// The events, which nobody takes away.
    pub async fn forget(&self) -> anyhow::Result<()> {
        self.database.run("truncate outbox").await
    }
}

/// Rate and latencies at one number of connections.
pub struct Case {
    pub connections: u64,
    pub rate: Row,
    pub mean: Row,
    p50: Row,
    p99: Row,
}

impl Case {
    pub fn new(connections: u64) -> Self {
        let s = if connections == 1 { "" } else { "s" };
        let row = |what: &str, unit| Row::new(format!("{connections} connection{s}{what}"), unit).limit(LIMIT);
        let (rate, mean) = (row("", "1/s"), row(", mean", "ms"));
        Self { connections, rate, mean, p50: row(", p50", "ms"), p99: row(", p99", "ms") }
    }

    pub fn add(&mut self, service: &Round, limit: &Round) {
        let (ours, theirs) = (&service.latencies_ms, &limit.latencies_ms);
        self.rate.add(service.per_second, limit.per_second);
        self.mean.add(self.mean_ms(service), self.mean_ms(limit));
        self.p50.add(ours.quantile(0.5), theirs.quantile(0.5));
        self.p99.add(ours.quantile(0.99), theirs.quantile(0.99));
    }

    /// From one request of a connection to its next, as pgbench itself has it: its log leaves out what waited in its own loop.
    pub fn mean_ms(&self, round: &Round) -> f64 {
        self.connections as f64 / round.per_second * 1e3
    }

    pub fn rows(self) -> [Row; 4] {
        [self.rate, self.mean, self.p50, self.p99]
    }
}
