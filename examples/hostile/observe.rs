//! What is to be seen of the service from outside: its memory, its descriptors, its sessions.

use std::{
    fmt, fs,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context;
use sqlx::{Connection, PgConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::{
    healthy::{Healthy, Seen},
    scratch::Scratch,
};

#[derive(Clone, Copy)]
pub struct Observed {
    pub memory_kib: u64,
    pub descriptors: usize,
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB, {} descriptors", self.memory_kib / 1024, self.descriptors)
    }
}

impl Observed {
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the service is gone")?;
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let memory_kib = memory.context("no VmRSS")?.trim().parse()?;
        Ok(Self { memory_kib, descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() })
    }
}

/// Whether the attackers are at work.
static AT_WORK: AtomicBool = AtomicBool::new(false);

pub struct Done(());

impl Done {
    pub fn new() -> Self {
        AT_WORK.store(true, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        AT_WORK.store(false, Ordering::Relaxed);
    }
}

/// The most memory while the attackers are at work, and what the healthy clients saw meanwhile.
pub async fn highest(pid: u32, healthy: &Healthy) -> anyhow::Result<(Seen, u64)> {
    let mut highest_kib = 0;
    while AT_WORK.load(Ordering::Relaxed) {
        highest_kib = highest_kib.max(Observed::of(pid)?.memory_kib);
        sleep(Duration::from_millis(200)).await;
    }
    Ok((healthy.take(), highest_kib))
}

pub async fn open_transactions(scratch: &Scratch) -> anyhow::Result<i64> {
    let mut connection = PgConnection::connect(scratch.url.as_str()).await?;
    let open = "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'";
    let open = sqlx::query_scalar(open).fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(open)
}

/// What the service itself counted.
pub async fn metrics(at: SocketAddr) -> anyhow::Result<Vec<String>> {
    let mut stream = TcpStream::connect(at).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let ours = |line: &&str| line.starts_with("tidings_connections") || line.starts_with("tidings_requests");
    Ok(text.lines().filter(ours).map(str::to_owned).collect())
}
