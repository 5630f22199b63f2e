//! Connections: how many there may be, and which one goes when there are too many.
//!
//! Promise: who only holds a connection open, with half a request, half a body or an unread answer, keeps nobody out: at the cap
//! those go first who have kept us waiting longest. A request that we are at work on is never cut for another.
//! Not here, on purpose: bytes (see `wire`).

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

/// Of the connections at the cap, the share that one look at all of them finds to be next. They are cut one by one, as room is needed: a
/// hundred that end at once, and come back at once, would hold up everybody else.
const NEXT_SHARE: usize = 64;
/// Who has kept us waiting for less is not cut: a request may be on its way.
const GRACE: Duration = Duration::from_millis(250);
/// In place of a time: it is the client who waits.
const AT_WORK: u64 = u64::MAX;

/// All connections of the process.
pub struct Connections {
    cap: usize,
    began: Instant,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    seats: HashMap<u64, Arc<Seat>>,
    next_number: u64,
    /// Since when they have kept us waiting, and who they are: the longest first. Whoever has said something since is not meant.
    next_to_go: VecDeque<(u64, u64)>,
    /// Nobody can have to go before.
    nobody_until_ms: u64,
}

/// One connection: since when we wait for its client, and a way to end it.
pub struct Seat {
    began: Instant,
    waiting_since_ms: AtomicU64,
    cut: CancellationToken,
}

/// Keeps a connection counted for as long as it lives.
pub struct Seated {
    connections: Arc<Connections>,
    number: u64,
    pub seat: Arc<Seat>,
}

/// What became of a new connection.
pub struct Admission {
    /// `None` when there is no room, as all the others are at work.
    pub seated: Option<Seated>,
    /// Whether another was cut to make room.
    pub cut: bool,
}

impl Connections {
    pub fn new(cap: usize) -> Arc<Self> {
        Arc::new(Self { cap, began: Instant::now(), open: Mutex::default() })
    }

    pub fn admit(self: &Arc<Self>) -> Admission {
        let now_ms = since(self.began);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = open.seats.len() >= self.cap && open.cut_oldest(now_ms, (self.cap / NEXT_SHARE).max(1));
        if open.seats.len() >= self.cap {
            return Admission { seated: None, cut };
        }
        let number = open.next_number;
        open.next_number += 1;
        let cut_it = CancellationToken::new();
        let seat = Arc::new(Seat { began: self.began, waiting_since_ms: now_ms.into(), cut: cut_it });
        open.seats.insert(number, seat.clone());
        Admission { seated: Some(Seated { connections: self.clone(), number, seat }), cut }
    }
}

impl Open {
    /// Cuts the one who has kept us waiting longest, if anybody has. It is counted no more, though its task ends a moment later.
    fn cut_oldest(&mut self, now_ms: u64, share: usize) -> bool {
        if self.cut_next() {
            return true;
        }
        if now_ms >= self.nobody_until_ms {
            self.look_for_next(now_ms, share);
        }
        self.cut_next()
    }

    fn cut_next(&mut self) -> bool {
        while let Some((since_ms, number)) = self.next_to_go.pop_front() {
            let is_waiting = |seat: &&Arc<Seat>| seat.waiting_since_ms.load(Ordering::Relaxed) == since_ms;
            if let Some(seat) = self.seats.get(&number).filter(is_waiting) {
                seat.cut.cancel();
                self.seats.remove(&number);
                return true;
            }
        }
        false
    }

    /// A look at all seats, for the `share` who have waited longest. It stays true that nobody has waited longer than these.
    fn look_for_next(&mut self, now_ms: u64, share: usize) {
        let mut waiting: Vec<(u64, u64)> = self
            .seats
            .iter()
            .map(|(number, seat)| (seat.waiting_since_ms.load(Ordering::Relaxed), *number))
            .filter(|(since_ms, _)| *since_ms != AT_WORK)
            .collect();
        if waiting.len() > share {
            waiting.select_nth_unstable(share);
            waiting.truncate(share);
        }
        waiting.sort_unstable();
        let patience_ms = GRACE.as_millis() as u64;
        // Who is served now begins to keep us waiting now at the earliest.
        self.nobody_until_ms = waiting.first().map_or(now_ms, |(since_ms, _)| *since_ms) + patience_ms;
        waiting.retain(|(since_ms, _)| now_ms.saturating_sub(*since_ms) >= patience_ms);
        self.next_to_go = waiting.into();
    }
}

impl Seat {
    /// From now on the client waits for us, until what is returned is dropped.
    pub fn at_work(self: &Arc<Self>) -> AtWork {
        self.waiting_since_ms.store(AT_WORK, Ordering::Relaxed);
        AtWork(self.clone())
    }

    /// From now on we wait for the client, who has more to send, until what is returned is dropped.
    pub fn waiting(self: &Arc<Self>) -> Waiting {
        self.waiting_since_ms.store(since(self.began), Ordering::Relaxed);
        Waiting(self.clone())
    }

    /// Waits until the connection is to end, for the sake of another.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }
}

#[must_use]
pub struct AtWork(Arc<Seat>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.waiting_since_ms.store(since(self.0.began), Ordering::Relaxed);
    }
}

#[must_use]
pub struct Waiting(Arc<Seat>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting_since_ms.store(AT_WORK, Ordering::Relaxed);
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.seats.remove(&self.number);
    }
}

fn since(began: Instant) -> u64 {
    began.elapsed().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As if these seats had been waiting since then.
    fn seated(connections: &Arc<Connections>, waiting_since_ms: u64) -> Seated {
        let seated = connections.admit().seated.unwrap();
        seated.seat.waiting_since_ms.store(waiting_since_ms, Ordering::Relaxed);
        seated
    }

    #[test]
    fn who_kept_us_waiting_longest_goes_first_and_who_is_served_stays() {
        let connections = Connections::new(4);
        let held = [500, AT_WORK, 100, 900].map(|since_ms| seated(&connections, since_ms));
        let is_cut = |place: usize| held[place].seat.cut.is_cancelled();
        let mut open = connections.open.lock().unwrap();
        assert!(open.cut_oldest(1000, 1) && is_cut(2) && !is_cut(0));
        assert!(open.cut_oldest(1000, 3) && is_cut(0));
        assert!(!open.cut_oldest(1000, 3), "one is served, and one came just now");
        assert!(!open.cut_oldest(1149, 3));
        assert!(open.cut_oldest(1150, 3) && is_cut(3));
        assert!(!open.cut_oldest(9000, 3) && !is_cut(1));
        drop(open);
        drop(held);
        assert!(connections.open.lock().unwrap().seats.is_empty());
    }

    #[test]
    fn who_was_next_and_has_said_something_since_is_spared() {
        let connections = Connections::new(3);
        let held = [100, 200, 300].map(|since_ms| seated(&connections, since_ms));
        let is_cut = |place: usize| held[place].seat.cut.is_cancelled();
        let mut open = connections.open.lock().unwrap();
        assert!(open.cut_oldest(1000, 3) && is_cut(0));
        held[1].seat.waiting_since_ms.store(AT_WORK, Ordering::Relaxed);
        assert!(open.cut_oldest(1000, 3) && is_cut(2));
        held[1].seat.waiting_since_ms.store(1000, Ordering::Relaxed);
        assert!(!open.cut_oldest(1249, 3) && open.cut_oldest(1250, 3) && is_cut(1));
    }

    #[test]
    fn nobody_is_let_in_over_the_cap() {
        let connections = Connections::new(2);
        let held = [seated(&connections, AT_WORK), seated(&connections, AT_WORK)];
        assert!(connections.admit().seated.is_none());
        drop(held);
        assert!(connections.admit().seated.is_some());
    }

    #[test]
    fn it_is_known_who_waits_for_whom() {
        let connections = Connections::new(1);
        let seated = connections.admit().seated.unwrap();
        let waits = || seated.seat.waiting_since_ms.load(Ordering::Relaxed) != AT_WORK;
        assert!(waits(), "for the first request");
        let at_work = seated.seat.at_work();
        assert!(!waits());
        let waiting = seated.seat.waiting();
        assert!(waits(), "for a body");
        drop(waiting);
        assert!(!waits());
        drop(at_work);
        assert!(waits(), "for the answer to be read");
    }
}
