//! Ops: what an operator asks. Is it alive, is it ready, is anybody behind.
//!
//! Promise: the answers come within seconds whatever is broken, and hold numbers and names only.
//! Not here, on purpose: deciding what to do about it.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use serde::Serialize;
use sqlx::PgPool;
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    clients::Clients,
    db::{self, Db},
    dead_letters,
    deletions::{Deletions, Ledger},
    lead, outbox,
    relay::{self, Complaints},
    subscriptions, telemetry,
    web::{Code, Problem, Refusals, Traffic},
};

mod starting;

pub use starting::{PROBES, Starting, routes_while_starting};

/// For a look at the database: a probe that hangs is as bad as one that fails.
const LOOK: Duration = Duration::from_secs(2);
/// Between two looks for metrics: whoever asks for them costs the database five looks a second, however often he asks.
const GAP: Duration = Duration::from_millis(200);

/// What the operator's questions are answered from.
#[derive(Clone)]
pub struct Ops {
    queries: PgPool,
    looks: Looks,
    /// `None` in an instance that serves no API.
    clients: Option<Clients>,
    ledger: Option<Ledger>,
    /// `None` in an instance that runs no relay.
    relay: Option<relay::Status>,
    metrics: Arc<Metrics>,
}

/// The looks at the database that metrics are told from: one at a time, which all share who asked before it began.
#[derive(Clone)]
pub struct Looks {
    /// Of their own, so that readiness is not behind them.
    queries: PgPool,
    last: Arc<Mutex<Last>>,
}

#[derive(Default)]
struct Last {
    began: Option<Instant>,
    floor: outbox::Floor,
}

impl Looks {
    pub fn new(db: &Db) -> Self {
        Self { queries: db.pool("metrics", 2, outbox::BY_PLACE), last: Arc::default() }
    }

    pub async fn close(&self) {
        db::close(&self.queries).await;
    }
}

struct Metrics {
    registry: Registry,
    pending: Gauge,
    oldest_seconds: Gauge<f64, AtomicU64>,
    dead_letters: Family<OfSubscription, Gauge>,
    erasures_overdue: Family<OfSubscription, Gauge>,
    erasures_oldest_seconds: Family<OfSubscription, Gauge<f64, AtomicU64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfSubscription {
    subscription: String,
}

impl Ops {
    /// `serving`: of an instance that serves the API. `telling`: the relay and the watch of one that has a broker.
    pub fn new(
        queries: PgPool,
        looks: Looks,
        serving: Option<(Clients, Deletions)>,
        telling: Option<(relay::Status, subscriptions::Status)>,
        duties: &lead::Status,
        traffic: &Traffic,
    ) -> Self {
        let (pending, oldest_seconds) = (Gauge::default(), Gauge::<f64, AtomicU64>::default());
        let mut registry = Registry::with_prefix("tidings");
        registry.register(
            "outbox_pending",
            "Committed events that the broker has not confirmed yet; exact below 10,000, estimated above; -1 when the database does not say so in time",
            pending.clone(),
        );
        registry.register(
            "outbox_oldest_seconds",
            "Age of the oldest such event; 0 when there is none; -1 when the database does not say so in time",
            oldest_seconds.clone(),
        );
        let dead_letters = Family::<OfSubscription, Gauge>::default();
        registry.register(
            "dead_letters",
            "Messages that a subscription could not handle and that are kept; at most 100,000 are; absent when the \
             database does not answer",
            dead_letters.clone(),
        );
        let erasures_overdue = Family::<OfSubscription, Gauge>::default();
        let erasures_oldest_seconds = Family::<OfSubscription, Gauge<f64, AtomicU64>>::default();
        let serving = serving.map(|(clients, deletions)| {
            registry.register(
                "erasures_overdue",
                "Deletions that a subscription has not confirmed in time; exact below 10,000, more show as so many; absent when the \
                 database does not answer",
                erasures_overdue.clone(),
            );
            registry.register(
                "erasures_overdue_oldest_seconds",
                "Since the oldest such deletion; 0 when there is none",
                erasures_oldest_seconds.clone(),
            );
            deletions.recorder().register(&mut registry);
            (clients, deletions.ledger().clone())
        });
        let (clients, ledger) = serving.unzip();
        duties.register(&mut registry);
        traffic.register(&mut registry);
        telemetry::register(&mut registry);
        let relay = telling.map(|(relay, watch)| {
            relay.register(&mut registry);
            watch.register(&mut registry);
            relay
        });
        let metrics =
            Metrics { registry, pending, oldest_seconds, dead_letters, erasures_overdue, erasures_oldest_seconds };
        Self { queries, looks, clients, ledger, relay, metrics: Arc::new(metrics) }
    }

    /// Whether the database answers; where requests need a key, whether it says who may ask: without that every one hears 503. That is
    /// looked at all the time, so that those who ask for readiness, which anybody may, cost no session that a request needs.
    async fn database(&self) -> Result<(), String> {
        let answers = async {
            if let Some(clients) = self.clients.as_ref().filter(|clients| !clients.is_anybody()) {
                return clients.known_now().await.map_err(|unknowable| unknowable.to_string());
            }
            let queries = self.queries.clone();
            let answered = db::ask(async move { sqlx::query("select").execute(&queries).await }).await;
            answered.map(drop).map_err(|trouble| trouble.report())
        };
        timeout(LOOK, answers).await.unwrap_or_else(|_| Err(format!("no answer within {LOOK:?}")))
    }

    /// Looks at the database, unless somebody did since this was asked.
    async fn look(self) {
        let asked = Instant::now();
        let mut last = self.looks.last.lock().await;
        if last.began.is_some_and(|began| began >= asked) {
            return;
        }
        if let Some(began) = last.began {
            sleep(GAP.saturating_sub(began.elapsed())).await;
        }
        last.began = Some(Instant::now());
        tokio::join!(self.measure_lag(&mut last.floor), self.count_dead_letters(), self.count_overdue_erasures());
    }

    async fn measure_lag(&self, floor: &mut outbox::Floor) {
        let (queries, place) = (self.looks.queries.clone(), floor.place());
        let lag = timeout(LOOK, db::ask(async move { outbox::lag(&queries, place).await })).await;
        let lag = lag.ok().and_then(Result::ok);
        if let Some(lag) = &lag {
            floor.note(lag, Instant::now());
        }
        self.metrics.pending.set(lag.map_or(-1, |lag| lag.pending));
        self.metrics.oldest_seconds.set(lag.map_or(-1.0, |lag| lag.oldest_seconds));
    }

    async fn count_dead_letters(&self) {
        let queries = self.looks.queries.clone();
        let counts = timeout(LOOK, db::ask(async move { dead_letters::counts(&queries).await })).await;
        self.metrics.dead_letters.clear();
        for (subscription, count) in counts.ok().and_then(Result::ok).into_iter().flatten() {
            self.metrics.dead_letters.get_or_create(&OfSubscription { subscription }).set(count);
        }
    }

    async fn count_overdue_erasures(&self) {
        let Some(ledger) = &self.ledger else { return };
        let lateness = timeout(LOOK, ledger.lateness()).await;
        self.metrics.erasures_overdue.clear();
        self.metrics.erasures_oldest_seconds.clear();
        for late in lateness.ok().and_then(Result::ok).into_iter().flatten() {
            let of = OfSubscription { subscription: late.subscription };
            self.metrics.erasures_overdue.get_or_create(&of).set(late.overdue);
            self.metrics.erasures_oldest_seconds.get_or_create(&of).set(late.oldest_seconds);
        }
    }
}

pub fn routes() -> OpenApiRouter<Ops> {
    OpenApiRouter::new().routes(routes!(healthz)).routes(routes!(readyz)).routes(routes!(metrics))
}

/// Alive: the process answers.
#[utoipa::path(get, path = "/healthz", tag = "operations", operation_id = "health", security(()),
    responses(
        (status = 200, description = "The process answers", body = String, content_type = "text/plain", example = json!("ok\n")),
        Refusals<()>,
    ))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// How an instance is.
#[derive(Serialize, utoipa::ToSchema)]
struct Readiness {
    status: Readily,
    /// `ok`, or what is wrong.
    #[schema(example = "ok")]
    database: String,
    /// `ok`, what is wrong, or that this instance runs no relay, or is not ready yet.
    #[schema(example = "ok")]
    broker: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum Readily {
    Ready,
    /// Requests are served; news waits in the outbox until the broker is back.
    Degraded,
    /// Requests cannot be served.
    Unready,
}

/// Ready: whether this instance should get requests.
///
/// Without the broker an instance is degraded, not unready: changes are kept, and told when the broker is back.
#[utoipa::path(get, path = "/readyz", tag = "operations", operation_id = "readiness", security(()),
    responses(
        Refusals<()>,
        (status = 200, description = "Send requests: ready or degraded", body = Readiness),
        (status = 503, description = "Send none: the database does not answer, or does not say who may ask, or this instance starts and waits for it", body = Readiness),
    ))]
async fn readyz(State(ops): State<Ops>) -> Response {
    let unready = ops.database().await.err();
    let complaints = ops.relay.as_ref().map(relay::Status::complaints);
    let is_degraded = |complaints: &Complaints| complaints.database.is_some() || complaints.broker.is_some();
    let status = match (&unready, &complaints) {
        (Some(_), _) => Readily::Unready,
        (None, Some(complaints)) if is_degraded(complaints) => Readily::Degraded,
        (None, _) => Readily::Ready,
    };
    let code = if status == Readily::Unready { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let well = || "ok".to_owned();
    let Complaints { database, broker } = complaints
        .unwrap_or_else(|| Complaints { database: None, broker: Some("no relay in this instance".to_owned()) });
    let (database, broker) = (unready.or(database).unwrap_or_else(well), broker.unwrap_or_else(well));
    (code, Json(Readiness { status, database, broker })).into_response()
}

/// Metrics in the OpenMetrics text format.
#[utoipa::path(get, path = "/metrics", tag = "operations", operation_id = "metrics", security(()),
    responses(
        (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text",
         example = json!("# TYPE tidings_outbox_pending gauge\ntidings_outbox_pending 0\n# EOF\n")),
        Refusals<()>,
    ))]
async fn metrics(State(ops): State<Ops>) -> Result<Response, Problem> {
    // In a task of its own: whoever asks and hangs up must not end a look that others share, nor begin more of them.
    tokio::spawn(ops.clone().look()).await.map_err(|_| Problem::from(Code::Internal))?;
    let mut text = String::new();
    encode(&mut text, &ops.metrics.registry).map_err(|_| Problem::from(Code::Internal))?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}
