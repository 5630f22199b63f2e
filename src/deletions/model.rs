//! What is known of a deletion and of those who have to confirm it. No I/O.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

/// A deletion, and who confirmed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    pub user_id: Uuid,
    /// The version that the deletion made.
    pub version: i64,
    pub deleted_at: OffsetDateTime,
    /// In order of their names.
    pub confirmations: Vec<Confirmation>,
}

/// How a subscription stands to a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation {
    pub subscription: String,
    pub state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Confirmed {
        at: OffsetDateTime,
        how: How,
    },
    /// There is still time.
    Pending,
    Overdue,
}

/// How a deletion was confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// The subscription was seen fetching the user, and was answered that he is gone.
    Fetched,
    /// It said that it is done.
    Receipt,
}

impl How {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fetched => "fetched",
            Self::Receipt => "receipt",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Fetched, Self::Receipt].into_iter().find(|how| how.as_str() == name)
    }
}

impl State {
    /// Of one who owes a confirmation and has not given it.
    pub fn owed(deleted_at: OffsetDateTime, deadline: Duration, now: OffsetDateTime) -> Self {
        if deleted_at + deadline <= now { Self::Overdue } else { Self::Pending }
    }
}

/// A deletion that some have not confirmed in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overdue {
    pub user_id: Uuid,
    pub version: i64,
    pub deleted_at: OffsetDateTime,
    /// Who is late.
    pub subscriptions: Vec<String>,
}

/// A place in the order of deletions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub deleted_at: OffsetDateTime,
    pub user_id: Uuid,
}

impl Place {
    pub const START: Self = Self { deleted_at: OffsetDateTime::UNIX_EPOCH, user_id: Uuid::nil() };
}

/// How far behind a subscription is.
#[derive(Debug, Clone, PartialEq)]
pub struct Lateness {
    pub subscription: String,
    /// Deletions that it should have confirmed, counted up to a limit.
    pub overdue: i64,
    /// Since the oldest of them; 0 when there is none.
    pub oldest_seconds: f64,
}

/// What became of a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// It is kept.
    Kept,
    /// Nobody ever had this id.
    UnknownUser,
    /// The user is at this version, and lives.
    Living(i64),
    /// Nobody registered a subscription of this name.
    UnknownSubscription,
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn it_is_overdue_from_the_deadline_on() {
        let (deleted_at, hour) = (datetime!(2026-01-01 00:00 UTC), Duration::from_secs(3_600));
        assert_eq!(State::owed(deleted_at, hour, datetime!(2026-01-01 00:59:59 UTC)), State::Pending);
        assert_eq!(State::owed(deleted_at, hour, datetime!(2026-01-01 01:00 UTC)), State::Overdue);
    }
}
