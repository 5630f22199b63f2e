//! Report: what a measure found, and whether it is good enough. Pure.
//!
//! Promise: a ratio is the median of the rounds' own ratios, so that what slowed the machine for a round slows both sides of it.

use serde::{Deserialize, Serialize};

use crate::figures::Spread;

/// All that one measure found.
#[derive(Debug, Default)]
pub struct Findings {
    pub rows: Vec<Row>,
    pub curves: Vec<Curve>,
}

/// One figure and its limit. Every round adds a sample to each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub case: String,
    pub unit: String,
    /// One per round.
    pub service: Vec<f64>,
    pub limit: Option<Limit>,
    pub goal: Option<Goal>,
}

/// What stands in the way of being faster, measured in the same rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limit {
    pub name: String,
    /// One per round.
    pub samples: Vec<f64>,
}

/// What is good enough.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    RatioAtLeast(f64),
    RatioAtMost(f64),
    /// Of the service's own figure.
    AtLeast(f64),
    AtMost(f64),
}

/// Something over something else, to be drawn: pending messages over seconds, say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Curve {
    /// What it is drawn with: one picture for all of the same.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub of: String,
    pub name: String,
    /// Whether it is what the others stand beside.
    #[serde(default)]
    pub is_limit: bool,
    pub x_unit: String,
    pub y_unit: String,
    pub points: Vec<(f64, f64)>,
}

impl Row {
    pub fn new(case: impl Into<String>, unit: &str) -> Self {
        Self { case: case.into(), unit: unit.to_owned(), service: vec![], limit: None, goal: None }
    }

    #[must_use]
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }

    #[must_use]
    pub fn limit(self, name: &str) -> Self {
        Self { limit: Some(Limit { name: name.to_owned(), samples: vec![] }), ..self }
    }

    /// Adds a round.
    pub fn add(&mut self, service: f64, limit: f64) {
        self.service.push(service);
        if let Some(own) = &mut self.limit {
            own.samples.push(limit);
        }
    }

    pub fn ratio(&self) -> Option<Spread> {
        let limit = &self.limit.as_ref()?.samples;
        let ratios: Vec<f64> = self.service.iter().zip(limit).map(|(service, limit)| service / limit).collect();
        Spread::of(&ratios)
    }

    /// `None` when there is no goal, or nothing to judge.
    pub fn is_met(&self) -> Option<bool> {
        let own = Spread::of(&self.service).map(|spread| spread.median);
        let ratio = self.ratio().map(|spread| spread.median);
        Some(match self.goal? {
            Goal::RatioAtLeast(least) => ratio? >= least,
            Goal::RatioAtMost(most) => ratio? <= most,
            Goal::AtLeast(least) => own? >= least,
            Goal::AtMost(most) => own? <= most,
        })
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RatioAtLeast(least) => write!(f, "ratio >= {least}"),
            Self::RatioAtMost(most) => write!(f, "ratio <= {most}"),
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::AtMost(most) => write!(f, "<= {most}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_compared_with_themselves() {
        let mut row = Row::new("32 connections", "1/s").limit("pgbench").goal(Goal::RatioAtLeast(1.25));
        // The machine was half as fast in the second round.
        row.add(1300.0, 1000.0);
        row.add(650.0, 500.0);
        row.add(1200.0, 1000.0);
        assert_eq!(row.ratio(), Some(Spread { median: 1.3, min: 1.2, max: 1.3 }));
        assert_eq!(row.is_met(), Some(true));
    }

    #[test]
    fn what_was_not_measured_is_not_met_and_not_missed() {
        assert_eq!(Row::new("memory", "MiB").goal(Goal::AtMost(96.0)).is_met(), None);
    }
}
