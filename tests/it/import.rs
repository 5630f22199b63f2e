//! `tidings import`: an existing user base comes in, whole, whatever is killed and however often it is begun.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    http::{HeaderMap, Uri, header::IF_MATCH},
    response::IntoResponse,
};
use reqwest::{Method, StatusCode, header::RETRY_AFTER};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::clients::{Key, NewClient, Scope};
use tidings_sdk::envelope::Notice;
use tokio::{
    io::AsyncWriteExt,
    net::TcpListener,
    process::{Child, Command},
    time::timeout,
};
use uuid::Uuid;

use crate::house::{Answer, House, collect, eventually, file, key, new_client, proxy_before, through, tidings};

/// For an import as a whole: it gets on, however slow the machine is.
const LONG_PATIENCE: Duration = Duration::from_secs(240);

/// An import under way.
pub struct Import {
    pub child: Child,
    pub said: Arc<Mutex<String>>,
}

/// An import that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub said: String,
}

impl Import {
    pub fn command(url: &str, arguments: &[&str]) -> Command {
        let command = [&["import"], arguments].concat();
        let mut command = tidings(&command, &[("TIDINGS_URL".to_owned(), url.to_owned())]);
        command.env("TIDINGS_API_KEY", key());
        command
    }

    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let said = Arc::<Mutex<String>>::default();
        collect(child.stderr.take().unwrap(), said.clone());
        Self { child, said }
    }

    pub fn start(url: &str, arguments: &[&str]) -> Self {
        Self::spawn(Self::command(url, arguments))
    }

    pub async fn signal(&self, signal: &str) {
        let pid = self.child.id().expect("it still runs").to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().await.unwrap().success());
    }

    pub async fn ends(mut self) -> Ended {
        let Ok(ended) = timeout(LONG_PATIENCE, self.child.wait()).await else {
            panic!("it does not end; it said {}", self.said.lock().unwrap())
        };
        // Its last words may still be on their way to us.
        let said = eventually("its last words", async || {
            let said = self.said.lock().unwrap().clone();
            if Arc::strong_count(&self.said) == 1 { Ok(said) } else { Err(said) }
        });
        Ended { code: ended.unwrap().code(), said: said.await }
    }
}

pub async fn import(url: &str, arguments: &[&str]) -> Ended {
    Import::start(url, arguments).ends().await
}

/// Ids are made from external ids and this.
async fn import_under(namespace: &str, url: &str, arguments: &[&str]) -> Ended {
    let mut command = Import::command(url, arguments);
    command.env("TIDINGS_IMPORT_NAMESPACE", namespace);
    Import::spawn(command).ends().await
}

impl Ended {
    #[track_caller]
    pub fn well(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    pub fn says(&self, words: &[&str]) -> &Self {
        let missing: Vec<_> = words.iter().filter(|word| !self.said.contains(**word)).collect();
        assert!(missing.is_empty(), "{missing:?} not in {}", self.said);
        self
    }
}

pub fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn append(path: &Path, text: &str) {
    let mut longer = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    longer.write_all(text.as_bytes()).unwrap();
}

fn journal(path: &Path) -> String {
    std::fs::read_to_string(format!("{}.import", path.display())).unwrap()
}

pub async fn living(house: &House) -> i64 {
    sqlx::query_scalar("select count(*) from users where deleted_at is null").fetch_one(&house.db).await.unwrap()
}

/// Users who are kept more than once, by their nickname.
pub async fn doubled(house: &House) -> i64 {
    let doubled = "select count(*) - count(distinct profile->>'nickname') from users";
    sqlx::query_scalar(doubled).fetch_one(&house.db).await.unwrap()
}

/// So many lines, half of them with an id, each with a nickname of its own.
pub fn lines(count: usize) -> (PathBuf, Vec<Uuid>) {
    let (mut text, mut ids) = (String::new(), vec![]);
    for line in 1..=count {
        let profile = json!({ "nickname": format!("n{line}") });
        if line % 2 == 0 {
            writeln!(text, "{}", json!({ "profile": profile })).unwrap();
        } else {
            let id = Uuid::new_v4();
            writeln!(text, "{}", json!({ "id": id, "profile": profile })).unwrap();
            ids.push(id);
        }
    }
    (file(&text), ids)
}

#[sqlx::test]
async fn everybody_is_in_and_told_once_whatever_the_lines_look_like(db: PgPool) {
    let house = House::open(db).await;
    let ids: [Uuid; 4] = std::array::from_fn(|_| Uuid::new_v4());
    let text = format!(
        "\u{feff}{{\"id\":\"{}\",\"profile\":{{\"first_name\":\"Zoë\",\"city\":\"東京\",\"nickname\":\"\\ud83d\\ude00\"}}}}\r\n\
         \r\n   \n\
         {{\"profile\":{{\"first_name\":\"Bo\"}},\"id\":\"{}\"}}\r\n\
         {{\"profile\":{{\"first_name\":\"Cy\"}}}}\n\
         \t{{ \"id\" : \"{}\", \"profile\" : {{ }} }} \n\
         {{\"id\":\"{}\",\"profile\":{{\"first_name\":\"Dee\"}}}}",
        ids[0], ids[1], ids[2], ids[3]
    );
    let lines = file(&text);
    import(&house.service.url, &[name(&lines)]).await.well().says(&["5 users created", "0 refused", "2 blank"]);
    let zoe = house.get(&ids[0]).await.ok();
    assert_eq!(zoe.body["profile"], json!({ "first_name": "Zoë", "city": "東京", "nickname": "😀" }));
    assert_eq!(house.get(&ids[3]).await.ok().body["profile"], json!({ "first_name": "Dee" }));
    assert_eq!(living(&house).await, 5);
    for id in &ids {
        assert_eq!(house.told(id).await, ["user.created"]);
    }
    // Nothing is left to do; and begun anew, what has an id of its own is there already, and nobody is told.
    import(&house.service.url, &[name(&lines)]).await.well().says(&["settled already", "5 users created"]);
    import(&house.service.url, &[name(&lines), "--restart"])
        .await
        .well()
        .says(&["1 users created, 4 brought up to date"]);
    assert_eq!(living(&house).await, 6);
    assert_eq!(house.told(&ids[0]).await, ["user.created"]);
}

/// In how many requests the changes were made that were told: what one has told belongs to one trace.
async fn traces(house: &House) -> usize {
    house.settle().await;
    house.audit.catch_up().await;
    let trace = |notice: Notice| notice.traceparent.expect("each has one").to_string()[3..35].to_owned();
    house.audit.heard().into_iter().map(trace).collect::<BTreeSet<_>>().len()
}

#[sqlx::test]
async fn many_lines_go_in_few_requests(db: PgPool) {
    let house = House::open(db).await;
    const LINES: usize = 1_000;
    // Among them lines that the service refuses and one that has to go alone: they do not make the others go alone.
    let (lines, _) = lines(LINES);
    let (holder, held) = (Uuid::new_v4(), json!({ "external_id": "E-1", "profile": { "nickname": "held" } }));
    Answer::to(house.request(Method::PUT, &format!("/v1/users/{holder}")).json(&held)).await.ok();
    let mut text = std::fs::read_to_string(&lines).unwrap();
    writeln!(text, "{}", json!({ "profile": { "nickname": 7 } })).unwrap();
    writeln!(text, "{}", json!({ "external_id": "E-1", "profile": { "nickname": "moved" } })).unwrap();
    let ended = import(&house.service.url, &[name(&file(&text))]).await;
    ended.says(&["line 1001: 422 profile_invalid", "1000 users created, 1 brought up to date, 1 refused"]);
    let moved = house.get(&holder).await.ok();
    assert_eq!((moved.version(), &moved.body["profile"]["nickname"]), (2, &json!("moved")));
    let requests = traces(&house).await;
    assert!(requests < LINES / 3, "{requests} requests for {LINES} lines");
}

#[sqlx::test]
async fn with_few_at_once_each_line_goes_by_itself(db: PgPool) {
    let house = House::open(db).await;
    import(&house.service.url, &[name(&lines(40).0), "--concurrency", "7"]).await.well();
    assert_eq!(traces(&house).await, 40);
}

#[sqlx::test]
async fn what_is_refused_is_told_by_line_and_place_and_by_no_value(db: PgPool) {
    let house = House::open(db).await;
    let canary = format!("canary{}", Uuid::new_v4().simple());
    let deleted = house.user(json!({})).await;
    house.delete(&deleted).await.ok();
    let good = Uuid::new_v4();
    let wrong = [
        json!({ "profile": { "first_name": 7, "last_name": [canary] } }).to_string(),
        format!("{{\"profile\":{{\"first_name\":\"{canary}\",\"first_name\":\"{canary}\"}}}}"),
        format!("{{\"profile\":{{\"first_name\":\"{canary}"),
        json!({ "id": canary, "profile": {} }).to_string(),
        json!({ "id": deleted, "profile": { "first_name": canary } }).to_string(),
        json!({ "profile": canary }).to_string(),
        format!("{{\"profile\":{{\"first_name\":\"{}\"}}}}", canary.repeat(10_000)),
        format!("{{\"profile\":{{\"first_name\":\"{}\"}}}}", canary.repeat(2_000)),
    ];
    let lines = file(
        &[&wrong[..], &[json!({ "id": good, "profile": { "first_name": "Ana" } }).to_string()]].concat().join("\n"),
    );
    let report = file("");
    let refused = import(&house.service.url, &[name(&lines), "--report", name(&report)]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let shown = [
        "line 1: 422 profile_invalid: /profile/first_name must be of type string",
        "line 2: unacceptable_json: /profile/first_name this name occurs twice",
        "line 3: malformed_json",
        "line 4: body_invalid: /id must be a UUID",
        "line 5: 410 user_deleted",
        "line 6: body_invalid: /profile must be an object",
        "line 7: line_too_long",
        "line 8: payload_too_large",
        "8 of 9 lines were refused",
    ];
    refused.says(&shown);
    house.get(&good).await.ok();
    let written = std::fs::read_to_string(&report).unwrap();
    let first: Value = serde_json::from_str(written.lines().next().unwrap()).unwrap();
    assert_eq!((&first["line"], &first["status"], &first["code"]), (&json!(1), &json!(422), &json!("profile_invalid")));
    assert_eq!(first["errors"][0]["pointer"], "/profile/first_name");
    assert!(first["request_id"].is_string());
    assert_eq!(written.lines().count(), 8);
    for place in [&refused.said, &written, &journal(&lines)] {
        assert!(!place.contains(&canary), "{place}");
    }
    // The journal still knows what was refused.
    let again = import(&house.service.url, &[name(&lines), "--report", name(&report)]).await;
    assert_eq!(again.code, Some(1), "{again:?}");
    assert_eq!(std::fs::read_to_string(&report).unwrap(), written);
}

#[sqlx::test]
async fn killed_in_the_middle_it_goes_on_and_nobody_is_doubled_or_missing(db: PgPool) {
    let house = House::open(db).await;
    const LINES: usize = 1_500;
    let (lines, ids) = lines(LINES);
    for kill in 1..=3 {
        let under_way = Import::start(&house.service.url, &[name(&lines), "--concurrency", "16"]);
        eventually("some more users", async || match living(&house).await {
            users if users >= kill * 200 => Ok(()),
            users => Err((users, under_way.said.lock().unwrap().clone())),
        })
        .await;
        under_way.signal("-KILL").await;
        assert_eq!(under_way.ends().await.code, None, "it was to be killed before it ended");
    }
    assert!((living(&house).await as usize) < LINES, "the last kill came too late to prove anything");
    import(&house.service.url, &[name(&lines)]).await.well().says(&["going on after line"]);
    assert_eq!((living(&house).await, doubled(&house).await), (LINES as i64, 0));
    assert_eq!(house.page(&format!("/v1/users/{}", ids[0])).await.ok().version(), 1);
    house.settle().await;
    assert_eq!(house.audit.heard().len(), LINES);
}

#[sqlx::test]
async fn an_outage_is_waited_out_and_told(db: PgPool) {
    let house = House::open(db).await;
    let proxy = proxy_before(&format!("{}/", house.service.url)).await;
    let url = through(&format!("{}/", house.service.url), &proxy);
    let (lines, _) = lines(1_500);
    let under_way = Import::start(&url, &[name(&lines), "--concurrency", "16"]);
    let gets_to = async |users| {
        eventually("some more users", async || match living(&house).await {
            found if found >= users => Ok(()),
            found => Err(found),
        })
        .await;
    };
    gets_to(200).await;
    let says = async |words: &'static str, times: usize| {
        eventually(words, async || {
            let said = under_way.said.lock().unwrap().clone();
            if said.matches(words).count() == times { Ok(()) } else { Err(said) }
        })
        .await;
    };
    // Nobody answers.
    proxy.down();
    says("the service does not take anything now (the connection broke): waiting", 1).await;
    let before = living(&house).await;
    proxy.up();
    says("the service answers again", 1).await;
    gets_to(before + 100).await;
    // It answers that it cannot.
    house.postgres.down();
    says("the service does not take anything now (503 database_unavailable): waiting", 1).await;
    house.postgres.up();
    says("the service answers again", 2).await;
    under_way.ends().await.well().says(&["0 refused"]);
    assert_eq!((living(&house).await, doubled(&house).await), (1_500, 0));
    // Who leaves while nobody answers does not hear that somebody did.
    let left = Import::start(&url, &[name(&lines), "--restart"]);
    proxy.down();
    eventually("an outage that is told", async || {
        let said = left.said.lock().unwrap().clone();
        if said.contains("the service does not take anything now") { Ok(()) } else { Err(said) }
    })
    .await;
    left.signal("-INT").await;
    let left = left.ends().await;
    assert!(left.code == Some(1) && !left.said.contains("answers again"), "{left:?}");
}

#[sqlx::test]
async fn asked_to_leave_it_leaves_in_order_and_says_how_to_go_on(db: PgPool) {
    let house = House::open(db).await;
    let (lines, _) = lines(1_500);
    let under_way = Import::start(&house.service.url, &[name(&lines), "--concurrency", "16"]);
    eventually("some users", async || match living(&house).await {
        users if users >= 100 => Ok(()),
        users => Err(users),
    })
    .await;
    under_way.signal("-INT").await;
    let ended = under_way.ends().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    ended.says(&["ended before the end, after line", "hint:", "goes on from there"]);
    import(&house.service.url, &[name(&lines)]).await.well().says(&["going on after line"]);
    assert_eq!((living(&house).await, doubled(&house).await), (1_500, 0));
}

#[sqlx::test]
async fn of_many_lines_about_one_user_the_last_one_holds(db: PgPool) {
    let house = House::open(db).await;
    let users: [Uuid; 5] = std::array::from_fn(|_| Uuid::new_v4());
    let mut text = String::new();
    for turn in 0..50 {
        for user in &users {
            writeln!(text, "{}", json!({ "id": user, "profile": { "nickname": format!("n{turn}") } })).unwrap();
        }
    }
    import(&house.service.url, &[name(&file(&text)), "--concurrency", "64"]).await.well();
    for user in &users {
        let kept = house.get(user).await.ok();
        assert_eq!((&kept.body["profile"]["nickname"], kept.version()), (&json!("n49"), 50));
    }
}

/// By an external id the first line leads to whom the second one names.
#[sqlx::test]
async fn of_lines_that_lead_to_one_user_by_different_names_the_last_one_holds(db: PgPool) {
    let house = House::open(db).await;
    let first = |external_id: &str| json!({ "external_id": external_id, "profile": { "nickname": "first" } });
    // In one request, and each by itself; and a last line that is refused does not hold.
    for (external_id, concurrency, last, kept, outcome) in [
        ("E1", "1000", json!("last"), "last", "0 users created, 2 brought up to date, 0 refused"),
        ("E2", "7", json!("last"), "last", "0 users created, 2 brought up to date, 0 refused"),
        ("E3", "1000", json!(7), "first", "0 users created, 1 brought up to date, 1 refused"),
        ("E4", "7", json!(7), "first", "0 users created, 1 brought up to date, 1 refused"),
    ] {
        let resident = Uuid::new_v4();
        let there = json!({ "external_id": external_id, "profile": { "nickname": "before" } });
        Answer::to(house.request(Method::PUT, &format!("/v1/users/{resident}")).json(&there)).await.ok();
        let last = json!({ "id": resident, "profile": { "nickname": last } });
        let lines = file(&format!("{}\n{last}\n", first(external_id)));
        import(&house.service.url, &[name(&lines), "--concurrency", concurrency]).await.says(&[outcome]);
        assert_eq!(house.get(&resident).await.ok().body["profile"]["nickname"], kept, "{external_id}");
    }
}

#[sqlx::test]
async fn where_changes_have_to_say_what_they_saw_it_says_so(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_REQUIRE_IF_MATCH", "true")]).await;
    let (lines, ids) = lines(100);
    import(&house.service.url, &[name(&lines)]).await.well().says(&["100 users created"]);
    let text = std::fs::read_to_string(&lines).unwrap().replace("\"nickname\"", "\"last_name\"");
    let changed = import(&house.service.url, &[name(&file(&text))]).await;
    changed.well().says(&["50 users created, 50 brought up to date"]);
    // How many lines are read by the time a request goes out is the machine's business; the fifty who were there are not asked about alone.
    let requests = traces(&house).await;
    assert!(requests < 50, "{requests} requests changed 150 users");
    assert_eq!(house.get(&ids[0]).await.ok().body["profile"], json!({ "last_name": "n1" }));
}

/// Who has this external id.
async fn named(house: &House, external_id: &str) -> Uuid {
    let page = house.page(&format!("/v1/users?external_id={external_id}")).await.ok();
    page.body["users"][0]["id"].as_str().unwrap_or_else(|| panic!("{page:?}")).parse().unwrap()
}

#[sqlx::test]
async fn who_brings_an_external_id_is_found_by_it_for_ever(db: PgPool) {
    let house = House::open(db).await;
    let resident = Uuid::new_v4();
    house.put(&resident, json!({ "nickname": "before" })).await.ok();
    let already = json!({ "external_id": "E 0/ä&", "profile": { "nickname": "before" } });
    Answer::to(house.request(Method::PUT, &format!("/v1/users/{resident}")).json(&already)).await.ok();
    let line = |external_id: &str, nickname: &str| {
        format!("{}\n", json!({ "external_id": external_id, "profile": { "nickname": nickname } }))
    };
    let text: String = (1..=200).map(|number| line(&format!("E{number}"), &format!("n{number}"))).collect();
    let lines = file(&(text + &line("E 0/ä&", "after") + &line("E7", "twice")));
    import(&house.service.url, &[name(&lines)]).await.well().says(&["200 users created, 2 brought up to date"]);
    assert_eq!(house.get(&resident).await.ok().body["profile"]["nickname"], "after");
    let seventh = named(&house, "E7").await;
    assert_eq!(house.get(&seventh).await.ok().body["profile"]["nickname"], "twice");
    // Without the journal, as from another machine: each is looked up.
    std::fs::remove_file(format!("{}.import", lines.display())).unwrap();
    import(&house.service.url, &[name(&lines)]).await.well().says(&["0 users created, 202 brought up to date"]);
    assert_eq!((living(&house).await, named(&house, "E7").await), (201, seventh));
    // By an id of its own nobody takes another's external id.
    let thief = json!({ "id": Uuid::new_v4(), "external_id": "E7", "profile": {} });
    let refused = import(&house.service.url, &[name(&file(&thief.to_string()))]).await;
    refused.says(&["line 1: 409 external_id_taken"]);
    assert!(!refused.said.contains("E7"), "{refused:?}");
}

/// Ids are made from external ids, which go from one to another while the ids stay.
#[sqlx::test]
async fn an_external_id_that_was_given_on_overwrites_nobody(db: PgPool) {
    let house = House::open(db).await;
    let namespace = Uuid::new_v4().to_string();
    let line = |external_id: &str, name: &str| {
        format!("{}\n", json!({ "external_id": external_id, "profile": { "first_name": name } }))
    };
    let others: String = (10..60).map(|number| line(&format!("E{number}"), "Cy")).collect();
    // In one request, and each by itself.
    for (old, new, concurrency) in [("E1", "E2", "1000"), ("E3", "E4", "7")] {
        let send = async |text: String| {
            let lines = file(&text);
            let arguments = [name(&lines), "--concurrency", concurrency];
            import_under(&namespace, &house.service.url, &arguments).await
        };
        send(line(old, "Ana") + &others).await.well();
        let ana = named(&house, old).await;
        let given = json!({ "external_id": new, "profile": {} }).to_string();
        let amend = house.request(Method::PATCH, &format!("/v1/users/{ana}"));
        Answer::to(amend.header("content-type", "application/merge-patch+json").body(given)).await.ok();

        // Whom it means nobody can tell: it may as well be an old file.
        let again = send(others.clone() + &line(old, "Bo") + &line(new, "Anna")).await;
        again.says(&["0 users created, 51 brought up to date, 1 refused", "line 51: external_id_changed"]);
        assert!(!again.said.contains(old), "{again:?}");
        assert_eq!(house.get(&ana).await.ok().body["profile"]["first_name"], "Anna");

        // By an id of his own he comes in, and from then on he is found.
        let bo = Uuid::new_v4();
        let own = json!({ "id": bo, "external_id": old, "profile": { "first_name": "Bo" } });
        send(format!("{own}\n")).await.well();
        send(others.clone() + &line(old, "Bob")).await.well().says(&["0 users created, 51 brought up to date"]);
        assert_eq!(house.get(&bo).await.ok().body["profile"]["first_name"], "Bob");
        assert_eq!(house.get(&ana).await.ok().body["profile"]["first_name"], "Anna");
    }
}

#[sqlx::test]
async fn those_who_came_in_by_an_external_id_before_cost_few_requests(db: PgPool) {
    let house = House::open(db).await;
    const LINES: usize = 2_000;
    let namespace = Uuid::new_v4().to_string();
    let lines = |nickname: &str| -> String {
        let line = |number| json!({ "external_id": format!("E{number}"), "profile": { "nickname": nickname } });
        (0..LINES).map(|number| format!("{}\n", line(number))).collect()
    };
    let send = async |text: &str| {
        let lines = file(text);
        import_under(&namespace, &house.service.url, &[name(&lines)]).await
    };
    send(&lines("before")).await.well().says(&["2000 users created"]);
    let before = traces(&house).await;
    send(&lines("after")).await.well().says(&["0 users created, 2000 brought up to date"]);
    let requests = traces(&house).await - before;
    assert!(requests < LINES / 3, "{requests} requests changed {LINES} users");
}

#[sqlx::test]
async fn an_external_id_cannot_be_guessed_from_the_id_unless_its_maker_wants_that(db: PgPool) {
    let house = House::open(db).await;
    let id_of = async |setting: &[(&str, &str)]| {
        let lines = file("{\"external_id\":\"E1\",\"profile\":{}}\n");
        let mut command = Import::command(&house.service.url, &[name(&lines)]);
        command.envs(setting.iter().copied());
        Import::spawn(command).ends().await.well().says(&["1 users created"]);
        let id = named(&house, "E1").await;
        house.delete(&id).await.ok();
        id
    };
    assert_ne!(id_of(&[]).await, id_of(&[]).await);
    let [namespace, other] = [(); 2].map(|()| Uuid::new_v4().to_string());
    let id = id_of(&[("TIDINGS_IMPORT_NAMESPACE", &namespace)]).await;
    assert_eq!(id, Uuid::new_v5(&namespace.parse().unwrap(), b"E1"));
    let kept = file(&format!("{other}\n"));
    let id = id_of(&[("TIDINGS_IMPORT_NAMESPACE_FILE", name(&kept))]).await;
    assert_eq!(id, Uuid::new_v5(&other.parse().unwrap(), b"E1"));
    // Made from the same, the user that was deleted stays deleted.
    let again = file("{\"external_id\":\"E1\",\"profile\":{}}\n");
    import_under(&namespace, &house.service.url, &[name(&again)]).await.says(&["line 1: 410 user_deleted"]);
}

#[sqlx::test]
async fn standard_input_is_taken_and_may_begin_further_on(db: PgPool) {
    let house = House::open(db).await;
    let ids: [Uuid; 3] = std::array::from_fn(|_| Uuid::new_v4());
    let text: String = ids.iter().map(|id| format!("{}\n", json!({ "id": id, "profile": {} }))).collect();
    let mut command = Import::command(&house.service.url, &["-", "--from-line", "2"]);
    command.stdin(Stdio::piped());
    let mut under_way = Import::spawn(command);
    let mut input = under_way.child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).await.unwrap();
    drop(input);
    under_way.ends().await.well().says(&["no journal", "2 users created"]);
    assert_eq!(house.get(&ids[0]).await.refusal(404), "user_not_found");
    house.get(&ids[2]).await.ok();
}

/// Answers are held back from the second line on: what is committed is not settled, and the import cannot tell.
#[sqlx::test]
async fn of_standard_input_nobody_is_doubled_who_goes_on_as_the_hint_says(db: PgPool) {
    let house = House::open(db).await;
    let proxy = proxy_before(&format!("{}/", house.service.url)).await;
    let lines: String =
        (2..=20).map(|line| format!("{}\n", json!({ "profile": { "nickname": line.to_string() } }))).collect();
    let text = format!("{{\n{lines}");
    let send = async |url: &str, arguments: &[&str]| {
        let mut command = Import::command(url, arguments);
        command.stdin(Stdio::piped());
        let mut under_way = Import::spawn(command);
        let mut input = under_way.child.stdin.take().unwrap();
        input.write_all(text.as_bytes()).await.unwrap();
        under_way
    };
    let report = file("");
    let reported = || {
        let text = std::fs::read_to_string(&report).unwrap();
        let line = |line: &str| serde_json::from_str::<Value>(line).unwrap()["line"].as_u64().unwrap();
        text.lines().map(line).collect::<Vec<_>>()
    };
    proxy.hold_answers();
    let url = through(&format!("{}/", house.service.url), &proxy);
    let under_way = send(&url, &["-", "--concurrency", "7", "--report", name(&report)]).await;
    eventually("a user who is there and not settled", async || match living(&house).await {
        0 => Err(under_way.said.lock().unwrap().clone()),
        _ => Ok(()),
    })
    .await;
    under_way.signal("-INT").await;
    let ended = under_way.ends().await;
    ended.says(&["ended before the end, after line 1\n", "--from-line 2"]);
    let hint = ended.said.split("`tidings import ").nth(1).and_then(|hint| hint.split('`').next());
    let hint: Vec<&str> = hint.unwrap_or_else(|| panic!("no command in {}", ended.said)).split(' ').collect();
    let hint = [&hint[..], &["--report", name(&report)]].concat();
    send(&house.service.url, &hint).await.ends().await.well();
    assert_eq!((living(&house).await, doubled(&house).await), (19, 0));
    assert_eq!(reported(), [1], "what was refused before stands nowhere else");
    // The same lines from the beginning, as after a kill that left no hint.
    let all: Vec<&str> = hint.iter().copied().filter(|word| !["--from-line", "2"].contains(word)).collect();
    send(&house.service.url, &all).await.ends().await.says(&["0 users created, 19 brought up to date, 1 refused"]);
    assert_eq!(reported(), [1], "it is written anew");
    // It is told as well when something else ends it.
    let astray = send(&format!("{}/nowhere", house.service.url), &["-"]).await.ends().await;
    astray.says(&["what answers at", "`tidings import - --import-id ", " --from-line 2` goes on with the same lines"]);
}

#[sqlx::test]
async fn a_dry_run_tells_what_is_wrong_and_sends_nothing(db: PgPool) {
    let house = House::open(db).await;
    let large = json!({ "profile": { "first_name": "x".repeat(100_000) } });
    let lines = file(&format!(
        "{{\"profile\":{{\"first_name\":\"Ana\"}}}}\n{{\"profile\":{{\"first_name\":7}}}}\n{{\n{large}\n"
    ));
    let checked = import(&house.service.url, &[name(&lines), "--dry-run"]).await;
    assert_eq!(checked.code, Some(1), "{checked:?}");
    checked.says(&["2 lines could be sent, 2 refused", "line 3: malformed_json", "line 4: payload_too_large"]);
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/src/profile/default.schema.json");
    // Needs no service at all.
    let checked = import("http://127.0.0.1:1", &[name(&lines), "--dry-run", "--profile-schema", schema]).await;
    checked.says(&["1 lines could be sent, 3 refused", "line 2: profile_invalid: /profile/first_name"]);
    assert_eq!(living(&house).await, 0);
    assert!(!PathBuf::from(format!("{}.import", lines.display())).exists());
}

/// It keeps no journal, which would tell again what was refused before.
#[tokio::test]
async fn a_dry_run_that_begins_further_on_adds_to_the_report() {
    let (lines, report) = (file("{\n"), file(""));
    let check = async |arguments: &[&str]| {
        let all = [&[name(&lines), "--dry-run", "--report", name(&report)], arguments].concat();
        import("http://127.0.0.1:1", &all).await.says(&["1 refused"]);
        std::fs::read_to_string(&report).unwrap()
    };
    let first = check(&[]).await;
    std::fs::write(&lines, "{\n[\n").unwrap();
    let both = check(&["--from-line", "2"]).await;
    assert!(both.starts_with(&first) && first.contains("\"line\":1,"), "{both}");
    assert!(both[first.len()..].starts_with("{\"line\":2,"), "{both}");
}

/// It keeps no journal: the same command would begin anew.
#[tokio::test]
async fn a_dry_run_that_was_stopped_says_how_to_go_on() {
    let mut command = Import::command("http://127.0.0.1:1", &["-", "--dry-run"]);
    command.stdin(Stdio::piped());
    let mut under_way = Import::spawn(command);
    let mut input = under_way.child.stdin.take().unwrap();
    let lines = "{\"profile\":{}}\n".repeat(100_000);
    // More than a pipe holds: it has begun to read.
    input.write_all(lines.as_bytes()).await.unwrap();
    under_way.signal("-INT").await;
    // It looks up after each line; the pipe ends when it leaves.
    while input.write_all(lines.as_bytes()).await.is_ok() {}
    let ended = under_way.ends().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    ended.says(&["ended before the end, after line", "`tidings import - --dry-run --from-line ", "goes on from there"]);
}

/// No service is needed: nothing is sent.
#[tokio::test]
async fn a_report_over_what_is_read_is_refused() {
    const NOBODY: &str = "http://127.0.0.1:1";
    let lines = file("{\n");
    let (link, journal_path) = (format!("{}.link", lines.display()), format!("{}.import", lines.display()));
    std::os::unix::fs::symlink(&lines, &link).unwrap();
    let refused = async |report: &str| {
        for how in [&[][..], &["--dry-run"]] {
            let refused = import(NOBODY, &[&[name(&lines), "--report", report], how].concat()).await;
            assert_eq!(refused.code, Some(2), "{report} {how:?}: {refused:?}");
            refused.says(&["--report: is a file that is read or the journal"]);
            assert_eq!(std::fs::read_to_string(&lines).unwrap(), "{\n", "{report} {how:?}");
        }
    };
    for report in [name(&lines), &link, &journal_path] {
        refused(report).await;
    }
    assert!(!Path::new(&journal_path).exists());
    import(NOBODY, &[name(&lines)]).await.says(&["1 of 1 lines were refused"]);
    let kept = journal(&lines);
    refused(&journal_path).await;
    assert_eq!(journal(&lines), kept);
    let mut from_stdin = Import::command(NOBODY, &["-", "--report", name(&lines)]);
    from_stdin.stdin(std::fs::File::open(&lines).unwrap());
    let from_stdin = Import::spawn(from_stdin).ends().await;
    assert_eq!(from_stdin.code, Some(2), "{from_stdin:?}");
    assert_eq!(std::fs::read_to_string(&lines).unwrap(), "{\n");
    for setting in ["--api-key-file", "--ca-file", "--namespace-file", "--profile-schema"] {
        let named = file("kept");
        let refused = import(NOBODY, &[name(&lines), setting, name(&named), "--report", name(&named)]).await;
        assert_eq!(refused.code, Some(2), "{setting}: {refused:?}");
        refused.says(&["--report: is a file that is read or the journal"]);
        assert_eq!(std::fs::read_to_string(&named).unwrap(), "kept", "{setting}");
    }
}

/// Of standard input, which has no journal. No service is needed: nothing is sent.
#[tokio::test]
async fn a_kill_takes_nothing_from_the_report_that_was_settled_and_leaves_no_half_line_in_it() {
    let report = file("");
    let begin = |arguments: &[&str]| {
        let mut command =
            Import::command("http://127.0.0.1:1", &[&["-", "--report", name(&report)], arguments].concat());
        command.stdin(Stdio::piped());
        Import::spawn(command)
    };
    let mut under_way = begin(&[]);
    let mut input = under_way.child.stdin.take().unwrap();
    input.write_all(b"{\n").await.unwrap();
    // More lines may come: it has not ended, and the line is there.
    eventually("a report that has the first line", async || match std::fs::read_to_string(&report).unwrap() {
        written if written.ends_with('\n') => Ok(()),
        written => Err(written),
    })
    .await;
    under_way.signal("-KILL").await;
    assert_eq!(under_way.ends().await.code, None, "it was to be killed before it ended");
    // As a kill in the middle of a write leaves it.
    append(&report, "{\"line\":2,\"code\":\"malf");
    let mut again = begin(&["--from-line", "2"]);
    let mut input = again.child.stdin.take().unwrap();
    input.write_all(b"{\n{\n").await.unwrap();
    drop(input);
    again.ends().await.says(&["line 2: malformed_json", "1 of 2 lines were refused"]);
    let written = std::fs::read_to_string(&report).unwrap();
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap()["line"].as_u64().unwrap();
    assert_eq!(written.lines().map(line).collect::<Vec<_>>(), [1, 2]);
}

/// Here by what is no tidings, and gives no reason.
#[tokio::test]
async fn a_line_that_meets_a_500_each_time_is_sent_five_times_and_refused() {
    let asked = Arc::<AtomicUsize>::default();
    let answer = {
        let asked = asked.clone();
        async move || {
            asked.fetch_add(1, Ordering::SeqCst);
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    let lines = file(&"{\"profile\":{}}\n".repeat(2));
    let ended = import(&url, &[name(&lines), "--concurrency", "1"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    ended.says(&["line 1: 500 no_reason", "line 2: 500 no_reason", "2 of 2 lines were refused"]);
    assert_eq!(asked.load(Ordering::SeqCst), 2 * 5);
}

/// However soon it would have been asked again.
#[tokio::test]
async fn a_service_that_asks_for_time_is_given_it() {
    let asked = Arc::<Mutex<Vec<Instant>>>::default();
    let answer = {
        let asked = asked.clone();
        async move || {
            let mut asked = asked.lock().unwrap();
            asked.push(Instant::now());
            if asked.len() == 1 {
                (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, "2")]).into_response()
            } else {
                StatusCode::OK.into_response()
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
    import(&url, &[name(&file("{\"profile\":{}}\n"))]).await.well();
    let asked = asked.lock().unwrap();
    assert!(asked[1] - asked[0] >= Duration::from_secs(2), "{:?}", asked[1] - asked[0]);
}

/// Another user has the external id, and who asks for him meets a 500 so often.
#[tokio::test]
async fn who_has_an_external_id_is_asked_five_times_before_the_line_is_refused() {
    for (failures, words) in [(4, "0 users created, 1 brought up to date, 0 refused"), (5, "line 1: 500 no_reason")] {
        let (holder, asked) = (Uuid::new_v4(), Arc::<AtomicUsize>::default());
        let answer = {
            let asked = asked.clone();
            async move |method: Method, uri: Uri| {
                if method == Method::GET {
                    let failed = asked.fetch_add(1, Ordering::SeqCst) < failures;
                    let status = if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
                    (status, Json(json!({ "users": [{ "id": holder, "version": 3 }] })))
                } else if uri.path().ends_with(&holder.to_string()) {
                    (StatusCode::OK, Json(json!({})))
                } else {
                    (StatusCode::CONFLICT, Json(json!({ "code": "external_id_taken" })))
                }
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
        let lines = file("{\"external_id\":\"E1\",\"profile\":{}}\n");
        import(&url, &[name(&lines), "--concurrency", "1"]).await.says(&[words]);
        assert_eq!(asked.load(Ordering::SeqCst), 5, "{failures}");
    }
}

/// Somebody is kept under the id that is made from the external id, and who asks whether it is he meets a 500 so often.
#[tokio::test]
async fn who_is_there_already_is_asked_for_five_times_before_the_line_is_refused() {
    for (failures, words, changes) in
        [(4, "0 users created, 1 brought up to date, 0 refused", 2), (5, "line 1: 500 no_reason", 1)]
    {
        let (asked, sent) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let answer = {
            let (asked, sent) = (asked.clone(), sent.clone());
            async move |method: Method, headers: HeaderMap| {
                if method == Method::POST {
                    let failed = asked.fetch_add(1, Ordering::SeqCst) < failures;
                    let status = if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
                    (status, Json(json!({ "results": [{ "user": { "version": 3, "external_id": "E1" } }] })))
                } else {
                    sent.fetch_add(1, Ordering::SeqCst);
                    let meets = headers.contains_key(IF_MATCH);
                    let status = if meets { StatusCode::OK } else { StatusCode::PRECONDITION_FAILED };
                    (status, Json(json!({})))
                }
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, Router::new().fallback(answer)).into_future());
        let lines = file("{\"external_id\":\"E1\",\"profile\":{}}\n");
        import(&url, &[name(&lines), "--concurrency", "1"]).await.says(&[words]);
        assert_eq!((asked.load(Ordering::SeqCst), sent.load(Ordering::SeqCst)), (5, changes), "{failures}");
    }
}

#[sqlx::test]
async fn the_journal_of_another_file_or_service_is_not_gone_on_with(db: PgPool) {
    let house = House::open(db).await;
    let (lines, _) = lines(10);
    import(&house.service.url, &[name(&lines)]).await.well();
    let elsewhere = import("http://127.0.0.1:1", &[name(&lines)]).await;
    assert_eq!(elsewhere.code, Some(1));
    elsewhere.says(&["is of an import into http://127.0.0.1:", "--restart"]);
    let as_long = std::fs::read_to_string(&lines).unwrap().replacen("\"n1\"", "\"m1\"", 1);
    for other in [&as_long, "{\"profile\":{}}\n"] {
        std::fs::write(&lines, other).unwrap();
        let changed = import(&house.service.url, &[name(&lines)]).await;
        assert_eq!(changed.code, Some(1));
        changed.says(&["of another file, or the file was changed", "--restart"]);
    }
    assert_eq!(living(&house).await, 10);
    import(&house.service.url, &[name(&lines), "--restart"]).await.well().says(&["1 users created"]);
}

/// Places repeat names that the line chose. No service is needed: nothing is sent.
#[tokio::test]
async fn a_line_with_endless_places_leaves_a_journal_that_can_be_read() {
    let nobody = "http://127.0.0.1:1";
    let line = json!({ "profile": { "n".repeat(30_000): vec!["\0"; 50] } });
    let (lines, report) = (file(&format!("{line}\n")), file(""));
    let mut reports = vec![];
    for arguments in [&["--report", name(&report)][..], &["--report", name(&report)], &["--restart"]] {
        let refused = import(nobody, &[&[name(&lines)], arguments].concat()).await;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        refused.says(&["line 1: unacceptable_json: /profile/nnn", "1 of 1 lines were refused"]);
        reports.push(std::fs::read_to_string(&report).unwrap());
    }
    let told: Value = serde_json::from_str(&reports[0]).unwrap();
    assert_eq!(told["errors"].as_array().unwrap().len(), 50);
    assert_eq!(reports[0], reports[1], "the journal knows what was refused");
}

#[tokio::test]
async fn what_travels_in_the_clear_to_another_machine_is_warned_of() {
    // Nothing of it can be sent: nobody is asked.
    let lines = file("{\n");
    const WARNING: &str = "TIDINGS_URL: the service is on another machine, and anybody between could read";
    import("http://users.example.org", &[name(&lines)]).await.says(&[WARNING, "use https://"]);
    for safe in ["https://users.example.org", "http://localhost:1"] {
        let quiet = import(safe, &[name(&lines), "--restart"]).await;
        assert!(!quiet.said.contains(WARNING), "{quiet:?}");
        quiet.says(&["1 of 1 lines were refused"]);
    }
}

#[sqlx::test]
async fn without_the_right_key_it_ends_at_once_and_says_what_is_missing(db: PgPool) {
    let house = House::open(db).await;
    let reader = NewClient::named("reader", [Scope::ReadUsers]).unwrap();
    let readers = new_client(&house.db, reader).await;
    let (_, unknown) = Key::generate().unwrap();
    let (lines, _) = lines(100);
    let with = async |key: Option<&str>| {
        let mut command = Import::command(&house.service.url, &[name(&lines)]);
        command.env_remove("TIDINGS_API_KEY").envs(key.map(|key| ("TIDINGS_API_KEY", key)));
        let ended = Import::spawn(command).ends().await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(key.is_none_or(|key| !ended.said.contains(key)), "{ended:?}");
        ended
    };
    with(None).await.says(&["TIDINGS_API_KEY: ", "the service wants a key: set TIDINGS_API_KEY"]);
    with(Some(unknown.expose_secret())).await.says(&["does not know this key"]);
    with(Some(&readers)).await.says(&["may not do that (forbidden)", "users:write"]);
    with(Some("not a\nkey")).await.says(&["TIDINGS_API_KEY: holds characters that no key has"]);
    let key_file = file(unknown.expose_secret());
    let from_file = import(&house.service.url, &[name(&lines), "--api-key-file", name(&key_file)]).await;
    from_file.says(&["TIDINGS_API_KEY_FILE: ", "does not know this key"]);
    assert_eq!(living(&house).await, 0);
    // Nothing was settled: with the right key it begins at the first line.
    import(&house.service.url, &[name(&lines)]).await.well().says(&["100 users created"]);
}

#[tokio::test]
async fn wrong_settings_are_named_at_once() {
    let wrong = import_under("s3cret", "ftp://ana:s3cret@host", &["/nowhere/at/all"]).await;
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    let namespace = "TIDINGS_IMPORT_NAMESPACE: expected a UUID";
    wrong.says(&["3 settings are wrong", "FILE: cannot read", "TIDINGS_URL: expected", namespace]);
    assert!(!wrong.said.contains("s3cret"));
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let began = std::time::Instant::now();
    let alone = import(&format!("http://{nobody}"), &[name(&file("{\"profile\":{}}"))]).await;
    assert_eq!(alone.code, Some(1));
    alone.says(&["nobody answers at http://127.0.0.1", "hint:", "TIDINGS_URL"]);
    assert!(!alone.said.contains("answers again"), "{alone:?}");
    assert!(began.elapsed() < Duration::from_secs(35));
}
