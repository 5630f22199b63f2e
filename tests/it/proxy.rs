//! A faulty TCP proxy: what stands between the service and its servers when a test says that the network is bad.

use std::{
    net::SocketAddr,
    slice,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{self, AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::timeout,
};

/// What the proxy does to the bytes that pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weather {
    /// New connections are closed at once, and those that stand are cut.
    pub down: bool,
    /// What the client says is held back.
    pub hold_requests: bool,
    /// What the server says is held back.
    pub hold_answers: bool,
    /// What is said after the head of a request or an answer comes a byte a second.
    pub trickle: bool,
    /// How often the connections that stood were cut.
    cuts: usize,
    /// How often the connections that stood were silenced.
    silences: usize,
}

pub struct Proxy {
    address: SocketAddr,
    weather: Arc<watch::Sender<Weather>>,
    held_back: Arc<AtomicBool>,
}

impl Proxy {
    /// A proxy before `server`, in fair weather.
    pub async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, seen) = watch::channel(Weather::default());
        let held_back = Arc::<AtomicBool>::default();
        tokio::spawn(accept(listener, server, seen, held_back.clone()));
        Self { address, weather: Arc::new(weather), held_back }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts every connection and lets none through.
    pub fn down(&self) {
        self.set(Weather { down: true, ..Weather::default() });
    }

    /// Cuts every connection, and lets new ones through.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cuts += 1);
    }

    /// Nothing arrives any more on the connections that stand, and none breaks; new ones get through.
    pub fn silence(&self) {
        self.weather.send_modify(|weather| weather.silences += 1);
    }

    /// Half-open: the server hears the client, and its answers do not arrive.
    pub fn hold_answers(&self) {
        self.set(Weather { hold_answers: true, ..Weather::default() });
    }

    /// The client hears the server, which does not hear what the client says.
    pub fn hold_requests(&self) {
        self.set(Weather { hold_requests: true, ..Weather::default() });
    }

    /// Heads arrive at once, and bodies a byte a second.
    pub fn trickle(&self) {
        self.set(Weather { trickle: true, ..Weather::default() });
    }

    /// Nothing arrives on either side, and no connection breaks.
    pub fn freeze(&self) {
        self.set(Weather { hold_answers: true, hold_requests: true, ..Weather::default() });
    }

    /// Whether anything that was said was ever held back.
    pub fn has_held_back(&self) -> bool {
        self.held_back.load(Relaxed)
    }

    /// Fair weather: what was held back goes through.
    pub fn up(&self) {
        self.set(Weather::default());
    }

    fn set(&self, weather: Weather) {
        self.weather
            .send_modify(|before| *before = Weather { cuts: before.cuts, silences: before.silences, ..weather });
    }
}

async fn accept(
    listener: TcpListener,
    server: SocketAddr,
    weather: watch::Receiver<Weather>,
    held_back: Arc<AtomicBool>,
) {
    while let Ok((client, _)) = listener.accept().await {
        if weather.borrow().down {
            continue;
        }
        let (weather, held_back) = (weather.clone(), held_back.clone());
        tokio::spawn(async move {
            if let Ok(server) = TcpStream::connect(server).await {
                let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
                let ((client_says, to_client), (server_says, to_server)) = (client.into_split(), server.into_split());
                // When one direction ends, both do: a connection that is half alive helps no test.
                tokio::select! {
                    () = pump(client_says, to_server, weather.clone(), &held_back, |weather| weather.hold_requests) => {}
                    () = pump(server_says, to_client, weather.clone(), &held_back, |weather| weather.hold_answers) => {}
                    () = cut(weather) => {}
                }
            }
        });
    }
}

async fn cut(mut weather: watch::Receiver<Weather>) {
    let cuts = weather.borrow().cuts;
    // The proxy outlives its connections, or the test is over.
    let _ = weather.wait_for(|weather| weather.down || weather.cuts != cuts).await;
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    held_back: &AtomicBool,
    is_held: fn(&Weather) -> bool,
) {
    let silences = weather.borrow().silences;
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if is_held(&weather.borrow()) {
            held_back.store(true, Relaxed);
        }
        // What was held back when the line is cut is lost.
        if weather.wait_for(|weather| !weather.down && !is_held(weather) && weather.silences == silences).await.is_err()
        {
            return;
        }
        let Ok(rest) = trickle(&buffer[..length], &mut to, &mut weather).await else { return };
        if to.write_all(rest).await.is_err() {
            return;
        }
    }
}

/// As much as arrives slowly; gives what is left when the weather is, or becomes, another.
async fn trickle<'a>(
    said: &'a [u8],
    to: &mut OwnedWriteHalf,
    weather: &mut watch::Receiver<Weather>,
) -> io::Result<&'a [u8]> {
    if !weather.borrow().trickle {
        return Ok(said);
    }
    let (head, mut body) = said.split_at(said.windows(4).position(|end| end == b"\r\n\r\n").map_or(0, |end| end + 4));
    to.write_all(head).await?;
    while let [next, rest @ ..] = body {
        if timeout(Duration::from_secs(1), weather.wait_for(|weather| !weather.trickle)).await.is_ok() {
            break;
        }
        to.write_all(slice::from_ref(next)).await?;
        body = rest;
    }
    Ok(body)
}
