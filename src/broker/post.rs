//! Post: messages to one subscription alone, through its own exchange.
//!
//! Promise: each message is said to have arrived only when the broker confirmed it and did not return it.
//! Not here, on purpose: the owner's exchange, where everybody would hear, and resending.

use std::collections::HashSet;

use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    types::{AMQPValue, ShortString},
};
use tidings_sdk::{
    envelope::{Notice, message_id},
    subscription::SubscriptionName,
    topology::WORK,
};
use uuid::Uuid;

use super::{Broker, Outcome, PUBLISHED, confirm_select, open};

/// One message.
pub struct Parcel {
    message_id: Uuid,
    properties: BasicProperties,
    body: Vec<u8>,
}

impl Parcel {
    /// A notice as the relay would publish it, and headers that say why it comes again.
    pub fn new(notice: &Notice, broker: &Broker, why: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> Self {
        let (properties, body) = notice.to_message(broker.source());
        let mut headers = properties.headers().clone().unwrap_or_default();
        for (header, value) in why {
            headers.insert(ShortString::from(header), value);
        }
        Self { message_id: notice.message_id, properties: properties.with_headers(headers), body }
    }
}

/// A channel in confirm mode.
pub struct Post {
    channel: Channel,
}

impl Post {
    pub async fn open(connection: &Connection) -> anyhow::Result<Self> {
        let channel = open(connection).await?;
        confirm_select(&channel).await?;
        Ok(Self { channel })
    }

    /// Sends these to the subscription's queue, and waits for what becomes of each; the answers are in their order.
    ///
    /// # Errors
    /// When the channel is lost, as it is when the subscription's exchange is gone. Some may have arrived then.
    pub async fn send(&self, to: &SubscriptionName, parcels: Vec<Parcel>) -> lapin::Result<Vec<Outcome>> {
        let ids: Vec<Uuid> = parcels.iter().map(|parcel| parcel.message_id).collect();
        let journeys = parcels.into_iter().map(|parcel| publish(self.channel.clone(), to.to_string(), parcel));
        let mut returned = HashSet::new();
        let mut taken = Vec::with_capacity(ids.len());
        for confirmation in try_join_all(journeys).await? {
            taken.push(confirmation.is_ack());
            // lapin hands a returned message to whichever confirm resolves next. All of them are here, and nothing else is under way
            // on this channel: so every return is among them.
            returned.extend(confirmation.take_message().and_then(|message| message_id(&message.delivery.properties)));
        }
        Ok(ids.iter().zip(taken).map(|(id, taken)| outcome(taken, returned.contains(id))).collect())
    }
}

fn outcome(taken: bool, came_back: bool) -> Outcome {
    match (taken, came_back) {
        (false, _) => Outcome::Refused,
        (true, true) => Outcome::Unroutable,
        (true, false) => Outcome::Routed,
    }
}

async fn publish(channel: Channel, exchange: String, parcel: Parcel) -> lapin::Result<Confirmation> {
    let Parcel { properties, body, .. } = parcel;
    channel.basic_publish(exchange.into(), WORK.into(), PUBLISHED, &body, properties).await?.await
}
