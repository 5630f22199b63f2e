//! Lead: work in the background that one instance does while the others stand by.
//!
//! Promise: of all instances one leads, as far as the database can tell; one whose session was lost stops within moments.
//! Not here, on purpose: fencing. An instance that was frozen may go on for a moment beside its successor, so whatever a duty does
//! twice must do no harm.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::Context;
use backon::{BackoffBuilder, ExponentialBuilder};
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
/// A turn that lasted this long was a good one: the next back-off starts small again.
const GOOD_TURN: Duration = Duration::from_secs(10);
pub const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// What a leader does.
pub trait Duty: Send {
    /// Names its session in the database, and itself in the log.
    const NAME: &'static str;
    /// Of the advisory lock that the leader holds.
    const KEY: i64;

    /// One turn at it: ends in order at `stop`, or at the first fault. A new turn then begins after a while.
    fn turn(&mut self, stop: &CancellationToken) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// Leads, or stands by, until `stop`.
pub async fn serve<D: Duty>(mut duty: D, db: Db, stop: CancellationToken) {
    let mut delays = back_off();
    // An outage is told once, and the end of it too.
    let mut is_well = true;
    while !stop.is_cancelled() {
        let began = Instant::now();
        let Err(error) = turn(&mut duty, &db, &stop).await else { break };
        if began.elapsed() > GOOD_TURN {
            (delays, is_well) = (back_off(), true);
        }
        if std::mem::take(&mut is_well) {
            tracing::warn!(duty = D::NAME, "interrupted, and will go on when it can: {}", with_causes(&error));
        } else {
            tracing::debug!(duty = D::NAME, "still interrupted: {}", with_causes(&error));
        }
        let delay = delays.next().unwrap_or(LONGEST_DELAY);
        let _ = stop.run_until_cancelled(sleep(delay)).await;
    }
}

async fn turn<D: Duty>(duty: &mut D, db: &Db, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut line = db.line(D::NAME, [("idle_session_timeout", IDLE_TIMEOUT)]);
    match stop.run_until_cancelled(wait_for_lead::<D>(&mut line)).await {
        None => return Ok(()),
        Some(leads) => leads?,
    }
    tracing::info!(duty = D::NAME, "this instance leads");
    let outcome = while_leading(duty, &mut line, stop).await;
    line.hang_up().await;
    outcome
}

async fn wait_for_lead<D: Duty>(line: &mut Line) -> anyhow::Result<()> {
    loop {
        let asked = line.run(async |session| sqlx::query_scalar(TRY_LEAD).bind(D::KEY).fetch_one(session).await).await;
        if asked.context("the lead cannot be asked for")? {
            return Ok(());
        }
        sleep(STAND_BY).await;
    }
}

async fn while_leading<D: Duty>(duty: &mut D, line: &mut Line, stop: &CancellationToken) -> anyhow::Result<()> {
    let leads = stop.child_token();
    let mut work = pin!(duty.turn(&leads));
    tokio::select! {
        outcome = &mut work => outcome,
        lost = lead_lost(line) => {
            leads.cancel();
            // Whatever it still had to say is said in the next turn.
            let _ = timeout(FAREWELL, work).await;
            Err(lost.context("the lead is lost"))
        }
    }
}

/// Gives the session signs of life, until it is over.
async fn lead_lost(line: &mut Line) -> anyhow::Error {
    loop {
        sleep(SIGN_OF_LIFE).await;
        let alive = line.run_in_session(async |session| sqlx::query("select 1").execute(session).await).await;
        if let Err(lost) = alive {
            return lost.into();
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
