//! Limits: clients who take more than their share, on purpose or not. They are turned away in words, and the others are served.

use std::{pin::pin, time::Duration};

use futures_util::{
    StreamExt,
    future::{Either, join_all, join3, select},
    stream::FuturesUnordered,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool};
use tidings::clients::{NewClient, Scope};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};
use uuid::Uuid;

use crate::{
    house::{Answer, House, PATIENCE, eventually, http_with, key, new_client},
    sessions,
    subscribed::Subscribed,
};

/// A connection whose every byte is ours.
struct Line(TcpStream);

impl Line {
    async fn open(house: &House) -> Self {
        Self(TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.unwrap())
    }

    /// If the service has closed already, its answer tells why.
    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.write_all(bytes.as_ref()).await;
    }

    /// Everything that comes until the service closes.
    async fn rest(&mut self) -> String {
        let mut rest = vec![];
        let ended = timeout(PATIENCE, self.0.read_to_end(&mut rest)).await.expect("the connection stays open");
        // Reset, if there was something that the service did not read.
        drop(ended);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

/// The status and the code of a refusal over the line, which must look like every other.
#[track_caller]
fn refusal(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("no problem: {answer:?}"));
    let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert_eq!(header("content-type"), Some("application/problem+json"), "{answer}");
    assert_eq!(header("x-request-id"), body["request_id"].as_str(), "{answer}");
    assert_eq!(body["status"], status, "{answer}");
    assert_eq!(header("retry-after").is_some(), status == 503, "{answer}");
    (status, body["code"].as_str().unwrap().to_owned())
}

#[sqlx::test]
async fn what_is_no_request_is_refused_like_everything_else(db: PgPool) {
    let house = House::open(db).await;
    let many = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let table = [
        ("nonsense\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /healthz HTTP/3.0\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /healthz\u{7f} HTTP/1.1\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /healthz HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /healthz HTTP/1.1\r\nhost: x\r\nx: \0\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /healthz HTTP/1.1\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET http://x/healthz HTTP/1.1\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /v1/users HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /v1/users HTTP/1.1\r\nhost: a b/c\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /v1/users HTTP/1.1\r\nhost: ana@x\r\n\r\n".to_owned(), 400, "malformed_request"),
        ("GET /v1/users HTTP/1.0\r\nhost: x\r\nhost: x\r\n\r\n".to_owned(), 400, "malformed_request"),
        (format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n"), 431, "headers_too_large"),
        (format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(16 * 1024)), 431, "headers_too_large"),
        (format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(20_000)), 431, "headers_too_large"),
        (format!("GET /?{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "x".repeat(8000)), 414, "uri_too_long"),
    ];
    for (request, status, code) in table {
        let mut line = Line::open(&house).await;
        line.send(&request).await;
        let shown: String = request.chars().take(60).collect();
        assert_eq!(refusal(&line.rest().await), (status, code.to_owned()), "{shown:?}");
    }
    // What is just within the limits is served.
    for request in [
        format!("GET /healthz?{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "x".repeat(7000)),
        format!("GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: {}\r\n\r\n", "x".repeat(16_000)),
        "GET /healthz HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\nhost: [::1]:8080\r\nconnection: close\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.0\r\n\r\n".to_owned(),
    ] {
        let mut line = Line::open(&house).await;
        line.send(&request).await;
        let answer = line.rest().await;
        assert!(answer.starts_with("HTTP/1.") && answer[8..].starts_with(" 200 OK"), "{} bytes", request.len());
    }
}

/// Chunks are taken off; whatever else was done to a body is still done to it.
#[sqlx::test]
async fn a_body_that_was_coded_for_the_way_is_refused(db: PgPool) {
    let house = House::open(db).await;
    for (coding, status) in [("chunked", 201), ("Chunked", 201), ("gzip, chunked", 415)] {
        let head = format!("content-type: application/json\r\nconnection: close\r\ntransfer-encoding: {coding}\r\n");
        let mut line = Line::open(&house).await;
        line.send(house.head("POST /v1/users", &head)).await;
        line.send("e\r\n{\"profile\":{}}\r\n0\r\n\r\n").await;
        let answer = line.rest().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{coding}: {answer}");
    }
}

#[sqlx::test]
async fn who_is_slow_is_let_go(db: PgPool) {
    let house = House::open(db).await;
    let began = Instant::now();
    let took = |within: std::ops::Range<u64>| {
        let took = began.elapsed();
        assert!((within.start..within.end).contains(&took.as_secs()), "{took:?}");
    };
    let headers = async {
        let mut line = Line::open(&house).await;
        line.send("GET /healthz HTTP/1.1\r\nhost: x\r\nx-").await;
        assert_eq!(line.rest().await, "", "nothing was asked");
        took(10..14);
    };
    let body = async {
        let mut line = Line::open(&house).await;
        line.send(house.head("POST /v1/users", "content-type: application/json\r\ncontent-length: 40\r\n")).await;
        line.send("{\"profile\":").await;
        assert_eq!(refusal(&line.rest().await), (408, "body_timeout".to_owned()));
        took(15..19);
    };
    let answers = async {
        let mut line = Line::open(&house).await;
        // Far more than the kernel buffers, asked for by who reads one byte in a while.
        let asked = "GET /openapi.yaml HTTP/1.1\r\nhost: x\r\n\r\n".repeat(300);
        line.send(asked).await;
        eventually("the service to lose patience", async || {
            let _ = timeout(Duration::from_millis(100), line.0.read_u8()).await;
            match house.metric("tidings_connections_ended_total{reason=\"write_deadline\"}").await {
                1.0 => Ok(()),
                ended => Err(ended),
            }
        })
        .await;
        took(30..34);
    };
    join3(headers, body, answers).await;
    assert_eq!(house.metric("tidings_connections_ended_total{reason=\"header_deadline\"}").await, 1.0);
    assert_eq!(house.metric("tidings_requests_under_way").await, 0.0);
}

#[sqlx::test]
async fn connections_that_only_wait_keep_nobody_out(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_MAX_CONNECTIONS", "20")]).await;
    let ana = house.user(json!({})).await;
    let mut held = vec![];
    for n in 0..200 {
        let mut line = Line::open(&house).await;
        match n % 3 {
            0 => {}
            1 => line.send("GET /healthz HTTP/1.1\r\nx").await,
            _ => {
                line.send(house.head("POST /v1/users", "content-type: application/json\r\ncontent-length: 40\r\n"))
                    .await;
                line.send("{").await;
            }
        }
        held.push(line);
    }
    // On a new connection each time. At first the others may be too fresh to be cut.
    eventually("an answer", async || {
        let read = http_with(key()).get(format!("{}/v1/users/{ana}", house.service.url));
        match read.send().await {
            Ok(answer) if answer.status() == StatusCode::OK => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // The house's own connection is as old as any, and may be cut at this moment.
    let client = http_with(key());
    assert!(house.metric_by(&client, "tidings_connections_ended_total{reason=\"room\"}").await >= 1.0);
    let open = house.metric_by(&client, "tidings_connections").await;
    assert!((1.0..=21.0).contains(&open), "{open} of {} are open", held.len());
}

/// Waits until so many requests have a place.
pub async fn under_way(house: &House, count: f64) {
    eventually("requests under way", async || match house.metric("tidings_requests_under_way").await {
        seen if seen == count => Ok(()),
        other => Err(other),
    })
    .await;
}

#[sqlx::test]
async fn a_request_at_work_is_never_cut_for_another(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_MAX_CONNECTIONS", "3")]).await;
    let ana = house.user(json!({})).await;
    let holder = sessions::hold(&house.db, &ana).await;
    let amend = |n: i32| house.amend(&ana, json!({ "city": n.to_string() }));
    let contest = async {
        // One connection is left for these questions, and it is kept.
        under_way(&house, 2.0).await;
        let mut at_work = Line::open(&house).await;
        let refused = eventually("a refusal", async || {
            let mut line = Line::open(&house).await;
            line.send("GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await;
            let mut first = [0; 12];
            match line.0.read_exact(&mut first).await {
                Ok(_) if first == *b"HTTP/1.1 503" => Ok(format!("HTTP/1.1 503{}", line.rest().await)),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        assert_eq!(refusal(&refused), (503, "overloaded".to_owned()));
        let _ = timeout(Duration::from_millis(1), at_work.0.read_u8()).await;
        holder.close().await.unwrap();
    };
    let (first, second, ()) = join3(amend(1), amend(2), contest).await;
    assert_eq!((first.status, second.status), (StatusCode::OK, StatusCode::OK));
    assert!(house.metric("tidings_connections_ended_total{reason=\"full\"}").await >= 1.0);
}

#[sqlx::test]
async fn more_requests_than_places_are_turned_away_at_once(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_MAX_REQUESTS", "2")]).await;
    let ana = house.user(json!({})).await;
    let holder = sessions::hold(&house.db, &ana).await;
    // Who is slow to send its body takes nobody's place.
    let mut slow = vec![];
    for _ in 0..10 {
        let mut line = Line::open(&house).await;
        line.send(house.head("POST /v1/users", "content-type: application/json\r\ncontent-length: 14\r\n")).await;
        slow.push(line);
    }
    under_way(&house, 0.0).await;
    let contest = async {
        under_way(&house, 2.0).await;
        let refused = house.get(&ana).await;
        assert_eq!(refused.refusal(503), "overloaded");
        assert_eq!(refused.headers["retry-after"], "1");
        let answers = join_all(["/healthz", "/readyz", "/metrics"].map(|path| house.page(path))).await;
        assert!(answers.iter().all(|answer| answer.status == StatusCode::OK), "{answers:?}");
        slow[0].send("{\"profile\":{}}").await;
        let mut came_too_late = vec![0; 12];
        slow[0].0.read_exact(&mut came_too_late).await.unwrap();
        assert_eq!(came_too_late, b"HTTP/1.1 503");
        holder.close().await.unwrap();
    };
    let amend = |n: i32| house.amend(&ana, json!({ "city": n.to_string() }));
    let (first, second, ()) = join3(amend(1), amend(2), contest).await;
    assert_eq!((first.status, second.status), (StatusCode::OK, StatusCode::OK));
    assert_eq!(house.metric("tidings_requests_shed_total").await, 2.0);
    under_way(&house, 0.0).await;
    Answer::to(house.request(Method::GET, &format!("/v1/users/{ana}"))).await.ok();
}

#[sqlx::test]
async fn who_asks_for_too_many_long_answers_at_once_is_turned_away(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let batch = house.request(Method::POST, "/v1/users:batchGet").json(&json!({ "ids": [ana] }));
    let pages = ["/v1/users", "/v1/changes", "/v1/digest/0"].map(|path| house.request(Method::GET, path));
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    // One client's line, those whose turn it is, and some more; far fewer than there are places.
    let crowd = 256 + std::thread::available_parallelism().unwrap().get() + 40;
    let mut shed_before = 0.0;
    for request in pages.iter().chain([&batch]) {
        let mut held = holder.begin().await.unwrap();
        sqlx::query("lock table users").execute(&mut *held).await.unwrap();
        let mut answers: FuturesUnordered<_> = (0..crowd).map(|_| Answer::to(request.try_clone().unwrap())).collect();
        let turned_away = loop {
            let answer = answers.next().await.unwrap_or_else(|| panic!("{request:?} finds no end of the line"));
            if answer.refusal(503) == "overloaded" {
                break answer;
            }
        };
        assert_eq!(turned_away.headers["retry-after"], "1");
        assert!(turned_away.body["detail"].as_str().unwrap().contains("long answers"), "{turned_away:?}");
        let shed = house.metric("tidings_requests_shed_total").await;
        assert!(shed > shed_before, "{shed}");
        shed_before = shed;
        assert_eq!(
            house.get(&Uuid::new_v4()).await.refusal(503),
            "database_unavailable",
            "a short one waits in no line"
        );
        drop(answers);
        held.rollback().await.unwrap();
        under_way(&house, 0.0).await;
        Answer::to(request.try_clone().unwrap()).await.ok();
    }
}

/// It keeps the sessions busy that look after subscriptions, and no others; and there its turn ends.
#[sqlx::test]
async fn one_clients_crowd_at_the_registry_holds_up_nobody_else(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let orders = Subscribed::to(&house, "orders", &["#"], &[]).await;
    let other = http_with(&new_client(&house.db, NewClient::named("other", [Scope::Admin]).unwrap()).await);
    let other = |method, path: &str| other.request(method, format!("{}{path}", house.service.url));
    let mut holder = PgConnection::connect_with(&house.db.connect_options()).await.unwrap();
    let mut held = holder.begin().await.unwrap();
    sqlx::query("lock table dead_letters").execute(&mut *held).await.unwrap();
    let letters = orders.path("dead-letters");
    let crowd = join_all((0..100).map(|_| Answer::to(house.request(Method::GET, &letters))));
    let others = async {
        sessions::blocked(&house.db, "tidings records").await;
        let body = json!({ "profile": { "city": "Riga" } }).to_string();
        let amend = other(Method::PATCH, &format!("/v1/users/{ana}")).header("idempotency-key", "once").body(body);
        Answer::to(amend.header("content-type", "application/merge-patch+json")).await.ok();
        Answer::to(other(Method::GET, "/v1/users")).await.ok();
        let backfill = Answer::to(other(Method::GET, &orders.path("backfill"))).await;
        assert_eq!(backfill.refusal(404), "backfill_not_found");
    };
    let Either::Right(((), crowd)) = select(crowd, pin!(others)).await else { panic!("the crowd was not held up") };
    drop(crowd);
    held.rollback().await.unwrap();
    orders.end().await;
}

#[sqlx::test]
async fn only_so_many_large_bodies_of_one_client_come_in_at_once(db: PgPool) {
    let house = House::open(db).await;
    let head = "content-type: application/json\r\ncontent-length: 90000\r\n";
    let mut slow = vec![];
    for _ in 0..17 {
        let mut line = Line::open(&house).await;
        line.send(house.head("POST /v1/users:batchReplace", head)).await;
        slow.push(line);
    }
    eventually("one too many", async || match house.metric("tidings_requests_shed_total").await {
        1.0 => Ok(()),
        other => Err(other),
    })
    .await;
    let ask = async |client: &reqwest::Client, count: usize| {
        let entry = |_| json!({ "id": Uuid::new_v4(), "profile": { "social": { "note": "x".repeat(1000) } } });
        let body = json!({ "users": (0..count).map(entry).collect::<Vec<_>>() });
        Answer::to(client.post(format!("{}/v1/users:batchReplace", house.service.url)).json(&body)).await
    };
    let mut one_more = Line::open(&house).await;
    one_more.send(house.head("POST /v1/users:batchReplace", head)).await;
    assert_eq!(refusal(&one_more.rest().await), (503, "overloaded".to_owned()));
    ask(&http_with(key()), 1).await.ok();
    let other = NewClient::named("other", [Scope::WriteUsers]).unwrap();
    ask(&http_with(&new_client(&house.db, other).await), 100).await.ok();
    drop(slow);
    eventually("room again", async || {
        let mut line = Line::open(&house).await;
        line.send(house.head("POST /v1/users:batchReplace", head)).await;
        let mut body = json!({ "users": [{ "id": Uuid::new_v4(), "profile": {} }] }).to_string().into_bytes();
        body.resize(90_000, b' ');
        line.send(body).await;
        let mut first = [0; 12];
        match line.0.read_exact(&mut first).await {
            Ok(_) if first == *b"HTTP/1.1 200" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

#[sqlx::test]
async fn who_changes_many_in_many_requests_lets_others_go_between(db: PgPool) {
    let house = House::open(db).await;
    let other = NewClient::named("other", [Scope::WriteUsers]).unwrap();
    let (greedy, other) = (http_with(key()), http_with(&new_client(&house.db, other).await));
    let replace = |client: &reqwest::Client| {
        let entry = || json!({ "id": Uuid::new_v4(), "profile": { "first_name": "Ana" } });
        let body = json!({ "users": (0..200).map(|_| entry()).collect::<Vec<_>>() });
        Answer::to(client.post(format!("{}/v1/users:batchReplace", house.service.url)).json(&body))
    };
    // Fewer than there may be large bodies, and far more than are worked on at once.
    let mut answers: FuturesUnordered<_> = (0..24).map(|_| replace(&greedy)).collect();
    answers.next().await.unwrap().ok();
    let mut others = pin!(replace(&other));
    let mut before = 0;
    while let Either::Right((answer, _)) = select(&mut others, answers.next()).await {
        answer.expect("the other one is answered before the last").ok();
        before += 1;
    }
    assert!(before < 12, "{before} were answered before");
}

/// Another client, and its key.
async fn client(house: &House, name: &str, rate: Option<&str>) -> String {
    let rate = rate.map(|rate| rate.parse().unwrap());
    let client = NewClient { rate, ..NewClient::named(name, [Scope::ReadUsers]).unwrap() };
    new_client(&house.db, client).await
}

/// What `RateLimit` says is left, and for how many seconds.
#[track_caller]
fn standing(answer: &Answer) -> (u32, u64) {
    let field = answer.headers["ratelimit"].to_str().unwrap();
    let (left, seconds) = field.strip_prefix("\"client\";r=").unwrap().split_once(";t=").unwrap();
    (left.parse().unwrap(), seconds.parse().unwrap())
}

#[sqlx::test]
async fn a_client_that_asks_too_often_waits_and_the_others_do_not(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_RATE_LIMIT", "1/20")]).await;
    // A request that costs its token, and nothing else that could be slow.
    let url = format!("{}/v1/users/7", house.service.url);
    let (hasty, calm) = (client(&house, "hasty", None).await, client(&house, "calm", Some("500/500")).await);
    let (hasty, calm) = (http_with(&hasty), http_with(&calm));
    // What is refused before it is known who asks costs nothing, and says nothing.
    for (asked, status) in [(hasty.get(format!("{}/v1/nothing", house.service.url)), 404), (hasty.post(&url), 405)] {
        let answer = Answer::to(asked).await;
        assert!(answer.status == status && !answer.headers.contains_key("ratelimit"), "{answer:?}");
    }
    let first = Answer::to(hasty.get(&url)).await;
    assert_eq!(first.refusal(400), "invalid_user_id");
    assert_eq!(first.headers["ratelimit-policy"], "\"client\";q=20;w=20");
    assert_eq!(standing(&first).0, 19);
    let began = Instant::now();
    let answers = join_all((0..60).map(|_| Answer::to(hasty.get(&url)))).await;
    let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 400);
    let came_in = began.elapsed().as_secs() as usize + 1;
    assert!((19..=19 + came_in).contains(&served.len()), "{} served", served.len());
    for answer in &refused {
        assert_eq!(answer.refusal(429), "rate_limited");
        assert_eq!(answer.headers["retry-after"].to_str().unwrap(), standing(answer).1.to_string(), "{answer:?}");
        assert_eq!(standing(answer), (0, 1), "{answer:?}");
    }
    for _ in 0..30 {
        let answer = Answer::to(calm.get(&url)).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert_eq!(answer.headers["ratelimit-policy"], "\"client\";q=500;w=1");
    }
    let counted = house.metric("tidings_requests_rate_limited_total{of=\"client\"}").await;
    assert_eq!(counted, refused.len() as f64);
    // Who waits as long as it is told is served again.
    eventually("to be served again", async || {
        let answer = Answer::to(hasty.get(&url)).await;
        if answer.status == 400 { Ok(()) } else { Err(answer) }
    })
    .await;
}

#[sqlx::test]
async fn a_long_answer_costs_more(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_RATE_LIMIT", "1/100")]).await;
    for n in 0..10 {
        house.user(json!({ "social": { "note": "x".repeat(50_000) }, "nickname": n.to_string() })).await;
    }
    let before = standing(&house.page("/v1/users?limit=1").await.ok()).0;
    let after = standing(&house.page("/v1/users").await.ok()).0;
    // Half a megabyte: the request, and seven more for the answer; a token or two have come in meanwhile.
    assert!((6..=8).contains(&(before - after)), "{before} and then {after}");
}

#[sqlx::test]
async fn off_is_off(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_RATE_LIMIT", "off")]).await;
    let answer = house.page("/v1/users").await.ok();
    assert!(!answer.headers.contains_key("ratelimit") && !answer.headers.contains_key("ratelimit-policy"));
}

#[sqlx::test]
async fn who_guesses_keys_is_held_back_and_nobody_else(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_TRUSTED_PROXIES", "127.0.0.0/8")]).await;
    let url = format!("{}/v1/users", house.service.url);
    let wrong = http_with(&format!("tdg_{}_{}", "0a".repeat(8), "1b".repeat(32)));
    let guess = |from: &str, origin: &str| {
        // What stands before the proxy's own word is the client's invention.
        Answer::to(wrong.get(&url).header("x-forwarded-for", format!("{origin}, {from}")))
    };
    let mut answers = vec![];
    let held_back = eventually("some to be held back", async || {
        let guesses = (0..400).map(|n| guess("192.0.2.7", &format!("198.51.100.{}", n % 250)));
        answers.extend(join_all(guesses).await);
        let with = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
        if with(429) > 0 { Ok(with(429)) } else { Err([with(401), with(503)]) }
    })
    .await;
    for answer in &answers {
        match answer.status.as_u16() {
            401 => assert_eq!(answer.refusal(401), "unauthenticated"),
            429 => assert_eq!(answer.refusal(429), "rate_limited"),
            // A machine that has a lot to do, and a look at the database that took too long.
            503 => assert_eq!(answer.refusal(503), "database_unavailable"),
            other => panic!("{other}: {answer:?}"),
        }
        assert_eq!(answer.headers.contains_key("retry-after"), answer.status != 401);
    }
    eventually("an answer elsewhere", async || match guess("192.0.2.8", "192.0.2.7").await {
        answer if answer.status == 503 => Err(answer),
        answer => {
            assert_eq!(answer.refusal(401), "unauthenticated");
            Ok(())
        }
    })
    .await;
    eventually("an answer for who has a key", async || {
        let known = http_with(key()).get(&url).header("x-forwarded-for", "192.0.2.7");
        match Answer::to(known).await {
            answer if answer.status == 503 => Err(answer),
            answer => {
                answer.ok();
                Ok(())
            }
        }
    })
    .await;
    let counted = house.metric("tidings_requests_rate_limited_total{of=\"address\"}").await;
    assert_eq!(counted, held_back as f64);
}

/// Nobody's word is taken without being configured, and a body is not waited for before it is known whose it is.
#[sqlx::test]
async fn who_has_no_key_gets_nowhere(db: PgPool) {
    let house = House::open(db).await;
    let mut line = Line::open(&house).await;
    line.send("POST /v1/users HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 40\r\n\r\n{")
        .await;
    let began = Instant::now();
    assert_eq!(refusal(&line.rest().await), (401, "unauthenticated".to_owned()));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let url = format!("{}/v1/users", house.service.url);
    let wrong = http_with(&format!("tdg_{}_{}", "0a".repeat(8), "1b".repeat(32)));
    let guesses =
        (0..400).map(|n| Answer::to(wrong.get(&url).header("x-forwarded-for", format!("198.51.100.{}", n % 250))));
    let held_back = join_all(guesses).await.iter().filter(|answer| answer.status == 429).count();
    assert!(held_back > 0, "of 400 none was held back");
}
