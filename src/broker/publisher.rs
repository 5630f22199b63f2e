//! A publisher: a channel in confirm mode and the messages that are under way.
//!
//! Promise: every message handed over gets a verdict of its own, decided by its `message_id`, or the session is over.
//! Not here, on purpose: resending. What has no verdict is still in the outbox.

use std::{
    collections::{HashSet, VecDeque},
    future::pending,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use lapin::{BasicProperties, Channel, Confirmation};
use tidings_sdk::envelope::message_id;
use tokio::time::timeout;
use uuid::Uuid;

use super::{Broker, FAREWELL, PUBLISHED, Session, confirm_select, request};
use crate::outbox::{Entry, OutboxId};

/// Between two looks whether the broker holds us back, while it has not answered.
const LOOK: Duration = Duration::from_millis(100);

/// What became of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub id: OutboxId,
    pub message_id: Uuid,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Confirmed: in every queue that was bound for it.
    Routed,
    /// Confirmed, and returned: no queue is bound for it.
    Unroutable,
    /// Not taken: a queue refused it, or the broker failed. To be sent again.
    Refused,
}

pub struct Publisher {
    broker: Broker,
    connection: Session,
    /// A clone of a channel is one of each of its many parts.
    channel: Arc<Channel>,
    /// Batches under way, oldest first.
    window: VecDeque<Vec<Parcel>>,
    /// Ids of returned messages that have no verdict yet.
    returned: HashSet<Uuid>,
}

/// One message under way.
struct Parcel {
    id: OutboxId,
    message_id: Uuid,
    /// From the first byte sent to the broker's confirm.
    journey: Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>,
    /// What is known of its end.
    end: End,
}

enum End {
    Open,
    /// Whether the broker took it.
    Heard {
        taken: bool,
    },
    /// The session broke under it. Kept for whoever waits for this parcel: a journey that has ended must not be polled again.
    Lost(lapin::Error),
}

impl Publisher {
    pub async fn connect(broker: &Broker) -> anyhow::Result<Self> {
        let connection = broker.session("relay").await?;
        let channel = Arc::new(open_channel(broker, &connection).await?);
        let (window, returned) = (VecDeque::new(), HashSet::new());
        Ok(Self { broker: broker.clone(), connection, channel, window, returned })
    }

    /// Goes on with another channel; what is under way ends on the one it was sent on.
    ///
    /// A channel keeps its own idea of each queue it has sent to. RabbitMQ (3.10) looks for a quorum queue where its leader was at
    /// the channel's first message: a leader that was lost just then, with its node, is looked for there ever after, and every
    /// message to the queue is refused, while it has long had another leader.
    ///
    /// False when the broker holds us back, and everything stays as it is.
    ///
    /// # Errors
    /// When the exchange is another, or the broker does not answer.
    pub async fn change_channel(&mut self) -> anyhow::Result<bool> {
        let opened = unless_blocked(&self.connection, open_channel(&self.broker, &self.connection)).await?;
        let Some(channel) = opened else { return Ok(false) };
        self.channel = Arc::new(channel);
        Ok(true)
    }

    /// Puts a batch on its way, in order, and does not wait for it.
    pub fn send(&mut self, entries: &[Entry]) {
        let mut batch: Vec<Parcel> = entries.iter().map(|entry| self.parcel(entry)).collect();
        for parcel in &mut batch {
            // A journey begins when it is first polled; awaiting one before starting the next would cost two thread hops each.
            parcel.look(&mut self.returned);
        }
        self.window.push_back(batch);
    }

    fn parcel(&self, entry: &Entry) -> Parcel {
        let (properties, body) = entry.notice.to_message(self.broker.source());
        let key = self.broker.routing_key(&entry.notice.event);
        let journey = publish(self.channel.clone(), self.broker.exchange.clone(), key, properties, body);
        Parcel { id: entry.id, message_id: entry.notice.message_id, journey: Box::pin(journey), end: End::Open }
    }

    /// The verdicts on the oldest batch, once all its messages have one, and on those behind it that have them too. Never returns
    /// while nothing is under way. Cancel safe.
    ///
    /// # Errors
    /// When the channel or connection is lost; [`Publisher::salvage`] then has the verdicts that came in before.
    pub async fn verdicts(&mut self) -> lapin::Result<Vec<Verdict>> {
        let Some(batch) = self.window.front_mut() else { return pending().await };
        for parcel in batch {
            parcel.arrival(&mut self.returned).await?;
        }
        Ok(self.decide())
    }

    /// lapin hands a returned message to whichever confirm resolves next, which may belong to a later batch. The broker returns a
    /// message before it confirms it, and returns arrive in the order of publishing: so once every confirm up to here has resolved,
    /// every return up to here has been handed to some confirm that has resolved too. A look at all of them finds it.
    ///
    /// The same look, which goes from the oldest to the youngest, is good for every batch up to the first that it finds incomplete:
    /// what resolved behind its back would be part of that one or of a later one. All of it holds for each channel by itself.
    fn decide(&mut self) -> Vec<Verdict> {
        self.look_at_all();
        let complete = self.window.iter().take_while(|batch| batch.iter().all(Parcel::is_heard)).count();
        self.window.drain(..complete).flatten().filter_map(|parcel| parcel.verdict(&mut self.returned)).collect()
    }

    fn look_at_all(&mut self) {
        for parcel in self.window.iter_mut().flatten() {
            parcel.look(&mut self.returned);
        }
    }

    /// Makes sure that the exchange is still what we publish to: one of another type takes messages and routes them elsewhere, or
    /// nowhere, and confirms them all the same. False when the broker holds us back, and nobody knows.
    ///
    /// # Errors
    /// When the exchange is another, or the broker does not answer.
    pub async fn vouch(&mut self) -> anyhow::Result<bool> {
        let (broker, connection) = (&self.broker, &self.connection);
        let asked = async {
            let channel = broker.channel_with_exchange(connection).await?;
            request(channel.close(200, "bye".into())).await
        };
        Ok(unless_blocked(connection, asked).await?.is_some())
    }

    /// What is known of the messages under way when the session is over. The others may or may not have arrived.
    pub fn salvage(&mut self) -> Vec<Verdict> {
        self.look_at_all();
        let batches = std::mem::take(&mut self.window);
        batches.iter().flatten().filter_map(|parcel| parcel.verdict(&mut self.returned)).collect()
    }

    /// Whether messages are under way.
    pub fn is_waiting(&self) -> bool {
        !self.window.is_empty()
    }

    /// Whether the broker has asked us to hold back (memory or disk alarm).
    pub fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    pub fn is_connected(&self) -> bool {
        self.channel.status().connected() && self.connection.status().connected()
    }

    pub async fn close(self) {
        // Gone either way; saying goodbye spares the broker a warning in its log.
        let closed = timeout(FAREWELL, self.connection.close(200, "bye".into()));
        let _ = tokio::join!(closed, self.broker.hang_up());
    }
}

/// A channel in confirm mode, to an exchange that is ours.
async fn open_channel(broker: &Broker, connection: &Session) -> anyhow::Result<Channel> {
    let channel = broker.channel_with_exchange(connection).await?;
    confirm_select(&channel).await?;
    Ok(channel)
}

/// `None` when the broker holds us back: what is asked of it then lies unread until the alarm is over, also behind what was published a
/// moment before.
async fn unless_blocked<T>(
    connection: &Session,
    asked: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<Option<T>> {
    let mut asked = pin!(asked);
    loop {
        match timeout(LOOK, &mut asked).await {
            Ok(answer) => return answer.map(Some),
            Err(_) if connection.status().blocked() => return Ok(None),
            Err(_) => {}
        }
    }
}

async fn publish(
    channel: Arc<Channel>,
    exchange: String,
    routing_key: String,
    properties: BasicProperties,
    body: Vec<u8>,
) -> lapin::Result<Confirmation> {
    channel.basic_publish(exchange.into(), routing_key.into(), PUBLISHED, &body, properties).await?.await
}

impl Parcel {
    /// Waits for the confirm. Cancel safe.
    async fn arrival(&mut self, returned: &mut HashSet<Uuid>) -> lapin::Result<()> {
        if matches!(self.end, End::Open) {
            let outcome = self.journey.as_mut().await;
            self.hear(outcome, returned);
        }
        match &self.end {
            End::Lost(error) => Err(error.clone()),
            End::Open | End::Heard { .. } => Ok(()),
        }
    }

    fn is_heard(&self) -> bool {
        matches!(self.end, End::Heard { .. })
    }

    /// Takes the confirm if it is there.
    fn look(&mut self, returned: &mut HashSet<Uuid>) {
        if matches!(self.end, End::Open)
            && let Some(outcome) = self.journey.as_mut().now_or_never()
        {
            self.hear(outcome, returned);
        }
    }

    fn hear(&mut self, outcome: lapin::Result<Confirmation>, returned: &mut HashSet<Uuid>) {
        self.end = match outcome {
            Err(error) => End::Lost(error),
            Ok(confirmation) => {
                let taken = confirmation.is_ack();
                // Not necessarily this parcel's message.
                returned
                    .extend(confirmation.take_message().and_then(|message| message_id(&message.delivery.properties)));
                End::Heard { taken }
            }
        };
    }

    fn verdict(&self, returned: &mut HashSet<Uuid>) -> Option<Verdict> {
        let came_back = returned.remove(&self.message_id);
        let outcome = match self.end {
            End::Open | End::Lost(_) => return None,
            End::Heard { taken: false } => Outcome::Refused,
            End::Heard { taken: true } if came_back => Outcome::Unroutable,
            End::Heard { taken: true } => Outcome::Routed,
        };
        Some(Verdict { id: self.id, message_id: self.message_id, outcome })
    }
}
