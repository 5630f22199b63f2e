//! The attackers, in a process of their own. They print what they counted as JSON; what should not be is under a name with WRONG.

use std::{
    collections::BTreeMap,
    io::{self, Write, stdout},
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::ValueEnum;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{Settings, corpus};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    SlowHeaders,
    SlowBodies,
    SlowReaders,
    Idle,
    Requests,
}

impl Kind {
    pub const ALL: [Self; 5] = [Self::SlowHeaders, Self::SlowBodies, Self::SlowReaders, Self::Idle, Self::Requests];

    /// Connections at once.
    fn connections(self, settings: &Settings) -> usize {
        match self {
            Self::SlowHeaders => 5000,
            Self::SlowBodies => 2000,
            Self::SlowReaders => 500,
            Self::Idle => settings.idle,
            Self::Requests => 64,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("none is skipped").get_name())
    }
}

pub struct Attack {
    kind: Kind,
    connections: usize,
    at: SocketAddr,
    key: String,
    requests: u64,
    until: Instant,
    sent: AtomicU64,
    counts: Mutex<BTreeMap<String, u64>>,
}

impl Attack {
    pub fn new(kind: Kind, at: SocketAddr, settings: &Settings) -> Self {
        Self {
            kind,
            connections: kind.connections(settings),
            at,
            key: settings.key.clone(),
            requests: settings.requests,
            until: Instant::now() + Duration::from_secs(settings.seconds),
            sent: AtomicU64::new(0),
            counts: Mutex::default(),
        }
    }

    pub fn count(&self, what: &str) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(what.to_owned()).or_default() += 1;
    }
}

pub async fn run(attack: &Attack) -> anyhow::Result<()> {
    let attack =
        Arc::new(Attack { counts: Mutex::default(), key: attack.key.clone(), sent: AtomicU64::new(0), ..*attack });
    let mut attackers = JoinSet::new();
    for number in 0..attack.connections {
        attackers.spawn(attacker(attack.clone(), number));
        if number % 64 == 63 {
            sleep(Duration::from_millis(20)).await;
        }
    }
    attackers.join_all().await;
    let counts = attack.counts.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(stdout().write_all(&serde_json::to_vec(&*counts)?)?)
}

/// Comes back whenever it is thrown out.
async fn attacker(attack: Arc<Attack>, number: usize) {
    if attack.kind == Kind::Requests {
        return corpus::send_all(&attack, number).await;
    }
    while Instant::now() < attack.until {
        let Ok(Ok(mut stream)) = timeout_at(attack.until, connect(attack.at, number)).await else {
            attack.count("could not connect");
            sleep(Duration::from_secs(1)).await;
            continue;
        };
        attack.count("connected");
        let outcome = match attack.kind {
            Kind::SlowHeaders => slow_headers(&attack, &mut stream).await,
            Kind::SlowBodies => slow_body(&attack, number, &mut stream).await,
            Kind::SlowReaders => slow_reader(&attack, number, &mut stream).await,
            Kind::Idle | Kind::Requests => silence(&attack, &mut stream).await,
        };
        if outcome.is_err() {
            attack.count("thrown out");
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// From many addresses of this machine: one alone has too few ports for all the connections that the service has closed.
pub async fn connect(at: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // What an attacker does not read must wait at the service, and not in buffers of this machine that are his.
    socket.set_recv_buffer_size(16 * 1024)?;
    let number = u8::try_from(number % 100).unwrap_or_default();
    socket.bind((Ipv4Addr::new(127, 0, 1, 1 + number), 0).into())?;
    socket.connect(at).await
}

/// A byte a second, for ever. Ends with an error when it is thrown out.
async fn trickle(attack: &Attack, stream: &mut TcpStream) -> io::Result<()> {
    let mut answer = vec![];
    while Instant::now() < attack.until {
        stream.write_all(b"x").await?;
        let Ok(read) = timeout(Duration::from_secs(1), stream.read_buf(&mut answer)).await else { continue };
        let read = read?;
        // The first part of an answer has the status; what follows is its body.
        if let Some(status) = answer.strip_prefix(b"HTTP/1.1 ").and_then(|rest| rest.get(..3)) {
            attack.count(&format!("answered {}", String::from_utf8_lossy(status)));
        }
        answer.clear();
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

async fn slow_headers(attack: &Attack, stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"GET /v1/users HTTP/1.1\r\nhost: localhost\r\nx-").await?;
    trickle(attack, stream).await
}

/// Every other one has a key.
async fn slow_body(attack: &Attack, number: usize, stream: &mut TcpStream) -> io::Result<()> {
    let authorization =
        if number.is_multiple_of(2) { format!("authorization: Bearer {}\r\n", attack.key) } else { String::new() };
    let head = format!(
        "POST /v1/users HTTP/1.1\r\nhost: localhost\r\n{authorization}content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    trickle(attack, stream).await
}

/// Asks for as much as it can and takes a byte a second. Every other one has a key.
async fn slow_reader(attack: &Attack, number: usize, stream: &mut TcpStream) -> io::Result<()> {
    let request = if number.is_multiple_of(2) {
        format!("GET /v1/users?limit=500 HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\r\n", attack.key)
    } else {
        "GET /openapi.yaml HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned()
    };
    let asked = request.repeat(64);
    let asking = timeout(Duration::from_secs(5), stream.write_all(asked.as_bytes())).await;
    asking.unwrap_or(Ok(()))?;
    while Instant::now() < attack.until {
        sleep(Duration::from_secs(1)).await;
        // Nothing can be read that was sent; that the service is gone shows when writing.
        stream.read_u8().await?;
        stream.write_all(b"x").await?;
    }
    Ok(())
}

async fn silence(attack: &Attack, stream: &mut TcpStream) -> io::Result<()> {
    match timeout_at(attack.until, stream.read_u8()).await {
        Ok(thrown_out) => thrown_out.map(drop),
        Err(_) => Ok(()),
    }
}

impl Attack {
    /// The number of the next request to send; `None` when all are.
    pub fn next(&self) -> Option<u64> {
        let next = self.sent.fetch_add(1, Ordering::Relaxed);
        if next.is_multiple_of(100_000) {
            eprintln!("hostile: {next} requests sent");
        }
        (next < self.requests).then_some(next)
    }

    pub fn at(&self) -> SocketAddr {
        self.at
    }

    pub fn key(&self) -> &str {
        &self.key
    }
}
