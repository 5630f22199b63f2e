//! An attempt: one call of the handler for what waited together, and what comes of it.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use lapin::message::Delivery;
use time::OffsetDateTime;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::{
    back_off,
    handler::{Failure, Handler, Kind, News, Observer},
    memory::Shown,
    park::{Failed, Owed, Parker},
};
use crate::{
    envelope::{Event, Notice},
    letter::Reason,
    owner::{Owner, Receipt},
    subscription::SubscriptionName,
};

/// For the owner's answer to a receipt.
const RECEIPT_DEADLINE: Duration = Duration::from_secs(5);
/// For a state that was waited for before.
const SECOND_PATIENCE: Duration = Duration::from_secs(1);

/// A notice that came in, and the message that it came in.
pub(super) struct Arrival {
    pub notice: Notice,
    pub delivery: Delivery,
    /// Attempts that have failed so far.
    pub attempts: u32,
    /// Whether it tells a state and not a change.
    pub is_backfill: bool,
    /// Whether the owner did not show what it tells of, alone or among others.
    pub was_not_shown: bool,
}

/// What has become of a job.
pub(super) enum Report {
    /// To be acknowledged; a deletion once it is confirmed to the owner, unless that showed somebody living.
    Handled { user: Uuid, event: Event, shown: Option<Shown>, arrivals: Vec<Arrival> },
    /// To be parked.
    Failed { user: Uuid, event: Event, reason: Reason, arrivals: Vec<Arrival> },
    /// Nobody waits for it any more; the messages will come again.
    GivenUp { user: Uuid },
    /// A message that failed is in another queue, or a deletion is confirmed: to be acknowledged; unless it was given up.
    Settled(Option<Box<Delivery>>),
}

/// Everything that attempts share.
pub(super) struct Attempts<H> {
    pub handler: Arc<H>,
    pub owner: Owner,
    pub parker: Arc<Parker>,
    pub observer: Arc<dyn Observer>,
    pub deadline: Duration,
    pub subscription: SubscriptionName,
    /// Whether the owner is told of deletions that are done.
    pub confirms: bool,
    /// Cancelled when the consumer is to leave: work is finished, but no outage is waited out.
    pub stop: CancellationToken,
    /// Cancelled when nobody waits for reports any more.
    pub over: CancellationToken,
}

impl<H: Handler> Attempts<H> {
    /// Handles a group, which is not empty, and with it what is owed to this user.
    pub(super) async fn group(self: Arc<Self>, user: Uuid, arrivals: Vec<Arrival>, owed: Option<Event>) -> Report {
        let (mut news, began) = (self.news(user, &arrivals, owed), Instant::now());
        let span = self.span(&news, &arrivals);
        let outcome = self.attempt(&mut news).instrument(span).await;
        match outcome {
            None => Report::GivenUp { user },
            Some(Ok(())) => {
                let lag = arrivals.iter().map(|arrival| lag(&arrival.notice)).min().unwrap_or_default();
                self.observer.handled(&news.event, arrivals.len(), began.elapsed(), lag);
                // What was fetched may be newer than what was told, and then stands for that too.
                news.tell_caches();
                Report::Handled { user, shown: news.latest.get().map(Shown::of), event: news.event, arrivals }
            }
            Some(Err(reason)) => Report::Failed { user, event: news.event, reason, arrivals },
        }
    }

    /// Of what is owed only the event: its version is told by the message itself, which comes again, and a restored owner may not come to it
    /// for long.
    fn news(&self, user: Uuid, arrivals: &[Arrival], owed: Option<Event>) -> News {
        let notices: Vec<Notice> = arrivals.iter().map(|arrival| arrival.notice.clone()).collect();
        let newest = notices.iter().max_by_key(|notice| notice.version);
        let trace = newest.and_then(|notice| notice.traceparent);
        let mut owner = trace.map_or_else(|| self.owner.clone(), |trace| self.owner.within(trace.child()));
        if let [Arrival { was_not_shown: true, .. }] = arrivals {
            owner = owner.patience_within(SECOND_PATIENCE);
        }
        let version = newest.map_or(1, |notice| notice.version);
        let event = merged(notices.iter().map(|notice| &notice.event).chain(&owed));
        let is_backfill = arrivals.iter().any(|arrival| arrival.is_backfill);
        let (latest, refusal, caches) = Default::default();
        News { user_id: user, version, event, notices, is_backfill, owner, latest, refusal, caches }
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
    async fn attempt(&self, news: &mut News) -> Option<Result<(), Reason>> {
        let mut pauses = back_off();
        loop {
            let called = self.over.run_until_cancelled(self.call(news)).await?;
            let failure = match called {
                Ok(()) => return Some(Ok(())),
                Err(failure) => failure,
            };
            match failure {
                Called::Failed(Failure { kind: Kind::Outage(why), .. }) => {
                    tracing::warn!("an outage, waiting: {why}");
                    self.observer.outage(why);
                    self.stop.run_until_cancelled(sleep(pauses.next().unwrap_or(super::LONGEST_DELAY))).await?;
                    // What is written over a newer version has to be fetched after the handler's look at that version.
                    if news.is_backfill {
                        news.latest = Arc::default();
                    }
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
        let (latest, refusal) = (news.latest.clone(), Arc::<Mutex<_>>::default());
        let news = News {
            notices: news.notices.clone(),
            event: news.event.clone(),
            owner: news.owner.clone(),
            latest: latest.clone(),
            refusal: refusal.clone(),
            caches: news.caches.clone(),
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
            Ok(Ok(outcome)) => outcome.map_err(|failure| {
                // One that is over by now has not made the call fail.
                let refusal = refusal.lock().unwrap_or_else(PoisonError::into_inner).filter(|_| latest.get().is_none());
                Called::Failed(failure.after(refusal))
            }),
            Ok(Err(_)) => Err(Called::Panicked),
            Err(_) => Err(Called::TimedOut),
        }
    }

    /// Parks until it succeeds; the message itself waits unacknowledged meanwhile, and nobody else waits for it.
    pub(super) async fn park(self: Arc<Self>, mut delivery: Delivery, reason: Reason, attempts: u32) -> Report {
        let failed = Failed::take(&mut delivery, reason, attempts);
        Report::Settled(self.park_until_it_succeeds(&failed).await.map(|()| Box::new(delivery)))
    }

    /// Tells the owner that a deletion is done. When it cannot be told, the message goes to a queue that gives it back later, marked as
    /// done: an outage of the owner has no handler run again, and holds up nobody. Without such a queue it waits where it is.
    pub(super) async fn confirm(self: Arc<Self>, user: Uuid, mut delivery: Delivery) -> Report {
        if !self.confirms {
            return Report::Settled(Some(Box::new(delivery)));
        }
        let mut pauses = back_off();
        loop {
            let Some(said) = self.over.run_until_cancelled(self.say_done(user)).await else {
                return Report::Settled(None);
            };
            let why = match said {
                Ok(()) => return Report::Settled(Some(Box::new(delivery))),
                Err(why) => why,
            };
            tracing::warn!(subscription = %self.subscription, user_id = %user, "a deletion is done and cannot be confirmed yet: {why}");
            if self.parker.has_queues() {
                let owed = Owed::take(&mut delivery);
                return Report::Settled(self.owe_until_it_succeeds(&owed).await.map(|()| Box::new(delivery)));
            }
            let pause = sleep(pauses.next().unwrap_or(super::LONGEST_DELAY));
            if self.stop.run_until_cancelled(pause).await.is_none() {
                return Report::Settled(None);
            }
        }
    }

    /// # Errors
    /// Why the owner could not be told.
    async fn say_done(&self, user: Uuid) -> Result<(), String> {
        match timeout(RECEIPT_DEADLINE, self.owner.confirm_deletion(user, &self.subscription)).await {
            Ok(Ok(Receipt::Kept)) => {
                tracing::debug!(subscription = %self.subscription, user_id = %user, "a deletion is confirmed");
                Ok(())
            }
            Ok(Ok(receipt)) => {
                tracing::debug!(subscription = %self.subscription, user_id = %user, ?receipt, "a deletion is done, and the owner keeps no receipt of it");
                Ok(())
            }
            Ok(Err(why)) => Err(why.to_string()),
            Err(_) => Err(format!("no answer within {RECEIPT_DEADLINE:?}")),
        }
    }

    /// `None` when it was given up because nobody waits for it any more.
    async fn owe_until_it_succeeds(&self, owed: &Owed) -> Option<()> {
        let mut pauses = back_off();
        loop {
            match self.over.run_until_cancelled(self.parker.owe(owed)).await? {
                Ok(()) => return Some(()),
                Err(why) => {
                    tracing::warn!(subscription = %self.subscription, "a deletion to be confirmed cannot be put aside, trying again: {why}")
                }
            }
            self.over.run_until_cancelled(sleep(pauses.next().unwrap_or(super::LONGEST_DELAY))).await?;
        }
    }

    /// `None` when it was given up because nobody waits for it any more.
    async fn park_until_it_succeeds(&self, failed: &Failed) -> Option<()> {
        let mut pauses = back_off();
        loop {
            match self.over.run_until_cancelled(self.parker.park(failed)).await? {
                Ok(is_dead) => {
                    self.tell(failed, is_dead);
                    return Some(());
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

/// What several events of one user come to.
fn merged<'a>(events: impl Iterator<Item = &'a Event> + Clone) -> Event {
    if let Some(whole) = [Event::Deleted, Event::Created].into_iter().find(|whole| events.clone().any(|e| e == whole)) {
        return whole;
    }
    let mut changed_fields: Vec<_> = events.flat_map(Event::changed_fields).cloned().collect();
    changed_fields.sort_unstable();
    changed_fields.dedup();
    Event::Updated { changed_fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn updated(fields: &[&str]) -> Event {
        Event::Updated { changed_fields: fields.iter().map(|field| field.parse().unwrap()).collect() }
    }

    #[test]
    fn several_events_come_to_one() {
        let (city, both) = (updated(&["city"]), updated(&["phone", "city"]));
        assert_eq!(merged([&both, &city].into_iter()), updated(&["city", "phone"]));
        assert_eq!(merged([&city, &Event::Created].into_iter()), Event::Created);
        assert_eq!(merged([&Event::Deleted, &Event::Created, &city].into_iter()), Event::Deleted);
    }
}
