//! The programs of `examples/consumers`: built, started, asked to leave and looked into, whatever their language.
//!
//! A program reaches the broker and the service through faulty proxies, or is shown somebody who stands in place of the service.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, LazyLock, Mutex},
    time::Instant,
};

use axum::{
    Router,
    http::{StatusCode, Uri},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use tidings_sdk::{
    envelope::{Event, Notice},
    subscription::{Subscription, SubscriptionName},
    topology::{self, Source},
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
    task::spawn_blocking,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    certificates::Authority,
    house::{self, House, PATIENCE, collect, env, eventually, proxy_before, through},
    proxy::Proxy,
};

#[derive(Debug, Clone, Copy)]
pub enum Language {
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
pub fn trusting(language: Language, authority: &Authority) -> Vec<(String, String)> {
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
pub static JAVA: LazyLock<String> = LazyLock::new(|| {
    let classes = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("consumer-in-java");
    let jars =
        ["amqp-client", "gson", "slf4j-api", "slf4j-nop"].map(|jar| format!("/usr/share/java/{jar}.jar")).join(":");
    let mut javac = std::process::Command::new("javac");
    javac.args(["-cp", &jars, "-d"]).arg(&classes).arg("Consumer.java").current_dir(example_folder("java"));
    built(&mut javac);
    format!("{}:{jars}", classes.display())
});

/// Waits until there is a program: to compile one takes longer than connections stay open that say nothing.
pub async fn compiled(language: Language) {
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
}

fn example_folder(language: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/consumers").join(language)
}

fn built(compiler: &mut std::process::Command) {
    let output = compiler.output().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(output.status.success(), "{compiler:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub struct Consumer {
    language: Language,
    pub name: SubscriptionName,
    pub broker: Proxy,
    pub owner: Proxy,
    connection: Connection,
    pub channel: Channel,
    settings: Vec<(String, String)>,
    lines: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
    pub process: Child,
}

impl Consumer {
    /// A consumer of everything in this House, which listens already.
    pub async fn start(house: &House, language: Language) -> Self {
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
    pub async fn restart(&mut self, settings: &[(&str, &str)]) {
        self.process.kill().await.unwrap();
        let mut all = self.settings.clone();
        all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        (self.process, self.lines, self.log) = spawn(self.language, &all);
    }

    /// A new process, which can print nothing: its stdout is a full disk.
    pub async fn restart_on_a_full_disk(&mut self) {
        self.process.kill().await.unwrap();
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        (self.process, self.log) = spawn_to(full.into(), self.language, &self.settings);
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it says so on stderr.
    pub async fn complains(&self, of: &str) {
        eventually(of, async || if self.log().contains(of) { Ok(()) } else { Err(self.log()) }).await;
    }

    pub fn resyncs(&self) -> usize {
        self.log().matches("news may have been missed: resync").count()
    }

    /// Waits until it has begun as many.
    pub async fn resyncs_anew(&self, count: usize) {
        eventually("another resync", async || if self.resyncs() >= count { Ok(()) } else { Err(self.log()) }).await;
    }

    /// Deletes its queue under it.
    pub async fn lose_queue(&self) {
        self.channel.queue_delete(self.name.queue().into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// Deletes the owner's exchange, and with it every binding to it. Nobody is told.
    pub async fn lose_exchange(&self, house: &House) {
        let exchange = house.exchange.as_str().into();
        self.channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await.unwrap();
    }

    /// Publishes an old notice of this user through the exchange until a queue is bound to take it.
    pub async fn is_bound_for(&self, house: &House, user: Uuid) {
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
    pub async fn listens(&self) {
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
    pub async fn line(&mut self) -> Option<Value> {
        let line =
            timeout(PATIENCE, self.lines.next_line()).await.unwrap_or_else(|_| panic!("silence: {}", self.log()));
        line.unwrap().map(|line| serde_json::from_str(&line).unwrap())
    }

    /// The next notice that it handled.
    pub async fn next(&mut self) -> Value {
        self.line().await.unwrap_or_else(|| panic!("it has left: {}", self.log()))
    }

    /// The next one about this user: a process that was killed may not have acknowledged what it handled last.
    pub async fn next_of(&mut self, user: &Uuid) -> Value {
        loop {
            let line = self.next().await;
            if line["user_id"] == user.to_string() {
                return line;
            }
        }
    }

    /// Puts a message into its queue that came from nowhere in the House.
    pub async fn send(&self, properties: BasicProperties, body: &[u8]) {
        let (options, queue) = (BasicPublishOptions::default(), self.name.queue().into());
        self.channel.basic_publish("".into(), queue, options, body, properties).await.unwrap().await.unwrap();
    }

    pub async fn forge(&self, user: Uuid, version: i64) {
        let event = Event::Updated { changed_fields: vec!["city".parse().unwrap()] };
        let occurred_at = OffsetDateTime::now_utc();
        let forged =
            Notice { message_id: Uuid::new_v4(), user_id: user, version, event, occurred_at, traceparent: None };
        let (properties, body) = forged.to_message("urn:test");
        self.send(properties, &body).await;
    }

    /// Tells of a user as a backfill does: nobody knows what the consumer still holds.
    pub async fn backfill(&self, user: Uuid, version: i64) {
        let headers =
            [("version", AMQPValue::LongLongInt(version)), ("tidings-backfill", AMQPValue::LongString("x".into()))];
        let headers: BTreeMap<_, _> = headers.map(|(name, value)| (name.into(), value)).into();
        let properties = BasicProperties::default().with_type("user.created".into()).with_headers(headers.into());
        self.send(properties, json!({ "user_id": user }).to_string().as_bytes()).await;
    }

    /// Makes a user of whom this consumer is told nothing but by a message of a kind that nobody knows.
    pub async fn blessed(&self, house: &House) -> Uuid {
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
    pub async fn dead_letter(&self) -> Vec<u8> {
        let letter = eventually("a dead letter", async || {
            let options = BasicGetOptions { no_ack: true };
            let letter = self.channel.basic_get(self.name.dead_queue().into(), options).await.unwrap();
            letter.ok_or_else(|| self.log())
        });
        letter.await.delivery.data.clone()
    }

    pub async fn dead_letters(&self) -> u32 {
        let channel = self.connection.create_channel().await.unwrap();
        topology::depth(&channel, &self.name.dead_queue()).await.unwrap().ready
    }

    /// Declares what the SDK declares for this subscription: the broker refuses when anything differs.
    pub async fn agrees_with_the_sdk(&self, house: &House) {
        let channel = self.connection.create_channel().await.unwrap();
        let source = Source { exchange: house.exchange.clone(), prefix: None };
        let mut subscription = Subscription::new(self.name.clone());
        subscription.keys.insert("#".parse().unwrap());
        topology::declare(&channel, &source, &subscription, &[]).await.unwrap();
    }

    /// A setting with which it ends at once, and says why.
    pub async fn refuses(&mut self, setting: &str, nonsense: &str, why: &str) {
        self.restart(&[(setting, nonsense)]).await;
        let left = timeout(PATIENCE, self.process.wait()).await.expect("it goes on").unwrap();
        assert_eq!(left.code(), Some(1), "{}", self.log());
        self.complains(why).await;
    }

    pub async fn ask_to_leave(&self) {
        let pid = self.process.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    }

    /// What it still printed before it left.
    pub async fn leaves(&mut self) -> Vec<Value> {
        let mut last_words = vec![];
        while let Some(line) = self.line().await {
            last_words.push(line);
        }
        let left = timeout(PATIENCE, self.process.wait()).await.expect("it does not leave").unwrap();
        assert_eq!(left.code(), Some(0), "{}", self.log());
        last_words
    }

    pub async fn end(mut self) {
        self.process.kill().await.unwrap();
        topology::delete(&self.channel, &self.name, &[]).await.unwrap();
    }
}

pub type Lived = (Child, Lines<BufReader<ChildStdout>>, Arc<Mutex<String>>);

pub fn spawn(language: Language, settings: &[(String, String)]) -> Lived {
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

pub fn line(event: &str, user: &Uuid, version: i64, profile: Value) -> Value {
    json!({ "event": event, "user_id": user, "version": version, "profile": profile })
}

pub fn forgotten(event: &str, user: &Uuid) -> Value {
    json!({ "event": event, "user_id": user, "version": null, "profile": null })
}

/// Where a program asks for one user, and for everybody.
pub const A_USER: &str = "/v1/users/";
pub const EVERYBODY: &str = "/v1/users?limit=500";

/// What an answer is made of: status, a header and its value, body.
pub type Words = (u16, (&'static str, &'static str), &'static str);

/// Shows the user who is asked for, and of everybody the first there could be.
const SHOWN: &str = r#"{"version":1,"profile":{},"users":[{"id":"00000000-0000-0000-0000-000000000001","version":1,"profile":{}}],"next":null}"#;

/// Somebody in place of the owner, who says something else first.
pub struct StandIn {
    pub url: String,
    asked: Arc<Mutex<Vec<(String, Instant)>>>,
}

impl StandIn {
    /// Whoever asks for what begins so hears these words, each once, before he is shown anybody.
    pub async fn saying(script: Vec<(&'static str, Words)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::<Mutex<Vec<(String, Instant)>>>::default();
        let (script, noted) = (Arc::new(Mutex::new(script)), asked.clone());
        let answer = move |uri: Uri| {
            let path = uri.to_string();
            let mut script = script.lock().unwrap();
            let next = script.iter().position(|(at, _)| path.starts_with(at));
            let (status, header, body) = next.map_or((200, ("server", "stand-in"), SHOWN), |nth| script.remove(nth).1);
            noted.lock().unwrap().push((path, Instant::now()));
            async move { (StatusCode::from_u16(status).unwrap(), [header], body) }
        };
        tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
        Self { url, asked }
    }

    /// When it was asked for what begins so.
    pub fn looks_at(&self, path: &str) -> Vec<Instant> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(asked, _)| asked.starts_with(path)).map(|(_, at)| *at).collect()
    }
}
