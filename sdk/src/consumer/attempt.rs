//! An attempt: one call of the handler for what waited together, and what comes of it.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use lapin::message::Delivery;
use time::OffsetDateTime;
use tokio::{
    sync::OnceCell,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::{
    back_off,
    handler::{Failure, Handler, Kind, News, Observer},
    park::{Failed, Parker},
};
use crate::{
    envelope::{Event, Notice},
    letter::Reason,
    owner::Owner,
};

/// A notice that came in, and the message that it came in.
pub(super) struct Arrival {
    pub notice: Notice,
    pub delivery: Delivery,
    /// Attempts that have failed so far.
    pub attempts: u32,
}

/// What has become of a group.
pub(super) struct Report {
    pub user: Uuid,
    /// To be acknowledged.
    pub done: Vec<Delivery>,
    /// The version that was handled, and what it was; `None` when the handler failed.
    pub handled: Option<(i64, Event)>,
}

/// Everything that attempts share.
pub(super) struct Attempts<H> {
    pub handler: Arc<H>,
    pub owner: Owner,
    pub parker: Arc<Parker>,
    pub observer: Arc<dyn Observer>,
    pub deadline: Duration,
    pub subscription: String,
    /// Cancelled when nobody waits for reports any more.
    pub over: CancellationToken,
}

impl<H: Handler> Attempts<H> {
    /// Handles a group, which is not empty, and parks what failed.
    pub(super) async fn group(self: Arc<Self>, user: Uuid, arrivals: Vec<Arrival>) -> Report {
        let (news, began) = (self.news(user, &arrivals), Instant::now());
        let (version, event, latest) = (news.version, news.event.clone(), news.latest.clone());
        let lag = arrivals.iter().map(|arrival| lag(&arrival.notice)).min().unwrap_or_default();
        let span = self.span(&news, &arrivals);
        match self.attempt(&news).instrument(span).await {
            None => Report { user, done: vec![], handled: None },
            Some(Ok(())) => {
                self.observer.handled(&event, arrivals.len(), began.elapsed(), lag);
                // What was fetched may be newer than what was told, and then stands for that too.
                let fetched = latest.get().map_or(version, |latest| latest.version());
                let done = arrivals.into_iter().map(|arrival| arrival.delivery).collect();
                Report { user, done, handled: Some((version.max(fetched), event)) }
            }
            Some(Err(reason)) => {
                let done = self.park_all(arrivals, reason).await;
                Report { user, done, handled: None }
            }
        }
    }

    /// A message that is no notice: a dead letter at once.
    pub(super) async fn malformed(self: Arc<Self>, delivery: Delivery) -> Report {
        let done = self.park(delivery, Reason::Malformed, 0).await.into_iter().collect();
        Report { user: Uuid::nil(), done, handled: None }
    }

    fn news(&self, user: Uuid, arrivals: &[Arrival]) -> News {
        let notices: Vec<Notice> = arrivals.iter().map(|arrival| arrival.notice.clone()).collect();
        let newest = notices.iter().max_by_key(|notice| notice.version);
        let trace = newest.and_then(|notice| notice.traceparent);
        let owner = trace.map_or_else(|| self.owner.clone(), |trace| self.owner.within(trace.child()));
        let version = newest.map_or(1, |notice| notice.version);
        News { user_id: user, version, event: merged(&notices), notices, owner, latest: Arc::new(OnceCell::new()) }
    }

    /// Part of the trace of the request that made the change.
    fn span(&self, news: &News, arrivals: &[Arrival]) -> tracing::Span {
        let trace = news.notices.iter().max_by_key(|notice| notice.version).and_then(|notice| notice.traceparent);
        tracing::info_span!(
            "handle",
            subscription = %self.subscription,
            user_id = %news.user_id,
            version = news.version,
            event = news.event.name(),
            notices = arrivals.len(),
            attempts = arrivals.iter().map(|arrival| arrival.attempts).max().unwrap_or_default(),
            traceparent = trace.map(tracing::field::display),
        )
    }

    /// `None` when it was given up because nobody waits for it any more.
    async fn attempt(&self, news: &News) -> Option<Result<(), Reason>> {
        let mut pauses = back_off();
        loop {
            let called = self.over.run_until_cancelled(self.call(news)).await?;
            let failure = match called {
                Ok(()) => return Some(Ok(())),
                Err(failure) => failure,
            };
            match failure {
                Called::Failed(Failure { kind: Kind::Outage, .. }) => {
                    tracing::warn!("an outage, waiting");
                    self.over.run_until_cancelled(sleep(pauses.next().unwrap_or(super::LONGEST_DELAY))).await?;
                }
                Called::Failed(failure @ Failure { kind: Kind::Attempt(reason), .. }) => {
                    tracing::debug!(?failure, "the handler failed");
                    return Some(Err(reason));
                }
                Called::Panicked => return Some(Err(Reason::HandlerPanicked)),
                Called::TimedOut => return Some(Err(Reason::HandlerTimedOut)),
            }
        }
    }

    async fn call(&self, news: &News) -> Result<(), Called> {
        let news = News {
            notices: news.notices.clone(),
            event: news.event.clone(),
            owner: news.owner.clone(),
            latest: news.latest.clone(),
            ..*news
        };
        let work = async {
            match news.event {
                Event::Created => self.handler.created(news).await,
                Event::Updated { .. } => self.handler.updated(news).await,
                Event::Deleted => self.handler.deleted(news).await,
            }
        };
        match timeout(self.deadline, AssertUnwindSafe(work).catch_unwind()).await {
            Ok(Ok(outcome)) => outcome.map_err(Called::Failed),
            Ok(Err(_)) => Err(Called::Panicked),
            Err(_) => Err(Called::TimedOut),
        }
    }

    /// What was parked, and can be acknowledged.
    async fn park_all(&self, arrivals: Vec<Arrival>, reason: Reason) -> Vec<Delivery> {
        let mut done = vec![];
        for Arrival { delivery, attempts, .. } in arrivals {
            done.extend(self.park(delivery, reason, attempts).await);
        }
        done
    }

    /// Parks until it succeeds; the message itself waits unacknowledged meanwhile. `None` when nobody waits for it any more.
    async fn park(&self, delivery: Delivery, reason: Reason, attempts: u32) -> Option<Delivery> {
        let failed = Failed { properties: delivery.properties.clone(), body: delivery.data.clone(), reason, attempts };
        let mut pauses = back_off();
        loop {
            match self.over.run_until_cancelled(self.parker.park(&failed)).await? {
                Ok(is_dead) => {
                    self.tell(&failed, is_dead);
                    return Some(delivery);
                }
                Err(why) => {
                    tracing::warn!(subscription = %self.subscription, "a message that failed cannot be put aside, trying again: {why}")
                }
            }
            self.over.run_until_cancelled(sleep(pauses.next().unwrap_or(super::LONGEST_DELAY))).await?;
        }
    }

    fn tell(&self, Failed { properties, reason, attempts, .. }: &Failed, is_dead: bool) {
        let attempts = attempts + 1;
        // Not whatever a stranger put there.
        let message_id = crate::envelope::message_id(properties).map(tracing::field::display);
        if is_dead {
            tracing::warn!(subscription = %self.subscription, message_id, %reason, attempts, "a dead letter");
            self.observer.dead(*reason);
        } else {
            tracing::warn!(subscription = %self.subscription, message_id, %reason, attempts, "an attempt failed");
            self.observer.failed(*reason, attempts);
        }
    }
}

enum Called {
    Failed(Failure),
    Panicked,
    TimedOut,
}

fn lag(notice: &Notice) -> Duration {
    (OffsetDateTime::now_utc() - notice.occurred_at).try_into().unwrap_or_default()
}

/// What several notices of one user come to.
fn merged(notices: &[Notice]) -> Event {
    if notices.iter().any(|notice| notice.event == Event::Deleted) {
        return Event::Deleted;
    }
    if notices.iter().any(|notice| notice.event == Event::Created) {
        return Event::Created;
    }
    let mut changed_fields: Vec<_> = notices.iter().flat_map(|notice| notice.event.changed_fields()).cloned().collect();
    changed_fields.sort_unstable();
    changed_fields.dedup();
    Event::Updated { changed_fields }
}
