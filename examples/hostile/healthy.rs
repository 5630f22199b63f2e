//! The healthy clients: a steady pace, whatever the others do.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    http::{Client, Request},
    scratch,
};

const CLIENTS: u64 = 20;
/// For each client: 200 requests a second in all.
const EVERY: Duration = Duration::from_millis(100);
/// Of its requests: one in ten is the first on a new connection, one in four changes something.
const RECONNECTS: u64 = 10;
const CHANGES: u64 = 4;

pub struct Healthy {
    seen: Arc<Mutex<Seen>>,
    clients: JoinSet<()>,
}

/// What they saw.
#[derive(Default, Clone)]
pub struct Seen {
    pub latencies_ms: Vec<f64>,
    pub failed: u64,
    /// Connections that were found closed; the request was sent again on a new one.
    pub reconnected: u64,
}

impl Healthy {
    pub fn start(at: SocketAddr, users: u64) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            clients.spawn(client(at, number, users, seen.clone()));
        }
        Self { seen, clients }
    }

    /// What was seen since this was last asked.
    pub fn take(&self) -> Seen {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub async fn stop(mut self) {
        self.clients.shutdown().await;
    }
}

async fn client(at: SocketAddr, number: u64, users: u64, seen: Arc<Mutex<Seen>>) {
    let mut pace = interval(EVERY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut line, mut patch, mut get) = (None, Request::patch(), Request::get());
    for count in 0.. {
        pace.tick().await;
        let user = scratch::user((number + count * CLIENTS) % users);
        let request = if count.is_multiple_of(CHANGES) { &mut patch } else { &mut get };
        let request = request.of(user, count * CLIENTS + number);
        if count.is_multiple_of(RECONNECTS) {
            line = None;
        }
        let began = Instant::now();
        let (was_kept, mut outcome) = (line.is_some(), ask(at, &mut line, request).await);
        let reconnected = was_kept && outcome.as_ref().is_err_and(|error| error.kind() != std::io::ErrorKind::Other);
        if reconnected {
            line = None;
            outcome = ask(at, &mut line, request).await;
        }
        let took_ms = began.elapsed().as_secs_f64() * 1000.0;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.reconnected += u64::from(reconnected);
        match outcome {
            Ok(()) => seen.latencies_ms.push(took_ms),
            Err(error) => {
                seen.failed += 1;
                line = None;
                eprintln!("hostile: a healthy client failed after {took_ms:.1} ms: {error}");
            }
        }
    }
}

async fn ask(at: SocketAddr, line: &mut Option<Client>, request: &[u8]) -> std::io::Result<()> {
    if line.is_none() {
        *line = Some(Client::connect(at).await?);
    }
    match line {
        Some(line) => line.ask(request).await,
        None => Ok(()),
    }
}

impl Seen {
    pub fn of_all(parts: &[Self]) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.latencies_ms.extend_from_slice(&part.latencies_ms);
            all.failed += part.failed;
            all.reconnected += part.reconnected;
        }
        all
    }

    fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let place = (share * sorted.len() as f64) as usize;
        sorted.get(place.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    }

    pub fn p99(&self) -> f64 {
        self.quantile(0.99)
    }

    pub fn figures(&self) -> String {
        format!(
            "healthy: {} answers, p50 {:.2} ms, p99 {:.2} ms, {} failed, {} reconnected",
            self.latencies_ms.len(),
            self.quantile(0.5),
            self.p99(),
            self.failed,
            self.reconnected
        )
    }
}
