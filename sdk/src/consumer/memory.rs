//! Memory: which version of whom was handled last, and what could not be. Pure.
//!
//! Promise: a notice is called old only when the state that it tells of, or a later one, was handled; what failed is told again together
//! with the next notice of that user, which would make it old.
//! Not here, on purpose: anything that outlives the process. A handler must not mind seeing a notice again.

use std::collections::{HashMap, VecDeque};

use uuid::Uuid;

use crate::envelope::{Event, Notice};

pub(super) struct Memory {
    capacity: usize,
    handled: HashMap<Uuid, Handled>,
    /// In order of arrival, for making room.
    arrivals: VecDeque<Uuid>,
}

#[derive(Debug, Default)]
struct Handled {
    version: i64,
    /// A state that was fetched may be of a deletion that no handler has heard of yet.
    deletion: bool,
    /// What the last attempt was about, if it failed.
    owed: Option<Event>,
}

impl Memory {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, handled: HashMap::new(), arrivals: VecDeque::new() }
    }

    pub(super) fn is_old(&self, notice: &Notice) -> bool {
        let Some(handled) = self.handled.get(&notice.user_id) else { return false };
        match notice.event {
            Event::Deleted => handled.deletion,
            Event::Created | Event::Updated { .. } => handled.deletion || notice.version <= handled.version,
        }
    }

    /// Notes that `version` of a user was handled. What was handled last is how it is, even if it is older or living again: only a backfill
    /// comes to that, and a restore may have set the owner back.
    pub(super) fn note(&mut self, user: Uuid, version: i64, event: &Event) {
        *self.entry(user) = Handled { version, deletion: *event == Event::Deleted, owed: None };
    }

    /// Notes that an attempt failed. A newer notice may be handled before it is tried again, and then makes it old.
    pub(super) fn owe(&mut self, user: Uuid, event: Event) {
        self.entry(user).owed = Some(event);
    }

    pub(super) fn owed(&self, user: Uuid) -> Option<Event> {
        self.handled.get(&user)?.owed.clone()
    }

    fn entry(&mut self, user: Uuid) -> &mut Handled {
        if !self.handled.contains_key(&user) {
            self.arrivals.push_back(user);
            if self.arrivals.len() > self.capacity
                && let Some(oldest) = self.arrivals.pop_front()
            {
                self.handled.remove(&oldest);
            }
        }
        self.handled.entry(user).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::OffsetDateTime;

    fn notice(user: u128, version: i64, event: Event) -> Notice {
        let (message_id, user_id) = (Uuid::from_u128(9), Uuid::from_u128(user));
        Notice { message_id, user_id, version, event, occurred_at: OffsetDateTime::UNIX_EPOCH, traceparent: None }
    }

    fn updated() -> Event {
        Event::Updated { changed_fields: vec![] }
    }

    #[test]
    fn a_deletion_is_old_only_when_a_deletion_was_handled() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, 7, &updated());
        assert!(memory.is_old(&notice(1, 7, updated())) && memory.is_old(&notice(1, 1, Event::Created)));
        assert!(!memory.is_old(&notice(1, 8, updated())));
        // The state of version 7 that was fetched may have been the tombstone.
        assert!(!memory.is_old(&notice(1, 7, Event::Deleted)));
        memory.note(ana, 7, &Event::Deleted);
        assert!(memory.is_old(&notice(1, 7, Event::Deleted)) && memory.is_old(&notice(1, 8, updated())));
    }

    #[test]
    fn what_was_handled_last_is_how_it_is() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, 7, &Event::Deleted);
        memory.note(ana, 3, &Event::Created);
        assert!(memory.is_old(&notice(1, 3, updated())));
        assert!(!memory.is_old(&notice(1, 4, updated())) && !memory.is_old(&notice(1, 7, Event::Deleted)));
    }

    #[test]
    fn what_failed_is_owed_until_something_succeeds() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.owe(ana, Event::Created);
        assert!(!memory.is_old(&notice(1, 1, Event::Created)));
        assert_eq!(memory.owed(ana), Some(Event::Created));
        memory.note(ana, 2, &Event::Created);
        assert!(memory.is_old(&notice(1, 1, Event::Created)));
        assert_eq!(memory.owed(ana), None);
    }

    #[test]
    fn whom_it_forgot_is_handled_again() {
        let mut memory = Memory::new(2);
        for user in 1..=3 {
            memory.note(Uuid::from_u128(user), 1, &updated());
        }
        assert!(!memory.is_old(&notice(1, 1, updated())) && memory.is_old(&notice(3, 1, updated())));
        assert_eq!((memory.handled.len(), memory.arrivals.len()), (2, 2));
    }
}
