//! Gathered fetches: what is asked for while requests are under way goes into the next one.
//!
//! Promise: an answer is as new as the question, or there is none and the caller asks by itself; an outage is told to all who asked
//! together, and to nobody later than his patience ends.
//! Not here, on purpose: a second try after a refusal. One user's trouble must not become everybody's: each asks alone then.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio::{
    sync::{Semaphore, SemaphorePermit, oneshot},
    time::{Instant, sleep_until, timeout_at},
};
use uuid::Uuid;

use super::{
    FetchError, Latest, TRACEPARENT, Tombstone, User,
    http::{Ask, Http, SILENCE},
};
use crate::trace::Traceparent;

/// Users in one request, as many as the owner takes.
const BATCH: usize = 500;
/// Requests under way at the same time.
const REQUESTS: usize = 2;
/// Requests for one user alone under way at the same time: a batch that is refused would become as many of them as it had users.
const ALONE: usize = 8;

struct Question {
    user: Uuid,
    trace: Option<Traceparent>,
    answer: oneshot::Sender<Result<Latest, FetchError>>,
}

/// Whoever asks first also carries the questions of those who ask meanwhile: there is no task that could outlive its runtime.
#[derive(Clone)]
pub(super) struct Gatherer {
    http: Arc<Http>,
    waiting: Arc<Mutex<Vec<Question>>>,
    requests: Arc<Semaphore>,
    alone: Arc<Semaphore>,
}

impl Gatherer {
    pub(super) fn new(http: Arc<Http>) -> Self {
        let turns = |count| Arc::new(Semaphore::new(count));
        Self { http, waiting: Arc::default(), requests: turns(REQUESTS), alone: turns(ALONE) }
    }

    /// A turn to ask alone for a user who was refused among others, to be held meanwhile.
    ///
    /// # Errors
    /// When there is none until `end`.
    pub(super) async fn turn_alone(&self, end: Instant) -> Result<SemaphorePermit<'_>, FetchError> {
        match timeout_at(end, self.alone.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(SILENCE.into()),
        }
    }

    /// The latest record, or `None`: then ask for this user alone.
    ///
    /// # Errors
    /// An outage that lasts until `end`, or for as long as who carries the question waits; or a refusal of all who were asked for together:
    /// then ask for this user alone, in turn.
    pub(super) async fn ask(
        &self,
        user: Uuid,
        trace: Option<Traceparent>,
        end: Instant,
    ) -> Result<Option<Latest>, FetchError> {
        let (answer, mut heard) = oneshot::channel();
        self.waiting().push(Question { user, trace, answer });
        let mut is_taken = false;
        loop {
            let _turn = tokio::select! {
                biased;
                answer = &mut heard => return answer.ok().transpose(),
                turn = self.requests.acquire(), if !is_taken => turn,
                () = sleep_until(end) => return Err(SILENCE.into()),
            };
            let questions = self.next_batch();
            // Somebody else has taken ours: only its answer is to be waited for, and without a turn.
            is_taken = questions.is_empty();
            if !is_taken {
                self.carry(questions, end).await;
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Question>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those who asked first. Whoever hung up is left out, and takes nobody's place: it is empty only if nobody waits.
    fn next_batch(&self) -> Vec<Question> {
        let mut waiting = self.waiting();
        waiting.retain(|question| !question.answer.is_closed());
        let rest = if waiting.len() > BATCH { waiting.split_off(BATCH) } else { vec![] };
        mem::replace(&mut *waiting, rest)
    }

    /// One request. Who gets no answer hears that his question was dropped.
    async fn carry(&self, questions: Vec<Question>, end: Instant) {
        let ids: Vec<Uuid> = questions.iter().map(|question| question.user).collect();
        let trace = match &questions[..] {
            [alone] => alone.trace,
            _ => None,
        };
        let found = self.fetch(&ids, trace, end).await;
        for question in questions {
            let answer = match &found {
                Ok(found) => found.get(&question.user).cloned().map(Ok),
                Err(error) => Some(Err(error.clone())),
            };
            if let Some(answer) = answer {
                // The asker may have hung up meanwhile.
                let _ = question.answer.send(answer);
            }
        }
    }

    async fn fetch(
        &self,
        ids: &[Uuid],
        trace: Option<Traceparent>,
        end: Instant,
    ) -> Result<HashMap<Uuid, Latest>, FetchError> {
        let ask = Ask::post("/v1/users:batchGet", &json!({ "ids": ids }));
        let ask = ask.with(TRACEPARENT, trace.map(|trace| trace.to_string()));
        let batch: Batch = self.http.ask_until(end, ask).await?.ok()?;
        Ok(batch.results.into_iter().filter_map(Entry::latest).map(|latest| (latest.id(), latest)).collect())
    }
}

#[derive(Deserialize)]
struct Batch {
    results: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Entry {
    Found {
        user: User,
    },
    Gone {
        id: Uuid,
        version: i64,
        #[serde(with = "time::serde::rfc3339")]
        deleted_at: OffsetDateTime,
    },
    /// Left to the single request, whose 404 is the last word.
    Missing {},
}

impl Entry {
    fn latest(self) -> Option<Latest> {
        match self {
            Self::Found { user } => Some(Latest::Living(user)),
            Self::Gone { id, version, deleted_at } => Some(Latest::Gone(Tombstone { id, version, deleted_at })),
            Self::Missing {} => None,
        }
    }
}
