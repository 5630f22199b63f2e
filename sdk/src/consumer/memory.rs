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

/// What the owner showed in a call that succeeded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub version: i64,
    /// The handler was told of a deletion, and not only shown one.
    pub deletion: bool,
}

impl Seen {
    /// `None` when the owner was not asked, or shows somebody living of whom the handler was told that he is deleted: that stands for no news
    /// of him.
    pub(super) fn of(told: &Event, latest: Option<&Latest>) -> Option<Self> {
        match (told, latest?) {
            (Event::Deleted, Latest::Living(_)) => None,
            (told, latest) => Some(Self { version: latest.version(), deletion: *told == Event::Deleted }),
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
    seen: Seen,
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
            Event::Deleted => handled.seen.deletion,
            Event::Created | Event::Updated { .. } => {
                let is_told = !has_failed || handled.made_good.contains(&notice.message_id);
                handled.seen.deletion || notice.version <= handled.seen.version && is_told
            }
        }
    }

    /// Notes that a call succeeded for these messages and for what was owed, and what was seen in it. A further attempt for an older one changes
    /// nothing about what was handled since.
    pub(super) fn note(&mut self, user: Uuid, seen: Option<Seen>, messages: &[Uuid]) {
        let handled = self.entry(user);
        let mut made_good = mem::take(&mut handled.made_good);
        made_good.extend(handled.failed.drain());
        // They are done, and come back from nowhere.
        made_good.retain(|message| !messages.contains(message));
        let Seen { version, deletion } = seen.unwrap_or_default();
        let seen = Seen { version: version.max(handled.seen.version), deletion };
        *handled = Handled { seen, made_good, ..Handled::default() };
    }

    /// The same for a backfill: what it tells is how it is, even if it is older or living again. A restore may have set the owner back.
    pub(super) fn begin_anew(&mut self, user: Uuid, seen: Option<Seen>) {
        *self.entry(user) = Handled { seen: seen.unwrap_or_default(), ..Handled::default() };
    }

    /// Notes that by the owner's word a user is not deleted. If it has shown him deleted before, it was set back, and whatever it showed is no more.
    pub(super) fn is_not_deleted(&mut self, user: Uuid) {
        if let Some(handled) = self.handled.get_mut(&user).filter(|handled| handled.seen.deletion) {
            handled.seen = Seen::default();
        }
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
    use crate::owner::{Tombstone, User};
    use time::OffsetDateTime;

    fn notice(user: u128, version: i64, event: Event) -> Notice {
        let (message_id, user_id) = (MESSAGE, Uuid::from_u128(user));
        Notice { message_id, user_id, version, event, occurred_at: OffsetDateTime::UNIX_EPOCH, traceparent: None }
    }

    fn seen(version: i64) -> Option<Seen> {
        Some(Seen { version, deletion: false })
    }

    fn seen_deleted(version: i64) -> Option<Seen> {
        Some(Seen { version, deletion: true })
    }

    fn updated() -> Event {
        Event::Updated { changed_fields: vec![] }
    }

    const MESSAGE: Uuid = Uuid::from_u128(9);

    #[test]
    fn a_deletion_is_old_only_when_a_deletion_was_handled() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, seen(7), &[]);
        assert!(memory.is_old(&notice(1, 7, updated()), false) && memory.is_old(&notice(1, 1, Event::Created), false));
        assert!(!memory.is_old(&notice(1, 8, updated()), false));
        // The state of version 7 that was fetched may have been the tombstone.
        assert!(!memory.is_old(&notice(1, 7, Event::Deleted), false));
        memory.note(ana, seen_deleted(7), &[]);
        for has_failed in [false, true] {
            assert!(memory.is_old(&notice(1, 7, Event::Deleted), has_failed));
            assert!(memory.is_old(&notice(1, 8, updated()), has_failed));
        }
    }

    /// Whoever can publish could make it deaf to a user otherwise.
    #[test]
    fn what_a_message_says_and_the_owner_does_not_show_makes_nothing_old() {
        let gone = Tombstone { id: Uuid::from_u128(1), version: 9, deleted_at: OffsetDateTime::UNIX_EPOCH };
        let (gone, mut memory, ana) = (Latest::Gone(gone), Memory::new(10), Uuid::from_u128(1));
        let living = User {
            id: ana,
            version: 5,
            created_at: OffsetDateTime::UNIX_EPOCH,
            updated_at: OffsetDateTime::UNIX_EPOCH,
            external_id: None,
            profile: serde_json::Map::new(),
        };
        let living = Latest::Living(living);
        for (told, latest) in
            [(Event::Deleted, None), (Event::Deleted, Some(&living)), (updated(), None), (Event::Created, None)]
        {
            memory.note(ana, Seen::of(&told, latest), &[]);
            assert!(
                !memory.is_old(&notice(1, 5, updated()), false) && !memory.is_old(&notice(1, 9, Event::Deleted), false)
            );
        }
        memory.note(ana, Seen::of(&updated(), Some(&living)), &[]);
        assert!(memory.is_old(&notice(1, 5, updated()), false) && !memory.is_old(&notice(1, 6, updated()), false));
        memory.note(ana, Seen::of(&updated(), Some(&gone)), &[]);
        assert!(memory.is_old(&notice(1, 9, updated()), false) && !memory.is_old(&notice(1, 9, Event::Deleted), false));
        memory.note(ana, Seen::of(&Event::Deleted, Some(&gone)), &[]);
        assert!(memory.is_old(&notice(1, 10, updated()), false) && memory.is_old(&notice(1, 9, Event::Deleted), false));
    }

    #[test]
    fn who_is_not_deleted_by_the_owners_word_is_news_again() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, seen(7), &[]);
        memory.is_not_deleted(ana);
        assert!(memory.is_old(&notice(1, 7, updated()), false), "it has never said anything else");
        memory.note(ana, seen_deleted(8), &[]);
        memory.is_not_deleted(ana);
        assert!(
            !memory.is_old(&notice(1, 2, updated()), false) && !memory.is_old(&notice(1, 8, Event::Deleted), false)
        );
    }

    #[test]
    fn what_a_backfill_told_is_how_it_is() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, seen_deleted(7), &[]);
        memory.begin_anew(ana, seen(3));
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
        memory.note(ana, seen(2), &[Uuid::from_u128(10)]);
        assert!(memory.is_old(&notice(1, 1, Event::Created), true));
        assert_eq!(memory.owed(ana), None);
        memory.is_back(&notice(1, 1, Event::Created));
        assert!(!memory.is_old(&notice(1, 1, Event::Created), true), "it is kept in mind no longer than needed");
    }

    /// A process that handled a later version knew nothing of the failure, nor does one that was started since.
    #[test]
    fn what_failed_elsewhere_is_not_made_old_by_what_was_handled_here() {
        let (mut memory, ana) = (Memory::new(10), Uuid::from_u128(1));
        memory.note(ana, seen(2), &[Uuid::from_u128(10)]);
        assert!(
            !memory.is_old(&notice(1, 1, Event::Created), true) && memory.is_old(&notice(1, 1, Event::Created), false)
        );
        memory.note(ana, seen(1), &[MESSAGE]);
        assert!(memory.is_old(&notice(1, 2, updated()), false), "nor does it make old news new");
    }

    #[test]
    fn whom_it_forgot_is_handled_again() {
        let mut memory = Memory::new(2);
        for user in 1..=3 {
            memory.note(Uuid::from_u128(user), seen(1), &[]);
        }
        assert!(!memory.is_old(&notice(1, 1, updated()), false) && memory.is_old(&notice(3, 1, updated()), false));
        assert_eq!((memory.handled.len(), memory.arrivals.len()), (2, 2));
    }
}
