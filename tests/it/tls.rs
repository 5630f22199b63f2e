//! TLS: servers are believed by their certificates alone, and are believed again, without a restart, when these are right.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};
use tidings_sdk::{
    consumer::{Consumer, Failure, Handler, News},
    owner::{FetchError, Latest, Owner},
    subscription::Subscription,
    topology::Source,
    trust::Trust,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::{Mutex, MutexGuard, mpsc},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    certificates::{Authority, Presented, put, terminate},
    house::{House, PATIENCE, eventually, file, key, owner_at, proxy_before, tidings},
    hurt::{broker, dev},
    load,
    proxy::Proxy,
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
/// Stands in every URL, and nowhere else.
const PASSWORD: &str = "c4nary-passw0rd";
/// Longer than anybody waits for an answer that has come.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A broker that speaks TLS, and what it shows is chosen by the test.
pub struct TlsBroker {
    pub authority: Authority,
    pub plain_url: String,
    pub url: String,
    management_url: String,
    /// Between the service and its TLS port.
    line: Proxy,
    _turn: MutexGuard<'static, ()>,
}

impl TlsBroker {
    pub async fn borrow() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let (authority, folder) = (Authority::new(), folder());
        put(&authority.right(), &folder);
        let started = broker(&["start", "tls", "--tls", folder.to_str().unwrap()]).await.unwrap();
        let printed = |name: &str| started.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap();
        let url = printed("AMQPS_URL").replace("guest:guest", &format!("known:{PASSWORD}"));
        let management_url = printed("MANAGEMENT_URL").replace("guest:guest", &format!("known:{PASSWORD}"));
        let line = proxy_before(&url.replace("localhost", "127.0.0.1")).await;
        let url = format!("amqps://known:{PASSWORD}@localhost:{}/%2f", line.address().port());
        let broker =
            Self { authority, plain_url: printed("AMQP_URL").to_owned(), url, management_url, line, _turn: turn };
        drop(broker.ctl(&["add_user", "known", PASSWORD]).await);
        broker.ctl(&["set_permissions", "known", ".*", ".*", ".*"]).await.unwrap();
        broker.ctl(&["set_user_tags", "known", "management"]).await.unwrap();
        broker.present(&broker.authority.right()).await;
        broker
    }

    async fn ctl(&self, command: &[&str]) -> Result<String, String> {
        broker(&[&["ctl", "tls"], command].concat()).await
    }

    /// Shows this certificate to whoever connects from now on, and has everybody connect anew.
    pub async fn present(&self, presented: &Presented) {
        put(presented, &folder());
        self.ctl(&["eval", "ssl:clear_pem_cache()."]).await.unwrap();
        self.line.cut();
    }

    pub fn settings(&self) -> [(&str, &str); 3] {
        [("AMQP_URL", &self.url), ("AMQP_REGISTRY_URL", &self.url), ("AMQP_CA_FILE", self.authority.trusted())]
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("broker-tls")
}

#[sqlx::test]
async fn a_broker_is_believed_by_its_certificate_alone(db: PgPool) {
    let broker = TlsBroker::borrow().await;
    let house = House::at(db, &broker.plain_url, &broker.settings()).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);
    let mut changes = 1;
    for (wrong, why) in broker.authority.wrong() {
        broker.present(&wrong).await;
        let presented = Instant::now();
        load::degraded_by(&house, why).await;
        assert!(presented.elapsed() < AT_ONCE, "{why}: {:?}", presented.elapsed());
        house.amend(&ana, json!({ "job_title": why })).await.ok();
        let mut starting = house.another(&["relay"]).await;
        eventually("a relay that says why it does not begin", async || {
            if starting.log().contains(why) { Ok(()) } else { Err(starting.log()) }
        })
        .await;
        starting.kill().await;
        assert_eq!(house.pending().await, 1, "{why}");
        broker.present(&broker.authority.right()).await;
        load::ready(&house).await;
        changes += 1;
        assert_eq!(house.told(&ana).await.len(), changes, "{why}");
    }
    assert!(!house.service.log().contains(PASSWORD), "{}", house.service.log());
}

#[sqlx::test]
async fn a_broker_without_tls_is_refused_where_tls_is_asked_for(db: PgPool) {
    let broker = TlsBroker::borrow().await;
    let url = broker.plain_url.replace("amqp://guest:guest@127.0.0.1", &format!("amqps://known:{PASSWORD}@localhost"));
    let asking = [("AMQP_URL", url.as_str()), ("AMQP_CA_FILE", broker.authority.trusted())];
    let house = House::at(db, &broker.plain_url, &asking).await;
    load::degraded_by(&house, "cannot be reached over TLS").await;
    // Nor is what it does not know believed because nobody said whom to trust.
    let house = House::at(house.db.clone(), &broker.plain_url, &[("AMQP_URL", &broker.url)]).await;
    load::degraded_by(&house, "UnknownIssuer").await;
}

#[sqlx::test]
async fn the_management_api_is_asked_over_tls(db: PgPool) {
    let broker = TlsBroker::borrow().await;
    let [url, registry, trust] = broker.settings();
    let management = ("TIDINGS_RABBITMQ_MANAGEMENT_URL", broker.management_url.as_str());
    let house = House::at(db, &broker.plain_url, &[url, registry, trust, management]).await;
    eventually("the listener's queue, which nobody registered", async || {
        let listing = house.page("/v1/subscriptions").await.ok().body;
        if listing["unregistered"][0]["queue"] == house.audit.queue { Ok(()) } else { Err(listing) }
    })
    .await;
    let (stranger, why) = broker.authority.wrong().into_iter().next().unwrap();
    broker.present(&stranger).await;
    let mut doubtful = House::at(house.db.clone(), &broker.plain_url, &[url, registry, trust, management]).await;
    eventually("a warning instead of its figures", async || {
        assert_eq!(doubtful.page("/v1/subscriptions").await.ok().body["unregistered"], json!(null));
        let log = doubtful.service.log();
        if log.contains("management API does not answer") && log.contains(why) { Ok(()) } else { Err(log) }
    })
    .await;
    doubtful.service.kill().await;
    assert!(!doubtful.service.log().contains(PASSWORD), "{}", doubtful.service.log());
}

/// A database server of the test's own; what it shows is chosen by the test.
struct TlsPostgres {
    authority: Authority,
    admin: PgPool,
    database: String,
    /// Between the service and it.
    line: Proxy,
    _turn: MutexGuard<'static, ()>,
}

impl TlsPostgres {
    async fn borrow() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let started = dev(&["database", "start", "tls"]).await.unwrap();
        let url = started.trim().strip_prefix("DATABASE_URL=").unwrap();
        let admin = PgPool::connect(url).await.unwrap();
        let database = format!("test_{}", Uuid::new_v4().simple());
        run(&admin, &format!("create database {database}")).await;
        let line = proxy_before(url).await;
        let postgres = Self { authority: Authority::new(), admin, database, line, _turn: turn };
        postgres.present(&postgres.authority.right()).await;
        postgres
    }

    fn url(&self, parameters: &str) -> String {
        format!("postgres://postgres:{PASSWORD}@localhost:{}/{}{parameters}", self.line.address().port(), self.database)
    }

    /// As it should be.
    fn verified(&self) -> String {
        self.url(&format!("?sslmode=verify-full&sslrootcert={}", self.authority.trusted()))
    }

    async fn present(&self, presented: &Presented) {
        // Written by the server itself, which reads only a key that is its own.
        for (text, name) in [(&presented.certificate, "server.crt"), (&presented.key, "server.key")] {
            let lines: Vec<String> = text.lines().map(|line| format!("('{line}')")).collect();
            let copy = format!("copy (values {}) to program 'umask 077; cat > {name}'", lines.join(", "));
            run(&self.admin, &copy).await;
        }
        self.tls("on").await;
    }

    async fn tls(&self, on: &str) {
        run(&self.admin, &format!("alter system set ssl = {on}")).await;
        run(&self.admin, "select pg_reload_conf()").await;
        self.line.cut();
    }

    /// A pool of the test's own, past the line.
    async fn pool(&self) -> PgPool {
        let options = (*self.admin.connect_options()).clone().database(&self.database);
        PgPoolOptions::new().max_connections(2).connect_with(options).await.unwrap()
    }
}

async fn run(db: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(db).await.unwrap();
}

/// Runs `tidings migrate` until it ends as it should; what it said.
async fn migrate(url: &str, succeeds: bool, says: &str) {
    eventually(&format!("a migration that says {says:?}"), async || {
        let began = Instant::now();
        let done = tidings(&["migrate"], &[("DATABASE_URL".to_owned(), url.to_owned())]).output().await.unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!said.contains(PASSWORD) && began.elapsed() < AT_ONCE, "{said} {:?}", began.elapsed());
        // The server takes a moment to read its settings anew.
        if done.status.success() == succeeds && said.contains(says) { Ok(()) } else { Err(said) }
    })
    .await;
}

#[tokio::test]
async fn a_database_is_believed_by_its_certificate_alone() {
    let postgres = TlsPostgres::borrow().await;
    let url = postgres.verified();
    migrate(&url, true, "up to date").await;
    let house = House::with(postgres.pool().await, &[("DATABASE_URL", &url)]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let encrypted = "select bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid) where application_name like 'tidings%'";
    assert_eq!(sqlx::query_scalar(encrypted).fetch_one(&house.db).await.ok(), Some(Some(true)));
    let mut changes = 1;
    for (wrong, why) in postgres.authority.wrong() {
        postgres.present(&wrong).await;
        migrate(&url, false, why).await;
        // Whoever came back between the old certificate and the new one comes again.
        postgres.line.cut();
        unready_by(&house, why).await;
        assert_eq!(house.amend(&ana, json!({ "job_title": "Editor" })).await.status, 503, "{why}");
        postgres.present(&postgres.authority.right()).await;
        load::ready(&house).await;
        eventually("a change that is kept", async || {
            match house.amend(&ana, json!({ "job_title": why, "company": changes.to_string() })).await {
                kept if kept.status == 200 => Ok(()),
                other => Err(other),
            }
        })
        .await;
        changes += 1;
        assert_eq!(house.told(&ana).await.len(), changes, "{why}");
    }
    postgres.tls("off").await;
    migrate(&url, false, "does not support TLS").await;
    unready_by(&house, "does not support TLS").await;
    postgres.tls("on").await;
    load::ready(&house).await;
    migrate(&postgres.url("?sslmode=verify-full"), false, "UnknownIssuer").await;
    assert!(!house.service.log().contains(PASSWORD), "{}", house.service.log());
}

async fn unready_by(house: &House, why: &str) {
    eventually(&format!("an instance that is unready by {why:?}"), async || {
        let asked = Instant::now();
        let answer = house.page("/readyz").await;
        assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
        let reason = answer.body["database"].as_str().unwrap_or_default();
        if answer.status == 503 && reason.contains(why) { Ok(()) } else { Err(answer) }
    })
    .await;
}

#[tokio::test]
async fn an_instance_that_starts_before_its_databases_certificate_is_right_waits_and_says_so() {
    let postgres = TlsPostgres::borrow().await;
    let url = postgres.verified();
    migrate(&url, true, "up to date").await;
    let (stranger, why) = postgres.authority.wrong().into_iter().next().unwrap();
    postgres.present(&stranger).await;
    migrate(&url, false, why).await;
    let settings =
        [("DATABASE_URL", url.as_str()), ("AMQP_URL", "amqp://127.0.0.1:1"), ("TIDINGS_LISTEN", "127.0.0.1:0")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut starting = tidings(&["serve"], &settings).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(starting.stderr.take().unwrap()).lines();
    while let Some(line) = log.next_line().await.unwrap() {
        assert!(!line.contains(PASSWORD), "{line}");
        if line.contains("waiting for the database") && line.contains(why) {
            break;
        }
    }
    postgres.present(&postgres.authority.right()).await;
    let mut out = BufReader::new(starting.stdout.take().unwrap()).lines();
    let ready = tokio::time::timeout(PATIENCE, out.next_line()).await.unwrap().unwrap().unwrap_or_default();
    assert!(ready.starts_with("tidings ready on"), "{ready:?}");
    starting.kill().await.unwrap();
}

struct Reader(mpsc::UnboundedSender<Latest>);

impl Handler for Reader {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        // The test may be over.
        let _ = self.0.send(news.latest().await?);
        Ok(())
    }
}

#[sqlx::test]
async fn a_consumer_verifies_the_broker_and_the_owner(db: PgPool) {
    let broker = TlsBroker::borrow().await;
    let house = House::at(db, &broker.plain_url, &broker.settings()).await;
    let trust = Trust::in_file(&broker.authority.file).unwrap();
    let https = terminate(&broker.authority.right(), &house.service.url).await;
    let owner = owner(https).trusting(&trust).unwrap();
    let mut subscription = Subscription::new(format!("{}.tls", house.exchange).parse().unwrap());
    subscription.keys.insert("#".parse().unwrap());
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    let consumer = Consumer::new(&broker.url, source, subscription, owner).unwrap().trusting(trust.clone());
    let ((heard, mut hears), stop) = (mpsc::unbounded_channel(), CancellationToken::new());
    broker.present(&broker.authority.wrong()[0].0).await;
    let running = tokio::spawn(consumer.run(Reader(heard), stop.clone()));
    load::degraded_by(&house, "UnknownIssuer").await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    broker.present(&broker.authority.right()).await;
    load::ready(&house).await;
    // The creation is told before the consumer is bound, or after; what is told from now on is heard.
    let queue = format!("{}.tls", house.exchange);
    eventually("the consumer's queue", async || {
        let listed = broker.ctl(&["-q", "list_consumers", "queue_name"]).await.unwrap();
        if listed.lines().any(|line| line == queue) { Ok(()) } else { Err(listed) }
    })
    .await;
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    let second = async {
        while let Some(latest) = hears.recv().await {
            if latest.version() == 2 {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, second).await.unwrap();
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[sqlx::test]
async fn an_owner_is_believed_by_its_certificate_alone(db: PgPool) {
    let (house, authority) = (House::open(db).await, Authority::new());
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let trust = Trust::in_file(&authority.file).unwrap();
    let right = terminate(&authority.right(), &house.service.url).await;
    let fetched = owner(right).trusting(&trust).unwrap().latest(ana, 1).await;
    assert_eq!(fetched.unwrap().version(), 1);
    for (wrong, why) in authority.wrong() {
        let port = terminate(&wrong, &house.service.url).await;
        let refused = owner(port).trusting(&trust).unwrap().latest(ana, 1).await;
        assert!(matches!(refused, Err(FetchError::Unavailable(_))), "{why}: {refused:?}");
    }
    let untrusted = owner(right).latest(ana, 1).await;
    assert!(matches!(untrusted, Err(FetchError::Unavailable(_))), "{untrusted:?}");
}

#[sqlx::test]
async fn an_import_goes_through_tls(db: PgPool) {
    let (house, authority) = (House::open(db).await, Authority::new());
    let url = format!("https://localhost:{}", terminate(&authority.right(), &house.service.url).await);
    let lines = file("{\"profile\":{\"first_name\":\"Ana\"}}\n");
    let settings =
        [("TIDINGS_URL", url.as_str()), ("TIDINGS_API_KEY", key()), ("TIDINGS_CA_FILE", authority.trusted())];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let done = tidings(&["import", lines.to_str().unwrap()], &settings).output().await.unwrap();
    assert!(done.status.success(), "{done:?}");
    let users = house.page("/v1/users").await.ok().body;
    assert_eq!(users["users"][0]["profile"], json!({ "first_name": "Ana" }), "{users}");
}

fn owner(port: u16) -> Owner {
    owner_at(&format!("https://localhost:{port}")).patience(Duration::from_secs(1))
}
