//! Starting: what an instance answers that is not ready yet.
//!
//! Promise: it says that it lives, and what it waits for, however long its database or a migration takes.
//! Not here, on purpose: the waiting (see `roles`).

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};

use super::{Readily, Readiness, healthz};

/// What an instance waits for.
#[derive(Clone, Default)]
pub struct Starting(Arc<Mutex<String>>);

impl Starting {
    /// From now on it waits for this, which holds no user's value.
    pub fn waits(&self, why: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why.into();
    }
}

/// Where [`routes_while_starting`] lead.
pub const PROBES: &[&str] = &[HEALTHZ, READYZ];
const HEALTHZ: &str = "/healthz";
const READYZ: &str = "/readyz";

/// The operator's questions, as far as they can be answered.
pub fn routes_while_starting(starting: Starting) -> Router {
    Router::new().route(HEALTHZ, get(healthz)).route(READYZ, get(not_ready_yet)).with_state(starting)
}

async fn not_ready_yet(State(Starting(why)): State<Starting>) -> Response {
    let database = why.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let broker = "not asked before the database is ready".to_owned();
    (StatusCode::SERVICE_UNAVAILABLE, Json(Readiness { status: Readily::Unready, database, broker })).into_response()
}
