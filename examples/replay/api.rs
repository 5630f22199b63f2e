//! The REST API, asked until it answers.
//!
//! Promise: an answer that is handed on is the service's last word on the request, and says whether the request was repeated.
//! Not here, on purpose: a limit to patience. Whoever asks bounds it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use reqwest::{
    Client, Method, RequestBuilder, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH, RETRY_AFTER},
};
use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use crate::changelog::Fields;

/// For one try. The service gives itself 30 s; a loaded one answers in milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

pub struct Api {
    http: Client,
    users: String,
    /// Requests sent, the repeated ones included.
    pub requests: AtomicU64,
    pub retries: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// What the service said.
pub struct Answer {
    pub status: StatusCode,
    /// Null when there is none.
    pub body: Value,
    /// The request was sent more than once: an earlier one, whose answer was lost, may have done its work.
    pub repeated: bool,
}

impl Answer {
    pub fn version(&self) -> Option<i64> {
        self.body.get("version")?.as_i64()
    }

    /// The stable code of a refusal.
    pub fn code(&self) -> &str {
        self.body.get("code").and_then(Value::as_str).unwrap_or("no code")
    }
}

impl Api {
    pub fn new(url: &str, key: &str) -> anyhow::Result<Self> {
        let mut authorization = HeaderValue::from_str(&format!("Bearer {key}")).context("TIDINGS_API_KEY")?;
        authorization.set_sensitive(true);
        let headers = HeaderMap::from_iter([(AUTHORIZATION, authorization)]);
        let http = Client::builder().timeout(DEADLINE).no_proxy().default_headers(headers).build()?;
        let users = format!("{}/v1/users", url.trim_end_matches('/'));
        Ok(Self { http, users, requests: AtomicU64::new(0), retries: AtomicU64::new(0), trouble: Mutex::default() })
    }

    /// Whether a service answers at all; one that is only half well may get better.
    pub async fn check(&self) -> anyhow::Result<()> {
        let page = self.http.get(format!("{}?limit=1", self.users)).send().await.context("no service answers")?;
        let looks_right = matches!(page.status(), StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE);
        anyhow::ensure!(looks_right, "what answers is no tidings: {}", page.status());
        Ok(())
    }

    /// Only if there is no such user yet: repeated, it cannot create twice.
    pub async fn create(&self, user: Uuid, profile: &Fields) -> Answer {
        let body = json!({ "profile": profile }).to_string();
        self.ask(|| {
            let request = self.request(Method::PUT, user).header(CONTENT_TYPE, "application/json");
            request.header(IF_NONE_MATCH, "*").body(body.clone())
        })
        .await
    }

    /// Only on the version that was seen: one that was lost on the way and arrives late cannot undo what came after.
    pub async fn amend(&self, user: Uuid, seen: i64, patch: &Fields) -> Answer {
        let body = json!({ "profile": patch }).to_string();
        self.ask(|| {
            let request = self.request(Method::PATCH, user).header(CONTENT_TYPE, "application/merge-patch+json");
            request.header(IF_MATCH, format!("\"{seen}\"")).body(body.clone())
        })
        .await
    }

    pub async fn delete(&self, user: Uuid, seen: i64) -> Answer {
        self.ask(|| self.request(Method::DELETE, user).header(IF_MATCH, format!("\"{seen}\""))).await
    }

    /// The user in a state no older than `min_version`.
    pub async fn fetch(&self, user: Uuid, min_version: i64) -> Answer {
        self.ask(|| self.http.get(format!("{}/{user}?min_version={min_version}", self.users))).await
    }

    /// What the service last said instead of an answer; nothing when it answers.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    fn request(&self, method: Method, user: Uuid) -> RequestBuilder {
        self.http.request(method, format!("{}/{user}", self.users))
    }

    async fn ask(&self, request: impl Fn() -> RequestBuilder) -> Answer {
        let mut pause = FIRST_PAUSE;
        let mut repeated = false;
        loop {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let at_least = match answer(request()).await {
                Ok(Heard::Final(status, body)) => {
                    self.note(None);
                    return Answer { status, body, repeated };
                }
                Ok(Heard::NotNow(status, wanted)) => {
                    self.note(Some(status.to_string()));
                    wanted
                }
                // No connection, or one that broke: the answer may be lost and the work done.
                Err(error) => {
                    self.note(Some(if error.is_connect() { "no connection" } else { "no answer" }.to_owned()));
                    Duration::ZERO
                }
            };
            self.retries.fetch_add(1, Ordering::Relaxed);
            repeated = true;
            sleep(jittered(pause).max(at_least)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

enum Heard {
    Final(StatusCode, Value),
    NotNow(StatusCode, Duration),
}

async fn answer(request: RequestBuilder) -> reqwest::Result<Heard> {
    let response = request.send().await?;
    let status = response.status();
    if matches!(status.as_u16(), 408 | 429 | 502..=504) {
        let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        return Ok(Heard::NotNow(status, Duration::from_secs(header.unwrap_or(0)).min(LONGEST_PAUSE)));
    }
    // A refusal of something between us and the service need not be JSON.
    Ok(Heard::Final(status, serde_json::from_slice(&response.bytes().await?).unwrap_or_default()))
}

/// Between half of it and all of it, so that those who failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = f64::from(Uuid::new_v4().as_bytes()[0]) / 255.0;
    pause.mul_f64(0.5 + random / 2.0)
}
