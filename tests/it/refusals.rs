//! Refusals: every one a problem+json with a stable code, and none of them changes or tells anything.

use std::time::Duration;

use reqwest::{Body, Method};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use uuid::Uuid;

use crate::house::{Answer, House, PATIENCE, http};

/// Places and codes of the faults in a refusal, sorted.
fn faults(answer: &Answer) -> Vec<(&str, &str)> {
    let faults = answer.body["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
    assert!(faults.iter().all(|fault| fault["detail"].as_str().is_some_and(|detail| !detail.is_empty())), "{answer:?}");
    let mut faults: Vec<_> =
        faults.iter().map(|fault| (fault["pointer"].as_str().unwrap(), fault["code"].as_str().unwrap())).collect();
    faults.sort_unstable();
    faults
}

async fn post(house: &House, body: impl Into<Body>) -> Answer {
    Answer::to(house.request(Method::POST, "/v1/users").header("content-type", "application/json").body(body)).await
}

/// `levels` objects, one inside the other, as a body.
pub fn nested(levels: usize) -> String {
    let inner = levels - 2;
    format!(r#"{{"profile":{}1{}}}"#, r#"{"social":"#.repeat(inner + 1), "}".repeat(inner + 1))
}

#[sqlx::test]
async fn a_body_that_is_not_json_is_malformed(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let deep = "[".repeat(30_000);
    for body in [
        "",
        "{",
        r#"{"profile":{"first_name":"Ana"}"#,
        r#"{"profile":{}} x"#,
        r#"{"profile":{'first_name':1}}"#,
        r#"{"profile":{"first_name":NaN}}"#,
        r#"{"profile":{"first_name":"\ud800"}}"#,
        r#"{"profile":{"first_name":"\udc00\ud800"}}"#,
        "{\"profile\":{\"first_name\":\"\u{1}\"}}",
        "\u{feff}{\"profile\":{}}",
        &deep,
    ] {
        let shown: String = body.chars().take(60).collect();
        assert_eq!(post(&house, body.to_owned()).await.refusal(400), "malformed_json", "{shown}");
        let patched = Answer::to(house.patch(&ana, json!({})).body(body.to_owned())).await;
        assert_eq!(patched.refusal(400), "malformed_json", "{shown}");
    }
    // JSON, and yet nothing that could be read to its end.
    for body in [r#"{"profile":{"social":{"n":1e400}}}"#, r#"{"profile":{"first_name":"\ud83d"}}"#] {
        let refused = post(&house, body).await;
        assert_eq!(refused.refusal(400), "malformed_json", "{body}");
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(detail.contains("no double holds") && detail.contains("half of a surrogate pair"), "{detail}");
    }
    let not_utf8 = post(&house, b"{\"profile\":{\"first_name\":\"\xff\"}}".to_vec()).await;
    assert_eq!(not_utf8.refusal(400), "malformed_json");
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

/// A body, the code of its refusal, and pointer and code of each fault.
type Refused<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

#[sqlx::test]
async fn a_body_that_cannot_be_taken_names_every_fault_by_pointer(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let table: &[Refused] = &[
        ("[]", "body_invalid", &[("", "type")]),
        ("{}", "body_invalid", &[("/profile", "required")]),
        (r#"{"profile":[]}"#, "body_invalid", &[("/profile", "type")]),
        (
            r#"{"profile":{},"version":7,"a/b":1}"#,
            "body_invalid",
            &[("/a~1b", "unknown_member"), ("/version", "unknown_member")],
        ),
        (
            r#"{"profile":{"first_name":"a","first_name":"b"}}"#,
            "unacceptable_json",
            &[("/profile/first_name", "duplicate_key")],
        ),
        (r#"{"profile":{},"profile":{}}"#, "unacceptable_json", &[("/profile", "duplicate_key")]),
        (r#"{"profile":{"first_name":"\u0000"}}"#, "unacceptable_json", &[("/profile/first_name", "nul_character")]),
        (r#"{"profile":{"social":{"a\u0000":1}}}"#, "unacceptable_json", &[("/profile/social/a\0", "nul_character")]),
        (
            r#"{"profile":{"social":{"$serde_json::private::RawValue":"x"}}}"#,
            "unacceptable_json",
            &[("/profile/social/$serde_json::private::RawValue", "reserved_name")],
        ),
        (
            r#"{"profile":{"district":9223372036854775808}}"#,
            "unacceptable_json",
            &[("/profile/district", "number_out_of_range")],
        ),
        (
            r#"{"profile":{"district":9007199254740992}}"#,
            "unacceptable_json",
            &[("/profile/district", "number_out_of_range")],
        ),
        (
            r#"{"profile":{"phone":["\u0000",{"a":1,"a":-9223372036854775809}]}}"#,
            "unacceptable_json",
            &[
                ("/profile/phone/0", "nul_character"),
                ("/profile/phone/1/a", "duplicate_key"),
                ("/profile/phone/1/a", "number_out_of_range"),
            ],
        ),
        (
            r#"{"profile":{"first_name":7,"shoe/size":38,"hat~":null,"job_title":[]}}"#,
            "profile_invalid",
            &[
                ("/profile/first_name", "type"),
                ("/profile/hat~0", "unknown_field"),
                ("/profile/job_title", "type"),
                ("/profile/shoe~1size", "unknown_field"),
            ],
        ),
    ];
    for (body, code, expected) in table {
        let answer = post(&house, *body).await;
        assert_eq!(answer.refusal(422), *code, "{body}");
        assert_eq!(faults(&answer), *expected, "{body}");
    }
    // What only a whole profile can show, a patch shows too: it is the profile after it that counts.
    let refused = house.amend(&ana, json!({ "first_name": 7, "hat": 1, "job_title": "Editor" })).await;
    assert_eq!(refused.refusal(422), "profile_invalid");
    assert_eq!(faults(&refused), [("/profile/first_name", "type"), ("/profile/hat", "unknown_field")]);
    assert_eq!(house.get(&ana).await.version(), 1);
    assert_eq!(house.told(&ana).await, ["user.created"]);
    let users = house.page("/v1/users").await.ok();
    assert_eq!(users.body["users"].as_array().unwrap().len(), 1, "{users:?}");
}

/// A name is the client's own, and each fault in its place would repeat it.
#[sqlx::test]
async fn a_refusal_is_short_however_long_the_names_are(db: PgPool) {
    let house = House::open(db).await;
    let (name, twice) = ("n".repeat(30_000), r#""a":1,"#.repeat(51) + r#""a":1"#);
    let answer = post(&house, format!(r#"{{"profile":{{"{name}":{{{twice}}}}}}}"#)).await;
    assert_eq!(answer.refusal(422), "unacceptable_json");
    let cut = "/profile/".to_owned() + &name[..491] + "…";
    assert_eq!(faults(&answer), [(&*cut, "duplicate_key"); 50]);
}

#[sqlx::test]
async fn nesting_has_a_bottom(db: PgPool) {
    let house = House::open(db).await;
    assert_eq!(post(&house, nested(32)).await.status, 201);
    let refused = post(&house, nested(33)).await;
    assert_eq!(refused.refusal(422), "unacceptable_json");
    assert_eq!(faults(&refused), [(format!("/profile{}", "/social".repeat(31)).as_str(), "too_deep")]);
}

#[sqlx::test]
async fn a_body_of_another_kind_hears_which_kind_is_right(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let one = format!("/v1/users/{ana}");
    let table = [
        (Method::POST, "/v1/users", "accept", "application/json", "application/merge-patch+json"),
        (Method::PUT, &one, "accept", "application/json", "text/plain"),
        (Method::PATCH, &one, "accept-patch", "application/merge-patch+json", "application/json"),
        (Method::PATCH, &one, "accept-patch", "application/merge-patch+json", "application/json-patch+json"),
    ];
    for (method, path, header, right, wrong) in table {
        let utf16 = format!("{right}; charset=utf-16");
        for (media_type, coding) in
            [(Some(wrong), None), (None, None), (Some(&*utf16), None), (Some(right), Some("gzip"))]
        {
            let mut request = house.request(method.clone(), path).body(r#"{"profile":{"city":"Riga"}}"#);
            for (name, value) in [("content-type", media_type), ("content-encoding", coding)] {
                request = value.into_iter().fold(request, |request, value| request.header(name, value));
            }
            let answer = Answer::to(request).await;
            assert_eq!(answer.refusal(415), "unsupported_media_type", "{method} {media_type:?} {coding:?}");
            assert_eq!(answer.headers[header], right, "{method} {media_type:?} {coding:?}");
        }
        let request = house.request(method.clone(), path).header("content-type", right).header("content-type", wrong);
        let twice = Answer::to(request.body(r#"{"profile":{"city":"Riga"}}"#)).await;
        assert_eq!(twice.refusal(400), "invalid_header", "{method} {wrong}");
        let spelt_otherwise = format!("{} ; Charset=\"UTF-8\"", right.to_uppercase());
        let request = house.request(method.clone(), path).header("content-type", spelt_otherwise);
        let taken = Answer::to(request.header("content-encoding", "identity").body(r#"{"profile":{}}"#)).await;
        assert!(taken.status.is_success(), "{method} {taken:?}");
    }
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

/// A body of exactly this many bytes: the object, and spaces.
fn sized(bytes: usize) -> Vec<u8> {
    let mut body = br#"{"profile":{"city":"Riga"}}"#.to_vec();
    body.resize(bytes, b' ');
    body
}

fn in_chunks(body: Vec<u8>) -> Body {
    let chunks: Vec<_> = body.chunks(8192).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect();
    Body::wrap_stream(futures_util::stream::iter(chunks))
}

#[sqlx::test]
async fn a_body_is_too_large_however_it_is_sent(db: PgPool) {
    let house = House::open(db).await;
    assert_eq!(post(&house, sized(65_536)).await.status, 201);
    assert_eq!(post(&house, in_chunks(sized(65_536))).await.status, 201);
    assert_eq!(post(&house, sized(65_537)).await.refusal(413), "payload_too_large");
    assert_eq!(post(&house, in_chunks(sized(65_537))).await.refusal(413), "payload_too_large");
    let users = house.page("/v1/users").await.ok();
    assert_eq!(users.body["users"].as_array().unwrap().len(), 2);
}

#[sqlx::test]
async fn amendments_do_not_add_up_to_more_than_a_request_may_hold(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let half = |name: &str| json!({ "social": { name: { "note": "x".repeat(40_000) } } });
    house.amend(&ana, half("first")).await.ok();
    let second = house.amend(&ana, half("second")).await;
    assert_eq!(second.refusal(422), "profile_invalid");
    assert_eq!(second.body["errors"][0]["code"], "too_large");
    assert_eq!(house.get(&ana).await.version(), 2);
}

#[sqlx::test]
async fn a_change_takes_no_parameters(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let path = format!("/v1/users/{ana}?if_version=1");
    for (method, path) in [
        (Method::POST, "/v1/users?if_version=1"),
        (Method::PATCH, &path),
        (Method::PUT, &path),
        (Method::DELETE, &path),
    ] {
        let asked = house.request(method.clone(), path).header("content-type", "application/json").body("{}");
        assert_eq!(Answer::to(asked).await.refusal(400), "invalid_query", "{method}");
    }
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn a_request_that_makes_no_sense_is_refused(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "city": "Riga" })).await;
    let bare = ana.simple().to_string();
    let table = [
        ("/v1/users/7".to_owned(), "invalid_user_id"),
        (format!("/v1/users/{bare}"), "invalid_user_id"),
        (format!("/v1/users/%7B{ana}%7D"), "invalid_user_id"),
        (format!("/v1/users/{}", Uuid::nil()), "invalid_user_id"),
        ("/v1/users/%ff".to_owned(), "invalid_user_id"),
        (format!("/v1/users/{ana}?min_version=two"), "invalid_query"),
        (format!("/v1/users/{ana}?min_version=9223372036854775808"), "invalid_query"),
        (format!("/v1/users/{ana}?minversion=2"), "invalid_query"),
        ("/v1/users?limit=0".to_owned(), "invalid_query"),
        ("/v1/users?limit=501".to_owned(), "invalid_query"),
        ("/v1/users?limit=-1".to_owned(), "invalid_query"),
        ("/v1/users?limit=many".to_owned(), "invalid_query"),
        ("/v1/users?limit=1&limit=2".to_owned(), "invalid_query"),
        ("/v1/users?offset=7".to_owned(), "invalid_query"),
        ("/v1/users?external_id=J%FCrgen".to_owned(), "invalid_query"),
        ("/v1/users?external_id=%C3&after=%BC".to_owned(), "invalid_query"),
        ("/v1/users?after=".to_owned(), "invalid_cursor"),
        ("/v1/users?after=!".to_owned(), "invalid_cursor"),
        (format!("/v1/users?after={ana}"), "invalid_cursor"),
    ];
    for (path, code) in table {
        assert_eq!(house.page(&path).await.refusal(400), code, "{path}");
    }
    for (path, detail) in [
        (
            format!("/v1/users/{ana}?min_version=9223372036854775808"),
            "min_version is a number from 1 to 9223372036854775807",
        ),
        ("/v1/users?limit=".to_owned(), "limit is a number from 1 to 500"),
        ("/v1/users?limit=501".to_owned(), "limit is a number from 1 to 500"),
        ("/v1/changes?limit=-1".to_owned(), "limit is a number from 1 to 1000"),
        ("/v1/digest?buckets=x".to_owned(), "buckets is a number from 1 to 65536"),
        ("/v1/users?limit=1&limit=2".to_owned(), "limit may be there once"),
        ("/v1/deletions".to_owned(), "state has to be there: expected `overdue`"),
        ("/v1/deletions?state=late".to_owned(), "there is no such choice: expected `overdue`"),
        ("/v1/subscriptions?limit=1".to_owned(), "there is no such parameter: none is taken here"),
    ] {
        assert_eq!(house.page(&path).await.body["detail"], detail, "{path}");
    }
    // Whatever a client writes where a name of ours should be, it does not hear it again.
    for path in ["/v1/users?Ana=1", "/v1/users?query%20string:%20Ana=1", "/v1/users?unknown%20field%20%60Ana=1"] {
        let refused = house.page(path).await;
        assert_eq!(refused.refusal(400), "invalid_query", "{path}");
        assert!(!refused.body.to_string().contains("Ana"), "{refused:?}");
    }
    for path in ["/", "/v1", "/v1/users/", "/v2/users", "/v1/users/7/8"] {
        assert_eq!(house.page(path).await.refusal(404), "route_not_found", "{path}");
    }
    let conditions = [
        ("if-match", "2"),
        ("if-match", "\"2"),
        ("if-match", "\"2\" \"3\""),
        ("if-match", "w/\"2\""),
        ("if-match", ""),
        ("if-none-match", "\"2\""),
        ("if-none-match", "x"),
    ];
    for (name, value) in conditions {
        let answer = Answer::to(house.patch(&ana, json!({ "city": "Oslo" })).header(name, value)).await;
        assert_eq!(answer.refusal(400), "invalid_header", "{name}: {value}");
    }
    // What would be without effect.
    let (one, many) = (json!({ "profile": {} }), json!({ "users": [{ "id": ana, "profile": {} }] }));
    for (path, body, header, code) in [
        ("/v1/users", &one, "if-match", "invalid_header"),
        ("/v1/users", &one, "if-none-match", "invalid_header"),
        ("/v1/users:batchReplace", &many, "if-match", "invalid_header"),
        ("/v1/users:batchReplace", &many, "idempotency-key", "invalid_idempotency_key"),
    ] {
        let answer = Answer::to(house.request(Method::POST, path).header(header, "*").json(body)).await;
        assert_eq!(answer.refusal(400), code, "{path} {header}");
    }
    // That there is a user, and that there is none.
    let nobody = Uuid::new_v4();
    for request in [
        house.patch(&ana, json!({ "city": "Oslo" })),
        house.request(Method::PUT, &format!("/v1/users/{nobody}")).json(&one),
    ] {
        let both = request.header("if-match", "\"1\"").header("if-none-match", "*");
        assert_eq!(Answer::to(both).await.refusal(412), "version_mismatch");
    }
    assert_eq!(house.get(&nobody).await.refusal(404), "user_not_found");
    for version in ["0", "-1"] {
        let read = house.page(&format!("/v1/users/{ana}?min_version={version}")).await;
        assert_eq!(read.refusal(400), "invalid_query", "{version}");
    }
    let read = house.request(Method::GET, &format!("/v1/users/{ana}")).header("if-none-match", "1");
    assert_eq!(Answer::to(read).await.refusal(400), "invalid_header");
    assert_eq!(house.told(&ana).await, ["user.created"]);
}

#[sqlx::test]
async fn a_method_that_is_not_there_hears_which_are(db: PgPool) {
    let house = House::open(db).await;
    let one = format!("/v1/users/{}", Uuid::new_v4());
    let table = [
        (Method::DELETE, "/v1/users", "GET,HEAD,POST"),
        (Method::POST, &one, "DELETE,GET,HEAD,PATCH,PUT"),
        (Method::POST, "/healthz", "GET,HEAD"),
    ];
    for (method, path, allowed) in table {
        let answer = Answer::to(house.request(method.clone(), path)).await;
        assert_eq!(answer.refusal(405), "method_not_allowed", "{method} {path}");
        let mut allow: Vec<&str> = answer.headers["allow"].to_str().unwrap().split(',').map(str::trim).collect();
        allow.sort_unstable();
        assert_eq!(allow.join(","), allowed, "{method} {path}");
    }
}

/// It has no document, and names what it has.
#[sqlx::test]
async fn a_relay_names_no_page_that_it_does_not_have(db: PgPool) {
    let house = House::open(db).await;
    let (relay, http) = (house.another(&["relay"]).await, http());
    // Not held against the document, which is of those that serve everything.
    let ask = async |path: &str| Answer::of(http.get(format!("{}{path}", relay.url)).send().await.unwrap()).await;
    for path in ["/", "/openapi.yaml", "/v1/users"] {
        let refused = ask(path).await;
        assert_eq!(refused.refusal(404), "route_not_found", "{path}");
        let words = refused.body["detail"].as_str().unwrap().split([' ', ',']);
        let pages: Vec<&str> = words.filter(|word| word.starts_with('/')).collect();
        assert_eq!(pages, ["/healthz", "/readyz", "/metrics"], "{path}");
        for page in pages {
            assert_ne!(ask(page).await.status, 404, "{page}");
        }
    }
}

#[sqlx::test]
async fn a_request_may_be_named_by_its_client(db: PgPool) {
    let house = House::open(db).await;
    let named = async |id: &str| Answer::to(house.request(Method::GET, "/v1/nothing").header("x-request-id", id)).await;
    let answer = named("import-7.b_2").await;
    assert_eq!((answer.refusal(404), &answer.body["request_id"]), ("route_not_found", &json!("import-7.b_2")));
    // What could forge a line of the log is no name.
    for harmful in ["a b", "a\tinfo", "", &"x".repeat(65)] {
        let answer = named(harmful).await;
        assert_eq!(answer.refusal(404), "route_not_found");
        assert_ne!(answer.body["request_id"], json!(harmful));
        assert!(answer.body["request_id"].as_str().unwrap().parse::<Uuid>().is_ok(), "{answer:?}");
    }
}

#[sqlx::test]
async fn every_problem_explains_itself(db: PgPool) {
    let house = House::open(db).await;
    let answer = house.page("/v1/users/7").await;
    let names: Vec<&String> = answer.body.as_object().unwrap().keys().collect();
    assert_eq!(names, ["code", "detail", "request_id", "status", "title", "type"]);
    assert_eq!(answer.body["type"], "urn:tidings:problem:invalid_user_id");
    assert_eq!(answer.body["title"], "Bad Request");
    assert_eq!(answer.headers["cache-control"], "no-store");
    assert_ne!(answer.body["detail"], Value::Null);
}

#[sqlx::test]
async fn a_client_that_never_finishes_its_headers_is_let_go(db: PgPool) {
    let house = House::open(db).await;
    let address = house.service.url.strip_prefix("http://").unwrap();
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-").await.unwrap();
    let mut rest = vec![];
    let ended = timeout(PATIENCE.min(Duration::from_secs(20)), slow.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the connection stays open");
    assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
}

#[sqlx::test]
async fn a_refusal_names_enough_faults_and_not_thousands(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({})).await;
    let unknown: Value = (0..3000).map(|n| (format!("f{n}"), json!(n))).collect::<serde_json::Map<_, _>>().into();
    let created = house.create(unknown.clone()).await;
    assert_eq!(created.refusal(422), "profile_invalid");
    assert_eq!(faults(&created).len(), 50);
    assert_eq!(faults(&house.amend(&ana, unknown).await).len(), 50);
}
