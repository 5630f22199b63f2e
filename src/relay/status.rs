//! What an operator sees of the relay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::{broker::Outcome, telemetry::with_causes};

#[derive(Clone, Default)]
pub struct Status {
    connected: Gauge,
    blocked: Gauge,
    leading: Gauge,
    results: Family<ResultLabel, Counter>,
    /// Why the last session ended, while there is no new one.
    trouble: Arc<Mutex<Option<String>>>,
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
        *self.trouble() = None;
    }

    pub fn session_over(&self, error: &anyhow::Error) {
        self.connected.set(0);
        self.blocked.set(0);
        *self.trouble() = Some(with_causes(error));
    }

    pub fn leads(&self, leads: bool) {
        self.leading.set(leads.into());
    }

    pub fn blocked(&self, blocked: bool) {
        self.blocked.set(blocked.into());
    }

    /// `None` when all is well; else what is not, for people.
    pub fn complaint(&self) -> Option<String> {
        if let Some(trouble) = self.trouble().clone() {
            return Some(trouble);
        }
        if self.connected.get() == 0 {
            return Some("connecting".to_owned());
        }
        (self.blocked.get() == 1).then(|| "the broker asks publishers to hold back (memory or disk alarm)".to_owned())
    }

    fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
