//! The service, asked until it has said what becomes of a line.
//!
//! Promise: a line is settled by the service's own word; an outage is waited out; sending a line again does no harm.
//! Not here, on purpose: order, and what is written down.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH, RETRY_AFTER},
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use tidings_sdk::owner::Connections;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use super::{
    bundle::Named,
    line::{Person, Refused},
    pace::Pace,
};
use crate::{json::Fault, users::ENTRIES_LIMIT_BYTES};

/// For one try. The service gives itself 30 s and then says so.
const DEADLINE: Duration = Duration::from_secs(35);
/// Five hundred users of 64 KiB; as many refusals with fifty places each have less.
const ANSWER_LIMIT_BYTES: usize = 40 * 1024 * 1024;
/// Nothing has ever answered for so long: the address is wrong.
const NOBODY_AFTER: Duration = Duration::from_secs(10);
/// A 500 may be an accident. A line that met so many is refused.
const FAILURES: u32 = 5;
/// So often a connection broke over one line while other lines were answered.
const BREAKS: u32 = 10;
/// Turns that one line may take: somebody else changes the same user without pause.
pub const ROUNDS: u32 = 20;

pub struct Service {
    connections: Connections,
    /// Without a slash at its end.
    url: String,
    key: Option<HeaderValue>,
    pace: Arc<Pace>,
    stop: CancellationToken,
    /// The deployment asks everybody to say what they expect to meet (428).
    wants_condition: AtomicBool,
    /// Somebody is kept already under an id that was made from an external id.
    meets_known: AtomicBool,
}

/// What became of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Replaced,
    Refused(Refused),
    Blank,
}

impl Outcome {
    /// Whom the line means cannot be told: the one who had this external id and has another one now, or somebody new to whom it was given.
    fn of_another() -> Self {
        let detail = "the user who came in by this external_id does not have it any more, and nobody else has it: if the line means \
                      that user, give it the external_id of now; if it means somebody else, an id of its own";
        Self::Refused(Refused::here("external_id_changed", detail, vec![]))
    }

    pub fn contended() -> Self {
        Self::Refused(Refused::here("contended", "the user is changed all the time; send the line again", vec![]))
    }

    /// The user is there as the line has him.
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Created | Self::Replaced)
    }
}

/// What became of a line that was sent by itself.
pub enum Put {
    Settled(Outcome),
    /// Another user has its external id.
    HeldBy(Holder),
}

/// Who has an external id, and at which version he was seen to have it.
#[derive(Clone, Copy, Deserialize)]
pub struct Holder {
    pub id: Uuid,
    pub version: i64,
}

/// Who is kept under an id that was made from an external id.
enum Met {
    /// Nobody, or who was deleted.
    Nobody,
    /// He has the external id, at this version.
    Him(i64),
    /// Somebody who does not have it any more, or not that this key sees.
    Another,
}

impl From<Outcome> for Put {
    fn from(outcome: Outcome) -> Self {
        Self::Settled(outcome)
    }
}

/// Why the import cannot go on. What was sent and not settled is sent again by the next one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    #[error("stopped")]
    Stopped,
    /// 401.
    #[error("{0}")]
    Unknown(&'static str),
    /// 403.
    #[error(
        "this key may not do that ({0}): an import needs the scope users:write, and users:read for lines with an external_id"
    )]
    Forbidden(String),
    #[error("nobody answers at {0}: {1}\nhint: is the service running, and is TIDINGS_URL right?")]
    Nobody(String, String),
    #[error("what answers at {0} is no tidings: {1}\nhint: TIDINGS_URL is the address without /v1")]
    Stranger(String, StatusCode),
}

/// What a change has to meet.
#[derive(Clone, Copy)]
enum Condition {
    None,
    Absent,
    Version(i64),
}

impl Condition {
    /// What to ask with instead, once it was answered so; `None` when the answer is not about conditions.
    fn after(self, status: u16, version: Option<i64>) -> Option<Self> {
        match (self, status) {
            (Self::None, 428) => Some(Self::Absent),
            (Self::Absent | Self::Version(_), 412) => Some(version.map_or(Self::Absent, Self::Version)),
            _ => None,
        }
    }
}

struct Answer {
    status: StatusCode,
    problem: Problem,
    body: Bytes,
}

/// Problem details, as far as they are needed.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    status: u16,
    code: String,
    detail: String,
    request_id: Option<String>,
    errors: Vec<Fault>,
    version: Option<i64>,
}

impl Service {
    /// # Errors
    /// What is wrong with `url`.
    pub fn at(
        url: &str,
        key: Option<&SecretString>,
        connections: Connections,
        pace: Arc<Pace>,
        stop: CancellationToken,
    ) -> Result<Self, &'static str> {
        let key = key.map(|key| {
            let mut key = HeaderValue::from_str(&format!("Bearer {}", key.expose_secret())).map_err(|_| WRONG_KEY)?;
            key.set_sensitive(true);
            Ok::<_, &'static str>(key)
        });
        let (url, key) = (address(url)?, key.transpose()?);
        Ok(Self {
            connections,
            url,
            key,
            pace,
            stop,
            wants_condition: AtomicBool::new(false),
            meets_known: AtomicBool::new(false),
        })
    }

    /// Brings a user about as the line has it, under `id`; or tells who else has the line's external id, if only that says whom it means.
    /// Then somebody who is there already is only touched at a version at which he has it, as `seen` if he was looked up.
    pub async fn put(&self, id: Uuid, seen: Option<i64>, person: &Person) -> Result<Put, Ended> {
        let mut condition = seen.map_or_else(|| self.first_condition(person), Condition::Version);
        for _ in 0..ROUNDS {
            let Some(answer) = self.ask_again(|| self.replacement(id, condition, &person.body)).await? else {
                return Ok(Outcome::Refused(no_answer()).into());
            };
            let by_external_id = person.by_external_id();
            if answer.status == StatusCode::PRECONDITION_FAILED
                && let Some(external_id) = by_external_id
            {
                self.meets_known.store(true, Ordering::Relaxed);
                condition = match self.meets(id, external_id).await? {
                    Ok(Met::Him(version)) => Condition::Version(version),
                    Ok(Met::Nobody) => Condition::Absent,
                    Ok(Met::Another) => match self.who_has(external_id).await? {
                        Ok(Some(holder)) if holder.id != id => return Ok(Put::HeldBy(holder)),
                        Ok(Some(holder)) => Condition::Version(holder.version),
                        Ok(None) => return Ok(Outcome::of_another().into()),
                        Err(refused) => return Ok(Outcome::Refused(refused).into()),
                    },
                    Err(refused) => return Ok(Outcome::Refused(refused).into()),
                };
                continue;
            }
            if let Some(next) = condition.after(answer.status.as_u16(), answer.problem.version) {
                self.wants_condition.store(true, Ordering::Relaxed);
                condition = next;
                continue;
            }
            let code = answer.problem.code.as_str();
            match (answer.status.as_u16(), code, by_external_id) {
                (201, ..) => return Ok(Outcome::Created.into()),
                (200, ..) => return Ok(Outcome::Replaced.into()),
                (401, ..) => return Err(Ended::Unknown(self.about_the_key())),
                (403, code, _) if code != "field_forbidden" => return Err(Ended::Forbidden(code.to_owned())),
                (409, "external_id_taken", Some(external_id)) => match self.who_has(external_id).await? {
                    Ok(Some(holder)) if holder.id != id => return Ok(Put::HeldBy(holder)),
                    // Whoever had it was deleted meanwhile, or it is he himself by now.
                    Ok(_) => {}
                    Err(refused) => return Ok(Outcome::Refused(refused).into()),
                },
                (status, ..) if is_no_refusal(status, code) => {
                    return Err(Ended::Stranger(self.url.clone(), answer.status));
                }
                _ => return Ok(Outcome::Refused(answer.problem.refusal(answer.status.as_u16())).into()),
            }
        }
        Ok(Outcome::contended().into())
    }

    /// Brings users about in few requests, as far as these settle them; `None` for who has to be asked about alone: somebody else has his
    /// external id, he has another one by now, he is changed all the time, or the service is in trouble.
    pub async fn put_many(&self, people: &[&Named]) -> Result<Vec<Option<Outcome>>, Ended> {
        let by_external_id = |place: usize| people[place].person.by_external_id().is_some();
        // Once one was met they are looked up at once: those who came in before cost two requests for hundreds of them, and not three.
        let looks_first = self.meets_known.load(Ordering::Relaxed);
        let (met, unmet): (Vec<usize>, Vec<usize>) =
            (0..people.len()).partition(|place| looks_first && by_external_id(*place));
        let mut asked = self.conditions(people, met).await?;
        asked.extend(unmet.into_iter().map(|place| (place, self.first_condition(&people[place].person))));
        let mut fates: Vec<Option<Fate>> = people.iter().map(|_| None).collect();
        // Without a condition; for who is not there; for who has the version that was met.
        for _ in 0..3 {
            if asked.is_empty() {
                break;
            }
            let entries: Vec<_> = asked.iter().map(|(place, condition)| (people[*place], *condition)).collect();
            for ((place, _), fate) in asked.iter().zip(self.fates(&entries).await?) {
                fates[*place] = Some(fate);
            }
            let mut met = vec![];
            let once_more = |(place, condition): (usize, Condition)| match fates[place].as_ref()? {
                // The version says nothing of whose it is.
                Fate::Refused { problem } if problem.status == 412 && by_external_id(place) => {
                    met.push(place);
                    None
                }
                Fate::Refused { problem } => Some((place, condition.after(problem.status, problem.version)?)),
                Fate::Created | Fate::Replaced | Fate::Unchanged => None,
            };
            asked = asked.into_iter().filter_map(once_more).collect();
            self.wants_condition.fetch_or(!asked.is_empty(), Ordering::Relaxed);
            self.meets_known.fetch_or(!met.is_empty(), Ordering::Relaxed);
            asked.extend(self.conditions(people, met).await?);
        }
        Ok(fates.into_iter().map(|fate| fate?.settled()).collect())
    }

    fn first_condition(&self, person: &Person) -> Condition {
        let is_careful = person.by_external_id().is_some() || self.wants_condition.load(Ordering::Relaxed);
        if is_careful { Condition::Absent } else { Condition::None }
    }

    /// What those at these places, who bring an external id alone, have to meet; who is left out has to be asked about alone.
    async fn conditions(&self, people: &[&Named], places: Vec<usize>) -> Result<Vec<(usize, Condition)>, Ended> {
        let of = |place: &usize| Some((people[*place].id, people[*place].person.by_external_id()?));
        let ids: Vec<_> = places.iter().filter_map(of).collect();
        let condition = |(place, met)| match met {
            Met::Nobody => Some((place, Condition::Absent)),
            Met::Him(version) => Some((place, Condition::Version(version))),
            Met::Another => None,
        };
        Ok(places.into_iter().zip(self.met(&ids).await?).filter_map(condition).collect())
    }

    /// Who is kept under each of these ids, which were made from these external ids. Nothing when the service does not say: then each is
    /// asked about alone.
    async fn met(&self, ids: &[(Uuid, &str)]) -> Result<Vec<Met>, Ended> {
        if ids.is_empty() {
            return Ok(vec![]);
        }
        let answer = self.ask(ids.len(), || self.look_up(ids)).await?;
        let said = answer.filter(|answer| answer.status != StatusCode::INTERNAL_SERVER_ERROR);
        said.map_or_else(|| Ok(vec![]), |answer| self.found(answer, ids))
    }

    /// The same of one; or why it cannot be told, which refuses the line.
    async fn meets(&self, id: Uuid, external_id: &str) -> Result<Result<Met, Refused>, Ended> {
        let ids = [(id, external_id)];
        let answer = match self.ask_about(|| self.look_up(&ids)).await? {
            Ok(answer) => answer,
            Err(refused) => return Ok(Err(refused)),
        };
        let met = self.found(answer, &ids)?.pop();
        met.map(Ok).ok_or_else(|| Ended::Stranger(self.url.clone(), StatusCode::OK))
    }

    fn look_up(&self, ids: &[(Uuid, &str)]) -> Request<Full<Bytes>> {
        let body = json!({ "ids": ids.iter().map(|(id, _)| id).collect::<Vec<_>>() }).to_string();
        self.request(Method::POST, "/v1/users:batchGet", None, body.into())
    }

    /// What the answer to that says of each.
    fn found(&self, answer: Answer, ids: &[(Uuid, &str)]) -> Result<Vec<Met>, Ended> {
        #[derive(Deserialize)]
        struct Results {
            results: Vec<Lookup>,
        }
        #[derive(Deserialize)]
        struct Lookup {
            user: Option<User>,
        }
        #[derive(Deserialize)]
        struct User {
            version: i64,
            external_id: Option<String>,
        }
        let found: Results = self.read(answer)?;
        let met = |(found, (_, external_id)): (Lookup, &(Uuid, &str))| match found.user {
            None => Met::Nobody,
            Some(user) if user.external_id.as_deref() == Some(external_id) => Met::Him(user.version),
            Some(_) => Met::Another,
        };
        Ok(found.results.into_iter().zip(ids).map(met).collect())
    }

    /// What one request says of users; nothing when it says nothing of them.
    async fn fates(&self, entries: &[(&Named, Condition)]) -> Result<Vec<Fate>, Ended> {
        let body = batch(entries);
        let post = || self.request(Method::POST, "/v1/users:batchReplace", None, body.clone());
        let answer = self.ask(entries.len(), post).await?.filter(|answer| answer.status == StatusCode::OK);
        let fates: Option<Fates> = answer.and_then(|answer| serde_json::from_slice(&answer.body).ok());
        Ok(fates.map(|fates| fates.results).unwrap_or_default())
    }

    fn replacement(&self, id: Uuid, condition: Condition, body: &Bytes) -> Request<Full<Bytes>> {
        let condition = match condition {
            Condition::None => None,
            Condition::Absent => Some((IF_NONE_MATCH, HeaderValue::from_static("*"))),
            Condition::Version(version) => Some((IF_MATCH, crate::web::etag(version))),
        };
        self.request(Method::PUT, &format!("/v1/users/{id}"), condition, body.clone())
    }

    /// Who has this external id, if anybody; or why that cannot be told, which refuses the line.
    async fn who_has(&self, external_id: &str) -> Result<Result<Option<Holder>, Refused>, Ended> {
        #[derive(Deserialize)]
        struct Page {
            users: Vec<Holder>,
        }
        let mut query = Url::parse("http://localhost/v1/users").expect("this is a URL");
        query.query_pairs_mut().append_pair("external_id", external_id);
        let path = format!("/v1/users?{}", query.query().unwrap_or_default());
        let get = || self.request(Method::GET, &path, None, Bytes::new());
        Ok(match self.ask_about(get).await? {
            Ok(answer) if answer.status == StatusCode::NOT_FOUND => Ok(None),
            Ok(answer) => Ok(self.read::<Page>(answer)?.users.first().copied()),
            Err(refused) => Err(refused),
        })
    }

    /// A question about the user of one line; where it is never answered, what refuses the line.
    async fn ask_about(&self, request: impl Fn() -> Request<Full<Bytes>>) -> Result<Result<Answer, Refused>, Ended> {
        Ok(match self.ask_again(request).await? {
            None => Err(no_answer()),
            Some(answer) if answer.status == StatusCode::INTERNAL_SERVER_ERROR => Err(answer.problem.refusal(500)),
            Some(answer) => Ok(answer),
        })
    }

    /// What an answer to a question says.
    fn read<T: DeserializeOwned>(&self, answer: Answer) -> Result<T, Ended> {
        let stranger = || Ended::Stranger(self.url.clone(), answer.status);
        match answer.status.as_u16() {
            200 => serde_json::from_slice(&answer.body).map_err(|_| stranger()),
            401 => Err(Ended::Unknown(self.about_the_key())),
            403 => Err(Ended::Forbidden(answer.problem.code)),
            _ => Err(stranger()),
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        condition: Option<(HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = format!("{}{path}", self.url).parse().expect("a URL and a path of ours");
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.key.clone().map(|key| (AUTHORIZATION, key)));
        headers.extend(condition);
        request
    }

    /// About one user; a 500 is an answer only when it comes time after time.
    async fn ask_again(&self, request: impl Fn() -> Request<Full<Bytes>>) -> Result<Option<Answer>, Ended> {
        for _ in 1..FAILURES {
            let answer = self.ask(1, &request).await?;
            if answer.as_ref().is_none_or(|answer| answer.status != StatusCode::INTERNAL_SERVER_ERROR) {
                return Ok(answer);
            }
            self.pace.hold("500", Duration::ZERO);
        }
        self.ask(1, request).await
    }

    /// Sends a request about so many `users` until it is answered. `None` when it never is, although others are meanwhile.
    async fn ask(&self, users: usize, request: impl Fn() -> Request<Full<Bytes>>) -> Result<Option<Answer>, Ended> {
        let answered = async {
            let mut breaks = 0;
            loop {
                let turn = self.pace.turn(users).await;
                let answers = self.pace.answers();
                let outage = match timeout(DEADLINE, self.exchange(request())).await {
                    Ok(Ok(answer)) => {
                        self.pace.well();
                        return Ok(Some(answer));
                    }
                    Ok(Err(outage)) => outage,
                    Err(_) => Outage { what: "no answer in time".to_owned(), wish: Duration::ZERO },
                };
                if outage.is_silence() && self.pace.unanswered() > NOBODY_AFTER {
                    return Err(Ended::Nobody(self.url.clone(), outage.what));
                }
                self.pace.hold(&outage.what, outage.wish);
                drop(turn);
                breaks += u32::from(outage.is_silence() && self.pace.answers() > answers);
                if breaks > BREAKS {
                    return Ok(None);
                }
            }
        };
        self.stop.run_until_cancelled(answered).await.unwrap_or(Err(Ended::Stopped))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Answer, Outage> {
        let silent = |what: &str| Outage { what: what.to_owned(), wish: Duration::ZERO };
        let response = self
            .connections
            .request(request)
            .await
            .map_err(|error| silent(if error.is_connect() { "no connection" } else { "the connection broke" }))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = Limited::new(response.into_body(), ANSWER_LIMIT_BYTES).collect().await;
        let body = body.map_err(|_| silent("the answer broke off"))?.to_bytes();
        // What stands between us and the service may answer with anything.
        let problem = if status.is_success() { None } else { serde_json::from_slice::<Problem>(&body).ok() };
        let problem = problem.filter(|problem| is_code(&problem.code)).unwrap_or_default();
        if matches!(status.as_u16(), 408 | 429 | 502..=504) {
            let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let what = format!("{} {}", status.as_u16(), problem.code).trim_end().to_owned();
            return Err(Outage { what, wish: Duration::from_secs(seconds.unwrap_or(0)) });
        }
        Ok(Answer { status, problem, body })
    }

    fn about_the_key(&self) -> &'static str {
        match self.key {
            Some(_) => "the service does not know this key, or does not take it any more",
            None => "the service wants a key: set TIDINGS_API_KEY, or TIDINGS_API_KEY_FILE to a file that holds it",
        }
    }
}

/// What stands in a batch around a user's body, at most.
pub const FRAME_BYTES: usize =
    r#"{"id":"0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a","if_version":9223372036854775807},"#.len();
/// So much of what the service takes in one request.
pub const BATCH_BYTES: usize = ENTRIES_LIMIT_BYTES - r#"{"users":[]}"#.len();

/// The bodies as they are, each with whose it is, and what has to be met.
fn batch(entries: &[(&Named, Condition)]) -> Bytes {
    let mut body = br#"{"users":["#.to_vec();
    for (place, (Named { id, person, .. }, condition)) in entries.iter().enumerate() {
        let comma = if place > 0 { "," } else { "" };
        let condition = match condition {
            Condition::None => String::new(),
            Condition::Absent => r#""if_version":0,"#.to_owned(),
            Condition::Version(version) => format!(r#""if_version":{version},"#),
        };
        body.extend(format!(r#"{comma}{{"id":"{id}",{condition}"#).bytes());
        body.extend(&person.body[1..]);
    }
    body.extend(b"]}");
    body.into()
}

/// What became of the users of a batch, in their order.
#[derive(Deserialize)]
struct Fates {
    results: Vec<Fate>,
}

#[derive(Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Fate {
    Created,
    Replaced,
    Unchanged,
    Refused { problem: Problem },
}

impl Fate {
    fn settled(self) -> Option<Outcome> {
        match self {
            Self::Created => Some(Outcome::Created),
            Self::Replaced | Self::Unchanged => Some(Outcome::Replaced),
            Self::Refused { problem } => {
                let status = problem.status;
                problem.is_about_the_line().then(|| Outcome::Refused(problem.refusal(status)))
            }
        }
    }
}

const WRONG_KEY: &str = "TIDINGS_API_KEY holds characters that no key has";

/// Where the service is, in one spelling.
///
/// # Errors
/// What would be right. The URL is not repeated: it may hold a password.
pub fn address(url: &str) -> Result<String, &'static str> {
    const WRONG: &str =
        "expected the service's address, such as http://127.0.0.1:8080, without user, query and fragment";
    let parsed: Url = url.parse().map_err(|_| WRONG)?;
    let is_plain = parsed.username().is_empty() && parsed.password().is_none();
    let is_whole = parsed.has_host() && parsed.query().is_none() && parsed.fragment().is_none();
    if matches!(parsed.scheme(), "http" | "https") && is_plain && is_whole {
        Ok(parsed.as_str().trim_end_matches('/').to_owned())
    } else {
        Err(WRONG)
    }
}

/// No answer, or one that asks to come again.
struct Outage {
    what: String,
    wish: Duration,
}

impl Outage {
    fn is_silence(&self) -> bool {
        !self.what.starts_with(|first: char| first.is_ascii_digit())
    }
}

/// An answer that nobody gives who keeps users: a redirection, or a 404 for a PUT that creates. A 500 anybody may give, and without a word.
fn is_no_refusal(status: u16, code: &str) -> bool {
    status < 400 || matches!(status, 404 | 405 | 426) || (code.is_empty() && status != 500)
}

fn no_answer() -> Refused {
    let detail = "the connection breaks whenever this line is sent, while others are answered";
    Refused::here("no_answer", detail, vec![])
}

fn is_code(code: &str) -> bool {
    (1..=64).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

impl Problem {
    fn refusal(self, status: u16) -> Refused {
        let Self { code, detail, request_id, errors, .. } = self;
        let (code, detail) = if code.is_empty() {
            ("no_reason".to_owned(), "what answers failed at this line each time, and did not say why".to_owned())
        } else {
            (code, detail)
        };
        Refused { status: Some(status), code, detail, request_id, errors }
    }

    /// Whether it settles the line that it was given for, whatever is tried.
    fn is_about_the_line(&self) -> bool {
        match (self.status, self.code.as_str()) {
            (403, code) => code == "field_forbidden",
            (409, code) => code != "external_id_taken",
            (status, _) => (400..500).contains(&status) && !matches!(status, 401 | 408 | 412 | 428 | 429),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_frames_each_body_and_no_more_than_counted() {
        let id = Uuid::from_u128(7);
        let named = |body: &'static str| {
            let person = Person { id: None, external_id: None, body: body.into() };
            Named { line: 1, id, keys: vec![], person }
        };
        let (ana, bo) = (named(r#"{"profile":{"a":1}}"#), named(r#"{"external_id":"E","profile":{}}"#));
        let text = batch(&[(&ana, Condition::None), (&bo, Condition::Version(i64::MAX))]);
        let entries = [
            format!(r#"{{"id":"{id}","profile":{{"a":1}}}}"#),
            format!(r#"{{"id":"{id}","if_version":{},"external_id":"E","profile":{{}}}}"#, i64::MAX),
        ];
        assert_eq!(text, format!(r#"{{"users":[{}]}}"#, entries.join(",")));
        let counted = [&ana, &bo].map(|named| named.person.body.len() + FRAME_BYTES).iter().sum::<usize>();
        assert!(text.len() <= counted + ENTRIES_LIMIT_BYTES - BATCH_BYTES);
    }

    #[test]
    fn what_is_not_about_the_line_does_not_settle_it() {
        let settles = |status: u16, code: &str| {
            Problem { status, code: code.to_owned(), ..Problem::default() }.is_about_the_line()
        };
        for (status, code) in [(422, "profile_invalid"), (410, "user_deleted"), (403, "field_forbidden")] {
            assert!(settles(status, code), "{code}");
        }
        for (status, code) in [
            (0, ""),
            (401, "unauthenticated"),
            (403, "forbidden"),
            (409, "external_id_taken"),
            (412, "version_mismatch"),
            (428, "precondition_required"),
            (429, "rate_limited"),
            (500, "internal"),
            (503, "outcome_unknown"),
        ] {
            assert!(!settles(status, code), "{code}");
        }
    }

    #[test]
    fn an_address_is_plain() {
        assert_eq!(address("http://127.0.0.1:8080/"), Ok("http://127.0.0.1:8080".to_owned()));
        assert_eq!(address("https://users.example.org/master"), Ok("https://users.example.org/master".to_owned()));
        for wrong in ["", "127.0.0.1:8080", "amqp://x", "http://ana:s3cret@x", "http://x?y=1", "http://x#y"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
