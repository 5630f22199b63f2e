//! Rights: the service under test has the roles and users of deploy/, and no others; and these hold what they promise.

use std::{collections::HashSet, path::Path, sync::LazyLock};

use lapin::options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use reqwest::{Client, Method};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tokio::{
    process::Command,
    sync::{Mutex, OnceCell},
};
use uuid::Uuid;

use crate::{
    house::{Answer, House, Service, connect, database_url, env, eventually, file, tidings},
    load,
    sdk::{Curse, Listener, notice, subscription},
    subscribed::Subscribed,
};
use tidings_sdk::{
    consumer::Consumer,
    envelope::Event,
    topology::{self, RETRY_DELAYS, Source},
};

const ROLES: &str = include_str!("../../deploy/postgres-roles.sql");
const GRANTS: &str = include_str!("../../deploy/postgres-grants.sql");
/// The roles of tests stand beside those of a deployment that may be on the same server.
const OURS: &str = "tidings_test_";
/// Of the roles and users of tests, which a server may want.
const PASSWORD: &str = "of-the-tests";
/// Every test has an exchange of such a name.
const EXCHANGES: &str = "test\\.[0-9a-f]{32}";
/// Of the lock under which roles are made: two at a time would be in each other's way. "roles" in ASCII.
const MAKING_ROLES: i64 = 0x72_6f_6c_65_73;

/// Gives the roles what they need in a test's database.
pub async fn grant(db: &PgPool) {
    grant_as(db, GRANTS).await;
}

/// The same as another version's `deploy/postgres-grants.sql` has it.
pub async fn grant_as(db: &PgPool, grants: &str) {
    make_roles(db).await;
    // The tests' own user has migrated; in a deployment the owner does.
    let hand_over = "
        do $$
        declare name text;
        begin
          for name in select tablename from pg_tables where schemaname = 'public' and tableowner <> 'tidings_owner' loop
            execute format('alter table public.%I owner to tidings_owner', name);
          end loop;
        end
        $$;
    ";
    sqlx::raw_sql(ours(&format!("{hand_over}{grants}"))).execute(db).await.unwrap();
}

fn ours(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql.replace("tidings_", OURS))
}

/// Once for each server.
async fn make_roles(db: &PgPool) {
    static MADE: LazyLock<Mutex<HashSet<(String, u16)>>> = LazyLock::new(Mutex::default);
    let options = db.connect_options();
    let mut made = MADE.lock().await;
    let server = (options.get_host().to_owned(), options.get_port());
    if made.contains(&server) {
        return;
    }
    // Such a lock holds within one database, so all meet in the same.
    let mut session = PgConnection::connect_with(&(*options).clone().database("postgres")).await.unwrap();
    sqlx::query("select pg_advisory_lock($1)").bind(MAKING_ROLES).execute(&mut session).await.unwrap();
    let roles = sqlx::raw_sql(ours(ROLES)).execute(&mut session).await;
    roles.expect("DATABASE_URL is that of a superuser: the tests make roles");
    for role in ["owner", "api", "relay", "serve"] {
        let password = format!("alter role {OURS}{role} password '{PASSWORD}'");
        sqlx::raw_sql(AssertSqlSafe(password)).execute(&mut session).await.unwrap();
    }
    session.close().await.unwrap();
    made.insert(server);
}

/// A URL with this user in place of its own.
pub fn as_user(url: &str, user: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap();
    let server = rest.rsplit_once('@').map_or(rest, |(_, server)| server);
    format!("{scheme}://{user}:{PASSWORD}@{server}")
}

/// The database's URL as the role of `tidings serve`.
pub fn as_serve(url: &str) -> String {
    as_user(url, &format!("{OURS}serve"))
}

/// The role of this command, where the URL is that of one of ours.
pub fn as_command(url: &str, command: &[&str]) -> String {
    let role = match command {
        ["migrate" | "client", ..] => "owner",
        ["relay", ..] => "relay",
        ["subscription", ..] => "api",
        ["serve", rest @ ..] if rest.contains(&"--no-relay") => "api",
        _ => "serve",
    };
    url.replace(&format!("{OURS}serve:"), &format!("{OURS}{role}:"))
}

/// The settings of a service at this broker: who publishes, and who does all else.
pub fn at_broker(amqp_url: &str) -> [(&'static str, String); 2] {
    [
        ("AMQP_URL", as_user(amqp_url, "tidings-test-relay")),
        ("AMQP_REGISTRY_URL", as_user(amqp_url, "tidings-test-registry")),
    ]
}

/// Makes the two users at the broker of all tests, once.
pub async fn make_users() {
    static MADE: OnceCell<()> = OnceCell::const_new();
    let make = async || {
        for role in ["relay", "registry"] {
            make_user(&format!("tidings-test-{role}"), &[role]).await;
        }
    };
    MADE.get_or_init(make).await;
}

/// Makes a user at the broker of all tests, with these rights, such as `consumer orders`.
pub async fn make_user(name: &str, of: &[&str]) {
    let api = env("TIDINGS_RABBITMQ_MANAGEMENT_URL");
    let given = rights(of).await;
    let [configure, write, read] = given.lines().collect::<Vec<_>>().try_into().unwrap();
    let user = json!({ "password": PASSWORD, "tags": "" });
    let permissions = json!({ "configure": configure, "write": write, "read": read });
    for (path, body) in [(format!("users/{name}"), user), (format!("permissions/%2f/{name}"), permissions)] {
        let put = Client::new().put(format!("{api}/api/{path}")).json(&body);
        put.send().await.unwrap().error_for_status().unwrap();
    }
}

pub async fn unmake(what: &str, name: &str) {
    let url = format!("{}/api/{what}/{name}", env("TIDINGS_RABBITMQ_MANAGEMENT_URL"));
    Client::new().delete(url).send().await.unwrap().error_for_status().unwrap();
}

/// Makes them at a broker of ours, by the commands of a deployment.
pub async fn make_users_at(name: &str) {
    for role in ["relay", "registry"] {
        user_of(name, "/", &[role, &format!("tidings-test-{role}")], &format!("{PASSWORD}\n")).await;
    }
}

/// Makes one user there.
async fn user_of(broker: &str, vhost: &str, arguments: &[&str], password_file: &str) {
    let ctl = format!("{} broker ctl {broker}", Path::new(env!("CARGO_MANIFEST_DIR")).join("dev").display());
    let mut command = script();
    command.args(arguments).envs([("RABBITMQCTL", ctl.as_str()), ("VHOST", vhost)]).stdin(std::process::Stdio::piped());
    let mut making = command.spawn().unwrap();
    let mut password = making.stdin.take().unwrap();
    // One that is there already keeps its password, and does not read.
    drop(tokio::io::AsyncWriteExt::write_all(&mut password, password_file.as_bytes()).await);
    drop(password);
    assert!(making.wait().await.unwrap().success());
}

/// A password file may end without a line end, and a virtual host is made for who wants one of his own.
#[tokio::test]
async fn a_user_of_a_virtual_host_that_is_not_there_yet_may_begin_at_once() {
    let name = format!("tidings-test-{}", Uuid::new_v4().simple());
    user_of("main", &name, &["relay", &name], PASSWORD).await;
    let url = env("AMQP_URL");
    let (_, server) = url.split_once('@').unwrap();
    let server = server.split('/').next().unwrap();
    let connected = connect(&format!("amqp://{name}:{PASSWORD}@{server}/{name}")).await;
    unmake("vhosts", &name).await;
    unmake("users", &name).await;
    connected.unwrap();
}

#[sqlx::test]
async fn the_monitors_user_hears_the_figures_alone_and_as_another_role_nothing(db: PgPool) {
    let user = format!("tidings-test-{}", Uuid::new_v4().simple());
    user_of("main", "/", &["monitor", &user], PASSWORD).await;
    let api = as_user(&env("TIDINGS_RABBITMQ_MANAGEMENT_URL"), &user);
    let house = House::with(db, &[("TIDINGS_RABBITMQ_MANAGEMENT_URL", &api)]).await;
    let orders = Subscribed::to(&house, "orders", &["user.deleted"], &[]).await;
    eventually("all queues, and what is bound to the exchange", async || {
        let listing = house.page("/v1/subscriptions").await.ok().body;
        if listing["unregistered"][0]["queue"] == house.audit.queue { Ok(()) } else { Err(listing) }
    })
    .await;
    eventually("one queue", async || {
        let seen = house.page(&format!("/v1/subscriptions/{}", orders.name)).await.ok().body;
        if seen["queue"]["unacknowledged"] == 0 { Ok(()) } else { Err(seen) }
    })
    .await;
    let asked = async |what: &str| Client::new().get(format!("{api}/api/{what}")).send().await.unwrap().status();
    assert_eq!([asked("whoami").await, asked("nodes").await], [200, 401]);
    user_of("main", "/", &["consumer", &user, orders.name.as_str()], "").await;
    assert_eq!(asked("whoami").await, 401);
    orders.end().await;
    unmake("users", &user).await;
}

/// At a broker of very many users and virtual hosts, the first ones of which are looked for: nobody stops to read there.
#[tokio::test]
async fn who_is_among_many_users_is_found() {
    let ctl = r#"case "$2" in
        list_users | list_vhosts) echo ana && seq 100000 ;;
        set_permissions | set_user_tags) ;;
        *) exit 1 ;;
    esac"#;
    let ctl = format!("bash {}", file(ctl).display());
    let mut command = script();
    command.args(["relay", "ana"]).envs([("RABBITMQCTL", ctl.as_str()), ("VHOST", "ana")]);
    let given = command.stdin(std::process::Stdio::null()).output().await.unwrap();
    assert!(given.status.success(), "{given:?}");
}

async fn rights(of: &[&str]) -> String {
    let printed = script().arg("rights").args(of).output().await.unwrap();
    String::from_utf8(printed.stdout).unwrap()
}

fn script() -> Command {
    let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/rabbitmq-users.sh"));
    script.env("EXCHANGE_PATTERN", EXCHANGES);
    script
}

#[sqlx::test]
async fn every_table_has_its_line(db: PgPool) {
    let tables: Vec<String> = sqlx::query_scalar("select tablename::text from pg_tables where schemaname = 'public'")
        .fetch_all(&db)
        .await
        .unwrap();
    assert!(tables.len() >= 9, "{tables:?}");
    for table in tables.iter().filter(|table| *table != "_sqlx_migrations") {
        assert!(GRANTS.contains(&format!(" on {table} to ")), "deploy/postgres-grants.sql has no line for {table}");
    }
}

#[sqlx::test]
async fn no_role_may_more_than_it_needs(db: PgPool) {
    grant(&db).await;
    let refused = [
        ("relay", "select profile from users"),
        ("relay", "select * from users"),
        ("relay", "update users set version = 1"),
        ("relay", "insert into outbox (message_id) values (gen_random_uuid())"),
        ("relay", "select * from client_keys"),
        ("relay", "select * from clients"),
        ("relay", "select * from changes"),
        ("relay", "select user_id from deletion_receipts"),
        ("relay", "delete from deletion_receipts"),
        ("relay", "update subscriptions set client = null"),
        ("relay", "update subscriptions set routing_keys = '{#}'"),
        ("api", "delete from users"),
        ("api", "delete from outbox"),
        ("api", "update outbox set version = 1"),
        ("api", "insert into client_keys (id) values ('x')"),
        ("api", "update client_keys set sha256 = ''"),
        ("api", "update clients set scopes = '{admin}'"),
        ("api", "insert into dead_letters (subscription) values ('x')"),
        ("serve", "insert into client_keys (id) values ('x')"),
        ("serve", "delete from users"),
        ("serve", "create table mine (x int)"),
        ("api", "create temporary table users (x int)"),
        ("serve", "select * from _sqlx_migrations"),
        ("owner", "create role more"),
    ];
    for (role, sql) in refused {
        let mut session = session(&db, role).await;
        let error = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut session).await.unwrap_err();
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
        assert_eq!(code, "42501", "{role}: {sql}: {error}");
    }
    for (role, sql) in [("relay", "select id, version from users"), ("api", "select profile from users")] {
        let mut session = session(&db, role).await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut session).await.unwrap();
    }
}

/// A session of the test's own as one of the roles.
pub async fn session(db: &PgPool, role: &str) -> PgConnection {
    PgConnection::connect(&as_user(&database_url(db), &format!("{OURS}{role}"))).await.unwrap()
}

/// From an empty database to a served one, as docs/deploy.md has it: nothing is done by a superuser but roles and grants.
#[sqlx::test(migrations = false)]
async fn the_owner_migrates_and_the_others_serve(db: PgPool) {
    grant(&db).await;
    let url = ("DATABASE_URL".to_owned(), as_serve(&database_url(&db)));
    let migrated = tidings(&["migrate"], std::slice::from_ref(&url)).output().await.unwrap();
    assert!(migrated.status.success(), "{migrated:?}");
    let api = ("DATABASE_URL".to_owned(), as_user(&database_url(&db), &format!("{OURS}api")));
    let others = [("AMQP_URL", env("AMQP_URL")), ("TIDINGS_LISTEN", "127.0.0.1:0".to_owned())];
    let others = others.map(|(name, value)| (name.to_owned(), value));
    for (command, url) in [("serve", url), ("migrate", api)] {
        let refused = tidings(&[command], &[&[url][..], &others].concat()).output().await.unwrap();
        let why = String::from_utf8_lossy(&refused.stderr);
        let hint = "permission denied for schema public (SQLSTATE 42501)\nhint: `tidings migrate` is for tidings_owner";
        assert!(refused.status.code() == Some(1) && why.contains(hint), "{command}: {why}");
    }
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

/// It is up to date: another migration would not help.
#[sqlx::test]
async fn a_command_as_the_wrong_role_says_which_is_the_right_one(db: PgPool) {
    grant(&db).await;
    let commands: [(&str, &[&str]); 5] = [
        ("api", &["client", "create", "orders", "--scope", "admin"]),
        ("api", &["client", "revoke", "orders"]),
        ("relay", &["client", "list"]),
        ("relay", &["deletions", "overdue"]),
        ("relay", &["subscription", "recovered", "orders"]),
    ];
    for (role, command) in commands {
        let url = as_user(&database_url(&db), &format!("{OURS}{role}"));
        let refused = tidings(command, &[("DATABASE_URL".to_owned(), url)]).output().await.unwrap();
        let why = String::from_utf8_lossy(&refused.stderr);
        let hint = "(SQLSTATE 42501)\nhint: this role may not: `tidings client` is for tidings_owner";
        assert!(refused.status.code() == Some(1) && why.contains(hint), "{command:?}: {why}");
    }
}

#[sqlx::test]
async fn the_relay_alone_tells_as_its_own_role(db: PgPool) {
    let mut house = House::open(db).await;
    house.service.kill().await;
    let api = house.another(&["serve", "--no-relay"]).await;
    let relay = house.another(&["relay"]).await;
    house.service = api;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);
    let roles: Vec<String> = sqlx::query_scalar(
        "select distinct usename::text from pg_stat_activity where datname = current_database() and application_name like 'tidings%' order by 1",
    )
    .fetch_all(&house.db)
    .await
    .unwrap();
    assert_eq!(roles, [format!("{OURS}api"), format!("{OURS}relay")]);
    for service in [&house.service, &relay] {
        assert!(!service.log().contains("the database has"), "the roles keep values out of the log: {}", service.log());
    }
}

/// Whoever watches asks for what is owed before it lets one go, and takes its dead letters with it.
#[sqlx::test]
async fn the_relay_alone_watches_and_lets_expire_as_its_own_role(db: PgPool) {
    let mut house = House::with(db, &[("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "1s")]).await;
    let path = format!("/v1/subscriptions/{}", subscription(&house).name);
    let wish = json!({ "routing_keys": ["user.deleted"], "owner": "a-team", "purpose": "a test" });
    Answer::to(house.request(Method::PUT, &path).json(&wish)).await.ok();
    house.service.kill().await;
    let api = house.another(&["serve", "--no-relay"]).await;
    let relay = house.another(&["relay"]).await;
    house.service = api;
    let letter = "
        insert into dead_letters (subscription, message_id, reason, attempts, redriven, size_bytes)
        select name, gen_random_uuid(), 'malformed', 1, 0, 0 from subscriptions
    ";
    sqlx::query(letter).execute(&house.db).await.unwrap();
    sqlx::query("update subscriptions set expires_after_s = 2").execute(&house.db).await.unwrap();
    eventually("it to expire", async || {
        let seen = house.page(&path).await;
        if seen.status == 404 { Ok(()) } else { Err((seen.status, relay.log())) }
    })
    .await;
    eventually("the watch to go on", async || {
        let metrics = reqwest::get(format!("{}/metrics", relay.url)).await.unwrap().text().await.unwrap();
        if metrics.contains("\ntidings_subscriptions_watching 1\n") { Ok(()) } else { Err(metrics) }
    })
    .await;
    assert!(!relay.log().contains("begins anew"), "{}", relay.log());
}

#[sqlx::test]
async fn a_server_that_would_log_values_is_told_of_at_start(db: PgPool) {
    let options = "?options=-c%20log_statement%3Dall%20-c%20log_parameter_max_length_on_error%3D-1";
    let settings = [
        ("DATABASE_URL", format!("{}{options}", database_url(&db))),
        ("AMQP_URL", env("AMQP_URL")),
        ("TIDINGS_LISTEN", "127.0.0.1:0".to_owned()),
    ];
    let service = Service::start(&["serve"], &settings.map(|(name, value)| (name.to_owned(), value))).await;
    for line in ["the database has log_statement = all", "the database has log_parameter_max_length_on_error = -1"] {
        eventually("a line in the log", async || {
            let log = service.log();
            if log.lines().filter(|told| told.contains(line)).count() == 1 { Ok(()) } else { Err(log) }
        })
        .await;
    }
}

#[sqlx::test]
async fn names_mean_our_tables_whatever_the_url_says(db: PgPool) {
    let elsewhere = format!("{}?options=-csearch_path%3Delsewhere", as_serve(&database_url(&db)));
    let house = House::with(db, &[("DATABASE_URL", &elsewhere)]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn the_relays_user_can_publish_to_the_exchange_and_nothing_else(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let [(_, relay), (_, registry)] = at_broker(&env("AMQP_URL"));
    assert!(publishes(&relay, &house.exchange).await);
    assert!(!publishes(&relay, "").await, "past the exchange, to a queue");
    assert!(!publishes(&registry, &house.exchange).await, "as if it were news");
    let channel = connect(&relay).await.unwrap().create_channel().await.unwrap();
    assert!(channel.basic_get(house.audit.queue.as_str().into(), BasicGetOptions::default()).await.is_err());
    let channel = connect(&relay).await.unwrap().create_channel().await.unwrap();
    let queue = format!("{}.mine", house.exchange);
    assert!(
        channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::default(), Default::default()).await.is_err()
    );
}

/// What an application of `role` does with its subscription: what comes is handled, what fails is tried again or set aside.
async fn lives_with_its_rights(
    house: &House,
    role: &str,
    set: impl FnOnce(Consumer) -> Consumer,
) -> (Listener, String) {
    let name = subscription(house).name;
    let user = format!("tidings-test-{}", name.as_str());
    make_user(&user, &[role, name.as_str()]).await;
    let url = as_user(&env("AMQP_URL"), &user);
    let listener = Listener::with(house, &url, set).await;
    let ana = house.user(json!({})).await;
    assert_eq!(listener.called(1).await[0].user, ana);
    let cursed = Uuid::new_v4();
    listener.diary.curse(cursed, Curse::Fails);
    listener.tell(&notice(cursed, 1, Event::Created)).await;

    assert!(!publishes(&url, &house.exchange).await, "as if it were news");
    assert!(!publishes(&url, "").await, "to another's queue");
    let channel = connect(&url).await.unwrap().create_channel().await.unwrap();
    assert!(channel.basic_get(house.audit.queue.as_str().into(), BasicGetOptions::default()).await.is_err());
    (listener, user)
}

#[sqlx::test]
async fn an_application_that_declares_its_queue_needs_no_more_than_its_users_rights(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let (listener, user) = lives_with_its_rights(&house, "declaring-consumer", |consumer| consumer).await;
    listener.dead_letter().await;
    listener.end().await;
    unmake("users", &user).await;
}

#[sqlx::test]
async fn an_application_that_is_registered_needs_no_more_than_its_users_rights(db: PgPool) {
    let house = House::open(db).await;
    load::ready(&house).await;
    let subscription = subscription(&house);
    let admin = connect(&env("AMQP_URL")).await.unwrap();
    let channel = admin.create_channel().await.unwrap();
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    topology::declare(&channel, &source, &subscription, &RETRY_DELAYS).await.unwrap();
    let (listener, user) = lives_with_its_rights(&house, "consumer", Consumer::registered).await;
    let retries = subscription.name.retry_queue(RETRY_DELAYS[0]);
    eventually("what failed to wait for its next attempt", async || match listener.depth(&retries).await {
        Some(depth) if depth.ready == 1 => Ok(()),
        other => Err(other),
    })
    .await;
    listener.end().await;
    topology::delete(&channel, &subscription.name, &RETRY_DELAYS).await.unwrap();
    unmake("users", &user).await;
}

async fn publishes(url: &str, exchange: &str) -> bool {
    let connection = connect(url).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    // To nobody: a mark that no listener is bound for is no news.
    let sent = channel.basic_publish(
        exchange.into(),
        Uuid::new_v4().to_string().as_str().into(),
        BasicPublishOptions::default(),
        b"",
        lapin::BasicProperties::default().with_type("mark".into()),
    );
    match sent.await {
        Ok(confirm) => confirm.await.is_ok_and(|confirmation| confirmation.is_ack()),
        Err(_) => false,
    }
}
