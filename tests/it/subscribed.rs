//! A subscription of the House's, registered and declared, and a consumer whose handler can be broken and mended.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tidings_sdk::{
    envelope::Notice,
    letter::{Letter, Reason},
    subscription::{Subscription, SubscriptionName},
    topology::{self, DEAD, RETRY_DELAYS, Source},
};
use time::OffsetDateTime;

use crate::{
    contract::check_message,
    house::{self, House, env, eventually},
};

pub struct Subscribed {
    pub name: SubscriptionName,
    subscription: Subscription,
    source: Source,
    pub channel: Channel,
    connection: Connection,
}

impl Subscribed {
    pub async fn to(house: &House, name: &str, keys: &[&str], fields: &[&str]) -> Self {
        Self::at(house, &env("AMQP_URL"), name, keys, fields).await
    }

    /// At another broker than that of all tests.
    pub async fn at(house: &House, amqp_url: &str, name: &str, keys: &[&str], fields: &[&str]) -> Self {
        let mut subscription = Subscription::new(format!("{}.{name}", house.exchange).parse().unwrap());
        subscription.keys = keys.iter().map(|key| key.parse().unwrap()).collect();
        subscription.fields = fields.iter().map(|field| field.parse().unwrap()).collect();
        let connection = house::connect(amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let name = subscription.name.clone();
        let subscribed = Self { name, subscription, source, channel, connection };
        subscribed.declare().await;
        subscribed.register(house, keys, fields).await;
        subscribed
    }

    async fn register(&self, house: &House, keys: &[&str], fields: &[&str]) {
        let register = "
            insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields, declared_revision)
            values ($1, $2, $3, 'team-orders', 'a test', $2, $3, 1)
        ";
        let register = sqlx::query(register).bind(self.name.as_str()).bind(keys).bind(fields);
        register.execute(&house.db).await.unwrap();
    }

    /// What the registry does, and a team whose queue is gone.
    pub async fn declare(&self) {
        topology::declare(&self.channel, &self.source, &self.subscription, &RETRY_DELAYS).await.unwrap();
    }

    pub async fn undeclare(&self) {
        topology::delete(&self.channel, &self.name, &RETRY_DELAYS).await.unwrap();
    }

    pub fn path(&self, rest: &str) -> String {
        format!("/v1/subscriptions/{}/{rest}", self.name)
    }

    /// Messages that wait in the queue.
    pub async fn waiting(&self) -> u32 {
        topology::depth(&self.channel, self.name.queue()).await.unwrap().ready
    }

    pub async fn waiting_dead(&self) -> u32 {
        topology::depth(&self.channel, &self.name.dead_queue()).await.unwrap().ready
    }

    /// Puts a message straight among the dead letters.
    pub async fn bury(&self, properties: BasicProperties, body: &[u8]) {
        let (exchange, options) = (self.name.as_str().into(), BasicPublishOptions::default());
        self.channel.basic_publish(exchange, DEAD.into(), options, body, properties).await.unwrap().await.unwrap();
    }

    /// Puts a notice among the dead letters, as a consumer of ours would.
    pub async fn bury_notice(&self, notice: &Notice, reason: Reason) {
        let (properties, body) = notice.to_message("urn:test");
        self.bury(failed(properties, reason), &body).await;
    }

    /// The same, with a notice that this backfill told.
    pub async fn bury_backfilled(&self, notice: &Notice, backfill: &str) {
        let (properties, body) = notice.to_message("urn:test");
        let mut headers = properties.headers().clone().unwrap_or_default();
        headers.insert(topology::BACKFILL.into(), AMQPValue::LongString(backfill.into()));
        self.bury(failed(properties.with_headers(headers), Reason::HandlerFailed), &body).await;
    }

    /// Puts a message straight into the queue.
    pub async fn put_into_queue(&self, properties: BasicProperties, body: &[u8]) {
        let (queue, options) = (self.name.queue().into(), BasicPublishOptions::default());
        self.channel.basic_publish("".into(), queue, options, body, properties).await.unwrap().await.unwrap();
    }

    /// Everything that waits in the queue, taken out.
    pub async fn take(&self) -> Vec<Delivery> {
        take(&self.channel, self.name.queue()).await
    }

    /// Waits until so many wait in the queue.
    pub async fn await_waiting(&self, count: u32) {
        eventually("messages in the queue", async || match self.waiting().await {
            waiting if waiting == count => Ok(()),
            waiting => Err(waiting),
        })
        .await;
    }

    pub async fn end(self) {
        self.undeclare().await;
        self.connection.close(200, "bye".into()).await.unwrap();
    }
}

/// Everything that waits in a queue, taken out.
pub async fn take(channel: &Channel, queue: &str) -> Vec<Delivery> {
    let mut taken = vec![];
    let options = BasicGetOptions { no_ack: true };
    while let Some(message) = channel.basic_get(queue.into(), options).await.unwrap() {
        check_message(&message.delivery.properties, &message.delivery.data).unwrap();
        taken.push(message.delivery);
    }
    taken
}

/// The properties of a message after three failed attempts.
pub fn failed(properties: BasicProperties, reason: Reason) -> BasicProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    Letter { attempts: 3, reason, failed_at: Some(OffsetDateTime::now_utc()) }.write(&mut headers);
    properties.with_headers(headers)
}

pub fn header(delivery: &Delivery, name: &str) -> Option<String> {
    let value = delivery.properties.headers().as_ref()?.inner().get(name)?;
    Some(match value {
        AMQPValue::LongString(text) => text.to_string(),
        lapin::types::AMQPValue::LongInt(number) => number.to_string(),
        other => panic!("{other:?}"),
    })
}

pub fn notice(delivery: &Delivery) -> Notice {
    Notice::from_message(&delivery.properties, &delivery.data).unwrap()
}

/// A consumer of a subscription, as teams write it: what its handler fails at becomes a dead letter.
pub struct Consumer {
    pub handled: Arc<Mutex<Vec<Notice>>>,
    broken: Arc<AtomicBool>,
}

impl Consumer {
    pub async fn of(subscribed: &Subscribed) -> Self {
        let channel = subscribed.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        channel.basic_qos(50, BasicQosOptions::default()).await.unwrap();
        let (queue, options) = (subscribed.name.queue().into(), BasicConsumeOptions::default());
        let mut news = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await.unwrap();
        let (handled, broken) = (Arc::<Mutex<Vec<Notice>>>::default(), Arc::<AtomicBool>::default());
        let consumer = Self { handled: handled.clone(), broken: broken.clone() };
        let exchange = subscribed.name.to_string();
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = news.next().await {
                if broken.load(Ordering::SeqCst) {
                    let properties = failed(delivery.properties.clone(), Reason::HandlerFailed);
                    let options = BasicPublishOptions::default();
                    let buried = channel.basic_publish(
                        exchange.as_str().into(),
                        DEAD.into(),
                        options,
                        &delivery.data,
                        properties,
                    );
                    buried.await.unwrap().await.unwrap();
                } else {
                    check_message(&delivery.properties, &delivery.data).unwrap();
                    handled.lock().unwrap().push(notice(&delivery));
                }
                delivery.ack(BasicAckOptions::default()).await.unwrap();
            }
        });
        consumer
    }

    pub fn break_down(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    pub fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    pub fn handled(&self) -> Vec<Notice> {
        self.handled.lock().unwrap().clone()
    }
}
