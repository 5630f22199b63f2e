//! Memory: the resident set of a service, looked at once a second while it is measured.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use crate::{
    figures::mean,
    report::{Goal, Row},
    service::Service,
};

const EVERY: Duration = Duration::from_secs(1);
/// Of all that the service takes.
const GOAL_MIB: f64 = 96.0;
/// What the last quarter may have over the first.
const GOAL_GROWTH: f64 = 1.1;
/// With fewer samples a quarter says nothing.
const FEWEST: usize = 16;

/// Looks until it is dropped. Begun after the warm-up.
pub struct Watch {
    pid: u32,
    samples_mib: Arc<Mutex<Vec<f64>>>,
    looking: JoinHandle<()>,
}

impl Watch {
    pub fn start(service: &Service) -> Self {
        let (pid, samples_mib) = (service.pid, Arc::<Mutex<Vec<f64>>>::default());
        let samples = samples_mib.clone();
        let looking = tokio::spawn(async move {
            let mut pace = interval(EVERY);
            pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                pace.tick().await;
                samples.lock().unwrap_or_else(PoisonError::into_inner).extend(of_process_mib(pid, "VmRSS:"));
            }
        });
        Self { pid, samples_mib, looking }
    }

    /// The highest that was ever reached, and whether it grew while we looked. Asked while the service still runs.
    pub fn rows(&self, who: &str) -> Vec<Row> {
        let samples = self.samples_mib.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = samples.iter().copied().chain(of_process_mib(self.pid, "VmHWM:")).reduce(f64::max);
        let mut highest_row = Row::new(format!("memory, {who}"), "MiB").goal(Goal::AtMost(GOAL_MIB));
        highest_row.service.extend(highest);
        let mut rows = vec![highest_row];
        if samples.len() >= FEWEST {
            let quarter = samples.len() / 4;
            let (first, last) = (mean(&samples[..quarter]), mean(&samples[samples.len() - quarter..]));
            let row = Row::new(format!("memory at the end, {who}"), "MiB").limit("at first");
            let mut row = row.goal(Goal::RatioAtMost(GOAL_GROWTH));
            row.add(last, first);
            rows.push(row);
        }
        rows
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

/// `None` when there is no such process any more.
fn of_process_mib(pid: u32, line: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|text| text.strip_prefix(line)?.trim().split(' ').next()?.parse::<f64>().ok())?;
    Some(kib / 1024.0)
}
