//! Telemetry: the log.
//!
//! Promise: the log goes to stderr, one event a line, and holds ids and names only.
//! Not here, on purpose: request and message bodies, at any level.

use std::{io::IsTerminal, str::FromStr};

use tracing::{Level, Metadata};
use tracing_subscriber::{EnvFilter, filter::filter_fn, layer::SubscriberExt, util::SubscriberInitExt};

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

/// Starts the log. `filter` is in the syntax of tracing's `EnvFilter`.
///
/// # Errors
/// When the filter does not parse.
pub fn start(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    // Filters of the whole registry, not of the layer: one of a layer remembers, by thread, that it said no, and when a library only asks
    // whether an event would be logged (sqlx does, of a notice), the next event is lost.
    let registry = tracing_subscriber::registry().with(EnvFilter::try_new(filter)?).with(filter_fn(holds_no_secret));
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => registry.with(log.with_ansi(std::io::stderr().is_terminal())).init(),
        LogFormat::Json => registry.with(log.json().flatten_event(true)).init(),
    }
    // The words of a panic may quote a value; its place is enough to find it.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, backtrace = %std::backtrace::Backtrace::capture(), "panicked");
    }));
    Ok(())
}

/// An error with its causes, for people. A cause that the error has quoted already is not told twice, as `{:#}` would.
pub fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |text, cause| if text.ends_with(&cause) { text } else { format!("{text}: {cause}") })
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
