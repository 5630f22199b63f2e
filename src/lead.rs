//! Lead: work in the background that one instance does while the others stand by.
//!
//! Promise: of all instances one leads, as far as the database can tell; one whose session was lost stops within moments. Work that fails
//! again and again is seen in the metrics for as long as it does.
//! Not here, on purpose: fencing. An instance that was frozen may go on for a moment beside its successor, so whatever a duty does
//! twice must do no harm.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::Context;
use backon::{BackoffBuilder, ExponentialBuilder};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    db::{Db, Line},
    telemetry::with_causes,
};

pub const TRY_LEAD: &str = "select pg_try_advisory_lock($1)";
/// Between two tries of an instance that stands by.
const STAND_BY: Duration = Duration::from_secs(1);
/// Between two signs of life of the leader's session.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// A leader that says nothing for this long is frozen, or cut off: the database ends its session, and with it the lead.
const IDLE_TIMEOUT: &str = "10s";
/// For work that was told to stop. What is still under way then is dropped.
const FAREWELL: Duration = Duration::from_secs(5);
/// A turn that lasted this long was a good one: the duty is done again, and the next back-off starts small.
const GOOD_TURN: Duration = Duration::from_secs(10);
pub const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// An interruption that lasts is told of again.
const TOLD_EVERY: Duration = Duration::from_secs(300);

/// What a leader does.
pub trait Duty: Send {
    /// Names its session in the database, and itself in the log.
    const NAME: &'static str;
    /// Of the advisory lock that the leader holds.
    const KEY: i64;

    /// One turn at it: ends in order at `stop`, or at the first fault. A new turn then begins after a while.
    fn turn(&mut self, stop: &CancellationToken) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// What an operator sees of the duties that this instance leads, or cannot ask for.
#[derive(Clone, Default)]
pub struct Status(Family<OfDuty, Gauge>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDuty {
    duty: &'static str,
}

impl Status {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "duty_interrupted",
            "1: this instance's turn at a duty failed, and none has lasted ten seconds since; absent where another instance leads it",
            self.0.clone(),
        );
    }
}

/// How it goes with a duty here. Who stands by remembers: two instances that fail in turn are not well in between.
struct Course {
    status: Status,
    of: OfDuty,
    /// When it was last told that the duty is interrupted. `None`: it is not.
    told: Option<Instant>,
}

impl Course {
    fn leads(&self) {
        tracing::info!(duty = self.of.duty, "this instance leads");
        self.show();
    }

    fn does_not_lead(&self) {
        self.status.0.remove(&self.of);
    }

    fn goes_well(&mut self) {
        self.told = None;
        self.show();
    }

    fn fails(&mut self, error: &anyhow::Error) {
        let (duty, error) = (self.of.duty, with_causes(error));
        if self.told.is_none_or(|told| told.elapsed() > TOLD_EVERY) {
            tracing::warn!(duty, "interrupted, and will go on when it can: {error}");
            self.told = Some(Instant::now());
        } else {
            tracing::debug!(duty, "still interrupted: {error}");
        }
        self.show();
    }

    fn show(&self) {
        self.status.0.get_or_create(&self.of).set(self.told.is_some().into());
    }
}

/// Leads, or stands by, until `stop`.
pub async fn serve<D: Duty>(mut duty: D, db: Db, status: Status, stop: CancellationToken) {
    let mut delays = back_off();
    let mut course = Course { status, of: OfDuty { duty: D::NAME }, told: None };
    while !stop.is_cancelled() {
        let began = Instant::now();
        let Err(error) = turn(&mut duty, &db, &mut course, &stop).await else { break };
        if began.elapsed() > GOOD_TURN {
            delays = back_off();
        }
        course.fails(&error);
        let delay = delays.next().unwrap_or(LONGEST_DELAY);
        let _ = stop.run_until_cancelled(sleep(delay)).await;
    }
    course.does_not_lead();
}

async fn turn<D: Duty>(duty: &mut D, db: &Db, course: &mut Course, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut line = db.line(D::NAME, [("idle_session_timeout", IDLE_TIMEOUT)]);
    match stop.run_until_cancelled(wait_for_lead::<D>(&mut line, course)).await {
        None => return Ok(()),
        Some(leads) => leads?,
    }
    course.leads();
    let outcome = while_leading(duty, &mut line, course, stop).await;
    line.hang_up().await;
    outcome
}

async fn wait_for_lead<D: Duty>(line: &mut Line, course: &Course) -> anyhow::Result<()> {
    loop {
        let asked = line.run(async |session| sqlx::query_scalar(TRY_LEAD).bind(D::KEY).fetch_one(session).await).await;
        if asked.context("the lead cannot be asked for")? {
            return Ok(());
        }
        course.does_not_lead();
        sleep(STAND_BY).await;
    }
}

async fn while_leading<D: Duty>(
    duty: &mut D,
    line: &mut Line,
    course: &mut Course,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let leads = stop.child_token();
    let mut work = pin!(duty.turn(&leads));
    tokio::select! {
        outcome = &mut work => outcome,
        lost = lead_lost(line, course) => {
            leads.cancel();
            // Whatever it still had to say is said in the next turn.
            let _ = timeout(FAREWELL, work).await;
            Err(lost.context("the lead is lost"))
        }
    }
}

/// Gives the session signs of life, until it is over; the turn was a good one once it has lasted.
async fn lead_lost(line: &mut Line, course: &mut Course) -> anyhow::Error {
    let began = Instant::now();
    loop {
        sleep(SIGN_OF_LIFE).await;
        let alive = line.run_in_session(async |session| sqlx::query("select 1").execute(session).await).await;
        if let Err(lost) = alive {
            return lost.into();
        }
        if began.elapsed() > GOOD_TURN {
            course.goes_well();
        }
    }
}

/// From a tenth of a second to five, jittered so that a restarted server does not meet all instances at once.
pub fn back_off() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(LONGEST_DELAY / 2)
        .with_jitter()
        .without_max_times()
        .build()
}
