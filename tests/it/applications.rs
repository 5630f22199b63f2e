//! Applications: the examples do what they say, as programs of their own, each with a database of its own.

use std::{
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
};

use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, PgConnection, PgPool, Row};
use tidings_sdk::{
    envelope::{Event, Notice},
    topology::{self, RETRY_DELAYS},
};
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, collect, database_url, eventually},
    load::{self, Load},
    sdk::notice,
    sdk_faults::curse_before,
};

/// An application of this House: its name there, and its database.
pub struct App {
    example: &'static str,
    pub subscription: String,
    pub database_url: String,
    amqp_url: String,
    settings: Vec<(&'static str, String)>,
}

/// A process of an application that listens.
pub struct Listening {
    pub process: Child,
    pub log: Arc<Mutex<String>>,
}

impl App {
    pub async fn of(house: &House, example: &'static str) -> Self {
        Self::keeping_at(house, example, &database_url(&house.db)).await
    }

    /// With its database on the server of this one.
    pub async fn keeping_at(house: &House, example: &'static str, database_url: &str) -> Self {
        let subscription = format!("{}.{example}", house.exchange);
        let (server, _) = database_url.rsplit_once('/').unwrap();
        let name = format!("app_{}", Uuid::new_v4().simple());
        let database_url = format!("{server}/{name}");
        administer(server, &format!("create database \"{name}\"")).await;
        let amqp_url = house.audit.amqp_url.clone();
        let settings = vec![
            ("AMQP_URL", amqp_url.clone()),
            ("APP_DATABASE_URL", database_url.clone()),
            ("TIDINGS_EXCHANGE", house.exchange.clone()),
            ("TIDINGS_SUBSCRIPTION", subscription.clone()),
            ("TIDINGS_API_KEY", house::key().to_owned()),
            ("TIDINGS_URL", house.service.url.clone()),
        ];
        Self { example, subscription, database_url, amqp_url, settings }
    }

    /// The same application at another exchange.
    pub fn at(mut self, exchange: &str) -> Self {
        self.settings.push(("TIDINGS_EXCHANGE", exchange.to_owned()));
        self
    }

    /// The same application with another way to the owner.
    fn asking(mut self, url: &str) -> Self {
        self.settings.push(("TIDINGS_URL", url.to_owned()));
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let built = PathBuf::from(env!("CARGO_BIN_EXE_tidings")).with_file_name("examples").join(self.example);
        assert!(built.exists(), "{} is not built: cargo build --examples", built.display());
        let mut command = Command::new(built);
        command.args(arguments).envs(self.settings.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs a command of it to its end; what it printed, or else what it complained of.
    pub async fn ask(&self, arguments: &[&str]) -> Result<String, String> {
        let done = self.command(arguments).output().await.unwrap();
        let (said, talk) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        if done.status.success() { Ok(said.trim().to_owned()) } else { Err(talk.into_owned()) }
    }

    /// Starts it, and waits until it consumes from its queue.
    pub async fn run(&self, arguments: &[&str]) -> Listening {
        let mut process = self.command(&[&["run"], arguments].concat()).spawn().unwrap();
        let log = Arc::<Mutex<String>>::default();
        collect(process.stderr.take().unwrap(), log.clone());
        collect(process.stdout.take().unwrap(), log.clone());
        eventually("the application to listen", async || match self.depth().await {
            Some(depth) if depth.consumers == 1 => Ok(()),
            other => Err((other, log.lock().unwrap().clone())),
        })
        .await;
        Listening { process, log }
    }

    /// What its queue holds, if it has one.
    pub async fn depth(&self) -> Option<topology::Depth> {
        let connection = house::connect(&self.amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        topology::depth(&channel, &self.subscription).await.ok()
    }

    /// Puts a message into its queue that the owner never told.
    async fn forge(&self, notice: &Notice) {
        let connection = house::connect(&self.amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(Default::default()).await.unwrap();
        let ((properties, body), queue) = (notice.to_message("urn:test"), self.subscription.as_str().into());
        let sent = channel.basic_publish("".into(), queue, Default::default(), &body, properties);
        assert!(sent.await.unwrap().await.unwrap().is_ack());
    }

    pub async fn database(&self) -> PgPool {
        PgPool::connect(&self.database_url).await.unwrap()
    }

    /// Takes its queues and its database away.
    pub async fn end(self) {
        let connection = house::connect(&self.amqp_url).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        topology::delete(&channel, &self.subscription.parse().unwrap(), &RETRY_DELAYS).await.unwrap();
        let (server, name) = self.database_url.rsplit_once('/').unwrap();
        administer(server, &format!("drop database \"{name}\" with (force)")).await;
    }
}

async fn administer(server: &str, sql: &str) {
    let mut admin = PgConnection::connect(&format!("{server}/postgres")).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut admin).await.unwrap();
}

impl Listening {
    pub async fn signal(&self, signal: &str) {
        let pid = self.process.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    /// Asks it to leave, which it must do well.
    pub async fn leave(mut self) {
        self.signal("-TERM").await;
        let left =
            tokio::time::timeout(house::PATIENCE, self.process.wait()).await.expect("it does not leave").unwrap();
        assert!(left.success(), "{left}: {}", self.log.lock().unwrap());
    }
}

#[sqlx::test]
async fn orders_of_a_deleted_person_are_cancelled_and_no_others(db: PgPool) {
    let house = House::open(db).await;
    let orders = App::of(&house, "orders").await;
    let [ana, bo, eve] = [house.user(json!({})).await, house.user(json!({})).await, house.user(json!({})).await];
    // The id of nobody holds up nothing.
    let mistyped = Uuid::new_v4();
    for (person, item) in [(mistyped, "lamp"), (ana, "teapot"), (bo, "kettle"), (eve, "cup")] {
        orders.ask(&["place", &person.to_string(), item]).await.unwrap();
    }
    let listening = orders.run(&[]).await;
    house.delete(&ana).await.ok();
    let states = async |expected: &str| {
        eventually("the orders", async || {
            let list = orders.ask(&["list"]).await.unwrap();
            let states: Vec<&str> = list.lines().map(|line| line.split('\t').nth(2).unwrap()).collect();
            if states.join(" ") == expected { Ok(()) } else { Err(list) }
        })
        .await;
    };
    states("pending cancelled pending pending").await;
    let refused = orders.ask(&["place", &ana.to_string(), "spoon"]).await.unwrap_err();
    assert!(refused.contains("gone"), "{refused}");

    // Who is deleted while nobody listens is heard of afterwards.
    listening.leave().await;
    house.delete(&bo).await.ok();
    let listening = orders.run(&[]).await;
    states("pending cancelled cancelled pending").await;
    listening.leave().await;
    orders.end().await;
}

/// An order that is cancelled stays so, and whoever is struck from a list: not by a message's word, but by the owner's.
#[sqlx::test]
async fn a_forged_deletion_cancels_no_order_and_strikes_nobody_from_a_list(db: PgPool) {
    let house = House::open(db).await;
    let [ana, bo] = [house.user(json!({})).await, house.user(json!({})).await];
    let (orders, events) = (App::of(&house, "orders").await, App::of(&house, "events").await);
    for person in [ana, bo] {
        orders.ask(&["place", &person.to_string(), "lamp"]).await.unwrap();
    }
    let listening = [orders.run(&[]).await, events.run(&["--listen", "127.0.0.1:0"]).await];
    let store = events.database().await;
    for person in [ana, bo] {
        sqlx::query("insert into attendees values ('gala', $1)").bind(person).execute(&store).await.unwrap();
    }
    for application in [&orders, &events] {
        application.forge(&notice(ana, 1, Event::Deleted)).await;
    }
    // Theirs comes after hers.
    house.delete(&bo).await.ok();
    let attending = async || -> Vec<Uuid> {
        sqlx::query_scalar("select person from attendees order by person").fetch_all(&store).await.unwrap()
    };
    eventually("the one who is gone to be forgotten by both", async || {
        let (list, left) = (orders.ask(&["list"]).await.unwrap(), attending().await);
        if list.contains("\tcancelled\t") && !left.contains(&bo) { Ok(()) } else { Err((list, left)) }
    })
    .await;
    // Who leaves well has finished what he began.
    for application in listening {
        application.leave().await;
    }
    for application in [&orders, &events] {
        assert_eq!(application.depth().await.unwrap().ready, 0, "it was handled");
    }
    assert_eq!(attending().await, [ana]);
    let list = orders.ask(&["list"]).await.unwrap();
    assert!(list.contains(&format!("{ana}\tpending")) && list.contains(&format!("{bo}\tcancelled")), "{list}");
    orders.ask(&["place", &ana.to_string(), "spoon"]).await.unwrap();
    store.close().await;
    orders.end().await;
    events.end().await;
}

/// Nor does one whom the owner cannot show keep an application from listening, when it looks for what it missed.
#[sqlx::test]
async fn one_whom_the_owner_cannot_show_keeps_no_application_from_listening(db: PgPool) {
    let house = House::open(db).await;
    let [cursed, ana] = [house.user(json!({})).await, house.user(json!({})).await];
    let stand_in = curse_before(&house.service.url, &Arc::new(Mutex::new(Some(cursed)))).await;
    let orders = App::of(&house, "orders").await.asking(&stand_in);
    for person in [cursed, ana] {
        orders.ask(&["place", &person.to_string(), "lamp"]).await.unwrap();
    }
    house.delete(&ana).await.ok();
    let listening = orders.run(&[]).await;
    let list = orders.ask(&["list"]).await.unwrap();
    assert!(list.contains("\tpending\t") && list.contains("\tcancelled\t"), "{list}");
    listening.leave().await;
    let events = App::of(&house, "events").await.asking(&stand_in);
    let store = events.database().await;
    sqlx::raw_sql("create table attendees (event text, person uuid, primary key (event, person))")
        .execute(&store)
        .await
        .unwrap();
    for person in [cursed, ana] {
        sqlx::query("insert into attendees values ('gala', $1)").bind(person).execute(&store).await.unwrap();
    }
    let listening = events.run(&["--listen", "127.0.0.1:0"]).await;
    let left: Vec<Uuid> = sqlx::query_scalar("select person from attendees").fetch_all(&store).await.unwrap();
    assert_eq!(left, [cursed], "who is gone attends nothing");
    listening.leave().await;
    store.close().await;
    orders.end().await;
    events.end().await;
}

#[sqlx::test]
async fn an_attendee_list_shows_names_as_they_are_now(db: PgPool) {
    let house = House::open(db).await;
    let events = App::of(&house, "events").await;
    let ana = house.user(json!({ "first_name": "Ana", "job_title": "Author" })).await;
    let listening = events.run(&["--listen", "127.0.0.1:0"]).await;
    let log = listening.log.lock().unwrap().clone();
    let url = log.lines().find_map(|line| line.strip_prefix("events ready on ")).unwrap().to_owned();
    let http = reqwest::Client::new();
    let attended = http.put(format!("{url}/events/gala/attendees/{ana}")).send().await.unwrap();
    assert_eq!(attended.status(), 204);
    let stranger = http.put(format!("{url}/events/gala/attendees/{}", Uuid::new_v4())).send().await.unwrap();
    assert_eq!(stranger.status(), 404);
    let shows = async |expected: serde_json::Value| {
        eventually("the list", async || {
            let list = http.get(format!("{url}/events/gala/attendees")).send().await.unwrap();
            let list: serde_json::Value = list.json().await.unwrap();
            if list == expected { Ok(()) } else { Err(list) }
        })
        .await;
    };
    shows(json!([{ "name": "Ana", "job_title": "Author" }])).await;
    // Nobody is woken for a field that is not shown; what is shown is fetched anew.
    house.amend(&ana, json!({ "phone": "1234" })).await.ok();
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    shows(json!([{ "name": "Ana", "job_title": "Editor" }])).await;
    house.delete(&ana).await.ok();
    shows(json!([])).await;
    listening.leave().await;
    events.end().await;
}

/// What it would go on showing might be old.
#[sqlx::test]
async fn an_application_that_cannot_begin_to_listen_does_not_serve_either(db: PgPool) {
    let house = House::open(db).await;
    let mut events = App::of(&house, "events").await;
    events.settings.push(("TIDINGS_API_KEY", format!("{}x", house::key())));
    let leaving = tokio::time::timeout(house::PATIENCE, events.ask(&["run", "--listen", "127.0.0.1:0"]));
    let complaint = leaving.await.expect("it does not leave").unwrap_err();
    assert!(complaint.contains("the owner answers 401"), "{complaint}");
    events.end().await;
}

/// Waits until a mirror holds what the owner has, deletions included.
pub async fn is_level(house: &House, mirror: &PgPool) {
    eventually("the mirror to be equal to its owner", async || {
        let (theirs, ours) = (rows(&house.db, "users").await, rows(mirror, "tidings_users").await);
        let differing = theirs.iter().filter(|row| !ours.contains(row)).count();
        if theirs == ours {
            Ok(())
        } else {
            Err(format!("{differing} of {} differ, {} here", theirs.len(), ours.len()))
        }
    })
    .await;
}

async fn rows(db: &PgPool, table: &str) -> Vec<(Uuid, i64, Option<serde_json::Value>)> {
    let all = format!("select id, version, profile::jsonb as profile from {table} order by id");
    let rows = sqlx::query(sqlx::AssertSqlSafe(all)).fetch_all(db).await.unwrap();
    rows.iter().map(|row| (row.get("id"), row.get("version"), row.get("profile"))).collect()
}

#[sqlx::test]
async fn a_mirror_that_joins_under_load_has_everybody_and_misses_nothing(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 60).await;
    house.delete(&users[0]).await.ok();
    let load = Load::on(&house, &users[1..], 4);
    load.goes_on(100).await;
    let crm = App::of(&house, "crm").await;
    let listening = crm.run(&[]).await;
    load.goes_on(200).await;
    load.end_well().await;
    let newcomer = house.user(json!({ "city": "Riga" })).await;
    let mirror = crm.database().await;
    is_level(&house, &mirror).await;
    assert_eq!(crm.ask(&["find", "city=Riga"]).await.unwrap(), format!("{newcomer}\t1"));
    assert_eq!(crm.ask(&["verify"]).await.unwrap(), "0 missing, 0 stale, 0 ghosts");
    listening.leave().await;
    mirror.close().await;
    crm.end().await;
}

/// A transaction that is open anywhere in the cluster holds the feed back, and keeps nobody from listening. Whoever was told before the
/// application had a queue comes when the transaction ends.
#[sqlx::test]
async fn a_mirror_that_joins_while_the_feed_is_held_back_misses_nobody(db: PgPool) {
    let house = House::open(db).await;
    let crm = App::of(&house, "crm").await;
    let mut open = house.db.begin().await.unwrap();
    sqlx::query("select pg_current_xact_id()").execute(&mut *open).await.unwrap();
    let early = house.user(json!({ "city": "Riga" })).await;
    house.settle().await;
    let listening = crm.run(&[]).await;
    let late = house.user(json!({ "city": "Oslo" })).await;
    let finds = async |city: &str, user: Uuid| {
        eventually("the user in the mirror", async || {
            let found = crm.ask(&["find", &format!("city={city}")]).await.unwrap();
            if found == format!("{user}\t1") { Ok(()) } else { Err(found) }
        })
        .await;
    };
    finds("Oslo", late).await;
    assert_eq!(crm.ask(&["find", "city=Riga"]).await.unwrap(), "", "the feed is held back");
    open.commit().await.unwrap();
    finds("Riga", early).await;
    listening.leave().await;
    crm.end().await;
}

#[sqlx::test]
async fn a_mirror_finds_and_mends_what_was_falsified(db: PgPool) {
    let house = House::open(db).await;
    load::users(&house, 50).await;
    let crm = App::of(&house, "crm").await;
    crm.run(&[]).await.leave().await;
    let mirror = crm.database().await;
    is_level(&house, &mirror).await;
    let falsify = "
        delete from tidings_users where id in (select id from tidings_users order by id limit 3);
        update tidings_users set version = version + 7 where id in (select id from tidings_users order by id desc limit 2);
        update tidings_users set version = 0 where id in (select id from tidings_users order by id limit 1);
        insert into tidings_users values (gen_random_uuid(), 1, '{}');
    ";
    sqlx::raw_sql(falsify).execute(&mirror).await.unwrap();
    assert_eq!(crm.ask(&["verify", "--repair"]).await.unwrap(), "3 missing, 3 stale, 1 ghosts");
    assert_eq!(crm.ask(&["verify"]).await.unwrap(), "0 missing, 0 stale, 0 ghosts");
    is_level(&house, &mirror).await;
    mirror.close().await;
    crm.end().await;
}

/// Invoices joins while the others run: registered, it misses nothing; a backfill tells it of those who were there before.
#[sqlx::test]
async fn an_application_that_joins_under_load_has_everybody_without_a_change_to_anything(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 50).await;
    house.delete(&users[0]).await.ok();
    // Not those who are amended and deleted here.
    let load = Load::on(&house, &users[3..], 4);
    load.goes_on(50).await;
    let invoices = App::of(&house, "invoices").await;
    let fields = ["address", "city", "postcode", "country"];
    let wish = json!({ "routing_keys": ["user.created", "user.deleted"], "fields": fields,
                       "owner": "team-invoices", "purpose": "addresses on invoices" });
    let path = format!("/v1/subscriptions/{}", invoices.subscription);
    Answer::to(house.request(Method::PUT, &path).json(&wish)).await.ok();
    let newcomer = house.user(json!({ "city": "Riga" })).await;
    let listening = invoices.run(&[]).await;
    let backfill = house.request(Method::POST, &format!("{path}/backfill")).json(&json!({ "users": "all" }));
    Answer::to(backfill).await.ok();
    load.goes_on(50).await;
    house.amend(&users[1], json!({ "city": "Oslo" })).await.ok();
    house.delete(&users[2]).await.ok();
    load.end_well().await;
    let store = invoices.database().await;
    let known = "select id, address->>'city' from debtors where address is not null order by id";
    eventually("everybody who lives, where they live now", async || {
        let known: Vec<(Uuid, Option<String>)> = sqlx::query_as(known).fetch_all(&store).await.unwrap();
        let living = "select id, profile->>'city' from users where deleted_at is null order by id";
        let living: Vec<(Uuid, Option<String>)> = sqlx::query_as(living).fetch_all(&house.db).await.unwrap();
        if known == living { Ok(()) } else { Err((known.len(), living.len())) }
    })
    .await;
    let issued = invoices.ask(&["issue", &newcomer.to_string(), "4900"]).await.unwrap();
    assert!(issued.starts_with("invoice"), "{issued}");
    assert!(invoices.ask(&["issue", &users[2].to_string(), "4900"]).await.is_err(), "nobody bills the dead");
    listening.leave().await;
    store.close().await;
    Answer::to(house.request(Method::DELETE, &format!("{path}?waiting=discard"))).await.ok();
    invoices.end().await;
}

/// After a restore of the owner people live where it says, whatever was known of later versions.
#[sqlx::test]
async fn an_application_that_is_told_anew_by_a_restored_owner_believes_it(db: PgPool) {
    let house = House::open(db).await;
    let invoices = App::of(&house, "invoices").await;
    let wish = json!({ "routing_keys": ["user.created", "user.deleted"], "fields": ["city"],
                       "owner": "team-invoices", "purpose": "addresses on invoices" });
    let path = format!("/v1/subscriptions/{}", invoices.subscription);
    Answer::to(house.request(Method::PUT, &path).json(&wish)).await.ok();
    let listening = invoices.run(&[]).await;
    let store = invoices.database().await;
    let lives = async |city: &str, version: i64| {
        eventually("the address", async || {
            let known: Vec<(String, i64)> =
                sqlx::query_as("select address->>'city', version from debtors").fetch_all(&store).await.unwrap();
            if known == [(city.to_owned(), version)] { Ok(()) } else { Err(known) }
        })
        .await;
    };
    let ana = house.user(json!({ "city": "Riga" })).await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    lives("Oslo", 2).await;
    let restore = r#"update users set version = 1, profile = '{"city":"Riga"}' where id = $1"#;
    sqlx::query(restore).bind(ana).execute(&house.db).await.unwrap();
    Answer::to(house.request(Method::POST, &format!("{path}/backfill")).json(&json!({ "users": "all" }))).await.ok();
    lives("Riga", 1).await;
    listening.leave().await;
    store.close().await;
    Answer::to(house.request(Method::DELETE, &format!("{path}?waiting=discard"))).await.ok();
    invoices.end().await;
}

/// The example that compares a mirror with a log says so when they agree, and when they do not.
#[sqlx::test]
async fn a_replayed_log_and_an_independent_mirror_agree(db: PgPool) {
    let house = House::open(db).await;
    let replay = App::of(&house, "replay").await;
    let log = house::file(concat!(
        r#"{"op":"create","key":"A1","profile":{"first_name":"Ana","job_title":"Author"}}"#,
        "\n",
        r#"{"op":"create","key":"B2","profile":{"first_name":"Bo"}}"#,
        "\n",
        r#"{"op":"update","key":"A1","patch":{"job_title":"Editor"}}"#,
        "\n",
        r#"{"op":"delete","key":"B2"}"#,
        "\n"
    ));
    let log = log.to_str().unwrap();
    let said = replay.ask(&[log]).await.unwrap();
    assert!(said.contains("equal: 1 living users field by field, 1 deleted ones"), "{said}");
    let refused = replay.ask(&[log, "--lose", "A1", "--patience-s", "2"]).await.unwrap_err();
    assert!(refused.contains("A1: not in the mirror"), "{refused}");
    replay.end().await;
}
