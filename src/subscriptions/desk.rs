//! Desk: the registry's connection to the broker, dialled when it is first needed and again after it was lost.
//!
//! Promise: every request has its deadline, and a refusal costs its asker a channel and nobody else anything.
//! Not here, on purpose: messages. Queues are looked at by a passive declaration, which touches none.

use std::{collections::BTreeSet, sync::Arc};

use lapin::Channel;
use tidings_sdk::{
    subscription::{Subscription, SubscriptionName},
    topology::{self, Depth, RETRY_DELAYS},
};
use tokio::{sync::Mutex, time::timeout};

use crate::broker::{Broker, FAREWELL, Session, is_refusal};

#[derive(Clone)]
pub struct Desk {
    broker: Broker,
    connection: Arc<Mutex<Option<Session>>>,
}

/// Why the broker did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// A part exists with other properties.
    #[error(transparent)]
    Differs(topology::Error),
    /// It answered, and will not: rights are missing, or the exchange is another.
    #[error("the broker refused")]
    Refused(#[source] anyhow::Error),
    #[error("the broker does not answer")]
    Away(#[source] anyhow::Error),
}

impl Trouble {
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away(_))
    }
}

impl From<topology::Error> for Trouble {
    fn from(error: topology::Error) -> Self {
        match error {
            topology::Error::Differs(_) => Self::Differs(error),
            topology::Error::Forbidden(_) => Self::Refused(error.into()),
            // What was there a moment ago is missing: somebody deletes it under us. The next try makes it anew.
            topology::Error::Missing(_) | topology::Error::Silent | topology::Error::Broken(_) => {
                Self::Away(error.into())
            }
        }
    }
}

/// What lies in a subscription's queues. `None` where there is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub work: Option<Depth>,
    pub dead: Option<Depth>,
}

impl Desk {
    pub fn new(broker: Broker) -> Self {
        Self { broker, connection: Arc::default() }
    }

    pub fn exchange(&self) -> &str {
        self.broker.exchange()
    }

    /// Declares what is registered, over the parts that are `there`, and unbinds what was bound beyond it, in this order: nothing is missed
    /// in between.
    pub async fn declare(
        &self,
        wanted: &Subscription,
        bound: &Subscription,
        there: &BTreeSet<String>,
    ) -> Result<(), Trouble> {
        let channel = self.channel().await?;
        let source = self.broker.topology();
        topology::declare_over(&channel, &source, wanted, &RETRY_DELAYS, there).await?;
        let keys = bound.keys.difference(&wanted.keys).cloned().collect();
        let fields = bound.fields.difference(&wanted.fields).cloned().collect();
        Ok(topology::unbind(&channel, &source, &wanted.name, &keys, &fields).await?)
    }

    pub async fn delete(&self, name: &SubscriptionName) -> Result<(), Trouble> {
        Ok(topology::delete(&self.channel().await?, name, &RETRY_DELAYS).await?)
    }

    /// Looks at a subscription's queues.
    pub async fn look(&self, name: &SubscriptionName) -> Result<Look, Trouble> {
        self.look_on(&mut self.channel().await?, name).await
    }

    /// Looks at all of theirs, in the order of their names. `None` where the broker does not say: RabbitMQ 4.3 lets nobody look at what he
    /// has no right to.
    pub async fn look_at_all(&self, names: &[&SubscriptionName]) -> Result<Vec<Option<Look>>, Trouble> {
        if names.is_empty() {
            return Ok(vec![]);
        }
        let mut channel = self.channel().await?;
        let mut looks = Vec::with_capacity(names.len());
        for name in names {
            looks.push(match self.look_on(&mut channel, name).await {
                Ok(look) => Some(look),
                Err(Trouble::Refused(_)) => {
                    channel = self.channel().await?;
                    None
                }
                Err(trouble) => return Err(trouble),
            });
        }
        Ok(looks)
    }

    async fn look_on(&self, channel: &mut Channel, name: &SubscriptionName) -> Result<Look, Trouble> {
        let work = self.depth(channel, name.queue()).await?;
        let dead = self.depth(channel, &name.dead_queue()).await?;
        Ok(Look { work, dead })
    }

    /// Messages on their way back to the queue.
    pub async fn retrying(&self, name: &SubscriptionName) -> Result<u32, Trouble> {
        let mut channel = self.channel().await?;
        let mut retrying = 0;
        for delay in RETRY_DELAYS {
            let depth = self.depth(&mut channel, &name.retry_queue(delay)).await?;
            retrying += depth.map_or(0, |depth| depth.ready);
        }
        Ok(retrying)
    }

    /// The parts of a subscription that was declared, and whether each is there; the exchange that chooses by field only if it had one. What
    /// lay in one that is not, or would have come by it, is lost.
    pub async fn parts(&self, name: &SubscriptionName, had_fields: bool) -> Result<Vec<(String, bool)>, Trouble> {
        let (mut channel, mut parts) = (self.channel().await?, vec![]);
        let retries = RETRY_DELAYS.map(|delay| name.retry_queue(delay));
        for queue in [name.queue().to_owned(), name.dead_queue()].into_iter().chain(retries) {
            let depth = self.depth(&mut channel, &queue).await?;
            parts.push((queue, depth.is_some()));
        }
        if had_fields {
            let exchange = name.fields_exchange();
            let is_there = topology::has_exchange(&channel, &exchange).await?;
            parts.push((exchange, is_there));
        }
        Ok(parts)
    }

    /// Whether a part is there that few subscriptions have, and that is deleted with any.
    pub async fn has_more(&self, name: &SubscriptionName) -> Result<bool, Trouble> {
        let mut channel = self.channel().await?;
        let resync = self.depth(&mut channel, &name.resync_queue()).await?;
        Ok(resync.is_some() || topology::has_exchange(&channel, &name.fields_exchange()).await?)
    }

    async fn depth(&self, channel: &mut Channel, queue: &str) -> Result<Option<Depth>, Trouble> {
        match topology::depth(channel, queue).await {
            Ok(depth) => Ok(Some(depth)),
            // One that is another connection's alone has the name and is not ours.
            Err(topology::Error::Missing(_) | topology::Error::Differs(_)) => {
                *channel = self.channel().await?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A channel of the asker's own, on which the owner's exchange is known to be there.
    async fn channel(&self) -> Result<Channel, Trouble> {
        let mut kept = self.connection.lock().await;
        let connection = match kept.take().filter(|connection| connection.status().connected()) {
            Some(connection) => connection,
            None => self.broker.session("subscriptions").await.map_err(Trouble::Away)?,
        };
        match self.broker.channel_with_exchange(&connection).await {
            Ok(channel) => {
                *kept = Some(connection);
                Ok(channel)
            }
            Err(error) if is_refusal(&error) => {
                *kept = Some(connection);
                Err(Trouble::Refused(error))
            }
            // The connection goes with the error: the next asker dials anew.
            Err(error) => Err(Trouble::Away(error)),
        }
    }

    /// Ends the connection in order, within bounds.
    pub async fn close(&self) {
        let closed = async {
            if let Some(connection) = self.connection.lock().await.take() {
                drop(connection.close(200, "bye".into()).await);
            }
        };
        let _ = timeout(FAREWELL, closed).await;
    }
}
