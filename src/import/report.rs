//! Report: the lines that were refused, for whoever mends them.
//!
//! Promise: every refused line is in the report file; the screen gets the first of them and says how many more there are.
//! Not here, on purpose: values. A line is found again by its number.

use std::{
    fs::{File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;

use super::journal::RefusedLine;

const SHOWN_LINES: usize = 20;
/// Faults of one line on the screen; the file has all.
const SHOWN_FAULTS: usize = 3;

#[derive(Default)]
pub struct Report {
    file: Option<(PathBuf, BufWriter<File>)>,
    first: Vec<String>,
    more: u64,
}

impl Report {
    /// A new one, or the one that is there if the import `goes_on` with it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn to(path: Option<&Path>, goes_on: bool) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).write(true).append(goes_on).truncate(!goes_on).open(path);
            let file = file.with_context(|| format!("cannot write {}", path.display()))?;
            Ok::<_, anyhow::Error>((path.to_owned(), BufWriter::new(file)))
        };
        Ok(Self { file: path.map(open).transpose()?, ..Self::default() })
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, refused: &RefusedLine) -> anyhow::Result<()> {
        if self.first.len() < SHOWN_LINES {
            self.first.push(shown(refused));
        } else {
            self.more += 1;
        }
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let line = serde_json::to_string(refused)?;
        writeln!(file, "{line}").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Says what the screen is told.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&mut self, say: impl Fn(&str)) -> anyhow::Result<()> {
        self.first.iter().for_each(|line| say(line));
        if let Some((path, file)) = &mut self.file {
            file.flush().with_context(|| format!("cannot write {}", path.display()))?;
        }
        match (self.more, &self.file) {
            (0, None) => {}
            (0, Some((path, _))) => say(&format!("the report is in {}", path.display())),
            (more, None) => say(&format!("and {more} more refused lines; --report FILE has them all")),
            (more, Some((path, _))) => say(&format!("and {more} more refused lines, see {}", path.display())),
        }
        Ok(())
    }
}

/// `line 7: 422 profile_invalid: /profile/birthday must be a string`
fn shown(RefusedLine { line, refused }: &RefusedLine) -> String {
    let status = refused.status.map(|status| format!("{status} ")).unwrap_or_default();
    let faults: Vec<String> = (refused.errors.iter().take(SHOWN_FAULTS))
        .map(|fault| format!("{} {}", fault.pointer, fault.detail).trim_start().to_owned())
        .collect();
    let more = match refused.errors.len().saturating_sub(SHOWN_FAULTS) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let what = if faults.is_empty() { refused.detail.clone() } else { faults.join("; ") + &more };
    format!("line {line}: {status}{}: {what}", refused.code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{import::line::Refused, json::Fault};

    #[test]
    fn a_refused_line_is_shown_with_its_number_code_and_places() {
        let faults =
            ["a", "b", "c", "d"].map(|name| Fault::new(format!("/profile/{name}"), "type", "must be a string"));
        let mut refused = Refused::here("profile_invalid", "see errors", faults.into());
        refused.status = Some(422);
        assert_eq!(
            shown(&RefusedLine { line: 7, refused }),
            "line 7: 422 profile_invalid: /profile/a must be a string; /profile/b must be a string; \
             /profile/c must be a string; and 1 more"
        );
        let refused = Refused::here("malformed_json", "not JSON: see column 3", vec![]);
        assert_eq!(shown(&RefusedLine { line: 8, refused }), "line 8: malformed_json: not JSON: see column 3");
    }
}
