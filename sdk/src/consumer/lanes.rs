//! Lanes: who is handled when. Pure.
//!
//! Promise: of one user at most one group is out at a time, and it holds everything that waited for him; users come in the order in
//! which they began to wait.

use std::collections::{HashMap, HashSet, VecDeque};

use uuid::Uuid;

pub(super) struct Lanes<T> {
    waiting: HashMap<Uuid, Vec<T>>,
    /// Users who wait and are not out.
    ready: VecDeque<Uuid>,
    out: HashSet<Uuid>,
}

impl<T> Lanes<T> {
    pub(super) fn new() -> Self {
        Self { waiting: HashMap::new(), ready: VecDeque::new(), out: HashSet::new() }
    }

    pub(super) fn arrive(&mut self, user: Uuid, arrival: T) {
        let waiting = self.waiting.entry(user).or_default();
        waiting.push(arrival);
        if waiting.len() == 1 && !self.out.contains(&user) {
            self.ready.push_back(user);
        }
    }

    /// The next user's group, who is out from now on.
    pub(super) fn next(&mut self) -> Option<(Uuid, Vec<T>)> {
        let user = self.ready.pop_front()?;
        self.out.insert(user);
        Some((user, self.waiting.remove(&user).unwrap_or_default()))
    }

    /// A user's group is done.
    pub(super) fn back(&mut self, user: Uuid) {
        if self.out.remove(&user) && self.waiting.contains_key(&user) {
            self.ready.push_back(user);
        }
    }

    pub(super) fn out(&self) -> usize {
        self.out.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANA: Uuid = Uuid::from_u128(1);
    const BO: Uuid = Uuid::from_u128(2);

    #[test]
    fn what_waits_together_goes_together_and_nobody_is_out_twice() {
        let mut lanes = Lanes::new();
        lanes.arrive(ANA, 1);
        assert_eq!(lanes.next(), Some((ANA, vec![1])));
        lanes.arrive(ANA, 2);
        lanes.arrive(BO, 3);
        lanes.arrive(ANA, 4);
        assert_eq!(lanes.next(), Some((BO, vec![3])), "Ana is out");
        assert_eq!((lanes.next(), lanes.out()), (None, 2));
        lanes.back(ANA);
        assert_eq!(lanes.next(), Some((ANA, vec![2, 4])));
        lanes.back(ANA);
        lanes.back(BO);
        assert_eq!((lanes.next(), lanes.out()), (None, 0));
    }
}
