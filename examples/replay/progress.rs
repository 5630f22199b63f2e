//! Progress: a bar where somebody looks, and a line now and then where the output goes into a file.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::{task::JoinHandle, time::interval};

const REDRAW: Duration = Duration::from_millis(100);
/// Redraws between two lines where there is no terminal.
const LINE_EVERY: u64 = 50;

#[derive(Clone)]
pub struct Progress(ProgressBar);

/// What is shown as long as this lives.
pub struct Shown {
    task: JoinHandle<()>,
    bar: ProgressBar,
}

impl Progress {
    /// On stderr, and drawn only if that is a terminal.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let style = "{prefix:>8} {wide_bar} {human_pos}/{human_len}, {per_sec}, {elapsed} {msg}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar)
    }

    /// A line above the bar.
    pub fn say(&self, text: &str) {
        self.0.suspend(|| eprintln!("replay: {}", text.trim_end()));
    }

    /// Shows how far `done` is on its way to `total`, and what `trouble` there is.
    pub fn show(
        &self,
        what: &'static str,
        total: usize,
        done: Arc<AtomicU64>,
        trouble: impl Fn() -> Option<String> + Send + 'static,
    ) -> Shown {
        let progress = self.clone();
        self.0.reset();
        self.0.set_length(total as u64);
        self.0.set_prefix(what);
        let task = tokio::spawn(async move {
            let mut redraw = interval(REDRAW);
            for tick in 1.. {
                redraw.tick().await;
                let trouble = trouble().map(|trouble| format!("(service: {trouble})")).unwrap_or_default();
                progress.0.set_position(done.load(Relaxed));
                progress.0.set_message(trouble.clone());
                if progress.0.is_hidden() && tick % LINE_EVERY == 0 {
                    progress.say(&format!("{what}: {} of {total} {trouble}", done.load(Relaxed)));
                }
            }
        });
        Shown { task, bar: self.0.clone() }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.task.abort();
        self.bar.finish_and_clear();
    }
}
