//! Hardship: the database is away, a row is held by somebody else, clients hang up. Who can be served is served, and nothing is
//! half done.

use std::{collections::HashMap, time::Duration};

use futures_util::{
    StreamExt,
    future::{join, join_all},
    stream,
};
use reqwest::Method;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Row};
use tidings::{
    clients::{NewClient, Scope},
    db::Db,
};
use tidings_sdk::envelope::Event;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, database_url, eventually, http_with, new_client},
    hurt::HurtPostgres,
    limits::under_way,
    sessions,
};

/// Which refusal it was, if it was one that a client may repeat.
fn not_now(answer: &Answer) -> &str {
    assert_eq!(answer.headers["retry-after"], "1", "{answer:?}");
    answer.refusal(503)
}

/// The first change after the sessions broke finds out; from then on it is known that nothing was sent.
async fn no_change_is_taken(house: &House) {
    let created = [house.create(json!({})).await, house.create(json!({})).await];
    assert_eq!(created.each_ref().map(not_now), ["outcome_unknown", "database_unavailable"]);
}

#[sqlx::test]
async fn without_its_database_the_service_says_so_and_recovers(db: PgPool) {
    // Without keys: who asks is known for a second longer than the database, and would be refused first.
    let house = House::with(db, &[("TIDINGS_INSECURE_NO_AUTH", "true")]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    // What is confirmed and not deleted yet would be told once more.
    house.settle().await;
    house.postgres.down();
    assert_eq!(not_now(&house.get(&ana).await), "database_unavailable");
    assert_eq!(not_now(&house.amend(&ana, json!({ "city": "Oslo" })).await), "database_unavailable");
    assert_eq!(not_now(&house.delete(&ana).await), "database_unavailable");
    assert_eq!(not_now(&house.page("/v1/users").await), "database_unavailable");
    no_change_is_taken(&house).await;

    house.postgres.up();
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    assert_eq!(house.get(&ana).await.body["profile"], json!({ "city": "Bern" }));
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
    let page = house.page("/v1/users").await.ok();
    assert_eq!(page.body["users"].as_array().unwrap().len(), 1);
    assert_eq!(house.audit.heard().len(), 2, "nobody is told of what was refused");
}

/// The database commits and its answer is lost: the client hears that the outcome is unknown, and the change is told.
#[sqlx::test]
async fn a_change_whose_answer_is_lost_is_told_nevertheless(db: PgPool) {
    let house = House::open(db).await;
    house.user(json!({})).await;
    house.settle().await;
    house.postgres.hold_answers();
    assert_eq!(not_now(&house.create(json!({ "city": "Riga" })).await), "outcome_unknown");
    house.postgres.up();
    house.settle().await;
    let page = house.page("/v1/users").await.ok();
    assert_eq!(page.body["users"][1]["profile"], json!({ "city": "Riga" }));
    assert_eq!(house.told(&page.body["users"][1]["id"].as_str().unwrap().parse().unwrap()).await, ["user.created"]);
}

#[sqlx::test]
async fn a_row_held_by_somebody_fails_its_own_change_and_no_other(db: PgPool) {
    let house = House::open(db).await;
    let mut users = vec![];
    for _ in 0..20 {
        users.push(house.user(json!({})).await);
    }
    let holder = sessions::hold(&house.db, &users[7]).await;
    let answers = join_all(users.iter().map(|user| house.amend(user, json!({ "city": "Riga" })))).await;
    for (user, answer) in users.iter().zip(&answers) {
        if *user == users[7] {
            assert_eq!(not_now(answer), "database_unavailable");
        } else {
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    }
    assert_eq!(house.get(&users[7]).await.version(), 1, "who only reads is served");
    holder.close().await.unwrap();
    house.amend(&users[7], json!({ "nickname": "A" })).await.ok();
    assert_eq!(house.told(&users[7]).await, ["user.created", "profile.updated[nickname]"]);
    assert_eq!(house.told(&users[6]).await, ["user.created", "profile.updated[city]"]);
}

/// The next change would find the session ended by the server, which does not wait long for the end of a transaction.
#[sqlx::test]
async fn a_refused_deletion_leaves_no_transaction_open(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let holder = sessions::hold(&house.db, &ana).await;
    assert_eq!(not_now(&house.delete(&ana).await), "database_unavailable");
    assert_eq!(sessions::states(&house.db, "tidings writer").await, ["idle"]);
    holder.close().await.unwrap();
}

/// As a provider does it whose disk is nearly full.
#[sqlx::test]
async fn a_database_that_was_read_only_for_a_while_is_written_to_again(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_INSECURE_NO_AUTH", "true")]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    // What was told and is not struck off yet would be told again.
    house.settle().await;
    sessions::are_read_only(&house.db, true).await;
    no_change_is_taken(&house).await;
    assert_eq!(house.get(&ana).await.version(), 1, "who only reads is served");
    sessions::are_read_only(&house.db, false).await;
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
}

/// As it is set for a load and forgotten, or on the server that takes over.
#[sqlx::test]
async fn a_database_that_comes_to_forget_what_it_acknowledges_is_written_to_no_more(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_INSECURE_NO_AUTH", "true")]).await;
    house.user(json!({})).await;
    sessions::begin_with(&house.db, "synchronous_commit", false).await;
    sessions::terminate(&house.db, "tidings%").await;
    no_change_is_taken(&house).await;
    house.logs(&["the database has synchronous_commit off"]).await;
    sessions::begin_with(&house.db, "synchronous_commit", true).await;
    house.create(json!({})).await.ok();
}

/// As a database administrator sets it for sessions that somebody forgot.
#[sqlx::test]
async fn a_session_rests_for_as_long_as_nobody_asks(db: PgPool) {
    let database = db.connect_options().get_database().unwrap().to_owned();
    let alter = format!("alter database \"{database}\" set idle_session_timeout = '500ms'");
    sqlx::raw_sql(AssertSqlSafe(alter)).execute(&db).await.unwrap();
    let house = House::open(db).await;
    house.user(json!({})).await;
    for session in ["tidings writer", "tidings relay settler", "tidings listener"] {
        sessions::silent(&house.db, session).await;
    }
    house.user(json!({})).await;
}

/// As the database's restart does, or somebody who ends sessions that he does not know: who reads is not told of it.
#[sqlx::test]
async fn a_read_outlives_its_session(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    house.get(&ana).await.ok();
    assert_eq!(sessions::terminate(&house.db, "tidings reader").await, 1);
    house.get(&ana).await.ok();
}

/// As a BEGIN leaves it that was given up: what the next one does would be undone with it, though it was answered.
#[sqlx::test]
async fn a_session_in_a_transaction_is_lent_to_nobody(db: PgPool) {
    let pool = Db::new(&database_url(&db).into()).unwrap().pool("test", 1, []);
    let session = "select pg_backend_pid(), now() = statement_timestamp(), current_setting('tcp_keepalives_idle')";
    let look = async || {
        let row = sqlx::raw_sql(session).fetch_one(&pool).await.unwrap();
        (row.get::<i32, _>(0), row.get::<bool, _>(1), row.get::<&str, _>(2).to_owned())
    };
    let (first, is_free, alive) = look().await;
    assert!(is_free);
    assert_eq!(alive, "60", "no firewall forgets it meanwhile");
    assert_eq!(look().await.0, first, "one in order is lent again");
    sqlx::raw_sql("begin").execute(&pool).await.unwrap();
    let (second, is_free, _) = look().await;
    assert!(is_free && second != first);
}

/// In a failover the address may still lead to the server that led before, which now follows another: what it answers is old.
#[tokio::test]
async fn a_standby_is_not_taken_for_the_database() {
    let server = HurtPostgres::borrow().await;
    let house = House::with(server.database().await, &[("TIDINGS_INSECURE_NO_AUTH", "true")]).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    house.settle().await;
    server.follow().await;
    assert_eq!(not_now(&house.get(&ana).await), "database_unavailable");
    assert_eq!(not_now(&house.page("/v1/users").await), "database_unavailable");
    assert_eq!(house.page("/readyz").await.status, 503);
    no_change_is_taken(&house).await;
    server.lead().await;
    house.amend(&ana, json!({ "city": "Bern" })).await.ok();
    assert_eq!(house.get(&ana).await.version(), 2);
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
}

/// The server waits for it for ever, whoever has given up, and the change would be kept if the session were ended.
#[tokio::test]
async fn commits_that_wait_for_a_lost_standby_do_not_pile_up() {
    let server = HurtPostgres::borrow().await;
    let house = House::open(server.database().await).await;
    let ana = house.user(json!({})).await;
    house.settle().await;
    server.await_standby(true).await;
    assert_eq!(not_now(&house.create(json!({ "city": "Riga" })).await), "outcome_unknown");
    for _ in 0..3 {
        assert_eq!(not_now(&house.create(json!({ "city": "Oslo" })).await), "database_unavailable");
    }
    // Those that were refused end a moment after they hung up.
    eventually("no session but the one that waits", async || {
        match sessions::processes(&house.db, "tidings writer").await {
            waiting if waiting.len() == 1 => Ok(()),
            others => Err(others),
        }
    })
    .await;
    assert_eq!(house.get(&ana).await.version(), 1, "who only reads is served");
    server.await_standby(false).await;
    house.user(json!({ "city": "Bern" })).await;
    let users = house.page("/v1/users").await.ok();
    let cities: Vec<_> = users.body["users"].as_array().unwrap().iter().map(|user| &user["profile"]["city"]).collect();
    assert_eq!(cities, [&json!(null), &json!("Riga"), &json!("Bern")]);
}

/// A session that lets nobody change a user, whichever, until it is closed.
async fn hold_all(db: &PgPool) -> PgConnection {
    let mut session = PgConnection::connect_with(&db.connect_options()).await.unwrap();
    sqlx::raw_sql("begin; lock table users in share mode").execute(&mut session).await.unwrap();
    session
}

/// What everybody waits for is not waited for by one after the other, and who was told that nothing was changed finds it so.
#[sqlx::test]
async fn where_nobody_can_be_changed_everybody_hears_so_in_good_time(db: PgPool) {
    let house = House::open(db).await;
    let holder = hold_all(&house.db).await;
    let began = Instant::now();
    let answers = join_all((0..40).map(|_| house.create(json!({ "city": "Riga" })))).await;
    let took = began.elapsed();
    assert!(answers.iter().all(|answer| not_now(answer) == "database_unavailable"), "{answers:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    holder.close().await.unwrap();
    // Behind everything that may still be written.
    house.user(json!({ "city": "Oslo" })).await;
    let users = house.page("/v1/users").await.ok();
    assert_eq!(users.body["users"].as_array().unwrap().len(), 1, "{users:?}");
}

#[sqlx::test]
async fn who_leaves_before_his_turn_has_changed_nothing(db: PgPool) {
    let house = House::open(db).await;
    let holder = hold_all(&house.db).await;
    // Together, and then each for itself, they hold up the writer for seconds.
    let first = join_all((0..3).map(|_| house.create(json!({ "city": "Riga" }))));
    let second = async {
        under_way(&house, 3.0).await;
        sessions::blocked(&house.db, "tidings writer").await;
        let mut line = TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.unwrap();
        let body = r#"{"profile":{"city":"Oslo"}}"#;
        let headers = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        line.write_all((house.head("POST /v1/users", &headers) + body).as_bytes()).await.unwrap();
        under_way(&house, 4.0).await;
        drop(line);
        under_way(&house, 3.0).await;
        holder.close().await.unwrap();
    };
    join(first, second).await;
    // Behind him in the line.
    house.user(json!({ "city": "Bern" })).await;
    let users = house.page("/v1/users").await.ok();
    let cities: Vec<_> = users.body["users"].as_array().unwrap().iter().map(|user| &user["profile"]["city"]).collect();
    assert!(cities.contains(&&json!("Bern")) && !cities.contains(&&json!("Oslo")), "{cities:?}");
}

/// Waits until a session of the service waits for a lock.
async fn stuck(db: &PgPool) {
    let waiting =
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    eventually("a statement that waits for a lock", async || {
        match sqlx::query_scalar::<_, i64>(waiting).fetch_one(db).await.unwrap() {
            0 => Err(0),
            _ => Ok(()),
        }
    })
    .await;
}

/// While the writer is held up, changes of one user pile up and are written together: each must still meet its own condition.
#[sqlx::test]
async fn of_many_who_wait_with_the_same_condition_one_wins(db: PgPool) {
    let house = House::open(db).await;
    let (ana, eve) = (house.user(json!({})).await, house.user(json!({})).await);
    let holder = sessions::hold(&house.db, &eve).await;
    let held_up = house.amend(&eve, json!({ "city": "Bern" }));
    let contest = async {
        stuck(&house.db).await;
        let amend = async |n: i32| {
            let request = house.patch(&ana, json!({ "city": n.to_string() })).header("if-match", "\"1\"");
            Answer::to(request).await
        };
        join_all((0..20).map(amend)).await
    };
    let (held_up, answers) = join(held_up, contest).await;
    assert_eq!(not_now(&held_up), "database_unavailable");
    holder.close().await.unwrap();
    let (won, lost): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert_eq!((won.len(), lost.len()), (1, 19));
    assert!(lost.iter().all(|answer| answer.refusal(412) == "version_mismatch"));
    assert_eq!(house.get(&ana).await.body, won[0].body);
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
}

/// Sends the first `share` percent of a patch, waits, and hangs up.
async fn hang_up(address: &str, user: &Uuid, n: u64) {
    // Spread over all combinations of how much is sent and when the line goes dead, the same in every run.
    let (share, pause_ms) = (n * 37 % 150, n * 23 % 61);
    let body = json!({ "profile": { "social": { format!("k{n}"): n } } }).to_string();
    let request = format!(
        "PATCH /v1/users/{user} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/merge-patch+json\r\nContent-Length: {}\r\n\r\n{body}",
        house::key(),
        body.len()
    );
    // A third sends it whole.
    let sent = request.len() * share.min(100) as usize / 100;
    let mut line = TcpStream::connect(address).await.unwrap();
    line.write_all(&request.as_bytes()[..sent]).await.unwrap();
    if n.is_multiple_of(10) && share >= 100 {
        // These hang up while the answer comes in, however slow the machine is.
        let _ = line.read_u8().await;
    }
    sleep(Duration::from_millis(pause_ms)).await;
}

#[sqlx::test]
async fn clients_that_hang_up_leave_nothing_half_done(db: PgPool) {
    let house = House::open(db).await;
    let mut users = vec![];
    for _ in 0..20 {
        users.push(house.user(json!({ "social": {} })).await);
    }
    let address = house.service.url.strip_prefix("http://").unwrap();
    let dropped = (0..1000_u64).map(|n| hang_up(address, &users[n as usize % users.len()], n));
    stream::iter(dropped).buffer_unordered(64).collect::<()>().await;
    // Behind everything that is still under way for its user.
    for user in &users {
        house.amend(user, json!({ "city": "Riga" })).await.ok();
    }
    eventually("as many events as versions", async || {
        house.settle().await;
        let mut told: HashMap<Uuid, i64> = HashMap::new();
        for notice in house.audit.heard() {
            assert!(notice.event == Event::Created || notice.version > 1);
            *told.entry(notice.user_id).or_default() += 1;
        }
        let kept: Vec<(Uuid, i64)> =
            sqlx::query_as("select id, version from users").fetch_all(&house.db).await.unwrap();
        let kept: HashMap<Uuid, i64> = kept.into_iter().collect();
        if told == kept { Ok(()) } else { Err((told, kept)) }
    })
    .await;
    let told = house.audit.heard().len();
    assert!((60..1000).contains(&told), "{told} events: some went through, and some did not");
    let open: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'",
    )
    .fetch_one(&house.db)
    .await
    .unwrap();
    assert_eq!(open, 0, "sessions that idle in a transaction");
    // Each user's profile has exactly the keys of the changes that were told.
    for user in &users {
        let last = house.get(user).await;
        let keys = last.body["profile"]["social"].as_object().unwrap().len() as i64;
        assert_eq!(last.version(), keys + 2, "{last:?}");
    }
}

/// Asks this 300 times, and hangs up after a few milliseconds.
async fn ask_and_hang_up(house: &House, request: &str) {
    let address = house.service.url.strip_prefix("http://").unwrap();
    let asked = (0..300_u64).map(async |n| {
        let mut line = TcpStream::connect(address).await.unwrap();
        line.write_all(request.as_bytes()).await.unwrap();
        sleep(Duration::from_millis(n * 7 % 11)).await;
    });
    stream::iter(asked).buffer_unordered(32).collect::<()>().await;
}

/// Readers that hang up must not take the small pool of the slow queries down with them.
#[sqlx::test]
async fn readers_that_hang_up_do_not_starve_the_others(db: PgPool) {
    let house = House::open(db).await;
    house.user(json!({})).await;
    let both = house.head("GET /v1/users", "") + "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n";
    ask_and_hang_up(&house, &both).await;
    let other = NewClient::named("other", [Scope::ReadUsers]).unwrap();
    let other = http_with(&new_client(&house.db, other).await);
    let page = Answer::to(other.get(format!("{}/v1/users", house.service.url))).await.ok();
    assert_eq!(page.body["users"].as_array().unwrap().len(), 1);
}

/// A session that lets nobody read a user, whichever, until it is closed.
async fn hide_all(db: &PgPool) -> PgConnection {
    let mut session = PgConnection::connect_with(&db.connect_options()).await.unwrap();
    sqlx::raw_sql("begin; lock table users in access exclusive mode").execute(&mut session).await.unwrap();
    session
}

/// What they asked for goes on at the database: their turns are not given to the next ones meanwhile.
#[sqlx::test]
async fn readers_that_hang_up_pile_up_no_queries(db: PgPool) {
    let house = House::open(db).await;
    house.user(json!({})).await;
    let holder = hide_all(&house.db).await;
    ask_and_hang_up(&house, &house.head("GET /v1/users", "")).await;
    let ready = house.page("/readyz").await;
    assert_eq!(ready.status, 200, "{ready:?}");
    holder.close().await.unwrap();
    assert_eq!(house.page("/v1/users").await.ok().body["users"].as_array().unwrap().len(), 1);
}

/// Whoever asks for many users and hangs up is not read for: the statements for all of them would take a second each.
#[sqlx::test]
async fn who_hung_up_is_not_read_for(db: PgPool) {
    let house = House::open(db).await;
    let holder = hide_all(&house.db).await;
    let ids: Vec<Uuid> = (0..500).map(|_| Uuid::new_v4()).collect();
    let body = json!({ "ids": ids }).to_string();
    let headers = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    // All that fit into the queue.
    for _ in 0..8 {
        let mut line = TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.unwrap();
        line.write_all((house.head("POST /v1/users:batchGet", &headers) + &body).as_bytes()).await.unwrap();
        under_way(&house, 1.0).await;
        drop(line);
        under_way(&house, 0.0).await;
    }
    let began = Instant::now();
    let read = house.request(Method::POST, "/v1/users:batchGet").json(&json!({ "ids": [ids[0]] }));
    assert_eq!(not_now(&Answer::to(read).await), "database_unavailable");
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    holder.close().await.unwrap();
}

#[sqlx::test]
async fn a_broker_lost_with_messages_under_way_does_not_take_the_service_along(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    house.settle().await;
    // Published, and the confirm is on its way when the line is cut.
    house.broker.hold_answers();
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    eventually("the message to arrive", async || {
        house.audit.catch_up().await;
        let heard = house.audit.heard().len();
        if heard == 2 { Ok(()) } else { Err(heard) }
    })
    .await;
    assert_eq!(house.pending().await, 1, "not confirmed, so it is still owed");
    house.broker.down();
    eventually("the relay to notice", async || match house.metric("tidings_broker_connected").await {
        0.0 => Ok(()),
        connected => Err(connected),
    })
    .await;
    house.broker.up();
    house.settle().await;
    house.amend(&ana, json!({ "city": "Oslo" })).await.ok();
    let told = house.told(&ana).await;
    // At least once: what was not confirmed was told again.
    assert_eq!(told, ["user.created", "profile.updated[city]", "profile.updated[city]", "profile.updated[city]"]);
}
