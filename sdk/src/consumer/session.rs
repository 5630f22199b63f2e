//! A session: one connection to the broker, from being bound to being lost.

use std::{cmp::Reverse, collections::HashSet, fmt, mem, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Connection, ConnectionProperties,
    message::Delivery,
    options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::FieldTable,
    uri::AMQPUri,
};
use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, interval_at, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Consumer, StartError,
    attempt::{Arrival, Attempts, Report},
    handler::{Dropped, Gap, Handler},
    lanes::Lanes,
    ledger::{Ack, Ledger},
    memory::{Memory, Shown},
    park::{self, Parker},
};
use crate::{
    envelope::{Event, Notice},
    letter::{Letter, Reason},
    topology,
    trust::Trust,
};

/// For the whole of connecting: lapin itself would wait for a silent peer for ever.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// For a request on a channel, and for saying goodbye.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// For handlers that run when the connection is lost: their messages will come again, and one user is not handled twice at once.
const LOSS_FAREWELL: Duration = Duration::from_secs(5);
/// An outage of the owner's has to be told before the call is out of time, which would count as a failed attempt. At the worst patience
/// is needed to be answered among others, to get a turn alone, to be shown, and to be known at all.
const WAITS_IN_A_CALL: u32 = 4;
const ABORT_DEADLINE: Duration = Duration::from_secs(1);

/// How a session ended.
pub(super) enum Ended {
    /// In order, as it was asked to.
    Left,
    /// The queue, or the exchange that it was bound to, is gone.
    QueueLost,
    /// By an answer that will be the same again, unless somebody changes something.
    Refused(StartError),
    Lost(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("left"),
            Self::QueueLost => f.write_str("the queue, or the exchange before it, was deleted"),
            Self::Refused(error) => error.fmt(f),
            Self::Lost(why) => f.write_str(why),
        }
    }
}

impl From<topology::Error> for Ended {
    fn from(error: topology::Error) -> Self {
        match error {
            topology::Error::Differs(_) | topology::Error::Missing(_) | topology::Error::Forbidden(_) => {
                Self::Refused(error.into())
            }
            topology::Error::Silent | topology::Error::Broken(_) => Self::Lost(error.to_string()),
        }
    }
}

fn lost(error: lapin::Error) -> Ended {
    Ended::Lost(error.to_string())
}

/// Where the broker is, and by whose word it is known.
#[derive(Clone)]
pub(super) struct Address {
    pub uri: AMQPUri,
    pub trust: Trust,
}

impl Address {
    /// Connects, without lapin's own recovery: what was under way on a lost connection comes again.
    pub(super) async fn connect(&self, name: &str) -> Result<Connection, Ended> {
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        match timeout(CONNECT_DEADLINE, self.trust.connect(&self.uri, properties)).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) if is_login_refused(&error) => Err(Ended::Refused(StartError::Login)),
            Ok(Err(error)) => Err(Ended::Lost(format!("the broker cannot be reached: {error}"))),
            Err(_) => Err(Ended::Lost(format!("the broker did not answer within {CONNECT_DEADLINE:?}"))),
        }
    }
}

fn is_login_refused(error: &lapin::Error) -> bool {
    let lapin::ErrorKind::ProtocolError(error) = error.kind() else { return false };
    matches!(
        error.kind(),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
    )
}

pub(super) struct Session<'a> {
    consumer: &'a Consumer,
    connection: Connection,
    channel: Channel,
    lanes: Lanes<Arrival>,
    jobs: JoinSet<Report>,
    /// Of `channel`.
    ledger: Ledger,
}

impl<'a> Session<'a> {
    /// Connects, binds, and catches up, in this order: what is told from now on waits in the queue.
    pub(super) async fn open(consumer: &'a Consumer, gap: &mut Gap, stop: &CancellationToken) -> Result<Self, Ended> {
        let opened = stop.run_until_cancelled(Self::open_until_stopped(consumer, gap)).await;
        opened.unwrap_or(Err(Ended::Left))
    }

    async fn open_until_stopped(consumer: &'a Consumer, gap: &mut Gap) -> Result<Self, Ended> {
        let name = &consumer.subscription.name;
        let connection = consumer.broker.connect(name.as_str()).await?;
        let looking = request(connection.create_channel()).await?;
        if let Some(part) = consumer.missing(&looking).await? {
            // New at the first start; later it was there, and somebody deleted it.
            if *gap == Gap::Reconnected {
                *gap = Gap::QueueLost;
            }
            if part == name.queue() && !consumer.settings.declares {
                return Err(Ended::Refused(StartError::NotRegistered(part)));
            }
        }
        let channel = request(connection.create_channel()).await?;
        if consumer.settings.declares {
            consumer.declare(&channel).await?;
        }
        let session = Self {
            consumer,
            connection,
            channel,
            lanes: Lanes::new(),
            jobs: JoinSet::new(),
            ledger: Ledger::default(),
        };
        if let Some(catch_up) = &consumer.catch_up {
            tracing::info!(subscription = %name, ?gap, "catching up");
            match AssertUnwindSafe(catch_up.run(*gap)).catch_unwind().await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => {
                    tracing::debug!(?failure, "catching up failed");
                    return Err(Ended::Lost(format!("catching up failed: {}", failure.reason())));
                }
                Err(_) => return Err(Ended::Lost("catching up panicked".to_owned())),
            }
        }
        *gap = Gap::Reconnected;
        Ok(session)
    }

    /// Handles what comes in, until `stop` or the end of the connection.
    pub(super) async fn run<H: Handler>(
        &mut self,
        handler: &Arc<H>,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Ended {
        let over = CancellationToken::new();
        let attempts = Arc::new(self.attempts(handler.clone(), stop.clone(), over.clone()));
        let ended = match self.listen(&attempts, memory, stop).await {
            Ok(()) => Ended::Left,
            Err(ended) => ended,
        };
        let bound = if matches!(ended, Ended::Left) { self.consumer.settings.farewell } else { LOSS_FAREWELL };
        self.finish(&attempts, memory, bound).await;
        // What is acknowledged and not looked at yet, RabbitMQ drops with the connection, but not with its channel.
        let _ = request(self.channel.close(200, "bye".into())).await;
        let _ = timeout(REQUEST_DEADLINE, self.connection.close(200, "bye".into())).await;
        ended
    }

    fn attempts<H: Handler>(&self, handler: Arc<H>, stop: CancellationToken, over: CancellationToken) -> Attempts<H> {
        let Consumer { broker, subscription, owner, settings, observer, .. } = self.consumer;
        let parker = Parker::new(broker.clone(), subscription.name.clone(), settings.retry_delays().to_vec());
        Attempts {
            handler,
            owner: owner.patience_within(settings.handler_deadline / WAITS_IN_A_CALL),
            parker: Arc::new(parker),
            observer: observer.clone(),
            deadline: settings.handler_deadline,
            subscription: subscription.name.clone(),
            confirms: settings.confirms,
            stop,
            over,
        }
    }

    async fn listen<H: Handler>(
        &mut self,
        attempts: &Arc<Attempts<H>>,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Result<(), Ended> {
        let settings = &self.consumer.settings;
        let mut news = self.consume().await?;
        let mut has_heard = false;
        self.consumer.observer.connected();
        tracing::info!(subscription = self.consumer.subscription.name.queue(), "listening");
        let mut check = interval_at(Instant::now() + settings.check_every, settings.check_every);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_what_can_be(attempts, memory);
            self.acknowledge().await?;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(done) = self.jobs.join_next() => {
                    self.take(done, attempts, memory)?;
                    // Those who were fetched together are done together.
                    while let Some(done) = self.jobs.try_join_next() {
                        self.take(done, attempts, memory)?;
                    }
                }
                // Before the news, of which there may be no end.
                _ = check.tick() => {
                    self.check().await?;
                    if !mem::replace(&mut has_heard, false) && self.jobs.is_empty() {
                        news = self.consume_anew().await?;
                    }
                }
                delivery = news.next() => {
                    has_heard = true;
                    self.arrive(self.delivered(delivery)?, attempts);
                    // What came together is looked at together.
                    while let Some(delivery) = news.next().now_or_never() {
                        self.arrive(self.delivered(delivery)?, attempts);
                    }
                }
            }
        }
        // Nothing new from here on; what was handed out and not begun goes back when the channel closes.
        request(self.channel.basic_cancel(news.tag(), BasicCancelOptions::default())).await
    }

    fn delivered(&self, delivery: Option<lapin::Result<Delivery>>) -> Result<Delivery, Ended> {
        match delivery {
            Some(delivery) => delivery.map_err(lost),
            // The connection stands, and nothing will come any more.
            None if self.connection.status().connected() => Err(Ended::QueueLost),
            None => Err(Ended::Lost("the connection to the broker is lost".to_owned())),
        }
    }

    async fn consume(&self) -> Result<lapin::Consumer, Ended> {
        let queue = self.consumer.subscription.name.queue();
        request(self.channel.basic_qos(self.consumer.settings.prefetch, BasicQosOptions::default())).await?;
        let options = BasicConsumeOptions::default();
        request(self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default())).await
    }

    /// A consumer that has heard nothing for a while asks anew. RabbitMQ 3.10 may forget to tell it that its quorum queue was deleted and
    /// declared again at once, and then hands it messages that never arrive; they are given back when its channel closes.
    async fn consume_anew(&mut self) -> Result<lapin::Consumer, Ended> {
        let fresh = request(self.connection.create_channel()).await?;
        let spent = mem::replace(&mut self.channel, fresh);
        self.ledger = Ledger::default();
        request(spent.close(200, "asking anew".into())).await?;
        self.consume().await
    }

    fn arrive<H: Handler>(&mut self, delivery: Delivery, attempts: &Arc<Attempts<H>>) {
        self.ledger.arrived(delivery.delivery_tag);
        let Ok(notice) = Notice::from_message(&delivery.properties, &delivery.data) else {
            self.jobs.spawn(attempts.clone().park(delivery, Reason::Malformed, 0));
            return;
        };
        // What comes through its own exchange was meant for it: a further attempt, a backfill, a redrive.
        let was_addressed = delivery.exchange.as_str() == self.consumer.subscription.name.as_str();
        // Handled before, and only to be confirmed. Whoever could forge that on the way here could also have sent the receipt.
        if was_addressed && notice.event == Event::Deleted && park::tries(&delivery.properties).is_some() {
            self.jobs.spawn(attempts.clone().confirm(notice.user_id, delivery));
            return;
        }
        let letter = Letter::read(delivery.properties.headers().as_ref());
        let attempts = letter.map_or(0, |letter| letter.attempts);
        let was_not_shown = letter.is_some_and(|letter| letter.reason == Reason::FetchFailed);
        let is_backfill =
            delivery.properties.headers().as_ref().is_some_and(|headers| headers.contains_key(topology::BACKFILL));
        self.lanes.arrive(notice.user_id, Arrival { notice, delivery, attempts, is_backfill, was_not_shown });
    }

    /// Starts groups while there is room for more users.
    fn start_what_can_be<H: Handler>(&mut self, attempts: &Arc<Attempts<H>>, memory: &mut Memory) {
        while self.lanes.out() < self.consumer.settings.concurrency
            && let Some((user, group)) = self.lanes.next()
        {
            let (group, rest) = apart(group);
            for arrival in rest {
                self.lanes.arrive(user, arrival);
            }
            let (old, news): (Vec<_>, Vec<_>) = group.into_iter().partition(|arrival| is_old(arrival, memory));
            old.iter().for_each(|arrival| memory.is_back(&arrival.notice));
            let (news, again) = distinct(news);
            // A deletion that comes again may not have been confirmed before the connection was lost.
            let (deletions, old): (Vec<_>, Vec<_>) =
                old.into_iter().partition(|arrival| arrival.notice.event == Event::Deleted);
            for Arrival { delivery, .. } in deletions {
                self.consumer.observer.dropped(Dropped::Old);
                self.jobs.spawn(attempts.clone().confirm(user, delivery));
            }
            self.drop_all(old, Dropped::Old);
            self.drop_all(again, Dropped::Duplicate);
            if news.is_empty() {
                self.lanes.back(user);
            } else {
                self.jobs.spawn(attempts.clone().group(user, news, memory.owed(user)));
                self.consumer.observer.under_way(self.lanes.out());
            }
        }
    }

    fn drop_all(&mut self, arrivals: Vec<Arrival>, why: Dropped) {
        for arrival in arrivals {
            self.consumer.observer.dropped(why);
            self.ledger.done(arrival.delivery.delivery_tag);
        }
    }

    /// Tells the broker what is done. To be called before anything is waited for.
    async fn acknowledge(&mut self) -> Result<(), Ended> {
        for Ack { tag, multiple } in self.ledger.take() {
            request(self.channel.basic_ack(tag, BasicAckOptions { multiple })).await?;
        }
        Ok(())
    }

    fn take<H: Handler>(
        &mut self,
        report: Result<Report, JoinError>,
        attempts: &Arc<Attempts<H>>,
        memory: &mut Memory,
    ) -> Result<(), Ended> {
        match report.map_err(|_| Ended::Lost("an attempt broke off".to_owned()))? {
            Report::Handled { user, event, shown, arrivals } => {
                self.is_back(user);
                if arrivals.iter().any(|arrival| arrival.is_backfill) {
                    memory.begin_anew(user);
                }
                let messages: Vec<_> = arrivals.iter().map(|arrival| arrival.notice.message_id).collect();
                memory.note(user, &event, shown, &messages);
                // Of somebody who lives there is no deletion to be confirmed.
                let is_deletion = event == Event::Deleted && !matches!(shown, Some(Shown::Living(_)));
                for Arrival { delivery, .. } in arrivals.into_iter().filter(|a| a.delivery.acker.usable()) {
                    if is_deletion {
                        self.jobs.spawn(attempts.clone().confirm(user, delivery));
                    } else {
                        self.ledger.done(delivery.delivery_tag);
                    }
                }
            }
            // One of them may be of a version that nobody ever had: they have failed when each has failed alone.
            Report::Failed { user, reason: Reason::FetchFailed, arrivals, .. } if arrivals.len() > 1 => {
                for arrival in arrivals.into_iter().filter(|arrival| arrival.delivery.acker.usable()) {
                    self.lanes.arrive(user, Arrival { was_not_shown: true, ..arrival });
                }
                self.is_back(user);
            }
            Report::Failed { user, event, reason, arrivals } => {
                self.is_back(user);
                let delays = self.consumer.settings.retry_delays().len();
                let comes_back = |arrival: &Arrival| (arrival.notice.message_id, (arrival.attempts as usize) < delays);
                memory.owe(user, event, arrivals.iter().map(comes_back));
                // What came on a connection that is lost comes again by itself.
                for Arrival { delivery, attempts: tried, .. } in
                    arrivals.into_iter().filter(|a| a.delivery.acker.usable())
                {
                    self.jobs.spawn(attempts.clone().park(delivery, reason, tried));
                }
            }
            Report::GivenUp { user } => self.is_back(user),
            Report::Settled(None) => {}
            Report::Settled(Some(delivery)) => self.ledger.done(delivery.delivery_tag),
        }
        Ok(())
    }

    fn is_back(&mut self, user: Uuid) {
        self.lanes.back(user);
        self.consumer.observer.under_way(self.lanes.out());
    }

    /// Lets running handlers end, within a bound, and acknowledges what they did as long as somebody listens.
    async fn finish<H: Handler>(&mut self, attempts: &Arc<Attempts<H>>, memory: &mut Memory, bound: Duration) {
        let end = Instant::now() + bound;
        while let Ok(Some(done)) = timeout_at(end, self.jobs.join_next()).await {
            // On a connection that is lost there is nobody to acknowledge to; that it was handled is remembered all the same.
            let _ = self.take(done, attempts, memory);
            let _ = self.acknowledge().await;
        }
        attempts.over.cancel();
        // A handler that blocks its thread never ends; we do.
        let _ = timeout(ABORT_DEADLINE, self.jobs.shutdown()).await;
    }

    /// Nobody is told when an exchange or a binding is deleted.
    async fn check(&self) -> Result<(), Ended> {
        let channel = request(self.connection.create_channel()).await?;
        if self.consumer.missing(&channel).await?.is_some() {
            return Err(Ended::QueueLost);
        }
        if self.consumer.settings.declares {
            self.consumer.declare(&channel).await?;
        }
        request(channel.close(200, "bye".into())).await
    }
}

impl Consumer {
    async fn declare(&self, channel: &Channel) -> Result<(), Ended> {
        let delays = self.settings.retry_delays();
        topology::declare(channel, &self.source, &self.subscription, delays).await.map_err(|error| match error {
            topology::Error::Missing(exchange) if exchange == self.source.exchange => {
                Ended::Refused(StartError::NoExchange(exchange))
            }
            error => error.into(),
        })
    }

    /// The first part that is not there of those whose loss means that news is lost. The channel is spent if there is one.
    async fn missing(&self, channel: &Channel) -> Result<Option<String>, Ended> {
        let name = &self.subscription.name;
        match topology::depth(channel, name.queue()).await {
            Ok(_) => {}
            Err(topology::Error::Missing(queue)) => return Ok(Some(queue)),
            Err(error) => return Err(error.into()),
        }
        // What the owner declares it looks after itself. From RabbitMQ 4.3 on who has no right to an exchange may not even look.
        if !self.settings.declares {
            return Ok(None);
        }
        let fields = (!self.subscription.fields.is_empty()).then(|| name.fields_exchange());
        for exchange in [self.source.exchange.clone()].into_iter().chain(fields) {
            if !topology::has_exchange(channel, &exchange).await? {
                return Ok(Some(exchange));
            }
        }
        Ok(None)
    }
}

/// Each message once, in the order of versions; and those that were there again. The one that was tried most often stands for all. One that
/// tells something else under the same id is another: it is forged.
fn distinct(mut arrivals: Vec<Arrival>) -> (Vec<Arrival>, Vec<Arrival>) {
    let mut seen = HashSet::new();
    arrivals.sort_by_key(|arrival| Reverse(arrival.attempts));
    let told = |Notice { message_id, version, event, .. }: &Notice| (*message_id, *version, event.name());
    let (mut first, again): (Vec<_>, Vec<_>) =
        arrivals.into_iter().partition(|arrival| seen.insert(told(&arrival.notice)));
    first.sort_by_key(|arrival| arrival.notice.version);
    (first, again)
}

/// What comes to one call, and the rest. A backfill is one by itself: what waits with it may be from before a restore of the owner, which
/// shows no version so high any more. So is what was not shown before, behind what may be: its version may be one that nobody ever had. Deletions
/// come without the others, for which one that is forged would speak; and first, since after one that is borne out nothing is news.
fn apart(mut group: Vec<Arrival>) -> (Vec<Arrival>, Vec<Arrival>) {
    group.sort_by_key(|arrival| arrival.was_not_shown);
    let together = group.iter().take_while(|arrival| !arrival.is_backfill && !arrival.was_not_shown).count();
    let rest = group.split_off(together.max(1));
    let (deletions, others): (Vec<_>, Vec<_>) =
        group.into_iter().partition(|arrival| arrival.notice.event == Event::Deleted);
    if deletions.is_empty() { (others, rest) } else { (deletions, others.into_iter().chain(rest).collect()) }
}

/// A backfill is for those who have lost what they held, whatever this process remembers.
fn is_old(arrival: &Arrival, memory: &Memory) -> bool {
    !arrival.is_backfill && memory.is_old(&arrival.notice, arrival.attempts > 0)
}

async fn request<T>(request: impl Future<Output = lapin::Result<T>>) -> Result<T, Ended> {
    match timeout(REQUEST_DEADLINE, request).await {
        Ok(answer) => answer.map_err(lost),
        Err(_) => Err(Ended::Lost(format!("the broker did not answer within {REQUEST_DEADLINE:?}"))),
    }
}
