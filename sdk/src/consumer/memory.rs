//! Memory: which version of whom was handled last, and what could not be. Pure.
//!
//! Promise: a notice is called old only when the state that it tells of, or a later one, was handled; what failed is told again together
//! with the next notice of that user, which makes it old if that is handled here. Another process that handled it knew nothing of the failure.
//! Not here, on purpose: anything that outlives the process. A handler must not mind seeing a notice again.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem,
};

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
    /// Messages that failed since the last success, and wait somewhere to be tried again.
    failed: HashSet<Uuid>,
    /// Messages that failed, and whose event a later call had with it that succeeded. Until they come back.
    made_good: HashSet<Uuid>,
}

impl Memory {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, handled: HashMap::new(), arrivals: VecDeque::new() }
    }

    /// Whether there is nothing more to be done for a notice. `has_failed`: it comes back from a failed attempt.
    pub(super) fn is_old(&self, notice: &Notice, has_failed: bool) -> bool {
        let Some(handled) = self.handled.get(&notice.user_id) else { return false };
        match notice.event {
            Event::Deleted => handled.deletion,
            Event::Created | Event::Updated { .. } => {
                let is_told = !has_failed || handled.made_good.contains(&notice.message_id);
                handled.deletion || notice.version <= handled.version && is_told
            }
        }
    }

    /// Notes that `version` of a user was handled, by a call for these messages and for what was owed. A further attempt for an older one
    /// changes nothing about what was handled since.
    pub(super) fn note(&mut self, user: Uuid, version: i64, event: &Event, messages: &[Uuid]) {
        let handled = self.entry(user);
        let mut made_good = mem::take(&mut handled.made_good);
        made_good.extend(handled.failed.drain());
        // They are done, and come back from nowhere.
        made_good.retain(|message| !messages.contains(message));
        let version = version.max(handled.version);
        *handled = Handled { version, deletion: *event == Event::Deleted, made_good, ..Handled::default() };
    }

    /// The same for a backfill: what it tells is how it is, even if it is older or living again. A restore may have set the owner back.
    pub(super) fn begin_anew(&mut self, user: Uuid, version: i64, event: &Event) {
        *self.entry(user) = Handled { version, deletion: *event == Event::Deleted, ..Handled::default() };
    }

    /// Notes that an attempt failed for these messages, each of which comes back or does not. A newer notice may be handled before they
    /// are tried again, and then makes them old.
    pub(super) fn owe(&mut self, user: Uuid, event: Event, messages: impl IntoIterator<Item = (Uuid, bool)>) {
        let handled = self.entry(user);
        handled.owed = Some(event);
        for (message, comes_back) in messages {
            if comes_back {
                handled.failed.insert(message);
            } else {
                handled.failed.remove(&message);
            }
        }
    }

    /// Forgets that an old message was to come back: it has.
    pub(super) fn is_back(&mut self, notice: &Notice) {
        if let Some(handled) = self.handled.get_mut(&notice.user_id) {
            handled.made_good.remove(&notice.message_id);
        }
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
        let (message_id, user_id) = (MESSAGE, Uuid::from_u128(user));
        Notice { message_id, user_id, version, event, occurred_at: OffsetDateTime::UNIX_EPOCH, traceparent: None }
    }

    fn updated() -> Event {
        Event::Updated { changed_fields: vec![] }
    }

    const MESSAGE: Uuid = Uuid::from_u128(9);

    #[test]
    fn a_deletion_is_old_only_when_a_deletion_was_handled() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, 7, &updated(), &[]);
        assert!(memory.is_old(&notice(1, 7, updated()), false) && memory.is_old(&notice(1, 1, Event::Created), false));
        assert!(!memory.is_old(&notice(1, 8, updated()), false));
        // The state of version 7 that was fetched may have been the tombstone.
        assert!(!memory.is_old(&notice(1, 7, Event::Deleted), false));
        memory.note(ana, 7, &Event::Deleted, &[]);
        for has_failed in [false, true] {
            assert!(memory.is_old(&notice(1, 7, Event::Deleted), has_failed));
            assert!(memory.is_old(&notice(1, 8, updated()), has_failed));
        }
    }

    #[test]
    fn what_a_backfill_told_is_how_it_is() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, 7, &Event::Deleted, &[]);
        memory.begin_anew(ana, 3, &Event::Created);
        assert!(memory.is_old(&notice(1, 3, updated()), false));
        assert!(
            !memory.is_old(&notice(1, 4, updated()), false) && !memory.is_old(&notice(1, 7, Event::Deleted), false)
        );
    }

    #[test]
    fn what_failed_is_owed_until_something_succeeds() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.owe(ana, Event::Created, [(MESSAGE, true)]);
        assert!(!memory.is_old(&notice(1, 1, Event::Created), true));
        assert_eq!(memory.owed(ana), Some(Event::Created));
        memory.note(ana, 2, &Event::Created, &[Uuid::from_u128(10)]);
        assert!(memory.is_old(&notice(1, 1, Event::Created), true));
        assert_eq!(memory.owed(ana), None);
        memory.is_back(&notice(1, 1, Event::Created));
        assert!(!memory.is_old(&notice(1, 1, Event::Created), true), "it is kept in mind no longer than needed");
    }

    /// A process that handled a later version knew nothing of the failure, nor does one that was started since.
    #[test]
    fn what_failed_elsewhere_is_not_made_old_by_what_was_handled_here() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, 2, &updated(), &[Uuid::from_u128(10)]);
        assert!(
            !memory.is_old(&notice(1, 1, Event::Created), true) && memory.is_old(&notice(1, 1, Event::Created), false)
        );
        memory.note(ana, 1, &Event::Created, &[MESSAGE]);
        assert!(memory.is_old(&notice(1, 2, updated()), false), "nor does it make old news new");
    }

    #[test]
    fn whom_it_forgot_is_handled_again() {
        let mut memory = Memory::new(2);
        for user in 1..=3 {
            memory.note(Uuid::from_u128(user), 1, &updated(), &[]);
        }
        assert!(!memory.is_old(&notice(1, 1, updated()), false) && memory.is_old(&notice(3, 1, updated()), false));
        assert_eq!((memory.handled.len(), memory.arrivals.len()), (2, 2));
    }
}
