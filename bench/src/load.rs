//! Load: as much as goes. Closed loops, in which every connection asks again as soon as it was answered.
//!
//! All of them share one thread, so that at most one core is taken from the service; pgbench, the limit, has two threads of its own.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    runtime,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    figures::{Latencies, Round},
    http::{Client, Request},
    scratch::user,
};

/// For the last answers after the end.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Patch,
    /// All of one user.
    PatchOne,
    Get,
    /// Of ten requests two are patches.
    Mixed,
}

#[derive(Clone)]
pub struct Load {
    /// Instances; connections are dealt out to them in turn.
    pub addresses: Vec<SocketAddr>,
    pub connections: u64,
    /// Each connection has some of its own, so that nobody waits for a row.
    pub users: u64,
    pub ask: Ask,
    pub time: Duration,
}

impl Load {
    pub async fn run(self) -> anyhow::Result<Round> {
        let deadline = self.time + PATIENCE;
        let round = spawn_blocking(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { timeout(deadline, self.run_here()).await.context("the service does not answer")? })
        });
        round.await?
    }

    async fn run_here(&self) -> anyhow::Result<Round> {
        let mut clients = vec![];
        for address in self.addresses.iter().cycle().take(usize::try_from(self.connections)?) {
            clients.push(Client::connect(*address).await.context("the service does not let in")?);
        }
        let (began, mut connections) = (Instant::now(), JoinSet::new());
        for (number, client) in (0..).zip(clients) {
            connections.spawn(self.clone().keep_asking(client, number, began));
        }
        let mut latencies_ms = vec![];
        while let Some(connection) = connections.join_next().await {
            latencies_ms.extend(connection??);
        }
        let per_second = latencies_ms.len() as f64 / began.elapsed().as_secs_f64();
        Ok(Round { per_second, latencies_ms: Latencies::of(latencies_ms) })
    }

    async fn keep_asking(self, mut client: Client, number: u64, began: Instant) -> anyhow::Result<Vec<f64>> {
        let (mut get, mut patch) = (Request::get(), Request::patch());
        let (mut latencies_ms, mut dice) = (vec![], Dice::new());
        let own_users = self.users / self.connections;
        let mut now = Instant::now();
        while now - began < self.time {
            let (chance, count) = (dice.roll(), dice.roll());
            let user =
                user(if self.ask == Ask::PatchOne { 0 } else { number + self.connections * (chance % own_users) });
            let reads = self.ask == Ask::Get || (self.ask == Ask::Mixed && !count.is_multiple_of(5));
            let request = if reads { get.of(user, count) } else { patch.of(user, count) };
            client.ask(request).await?;
            let asked = now;
            now = Instant::now();
            latencies_ms.push((now - asked).as_secs_f64() * 1e3);
        }
        Ok(latencies_ms)
    }
}

/// Numbers that nobody foresees well enough to be fast by it.
pub struct Dice(u64);

impl Dice {
    pub fn new() -> Self {
        Self(Uuid::new_v4().as_u64_pair().0)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The low bits of such a sequence come round soon.
        self.0 >> 24
    }
}
