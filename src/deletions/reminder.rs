//! Reminder: writes down who has let the deadline pass.
//!
//! Promise: a deletion that somebody has not confirmed in time is listed and counted within seconds after its deadline, once, however
//! many deletions there are.
//! Not here, on purpose: telling a subscription again. Its operators have dead letters and backfills for that.

use std::time::Duration;

use anyhow::Context;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::store::{self, BY_INDEX};
use crate::{
    db::{Db, Line},
    lead::Duty,
};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Deletions in one statement, each times the subscriptions that are late with it.
const PAGE: i64 = 1_000;
/// What a deleted subscription owed, taken away in one statement.
const RELEASE: i64 = 5_000;

pub struct Reminder {
    db: Db,
    deadline: Duration,
}

impl Reminder {
    pub fn new(db: &Db, deadline: Duration) -> Self {
        Self { db: db.clone(), deadline }
    }

    /// The step: looks at all deletions whose deadline has passed since the last look, until `stop`.
    async fn look(&self, line: &mut Line, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut place = line.run(async |db| store::looked_at(db).await).await?;
        let mut late = 0;
        while !stop.is_cancelled() {
            let looked = line.run(async |db| store::late(db, place, self.deadline, PAGE).await).await?;
            let Some(looked) = looked else { break };
            (place, late) = (looked.last, late + looked.late);
            line.run(async |db| store::looked(db, place).await).await?;
            if looked.passed < PAGE {
                break;
            }
        }
        if late > 0 {
            tracing::warn!(late, "deletions were not confirmed in time; GET /v1/deletions?state=overdue says by whom");
        }
        line.run(async |db| store::release(db, RELEASE).await).await?;
        Ok(())
    }
}

impl Duty for Reminder {
    const NAME: &'static str = "deletions";
    /// "deletion" in ASCII.
    const KEY: i64 = 0x64_65_6c_65_74_69_6f_6e;

    async fn turn(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut line = self.db.line("deletions reminder", BY_INDEX);
        let mut pace = interval(LOOK_EVERY);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(pace.tick()).await.is_some() {
            self.look(&mut line, stop).await.context("it cannot be looked who is late")?;
        }
        line.hang_up().await;
        Ok(())
    }
}
