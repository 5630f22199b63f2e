//! Dial: TCP to a host that may have several addresses.
//!
//! Promise: an address that does not answer delays the next one by moments, and does not keep it from being reached.
//! Not here, on purpose: a deadline for the whole, and what is said once it stands.

use std::{io, net::SocketAddr, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{net::lookup_host, time::timeout};

/// Until the next address is tried beside those that have not answered: the delay that RFC 8305 recommends.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

/// The first connection to any address of a host that stands.
///
/// # Errors
/// When the host has no address, or each of them refused: with the last refusal.
pub(crate) async fn dial<T>(
    host: &str,
    port: u16,
    connect: impl AsyncFn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    any_of(lookup_host((host, port)).await?, connect).await
}

/// In their order, which is the resolver's preference, each a moment after the one before it or as soon as that has refused.
async fn any_of<T>(
    addresses: impl IntoIterator<Item = SocketAddr>,
    connect: impl AsyncFn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut addresses = addresses.into_iter();
    let mut tries = FuturesUnordered::new();
    let mut refusal = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    loop {
        let answer = if let Some(address) = addresses.next() {
            tries.push(connect(address));
            timeout(NEXT_ADDRESS_AFTER, tries.next()).await
        } else {
            Ok(tries.next().await)
        };
        match answer {
            Ok(Some(Ok(connection))) => return Ok(connection),
            Ok(Some(Err(refused))) => refusal = refused,
            Ok(None) => return Err(refusal),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::*;

    /// Longer than an address is waited for before the next one is tried.
    const GIVES_UP: Duration = Duration::from_millis(500);

    /// A listener that answers nobody any more, as behind a network that swallows packets; `TcpStream`s keep it so.
    async fn dead() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = vec![];
        while let Ok(stream) = timeout(GIVES_UP, TcpStream::connect(address)).await {
            waiting.push(stream.unwrap());
        }
        (address, listener, waiting)
    }

    fn localhost() -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    #[tokio::test]
    async fn an_address_that_is_dead_or_refuses_does_not_keep_the_next_from_being_reached() {
        let (dead, _listener, _waiting) = dead().await;
        let alive = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [dead, localhost(), dead, alive.local_addr().unwrap()];
        let reached = timeout(Duration::from_secs(10), any_of(addresses, TcpStream::connect)).await;
        assert_eq!(reached.expect("it is reached").unwrap().peer_addr().unwrap(), alive.local_addr().unwrap());
    }

    #[tokio::test]
    async fn where_each_address_refuses_the_last_refusal_is_told() {
        let refused = any_of([localhost(), localhost()], TcpStream::connect).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let none = any_of([], TcpStream::connect).await.unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }
}
