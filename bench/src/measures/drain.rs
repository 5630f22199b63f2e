//! Drain: how fast a backlog gets out, to each type of queue, while somebody reads and while nobody does.
//!
//! Two limits, with as many messages under way and the same messages: lapin, which the relay is built on, and a socket into which
//! frames are written that were made beforehand. Whoever publishes, it counts what arrives in the queue, from the first message to the
//! last. The service is started when the backlog is there, as after an outage of the broker.

use std::sync::Arc;

use anyhow::ensure;
use tokio::task::spawn_blocking;

use crate::{
    house::House,
    memory::Watch,
    publishers::{Frames, KEY, Lapin, Raw, change, fill_outbox},
    queue::{Arrivals, Kind, Queue, by_second, per_second, tenths},
    report::{Curve, Findings, Goal, Row},
    scratch::Scratch,
    service::Relay,
    settings::Settings,
};

/// Frames that are made beforehand; a longer drain sends them again.
const FRAMES: u64 = 200_000;
/// A drain and the making of its backlog are about so fast.
const PER_SECOND: u64 = 15_000;

pub fn turns(settings: &Settings) -> u64 {
    let drains = 3 * CASES.len() as u64 + 1;
    (drains * settings.pending()).div_ceil(PER_SECOND * settings.seconds)
}

const CASES: [(Kind, bool); 4] =
    [(Kind::Quorum, false), (Kind::Quorum, true), (Kind::Classic, false), (Kind::Classic, true)];

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let pending = house.settings.pending();
    let frames = Frames::of((&house.exchange, KEY), (0..FRAMES.min(pending)).map(change))?.into();
    let contest = Contest { house, database: house.empty_database("drain").await?, pending, frames };
    let mut cases: Vec<Case> = CASES.into_iter().map(Case::new).collect();
    let mut held = tenths_row("old snapshot held open, the last tenth");
    let mut memory = vec![];
    let mut curves = vec![];
    for round in 1..=house.settings.rounds {
        eprintln!("bench: drain, round {round} of {}", house.settings.rounds);
        for case in &mut cases {
            contest.round(case).await?;
        }
        let snapshot = contest.open_snapshot().await?;
        let (arrivals, watched) = contest.relay(Kind::Quorum, false, true).await?;
        drop(snapshot);
        add_tenths(&mut held, &arrivals);
        memory = watched;
        curves = cases.iter().flat_map(Case::curves).collect();
        curves.push(curve(&name(Kind::Quorum, false), "relay, old snapshot open", &arrivals));
    }
    let rows = cases.into_iter().flat_map(Case::rows).chain([held]).chain(memory).collect();
    Ok(Findings { rows, curves })
}

/// What is the same in all drains.
struct Contest<'a> {
    house: &'a House,
    database: Scratch,
    pending: u64,
    frames: Arc<Frames>,
}

impl Contest<'_> {
    async fn round(&self, case: &mut Case) -> anyhow::Result<()> {
        let (kind, is_read) = (case.kind, case.is_read);
        let (relay, _) = self.relay(kind, is_read, false).await?;
        let lapin = self.lapin(kind, is_read).await?;
        let raw = self.raw(kind, is_read).await?;
        case.add(relay, lapin, raw);
        Ok(())
    }

    /// `users` is how many are told of.
    async fn queue(&self, kind: Kind, is_read: bool, users: u64) -> anyhow::Result<Queue> {
        let mut queue = Queue::bound(self.house, kind).await?;
        queue.clear().await?;
        if is_read {
            queue.read(self.house, users).await?;
        }
        Ok(queue)
    }

    /// With what the service took of memory.
    async fn relay(&self, kind: Kind, is_read: bool, has_backlog: bool) -> anyhow::Result<(Arrivals, Vec<Row>)> {
        if !has_backlog {
            self.fill().await?;
        }
        let queue = self.queue(kind, is_read, self.pending).await?;
        let service = self.house.serve(&self.database, Relay::Here).await?;
        let watch = Watch::start(&service);
        let arrivals = queue.await_all(self.pending).await?;
        // Told, and known to be told.
        self.database.settle().await?;
        ensure!(arrivals.last().is_some_and(|(_, arrived)| *arrived == self.pending), "something was told twice");
        queue.delete().await?;
        Ok((arrivals, watch.rows("drain")))
    }

    async fn lapin(&self, kind: Kind, is_read: bool) -> anyhow::Result<Arrivals> {
        let queue = self.queue(kind, is_read, self.pending).await?;
        let connection = self.house.connect_broker().await?;
        let lapin = Lapin::open(&connection).await?;
        let messages = (0..self.pending).map(change);
        let (arrivals, sent) =
            tokio::join!(queue.await_all(self.pending), lapin.publish((&self.house.exchange, KEY), messages));
        sent?;
        queue.delete().await?;
        connection.close(200, "bye".into()).await?;
        arrivals
    }

    async fn raw(&self, kind: Kind, is_read: bool) -> anyhow::Result<Arrivals> {
        let (url, frames, pending) = (self.house.amqp_url.clone(), self.frames.clone(), self.pending);
        // Frames that are sent again tell of the same users again.
        let queue = self.queue(kind, is_read, pending.min(FRAMES)).await?;
        let sent = spawn_blocking(move || anyhow::Ok(Raw::connect(&url)?.publish(&frames, pending)?));
        let (arrivals, sent) = tokio::join!(queue.await_all(self.pending), sent);
        sent??;
        queue.delete().await?;
        arrivals
    }

    async fn fill(&self) -> anyhow::Result<()> {
        self.database.run("truncate outbox").await?;
        self.database.run(&fill_outbox(self.pending)).await
    }

    /// Fills the outbox, and then sees it as it is for as long as what is returned lives.
    async fn open_snapshot(&self) -> anyhow::Result<sqlx::PgConnection> {
        self.fill().await?;
        let mut connection = self.database.connect().await?;
        for sql in ["begin isolation level repeatable read", "select from users limit 1"] {
            sqlx::raw_sql(sql).execute(&mut connection).await?;
        }
        Ok(connection)
    }
}

/// One type of queue, with a reader or without.
struct Case {
    kind: Kind,
    is_read: bool,
    beside_lapin: Row,
    beside_raw: Row,
    last_tenth: Row,
    /// Of the last round.
    arrivals: [(&'static str, Arrivals); 3],
}

impl Case {
    fn new((kind, is_read): (Kind, bool)) -> Self {
        let name = name(kind, is_read);
        let row = |limit| Row::new(&name, "1/s").limit(limit);
        Self {
            kind,
            is_read,
            beside_lapin: row("lapin").goal(Goal::RatioAtLeast(0.95)),
            beside_raw: row("socket").goal(Goal::RatioAtLeast(0.93)),
            last_tenth: tenths_row(&format!("{name}, the last tenth")),
            arrivals: ["relay", "lapin", "socket"].map(|who| (who, vec![])),
        }
    }

    fn add(&mut self, relay: Arrivals, lapin: Arrivals, raw: Arrivals) {
        self.beside_lapin.add(per_second(&relay), per_second(&lapin));
        self.beside_raw.add(per_second(&relay), per_second(&raw));
        add_tenths(&mut self.last_tenth, &relay);
        self.arrivals = [("relay", relay), ("lapin", lapin), ("socket", raw)];
    }

    fn curves(&self) -> impl Iterator<Item = Curve> {
        let name = name(self.kind, self.is_read);
        self.arrivals.iter().map(move |(who, arrivals)| curve(&name, who, arrivals))
    }

    fn rows(self) -> [Row; 3] {
        [self.beside_lapin, self.beside_raw, self.last_tenth]
    }
}

fn name(kind: Kind, is_read: bool) -> String {
    format!("{}, {}", kind.name(), if is_read { "with a consumer" } else { "without a consumer" })
}

fn tenths_row(case: &str) -> Row {
    Row::new(case, "1/s").limit("the first").goal(Goal::RatioAtLeast(0.95))
}

fn add_tenths(row: &mut Row, arrivals: &Arrivals) {
    let (first, last) = tenths(arrivals);
    row.add(per_second(last), per_second(first));
}

fn curve(of: &str, name: &str, arrivals: &Arrivals) -> Curve {
    Curve {
        of: of.to_owned(),
        name: name.to_owned(),
        is_limit: name == "lapin",
        x_unit: "s".to_owned(),
        y_unit: "1/s".to_owned(),
        points: by_second(arrivals),
    }
}
