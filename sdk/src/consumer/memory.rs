//! Memory: which version of whom was handled last, and what could not be. Pure.
//!
//! Promise: a notice is called old only when the state that it tells of, or a later one, was shown by the owner and handled; what failed is told
//! again together with the next notice of that user, which makes it old if that is handled here. Another process that handled it knew nothing of
//! the failure.
//! Not here, on purpose: anything that outlives the process, since a handler must not mind seeing a notice again; and a message's word for itself,
//! which may be forged, or of a history that the owner has no more.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem,
};

use uuid::Uuid;

use crate::{
    envelope::{Event, Notice},
    owner::Latest,
};

/// What the owner showed in a call: somebody of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Living(i64),
    Gone(i64),
}

impl Shown {
    pub(super) fn of(latest: &Latest) -> Self {
        match latest {
            Latest::Living(user) => Self::Living(user.version),
            Latest::Gone(tombstone) => Self::Gone(tombstone.version),
        }
    }
}

pub(super) struct Memory {
    capacity: usize,
    handled: HashMap<Uuid, Handled>,
    /// In order of arrival, for making room.
    arrivals: VecDeque<Uuid>,
}

#[derive(Debug, Default)]
struct Handled {
    version: i64,
    /// The handler was told of a deletion that the owner showed, and not only shown one.
    is_deleted: bool,
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
            Event::Deleted => handled.is_deleted,
            Event::Created | Event::Updated { .. } => {
                let is_told = !has_failed || handled.made_good.contains(&notice.message_id);
                handled.is_deleted || notice.version <= handled.version && is_told
            }
        }
    }

    /// Notes that a call succeeded for these messages and for what was owed, and what the owner showed in it, if it was asked. A further attempt for
    /// an older one changes nothing about what was handled since. A deletion is the last word of him if the owner says so too, and else nothing.
    pub(super) fn note(&mut self, user: Uuid, told: &Event, shown: Option<Shown>, messages: &[Uuid]) {
        let handled = self.entry(user);
        let version = match (told, shown) {
            (Event::Deleted, Some(Shown::Gone(_))) => {
                *handled = Handled { is_deleted: true, ..Handled::default() };
                return;
            }
            (Event::Deleted, _) => return,
            (_, Some(Shown::Living(version) | Shown::Gone(version))) => version.max(handled.version),
            (_, None) => handled.version,
        };
        let mut made_good = mem::take(&mut handled.made_good);
        made_good.extend(handled.failed.drain());
        // They are done, and come back from nowhere.
        made_good.retain(|message| !messages.contains(message));
        *handled = Handled { version, made_good, ..Handled::default() };
    }

    /// What a backfill then tells is how it is, even if it is older or living again. A restore may have set the owner back.
    pub(super) fn begin_anew(&mut self, user: Uuid) {
        *self.entry(user) = Handled::default();
    }

    /// Notes that an attempt failed for these messages, each of which comes back or does not. A newer notice may be handled before they
    /// are tried again, and then makes them old. Not a deletion: only its own message tells it, when it comes back.
    pub(super) fn owe(&mut self, user: Uuid, event: Event, messages: impl IntoIterator<Item = (Uuid, bool)>) {
        if event == Event::Deleted {
            return;
        }
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

    /// Notes a change that was handled with a fetch.
    fn handles(memory: &mut Memory, user: u128, version: i64, messages: &[Uuid]) {
        memory.note(Uuid::from_u128(user), &updated(), Some(Shown::Living(version)), messages);
    }

    fn updated() -> Event {
        Event::Updated { changed_fields: vec![] }
    }

    const MESSAGE: Uuid = Uuid::from_u128(9);

    #[test]
    fn a_deletion_is_old_only_when_a_deletion_was_handled() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        // The state of version 7 that was fetched for a change may be the tombstone.
        memory.note(ana, &updated(), Some(Shown::Gone(7)), &[]);
        assert!(memory.is_old(&notice(1, 7, updated()), false) && memory.is_old(&notice(1, 1, Event::Created), false));
        assert!(!memory.is_old(&notice(1, 8, updated()), false));
        assert!(!memory.is_old(&notice(1, 7, Event::Deleted), false));
        memory.note(ana, &Event::Deleted, Some(Shown::Gone(7)), &[]);
        for has_failed in [false, true] {
            assert!(memory.is_old(&notice(1, 7, Event::Deleted), has_failed));
            assert!(memory.is_old(&notice(1, 8, updated()), has_failed));
        }
    }

    /// Whoever can publish could make it deaf to a user otherwise, or have it take for done what failed.
    #[test]
    fn what_a_message_says_and_the_owner_does_not_show_makes_nothing_old() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        let living = Some(Shown::Living(5));
        for (told, shown) in
            [(Event::Deleted, None), (Event::Deleted, living), (updated(), None), (Event::Created, None)]
        {
            memory.note(ana, &told, shown, &[]);
            assert!(!memory.is_old(&notice(1, 5, updated()), false));
            assert!(!memory.is_old(&notice(1, 9, Event::Deleted), false));
        }
        memory.owe(ana, updated(), [(MESSAGE, true)]);
        memory.owe(ana, Event::Deleted, [(Uuid::from_u128(10), true)]);
        memory.note(ana, &Event::Deleted, living, &[]);
        assert_eq!(memory.owed(ana), Some(updated()));
        handles(&mut memory, 1, 5, &[]);
        assert!(memory.is_old(&notice(1, 5, updated()), false) && !memory.is_old(&notice(1, 6, updated()), false));
    }

    #[test]
    fn what_a_backfill_told_is_how_it_is() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, &Event::Deleted, Some(Shown::Gone(7)), &[]);
        memory.begin_anew(ana);
        handles(&mut memory, 1, 3, &[]);
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
        handles(&mut memory, 1, 2, &[Uuid::from_u128(10)]);
        assert!(memory.is_old(&notice(1, 1, Event::Created), true));
        assert_eq!(memory.owed(ana), None);
        memory.is_back(&notice(1, 1, Event::Created));
        assert!(!memory.is_old(&notice(1, 1, Event::Created), true), "it is kept in mind no longer than needed");
    }

    /// A process that handled a later version knew nothing of the failure, nor does one that was started since.
    #[test]
    fn what_failed_elsewhere_is_not_made_old_by_what_was_handled_here() {
        let mut memory = Memory::new(10);
        handles(&mut memory, 1, 2, &[Uuid::from_u128(10)]);
        assert!(
            !memory.is_old(&notice(1, 1, Event::Created), true) && memory.is_old(&notice(1, 1, Event::Created), false)
        );
        handles(&mut memory, 1, 1, &[MESSAGE]);
        assert!(memory.is_old(&notice(1, 2, updated()), false), "nor does it make old news new");
    }

    #[test]
    fn whom_it_forgot_is_handled_again() {
        let mut memory = Memory::new(2);
        for user in 1..=3 {
            handles(&mut memory, user, 1, &[]);
        }
        assert!(!memory.is_old(&notice(1, 1, updated()), false) && memory.is_old(&notice(3, 1, updated()), false));
        assert_eq!((memory.handled.len(), memory.arrivals.len()), (2, 2));
    }
}
