//! The House: a running service with its own database and exchange, and a listener who hears everything.
//!
//! The service is the real binary in a process of its own, so that a test can kill it, freeze it and read its log. It reaches
//! Postgres and RabbitMQ through faulty proxies; the House itself reaches them directly.

use std::{
    fmt::Debug,
    io::PipeWriter,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use reqwest::{
    Client, Method, RequestBuilder, StatusCode,
    header::{AUTHORIZATION, HeaderMap},
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::clients::{self, Key, NewClient, Scope};
use tidings_sdk::{
    envelope::{FieldName, Notice},
    owner::Owner,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    time::{sleep, timeout},
};
use url::Url;
use uuid::Uuid;

use crate::{contract, proxy::Proxy, rights};

/// How long a test waits for what has to come, while nothing moves.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// Until a message that was acknowledged is written to the broker.
const ACKNOWLEDGED: Duration = Duration::from_secs(5);
/// Messages that a listener is sent ahead: behind a whole backlog its acknowledgements would be late, and one who is given up for that is
/// listened beside, out of order.
const PREFETCH: u16 = 500;
/// However much moves meanwhile.
const END_OF_PATIENCE: Duration = Duration::from_secs(240);

pub fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the tests with ./dev test"))
}

/// Waits for `look` to give something; fails with the last thing it saw instead. What comes nearer on a slow machine is waited for.
pub async fn eventually<T, Seen: Debug>(what: &str, mut look: impl AsyncFnMut() -> Result<T, Seen>) -> T {
    let began = Instant::now();
    let (mut moved, mut last) = (began, String::new());
    loop {
        let seen = match timeout(PATIENCE, look()).await {
            Ok(Ok(found)) => return found,
            Ok(Err(seen)) => format!("{seen:?}"),
            Err(_) => panic!("a look for {what} has no end, last saw {last}"),
        };
        if seen != last {
            (moved, last) = (Instant::now(), seen);
        }
        assert!(
            moved.elapsed() < PATIENCE && began.elapsed() < END_OF_PATIENCE,
            "waited {:?} for {what}, last saw {last}",
            began.elapsed()
        );
        // A pause between two looks, not a wait for time to pass: the condition decides.
        sleep(Duration::from_millis(10)).await;
    }
}

/// A URL with its host and port replaced by those of a proxy.
pub fn through(url: &str, proxy: &Proxy) -> String {
    let (head, rest) = url.split_once("://").unwrap();
    let (authority, path) = rest.split_once('/').unwrap();
    let user = authority.rsplit_once('@').map(|(user, _)| format!("{user}@")).unwrap_or_default();
    format!("{head}://{user}{}/{path}", proxy.address())
}

pub async fn proxy_before(url: &str) -> Proxy {
    let authority = url.split_once("://").unwrap().1.split('/').next().unwrap();
    let host = authority.rsplit('@').next().unwrap();
    Proxy::before(tokio::net::lookup_host(host).await.unwrap().next().unwrap()).await
}

/// The address of a test's own database.
pub fn database_url(db: &PgPool) -> String {
    let (options, mut url) = (db.connect_options(), Url::parse(&env("DATABASE_URL")).unwrap());
    url.set_host(Some(options.get_host())).unwrap();
    url.set_port(Some(options.get_port())).unwrap();
    url.set_path(options.get_database().unwrap());
    url.into()
}

pub struct House {
    pub db: PgPool,
    pub exchange: String,
    pub service: Service,
    pub postgres: Proxy,
    pub broker: Proxy,
    pub audit: Audit,
    settings: Vec<(String, String)>,
    http: Client,
}

/// The key of all tests, which may do everything.
pub fn key() -> &'static str {
    ADMIN.1.as_str()
}

static ADMIN: LazyLock<(Key, String)> = LazyLock::new(|| {
    let (key, text) = Key::generate().unwrap();
    (key, text.expose_secret().to_owned())
});

/// A client that asks with this key.
pub fn http_with(key: &str) -> Client {
    let headers = HeaderMap::from_iter([(AUTHORIZATION, format!("Bearer {key}").parse().unwrap())]);
    Client::builder().timeout(PATIENCE).default_headers(headers).build().unwrap()
}

/// A client that may do everything.
pub fn http() -> Client {
    http_with(key())
}

/// The owner there, asked with the key of all tests.
pub fn owner_at(url: &str) -> Owner {
    Owner::at(url).unwrap().with_key(key()).unwrap()
}

/// Lets the key of all tests in.
pub async fn admit_key(db: &PgPool) {
    let admin = NewClient::named("tests", [Scope::Admin]).unwrap();
    if clients::create(db, &admin).await.unwrap() {
        assert!(clients::issue(db, &admin.name, &ADMIN.0, None).await.unwrap());
    }
}

/// Another client; its key.
pub async fn new_client(db: &PgPool, client: NewClient) -> String {
    assert!(clients::create(db, &client).await.unwrap());
    let (key, text) = Key::generate().unwrap();
    assert!(clients::issue(db, &client.name, &key, None).await.unwrap());
    text.expose_secret().to_owned()
}

impl House {
    pub async fn open(db: PgPool) -> Self {
        Self::with(db, &[]).await
    }

    /// A House whose service has these settings on top.
    pub async fn with(db: PgPool, extra: &[(&str, &str)]) -> Self {
        Self::at(db, &env("AMQP_URL"), extra).await
    }

    /// A House at another broker than that of all tests, which has the users that its service needs.
    pub async fn at(db: PgPool, amqp_url: &str, extra: &[(&str, &str)]) -> Self {
        rights::grant(&db).await;
        admit_key(&db).await;
        Self::of_build(this_build(), db, amqp_url, extra).await
    }

    /// A House whose service is this build of the binary, on a database that has been made ready for it.
    pub async fn of_build(binary: &Path, db: PgPool, amqp_url: &str, extra: &[(&str, &str)]) -> Self {
        let exchange = format!("test.{}", Uuid::new_v4().simple());
        let audit = Audit::at(amqp_url, &exchange).await;
        let database_url = database_url(&db);
        let (postgres, broker) = (proxy_before(&database_url).await, proxy_before(amqp_url).await);
        let mut settings: Vec<(String, String)> = [
            ("DATABASE_URL", rights::as_serve(&through(&database_url, &postgres)).as_str()),
            ("TIDINGS_NO_MIGRATE", "true"),
            ("TIDINGS_EXCHANGE", &exchange),
            ("TIDINGS_LISTEN", "127.0.0.1:0"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let at_broker = rights::at_broker(&through(amqp_url, &broker));
        settings.extend(at_broker.map(|(name, value)| (name.to_owned(), value)));
        settings.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        if amqp_url == env("AMQP_URL") {
            rights::make_users().await;
        }
        let service = Service::started(program(binary, &["serve"], &settings)).await;
        let http = http();
        Self { db, exchange, service, postgres, broker, audit, settings, http }
    }

    /// Another process of the same deployment, such as `&["relay"]`.
    pub async fn another(&self, command: &[&str]) -> Service {
        Service::start(command, &self.settings).await
    }

    /// Another process of the same deployment that is not waited for: it may not come up.
    pub fn settings(&self) -> &[(String, String)] {
        &self.settings
    }

    /// A new process in place of the one that is gone.
    pub async fn restart(&mut self) {
        self.start_build(this_build()).await;
    }

    /// The same of another build.
    pub async fn start_build(&mut self, binary: &Path) {
        self.service = Service::started(program(binary, &["serve"], &self.settings)).await;
    }

    /// What the owner of the tables does before a new version serves, or after a restore.
    pub async fn migrate(&self) {
        let migrated = tidings(&["migrate"], &self.settings).output().await.unwrap();
        assert!(migrated.status.success(), "{migrated:?}");
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.service.url))
    }

    /// Request line and headers, with the key of all tests, for who speaks HTTP by hand, such as `POST /v1/users`; these headers on top, each with its line end.
    pub fn head(&self, method_and_path: &str, headers: &str) -> String {
        format!("{method_and_path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n{headers}\r\n", key())
    }

    pub async fn create(&self, profile: Value) -> Answer {
        Answer::to(self.request(Method::POST, "/v1/users").json(&json!({ "profile": profile }))).await
    }

    /// A new user; the id.
    pub async fn user(&self, profile: Value) -> Uuid {
        let created = self.create(profile).await;
        assert_eq!(created.status, 201, "{created:?}");
        created.body["id"].as_str().unwrap().parse().unwrap()
    }

    pub fn patch(&self, user: &Uuid, patch: Value) -> RequestBuilder {
        self.request(Method::PATCH, &format!("/v1/users/{user}"))
            .header("content-type", "application/merge-patch+json")
            .body(json!({ "profile": patch }).to_string())
    }

    pub async fn amend(&self, user: &Uuid, patch: Value) -> Answer {
        Answer::to(self.patch(user, patch)).await
    }

    pub async fn put(&self, user: &Uuid, profile: Value) -> Answer {
        Answer::to(self.request(Method::PUT, &format!("/v1/users/{user}")).json(&json!({ "profile": profile }))).await
    }

    pub async fn get(&self, user: &Uuid) -> Answer {
        Answer::to(self.request(Method::GET, &format!("/v1/users/{user}"))).await
    }

    pub async fn delete(&self, user: &Uuid) -> Answer {
        Answer::to(self.request(Method::DELETE, &format!("/v1/users/{user}"))).await
    }

    pub async fn page(&self, path: &str) -> Answer {
        Answer::to(self.request(Method::GET, path)).await
    }

    /// A sample of `/metrics`, by its name with labels, such as `tidings_outbox_pending`.
    pub async fn metric(&self, sample: &str) -> f64 {
        self.metric_by(&self.http, sample).await
    }

    /// The same over a connection of another client.
    pub async fn metric_by(&self, client: &Client, sample: &str) -> f64 {
        let page = client.get(format!("{}/metrics", self.service.url));
        let text = page.send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {sample} in {text}")).parse().unwrap()
    }

    /// Waits until a line of the log has all these words: it is on its way for a moment after what it tells of.
    pub async fn logs(&self, words: &[&str]) {
        eventually("a line in the log", async || {
            let log = self.service.log();
            if log.lines().any(|line| words.iter().all(|word| line.contains(word))) { Ok(()) } else { Err(log) }
        })
        .await;
    }

    /// All that was logged up to now, by a service that logs each answer (`tidings::web=debug`).
    pub async fn log_so_far(&self) -> String {
        let mark = Uuid::new_v4().to_string();
        Answer::to(self.request(Method::GET, "/healthz").header("x-request-id", &mark)).await;
        self.logs(&[&mark]).await;
        self.service.log()
    }

    /// Rows in the outbox.
    pub async fn pending(&self) -> i64 {
        sqlx::query_scalar("select count(*) from outbox").fetch_one(&self.db).await.unwrap()
    }

    /// Waits until everything that is committed is confirmed, and everything that is confirmed was heard.
    pub async fn settle(&self) {
        eventually("an empty outbox", async || match self.pending().await {
            0 => Ok(()),
            rows => Err(rows),
        })
        .await;
        self.audit.catch_up().await;
    }

    /// Waits until the feed shows everything that is committed by now. A transaction that is open anywhere in the cluster, in the
    /// database of another test, say, holds it back.
    pub async fn feed_is_clear(&self) {
        let now: String = sqlx::query_scalar("select pg_current_xact_id()::text").fetch_one(&self.db).await.unwrap();
        let oldest = "select pg_snapshot_xmin(pg_current_snapshot())::text,
                             pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8";
        eventually("every transaction of before to end", async || {
            let (oldest, is_later): (String, bool) =
                sqlx::query_as(oldest).bind(&now).fetch_one(&self.db).await.unwrap();
            if is_later { Ok(()) } else { Err(oldest) }
        })
        .await;
    }

    /// What the listener heard of a user once all is settled, such as `profile.updated[job_title,company]`.
    pub async fn told(&self, user: &Uuid) -> Vec<String> {
        self.settle().await;
        self.audit.heard().iter().filter(|notice| notice.user_id == *user).map(describe).collect()
    }
}

pub fn describe(notice: &Notice) -> String {
    let fields: Vec<&str> = notice.event.changed_fields().iter().map(FieldName::as_str).collect();
    let name = notice.event.name();
    if fields.is_empty() { name.to_owned() } else { format!("{name}[{}]", fields.join(",")) }
}

/// An answer of the service.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub etag: Option<String>,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
    /// Null where the text is no JSON.
    pub body: Value,
}

impl Answer {
    /// The answer to a request; it must be one that the OpenAPI document promises.
    pub async fn to(request: RequestBuilder) -> Self {
        let (http, request) = request.build_split();
        let request = request.unwrap();
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let answer = Self::of(http.execute(request).await.unwrap()).await;
        if let Err(lie) = contract::check(&method, &path, &answer) {
            panic!("{method} {path}: {lie}: {answer:?}");
        }
        answer
    }

    pub async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let etag = headers.get("etag").map(|etag| etag.to_str().unwrap().to_owned());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Self { status, etag, headers, text, body }
    }

    /// The answer, which must be a success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.is_success(), "{self:?}");
        self
    }

    /// The stable code of a refusal, which must be a well-formed problem+json with this status.
    #[track_caller]
    pub fn refusal(&self, status: u16) -> &str {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.headers["content-type"], "application/problem+json", "{self:?}");
        assert_eq!(self.body["status"], status, "{self:?}");
        assert_eq!(self.body["request_id"].as_str().unwrap(), self.headers["x-request-id"], "{self:?}");
        self.body["code"].as_str().unwrap()
    }

    pub fn version(&self) -> i64 {
        self.body["version"].as_i64().unwrap()
    }
}

/// A process of the real binary.
pub struct Service {
    child: Child,
    pub url: String,
    log: Arc<Mutex<String>>,
}

pub fn this_build() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tidings"))
}

/// A command of the binary with a clean environment and these settings.
pub fn tidings(command: &[&str], settings: &[(String, String)]) -> Command {
    program(this_build(), command, settings)
}

/// The same of any build of it.
pub fn program(binary: &Path, command: &[&str], settings: &[(String, String)]) -> Command {
    let mut tidings = Command::new(binary);
    let is_ours =
        |name: &str| name.starts_with("TIDINGS_") || name.starts_with("DATABASE_") || name.starts_with("AMQP_");
    for (name, _) in std::env::vars().filter(|(name, _)| is_ours(name)) {
        tidings.env_remove(name);
    }
    let as_its_role = |name: &str, value: &str| match name {
        "DATABASE_URL" => rights::as_command(value, command),
        _ => value.to_owned(),
    };
    tidings.args(command).envs(settings.iter().map(|(name, value)| (name, as_its_role(name, value))));
    tidings.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    tidings
}

impl Service {
    /// Starts a process that serves HTTP, and waits for its ready line.
    pub async fn start(command: &[&str], settings: &[(String, String)]) -> Self {
        Self::started(tidings(command, settings)).await
    }

    /// The same, and its log goes into this pipe.
    pub async fn logging_to(log: PipeWriter, command: &[&str], settings: &[(String, String)]) -> Self {
        let mut tidings = tidings(command, settings);
        tidings.stderr(log);
        Self::started(tidings).await
    }

    async fn started(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let log = Arc::<Mutex<String>>::default();
        if let Some(stderr) = child.stderr.take() {
            collect(stderr, log.clone());
        }
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = timeout(PATIENCE, lines.next_line()).await.ok().and_then(Result::unwrap);
        let ready = ready.unwrap_or_else(|| panic!("no ready line; the log: {}", log.lock().unwrap()));
        let url = ready.strip_prefix("tidings ready on ").unwrap_or_else(|| panic!("{ready}")).to_owned();
        Self { child, url, log }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    pub async fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    /// How many files and connections it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id().unwrap())).unwrap().count()
    }

    /// The exit code, once it has left.
    pub async fn left(&mut self) -> Option<i32> {
        timeout(PATIENCE, self.child.wait()).await.expect("it does not leave").unwrap().code()
    }
}

pub fn collect(from: impl AsyncRead + Unpin + Send + 'static, into: Arc<Mutex<String>>) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut log = into.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
}

/// A listener with a durable queue bound `#`, who comes back when the broker does.
pub struct Audit {
    pub amqp_url: String,
    pub queue: String,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    notices: Vec<Notice>,
    /// Everything of each message as it came, for those who look for what should not be there.
    raw: Vec<String>,
    marks: Vec<String>,
    /// What the AsyncAPI document does not promise.
    lies: Vec<String>,
}

impl Audit {
    async fn at(amqp_url: &str, exchange: &str) -> Self {
        let queue = format!("{exchange}.audit");
        let connection = connect(amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        declare(&channel, exchange).await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), AMQPValue::LongInt(600_000));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), durable, arguments).await.unwrap();
        bind(&channel, &queue, exchange, "#").await;
        let heard = Arc::<Mutex<Heard>>::default();
        tokio::spawn(listen(amqp_url.to_owned(), queue.clone(), heard.clone()));
        Self { amqp_url: amqp_url.to_owned(), queue, heard }
    }

    pub fn heard(&self) -> Vec<Notice> {
        self.heard.lock().unwrap().notices.clone()
    }

    fn lies(&self) -> Vec<String> {
        self.heard.lock().unwrap().lies.clone()
    }

    /// Lets pass what a test told for the service, in its name and not as it would.
    pub async fn forgive(&self) {
        eventually("what is not told so", async || if self.lies().is_empty() { Err(()) } else { Ok(()) }).await;
        self.heard.lock().unwrap().lies.clear();
    }

    /// Properties and bodies as they came.
    pub fn raw(&self) -> Vec<String> {
        self.heard.lock().unwrap().raw.clone()
    }

    /// Waits until everything that is in the queue now was heard: a mark put at its end has arrived.
    pub async fn catch_up(&self) {
        let mark = Uuid::new_v4().to_string();
        eventually("the broker to take a mark", async || {
            self.send_mark(&mark).await.map_err(|error| error.to_string())
        })
        .await;
        eventually("the listener to catch up", async || {
            let heard = self.heard.lock().unwrap();
            if heard.marks.contains(&mark) { Ok(()) } else { Err(heard.notices.len()) }
        })
        .await;
        assert_eq!(self.lies(), Vec::<String>::new(), "messages that the AsyncAPI document does not promise");
    }

    async fn send_mark(&self, mark: &str) -> lapin::Result<()> {
        let connection = connect(&self.amqp_url).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let properties = BasicProperties::default().with_type("mark".into()).with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        channel
            .basic_publish("".into(), self.queue.as_str().into(), options, mark.as_bytes(), properties)
            .await?
            .await?;
        connection.close(200, "".into()).await
    }
}

pub async fn connect(amqp_url: &str) -> lapin::Result<Connection> {
    Connection::connect(amqp_url, ConnectionProperties::default()).await
}

/// The exchange as the service declares it.
pub async fn declare(channel: &Channel, exchange: &str) {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
}

pub async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) {
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await.unwrap();
}

impl Drop for Audit {
    fn drop(&mut self) {
        // A test that fails already says why.
        if !std::thread::panicking() {
            assert_eq!(self.lies(), Vec::<String>::new(), "messages that the AsyncAPI document does not promise");
        }
    }
}

/// For as long as the test runs, whatever becomes of the broker.
async fn listen(amqp_url: String, queue: String, heard: Arc<Mutex<Heard>>) {
    loop {
        drop(listen_once(&amqp_url, &queue, &heard).await);
        sleep(Duration::from_millis(100)).await;
    }
}

async fn listen_once(amqp_url: &str, queue: &str, heard: &Mutex<Heard>) -> lapin::Result<()> {
    let connection = connect(amqp_url).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut news = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    while let Some(delivery) = news.next().await {
        let delivery = delivery?;
        {
            let mut heard = heard.lock().unwrap();
            if delivery.properties.kind().as_ref().is_some_and(|kind| kind.as_str() == "mark") {
                heard.marks.push(String::from_utf8(delivery.data.clone()).unwrap());
            } else {
                heard.raw.push(format!("{:?} {}", delivery.properties, String::from_utf8_lossy(&delivery.data)));
                heard.lies.extend(contract::check_message(&delivery.properties, &delivery.data).err());
                heard.notices.push(Notice::from_message(&delivery.properties, &delivery.data).unwrap());
            }
        }
        // lapin (4.12) may never answer an acknowledgement that was asked for while the connection broke.
        let Ok(acknowledged) = timeout(ACKNOWLEDGED, delivery.ack(BasicAckOptions::default())).await else { break };
        acknowledged?;
    }
    Ok(())
}

/// A file with this text; the path. It goes with the build's own folder.
pub fn file(text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(Uuid::new_v4().to_string());
    std::fs::write(&path, text).unwrap();
    path
}
