//! Roles and commands; owns the exit code.

use std::{
    io::{self, ErrorKind, Read, Write, stdout},
    net::TcpStream,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use clap::Parser;
use tidings::{
    app, audit_leaks, clients,
    config::{self, Cli, Command, Faults, WrongSettings},
    deletions, docs, import, lifecycle, roles, subscriptions,
    tail::{self, Wanted},
    telemetry::{self, Writing},
};
use tidings_sdk::topology::Source;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// A request is many small texts that live for a moment: docs/performance.md tells what this one brings.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            telemetry::say(&format!("error: there is no room for the threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(answer(cli));
    // Waits for nobody: to look up a name is a call of the system's that nobody can end, and it may take minutes.
    runtime.shutdown_background();
    telemetry::flush();
    code
}

async fn answer(cli: Cli) -> ExitCode {
    match run(cli).await {
        Ok(code) => code,
        Err(error) if nobody_reads(&error) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::say(&format!("error: {}", telemetry::with_causes(&error)));
            if error.is::<WrongSettings>() {
                telemetry::say("hint: `tidings help` and `tidings COMMAND --help` tell what each setting is for");
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Whether what is printed is read no more, as in `tidings openapi | head -1`. All else that writes has an error of its own.
fn nobody_reads(error: &anyhow::Error) -> bool {
    let of_json = || error.downcast_ref::<serde_json::Error>()?.io_error_kind();
    let kind = error.downcast_ref().map(io::Error::kind).or_else(of_json);
    kind == Some(ErrorKind::BrokenPipe)
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let mut faults = Faults::default();
    let writing = match cli.command {
        Command::Serve(_) | Command::Relay(_) => Writing::Queued,
        _ => Writing::AtOnce,
    };
    cli.log.start(writing, &mut faults);
    match cli.command {
        Command::Serve(settings) => Box::pin(roles::serve(*settings, faults)).await,
        Command::Relay(settings) => Box::pin(roles::relay(settings, faults)).await,
        Command::Migrate(settings) => migrate(&settings, faults).await,
        Command::Tail(settings) => tail(settings, faults).await,
        Command::Subscription(subscription) => Box::pin(subscriptions::command::run(subscription.action, faults)).await,
        Command::Deletions(action) => deletions::command::run(action, faults).await,
        Command::Client(client) => clients::command::run(client.action, faults).await,
        Command::AuditLeaks(settings) => {
            let is_clean = audit_leaks::run(settings, faults).await?;
            return Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Import(settings) => Box::pin(import(settings, faults)).await,
        Command::Openapi => print(faults, app::openapi),
        Command::Asyncapi => {
            print(faults, || docs::asyncapi(&Source { exchange: config::DEFAULT_EXCHANGE.to_owned(), prefix: None }))
        }
        Command::Healthcheck(settings) => healthcheck(&settings, faults),
    }?;
    Ok(ExitCode::SUCCESS)
}

async fn migrate(settings: &config::Migrate, mut faults: Faults) -> anyhow::Result<()> {
    let db = settings.database.open(&mut faults);
    faults.none()?;
    let Some(db) = db else { unreachable!("no faults, so it is there") };
    roles::migrate(&db).await?;
    eprintln!("the schema is up to date");
    Ok(())
}

async fn tail(settings: config::Tail, mut faults: Faults) -> anyhow::Result<()> {
    let (keys, fields) = (settings.keys(&mut faults), settings.fields(&mut faults));
    let broker = settings.amqp.open(&mut faults);
    faults.none()?;
    let Some(broker) = broker else { unreachable!("no faults, so it is there") };
    let stop = CancellationToken::new();
    lifecycle::leave_on_signal(stop.clone())?;
    tail::run(&broker.as_registry(), &Wanted { keys, fields }, &stop).await
}

async fn import(settings: config::Import, mut faults: Faults) -> anyhow::Result<()> {
    let parsed = settings.parse(&mut faults);
    faults.none()?;
    let Some(parsed) = parsed else { unreachable!("no faults, so it is there") };
    import::run(&settings, parsed).await
}

fn print(faults: Faults, document: fn() -> anyhow::Result<String>) -> anyhow::Result<()> {
    faults.none()?;
    Ok(stdout().write_all(document()?.as_bytes())?)
}

/// Plain HTTP by hand: a health check must not need what it checks.
fn healthcheck(settings: &config::Healthcheck, mut faults: Faults) -> anyhow::Result<()> {
    const DEADLINE: Duration = Duration::from_secs(2);
    let address = settings.listen.parse(&mut faults);
    faults.none()?;
    let Some(mut address) = address else { unreachable!("no faults, so it is there") };
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() });
    }
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE).context("no instance listens")?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut answer = String::new();
    let asked = write!(stream, "GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    asked.and_then(|()| stream.read_to_string(&mut answer)).map_err(|error| anyhow!("no answer in time: {error}"))?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "the instance is not well");
    Ok(())
}
