//! Pace: how many users are asked about at once, and when none.
//!
//! Promise: when the service asks to be left alone, or does not answer, everybody waits together.
//! Not here, on purpose: an end to patience. Whoever started the import may end it.

use std::{
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep_until},
};
use uuid::Uuid;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// However long an answer asks to wait: somebody looks at this.
const LONGEST_WISH: Duration = Duration::from_secs(120);

pub struct Pace {
    places: Semaphore,
    rest: Mutex<Rest>,
    answers: AtomicU64,
    /// When somebody first asked: lines may be long in coming.
    began: OnceLock<Instant>,
}

struct Rest {
    until: Instant,
    /// The pause after the next failure.
    next: Duration,
    /// What the service said instead of an answer, and since when.
    trouble: Option<(String, Instant)>,
}

impl Pace {
    pub fn new(concurrency: usize) -> Self {
        let rest = Rest { until: Instant::now(), next: FIRST_PAUSE, trouble: None };
        Self {
            places: Semaphore::new(concurrency),
            rest: rest.into(),
            answers: AtomicU64::new(0),
            began: OnceLock::new(),
        }
    }

    /// Waits for places among those who are asked about, one for each of so many users, and for the end of a rest.
    pub async fn turn(&self, users: usize) -> SemaphorePermit<'_> {
        let users = u32::try_from(users).expect("a batch is not so large");
        let place = self.places.acquire_many(users).await.expect("it is never closed");
        self.began.get_or_init(Instant::now);
        loop {
            let until = self.rest().until;
            if Instant::now() >= until {
                return place;
            }
            sleep_until(until).await;
        }
    }

    /// An answer came.
    pub fn well(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
        let mut rest = self.rest();
        if rest.trouble.take().is_some() {
            rest.next = FIRST_PAUSE;
        }
    }

    /// Nobody asks for a while, and at least for `wish`.
    pub fn hold(&self, trouble: &str, wish: Duration) {
        let now = Instant::now();
        let mut rest = self.rest();
        let since = rest.trouble.as_ref().map_or(now, |(_, since)| *since);
        rest.trouble = Some((trouble.to_owned(), since));
        // Those who asked at the same time as the first who failed say the same thing, and not one more.
        if now >= rest.until {
            rest.until = now + jittered(rest.next);
            rest.next = (rest.next * 2).min(LONGEST_PAUSE);
        }
        rest.until = rest.until.max(now + wish.min(LONGEST_WISH));
    }

    /// What is in the way, and for how long already.
    pub fn trouble(&self) -> Option<(String, Duration)> {
        self.rest().trouble.as_ref().map(|(trouble, since)| (trouble.clone(), since.elapsed()))
    }

    /// Nothing has answered yet, so long since somebody first asked.
    pub fn unanswered(&self) -> Duration {
        let began = self.began.get().filter(|_| self.answers() == 0);
        began.map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Answers that anybody got.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Between half of it and all of it, so that importers who met the same outage do not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = f64::from(Uuid::new_v4().as_bytes()[0]) / 255.0;
    pause.mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test]
    async fn all_wait_for_as_long_as_one_was_asked_to() {
        let pace = Pace::new(8);
        let began = Instant::now();
        let asked = Duration::from_millis(300);
        pace.hold("503 overloaded", asked);
        pace.hold("503 overloaded", Duration::ZERO);
        let (_one, _other) = tokio::join!(pace.turn(1), pace.turn(7));
        assert!(began.elapsed() >= asked && pace.trouble().is_some());
        pace.well();
        assert_eq!(pace.trouble(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_waited_for_before_somebody_asked() {
        let pace = Pace::new(8);
        advance(Duration::from_secs(60)).await;
        assert_eq!(pace.unanswered(), Duration::ZERO);
        let _place = pace.turn(1).await;
        advance(Duration::from_secs(7)).await;
        assert_eq!(pace.unanswered(), Duration::from_secs(7));
        pace.well();
        assert_eq!(pace.unanswered(), Duration::ZERO);
    }

    #[test]
    fn many_failures_at_once_count_as_one() {
        let pace = Pace::new(8);
        for _ in 0..50 {
            pace.hold("no connection", Duration::ZERO);
        }
        assert!(pace.rest().until <= Instant::now() + FIRST_PAUSE);
        pace.hold("429", Duration::from_secs(1_000_000));
        assert!(pace.rest().until <= Instant::now() + LONGEST_WISH);
    }
}
