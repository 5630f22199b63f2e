//! What an operator sees of the subscriptions: figures of the instance whose watch leads.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;

use super::{desk::Look, model::Registered};

type BySubscription<G = Gauge> = Family<OfSubscription, G>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfSubscription {
    subscription: String,
}

#[derive(Clone, Default)]
pub struct Status {
    watching: Gauge,
    ready: BySubscription,
    consumers: BySubscription,
    dead_letters: BySubscription,
    waiting_seconds: BySubscription<Gauge<f64, AtomicU64>>,
    idle: BySubscription,
    expiring: BySubscription,
    undeclared: BySubscription,
    queue_lost: BySubscription,
    /// Who has figures.
    shown: Arc<Mutex<Vec<OfSubscription>>>,
}

impl Status {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "subscriptions_watching",
            "Whether this instance's watch is the one that looks at the subscriptions, with an answer from the broker",
            self.watching.clone(),
        );
        for (name, help, gauge) in [
            ("subscription_ready", "Messages that wait for a consumer", &self.ready),
            ("subscription_consumers", "Consumers", &self.consumers),
            ("subscription_dead_letters", "Messages that the consumer gave up", &self.dead_letters),
            ("subscription_idle", "1: no consumer for a long time", &self.idle),
            ("subscription_expiring", "1: will be deleted, as its owner asked, because nobody listens", &self.expiring),
            ("subscription_undeclared", "1: not declared as it is registered: not yet, or not again", &self.undeclared),
            ("subscription_queue_lost", "1: its queue was gone, and news may be missing", &self.queue_lost),
        ] {
            registry.register(name, help, gauge.clone());
        }
        registry.register(
            "subscription_waiting_seconds",
            "Since when the queue was not seen empty; 0 when it is empty",
            self.waiting_seconds.clone(),
        );
    }

    /// Shows these subscriptions, and no others; those that are `refused` could not be declared just now.
    pub(super) fn show(
        &self,
        rows: &[(Registered, Option<Look>)],
        refused: &HashSet<SubscriptionName>,
        idle_after: Duration,
    ) {
        self.watching.set(1);
        let labels: Vec<OfSubscription> =
            rows.iter().map(|(row, _)| OfSubscription { subscription: row.name().to_string() }).collect();
        let gone = std::mem::replace(&mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner), labels.clone());
        gone.iter().filter(|label| !labels.contains(label)).for_each(|label| self.forget(label));
        for (label, (row, look)) in labels.iter().zip(rows) {
            let is_declared = row.is_declared() && !refused.contains(row.name());
            self.set(label, row, *look, is_declared, idle_after);
        }
    }

    fn set(
        &self,
        label: &OfSubscription,
        row: &Registered,
        look: Option<Look>,
        is_declared: bool,
        idle_after: Duration,
    ) {
        let waits = row.seen.waiting_since.map_or(0.0, |since| seconds_between(since, row.as_of));
        if let Some(Look { work, dead }) = look {
            self.ready.get_or_create(label).set(work.map_or(0, |depth| depth.ready.into()));
            self.consumers.get_or_create(label).set(work.map_or(0, |depth| depth.consumers.into()));
            self.dead_letters.get_or_create(label).set(dead.map_or(0, |depth| depth.ready.into()));
        } else {
            // Not told this time: figures of an earlier time would mislead.
            for gauge in [&self.ready, &self.consumers, &self.dead_letters] {
                gauge.remove(label);
            }
        }
        self.waiting_seconds.get_or_create(label).set(waits);
        self.idle.get_or_create(label).set(row.is_idle(idle_after).into());
        self.expiring.get_or_create(label).set(row.expires_at().is_some().into());
        self.undeclared.get_or_create(label).set((!is_declared).into());
        self.queue_lost.get_or_create(label).set(row.is_lost().into());
    }

    fn forget(&self, label: &OfSubscription) {
        for gauge in [
            &self.ready,
            &self.consumers,
            &self.dead_letters,
            &self.idle,
            &self.expiring,
            &self.undeclared,
            &self.queue_lost,
        ] {
            gauge.remove(label);
        }
        self.waiting_seconds.remove(label);
    }

    /// This instance's watch does not lead, or has no broker: figures of an earlier time would mislead.
    pub(super) fn hide(&self) {
        self.watching.set(0);
        let gone = std::mem::take(&mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner));
        gone.iter().for_each(|label| self.forget(label));
    }
}

fn seconds_between(from: OffsetDateTime, to: OffsetDateTime) -> f64 {
    (to - from).as_seconds_f64().max(0.0)
}
