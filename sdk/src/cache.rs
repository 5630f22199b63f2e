//! Cache: records that were fetched, until a notice says that they are old.
//!
//! Promise: after [`Cache::invalidate`] nobody is given a state older than the notice, not even one whose fetch was under way.
//! Not here, on purpose: a time to live. A notice comes when there is a reason for one.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

use crate::owner::{FetchError, Latest, Owner};

/// Cheap to clone; clones share what they hold.
#[derive(Clone)]
pub struct Cache {
    owner: Owner,
    capacity: usize,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    entries: HashMap<Uuid, Entry>,
    /// In order of arrival, for making room.
    arrivals: VecDeque<Uuid>,
}

struct Entry {
    /// No state older than this may be given out.
    at_least: i64,
    latest: Option<Latest>,
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
            let at_least = match self.held().look_up(user, self.capacity) {
                Ok(latest) => return Ok(latest),
                Err(at_least) => at_least,
            };
            let latest = self.owner.latest(user, at_least).await?;
            // A notice that came meanwhile may have made it old already.
            if self.held().take_in(&latest) {
                return Ok(latest);
            }
        }
    }

    /// What a notice calls for: states older than `version` are forgotten, and not taken in any more.
    pub fn invalidate(&self, user: Uuid, version: i64) {
        self.held().raise(user, version);
    }

    /// Forgets everything: for when news may have been missed.
    pub fn clear(&self) {
        *self.held() = Held::default();
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// What is held, or the version that a fetch has to reach. From then on there is an entry, so that a notice finds it.
    fn look_up(&mut self, user: Uuid, capacity: usize) -> Result<Latest, i64> {
        if let Some(entry) = self.entries.get(&user) {
            return entry.latest.clone().ok_or(entry.at_least);
        }
        self.entries.insert(user, Entry { at_least: 1, latest: None });
        self.arrivals.push_back(user);
        if self.arrivals.len() > capacity
            && let Some(oldest) = self.arrivals.pop_front()
        {
            self.entries.remove(&oldest);
        }
        Err(1)
    }

    /// Keeps what was fetched; false when it is too old to be given out.
    fn take_in(&mut self, latest: &Latest) -> bool {
        // Who has lost his place meanwhile is not held; what a notice said of him is not known either.
        let Some(entry) = self.entries.get_mut(&latest.id()) else { return true };
        let is_new_enough = latest.version() >= entry.at_least;
        if is_new_enough {
            *entry = Entry { at_least: latest.version(), latest: Some(latest.clone()) };
        }
        is_new_enough
    }

    fn raise(&mut self, user: Uuid, version: i64) {
        if let Some(entry) = self.entries.get_mut(&user)
            && version > entry.at_least
        {
            *entry = Entry { at_least: version, latest: None };
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

    #[test]
    fn a_state_that_was_under_way_when_the_notice_came_is_not_given_out() {
        let (mut held, ana) = (Held::default(), Uuid::from_u128(1));
        assert_eq!(held.look_up(ana, 10), Err(1));
        held.raise(ana, 2);
        assert!(!held.take_in(&state(ana, 1)));
        assert_eq!(held.look_up(ana, 10), Err(2));
        assert!(held.take_in(&state(ana, 3)));
        held.raise(ana, 3);
        assert_eq!(held.look_up(ana, 10), Ok(state(ana, 3)), "an old notice changes nothing");
        held.raise(ana, 4);
        assert_eq!(held.look_up(ana, 10), Err(4));
    }

    #[test]
    fn no_more_are_held_than_there_is_room_for() {
        let mut held = Held::default();
        for user in (1..=5).map(Uuid::from_u128) {
            assert_eq!(held.look_up(user, 3), Err(1));
            assert!(held.take_in(&state(user, 1)));
        }
        assert_eq!((held.entries.len(), held.arrivals.len()), (3, 3));
        assert_eq!(held.look_up(Uuid::from_u128(1), 3), Err(1));
    }
}
