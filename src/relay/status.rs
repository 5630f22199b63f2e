//! What an operator sees of the relay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::cursor::REFUSED_LIMIT;
use crate::{broker::Outcome, db, telemetry::with_causes};

/// Of the cursor, which remembers no more that were refused.
const STALLED: &str =
    "10,000 events are refused, by a full queue mostly: nothing new is told until some of them are taken";
const _: () = assert!(REFUSED_LIMIT == 10_000);

#[derive(Clone, Default)]
pub struct Status {
    connected: Gauge,
    blocked: Gauge,
    leading: Gauge,
    stalled: Gauge,
    results: Family<ResultLabel, Counter>,
    /// Why the last session ended, until that is known to be over.
    trouble: Arc<Mutex<Complaints>>,
}

/// What is not well, for people, by where it is.
#[derive(Debug, Clone, Default)]
pub struct Complaints {
    pub database: Option<String>,
    pub broker: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

fn label(outcome: Outcome) -> ResultLabel {
    let result = match outcome {
        Outcome::Routed => "routed",
        Outcome::Unroutable => "unroutable",
        Outcome::Refused => "refused",
    };
    ResultLabel { result }
}

impl Status {
    pub fn register(&self, registry: &mut Registry) {
        for outcome in [Outcome::Routed, Outcome::Unroutable, Outcome::Refused] {
            // A result that never happened shows as 0, not as absent.
            drop(self.results.get_or_create(&label(outcome)));
        }
        registry.register(
            "broker_connected",
            "Whether this instance's relay is connected to the broker",
            self.connected.clone(),
        );
        registry.register(
            "broker_blocked",
            "Whether the broker asks publishers to hold back (memory or disk alarm)",
            self.blocked.clone(),
        );
        registry.register(
            "relay_leading",
            "Whether this instance's relay is the one that carries the events",
            self.leading.clone(),
        );
        registry.register(
            "relay_stalled",
            "Whether so many events are refused that this instance's relay tells nothing new",
            self.stalled.clone(),
        );
        registry.register(
            "publish_results",
            "Messages by what the broker made of them: routed, unroutable (confirmed, nobody is bound), refused (sent again)",
            self.results.clone(),
        );
    }

    pub fn count(&self, outcome: Outcome) {
        self.results.get_or_create(&label(outcome)).inc();
    }

    pub fn broker_is_up(&self) {
        self.connected.set(1);
        self.trouble().broker = None;
    }

    pub fn outbox_is_up(&self) {
        self.trouble().database = None;
    }

    pub fn session_over(&self, error: &anyhow::Error) {
        self.connected.set(0);
        self.blocked.set(0);
        self.stalled.set(0);
        let (text, mut trouble) = (Some(with_causes(error)), self.trouble());
        *trouble = if error.is::<db::Trouble>() {
            Complaints { database: text, broker: None }
        } else {
            Complaints { database: None, broker: text }
        };
    }

    pub fn leads(&self, leads: bool) {
        self.leading.set(leads.into());
    }

    pub fn blocked(&self, blocked: bool) {
        self.blocked.set(blocked.into());
    }

    /// Whether so much is refused that nothing new is told. The log says when that begins, and when it ends.
    pub fn stalled(&self, stalled: bool) {
        match (self.stalled.set(stalled.into()) == 1, stalled) {
            (false, true) => tracing::warn!("{STALLED}"),
            (true, false) => tracing::warn!("some of what was refused is taken: news is told again"),
            _ => {}
        }
    }

    /// Nothing when all is well.
    pub fn complaints(&self) -> Complaints {
        let mut complaints = self.trouble().clone();
        complaints.broker = complaints.broker.or_else(|| self.standstill());
        complaints
    }

    fn standstill(&self) -> Option<String> {
        if self.connected.get() == 0 {
            return Some("connecting".to_owned());
        }
        if self.blocked.get() == 1 {
            return Some("the broker asks publishers to hold back (memory or disk alarm)".to_owned());
        }
        (self.stalled.get() == 1).then(|| STALLED.to_owned())
    }

    fn trouble(&self) -> MutexGuard<'_, Complaints> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
