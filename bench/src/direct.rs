//! Direct: what a program would do that has no outbox and may lose news: change the user, then publish.
//!
//! Promise: it is as good a program as its kind can be. It gathers changes as the service does, one statement for whatever waits, so
//! that it is not slowed by commits that the service shares; it publishes a batch at once and waits for no confirm. It has no HTTP, no
//! key and no schema to check, and no feed.

use std::time::Instant;

use anyhow::Context;
use futures_util::future::try_join_all;
use lapin::{Channel, Connection, options::BasicPublishOptions};
use sqlx::PgConnection;
use tidings_sdk::envelope::{Event, Notice};
use time::OffsetDateTime;
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;

use crate::{
    house::House,
    pace::Due,
    scratch::{PROFILE, Scratch, user},
};

/// As many as the service takes into one statement.
const BATCH: usize = 128;

const CHANGE: &str = "
with asked as (
  select * from unnest($1::uuid[], $2::text[]) as asked (id, profile)
)
update users
   set version = version + 1, profile = asked.profile::json, updated_at = now()
  from asked
 where users.id = asked.id
   and users.deleted_at is null
returning users.id, version, now()
";

pub struct Direct {
    database: PgConnection,
    broker: Connection,
    publisher: Channel,
    exchange: String,
}

impl Direct {
    pub async fn open(house: &House, database: &Scratch) -> anyhow::Result<Self> {
        let broker = house.connect_broker().await?;
        let publisher = broker.create_channel().await?;
        Ok(Self { database: database.connect().await?, broker, publisher, exchange: house.exchange.clone() })
    }

    /// Changes one user for each that is due; who was changed, and when that was due.
    pub async fn run(&mut self, mut dues: UnboundedReceiver<Due>) -> anyhow::Result<Vec<(Uuid, Instant)>> {
        let (mut all, mut batch) = (vec![], vec![]);
        while dues.recv_many(&mut batch, BATCH).await > 0 {
            self.change_and_publish(&batch).await?;
            all.extend(batch.drain(..).map(|(number, due)| (user(number), due)));
        }
        Ok(all)
    }

    async fn change_and_publish(&mut self, batch: &[Due]) -> anyhow::Result<()> {
        let (ids, profiles): (Vec<Uuid>, Vec<String>) =
            batch.iter().map(|(number, _)| (user(*number), profile())).unzip();
        let changed: Vec<(Uuid, i64, OffsetDateTime)> =
            sqlx::query_as(CHANGE).bind(ids).bind(profiles).fetch_all(&mut self.database).await.context("a change")?;
        try_join_all(changed.into_iter().map(|(user, version, at)| self.publish(user, version, at))).await?;
        Ok(())
    }

    async fn publish(&self, user: Uuid, version: i64, at: OffsetDateTime) -> anyhow::Result<()> {
        let notice = Notice {
            message_id: Uuid::new_v4(),
            user_id: user,
            version,
            event: Event::Updated { changed_fields: vec!["job_title".parse()?] },
            occurred_at: at,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".parse().ok(),
        };
        let (properties, body) = notice.to_message("urn:tidings:bench");
        let (exchange, key) = (self.exchange.as_str().into(), notice.event.name().into());
        self.publisher.basic_publish(exchange, key, BasicPublishOptions::default(), &body, properties).await?;
        Ok(())
    }

    pub async fn close(self) -> anyhow::Result<()> {
        sqlx::Connection::close(self.database).await?;
        Ok(self.broker.close(200, "bye".into()).await?)
    }
}

/// One that was not there before, as long as all others.
fn profile() -> String {
    PROFILE.replace("0000000000", &format!("{:010}", Uuid::new_v4().as_u128() % 10_000_000_000))
}
