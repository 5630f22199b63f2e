//! Requests to the owner: deadlines, retries, and what an answer means.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::Bytes,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER},
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use crate::{
    FOREVER,
    trust::{Connector, InvalidCa, Trust},
};

/// For one try. The owner answers in milliseconds, and gives up by itself after 30 s.
const DEADLINE: Duration = Duration::from_secs(10);
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// More than 500 records of 64 KiB, the most that one request asks for.
const ANSWER_LIMIT_BYTES: usize = 64 * 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// For how long at a time an owner is left alone that asks for it: whoever stands before it may ask for years.
const LONGEST_REST: Duration = Duration::from_secs(120);
const LEFT_ALONE: &str = "it asks to be left alone for now";
pub(super) const SOMEBODY_ELSE: &str = "what answers is not the owner";

/// Not an address of an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected the owner's URL, such as http://127.0.0.1:8080, without query and fragment")]
pub struct InvalidUrl;

/// Not a key that the owner gave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a key such as `tidings client create` prints")]
pub struct InvalidKey;

/// There is no key in the file that should hold one.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("the file with the owner's key cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    #[error(transparent)]
    Invalid(#[from] InvalidKey),
}

/// Why there is no record. Holds no value of anybody's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Nobody ever had this id. Not a deletion: that is [`super::Latest::Gone`].
    #[error("the owner never knew this user")]
    UnknownUser,
    /// The owner has an older state, or none, and nothing newer has come in good time. A forged notice may be the reason.
    #[error("the owner does not show a state this new")]
    NotYetVisible,
    /// An outage: unreachable, silent, asking to be left alone for a while, or somebody else answers in its place. Nothing is wrong with the
    /// request.
    #[error("the owner does not answer: {0}")]
    Unavailable(&'static str),
    /// The owner does not let this key in (401), or not to what was asked for (403). Nothing is wrong with the request: it can be sent
    /// again when there is another key, or the key has another scope.
    #[error("the owner refuses the key: {status} {code}")]
    Denied { status: u16, code: String },
    /// The owner answered, with something else than was asked for.
    #[error("the owner answered {status} {code}")]
    Refused { status: u16, code: String },
    #[error("the owner's answer cannot be read")]
    Malformed,
}

impl FetchError {
    /// Whether it is everybody's trouble, and passes: nothing is wrong with the request, nor with the user that it is about.
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Denied { .. })
    }
}

/// Connections to the owner, kept between requests; over TLS where the URL says so.
pub type Connections = Client<Connector, Full<Bytes>>;

pub(super) struct Http {
    client: Connections,
    url: String,
    patience: Duration,
    /// An owner that asks nobody for a key needs none.
    key: Option<Arc<Key>>,
    /// Shared by all who ask with this key, whatever their patience: another client has another rate.
    rest: Arc<Rest>,
}

/// Until when the owner asked to be left alone.
#[derive(Default)]
struct Rest(Mutex<Option<Instant>>);

impl Rest {
    fn lasts(&self, pause: Duration) {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wished = Some(Instant::now() + pause);
        if *end < wished {
            *end = wished;
        }
    }

    /// Unless it is over.
    fn end(&self) -> Option<Instant> {
        let end = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.filter(|end| *end > Instant::now())
    }
}

/// What opens the owner.
struct Key {
    /// `Bearer` and the key.
    authorization: Mutex<HeaderValue>,
    /// Where to look for another one when this one is refused.
    file: Option<PathBuf>,
}

impl Key {
    fn now(&self) -> HeaderValue {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is another key in place of this one.
    async fn is_replaced(&self, refused: &HeaderValue) -> bool {
        if self.now() == *refused
            && let Some(file) = self.file.clone()
            && let Ok(Ok(authorization)) = spawn_blocking(move || authorization_in(&file)).await
        {
            *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = authorization;
        }
        self.now() != *refused
    }
}

/// White space around a key, such as the end of a secret's file, is no part of it.
fn authorization(key: &str) -> Result<HeaderValue, InvalidKey> {
    let key = key.trim();
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(InvalidKey);
    }
    let mut authorization = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| InvalidKey)?;
    authorization.set_sensitive(true);
    Ok(authorization)
}

fn authorization_in(file: &Path) -> Result<HeaderValue, KeyFileError> {
    Ok(authorization(&fs::read_to_string(file)?)?)
}

/// A request that can be sent again.
pub(super) struct Ask {
    method: Method,
    path: String,
    headers: Vec<(HeaderName, String)>,
    body: Bytes,
}

impl Ask {
    /// `path` is made of ids, numbers and what the owner gave; it needs no escaping.
    pub(super) fn get(path: String) -> Self {
        Self { method: Method::GET, path, headers: vec![], body: Bytes::new() }
    }

    pub(super) fn post(path: &str, body: &Value) -> Self {
        let headers = vec![(CONTENT_TYPE, "application/json".to_owned())];
        Self { method: Method::POST, path: path.to_owned(), headers, body: body.to_string().into() }
    }

    pub(super) fn with(mut self, name: HeaderName, value: Option<String>) -> Self {
        self.headers.extend(value.map(|value| (name, value)));
        self
    }
}

impl Http {
    pub(super) fn at(url: &str) -> Result<Self, InvalidUrl> {
        let parsed: Uri = url.parse().map_err(|_| InvalidUrl)?;
        let is_ours = matches!(parsed.scheme_str(), Some("http" | "https")) && parsed.query().is_none();
        if !is_ours || url.contains('#') {
            return Err(InvalidUrl);
        }
        let url = url.trim_end_matches('/').to_owned();
        let client = connections(&Trust::default()).expect("there is no file that could be wrong");
        Ok(Self { client, url, patience: PATIENCE, key: None, rest: Arc::default() })
    }

    pub(super) fn trusting(&self, trust: &Trust) -> Result<Self, InvalidCa> {
        Ok(Self { client: connections(trust)?, ..self.copy() })
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    pub(super) fn with_patience(&self, patience: Duration) -> Self {
        Self { patience: patience.min(FOREVER), ..self.copy() }
    }

    pub(super) fn with_key(&self, key: &str) -> Result<Self, InvalidKey> {
        Ok(self.authorized(authorization(key)?, None))
    }

    pub(super) fn with_key_file(&self, file: &Path) -> Result<Self, KeyFileError> {
        Ok(self.authorized(authorization_in(file)?, Some(file.to_owned())))
    }

    fn authorized(&self, authorization: HeaderValue, file: Option<PathBuf>) -> Self {
        let key = Key { authorization: Mutex::new(authorization), file };
        Self { key: Some(Arc::new(key)), rest: Arc::default(), ..self.copy() }
    }

    pub(super) fn has_key(&self) -> bool {
        self.key.is_some()
    }

    fn copy(&self) -> Self {
        let (client, url) = (self.client.clone(), self.url.clone());
        Self { client, url, patience: self.patience, key: self.key.clone(), rest: self.rest.clone() }
    }

    /// Sends a request until it is answered, or patience is at its end. A refusal of the key is no answer once there is another key.
    pub(super) async fn ask(&self, ask: Ask) -> Result<Answer, FetchError> {
        self.ask_until(self.end(), ask).await
    }

    /// When patience with a call that begins now is at its end.
    pub(super) fn end(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// The same, with patience until `end`.
    pub(super) async fn ask_until(&self, end: Instant, ask: Ask) -> Result<Answer, FetchError> {
        let (mut pauses, mut told) = (pauses(), None);
        loop {
            self.rested(end).await?;
            let authorization = self.authorization();
            let outage = match timeout_at(end, self.send(&ask, authorization.as_ref())).await {
                Ok(Ok(answer)) if answer.is_denial() && self.is_replaced(authorization.as_ref()).await => continue,
                Ok(Ok(answer)) if answer.is_denial() => return Err(answer.refusal()),
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(outage)) => outage,
                // What was told before says more than a try that was cut short.
                Err(_) => return Err(told.unwrap_or(SILENCE).into()),
            };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE).max(outage.pause);
            if Instant::now() + pause >= end {
                return Err(outage.into());
            }
            told = Some(outage);
            sleep(pause).await;
        }
    }

    /// Waits for as long as the owner asked to be left alone, whoever heard it. If that is longer than until `end`, nothing is waited for.
    async fn rested(&self, end: Instant) -> Result<(), FetchError> {
        while let Some(rest) = self.rest.end() {
            if rest >= end {
                return Err(FetchError::Unavailable(LEFT_ALONE));
            }
            sleep_until(rest).await;
        }
        Ok(())
    }

    /// Sends a request once; the answer, whoever gave it, or `None` without one.
    pub(super) async fn ask_once(&self, ask: Ask) -> Option<Answer> {
        self.exchange(&ask, self.authorization().as_ref()).await.ok()
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.key.as_ref().map(|key| key.now())
    }

    async fn is_replaced(&self, refused: Option<&HeaderValue>) -> bool {
        match (&self.key, refused) {
            (Some(key), Some(refused)) => key.is_replaced(refused).await,
            _ => false,
        }
    }

    async fn send(&self, ask: &Ask, authorization: Option<&HeaderValue>) -> Result<Answer, Outage> {
        let answer = timeout(DEADLINE, self.exchange(ask, authorization)).await.unwrap_or(Err(SILENCE))?;
        let what = match answer.status {
            status if is_outage(status) => LEFT_ALONE,
            _ if !answer.is_the_owners() => SOMEBODY_ELSE,
            _ => return Ok(answer),
        };
        let (pause, is_stale) = (answer.pause, answer.code() == "not_yet_visible");
        // Who is late is so for whoever asks for him: others need not wait, or a forged version would make them.
        if !is_stale {
            self.rest.lasts(pause);
        }
        Err(Outage { what, pause, is_stale })
    }

    async fn exchange(&self, ask: &Ask, authorization: Option<&HeaderValue>) -> Result<Answer, Outage> {
        let broken = |what| Outage { what, ..SILENCE };
        let mut request = Request::builder().method(&ask.method).uri(format!("{}{}", self.url, ask.path));
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        for (name, value) in &ask.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(ask.body.clone())).map_err(|_| broken("the request cannot be written"))?;
        let response = self.client.request(request).await.map_err(|_| broken("it cannot be reached"))?;
        let (status, pause, is_json) = (response.status(), pause_asked_for(&response), is_json(&response));
        let body = Limited::new(response.into_body(), ANSWER_LIMIT_BYTES).collect().await;
        let body = body.map_err(|_| broken("its answer broke off"))?.to_bytes();
        Ok(Answer { status, pause, is_json, body })
    }
}

/// For the owner's own tools, which ask in other ways than an application does.
///
/// # Errors
/// As [`Trust::in_file`].
pub fn connections(trust: &Trust) -> Result<Connections, InvalidCa> {
    Ok(Client::builder(TokioExecutor::new()).build(trust.for_http(CONNECT_DEADLINE)?))
}

/// Jittered, so that consumers that met the same outage do not come back together.
fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE / 2)
        .with_jitter()
        .without_max_times()
        .build()
}

pub(super) struct Outage {
    what: &'static str,
    /// At least this long, as the owner asked.
    pause: Duration,
    /// The owner is well, and has nothing new enough yet.
    is_stale: bool,
}

pub(super) const SILENCE: Outage = Outage { what: "no answer in time", pause: Duration::ZERO, is_stale: false };

impl From<Outage> for FetchError {
    fn from(outage: Outage) -> Self {
        if outage.is_stale { Self::NotYetVisible } else { Self::Unavailable(outage.what) }
    }
}

fn pause_asked_for<B>(response: &Response<B>) -> Duration {
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONGEST_REST)
}

fn is_json<B>(response: &Response<B>) -> bool {
    response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"))
}

/// The owner's own 503 and those of proxies before it. Not 500: that one may be this user's alone, and for ever.
fn is_outage(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::GATEWAY_TIMEOUT
            | StatusCode::REQUEST_TIMEOUT
    )
}

/// The word on a request, the owner's or that of who stands in its place.
pub(super) struct Answer {
    pub status: StatusCode,
    /// For how long its giver asks to be left alone.
    pause: Duration,
    is_json: bool,
    body: Bytes,
}

impl Answer {
    /// Whether it has the marks of an owner's. Not a redirect, nor a page that a gateway shows for maintenance: who believed that would take each
    /// message for one that cannot be handled.
    fn is_the_owners(&self) -> bool {
        match self.status {
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                true
            }
            status if status.is_success() => self.is_json,
            _ => !self.code().is_empty(),
        }
    }

    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, FetchError> {
        serde_json::from_slice(&self.body).map_err(|_| FetchError::Malformed)
    }

    /// The body of a success.
    pub(super) fn ok<T: DeserializeOwned>(&self) -> Result<T, FetchError> {
        if self.status.is_success() { self.read() } else { Err(self.refusal()) }
    }

    /// The stable code of a problem.
    pub(super) fn code(&self) -> String {
        #[derive(Deserialize)]
        struct Problem {
            code: String,
        }
        let is_name = |code: &String| code.len() <= 64 && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let problem: Option<Problem> = serde_json::from_slice(&self.body).ok();
        problem.map(|problem| problem.code).filter(is_name).unwrap_or_default()
    }

    /// The owner's own 404; another one's says that the address is wrong.
    pub(super) fn is_unknown_user(&self) -> bool {
        self.status == StatusCode::NOT_FOUND && self.code() == "user_not_found"
    }

    pub(super) fn is_deleted_user(&self) -> bool {
        self.status == StatusCode::GONE && self.code() == "user_deleted"
    }

    /// Whether it is the key that is refused, not the request.
    pub(super) fn is_denial(&self) -> bool {
        matches!(self.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
    }

    pub(super) fn refusal(&self) -> FetchError {
        let (status, code) = (self.status.as_u16(), self.code());
        if self.is_denial() { FetchError::Denied { status, code } } else { FetchError::Refused { status, code } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patience_without_end_has_one() {
        let http = Http::at("http://127.0.0.1:8080").unwrap().with_patience(Duration::MAX);
        assert!(http.end() > Instant::now() + http.patience() / 2);
        let asks = Response::builder().header(RETRY_AFTER, u64::MAX);
        assert_eq!(pause_asked_for(&asks.body(()).unwrap()), LONGEST_REST);
    }

    #[test]
    fn white_space_around_a_key_is_no_part_of_it() {
        assert_eq!(authorization(" tdg_a\n").unwrap(), authorization("tdg_a").unwrap());
        for wrong in ["", "\n", "tdg_a tdg_b", "tdg_ä"] {
            assert!(authorization(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_owner_has_a_plain_address() {
        for right in ["http://127.0.0.1:8080", "https://users.example.org/", "http://proxy/owner"] {
            assert!(Http::at(right).is_ok(), "{right}");
        }
        for wrong in ["", "127.0.0.1:8080", "ftp://x", "http://x?y=1", "http://x#y", "amqp://x"] {
            assert!(Http::at(wrong).is_err(), "{wrong}");
        }
    }
}
