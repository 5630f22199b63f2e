//! Repetitions: a request that comes again under the same `Idempotency-Key` is not done again.
//!
//! Promise: of all requests of a client with one key, the first that was decided counts, on whichever instance, also when it crashed
//! before it could answer: what it came to is committed by the statement that made the change.
//! Not here, on purpose: values. What came of a request is kept as ids and versions, the request itself as a salted hash.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sha2::{Digest, Sha256};
use tidings_sdk::envelope::Event;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    change::{Change, Changed, Naming, Refusal, Step, Verb},
    model::{Record, Tombstone, UserId, Version},
    store,
};
use crate::db::Line;

/// Between two looks for what may go.
const PURGE_EVERY: Duration = Duration::from_secs(60);
/// Rows in one statement.
const PURGE: i64 = 1_000;

/// A client's claim that this is one request, however often it is sent.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Hash of client and key.
    pub key: [u8; 32],
    pub salt: [u8; 16],
    /// Hash of the request.
    pub fingerprint: [u8; 32],
}

impl Claim {
    /// `change`, claimed by `client` under `key`.
    pub fn of(client: &str, key: &str, change: &Change) -> Self {
        let salt = Uuid::new_v4().into_bytes();
        let key = Parts::default().with(client.as_bytes()).with(key.as_bytes()).digest();
        Self { key, salt, fingerprint: fingerprint(change, &salt) }
    }
}

/// What tells a request from another one. The id of a new user is ours, and another one each time.
fn fingerprint(change: &Change, salt: &[u8; 16]) -> [u8; 32] {
    let id = change.id.0.into_bytes();
    let condition = format!("{:?}", change.condition);
    let (verb, id, content): (&str, &[u8], String) = match &change.verb {
        Verb::Create(fields) => ("create", &[], json(fields)),
        Verb::Amend(patch) => ("amend", &id, json(patch)),
        Verb::Replace { fields, .. } => ("replace", &id, json(fields)),
        Verb::Delete => ("delete", &id, String::new()),
    };
    let (naming, external_id) = match &change.external_id {
        Naming::Stays => ("stays", ""),
        Naming::Is(external_id) => ("is", external_id.as_str()),
        Naming::Goes => ("goes", ""),
    };
    let parts = Parts::default().with(salt).with(verb.as_bytes()).with(id).with(condition.as_bytes());
    parts.with(naming.as_bytes()).with(external_id.as_bytes()).with(content.as_bytes()).digest()
}

/// The members stand in order of name, so that one document has one text.
fn json(fields: &crate::profile::Fields) -> String {
    serde_json::to_string(fields).expect("a map with string keys is always JSON")
}

/// Texts one after another, each with its length, so that none runs into the next.
#[derive(Default)]
struct Parts(Sha256);

impl Parts {
    fn with(mut self, part: &[u8]) -> Self {
        self.0.update((part.len() as u64).to_be_bytes());
        self.0.update(part);
        self
    }

    fn digest(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Changed,
    /// Everything was so already.
    Unchanged,
    Deleted,
    Missing,
    Gone,
    Stale,
    Taken,
}

impl Outcome {
    const ALL: [Self; 8] = [
        Self::Created,
        Self::Changed,
        Self::Unchanged,
        Self::Deleted,
        Self::Missing,
        Self::Gone,
        Self::Stale,
        Self::Taken,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
            Self::Deleted => "deleted",
            Self::Missing => "missing",
            Self::Gone => "gone",
            Self::Stale => "stale",
            Self::Taken => "taken",
        }
    }

    pub fn from_kept(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == text)
    }

    /// Of a change that is written.
    pub fn of(step: &Step) -> Self {
        match step.event {
            Event::Created => Self::Created,
            Event::Updated { .. } => Self::Changed,
            Event::Deleted => Self::Deleted,
        }
    }

    /// Of a change that was decided without being written, with the version it met. `None` for one whose request alone decides:
    /// that is decided anew, and comes to the same.
    pub fn unwritten(decided: &Result<Changed, Refusal>) -> Option<(Self, Version)> {
        match decided {
            Ok(Changed { record: Record::Deleted(tombstone), .. }) => Some((Self::Deleted, tombstone.version)),
            Ok(Changed { record, .. }) => Some((Self::Unchanged, record.version())),
            Err(Refusal::Missing) => Some((Self::Missing, 0)),
            Err(Refusal::Gone(tombstone)) => Some((Self::Gone, tombstone.version)),
            Err(Refusal::Stale(version)) => Some((Self::Stale, version.unwrap_or(0))),
            Err(Refusal::Taken) => Some((Self::Taken, 0)),
            Err(Refusal::Invalid(_) | Refusal::Unconditional) => None,
        }
    }
}

/// A request that was decided before.
#[derive(Debug, Clone)]
pub struct Remembered {
    pub salt: [u8; 16],
    /// `None` once the user is deleted.
    pub fingerprint: Option<[u8; 32]>,
    pub outcome: Outcome,
    pub user_id: UserId,
    pub version: Version,
    pub at: OffsetDateTime,
}

/// What a repetition is answered from.
pub enum Recalled {
    /// As it was then.
    Final(Result<Changed, Refusal>),
    /// As the user is now: no values were kept, and of one who was gone not since when.
    Now { created: bool },
}

impl Remembered {
    /// Whether `change` is the request that was decided.
    pub fn is_of(&self, change: &Change) -> bool {
        match &self.fingerprint {
            Some(kept) => *kept == fingerprint(change, &self.salt),
            None => self.may_be_of(change),
        }
    }

    /// Of a deleted user the request is not kept. Whom it was about and what it came to still tell most others from it, and no
    /// request gets an answer that it could not get.
    fn may_be_of(&self, change: &Change) -> bool {
        use Outcome::{Changed, Created, Deleted, Gone, Missing, Stale, Taken, Unchanged};
        let outcomes: &[Outcome] = match &change.verb {
            // The id is ours, and another one each time.
            Verb::Create(_) => return matches!(self.outcome, Created | Taken),
            Verb::Amend(_) => &[Changed, Unchanged, Missing, Gone, Stale, Taken],
            Verb::Replace { .. } => &[Created, Changed, Unchanged, Gone, Stale, Taken],
            Verb::Delete => &[Deleted, Missing, Stale],
        };
        change.id == self.user_id && outcomes.contains(&self.outcome)
    }

    pub fn recalled(&self) -> Recalled {
        let tombstone = Tombstone { id: self.user_id, version: self.version, deleted_at: self.at };
        Recalled::Final(match self.outcome {
            Outcome::Created => return Recalled::Now { created: true },
            Outcome::Changed | Outcome::Unchanged | Outcome::Gone => return Recalled::Now { created: false },
            Outcome::Deleted => Ok(Changed::nothing(Record::Deleted(tombstone))),
            Outcome::Missing => Err(Refusal::Missing),
            Outcome::Stale => Err(Refusal::Stale((self.version > 0).then_some(self.version))),
            Outcome::Taken => Err(Refusal::Taken),
        })
    }
}

/// The claims whose requests are under way in this process.
#[derive(Clone, Default)]
pub struct UnderWay(Arc<Mutex<HashSet<[u8; 32]>>>);

impl UnderWay {
    /// `None` when one with this key is under way already.
    pub fn enter(&self, claim: &Claim) -> Option<Turn> {
        let entered = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(claim.key);
        entered.then(|| Turn { under_way: self.clone(), key: claim.key })
    }
}

/// Ends with the request, answered or not.
pub struct Turn {
    under_way: UnderWay,
    key: [u8; 32],
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.under_way.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Lets go of what was kept for a day, until `stop`. Any number of instances may do it.
pub async fn purge(mut line: Line, stop: CancellationToken) {
    // A clock that goes on evenly, however the machine's is set meanwhile.
    let (began_at, began) = (OffsetDateTime::now_utc(), Instant::now());
    while !stop.is_cancelled() {
        let now = began_at + began.elapsed();
        match line.run(async |connection| store::purge(connection, PURGE, now).await).await {
            // There may be more.
            Ok(purged) if purged == PURGE.unsigned_abs() => continue,
            Ok(_) => {}
            Err(trouble) => tracing::debug!("old idempotency keys are purged later: {}", trouble.report()),
        }
        stop.run_until_cancelled(sleep(PURGE_EVERY)).await;
    }
    line.hang_up().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{profile::Fields, web::Precondition};
    use serde_json::json;
    use tidings_sdk::trace::Traceparent;

    fn amendment(id: UserId, patch: serde_json::Value) -> Change {
        let fields: Fields = patch.as_object().unwrap().clone();
        Change::new(id, Verb::Amend(fields), Traceparent::new_root())
    }

    #[test]
    fn another_request_has_another_fingerprint_and_the_same_one_the_same() {
        let id = UserId::new();
        let first = amendment(id, json!({ "city": "Riga", "nickname": null }));
        let claim = Claim::of("crm", "k", &first);
        let same = amendment(id, json!({ "nickname": null, "city": "Riga" }));
        assert_eq!(fingerprint(&same, &claim.salt), claim.fingerprint);
        for other in [
            amendment(UserId::new(), json!({ "city": "Riga", "nickname": null })),
            amendment(id, json!({ "city": "Riga" })),
            Change { condition: Precondition::VersionIn(vec![1]), ..first.clone() },
            Change { external_id: Naming::Goes, ..first.clone() },
            Change { verb: Verb::Delete, ..first.clone() },
        ] {
            assert_ne!(fingerprint(&other, &claim.salt), claim.fingerprint, "{other:?}");
        }
        assert_ne!(Claim::of("crm", "k", &first).fingerprint, claim.fingerprint, "salted");
        assert_eq!(Claim::of("crm", "k", &first).key, claim.key);
        assert_ne!(Claim::of("crmk", "", &first).key, claim.key, "a key of another client");
    }

    #[test]
    fn of_a_deleted_user_no_request_gets_an_answer_that_it_could_not_get() {
        let user_id = UserId::new();
        let remembered = |outcome| {
            let at = OffsetDateTime::UNIX_EPOCH;
            Remembered { salt: [0; 16], fingerprint: None, outcome, user_id, version: 2, at }
        };
        let change = |id, verb| Change::new(id, verb, Traceparent::new_root());
        let (patch, other) = (json!({ "city": "Riga" }).as_object().unwrap().clone(), UserId::new());
        assert!(remembered(Outcome::Changed).is_of(&amendment(user_id, json!({ "city": "Riga" }))));
        assert!(remembered(Outcome::Deleted).is_of(&change(user_id, Verb::Delete)));
        assert!(!remembered(Outcome::Deleted).is_of(&change(other, Verb::Delete)), "of somebody else");
        assert!(!remembered(Outcome::Deleted).is_of(&change(user_id, Verb::Amend(patch.clone()))), "was no deletion");
        assert!(!remembered(Outcome::Changed).is_of(&change(user_id, Verb::Delete)), "was a deletion");
        assert!(!remembered(Outcome::Changed).is_of(&change(other, Verb::Amend(patch))), "of somebody else");
    }

    #[test]
    fn every_outcome_is_read_as_it_was_kept() {
        for outcome in Outcome::ALL {
            assert_eq!(Outcome::from_kept(outcome.as_str()), Some(outcome));
        }
    }

    #[test]
    fn one_key_is_under_way_once() {
        let (under_way, change) = (UnderWay::default(), amendment(UserId::new(), json!({})));
        let claim = Claim::of("crm", "k", &change);
        let turn = under_way.enter(&claim);
        assert!(turn.is_some() && under_way.enter(&claim).is_none());
        drop(turn);
        assert!(under_way.enter(&claim).is_some());
    }
}
