//! Run: one backfill on its walk over the users.
//!
//! Promise: how far it is, is noted only when everything up to there was confirmed; after a crash at most a page is told twice.
//! Not here, on purpose: a transaction. A walk over a million users must not hold up the cleaning of the table.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use lapin::{Channel, Connection, types::AMQPValue};
use tidings_sdk::{envelope::Notice, topology};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    model::{Pace, Passed, WaitingFor, notice},
    store::{self, Running},
};
use crate::{
    broker::{self, Broker, Outcome, Parcel, Post},
    db::Line,
};

/// Users in a page: what is read at once, and the most that is passed before it is noted.
const PAGE: usize = 1_000;
/// Users in a page of a slow walk.
const SMALL_PAGE: usize = 200;
/// Messages under way at once: a page, so that a fast walk waits for the broker once a page and not five times.
const CHUNK: usize = PAGE;
/// Between two notes of how far it is.
const NOTE: Duration = Duration::from_secs(1);
/// Between two looks at a queue that has no room.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Between two looks at a queue that is not there: each costs the connection, which all share, the number of a channel.
const LOOK_FOR_QUEUE: Duration = Duration::from_secs(5);
/// Shorter waits are not told: they are part of a queue being emptied.
const WORTH_TELLING: Duration = Duration::from_secs(1);
/// One that could send nothing for so long gives way to others who wait for a turn.
const PATIENCE: Duration = Duration::from_secs(3);
/// Who goes on gives way after so long, however slow or fast. Long enough for the half second between two turns to cost little.
const TURN: Duration = Duration::from_secs(10);
/// Messages of this time are sent together, so that a slow rate is not sent one by one.
const CHUNK_TIME: Duration = Duration::from_millis(20);
/// For the confirms of a chunk, unless the broker holds us back.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(30);

/// What may change while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Orders {
    pub(super) rate_per_s: i32,
    pub(super) max_waiting: i32,
    /// The outbox lags behind.
    pub(super) news_first: bool,
    /// More are to be carried on than are at once.
    pub(super) others_wait: bool,
}

pub(super) struct Run {
    backfill: Running,
    broker: Broker,
    connection: Arc<Connection>,
    line: Line,
    orders: watch::Receiver<Orders>,
    stop: CancellationToken,
    pace: Pace,
    began_at: Instant,
    /// Read, and not yet passed.
    ahead: VecDeque<Step>,
    progress: Progress,
    /// Since when nothing could be sent, and what was told of it.
    held_up: Option<(Instant, Option<WaitingFor>)>,
    /// When the queue was last found missing.
    missing_at: Option<Instant>,
}

/// A user on the way, and what there is to tell.
struct Step {
    user_id: Uuid,
    notice: Option<Notice>,
}

/// How far it is.
struct Progress {
    /// As the table has it.
    noted: Option<Uuid>,
    /// As it really is.
    reached: Option<Uuid>,
    sent: usize,
    skipped: usize,
    noted_at: Instant,
}

/// How many may be sent now.
enum Room {
    For(usize),
    None(WaitingFor),
}

impl Run {
    pub(super) fn new(
        backfill: Running,
        broker: Broker,
        connection: Arc<Connection>,
        line: Line,
        orders: watch::Receiver<Orders>,
        stop: CancellationToken,
    ) -> Self {
        let now = Instant::now();
        let pace = Pace::new(backfill.rate_per_s, now);
        let (noted, reached) = (backfill.cursor, backfill.cursor);
        let progress = Progress { noted, reached, sent: 0, skipped: 0, noted_at: now };
        let held_up = backfill.waiting_for.map(|why| (now, Some(why)));
        let (began_at, ahead, missing_at) = (now, VecDeque::new(), None);
        Self { backfill, broker, connection, line, orders, stop, pace, began_at, ahead, progress, held_up, missing_at }
    }

    /// To its end, to `stop`, or until it gives way.
    pub(super) async fn carry_on(mut self) -> anyhow::Result<()> {
        let outcome = self.walk().await;
        // Also when it broke off: what was confirmed need not be sent again.
        let noted = self.note().await;
        let nobody_is_left = outcome?;
        noted?;
        if nobody_is_left {
            let id = self.backfill.id;
            self.line.run(async |session| store::finish(session, id).await).await?;
            tracing::info!(subscription = %self.backfill.subscription.name, backfill = %id, "the backfill is done");
        }
        self.line.hang_up().await;
        Ok(())
    }

    /// True when there is nobody left.
    async fn walk(&mut self) -> anyhow::Result<bool> {
        if !self.await_broker().await? {
            return Ok(false);
        }
        let post = Post::open(&self.connection).await?;
        let mut look = self.channel().await?;
        loop {
            if self.ahead.is_empty() && !self.read_on().await? {
                return Ok(true);
            }
            self.skip();
            if !self.ahead.is_empty() {
                let Some(room) = self.await_room(&mut look).await? else { return Ok(false) };
                self.send(&post, room).await?;
            } else if self.stop.is_cancelled() || self.had_its_turn() {
                return Ok(false);
            }
            if self.progress.is_to_be_noted() {
                self.note().await?;
            }
        }
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        broker::open(&self.connection).await
    }

    /// Reads a page. False when there is none.
    async fn read_on(&mut self) -> anyhow::Result<bool> {
        // Of a slow walk little is read ahead: what is told would be old when it is told.
        let of_a_second = usize::try_from(self.orders.borrow().rate_per_s)?;
        let limit = of_a_second.clamp(SMALL_PAGE, PAGE);
        let past = self.progress.reached.unwrap_or_default();
        self.ahead = match &self.backfill {
            Running { user_ids: Some(ids), changed_since: None, .. } => {
                let rest = &ids[ids.partition_point(|id| *id <= past)..];
                let asked = &rest[..limit.min(rest.len())];
                let found = self.line.run(async |session| store::these(session, asked).await).await?;
                asked.iter().map(|id| self.step_to(*id, &found)).collect()
            }
            &Running { up_to, .. } => {
                let found = self.line.run(async |session| store::walk(session, past, up_to, limit).await).await?;
                found.iter().map(|user| self.step(user)).collect()
            }
        };
        Ok(!self.ahead.is_empty())
    }

    /// To one that was asked for; nothing to tell where there is no such user.
    fn step_to(&self, user_id: Uuid, found: &[Passed]) -> Step {
        match found.binary_search_by_key(&user_id, |user| user.user_id) {
            Ok(place) => self.step(&found[place]),
            Err(_) => Step { user_id, notice: None },
        }
    }

    fn step(&self, user: &Passed) -> Step {
        let Running { id, subscription, user_ids, changed_since, .. } = &self.backfill;
        let is_named = user_ids.as_ref().is_some_and(|ids| ids.binary_search(&user.user_id).is_ok());
        let since = changed_since.filter(|_| !is_named);
        Step { user_id: user.user_id, notice: notice(*id, subscription, since, user) }
    }

    /// Passes those of whom there is nothing to tell.
    fn skip(&mut self) {
        while self.ahead.front().is_some_and(|step| step.notice.is_none()) {
            self.progress.reached = self.ahead.pop_front().map(|step| step.user_id);
            self.progress.skipped += 1;
        }
    }

    /// Waits until something may be sent; how much. `None` when it is to stop, or gives way.
    async fn await_room(&mut self, look: &mut Channel) -> anyhow::Result<Option<usize>> {
        while !self.stop.is_cancelled() {
            let orders = *self.orders.borrow_and_update();
            self.pace.set(orders.rate_per_s);
            let pause = match self.room(look, orders).await? {
                Room::For(_) if self.had_its_turn() => return Ok(None),
                Room::For(0) => self.pace.until(chunk_at(orders.rate_per_s), Instant::now()),
                Room::For(room) => return Ok(Some(room)),
                Room::None(why) => {
                    self.tell_wait(why).await?;
                    if orders.others_wait && self.gives_way(why) {
                        return Ok(None);
                    }
                    LOOK_AGAIN
                }
            };
            self.rest(pause).await?;
        }
        Ok(None)
    }

    /// Waits while the broker holds the connection back: it would answer nothing. False when it is to stop.
    async fn await_broker(&mut self) -> anyhow::Result<bool> {
        while self.connection.status().blocked() && !self.stop.is_cancelled() {
            self.tell_wait(WaitingFor::Broker).await?;
            self.rest(LOOK_AGAIN).await?;
        }
        Ok(!self.stop.is_cancelled())
    }

    /// For so long, or until something else is ordered.
    async fn rest(&mut self, pause: Duration) -> anyhow::Result<()> {
        tokio::select! {
            () = self.stop.cancelled() => {}
            changed = self.orders.changed() => changed.context("the runner is gone")?,
            () = sleep(pause) => {}
        }
        Ok(())
    }

    /// The queue is looked at last, right before it is sent to.
    async fn room(&mut self, look: &mut Channel, orders: Orders) -> anyhow::Result<Room> {
        if orders.news_first {
            return Ok(Room::None(WaitingFor::News));
        }
        if self.connection.status().blocked() {
            return Ok(Room::None(WaitingFor::Broker));
        }
        let due = self.pace.due(Instant::now());
        if due < chunk_at(orders.rate_per_s) {
            return Ok(Room::For(0));
        }
        if self.missing_at.is_some_and(|at| at.elapsed() < LOOK_FOR_QUEUE) {
            return Ok(Room::None(WaitingFor::Queue));
        }
        let ready = match topology::depth(look, self.backfill.subscription.name.queue()).await {
            Ok(depth) => usize::try_from(depth.ready)?,
            Err(topology::Error::Missing(_)) => {
                self.missing_at = Some(Instant::now());
                *look = self.channel().await?;
                return Ok(Room::None(WaitingFor::Queue));
            }
            Err(error) => return Err(error).context("the queue cannot be looked at"),
        };
        match usize::try_from(orders.max_waiting)?.saturating_sub(ready) {
            0 => Ok(Room::None(WaitingFor::Room)),
            room => Ok(Room::For(room.min(due).min(CHUNK))),
        }
    }

    async fn tell_wait(&mut self, why: WaitingFor) -> anyhow::Result<()> {
        let (since, told) = *self.held_up.get_or_insert((Instant::now(), None));
        if told != Some(why) && since.elapsed() > WORTH_TELLING {
            self.note().await?;
            let ids = [self.backfill.id];
            self.line.run(async |session| store::wait(session, &ids, why).await).await?;
            self.held_up = Some((since, Some(why)));
        }
        Ok(())
    }

    /// Whether others are to go on in its place.
    fn had_its_turn(&self) -> bool {
        self.orders.borrow().others_wait && self.began_at.elapsed() > TURN
    }

    /// What holds everybody up is waited for in place.
    fn gives_way(&self, why: WaitingFor) -> bool {
        let is_its_own = matches!(why, WaitingFor::Room | WaitingFor::Queue);
        is_its_own && self.held_up.is_some_and(|(since, _)| since.elapsed() > PATIENCE)
    }

    /// Sends up to `room` notices and, once all are confirmed, passes everybody up to the last of them.
    async fn send(&mut self, post: &Post, room: usize) -> anyhow::Result<()> {
        let (mut parcels, mut passed) = (vec![], 0);
        for step in &self.ahead {
            if let Some(notice) = &step.notice {
                if parcels.len() == room {
                    break;
                }
                parcels.push(self.parcel(notice));
            }
            passed += 1;
        }
        let sent = parcels.len();
        self.pace.pay(sent);
        self.deliver(post, parcels).await?;
        self.progress.reached = self.ahead.drain(..passed).next_back().map(|step| step.user_id);
        self.progress.sent += sent;
        self.progress.skipped += passed - sent;
        match self.held_up.take() {
            // What was told is no longer so.
            Some((_, Some(_))) => self.note().await,
            _ => Ok(()),
        }
    }

    fn parcel(&self, notice: &Notice) -> Parcel {
        let id = AMQPValue::LongString(self.backfill.id.to_string().into());
        Parcel::new(notice, &self.broker, [(topology::BACKFILL, id)])
    }

    /// Returns when all are in the queue.
    async fn deliver(&mut self, post: &Post, parcels: Vec<Parcel>) -> anyhow::Result<()> {
        let name = self.backfill.subscription.name.clone();
        let mut sent = pin!(post.send(&name, parcels));
        let mut silent_since = Instant::now();
        let outcomes = loop {
            match timeout(WORTH_TELLING, &mut sent).await {
                Ok(outcomes) => break outcomes.context("the channel to the broker is lost")?,
                // An alarm: confirms come when it is over. To send again would make it worse.
                Err(_) if self.connection.status().blocked() => {
                    self.tell_wait(WaitingFor::Broker).await?;
                    silent_since = Instant::now();
                }
                Err(_) if silent_since.elapsed() < CONFIRM_DEADLINE => {}
                Err(_) => bail!("the broker has confirmed nothing for {CONFIRM_DEADLINE:?}"),
            }
        };
        match outcomes.iter().find(|outcome| **outcome != Outcome::Routed) {
            None => Ok(()),
            Some(Outcome::Unroutable) => bail!("the subscription's queue is gone"),
            Some(_) => bail!("the broker did not take all messages"),
        }
    }

    /// Writes down how far it is.
    async fn note(&mut self) -> anyhow::Result<()> {
        let Progress { noted, reached, sent, skipped, .. } = self.progress;
        if reached != noted {
            let (id, sent, skipped) = (self.backfill.id, i64::try_from(sent)?, i64::try_from(skipped)?);
            let moved =
                self.line.run(async |session| store::move_on(session, id, noted, reached, sent, skipped).await).await?;
            if !moved {
                bail!("somebody else carries this backfill on");
            }
            // The row says no longer what it waited for.
            self.held_up = self.held_up.map(|(since, _)| (since, None));
        }
        self.progress = Progress { noted: reached, reached, sent: 0, skipped: 0, noted_at: Instant::now() };
        Ok(())
    }
}

impl Progress {
    fn is_to_be_noted(&self) -> bool {
        self.sent + self.skipped >= PAGE || self.noted_at.elapsed() > NOTE
    }
}

/// Messages that are sent together at this rate.
fn chunk_at(per_s: i32) -> usize {
    ((f64::from(per_s) * CHUNK_TIME.as_secs_f64()) as usize).clamp(1, CHUNK)
}
