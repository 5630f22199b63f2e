//! The registry of a House, and somebody with every right at its broker.

use lapin::{
    Channel, Connection, Consumer,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tidings_sdk::{
    envelope::Notice,
    topology::{self, Depth, RETRY_DELAYS},
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::house::{self, Answer, House, env, eventually};

/// Looks often enough for a test to see what comes of it.
pub const EVERY_SECOND: (&str, &str) = ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s");
/// The watch looks once, at its start, and then not while a test runs its few steps.
pub const SELDOM: (&str, &str) = ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "60s");

/// Names are the broker's, which all tests share.
pub fn unique(name: &str) -> String {
    format!("{name}-{}", Uuid::new_v4().simple())
}

pub fn wish(keys: &[&str], fields: &[&str]) -> Value {
    json!({ "routing_keys": keys, "fields": fields, "owner": "team-orders", "purpose": "cancels pending orders" })
}

impl House {
    pub async fn register(&self, name: &str, wish: &Value) -> Answer {
        Answer::to(self.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(wish)).await
    }

    /// Without asking the broker, which is said to have had this revision; 0: none.
    pub async fn has_registered(&self, name: &str, declared_revision: i64) {
        let register = "
            insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields, declared_revision)
            values ($1, '{user.created}', '{city}', 'team-orders', 'a test', '{user.created}', '{city}', $2)
        ";
        sqlx::query(register).bind(name).bind(declared_revision).execute(&self.db).await.unwrap();
    }

    pub async fn subscription(&self, name: &str) -> Answer {
        self.page(&format!("/v1/subscriptions/{name}")).await
    }

    pub async fn unsubscribe(&self, name: &str, query: &str) -> Answer {
        Answer::to(self.request(Method::DELETE, &format!("/v1/subscriptions/{name}{query}"))).await
    }

    /// Waits until the subscription is in this state; all that is told of it then.
    pub async fn comes_to_be(&self, name: &str, state: &str) -> Value {
        eventually(state, async || {
            let seen = self.subscription(name).await.body;
            if seen["state"] == state { Ok(seen) } else { Err(seen) }
        })
        .await
    }

    /// Since when news is missing for one that was lost.
    pub async fn missing_since(&self, name: &str) -> OffsetDateTime {
        let since = "select missing_since from subscriptions where name = $1";
        sqlx::query_scalar(since).bind(name).fetch_one(&self.db).await.unwrap()
    }

    /// The database refuses to note that the broker has this one, or has it no more.
    pub async fn hold(&self, name: &str) {
        let hold = format!(
            "
            create function hold() returns trigger language plpgsql as $$ begin raise 'held'; end $$;
            create trigger hold before update on subscriptions
              for each row when (old.name = '{name}' and new.declared_revision <> old.declared_revision)
              execute function hold();
            "
        );
        sqlx::raw_sql(AssertSqlSafe(hold)).execute(&self.db).await.unwrap();
    }

    pub async fn let_go(&self) {
        sqlx::query("drop trigger hold on subscriptions").execute(&self.db).await.unwrap();
    }

    /// Waits until the watch has looked once more, beginning after this was asked.
    pub async fn looks_again(&self) {
        self.looks(1).await;
    }

    /// The same for so many looks; one that was under way is not counted.
    pub async fn looks(&self, count: u32) {
        for _ in 0..=count {
            let looked_at = async || -> Option<OffsetDateTime> {
                let when = "select greatest((select looked_at from subscriptions_looked_at), (select max(seen_at) from subscriptions))";
                sqlx::query_scalar(when).fetch_one(&self.db).await.unwrap()
            };
            let before = looked_at().await;
            eventually("another look", async || if looked_at().await > before { Ok(()) } else { Err(before) }).await;
        }
    }
}

/// Somebody with every right at the broker.
pub struct Admin {
    connection: Connection,
}

impl Admin {
    pub async fn new() -> Self {
        Self::at(&env("AMQP_URL")).await
    }

    pub async fn at(amqp_url: &str) -> Self {
        Self { connection: house::connect(amqp_url).await.unwrap() }
    }

    /// A refusal costs a channel, so each question has its own.
    pub async fn channel(&self) -> Channel {
        self.connection.create_channel().await.unwrap()
    }

    /// `None` when there is no such queue.
    pub async fn depth(&self, queue: &str) -> Option<Depth> {
        topology::depth(&self.channel().await, queue).await.ok()
    }

    pub async fn delete_exchange(&self, exchange: &str) {
        let options = ExchangeDeleteOptions::default();
        self.channel().await.exchange_delete(exchange.into(), options).await.unwrap();
    }

    pub async fn has_exchange(&self, exchange: &str) -> bool {
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        let kind = lapin::ExchangeKind::Direct;
        self.channel().await.exchange_declare(exchange.into(), kind, passive, FieldTable::default()).await.is_ok()
    }

    pub async fn delete_queue(&self, queue: &str) {
        self.channel().await.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// A classic queue, as no subscription has.
    pub async fn classic_queue(&self, queue: &str) {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel().await.queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
    }

    /// Takes everything out of a queue: what each message says, in order.
    pub async fn drain(&self, queue: &str) -> Vec<Notice> {
        let channel = self.channel().await;
        let mut taken = vec![];
        while let Some(message) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap() {
            taken.push(Notice::from_message(&message.properties, &message.data).unwrap());
        }
        taken
    }

    /// Waits until all of these users and versions came; all that came.
    pub async fn hears_of(&self, queue: &str, users: &[(Uuid, i64)]) -> Vec<(Uuid, i64)> {
        let mut told = vec![];
        eventually("all of them to be told", async || {
            told.extend(self.drain(queue).await.into_iter().map(|notice| (notice.user_id, notice.version)));
            if users.iter().all(|user| told.contains(user)) { Ok(()) } else { Err(told.clone()) }
        })
        .await;
        told
    }

    pub async fn told(&self, queue: &str) -> Vec<String> {
        self.drain(queue).await.iter().map(house::describe).collect()
    }

    /// A consumer that takes nothing; it goes with its channel.
    pub async fn attend(&self, queue: &str) -> Attendance {
        let channel = self.channel().await;
        let consumer =
            channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
        Attendance { consumer: consumer.await.unwrap(), channel }
    }
}

pub struct Attendance {
    /// Cancelled when it is dropped.
    consumer: Consumer,
    channel: Channel,
}

impl Attendance {
    pub async fn ends(self) {
        self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default()).await.unwrap();
    }
}

/// All queues and exchanges of a subscription that are there.
pub async fn parts(admin: &Admin, name: &str) -> Vec<String> {
    let queues = RETRY_DELAYS.iter().map(|delay| format!("{name}.{}", topology::retry_key(*delay)));
    let mut there = vec![];
    for queue in queues.chain([name.to_owned(), format!("{name}.dead")]) {
        there.extend(admin.depth(&queue).await.map(|_| queue));
    }
    for exchange in [name.to_owned(), format!("{name}.fields")] {
        if admin.has_exchange(&exchange).await {
            there.push(format!("exchange {exchange}"));
        }
    }
    there
}
