//! Traffic: what the limits did, as numbers.
//!
//! Promise: whoever was turned away or cut off is counted, under a name that says why.
//! Not here, on purpose: the limits.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Shared by everything that limits.
#[derive(Clone, Default)]
pub struct Traffic {
    connections: Gauge,
    under_way: Gauge,
    ended: Family<Reason, Counter>,
    shed: Counter,
    limited: Family<Whose, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Whose {
    of: &'static str,
}

impl Traffic {
    pub fn register(&self, registry: &mut Registry) {
        registry.register("connections", "Connections that are open", self.connections.clone());
        registry.register("requests_under_way", "Requests to /v1 that have a place", self.under_way.clone());
        registry.register(
            "connections_ended",
            "Connections that were ended for a limit: room (cut, as others needed the room), full (refused, as all were at work), \
             header_deadline (no whole request in time, or idle), write_deadline (an answer was not read in time)",
            self.ended.clone(),
        );
        registry.register(
            "requests_shed",
            "Requests that were answered 503, as too many were under way",
            self.shed.clone(),
        );
        registry.register(
            "requests_rate_limited",
            "Requests that were answered 429, of a client, or of an address with wrong keys",
            self.limited.clone(),
        );
        // What never happened is there as a 0.
        for reason in ["room", "full", "header_deadline", "write_deadline"] {
            drop(self.ended.get_or_create(&Reason { reason }));
        }
        for of in ["client", "address"] {
            drop(self.limited.get_or_create(&Whose { of }));
        }
    }

    pub(super) fn connected(&self) -> Counted {
        Counted::of(&self.connections)
    }

    pub(super) fn begun(&self) -> Counted {
        Counted::of(&self.under_way)
    }

    pub(super) fn cut(&self) {
        self.ended.get_or_create(&Reason { reason: "room" }).inc();
    }

    pub(super) fn full(&self) {
        self.ended.get_or_create(&Reason { reason: "full" }).inc();
    }

    pub(super) fn no_request(&self) {
        self.ended.get_or_create(&Reason { reason: "header_deadline" }).inc();
    }

    pub(super) fn unread(&self) {
        self.ended.get_or_create(&Reason { reason: "write_deadline" }).inc();
    }

    pub(super) fn shed(&self) {
        self.shed.inc();
    }

    pub fn limited_client(&self) {
        self.limited.get_or_create(&Whose { of: "client" }).inc();
    }

    pub fn limited_address(&self) {
        self.limited.get_or_create(&Whose { of: "address" }).inc();
    }
}

/// Counts one for as long as it lives.
pub(super) struct Counted(Gauge);

impl Counted {
    fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
