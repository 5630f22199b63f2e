//! One turn at leading: claim, publish and settle, with messages under way all the while.
//!
//! Promise: no transaction is open while the broker is waited for, and only what was confirmed is deleted.

use std::{
    collections::HashSet,
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    cursor::{Cursor, Place},
    errand::Errand,
    settler::{Settled, Settler},
    status::{Standstill, Status},
};
use crate::{
    broker::{Outcome, Publisher, Verdict},
    db::{Line, Trouble},
    outbox::{self, Bell, Confirmed, Entry, Heard, OutboxId},
};

/// Events in one claim, and messages in one batch.
const BATCH: usize = 500;
const _: () = assert!(outbox::AT_HAND <= BATCH, "what is handed over at once finds the room of one claim");
/// Messages at once that were sent and whose rows are still there, which is the most that a crash can send twice; but for refused ones,
/// which are sent again anyway, and for skipped ones that one claim brings beyond its batch.
const WINDOW: usize = 2000;
/// Between two signs of life to the outbox while the broker is waited for.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// Between two looks at the table when nobody rings.
const POLL: Duration = Duration::from_millis(500);
/// Without a single confirm for this long, and not held back by the broker, it is said that nothing new is told.
const SILENCE: Duration = Duration::from_secs(5);
/// And after this long a session is given up, in case it is the channel that is at fault. Every one that is has the queues that are well
/// get twice what is under way; a connection that is dead is found out by its heartbeats.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(120);
/// Between two looks at the exchange when nothing is unroutable.
const VOUCH_INTERVAL: Duration = Duration::from_secs(10);
/// Between two channels at least, however much is refused.
const CHANGE_INTERVAL: Duration = Duration::from_secs(1);
/// For the confirms of what is under way when we leave.
const FAREWELL: Duration = Duration::from_secs(5);

pub(super) struct Drain<'a> {
    pub(super) publisher: &'a mut Publisher,
    /// Holds the lead and reads the outbox, both or neither: a relay that lost its lead cannot claim.
    pub(super) lead: &'a mut Line,
    pub(super) sweep: Errand<Swept>,
    pub(super) bell: &'a Bell,
    pub(super) status: &'a Status,
    /// Confirmed, and still to be deleted.
    pub(super) unsettled: &'a mut Vec<Confirmed>,
    pub(super) settler: Settler,
    pub(super) cursor: Cursor,
    pub(super) ledger: Ledger,
}

/// What a sweep found, and how long it took.
pub(super) struct Swept {
    outcome: Result<Vec<Entry>, Trouble>,
    took: Duration,
}

/// What this session has claimed and not seen the end of.
pub(super) struct Ledger {
    /// Claimed, and not yet deleted from the outbox.
    under_way: HashSet<OutboxId>,
    /// How many of them wait for the broker, or to be vouched for.
    unconfirmed: usize,
    /// Said to be unroutable, which is not believed yet.
    unvouched: Vec<Verdict>,
    /// When the broker last answered, or was last asked after it had answered everything.
    progress: Instant,
    /// When the exchange was last known to be ours.
    vouched: Instant,
    /// When the channel was opened.
    opened: Instant,
}

impl Ledger {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { under_way: HashSet::new(), unconfirmed: 0, unvouched: vec![], progress: now, vouched: now, opened: now }
    }

    /// These are on their way. A broker that had answered everything owed nothing until now.
    fn sent(&mut self, entries: &[Entry], now: Instant) {
        if self.unconfirmed == 0 {
            self.progress = now;
        }
        self.unconfirmed += entries.len();
        self.under_way.extend(entries.iter().map(|entry| entry.id));
    }

    /// For how long the broker has owed an answer. One that holds us back owes none: confirms stall until the alarm is over, and to
    /// reconnect and send again would turn it into a storm of duplicates.
    fn silence(&mut self, blocked: bool, now: Instant) -> Duration {
        if blocked {
            self.progress = now;
        }
        now.duration_since(self.progress)
    }
}

impl Drain<'_> {
    /// Carries events until `stop`, then waits, within bounds, for what is under way.
    pub(super) async fn run(mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        // What an earlier session saw confirmed must be gone before the first claim could find it again.
        self.settle_all().await?;
        let mut outcome = self.carry(stop).await;
        if outcome.is_ok() {
            outcome = timeout(FAREWELL, self.await_verdicts()).await.unwrap_or(Ok(()));
        }
        // What reached nobody can be sent again without a duplicate; only while the exchange is known to be ours is it settled.
        let mut salvaged = self.publisher.salvage();
        salvaged.retain(|verdict| verdict.outcome != Outcome::Unroutable);
        self.take(&salvaged);
        let settled = self.settle_all().await;
        self.settler.hang_up().await;
        self.sweep.hang_up().await;
        outcome.and(settled)
    }

    async fn carry(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Whether there may be events that nobody has claimed.
        let mut look = true;
        while !stop.is_cancelled() {
            self.start_sweep();
            if look && self.has_room() {
                look = self.claim_and_send().await?;
            }
            if self.settler.is_worth(self.unsettled.len()) {
                self.settler.start(self.unsettled);
            }
            let look_again = look && self.has_room();
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                verdicts = self.publisher.verdicts() => self.hear(verdicts.context(CHANNEL_LOST)?).await?,
                settled = self.settler.done_or_rested(), if !self.settler.is_idle() || !self.unsettled.is_empty() => {
                    settled.map_or(Ok(()), |settled| self.note(settled))?;
                }
                swept = self.sweep.done() => self.take_swept(swept).await?,
                heard = self.bell.rung() => look |= self.send_handed_over(heard),
                _ = poll.tick() => {
                    self.check_on_broker().await?;
                    look = true;
                }
                () = std::future::ready(()), if look_again => {}
            }
        }
        Ok(())
    }

    /// For a batch more, and for what the sweep may bring if one is under way.
    fn has_room(&self) -> bool {
        let batches = if self.sweep.is_idle() { 1 } else { 2 };
        let undeleted = self.ledger.unconfirmed + self.unsettled.len() + self.settler.deleting();
        undeleted + batches * BATCH <= WINDOW && !self.publisher.is_blocked()
    }

    /// Claims one batch and puts it on its way. True when there may be more.
    async fn claim_and_send(&mut self) -> anyhow::Result<bool> {
        let question = self.cursor.question(Instant::now());
        if question.resends && self.ledger.opened.elapsed() >= CHANGE_INTERVAL && !self.change_channel().await? {
            return Ok(true);
        }
        self.status.stands_still(Standstill::Refused, !question.read_on);
        let limit = if question.read_on { BATCH } else { 0 };
        let claimed = self
            .lead
            .run_in_session(async |connection| outbox::claim(connection, question.past, limit, &question.again).await)
            .await;
        let entries = claimed.map_err(database_lost)?;
        self.status.outbox_is_up();
        let found = ids(&entries);
        for gone in self.cursor.gone(&question.again, &found) {
            self.ledger.under_way.remove(&gone);
        }
        self.cursor.found(&found, Instant::now());
        self.send(&entries);
        Ok(entries.len() >= BATCH)
    }

    /// Sweeps when it is time. It walks over whatever died since the last vacuum: nothing waits for it.
    fn start_sweep(&mut self) {
        if !self.sweep.is_idle() || !self.has_room() {
            return;
        }
        if let Some(up_to) = self.cursor.begin_sweep(Instant::now()) {
            let under_way = self.ledger.under_way.iter().copied().collect();
            self.sweep.start(|line| sweep(line, up_to, under_way));
        }
    }

    async fn take_swept(&mut self, Swept { outcome, took }: Swept) -> anyhow::Result<()> {
        // One that fails, on too many dead rows for its time, say, is tried again after its rest. It is a second look: the telling
        // goes on without.
        let mut entries = outcome.unwrap_or_else(|trouble| {
            tracing::warn!("the outbox was not swept, which will be tried again: {}", trouble.report());
            vec![]
        });
        let claimed = self.cursor.swept(&ids(&entries), entries.len() < BATCH, took, Instant::now());
        entries.retain(|entry| !claimed.contains(&entry.id));
        if !entries.is_empty() {
            // Another session than the lead's has read them.
            self.make_sure_of_lead().await?;
        }
        self.send(&entries);
        Ok(())
    }

    /// Sends what was handed over, without reading it, as far as it is next. True when there may be more to read.
    fn send_handed_over(&mut self, heard: Heard) -> bool {
        if !self.has_room() {
            return true;
        }
        let (mut look, now) = (heard.look, Instant::now());
        let mut next = heard.handed_over;
        next.retain(|entry| match self.cursor.place(entry.id) {
            Place::Read => false,
            Place::Next => {
                self.cursor.found(&[entry.id], now);
                true
            }
            Place::Beyond => {
                look = true;
                false
            }
        });
        self.send(&next);
        look
    }

    fn send(&mut self, entries: &[Entry]) {
        if entries.is_empty() {
            return;
        }
        self.ledger.sent(entries, Instant::now());
        self.publisher.send(entries);
    }

    /// Acts on verdicts. That nobody is bound is believed only of an exchange that is ours: in the place of one that was swapped for
    /// another type nobody ever is.
    async fn hear(&mut self, verdicts: Vec<Verdict>) -> anyhow::Result<()> {
        let (unroutable, others): (Vec<_>, Vec<_>) =
            verdicts.into_iter().partition(|verdict| verdict.outcome == Outcome::Unroutable);
        self.take(&others);
        self.ledger.unvouched.extend(unroutable);
        self.take_unroutable().await
    }

    /// A broker that holds us back would not answer the question whether the exchange is ours: it waits for the end of the alarm.
    async fn take_unroutable(&mut self) -> anyhow::Result<()> {
        if self.ledger.unvouched.is_empty() || self.publisher.is_blocked() {
            return Ok(());
        }
        if !self.vouch().await? {
            return Ok(());
        }
        let unroutable = std::mem::take(&mut self.ledger.unvouched);
        self.take(&unroutable);
        Ok(())
    }

    /// What one channel was refused is tried on another, in case it is the channel that is at fault. False when the broker holds us
    /// back.
    async fn change_channel(&mut self) -> anyhow::Result<bool> {
        let is_changed = while_alive(self.lead, self.publisher.change_channel()).await?;
        if is_changed {
            let now = Instant::now();
            (self.ledger.opened, self.ledger.vouched) = (now, now);
        }
        Ok(is_changed)
    }

    /// False when the broker holds us back.
    async fn vouch(&mut self) -> anyhow::Result<bool> {
        let is_vouched = while_alive(self.lead, self.publisher.vouch()).await?;
        if is_vouched {
            self.ledger.vouched = Instant::now();
        }
        Ok(is_vouched)
    }

    /// Acts on what the broker said: confirmed events are to be deleted, refused ones to be sent again.
    fn take(&mut self, verdicts: &[Verdict]) {
        let now = Instant::now();
        for &Verdict { id, message_id, outcome } in verdicts {
            self.status.count(outcome);
            if outcome == Outcome::Unroutable {
                tracing::debug!(%message_id, "nobody is bound for this message");
            }
            match outcome {
                // Nobody listening is no fault of the event: it was offered, and that is all that was promised.
                Outcome::Routed | Outcome::Unroutable => {
                    self.cursor.confirmed(id);
                    self.unsettled.push(Confirmed { id, message_id });
                }
                // Stays under way for the sweep; the cursor asks for it when its time has come.
                Outcome::Refused => self.cursor.refused(id, now),
            }
        }
        self.ledger.unconfirmed -= verdicts.len().min(self.ledger.unconfirmed);
        self.ledger.progress = now;
        self.status.stands_still(Standstill::Unconfirmed, false);
    }

    fn note(&mut self, settled: Settled) -> anyhow::Result<()> {
        match settled.outcome {
            Ok(()) => {
                for event in &settled.events {
                    self.ledger.under_way.remove(&event.id);
                }
                Ok(())
            }
            Err(trouble) => {
                self.unsettled.extend(settled.events);
                Err(database_lost(trouble))
            }
        }
    }

    async fn await_verdicts(&mut self) -> anyhow::Result<()> {
        while self.publisher.is_waiting() {
            let verdicts = self.publisher.verdicts().await.context(CHANNEL_LOST)?;
            self.hear(verdicts).await?;
        }
        Ok(())
    }

    async fn settle_all(&mut self) -> anyhow::Result<()> {
        while !self.settler.is_idle() || !self.unsettled.is_empty() {
            self.settler.start(self.unsettled);
            let settled = self.settler.done().await;
            self.note(settled)?;
        }
        Ok(())
    }

    /// What no confirm and no ring would tell.
    async fn check_on_broker(&mut self) -> anyhow::Result<()> {
        ensure!(self.publisher.is_connected(), CHANNEL_LOST);
        let blocked = self.publisher.is_blocked();
        self.status.blocked(blocked);
        let (is_waiting, silence) = (self.ledger.unconfirmed > 0, self.ledger.silence(blocked, Instant::now()));
        if !is_waiting || silence > SILENCE {
            self.status.stands_still(Standstill::Unconfirmed, is_waiting);
        }
        ensure!(!is_waiting || silence < CONFIRM_DEADLINE, "the broker has confirmed nothing for {CONFIRM_DEADLINE:?}");
        self.take_unroutable().await?;
        if !blocked && self.ledger.vouched.elapsed() > VOUCH_INTERVAL {
            self.vouch().await?;
        }
        if !self.has_room() {
            // A leader that claims nothing has to say that it lives.
            self.make_sure_of_lead().await?;
        }
        Ok(())
    }

    async fn make_sure_of_lead(&mut self) -> anyhow::Result<()> {
        give_sign_of_life(self.lead).await
    }
}

/// Waits for the broker, and says meanwhile that this leader lives: one that says nothing loses its lead.
async fn while_alive<T>(lead: &mut Line, asked: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut asked = pin!(asked);
    loop {
        match timeout(SIGN_OF_LIFE, &mut asked).await {
            Ok(answer) => return answer,
            Err(_) => give_sign_of_life(lead).await?,
        }
    }
}

async fn give_sign_of_life(lead: &mut Line) -> anyhow::Result<()> {
    let alive = lead.run_in_session(async |connection| outbox::last_id(connection).await).await;
    alive.map(drop).map_err(database_lost)
}

fn ids(entries: &[Entry]) -> Vec<OutboxId> {
    entries.iter().map(|entry| entry.id).collect()
}

async fn sweep(mut line: Box<Line>, up_to: OutboxId, under_way: Vec<OutboxId>) -> (Box<Line>, Swept) {
    let began = Instant::now();
    let outcome = line.run(async |connection| outbox::sweep(connection, up_to, BATCH, &under_way).await).await;
    (line, Swept { outcome, took: began.elapsed() })
}

const CHANNEL_LOST: &str = "the channel to the broker is lost";

fn database_lost(trouble: Trouble) -> anyhow::Error {
    anyhow::Error::new(trouble).context("the outbox cannot be reached")
}

#[cfg(test)]
mod tests {
    use tidings_sdk::envelope::{Event, Notice};
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_silence_counts_from_the_last_answer_or_from_the_end_of_an_alarm() {
        let mut ledger = Ledger::new();
        let answered = ledger.progress;
        let mut silence = |blocked, after| ledger.silence(blocked, answered + after);
        assert_eq!(silence(false, CONFIRM_DEADLINE), CONFIRM_DEADLINE);
        let end_of_alarm = 2 * CONFIRM_DEADLINE;
        assert_eq!(silence(true, end_of_alarm), Duration::ZERO);
        assert_eq!(silence(false, end_of_alarm + SILENCE), SILENCE);
    }

    #[test]
    fn who_was_asked_nothing_was_not_silent() {
        let mut ledger = Ledger::new();
        let (asked, notice) = (
            ledger.progress + 2 * CONFIRM_DEADLINE,
            Notice {
                message_id: Uuid::from_u128(1),
                user_id: Uuid::from_u128(2),
                version: 1,
                event: Event::Created,
                occurred_at: OffsetDateTime::UNIX_EPOCH,
                traceparent: None,
            },
        );
        ledger.sent(&[Entry { id: 1, notice: notice.clone() }], asked);
        assert_eq!(ledger.silence(false, asked), Duration::ZERO);
        ledger.sent(&[Entry { id: 2, notice }], asked + SILENCE);
        assert_eq!(ledger.silence(false, asked + 2 * SILENCE), 2 * SILENCE, "to ask on is no answer");
    }
}
