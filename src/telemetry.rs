//! Telemetry: the log.
//!
//! Promise: the log goes to stderr, one event a line, and holds ids and names only. A service never waits for whoever reads it.
//! Not here, on purpose: request and message bodies, at any level.

use std::{
    io::{IsTerminal, Write, stderr},
    str::FromStr,
    sync::OnceLock,
    time::Duration,
};

use prometheus_client::registry::Registry;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, filter::filter_fn, fmt::writer::BoxMakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

mod queue;

use queue::Queue;

/// For what of the log is not written yet, when the process leaves or a thread panics.
const FLUSH: Duration = Duration::from_secs(1);

/// Of a process whose log is queued.
static QUEUE: OnceLock<Queue> = OnceLock::new();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("expected text or json"),
        }
    }
}

/// Whether whoever logs waits until it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// As a command does, between what it says to people on stderr.
    AtOnce,
    /// As a service does not: a log that nobody reads, a full pipe or a stopped terminal, would stop it.
    Queued,
}

/// Starts the log. `filter` is in the syntax of tracing's `EnvFilter`.
///
/// # Errors
/// When the filter does not parse, or there is no room for a thread that writes.
pub fn start(filter: &str, format: LogFormat, writing: Writing) -> anyhow::Result<()> {
    // Filters of the whole registry, not of the layer: one of a layer remembers, by thread, that it said no, and when a library only asks
    // whether an event would be logged (sqlx does, of a notice), the next event is lost.
    let registry = tracing_subscriber::registry().with(EnvFilter::try_new(filter)?).with(filter_fn(holds_no_secret));
    let log = tracing_subscriber::fmt::layer().with_writer(match writing {
        Writing::AtOnce => BoxMakeWriter::new(stderr),
        Writing::Queued => {
            let queue = QUEUE.get_or_init(|| Queue::new(queue::ROOM_BYTES));
            queue.write_to(stderr(), |lines| {
                tracing::warn!(lines, "the log was not read in time: lines were dropped")
            })?;
            BoxMakeWriter::new(|| queue.clone())
        }
    });
    match format {
        LogFormat::Text => registry.with(log.with_ansi(stderr().is_terminal())).init(),
        LogFormat::Json => registry.with(log.json().flatten_event(true)).init(),
    }
    // The words of a panic may quote a value; its place is enough to find it.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, backtrace = %std::backtrace::Backtrace::capture(), "panicked");
        // It may be the last thing that this process does.
        flush();
    }));
    Ok(())
}

/// Waits, within a bound, until the log is written: before the process ends.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH);
    }
}

/// Says something to people, behind the log and as patiently.
pub fn say(text: &str) {
    let line = format!("{text}\n");
    // Who does not hear it sees the exit code.
    let _ = match QUEUE.get() {
        Some(queue) => queue.clone().write_all(line.as_bytes()),
        None => stderr().write_all(line.as_bytes()),
    };
}

/// How much of the log is missing.
pub fn register(registry: &mut Registry) {
    if let Some(queue) = QUEUE.get() {
        registry.register(
            "log_lines_dropped",
            "Lines of the log that are missing in it, because it was not read in time",
            queue.dropped(),
        );
    }
}

/// An error with its causes, for people. A cause that the error has quoted already is not told twice, as `{:#}` would.
pub fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |text, cause| if text.ends_with(&cause) { text } else { format!("{text}: {cause}") })
}

/// A time, for people.
pub fn rfc3339(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

/// At TRACE lapin shows the frames it sends, and one of them holds the password.
fn holds_no_secret(metadata: &Metadata<'_>) -> bool {
    *metadata.level() != Level::TRACE || !metadata.target().starts_with("lapin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error =
            anyhow::anyhow!("refused").context("no connection: refused").context("the broker cannot be reached");
        assert_eq!(with_causes(&error), "the broker cannot be reached: no connection: refused");
    }
}
