//! Report: the lines that were refused, for whoever mends them.
//!
//! Promise: every refused line is in the report file; the screen gets the first of them and says how many more there are.
//! Not here, on purpose: values. A line is found again by its number.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Write},
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
        let Some(path) = path else { return Ok(Self::default()) };
        let file = open(path, goes_on).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file: Some((path.to_owned(), BufWriter::new(file))), ..Self::default() })
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
        // In one piece: a buffer that is full is written at the end of a line.
        let line = serde_json::to_string(refused)? + "\n";
        file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What was added is in the file, whatever is killed from now on.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        file.flush().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Says what the screen is told.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&mut self, say: impl Fn(&str)) -> anyhow::Result<()> {
        self.first.iter().for_each(|line| say(line));
        self.flush()?;
        match (self.more, &self.file) {
            (0, None) => {}
            (0, Some((path, _))) => say(&format!("the report is in {}", path.display())),
            (more, None) => say(&format!("and {more} more refused lines; --report FILE has them all")),
            (more, Some((path, _))) => say(&format!("and {more} more refused lines, see {}", path.display())),
        }
        Ok(())
    }
}

fn open(path: &Path, goes_on: bool) -> io::Result<File> {
    // What is no file, a pipe say, has nothing to look back at.
    if goes_on && path.is_file() {
        cut(&OpenOptions::new().read(true).write(true).open(path)?)?;
    }
    OpenOptions::new().create(true).write(true).append(goes_on).truncate(!goes_on).open(path)
}

/// Cuts off half a line, as a kill may leave it. What was told as settled was flushed before: its line comes again.
fn cut(report: &File) -> io::Result<()> {
    let (mut reader, mut line, mut whole_bytes) = (BufReader::new(report), Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        whole_bytes += line.len() as u64;
        line.clear();
    }
    report.set_len(whole_bytes)
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
    fn one_that_goes_on_keeps_every_whole_line_and_no_half_one() {
        let path = std::env::temp_dir().join(format!("tidings-report-{}.jsonl", uuid::Uuid::new_v4()));
        let refused = RefusedLine { line: 7, refused: Refused::here("malformed_json", "no", vec![]) };
        let added = serde_json::to_string(&refused).unwrap() + "\n";
        let add = |goes_on| {
            let mut report = Report::to(Some(&path), goes_on).unwrap();
            report.add(&refused).unwrap();
            report.flush().unwrap();
            std::fs::read_to_string(&path).unwrap()
        };
        assert_eq!(add(true), added, "there was none");
        for (left, kept) in [("", ""), ("{\"li", ""), ("1\n2\n", "1\n2\n"), ("1\n2\n{\"li", "1\n2\n")] {
            std::fs::write(&path, left).unwrap();
            assert_eq!(add(true), format!("{kept}{added}"), "{left:?}");
        }
        assert_eq!(add(false), added);
    }

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
