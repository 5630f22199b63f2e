//! Subscriptions: who listens to what.
//!
//! Promise: once a registration was answered, nothing published afterwards is missed by its queue; nothing that waits for a consumer
//! is deleted without being asked for, or told long before.
//! Not here, on purpose: what a subscription is made of at the broker (`sdk::topology`), and any look into a message: a message that
//! is taken out and put back counts as delivered, and RabbitMQ drops it in the end.

pub mod command;
mod model;
mod store;

pub use model::{Registered, Registration, Seen, State};
pub use store::{FIND, FORGET, LOCK, MARK_DECLARED, PUT, TAKE_BACK};

use std::sync::Arc;

use sqlx::PgPool;
use tidings_sdk::subscription::SubscriptionName;

use crate::{
    broker::Broker,
    db::{self, Db, Trouble},
    profile::Schema,
};

/// The verbs of the registry. Cheap to clone.
#[derive(Clone)]
pub struct Subscriptions {
    pub db: Db,
    pub queries: PgPool,
    /// `None` in an instance without a broker.
    pub broker: Option<Broker>,
    pub schema: Arc<Schema>,
}

impl Subscriptions {
    /// What is registered under this name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn get(&self, name: &SubscriptionName) -> Result<Option<Registered>, Trouble> {
        let (queries, name) = (self.queries.clone(), name.clone());
        Ok(db::ask(async move { store::find(&queries, Some(&name)).await }).await?.pop())
    }

    /// Everything that is registered, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn list(&self) -> Result<Vec<Registered>, Trouble> {
        let queries = self.queries.clone();
        db::ask(async move { store::find(&queries, None).await }).await
    }
}
