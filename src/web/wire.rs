//! Wire: the bytes of one connection, with two things that hyper leaves out.
//!
//! Promise: an answer that its client does not take within 30 s ends the connection, however slowly it goes on reading; and what
//! hyper refuses by itself, before a request is one, is a problem+json with a request id like every other refusal.
//! Not here, on purpose: which connection may live (see `connections`).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use super::{Code, Problem, manners::X_REQUEST_ID, traffic::Traffic};

/// For an answer to be taken, from the moment when its client does not keep up. The longest, a page of 500 users of 64 KiB, needs
/// 1 MiB/s.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

pub struct Wire {
    stream: TcpStream,
    traffic: Traffic,
    /// Runs from the first write that could not go on, until everything is written.
    deadline: Option<Pin<Box<Sleep>>>,
    /// What goes out in place of a refusal of hyper's, and how much of it is out.
    instead: Option<(Vec<u8>, usize)>,
}

impl Wire {
    pub fn new(stream: TcpStream, traffic: Traffic) -> Self {
        Self { stream, traffic, deadline: None, instead: None }
    }

    /// `blocked`, unless that has lasted too long.
    fn or_too_late<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_pending() {
            let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(WRITE_DEADLINE)));
            ready!(deadline.as_mut().poll(context));
            self.traffic.unread();
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the answer was not read in time")));
        }
        written
    }

    /// Writes our words in place of `theirs`, which counts as written when ours are out.
    fn write_instead(&mut self, context: &mut Context<'_>, theirs: usize) -> Poll<io::Result<usize>> {
        while let Some((words, out)) = &mut self.instead {
            match ready!(Pin::new(&mut self.stream).poll_write(context, &words[*out..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                more => *out += more,
            }
            if *out == words.len() {
                self.instead = None;
            }
        }
        Poll::Ready(Ok(theirs))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.instead.is_none()
            && let [head] = slices
            && let Some(status) = bare_refusal(head)
        {
            self.instead = Some((in_our_words(status).into_http(), 0));
        }
        let written = if self.instead.is_some() {
            let theirs = slices.iter().map(|slice| slice.len()).sum();
            self.write_instead(context, theirs)
        } else {
            Pin::new(&mut self.stream).poll_write_vectored(context, slices)
        };
        self.or_too_late(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper flushes when it has nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.deadline = None;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The status of an answer that hyper made up itself. It has no body and, other than every answer of ours, no request id.
fn bare_refusal(head: &[u8]) -> Option<StatusCode> {
    let rest = head.strip_prefix(b"HTTP/1.").filter(|rest| rest.get(1..3) == Some(b" 4"))?;
    let lines = head.strip_suffix(b"\r\n\r\n")?.split(|byte| *byte == b'\n');
    let names_its_request = |line: &[u8]| line.starts_with(X_REQUEST_ID.as_str().as_bytes());
    if lines.into_iter().any(names_its_request) { None } else { StatusCode::from_bytes(rest.get(2..5)?).ok() }
}

fn in_our_words(status: StatusCode) -> Problem {
    match status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Code::HeadersTooLarge.into(),
        StatusCode::URI_TOO_LONG => Code::UriTooLong.into(),
        _ => Code::MalformedRequest.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_hyper_says_by_itself_is_said_otherwise() {
        let said = |head: &str| bare_refusal(head.as_bytes()).map(|status| status.as_u16());
        assert_eq!(said("HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"), Some(400));
        assert_eq!(said("HTTP/1.0 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n\r\n"), Some(431));
        assert_eq!(said("HTTP/1.1 404 Not Found\r\nx-request-id: 7\r\ncontent-length: 0\r\n\r\n"), None);
        assert_eq!(said("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), None);
        assert_eq!(said("HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno"), None, "it has a body");
        assert_eq!(said("HTTP/1.1 100 Continue\r\n\r\n"), None);
        assert_eq!(said("HTTP/1.1 4"), None);
        assert_eq!(said(""), None);
    }
}
