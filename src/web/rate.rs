//! Rate: a token bucket per client, and one per address that asks with wrong keys.
//!
//! Promise: over any time nobody is served more than `burst` + `per_second` x seconds; what is kept of anybody is one number, and of how
//! many is bounded.
//! Not here, on purpose: a crate. Those there are take each price in advance, and have one rate for all keys; an answer's price is
//! known when it is there, and may leave the bucket in debt.

use std::{
    borrow::Borrow,
    collections::HashMap,
    fmt,
    hash::Hash,
    num::NonZeroU32,
    str::FromStr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two searches for buckets that are full again, and need not be kept.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// A debt is paid off after so many times what fills an empty bucket, however much was charged.
const DEEPEST_DEBT: u32 = 1;

/// Tokens: so many a second, and so many at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub per_second: NonZeroU32,
    pub burst: NonZeroU32,
}

impl Rate {
    pub const fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        Self { per_second, burst }
    }

    /// Until so many tokens have come in.
    fn time(self, tokens: u32) -> Duration {
        Duration::from_nanos(1_000_000_000 * u64::from(tokens) / u64::from(self.per_second.get()))
    }

    /// Until an empty bucket is full.
    pub fn window(self) -> Duration {
        self.time(self.burst.get())
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.per_second, self.burst)
    }
}

impl FromStr for Rate {
    type Err = &'static str;

    /// `PER_SECOND/BURST`, or `PER_SECOND`, which may come at once after two seconds' rest.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "expected requests a second and at once, such as 100 or 100/500, each from 1 to 1000000";
        let (per_second, burst) = text.split_once('/').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let number = |text: &str| text.parse().ok().filter(|number: &NonZeroU32| number.get() <= 1_000_000);
        let per_second = number(per_second).ok_or(WRONG)?;
        let burst = burst.map_or_else(|| Some(per_second.saturating_mul(TWO)), number).ok_or(WRONG)?;
        Ok(Self { per_second, burst })
    }
}

const TWO: NonZeroU32 = NonZeroU32::new(2).expect("it is not 0");

/// What a bucket holds after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub left: u32,
    /// Until it is full again; after a refusal, until the request would be let through.
    pub wait: Duration,
}

/// A bucket is the time at which it is full again, if nothing more is taken (the "generic cell rate algorithm").
#[derive(Debug, Clone, Copy)]
struct Bucket {
    full_at: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { full_at: now }
    }

    fn missing(self, now: Instant) -> Duration {
        self.full_at.saturating_duration_since(now)
    }

    fn take(&mut self, now: Instant, rate: Rate) -> Result<Standing, Standing> {
        let missing = self.missing(now) + rate.time(1);
        if missing > rate.window() {
            return Err(Standing { left: 0, wait: missing - rate.window() });
        }
        self.full_at = now + missing;
        Ok(self.standing(now, rate))
    }

    /// Takes what is owed, whether it is there or not.
    fn charge(&mut self, now: Instant, rate: Rate, tokens: u32) {
        let deepest = rate.window() * (1 + DEEPEST_DEBT);
        self.full_at = now + (self.missing(now) + rate.time(tokens)).min(deepest);
    }

    fn standing(self, now: Instant, rate: Rate) -> Standing {
        let missing = self.missing(now);
        let there = rate.window().saturating_sub(missing);
        let left = there.as_nanos() * u128::from(rate.per_second.get()) / 1_000_000_000;
        Standing { left: u32::try_from(left).unwrap_or(u32::MAX), wait: missing }
    }
}

/// Buckets by name. Whoever is not known has a full one.
pub struct Buckets<K> {
    kept: Mutex<Kept<K>>,
    /// How many are kept. More names than that at the same time share one bucket.
    limit: usize,
}

struct Kept<K> {
    buckets: HashMap<K, Bucket>,
    of_all_others: Bucket,
    swept: Instant,
}

impl<K> Kept<K> {
    /// Whether there is no room for another, after what is not needed any more is gone.
    fn is_full(&mut self, limit: usize, now: Instant) -> bool {
        if self.buckets.len() >= limit && now.saturating_duration_since(self.swept) >= SWEEP_EVERY {
            self.swept = now;
            self.buckets.retain(|_, bucket| bucket.full_at > now);
        }
        self.buckets.len() >= limit
    }
}

impl<K: Hash + Eq> Buckets<K> {
    pub fn new(limit: usize, now: Instant) -> Self {
        let kept = Kept { buckets: HashMap::new(), of_all_others: Bucket::full(now), swept: now };
        Self { kept: Mutex::new(kept), limit }
    }

    /// Takes one token.
    ///
    /// # Errors
    /// When there is none.
    pub fn take<Q>(&self, name: &Q, rate: Rate, now: Instant) -> Result<Standing, Standing>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.with(name, now, |bucket| bucket.take(now, rate))
    }

    /// Gives back a token that was taken.
    pub fn give_back<Q>(&self, name: &Q, rate: Rate, now: Instant)
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.with(name, now, |bucket| bucket.full_at = now + bucket.missing(now).saturating_sub(rate.time(1)));
    }

    /// Takes more, and goes into debt for it.
    pub fn charge<Q>(&self, name: &Q, rate: Rate, tokens: u32, now: Instant) -> Standing
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.with(name, now, |bucket| {
            bucket.charge(now, rate, tokens);
            bucket.standing(now, rate)
        })
    }

    fn with<Q, T>(&self, name: &Q, now: Instant, act: impl FnOnce(&mut Bucket) -> T) -> T
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = kept.buckets.get_mut(name) {
            return act(bucket);
        }
        if kept.is_full(self.limit, now) {
            return act(&mut kept.of_all_others);
        }
        act(kept.buckets.entry(name.to_owned()).or_insert(Bucket::full(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(text: &str) -> Rate {
        text.parse().unwrap()
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_is_written_as_a_second_and_at_once() {
        assert_eq!(rate("100").to_string(), "100/200");
        assert_eq!(rate("100/7").to_string(), "100/7");
        for wrong in ["", "0", "100/0", "/5", "5/", "-1", "1.5", "1000001", "1/2/3"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn nobody_is_served_more_than_burst_and_rate_allow() {
        let (began, rate) = (Instant::now(), rate("10/30"));
        let buckets = Buckets::<String>::new(8, began);
        // Ever so often, and in any rhythm.
        for step_ms in [0, 1, 7, 99, 100, 101, 350] {
            let name = step_ms.to_string();
            let mut served = 0;
            for n in 0..2000 {
                let now = began + MS * step_ms * n;
                served += u32::from(buckets.take(name.as_str(), rate, now).is_ok());
                assert!(served <= 30 + (step_ms * n) / 100, "{served} after {} ms", step_ms * n);
            }
            let lasted_ms = step_ms * 1999;
            let due = (30 + lasted_ms / 100).min(2000);
            assert!(served >= due - 1, "{served} of {due}: nobody is cheated either");
        }
    }

    #[test]
    fn a_refusal_says_when_to_come_again() {
        let (began, rate) = (Instant::now(), rate("2/2"));
        let buckets = Buckets::<String>::new(8, began);
        assert_eq!(buckets.take("a", rate, began), Ok(Standing { left: 1, wait: MS * 500 }));
        assert_eq!(buckets.take("a", rate, began), Ok(Standing { left: 0, wait: MS * 1000 }));
        assert_eq!(buckets.take("a", rate, began), Err(Standing { left: 0, wait: MS * 500 }));
        assert!(buckets.take("a", rate, began + MS * 499).is_err(), "and refusals cost nothing");
        assert!(buckets.take("a", rate, began + MS * 500).is_ok());
        assert!(buckets.take("b", rate, began).is_ok(), "others are not affected");
    }

    #[test]
    fn what_is_charged_afterwards_is_paid_off_and_never_drowns() {
        let (began, rate) = (Instant::now(), rate("10/10"));
        let buckets = Buckets::<String>::new(8, began);
        assert_eq!(buckets.charge("a", rate, 15, began), Standing { left: 0, wait: MS * 1500 });
        assert_eq!(buckets.take("a", rate, began), Err(Standing { left: 0, wait: MS * 600 }));
        assert!(buckets.take("a", rate, began + MS * 600).is_ok());
        buckets.charge("b", rate, 1_000_000, began);
        assert!(buckets.take("b", rate, began + MS * 1100).is_ok());
    }

    #[test]
    fn however_many_names_there_are_few_are_kept() {
        let (began, rate) = (Instant::now(), rate("1/2"));
        let buckets = Buckets::<String>::new(100, began);
        let ask = |n: u32, now| buckets.take(n.to_string().as_str(), rate, now).is_ok();
        let served = (0..10_000).filter(|n| ask(*n, began)).count();
        assert_eq!(served, 102, "the hundred, and two of all others");
        assert_eq!(buckets.kept.lock().unwrap().buckets.len(), 100);
        // Those who rested are forgotten, and there is room for others.
        assert!((0..100).all(|n| ask(20_000 + n, began + MS * 2000)));
        assert_eq!(buckets.kept.lock().unwrap().buckets.len(), 100);
    }
}
