//! Disturbed: what the service loses to what goes on around it, beside the same without it.
//!
//! Each case has two sides, which take turns at full load, each with a database and services of its own. An old snapshot holds up the
//! cleaning of its own database alone, so that the other side is free of it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use sqlx::{Connection, PgConnection};

use crate::{
    house::House,
    load::{Ask, Load},
    memory::Watch,
    report::{Curve, Findings, Goal, Row},
    scratch::Scratch,
    service::{Relay, Service},
    settings::Settings,
};

const CONNECTIONS: u64 = 32;
/// Of what it does undisturbed.
const KEEPS: Goal = Goal::RatioAtLeast(0.9);
/// With `--full`.
const MANY: u64 = 10_000_000;
const ANALYTICS: &str = "begin isolation level repeatable read; select count(*) from users where deleted_at is null;";

pub fn turns(settings: &Settings) -> u64 {
    let held = settings.hold().as_secs() / (settings.seconds * settings.rounds);
    // Pending events, two and four instances, and what is many.
    held + 6 + if settings.full { 200 } else { 10 }
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let mut findings = old_snapshot(house).await?;
    house.clear().await;
    findings.rows.push(pending(house).await?);
    for instances in [2, 4] {
        house.clear().await;
        findings.rows.extend(several(house, instances).await?);
    }
    if house.settings.full {
        house.clear().await;
        findings.rows.extend(many_users(house).await?);
    }
    Ok(findings)
}

/// An analytics transaction is open all the while. What counts is how it is after half of that time.
async fn old_snapshot(house: &House) -> anyhow::Result<Findings> {
    let settings = &house.settings;
    let held = Side::open(house, house.database("held").await?, 1, Relay::Here).await?;
    let free = Side::open(house, house.database("free").await?, 1, Relay::Here).await?;
    let name = format!("transaction open for {} s", settings.hold().as_secs());
    let mut rows = Pair::new(&name, "without it");
    let mut curves = [curve("kept with the old snapshot", false), curve("kept without", true)];
    held.load(settings).await?;
    free.load(settings).await?;
    let analytics = Analytics::begin(&held.database).await?;
    let (watch, began) = (Watch::start(&held.services[0]), Instant::now());
    while began.elapsed() < settings.hold() {
        let (with, without) = (held.load(settings).await?, free.load(settings).await?);
        let at_s = began.elapsed().as_secs_f64();
        eprintln!("bench: disturbed, {at_s:.0} s of {}", settings.hold().as_secs());
        curves[0].points.push((at_s, with.kept));
        curves[1].points.push((at_s, without.kept));
        if began.elapsed() > settings.hold() / 2 {
            rows.add(with, without);
        }
    }
    analytics.end().await?;
    let rows = rows.rows().into_iter().chain(watch.rows(&name)).collect();
    Ok(Findings { rows, curves: curves.into() })
}

fn curve(name: &str, is_limit: bool) -> Curve {
    let [of, name, x_unit, y_unit] = ["", name, "s", "1/s"].map(str::to_owned);
    Curve { of, name, is_limit, x_unit, y_unit, points: vec![] }
}

/// Nobody tells what waits in the outbox, as if the broker had been away for a day.
async fn pending(house: &House) -> anyhow::Result<Row> {
    let settings = &house.settings;
    let count = if settings.full { MANY } else { settings.users };
    let full = Side::open(house, house.database("pending").await?, 1, Relay::Off).await?;
    let empty = Side::open(house, house.database("no_pending").await?, 1, Relay::Off).await?;
    eprintln!("bench: disturbed, {count} events are being made");
    full.database.fill_outbox(count).await?;
    let mut row = Row::new(format!("{count} pending, kept"), "1/s").limit("none pending").goal(KEEPS);
    full.load(settings).await?;
    empty.load(settings).await?;
    for _ in 0..settings.rounds {
        row.add(full.load(settings).await?.kept, empty.load(settings).await?.kept);
    }
    Ok(row)
}

/// Several instances on one database, of which one leads. They share the cores of one machine.
async fn several(house: &House, instances: usize) -> anyhow::Result<[Row; 2]> {
    let settings = &house.settings;
    let several = Side::open(house, house.database("several").await?, instances, Relay::Here).await?;
    let one = Side::open(house, house.database("one").await?, 1, Relay::Here).await?;
    contest(settings, &format!("{instances} instances"), &several, "one instance", &one).await
}

async fn many_users(house: &House) -> anyhow::Result<[Row; 2]> {
    let settings = &house.settings;
    let database = house.empty_database("many").await?;
    eprintln!("bench: disturbed, {MANY} users are being made");
    database.seed(MANY).await?;
    let many = Side { users: MANY, ..Side::open(house, database, 1, Relay::Here).await? };
    let some = Side::open(house, house.database("some").await?, 1, Relay::Here).await?;
    contest(settings, &format!("{MANY} users"), &many, &format!("{} users", settings.users), &some).await
}

async fn contest(settings: &Settings, name: &str, side: &Side, limit: &str, beside: &Side) -> anyhow::Result<[Row; 2]> {
    let mut rows = Pair::new(name, limit);
    side.load(settings).await?;
    beside.load(settings).await?;
    for round in 1..=settings.rounds {
        eprintln!("bench: disturbed, {name}, round {round} of {}", settings.rounds);
        rows.add(side.load(settings).await?, beside.load(settings).await?);
    }
    Ok(rows.rows())
}

/// A database and the services on it.
struct Side {
    database: Scratch,
    services: Vec<Service>,
    relay: Relay,
    users: u64,
}

/// A second.
#[derive(Clone, Copy)]
struct Rates {
    /// Until the writers ended.
    kept: f64,
    /// Until the last of it was told.
    told: f64,
}

impl Side {
    async fn open(house: &House, database: Scratch, instances: usize, relay: Relay) -> anyhow::Result<Self> {
        let mut services = vec![];
        for _ in 0..instances {
            services.push(house.serve(&database, relay).await?);
        }
        Ok(Self { database, services, relay, users: house.settings.users })
    }

    async fn load(&self, settings: &Settings) -> anyhow::Result<Rates> {
        let before = self.database.last_place().await?;
        let (began, users, time) = (Instant::now(), self.users, settings.time());
        let addresses: Vec<SocketAddr> = self.services.iter().map(|service| service.address).collect();
        let round = Load { addresses, connections: CONNECTIONS, users, ask: Ask::Patch, time }.run().await?;
        if self.relay == Relay::Here {
            self.database.settle_past(before).await?;
        }
        let took: Duration = began.elapsed();
        Ok(Rates { kept: round.per_second, told: round.latencies_ms.count() as f64 / took.as_secs_f64() })
    }
}

/// What is kept and what is told, of two sides.
struct Pair {
    kept: Row,
    told: Row,
}

impl Pair {
    fn new(name: &str, limit: &str) -> Self {
        let row = |what| Row::new(format!("{name}, {what}"), "1/s").limit(limit).goal(KEEPS);
        Self { kept: row("kept"), told: row("told") }
    }

    fn add(&mut self, side: Rates, beside: Rates) {
        self.kept.add(side.kept, beside.kept);
        self.told.add(side.told, beside.told);
    }

    fn rows(self) -> [Row; 2] {
        [self.kept, self.told]
    }
}

/// A transaction that reads, and keeps its snapshot.
struct Analytics(PgConnection);

impl Analytics {
    async fn begin(database: &Scratch) -> anyhow::Result<Self> {
        let mut connection = database.connect().await?;
        sqlx::raw_sql(ANALYTICS).execute(&mut connection).await?;
        Ok(Self(connection))
    }

    async fn end(mut self) -> anyhow::Result<()> {
        sqlx::raw_sql("commit").execute(&mut self.0).await?;
        Ok(self.0.close().await?)
    }
}
