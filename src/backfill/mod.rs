//! Backfill: tells one subscription of users it has not heard of, as if each of them had just changed.
//!
//! Promise: every user that was asked for is told at least once, to that queue alone, whatever is killed meanwhile; and news is never
//! behind more than `max_waiting` of these messages, nor behind an outbox that lags.
//! Not here, on purpose: the owner's exchange, where others would hear; a profile, which consumers fetch; changing a user.

pub mod command;
mod http;
mod model;
mod run;
mod runner;
mod store;

pub use http::{Start, routes};
pub use model::{Backfill, DEFAULT_MAX_WAITING, DEFAULT_RATE, MAX_USER_IDS, Plan, RATES, State, WaitingFor, Whom};
pub use runner::Runner;
pub use store::{BEGIN_ANEW, FIND, FINISH, KNOWN, MOVE_ON, RUNNING, START, THESE, TURN, WAIT, WALK};

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;

use crate::db::{self, Trouble};

/// The verbs of backfills. Cheap to clone. They write what is wanted; the [`Runner`] of some instance does it.
#[derive(Clone)]
pub struct Backfills {
    queries: PgPool,
}

/// What to do with a backfill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Pause,
    /// With this rate from now on, or as before. Also for one that runs.
    Resume(Option<i32>),
    Cancel,
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nobody registered a subscription of this name")]
    NoSubscription,
    #[error("this subscription was never backfilled")]
    NoBackfill,
    #[error("a backfill of this subscription is under way; cancel it first, or wait for its end")]
    Running,
    #[error("the backfill is over")]
    Over,
    #[error("the query failed")]
    Query(#[from] Trouble),
}

/// Changes are dated by the beginning of their transaction, and what a consumer had not acknowledged was told before it was lost: with
/// the SDK's retries up to 671 s before, and its handler takes time too.
const MARGIN: Duration = Duration::from_secs(900);

/// Starts telling a subscription anew what it has lost. What another backfill told it may be lost too: one that is under way, be it
/// paused, or was done not long before, begins anew in a form that covers both.
///
/// # Errors
/// When the database refuses.
pub async fn make_good(
    db: &mut PgConnection,
    name: &SubscriptionName,
    missing_since: OffsetDateTime,
) -> sqlx::Result<()> {
    let since = missing_since - MARGIN;
    let users = Whom::ChangedSince(since);
    let plan = Plan { users, rate_per_s: DEFAULT_RATE, max_waiting: DEFAULT_MAX_WAITING };
    // Neither only when somebody started another in between.
    while !store::begin_anew(db, name, since).await? && !store::start(&mut *db, name, &plan).await? {}
    Ok(())
}

impl Backfills {
    pub fn new(queries: PgPool) -> Self {
        Self { queries }
    }

    /// Starts one, unless one is under way.
    pub async fn start(&self, name: &SubscriptionName, plan: &Plan) -> Result<Backfill, Error> {
        self.must_know(name).await?;
        let mut plan = plan.clone();
        if let Whom::These(ids) = &mut plan.users {
            // The walk goes in this order, and meets each once.
            ids.sort_unstable();
            ids.dedup();
        }
        let (queries, of) = (self.queries.clone(), name.clone());
        if !db::ask(async move { store::start(&queries, &of, &plan).await }).await? {
            return Err(Error::Running);
        }
        self.get(name).await
    }

    /// The one under way, or the last one.
    pub async fn get(&self, name: &SubscriptionName) -> Result<Backfill, Error> {
        let (queries, of) = (self.queries.clone(), name.clone());
        if let Some(found) = db::ask(async move { store::find(&queries, &of).await }).await? {
            return Ok(found);
        }
        self.must_know(name).await?;
        Err(Error::NoBackfill)
    }

    /// Pauses, resumes or cancels. What is so already stays so.
    pub async fn act(&self, name: &SubscriptionName, action: Action) -> Result<Backfill, Error> {
        let (from, to, rate): (&[&str], _, _) = match action {
            Action::Pause => (&["running", "paused"], "paused", None),
            Action::Resume(rate) => (&["running", "paused"], "running", rate),
            Action::Cancel => (&["running", "paused", "cancelled"], "cancelled", None),
        };
        let (queries, of) = (self.queries.clone(), name.clone());
        let turned = db::ask(async move { store::turn(&queries, &of, from, to, rate).await }).await?;
        let now = self.get(name).await?;
        if turned { Ok(now) } else { Err(Error::Over) }
    }

    async fn must_know(&self, name: &SubscriptionName) -> Result<(), Error> {
        let (queries, of) = (self.queries.clone(), name.clone());
        let known = db::ask(async move { store::is_known(&queries, &of).await }).await?;
        if known { Ok(()) } else { Err(Error::NoSubscription) }
    }
}
