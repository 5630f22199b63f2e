//! Connections: how many there may be, and which one goes when there are too many.
//!
//! Promise: who only holds a connection open, with half a request, half a body or an unread answer, keeps nobody out: near
//! the cap those go first who have kept us waiting longest. A request that we are at work on is never cut for another.
//! Not here, on purpose: bytes (see `wire`).

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// Of the connections at the cap, the share that one look at all of them finds to be next.
const NEXT_SHARE: usize = 64;
/// The share of the cap that is kept free for those who come next.
const FREE_SHARE: usize = 64;
/// Of those that are to go for that, the share that is cut each [`TICK`]: a hundred that end at once, and come back at once, would hold
/// up everybody else.
const TICK_SHARE: usize = 16;
const TICK: Duration = Duration::from_millis(1);
/// Who has kept us waiting for less is not cut: a request may be on its way.
const GRACE: Duration = Duration::from_millis(250);
/// In place of a time: it is the client who waits.
const AT_WORK: u64 = u64::MAX;
/// In place of a time: the connection is cut.
const CUT: u64 = u64::MAX - 1;

/// All connections of the process.
pub struct Connections {
    cap: usize,
    began: Instant,
    open: Mutex<Open>,
    /// There are more than there should be.
    crowded: Notify,
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
    /// Counts the connections of the process.
    pub number: u64,
    pub seat: Arc<Seat>,
}

impl Connections {
    pub fn new(cap: usize) -> Arc<Self> {
        Arc::new(Self { cap, began: Instant::now(), open: Mutex::default(), crowded: Notify::new() })
    }

    /// Gives a new connection its seat; `None` when there is no room, as all the others are at work.
    pub fn admit(self: &Arc<Self>) -> Option<Seated> {
        let now_ms = since(self.began);
        let mut open = self.open();
        if open.seats.len() >= self.cap && !open.cut_oldest(now_ms, self.next_share()) {
            return None;
        }
        let number = open.next_number;
        open.next_number += 1;
        let seat = Arc::new(Seat { began: self.began, waiting_since_ms: now_ms.into(), cut: CancellationToken::new() });
        open.seats.insert(number, seat.clone());
        if open.seats.len() > self.enough() {
            self.crowded.notify_one();
        }
        Some(Seated { connections: self.clone(), number, seat })
    }

    /// Keeps room for those who come next, as long as it is polled.
    pub async fn keep_room(&self) {
        loop {
            self.crowded.notified().await;
            while self.cut_some(since(self.began)) {
                sleep(TICK).await;
            }
        }
    }

    /// Cuts some of those who are too many. False when there are none, or nobody who could go.
    fn cut_some(&self, now_ms: u64) -> bool {
        let mut open = self.open();
        let too_many = open.seats.len().saturating_sub(self.enough());
        let some = too_many.div_ceil(TICK_SHARE);
        some > 0 && (0..some).all(|_| open.cut_oldest(now_ms, self.next_share()))
    }

    /// As many as leave room.
    fn enough(&self) -> usize {
        self.cap - self.cap / FREE_SHARE
    }

    fn next_share(&self) -> usize {
        (self.cap / NEXT_SHARE).max(1)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
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
            if let Some(seat) = self.seats.get(&number).filter(|seat| seat.is_cut_if_waiting_since(since_ms)) {
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
            .filter(|(since_ms, _)| !matches!(*since_ms, AT_WORK | CUT))
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
    /// From now on the client waits for us, until what is returned is dropped. `None` when its connection was cut at this moment, and
    /// whatever it asks for must not be begun.
    pub fn at_work(self: &Arc<Self>) -> Option<AtWork> {
        self.turns_to(AT_WORK).then(|| AtWork(self.clone()))
    }

    /// From now on we wait for the client, who has more to send, until what is returned is dropped.
    pub fn waiting(self: &Arc<Self>) -> Waiting {
        self.turns_to(since(self.began));
        Waiting(self.clone())
    }

    /// False when it is cut, which it stays.
    fn turns_to(&self, now: u64) -> bool {
        let unless_cut = |before| (before != CUT).then_some(now);
        self.waiting_since_ms.fetch_update(Ordering::Relaxed, Ordering::Relaxed, unless_cut).is_ok()
    }

    /// A request that begins at the same moment comes before this, and is served, or after it, and is not begun.
    fn is_cut_if_waiting_since(&self, since_ms: u64) -> bool {
        self.waiting_since_ms.compare_exchange(since_ms, CUT, Ordering::Relaxed, Ordering::Relaxed).is_ok()
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
        self.0.turns_to(since(self.0.began));
    }
}

#[must_use]
pub struct Waiting(Arc<Seat>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.turns_to(AT_WORK);
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.connections.open().seats.remove(&self.number);
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
        let seated = connections.admit().unwrap();
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
    fn who_is_cut_is_at_work_no_more() {
        let connections = Connections::new(1);
        let seated = seated(&connections, 100);
        assert!(connections.open.lock().unwrap().cut_oldest(1000, 1));
        assert!(seated.seat.at_work().is_none());
        drop(seated.seat.waiting());
        assert!(seated.seat.at_work().is_none(), "it stays so");
    }

    #[test]
    fn nobody_is_let_in_over_the_cap() {
        let connections = Connections::new(2);
        let held = [seated(&connections, AT_WORK), seated(&connections, AT_WORK)];
        assert!(connections.admit().is_none());
        drop(held);
        assert!(connections.admit().is_some());
    }

    #[test]
    fn room_is_kept_free_a_little_at_a_time() {
        let connections = Connections::new(2048);
        let held: Vec<Seated> = (0..2048).map(|_| seated(&connections, 0)).collect();
        let cut = || held.iter().filter(|seated| seated.seat.cut.is_cancelled()).count();
        assert!(!connections.cut_some(100) && cut() == 0, "too soon for everybody");
        assert!(connections.cut_some(1000) && cut() == 2);
        assert!(connections.cut_some(1000) && cut() == 4);
        while connections.cut_some(1000) {}
        assert_eq!(cut(), 32);
    }

    #[tokio::test]
    async fn whoever_is_one_too_many_has_room_made() {
        let began = Instant::now() - GRACE;
        let connections = Arc::new(Connections { cap: 64, began, open: Mutex::default(), crowded: Notify::new() });
        let held: Vec<Seated> = (0..63).map(|_| seated(&connections, 0)).collect();
        let cut = || held.iter().filter(|seated| seated.seat.cut.is_cancelled()).count();
        let mut keeping = Box::pin(connections.keep_room());
        assert!(futures_util::poll!(&mut keeping).is_pending() && cut() == 0);
        let _one_more = connections.admit();
        assert!(futures_util::poll!(&mut keeping).is_pending() && cut() == 1);
    }

    #[test]
    fn it_is_known_who_waits_for_whom() {
        let connections = Connections::new(1);
        let seated = connections.admit().unwrap();
        let waits = || seated.seat.waiting_since_ms.load(Ordering::Relaxed) != AT_WORK;
        assert!(waits(), "for the first request");
        let at_work = seated.seat.at_work().unwrap();
        assert!(!waits());
        let waiting = seated.seat.waiting();
        assert!(waits(), "for a body");
        drop(waiting);
        assert!(!waits());
        drop(at_work);
        assert!(waits(), "for the answer to be read");
    }
}
