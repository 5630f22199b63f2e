//! Servers to be hurt, beside those of all tests: a broker and a Postgres that tests borrow one at a time, and a cluster of brokers.

use std::path::Path;

use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};
use tidings::db;
use tokio::{
    process::Command,
    sync::{Mutex, MutexGuard, OnceCell},
};
use uuid::Uuid;

use crate::{house::eventually, rights};

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
static HURT_HAS_USERS: OnceCell<()> = OnceCell::const_new();
static ONE_CLUSTER_AT_A_TIME: Mutex<()> = Mutex::const_new(());
static ONE_DATABASE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

pub struct HurtBroker {
    pub amqp_url: String,
    _turn: MutexGuard<'static, ()>,
}

impl HurtBroker {
    /// The broker, running and well. It goes on running; `./dev down` stops it.
    pub async fn borrow() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        // A test that failed may have left it frozen.
        drop(broker(&["thaw", "hurt"]).await);
        let broker = Self { amqp_url: start(&["hurt"]).await, _turn: turn };
        // Or in an alarm.
        broker.end_alarm().await;
        HURT_HAS_USERS.get_or_init(|| rights::make_users_at("hurt")).await;
        broker
    }

    pub async fn stop(&self) {
        broker(&["stop", "hurt"]).await.unwrap();
    }

    pub async fn start(&self) {
        broker(&["start", "hurt"]).await.unwrap();
    }

    /// As an operator does (docs/operating.md): RabbitMQ (3.10), alone on its node and killed, leaves a quorum queue without a leader if
    /// somebody asks it for something before it has chosen one.
    pub async fn has_leaders(&self) {
        eventually("each queue to have a leader", async || {
            let elected =
                "[element(1, {N, ra:trigger_election({N, node()})}) || {N, follower} <- ets:tab2list(ra_state)].";
            let without = self.try_ctl(&["eval", elected]).await.unwrap();
            if without.trim() == "[]" { Ok(()) } else { Err(without) }
        })
        .await;
    }

    pub async fn kill(&self) {
        broker(&["kill", "hurt"]).await.unwrap();
    }

    pub async fn freeze(&self) {
        broker(&["freeze", "hurt"]).await.unwrap();
    }

    pub async fn thaw(&self) {
        broker(&["thaw", "hurt"]).await.unwrap();
    }

    /// As if memory had run out: publishers are blocked.
    pub async fn alarm(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "0.00001"]).await;
    }

    /// The same by the broker itself, as soon as it has a queue of this name: the command may take longer than the alarm may be late.
    pub async fn alarm_at(&self, queue: &str) {
        let wait = format!(
            "spawn(fun() ->
               Queue = rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>),
               Wait = fun(Again) ->
                 case rabbit_amqqueue:exists(Queue) of
                   true -> vm_memory_monitor:set_vm_memory_high_watermark(0.00001);
                   false -> timer:sleep(10), Again(Again)
                 end
               end,
               Wait(Wait)
             end)."
        );
        self.ctl(&["eval", &wait]).await;
    }

    pub async fn end_alarm(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "0.4"]).await;
    }

    pub async fn ctl(&self, command: &[&str]) {
        self.try_ctl(command).await.unwrap();
    }

    pub async fn try_ctl(&self, command: &[&str]) -> Result<String, String> {
        broker(&[&["ctl", "hurt"], command].concat()).await
    }
}

/// Three brokers that are one, made anew: nodes that were all stopped wait at their start for the one that was last.
pub struct Cluster {
    pub amqp_urls: [String; 3],
    _turn: MutexGuard<'static, ()>,
}

/// The others join the first.
const NODES: [&str; 3] = ["north", "south", "east"];

impl Cluster {
    pub async fn set_up() -> Self {
        let turn = ONE_CLUSTER_AT_A_TIME.lock().await;
        forget_nodes().await;
        let [first, second, third] = NODES;
        let amqp_urls =
            [start(&[first]).await, start(&[second, "--join", first]).await, start(&[third, "--join", first]).await];
        rights::make_users_at(first).await;
        Self { amqp_urls, _turn: turn }
    }

    /// The node at this place of the addresses.
    pub async fn kill(&self, place: usize) {
        broker(&["kill", NODES[place]]).await.unwrap();
    }

    pub async fn start(&self, place: usize) {
        start(&[NODES[place]]).await;
    }

    /// Whether the node at this place has the leader of a queue.
    pub async fn leads(&self, place: usize, queue: &str) -> bool {
        let queues = broker(&["ctl", NODES[place], "list_queues", "name", "leader"]).await.unwrap();
        queues.lines().any(|line| line == format!("{queue}\t{}@localhost", NODES[place]))
    }

    pub async fn tear_down(self) {
        forget_nodes().await;
    }
}

/// A Postgres that can be stopped and killed, made a standby, of nobody in particular, or to wait for one.
pub struct HurtPostgres {
    admin: PgPool,
    _turn: MutexGuard<'static, ()>,
}

impl HurtPostgres {
    /// The server, running and no standby.
    pub async fn borrow() -> Self {
        let turn = ONE_DATABASE_AT_A_TIME.lock().await;
        let started = dev(&["database", "start", "hurt"]).await.unwrap();
        let admin = PgPool::connect(started.trim().strip_prefix("DATABASE_URL=").unwrap()).await.unwrap();
        let server = Self { admin, _turn: turn };
        if sqlx::query_scalar(db::FOLLOWS).fetch_one(&server.admin).await.unwrap() {
            // A test that failed has left it so.
            server.lead().await;
        }
        server.await_standby(false).await;
        server
    }

    /// A new database there, with our tables.
    pub async fn database(&self) -> PgPool {
        let name = format!("test_{}", Uuid::new_v4().simple());
        self.run(&format!("create database {name}")).await;
        let options = (*self.admin.connect_options()).clone().database(&name);
        let pool = PgPoolOptions::new().max_connections(2).connect_with(options).await.unwrap();
        sqlx::migrate!().run(&pool).await.unwrap();
        pool
    }

    /// Another database there, which has what is in this one, to which nobody may be connected.
    pub async fn copy(&self, original: PgPool) -> PgPool {
        let options = original.connect_options();
        original.close().await;
        let (name, copy) = (options.get_database().unwrap(), format!("test_{}", Uuid::new_v4().simple()));
        self.run(&format!("create database {copy} template {name}")).await;
        PgPoolOptions::new().max_connections(2).connect_with((*options).clone().database(&copy)).await.unwrap()
    }

    /// Starts it anew as a standby.
    pub async fn follow(&self) {
        self.run("copy (select) to program 'cat > standby.signal'").await;
        self.stop().await;
        self.start().await;
    }

    pub async fn stop(&self) {
        dev(&["database", "stop", "hurt"]).await.unwrap();
    }

    pub async fn start(&self) {
        dev(&["database", "start", "hurt"]).await.unwrap();
    }

    pub async fn kill(&self) {
        dev(&["database", "kill", "hurt"]).await.unwrap();
    }

    /// Makes it lead.
    pub async fn lead(&self) {
        self.run("select pg_promote()").await;
    }

    /// Whether commits wait for a synchronous standby, which there is not.
    pub async fn await_standby(&self, on: bool) {
        let standbys = if on { "lost" } else { "" };
        self.run(&format!("alter system set synchronous_standby_names = '{standbys}'")).await;
        self.run("select pg_reload_conf()").await;
        let setting = "select current_setting('synchronous_standby_names')";
        eventually("the setting to be read", async || {
            let seen: String = sqlx::query_scalar(setting).fetch_one(&self.admin).await.unwrap();
            if seen == standbys { Ok(()) } else { Err(seen) }
        })
        .await;
    }

    async fn run(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.admin).await.unwrap();
    }
}

async fn forget_nodes() {
    for node in NODES.iter().rev() {
        broker(&["forget", node]).await.unwrap();
    }
}

/// `./dev broker start` with these arguments; its address.
async fn start(arguments: &[&str]) -> String {
    let started = broker(&[&["start"], arguments].concat()).await.unwrap();
    started.trim().strip_prefix("AMQP_URL=").unwrap().to_owned()
}

/// Has a quorum queue of the broker of all tests say nothing, as one that has no leader; or speak again.
pub async fn silence(queue: &str, on: bool) {
    let what = if on { "suspend" } else { "resume" };
    broker(&["ctl", "main", "eval", &format!("sys:{what}(whereis('%2F_{queue}')).")]).await.unwrap();
}

/// `./dev broker` with these arguments; what it printed.
pub async fn broker(arguments: &[&str]) -> Result<String, String> {
    dev(&[&["broker"], arguments].concat()).await
}

/// `./dev` with these arguments; what it printed.
pub async fn dev(arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev"));
    let done = command.args(arguments).output().await.unwrap();
    let (said, talk) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if done.status.success() { Ok(said.into_owned()) } else { Err(format!("{arguments:?}: {said}{talk}")) }
}
