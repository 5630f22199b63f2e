//! Replays a log of real changes against a running service, and checks what a consumer holds in the end.
//!
//! ```sh
//! ./dev run
//! eval "$(./dev up)"
//! TIDINGS_URL=$(./dev status --url) TIDINGS_API_KEY=$(./dev key) cargo run --locked --example replay -- changes.jsonl.gz
//! ```
//!
//! The log has one change a line, plain or gzip:
//! `{"op":"create","key":"A1","profile":{..}}`, `{"op":"update","key":"A1","patch":{..}}` (RFC 7396) or `{"op":"delete","key":"A1"}`.
//!
//! One half of this program makes the changes happen over REST, many persons at once and each in order. The other half is a
//! consumer that knows nothing of the first: it hears notices from a queue of its own and fetches each user it hears of. In the
//! end both are compared with the log, person by person. Stop and start the broker, or kill the service, while it runs: it must
//! come out the same.
//!
//! Exit status: 0 when everything is equal, 1 when something differs or cannot be reached, 2 when the log cannot be read.

mod api;
mod changelog;
mod driver;
mod mirror;
mod progress;
mod queue;
mod verdict;

use std::{
    collections::HashSet,
    io::{Write, stdout},
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{Parser, value_parser};
use tidings::telemetry::with_causes;
use tokio::{signal::ctrl_c, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    changelog::Changelog,
    driver::{Answers, Driver},
    mirror::{Mirror, caught_up},
    progress::Progress,
    queue::Queue,
    verdict::{Difference, differences},
};

const SHOWN_DIFFERENCES: usize = 20;
const WRONG_INPUT: u8 = 2;

/// Replay a log of changes against a running tidings, and check what a consumer holds in the end.
#[derive(Parser)]
struct Settings {
    /// Log of changes, one JSON object a line, plain or gzip; `-` is standard input.
    file: PathBuf,
    /// Where the service listens.
    #[arg(long, env = "TIDINGS_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// A key that may read and write users.
    #[arg(long, env = "TIDINGS_API_KEY", hide_env_values = true)]
    api_key: String,
    /// The broker it publishes to.
    #[arg(long, env = "AMQP_URL", hide_env_values = true, default_value = "amqp://guest:guest@127.0.0.1:5672/%2f")]
    amqp_url: String,
    /// The exchange it publishes to.
    #[arg(long, env = "TIDINGS_EXCHANGE", default_value = "masterdata")]
    exchange: String,
    /// Persons that are changed at once.
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// For all changes together.
    #[arg(long, default_value_t = 900, value_name = "SECONDS")]
    deadline_s: u64,
    /// How long the mirror may make no headway once all changes are made.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    patience_s: u64,
    /// Lose every notice about this person, to see that the check fails.
    #[arg(long, value_name = "KEY")]
    lose: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    let log = match changelog::read(&settings.file) {
        Ok(log) => log,
        Err(unreadable) => {
            eprintln!("error: {}: {unreadable}", settings.file.display());
            return WRONG_INPUT.into();
        }
    };
    match run(&settings, log).await {
        Ok(differences) if differences.is_empty() => ExitCode::SUCCESS,
        Ok(differences) => {
            complain(&differences);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

async fn run(settings: &Settings, log: Changelog) -> anyhow::Result<Vec<Difference>> {
    let api = Arc::new(Api::new(&settings.url, &settings.api_key)?);
    api.check().await.map_err(|error| {
        hinted(&error, &settings.url, "start the service with ./dev run, or tell where it is with --url")
    })?;
    let queue = Arc::new(Queue::new(&settings.amqp_url, &settings.exchange).context("AMQP_URL")?);
    let first = queue.open().await.map_err(|error| {
        const HINT: &str = "eval \"$(./dev up)\" tells where it is, or give it with --amqp-url and --exchange";
        hinted(&error, "the broker cannot be used", HINT)
    })?;

    let replay = Replay::new(settings, log)?;
    let stop = CancellationToken::new();
    let listening =
        tokio::spawn(replay.mirror.clone().listen(queue.clone(), first, replay.progress.clone(), stop.clone()));
    let outcome = tokio::select! {
        outcome = replay.run(settings) => outcome,
        _ = ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    stop.cancel();
    let listened = listening.await;
    if let Err(error) = queue.delete().await {
        replay.progress.say(&format!(
            "queue {} stays behind and expires by itself: {}",
            queue.name,
            with_causes(&error)
        ));
    }
    listened.context("the consumer fell")?;
    outcome
}

fn hinted(error: &anyhow::Error, what: &str, hint: &str) -> anyhow::Error {
    anyhow::anyhow!("{what}: {}\nhint: {hint}", with_causes(error))
}

struct Replay {
    log: Arc<Changelog>,
    driver: Driver,
    mirror: Arc<Mirror>,
    fetches: Arc<Api>,
    progress: Progress,
}

/// How long each part took.
struct Times {
    replay: Duration,
    catch_up: Duration,
}

impl Replay {
    fn new(settings: &Settings, log: Changelog) -> anyhow::Result<Self> {
        let log = Arc::new(log);
        // Two clients, so that the consumer's requests are counted by themselves.
        let api = || Api::new(&settings.url, &settings.api_key).map(Arc::new);
        let (changes, fetches) = (api()?, api()?);
        let users = log.lives.iter().map(|life| life.user).collect();
        let lost: HashSet<_> =
            log.lives.iter().filter(|life| settings.lose.contains(&life.key)).map(|life| life.user).collect();
        if lost.is_empty() && !settings.lose.is_empty() {
            bail!("--lose: the log has nobody of this key");
        }
        let driver = Driver { log: log.clone(), api: changes, made: Arc::default() };
        let mirror = Arc::new(Mirror::new(fetches.clone(), users, lost));
        Ok(Self { log, driver, mirror, fetches, progress: Progress::new() })
    }

    async fn run(&self, settings: &Settings) -> anyhow::Result<Vec<Difference>> {
        let began = Instant::now();
        let answers = self.change_all(settings).await?;
        let replayed = Instant::now();
        self.await_mirror(settings, &answers).await;
        let times = Times { replay: replayed - began, catch_up: replayed.elapsed() };
        let differences = differences(&self.log, &answers, self.mirror.held());
        self.report(&times, &differences)?;
        Ok(differences)
    }

    async fn change_all(&self, settings: &Settings) -> anyhow::Result<Answers> {
        let total = self.log.changes.len();
        let api = self.driver.api.clone();
        let _shown = self.progress.show("changes", total, self.driver.made.clone(), move || api.trouble());
        let deadline = Duration::from_secs(settings.deadline_s);
        let answers = timeout(deadline, self.driver.run(settings.concurrency.into())).await;
        answers.map_err(|_| {
            let made = self.driver.made.load(Relaxed);
            let trouble = self.driver.api.trouble().unwrap_or_else(|| "it answers".to_owned());
            anyhow::anyhow!("{made} of {total} changes were made within {deadline:?}; the service: {trouble}")
        })
    }

    /// Until the mirror holds, for every user, the version that was answered last.
    async fn await_mirror(&self, settings: &Settings, answers: &Answers) {
        let targets: Vec<_> = (self.log.lives.iter().zip(answers))
            .filter_map(|(life, answer)| Some((life.user, *answer.as_ref().ok()?)))
            .collect();
        let reached = Arc::new(AtomicU64::new(0));
        let api = self.fetches.clone();
        let _shown = self.progress.show("mirror", targets.len(), reached.clone(), move || api.trouble());
        if !caught_up(&self.mirror, &targets, &reached, Duration::from_secs(settings.patience_s)).await {
            let behind = targets.len() as u64 - reached.load(Relaxed);
            self.progress.say(&format!("the mirror makes no headway any more: {behind} users are behind"));
            if let Some(status) = self.mirror.strange() {
                self.progress.say(&format!("a fetch was answered {status}, which the contract does not know"));
            }
        }
    }

    fn report(&self, times: &Times, differences: &[Difference]) -> anyhow::Result<()> {
        let (tally, news) = (&self.log.tally, &self.mirror.counts);
        let of = |count: &AtomicU64| count.load(Relaxed);
        let total = times.replay + times.catch_up;
        let rate = self.log.changes.len() as f64 / times.replay.as_secs_f64();
        let living = self.log.lives.iter().filter(|life| life.profile.is_some()).count();
        let mut out = stdout().lock();
        writeln!(
            out,
            "log       {} changes of {} persons: {} creates, {} updates ({} change nothing), {} deletes",
            self.log.changes.len(),
            self.log.persons,
            tally.creates,
            tally.updates,
            tally.without_effect,
            tally.deletes
        )?;
        writeln!(
            out,
            "requests  {} ({} of them repeated)",
            of(&self.driver.api.requests),
            of(&self.driver.api.retries)
        )?;
        writeln!(
            out,
            "notices   {} ({} duplicates, {} redelivered, {} of versions held already, {} lost on purpose), {} about others, {} malformed",
            of(&news.received),
            of(&news.duplicates),
            of(&news.redelivered),
            of(&news.outrun),
            of(&news.lost),
            of(&news.foreign),
            of(&news.malformed)
        )?;
        writeln!(
            out,
            "fetches   {} ({} of them repeated); the consumer lost the broker {} times",
            of(&self.fetches.requests),
            of(&self.fetches.retries),
            of(&news.outages)
        )?;
        writeln!(
            out,
            "time      replay {:.1} s ({rate:.0} changes/s), catch-up {:.2} s, total {:.1} s",
            times.replay.as_secs_f64(),
            times.catch_up.as_secs_f64(),
            total.as_secs_f64()
        )?;
        if differences.is_empty() {
            let gone = self.log.lives.len() - living;
            writeln!(out, "verdict   equal: {living} living users field by field, {gone} deleted ones, every version")?;
        } else {
            writeln!(out, "verdict   {} of {} users differ", differences.len(), self.log.lives.len())?;
        }
        Ok(out.flush()?)
    }
}

fn complain(differences: &[Difference]) {
    eprintln!("error: the mirror is not what the log says");
    for difference in differences.iter().take(SHOWN_DIFFERENCES) {
        eprintln!("  {difference}");
    }
    if differences.len() > SHOWN_DIFFERENCES {
        eprintln!("  and {} more", differences.len() - SHOWN_DIFFERENCES);
    }
}
