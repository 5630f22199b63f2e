//! Answers: how many bytes may wait for clients that are slow to take them.
//!
//! Promise: of long answers, which are pages and batches, no more than this is in memory, however many clients do not read theirs. Who
//! asks for one more hears 503 `overloaded`; short answers are given all the while, and so is the answer to a change, which may be done
//! and has to be heard: it takes its room even where there is none.
//! Not here, on purpose: when a client's time is up (see `wire`).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    body::{Body, Bytes, HttpBody, to_bytes},
    response::{IntoResponse, Response},
};

use super::{Code, Problem, traffic::Traffic};

/// Up to here an answer is short. As many of these as there may be connections are 640 MiB, if every user is as large as can be.
const SHORT_BYTES: u64 = 64 * 1024;
/// For all long answers. The longest, 500 users of 64 KiB, is 32 MiB.
const ROOM_BYTES: u64 = 256 * 1024 * 1024;

#[derive(Clone)]
pub struct Answers {
    taken_bytes: Arc<AtomicU64>,
    traffic: Traffic,
}

/// What one answer takes, until it is dropped.
struct Room {
    taken_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.taken_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Bytes that give their room back when the last of them is written, or never will be.
struct Held {
    bytes: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Answers {
    pub fn new(traffic: Traffic) -> Self {
        Self { taken_bytes: Arc::default(), traffic }
    }

    /// The answer, with room for it; or a refusal in its place, unless it `has_to_be_heard`.
    pub async fn hold(&self, response: Response, has_to_be_heard: bool) -> Response {
        let Some(size) = response.body().size_hint().exact().filter(|size| *size > SHORT_BYTES) else {
            return response;
        };
        let Some(room) = self.room(size, if has_to_be_heard { u64::MAX } else { ROOM_BYTES }) else {
            self.traffic.shed();
            return Problem::new(Code::Overloaded, "too many long answers wait to be read").into_response();
        };
        let (head, body) = response.into_parts();
        // It is there already, whole.
        match to_bytes(body, usize::MAX).await {
            Ok(bytes) => Response::from_parts(head, Body::from(Bytes::from_owner(Held { bytes, _room: room }))),
            Err(_) => Problem::from(Code::Internal).into_response(),
        }
    }

    /// Room for so many bytes, if with them no more than `at_most` are taken.
    fn room(&self, bytes: u64, at_most: u64) -> Option<Room> {
        let taken = |taken: u64| taken.checked_add(bytes).filter(|taken| *taken <= at_most);
        self.taken_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).ok()?;
        Some(Room { taken_bytes: self.taken_bytes.clone(), bytes })
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    #[tokio::test]
    async fn long_answers_that_nobody_reads_leave_the_short_ones_alone() {
        let answers = Answers::new(Traffic::default());
        let answer = |bytes: u64| answers.hold(Response::new(Body::from(vec![b'x'; bytes as usize])), false);
        let unread = answer(ROOM_BYTES).await;
        assert_eq!(unread.status(), StatusCode::OK);
        assert_eq!(answer(SHORT_BYTES).await.status(), StatusCode::OK);
        assert_eq!(answer(SHORT_BYTES + 1).await.status(), StatusCode::SERVICE_UNAVAILABLE);
        // What hyper writes outlives the body that it came from.
        let bytes = to_bytes(unread.into_body(), usize::MAX).await.unwrap();
        assert_eq!(answer(SHORT_BYTES + 1).await.status(), StatusCode::SERVICE_UNAVAILABLE);
        drop(bytes);
        assert_eq!(answer(SHORT_BYTES + 1).await.status(), StatusCode::OK);
    }
}
