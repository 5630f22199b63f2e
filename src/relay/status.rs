//! What an operator sees of the relay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::cursor::REFUSED_LIMIT;
use crate::{broker::Outcome, db, telemetry::with_causes};

/// Why nothing new is told, although the broker can be reached and does not ask to hold back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standstill {
    /// The cursor remembers no more events that were.
    Refused,
    /// The broker has a message when all its queues have it. One of them that is silent has the broker take nothing more in the end.
    Unconfirmed,
}

const _: () = assert!(REFUSED_LIMIT == 10_000);

impl Standstill {
    const ALL: [Self; 2] = [Self::Refused, Self::Unconfirmed];

    fn label(self) -> ReasonLabel {
        let reason = match self {
            Self::Refused => "refused",
            Self::Unconfirmed => "unconfirmed",
        };
        ReasonLabel { reason }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Refused => {
                "10,000 events are refused, by a full queue mostly: nothing new is told until some of them are taken"
            }
            Self::Unconfirmed => {
                "the broker answers, and confirms nothing: nothing new is told until a queue that is silent, mostly for want of a \
                 leader, answers too"
            }
        }
    }

    fn end(self) -> &'static str {
        match self {
            Self::Refused => "some of what was refused is taken: news is told again",
            Self::Unconfirmed => "the broker confirms again: news is told",
        }
    }
}

#[derive(Clone, Default)]
pub struct Status {
    connected: Gauge,
    blocked: Gauge,
    leading: Gauge,
    stalled: Family<ReasonLabel, Gauge>,
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

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
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
        for why in Standstill::ALL {
            drop(self.stalled.get_or_create(&why.label()));
        }
        registry.register(
            "broker_connected",
            "Whether this instance's relay is connected to the broker, or was when the outbox could not be reached",
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
            "Whether this instance's relay tells nothing new: too many events are refused, or none is confirmed",
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

    /// A session that ended for the database leaves a broker that can be reached, as far as anybody knows.
    pub fn session_over(&self, error: &anyhow::Error) {
        self.blocked.set(0);
        self.stands_still(Standstill::Refused, false);
        let (text, mut trouble) = (Some(with_causes(error)), self.trouble());
        *trouble = if error.is::<db::Trouble>() {
            Complaints { database: text, broker: None }
        } else {
            self.connected.set(0);
            Complaints { database: None, broker: text }
        };
    }

    pub fn leads(&self, leads: bool) {
        self.leading.set(leads.into());
    }

    pub fn blocked(&self, blocked: bool) {
        self.blocked.set(blocked.into());
    }

    /// Another relay leads.
    pub fn stands_by(&self) {
        self.outbox_is_up();
        self.stands_still(Standstill::Unconfirmed, false);
    }

    /// Whether nothing new is told for this reason. The log says when that begins, and when it ends.
    pub fn stands_still(&self, why: Standstill, stands_still: bool) {
        match (self.stalled.get_or_create(&why.label()).set(stands_still.into()) == 1, stands_still) {
            (false, true) => tracing::warn!("{}", why.reason()),
            (true, false) => tracing::warn!("{}", why.end()),
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
        let is_so = |why: &Standstill| self.stalled.get_or_create(&why.label()).get() == 1;
        Standstill::ALL.into_iter().find(is_so).map(|why| why.reason().to_owned())
    }

    fn trouble(&self) -> MutexGuard<'_, Complaints> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
