//! Gathered fetches: what is asked for while requests are under way goes into the next one.
//!
//! Promise: an answer is as new as the question, or there is none and the caller asks by itself.
//! Not here, on purpose: retries. One user's trouble must not become everybody's, so a request that fails simply answers nobody.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, oneshot};
use uuid::Uuid;

use super::{
    Latest, TRACEPARENT, Tombstone, User,
    http::{Ask, Http},
};
use crate::trace::Traceparent;

/// Users in one request, as many as the owner takes.
const BATCH: usize = 500;
/// Requests under way at the same time.
const REQUESTS: usize = 2;

struct Question {
    user: Uuid,
    trace: Option<Traceparent>,
    answer: oneshot::Sender<Latest>,
}

/// Whoever asks first also carries the questions of those who ask meanwhile: there is no task that could outlive its runtime.
#[derive(Clone)]
pub(super) struct Gatherer {
    http: Arc<Http>,
    waiting: Arc<Mutex<Vec<Question>>>,
    requests: Arc<Semaphore>,
}

impl Gatherer {
    pub(super) fn new(http: Arc<Http>) -> Self {
        Self { http, waiting: Arc::default(), requests: Arc::new(Semaphore::new(REQUESTS)) }
    }

    /// The latest record, or `None`: then ask for this user alone.
    pub(super) async fn ask(&self, user: Uuid, trace: Option<Traceparent>) -> Option<Latest> {
        let (answer, mut heard) = oneshot::channel();
        self.waiting().push(Question { user, trace, answer });
        loop {
            tokio::select! {
                biased;
                latest = &mut heard => return latest.ok(),
                turn = self.requests.acquire() => {
                    let _turn = turn.ok()?;
                    let questions = self.next_batch();
                    // Somebody else has taken ours: only its answer is to be waited for.
                    if questions.is_empty() {
                        return heard.await.ok();
                    }
                    self.carry(questions).await;
                }
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Question>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those who asked first. Whoever hung up is left out.
    fn next_batch(&self) -> Vec<Question> {
        let mut waiting = self.waiting();
        let rest = if waiting.len() > BATCH { waiting.split_off(BATCH) } else { vec![] };
        let batch = mem::replace(&mut *waiting, rest);
        batch.into_iter().filter(|question| !question.answer.is_closed()).collect()
    }

    /// One request. Who gets no answer hears that his question was dropped.
    async fn carry(&self, questions: Vec<Question>) {
        let ids: Vec<Uuid> = questions.iter().map(|question| question.user).collect();
        let trace = match &questions[..] {
            [alone] => alone.trace,
            _ => None,
        };
        let Some(found) = self.fetch(&ids, trace).await else { return };
        for question in questions {
            if let Some(latest) = found.get(&question.user) {
                // The asker may have hung up meanwhile.
                let _ = question.answer.send(latest.clone());
            }
        }
    }

    async fn fetch(&self, ids: &[Uuid], trace: Option<Traceparent>) -> Option<HashMap<Uuid, Latest>> {
        let ask = Ask::post("/v1/users:batchGet", &json!({ "ids": ids }));
        let answer = self.http.ask_once(ask.with(TRACEPARENT, trace.map(|trace| trace.to_string())));
        let batch: Batch = answer.await?.ok().ok()?;
        Some(batch.results.into_iter().filter_map(Entry::latest).map(|latest| (latest.id(), latest)).collect())
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
