//! The facts about a backfill, free of any I/O: whom it tells what, how fast, and how far it is.

use std::time::{Duration, Instant};

use serde::Serialize;
use tidings_sdk::{
    envelope::{Event, Notice},
    subscription::Subscription,
};
use time::OffsetDateTime;
use uuid::Uuid;

pub const RATES: std::ops::RangeInclusive<i32> = 1..=50_000;
pub const DEFAULT_RATE: i32 = 1_000;
pub const DEFAULT_MAX_WAITING: i32 = 2_000;
pub const MAX_USER_IDS: usize = 10_000;

/// What to tell a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub users: Whom,
    pub rate_per_s: i32,
    pub max_waiting: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whom {
    All,
    These(Vec<Uuid>),
    ChangedSince(OffsetDateTime),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = BackfillState)]
pub enum State {
    Running,
    /// Running, and nothing can be sent just now: see `waiting_for`.
    Waiting,
    Paused,
    Done,
    Cancelled,
}

impl State {
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled)
    }
}

/// Why nothing is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitingFor {
    /// The queue holds `max_waiting` messages.
    Room,
    /// The queue is not at the broker.
    Queue,
    /// The broker cannot be reached, or holds us back.
    Broker,
    /// The outbox lags behind: news goes first.
    News,
    /// Others are under way.
    Turn,
}

impl WaitingFor {
    const ALL: [Self; 5] = [Self::Room, Self::Queue, Self::Broker, Self::News, Self::Turn];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Queue => "queue",
            Self::Broker => "broker",
            Self::News => "news",
            Self::Turn => "turn",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|why| why.as_str() == name)
    }
}

/// The backfill of a subscription, as it stands.
#[derive(Debug, Clone)]
pub struct Backfill {
    pub id: Uuid,
    pub state: State,
    pub waiting_for: Option<WaitingFor>,
    pub rate_per_s: i32,
    pub max_waiting: i32,
    pub changed_since: Option<OffsetDateTime>,
    pub sent: i64,
    pub skipped: i64,
    pub total: i64,
    pub total_is_estimate: bool,
    pub started_at: OffsetDateTime,
    pub finished_at: Option<OffsetDateTime>,
}

impl Backfill {
    /// Share of the users that were looked at, from 0 to 1.
    pub fn progress(&self) -> f64 {
        let looked_at = self.sent + self.skipped;
        match self.state {
            State::Done => 1.0,
            // Short of 1 as long as it is not done: a total may be estimated too low.
            _ => (looked_at as f64 / self.total.max(looked_at).max(1) as f64).min(0.999),
        }
    }

    /// Seconds until it is done, if everybody left is told and nothing holds it up.
    pub fn eta_s(&self) -> Option<i64> {
        let left = (self.total - self.sent - self.skipped).max(0);
        let rate_per_s = i64::from(self.rate_per_s.max(1));
        (!self.state.is_over()).then(|| (left + rate_per_s - 1) / rate_per_s)
    }
}

/// A user as the walk meets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub struct Passed {
    pub user_id: Uuid,
    pub version: i64,
    /// When that version was made.
    pub at: OffsetDateTime,
    pub is_deleted: bool,
}

/// What is told of a user: what would have told this subscription of the latest state. `None` when it does not want to know.
pub fn notice(
    backfill: Uuid,
    subscription: &Subscription,
    since: Option<OffsetDateTime>,
    user: &Passed,
) -> Option<Notice> {
    if since.is_some_and(|since| user.at < since) {
        return None;
    }
    let &Passed { user_id, version, at: occurred_at, is_deleted } = user;
    let event = if is_deleted { wanted(subscription, Event::Deleted)? } else { of_the_living(subscription)? };
    // The same on every resend, and another one in the next backfill: consumers drop duplicates by it.
    let message_id = Uuid::new_v5(&backfill, format!("{user_id}/{version}").as_bytes());
    Some(Notice { message_id, user_id, version, event, occurred_at, traceparent: None })
}

fn of_the_living(subscription: &Subscription) -> Option<Event> {
    let changed_fields = subscription.fields.iter().cloned().collect();
    wanted(subscription, Event::Created).or_else(|| wanted(subscription, Event::Updated { changed_fields }))
}

fn wanted(subscription: &Subscription, event: Event) -> Option<Event> {
    subscription.wants(&event).then_some(event)
}

/// Keeps to a rate: what was not sent for want of time is made up for, what was not sent for want of room is not.
#[derive(Debug)]
pub struct Pace {
    per_s: f64,
    /// All messages due up to here were sent.
    paid_until: Instant,
}

/// How much may be made up for at once.
const SLACK: Duration = Duration::from_millis(100);

impl Pace {
    pub fn new(per_s: i32, now: Instant) -> Self {
        Self { per_s: f64::from(per_s), paid_until: now }
    }

    pub fn set(&mut self, per_s: i32) {
        self.per_s = f64::from(per_s);
    }

    /// Messages due by now. The time of one message is always made up for, however slow the rate.
    pub fn due(&mut self, now: Instant) -> usize {
        let slack = SLACK.max(self.time_of(1));
        if now.saturating_duration_since(self.paid_until) > slack {
            self.paid_until = now.checked_sub(slack).unwrap_or(now);
        }
        // A hair more, so that the time of one message is one message in spite of rounding.
        (now.saturating_duration_since(self.paid_until).as_secs_f64() * self.per_s + 1e-6) as usize
    }

    pub fn pay(&mut self, messages: usize) {
        self.paid_until += self.time_of(messages);
    }

    /// Until this many are due.
    pub fn until(&self, messages: usize, now: Instant) -> Duration {
        (self.paid_until + self.time_of(messages)).saturating_duration_since(now)
    }

    fn time_of(&self, messages: usize) -> Duration {
        Duration::from_secs_f64(messages as f64 / self.per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscription(keys: &[&str], fields: &[&str]) -> Subscription {
        let mut subscription = Subscription::new("orders".parse().unwrap());
        subscription.keys = keys.iter().map(|key| key.parse().unwrap()).collect();
        subscription.fields = fields.iter().map(|field| field.parse().unwrap()).collect();
        subscription
    }

    fn user(is_deleted: bool) -> Passed {
        Passed { user_id: Uuid::from_u128(7), version: 3, at: OffsetDateTime::UNIX_EPOCH, is_deleted }
    }

    fn told(keys: &[&str], fields: &[&str], is_deleted: bool) -> Option<Event> {
        notice(Uuid::from_u128(1), &subscription(keys, fields), None, &user(is_deleted)).map(|notice| notice.event)
    }

    #[test]
    fn a_subscription_is_told_what_it_would_have_heard() {
        let city = vec!["city".parse().unwrap()];
        assert_eq!(told(&["#"], &["city"], false), Some(Event::Created));
        assert_eq!(told(&["profile.updated"], &[], false), Some(Event::Updated { changed_fields: vec![] }));
        assert_eq!(told(&["user.deleted"], &["city"], false), Some(Event::Updated { changed_fields: city }));
        assert_eq!(told(&["user.deleted"], &[], false), None);
        assert_eq!(told(&["user.*"], &[], true), Some(Event::Deleted));
        assert_eq!(told(&["user.created"], &["city"], true), None);
    }

    #[test]
    fn only_what_changed_since() {
        let since = |seconds| OffsetDateTime::from_unix_timestamp(seconds).ok();
        let told = |since| notice(Uuid::from_u128(1), &subscription(&["#"], &[]), since, &user(false)).is_some();
        assert!(told(since(-1)) && told(since(0)) && !told(since(1)));
    }

    #[test]
    fn a_resend_is_the_same_message_and_another_backfill_is_not() {
        let id = |backfill, version| {
            let user = Passed { version, ..user(false) };
            notice(Uuid::from_u128(backfill), &subscription(&["#"], &[]), None, &user).unwrap().message_id
        };
        assert_eq!(id(1, 3), id(1, 3));
        assert!(id(1, 3) != id(2, 3) && id(1, 3) != id(1, 4));
    }

    /// Looks every 7 ms for ten seconds; how many were sent.
    fn sent_at(per_s: i32) -> usize {
        let began = Instant::now();
        let mut pace = Pace::new(per_s, began);
        (0..=10_000).step_by(7).fold(0, |sent, ms| {
            let due = pace.due(began + Duration::from_millis(ms));
            pace.pay(due);
            sent + due
        })
    }

    #[test]
    fn a_rate_is_kept_without_drift() {
        for per_s in [1, 3, 1_000, 50_000] {
            let (sent, wanted) = (sent_at(per_s), 10 * per_s as usize);
            assert!(sent <= wanted && wanted - sent <= 1 + wanted / 500, "{sent} at {per_s}/s");
        }
    }

    #[test]
    fn a_wait_is_not_made_up_for() {
        let began = Instant::now();
        let mut pace = Pace::new(1_000, began);
        assert_eq!(pace.due(began + Duration::from_secs(3600)), 100);
        let mut slow = Pace::new(1, began);
        assert_eq!(slow.due(began + Duration::from_secs(3600)), 1);
    }

    #[test]
    fn an_end_is_foreseen() {
        let mut backfill = Backfill {
            id: Uuid::from_u128(1),
            state: State::Running,
            waiting_for: None,
            rate_per_s: 100,
            max_waiting: 1,
            changed_since: None,
            sent: 300,
            skipped: 200,
            total: 1_000,
            total_is_estimate: true,
            started_at: OffsetDateTime::UNIX_EPOCH,
            finished_at: None,
        };
        assert_eq!((backfill.progress(), backfill.eta_s()), (0.5, Some(5)));
        backfill.total = 400;
        assert_eq!((backfill.progress(), backfill.eta_s()), (0.999, Some(0)));
        backfill.state = State::Done;
        assert_eq!((backfill.progress(), backfill.eta_s()), (1.0, None));
    }
}
