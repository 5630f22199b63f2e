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
    missed: Vec<Missed>,
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

/// A place that was to be looked at and could not be.
#[derive(Serialize)]
struct Missed {
    place: String,
    why: String,
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
        Self { values: needles.len(), users: users.len(), scanned: vec![], missed: vec![], found: vec![] }
    }

    /// A place was looked at, and this was found within it.
    pub fn scanned(&mut self, place: impl Into<String>, looked_at: u64, found: Found, but: Option<String>) {
        let unnamed = found.0.len().saturating_sub(NAMED);
        let unnamed = (unnamed > 0).then(|| format!("{unnamed} more places with a value are not named"));
        let but = but.into_iter().chain(unnamed).reduce(|but, unnamed| format!("{but}; {unnamed}"));
        self.scanned.push(Scanned { place: place.into(), looked_at, but });
        let findings = found.0.into_iter().take(NAMED);
        self.found.extend(findings.map(|(place, (times, Origin { field, user_id }))| Finding {
            place,
            times,
            field,
            user_id,
        }));
    }

    /// Notes why a place could not be looked at, if so: what is found elsewhere is told all the same.
    pub fn looked_at(&mut self, place: impl Into<String>, outcome: anyhow::Result<()>) {
        let missed = outcome.err().map(|why| Missed { place: place.into(), why: format!("{why:#}") });
        self.missed.extend(missed);
    }

    /// Everything was looked at, and nothing was found.
    pub fn is_clean(&self) -> bool {
        self.found.is_empty() && self.missed.is_empty()
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
        for Missed { place, why } in &self.missed {
            writeln!(out, "MISSED   {place}: {why}")?;
        }
        for Finding { place, times, field, user_id } in &self.found {
            writeln!(out, "FOUND    {place}: {times} times, such as a value of {field} of user {user_id}")?;
        }
        let verdict = match (self.found.is_empty(), self.missed.is_empty()) {
            (true, true) => "clean: no value was found",
            (true, false) => "INCOMPLETE: no value was found, and not everything could be looked at",
            (false, _) => "LEAKS: values are where none may be",
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_of_a_place_is_said_whatever_else_there_is_to_say() {
        let (origin, mut found) = (Origin { field: "city".to_owned(), user_id: Uuid::nil() }, Found::default());
        (0..=NAMED).for_each(|line| found.note(format!("log:{line}"), &[&origin]));
        let mut report = Report::of(&Needles::default());
        report.scanned("log", 9, found, Some("and no more than the first 9".to_owned()));
        let but = report.scanned[0].but.as_deref();
        assert_eq!(but, Some("and no more than the first 9; 1 more places with a value are not named"));
        assert_eq!(report.found.len(), NAMED);
    }
}
