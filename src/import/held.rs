//! Held: which line holds for whom, among those that are in hand.
//!
//! Promise: of several lines about one user the last one holds, however late it shows that they are about the same.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

/// The last line that each user is kept as. Forgotten when every line before it is settled: none that is earlier can come then.
#[derive(Clone, Default)]
pub struct Held(Arc<Mutex<HashMap<Uuid, u64>>>);

impl Held {
    /// The user is kept as this line has him. Said, and asked, by whoever has his turn.
    pub fn note(&self, id: Uuid, line: u64) {
        self.lines().insert(id, line);
    }

    /// Whether a line after this one holds already.
    pub fn is_later(&self, id: Uuid, line: u64) -> bool {
        self.lines().get(&id).is_some_and(|held| *held > line)
    }

    /// Every line up to this one is settled.
    pub fn settled(&self, line: u64) {
        self.lines().retain(|_, held| *held > line);
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<Uuid, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_line_holds_until_every_earlier_one_is_settled() {
        let (held, [ana, bo]) = (Held::default(), [1, 2].map(Uuid::from_u128));
        held.note(ana, 7);
        assert!(held.is_later(ana, 6) && !held.is_later(ana, 7) && !held.is_later(ana, 8) && !held.is_later(bo, 1));
        held.settled(6);
        assert!(held.is_later(ana, 6));
        held.settled(7);
        assert!(held.lines().is_empty());
    }
}
