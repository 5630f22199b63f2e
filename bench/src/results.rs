//! Results: `bench/results/MEASURE.json`, from which the plots and the table of docs/performance.md are made.
//!
//! Promise: a later run of a measure replaces the file of the run before; nothing in it names a host or a folder.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::{
    figures::Spread,
    machine::Machine,
    report::{Curve, Row},
};

/// A run of one measure.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub measure: String,
    #[serde(with = "time::serde::rfc3339")]
    pub taken_at: OffsetDateTime,
    pub machine: Machine,
    pub users: u64,
    pub rounds: u64,
    /// For one contestant in one round.
    pub seconds: u64,
    pub rows: Vec<Judged>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curves: Vec<Curve>,
}

/// A row and what follows from it, for who reads the file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Judged {
    #[serde(flatten)]
    pub row: Row,
    pub ratio: Option<Spread>,
    pub is_met: Option<bool>,
}

impl From<Row> for Judged {
    fn from(row: Row) -> Self {
        Self { ratio: row.ratio(), is_met: row.is_met(), row }
    }
}

impl Results {
    pub fn keep(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder)?;
        let path = file(folder, &self.measure);
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// `None` when the measure was never taken.
    pub fn read(folder: &Path, measure: &str) -> anyhow::Result<Option<Self>> {
        let path = file(folder, measure);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path)?;
        serde_json::from_str(&text).map(Some).with_context(|| format!("{} is none of ours", path.display()))
    }
}

fn file(folder: &Path, measure: &str) -> PathBuf {
    folder.join(format!("{measure}.json"))
}
