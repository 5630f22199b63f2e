//! Pace: when requests are to begin, at a steady rate, whatever became of those before: an open loop.
//!
//! Latencies are counted from these moments. A client that waits for an answer before it asks again leaves out just those requests
//! that would have met the delay (coordinated omission).

use std::{
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Before the first, for the rest to be ready.
const LEAD: Duration = Duration::from_millis(20);

/// A number, and when it is due. They arrive at that time or a little later, never earlier.
pub type Due = (u64, Instant);

/// `count` of them, from 0 on.
pub fn pace(per_second: u64, count: u64) -> UnboundedReceiver<Due> {
    let (due, dues) = unbounded_channel();
    let began = Instant::now() + LEAD;
    thread::spawn(move || {
        for number in 0..count {
            let at = began + Duration::from_nanos(number * 1_000_000_000 / per_second);
            wait_until(at);
            if due.send((number, at)).is_err() {
                break;
            }
        }
    });
    dues
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own; the runtime's timers are good to a millisecond only"
)]
fn wait_until(at: Instant) {
    thread::sleep(at.saturating_duration_since(Instant::now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_left_out_and_nothing_comes_early() {
        let (mut dues, mut seen) = (pace(1000, 20), vec![]);
        while let Some((number, at)) = dues.recv().await {
            assert!(Instant::now() >= at);
            seen.push((number, at));
        }
        assert_eq!(seen.len(), 20);
        assert_eq!(seen[19].1 - seen[9].1, Duration::from_millis(10));
    }
}
