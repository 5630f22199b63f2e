//! Meter: what a request costs its client, and what the answer says about it.
//!
//! Promise: every answer to a limited client, once it is known who asks, says what is left, in the fields of
//! draft-ietf-httpapi-ratelimit-headers-11; who has nothing left hears 429 and when to come again. Who asks with wrong keys is held back by
//! address, before a key is looked up.
//! Not here, on purpose: who the client is (see `clients`).

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, header};

use super::{
    Code, Problem,
    rate::{Buckets, Rate, Standing},
    traffic::Traffic,
};

const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// A request costs a token, and each such part of its answer beyond the first one more: pages and batches cost what they move.
const BYTES_PER_TOKEN: u64 = 64 * 1024;
/// Clients that are not at rest: more than any deployment has.
const CLIENTS: usize = 10_000;
/// Addresses that sent a wrong key lately. About 3 MiB; an attacker with more than that shares one bucket with himself.
const ADDRESSES: usize = 50_000;
/// Wrong keys from one address. Enough for a fleet behind one address that starts with an old key, and for no guesser.
const WRONG_KEYS: Rate = match (NonZeroU32::new(10), NonZeroU32::new(100)) {
    (Some(per_second), Some(burst)) => Rate::new(per_second, burst),
    _ => unreachable!(),
};

/// Goes with an answer, inside this service: tokens that it costs beside its first one and those for its length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Price(u32);

impl Price {
    /// A token for each of so many things done in one request.
    pub fn of_many(count: usize) -> Self {
        Self(u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX))
    }
}

/// The buckets of a process.
pub struct Tolls {
    /// For a client without a rate of its own. `None`: unlimited.
    default: Option<Rate>,
    clients: Buckets<Arc<str>>,
    addresses: Buckets<IpAddr>,
    traffic: Traffic,
}

impl Tolls {
    pub fn new(default: Option<Rate>, traffic: Traffic) -> Self {
        let now = Instant::now();
        let (clients, addresses) = (Buckets::new(CLIENTS, now), Buckets::new(ADDRESSES, now));
        Self { default, clients, addresses, traffic }
    }
}

/// What one request costs. In its extensions, where whoever learns who the client is finds it.
#[derive(Clone)]
pub struct Meter(Arc<Inner>);

struct Inner {
    tolls: Arc<Tolls>,
    address: Option<IpAddr>,
    client: OnceLock<(Arc<str>, Rate, Result<Standing, Standing>)>,
}

impl Meter {
    pub(super) fn new(tolls: Arc<Tolls>, address: Option<IpAddr>) -> Self {
        Self(Arc::new(Inner { tolls, address, client: OnceLock::new() }))
    }

    pub fn of(request: &Extensions) -> Option<&Self> {
        request.get()
    }

    /// Takes this request's token from its client, who may have a rate of its own.
    ///
    /// # Errors
    /// `rate_limited` when there is none.
    pub fn client(&self, name: &Arc<str>, own: Option<Rate>) -> Result<(), Problem> {
        let Some(rate) = own.or(self.0.tolls.default) else { return Ok(()) };
        let taken = self.0.tolls.clients.take(name, rate, Instant::now());
        // What is there already was taken by the same request, and says the same.
        let _ = self.0.client.set((name.clone(), rate, taken));
        taken.map(drop).map_err(|standing| {
            self.0.tolls.traffic.limited_client();
            refused("this client has sent too many requests", standing.wait)
        })
    }

    /// Takes a token for looking up a key that nobody here knows. In advance: many who guess at once wait for the same look.
    ///
    /// # Errors
    /// `rate_limited` when too many wrong ones came from this address.
    pub fn guess(&self) -> Result<(), Problem> {
        let Some(address) = &self.0.address else { return Ok(()) };
        self.0.tolls.addresses.take(address, WRONG_KEYS, Instant::now()).map(drop).map_err(|standing| {
            self.0.tolls.traffic.limited_address();
            refused("too many wrong keys came from this address", standing.wait)
        })
    }

    /// It was a right one, made a moment ago; or it cannot be told now. That costs nothing.
    pub fn no_guess(&self) {
        if let Some(address) = &self.0.address {
            self.0.tolls.addresses.give_back(address, WRONG_KEYS, Instant::now());
        }
    }

    /// Says what is left, once the answer is there and its price is known.
    pub(super) fn settle(&self, answer_bytes: u64, Price(also): Price, headers: &mut HeaderMap) {
        let Some((name, rate, taken)) = self.0.client.get() else { return };
        let more = u32::try_from(answer_bytes / BYTES_PER_TOKEN).unwrap_or(u32::MAX).saturating_add(also);
        let standing = match taken {
            Ok(_) if more > 0 => self.0.tolls.clients.charge(name, *rate, more, Instant::now()),
            Ok(standing) | Err(standing) => *standing,
        };
        let policy = format!("\"client\";q={};w={}", rate.burst, seconds(rate.window()).max(1));
        let left = format!("\"client\";r={};t={}", standing.left, seconds(standing.wait));
        for (name, value) in [(RATELIMIT_POLICY, policy), (RATELIMIT, left)] {
            headers.insert(name, HeaderValue::try_from(value).expect("digits and quotes are a valid header"));
        }
    }
}

fn refused(detail: &str, wait: Duration) -> Problem {
    let after = HeaderValue::from(seconds(wait).max(1));
    Problem::new(Code::RateLimited, detail).with_header_value(header::RETRY_AFTER, after)
}

/// Rounded up: who comes then does not come too early.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
        headers.get(name)?.to_str().ok()
    }

    #[test]
    fn an_answer_says_what_is_left_and_a_long_one_costs_more() {
        let tolls = Arc::new(Tolls::new(Some("10/30".parse().unwrap()), Traffic::default()));
        let buy = |name: &str, own: Option<Rate>, answer_bytes: u64, price: Price| {
            let (meter, mut headers) = (Meter::new(tolls.clone(), None), HeaderMap::new());
            let taken = meter.client(&name.into(), own).is_ok();
            meter.settle(answer_bytes, price, &mut headers);
            (taken, headers)
        };
        let ask = |name: &str, own: Option<Rate>, answer_bytes: u64| buy(name, own, answer_bytes, Price::default());
        let (taken, headers) = ask("a", None, 200);
        assert!(taken);
        assert_eq!(header(&headers, "ratelimit-policy"), Some("\"client\";q=30;w=3"));
        assert_eq!(header(&headers, "ratelimit"), Some("\"client\";r=29;t=1"));
        let (_, headers) = ask("a", None, 10 * BYTES_PER_TOKEN);
        let left = header(&headers, "ratelimit").unwrap();
        assert!(["\"client\";r=18;t=2", "\"client\";r=19;t=2"].contains(&left), "{left}");
        let (_, headers) = ask("a", None, 100 * BYTES_PER_TOKEN);
        assert_eq!(header(&headers, "ratelimit"), Some("\"client\";r=0;t=6"));
        let (taken, headers) = ask("a", None, 0);
        assert!(!taken);
        assert_eq!(header(&headers, "ratelimit"), Some("\"client\";r=0;t=4"));
        let (_, headers) = ask("b", Some("1/5".parse().unwrap()), 0);
        assert_eq!(header(&headers, "ratelimit"), Some("\"client\";r=4;t=1"));
        let (_, headers) = buy("b", Some("1/5".parse().unwrap()), 0, Price::of_many(3));
        assert_eq!(header(&headers, "ratelimit"), Some("\"client\";r=1;t=4"));
        let unlimited = Meter::new(Arc::new(Tolls::new(None, Traffic::default())), None);
        let mut headers = HeaderMap::new();
        assert!(unlimited.client(&"a".into(), None).is_ok());
        unlimited.settle(0, Price::default(), &mut headers);
        assert!(headers.is_empty());
    }

    #[test]
    fn wrong_keys_are_held_back_by_address() {
        let tolls = Arc::new(Tolls::new(None, Traffic::default()));
        let from = |address: &str| Meter::new(tolls.clone(), address.parse().ok());
        let guess = |address| from(address).guess().is_ok();
        for _ in 0..1000 {
            assert!(guess("192.0.2.7"));
            from("192.0.2.7").no_guess();
        }
        let guessed = (0..1000).filter(|_| guess("192.0.2.7")).count();
        assert!((100..150).contains(&guessed), "{guessed}");
        assert!(guess("192.0.2.8"), "others are not affected");
    }
}
