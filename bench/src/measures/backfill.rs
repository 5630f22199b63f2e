//! Backfill: how fast a newcomer is told of everybody.
//!
//! The limit is lapin, with the same messages to the same queue and nothing to look out for. The service reads the users a page at a
//! time, looks at the queue before it sends anything, and notes how far it is. A consumer reads meanwhile: without one a backfill stops.

use std::time::Duration;

use anyhow::{Context, ensure};
use sqlx::PgPool;
use tidings::backfill::{Backfills, Plan, RATES, State, Whom};
use tidings_sdk::{subscription::SubscriptionName, topology::WORK};
use tokio::time::{sleep, timeout};

use crate::{
    house::House,
    publishers::{Lapin, creation},
    queue::{Arrivals, Queue, by_second, per_second},
    report::{Curve, Findings, Goal, Row},
    scratch::Scratch,
    service::Relay,
    settings::Settings,
};

const USERS: u64 = 100_000;
const FULL_USERS: u64 = 1_000_000;
/// As much as the reader has in hand, several times over: it is the reader who decides how fast it goes, not this.
const MAX_WAITING: i32 = 20_000;
/// For the last note of one whose messages have all arrived.
const PATIENCE: Duration = Duration::from_secs(10);
/// A backfill and its limit take about so long.
const TURN: u64 = 20;

pub fn turns(settings: &Settings) -> u64 {
    (users(settings) / USERS * TURN).div_ceil(settings.seconds)
}

fn users(settings: &Settings) -> u64 {
    if settings.full { FULL_USERS } else { USERS }
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let database = house.empty_database("backfill").await?;
    let users = users(&house.settings);
    database.seed(users).await?;
    let service = house.serve(&database, Relay::Here).await?;
    let name = format!("bench-{}", std::process::id());
    let register =
        ["subscription", "put", &name, "--key", "user.created", "--owner", "bench", "--purpose", "a measure"];
    house.deployment().run(&database, &register).await?;
    let contest = Contest { house, database: &database, name: name.parse()?, users };
    let outcome = contest.take().await;
    house.deployment().run(&database, &["subscription", "delete", &name, "--discard-waiting"]).await?;
    drop(service);
    outcome
}

struct Contest<'a> {
    house: &'a House,
    database: &'a Scratch,
    name: SubscriptionName,
    users: u64,
}

impl Contest<'_> {
    async fn take(&self) -> anyhow::Result<Findings> {
        let mut row = Row::new(format!("{} users", self.users), "1/s").limit("lapin").goal(Goal::RatioAtLeast(0.7));
        let mut curves = vec![];
        for round in 1..=self.house.settings.rounds {
            eprintln!("bench: backfill, round {round} of {}", self.house.settings.rounds);
            let (service, lapin) = (self.service().await?, self.lapin().await?);
            row.add(per_second(&service), per_second(&lapin));
            curves = vec![curve("backfill", false, &service), curve("lapin", true, &lapin)];
        }
        Ok(Findings { rows: vec![row], curves })
    }

    async fn queue(&self) -> anyhow::Result<Queue> {
        let mut queue = Queue::of(self.house, self.name.queue()).await?;
        queue.read(self.house, self.users).await?;
        Ok(queue)
    }

    async fn service(&self) -> anyhow::Result<Arrivals> {
        let backfills = Backfills::new(PgPool::connect(self.database.url.as_str()).await?);
        let mut queue = self.queue().await?;
        let plan = Plan { users: Whom::All, rate_per_s: *RATES.end(), max_waiting: MAX_WAITING };
        backfills.start(&self.name, &plan).await?;
        let arrivals = queue.await_all(self.users).await?;
        let ended = timeout(PATIENCE, async {
            loop {
                let backfill = backfills.get(&self.name).await?;
                if backfill.state == State::Done {
                    return anyhow::Ok(backfill);
                }
                sleep(Duration::from_millis(50)).await;
            }
        });
        let backfill = ended.await.context("the backfill does not end")??;
        ensure!(backfill.sent.unsigned_abs() == self.users, "it told of {} users", backfill.sent);
        queue.clear().await?;
        Ok(arrivals)
    }

    async fn lapin(&self) -> anyhow::Result<Arrivals> {
        let mut queue = self.queue().await?;
        let connection = self.house.connect_broker().await?;
        let lapin = Lapin::open(&connection).await?;
        let messages = (0..self.users).map(creation);
        let (arrivals, sent) =
            tokio::join!(queue.await_all(self.users), lapin.publish((self.name.as_str(), WORK), messages));
        sent?;
        queue.clear().await?;
        connection.close(200, "bye".into()).await?;
        arrivals
    }
}

fn curve(name: &str, is_limit: bool, arrivals: &Arrivals) -> Curve {
    let [of, name, x_unit, y_unit] = ["", name, "s", "1/s"].map(str::to_owned);
    Curve { of, name, is_limit, x_unit, y_unit, points: by_second(arrivals) }
}
