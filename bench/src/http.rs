//! A client that costs little: keep-alive HTTP/1.1 over one socket, and no more of it than this service's answers need.
//!
//! It shares its cores with the service. A request is made once and only its id and its value are written anew, so that of the time
//! between two requests most goes to the two system calls.

use std::{io, net::SocketAddr, sync::LazyLock};

use secrecy::ExposeSecret;
use tidings::clients::Key;
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
    pub async fn ask(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
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

    /// The cursor of the next page, in the last answer.
    pub fn next(&self) -> Option<String> {
        let answer = String::from_utf8_lossy(&self.buffer);
        let (_, next) = answer.rsplit_once(r#""next":""#)?;
        next.split_once('"').map(|(next, _)| next.to_owned())
    }
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&answer[..end]).unwrap_or_default();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    answer.len() >= end + 4 + length
}

/// The key that every request carries.
pub static KEY: LazyLock<(Key, String)> = LazyLock::new(|| {
    let (key, text) = Key::generate().expect("the operating system has random bits");
    (key, text.expose_secret().to_owned())
});

/// A request for anything that can be read.
pub fn read(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\r\n", KEY.1)
}

/// As long as [`PLACE_OF_COUNT`].
const COUNTS: u64 = 10_u64.pow(PLACE_OF_COUNT.len() as u32);
const PLACE_OF_COUNT: &str = "0000000000";

/// A request that is made once and asked of many users.
#[derive(Clone)]
pub struct Request {
    bytes: Vec<u8>,
    id_at: usize,
    count_at: Option<usize>,
}

impl Request {
    pub fn get() -> Self {
        Self::new(read(&format!("/v1/users/{}", Uuid::nil())))
    }

    /// A patch that leaves the profile as long as it was.
    pub fn patch() -> Self {
        let body = format!(r#"{{"profile":{{"job_title":"Editor {PLACE_OF_COUNT}"}}}}"#);
        let (nobody, key, length) = (Uuid::nil(), &KEY.1, body.len());
        Self::new(format!(
            "PATCH /v1/users/{nobody} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\
             content-type: application/merge-patch+json\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
    }

    fn new(text: String) -> Self {
        let id_at = text.find(&Uuid::nil().to_string()).expect("it was put there");
        let count_at = text.rfind(PLACE_OF_COUNT).filter(|at| *at > id_at + 36);
        Self { bytes: text.into_bytes(), id_at, count_at }
    }

    /// The request for this user. A patch changes something for as long as no `count` comes twice.
    pub fn of(&mut self, user: Uuid, count: u64) -> &[u8] {
        user.hyphenated().encode_lower(&mut self.bytes[self.id_at..]);
        if let Some(at) = self.count_at {
            let mut rest = count % COUNTS;
            for digit in self.bytes[at..at + PLACE_OF_COUNT.len()].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_written_anew() {
        let (mut patch, user) = (Request::patch(), Uuid::from_u128(0xabc));
        let text = String::from_utf8(patch.of(user, 1_234).to_vec()).unwrap();
        assert!(text.starts_with(&format!("PATCH /v1/users/{user} HTTP/1.1\r\n")), "{text}");
        assert!(text.ends_with(r#"{"profile":{"job_title":"Editor 0000001234"}}"#), "{text}");
        let text = String::from_utf8(Request::get().of(user, 1).to_vec()).unwrap();
        assert!(
            text.starts_with(&format!("GET /v1/users/{user} HTTP/1.1\r\n")) && text.ends_with("\r\n\r\n"),
            "{text}"
        );
    }

    #[test]
    fn an_answer_is_whole_with_its_body() {
        assert!(!is_whole(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{"));
        assert!(is_whole(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"));
    }
}
