//! Lifecycle: how the process starts to leave, and how it makes sure that it does.
//!
//! Promise: the first SIGTERM or SIGINT drains within a bound; a second one leaves at once.
//! Not here, on purpose: what draining means. Each role watches the token and knows what it still owes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::telemetry;

/// A supervisor (systemd, Docker, Kubernetes) kills after 10 to 90 s; stay below the usual 30.
pub const DRAIN_BOUND: Duration = Duration::from_secs(20);

/// Cancels `stop` on the first signal and ends the process on the second, or when the drain overruns its bound.
pub fn leave_on_signal(stop: CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        tracing::info!(
            bound_s = DRAIN_BOUND.as_secs(),
            "leaving: finishing what is under way; a second signal leaves at once"
        );
        stop.cancel();
        tokio::select! {
            () = either(&mut terminate, &mut interrupt) => tracing::warn!("a second signal: leaving at once"),
            () = tokio::time::sleep(DRAIN_BOUND) => tracing::warn!("the drain overran its bound: leaving at once"),
        }
        telemetry::flush();
        std::process::exit(1);
    });
    Ok(())
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The tasks that the process lives by. If one falls, all leave, and the exit code says so.
#[derive(Clone)]
pub struct Roles {
    tasks: TaskTracker,
    stop: CancellationToken,
    fell: Arc<AtomicBool>,
}

impl Roles {
    /// `stop` is cancelled when a role falls.
    pub fn new(stop: CancellationToken) -> Self {
        Self { tasks: TaskTracker::new(), stop, fell: Arc::default() }
    }

    pub fn spawn(&self, name: &'static str, role: impl Future<Output = ()> + Send + 'static) {
        let watch = Watch { name, roles: self.clone() };
        self.tasks.spawn(async move {
            role.await;
            drop(watch);
        });
    }

    /// Waits until every role has ended. False when one fell.
    pub async fn ended(&self) -> bool {
        self.tasks.close();
        self.tasks.wait().await;
        !self.fell.load(Ordering::Relaxed)
    }
}

struct Watch {
    name: &'static str,
    roles: Roles,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!(role = self.name, "a role fell: leaving");
            self.roles.fell.store(true, Ordering::Relaxed);
            self.roles.stop.cancel();
        }
    }
}
