//! Machine: what a figure was measured on, as far as it may be told: no name, no address, no folder.

use std::{fs, thread::available_parallelism, time::Duration};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use url::Url;

const DEADLINE: Duration = Duration::from_secs(10);
const AMQP_PORT: u16 = 5672;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Of tidings; with a + when it had changes that were not committed.
    pub commit: String,
    pub postgres: String,
    pub rabbitmq: String,
    pub cores: usize,
    pub memory_gib: f64,
    /// What waited for a core before the measure began, over a minute. Near the number of cores or above, others were at work.
    pub load_before: f64,
    /// The measure's own load among it.
    pub load_after: f64,
}

impl Machine {
    pub async fn look(pg_url: &Url, amqp_url: &Url, commit: &str) -> anyhow::Result<Self> {
        Ok(Self {
            commit: commit.to_owned(),
            postgres: timeout(DEADLINE, postgres(pg_url)).await.context("Postgres does not answer")??,
            rabbitmq: timeout(DEADLINE, rabbitmq(amqp_url)).await.context("the broker does not answer")??,
            cores: available_parallelism()?.get(),
            memory_gib: memory_gib(),
            load_before: 0.0,
            load_after: 0.0,
        })
    }
}

/// Over the last minute; not a number where nobody counts it.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}

fn memory_gib() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<f64>().ok());
    (total_kib.unwrap_or(f64::NAN) / 1024.0 / 1024.0).round()
}

async fn postgres(url: &Url) -> anyhow::Result<String> {
    let mut connection = PgConnection::connect(url.as_str()).await?;
    let version: String = sqlx::query_scalar("show server_version").fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(version.split(' ').next().unwrap_or_default().to_owned())
}

/// A broker says its version in its first frame, before anybody logs in.
async fn rabbitmq(url: &Url) -> anyhow::Result<String> {
    let host = url.host_str().context("the broker's URL has no host")?;
    let mut stream = TcpStream::connect((host, url.port().unwrap_or(AMQP_PORT))).await?;
    stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
    let mut head = [0; 7];
    stream.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    let mut frame = vec![];
    stream.take(u64::from(length)).read_to_end(&mut frame).await?;
    Ok(text_field(&frame, b"\x07version").unwrap_or_else(|| "unknown".to_owned()))
}

/// A field of type S in a table of AMQP: the name, S, four bytes of length, the text.
fn text_field(frame: &[u8], name: &[u8]) -> Option<String> {
    let at = frame.windows(name.len()).position(|bytes| bytes == name)? + name.len();
    let (length, text) = frame.get(at..)?.strip_prefix(b"S")?.split_at_checked(4)?;
    let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
    Some(String::from_utf8_lossy(text.get(..length)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_in_the_first_frame() {
        assert_eq!(text_field(b"..\x07versionS\x00\x00\x00\x063.10.8..", b"\x07version").as_deref(), Some("3.10.8"));
        assert_eq!(text_field(b"\x07versionS\x00\x00\x00\xff3", b"\x07version"), None);
    }
}
