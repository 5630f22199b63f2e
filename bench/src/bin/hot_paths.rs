//! Hot paths: what every change costs this process, without I/O, so that its instructions can be counted.
//!
//! Promise: the same work each time, on the same input. `./dev instructions` runs a path once and a thousand times more under callgrind;
//! the difference is the path's own, whatever the machine is doing.
//! Not here, on purpose: time.

use std::{hint::black_box, path::Path, process::ExitCode, sync::Arc};

use lapin::BasicProperties;
use secrecy::ExposeSecret;
use serde_json::value::RawValue;
use tidings::{
    clients::Key,
    json,
    profile::{self, Fields, Profile, Schema},
    users::{Change, Order, Plan, Record, Step, User, UserId, Verb, pile_up},
};
use tidings_sdk::{
    envelope::{Event, Notice},
    trace::Traceparent,
};
use time::OffsetDateTime;
use uuid::Uuid;

/// The service's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BODY: &str = r#"{"profile":{"job_title":"Editor 0000000001","social":{"mastodon":"@ana@example.com"}}}"#;
const PROFILE: &str = r#"{"address":"1 Example Street, 12345 Example","city":"Example","company":"Example Ltd","country":"DE","email":"ana@example.org","first_name":"Ana","job_title":"Author 0000000000","language":"de","last_name":"Example","phone":"+49 30 1234567","social":{"mastodon":"@ana@example.org"},"timezone":"Europe/Berlin"}"#;
/// As many as one statement takes.
const BATCH: u128 = 128;

/// Does its work once.
type Work = Box<dyn Fn()>;
/// A path by its name, and what makes its work ready.
type HotPath = (&'static str, fn(&Given) -> Work);

const ALL: [HotPath; 9] = [
    ("key: read and hash", key),
    ("body: parse", body),
    ("profile: parse, amend, tell what changed", amend),
    ("profile: validate and write", admit),
    ("change: plan an amendment", plan),
    ("batch: 128 amendments of 128 users", batch),
    ("user: write as JSON", answer),
    ("notice: write", notice),
    ("notice: read", read_notice),
];

struct Given {
    schema: Arc<Schema>,
    patch: Fields,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["list"] => ALL.iter().for_each(|(name, _)| say(name)),
        ["run", schema, name, times] => return run(schema, name, times.parse().unwrap_or(0)),
        _ => return fail("expected: list, or: run SCHEMA PATH TIMES"),
    }
    ExitCode::SUCCESS
}

fn run(schema: &str, name: &str, times: u32) -> ExitCode {
    let Some((_, prepare)) = ALL.iter().find(|(one, _)| *one == name) else { return fail("no such path") };
    let schema = match Schema::load(Some(Path::new(schema))) {
        Ok(schema) => Arc::new(schema),
        Err(error) => return fail(&format!("{error:#}")),
    };
    let work = prepare(&Given { schema, patch: patch() });
    (0..times).for_each(|_| work());
    ExitCode::SUCCESS
}

#[expect(clippy::print_stdout, reason = "a list for a script")]
fn say(line: &str) {
    println!("{line}");
}

fn fail(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::FAILURE
}

fn key(_: &Given) -> Work {
    let (_, text) = Key::generate().expect("the operating system has random bits");
    Box::new(move || drop(black_box(text.expose_secret().parse::<Key>())))
}

fn body(_: &Given) -> Work {
    Box::new(|| drop(black_box(json::parse(black_box(BODY.as_bytes())))))
}

fn amend(given: &Given) -> Work {
    let (profile, patch) = (kept(), given.patch.clone());
    Box::new(move || {
        let mut fields = profile.fields();
        drop(black_box(profile::amend(&mut fields, &patch)));
    })
}

fn admit(given: &Given) -> Work {
    let (schema, fields) = (given.schema.clone(), kept().fields());
    Box::new(move || drop(black_box(schema.admit(fields.clone()))))
}

fn plan(given: &Given) -> Work {
    let (schema, change, record) = (given.schema.clone(), amendment(given, 0), living(0));
    Box::new(move || drop(black_box(change.plan(Some(&record), &schema))))
}

fn batch(given: &Given) -> Work {
    let step = |n| step(given, n);
    let orders: Vec<(Arc<Change>, Step)> = (0..BATCH).map(|n| (Arc::new(amendment(given, n)), step(n))).collect();
    let schema = given.schema.clone();
    Box::new(move || {
        let orders = orders.iter().cloned().map(|(change, step)| Order { change, step, caller: () });
        drop(black_box(pile_up(orders, &schema)));
    })
}

fn answer(_: &Given) -> Work {
    let Record::Living(user) = living(0) else { unreachable!("it lives") };
    Box::new(move || drop(black_box(serde_json::to_vec(&user))))
}

fn notice(_: &Given) -> Work {
    let notice = sample();
    Box::new(move || drop(black_box(notice.to_message("urn:tidings:masterdata"))))
}

fn read_notice(_: &Given) -> Work {
    let (properties, body): (BasicProperties, Vec<u8>) = sample().to_message("urn:tidings:masterdata");
    Box::new(move || drop(black_box(Notice::from_message(&properties, &body))))
}

fn patch() -> Fields {
    let body = json::parse(BODY.as_bytes()).expect("it is JSON");
    body["profile"].as_object().expect("it is an object").clone()
}

fn kept() -> Profile {
    Profile::from_kept(RawValue::from_string(PROFILE.to_owned()).expect("it is JSON"))
}

/// Not random: the order of a map must not differ from run to run more than it has to.
fn id(n: u128) -> UserId {
    UserId(Uuid::from_u128(0x0193_a2b4_7c1e_7d53_9a51_0000_0000_0000 | n))
}

fn living(n: u128) -> Record {
    let at = OffsetDateTime::UNIX_EPOCH;
    Record::Living(User { id: id(n), version: 7, created_at: at, updated_at: at, external_id: None, profile: kept() })
}

fn amendment(given: &Given, n: u128) -> Change {
    Change::new(id(n), Verb::Amend(given.patch.clone()), Traceparent::new_root())
}

fn step(given: &Given, n: u128) -> Step {
    match amendment(given, n).plan(Some(&living(n)), &given.schema) {
        Ok(Plan::Write(step)) => step,
        _ => unreachable!("the patch changes something"),
    }
}

fn sample() -> Notice {
    Notice {
        message_id: id(1).0,
        user_id: id(2).0,
        version: 7,
        event: Event::Updated { changed_fields: vec!["job_title".parse().expect("it is a name")] },
        occurred_at: OffsetDateTime::UNIX_EPOCH,
        traceparent: Some(Traceparent::new_root()),
    }
}
