//! The command line: what it teaches, what it refuses, what it prints, and how it leaves.

use std::{
    fs, iter,
    net::{SocketAddr, TcpListener},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use clap::CommandFactory;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, migrate::Migrate};
use tidings::config::Cli;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{TcpSocket, TcpStream},
    process::{Child, ChildStdout},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    house::{self, Answer, House, PATIENCE, Service, collect, database_url, env, eventually, file, tidings},
    sessions,
};

/// What a command that ends by itself has said.
#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

async fn run(command: &[&str], settings: &[(&str, &str)]) -> Outcome {
    let settings: Vec<_> = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let ended = timeout(PATIENCE, tidings(command, &settings).output()).await;
    let output = ended.unwrap_or_else(|_| panic!("{command:?} does not end")).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[tokio::test]
async fn help_teaches() {
    let commands: &[(&[&str], &[&str])] = &[
        (
            &["--help"],
            &["serve", "relay", "migrate", "tail", "import", "openapi", "asyncapi", "healthcheck", "TIDINGS_LOG"],
        ),
        (
            &["serve", "--help"],
            &[
                "Examples:",
                "DATABASE_URL",
                "AMQP_URL",
                "TIDINGS_LISTEN",
                "TIDINGS_PROFILE_SCHEMA",
                "--no-relay",
                "SIGTERM",
            ],
        ),
        (
            &["relay", "--help"],
            &["DATABASE_URL", "AMQP_URL", "TIDINGS_EXCHANGE", "TIDINGS_ROUTING_KEY_PREFIX", "stand by"],
        ),
        (&["migrate", "--help"], &["DATABASE_URL"]),
        (&["tail", "--help"], &["Examples:", "--fields", "AMQP_URL", "user.deleted"]),
        (&["subscription", "--help"], &["Examples:", "put", "list", "show", "recovered", "delete"]),
        (&["subscription", "put", "--help"], &["--key", "--field", "--owner", "--purpose", "--expires-after", "30d"]),
        (
            &["import", "--help"],
            &[
                "Examples:",
                "TIDINGS_URL",
                "TIDINGS_API_KEY",
                "--dry-run",
                "--report",
                "--from-line",
                "--import-id",
                "external_id",
                "Exit status",
            ],
        ),
        (&["openapi", "--help"], &["OpenAPI"]),
        (&["asyncapi", "--help"], &["AsyncAPI"]),
        (&["healthcheck", "--help"], &["TIDINGS_LISTEN", "exit 0"]),
    ];
    for (command, taught) in commands {
        let help = run(command, &[]).await;
        assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""), "{command:?}");
        let missing: Vec<_> = taught.iter().filter(|word| !help.stdout.contains(*word)).collect();
        assert!(missing.is_empty(), "{command:?} does not say {missing:?}: {}", help.stdout);
    }
    let version = run(&["--version"], &[]).await;
    assert_eq!((version.code, version.stdout.trim()), (Some(0), concat!("tidings ", env!("CARGO_PKG_VERSION"))));
    assert_eq!(run(&["shout"], &[]).await.code, Some(2));
}

/// The command called by these words, and all below it.
fn with_all_below(words: Vec<String>, command: &clap::Command) -> Vec<(Vec<String>, &clap::Command)> {
    let below = command.get_subcommands().flat_map(|below| {
        let words = words.iter().cloned().chain([below.get_name().to_owned()]).collect();
        with_all_below(words, below)
    });
    let below: Vec<_> = below.collect();
    iter::once((words, command)).chain(below).collect()
}

/// An example that is broken into two lines is two commands when it is pasted.
#[tokio::test]
async fn no_example_is_broken_on_a_terminal_of_eighty_columns() {
    let mut examples = 0;
    for (words, command) in with_all_below(vec![], &Cli::command()) {
        let Some(written) = command.get_after_help().map(ToString::to_string) else { continue };
        let asked: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = run(&asked, &[("COLUMNS", "80")]).await.stdout;
        assert!(help.contains(&written), "{asked:?}: {help}");
        examples += written.matches("\n  tidings ").count();
    }
    assert!(examples > 10, "{examples}");
}

/// A ./dev of its own, which has nothing yet and leaves this checkout's servers alone.
#[tokio::test]
async fn dev_shows_its_help_wherever_it_is_asked_and_passes_over_no_argument() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(Uuid::new_v4().to_string());
    fs::create_dir(&home).unwrap();
    for part in ["dev", "scripts"] {
        symlink(checkout.join(part), home.join(part)).unwrap();
    }
    let dev = async |arguments: String| {
        let mut command = tokio::process::Command::new(home.join("dev"));
        let ended = timeout(PATIENCE, command.args(arguments.split(' ')).output()).await;
        let output = ended.unwrap_or_else(|_| panic!("{arguments} does not end")).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let help = dev("help".to_owned()).await;
    assert!(help.0 == Some(0) && help.1.contains("./dev down"), "{help:?}");
    for command in [
        "run",
        "test",
        "key",
        "app",
        "schemathesis",
        "planted",
        "fuzz",
        "instructions",
        "upgrade",
        "status",
        "logs",
        "up",
        "down",
        "broker",
        "database",
    ] {
        for word in ["--help", "-h", "help"] {
            assert_eq!(dev(format!("{command} {word}")).await, help, "{command} {word}");
        }
    }
    assert!(!home.join(".dev").exists(), "more was done than asked");

    let refused = async |arguments: &str, why: &str| {
        let (code, said, talk) = dev(arguments.to_owned()).await;
        assert_eq!((code, said.as_str(), talk.as_str()), (Some(1), "", why), "{arguments}");
    };
    for arguments in [
        "run --all",
        "up --all",
        "key --all",
        "down --all",
        "down --wipe --all",
        "status --all",
        "status --url --all",
        "logs postgres --all",
        "fuzz merge_patch 1 --all",
        "upgrade HEAD --all",
        "broker start east --all",
        "broker stop main --all",
        "database start east --all",
    ] {
        refused(arguments, "error: no such argument: --all\nhint: ./dev help\n").await;
    }
    for arguments in ["broker kill", "broker stop", "database kill", "database stop"] {
        let server = if arguments.starts_with("broker") { "rabbitmq" } else { "postgres" };
        let why = format!("error: there is no {server}-nobody\nhint: ./dev status\n");
        refused(&format!("{arguments} nobody"), &why).await;
    }
    fs::remove_dir_all(&home).unwrap();
}

#[tokio::test]
async fn all_wrong_settings_are_named_at_once_and_no_password_is_repeated() {
    let schema = file("{ \"properties\": {} }");
    let schema = schema.to_str().unwrap();
    let wrong = [
        ("DATABASE_URL", "mysql://ana:s3cret@host/db"),
        ("TIDINGS_LISTEN", "localhost"),
        ("TIDINGS_PROFILE_SCHEMA", schema),
        ("TIDINGS_EXCHANGE", "amq.topic"),
        ("TIDINGS_ROUTING_KEY_PREFIX", "eu..prod"),
        ("TIDINGS_SUBSCRIPTION_IDLE_AFTER", "0d"),
        ("TIDINGS_LOG", "loud=very"),
    ];
    let refused = run(&["serve"], &wrong).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{refused:?}");
    assert!(refused.stderr.contains("8 settings are wrong"), "{}", refused.stderr);
    for named in [
        "DATABASE_URL: expected postgres://",
        "AMQP_URL: is not set; set it, or AMQP_URL_FILE",
        "TIDINGS_LISTEN: expected an IP address and a port",
        &format!("TIDINGS_PROFILE_SCHEMA: {schema} is not a profile schema"),
        "TIDINGS_EXCHANGE: expected a name",
        "TIDINGS_ROUTING_KEY_PREFIX: expected words",
        "TIDINGS_SUBSCRIPTION_IDLE_AFTER: expected a number",
        "TIDINGS_LOG: ",
        "hint: ",
    ] {
        assert!(refused.stderr.contains(named), "no {named:?} in {}", refused.stderr);
    }
    assert!(!refused.stderr.contains("s3cret"), "{}", refused.stderr);
}

/// What the parser of the command line would refuse by itself, and then nothing else be told.
#[tokio::test]
async fn a_wrong_switch_or_an_empty_path_is_named_with_all_else_that_is_wrong() {
    let wrong = [
        ("TIDINGS_NO_RELAY", "maybe"),
        ("TIDINGS_REQUIRE_IF_MATCH", "on"),
        ("TIDINGS_NO_MIGRATE", ""),
        ("TIDINGS_INSECURE_NO_AUTH", "TRUE"),
        ("TIDINGS_LOG_FORMAT", "xml"),
        ("TIDINGS_PROFILE_SCHEMA", ""),
        ("DATABASE_URL_FILE", ""),
    ];
    let refused = run(&["serve"], &wrong).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{refused:?}");
    assert!(refused.stderr.contains("7 settings are wrong"), "{}", refused.stderr);
    for (name, _) in &wrong[..4] {
        assert!(refused.stderr.contains(&format!("{name}: expected true or false")), "{}", refused.stderr);
    }
    for named in [
        "TIDINGS_LOG_FORMAT: expected text or json",
        "TIDINGS_PROFILE_SCHEMA: is empty; name a file",
        "DATABASE_URL_FILE: is empty; name a file",
    ] {
        assert!(refused.stderr.contains(named), "no {named:?} in {}", refused.stderr);
    }
    let relays = run(&["serve"], &[("TIDINGS_NO_RELAY", "false")]).await;
    assert!(relays.stderr.contains("AMQP_URL: is not set"), "{}", relays.stderr);
    let lone = run(&["serve", "--no-relay"], &[]).await;
    assert!(lone.stderr.contains("1 setting is wrong\n  DATABASE_URL: is not set"), "{}", lone.stderr);
}

#[tokio::test]
async fn no_fault_about_the_broker_hides_another() {
    for other in [
        ("AMQP_URL", "http://localhost"),
        ("AMQP_REGISTRY_URL", "http://localhost"),
        ("AMQP_CA_FILE", "/nowhere"),
        ("TIDINGS_NO_RELAY", "yes"),
    ] {
        let right = [("DATABASE_URL", "postgres://localhost/x"), ("AMQP_URL", "amqp://localhost")];
        let wrong = [other, ("TIDINGS_RABBITMQ_MANAGEMENT_URL", "nonsense")];
        let refused = run(&["serve"], &[right, wrong].concat()).await;
        assert!(refused.stderr.contains("2 settings are wrong"), "{other:?}: {}", refused.stderr);
        for named in [format!("  {}: ", other.0), "  TIDINGS_RABBITMQ_MANAGEMENT_URL: expected https://".to_owned()] {
            assert!(refused.stderr.contains(&named), "no {named:?} in {}", refused.stderr);
        }
    }
}

/// Every command, with what it cannot do without.
const COMMANDS: [&[&str]; 28] = [
    &["serve"],
    &["relay"],
    &["migrate"],
    &["tail"],
    &["client", "create", "--scope", "admin", "orders"],
    &["client", "list"],
    &["client", "rotate", "orders"],
    &["client", "revoke", "orders"],
    &["subscription", "put", "--owner", "o", "--purpose", "p", "orders"],
    &["subscription", "list"],
    &["subscription", "show", "orders"],
    &["subscription", "recovered", "orders"],
    &["subscription", "delete", "orders"],
    &["subscription", "dead-letters", "list", "orders"],
    &["subscription", "dead-letters", "redrive", "--all", "orders"],
    &["subscription", "dead-letters", "purge", "orders"],
    &["subscription", "backfill", "start", "orders"],
    &["subscription", "backfill", "show", "orders"],
    &["subscription", "backfill", "pause", "orders"],
    &["subscription", "backfill", "resume", "orders"],
    &["subscription", "backfill", "cancel", "orders"],
    &["deletions", "show", "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a"],
    &["deletions", "overdue"],
    &["audit-leaks"],
    &["import", "-"],
    &["openapi"],
    &["asyncapi"],
    &["healthcheck"],
];

/// What its help lists of the environment.
async fn settings_of(command: &[&str]) -> Vec<String> {
    let help = run(&[command, &["--help"]].concat(), &[]).await.stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let names = help.split("[env: ").skip(1).map(|rest| rest.split(['=', ']']).next().unwrap().to_owned());
    let names: Vec<String> = names.collect();
    assert!(names.iter().any(|name| name == "TIDINGS_LOG_FORMAT"), "{help}");
    names
}

#[tokio::test]
async fn no_setting_is_refused_before_the_others_are_looked_at() {
    for command in COMMANDS {
        let names = settings_of(command).await;
        let empty: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
        let refused = run(command, &empty).await;
        let all_at_once = ["settings are wrong", "setting is wrong"].iter().any(|words| refused.stderr.contains(words));
        assert!(refused.code == Some(2) && all_at_once, "{command:?}: {refused:?}");
    }
}

#[tokio::test]
async fn each_command_lists_files_that_it_reads_and_no_others() {
    for command in COMMANDS {
        for name in settings_of(command).await.iter().filter(|name| name.ends_with("_FILE")) {
            let settings = [
                ("DATABASE_URL", "postgres://localhost/x"),
                ("AMQP_URL", "amqp://localhost"),
                (name.as_str(), "/nowhere"),
            ];
            let refused = run(command, &settings).await;
            let is_named = refused.stderr.contains(&format!("1 setting is wrong\n  {name}: "));
            assert!(refused.code == Some(2) && is_named, "{command:?} {name}: {refused:?}");
        }
    }
}

/// It may share its environment with `serve`, and lists and refuses nothing of what it does not read.
async fn leaves_alone(command: &[&str], others: &[(&str, &str)]) {
    let settings = settings_of(command).await;
    let listed: Vec<_> = others.iter().filter(|(name, _)| settings.iter().any(|listed| listed == name)).collect();
    assert!(listed.is_empty(), "{listed:?}");
    let refused = run(command, &[others, &[("AMQP_URL", "amqp://localhost")]].concat()).await;
    assert!(refused.stderr.contains("1 setting is wrong\n  DATABASE_URL: is not set"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("no such setting"), "{}", refused.stderr);
}

#[tokio::test]
async fn a_relay_leaves_alone_what_only_the_api_reads() {
    let of_the_api = [
        ("TIDINGS_MAX_REQUESTS", "none"),
        ("TIDINGS_RATE_LIMIT", "none"),
        ("TIDINGS_TRUSTED_PROXIES", "none"),
        ("TIDINGS_RABBITMQ_MANAGEMENT_URL_FILE", "/nowhere"),
    ];
    leaves_alone(&["relay"], &of_the_api).await;
}

#[tokio::test]
async fn an_audit_leaves_alone_what_it_takes_to_publish_and_to_declare() {
    let of_others = [
        ("AMQP_REGISTRY_URL", "http://localhost"),
        ("AMQP_REGISTRY_URL_FILE", "/nowhere"),
        ("TIDINGS_ROUTING_KEY_PREFIX", "eu..prod"),
    ];
    leaves_alone(&["audit-leaks"], &of_others).await;
}

#[tokio::test]
async fn a_wrong_file_is_blamed_and_not_the_variable_beside_it() {
    let file = file("s3cret");
    let file = file.to_str().unwrap();
    let commands: [(&[&str], _, _, _); 5] = [
        (&["migrate"], "DATABASE_URL", "postgres://localhost/x", "expected postgres://"),
        (&["tail"], "AMQP_URL", "amqp://localhost", "expected amqp://"),
        (&["relay"], "AMQP_REGISTRY_URL", "amqp://localhost", "expected amqp://"),
        (&["import", file], "TIDINGS_IMPORT_NAMESPACE", "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a", "expected a UUID"),
        (&["import", file], "TIDINGS_API_KEY", "key", "cannot read"),
    ];
    for (command, name, right, wrong) in commands {
        let file = if wrong == "cannot read" { "/nowhere" } else { file };
        let refused = run(command, &[(name, right), (&format!("{name}_FILE"), file)]).await;
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(&format!("  {name}_FILE: {wrong}")), "{}", refused.stderr);
        assert!(!refused.stderr.contains(&format!("{name}: ")) && !refused.stderr.contains("s3cret"), "{refused:?}");
    }
}

#[tokio::test]
async fn each_wrong_setting_is_refused_by_every_command_that_reads_it() {
    let empty = file(" \n");
    let table: &[(&[&str], (&str, &str), &str)] = &[
        (&["migrate"], ("DATABASE_URL", "postgres:s3cret"), "DATABASE_URL: expected postgres://"),
        (&["migrate"], ("DATABASE_URL", "mysql://ana:s3cret@host/db"), "DATABASE_URL: expected postgres://"),
        (&["migrate"], ("DATABASE_URL", " "), "DATABASE_URL: is empty"),
        (&["migrate"], ("DATABASE_URL_FILE", "/nowhere/s3cret"), "DATABASE_URL_FILE: cannot read"),
        (&["migrate"], ("DATABASE_URL_FILE", empty.to_str().unwrap()), "DATABASE_URL_FILE: is empty"),
        (&["tail"], ("AMQP_URL", "http://ana:s3cret@host"), "AMQP_URL: expected amqp://"),
        (&["tail"], ("AMQP_URL_FILE", "/nowhere"), "AMQP_URL_FILE: cannot read"),
        (&["tail"], ("AMQP_REGISTRY_URL", "http://ana:s3cret@host"), "AMQP_REGISTRY_URL: expected amqp://"),
        (&["relay"], ("AMQP_CA_FILE", "/nowhere"), "AMQP_CA_FILE: /nowhere: No such file"),
        (&["tail", "--fields", "job title"], ("AMQP_URL", "amqp://localhost"), "--fields: a field name is"),
        (&["tail", "user.delted"], ("AMQP_URL", "amqp://localhost"), "KEY: no notice has such a routing key"),
        (&["relay"], ("AMQP_URL", "amqp://localhost"), "DATABASE_URL: is not set"),
        (&["relay"], ("TIDINGS_SUBSCRIPTION_IDLE_AFTER", "soon"), "TIDINGS_SUBSCRIPTION_IDLE_AFTER: expected a number"),
        (&["relay"], ("TIDINGS_SUBSCRIPTION_CHECK_EVERY", "2m"), "TIDINGS_SUBSCRIPTION_CHECK_EVERY: expected at most"),
        (&["subscription", "list"], ("AMQP_URL", "http://ana:s3cret@host"), "AMQP_URL: expected amqp://"),
        (&["healthcheck"], ("TIDINGS_LISTEN", "8080"), "TIDINGS_LISTEN: expected"),
        (&["openapi"], ("TIDINGS_LOG", "a=b=c"), "TIDINGS_LOG: "),
    ];
    for (command, setting, named) in table {
        let refused = run(command, &[*setting]).await;
        assert_eq!(refused.code, Some(2), "{command:?} {setting:?} {refused:?}");
        assert!(refused.stderr.contains(named), "{command:?} {setting:?}: {}", refused.stderr);
        assert!(setting.0.ends_with("_FILE") || !refused.stderr.contains("s3cret"), "{}", refused.stderr);
    }
}

#[sqlx::test(migrations = false)]
async fn secrets_may_come_from_files_and_migrating_again_does_no_harm(db: PgPool) {
    let database = file(&format!("{}\n", database_url(&db)));
    // Where both are set, the file counts.
    let files = [("DATABASE_URL_FILE", database.to_str().unwrap()), ("DATABASE_URL", "postgres://127.0.0.1:1/nowhere")];
    for _ in 0..2 {
        let migrated = run(&["migrate"], &files).await;
        assert_eq!((migrated.code, migrated.stderr.as_str()), (Some(0), "the schema is up to date\n"), "{migrated:?}");
    }
    let users: i64 = sqlx::query_scalar("select count(*) from users").fetch_one(&db).await.unwrap();
    assert_eq!(users, 0);

    let amqp = file(&format!("{}\n", env("AMQP_URL")));
    let settings = [
        ("DATABASE_URL_FILE", database.to_str().unwrap()),
        ("AMQP_URL_FILE", amqp.to_str().unwrap()),
        ("TIDINGS_LISTEN", "127.0.0.1:0"),
        ("TIDINGS_EXCHANGE", &format!("test.{}", Uuid::new_v4().simple())),
    ];
    let settings: Vec<_> = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let service = Service::start(&["serve"], &settings).await;
    eventually("a ready service", async || {
        let ready = readiness(&service.url).await;
        if ready["status"] == "ready" { Ok(()) } else { Err(ready) }
    })
    .await;
}

#[sqlx::test(migrations = false)]
async fn instances_that_start_together_migrate_once(db: PgPool) {
    let url = database_url(&db);
    let migrate = async || run(&["migrate"], &[("DATABASE_URL", &url)]).await.code;
    let codes = futures_util::future::join_all((0..4).map(|_| migrate())).await;
    assert_eq!(codes, [Some(0); 4]);
}

#[tokio::test]
async fn each_document_is_the_committed_one() {
    for (command, committed) in
        [("openapi", include_str!("../../openapi.yaml")), ("asyncapi", include_str!("../../asyncapi.yaml"))]
    {
        let printed = run(&[command], &[]).await;
        assert_eq!(printed.code, Some(0), "{printed:?}");
        let differs = printed.stdout.lines().zip(committed.lines()).find(|(printed, committed)| printed != committed);
        assert_eq!(differs, None, "run `tidings {command} > {command}.yaml`");
        assert_eq!(printed.stdout.len(), committed.len(), "run `tidings {command} > {command}.yaml`");
    }
}

#[sqlx::test]
async fn the_service_serves_its_documents(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ROUTING_KEY_PREFIX", "eu")]).await;
    let served = async |path| {
        let served = house.request(reqwest::Method::GET, path).send().await.unwrap();
        assert_eq!(served.headers()["content-type"], "application/yaml");
        served.text().await.unwrap()
    };
    assert_eq!(served("/openapi.yaml").await, include_str!("../../openapi.yaml"));
    // Where this deployment really publishes to.
    let messages = served("/asyncapi.yaml").await;
    let names = [format!("name: {}\n", house.exchange), "address: eu.user.created\n".to_owned()];
    assert!(names.iter().all(|name| messages.contains(name)), "{messages}");
}

/// As `tidings openapi | head -1` does, once `head` has gone.
#[sqlx::test]
async fn a_command_ends_quietly_when_nobody_reads_any_more(db: PgPool) {
    let settings = [("DATABASE_URL", database_url(&db)), ("AMQP_URL", env("AMQP_URL"))];
    let settings = settings.map(|(name, value)| (name.to_owned(), value));
    let unread = async |command: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = tidings(command, &settings).stdout(writer).spawn().unwrap();
        let ended = timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let quiet = (Some(0), String::new());
    for command in [&["openapi"][..], &["subscription", "list"], &["subscription", "list", "--json"]] {
        assert_eq!(unread(command).await, quiet, "{command:?}");
    }
    // A key that nobody has seen is no success.
    let (code, said) = unread(&["client", "create", "orders", "--scope", "users:read"]).await;
    assert!(code == Some(1) && said.contains("is lost") && said.contains("hint: `tidings client revoke"), "{said}");
    for command in [&["client", "list"][..], &["client", "list", "--json"]] {
        assert_eq!(unread(command).await, quiet, "{command:?}");
    }
}

// How it comes up.

#[sqlx::test]
async fn a_port_that_is_taken_is_named(db: PgPool) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let settings =
        [("DATABASE_URL", &*database_url(&db)), ("AMQP_URL", &env("AMQP_URL")), ("TIDINGS_LISTEN", &address)];
    for role in ["serve", "relay"] {
        let refused = run(&[role], &settings).await;
        assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        let named =
            format!("error: cannot listen on {address}; free it, or choose another with --listen or TIDINGS_LISTEN");
        assert!(refused.stderr.contains(&named), "{}", refused.stderr);
    }
}

#[sqlx::test]
async fn a_database_that_forgets_what_it_acknowledged_is_refused(db: PgPool) {
    let name = db.connect_options().get_database().unwrap().to_owned();
    let forgetful = format!("alter database \"{name}\" set synchronous_commit = off");
    sqlx::query(AssertSqlSafe(forgetful)).execute(&db).await.unwrap();
    let settings =
        [("DATABASE_URL", &*database_url(&db)), ("AMQP_URL", &env("AMQP_URL")), ("TIDINGS_LISTEN", "127.0.0.1:0")];
    for role in ["serve", "relay"] {
        let refused = run(&[role], &settings).await;
        assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        assert!(refused.stderr.contains("the database has synchronous_commit off"), "{}", refused.stderr);
    }
    let clients = run(&["client", "list"], &settings[..1]).await;
    assert_eq!(clients.code, Some(0), "who got at a key is shut out there too: {clients:?}");
}

/// The address of something before the server that passes on everything but `options`, in which a session's settings are.
async fn pooler(server: &str) -> SocketAddr {
    let (listener, server) = (tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(), server.to_owned());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(&server).await.unwrap();
            tokio::spawn(async move {
                let mut startup = vec![0; client.read_i32().await? as usize - 4];
                client.read_exact(&mut startup).await?;
                let (version, parameters) = startup.split_at(4);
                let parameters: Vec<&[u8]> = parameters.split_inclusive(|byte| *byte == 0).collect();
                let kept = parameters.chunks(2).filter(|pair| pair[0] != b"options\0").flatten();
                let kept = [version, &kept.copied().collect::<Vec<_>>().concat()].concat();
                server.write_i32(kept.len() as i32 + 4).await?;
                server.write_all(&kept).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    address
}

#[sqlx::test]
async fn a_pooler_that_ignores_the_settings_of_sessions_is_refused(db: PgPool) {
    let options = db.connect_options();
    let pooler = pooler(&format!("{}:{}", options.get_host(), options.get_port())).await;
    let mut url: url::Url = database_url(&db).parse().unwrap();
    url.set_port(Some(pooler.port())).unwrap();
    url.set_query(Some("sslmode=disable"));
    let settings = [("DATABASE_URL", url.as_str()), ("AMQP_URL", &env("AMQP_URL")), ("TIDINGS_LISTEN", "127.0.0.1:0")];
    for role in ["serve", "relay"] {
        let refused = run(&[role], &settings).await;
        assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        for word in ["statement_timeout", "search_path", "a pooler before it"] {
            assert!(refused.stderr.contains(word), "{}", refused.stderr);
        }
    }
}

/// An address that nobody else is given as long as the socket lives, and at which a service may listen all the same.
fn reserved() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// The same settings, to listen at this address.
fn listening_at(address: SocketAddr, settings: &[(String, String)]) -> Vec<(String, String)> {
    [settings, &[("TIDINGS_LISTEN".to_owned(), address.to_string())]].concat()
}

/// An instance that is not ready says that it lives, what it waits for, and nothing else.
async fn is_on_its_way(address: SocketAddr, why: &str) {
    let ask = async |path: &str| Answer::to(house::http().get(format!("http://{address}{path}"))).await;
    eventually("an instance to say what it waits for", async || {
        let unready = ask("/readyz").await;
        assert_eq!((unready.status.as_u16(), &unready.body["status"]), (503, &json!("unready")), "{unready:?}");
        if unready.body["database"].as_str().unwrap().contains(why) { Ok(()) } else { Err(unready) }
    })
    .await;
    assert_eq!(run(&["healthcheck"], &[("TIDINGS_LISTEN", &address.to_string())]).await.code, Some(0));
    assert_eq!(ask("/v1/users").await.refusal(503), "database_unavailable");
}

async fn listens(address: SocketAddr) {
    eventually("an instance to listen", async || TcpStream::connect(address).await.map(drop)).await;
}

/// Waits for its ready line.
async fn comes_up(starting: &mut Child) {
    let mut lines = BufReader::new(starting.stdout.take().unwrap()).lines();
    let ready = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
    assert!(ready.as_ref().is_some_and(|line| line.starts_with("tidings ready on http://127.0.0.1:")), "{ready:?}");
}

#[sqlx::test]
async fn a_service_waits_for_a_database_that_comes_up_later(db: PgPool) {
    let house = House::open(db).await;
    for role in ["serve", "relay"] {
        let (_reserved, address) = reserved();
        house.postgres.down();
        let mut starting = tidings(&[role], &listening_at(address, house.settings())).spawn().unwrap();
        let mut log = BufReader::new(starting.stderr.take().unwrap()).lines();
        let waits = async { while !log.next_line().await.unwrap().unwrap().contains("waiting for the database") {} };
        timeout(PATIENCE, waits).await.expect("it does not say that it waits");
        is_on_its_way(address, "no connection to the database").await;
        house.postgres.up();
        comes_up(&mut starting).await;
        assert_eq!(readiness(&format!("http://{address}")).await["database"], "ok");
    }
}

/// It may be about to be made, or a password to be changed: a service waits. Who is at the terminal is told at once.
#[sqlx::test]
async fn a_database_that_lets_nobody_in_says_why(db: PgPool) {
    let mut url = url::Url::parse(&database_url(&db)).unwrap();
    let name = format!("nowhere_{}", Uuid::new_v4().simple());
    url.set_path(&name);
    let settings = [("DATABASE_URL", url.as_str()), ("AMQP_URL", &env("AMQP_URL")), ("TIDINGS_LISTEN", "127.0.0.1:0")];
    let why = format!("no connection to the database: database \"{name}\" does not exist (SQLSTATE 3D000)\n");
    for command in [&["migrate"][..], &["subscription", "list"], &["client", "list"]] {
        let refused = run(command, &settings).await;
        assert!(refused.code == Some(1) && refused.stderr.contains(&why), "{command:?}: {}", refused.stderr);
    }
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut starting = tidings(&["serve"], &settings).spawn().unwrap();
    let mut log = BufReader::new(starting.stderr.take().unwrap()).lines();
    let first = timeout(PATIENCE, log.next_line()).await.unwrap().unwrap().unwrap();
    assert!(first.contains(&format!("waiting for the database: {}", why.trim())), "{first}");
}

/// As a change of a table does it, or a backup.
#[sqlx::test]
async fn a_service_waits_for_a_table_that_somebody_holds(db: PgPool) {
    let house = House::open(db).await;
    let mut holder = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table clients in access exclusive mode").execute(&mut *holder).await.unwrap();
    let start = async || {
        let (reserved, address) = reserved();
        let mut starting = tidings(&["serve"], &listening_at(address, house.settings())).spawn().unwrap();
        let mut log = BufReader::new(starting.stderr.take().unwrap()).lines();
        let waits = async { while !log.next_line().await.unwrap().unwrap().contains("somebody holds a table") {} };
        timeout(PATIENCE, waits).await.expect("it does not say that it waits");
        is_on_its_way(address, "somebody holds a table").await;
        (starting, log, reserved)
    };
    let ((mut one, _log, _reserved), (mut other, _other_log, _also_reserved)) = tokio::join!(start(), start());
    let pid = other.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    assert_eq!(timeout(PATIENCE, other.wait()).await.unwrap().unwrap().code(), Some(0), "told to leave meanwhile");
    holder.rollback().await.unwrap();
    comes_up(&mut one).await;
}

/// The settings of an instance that migrates.
fn migrating(db: &PgPool) -> Vec<(String, String)> {
    let settings = [
        ("DATABASE_URL", database_url(db)),
        ("AMQP_URL", env("AMQP_URL")),
        ("TIDINGS_EXCHANGE", format!("test.{}", Uuid::new_v4().simple())),
        ("TIDINGS_LISTEN", "127.0.0.1:0".to_owned()),
    ];
    settings.map(|(name, value)| (name.to_owned(), value)).into()
}

/// As a long query does it: of all that migrations do, most have to wait for it.
#[sqlx::test]
async fn a_migration_waits_for_a_table_that_somebody_holds(db: PgPool) {
    let undone = "
        alter table dead_letters drop column backfill;
        delete from _sqlx_migrations where version = 20261129000002
    ";
    sqlx::raw_sql(undone).execute(&db).await.unwrap();
    let mut holder = db.begin().await.unwrap();
    sqlx::raw_sql("lock table dead_letters in access share mode").execute(&mut *holder).await.unwrap();
    let settings = migrating(&db);
    let start = async |command: &str| {
        let mut starting = tidings(&[command], &settings).spawn().unwrap();
        let mut log = BufReader::new(starting.stderr.take().unwrap()).lines();
        let waits = async { while !log.next_line().await.unwrap().unwrap().contains("somebody holds a table") {} };
        timeout(PATIENCE, waits).await.expect("it does not say that it waits");
        (starting, log)
    };
    let ((mut command, _log), (mut service, _service_log)) = tokio::join!(start("migrate"), start("serve"));
    holder.rollback().await.unwrap();
    comes_up(&mut service).await;
    assert_eq!(timeout(PATIENCE, command.wait()).await.unwrap().unwrap().code(), Some(0));
}

#[sqlx::test]
async fn an_instance_that_waits_for_a_migration_says_so(db: PgPool) {
    let mut first = PgConnection::connect_with(&db.connect_options()).await.unwrap();
    first.lock().await.unwrap();
    let (_reserved, address) = reserved();
    let mut starting = tidings(&["serve"], &listening_at(address, &migrating(&db))).spawn().unwrap();
    listens(address).await;
    is_on_its_way(address, "its schema is being brought up to date").await;
    first.close().await.unwrap();
    comes_up(&mut starting).await;
}

/// Instances that start together all want to migrate; who goes first may take hours.
#[sqlx::test]
async fn who_migrates_waits_for_who_migrates_already(db: PgPool) {
    let mut first = PgConnection::connect_with(&db.connect_options()).await.unwrap();
    first.lock().await.unwrap();
    let url = database_url(&db);
    let settings = [("DATABASE_URL", url.as_str())];
    let second = run(&["migrate"], &settings);
    let waits = "
        select extract(epoch from clock_timestamp() - query_start)::float8 from pg_stat_activity
         where datname = current_database() and application_name = 'tidings migrate' and wait_event_type = 'Lock'
    ";
    let waited = async {
        // For longer than it would for a table.
        eventually("who waits for his turn", async || {
            let seen: Option<f64> = sqlx::query_scalar(waits).fetch_optional(&db).await.unwrap();
            if seen.is_some_and(|seconds| seconds > 6.0) { Ok(()) } else { Err(seen) }
        })
        .await;
        first.close().await.unwrap();
    };
    let (second, ()) = tokio::join!(second, waited);
    assert_eq!(second.code, Some(0), "{second:?}");
}

#[sqlx::test]
async fn an_instance_without_a_relay_keeps_and_another_tells(db: PgPool) {
    let mut house = House::open(db).await;
    house.service.kill().await;
    house.service = house.another(&["serve", "--no-relay"]).await;
    let ana = house.user(json!({})).await;
    assert_eq!(readiness(&house.service.url).await["broker"], "no relay in this instance");
    assert_eq!(house.pending().await, 1);
    let _relay = house.another(&["relay"]).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[city]"]);
}

// How it is.

async fn readiness(url: &str) -> Value {
    reqwest::get(format!("{url}/readyz")).await.unwrap().json().await.unwrap()
}

/// An instance that serves is not sent away because somebody holds a table, or because counting what is in one takes long.
#[sqlx::test]
async fn readiness_waits_for_no_table(db: PgPool) {
    let house = House::open(db).await;
    let mut somebody = house.db.begin().await.unwrap();
    sqlx::query("lock table outbox, users in access exclusive mode").execute(&mut *somebody).await.unwrap();
    assert_eq!(readiness(&house.service.url).await["database"], "ok");
    somebody.rollback().await.unwrap();
}

/// Whoever asks needs no key: however many do, none of them takes a session from a request that has one.
#[sqlx::test]
async fn who_asks_for_readiness_takes_nobodys_session(db: PgPool) {
    let house = House::open(db).await;
    sessions::terminate(&house.db, "tidings queries").await;
    for _ in 0..10 {
        assert_eq!(readiness(&house.service.url).await["database"], "ok");
    }
    let names = sessions::names(&house.db).await;
    assert!(names.iter().any(|name| name == "tidings clients"), "{names:?}");
    assert!(!names.iter().any(|name| name == "tidings queries"), "{names:?}");
}

#[sqlx::test]
async fn an_operator_sees_at_a_glance_what_is_wrong(db: PgPool) {
    let house = House::open(db).await;
    let look = async |expected: (u16, &str)| {
        let wanted = (expected.0, json!(expected.1));
        eventually("the readiness to change", async || {
            let answer = house.page("/readyz").await;
            let seen = (answer.status.as_u16(), answer.body["status"].clone());
            if seen == wanted { Ok(answer.body) } else { Err(answer) }
        })
        .await
    };
    assert_eq!(look((200, "ready")).await, json!({ "status": "ready", "database": "ok", "broker": "ok" }));
    house.broker.down();
    let degraded = look((200, "degraded")).await;
    assert!(degraded["database"] == "ok" && degraded["broker"].as_str().is_some_and(|why| why.len() > 5), "{degraded}");
    house.postgres.down();
    let unready = look((503, "unready")).await;
    assert!(unready["database"].as_str().is_some_and(|why| why.contains("database")), "{unready}");
    let alive = house.request(reqwest::Method::GET, "/healthz").send().await.unwrap();
    assert_eq!((alive.status().as_u16(), alive.text().await.unwrap().as_str()), (200, "ok\n"));
    assert_eq!(house.metric("tidings_outbox_pending").await, -1.0);
    house.postgres.up();
    house.broker.up();
    look((200, "ready")).await;
}

#[sqlx::test]
async fn metrics_count_what_waits_and_what_became_of_it(db: PgPool) {
    let house = House::open(db).await;
    let is = async |sample: &str, expected: f64| {
        eventually(&format!("{sample} to be {expected}"), async || {
            let seen = house.metric(sample).await;
            if seen == expected { Ok(()) } else { Err(seen) }
        })
        .await;
    };
    is("tidings_broker_connected", 1.0).await;
    house.user(json!({})).await;
    house.settle().await;
    is("tidings_publish_results_total{result=\"routed\"}", 1.0).await;
    is("tidings_publish_results_total{result=\"unroutable\"}", 0.0).await;
    is("tidings_publish_results_total{result=\"refused\"}", 0.0).await;
    assert_eq!(
        (house.metric("tidings_outbox_pending").await, house.metric("tidings_outbox_oldest_seconds").await),
        (0.0, 0.0)
    );
    house.broker.down();
    is("tidings_broker_connected", 0.0).await;
    house.user(json!({})).await;
    house.user(json!({})).await;
    assert_eq!(house.metric("tidings_outbox_pending").await, 2.0);
    assert!(house.metric("tidings_outbox_oldest_seconds").await > 0.0);
    house.broker.up();
    is("tidings_outbox_pending", 0.0).await;
    is("tidings_publish_results_total{result=\"routed\"}", 3.0).await;
}

#[sqlx::test]
async fn a_health_check_tells_the_living_from_the_dead(db: PgPool) {
    let mut house = House::open(db).await;
    let address = house.service.url.strip_prefix("http://").unwrap().to_owned();
    let check = async || run(&["healthcheck"], &[("TIDINGS_LISTEN", &address)]).await;
    assert_eq!(check().await.code, Some(0));
    house.service.signal("-STOP").await;
    assert_eq!(check().await.code, Some(1), "frozen");
    house.service.kill().await;
    let dead = check().await;
    assert!(dead.code == Some(1) && dead.stderr.contains("no instance listens"), "{dead:?}");
}

#[tokio::test]
async fn a_health_check_is_not_content_with_any_answer() {
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = stranger.local_addr().unwrap().to_string();
    let settings = [("TIDINGS_LISTEN", &*address)];
    let check = run(&["healthcheck"], &settings);
    let answer = async {
        let (mut line, _) = stranger.accept().await.unwrap();
        let mut asked = vec![];
        while !asked.ends_with(b"\r\n\r\n") {
            asked.push(line.read_u8().await.unwrap());
        }
        line.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    };
    let (checked, ()) = tokio::join!(check, answer);
    assert!(checked.code == Some(1) && checked.stderr.contains("the instance is not well"), "{checked:?}");
}

// How it leaves.

/// A request whose handler has begun: the service has asked for its body, which is still to come.
async fn begin(house: &House) -> TcpStream {
    let mut line = TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = "POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\nExpect: 100-continue\r\n";
    line.write_all(format!("{head}Authorization: Bearer {}\r\n\r\n", house::key()).as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    timeout(PATIENCE, line.read_exact(&mut go_on)).await.expect("no 100 Continue").unwrap();
    assert_eq!(String::from_utf8_lossy(&go_on), "HTTP/1.1 100 Continue\r\n\r\n");
    line
}

async fn leaving(house: &House) {
    house.service.signal("-TERM").await;
    eventually("the service to say that it leaves", async || {
        let log = house.service.log();
        if log.contains("leaving: finishing what is under way") { Ok(()) } else { Err(log) }
    })
    .await;
}

#[sqlx::test]
async fn a_service_that_is_asked_to_leave_finishes_what_is_under_way(db: PgPool) {
    let mut house = House::open(db).await;
    let mut under_way = vec![];
    for _ in 0..10 {
        under_way.push(begin(&house).await);
    }
    leaving(&house).await;
    for line in &mut under_way {
        line.write_all(br#"{"profile":{}}"#).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, line.read_to_string(&mut answer)).await.expect("no answer").unwrap();
        assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    }
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.is_err());
    // What it had no time to tell is told by the next one.
    house.restart().await;
    house.settle().await;
    assert_eq!(house.audit.heard().len(), 10);
}

#[sqlx::test]
async fn a_second_signal_leaves_at_once(db: PgPool) {
    let mut house = House::open(db).await;
    let _never_sends_its_body = begin(&house).await;
    leaving(&house).await;
    let asked_again = Instant::now();
    house.service.signal("-INT").await;
    assert_eq!(house.service.left().await, Some(1));
    assert!(asked_again.elapsed() < Duration::from_secs(5), "{:?}", asked_again.elapsed());
}

#[sqlx::test]
async fn nothing_that_hangs_holds_up_the_leaving(db: PgPool) {
    let mut house = House::open(db).await;
    house.postgres.freeze();
    house.broker.freeze();
    leaving(&house).await;
    let asked = Instant::now();
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
}

/// Who asks for more than the system holds for him, and does not read it, has half of the time, and those who tell have the rest.
#[sqlx::test]
async fn who_does_not_read_his_answer_does_not_hold_up_the_leaving(db: PgPool) {
    let mut house = House::open(db).await;
    let mut line = TcpStream::connect(house.service.url.strip_prefix("http://").unwrap()).await.unwrap();
    line.write_all(house.head("GET /docs/swagger-ui-bundle.js", "").as_bytes()).await.unwrap();
    let mut begun = [0; 15];
    timeout(PATIENCE, line.read_exact(&mut begun)).await.expect("no answer").unwrap();
    assert_eq!(String::from_utf8_lossy(&begun), "HTTP/1.1 200 OK");
    leaving(&house).await;
    let asked = Instant::now();
    assert_eq!(house.service.left().await, Some(0), "{}", house.service.log());
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    house.logs(&["leaving without clients who are slow"]).await;
}

/// A library that, put before the system's own, finds no name and never says so.
fn names_without_end() -> PathBuf {
    let (source, library) = (file("int pause(void); int getaddrinfo(void) { for (;;) pause(); }"), file(""));
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-x", "c", "-o"]).arg(&library).arg(source);
    assert!(compiler.status().expect("the compiler that links what Rust builds").success());
    library
}

/// No deadline ends the system's look for a name.
#[tokio::test]
async fn a_name_that_is_looked_up_without_end_does_not_hold_up_the_leaving() {
    let library = names_without_end();
    let settings = [
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("DATABASE_URL", "postgres://ana:s3cret@database.test/x"),
        ("AMQP_URL", "amqp://ana:s3cret@broker.test"),
        ("TIDINGS_LISTEN", "127.0.0.1:0"),
    ];
    let list = run(&["client", "list"], &settings).await;
    assert!(list.code == Some(1) && list.stderr.contains("no answer within 3s"), "{list:?}");
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut relay = tidings(&["relay"], &settings).spawn().unwrap();
    let mut log = BufReader::new(relay.stderr.take().unwrap()).lines();
    let waits = async { while !log.next_line().await.unwrap().unwrap().contains("no answer within 3s") {} };
    timeout(PATIENCE, waits).await.expect("it does not say that it waits");
    let pid = relay.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    assert_eq!(timeout(PATIENCE, relay.wait()).await.expect("it does not leave").unwrap().code(), Some(0));
}

// Tail.

struct Tail {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    log: Arc<Mutex<String>>,
}

impl Tail {
    /// A tail that listens already.
    async fn of(house: &House, arguments: &[&str]) -> Self {
        let mut settings = house.settings().to_vec();
        settings.push(("TIDINGS_LOG".to_owned(), "tidings=debug".to_owned()));
        let mut child = tidings(&[&["tail"], arguments].concat(), &settings).spawn().unwrap();
        let log = Arc::<Mutex<String>>::default();
        collect(child.stderr.take().unwrap(), log.clone());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let tail = Self { child, lines, log };
        tail.says("tidings tail: listening", 1).await;
        tail
    }

    /// Waits until it has said this so many times.
    async fn says(&self, words: &str, times: usize) {
        eventually("the tail to speak", async || {
            let log = self.log.lock().unwrap();
            if log.matches(words).count() >= times { Ok(()) } else { Err(log.clone()) }
        })
        .await;
    }

    async fn next(&mut self, count: usize) -> Vec<Value> {
        let mut found: Vec<Value> = vec![];
        while found.len() < count {
            let line = timeout(PATIENCE, self.lines.next_line()).await.unwrap_or_else(|_| panic!("only {found:?}"));
            found.push(serde_json::from_str(&line.unwrap().expect("the tail ended")).unwrap());
        }
        found
    }

    /// The name of its queue and of its exchange.
    fn name(&self) -> String {
        let log = self.log.lock().unwrap();
        let (_, from) = log.split_once("tidings.tail.").expect("no queue in the log");
        format!("tidings.tail.{}", &from[..36])
    }

    async fn ends(&mut self) -> Option<i32> {
        timeout(PATIENCE, self.child.wait()).await.expect("the tail does not end").unwrap().code()
    }
}

fn events(lines: &[Value]) -> Vec<(&str, i64)> {
    lines.iter().map(|line| (line["event"].as_str().unwrap(), line["version"].as_i64().unwrap())).collect()
}

#[sqlx::test]
async fn tail_prints_one_json_object_a_line(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ROUTING_KEY_PREFIX", "eu")]).await;
    let mut tail = Tail::of(&house, &[]).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "job_title": "Editor", "company": "A" })).await.ok();
    house.delete(&ana).await;
    let lines = tail.next(3).await;
    assert_eq!(events(&lines), [("user.created", 1), ("profile.updated", 2), ("user.deleted", 3)]);
    assert_eq!(lines[0].get("changed_fields"), None);
    assert_eq!(lines[1]["changed_fields"], json!(["company", "job_title"]));
    house.settle().await;
    let heard = house.audit.heard();
    let notice = heard.iter().find(|notice| notice.user_id == ana).unwrap();
    assert_eq!(lines[0]["message_id"], notice.message_id.to_string());
    assert_eq!(lines[0]["traceparent"], notice.traceparent.unwrap().to_string());
    assert_eq!(lines[0]["routing_key"], "eu.user.created");
    assert!(lines[0]["occurred_at"].as_str().unwrap().ends_with('Z'));
}

#[sqlx::test]
async fn tail_listens_for_keys(db: PgPool) {
    let house = House::with(db, &[("TIDINGS_ROUTING_KEY_PREFIX", "eu")]).await;
    let mut tail = Tail::of(&house, &["user.created", "*.deleted"]).await;
    let ana = house.user(json!({})).await;
    house.amend(&ana, json!({ "city": "Riga" })).await.ok();
    house.delete(&ana).await;
    assert_eq!(events(&tail.next(2).await), [("user.created", 1), ("user.deleted", 3)]);
}

#[sqlx::test]
async fn tail_listens_for_fields(db: PgPool) {
    let house = House::open(db).await;
    let mut tail = Tail::of(&house, &["--fields", "job_title,nickname", "user.deleted"]).await;
    let ana = house.user(json!({ "job_title": "Author" })).await;
    for patch in
        [json!({ "city": "Riga" }), json!({ "job_title": "Editor", "city": "Oslo" }), json!({ "nickname": "A" })]
    {
        house.amend(&ana, patch).await.ok();
    }
    house.delete(&ana).await;
    assert_eq!(events(&tail.next(3).await), [("profile.updated", 3), ("profile.updated", 4), ("user.deleted", 5)]);
}

/// Whether the broker has this queue, and this exchange.
async fn is_there(name: &str) -> (bool, bool) {
    let connection = house::connect(&env("AMQP_URL")).await.unwrap();
    let queue = QueueDeclareOptions { passive: true, ..Default::default() };
    let channel = connection.create_channel().await.unwrap();
    let queue = channel.queue_declare(name.into(), queue, Default::default()).await;
    // Somebody else's private queue is locked (405), one that is not there is not found (404).
    let queue = queue
        .err()
        .is_none_or(|error| !error.to_string().contains("NOT-FOUND") && !error.to_string().contains("NOT_FOUND"));
    let exchange = ExchangeDeclareOptions { passive: true, ..Default::default() };
    let channel = connection.create_channel().await.unwrap();
    let kind = lapin::ExchangeKind::Headers;
    let exchange = channel.exchange_declare(name.into(), kind, exchange, Default::default()).await.is_ok();
    (queue, exchange)
}

#[sqlx::test]
async fn tail_leaves_nothing_behind(db: PgPool) {
    let house = House::open(db).await;
    let mut tail = Tail::of(&house, &["--fields", "job_title"]).await;
    let name = tail.name();
    assert_eq!(is_there(&name).await, (true, true), "{name}");
    let pid = tail.child.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    assert_eq!(tail.ends().await, Some(0));
    eventually("queue and exchange to be gone", async || match is_there(&name).await {
        (false, false) => Ok(()),
        there => Err(there),
    })
    .await;
}

#[sqlx::test]
async fn tail_ends_quietly_when_nobody_reads_any_more(db: PgPool) {
    let house = House::open(db).await;
    let tail = Tail::of(&house, &[]).await;
    let Tail { mut child, lines, log } = tail;
    // As `tidings tail | head -1` does.
    drop(lines);
    let ended = eventually("the tail to end", async || {
        house.user(json!({})).await;
        child.try_wait().unwrap().ok_or("it still runs")
    })
    .await;
    assert_eq!(ended.code(), Some(0));
    assert!(!log.lock().unwrap().contains("rror"), "{log:?}");
}

#[sqlx::test]
async fn tail_comes_back_when_the_broker_does(db: PgPool) {
    let house = House::open(db).await;
    let mut tail = Tail::of(&house, &[]).await;
    house.broker.down();
    tail.says("what happens until the broker is back will not be shown", 1).await;
    house.broker.up();
    tail.says("tidings tail: listening", 2).await;
    house.user(json!({})).await;
    assert_eq!(events(&tail.next(1).await), [("user.created", 1)]);
}

#[tokio::test]
async fn tail_without_a_broker_says_so() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused = run(&["tail"], &[("AMQP_URL", &format!("amqp://ana:s3cret@{nobody}/%2f"))]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("the broker cannot be reached") && !refused.stderr.contains("s3cret"),
        "{refused:?}"
    );
}
