//! Consumers in other languages: the contract is the protocol, and no library of ours is needed to keep up.

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
};

use lapin::{
    BasicProperties, Channel,
    options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::envelope::{Event, Notice};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use uuid::Uuid;

use crate::house::{self, House, PATIENCE, collect, env, eventually};

struct Consumer {
    queue: String,
    channel: Channel,
    lines: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
    process: Child,
}

impl Consumer {
    /// A consumer of this House that listens already.
    async fn start(house: &House, script: &str, keys: &[&str]) -> Self {
        let queue = format!("{}.consumer", house.exchange);
        let connection = house::connect(&env("AMQP_URL")).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let (process, lines, log) = Self::spawn(house, script, keys, &queue);
        let consumer = Self { queue, channel, lines, log, process };
        consumer.listens().await;
        // The channel keeps its connection.
        drop(connection);
        consumer
    }

    fn spawn(
        house: &House,
        script: &str,
        keys: &[&str],
        queue: &str,
    ) -> (Child, Lines<BufReader<ChildStdout>>, Arc<Mutex<String>>) {
        let (interpreter, otherwise) =
            if script.ends_with(".rb") { ("TIDINGS_TEST_RUBY", "ruby") } else { ("TIDINGS_TEST_PYTHON", "python3") };
        let interpreter = std::env::var(interpreter).unwrap_or_else(|_| otherwise.to_owned());
        let mut process = Command::new(interpreter)
            .arg(format!("{}/tests/consumers/{script}", env!("CARGO_MANIFEST_DIR")))
            .args(keys)
            .env("AMQP_URL", env("AMQP_URL"))
            .env("TIDINGS_URL", &house.service.url)
            .env("TIDINGS_EXCHANGE", &house.exchange)
            .env("TIDINGS_QUEUE", queue)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = Arc::<Mutex<String>>::default();
        collect(process.stderr.take().unwrap(), log.clone());
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        (process, lines, log)
    }

    /// A new process in place of this one, which is killed with whatever it was about to do.
    async fn restart(&mut self, house: &House, script: &str, keys: &[&str]) {
        self.process.kill().await.unwrap();
        let (process, lines, log) = Self::spawn(house, script, keys, &self.queue);
        (self.process, self.lines, self.log) = (process, lines, log);
    }

    /// Waits until somebody consumes from its queue.
    async fn listens(&self) {
        eventually("the consumer to listen", async || {
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            let connection = house::connect(&env("AMQP_URL")).await.unwrap();
            let channel = connection.create_channel().await.unwrap();
            let queue = channel.queue_declare(self.queue.as_str().into(), passive, Default::default()).await;
            match queue.map(|queue| queue.consumer_count()) {
                Ok(1) => Ok(()),
                other => Err((other.map_err(|error| error.to_string()), self.log.lock().unwrap().clone())),
            }
        })
        .await;
    }

    /// The next notice that it handled.
    async fn next(&mut self) -> Value {
        let line =
            timeout(PATIENCE, self.lines.next_line()).await.unwrap_or_else(|_| panic!("{}", self.log.lock().unwrap()));
        serde_json::from_str(&line.unwrap().unwrap_or_else(|| panic!("{}", self.log.lock().unwrap()))).unwrap()
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
        let options = BasicPublishOptions::default();
        let sent = self.channel.basic_publish("".into(), self.queue.as_str().into(), options, body, properties).await;
        sent.unwrap().await.unwrap();
    }

    async fn end(mut self) {
        self.process.kill().await.unwrap();
        for queue in [self.queue.clone(), format!("{}.dead", self.queue)] {
            self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        }
    }
}

fn line(event: &str, user: &Uuid, version: i64, profile: Value) -> Value {
    json!({ "event": event, "user_id": user, "version": version, "profile": profile })
}

fn forgotten(event: &str, user: &Uuid) -> Value {
    json!({ "event": event, "user_id": user, "version": null, "profile": null })
}

/// What every consumer has to do right, whatever it is written in.
async fn keeps_up(db: PgPool, script: &str) {
    let house = House::open(db).await;
    let mut consumer = Consumer::start(&house, script, &[]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(consumer.next().await, line("user.created", &ana, 1, json!({ "first_name": "Ana" })));
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    let editor = json!({ "first_name": "Ana", "job_title": "Editor" });
    assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, editor));

    // A duplicate is dropped, and what is no notice is set aside; neither holds up what comes after it.
    house.settle().await;
    let id = house.audit.heard()[1].message_id.to_string();
    consumer.send(BasicProperties::default().with_message_id(id.into()), b"{}").await;
    consumer.send(BasicProperties::default().with_message_id("poison".into()), b"no notice").await;
    house.delete(&ana).await;
    assert_eq!(consumer.next().await, forgotten("user.deleted", &ana));
    let dead = format!("{}.dead", consumer.queue);
    let poison = eventually("a dead letter", async || {
        let letter = consumer.channel.basic_get(dead.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap();
        letter.ok_or("none")
    })
    .await;
    assert_eq!(poison.delivery.data, b"no notice");

    // News of while it was down waits for it.
    consumer.process.kill().await.unwrap();
    let eve = house.user(json!({ "city": "Riga" })).await;
    house.amend(&eve, json!({ "city": "Oslo" })).await.ok();
    house.settle().await;
    consumer.restart(&house, script, &[]).await;
    // By now there is only the latest state to see, for the older news too.
    for event in ["user.created", "profile.updated"] {
        assert_eq!(consumer.next_of(&eve).await, line(event, &eve, 2, json!({ "city": "Oslo" })));
    }
    consumer.end().await;
}

/// A notice may be ahead of what a consumer is shown: then it asks again until it sees that state or a later one.
async fn asks_until_it_sees(db: PgPool, script: &str) {
    let house = House::with(db, &[("TIDINGS_LOG", "tidings=debug")]).await;
    let mut consumer = Consumer::start(&house, script, &["profile.updated", "user.deleted"]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let early = Notice {
        message_id: Uuid::new_v4(),
        user_id: ana,
        version: 2,
        event: Event::Updated { changed_fields: vec!["city".parse().unwrap()] },
        occurred_at: OffsetDateTime::now_utc(),
        traceparent: None,
    };
    let (properties, body) = early.to_message("urn:test");
    consumer.send(properties, &body).await;
    eventually("an answer that it cannot be seen yet", async || {
        let log = house.service.log();
        if log.contains("status=503") { Ok(()) } else { Err(log) }
    })
    .await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    for _ in ["the early notice", "the real one"] {
        assert_eq!(consumer.next().await, line("profile.updated", &ana, 2, json!({ "city": "Oslo" })));
    }
    consumer.end().await;
}

#[sqlx::test]
async fn a_consumer_in_ruby_keeps_up(db: PgPool) {
    keeps_up(db, "bunny.rb").await;
}

#[sqlx::test]
async fn a_consumer_in_python_keeps_up(db: PgPool) {
    keeps_up(db, "pika_consumer.py").await;
}

#[sqlx::test]
async fn a_consumer_in_ruby_never_takes_an_older_state_than_it_was_told_of(db: PgPool) {
    asks_until_it_sees(db, "bunny.rb").await;
}

#[sqlx::test]
async fn a_consumer_in_python_never_takes_an_older_state_than_it_was_told_of(db: PgPool) {
    asks_until_it_sees(db, "pika_consumer.py").await;
}
