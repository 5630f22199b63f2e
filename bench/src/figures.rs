//! Figures: from samples to what is told of them. Pure.

use serde::{Deserialize, Serialize};

/// What one contestant did in one round.
#[derive(Debug, Default)]
pub struct Round {
    pub per_second: f64,
    pub latencies_ms: Latencies,
}

/// Milliseconds, one per request.
#[derive(Debug, Default)]
pub struct Latencies(Vec<f64>);

impl Latencies {
    pub fn of(mut samples_ms: Vec<f64>) -> Self {
        samples_ms.sort_unstable_by(f64::total_cmp);
        Self(samples_ms)
    }

    /// What this share of all took no longer than; not a number when there is none.
    pub fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
    }

    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }
}

/// The median of some rounds, and the least and most of any.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` when there is no sample.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Self { median, min, max })
    }
}

/// Not a number when there is none.
pub fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn a_quantile_is_a_sample() {
        let latencies = Latencies::of(vec![3.0, 1.0, 2.0]);
        assert_eq!([0.0, 0.5, 1.0].map(|share| latencies.quantile(share)), [1.0, 2.0, 3.0]);
        assert!(Latencies::default().quantile(0.5).is_nan());
    }
}
