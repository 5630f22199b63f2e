//! Cache: records that were fetched, until a notice says that they are old.
//!
//! Promise: after [`Cache::invalidate`] nobody is given a state older than the notice, not even one whose fetch was under way.
//! Not here, on purpose: a time to live. A notice comes when there is a reason for one. Nor what other processes hear: of those that share a
//! queue each notice reaches one, so a cache needs a subscription for each process.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

use crate::{
    consumer::News,
    owner::{FetchError, Latest, Owner},
};

/// Cheap to clone; clones share what they hold.
#[derive(Clone)]
pub struct Cache {
    owner: Owner,
    capacity: usize,
    held: Arc<Mutex<Held>>,
}

/// Shows nobody whom it holds.
impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cache")
    }
}

#[derive(Default)]
struct Held {
    entries: HashMap<Uuid, Entry>,
    /// In order of arrival, for making room.
    arrivals: VecDeque<Uuid>,
    /// How often an entry was made, or began anew at a lower version.
    beginnings: u64,
}

struct Entry {
    wanted: Wanted,
    latest: Option<Latest>,
}

/// What a fetch has to bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    /// No state older than this may be given out.
    at_least: i64,
    /// Of what was asked for before an entry was made, or began anew, versions say nothing.
    beginning: u64,
}

impl Cache {
    /// A cache of up to `capacity` users.
    pub fn new(owner: Owner, capacity: usize) -> Self {
        Self { owner, capacity: capacity.max(1), held: Arc::default() }
    }

    /// The record of a user: what is held, or else what the owner has.
    ///
    /// # Errors
    /// [`FetchError`], when it has to be fetched.
    pub async fn get(&self, user: Uuid) -> Result<Latest, FetchError> {
        loop {
            let wanted = match self.held().look_up(user, self.capacity) {
                Ok(latest) => return Ok(latest),
                Err(wanted) => wanted,
            };
            let latest = self.owner.latest(user, wanted.at_least).await?;
            // A notice that came meanwhile may have made it old already.
            if self.held().take_in(&latest, wanted) {
                return Ok(latest);
            }
        }
    }

    /// What news calls for: [`Cache::invalidate`], or, if it is a backfill, to forget whatever is held. The owner may have been restored.
    ///
    /// For every call of a handler, before or after [`News::latest`]: what that brings makes later notices old, of which no call tells. So when
    /// the call succeeds, states older than that are forgotten too.
    pub fn heed(&self, news: &News) {
        news.is_heeded_by(self);
        if news.is_backfill() {
            self.held().begin_anew(news.user_id, news.version);
        } else {
            self.invalidate(news.user_id, news.version);
        }
    }

    /// What a notice calls for: states older than `version` are forgotten, and not taken in any more.
    pub fn invalidate(&self, user: Uuid, version: i64) {
        self.held().raise(user, version);
    }

    /// Forgets everything: for when news may have been missed.
    pub fn clear(&self) {
        let mut held = self.held();
        *held = Held { beginnings: held.beginnings, ..Held::default() };
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.held, &other.held)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// What is held, or what a fetch has to bring. From then on there is an entry, so that a notice finds it.
    fn look_up(&mut self, user: Uuid, capacity: usize) -> Result<Latest, Wanted> {
        if let Some(entry) = self.entries.get(&user) {
            return entry.latest.clone().ok_or(entry.wanted);
        }
        self.beginnings += 1;
        let wanted = Wanted { at_least: 1, beginning: self.beginnings };
        self.entries.insert(user, Entry { wanted, latest: None });
        self.arrivals.push_back(user);
        if self.arrivals.len() > capacity
            && let Some(oldest) = self.arrivals.pop_front()
        {
            self.entries.remove(&oldest);
        }
        Err(wanted)
    }

    /// Keeps what was fetched when this was `wanted`; false when it is too old to be given out.
    fn take_in(&mut self, latest: &Latest, wanted: Wanted) -> bool {
        // Who has lost his place meanwhile is not held; what a notice said of him is not known either.
        let Some(entry) = self.entries.get_mut(&latest.id()) else { return true };
        let is_new_enough = wanted.beginning == entry.wanted.beginning && latest.version() >= entry.wanted.at_least;
        if is_new_enough {
            entry.wanted.at_least = latest.version();
            entry.latest = Some(latest.clone());
        }
        is_new_enough
    }

    fn raise(&mut self, user: Uuid, version: i64) {
        if let Some(entry) = self.entries.get_mut(&user)
            && version > entry.wanted.at_least
        {
            entry.wanted.at_least = version;
            entry.latest = None;
        }
    }

    fn begin_anew(&mut self, user: Uuid, version: i64) {
        self.beginnings += 1;
        if let Some(entry) = self.entries.get_mut(&user) {
            *entry = Entry { wanted: Wanted { at_least: version, beginning: self.beginnings }, latest: None };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::Tombstone;

    fn state(user: Uuid, version: i64) -> Latest {
        Latest::Gone(Tombstone { id: user, version, deleted_at: time::OffsetDateTime::UNIX_EPOCH })
    }

    fn wanted(at_least: i64) -> Wanted {
        Wanted { at_least, beginning: 1 }
    }

    #[test]
    fn a_state_that_was_under_way_when_the_notice_came_is_not_given_out() {
        let (mut held, ana) = (Held::default(), Uuid::from_u128(1));
        assert_eq!(held.look_up(ana, 10), Err(wanted(1)));
        held.raise(ana, 2);
        assert!(!held.take_in(&state(ana, 1), wanted(1)));
        assert_eq!(held.look_up(ana, 10), Err(wanted(2)));
        assert!(held.take_in(&state(ana, 3), wanted(2)));
        held.raise(ana, 3);
        assert_eq!(held.look_up(ana, 10), Ok(state(ana, 3)), "an old notice changes nothing");
        held.raise(ana, 4);
        assert_eq!(held.look_up(ana, 10), Err(wanted(4)));
    }

    #[test]
    fn what_a_backfill_tells_counts_although_it_is_older() {
        let (mut held, ana) = (Held::default(), Uuid::from_u128(1));
        let first = held.look_up(ana, 10).unwrap_err();
        assert!(held.take_in(&state(ana, 9), first));
        held.begin_anew(ana, 3);
        let second = held.look_up(ana, 10).unwrap_err();
        assert_eq!(second.at_least, 3);
        assert!(!held.take_in(&state(ana, 9), first), "it was under way");
        assert!(held.take_in(&state(ana, 3), second));
        assert_eq!(held.look_up(ana, 10), Ok(state(ana, 3)));
    }

    #[test]
    fn no_more_are_held_than_there_is_room_for() {
        let mut held = Held::default();
        for user in (1..=5).map(Uuid::from_u128) {
            let wanted = held.look_up(user, 3).unwrap_err();
            assert!(held.take_in(&state(user, 1), wanted));
        }
        assert_eq!((held.entries.len(), held.arrivals.len()), (3, 3));
        assert!(held.look_up(Uuid::from_u128(1), 3).is_err());
    }

    /// A notice that came in between found no entry.
    #[test]
    fn what_was_under_way_before_an_entry_was_made_anew_is_not_taken_in() {
        let (mut held, ana) = (Held::default(), Uuid::from_u128(1));
        let first = held.look_up(ana, 1).unwrap_err();
        held.look_up(Uuid::from_u128(2), 1).unwrap_err();
        held.raise(ana, 2);
        let second = held.look_up(ana, 1).unwrap_err();
        assert!(!held.take_in(&state(ana, 1), first));
        assert!(held.take_in(&state(ana, 2), second));
    }

    #[test]
    fn nor_is_what_was_under_way_before_everything_was_forgotten() {
        let (cache, ana) = (Cache::new(Owner::at("http://127.0.0.1:8080").unwrap(), 10), Uuid::from_u128(1));
        let first = cache.held().look_up(ana, 10).unwrap_err();
        cache.clear();
        cache.invalidate(ana, 2);
        cache.held().look_up(ana, 10).unwrap_err();
        assert!(!cache.held().take_in(&state(ana, 1), first));
    }
}
