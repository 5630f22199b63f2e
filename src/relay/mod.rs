//! Relay: carries committed events from the outbox to the broker.
//!
//! Promise: each event is published at least once; nothing counts as published before the broker confirmed it.
//! Not here, on purpose: users, HTTP, and trust in a wake-up (a wake is a hint; the table is the truth). Of what comes with one it
//! believes that it is committed, and not that it is all.

mod cursor;
mod drain;
mod errand;
mod settler;
mod status;

pub use status::{Complaints, Status};

use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Broker, Publisher},
    db::{Db, Line},
    lead::{LONGEST_DELAY, TRY_LEAD, back_off},
    outbox::{self, Bell, Confirmed},
    telemetry::with_causes,
};
use cursor::Cursor;
use drain::{Drain, Ledger};
use errand::Errand;
use settler::Settler;

/// Key of the advisory lock that the leading relay of a database holds: "tidings" in ASCII.
const LEAD: i64 = 0x74_69_64_69_6e_67_73;
/// Between two tries of a relay that stands by.
const STAND_BY: Duration = Duration::from_millis(500);
/// A leader that says nothing for this long loses its session, and with it the lead: it is frozen, or cut off. A working leader
/// asks the outbox at least twice a second.
const LEADER_IDLE_TIMEOUT: &str = "10s";
/// A session that lasted this long was a good one: the next back-off starts small again.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// Everything a relay needs; [`Relay::run`] is its life.
pub struct Relay {
    db: Db,
    broker: Broker,
    bell: Bell,
    status: Status,
    /// Confirmed events whose rows are still to be deleted; they outlive the session, so that they are not sent twice.
    unsettled: Vec<Confirmed>,
}

impl Relay {
    pub fn new(db: Db, broker: Broker, bell: Bell, status: Status) -> Self {
        Self { db, broker, bell, status, unsettled: vec![] }
    }

    /// Carries events until `stop`, whatever happens to broker and database meanwhile.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = back_off();
        while !stop.is_cancelled() {
            let began = Instant::now();
            let Err(error) = self.session(&stop).await else { break };
            self.status.session_over(&error);
            if began.elapsed() > GOOD_SESSION {
                delays = back_off();
            }
            let delay = delays.next().unwrap_or(LONGEST_DELAY);
            tracing::warn!(
                retry_in_ms = delay.as_millis() as u64,
                "the relay's session is over: {}",
                with_causes(&error)
            );
            let _ = stop.run_until_cancelled(sleep(delay)).await;
        }
    }

    /// One connection to the broker, one turn at leading. Ends in order at `stop`.
    async fn session(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut publisher = match stop.run_until_cancelled(Publisher::connect(&self.broker)).await {
            None => return Ok(()),
            Some(publisher) => publisher?,
        };
        self.status.broker_is_up();
        let [one, other] = outbox::BY_PLACE;
        let mut lead = self.db.line("relay leader", [("idle_session_timeout", LEADER_IDLE_TIMEOUT), one, other]);
        let outcome = self.lead(&mut publisher, &mut lead, stop).await;
        self.bell.lead_here(false);
        self.status.leads(false);
        // In this order: whoever leads next must find the rows of what we published settled.
        lead.hang_up().await;
        publisher.close().await;
        outcome
    }

    async fn lead(
        &mut self,
        publisher: &mut Publisher,
        lead: &mut Line,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        if !wait_for_lead(publisher, lead, &self.status, stop).await? {
            return Ok(());
        }
        tracing::info!("this relay leads");
        self.bell.lead_here(true);
        self.status.leads(true);
        let floor = lead.run_in_session(async |connection| outbox::last_id(connection).await).await?;
        let drain = Drain {
            publisher,
            lead,
            sweep: Errand::new(self.db.line("relay sweep", outbox::BY_PLACE)),
            bell: &self.bell,
            status: &self.status,
            unsettled: &mut self.unsettled,
            settler: Settler::new(self.db.line("relay settler", outbox::BY_PLACE)),
            cursor: Cursor::new(floor, Instant::now()),
            ledger: Ledger::new(),
        };
        drain.run(stop).await
    }
}

/// Waits until no other relay leads. False when `stop` came first.
async fn wait_for_lead(
    publisher: &mut Publisher,
    lead: &mut Line,
    status: &Status,
    stop: &CancellationToken,
) -> anyhow::Result<bool> {
    loop {
        let leads: bool = lead
            .run(async |connection| sqlx::query_scalar(TRY_LEAD).bind(LEAD).fetch_one(connection).await)
            .await
            .context("the lead cannot be asked for")?;
        if leads {
            return Ok(true);
        }
        status.stands_by();
        anyhow::ensure!(publisher.is_connected(), "the connection to the broker is lost");
        if stop.run_until_cancelled(sleep(STAND_BY)).await.is_none() {
            return Ok(false);
        }
    }
}
