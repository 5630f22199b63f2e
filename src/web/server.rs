//! The accept loop: HTTP/1.1 with the limits and deadlines that `axum::serve` does not have.
//!
//! Promise: no client can hold a connection for ever, and none of them, however many, keeps the others out.
//! Not here, on purpose: what a request may do (see `manners`).

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{Router, extract::Request, response::Response};
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Code, Limits, Problem, connections::Seated, wire::Wire};
use crate::lifecycle::DRAIN_BOUND;

/// From the first byte of a request to the end of its headers, and for an idle connection to send one.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Up to so much is added to it, so that those who came together do not go, and come back, together.
const DEADLINE_SPREAD_MS: u64 = 256;
/// For a request's line and headers.
const HEADER_LIMIT_BYTES: usize = 16 * 1024;
/// After a failed accept (no file descriptors left): time for some connections to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For a client who is turned away to take the answer.
const FAREWELL: Duration = Duration::from_secs(1);
/// How many are told so at the same time; others only find the connection closed. Well below `descriptors::RESERVE`.
const FAREWELLS: usize = 64;

/// In the kernel, for what a client has not taken yet; the kernel doubles it. Without a bound it grows to megabytes for whoever asks and
/// does not read. Enough for 25 MB/s at 10 ms.
const SEND_BUFFER_BYTES: u32 = 128 * 1024;
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;

/// For the requests that are under way when the process is asked to leave, and for their clients to read the answers. As much is left for
/// what comes after them.
const FINISHING: Duration = Duration::from_secs(DRAIN_BOUND.as_secs() / 2);

/// For what comes while the process starts, until it hears that this takes longer.
const STARTING: Duration = Duration::from_secs(2);

/// Where the connection of a request comes from: the client, or a proxy before it.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// Listens on `address`.
///
/// # Errors
/// When somebody else does, or nobody may.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections that ended lately must not keep a new process from its port.
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What a port leads to: to a few answers while the process starts, and from then on to the app.
pub struct Door {
    /// Paths that lead there at once.
    at_once: &'static [&'static str],
    meanwhile: TowerToHyperService<Router>,
    app: OnceLock<TowerToHyperService<Router>>,
    is_open: CancellationToken,
}

impl Door {
    /// What is not asked for at these paths waits for the app, for a moment, before `meanwhile` answers it too.
    pub fn new(at_once: &'static [&'static str], meanwhile: Router) -> Arc<Self> {
        let (app, is_open) = (OnceLock::new(), CancellationToken::new());
        Arc::new(Self { at_once, meanwhile: TowerToHyperService::new(meanwhile), app, is_open })
    }

    /// From now on each request meets `app`, also on connections that are there already.
    pub fn open(&self, app: Router) {
        // Once.
        let _ = self.app.set(TowerToHyperService::new(app));
        self.is_open.cancel();
    }

    /// Most starts take a moment: what comes meanwhile need not hear that the app is not there.
    async fn wait(&self, path: &str) {
        if self.app.get().is_none() && !self.at_once.contains(&path) {
            let _ = timeout(STARTING, self.is_open.cancelled()).await;
        }
    }

    fn leads_to(&self) -> &TowerToHyperService<Router> {
        self.app.get().unwrap_or(&self.meanwhile)
    }
}

/// Serves until `stop`, then finishes the requests that are under way, within a bound.
pub async fn serve(listener: TcpListener, door: Arc<Door>, limits: Limits, stop: CancellationToken) {
    let (graceful, too_late) = (GracefulShutdown::new(), CancellationToken::new());
    let farewells = Arc::new(Semaphore::new(FAREWELLS));
    let keeping_room = tokio::spawn({
        let (connections, stop) = (limits.connections.clone(), stop.clone());
        async move { stop.run_until_cancelled(connections.keep_room()).await }
    });
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(seated) = limits.connections.admit() {
            let app = AtPeer { door: door.clone(), peer: Peer(peer), seated };
            let until = Until { stop: stop.clone(), too_late: too_late.clone() };
            tokio::spawn(connection(stream, app, limits.clone(), until, graceful.watcher()));
        } else {
            limits.traffic.full();
            if let Ok(turn) = farewells.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    let _ = timeout(FAREWELL, turn_away(stream)).await;
                    drop(turn);
                });
            }
        }
    }
    drop(listener);
    let _ = keeping_room.await;
    if timeout(FINISHING, graceful.shutdown()).await.is_err() {
        tracing::warn!(
            "leaving without clients who are slow to ask or to read, and requests that take longer than {FINISHING:?}"
        );
        too_late.cancel();
    }
}

/// When a connection ends although its client would go on.
struct Until {
    /// With the request that is under way.
    stop: CancellationToken,
    /// Whatever is under way.
    too_late: CancellationToken,
}

async fn connection(stream: TcpStream, app: AtPeer, limits: Limits, until: Until, watcher: Watcher) {
    let _counted = limits.traffic.connected();
    // Not all at once that came at once.
    let deadline = HEADER_DEADLINE + Duration::from_millis(app.seated.number % DEADLINE_SPREAD_MS);
    let mut first = [0];
    tokio::select! {
        // First: a request that is here is answered, also when we are about to stop.
        biased;
        spoken = timeout(deadline, stream.peek(&mut first)) => match spoken {
            // Only who says something gets the buffers and whatever else it takes to answer.
            Ok(Ok(1..)) => Box::pin(conversation(stream, app, deadline, limits, until.too_late, watcher)).await,
            Ok(Ok(0) | Err(_)) => {}
            Err(_) => limits.traffic.no_request(),
        },
        () = app.seated.seat.cut() => {
            limits.traffic.cut();
            // Nothing was said, so nothing can be lost, and the system need not remember the connection for a minute.
            let _ = stream.set_zero_linger();
        }
        () = until.stop.cancelled() => {}
    }
}

async fn conversation(
    stream: TcpStream,
    app: AtPeer,
    deadline: Duration,
    limits: Limits,
    too_late: CancellationToken,
    watcher: Watcher,
) {
    // Answers are small and must not wait for each other (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(deadline)
        .max_header_size(HEADER_LIMIT_BYTES)
        .max_buf_size(HEADER_LIMIT_BYTES);
    let seat = app.seated.seat.clone();
    let wire = Wire::new(stream, limits.traffic.clone());
    let served = watcher.watch(http.serve_connection(TokioIo::new(wire), app));
    tokio::select! {
        served = served => if let Err(error) = served {
            if error.is_timeout() {
                limits.traffic.no_request();
            }
            tracing::debug!(%error, "a connection broke");
        },
        () = seat.cut() => limits.traffic.cut(),
        // What its handler has begun at the database ends there, as when a client hangs up.
        () = too_late.cancelled() => {}
    }
}

/// The app as one connection sees it. Its seat is given up with it.
struct AtPeer {
    door: Arc<Door>,
    peer: Peer,
    seated: Seated,
}

impl Service<Request<Incoming>> for AtPeer {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response, Self::Error>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer);
        request.extensions_mut().insert(self.seated.seat.clone());
        let Some(at_work) = self.seated.seat.at_work() else {
            // The connection ends, and this with it.
            return Box::pin(std::future::pending());
        };
        let door = self.door.clone();
        Box::pin(async move {
            door.wait(request.uri().path()).await;
            let answer = door.leads_to().call(request).await;
            drop(at_work);
            answer
        })
    }
}

/// Says why, and waits until it was heard: to close at once, with a request unread, would take the words back.
async fn turn_away(mut stream: TcpStream) {
    let words = Problem::new(Code::Overloaded, "too many connections are at work").into_http();
    if stream.write_all(&words).await.is_ok() && stream.shutdown().await.is_ok() {
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await.is_ok_and(|bytes| bytes > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;
    use crate::web::{LimitSettings, Proxies};

    #[tokio::test]
    async fn what_comes_while_the_process_starts_waits_for_the_app_and_a_probe_does_not() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let limits = LimitSettings { connections: 9, requests: 9, rate: None, proxies: Proxies::default() };
        let door = Door::new(&["/healthz"], Router::new().route("/healthz", get("alive")).fallback("not yet"));
        let serving = tokio::spawn(serve(listener, door.clone(), Limits::new(limits), stop.clone()));
        let ask = async |path: &str| {
            let mut line = TcpStream::connect(address).await.unwrap();
            let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            line.write_all(head.as_bytes()).await.unwrap();
            line
        };
        let heard = async |mut line: TcpStream| {
            let mut answer = String::new();
            line.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let early = ask("/v1/users").await;
        assert!(heard(ask("/healthz").await).await.ends_with("alive"));
        door.open(Router::new().fallback("the app"));
        let answer = heard(early).await;
        assert!(answer.ends_with("the app"), "{answer}");
        stop.cancel();
        serving.await.unwrap();
    }
}
