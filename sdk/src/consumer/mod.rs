//! Consumer: a queue of the application's own, and a handler that is called for what comes in.
//!
//! Promise: a notice is acknowledged after its work; one user's notices are handled one after the other, different users' at the same
//! time; what fails is tried again later and later, and ends as a dead letter with a reason; lost connections and deleted queues
//! heal by themselves, followed by a catch-up; a deletion is confirmed to the owner between its work and its acknowledgement.
//! Not here, on purpose: exactly once. A handler may see a notice again, after a crash for one, and must not mind.
//!
//! ```no_run
//! use tidings_sdk::{
//!     consumer::{Consumer, Failure, Handler, News},
//!     owner::Owner,
//!     subscription::Subscription,
//!     topology::Source,
//! };
//!
//! struct Badges;
//!
//! impl Handler for Badges {
//!     async fn changed(&self, news: News) -> Result<(), Failure> {
//!         let latest = news.latest().await?;
//!         // print a badge, or forget the person when `latest` is gone
//!         Ok(())
//!     }
//! }
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let owner = Owner::at("http://127.0.0.1:8080")?.with_key(&std::env::var("TIDINGS_API_KEY")?)?;
//! let source = Source { exchange: "masterdata".into(), prefix: None };
//! let mut subscription = Subscription::new("badges".parse()?);
//! subscription.keys.insert("user.*".parse()?);
//! subscription.fields.insert("full_name".parse()?);
//! let stop = tokio_util::sync::CancellationToken::new();
//! Consumer::new("amqp://localhost", source, subscription, owner)?.run(Badges, stop).await?;
//! # Ok(())
//! # }
//! ```

mod attempt;
mod handler;
mod lanes;
mod ledger;
mod memory;
mod park;
mod session;

pub use handler::{CatchUp, Dropped, Failure, Gap, Handler, News, Observer};

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder, ExponentialBuilder};
use lapin::uri::AMQPUri;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    FOREVER,
    owner::{FetchError, Owner},
    subscription::Subscription,
    topology::{self, RETRY_DELAYS, Source},
    trust::{self, Trust},
};
use handler::{BoxedCatchUp, boxed};
use memory::Memory;
use session::{Address, Ended, Session};

/// A peer that says nothing for twice this long is gone.
const HEARTBEAT_S: u16 = 10;
/// For the question whether the key is good.
const KEY_DEADLINE: Duration = Duration::from_secs(3);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
/// A session that lasted this long was a good one: the next back-off starts small again.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// A consumer to be: what it listens to, and how.
pub struct Consumer {
    broker: Address,
    source: Source,
    subscription: Subscription,
    owner: Owner,
    settings: Settings,
    catch_up: Option<BoxedCatchUp>,
    observer: Arc<dyn Observer>,
}

/// What can be set, with its defaults.
#[derive(Debug, Clone)]
struct Settings {
    declares: bool,
    prefetch: u16,
    concurrency: usize,
    handler_deadline: Duration,
    retry_delays: Vec<Duration>,
    remembered: usize,
    farewell: Duration,
    check_every: Duration,
    confirms: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            declares: true,
            prefetch: 200,
            concurrency: 16,
            handler_deadline: Duration::from_secs(30),
            retry_delays: RETRY_DELAYS.to_vec(),
            remembered: 100_000,
            farewell: Duration::from_secs(15),
            check_every: Duration::from_secs(30),
            confirms: true,
        }
    }
}

impl Settings {
    /// A registered subscription has the queues that the registry made.
    fn retry_delays(&self) -> &[Duration] {
        if self.declares { &self.retry_delays } else { &RETRY_DELAYS }
    }
}

/// Why a URL leads to no broker. It is not repeated: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidUrl {
    #[error("expected the broker's URL, such as amqp://USER:PASSWORD@HOST/VHOST")]
    NotAmqp,
    /// Without it the connection would be a plain one, password and all.
    #[error("amqps:// needs the feature \"tls\" of tidings-sdk, without which this program was built")]
    NoTls,
}

/// Why a consumer cannot begin: what waiting would not mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    #[error(transparent)]
    Topology(#[from] topology::Error),
    #[error("the broker refuses the login: check user, password and virtual host in its URL")]
    Login,
    #[error(
        "there is no queue {0:?} at the broker: register the subscription with its owner first, or let the consumer declare it"
    )]
    NotRegistered(String),
    #[error("there is no exchange {0:?} at the broker: check its name, and that its owner has been started there once")]
    NoExchange(String),
    #[error("nothing wakes the subscription {0:?}: give it at least one routing key or one field")]
    NothingWakesIt(String),
    #[error(
        "no routing key begins with {0:?}: a prefix is words with dots between them, without * and #, or none at all"
    )]
    InvalidPrefix(String),
    #[error("the owner answers {status} {code} to this key: give the consumer a valid one with the scope users:read")]
    KeyRefused { status: u16, code: String },
    /// Nobody is followed to where he sends us: the key would be told there.
    #[error("the owner's URL leads elsewhere: {status}; give the consumer the address that answers by itself")]
    LeadsElsewhere { status: u16 },
}

impl Consumer {
    /// A consumer of `subscription` at the broker of this URL. Nothing is sent yet.
    ///
    /// # Errors
    /// When `amqp_url` is no AMQP URL, or one of `amqps` without the feature `tls`.
    pub fn new(amqp_url: &str, source: Source, subscription: Subscription, owner: Owner) -> Result<Self, InvalidUrl> {
        let mut uri: AMQPUri = amqp_url.parse().map_err(|_| InvalidUrl::NotAmqp)?;
        if !trust::can_reach(&uri) {
            return Err(InvalidUrl::NoTls);
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        let (broker, settings) = (Address { uri, trust: Trust::default() }, Settings::default());
        Ok(Self { broker, source, subscription, owner, settings, catch_up: None, observer: Arc::new(handler::Blind) })
    }

    /// Trusts these certificate authorities at an `amqps` address, beside those of this machine. Needs the feature `tls`.
    #[must_use]
    pub fn trusting(mut self, trust: Trust) -> Self {
        self.broker.trust = trust;
        self
    }

    /// The owner's registry has made the queue: nothing is declared, and no right to do so is needed.
    #[must_use]
    pub fn registered(mut self) -> Self {
        self.settings.declares = false;
        self
    }

    /// Messages that the broker hands out before it waits for acknowledgements; 200 unless told otherwise. What waits together for one
    /// user is handled together, so more of them means fewer fetches.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.settings.prefetch = messages.max(1);
        self
    }

    /// Users handled at the same time; 16 unless told otherwise.
    #[must_use]
    pub fn concurrency(mut self, users: usize) -> Self {
        self.settings.concurrency = users.max(1);
        self
    }

    /// How long one attempt may take; 30 s unless told otherwise. Then it is dropped where it stands, and has failed. Within it an outage of
    /// the owner is waited out for a quarter of that at most, so that it is told as one.
    #[must_use]
    pub fn handler_deadline(mut self, deadline: Duration) -> Self {
        self.settings.handler_deadline = deadline;
        self
    }

    /// How long a message waits after its first failed attempt, its second, and so on; after the last it is a dead letter. 1 s, 10 s,
    /// 1 min and 10 min unless told otherwise. Each delay is a queue at the broker; those of a registered subscription are fixed.
    #[must_use]
    pub fn retry_delays(mut self, delays: impl Into<Vec<Duration>>) -> Self {
        self.settings.retry_delays = delays.into();
        self
    }

    /// Users of whom the version handled last is remembered; 100,000 unless told otherwise. Of others a duplicate is handled again.
    #[must_use]
    pub fn remember(mut self, users: usize) -> Self {
        self.settings.remembered = users.max(1);
        self
    }

    /// How long running handlers may go on when the consumer is to leave; 15 s unless told otherwise.
    #[must_use]
    pub fn farewell(mut self, bound: Duration) -> Self {
        self.settings.farewell = bound.min(FOREVER);
        self
    }

    /// How often queue, exchange and bindings are looked after, the latter two by one that declares for itself, since nobody tells when they
    /// are deleted: for a registered one its owner sees to them. 30 s unless told otherwise, and never
    /// more than a hundred times a second.
    #[must_use]
    pub fn check_every(mut self, interval: Duration) -> Self {
        self.settings.check_every = interval.clamp(SHORTEST_INTERVAL, FOREVER);
        self
    }

    /// Do not tell the owner which deletions are done: for an application that holds nothing of its users, or confirms by itself
    /// ([`Owner::confirm_deletion`]) when work that its handler only began is done.
    #[must_use]
    pub fn without_receipts(mut self) -> Self {
        self.settings.confirms = false;
        self
    }

    /// What to do when news may have been missed: between being bound, so that nothing more is missed, and consuming.
    #[must_use]
    pub fn catch_up(mut self, catch_up: impl CatchUp) -> Self {
        self.catch_up = Some(boxed(catch_up));
        self
    }

    /// Who is told what goes on; for metrics.
    #[must_use]
    pub fn observe(mut self, observer: impl Observer) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Listens until `stop`, whatever happens to the broker and the owner meanwhile; then finishes what is under way.
    ///
    /// # Errors
    /// [`StartError`], at the first start only.
    pub async fn run(self, handler: impl Handler, stop: CancellationToken) -> Result<(), StartError> {
        self.check_bindings()?;
        self.check_key().await?;
        let (handler, mut memory) = (Arc::new(handler), Memory::new(self.settings.remembered));
        let (mut gap, mut delays) = (Gap::FirstStart, back_off());
        while !stop.is_cancelled() {
            let began = Instant::now();
            let ended = match Session::open(&self, &mut gap, &stop).await {
                Ok(mut session) => session.run(&handler, &mut memory, &stop).await,
                Err(ended) => ended,
            };
            self.observer.disconnected();
            let why = ended.to_string();
            match ended {
                Ended::Left => return Ok(()),
                Ended::Refused(error) if gap == Gap::FirstStart => return Err(error),
                // An exchange may go between the look for it and the declaration; our bindings went with it.
                Ended::QueueLost | Ended::Refused(StartError::NoExchange(_)) => gap = Gap::QueueLost,
                Ended::Refused(_) | Ended::Lost(_) => {}
            }
            if began.elapsed() > GOOD_SESSION {
                delays = back_off();
            }
            let delay = delays.next().unwrap_or(LONGEST_DELAY);
            tracing::warn!(subscription = %self.subscription.name, retry_in_ms = delay.as_millis() as u64, "not listening: {why}");
            let _ = stop.run_until_cancelled(sleep(delay)).await;
        }
        Ok(())
    }

    /// The broker takes bindings that nothing ever matches, and says nothing.
    fn check_bindings(&self) -> Result<(), StartError> {
        let Subscription { name, keys, fields } = &self.subscription;
        match &self.source.prefix {
            // The registry has made them.
            _ if !self.settings.declares => Ok(()),
            Some(prefix) if !topology::are_words(prefix) => Err(StartError::InvalidPrefix(prefix.clone())),
            _ if keys.is_empty() && fields.is_empty() => Err(StartError::NothingWakesIt(name.to_string())),
            _ => Ok(()),
        }
    }

    /// Before anything is taken from the queue: an outage of the owner is no reason not to begin, a wrong key is. One that is refused
    /// later may have been revoked to be replaced, and is waited out.
    async fn check_key(&self) -> Result<(), StartError> {
        match timeout(KEY_DEADLINE, self.owner.objection()).await {
            Ok(Some(FetchError::Denied { status, code })) => Err(StartError::KeyRefused { status, code }),
            Ok(Some(FetchError::Refused { status, .. })) => Err(StartError::LeadsElsewhere { status }),
            _ => Ok(()),
        }
    }
}

/// From a tenth of a second to five, jittered so that a restarted broker does not meet all its consumers at once.
fn back_off() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(LONGEST_DELAY / 2)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(url: &str, prefix: Option<&str>, keys: &[&str]) -> Result<Consumer, InvalidUrl> {
        let source = Source { exchange: "masterdata".into(), prefix: prefix.map(str::to_owned) };
        let mut subscription = Subscription::new("badges".parse().unwrap());
        subscription.keys = keys.iter().map(|key| key.parse().unwrap()).collect();
        Consumer::new(url, source, subscription, Owner::at("http://127.0.0.1:8080").unwrap())
    }

    #[test]
    fn a_broker_over_tls_is_refused_by_a_build_that_cannot_verify_it() {
        let refusal = |url| made(url, None, &[]).err();
        let of_tls = (!cfg!(feature = "tls")).then_some(InvalidUrl::NoTls);
        assert_eq!(refusal("amqps://ana:s3cret@host"), of_tls);
        assert_eq!(refusal("amqp://ana:s3cret@host"), None);
        assert_eq!(refusal("http://ana:s3cret@host"), Some(InvalidUrl::NotAmqp));
    }

    #[test]
    fn bindings_that_nothing_ever_matches_are_refused() {
        let refusal = |prefix, keys| made("amqp://host", prefix, keys).unwrap().check_bindings().err();
        for wrong in ["", "eu.", ".eu", "eu..prod", "eu.*", "#"] {
            assert!(matches!(refusal(Some(wrong), &["#"]), Some(StartError::InvalidPrefix(_))), "{wrong:?}");
        }
        assert!(matches!(refusal(None, &[]), Some(StartError::NothingWakesIt(_))));
        assert!(refusal(Some("eu.prod"), &["#"]).is_none() && refusal(None, &["user.*"]).is_none());
        assert!(made("amqp://host", Some(""), &[]).unwrap().registered().check_bindings().is_ok());
    }
}
