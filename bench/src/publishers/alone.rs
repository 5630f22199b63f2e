//! Lapin alone: messages that are made as they go out, and a sliding window of confirms.

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use lapin::{Channel, Connection, options::ConfirmSelectOptions};
use tidings::broker::PUBLISHED;

use super::{Message, WINDOW};

pub struct Lapin {
    channel: Channel,
}

impl Lapin {
    pub async fn open(connection: &Connection) -> anyhow::Result<Self> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        ensure!(channel.status().confirm(), "the broker did not switch confirms on");
        Ok(Self { channel })
    }

    /// Returns when everything is confirmed.
    pub async fn publish(&self, to: (&str, &str), messages: impl Iterator<Item = Message>) -> anyhow::Result<()> {
        let journeys = stream::iter(messages).map(|message| self.publish_one(to, message));
        journeys.buffer_unordered(WINDOW).try_collect().await
    }

    async fn publish_one(&self, to: (&str, &str), (properties, body): Message) -> anyhow::Result<()> {
        let (exchange, key) = to;
        let sent = self.channel.basic_publish(exchange.into(), key.into(), PUBLISHED, &body, properties).await;
        let confirmation = sent.context("the channel is lost")?.await?;
        ensure!(confirmation.is_ack() && confirmation.take_message().is_none(), "the broker did not take a message");
        Ok(())
    }
}
