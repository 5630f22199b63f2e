//! What is told of a subscription: what is registered, what the watch has seen, and what its queues hold now.

use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;

use super::{
    desk::Look,
    management::{Queue, Unregistered},
    model::{Registered, State},
};

/// A subscription, as it is now.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
#[schema(as = Subscription)]
pub struct View {
    #[schema(example = "orders")]
    pub name: String,
    /// Kinds of notice that wake it, without the deployment's prefix.
    #[schema(example = json!(["user.deleted"]))]
    pub routing_keys: Vec<String>,
    /// Profile fields whose change wakes it.
    #[schema(example = json!(["address"]))]
    pub fields: Vec<String>,
    #[schema(example = "team-orders")]
    pub owner: String,
    #[schema(example = "cancels pending orders")]
    pub purpose: String,
    /// The client that stands for it; null: nobody, an administrator looks after it.
    #[schema(required = true, example = "orders")]
    pub client: Option<String>,
    /// Deleted after it had no consumer for so long; null: never.
    #[schema(required = true, example = 2_592_000)]
    pub expires_after_s: Option<u64>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it was last registered.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    pub state: State,
    /// Whether the broker has it as it is registered here.
    pub declared: bool,
    /// What its queue holds; null when the broker does not say.
    #[schema(required = true)]
    pub queue: Option<QueueView>,
    /// Messages that its consumer gave up; null when the broker does not say.
    #[schema(required = true, example = 0)]
    pub dead_letters: Option<u32>,
    /// When something last moved in the queue, to the minute; null if nothing was seen to.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub last_activity_at: Option<OffsetDateTime>,
    /// When a consumer was last seen; null if never.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub consumer_seen_at: Option<OffsetDateTime>,
    /// With state `expiring`: when it will be deleted, unless a consumer comes.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub expires_at: Option<OffsetDateTime>,
    /// When its queue was last found gone; null if never.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub lost_at: Option<OffsetDateTime>,
    /// With `lost_at`: since when news may be missing therefore.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub missing_since: Option<OffsetDateTime>,
}

/// A subscription's queue.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
#[schema(as = SubscriptionQueue)]
pub struct QueueView {
    /// Messages that wait for a consumer.
    #[schema(example = 12)]
    pub ready: u32,
    #[schema(example = 1)]
    pub consumers: u32,
    /// Messages that a consumer has and has not acknowledged; null when the broker's management API does not tell.
    #[schema(required = true, example = 3)]
    pub unacknowledged: Option<u64>,
    /// Since when the queue was not seen empty: the oldest message waits no longer than that. Null when it is empty.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub waiting_since: Option<OffsetDateTime>,
    /// When the change behind the first message was made, if the broker tells.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    pub head_message_at: Option<OffsetDateTime>,
}

/// All subscriptions.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
#[schema(as = Subscriptions)]
pub struct Listing {
    pub subscriptions: Vec<View>,
    /// Queues that hear our exchange and that nobody registered; null when the broker's management API is not set up, or does not
    /// answer.
    #[schema(required = true)]
    pub unregistered: Option<Vec<Unregistered>>,
}

impl View {
    pub fn of(row: &Registered, idle_after: Duration, look: Option<Look>, told: Option<&Queue>) -> Self {
        let wish = &row.registration;
        let work = look.and_then(|look| look.work);
        let is_attended = work.is_some_and(|depth| depth.consumers > 0);
        Self {
            name: row.name().to_string(),
            routing_keys: wish.subscription.keys.iter().map(ToString::to_string).collect(),
            fields: wish.subscription.fields.iter().map(ToString::to_string).collect(),
            owner: wish.owner.clone(),
            purpose: wish.purpose.clone(),
            client: wish.client.clone(),
            expires_after_s: wish.expires_after.map(|after| after.as_secs()),
            created_at: row.created_at,
            updated_at: row.updated_at,
            state: row.state(idle_after),
            declared: row.is_declared(),
            queue: work.map(|depth| QueueView {
                ready: depth.ready,
                consumers: depth.consumers,
                unacknowledged: told.and_then(|queue| queue.unacknowledged),
                waiting_since: (depth.ready > 0).then(|| row.seen.waiting_since.unwrap_or(row.as_of)),
                head_message_at: told.and_then(|queue| queue.head_message_at),
            }),
            dead_letters: look.and_then(|look| look.dead).map(|dead| dead.ready + row.dead_letters),
            last_activity_at: row.seen.last_activity_at,
            consumer_seen_at: if is_attended { Some(row.as_of) } else { row.seen.consumer_seen_at },
            expires_at: row.expires_at(),
            lost_at: row.seen.lost_at,
            missing_since: row.seen.missing_since,
        }
    }
}
