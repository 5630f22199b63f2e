//! Traffic: how requests fare and what the limits did, as numbers.
//!
//! Promise: each answer is counted, and whoever was turned away or cut off under a name that says why.
//! Not here, on purpose: the limits; and names that whoever asks could make up: a route is its template, and a method one of ours.

use std::time::Duration;

use axum::{
    http::{Method, StatusCode},
    response::Response,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::Code;

/// Shared by everything that limits.
#[derive(Clone)]
pub struct Traffic {
    answers: Family<Answered, Counter>,
    problems: Family<Which, Counter>,
    durations: Family<Route, Histogram>,
    connections: Gauge,
    under_way: Gauge,
    ended: Family<Reason, Counter>,
    shed: Counter,
    limited: Family<Whose, Counter>,
}

/// The bounds of the histogram, in seconds; a request has 30.
const BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    method: &'static str,
    route: String,
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Which {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: &'static str,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Whose {
    of: &'static str,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            answers: Family::default(),
            problems: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            connections: Gauge::default(),
            under_way: Gauge::default(),
            ended: Family::default(),
            shed: Counter::default(),
            limited: Family::default(),
        }
    }
}

impl Traffic {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "http_requests",
            "Requests that were answered, by method, route (its template; unknown when there is none) and class of status",
            self.answers.clone(),
        );
        registry.register("http_problems", "Requests whose answer was a problem, by its code", self.problems.clone());
        registry.register(
            "http_request_duration_seconds",
            "From the head of a request until its answer begins, by method and route",
            self.durations.clone(),
        );
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
        for code in Code::ALL {
            drop(self.problems.get_or_create(&Which { code: code.as_str() }));
        }
        for reason in ["room", "full", "header_deadline", "write_deadline"] {
            drop(self.ended.get_or_create(&Reason { reason }));
        }
        for of in ["client", "address"] {
            drop(self.limited.get_or_create(&Whose { of }));
        }
    }

    pub(super) fn answered(&self, method: &Method, route: &str, response: &Response, took: Duration) {
        if let Some(code) = response.extensions().get::<Code>() {
            self.problems.get_or_create(&Which { code: code.as_str() }).inc();
        }
        let of = Route { method: name(method), route: route.to_owned() };
        self.durations.get_or_create(&of).observe(took.as_secs_f64());
        self.answers
            .get_or_create(&Answered { method: of.method, route: of.route, status: class(response.status()) })
            .inc();
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

    pub(super) fn limited_client(&self) {
        self.limited.get_or_create(&Whose { of: "client" }).inc();
    }

    pub(super) fn limited_address(&self) {
        self.limited.get_or_create(&Whose { of: "address" }).inc();
    }
}

/// Whoever asks may make up methods.
fn name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() / 100 {
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => "1xx",
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
