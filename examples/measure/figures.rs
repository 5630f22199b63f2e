//! From samples to the figures of the table.

/// One round of throughput.
pub struct Round {
    pub per_second: f64,
    pub latencies_ms: Vec<f64>,
}

/// All rounds of one contestant.
#[derive(Default)]
pub struct Rounds {
    rates: Vec<f64>,
    pub latencies_ms: Vec<f64>,
}

impl Rounds {
    pub fn add(&mut self, round: Round) {
        self.rates.push(round.per_second);
        self.latencies_ms.extend(round.latencies_ms);
    }

    pub fn rate(&self) -> f64 {
        quantile(&self.rates, 0.5)
    }

    /// The median, and the least and most of any round.
    pub fn rates(&self) -> String {
        let (least, most) = (quantile(&self.rates, 0.0), quantile(&self.rates, 1.0));
        format!("{:.0} ({least:.0} .. {most:.0})", self.rate())
    }
}

/// p50 / p99 in milliseconds.
pub fn latencies(samples_ms: &[f64]) -> String {
    format!("{:.2} / {:.2}", quantile(samples_ms, 0.5), quantile(samples_ms, 0.99))
}

/// The sample that this share of all lies below; not a number when there is none.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}
