//! A client that costs little: keep-alive HTTP/1.1 over one socket, and no more of it than this service's answers need.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(8 * 1024) })
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// When the connection breaks, or the status is not 200.
    pub async fn ask(&mut self, request: &str) -> io::Result<()> {
        self.stream.write_all(request.as_bytes()).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if is_whole(&self.buffer) {
                break;
            }
        }
        if self.buffer.starts_with(b"HTTP/1.1 200") {
            Ok(())
        } else {
            let status = self.buffer.split(|byte| *byte == b'\r').next().unwrap_or_default();
            Err(io::Error::other(format!("answered {}", String::from_utf8_lossy(status))))
        }
    }
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&answer[..end]).unwrap_or_default();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    answer.len() >= end + 4 + length
}

pub fn get(user: Uuid) -> String {
    format!("GET /v1/users/{user} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

/// A patch that changes something, for as long as no `count` comes twice, and leaves the profile as long as it was.
pub fn patch(user: Uuid, count: u64) -> String {
    let body = format!(r#"{{"profile":{{"job_title":"Editor {count:010}"}}}}"#);
    let length = body.len();
    format!(
        "PATCH /v1/users/{user} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/merge-patch+json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}
