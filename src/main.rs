//! Roles and commands; owns the exit code.

use std::{
    io::{Read, Write, stdout},
    net::TcpStream,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Parser;
use tidings::{
    app,
    config::{self, Cli, Command, Faults, WrongSettings},
    lifecycle, roles, subscriptions,
    tail::{self, Wanted},
    telemetry,
};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", telemetry::with_causes(&error));
            if error.is::<WrongSettings>() {
                eprintln!("hint: `tidings help` and `tidings COMMAND --help` tell what each setting is for");
                return ExitCode::from(2);
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let mut faults = Faults::default();
    faults.note("TIDINGS_LOG", telemetry::start(&cli.log.log, cli.log.log_format));
    match cli.command {
        Command::Serve(settings) => roles::serve(settings, faults).await,
        Command::Relay(settings) => roles::relay(settings, faults).await,
        Command::Migrate(settings) => migrate(&settings, faults).await,
        Command::Tail(settings) => tail(settings, faults).await,
        Command::Subscription(subscription) => Box::pin(subscriptions::command::run(subscription.action, faults)).await,
        Command::Openapi => openapi(faults),
        Command::Healthcheck(settings) => healthcheck(&settings, faults),
    }
}

async fn migrate(settings: &config::Migrate, mut faults: Faults) -> anyhow::Result<()> {
    let db = settings.database.open(&mut faults);
    faults.none()?;
    let Some(db) = db else { unreachable!("no faults, so it is there") };
    roles::bring_up_to_date(&db).await?;
    eprintln!("the schema is up to date");
    Ok(())
}

async fn tail(settings: config::Tail, mut faults: Faults) -> anyhow::Result<()> {
    let fields = settings.fields(&mut faults);
    let broker = settings.amqp.open(&mut faults);
    faults.none()?;
    let Some(broker) = broker else { unreachable!("no faults, so it is there") };
    let stop = CancellationToken::new();
    lifecycle::leave_on_signal(stop.clone())?;
    tail::run(&broker, &Wanted { keys: settings.keys, fields }, &stop).await
}

fn openapi(faults: Faults) -> anyhow::Result<()> {
    faults.none()?;
    Ok(stdout().write_all(app::openapi()?.as_bytes())?)
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
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("no answer in time")?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "the instance is not well");
    Ok(())
}
