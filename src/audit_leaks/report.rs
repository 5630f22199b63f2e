//! Report: what was looked at, and where something was found. Holds places, never a value.

use std::{
    collections::BTreeMap,
    io::{Write, stdout},
};

use serde::Serialize;
use uuid::Uuid;

use super::needles::{Needles, Origin};

/// Places that are named of each kind; more are only counted.
const NAMED: usize = 20;

#[derive(Serialize)]
pub struct Report {
    /// Values that were looked for.
    values: usize,
    /// Users whose values they are.
    users: usize,
    scanned: Vec<Scanned>,
    found: Vec<Finding>,
}

/// A place that was looked at.
#[derive(Serialize)]
struct Scanned {
    place: String,
    /// Rows, messages or lines.
    looked_at: u64,
    /// Why not all of it, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    but: Option<String>,
}

/// Values in one place.
#[derive(Serialize)]
struct Finding {
    /// `table.column`, `file:line`, or a message's id.
    place: String,
    /// How often; more than one line or row may be behind a column.
    times: u64,
    /// Of one of the values: which field it is of, and whose.
    field: String,
    user_id: Uuid,
}

impl Report {
    pub fn of(needles: &Needles) -> Self {
        let mut users: Vec<Uuid> = needles.origins().iter().map(|origin| origin.user_id).collect();
        users.sort_unstable();
        users.dedup();
        Self { values: needles.len(), users: users.len(), scanned: vec![], found: vec![] }
    }

    /// A place was looked at, and this was found within it.
    pub fn scanned(&mut self, place: impl Into<String>, looked_at: u64, found: Found, but: Option<String>) {
        self.scanned.push(Scanned { place: place.into(), looked_at, but });
        let unnamed = found.0.len().saturating_sub(NAMED);
        let findings = found.0.into_iter().take(NAMED);
        self.found.extend(findings.map(|(place, (times, Origin { field, user_id }))| Finding {
            place,
            times,
            field,
            user_id,
        }));
        if unnamed > 0
            && let Some(scanned) = self.scanned.last_mut()
        {
            scanned.but = Some(format!("{unnamed} more places with a value are not named"));
        }
    }

    pub fn is_clean(&self) -> bool {
        self.found.is_empty()
    }

    /// # Errors
    /// When nobody reads it.
    pub fn print(&self, as_json: bool) -> anyhow::Result<()> {
        let mut out = stdout().lock();
        if as_json {
            serde_json::to_writer_pretty(&mut out, self)?;
            return Ok(writeln!(out)?);
        }
        writeln!(out, "looked for {} values of {} users", self.values, self.users)?;
        for Scanned { place, looked_at, but } in &self.scanned {
            let but = but.as_ref().map(|but| format!("; {but}")).unwrap_or_default();
            writeln!(out, "scanned  {place}: {looked_at}{but}")?;
        }
        for Finding { place, times, field, user_id } in &self.found {
            writeln!(out, "FOUND    {place}: {times} times, such as a value of {field} of user {user_id}")?;
        }
        let verdict = if self.is_clean() { "clean: no value was found" } else { "LEAKS: values are where none may be" };
        Ok(writeln!(out, "{verdict}")?)
    }
}

/// Places where something was found, how often, and an example of whose.
#[derive(Default)]
pub struct Found(BTreeMap<String, (u64, Origin)>);

impl Found {
    pub fn note(&mut self, place: impl Into<String>, origins: &[&Origin]) {
        if let Some(first) = origins.first() {
            self.0.entry(place.into()).or_insert_with(|| (0, (*first).clone())).0 += 1;
        }
    }
}
