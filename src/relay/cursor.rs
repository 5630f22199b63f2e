//! Which places of the outbox to look at next. Pure.
//!
//! A relay that only remembers the last id loses events: ids are given out before the commit, so a lower one may appear after a
//! higher one was read. Three things together find every event: reading on past the last id; asking again for each id that was
//! skipped; and, now and then, sweeping everything, for what commits after we stopped asking.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use crate::outbox::OutboxId;

/// How long a skipped id is asked for. After that the sweep finds it.
const ASK_FOR: Duration = Duration::from_secs(60);
/// Ids asked for again in one question. A jump in the sequence larger than this is left to the sweep.
const ASK_LIMIT: usize = 1000;
/// Between two sweeps, in the long run.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Before the first sweep; the next ones take twice as long each, up to the interval. What was open when this relay began to lead,
/// and whose place it therefore never saw skipped, mostly commits within moments.
const FIRST_SWEEP: Duration = Duration::from_secs(1);
/// A sweep over many dead rows is slow: rest this many times as long as it took.
const SWEEP_REST: u32 = 50;
/// Before a refused message is sent again; doubles with each refusal, since every resend is a duplicate to the healthy queues.
const RESEND_AFTER: Duration = Duration::from_secs(1);
/// Refused messages that are remembered before reading on stops.
pub(super) const REFUSED_LIMIT: usize = 10_000;
const RESEND_AFTER_AT_MOST: Duration = Duration::from_secs(60);

pub struct Cursor {
    /// Every id up to here was read or is in `again`, or the sweep will find it.
    past: OutboxId,
    /// The last id given out before this relay began. Until one was read, what is missing below counts as settled long ago.
    floor: OutboxId,
    /// Ids that were skipped, and when.
    skipped: BTreeMap<OutboxId, Instant>,
    refused: BTreeMap<OutboxId, Refused>,
    sweep: Sweep,
    /// How long the sweep rests.
    rest: Duration,
}

enum Sweep {
    Due(Instant),
    /// With what questions found meanwhile, which it may find too.
    UnderWay(HashSet<OutboxId>),
}

struct Refused {
    /// When to send it again; `None` while it is under way.
    due: Option<Instant>,
    times: u32,
}

/// What to ask the outbox: what is past a place, and at places that were skipped or refused. Not past it while too many are refused:
/// then the broker has to recover first.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    pub past: OutboxId,
    pub again: Vec<OutboxId>,
    /// Whether some of these were refused.
    pub resends: bool,
    pub read_on: bool,
}

/// Where an id stands to what was read.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// It was read.
    Read,
    /// Everything before it was read, and nothing else.
    Next,
    /// Something before it may be missing, or the broker has to recover first.
    Beyond,
}

impl Cursor {
    pub fn new(floor: OutboxId, now: Instant) -> Self {
        let (skipped, refused) = (BTreeMap::new(), BTreeMap::new());
        Self { past: 0, floor, skipped, refused, sweep: Sweep::Due(now + FIRST_SWEEP), rest: FIRST_SWEEP }
    }

    pub fn question(&mut self, now: Instant) -> Question {
        self.skipped.retain(|_, since| now.duration_since(*since) < ASK_FOR);
        let due =
            self.refused.iter().filter(|(_, refused)| refused.due.is_some_and(|due| due <= now)).map(|(id, _)| *id);
        // The sweep finds what was skipped, and nothing else asks for what was refused.
        let again: Vec<OutboxId> = due.chain(self.skipped.keys().copied()).take(ASK_LIMIT).collect();
        let resends = again.iter().any(|id| self.refused.contains_key(id));
        Question { past: self.past, again, resends, read_on: self.refused.len() < REFUSED_LIMIT }
    }

    /// Begins a sweep if one is due: of everything up to the place that is returned and not under way. It ends with [`Self::swept`].
    pub fn begin_sweep(&mut self, now: Instant) -> Option<OutboxId> {
        let is_due = matches!(self.sweep, Sweep::Due(due) if due <= now);
        is_due.then(|| {
            self.sweep = Sweep::UnderWay(HashSet::new());
            self.past
        })
    }

    /// Where an id stands that came without a question. While one is skipped none is next: it may be of the same user, and older.
    pub fn place(&self, id: OutboxId) -> Place {
        let is_whole = self.skipped.is_empty() && self.refused.len() < REFUSED_LIMIT;
        if id <= self.past && !self.skipped.contains_key(&id) {
            Place::Read
        } else if id == self.past + 1 && is_whole {
            Place::Next
        } else {
            Place::Beyond
        }
    }

    /// The ids that a [`Question`] found, in order.
    pub fn found(&mut self, ids: &[OutboxId], now: Instant) {
        for &id in ids {
            if let Some(refused) = self.refused.get_mut(&id) {
                refused.due = None;
            }
            if id <= self.past {
                self.skipped.remove(&id);
                if let Sweep::UnderWay(found) = &mut self.sweep {
                    found.insert(id);
                }
                continue;
            }
            // At the start nothing is known of the ids below the first one, unless they were given out since.
            let first = Some(self.floor).filter(|&floor| id > floor);
            if let Some(known) = Some(self.past).filter(|&past| past > 0).or(first) {
                let ask_limit = OutboxId::try_from(ASK_LIMIT).unwrap_or(OutboxId::MAX);
                for missing in (known + 1).max(id - ask_limit)..id {
                    self.skipped.insert(missing, now);
                }
            }
            self.past = id;
        }
        while self.skipped.len() > ASK_LIMIT {
            self.skipped.pop_first();
        }
    }

    /// Of the ids that a [`Question`] asked for again, the refused ones that are not among those it found, in order: somebody deleted their
    /// rows. They are asked for no more.
    pub fn gone(&mut self, asked: &[OutboxId], found: &[OutboxId]) -> Vec<OutboxId> {
        let missing = asked.iter().filter(|id| found.binary_search(id).is_err());
        missing.filter(|id| self.refused.remove(id).is_some()).copied().collect()
    }

    /// The ids that a sweep found. One that found everything there was is over; one that did not goes on. Returns those of them that a
    /// question found meanwhile: they are under way, or were already settled.
    pub fn swept(&mut self, ids: &[OutboxId], found_all: bool, took: Duration, now: Instant) -> HashSet<OutboxId> {
        for id in ids {
            self.skipped.remove(id);
        }
        let mut pause = Duration::ZERO;
        if found_all {
            self.rest = (2 * self.rest).min(SWEEP_INTERVAL);
            pause = self.rest.max(took * SWEEP_REST);
        }
        match std::mem::replace(&mut self.sweep, Sweep::Due(now + pause)) {
            Sweep::UnderWay(found) => found,
            Sweep::Due(_) => HashSet::new(),
        }
    }

    /// The broker did not take this one: ask for it again, later each time.
    pub fn refused(&mut self, id: OutboxId, now: Instant) {
        let times = self.refused.get(&id).map_or(0, |refused| refused.times);
        let delay = RESEND_AFTER.saturating_mul(1 << times.min(6)).min(RESEND_AFTER_AT_MOST);
        self.refused.insert(id, Refused { due: Some(now + delay), times: times + 1 });
    }

    /// The broker took this one.
    pub fn confirmed(&mut self, id: OutboxId) {
        self.refused.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(cursor: &mut Cursor, now: Instant) -> (OutboxId, Vec<OutboxId>) {
        let Question { past, again, .. } = cursor.question(now);
        (past, again)
    }

    #[test]
    fn a_skipped_id_is_asked_for_until_it_comes() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1, 2, 5], now);
        assert_eq!(next(&mut cursor, now), (5, vec![3, 4]));
        cursor.found(&[3, 6], now);
        assert_eq!(next(&mut cursor, now), (6, vec![4]));
    }

    #[test]
    fn the_very_first_id_may_come_late_too() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[3], now);
        assert_eq!(next(&mut cursor, now), (3, vec![1, 2]));
    }

    #[test]
    fn ids_given_out_before_the_start_are_left_to_the_sweep_and_later_ones_are_not() {
        let now = Instant::now();
        let mut cursor = Cursor::new(100, now);
        cursor.found(&[103], now);
        assert_eq!(next(&mut cursor, now), (103, vec![101, 102]));
        let mut cursor = Cursor::new(100, now);
        cursor.found(&[90], now);
        assert_eq!(next(&mut cursor, now), (90, vec![]));
    }

    /// Another instance may still be about to commit them.
    #[test]
    fn ids_given_out_before_the_start_are_asked_for_above_the_first_one_that_was_read() {
        let now = Instant::now();
        let mut cursor = Cursor::new(100, now);
        cursor.found(&[50], now);
        cursor.found(&[101], now);
        assert_eq!(next(&mut cursor, now), (101, (51..=100).collect()));
        assert_eq!(cursor.place(102), Place::Beyond);
    }

    #[test]
    fn an_id_is_next_when_everything_before_it_was_read() {
        use Place::{Beyond, Next, Read};
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        assert_eq!([1, 2].map(|id| cursor.place(id)), [Next, Beyond]);
        cursor.found(&[1, 3], now);
        assert_eq!([1, 2, 3, 4].map(|id| cursor.place(id)), [Read, Beyond, Read, Beyond]);
        cursor.found(&[2], now);
        assert_eq!([2, 3, 4, 5].map(|id| cursor.place(id)), [Read, Read, Next, Beyond]);
    }

    #[test]
    fn reading_on_stops_while_too_many_are_refused() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        for id in 1..=REFUSED_LIMIT as OutboxId {
            cursor.refused(id, now);
        }
        assert!(!cursor.question(now).read_on);
        assert_eq!(cursor.place(1), Place::Beyond);
        cursor.confirmed(1);
        assert!(cursor.question(now).read_on);
    }

    #[test]
    fn the_list_of_skipped_ids_is_bounded() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1, 1_000_000_000, 1_000_000_500, 1_000_001_500], now);
        assert_eq!(next(&mut cursor, now).1.len(), ASK_LIMIT);
    }

    #[test]
    fn what_was_refused_is_asked_for_however_much_was_skipped() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1, 2000], now);
        cursor.refused(1, now);
        let Question { again, resends, .. } = cursor.question(now + RESEND_AFTER);
        assert!(again.contains(&1) && resends, "{again:?}");
    }

    #[test]
    fn a_sweep_comes_now_and_then_and_goes_on_until_it_is_through() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[7], now);
        let later = now + FIRST_SWEEP;
        assert_eq!(cursor.begin_sweep(now), None);
        assert_eq!(cursor.begin_sweep(later), Some(7));
        assert_eq!(cursor.begin_sweep(later), None, "one is under way");
        cursor.swept(&[], false, Duration::ZERO, later);
        assert_eq!(cursor.begin_sweep(later), Some(7));
        cursor.swept(&[], true, Duration::ZERO, later);
        assert_eq!(cursor.begin_sweep(later + FIRST_SWEEP), None);
        assert_eq!(cursor.begin_sweep(later + 2 * FIRST_SWEEP), Some(7));
    }

    /// It may be older than what is read on meanwhile, and of the same user.
    #[test]
    fn what_was_skipped_is_asked_for_while_a_sweep_is_under_way_and_comes_once() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1, 5], now);
        cursor.refused(1, now);
        let later = now + RESEND_AFTER.max(FIRST_SWEEP);
        assert_eq!(cursor.begin_sweep(later), Some(5));
        assert_eq!(next(&mut cursor, later), (5, vec![1, 2, 3, 4]));
        cursor.found(&[2, 6], later);
        assert_eq!(next(&mut cursor, later), (6, vec![1, 3, 4]));
        assert_eq!(cursor.swept(&[2, 3], true, Duration::ZERO, later), HashSet::from([2]));
        assert_eq!(next(&mut cursor, later), (6, vec![1, 4]));
        cursor.found(&[4], later);
        assert_eq!(cursor.swept(&[4], true, Duration::ZERO, later), HashSet::new(), "no sweep was under way");
    }

    #[test]
    fn a_sweep_rests_longer_each_time_and_longer_than_it_took() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        for _ in 0..10 {
            cursor.swept(&[], true, Duration::ZERO, now);
        }
        assert!(matches!(cursor.sweep, Sweep::Due(due) if due == now + SWEEP_INTERVAL));
        cursor.swept(&[], true, Duration::from_secs(1), now);
        assert!(matches!(cursor.sweep, Sweep::Due(due) if due == now + Duration::from_secs(50)));
    }

    #[test]
    fn what_a_sweep_found_is_not_asked_for_again() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[3], now);
        cursor.swept(&[1], true, Duration::ZERO, now);
        assert_eq!(next(&mut cursor, now), (3, vec![2]));
    }

    #[test]
    fn a_refused_message_whose_row_is_gone_is_asked_for_once() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1, 2, 4], now);
        cursor.refused(1, now);
        cursor.refused(2, now);
        let later = now + RESEND_AFTER;
        let Question { again, .. } = cursor.question(later);
        assert_eq!(again, [1, 2, 3]);
        assert_eq!(cursor.gone(&again, &[2, 5]), [1]);
        let Question { again, resends, .. } = cursor.question(later);
        assert_eq!((again, resends), (vec![2, 3], true));
    }

    #[test]
    fn a_refused_message_waits_longer_each_time() {
        let now = Instant::now();
        let mut cursor = Cursor::new(0, now);
        cursor.found(&[1], now);
        cursor.refused(1, now);
        assert!(next(&mut cursor, now).1.is_empty());
        let later = now + RESEND_AFTER;
        assert_eq!(next(&mut cursor, later).1, [1]);
        cursor.found(&[1], later);
        assert!(next(&mut cursor, later).1.is_empty(), "it is under way");
        cursor.refused(1, later);
        assert!(next(&mut cursor, later + RESEND_AFTER).1.is_empty());
        assert_eq!(next(&mut cursor, later + 2 * RESEND_AFTER).1, [1]);
        cursor.confirmed(1);
        assert!(next(&mut cursor, later + 2 * RESEND_AFTER).1.is_empty());
    }
}
