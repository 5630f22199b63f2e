//! Consumers in other languages: the contract is the protocol, and no library of ours is needed to keep up.
//!
//! Each program of `examples/consumers` goes through the same stories. It reaches the broker and the service through faulty proxies.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, LazyLock, Mutex},
};

use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::{
    envelope::{Event, Notice},
    subscription::{Subscription, SubscriptionName},
    topology::{self, Source},
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::spawn_blocking,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    certificates::{Authority, terminate},
    clients::{client, revoke},
    house::{self, House, PATIENCE, collect, env, eventually, file, proxy_before, through},
    load::users,
    proxy::Proxy,
    rights::{as_user, make_user, unmake},
    tls::TlsBroker,
};

/// How many users a program asks for at once.
const PAGE: usize = 500;

#[derive(Debug, Clone, Copy)]
enum Language {
    Ruby,
    Python,
    Node,
    Go,
    Java,
    Php,
}

impl Language {
    /// The program, without its arguments.
    fn program(self) -> Command {
        let example = |path: &str| format!("{}/examples/consumers/{path}", env!("CARGO_MANIFEST_DIR"));
        let mut program = match self {
            Self::Ruby => Command::new(tool("TIDINGS_TEST_RUBY", "ruby")),
            Self::Python => Command::new(tool("TIDINGS_TEST_PYTHON", "python3")),
            Self::Node => Command::new(tool("TIDINGS_TEST_NODE", "node")),
            Self::Go => return Command::new(&*GO),
            Self::Java => Command::new("java"),
            Self::Php => Command::new("php"),
        };
        match self {
            Self::Ruby => program.arg(example("ruby/consumer.rb")),
            Self::Python => program.arg(example("python/consumer.py")),
            Self::Node => program.arg(example("node/consumer.mjs")),
            Self::Php => program.arg(example("php/consumer.php")),
            // It lives for seconds: optimising it would cost more than it gains.
            Self::Java => program.args(["-XX:TieredStopAtLevel=1", "Consumer"]).env("CLASSPATH", JAVA.as_str()),
            Self::Go => unreachable!("it is its own program"),
        };
        program
    }
}

/// What makes a runtime trust this authority, at the broker and at the owner: its own way, as the programs have no setting for it.
fn trusting(language: Language, authority: &Authority) -> Vec<(String, String)> {
    let folder = authority.file.with_extension("trusted");
    fs::create_dir_all(&folder).unwrap();
    let (file, folder) = (authority.trusted(), folder.display());
    let (name, value) = match language {
        Language::Ruby | Language::Python | Language::Go => ("SSL_CERT_FILE", file.to_owned()),
        Language::Node => ("NODE_EXTRA_CA_CERTS", file.to_owned()),
        Language::Java => {
            let store = format!("{folder}/store");
            let mut keytool = std::process::Command::new("keytool");
            keytool.args(["-importcert", "-noprompt", "-storepass", "changeit", "-keystore", &store, "-file", file]);
            built(&mut keytool);
            let password = "-Djavax.net.ssl.trustStorePassword=changeit";
            ("JAVA_TOOL_OPTIONS", format!("-Djavax.net.ssl.trustStore={store} {password}"))
        }
        Language::Php => {
            let settings = format!("openssl.cafile={file}\ncurl.cainfo={file}\n");
            fs::write(format!("{folder}/trusted.ini"), settings).unwrap();
            ("PHP_INI_SCAN_DIR", format!(":{folder}"))
        }
    };
    vec![(name.to_owned(), value)]
}

fn tool(variable: &str, otherwise: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| otherwise.to_owned())
}

/// The program in Go, built once, from Debian's copy of the library.
static GO: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("consumer-in-go");
    let mut go = std::process::Command::new("go");
    go.args(["build", "-o"]).arg(&program).arg(".").current_dir(example_folder("go"));
    built(go.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode"));
    program
});

/// The class path of the program in Java, compiled once.
static JAVA: LazyLock<String> = LazyLock::new(|| {
    let classes = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("consumer-in-java");
    let jars =
        ["amqp-client", "gson", "slf4j-api", "slf4j-nop"].map(|jar| format!("/usr/share/java/{jar}.jar")).join(":");
    let mut javac = std::process::Command::new("javac");
    javac.args(["-cp", &jars, "-d"]).arg(&classes).arg("Consumer.java").current_dir(example_folder("java"));
    built(&mut javac);
    format!("{}:{jars}", classes.display())
});

fn example_folder(language: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/consumers").join(language)
}

fn built(compiler: &mut std::process::Command) {
    let output = compiler.output().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(output.status.success(), "{compiler:?}: {}", String::from_utf8_lossy(&output.stderr));
}

struct Consumer {
    language: Language,
    name: SubscriptionName,
    broker: Proxy,
    owner: Proxy,
    connection: Connection,
    channel: Channel,
    settings: Vec<(String, String)>,
    lines: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
    process: Child,
}

impl Consumer {
    /// A consumer of everything in this House, which listens already.
    async fn start(house: &House, language: Language) -> Self {
        let name: SubscriptionName = format!("{}.consumer", house.exchange).parse().unwrap();
        let (broker, owner) =
            (proxy_before(&env("AMQP_URL")).await, proxy_before(&format!("{}/", house.service.url)).await);
        let connection = house::connect(&env("AMQP_URL")).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let settings = [
            ("AMQP_URL", through(&env("AMQP_URL"), &broker)),
            ("TIDINGS_API_KEY", house::key().to_owned()),
            ("TIDINGS_URL", format!("http://{}", owner.address())),
            ("TIDINGS_EXCHANGE", house.exchange.clone()),
            ("TIDINGS_QUEUE", name.to_string()),
            ("TIDINGS_PATIENCE_S", "0".to_owned()),
            // A story that unbinds a queue does not want it bound anew. More than a timer of 31 bits can hold.
            ("TIDINGS_CHECK_S", "99999999".to_owned()),
        ];
        let settings: Vec<_> = settings.map(|(name, value)| (name.to_owned(), value)).into();
        let (process, lines, log) = spawn(language, &settings);
        let consumer = Self { language, name, broker, owner, connection, channel, settings, lines, log, process };
        consumer.listens().await;
        consumer
    }

    /// A new process in place of this one, which has left or is killed now, with these settings on top.
    async fn restart(&mut self, settings: &[(&str, &str)]) {
        self.process.kill().await.unwrap();
        let mut all = self.settings.clone();
        all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        (self.process, self.lines, self.log) = spawn(self.language, &all);
    }

    /// A new process, which can print nothing: its stdout is a full disk.
    async fn restart_on_a_full_disk(&mut self) {
        self.process.kill().await.unwrap();
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        (self.process, self.log) = spawn_to(full.into(), self.language, &self.settings);
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it says so on stderr.
    async fn complains(&self, of: &str) {
        eventually(of, async || if self.log().contains(of) { Ok(()) } else { Err(self.log()) }).await;
    }

    fn resyncs(&self) -> usize {
        self.log().matches("news may have been missed: resync").count()
    }

    /// Waits until it has begun as many.
    async fn resyncs_anew(&self, count: usize) {
        eventually("another resync", async || if self.resyncs() >= count { Ok(()) } else { Err(self.log()) }).await;
    }

    /// Deletes its queue under it.
    async fn lose_queue(&self) {
        self.channel.queue_delete(self.name.queue().into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// Deletes the owner's exchange, and with it every binding to it. Nobody is told.
    async fn lose_exchange(&self, house: &House) {
        let exchange = house.exchange.as_str().into();
        self.channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await.unwrap();
    }

    /// Publishes an old notice of this user through the exchange until a queue is bound to take it.
    async fn is_bound_for(&self, house: &House, user: Uuid) {
        let channel = self.connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let (event, occurred_at) = (Event::Created, OffsetDateTime::now_utc());
        let told =
            Notice { message_id: Uuid::new_v4(), user_id: user, version: 1, event, occurred_at, traceparent: None };
        let (properties, body) = told.to_message("urn:test");
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        eventually("a binding", async || {
            let (exchange, key) = (house.exchange.as_str().into(), "user.created".into());
            let sent = channel.basic_publish(exchange, key, options, &body, properties.clone()).await.unwrap();
            match sent.await.unwrap() {
                Confirmation::Ack(None) => Ok(()),
                _ => Err(self.log()),
            }
        })
        .await;
    }

    /// Waits until somebody consumes from its queue.
    async fn listens(&self) {
        eventually("the consumer to listen", async || {
            // The broker's "there is no such queue" ends the channel, and may be what the next one's opening hears.
            let depth = match self.connection.create_channel().await {
                Ok(channel) => topology::depth(&channel, self.name.queue()).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match depth {
                Ok(depth) if depth.consumers == 1 => Ok(()),
                other => Err((other, self.log())),
            }
        })
        .await;
    }

    /// The next line that it printed; `None` when it has left.
    async fn line(&mut self) -> Option<Value> {
        let line =
            timeout(PATIENCE, self.lines.next_line()).await.unwrap_or_else(|_| panic!("silence: {}", self.log()));
        line.unwrap().map(|line| serde_json::from_str(&line).unwrap())
    }

    /// The next notice that it handled.
    async fn next(&mut self) -> Value {
        self.line().await.unwrap_or_else(|| panic!("it has left: {}", self.log()))
    }

    /// The next one about this user: a process that was killed may not have acknowledged what it handled last.
    async fn next_of(&mut self, user: &Uuid) -> Value {
        loop {
            let line = self.next().await;
            if line["user_id"] == user.to_string() {
                return line;
            }
        }
    }

    /// Puts a message into its queue that came from nowhere in the House.
    async fn send(&self, properties: BasicProperties, body: &[u8]) {
        let (options, queue) = (BasicPublishOptions::default(), self.name.queue().into());
        self.channel.basic_publish("".into(), queue, options, body, properties).await.unwrap().await.unwrap();
    }

    async fn forge(&self, user: Uuid, version: i64) {
        let event = Event::Updated { changed_fields: vec!["city".parse().unwrap()] };
        let occurred_at = OffsetDateTime::now_utc();
        let forged =
            Notice { message_id: Uuid::new_v4(), user_id: user, version, event, occurred_at, traceparent: None };
        let (properties, body) = forged.to_message("urn:test");
        self.send(properties, &body).await;
    }

    /// Tells of a user as a backfill does: nobody knows what the consumer still holds.
    async fn backfill(&self, user: Uuid, version: i64) {
        let headers =
            [("version", AMQPValue::LongLongInt(version)), ("tidings-backfill", AMQPValue::LongString("x".into()))];
        let headers: BTreeMap<_, _> = headers.map(|(name, value)| (name.into(), value)).into();
        let properties = BasicProperties::default().with_type("user.created".into()).with_headers(headers.into());
        self.send(properties, json!({ "user_id": user }).to_string().as_bytes()).await;
    }

    /// Makes a user of whom this consumer is told nothing but by a message of a kind that nobody knows.
    async fn blessed(&self, house: &House) -> Uuid {
        let (queue, exchange) = (self.name.queue(), house.exchange.as_str());
        self.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
        let user = house.user(json!({})).await;
        house.settle().await;
        house::bind(&self.channel, queue, exchange, "#").await;
        let mut headers = FieldTable::default();
        headers.insert("version".into(), AMQPValue::ShortInt(1));
        let properties = BasicProperties::default().with_type("user.blessed".into()).with_headers(headers);
        self.send(properties, json!({ "user_id": user }).to_string().as_bytes()).await;
        user
    }

    /// The body of the next dead letter.
    async fn dead_letter(&self) -> Vec<u8> {
        let letter = eventually("a dead letter", async || {
            let options = BasicGetOptions { no_ack: true };
            let letter = self.channel.basic_get(self.name.dead_queue().into(), options).await.unwrap();
            letter.ok_or_else(|| self.log())
        });
        letter.await.delivery.data.clone()
    }

    async fn dead_letters(&self) -> u32 {
        let channel = self.connection.create_channel().await.unwrap();
        topology::depth(&channel, &self.name.dead_queue()).await.unwrap().ready
    }

    /// Declares what the SDK declares for this subscription: the broker refuses when anything differs.
    async fn agrees_with_the_sdk(&self, house: &House) {
        let channel = self.connection.create_channel().await.unwrap();
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let mut subscription = Subscription::new(self.name.clone());
        subscription.keys.insert("#".parse().unwrap());
        topology::declare(&channel, &source, &subscription, &[]).await.unwrap();
    }

    /// A setting with which it ends at once, and says why.
    async fn refuses(&mut self, setting: &str, nonsense: &str, why: &str) {
        self.restart(&[(setting, nonsense)]).await;
        let left = timeout(PATIENCE, self.process.wait()).await.expect("it goes on").unwrap();
        assert!(!left.success(), "{}", self.log());
        self.complains(why).await;
    }

    async fn ask_to_leave(&self) {
        let pid = self.process.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    }

    /// What it still printed before it left.
    async fn leaves(&mut self) -> Vec<Value> {
        let mut last_words = vec![];
        while let Some(line) = self.line().await {
            last_words.push(line);
        }
        let left = timeout(PATIENCE, self.process.wait()).await.expect("it does not leave").unwrap();
        assert_eq!(left.code(), Some(0), "{}", self.log());
        last_words
    }

    async fn end(mut self) {
        self.process.kill().await.unwrap();
        topology::delete(&self.channel, &self.name, &[]).await.unwrap();
    }
}

type Lived = (Child, Lines<BufReader<ChildStdout>>, Arc<Mutex<String>>);

fn spawn(language: Language, settings: &[(String, String)]) -> Lived {
    let (mut process, log) = spawn_to(Stdio::piped(), language, settings);
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    (process, lines, log)
}

fn spawn_to(stdout: Stdio, language: Language, settings: &[(String, String)]) -> (Child, Arc<Mutex<String>>) {
    let mut program = language.program();
    program.envs(settings.iter().cloned()).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let mut process = program.kill_on_drop(true).spawn().unwrap_or_else(|error| panic!("{program:?}: {error}"));
    let log = Arc::<Mutex<String>>::default();
    collect(process.stderr.take().unwrap(), log.clone());
    (process, log)
}

fn line(event: &str, user: &Uuid, version: i64, profile: Value) -> Value {
    json!({ "event": event, "user_id": user, "version": version, "profile": profile })
}

fn forgotten(event: &str, user: &Uuid) -> Value {
    json!({ "event": event, "user_id": user, "version": null, "profile": null })
}

/// A House that says of each request how it went.
async fn talkative_house(db: PgPool) -> House {
    House::with(db, &[("TIDINGS_LOG", "tidings::web=debug")]).await
}

/// How many reads of one user were answered with this status.
async fn reads(house: &House, status: u16) -> usize {
    let (read, status) = ("route=\"/v1/users/{id}\"", format!("status={status}"));
    let log = house.log_so_far().await;
    log.lines().filter(|line| line.contains("GET") && line.contains(read) && line.contains(&status)).count()
}

async fn is_read(house: &House, status: u16) {
    eventually("a read", async || if reads(house, status).await > 0 { Ok(()) } else { Err(house.service.log()) }).await;
}

/// Created, changed, deleted, and what happened while it was down; a duplicate and an old notice cost nothing.
async fn keeps_up(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.agrees_with_the_sdk(&house).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "first_name": "Ana" })));
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    let editor = json!({ "first_name": "Ana", "job_title": "Editor" });
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, editor));

    // A message that came already is not looked at again, and what is old is not asked for.
    house.settle().await;
    let id = house.audit.heard()[1].message_id.to_string();
    consumer.send(BasicProperties::default().with_message_id(id.into()), b"{}").await;
    consumer.forge(ana, 1).await;
    consumer.forge(ana, 2).await;
    house.delete(&ana).await;
    assert_eq!(consumer.next().await, forgotten("user.deleted", &ana));
    consumer.forge(ana, 2).await;
    let bo = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!((reads(&house, 200).await, reads(&house, 410).await), (3, 1), "{}", house.service.log());
    consumer.backfill(bo, 1).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());

    // A look that is years away is not taken at once, again and again.
    assert!(!consumer.log().contains("TimeoutOverflowWarning"), "{}", consumer.log());

    // News of while it was down waits for it. By then there is only the latest state to see, and one look is enough.
    consumer.process.kill().await.unwrap();
    let eve = house.user(json!({ "city": "Riga" })).await;
    house.amend(&eve, json!({ "city": "Oslo" })).await.ok();
    let cy = house.user(json!({})).await;
    house.settle().await;
    consumer.restart(&[]).await;
    assert_eq!(consumer.next_of(&eve).await, line("user.created", &eve, 2, json!({ "city": "Oslo" })));
    assert_eq!(consumer.next().await, line("user.created", &cy, 1, json!({})));
    consumer.end().await;
}

/// A notice may be ahead of what a consumer is shown: then it asks again until it sees that state or a later one.
async fn asks_until_it_sees(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_PATIENCE_S", "60.5")]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    consumer.forge(ana, 2).await;
    is_read(&house, 503).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    assert!(!consumer.log().contains("cannot be asked"), "to be ahead is no outage: {}", consumer.log());
    // An owner that cannot be reached is no reason to give up either, and none to be silent.
    consumer.owner.down();
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    house.settle().await;
    consumer.complains("the owner cannot be asked: ").await;
    consumer.owner.up();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Bern" })));
    // Nor is one that says itself that it is away.
    house.postgres.down();
    consumer.backfill(ana, 3).await;
    consumer.complains("the owner cannot be asked: 503").await;
    house.postgres.up();
    assert_eq!(consumer.next().await, line("user.created", &ana, 3, json!({ "city": "Bern" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.end().await;
}

/// What is no notice: properties and body.
fn poison(user: Uuid) -> Vec<(BasicProperties, String)> {
    let good = json!({ "user_id": user }).to_string();
    let with = |version: Option<AMQPValue>| {
        let mut headers = FieldTable::default();
        if let Some(version) = version {
            headers.insert("version".into(), version);
        }
        BasicProperties::default().with_message_id(Uuid::new_v4().to_string().into()).with_headers(headers)
    };
    let seven = || with(Some(AMQPValue::LongLongInt(7)));
    vec![
        (seven(), "secret".to_owned()),
        (seven(), "[\"secret\"]".to_owned()),
        (seven(), "{}".to_owned()),
        (seven(), json!({ "user_id": 7 }).to_string()),
        (seven(), json!({ "user_id": [user] }).to_string()),
        (seven(), json!({ "user_id": "secret" }).to_string()),
        (seven(), json!({ "user_id": format!("{user}/secret") }).to_string()),
        (seven(), "[".repeat(60_000)),
        (BasicProperties::default(), good.clone()),
        (with(None), good.clone()),
        (with(Some(AMQPValue::LongString("7".into()))), good.clone()),
        (with(Some(AMQPValue::Boolean(true))), good.clone()),
        (with(Some(AMQPValue::LongLongInt(0))), good),
    ]
}

/// What can never be handled goes to the dead letters, holds nothing up, and its content is not in the log. A 404 is no deletion.
async fn sets_aside(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    for (properties, body) in poison(ana) {
        consumer.send(properties, body.as_bytes()).await;
        assert_eq!(consumer.dead_letter().await, body.as_bytes());
    }
    let refused = consumer.log().matches("set aside: not a notice").count();
    assert_eq!(refused, poison(ana).len(), "nobody was asked about it: {}", consumer.log());
    // Nobody ever had this id, and somebody will never be at this version.
    let nobody = Uuid::new_v4();
    consumer.forge(nobody, 1).await;
    consumer.forge(ana, 1_000).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    for user in [nobody, ana] {
        assert!(String::from_utf8(consumer.dead_letter().await).unwrap().contains(&user.to_string()));
    }
    // A type that it does not know is a change like any other, and a version may come in any width.
    let eve = consumer.blessed(&house).await;
    assert_eq!(consumer.next().await, line("user.blessed", &eve, 1, json!({})));
    assert!(!consumer.log().contains("secret"), "{}", consumer.log());

    // The wrong service answers 404 to everything. This time the queue is not its own to declare.
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    let elsewhere = format!("http://{}/elsewhere", consumer.owner.address());
    consumer.restart(&[("TIDINGS_URL", &elsewhere), ("TIDINGS_DECLARE", "no")]).await;
    consumer.listens().await;
    let bo = house.user(json!({})).await;
    assert!(String::from_utf8(consumer.dead_letter().await).unwrap().contains(&bo.to_string()));
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty(), "somebody was forgotten");
    consumer.end().await;
}

/// A queue that is deleted under it is made anew, and what was missed is read; a broken connection is made anew and nothing was missed.
async fn heals(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    house.settle().await;
    consumer.lose_queue().await;
    assert_eq!(consumer.next().await, line("resync", &ana, 2, json!({ "city": "Oslo" })));
    consumer.listens().await;
    assert_eq!(consumer.resyncs(), 2, "at its first start, and now: {}", consumer.log());

    consumer.broker.down();
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    house.settle().await;
    consumer.broker.up();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Bern" })));
    assert_eq!(consumer.resyncs(), 2, "{}", consumer.log());
    consumer.end().await;
}

/// An exchange that is deleted takes the bindings along, and nobody is told. Who finds none reads everybody once there is one, though its
/// queue looks as if nothing was missed: at a look while it listens, as the next process, or after its connection was lost. The owner is
/// kept from the broker meanwhile, as it would make another one soon.
async fn misses_its_exchange(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    consumer.listens().await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    house.broker.down();
    consumer.lose_exchange(&house).await;
    consumer.complains("no exchange").await;
    consumer.process.kill().await.unwrap();
    // Told by an exchange to which nobody is bound.
    house.broker.up();
    let bo = house.user(json!({})).await;
    house.settle().await;
    consumer.restart(&[]).await;
    for user in [ana, bo] {
        assert_eq!(consumer.next().await, line("resync", &user, 1, json!({})));
    }
    consumer.listens().await;

    house.broker.down();
    consumer.broker.down();
    consumer.lose_exchange(&house).await;
    consumer.broker.up();
    consumer.complains("no exchange").await;
    house.broker.up();
    let cy = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("resync", &cy, 1, json!({})));
    consumer.listens().await;

    // A lost binding cannot be seen. It is made anew with the next look, and no resync is owed.
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    consumer.listens().await;
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    consumer.is_bound_for(&house, ana).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    assert_eq!(consumer.resyncs(), 0, "{}", consumer.log());
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.end().await;
}

/// Whoever is killed in the middle of a resync leaves a queue that looks as if nothing was missed. The next process reads everybody all
/// the same; the one after it has no need to.
async fn resyncs_to_the_end(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.owner.hold_answers();
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.process.kill().await.unwrap();
    consumer.owner.up();

    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("resync", &ana, 1, json!({})));
    consumer.listens().await;
    consumer.restart(&[]).await;
    let bo = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &bo, 1, json!({})));
    assert_eq!(consumer.resyncs(), 0, "{}", consumer.log());
    consumer.end().await;
}

/// Its user at the broker needs no more than the rights of its role, also when its queue is lost.
async fn lives_with_its_rights(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    for (role, declares) in [("declaring-consumer", "yes"), ("consumer", "no")] {
        let user = format!("tidings-test-{}-{role}", consumer.name);
        make_user(&user, &[role, consumer.name.as_str()]).await;
        let url = through(&as_user(&env("AMQP_URL"), &user), &consumer.broker);
        consumer.restart(&[("AMQP_URL", &url), ("TIDINGS_DECLARE", declares)]).await;
        consumer.listens().await;
        consumer.lose_queue().await;
        if declares == "no" {
            consumer.complains("session ended").await;
            consumer.agrees_with_the_sdk(&house).await;
        }
        assert_eq!(consumer.next().await, line("resync", &ana, 1, json!({})));
        consumer.listens().await;
        assert_eq!(consumer.resyncs(), 1, "{}", consumer.log());
        consumer.ask_to_leave().await;
        assert!(consumer.leaves().await.is_empty());
        unmake("users", &user).await;
    }
    consumer.end().await;
}

/// A refused key is the end at the start. Later on it is waited for another one, which takes effect without a restart, and no message
/// is set aside for it.
async fn waits_for_a_key(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let first = client(&house, "create badges --scope users:read").await;
    let key = file(&format!("{first}\n"));
    consumer.restart(&[("TIDINGS_API_KEY_FILE", key.to_str().unwrap())]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    // A file that is not there is in the middle of being replaced.
    fs::remove_file(&key).unwrap();
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    consumer.complains("the owner cannot be asked: ").await;
    fs::write(&key, &first).unwrap();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));

    revoke(&house, "badges", &first).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    consumer.complains("the owner refuses the key: 401").await;
    let blind = client(&house, "create badges --scope users:write").await;
    fs::write(&key, &blind).unwrap();
    consumer.complains("the owner refuses the key: 403").await;
    let seeing = client(&house, "create badges.reader --scope users:read").await;
    fs::write(&key, format!("{seeing}\n")).unwrap();
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 3, json!({ "city": "Riga" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    let is_silent = |log: &str| [&first, &blind, &seeing].iter().all(|key| !log.contains(&key[21..]));
    assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());

    for (refused, status) in [(&first, 401), (&blind, 403)] {
        consumer.restart(&[("TIDINGS_API_KEY", refused)]).await;
        let left = timeout(PATIENCE, consumer.process.wait()).await.expect("it goes on").unwrap();
        assert_eq!(left.code(), Some(1), "{}", consumer.log());
        consumer.complains(&format!("the owner refuses the key: {status}")).await;
        assert!(is_silent(&consumer.log()), "a key is in the log: {}", consumer.log());
    }
    consumer.end().await;
}

/// A setting that says nothing is the end at the start, and is named.
async fn refuses_nonsense(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let no_number = ["soon", "-1", "NaN"].map(|it| ("TIDINGS_PATIENCE_S", it, "is not a number of seconds"));
    let no_number = no_number.into_iter().chain([("TIDINGS_CHECK_S", "often", "is not a number of seconds")]);
    let no_address = ("TIDINGS_URL", "localhost:8080", "does not begin with http:// or https://");
    for (setting, nonsense, why) in no_number.chain([no_address]) {
        consumer.refuses(setting, nonsense, &format!("{setting} {why}")).await;
    }
    if matches!(language, Language::Java) {
        // An error that is no exception is not to look like an end in order.
        let incomplete = JAVA.replace("slf4j-api", "no-such");
        consumer.refuses("CLASSPATH", &incomplete, "NoClassDefFoundError").await;
    }
    consumer.end().await;
}

/// An answer that never ends holds nobody for ever, though some of it always arrives. Who waits for one and is asked to leave, leaves; the
/// message goes back.
async fn gives_up_on_an_endless_answer(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.owner.trickle();
    let ana = house.user(json!({})).await;
    is_read(&house, 200).await;
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.owner.up();
    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({})));
    consumer.end().await;
}

/// Asked to leave in the middle of a resync, it ends with the page in hand. The next process begins anew.
async fn leaves_a_resync(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let (queue, exchange) = (consumer.name.queue(), house.exchange.as_str());
    consumer.channel.queue_unbind(queue.into(), exchange.into(), "#".into(), FieldTable::default()).await.unwrap();
    let all = users(&house, PAGE + 1).await;
    house.settle().await;
    consumer.owner.hold_answers();
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.ask_to_leave().await;
    consumer.owner.up();
    assert_eq!(consumer.leaves().await.len(), PAGE, "{}", consumer.log());

    consumer.restart(&[]).await;
    for _ in &all {
        assert_eq!(consumer.next().await["event"], "resync");
    }
    consumer.end().await;
}

/// Asked to leave, it finishes what it has in hand; what waits behind goes back. Nothing is lost and nothing comes twice.
async fn leaves_in_order(db: PgPool, language: Language) {
    let house = talkative_house(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.owner.hold_answers();
    let users = [house.user(json!({})).await, house.user(json!({})).await];
    house.settle().await;
    is_read(&house, 200).await;
    consumer.ask_to_leave().await;
    consumer.owner.up();
    let mut handled = consumer.leaves().await;
    assert!(!handled.is_empty(), "what it had in hand was dropped: {}", consumer.log());

    consumer.restart(&[]).await;
    let last = house.user(json!({})).await;
    while !handled.contains(&line("user.created", &last, 1, json!({}))) {
        handled.push(consumer.next().await);
    }
    assert_eq!(handled, [users[0], users[1], last].map(|user| line("user.created", &user, 1, json!({}))));
    consumer.end().await;
}

/// A broker that falls silent, as when it is frozen, keeps nobody: asked once, it leaves, also in the middle of a look.
async fn leaves_a_silent_broker(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    consumer.restart(&[("TIDINGS_CHECK_S", "0.2")]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(consumer.next_of(&ana).await, line("user.created", &ana, 1, json!({})));
    consumer.broker.freeze();
    eventually("a look", async || if consumer.broker.has_held_back() { Ok(()) } else { Err(consumer.log()) }).await;
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.end().await;
}

/// What cannot be kept is waited for as the owner is: nothing is acknowledged, set aside or left out.
async fn waits_for_its_own_copy(db: PgPool, language: Language) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, language).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "city": "Riga" })));
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());
    consumer.restart_on_a_full_disk().await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    consumer.complains("is tried again").await;
    consumer.restart(&[]).await;
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    assert_eq!(consumer.dead_letters().await, 0, "{}", consumer.log());
    consumer.ask_to_leave().await;
    assert!(consumer.leaves().await.is_empty());

    // What was missed is read again until it is kept, too.
    consumer.restart_on_a_full_disk().await;
    consumer.listens().await;
    consumer.lose_queue().await;
    consumer.resyncs_anew(2).await;
    consumer.end().await;
}

/// Over TLS the broker is believed by its certificate alone: one of the authority that the runtime trusts, and of this host.
async fn verifies(db: PgPool, language: Language) {
    let broker = TlsBroker::borrow().await;
    let house = House::at(db, &broker.plain_url, &broker.settings()).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let owner = terminate(&broker.authority.right(), &house.service.url).await;
    let mut settings = trusting(language, &broker.authority);
    settings.extend(
        [
            ("AMQP_URL", broker.url.clone()),
            ("TIDINGS_API_KEY", house::key().to_owned()),
            ("TIDINGS_URL", format!("https://localhost:{owner}")),
            ("TIDINGS_EXCHANGE", house.exchange.clone()),
            ("TIDINGS_QUEUE", format!("{}.consumer", house.exchange)),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let [stranger, other_name, ..] = broker.authority.wrong();
    for (wrong, why) in [stranger, other_name] {
        broker.present(&wrong).await;
        let (_process, _lines, log) = spawn(language, &settings);
        eventually("two attempts that came to nothing", async || {
            let log = log.lock().unwrap().clone();
            assert!(!log.contains("news may have been missed"), "{why}: it is at work: {log}");
            if log.matches("session ended").count() > 1 { Ok(()) } else { Err(log) }
        })
        .await;
    }
    broker.present(&broker.authority.right()).await;
    let (_process, mut lines, log) = spawn(language, &settings);
    let heard = timeout(PATIENCE, lines.next_line()).await.unwrap_or_else(|_| panic!("{}", log.lock().unwrap()));
    let heard: Value = serde_json::from_str(&heard.unwrap().unwrap()).unwrap();
    assert_eq!(heard, line("resync", &ana, 1, json!({ "city": "Riga" })));
}

/// A story, once there is a program to tell it of: to compile one takes longer than connections stay open that say nothing.
async fn told(db: PgPool, language: Language, story: impl AsyncFnOnce(PgPool, Language)) {
    let compiled = spawn_blocking(move || match language {
        Language::Go => {
            LazyLock::force(&GO);
        }
        Language::Java => {
            LazyLock::force(&JAVA);
        }
        Language::Ruby | Language::Python | Language::Node | Language::Php => {}
    });
    compiled.await.unwrap();
    story(db, language).await;
}

/// Every language goes through every story.
macro_rules! stories {
    ($($module:ident $language:ident),+) => {$(
        mod $module {
            use sqlx::PgPool;

            use super::Language::$language;

            #[sqlx::test]
            async fn keeps_up(db: PgPool) {
                super::told(db, $language, super::keeps_up).await;
            }

            #[sqlx::test]
            async fn never_takes_an_older_state_than_it_was_told_of(db: PgPool) {
                super::told(db, $language, super::asks_until_it_sees).await;
            }

            #[sqlx::test]
            async fn sets_aside_what_it_can_never_handle(db: PgPool) {
                super::told(db, $language, super::sets_aside).await;
            }

            #[sqlx::test]
            async fn heals(db: PgPool) {
                super::told(db, $language, super::heals).await;
            }

            #[sqlx::test]
            async fn misses_its_exchange(db: PgPool) {
                super::told(db, $language, super::misses_its_exchange).await;
            }

            #[sqlx::test]
            async fn resyncs_to_the_end(db: PgPool) {
                super::told(db, $language, super::resyncs_to_the_end).await;
            }

            #[sqlx::test]
            async fn lives_with_its_rights(db: PgPool) {
                super::told(db, $language, super::lives_with_its_rights).await;
            }

            #[sqlx::test]
            async fn waits_for_a_key(db: PgPool) {
                super::told(db, $language, super::waits_for_a_key).await;
            }

            #[sqlx::test]
            async fn waits_for_its_own_copy(db: PgPool) {
                super::told(db, $language, super::waits_for_its_own_copy).await;
            }

            #[sqlx::test]
            async fn believes_a_broker_by_its_certificate_alone(db: PgPool) {
                super::told(db, $language, super::verifies).await;
            }

            #[sqlx::test]
            async fn refuses_nonsense(db: PgPool) {
                super::told(db, $language, super::refuses_nonsense).await;
            }

            #[sqlx::test]
            async fn gives_up_on_an_endless_answer(db: PgPool) {
                super::told(db, $language, super::gives_up_on_an_endless_answer).await;
            }

            #[sqlx::test]
            async fn leaves_in_order(db: PgPool) {
                super::told(db, $language, super::leaves_in_order).await;
            }

            #[sqlx::test]
            async fn leaves_a_resync(db: PgPool) {
                super::told(db, $language, super::leaves_a_resync).await;
            }

            #[sqlx::test]
            async fn leaves_a_silent_broker(db: PgPool) {
                super::told(db, $language, super::leaves_a_silent_broker).await;
            }
        }
    )+};
}

stories!(ruby Ruby, python Python, node Node, go Go, java Java, php Php);
