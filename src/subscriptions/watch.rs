//! Watch: looks at every subscription's queue, again and again.
//!
//! Promise: what is registered comes to be declared, a queue that vanished is declared again and said to have been lost, and
//! nothing is deleted that its owner did not ask to expire, was not told of before, or that has a consumer.
//! Not here, on purpose: the API's answers. A broker that is away stops the watch's looks and nothing else.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Error, Status, Waiting,
    desk::{Desk, Look},
    model::Registered,
    registrar::Registrar,
    store,
};
use crate::{
    db::{Db, Line, Trouble},
    lead::TRY_LEAD,
    telemetry::{rfc3339, with_causes},
};

/// Key of the advisory lock that the leading watch of a database holds: "watching" in ASCII.
const LEAD: i64 = 0x77_61_74_63_68_69_6e_67;
/// Between two tries of a watch that stands by.
const STAND_BY: Duration = Duration::from_secs(1);
/// Before a session begins in place of one that failed.
const RECOVERY: Duration = Duration::from_secs(3);
/// A leader that says nothing for this long is frozen, or cut off.
const LEADER_IDLE_TIMEOUT: &str = "2min";
/// After so many looks everything is declared anew: a binding that somebody removed is not seen by looking, and the queues of what is
/// to be tried again are not looked at before.
const DECLARE_ALL_EVERY: u32 = 6;

/// Everything a watch needs; [`Watch::run`] is its life.
pub struct Watch {
    db: Db,
    registrar: Registrar,
    status: Status,
    idle_after: Duration,
    check_every: Duration,
    memory: Memory,
}

/// What this watch remembers from look to look; another leader begins without.
#[derive(Default)]
struct Memory {
    looks: HashMap<SubscriptionName, Look>,
    /// Told to be idle already.
    idle: HashSet<SubscriptionName>,
    /// Could not be declared at the last look, and told so already.
    refused: HashSet<SubscriptionName>,
    /// Told already that they have expired and cannot be deleted.
    kept: HashSet<SubscriptionName>,
    broker_is_away: bool,
    count: u32,
}

impl Watch {
    pub fn new(db: Db, desk: Desk, status: Status, idle_after: Duration, check_every: Duration) -> Self {
        let registrar = Registrar::new(db.clone(), desk);
        Self { db, registrar, status, idle_after, check_every, memory: Memory::default() }
    }

    /// Watches until `stop`, whatever happens to broker and database meanwhile.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let settings = [("idle_session_timeout", LEADER_IDLE_TIMEOUT), ("lock_timeout", "4s")];
            let mut line = self.db.line("subscriptions watch", settings);
            if let Err(trouble) = self.session(&mut line, &stop).await {
                tracing::warn!("the watch over the subscriptions begins anew: {}", with_hint(&trouble));
            }
            line.hang_up().await;
            self.status.hide();
            self.memory = Memory::default();
            let _ = stop.run_until_cancelled(sleep(RECOVERY)).await;
        }
        self.registrar.desk().close().await;
    }

    /// One turn at leading.
    async fn session(&mut self, line: &mut Line, stop: &CancellationToken) -> Result<(), Trouble> {
        if !wait_for_lead(line, stop).await? {
            return Ok(());
        }
        tracing::debug!("this watch leads");
        let mut pace = interval(self.check_every);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(pace.tick()).await.is_some() {
            match stop.run_until_cancelled(self.look(line)).await {
                None => break,
                Some(outcome) => self.took(outcome)?,
            }
        }
        Ok(())
    }

    /// A database in trouble ends the session; a broker in trouble is told once, and waited for.
    fn took(&mut self, outcome: Result<(), Error>) -> Result<(), Trouble> {
        match outcome {
            Ok(()) => {
                if std::mem::take(&mut self.memory.broker_is_away) {
                    tracing::info!("the subscriptions are watched again");
                }
            }
            Err(Error::Database(trouble)) => return Err(trouble),
            Err(error) => {
                self.status.hide();
                if !std::mem::replace(&mut self.memory.broker_is_away, true) {
                    let error = anyhow::Error::from(error);
                    tracing::warn!("the subscriptions are not watched for now: {}", with_causes(&error));
                }
            }
        }
        Ok(())
    }

    /// The step: one look at everything, and what follows from it.
    async fn look(&mut self, line: &mut Line) -> Result<(), Error> {
        let before = line.run_in_session(async |db| store::find(db, None).await).await?;
        let began_at = before.first().map(|row| row.as_of);
        let names: Vec<&SubscriptionName> = before.iter().map(Registered::name).collect();
        let looks = self.registrar.desk().look_at_all(&names).await?;
        let mut rows: Vec<(Registered, Option<Look>)> = before.into_iter().zip(looks).collect();
        self.observe(line, &mut rows).await?;
        self.declare(line, &mut rows).await?;
        self.tell_idle(&rows);
        self.expire(line, &rows).await?;
        self.status.show(&rows, &self.memory.refused, self.idle_after);
        if let Some(began_at) = began_at {
            self.note_sight(line, &rows, began_at).await?;
        }
        self.memory.looks = rows.into_iter().filter_map(|(row, look)| Some((row.name().clone(), look?))).collect();
        Ok(())
    }

    /// Keeps what is different from what is known.
    async fn observe(&self, line: &mut Line, rows: &mut [(Registered, Option<Look>)]) -> Result<(), Error> {
        let mut changed = vec![];
        for (row, look) in rows {
            let seen = row.seen;
            if let Some(look) = look {
                let moved = self.memory.looks.get(row.name()).is_some_and(|last| last != look);
                row.saw(*look, moved);
            }
            row.warn_of_expiry();
            if row.seen != seen {
                tell_expiry(row, seen.expiry_warned_at);
                changed.push(row.clone());
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        Ok(line.run_in_session(async |db| store::observe(db, &changed).await).await?)
    }

    /// Has the broker have what is registered.
    async fn declare(&mut self, line: &mut Line, rows: &mut [(Registered, Option<Look>)]) -> Result<(), Error> {
        let all = self.memory.count.is_multiple_of(DECLARE_ALL_EVERY);
        self.memory.count = self.memory.count.wrapping_add(1);
        self.memory.refused.retain(|name| rows.iter().any(|(row, _)| row.name() == name));
        for (row, look) in rows {
            let is_whole = look.is_some_and(|look| look.work.is_some() && look.dead.is_some());
            // One that was refused may be declared by half.
            if all || !is_whole || !row.is_declared() || self.memory.refused.contains(row.name()) {
                self.declare_one(line, row).await?;
            }
        }
        Ok(())
    }

    /// One that cannot be declared does not keep the others from it.
    async fn declare_one(&mut self, line: &mut Line, row: &mut Registered) -> Result<(), Error> {
        let name = row.name().clone();
        let was_declared = row.is_declared();
        match self.registrar.declare_again(line, &name).await {
            Ok(Some(now)) => {
                *row = now;
                self.memory.refused.remove(&name);
                if !was_declared {
                    tracing::info!(subscription = %name, "declared");
                }
                Ok(())
            }
            // Not registered any more, or being changed by somebody who will declare it.
            Ok(None) | Err(Error::Busy) => Ok(()),
            Err(error) if is_of_one(&error) => {
                if self.memory.refused.insert(name.clone()) {
                    tracing::warn!(subscription = %name, "cannot be declared: {}", why(error));
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Notes which queues this look has seen: what is told to one from then on is to be told anew, if it is found gone later. Where all
    /// were seen, that is one row.
    async fn note_sight(
        &self,
        line: &mut Line,
        rows: &[(Registered, Option<Look>)],
        began_at: OffsetDateTime,
    ) -> Result<(), Error> {
        let (seen, unseen): (Vec<_>, Vec<_>) = rows.iter().partition(|(row, look)| self.has_seen(row, *look));
        let noted = if unseen.iter().all(|(row, _)| row.declared_revision == 0) {
            line.run_in_session(async |db| store::looked(db, began_at).await).await
        } else {
            let names: Vec<&SubscriptionName> = seen.iter().map(|(row, _)| row.name()).collect();
            line.run_in_session(async |db| store::saw(db, &names, began_at).await).await
        };
        Ok(noted?)
    }

    /// Not so where the broker does not say, nor while a loss may be there that could not be noted.
    fn has_seen(&self, row: &Registered, look: Option<Look>) -> bool {
        look.is_some_and(|look| look.work.is_some()) && !self.memory.refused.contains(row.name())
    }

    fn tell_idle(&mut self, rows: &[(Registered, Option<Look>)]) {
        self.memory.idle.retain(|name| rows.iter().any(|(row, _)| row.name() == name));
        for (row, _) in rows {
            if !row.is_idle(self.idle_after) {
                self.memory.idle.remove(row.name());
            } else if self.memory.idle.insert(row.name().clone()) {
                let since = row.seen.unattended_since.map(rfc3339);
                tracing::warn!(subscription = %row.name(), owner = row.registration.owner, since, "idle: nobody listens");
            }
        }
    }

    async fn expire(&mut self, line: &mut Line, rows: &[(Registered, Option<Look>)]) -> Result<(), Error> {
        let is_expired = |row: &&Registered| row.expires_at().is_some_and(|at| at <= row.as_of);
        let expired: Vec<&Registered> = rows.iter().map(|(row, _)| row).filter(is_expired).collect();
        self.memory.kept.retain(|name| expired.iter().any(|row| row.name() == name));
        for row in expired {
            self.expire_one(line, row).await?;
        }
        Ok(())
    }

    /// One that cannot be deleted does not keep the others from it.
    async fn expire_one(&mut self, line: &mut Line, row: &Registered) -> Result<(), Error> {
        let name = row.name();
        match self.registrar.expire(line, name).await {
            Ok(deleted) => {
                deleted.iter().for_each(|lost| tell_expired(row, lost));
                Ok(())
            }
            Err(Error::Busy) => Ok(()),
            Err(error) if is_of_one(&error) => {
                if self.memory.kept.insert(name.clone()) {
                    tracing::warn!(subscription = %name, "has expired and cannot be deleted: {}", why(error));
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Classes of refusals that are not about the one subscription: what was prepared is out of date (0A), or the database is read-only (25),
/// has no room (53), is stopped or too slow (57), or is broken (58).
const OF_ALL: [&str; 5] = ["0A", "25", "53", "57", "58"];

/// Whether others may fare better, or at least be looked at: a right that is missing is soon refused to each.
fn is_of_one(error: &Error) -> bool {
    match error {
        Error::Undeclared(trouble) | Error::Broker(trouble) => !trouble.is_away(),
        Error::Database(Trouble::Refused { code, .. }) => !OF_ALL.iter().any(|class| code.starts_with(class)),
        _ => false,
    }
}

fn why(error: Error) -> String {
    match error {
        Error::Undeclared(trouble) | Error::Broker(trouble) => with_causes(&trouble.into()),
        Error::Database(trouble) => with_hint(&trouble),
        other => with_causes(&other.into()),
    }
}

fn with_hint(trouble: &Trouble) -> String {
    let hint = trouble.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    format!("{}{hint}", trouble.report())
}

fn tell_expired(row: &Registered, lost: &Waiting) {
    tracing::warn!(
        subscription = %row.name(),
        owner = row.registration.owner,
        ready = lost.ready,
        retrying = lost.retrying,
        dead_letters = lost.dead_letters,
        "expired: deleted, as nobody listened and its owner asked for it"
    );
}

fn tell_expiry(row: &Registered, told_before: Option<OffsetDateTime>) {
    let owner = &row.registration.owner;
    match (told_before, row.expires_at()) {
        (None, Some(at)) => tracing::warn!(
            subscription = %row.name(), owner, expires_at = rfc3339(at),
            "expiring: nobody listens, and its owner asked to have it deleted then"
        ),
        (Some(_), None) => tracing::info!(subscription = %row.name(), owner, "no longer expiring: a consumer is there"),
        _ => {}
    }
}

/// Waits until no other watch leads. False when `stop` came first.
async fn wait_for_lead(line: &mut Line, stop: &CancellationToken) -> Result<bool, Trouble> {
    loop {
        let leads: bool = line.run(async |db| sqlx::query_scalar(TRY_LEAD).bind(LEAD).fetch_one(db).await).await?;
        if leads {
            return Ok(true);
        }
        if stop.run_until_cancelled(sleep(STAND_BY)).await.is_none() {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_to_all_ends_the_look() {
        let is_of_one =
            |code: &str| is_of_one(&Error::Database(Trouble::Refused { code: code.to_owned(), constraint: None }));
        // A missing right, a check, something that is there once, two who wait for each other, a trigger.
        assert!(["42501", "23514", "23505", "40P01", "P0001"].into_iter().all(is_of_one));
        // A plan of before a migration, read-only, no room, too slow, a broken file.
        assert!(!["0A000", "25006", "53100", "57014", "58030"].into_iter().any(is_of_one));
        for lost in [Trouble::Broken(anyhow::anyhow!("silence")), Trouble::Unreachable(anyhow::anyhow!("nobody"))] {
            assert!(!super::is_of_one(&Error::Database(lost)));
        }
    }
}
