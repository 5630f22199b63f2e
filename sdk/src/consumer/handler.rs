//! What an application brings: a handler, a way to catch up, an observer.

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::{
    cache::Cache,
    envelope::{Event, Notice},
    letter::Reason,
    owner::{FetchError, Latest, Owner},
};

/// The work that notices call for. Each method returns once the work is done: then the notice is acknowledged.
///
/// Called for different users at the same time, for one user never. It may be called again for what it has done already. It must not
/// block its thread: what never gives the thread back cannot be stopped at its deadline.
pub trait Handler: Send + Sync + 'static {
    /// A user has come into being, or into the view of this subscription by a backfill.
    fn created(&self, news: News) -> impl Future<Output = Result<(), Failure>> + Send {
        self.changed(news)
    }

    /// Fields of a user have changed.
    fn updated(&self, news: News) -> impl Future<Output = Result<(), Failure>> + Send {
        self.changed(news)
    }

    /// A user was deleted for good, by the message's word: it may be forged, or from before a restore of the owner. What cannot be undone needs
    /// [`News::latest`] to be [`Latest::Gone`]; that also spares him what else waits for this user, which comes to a call of its own otherwise.
    fn deleted(&self, news: News) -> impl Future<Output = Result<(), Failure>> + Send {
        self.changed(news)
    }

    /// Any of the three, unless its own method says otherwise.
    fn changed(&self, _news: News) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }
}

/// What has happened to one user, from one or several notices that waited together.
#[derive(Debug)]
pub struct News {
    pub user_id: Uuid,
    /// Of the newest notice.
    pub version: i64,
    /// Deleted if the notices say so, which come to a call of their own; else created if one does, else updated in the fields of all of them, and
    /// of those whose last attempt failed. A hint: fields of a notice that [`News::latest`] of an earlier call made old are in none.
    pub event: Event,
    /// The notices that this call stands for, in the order of their versions.
    pub notices: Vec<Notice>,
    pub(super) is_backfill: bool,
    pub(super) owner: Owner,
    pub(super) latest: Arc<OnceCell<Latest>>,
    /// What kept this call from [`News::latest`] the last time that it asked.
    pub(super) refusal: Arc<Mutex<Option<Kind>>>,
    /// Those that heeded it, to be told which version it stood for.
    pub(super) caches: Arc<Mutex<Vec<Cache>>>,
}

impl News {
    /// The latest record of the user, never older than the news. Fetched when it is first asked for.
    ///
    /// # Errors
    /// [`FetchError`], for which `?` does the right thing.
    pub async fn latest(&self) -> Result<Latest, FetchError> {
        let latest = self.latest.get_or_try_init(|| self.owner.latest(self.user_id, self.version)).await;
        if let Err(error) = &latest {
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(kind_of_fetch(error));
        }
        latest.cloned()
    }

    /// Whether a backfill tells how the user is. That counts even if it is a lower version than what was held before
    /// [`News::latest`] was asked: the owner may have been restored from a backup.
    pub fn is_backfill(&self) -> bool {
        self.is_backfill
    }

    pub(crate) fn is_heeded_by(&self, cache: &Cache) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        if !caches.iter().any(|known| known.is(cache)) {
            caches.push(cache.clone());
        }
    }

    /// Tells those that heeded it which version was fetched: notices up to that one come to no call any more.
    pub(super) fn tell_caches(&self) {
        let Some(latest) = self.latest.get() else { return };
        let caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.iter().for_each(|cache| cache.invalidate(self.user_id, latest.version()));
    }
}

/// Why a handler could not do its work. `?` makes one of any error.
pub struct Failure {
    pub(super) kind: Kind,
    cause: Box<dyn Error + Send + Sync>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An attempt of this news.
    Attempt(Reason),
    /// Something that this news has no part in; it waits for it to end, and no attempt is counted. What it is, in words that quote
    /// nobody's data.
    Outage(&'static str),
}

impl Failure {
    /// A failure that has nothing to do with the news at hand: a database of the application's that is down. The news waits where it
    /// is and is tried again, and its attempts are not counted.
    pub fn outage(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: Kind::Outage("the application says so"), cause: cause.into() }
    }

    /// For causes that `?` does not take: words, or an `anyhow::Error`. What kept this call from [`News::latest`] is known whatever it
    /// is wrapped in; others are looked for among the causes, where a bare `anyhow::Error` hides itself: give it a `.context(..)`.
    pub fn because(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        Self { kind: kind(&*cause), cause }
    }

    /// The same, knowing what kept the call from the latest record, which its cause may have lost.
    pub(super) fn after(self, refusal: Option<Kind>) -> Self {
        match (self.kind, refusal) {
            (Kind::Attempt(Reason::HandlerFailed), Some(kind)) => Self { kind, ..self },
            _ => self,
        }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(cause: E) -> Self {
        Self { kind: kind(&cause), cause: Box::new(cause) }
    }
}

/// What the error says, or the first of its causes that is known here: an application wraps errors in its own.
fn kind(error: &(dyn Error + 'static)) -> Kind {
    let chain = std::iter::successors(Some(error), |error| (*error).source());
    chain.into_iter().find_map(known).unwrap_or(Kind::Attempt(Reason::HandlerFailed))
}

fn known(cause: &(dyn Error + 'static)) -> Option<Kind> {
    #[cfg(feature = "mirror")]
    match cause.downcast_ref() {
        Some(crate::mirror::MirrorError::Fetch(error)) => return Some(kind_of_fetch(error)),
        Some(crate::mirror::MirrorError::Database(error)) => return Some(kind_of_database(error)),
        None => {}
    }
    #[cfg(feature = "mirror")]
    if let Some(error) = cause.downcast_ref() {
        return Some(kind_of_database(error));
    }
    cause.downcast_ref().map(kind_of_fetch)
}

fn kind_of_fetch(error: &FetchError) -> Kind {
    match error {
        FetchError::Unavailable(why) => Kind::Outage(why),
        FetchError::Denied { status: 401, .. } => Kind::Outage("the owner refuses the key"),
        FetchError::Denied { .. } => Kind::Outage("the owner does not let this key read users"),
        FetchError::UnknownUser => Kind::Attempt(Reason::UnknownUser),
        FetchError::Refused { .. } | FetchError::NotYetVisible | FetchError::Malformed => {
            Kind::Attempt(Reason::FetchFailed)
        }
    }
}

#[cfg(feature = "mirror")]
fn kind_of_database(error: &sqlx::Error) -> Kind {
    let is_outage = match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
        sqlx::Error::Database(refusal) => refusal.code().is_some_and(|code| is_trouble(&code)),
        _ => false,
    };
    if is_outage {
        Kind::Outage("the application's database does not answer")
    } else {
        Kind::Attempt(Reason::HandlerFailed)
    }
}

/// SQLSTATE classes 08 (connection), 53 (no resources), 57 (operator intervention) and 58 (system error) are the database's trouble, and so is
/// one that takes no writes for now (25006). But a query that was cancelled (57014) has most likely met the application's own
/// `statement_timeout`, and will again.
#[cfg(feature = "mirror")]
fn is_trouble(sqlstate: &str) -> bool {
    ["08", "25006", "53", "57", "58"].iter().any(|trouble| sqlstate.starts_with(trouble)) && sqlstate != "57014"
}

impl Failure {
    /// What may be logged of it.
    pub(crate) fn reason(&self) -> &'static str {
        match self.kind {
            Kind::Outage(why) => why,
            Kind::Attempt(reason) => reason.as_str(),
        }
    }
}

/// The cause, whose words are the application's and may quote its data.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure").field("kind", &self.kind).field("cause", &self.cause).finish()
    }
}

/// How news may have been missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gap {
    /// This process has not listened yet. Its queue may be new, or have been there all the while.
    FirstStart,
    /// The connection was lost; the queue was there all the while.
    Reconnected,
    /// The queue, or what it is bound to, was deleted: what was in it, and what was told since, is missing.
    QueueLost,
}

/// Makes good what was missed.
pub trait CatchUp: Send + Sync + 'static {
    /// Called when the queue is bound, so that nothing more is missed, and before anything is consumed from it. Called again when it
    /// fails.
    fn catch_up(&self, gap: Gap) -> impl Future<Output = Result<(), Failure>> + Send;
}

type BoxedFuture<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

pub(super) trait DynCatchUp: Send + Sync {
    fn run(&self, gap: Gap) -> BoxedFuture<'_>;
}

impl<C: CatchUp> DynCatchUp for C {
    fn run(&self, gap: Gap) -> BoxedFuture<'_> {
        Box::pin(self.catch_up(gap))
    }
}

pub(super) type BoxedCatchUp = Box<dyn DynCatchUp>;

pub(super) fn boxed(catch_up: impl CatchUp) -> BoxedCatchUp {
    Box::new(catch_up)
}

/// Why a notice was acknowledged without a call of the handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dropped {
    /// This version of the user, or a newer one, was handled already.
    Old,
    /// The same message was there twice.
    Duplicate,
}

/// Is told what goes on, to make metrics of it. Every method does nothing unless it is given something to do.
pub trait Observer: Send + Sync + 'static {
    /// Listening.
    fn connected(&self) {}
    fn disconnected(&self) {}
    /// Notices of one user were handled in one call. `lag` is the time since the newest of them happened.
    fn handled(&self, _event: &Event, _notices: usize, _took: Duration, _lag: Duration) {}
    fn dropped(&self, _why: Dropped) {}
    /// An attempt has failed; the message will come again.
    fn failed(&self, _reason: Reason, _attempts: u32) {}
    /// A call of the handler met an outage: of the owner, who may also refuse the key, or of the application's own making. The news waits
    /// and is tried again.
    fn outage(&self, _why: &'static str) {}
    /// A message has become a dead letter.
    fn dead(&self, _reason: Reason) {}
    /// Users that are being handled now.
    fn under_way(&self, _users: usize) {}
}

pub(super) struct Blind;

impl Observer for Blind {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the badge cannot be printed")]
    struct Wrapped(#[source] FetchError);

    #[cfg(feature = "mirror")]
    #[test]
    fn a_database_in_trouble_is_told_from_a_statement_that_takes_too_long() {
        for trouble in ["08006", "25006", "53300", "57P01", "57P03", "58030"] {
            assert!(is_trouble(trouble), "{trouble}");
        }
        for own in ["25001", "57014", "23505", "40001"] {
            assert!(!is_trouble(own), "{own}");
        }
    }

    #[test]
    fn an_outage_is_told_from_a_failed_attempt_however_it_is_wrapped() {
        let unavailable = FetchError::Unavailable("no answer");
        assert_eq!(Failure::from(unavailable.clone()).kind, Kind::Outage("no answer"));
        assert_eq!(Failure::from(Wrapped(unavailable)).kind, Kind::Outage("no answer"));
        for status in [401, 403] {
            let denied = FetchError::Denied { status, code: String::new() };
            assert!(matches!(Failure::from(Wrapped(denied)).kind, Kind::Outage(why) if why.contains("key")));
        }
        assert_eq!(Failure::from(Wrapped(FetchError::UnknownUser)).kind, Kind::Attempt(Reason::UnknownUser));
        let refused = FetchError::Refused { status: 500, code: String::new() };
        assert_eq!(Failure::from(refused).kind, Kind::Attempt(Reason::FetchFailed));
        assert_eq!(Failure::from(std::fmt::Error).kind, Kind::Attempt(Reason::HandlerFailed));
        assert_eq!(Failure::because("no paper").kind, Kind::Attempt(Reason::HandlerFailed));
    }

    #[test]
    fn a_cause_that_question_mark_does_not_take_is_looked_through_too() {
        let unavailable = FetchError::Unavailable("no answer");
        let boxed: Box<dyn Error + Send + Sync> = Box::new(Wrapped(unavailable.clone()));
        assert_eq!(Failure::because(boxed).kind, Kind::Outage("no answer"));
        let in_context = anyhow::Error::new(unavailable).context("no badge");
        assert_eq!(Failure::because(in_context).kind, Kind::Outage("no answer"));
        for kind in [Kind::Outage("no answer"), Kind::Attempt(Reason::FetchFailed)] {
            assert_eq!(Failure::because("no paper").after(Some(kind)).kind, kind);
            assert_eq!(Failure::from(FetchError::UnknownUser).after(Some(kind)).reason(), "unknown_user");
        }
    }
}
