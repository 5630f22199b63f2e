//! Book: what became of the lines, kept in the journal, told in the report, shown as progress.

use std::{fs, path::Path, time::Duration};

use anyhow::anyhow;
use uuid::Uuid;

use super::{
    journal::{Journal, RefusedLine, Tally},
    lines::Place,
    progress::Progress,
    report::Report,
    service::{Ended, Outcome},
};
use crate::{
    config::{Faults, Import, ImportSettings, Input},
    db::is_overheard,
};

pub struct Book {
    place: Place,
    tally: Tally,
    journal: Option<Journal>,
    /// Something was noted that the journal does not have yet.
    is_behind: bool,
    report: Report,
    progress: Progress,
    import_id: Uuid,
    input: Input,
    /// Of the file when it was begun; unknown for standard input.
    size_bytes: Option<u64>,
    dry_run: bool,
    key_setting: String,
}

impl Book {
    /// # Errors
    /// When the report cannot be written, or the journal not be read.
    pub fn open(
        import: &Import,
        settings: &ImportSettings,
        journal: Option<Journal>,
        place: Place,
        size_bytes: Option<u64>,
    ) -> anyhow::Result<Self> {
        // A journal tells again what was refused before; without one that stands in the report alone.
        let goes_on = journal.is_none() && import.from_line.is_some();
        let mut report = Report::to(import.report.as_deref(), goes_on)?;
        let tally = journal.as_ref().map(|journal| journal.tally).unwrap_or_default();
        if let Some(journal) = &journal {
            journal.refusals(|refused| report.add(&refused))?;
        }
        let progress = Progress::new(place, size_bytes);
        let kept = journal.as_ref().map(Journal::import_id).or(settings.import_id);
        let import_id = kept.unwrap_or_else(Uuid::new_v4);
        let input = settings.input.clone();
        let book = Self {
            place,
            tally,
            journal,
            is_behind: false,
            report,
            progress,
            import_id,
            input,
            size_bytes,
            dry_run: import.dry_run,
            key_setting: import.api.key_setting(),
        };
        book.greet(settings);
        Ok(book)
    }

    fn greet(&self, settings: &ImportSettings) {
        if !self.dry_run && settings.url.parse().is_ok_and(|url| is_overheard(&url)) {
            self.progress.say(
                "warning: TIDINGS_URL: the service is on another machine, and anybody between could read users and key; use https://",
            );
        }
        let line = self.place.line;
        match &self.journal {
            Some(journal) if journal.is_done() && line > 0 => {
                self.progress.say("every line is settled already; --restart begins anew")
            }
            Some(_) if line > 0 => self.progress.say(&format!("going on after line {line}")),
            None if !self.dry_run && matches!(self.input, Input::Stdin) => self.progress.say(&format!(
                "standard input has no journal: should this import end early, the same lines with --import-id {} double nobody",
                self.import_id
            )),
            _ => {}
        }
    }

    pub fn import_id(&self) -> Uuid {
        self.import_id
    }

    /// How to go on, for somebody whose import ended early.
    fn again(&self) -> String {
        let next = self.place.line + 1;
        match &self.input {
            // It keeps no journal.
            input if self.dry_run => {
                let file = if let Input::File(file) = input { file } else { Path::new("-") }.display();
                format!("`tidings import {file} --dry-run --from-line {next}` goes on from there")
            }
            Input::File(file) => format!("`tidings import {}` goes on from there", file.display()),
            Input::Stdin => {
                let import_id = self.import_id;
                format!("`tidings import - --import-id {import_id} --from-line {next}` goes on with the same lines")
            }
        }
    }

    /// The file, when it has more than was read.
    fn longer(&self) -> Option<&Path> {
        let Input::File(file) = &self.input else { return None };
        fs::metadata(file).is_ok_and(|found| found.len() > self.place.offset).then_some(file.as_path())
    }

    /// Everything before `end` is settled, the last line by `outcome`.
    ///
    /// # Errors
    /// When the report cannot be written.
    pub fn note(&mut self, end: Place, outcome: Outcome) -> anyhow::Result<()> {
        let mut refused = None;
        match outcome {
            Outcome::Created => self.tally.created += 1,
            Outcome::Replaced => self.tally.replaced += 1,
            Outcome::Blank => self.tally.blank += 1,
            Outcome::Refused(why) => {
                self.tally.refused += 1;
                refused = Some(RefusedLine { line: end.line, refused: why.bounded() });
            }
        }
        if let Some(refused) = &refused {
            self.report.add(refused)?;
        }
        self.place = end;
        self.is_behind = true;
        if let Some(journal) = &mut self.journal {
            journal.settle(end, self.tally, refused);
        }
        Ok(())
    }

    /// Writes down what was noted, and shows it. Who goes on after what was shown misses no refusal: without a journal the report alone
    /// has them.
    ///
    /// # Errors
    /// When the report or the journal cannot be written.
    pub fn save(&mut self, trouble: Option<(String, Duration)>) -> anyhow::Result<()> {
        self.report.flush()?;
        self.write()?;
        self.progress.show(self.place, &self.tally, trouble);
        Ok(())
    }

    fn write(&mut self) -> anyhow::Result<()> {
        if let Some(journal) = &mut self.journal
            && std::mem::take(&mut self.is_behind)
        {
            journal.write()?;
        }
        Ok(())
    }

    /// Tells how it ended.
    ///
    /// # Errors
    /// When not every line is in, or when what was settled cannot be written down.
    pub fn close(mut self, ended: Option<anyhow::Error>) -> anyhow::Result<()> {
        self.write()?;
        if let Some(journal) = &mut self.journal {
            journal.sync()?;
        }
        self.progress.end();
        let (place, progress, again) = (self.place, &self.progress, self.again());
        let Tally { created, replaced, refused, blank } = self.tally;
        self.report.finish(|line| progress.say(line))?;
        let took = progress.elapsed().as_secs_f64();
        let blank = if blank > 0 { format!(", {blank} blank") } else { String::new() };
        let kept = match self.dry_run {
            true => format!("{replaced} lines could be sent"),
            false => format!("{created} users created, {replaced} brought up to date"),
        };
        progress.say(&format!("{kept}, {refused} refused{blank}; {took:.1} s, {} lines/s", progress.rate(place)));
        let is_done = self.journal.as_ref().is_some_and(Journal::is_done);
        let is_stopped = |why: &anyhow::Error| why.downcast_ref() == Some(&Ended::Stopped);
        // A file is gone on with by the same command, whatever ended it.
        let is_to_be_told = matches!(self.input, Input::Stdin) && !self.dry_run;
        if is_to_be_told && ended.as_ref().is_some_and(|why| !is_stopped(why)) {
            progress.say(&again);
        }
        // No line is read beyond what was there at the start: when all of that is settled, only a late Ctrl-C can have ended it.
        match ended.filter(|_| !is_done) {
            Some(why) if is_stopped(&why) => {
                Err(anyhow!("ended before the end, after line {}\nhint: {again}", place.line))
            }
            Some(why) if let Some(Ended::Unknown(_) | Ended::Forbidden(_)) = why.downcast_ref() => {
                let mut faults = Faults::default();
                faults.note::<(), _>(&self.key_setting, Err(why));
                Err(faults.none().expect_err("one was noted").into())
            }
            Some(why) => Err(why.context(format!("ended before the end, after line {}", place.line))),
            None if let Some(size_bytes) = self.size_bytes
                && place.offset < size_bytes =>
            {
                let Place { line, offset } = place;
                Err(anyhow!(
                    "the file became shorter meanwhile: it ended with line {line}, after {offset} of {size_bytes} bytes"
                ))
            }
            None if let Some(file) = self.longer() => {
                // By bytes: a last line without its end may have been continued.
                let (line, next, file) = (place.line, place.offset + 1, file.display());
                Err(anyhow!(
                    "the file became longer meanwhile: what came after line {line} was not read\n\
                     hint: `tail -c +{next} {file}` has it; import it as a file of its own"
                ))
            }
            None if refused > 0 => Err(anyhow!("{refused} of {} lines were refused", place.line)),
            None => Ok(()),
        }
    }
}
