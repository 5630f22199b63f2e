//! Clients: who may ask, for what, and for which fields.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, Service, eventually, file, http_with, tidings},
    subscribed::Subscribed,
};

/// What revocation is promised to take.
const AT_ONCE: Duration = Duration::from_secs(1);

/// What `tidings client ..` says on stdout; it has to succeed.
pub async fn client(house: &House, words: &str) -> String {
    let (code, stdout, stderr) = client_command(house, words).await;
    assert_eq!(code, Some(0), "{stderr}");
    stdout.trim_end().to_owned()
}

async fn client_command(house: &House, words: &str) -> (Option<i32>, String, String) {
    let words: Vec<&str> = ["client"].into_iter().chain(words.split(' ')).collect();
    let output = tidings(&words, house.settings()).output().await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Takes a client's rights away, and waits until that is heard of.
pub async fn revoke(house: &House, name: &str, key: &str) {
    client(house, &format!("revoke {name}")).await;
    let holder = Holder::of(key, &house.service);
    eventually("the key to be refused", async || match holder.get("/v1/users").await.status.as_u16() {
        401 => Ok(()),
        other => Err(other),
    })
    .await;
}

/// Requests to a service by somebody with a key.
struct Holder {
    http: Client,
    url: String,
}

impl Holder {
    fn of(key: &str, service: &Service) -> Self {
        Self { http: http_with(key), url: service.url.clone() }
    }

    /// A client that was made with these words.
    async fn new(house: &House, words: &str) -> Self {
        Self::of(&client(house, &format!("create {words}")).await, &house.service)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    async fn get(&self, path: &str) -> Answer {
        Answer::to(self.request(Method::GET, path)).await
    }

    async fn patch(&self, user: &Uuid, patch: Value) -> Answer {
        let request = self.request(Method::PATCH, &format!("/v1/users/{user}"));
        let body = json!({ "profile": patch }).to_string();
        Answer::to(request.header("content-type", "application/merge-patch+json").body(body)).await
    }

    async fn put(&self, path: &str, body: Value) -> Answer {
        Answer::to(self.request(Method::PUT, path).json(&body)).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::to(self.request(Method::POST, path).json(&body)).await
    }
}

#[sqlx::test]
async fn a_key_is_printed_once_alone_and_opens_at_once(db: PgPool) {
    let house = House::open(db).await;
    let (code, stdout, stderr) = client_command(&house, "create orders --scope users:read").await;
    let key = stdout.strip_suffix('\n').unwrap();
    assert!(code == Some(0) && key.starts_with("tdg_") && !key.contains(char::is_whitespace), "{stdout}");
    let secret = key.rsplit('_').next().unwrap();
    assert!(!stderr.contains(secret), "{stderr}");
    Holder::of(key, &house.service).get("/v1/users").await.ok();
    let listed = client(&house, "list").await;
    assert!(listed.contains("orders  users:read  every field") && !listed.contains(secret), "{listed}");
    let kept: Vec<Vec<u8>> = sqlx::query_scalar("select sha256 from client_keys").fetch_all(&house.db).await.unwrap();
    assert!(kept.iter().all(|sha256| !key.as_bytes().windows(32).any(|part| part == sha256)));
}

#[sqlx::test]
async fn without_a_valid_key_nothing_under_v1_answers(db: PgPool) {
    let house = House::open(db).await;
    let good = client(&house, "create orders --scope users:read").await;
    let (id, secret) = good.strip_prefix("tdg_").unwrap().split_once('_').unwrap();
    let forged = format!("Bearer tdg_{id}_{}", "0".repeat(64));
    let stranger = format!("Bearer tdg_{}_{secret}", "0".repeat(16));
    let basic = format!("Basic {good}");
    let url = format!("{}/v1/users", house.service.url);
    for header in [None, Some("Bearer x"), Some(&*forged), Some(&*stranger), Some(&*basic), Some("Bearer"), Some("")] {
        let request = Client::new().get(&url);
        let request = match header {
            Some(header) => request.header("authorization", header),
            None => request,
        };
        let refused = Answer::to(request).await;
        assert_eq!(refused.refusal(401), "unauthenticated", "{header:?}");
        assert!(refused.headers["www-authenticate"].to_str().unwrap().starts_with("Bearer"), "{header:?}");
        assert!(!refused.body.to_string().contains(id), "{refused:?}");
    }
    let in_url = Answer::to(Client::new().get(format!("{url}?access_token={good}"))).await;
    assert_eq!(in_url.refusal(401), "unauthenticated", "a key in a URL is no key");
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.yaml"] {
        assert_eq!(Client::new().get(format!("{}{path}", house.service.url)).send().await.unwrap().status(), 200);
    }
}

#[sqlx::test]
async fn a_revoked_key_is_refused_by_every_instance_within_a_second(db: PgPool) {
    let house = House::open(db).await;
    let second = house.another(&["serve", "--no-relay"]).await;
    let key = client(&house, "create orders --scope users:read").await;
    let holders = [&house.service, &second].map(|service| Holder::of(&key, service));
    for holder in &holders {
        holder.get("/v1/users").await.ok();
    }
    client(&house, "revoke orders").await;
    let revoked = Instant::now();
    for holder in &holders {
        eventually("the key to be refused", async || match holder.get("/v1/users").await.status.as_u16() {
            401 => Ok(()),
            other => Err(other),
        })
        .await;
    }
    assert!(revoked.elapsed() < AT_ONCE, "{:?}", revoked.elapsed());
    assert!(client(&house, "list").await.contains("revoked"));
    let (code, _, stderr) = client_command(&house, "revoke orders").await;
    assert_eq!((code, stderr.as_str()), (Some(0), "orders was revoked before\n"));
    let (code, _, stderr) = client_command(&house, "revoke nobody").await;
    assert!(code == Some(1) && stderr.contains("there is no client nobody"), "{stderr}");
}

/// When the database cannot say that a key was not revoked, the key opens nothing.
#[sqlx::test]
async fn a_key_that_cannot_be_vouched_for_is_not_believed(db: PgPool) {
    let house = House::open(db).await;
    let orders = Holder::new(&house, "orders --scope users:read").await;
    let nobody = format!("/v1/users/{}", Uuid::new_v4());
    assert_eq!(orders.get(&nobody).await.refusal(404), "user_not_found");
    house.postgres.down();
    eventually("503", async || match orders.get(&nobody).await.status.as_u16() {
        503 => Ok(()),
        other => Err(other),
    })
    .await;
    assert_eq!(reqwest::get(format!("{}/openapi.yaml", house.service.url)).await.unwrap().status(), 200);
    house.postgres.up();
    eventually("404", async || match orders.get(&nobody).await.status.as_u16() {
        404 => Ok(()),
        other => Err(other),
    })
    .await;
}

/// More requests at once than an address may guess keys: whoever has a right one waits for the database, and is no guesser.
#[sqlx::test]
async fn a_key_that_was_known_is_no_guess_while_the_database_is_slow(db: PgPool) {
    let house = House::open(db).await;
    let orders = Holder::new(&house, "orders --scope users:read").await;
    let nobody = format!("/v1/users/{}", Uuid::new_v4());
    assert_eq!(orders.get(&nobody).await.refusal(404), "user_not_found");
    house.postgres.freeze();
    eventually("a look that is too old", async || match orders.get(&nobody).await.status.as_u16() {
        503 => Ok(()),
        other => Err(other),
    })
    .await;
    let answers = join_all((0..200).map(|_| orders.get(&nobody))).await;
    house.postgres.up();
    let statuses: BTreeSet<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
    assert!(!statuses.contains(&429) && !statuses.contains(&401), "{statuses:?}");
}

#[sqlx::test]
async fn keys_are_rotated_without_a_gap_and_expire(db: PgPool) {
    let house = House::open(db).await;
    let first = client(&house, "create orders --scope users:read").await;
    let (code, second, stderr) = client_command(&house, "rotate orders --overlap 1s").await;
    assert!(code == Some(0) && stderr.contains("goes on for 1s"), "{stderr}");
    let [first, second] = [&*first, second.trim_end()].map(|key| Holder::of(key, &house.service));
    first.get("/v1/users").await.ok();
    second.get("/v1/users").await.ok();
    eventually("the first key to end", async || match first.get("/v1/users").await.status.as_u16() {
        401 => Ok(()),
        other => Err(other),
    })
    .await;
    second.get("/v1/users").await.ok();
    client(&house, "rotate orders").await;
    let (code, _, stderr) = client_command(&house, "rotate orders").await;
    assert!(code == Some(1) && stderr.contains("two keys already") && stderr.contains("hint:"), "{stderr}");
}

/// The overlap is how long the key before goes on at most: it gives it no time that it did not have.
#[sqlx::test]
async fn a_rotation_lets_no_key_live_longer_than_it_was_given(db: PgPool) {
    let house = House::open(db).await;
    client(&house, "create orders --scope users:read --expires-after 1h").await;
    let end = "select expires_at from client_keys where client = 'orders' order by created_at limit 1";
    let end = async || sqlx::query_scalar::<_, OffsetDateTime>(end).fetch_one(&house.db).await.unwrap();
    let given = end().await;
    client(&house, "rotate orders --overlap 2h").await;
    assert_eq!(end().await, given);
}

#[sqlx::test]
async fn one_key_is_revoked_and_the_other_goes_on(db: PgPool) {
    let house = House::open(db).await;
    let first = client(&house, "create orders --scope users:read").await;
    let second = client(&house, "rotate orders").await;
    let [lost, kept] = [&first, &second].map(|key| Holder::of(key, &house.service));
    let id = first.split('_').nth(1).unwrap();
    lost.get("/v1/users").await.ok();
    client(&house, &format!("revoke orders --key {id}")).await;
    eventually("the key to be refused", async || match lost.get("/v1/users").await.status.as_u16() {
        401 => Ok(()),
        other => Err(other),
    })
    .await;
    kept.get("/v1/users").await.ok();
    let (code, _, stderr) = client_command(&house, &format!("revoke orders --key {id}")).await;
    assert!(code == Some(1) && stderr.contains("no such key"), "{stderr}");
    // A client that is made anew does not bring its old keys back.
    revoke(&house, "orders", &second).await;
    let anew = Holder::new(&house, "orders --scope users:read").await;
    anew.get("/v1/users").await.ok();
    for old in [&lost, &kept] {
        assert_eq!(old.get("/v1/users").await.refusal(401), "unauthenticated");
    }
}

/// There is no moment at which a client is revoked and its keys are not.
#[sqlx::test]
async fn a_client_is_revoked_with_its_keys_or_not_at_all(db: PgPool) {
    let house = House::open(db).await;
    let key = client(&house, "create orders --scope users:read").await;
    let holder = Holder::of(&key, &house.service);
    holder.get("/v1/users").await.ok();
    let keep_keys = "
        create function keep() returns trigger language plpgsql as $$ begin raise 'no'; end $$;
        create trigger keep before update of revoked_at on client_keys for each row execute function keep();
    ";
    sqlx::raw_sql(keep_keys).execute(&house.db).await.unwrap();
    let (code, ..) = client_command(&house, "revoke orders").await;
    assert_eq!(code, Some(1));
    assert!(!client(&house, "list").await.contains("revoked"));
    sqlx::raw_sql("drop trigger keep on client_keys").execute(&house.db).await.unwrap();
    // Revoked by hand, without its keys: they do not open anything for a client that is made anew.
    sqlx::raw_sql("update clients set revoked_at = now() where name = 'orders'").execute(&house.db).await.unwrap();
    let anew = Holder::new(&house, "orders --scope users:read").await;
    anew.get("/v1/users").await.ok();
    assert_eq!(holder.get("/v1/users").await.refusal(401), "unauthenticated");
}

#[sqlx::test]
async fn a_client_does_what_its_scopes_say_and_no_more(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    let reader = Holder::new(&house, "reader --scope users:read").await;
    let writer = Holder::new(&house, "writer --scope users:write").await;
    reader.get(&format!("/v1/users/{ana}")).await.ok();
    let refused = reader.patch(&ana, json!({ "city": "Berlin" })).await;
    assert_eq!(refused.refusal(403), "forbidden");
    assert!(refused.body["detail"].as_str().unwrap().contains("users:write"), "{refused:?}");
    let challenge = "Bearer realm=\"tidings\", error=\"insufficient_scope\", scope=\"users:write\"";
    assert_eq!(refused.headers["www-authenticate"], challenge);
    assert_eq!(writer.get(&format!("/v1/users/{ana}")).await.refusal(403), "forbidden");
    let amended = writer.patch(&ana, json!({ "city": "Berlin" })).await.ok();
    assert_eq!((amended.version(), &amended.body["profile"]), (2, &json!({})), "who may not read sees no values");
    assert_eq!(reader.get("/v1/subscriptions").await.refusal(403), "forbidden");
}

#[sqlx::test]
async fn a_client_with_a_field_list_sees_only_these_fields(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana", "city": "Berlin", "email": "ana@example.org" })).await;
    let crm = Holder::new(&house, "crm --scope users:read,users:write --field city,job_title").await;
    let seen = json!({ "city": "Berlin" });
    assert_eq!(crm.get(&format!("/v1/users/{ana}")).await.ok().body["profile"], seen);
    assert_eq!(crm.get("/v1/users").await.ok().body["users"][0]["profile"], seen);
    let batch = crm.post("/v1/users:batchGet", json!({ "ids": [ana] })).await.ok();
    assert_eq!(batch.body["results"][0]["user"]["profile"], seen);
    house.feed_is_clear().await;
    let changes = crm.get("/v1/changes").await.ok();
    assert_eq!(changes.body["changes"][0]["user_id"], json!(ana));
    assert!(!changes.body.to_string().contains("first_name"), "{changes:?}");

    let amended = crm.patch(&ana, json!({ "job_title": "Editor" })).await.ok();
    assert_eq!(amended.body["profile"], json!({ "city": "Berlin", "job_title": "Editor" }));
    let refused = crm.patch(&ana, json!({ "job_title": "Author", "email": null })).await;
    assert_eq!(refused.refusal(403), "field_forbidden");
    assert_eq!(refused.body["errors"][0]["pointer"], "/profile/email");
    let forbidden = json!({ "profile": { "email": "x" } });
    assert_eq!(crm.post("/v1/users", forbidden.clone()).await.refusal(403), "field_forbidden");
    assert_eq!(crm.put(&format!("/v1/users/{ana}"), forbidden).await.refusal(403), "field_forbidden");
    // A replacement replaces what the client may write, and leaves the rest alone.
    let replaced = crm.put(&format!("/v1/users/{ana}"), json!({ "profile": { "city": "Bonn" } })).await.ok();
    assert_eq!(replaced.body["profile"], json!({ "city": "Bonn" }));
    let whole = json!({ "first_name": "Ana", "city": "Bonn", "email": "ana@example.org" });
    assert_eq!(house.get(&ana).await.ok().body["profile"], whole);
    let deleted = Answer::to(crm.request(Method::DELETE, &format!("/v1/users/{ana}"))).await;
    assert_eq!(deleted.refusal(403), "field_forbidden", "a deletion takes fields that are not the client's");
    assert_eq!(house.get(&ana).await.ok().version(), 3);
}

/// What it read is not the whole, and its tag says so of no more than it saw.
#[sqlx::test]
async fn who_puts_back_what_he_read_takes_nothing_away_that_he_does_not_see(db: PgPool) {
    let house = House::open(db).await;
    let whole = json!({ "first_name": "Ana", "city": "Riga", "email": "ana@example.org" });
    let ana = house.user(whole.clone()).await;
    let user = format!("/v1/users/{ana}");
    let crm = Holder::new(&house, "crm --scope users:read,users:write,subscriptions").await;
    let path = format!("/v1/subscriptions/crm.{}", Uuid::new_v4().simple());
    crm.put(&path, registration(&["user.deleted"], &["city"])).await.ok();
    let read = eventually("its client to read what it declares", async || match crm.get(&user).await.ok() {
        answer if answer.body["profile"] == json!({ "city": "Riga" }) => Ok(answer),
        answer => Err(answer),
    })
    .await;
    let put = crm.request(Method::PUT, &user).header("if-match", read.etag.unwrap());
    Answer::to(put.json(&json!({ "profile": { "city": "Oslo" } }))).await.ok();
    let entry = json!({ "users": [{ "id": ana, "profile": { "city": "Bonn", "email": "a@example.org" } }] });
    crm.post("/v1/users:batchReplace", entry).await.ok();
    let mut kept = whole;
    (kept["city"], kept["email"]) = ("Bonn".into(), "a@example.org".into());
    assert_eq!(house.get(&ana).await.ok().body["profile"], kept);
    // What it sees goes, and of the rest what it names.
    crm.put(&user, json!({ "profile": {} })).await.ok();
    crm.patch(&ana, json!({ "email": null })).await.ok();
    assert_eq!(house.get(&ana).await.ok().body["profile"], json!({ "first_name": "Ana" }));
    // Who reads nobody replaces what he may write.
    let writer = Holder::new(&house, "writer --scope users:write").await;
    writer.put(&user, json!({ "profile": { "city": "Riga" } })).await.ok();
    assert_eq!(house.get(&ana).await.ok().body["profile"], json!({ "city": "Riga" }));
    house.request(Method::DELETE, &path).send().await.unwrap();
}

#[sqlx::test]
async fn a_refusal_tells_nothing_of_fields_that_are_not_the_clients(db: PgPool) {
    // What may stand in one field depends on another.
    let schema = file(
        r#"{ "type": "object", "additionalProperties": false,
             "properties": { "city": { "maxLength": 10 }, "job_title": {}, "standing": {}, "email": {} },
             "if": { "properties": { "city": { "const": "Bonn" } }, "required": ["city"] },
             "then": { "properties": { "standing": { "enum": ["left", "dismissed"] }, "job_title": { "const": "Clerk" } }, "required": ["email"] } }"#,
    );
    let house = House::with(db, &[("TIDINGS_PROFILE_SCHEMA", schema.to_str().unwrap())]).await;
    let ana = house.user(json!({ "city": "Riga", "standing": "away" })).await;
    let words = "crm --scope users:read,users:write --field city,job_title --write-field city";
    let crm = Holder::new(&house, words).await;
    let faults = |problem: &Value| -> Vec<String> {
        assert!(
            ["standing", "email", "dismissed", "away"].iter().all(|word| !problem["errors"].to_string().contains(word)),
            "{problem}"
        );
        let errors = problem["errors"].as_array().unwrap().iter();
        errors
            .map(|fault| format!("{} {}", fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap()))
            .collect()
    };
    let hidden = ["/profile hidden_field"];
    let bonn = json!({ "profile": { "city": "Bonn" } });
    assert_eq!(faults(&crm.patch(&ana, json!({ "city": "Bonn" })).await.body), hidden);
    assert_eq!(faults(&crm.put(&format!("/v1/users/{ana}"), bonn.clone()).await.body), hidden);
    assert_eq!(faults(&crm.post("/v1/users", bonn).await.body), hidden);
    let entry = json!({ "users": [{ "id": ana, "profile": { "city": "Bonn" } }] });
    let many = crm.post("/v1/users:batchReplace", entry).await.ok();
    assert_eq!(faults(&many.body["results"][0]["problem"]), hidden);
    // Of its own fields, those too that it only sees, a client hears all.
    assert_eq!(faults(&crm.patch(&ana, json!({ "city": "Castrop-Rauxel" })).await.body), ["/profile/city maxLength"]);
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    let both = ["/profile/job_title const", "/profile hidden_field"];
    assert_eq!(faults(&crm.patch(&ana, json!({ "city": "Bonn" })).await.body), both);
    assert_eq!(house.amend(&ana, json!({ "city": "Bonn" })).await.body["errors"].as_array().unwrap().len(), 3);
}

#[sqlx::test]
async fn the_external_id_is_a_field_like_another(db: PgPool) {
    let house = House::open(db).await;
    let named = json!({ "external_id": "E-1", "profile": { "first_name": "Ana" } });
    let created = Answer::to(house.request(Method::POST, "/v1/users").json(&named)).await.ok();
    let path = format!("/v1/users/{}", created.body["id"].as_str().unwrap());
    let without = Holder::new(&house, "crm --scope users:read --scope users:write --field first_name").await;
    assert!(without.get(&path).await.ok().body.get("external_id").is_none());
    assert!(without.get("/v1/users").await.ok().body["users"][0].get("external_id").is_none());
    assert_eq!(without.get("/v1/users?external_id=E-1").await.refusal(403), "field_forbidden");
    for external_id in [json!("E-1"), json!("E-2"), Value::Null] {
        let refused = without.put(&path, json!({ "external_id": external_id, "profile": {} })).await;
        assert_eq!(refused.refusal(403), "field_forbidden", "{external_id}");
        assert_eq!(refused.body["errors"][0]["pointer"], "/external_id");
    }
    let kept = without.put(&path, json!({ "profile": {} })).await.ok();
    assert!(kept.body.get("external_id").is_none());
    assert_eq!(house.page(&path).await.body["external_id"], "E-1", "whose it is not leaves it alone");
    let with =
        Holder::new(&house, "hr --scope users:read --scope users:write --field first_name --field external_id").await;
    assert_eq!(with.get("/v1/users?external_id=E-1").await.ok().body["users"][0]["external_id"], "E-1");
    let renamed = with.put(&path, json!({ "external_id": "E-2", "profile": {} })).await.ok();
    assert_eq!(renamed.body["external_id"], "E-2");
}

/// A list beside `admin` would be shown, and be without effect.
#[sqlx::test]
async fn an_administrator_has_no_list_of_fields(db: PgPool) {
    let house = House::open(db).await;
    for flag in ["--field", "--write-field"] {
        let words = format!("create adm --scope users:read,admin {flag} city");
        let (code, stdout, stderr) = client_command(&house, &words).await;
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
        assert!(stderr.contains(&format!("{flag}: admin is every field")), "{stderr}");
    }
    // One that was made with a list all the same is not shown with it.
    client(&house, "create adm --scope admin").await;
    let listed = "update clients set fields = '{city}', write_fields = '{city}' where name = 'adm'";
    sqlx::query(listed).execute(&house.db).await.unwrap();
    let table = client(&house, "list").await;
    assert!(table.contains("adm  admin  every field"), "{table}");
    let all: Value = serde_json::from_str(&client(&house, "list --json").await).unwrap();
    let adm = all.as_array().unwrap().iter().find(|client| client["name"] == "adm").unwrap();
    assert_eq!((&adm["fields"], &adm["write_fields"]), (&Value::Null, &Value::Null));
}

#[sqlx::test]
async fn what_may_be_written_can_be_less_than_what_may_be_read(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana", "city": "Berlin" })).await;
    let words = "desk --scope users:read,users:write --field first_name,city --write-field city";
    let desk = Holder::new(&house, words).await;
    let amended = desk.patch(&ana, json!({ "city": "Bonn" })).await.ok();
    assert_eq!(amended.body["profile"], json!({ "first_name": "Ana", "city": "Bonn" }));
    assert_eq!(desk.patch(&ana, json!({ "first_name": "Eve" })).await.refusal(403), "field_forbidden");
}

fn registration(keys: &[&str], fields: &[&str]) -> Value {
    json!({ "routing_keys": keys, "fields": fields, "owner": "team-invoices", "purpose": "addresses on invoices" })
}

/// One declaration: what wakes a subscription is what its client reads, and stands in the record of who reads what.
#[sqlx::test]
async fn what_a_subscription_declares_is_what_its_client_reads(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana", "city": "Berlin", "email": "ana@example.org" })).await;
    let user = format!("/v1/users/{ana}");
    let words = "invoices --scope users:read,subscriptions --field city,postcode,first_name";
    let invoices = Holder::new(&house, words).await;
    let name = format!("invoices.{}", Uuid::new_v4().simple());
    let path = format!("/v1/subscriptions/{name}");
    let refused = invoices.put(&path, registration(&["user.deleted"], &["city", "email"])).await;
    assert_eq!(refused.refusal(403), "field_forbidden", "more than it may ever read");
    assert_eq!(refused.body["errors"][0]["pointer"], "/fields/1");
    let registered = invoices.put(&path, registration(&["user.deleted"], &["city"])).await.ok();
    assert_eq!(registered.body["client"], "invoices");
    eventually("its client to read what it declares", async || {
        let profile = invoices.get(&user).await.ok().body["profile"].clone();
        if profile == json!({ "city": "Berlin" }) { Ok(()) } else { Err(profile) }
    })
    .await;
    invoices.put(&path, registration(&["user.deleted"], &["city", "first_name"])).await.ok();
    eventually("a wider declaration to count", async || {
        let profile = invoices.get(&user).await.ok().body["profile"].clone();
        if profile == json!({ "first_name": "Ana", "city": "Berlin" }) { Ok(()) } else { Err(profile) }
    })
    .await;

    let readers = |record: &Answer, field: &str| {
        let fields = record.body["fields"].as_array().unwrap();
        fields.iter().find(|one| one["field"] == field).unwrap()["readers"].clone()
    };
    let record = house.page("/v1/fields").await.ok();
    let admin = json!({ "client": "tests", "subscription": null, "owner": null, "purpose": null });
    let reads = json!({ "client": "invoices", "subscription": name, "owner": "team-invoices", "purpose": "addresses on invoices" });
    assert_eq!(readers(&record, "city"), json!([reads, admin]));
    assert_eq!(readers(&record, "email"), json!([admin]));
    assert_eq!(readers(&record, "postcode"), json!([admin]), "granted and not declared");
    let own = invoices.get("/v1/fields").await.ok();
    assert_eq!((readers(&own, "city"), readers(&own, "email")), (json!([reads]), json!([])), "of others nothing");

    // Who is woken by everything declares everything, which is no more than its list.
    invoices.put(&path, registration(&["#"], &[])).await.ok();
    let list = json!({ "first_name": "Ana", "city": "Berlin" });
    house.amend(&ana, json!({ "postcode": "10115" })).await.ok();
    eventually("the whole list to be read", async || {
        let profile = invoices.get(&user).await.ok().body["profile"].clone();
        let mut whole = list.clone();
        whole["postcode"] = "10115".into();
        if profile == whole { Ok(()) } else { Err(profile) }
    })
    .await;
    let record = house.page("/v1/fields").await.ok().body;
    let all = record["fields"].as_array().unwrap();
    let names = all.iter().filter(|field| field["readers"].as_array().unwrap().contains(&reads));
    let names: Vec<&str> = names.map(|field| field["field"].as_str().unwrap()).collect();
    assert_eq!(names, ["city", "first_name", "postcode"]);
    Answer::to(invoices.request(Method::DELETE, &format!("{path}?waiting=discard"))).await.ok();
}

/// Who stands for a subscription is its registrar, or whom an administrator names; and nobody who was revoked reads anything.
#[sqlx::test]
async fn who_stands_for_a_subscription_is_said_by_those_who_may(db: PgPool) {
    let house = House::open(db).await;
    let orders = client(&house, "create orders --scope users:read,subscriptions --field city").await;
    let rival = Holder::new(&house, "rival --scope subscriptions").await;
    let path = format!("/v1/subscriptions/orders.{}", Uuid::new_v4().simple());
    let standing = |client: &str| {
        let mut wish = registration(&["user.deleted"], &["city"]);
        wish["client"] = client.into();
        wish
    };
    let refused = rival.put(&path, standing("orders")).await;
    assert_eq!(
        (refused.refusal(422), &refused.body["errors"][0]["pointer"]),
        ("subscription_invalid", &json!("/client"))
    );
    let put = async |wish: Value| Answer::to(house.request(Method::PUT, &path).json(&wish)).await;
    let unknown = put(standing("nobody")).await;
    assert_eq!(
        (unknown.refusal(422), &unknown.body["errors"][0]["code"]),
        ("subscription_invalid", &json!("unknown_client"))
    );
    assert_eq!(put(standing("orders")).await.ok().body["client"], "orders");
    assert_eq!(put(registration(&["user.deleted"], &["city"])).await.ok().body["client"], "orders", "as before");
    Holder::of(&orders, &house.service).get(&path).await.ok();
    let reads = async || {
        let record = house.page("/v1/fields").await.ok().body;
        let all = record["fields"].as_array().unwrap();
        let city = all.iter().find(|one| one["field"] == "city").unwrap();
        city["readers"].as_array().unwrap().iter().map(|reader| reader["client"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(reads().await, [json!("orders"), json!("tests")]);
    revoke(&house, "orders", &orders).await;
    assert_eq!(reads().await, [json!(null), json!("tests")], "its subscription goes on, and nobody stands for it");
    Answer::to(house.request(Method::DELETE, &path)).await.ok();
}

/// What it declares beyond its client's list would wake that client, and take away all else that it reads.
#[sqlx::test]
async fn nobody_declares_for_a_client_what_it_may_not_come_to_read(db: PgPool) {
    let house = House::open(db).await;
    let words = "create invoices --scope users:read,subscriptions --field city,postcode";
    let invoices = Holder::of(&client(&house, words).await, &house.service);
    let ana = house.user(json!({ "city": "Riga", "email": "ana@example.org" })).await;
    let name = format!("invoices.{}", Uuid::new_v4().simple());
    let path = format!("/v1/subscriptions/{name}");
    let standing = |client: &str, fields: &[&str]| {
        let mut wish = registration(&["user.deleted"], fields);
        wish["client"] = client.into();
        wish
    };
    let put = async |wish: Value| Answer::to(house.request(Method::PUT, &path).json(&wish)).await;
    let is_refused = |refused: &Answer| {
        assert_eq!(refused.refusal(403), "field_forbidden");
        assert_eq!(refused.body["errors"].as_array().unwrap().len(), 1, "{refused:?}");
        assert_eq!(refused.body["errors"][0]["pointer"], "/fields/1");
        let detail = refused.body["errors"][0]["detail"].as_str().unwrap();
        assert!(detail.contains("email") && detail.contains("invoices"), "{detail}");
    };
    is_refused(&put(standing("invoices", &["city", "email"])).await);
    assert_eq!(house.page(&path).await.refusal(404), "subscription_not_found");
    put(standing("invoices", &["city"])).await.ok();
    // Whoever stood for it before still does, and nobody else has to be named.
    is_refused(&put(registration(&["user.deleted"], &["city", "email"])).await);
    put(registration(&["user.deleted", "profile.updated"], &["postcode", "city"])).await.ok();
    let seen = invoices.get(&format!("/v1/users/{ana}")).await.ok();
    assert_eq!(seen.body["profile"], json!({ "city": "Riga" }));

    let by_hand = async |client: &str, fields: &str| {
        let of = ["--key", "user.deleted", "--field", fields, "--owner", "team-invoices", "--purpose", "x"];
        let words = [&["subscription", "put", &name][..], &of, &["--client", client]].concat();
        let output = tidings(&words, house.settings()).output().await.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = by_hand("invoices", "city,email").await;
    assert_eq!(
        (code, said.contains("--field: email is not in the list of the client invoices")),
        (Some(2), true),
        "{said}"
    );
    assert_eq!(by_hand("invoices", "city,postcode").await.0, Some(0));
    // Who has no list may come to read everything; and who was revoked reads nothing, whatever is declared.
    client(&house, "create all --scope users:read --no-key").await;
    assert_eq!(by_hand("all", "city,email").await.0, Some(0));
    client(&house, "revoke all").await;
    put(registration(&["user.deleted"], &["email"])).await.ok();
    Answer::to(house.request(Method::DELETE, &path)).await.ok();
}

#[sqlx::test]
async fn of_another_clients_subscription_nothing_is_told(db: PgPool) {
    let house = House::open(db).await;
    let orders = Holder::new(&house, "orders --scope subscriptions").await;
    let rival = Holder::new(&house, "rival --scope subscriptions").await;
    let name = format!("orders.{}", Uuid::new_v4().simple());
    let path = format!("/v1/subscriptions/{name}");
    orders.put(&path, registration(&["user.deleted"], &[])).await.ok();
    let questions = [
        (Method::GET, path.clone()),
        (Method::DELETE, path.clone()),
        (Method::GET, format!("{path}/dead-letters")),
        (Method::DELETE, format!("{path}/dead-letters?confirm={name}")),
        (Method::DELETE, format!("{path}/dead-letters/{}", Uuid::new_v4())),
        (Method::GET, format!("{path}/backfill")),
        (Method::POST, format!("{path}/backfill:pause")),
        (Method::POST, format!("{path}/backfill:resume")),
        (Method::POST, format!("{path}/backfill:cancel")),
    ];
    for (method, path) in questions {
        let refused = Answer::to(rival.request(method.clone(), &path)).await;
        assert_eq!(refused.refusal(404), "subscription_not_found", "{method} {path}");
        // True of each of the two.
        let both = "nobody registered this name, or this client does not stand for it";
        assert_eq!(refused.body["detail"], both, "{method} {path}");
    }
    let backfill = rival.post(&format!("{path}/backfill"), json!({ "users": "all" })).await;
    assert_eq!(backfill.refusal(404), "subscription_not_found");
    let redrive = rival.post(&format!("{path}/dead-letters:redrive"), json!({ "all": true })).await;
    assert_eq!(redrive.refusal(404), "subscription_not_found");
    assert_eq!(
        rival.put(&path, registration(&["#"], &[])).await.refusal(409),
        "name_taken",
        "the same owner's name is no key"
    );
    assert_eq!(rival.get("/v1/subscriptions").await.ok().body["subscriptions"], json!([]));
    orders.get(&path).await.ok();
    assert_eq!(house.page(&path).await.ok().body["client"], "orders", "an administrator looks after all of them");
    Answer::to(orders.request(Method::DELETE, &path)).await.ok();
}

/// An application may declare for itself, and the registry declares the very same: it must not come into another client's hands.
#[sqlx::test]
async fn a_queue_that_nobody_registered_is_no_clients_to_take(db: PgPool) {
    let house = House::open(db).await;
    let own = Subscribed::to(&house, "badges", &["user.deleted"], &[]).await;
    sqlx::query("delete from subscriptions").execute(&house.db).await.unwrap();
    let rival = Holder::new(&house, "rival --scope subscriptions").await;
    let path = format!("/v1/subscriptions/{}", own.name);
    let refused = rival.put(&path, registration(&["#"], &[])).await;
    assert_eq!(refused.refusal(409), "name_taken");
    assert_eq!(house.page(&path).await.refusal(404), "subscription_not_found");
    // Nor is that decided while nobody can tell.
    let other = format!("/v1/subscriptions/other.{}", Uuid::new_v4().simple());
    house.broker.down();
    assert_eq!(rival.put(&other, registration(&["#"], &[])).await.refusal(503), "broker_unavailable");
    assert_eq!(house.page(&other).await.refusal(404), "subscription_not_found");
    house.broker.up();
    Answer::to(house.request(Method::PUT, &path).json(&registration(&["user.deleted"], &[]))).await.ok();
    own.end().await;
}

#[sqlx::test]
async fn one_client_leaves_others_their_share_of_subscriptions(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "60s")]).await;
    let greedy = Holder::new(&house, "greedy --scope subscriptions").await;
    let modest = Holder::new(&house, "modest --scope subscriptions").await;
    let hundred = "
        insert into subscriptions (name, routing_keys, fields, owner, purpose, bound_keys, bound_fields, client, declared_revision)
        select 'greedy.' || n, '{#}', '{}', 'greedy', 'a test', '{#}', '{}', 'greedy', 1 from generate_series(1, 100) as n
    ";
    // After the look, of which there is one a minute: nobody is to declare their queues.
    eventually("the first look", async || match house.metric("tidings_subscriptions_watching").await {
        1.0 => Ok(()),
        other => Err(other),
    })
    .await;
    sqlx::query(hundred).execute(&house.db).await.unwrap();
    let path = format!("/v1/subscriptions/one.{}", Uuid::new_v4().simple());
    assert_eq!(greedy.put(&path, registration(&["#"], &[])).await.refusal(409), "too_many_subscriptions");
    modest.put(&path, registration(&["#"], &[])).await.ok();
    Answer::to(modest.request(Method::DELETE, &path)).await.ok();
}

#[sqlx::test]
async fn a_schema_without_a_field_that_somebody_declared_is_refused_with_their_names(db: PgPool) {
    let house = House::open(db).await;
    client(&house, "create crm --scope users:read --field email").await;
    let name = format!("invoices.{}", Uuid::new_v4().simple());
    let wish = registration(&[], &["city"]);
    Answer::to(house.request(Method::PUT, &format!("/v1/subscriptions/{name}")).json(&wish)).await.ok();
    let schema = json!({ "properties": { "first_name": {} }, "additionalProperties": false });
    let schema = file(&schema.to_string());
    let mut settings = house.settings().to_vec();
    settings.push(("TIDINGS_PROFILE_SCHEMA".to_owned(), schema.to_str().unwrap().to_owned()));
    let refused = tidings(&["serve"], &settings).output().await.unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    for said in ["email: client crm".to_owned(), format!("city: subscription {name}")] {
        assert!(stderr.contains(&said), "{said}: {stderr}");
    }
    Answer::to(house.request(Method::DELETE, &format!("/v1/subscriptions/{name}"))).await.ok();
}

#[sqlx::test]
async fn nobody_is_asked_for_a_key_only_where_nobody_else_comes(db: PgPool) {
    let house = House::open(db).await;
    let mut settings = house.settings().to_vec();
    settings.push(("TIDINGS_INSECURE_NO_AUTH".to_owned(), "true".to_owned()));
    let open = Service::start(&["serve", "--no-relay"], &settings).await;
    assert_eq!(Client::new().get(format!("{}/v1/users", open.url)).send().await.unwrap().status(), 200);
    // A browser on this machine asks what any page tells it to.
    let ask = |method: Method, path: &str, headers: &[(&'static str, &'static str)]| {
        let request = Client::new().request(method, format!("{}{path}", open.url));
        Answer::to(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)))
    };
    for elsewhere in [("host", "evil.example"), ("origin", "https://evil.example"), ("origin", "null")] {
        assert_eq!(ask(Method::GET, "/v1/users", &[elsewhere]).await.refusal(403), "forbidden", "{elsewhere:?}");
        let cancel = ask(Method::POST, "/v1/subscriptions/orders/backfill:cancel", &[elsewhere]).await;
        assert_eq!(cancel.refusal(403), "forbidden", "{elsewhere:?}");
    }
    ask(Method::GET, "/v1/users", &[("host", "localhost:8080"), ("origin", "http://127.0.0.1:3000")]).await.ok();
    eventually("the service to say so", async || {
        let log = open.log();
        if log.contains("whoever reaches 127.0.0.1:0 may do everything") { Ok(()) } else { Err(log) }
    })
    .await;
    settings.push(("TIDINGS_LISTEN".to_owned(), "0.0.0.0:0".to_owned()));
    let refused = tidings(&["serve"], &settings).output().await.unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && stderr.contains("only with a loopback address"), "{stderr}");
}

#[sqlx::test]
async fn when_a_key_was_used_is_noted(db: PgPool) {
    let mut house = House::open(db).await;
    let orders = Holder::new(&house, "orders --scope users:read").await;
    orders.get("/v1/users").await.ok();
    assert!(client(&house, "list").await.contains("never used"));
    // At the latest when the service leaves.
    house.service.signal("-TERM").await;
    assert_eq!(house.service.left().await, Some(0));
    let listed: Value = serde_json::from_str(&client(&house, "list --json").await).unwrap();
    let orders = listed.as_array().unwrap().iter().find(|client| client["name"] == "orders").unwrap();
    assert!(orders["keys"][0]["last_used_at"].is_string(), "{listed}");
}

#[sqlx::test]
async fn wrong_words_are_named_all_at_once(db: PgPool) {
    let house = House::open(db).await;
    let words = "create Orders --scope users:raed --field shoe_size,a.b --expires-after soon";
    let (code, stdout, stderr) = client_command(&house, words).await;
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    for said in
        ["5 settings are wrong", "lowercase letter", "users:read, users:write", "no field shoe_size", "such as 30s"]
    {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
    client(&house, "create orders --scope users:read").await;
    let (code, _, stderr) = client_command(&house, "create orders --scope admin").await;
    assert!(code == Some(1) && stderr.contains("hint:"), "{stderr}");
    let (code, _, stderr) = client_command(&house, "revoke nobody").await;
    assert!(code == Some(1) && stderr.contains("hint:"), "{stderr}");
    assert!(!house::key().is_empty());
}
