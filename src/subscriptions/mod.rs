//! Subscriptions: who listens to what.
//!
//! Promise: once a registration was answered, nothing published afterwards is missed by its queue; nothing that waits for a consumer
//! is deleted without being asked for, or told long before.
//! Not here, on purpose: what a subscription is made of at the broker (`sdk::topology`), and any look into a message: a message that
//! is taken out and put back counts as delivered, and RabbitMQ drops it in the end.

pub mod command;
mod desk;
mod http;
mod management;
mod model;
mod registrar;
mod status;
mod store;
mod view;
mod watch;

pub use desk::Desk;
pub use http::routes;
pub use management::Management;
pub use model::{Registered, Registration, Seen, State};
pub use registrar::{Put, Registrar};
pub use status::Status;
pub use store::{
    FIND, FORGET, LOCK, LOOKED, MARK_DECLARED, MARK_LOST, OBSERVE, PUT, RECOVERED, SAW, TAKE_BACK, UNLOCK,
};
pub use view::{Listing, View};
pub use watch::Watch;

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use sqlx::PgPool;
use tidings_sdk::{
    subscription::{Subscription, SubscriptionName},
    topology,
};
use tokio::time::timeout;

use crate::{
    clients::{self, Caller},
    db::{self, Db, Trouble},
    json::Fault,
    profile::Schema,
};
use desk::Look;

/// For a look at the broker while somebody waits for the answer, which does not depend on it.
const LOOK: Duration = Duration::from_secs(5);

/// What [`crate::broker::Broker::noting_missing`] is to do: an exchange that is made anew has nobody bound, so that every subscription misses news until
/// it is declared again.
pub fn note_missing_exchange(db: &Db) -> impl Fn() -> BoxFuture<'static, anyhow::Result<()>> + use<> {
    let db = db.clone();
    move || {
        let mut line = db.line("exchange", []);
        let noted = async move {
            let lost = line.run(async |session| store::mark_all_lost(session).await).await;
            line.hang_up().await;
            match lost? {
                0 => {}
                lost => tracing::warn!(
                    subscriptions = lost,
                    "the exchange was deleted at the broker: all are bound again, and told anew what changed since"
                ),
            }
            Ok(())
        };
        noted.boxed()
    }
}

/// The verbs of the registry. Cheap to clone.
#[derive(Clone)]
pub struct Subscriptions {
    queries: PgPool,
    schema: Arc<Schema>,
    /// `None` in an instance without a broker.
    registrar: Option<Registrar>,
    management: Option<Management>,
    idle_after: Duration,
}

/// Messages that a deletion would lose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    pub ready: u32,
    /// On their way back to the queue after a failure.
    pub retrying: u32,
    pub dead_letters: u32,
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the registration cannot be taken")]
    Invalid(Vec<Fault>),
    #[error("some fields are not for the client that is to stand for it")]
    NotReadable(Vec<Fault>),
    #[error("this instance has no broker")]
    NoBroker,
    #[error("the name is registered by {0:?}")]
    Taken(String),
    #[error("the name is that of the owner's exchange")]
    NameOfExchange,
    #[error("a queue of this name, or a part of one, is at the broker, and nobody registered it")]
    Adopted,
    #[error("there are {} subscriptions already, or {} of this client", store::MOST, store::MOST_OF_ONE)]
    Full,
    #[error("there is no such subscription")]
    NotFound,
    #[error("messages wait: {} ready, {} on their way back, {} dead letters", .0.ready, .0.retrying, .0.dead_letters)]
    NotEmpty(Waiting),
    #[error("it has not confirmed deletions whose deadline has passed")]
    Owing,
    #[error("the subscription is being changed by somebody else")]
    Busy,
    #[error(transparent)]
    Differs(topology::Error),
    /// Registered, and to be declared as soon as the broker lets us.
    #[error("registered, and not declared yet")]
    Undeclared(#[source] desk::Trouble),
    /// Nothing was changed in the registry.
    #[error("not done")]
    Broker(#[from] desk::Trouble),
    #[error("the registry cannot be asked")]
    Database(#[source] Trouble),
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            // lock_not_available: another change of the same subscription takes its time.
            Trouble::Refused { code, .. } if code == "55P03" => Self::Busy,
            trouble => Self::Database(trouble),
        }
    }
}

/// A registration as it was asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    pub routing_keys: Vec<String>,
    pub fields: Vec<String>,
    pub owner: String,
    pub purpose: String,
    pub expires_after: Option<Duration>,
    /// The client that is to stand for it; `None`: the asker, or whoever stood for it before.
    pub client: Option<String>,
}

/// What was asked for, without a fault that can be told without asking anybody.
pub struct Admitted {
    registration: Registration,
    /// As they were asked for, one after the other.
    fields: Vec<String>,
    by: Asker,
}

/// Who asks for something to be done to a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asker {
    /// Looks after all of them.
    Operator,
    /// Looks after those that it stands for.
    Client(String),
}

impl Asker {
    pub fn of(caller: &Caller) -> Self {
        if caller.is_admin() { Self::Operator } else { Self::Client(caller.client.to_string()) }
    }
}

impl Subscriptions {
    pub fn new(
        db: &Db,
        queries: PgPool,
        schema: Arc<Schema>,
        desk: Option<Desk>,
        management: Option<Management>,
        idle_after: Duration,
    ) -> Self {
        let registrar = desk.map(|desk| Registrar::new(db.clone(), desk));
        Self { queries, schema, registrar, management, idle_after }
    }

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

    /// Registers, and declares at the broker. When it is `Ok`, nothing published afterwards is missed.
    pub async fn put(&self, Admitted { registration, fields, by }: Admitted) -> Result<Put, Error> {
        let by_operator = by == Asker::Operator;
        if by_operator {
            self.check_client(&registration, &fields).await?;
        }
        let registrar = self.registrar()?;
        to_its_end(async move { registrar.put(registration, by_operator).await }).await
    }

    /// Whether whoever will stand for it may come to read what it declares: to a client that reads nothing of it, its fields are lost. A
    /// client that registers for itself was asked at the door.
    async fn check_client(&self, wish: &Registration, fields: &[String]) -> Result<(), Error> {
        let client = match &wish.client {
            Some(named) => Some(named.clone()),
            None => self.get(&wish.subscription.name).await?.and_then(|before| before.registration.client),
        };
        let Some(client) = client else { return Ok(()) };
        let (queries, name) = (self.queries.clone(), client.clone());
        let Some(readable) = db::ask(async move { clients::may_declare(&queries, &name).await }).await? else {
            // Who stood for it before and was revoked stays, and reads nothing.
            if wish.client.is_none() {
                return Ok(());
            }
            return Err(Error::Invalid(vec![Fault::new("/client", "unknown_client", "there is no such client")]));
        };
        let strangers = fields.iter().enumerate().filter(|(_, field)| !readable.has(field));
        let strangers: Vec<Fault> = strangers
            .map(|(place, field)| {
                let detail = format!("{field} is not in the list of the client {client}");
                Fault::new(format!("/fields/{place}"), "field_forbidden", detail)
            })
            .collect();
        if strangers.is_empty() { Ok(()) } else { Err(Error::NotReadable(strangers)) }
    }

    /// Deletes with all that lies in it, which has to be `discard`ed knowingly.
    pub async fn delete(&self, name: SubscriptionName, discard: bool, by: Asker) -> Result<(), Error> {
        let registrar = self.registrar()?;
        to_its_end(async move { registrar.delete(name, discard, by == Asker::Operator).await }).await
    }

    /// Ends a loss: its subscriber was brought up to date.
    pub async fn recovered(&self, name: &SubscriptionName) -> Result<(), Error> {
        let (queries, name) = (self.queries.clone(), name.clone());
        let known = db::ask(async move { store::recovered(&queries, &name).await }).await?;
        if known { Ok(()) } else { Err(Error::NotFound) }
    }

    /// Ends the connection to the broker in order.
    pub async fn close(&self) {
        if let Some(registrar) = &self.registrar {
            registrar.desk().close().await;
        }
    }

    /// All that is known of one subscription.
    pub async fn view(&self, name: &SubscriptionName) -> Result<View, Error> {
        let row = self.get(name).await?.ok_or(Error::NotFound)?;
        let (looks, told) = tokio::join!(self.look(std::slice::from_ref(&row)), self.queue(name));
        Ok(View::of(&row, self.idle_after, looks.first().copied().flatten(), told.as_ref()))
    }

    /// All that is known of the subscriptions that somebody looks after; for an operator also of queues that nobody registered.
    pub async fn view_all(&self, by: &Asker) -> Result<Listing, Error> {
        let mut rows = self.list().await?;
        if let Asker::Client(client) = by {
            rows.retain(|row| row.registration.client.as_ref() == Some(client));
        }
        let (looks, queues, ways) = tokio::join!(self.look(&rows), self.queues(), self.ways(by));
        let view = |(place, row): (usize, &Registered)| {
            let told = queues.as_ref().and_then(|found| found.get(row.name()));
            View::of(row, self.idle_after, looks.get(place).copied().flatten(), told)
        };
        let subscriptions = rows.iter().enumerate().map(view).collect();
        let unregistered = queues.zip(ways).map(|(queues, ways)| queues.unregistered(&ways, &rows));
        Ok(Listing { subscriptions, unregistered })
    }

    fn registrar(&self) -> Result<Registrar, Error> {
        self.registrar.clone().ok_or(Error::NoBroker)
    }

    /// What the queues hold; nothing when the broker does not say.
    async fn look(&self, rows: &[Registered]) -> Vec<Option<Look>> {
        let Some(registrar) = &self.registrar else { return vec![] };
        let names: Vec<&SubscriptionName> = rows.iter().map(Registered::name).collect();
        timeout(LOOK, registrar.desk().look_at_all(&names)).await.ok().and_then(Result::ok).unwrap_or_default()
    }

    async fn queue(&self, name: &SubscriptionName) -> Option<management::Queue> {
        self.management.as_ref()?.queue(name).await
    }

    async fn queues(&self) -> Option<management::Queues> {
        self.management.as_ref()?.queues().await
    }

    /// For an operator alone: a client is not told of queues that are not its own.
    async fn ways(&self, by: &Asker) -> Option<management::Ways> {
        let management = self.management.as_ref().filter(|_| *by == Asker::Operator)?;
        management.ways().await
    }

    /// # Errors
    /// [`Error::Invalid`], with all that is wrong with it in itself.
    pub fn admit(&self, name: SubscriptionName, wish: Wish, by: Asker) -> Result<Admitted, Error> {
        let mut faults = vec![];
        let keys = parsed("routing_keys", "unknown_key", &wish.routing_keys, &mut faults);
        let fields = parsed("fields", "unknown_field", &wish.fields, &mut faults);
        for (place, field) in wish.fields.iter().enumerate() {
            if field.parse().is_ok_and(|field| !self.schema.has(&field)) {
                let unknown = "the profile schema has no such field";
                faults.push(Fault::new(format!("/fields/{place}"), "unknown_field", unknown));
            }
        }
        if wish.routing_keys.is_empty() && wish.fields.is_empty() {
            faults.push(Fault::new("", "nothing_wakes_it", "give at least one routing key or one field"));
        }
        for (member, text) in [("owner", &wish.owner), ("purpose", &wish.purpose)] {
            if !is_a_line(text) {
                let rule = format!("must be 1 to {MAX_TEXT} characters in one line, not only spaces");
                faults.push(Fault::new(format!("/{member}"), "text", rule));
            }
        }
        if wish.expires_after.is_some_and(|after| after.is_zero() || after > LONGEST_EXPIRY) {
            faults.push(Fault::new("/expires_after_s", "range", "must be null, or 1 to 315360000 seconds"));
        }
        let client = match &by {
            Asker::Operator => wish.client,
            Asker::Client(client) if wish.client.as_ref().is_none_or(|named| named == client) => Some(client.clone()),
            Asker::Client(_) => {
                let rule = "only an administrator says that another client stands for a subscription";
                faults.push(Fault::new("/client", "forbidden", rule));
                None
            }
        };
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        let subscription = Subscription { name, keys, fields };
        let Wish { owner, purpose, expires_after, fields, .. } = wish;
        Ok(Admitted { registration: Registration { subscription, owner, purpose, expires_after, client }, fields, by })
    }
}

const MAX_TEXT: usize = 200;
/// Ten years.
const LONGEST_EXPIRY: Duration = Duration::from_secs(315_360_000);

fn is_a_line(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().count() <= MAX_TEXT && !text.chars().any(char::is_control)
}

fn parsed<T: std::str::FromStr + Ord>(
    member: &str,
    code: &str,
    texts: &[String],
    faults: &mut Vec<Fault>,
) -> std::collections::BTreeSet<T>
where
    T::Err: std::fmt::Display,
{
    let mut fault =
        |place, error: T::Err| faults.push(Fault::new(format!("/{member}/{place}"), code, error.to_string()));
    texts
        .iter()
        .enumerate()
        .filter_map(|(place, text)| text.parse().map_err(|error| fault(place, error)).ok())
        .collect()
}

/// Runs a change in a task of its own: a client that hangs up does not leave it half done.
async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    match tokio::spawn(change).await {
        Ok(outcome) => outcome,
        Err(panicked) => Err(Error::Database(Trouble::Broken(panicked.into()))),
    }
}
