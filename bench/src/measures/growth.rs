//! Growth: what one step of each kind of work costs while the tables grow.
//!
//! The statements are the service's own, through its functions or its API. What takes a page, a batch or a bucket has the same number of
//! rows in it at every size; a whole digest looks at everybody by nature, and is shown per thousand users.

use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tidings::{
    outbox::{self, Confirmed, OutboxId},
    users, web,
};
use time::OffsetDateTime;

use crate::{
    house::House,
    http::{Client, Request, read},
    publishers::fill_outbox,
    report::{Curve, Findings, Goal, Row},
    scratch::{Scratch, user, user_in_sql},
    service::{Relay, Service},
    settings::Settings,
};

const SIZES: [u64; 3] = [10_000, 100_000, 1_000_000];
const FULL_SIZE: u64 = 10_000_000;
/// Of each step in a round, of which the quickest counts: what others take of the machine only adds to it.
const TIMES: u64 = 10;
/// What is still flat: a tree gets a level higher, and less of a large table lies in the processor's caches.
const GOAL: f64 = 1.5;
/// As the relay claims, and settles; what it has under way; ids that it asks for again.
const BATCH: usize = 500;
const UNDER_WAY: OutboxId = 2_000;
const SKIPPED: u64 = 1_000;
/// Rows in one statement of the purge.
const PURGE: i64 = 100;
/// Users in a bucket, about.
const IN_BUCKET: u64 = 40;
const MAX_BUCKETS: u64 = 65_536;
/// As the SDK asks.
const DIGEST_PAGE: u64 = 100_000;
/// Making and measuring a million rows takes about so long.
const TURN: u64 = 40;

pub fn turns(settings: &Settings) -> u64 {
    let times = if settings.full { 11 } else { 1 };
    (times * TURN).div_ceil(settings.seconds)
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let mut stages = vec![];
    for size in SIZES.into_iter().chain(house.settings.full.then_some(FULL_SIZE)) {
        eprintln!("bench: growth, {size} rows are being made");
        stages.push(Stage::set(house, size).await?);
    }
    for round in 1..=house.settings.rounds {
        eprintln!("bench: growth, round {round} of {}", house.settings.rounds);
        for stage in &mut stages {
            stage.round().await?;
        }
    }
    Ok(Findings { rows: rows(&stages), curves: curves(&stages) })
}

/// A database of one size.
struct Stage {
    size: u64,
    database: Scratch,
    service: Service,
    /// Milliseconds of each step, one per round.
    steps: Vec<(&'static str, Vec<f64>)>,
}

impl Stage {
    async fn set(house: &House, size: u64) -> anyhow::Result<Self> {
        let database = house.empty_database(&format!("growth_{size}")).await?;
        database.seed(size).await?;
        database.run(&keys(size, "0 days")).await?;
        database.run("vacuum analyze idempotency_keys").await?;
        let service = house.serve(&database, Relay::Off).await?;
        Ok(Self { size, database, service, steps: vec![] })
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        self.database.run("truncate outbox").await?;
        self.database.run(&fill_outbox(self.size)).await?;
        self.database.run("vacuum analyze outbox").await?;
        let mut taken = Taken::default();
        self.telling(&mut taken).await?;
        self.asking(&mut taken).await?;
        for (place, (step, ms)) in taken.0.into_iter().enumerate() {
            match self.steps.get_mut(place) {
                Some((_, samples)) => samples.push(ms),
                None => self.steps.push((step, vec![ms])),
            }
        }
        Ok(())
    }

    /// What the service does in the background.
    async fn telling(&self, taken: &mut Taken) -> anyhow::Result<()> {
        let mut db = self.database.connect().await?;
        let (last, size) = (outbox::last_id(&mut db).await?, OutboxId::try_from(self.size)?);
        let first = last - size + 1;
        let share = |n: u64, of: u64| first + size * n as OutboxId / of as OutboxId;
        let again: Vec<OutboxId> = (0..SKIPPED).map(|n| share(n, SKIPPED)).collect();
        let under_way: Vec<OutboxId> = (first..first + UNDER_WAY).collect();
        taken
            .on(&mut db, "claim of 500", async |db, n| outbox::claim(db, share(n, TIMES), BATCH, &[]).await.map(drop))
            .await?;
        taken
            .on(&mut db, "1,000 skipped ids asked for again", async |db, _| {
                outbox::claim(db, last, 0, &again).await.map(drop)
            })
            .await?;
        taken
            .on(&mut db, "sweep of 500", async |db, _| outbox::sweep(db, last, BATCH, &under_way).await.map(drop))
            .await?;
        taken
            .on(&mut db, "lag", async |db, _| outbox::lag(db, outbox::Floor::default().place()).await.map(drop))
            .await?;
        let told = outbox::claim(&mut db, first - 1, TIMES as usize * BATCH, &[]).await?;
        let confirmed: Vec<_> =
            told.iter().map(|entry| Confirmed { id: entry.id, message_id: entry.notice.message_id }).collect();
        taken
            .on(&mut db, "settle of 500", async |db, n| {
                outbox::settle(db, &confirmed[n as usize * BATCH..][..BATCH]).await
            })
            .await?;
        // Too old only now: the service purges by itself.
        self.database.run(&keys(TIMES * PURGE.unsigned_abs(), "2 days")).await?;
        taken
            .on(&mut db, "purge of 100", async |db, _| {
                sqlx::query(users::PURGE).bind(PURGE).bind(OffsetDateTime::now_utc()).execute(db).await.map(drop)
            })
            .await?;
        Ok(sqlx::Connection::close(db).await?)
    }

    /// What clients ask for, over HTTP.
    async fn asking(&self, taken: &mut Taken) -> anyhow::Result<()> {
        let mut client = Client::connect(self.service.address).await?;
        let person = |n: u64| user(self.size * n / TIMES);
        let (mut get, mut patch) = (Request::get(), Request::patch());
        let before = TIMES * self.steps.first().map_or(0, |(_, samples)| samples.len() as u64);
        taken.from(&mut client, "GET of a user", |_, n| get.of(person(n), 0).to_vec()).await?;
        // A patch changes something: no count comes twice.
        taken.from(&mut client, "PATCH of a user", |_, n| patch.of(person(n), before + n + 1).to_vec()).await?;
        let list = |n: u64| read(&format!("/v1/users?limit=100&after={}", web::cursor(person(n))));
        taken.from(&mut client, "list, a page of 100", |_, n| list(n).into_bytes()).await?;
        client.ask(read("/v1/changes?limit=500").as_bytes()).await?;
        let next =
            |client: &Client| read(&format!("/v1/changes?limit=500&after={}", client.next().unwrap_or_default()));
        taken.from(&mut client, "changes, a page of 500", |client, _| next(client).into_bytes()).await?;
        // Of the same size everywhere, as near as powers of two allow.
        let buckets = (self.size / IN_BUCKET + 1).next_power_of_two().min(2 * MAX_BUCKETS) / 2;
        let bucket = |n: u64| read(&format!("/v1/digest/{}?buckets={buckets}", buckets * n / TIMES));
        taken.from(&mut client, "digest, the users of a bucket", |_, n| bucket(n).into_bytes()).await?;
        let (began, mut page) = (Instant::now(), Some(String::new()));
        while let Some(after) = page {
            client.ask(read(&format!("/v1/digest?buckets=256&limit={DIGEST_PAGE}{after}")).as_bytes()).await?;
            page = client.next().map(|next| format!("&after={next}"));
        }
        let all_ms = ms(began.elapsed());
        taken.0.push(("digest of all, per 1,000 users", all_ms * 1e3 / self.size as f64));
        Ok(())
    }
}

/// Makes so many idempotency keys of this age; each a millisecond older than the one before.
fn keys(count: u64, age: &str) -> String {
    format!(
        "insert into idempotency_keys (key, salt, fingerprint, outcome, user_id, version, kept_at)
         select sha256(uuid_send(gen_random_uuid())), 'salt', sha256('x'), 'changed', {}, 2, now() - interval '{age}' - n * interval '1 ms'
           from generate_series(0, {count} - 1) as n",
        user_in_sql("n::bigint")
    )
}

/// Milliseconds of each step.
#[derive(Default)]
struct Taken(Vec<(&'static str, f64)>);

impl Taken {
    async fn on(
        &mut self,
        db: &mut PgConnection,
        name: &'static str,
        step: impl AsyncFn(&mut PgConnection, u64) -> sqlx::Result<()>,
    ) -> anyhow::Result<()> {
        let mut least_ms = f64::INFINITY;
        for n in 0..TIMES {
            let began = Instant::now();
            step(db, n).await?;
            least_ms = least_ms.min(ms(began.elapsed()));
        }
        self.0.push((name, least_ms));
        Ok(())
    }

    /// Each request may follow from the last answer.
    async fn from(
        &mut self,
        client: &mut Client,
        name: &'static str,
        mut request: impl FnMut(&Client, u64) -> Vec<u8>,
    ) -> anyhow::Result<()> {
        let mut least_ms = f64::INFINITY;
        for n in 0..TIMES {
            let request = request(client, n);
            let began = Instant::now();
            client.ask(&request).await?;
            least_ms = least_ms.min(ms(began.elapsed()));
        }
        self.0.push((name, least_ms));
        Ok(())
    }
}

/// The largest size beside the smallest.
fn rows(stages: &[Stage]) -> Vec<Row> {
    let (Some(small), Some(large)) = (stages.first(), stages.last()) else { return vec![] };
    let limit = format!("{} rows", small.size);
    let pairs = small.steps.iter().zip(&large.steps);
    pairs
        .map(|((step, small), (_, large_ms))| {
            let mut row =
                Row::new(format!("{step}, {} rows", large.size), "ms").limit(&limit).goal(Goal::RatioAtMost(GOAL));
            small.iter().zip(large_ms).for_each(|(small, large)| row.add(*large, *small));
            row
        })
        .collect()
}

fn curves(stages: &[Stage]) -> Vec<Curve> {
    let steps = stages.first().map_or(0, |stage| stage.steps.len());
    (0..steps)
        .map(|place| {
            let points = stages.iter().map(|stage| (stage.size as f64, least(&stage.steps[place].1)));
            let [of, name, x_unit, y_unit] = ["", stages[0].steps[place].0, "rows", "ms"].map(str::to_owned);
            Curve { of, name, is_limit: false, x_unit, y_unit, points: points.collect() }
        })
        .collect()
}

/// The quickest.
fn least(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::NAN, f64::min)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
