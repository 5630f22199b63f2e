//! Progress: a bar where somebody looks, and a line now and then where stderr goes into a file.

use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::{journal::Tally, lines::Place};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// A short pause is no news.
const COMPLAIN_AFTER: Duration = Duration::from_secs(1);

pub struct Progress {
    bar: ProgressBar,
    began: Instant,
    /// Lines that were settled before this run began.
    before: u64,
    spoke: Instant,
    /// That the service does not answer was said.
    complained: bool,
}

impl Progress {
    /// `size_bytes` is unknown for standard input.
    pub fn new(place: Place, size_bytes: Option<u64>) -> Self {
        let bar = size_bytes.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let style = match size_bytes {
            Some(_) => "{wide_bar} {percent}% {msg}, {eta} left",
            None => "{spinner} {msg}, {elapsed}",
        };
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(place.offset);
        bar.reset_eta();
        let now = Instant::now();
        Self { bar, began: now, before: place.line, spoke: now, complained: false }
    }

    /// A line of talk, above the bar.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    pub fn show(&mut self, place: Place, tally: &Tally, trouble: Option<(String, Duration)>) {
        self.complain(trouble.as_ref());
        let rate = self.rate(place);
        let refused =
            if tally.refused > 0 { format!(", {} refused", HumanCount(tally.refused)) } else { String::new() };
        let trouble =
            trouble.map(|(trouble, since)| format!(" (the service: {trouble}, for {} s; waiting)", since.as_secs()));
        let trouble = trouble.unwrap_or_default();
        let text = format!("{} lines{refused}, {rate}/s{trouble}", HumanCount(place.line));
        self.bar.set_position(place.offset);
        self.bar.set_message(text.clone());
        if self.bar.is_hidden() && self.spoke.elapsed() >= LINE_EVERY {
            self.spoke = Instant::now();
            let percent = self.bar.length().map(|size_bytes| format!("{}%, ", place.offset * 100 / size_bytes.max(1)));
            self.say(&format!("{}{text}", percent.unwrap_or_default()));
        }
    }

    /// An outage is said once, and its end.
    fn complain(&mut self, trouble: Option<&(String, Duration)>) {
        match trouble {
            Some((trouble, since)) if !self.complained && *since >= COMPLAIN_AFTER => {
                self.complained = true;
                self.say(&format!(
                    "the service does not take anything now ({trouble}): waiting; Ctrl-C ends the import in order"
                ));
            }
            None if std::mem::take(&mut self.complained) => self.say("the service answers again"),
            _ => {}
        }
    }

    /// Lines a second, in this run.
    pub fn rate(&self, place: Place) -> u64 {
        ((place.line - self.before) as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
