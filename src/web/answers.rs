//! Answers: how many bytes may wait for clients that are slow to take them.
//!
//! Promise: of long answers, which are pages and batches, no more than this is in memory, however many clients do not read theirs. Who
//! asks for one more hears 503 `overloaded`; short answers are given all the while.
//! Not here, on purpose: when a client's time is up (see `wire`).

use std::sync::Arc;

use axum::{
    body::{Body, Bytes, HttpBody, to_bytes},
    response::{IntoResponse, Response},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Code, Problem, traffic::Traffic};

/// Up to here an answer is short. As many of these as there may be connections are 640 MiB, if every user is as large as can be.
const SHORT_BYTES: u64 = 64 * 1024;
/// For all long answers. The longest, 500 users of 64 KiB, is 32 MiB.
const ROOM_BYTES: u64 = 256 * 1024 * 1024;
/// One permit.
const UNIT_BYTES: u64 = 1024;

#[derive(Clone)]
pub struct Answers {
    room: Arc<Semaphore>,
    traffic: Traffic,
}

/// Bytes that give their room back when the last of them is written, or never will be.
struct Held {
    bytes: Bytes,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Answers {
    pub fn new(traffic: Traffic) -> Self {
        Self { room: Arc::new(Semaphore::new((ROOM_BYTES / UNIT_BYTES) as usize)), traffic }
    }

    /// The answer, with room for it; or a refusal in its place.
    pub async fn hold(&self, response: Response) -> Response {
        let Some(size) = response.body().size_hint().exact().filter(|size| *size > SHORT_BYTES) else {
            return response;
        };
        let Ok(room) = self.room.clone().try_acquire_many_owned(u32::try_from(size / UNIT_BYTES).unwrap_or(u32::MAX))
        else {
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
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    #[tokio::test]
    async fn long_answers_that_nobody_reads_leave_the_short_ones_alone() {
        let answers = Answers::new(Traffic::default());
        let answer = |bytes: u64| answers.hold(Response::new(Body::from(vec![b'x'; bytes as usize])));
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
