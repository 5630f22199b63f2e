//! Broker: how this service reaches RabbitMQ.
//!
//! Promise: a message counts as published only when the broker confirmed it, and what it could not route is told apart.
//! Not here, on purpose: reconnecting. A connection is one session; whoever needs the next one decides when.

mod post;
mod publisher;

pub use post::{Parcel, Post};
pub use publisher::{Outcome, Publisher, Verdict};

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use futures_util::future::BoxFuture;
use lapin::{
    Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::FieldTable,
    uri::{AMQPScheme, AMQPUri},
};
use secrecy::{ExposeSecret, SecretString};
use tidings_sdk::{
    envelope::Event,
    topology::{self, Source},
    trust::Trust,
};
use tokio::{sync::Mutex, time::timeout};

use crate::db::is_loopback;

/// Channels in a row that fail by an earlier one's error before their connection is given up.
const NUMBERS: usize = 8;
/// For the whole of connecting, handshake included: lapin itself would wait for a silent peer for ever.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A peer that says nothing for twice this long is gone.
const HEARTBEAT_S: u16 = 10;
/// For one request of the set-up (declare, bind, confirm.select).
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// For saying goodbye. A broker in a memory alarm does not read, and must not hold up our leaving.
pub const FAREWELL: Duration = Duration::from_secs(2);
/// For the headers of the widest event, which travel in one frame: 256 field names of 64 bytes, and what else is said of it.
const FRAME_BYTES: u32 = 32 * 1024;
/// AMQP 0-9-1 short strings, which names and routing keys are, hold 255 bytes.
const NAME_LIMIT_BYTES: usize = 200;

/// The virtual host that a broker begins with.
pub const DEFAULT_VHOST: &str = "/";

/// How everything is published: what no queue takes comes back.
pub const PUBLISHED: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// CloudEvents source: which owner of master data speaks.
pub fn cloudevents_source(exchange: &str) -> String {
    let name: String =
        exchange.chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '-' }).collect();
    format!("urn:tidings:{name}")
}

/// The address of a broker.
///
/// # Errors
/// When `url` is no AMQP URL. The URL is not repeated: it holds a password.
pub fn parse_url(url: &SecretString) -> anyhow::Result<AMQPUri> {
    let uri = url.expose_secret().parse();
    let mut uri: AMQPUri =
        uri.map_err(|_| anyhow::anyhow!("expected amqp://USER:PASSWORD@HOST/VHOST, or amqps:// for TLS"))?;
    uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
    Ok(uri)
}

/// The name of an exchange that may be ours.
///
/// # Errors
/// When the broker would not take it, or whoever deletes a subscription would delete it too.
pub fn parse_exchange(name: &str) -> anyhow::Result<String> {
    ensure!(
        (1..=NAME_LIMIT_BYTES).contains(&name.len()) && !name.starts_with("amq."),
        "expected a name of 1 to {NAME_LIMIT_BYTES} bytes that does not begin with \"amq.\""
    );
    ensure!(
        !name.ends_with(".fields"),
        "expected a name that does not end in \".fields\": the exchange of a subscription is called so, and goes with it"
    );
    Ok(name.to_owned())
}

/// The words before every routing key.
///
/// # Errors
/// When they would not be words to a topic exchange.
pub fn parse_prefix(prefix: &str) -> anyhow::Result<String> {
    ensure!(
        topology::are_words(prefix) && prefix.len() <= NAME_LIMIT_BYTES,
        "expected words with dots between them, without * and #, at most {NAME_LIMIT_BYTES} bytes"
    );
    Ok(prefix.to_owned())
}

/// Where the broker is, and what we publish to.
#[derive(Clone)]
pub struct Broker {
    uri: AMQPUri,
    trust: Trust,
    exchange: String,
    /// CloudEvents source: which owner of master data speaks.
    source: String,
    prefix: Option<String>,
    /// Where there is a user of its own for all but publishing to the exchange.
    registry: Option<Arc<Registry>>,
    /// Who has none leaves a missing exchange alone.
    note_missing: Option<Note>,
}

/// What is to be done before the exchange is made because there is none.
type Note = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

/// The user who may declare, and a connection of his, dialled when it is first needed.
struct Registry {
    uri: AMQPUri,
    connection: Mutex<Option<Session>>,
}

/// A connection on which the exchange is looked at again and again.
pub struct Session {
    connection: Connection,
    /// Its user was refused once. He need not ask again: each refusal costs the connection the number of a channel, see [`open`].
    may_not_declare: AtomicBool,
}

impl Deref for Session {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Broker {
    pub fn new(uri: AMQPUri, trust: Trust, exchange: String) -> Self {
        let source = cloudevents_source(&exchange);
        Self { uri, trust, exchange, source, prefix: None, registry: None, note_missing: None }
    }

    /// With these words before every routing key.
    #[must_use]
    pub fn with_prefix(self, prefix: Option<String>) -> Self {
        Self { prefix, ..self }
    }

    /// With another user for all but publishing to the exchange.
    #[must_use]
    pub fn with_registry(self, uri: AMQPUri) -> Self {
        Self { registry: Some(Arc::new(Registry { uri, connection: Mutex::new(None) })), ..self }
    }

    /// With something to be done before the exchange is made because there is none: what was bound to an earlier one is bound no more.
    #[must_use]
    pub fn noting_missing(
        self,
        note: impl Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync + 'static,
    ) -> Self {
        Self { note_missing: Some(Arc::new(note)), ..self }
    }

    /// The same broker as the user for all but publishing to the exchange; where there is no such user, as the one there is.
    #[must_use]
    pub fn as_registry(&self) -> Self {
        let uri = self.registry.as_ref().map_or(&self.uri, |registry| &registry.uri);
        Self { uri: uri.clone(), registry: None, ..self.clone() }
    }

    pub fn exchange(&self) -> &str {
        &self.exchange
    }

    /// The routing key of an event: its name, behind the deployment's prefix if there is one.
    pub fn routing_key(&self, event: &Event) -> String {
        self.prefixed(event.name())
    }

    /// A binding key of this contract, behind the deployment's prefix if there is one.
    pub fn prefixed(&self, key: &str) -> String {
        match &self.prefix {
            Some(prefix) => format!("{prefix}.{key}"),
            None => key.to_owned(),
        }
    }

    /// By whose word it is known.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Its namespace at the broker.
    pub fn vhost(&self) -> &str {
        &self.uri.vhost
    }

    /// What subscriptions are bound to.
    pub fn topology(&self) -> Source {
        Source { exchange: self.exchange.clone(), prefix: self.prefix.clone() }
    }

    /// CloudEvents source: which owner of master data speaks.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// A new connection; `purpose` is its name in the broker's lists.
    pub async fn connect(&self, purpose: &str) -> anyhow::Result<Connection> {
        let properties = ConnectionProperties::default().with_connection_name(format!("tidings {purpose}").into());
        let connected = within(CONNECT_DEADLINE, self.trust.connect(&self.uri, properties)).await;
        let connection = connected.context(match self.uri.scheme {
            AMQPScheme::AMQP => "the broker cannot be reached",
            AMQPScheme::AMQPS => "the broker cannot be reached over TLS",
        })?;
        let frame_bytes = connection.configuration().frame_max();
        if frame_bytes < FRAME_BYTES {
            let _ = timeout(FAREWELL, connection.close(200, "bye".into())).await;
            bail!(
                "frames of {frame_bytes} bytes may not hold an event with many fields: frame_max, of the broker and of its URL, has to be \
                 at least {FRAME_BYTES}"
            );
        }
        Ok(connection)
    }

    /// A new connection on which [`Self::channel_with_exchange`] may be asked for.
    pub async fn session(&self, purpose: &str) -> anyhow::Result<Session> {
        Ok(Session { connection: self.connect(purpose).await?, may_not_declare: AtomicBool::new(false) })
    }

    /// Whether what is said travels in the clear, to somewhere else than this machine.
    pub fn is_overheard(&self) -> bool {
        let in_the_clear = |uri: &AMQPUri| uri.scheme == AMQPScheme::AMQP && !is_loopback(&uri.authority.host);
        in_the_clear(&self.uri) || self.registry.as_ref().is_some_and(|registry| in_the_clear(&registry.uri))
    }

    /// A channel, and the exchange is known to be a durable topic exchange.
    ///
    /// # Errors
    /// When the exchange exists with another type, is missing and not to be made by this one, or the broker does not answer.
    pub async fn channel_with_exchange(&self, session: &Session) -> anyhow::Result<Channel> {
        let Some(registry) = &self.registry else { return self.channel_that_declared(session).await };
        self.as_registry().vouch(&registry.connection).await?;
        open(session).await
    }

    /// Who may only write could not tell an exchange of another type: a passive declaration does not compare.
    async fn vouch(&self, kept: &Mutex<Option<Session>>) -> anyhow::Result<()> {
        let mut kept = kept.lock().await;
        let session = match kept.take().filter(|session| session.status().connected()) {
            Some(session) => session,
            None => self.session("set-up").await.context("as the user of AMQP_REGISTRY_URL")?,
        };
        let channel = self.channel_that_declared(&session).await?;
        request(channel.close(200, "bye".into())).await?;
        // After an error the connection goes with it: the next one begins anew.
        *kept = Some(session);
        Ok(())
    }

    async fn channel_that_declared(&self, session: &Session) -> anyhow::Result<Channel> {
        let mut channel = open(session).await?;
        let there = request(self.declare_exchange(&channel, true)).await;
        let is_missing = there.as_ref().is_err_and(is_missing);
        if is_missing {
            let Some(note) = &self.note_missing else {
                bail!("exchange {:?} is missing; `tidings serve` and `tidings relay` make it", self.exchange)
            };
            note().await.with_context(|| format!("exchange {:?} is missing, and not made anew", self.exchange))?;
            channel = open(session).await?;
        } else {
            there.with_context(|| format!("exchange {:?} cannot be used", self.exchange))?;
        }
        if !is_missing && session.may_not_declare.load(Ordering::Relaxed) {
            return Ok(channel);
        }
        let name = &self.exchange;
        match request(self.declare_exchange(&channel, false)).await {
            Ok(()) => Ok(channel),
            Err(refused) if is(&refused, AMQPSoftError::ACCESSREFUSED) && is_missing => {
                Err(refused).with_context(|| format!("exchange {name:?} is missing and may not be declared"))
            }
            // Least privilege: who may only write cannot declare. Then it is enough that the exchange is there.
            Err(refused) if is(&refused, AMQPSoftError::ACCESSREFUSED) => {
                session.may_not_declare.store(true, Ordering::Relaxed);
                open(session).await
            }
            Err(error) => Err(error).with_context(|| format!("exchange {name:?} cannot be used")),
        }
    }

    /// Ends the connection of the user who may declare.
    pub async fn hang_up(&self) {
        let Some(registry) = &self.registry else { return };
        let closed = async {
            if let Some(connection) = registry.connection.lock().await.take() {
                drop(connection.close(200, "bye".into()).await);
            }
        };
        let _ = timeout(FAREWELL, closed).await;
    }

    async fn declare_exchange(&self, channel: &Channel, passive: bool) -> lapin::Result<()> {
        let options = ExchangeDeclareOptions { durable: true, passive, ..Default::default() };
        channel
            .exchange_declare(self.exchange.as_str().into(), ExchangeKind::Topic, options, FieldTable::default())
            .await
    }
}

/// A channel of this connection.
///
/// lapin (4.12) remembers the error that closed a channel, and fails a later one of the same number with it; numbers come round after
/// 2,047. No broker has such an error for a channel that is only being opened, so the next number is tried.
///
/// # Errors
/// When the broker does not answer, or too many channels of this connection were closed by errors: then it is used up, and ended, so that
/// nobody else goes on with it.
pub async fn open(connection: &Connection) -> anyhow::Result<Channel> {
    for _ in 0..NUMBERS {
        match request(connection.create_channel()).await {
            Err(error) if is_refusal(&error) => {}
            // Those that failed so are never given back.
            Err(error) if is_limit(&error) => break,
            outcome => return outcome,
        }
    }
    let _ = timeout(FAREWELL, connection.close(200, "used up".into())).await;
    bail!("too many channels of the connection were closed by errors")
}

/// Puts a channel in confirm mode.
async fn confirm_select(channel: &Channel) -> anyhow::Result<()> {
    request(channel.confirm_select(ConfirmSelectOptions::default())).await.context("confirms cannot be switched on")?;
    // Without confirm mode every publish would look confirmed at once.
    ensure!(channel.status().confirm(), "the broker did not switch confirms on");
    Ok(())
}

fn is(error: &anyhow::Error, expected: AMQPSoftError) -> bool {
    let kind = error.downcast_ref::<lapin::Error>().map(lapin::Error::kind);
    matches!(kind, Some(lapin::ErrorKind::ProtocolError(error)) if *error.kind() == AMQPErrorKind::Soft(expected))
}

/// Whether the broker answered that it will not, as opposed to not answering.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<lapin::Error>().map(lapin::Error::kind);
    matches!(kind, Some(lapin::ErrorKind::ProtocolError(error)) if matches!(error.kind(), AMQPErrorKind::Soft(_)))
}

/// Whether the connection has no number left for another channel.
fn is_limit(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<lapin::Error>().map(lapin::Error::kind);
    matches!(kind, Some(lapin::ErrorKind::ChannelsLimitReached))
}

/// Whether the broker said that there is no such queue or exchange.
pub fn is_missing(error: &anyhow::Error) -> bool {
    is(error, AMQPSoftError::NOTFOUND)
}

/// A request of the set-up, within its deadline.
pub async fn request<T>(request: impl Future<Output = lapin::Result<T>>) -> anyhow::Result<T> {
    within(REQUEST_DEADLINE, request).await
}

async fn within<T>(deadline: Duration, request: impl Future<Output = lapin::Result<T>>) -> anyhow::Result<T> {
    Ok(timeout(deadline, request).await.map_err(|_| anyhow::anyhow!("no answer within {deadline:?}"))??)
}

#[cfg(test)]
mod tests {
    use lapin::protocol::basic::gen_properties;
    use tidings_sdk::envelope::{FieldName, Notice};
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn names_are_checked_before_the_broker_sees_them() {
        for exchange in ["", "amq.topic", "people.fields", &"x".repeat(201)] {
            assert!(parse_exchange(exchange).is_err(), "{exchange}");
        }
        for prefix in ["", ".", "a..b", "a.*", "#"] {
            assert!(parse_prefix(prefix).is_err(), "{prefix}");
        }
        let uri = parse_url(&"amqp://localhost".into()).unwrap();
        let broker = Broker::new(uri, Trust::default(), parse_exchange("master data").unwrap())
            .with_prefix(Some(parse_prefix("eu.prod").unwrap()));
        assert_eq!(broker.routing_key(&Event::Deleted), "eu.prod.user.deleted");
        assert_eq!(broker.source(), "urn:tidings:master-data");
    }

    #[test]
    fn who_may_listen_is_told_by_the_address() {
        let is_overheard = |url: &str| {
            Broker::new(parse_url(&url.into()).unwrap(), Trust::default(), "masterdata".into()).is_overheard()
        };
        assert!(
            !is_overheard("amqp://localhost") && !is_overheard("amqp://[::1]:1/%2f") && !is_overheard("amqps://broker")
        );
        assert!(is_overheard("amqp://broker") && is_overheard("amqp://10.0.0.1"));
    }

    #[test]
    fn a_frame_holds_the_headers_of_the_widest_event() {
        let name = |n: u32| format!("{}{n:03}", "x".repeat(FieldName::MAX_BYTES - 3)).parse().unwrap();
        let widest = Notice {
            message_id: Uuid::nil(),
            user_id: Uuid::nil(),
            version: i64::MAX,
            event: Event::Updated { changed_fields: (0..256).map(name).collect() },
            occurred_at: OffsetDateTime::UNIX_EPOCH,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
        };
        let (properties, _) = widest.to_message(&cloudevents_source(&"x".repeat(NAME_LIMIT_BYTES)));
        let bytes = gen_properties(&properties)(Vec::new().into()).unwrap().position;
        assert!((16 * 1024..u64::from(FRAME_BYTES) / 4 * 3).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_virtual_host_is_known_by_its_name_and_not_as_the_url_writes_it() {
        for (url, vhost) in [
            ("amqp://ana:s3cret@host", DEFAULT_VHOST),
            ("amqp://host/%2f", "/"),
            ("amqps://host/tidings?heartbeat=5", "tidings"),
            ("amqp://host/user%20data", "user data"),
        ] {
            let uri = parse_url(&url.into()).unwrap();
            assert_eq!(Broker::new(uri, Trust::default(), "masterdata".into()).vhost(), vhost, "{url}");
        }
    }

    #[test]
    fn a_wrong_url_is_not_repeated() {
        let error = parse_url(&"http://ana:s3cret@host".into()).unwrap_err();
        assert!(!format!("{error:#}").contains("s3cret"), "{error:#}");
    }
}
