//! Ledger: which deliveries of a channel are done, and how the broker is told in few words. Pure.
//!
//! Promise: a delivery is acknowledged once, when it is done and not before; one that takes long holds up the acknowledgement of no other.

use std::{collections::BTreeSet, mem};

/// Deliveries, by tag, that the broker waits for.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    under_way: BTreeSet<u64>,
    done: BTreeSet<u64>,
}

/// What to tell the broker (AMQP 0-9-1, basic.ack).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ack {
    pub tag: u64,
    /// This one and all before it.
    pub multiple: bool,
}

impl Ledger {
    pub(super) fn arrived(&mut self, tag: u64) {
        self.under_way.insert(tag);
    }

    /// One that is not there is of an earlier channel, which gave it back.
    pub(super) fn done(&mut self, tag: u64) {
        if self.under_way.remove(&tag) {
            self.done.insert(tag);
        }
    }

    /// What is to be told now, and is then told.
    pub(super) fn take(&mut self) -> Vec<Ack> {
        let alone = self.under_way.first().map(|first| self.done.split_off(first)).unwrap_or_default();
        let in_a_row = mem::take(&mut self.done);
        let together = in_a_row.last().map(|last| Ack { tag: *last, multiple: in_a_row.len() > 1 });
        together.into_iter().chain(alone.into_iter().map(|tag| Ack { tag, multiple: false })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(ledger: &mut Ledger, done: &[u64]) -> Vec<(u64, bool)> {
        done.iter().for_each(|tag| ledger.done(*tag));
        ledger.take().into_iter().map(|Ack { tag, multiple }| (tag, multiple)).collect()
    }

    #[test]
    fn those_in_a_row_are_told_as_one_and_others_alone() {
        let mut ledger = Ledger::default();
        (1..=9).for_each(|tag| ledger.arrived(tag));
        assert_eq!(told(&mut ledger, &[]), []);
        assert_eq!(told(&mut ledger, &[2, 1, 3, 5, 6]), [(3, true), (5, false), (6, false)]);
        assert_eq!(told(&mut ledger, &[]), [], "each is told once");
        assert_eq!(told(&mut ledger, &[4]), [(4, false)]);
        assert_eq!(told(&mut ledger, &[8]), [(8, false)], "7 holds up nobody");
        ledger.arrived(10);
        assert_eq!(told(&mut ledger, &[7, 10]), [(7, false), (10, false)]);
        assert_eq!(told(&mut ledger, &[9]), [(9, false)]);
        ledger.arrived(11);
        ledger.arrived(12);
        assert_eq!(told(&mut ledger, &[12, 11]), [(12, true)]);
        assert!(ledger.under_way.is_empty());
    }

    #[test]
    fn what_an_earlier_channel_gave_back_is_not_told() {
        let mut ledger = Ledger::default();
        assert_eq!(told(&mut ledger, &[7]), []);
    }
}
