//! Turns: requests about the same user are sent one after the other.
//!
//! Promise: whoever took his turn later goes later.
//! Not here, on purpose: which line holds. Lines that name a user alike take their turns in the order of the file; for others see `held`.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Who is being asked about now, and by which line last.
#[derive(Clone, Default)]
pub struct Turns(Arc<Mutex<HashMap<Uuid, (u64, CancellationToken)>>>);

/// A place in the order. Whoever comes after goes on when it is dropped.
pub struct Turn {
    turns: Turns,
    line: u64,
    keys: HashSet<Uuid>,
    before: Vec<CancellationToken>,
    done: CancellationToken,
}

impl Turns {
    /// A place behind all of these keys that took one earlier. `line` tells it from the others.
    pub fn take(&self, line: u64, keys: &HashSet<Uuid>) -> Turn {
        let done = CancellationToken::new();
        let mut last = self.last();
        let before =
            keys.iter().filter_map(|key| last.insert(*key, (line, done.clone()))).map(|(_, done)| done).collect();
        drop(last);
        Turn { turns: self.clone(), line, keys: keys.clone(), before, done }
    }

    fn last(&self) -> MutexGuard<'_, HashMap<Uuid, (u64, CancellationToken)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    pub async fn comes(&self) {
        for before in &self.before {
            before.cancelled().await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut last = self.turns.last();
        for key in &self.keys {
            if last.get(key).is_some_and(|(line, _)| *line == self.line) {
                last.remove(key);
            }
        }
        drop(last);
        self.done.cancel();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn who_shares_a_key_waits_and_nobody_else() {
        let (turns, [a, b, c]) = (Turns::default(), [1, 2, 3].map(Uuid::from_u128));
        let comes = |turn: &Turn| turn.comes().now_or_never().is_some();
        let take = |line: u64, keys: &[Uuid]| turns.take(line, &keys.iter().copied().collect());
        let first = take(1, &[a, b]);
        let (second, other, third) = (take(2, &[a]), take(3, &[c]), take(4, &[b, a]));
        assert!(comes(&first) && comes(&other) && !comes(&second) && !comes(&third));
        drop(first);
        assert!(comes(&second) && !comes(&third));
        drop(second);
        assert!(comes(&third));
        drop((third, other));
        assert!(turns.last().is_empty());
    }
}
