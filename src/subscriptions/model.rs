//! What the registry knows of a subscription, and what follows from it. No I/O.

use std::time::Duration;

use serde::Serialize;
use tidings_sdk::subscription::{Subscription, SubscriptionName};
use time::OffsetDateTime;

use super::desk::Look;

/// A busy queue is written down as such once in this time, not at every look.
const ACTIVITY_GRAIN: Duration = Duration::from_secs(60);
/// An expiry is told at least this long before it happens, or half the time to it when that is shorter.
const LONGEST_NOTICE: Duration = Duration::from_secs(24 * 60 * 60);

/// What an owner registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    pub subscription: Subscription,
    /// The team that may change it.
    pub owner: String,
    pub purpose: String,
    /// Without a consumer for so long it is deleted; `None`: never.
    pub expires_after: Option<Duration>,
    /// The client that stands for it. `None` in what was asked for: whoever did before.
    pub client: Option<String>,
}

/// A subscription as the registry has it.
#[derive(Debug, Clone)]
pub struct Registered {
    pub registration: Registration,
    pub revision: i64,
    /// The revision that the broker is known to have; 0 while it never had any.
    pub declared_revision: i64,
    /// What may still be bound at the broker: what is registered, and what was.
    pub bound: Subscription,
    /// Whether the broker is known to have the exchange that chooses by field: `bound` names fields before they are declared.
    pub has_fields_exchange: bool,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
    pub seen: Seen,
    /// Dead letters that were collected; at most 100,000 are counted.
    pub dead_letters: u32,
    /// The database's clock when this was read.
    pub as_of: OffsetDateTime,
}

/// What the watch has seen of a subscription's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// `None` while a consumer is there.
    pub unattended_since: Option<OffsetDateTime>,
    pub consumer_seen_at: Option<OffsetDateTime>,
    /// `None` when the queue was empty at the last look.
    pub waiting_since: Option<OffsetDateTime>,
    pub last_activity_at: Option<OffsetDateTime>,
    pub lost_at: Option<OffsetDateTime>,
    pub missing_since: Option<OffsetDateTime>,
    pub recovered_at: Option<OffsetDateTime>,
    pub expiry_warned_at: Option<OffsetDateTime>,
}

/// How a subscription is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A consumer is there, or was there not long ago.
    Active,
    /// No consumer for a long time.
    Idle,
    /// No consumer for so long that it will be deleted at `expires_at`, as its owner asked.
    Expiring,
    /// The broker does not have it yet: news is missed until it has.
    Undeclared,
    /// Its queue, or one in which what failed waited, was gone and was declared again: news since `missing_since` may be missing.
    QueueLost,
}

impl Registered {
    pub fn name(&self) -> &SubscriptionName {
        &self.registration.subscription.name
    }

    /// Whether the broker has it as it is registered.
    pub fn is_declared(&self) -> bool {
        self.declared_revision == self.revision
    }

    pub fn state(&self, idle_after: Duration) -> State {
        if !self.is_declared() {
            State::Undeclared
        } else if self.is_lost() {
            State::QueueLost
        } else if self.expires_at().is_some() {
            State::Expiring
        } else if self.is_idle(idle_after) {
            State::Idle
        } else {
            State::Active
        }
    }

    /// Whether news was lost and has not been made good.
    pub fn is_lost(&self) -> bool {
        self.seen.lost_at.is_some_and(|lost| self.seen.recovered_at.is_none_or(|recovered| recovered < lost))
    }

    /// Whether nobody has listened for `idle_after`.
    pub fn is_idle(&self, idle_after: Duration) -> bool {
        self.seen.unattended_since.is_some_and(|since| self.as_of >= since + idle_after)
    }

    /// Takes in a look at its queue; `moved` when it differs from the look before.
    pub fn saw(&mut self, look: Look, moved: bool) {
        let Some(depth) = look.work else { return };
        let (now, seen) = (self.as_of, &mut self.seen);
        match (depth.consumers > 0, seen.unattended_since) {
            (true, Some(_)) => (seen.unattended_since, seen.consumer_seen_at) = (None, Some(now)),
            (false, None) => (seen.unattended_since, seen.consumer_seen_at) = (Some(now), Some(now)),
            _ => {}
        }
        seen.waiting_since = (depth.ready > 0).then(|| seen.waiting_since.unwrap_or(now));
        if moved && seen.last_activity_at.is_none_or(|last| now - last >= ACTIVITY_GRAIN) {
            seen.last_activity_at = Some(now);
        }
    }

    /// Notes that its coming expiry is told now, if it is time, or that a consumer has called it off.
    pub fn warn_of_expiry(&mut self) {
        let warns_at = self.warns_of_expiry_at();
        if warns_at.is_none() {
            self.seen.expiry_warned_at = None;
        } else if self.seen.expiry_warned_at.is_none() && warns_at.is_some_and(|at| at <= self.as_of) {
            self.seen.expiry_warned_at = Some(self.as_of);
        }
    }

    /// When its owner is to be told that it will be deleted, if nobody listens until then.
    pub fn warns_of_expiry_at(&self) -> Option<OffsetDateTime> {
        let expires_after = self.registration.expires_after?;
        Some(self.seen.unattended_since? + expires_after - notice(expires_after))
    }

    /// When it will be deleted; only once that was told.
    pub fn expires_at(&self) -> Option<OffsetDateTime> {
        let (expires_after, warned_at) = (self.registration.expires_after?, self.seen.expiry_warned_at?);
        Some((self.seen.unattended_since? + expires_after).max(warned_at + notice(expires_after)))
    }
}

/// Between the first warning and the deletion.
fn notice(expires_after: Duration) -> Duration {
    LONGEST_NOTICE.min(expires_after / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const START: OffsetDateTime = datetime!(2026-01-01 00:00 UTC);

    fn unattended(expires_after: Option<Duration>) -> Registered {
        let registration = Registration {
            subscription: Subscription::new("orders".parse().unwrap()),
            owner: "team-orders".to_owned(),
            purpose: "cancels orders".to_owned(),
            expires_after,
            client: None,
        };
        let seen = Seen {
            unattended_since: Some(START),
            consumer_seen_at: None,
            waiting_since: None,
            last_activity_at: None,
            lost_at: None,
            missing_since: None,
            recovered_at: None,
            expiry_warned_at: None,
        };
        let bound = registration.subscription.clone();
        Registered {
            registration,
            revision: 2,
            declared_revision: 2,
            bound,
            has_fields_exchange: false,
            created_at: START,
            updated_at: START,
            seen,
            dead_letters: 0,
            as_of: START,
        }
    }

    #[test]
    fn it_is_idle_after_its_time_and_not_while_somebody_listens() {
        let mut orders = unattended(None);
        orders.as_of = START + 7 * DAY - Duration::from_secs(1);
        assert_eq!(orders.state(7 * DAY), State::Active);
        orders.as_of = START + 7 * DAY;
        assert_eq!(orders.state(7 * DAY), State::Idle);
        orders.seen.unattended_since = None;
        assert_eq!(orders.state(7 * DAY), State::Active);
    }

    #[test]
    fn it_never_expires_untold_nor_sooner_than_a_day_after_it_was_told() {
        let mut orders = unattended(Some(30 * DAY));
        assert_eq!(orders.warns_of_expiry_at(), Some(START + 29 * DAY));
        orders.as_of = START + 300 * DAY;
        assert_eq!(orders.expires_at(), None);
        orders.seen.expiry_warned_at = Some(START + 29 * DAY);
        assert_eq!(orders.expires_at(), Some(START + 30 * DAY));
        orders.seen.expiry_warned_at = Some(START + 300 * DAY);
        assert_eq!((orders.expires_at(), orders.state(DAY)), (Some(START + 301 * DAY), State::Expiring));
        orders.seen.unattended_since = None;
        assert_eq!((orders.warns_of_expiry_at(), orders.expires_at()), (None, None));
        assert_eq!(unattended(None).warns_of_expiry_at(), None, "nobody asked for it");
    }

    #[test]
    fn a_short_expiry_is_told_half_way() {
        let orders = unattended(Some(Duration::from_secs(60)));
        assert_eq!(orders.warns_of_expiry_at(), Some(START + Duration::from_secs(30)));
    }

    #[test]
    fn what_was_lost_is_told_until_it_was_made_good() {
        let mut orders = unattended(None);
        orders.seen.lost_at = Some(START + DAY);
        assert_eq!(orders.state(7 * DAY), State::QueueLost);
        orders.seen.recovered_at = Some(START + 2 * DAY);
        assert_eq!(orders.state(7 * DAY), State::Active);
        orders.seen.lost_at = Some(START + 3 * DAY);
        assert_eq!(orders.state(7 * DAY), State::QueueLost);
        orders.revision = 3;
        assert_eq!(orders.state(7 * DAY), State::Undeclared);
    }
}
