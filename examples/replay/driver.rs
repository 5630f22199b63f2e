//! The driver: makes every change of the log happen over REST.
//!
//! Promise: a person's changes are made in the order of the log, each exactly once, whatever answers are lost on the way.
//! Not here, on purpose: order between persons. Nobody may rely on it, so many are changed at once.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use reqwest::StatusCode;
use tokio::task::JoinSet;

use crate::{
    api::{Answer, Api},
    changelog::{Change, Changelog, Op},
};

/// What the service answered last, for each of [`Changelog::lives`].
pub type Answers = Vec<Result<i64, Refused>>;

/// The service would not make a change; the rest of that life was left out.
#[derive(Debug, Clone)]
pub struct Refused {
    line: usize,
    status: StatusCode,
    code: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} was refused: {} {}", self.line, self.status.as_u16(), self.code)
    }
}

#[derive(Clone)]
pub struct Driver {
    pub log: Arc<Changelog>,
    pub api: Arc<Api>,
    /// Changes done with, for whoever watches.
    pub made: Arc<AtomicU64>,
}

impl Driver {
    /// Makes all changes, those of up to `concurrency` persons at once.
    pub async fn run(&self, concurrency: usize) -> Answers {
        let mut shards = JoinSet::new();
        for number in 0..concurrency {
            let driver = self.clone();
            shards.spawn(async move { driver.shard(number, concurrency).await });
        }
        // No answer yet is version 0.
        let mut answers: Answers = vec![Ok(0); self.log.lives.len()];
        for (life, answer) in shards.join_all().await.into_iter().flatten() {
            answers[life] = answer;
        }
        answers
    }

    /// The persons of one shard, change by change. Returns how each life in it came out.
    async fn shard(&self, number: usize, of: usize) -> Vec<(usize, Result<i64, Refused>)> {
        let mut answers = vec![Ok(0); self.log.lives.len()];
        let mut touched = vec![];
        for change in self.log.changes.iter().filter(|change| change.person % of == number) {
            let before = &answers[change.life];
            if matches!(change.op, Op::Create(_)) {
                touched.push(change.life);
            }
            if let Ok(seen) = *before {
                answers[change.life] = self.make(change, seen).await;
            }
            self.made.fetch_add(1, Ordering::Relaxed);
        }
        touched.into_iter().map(|life| (life, answers[life].clone())).collect()
    }

    /// Makes one change of a life that is at version `seen`; the version it is at then.
    async fn make(&self, change: &Change, seen: i64) -> Result<i64, Refused> {
        let user = self.log.lives[change.life].user;
        let answer = match &change.op {
            Op::Create(profile) => self.api.create(user, profile).await,
            Op::Update(patch) => self.api.amend(user, seen, patch).await,
            Op::Delete => self.api.delete(user, seen).await,
        };
        version_after(&change.op, seen, &answer).ok_or_else(|| Refused {
            line: change.line,
            status: answer.status,
            code: answer.code().to_owned(),
        })
    }
}

/// The version that the answer tells; none for a refusal.
fn version_after(op: &Op, seen: i64, answer: &Answer) -> Option<i64> {
    match (op, answer.status) {
        (Op::Create(_), StatusCode::CREATED) | (Op::Update(_), StatusCode::OK) => answer.version(),
        // Says nothing of the version: the contract does.
        (Op::Delete, StatusCode::NO_CONTENT) => Some(seen + 1),
        // The condition does not hold any more because a request before this one made the change, and its answer was lost: nobody
        // else writes these users. Anything but the next version is somebody else's doing.
        (Op::Create(_) | Op::Update(_), StatusCode::PRECONDITION_FAILED) if answer.repeated => {
            answer.version().filter(|version| *version == seen + 1)
        }
        _ => None,
    }
}
