//! Journal: how far a file is settled and what was refused on the way, in a file beside it.
//!
//! Promise: what it says is settled is settled, whatever was killed; it belongs to one file and one service, and is never taken for
//! another's.
//! Not here, on purpose: values. It holds numbers, codes and places.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{line::Refused, lines::Place};

/// Of the beginning and of the ending of the file, to know it again by. A change between them that moves neither goes unnoticed.
const MARK_BYTES: u64 = 1024 * 1024;
/// Between two writes that reach the disk. What is lost in between is sent again.
const SYNC_EVERY: Duration = Duration::from_secs(2);
/// A journal's lines are short: what is kept of a refusal is bounded. A longer one counts as torn.
const LINE_LIMIT_BYTES: u64 = 1024 * 1024;

/// What became of the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Users that were not there before.
    pub created: u64,
    /// Users that were there, and now are as the line has them.
    pub replaced: u64,
    pub refused: u64,
    pub blank: u64,
}

/// A line that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedLine {
    pub line: u64,
    #[serde(flatten)]
    pub refused: Refused,
}

/// The first line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// The version of this form.
    tidings_import: u32,
    /// Random; the ids of users that bring none are made from it. Whoever knows it can tell which line an id came from.
    import_id: Uuid,
    target: String,
    /// Of the file when it was begun: these bytes are imported, and none that were appended since.
    size_bytes: u64,
    /// A digest of their first mebibyte.
    beginning: Uuid,
    /// A digest of their last mebibyte, by which a file that became longer is known again. Earlier versions kept none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ending: Option<Uuid>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Refused(RefusedLine),
    /// Everything before `place`, the refusals above included.
    Settled {
        line: u64,
        offset: u64,
        tally: Tally,
    },
}

pub struct Journal {
    path: PathBuf,
    file: File,
    head: Head,
    /// The length of the first line, with its end.
    head_bytes: u64,
    pub place: Place,
    pub tally: Tally,
    /// Refusals since the last time that it was written.
    unwritten: Vec<RefusedLine>,
    synced: Instant,
}

/// Where the journal of a file lies: beside it.
pub fn path_of(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".import");
    path.into()
}

impl Journal {
    /// The journal of `file` and `target`; a new one when there is none, or when `restart`.
    ///
    /// # Errors
    /// When it belongs to another file or service, when another import holds it, or when it cannot be written.
    pub fn open(file: &Path, target: &str, restart: bool) -> anyhow::Result<Self> {
        let path = path_of(file);
        let shown = path.display();
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let journal = opened.with_context(|| format!("the journal {shown} cannot be opened"))?;
        journal.try_lock().map_err(|_| anyhow!("another import of this file is under way: it holds {shown}"))?;
        let kept =
            Kept::read(&journal).with_context(|| format!("{shown} cannot be read as the journal of an import"))?;
        // Of an empty file nothing was sent: with what it holds by now an import begins.
        match kept.filter(|kept| !restart && kept.head.size_bytes > 0) {
            Some(kept) => {
                kept.head.check(file, target).with_context(|| format!("the journal {shown}"))?;
                journal.set_len(kept.bytes)?;
                Ok(Self::new(journal, path, kept))
            }
            None => Self::begin(journal, path, Head::of(file, target)?),
        }
    }

    fn new(file: File, path: PathBuf, Kept { head, head_bytes, place, tally, .. }: Kept) -> Self {
        Self { path, file, head, head_bytes, place, tally, unwritten: vec![], synced: Instant::now() }
    }

    /// On the disk before anything is sent: ids are made from what it holds.
    fn begin(mut file: File, path: PathBuf, head: Head) -> anyhow::Result<Self> {
        let line = lines(&[&head])?;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&line)?;
        file.sync_all()?;
        Ok(Self::new(file, path, Kept::new(head, line.len() as u64)))
    }

    /// Forgets what was, and says that everything before `place` is settled.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin_at(&mut self, place: Place) -> anyhow::Result<()> {
        self.forget()?;
        self.place = place;
        self.write()?;
        Ok(self.file.sync_all()?)
    }

    /// All but the first line, which stays where it is: a crash that took it would take with it what ids were made from.
    fn forget(&mut self) -> anyhow::Result<()> {
        (self.place, self.tally) = (Place::default(), Tally::default());
        Ok(self.file.set_len(self.head_bytes)?)
    }

    pub fn import_id(&self) -> Uuid {
        self.head.import_id
    }

    /// Of the file when it was begun.
    pub fn size_bytes(&self) -> u64 {
        self.head.size_bytes
    }

    /// Nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.place.offset >= self.head.size_bytes
    }

    /// Everything before `place` is settled. Written with the next [`Self::write`].
    pub fn settle(&mut self, place: Place, tally: Tally, refused: Option<RefusedLine>) {
        (self.place, self.tally) = (place, tally);
        self.unwritten.extend(refused);
    }

    /// Writes what was settled: the refusals first, so that a line torn by a crash leaves out both or neither.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self) -> anyhow::Result<()> {
        let Place { line, offset } = self.place;
        let mut entries: Vec<Entry> = self.unwritten.drain(..).map(Entry::Refused).collect();
        entries.push(Entry::Settled { line, offset, tally: self.tally });
        self.file.seek(SeekFrom::End(0))?;
        let written = self.file.write_all(&lines(&entries)?);
        written.with_context(|| format!("the journal {} cannot be written", self.path.display()))?;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// # Errors
    /// When it does not reach the disk.
    pub fn sync(&mut self) -> anyhow::Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().with_context(|| format!("the journal {} cannot be written", self.path.display()))
    }

    /// Every refusal that was written, in order of line.
    ///
    /// # Errors
    /// When it cannot be read, or `tell` cannot tell it.
    pub fn refusals(&self, mut tell: impl FnMut(RefusedLine) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut reader = entries(File::open(&self.path)?);
        while let Some((line, _)) = next(&mut reader)? {
            if let Ok(Entry::Refused(refused)) = serde_json::from_slice(&line) {
                tell(refused)?;
            }
        }
        Ok(())
    }
}

impl Head {
    fn of(file: &Path, target: &str) -> anyhow::Result<Self> {
        let input = File::open(file)?;
        let size_bytes = input.metadata()?.len();
        let (beginning, ending) = marks(&input, size_bytes)?;
        let (import_id, target) = (Uuid::new_v4(), target.to_owned());
        Ok(Self { tidings_import: FORM, import_id, target, size_bytes, beginning, ending: Some(ending) })
    }

    /// Whether this journal is the one of what is to be imported now.
    fn check(&self, file: &Path, target: &str) -> anyhow::Result<()> {
        const HINT: &str = "if that is as it should be, --restart begins anew, from the first line";
        let is_known = self.is_of(&File::open(file)?)?;
        ensure!(is_known, "is of another file, or the file was changed since; {HINT}");
        ensure!(self.target == target, "is of an import into {}; {HINT}", self.target);
        Ok(())
    }

    /// Whether the file still is the one that was begun with, whatever was appended to it since.
    fn is_of(&self, file: &File) -> io::Result<bool> {
        let (beginning, ending) = marks(file, self.size_bytes)?;
        let ends_alike = match self.ending {
            Some(kept) => kept == ending,
            None => file.metadata()?.len() == self.size_bytes,
        };
        Ok(self.beginning == beginning && ends_alike)
    }
}

/// What a file is known again by: of its first `size_bytes` the beginning and the ending. One that has less has another ending.
fn marks(file: &File, size_bytes: u64) -> io::Result<(Uuid, Uuid)> {
    let bytes = size_bytes.min(MARK_BYTES);
    Ok((digest(file, 0, bytes)?, digest(file, size_bytes - bytes, bytes)?))
}

fn digest(mut file: &File, from: u64, bytes: u64) -> io::Result<Uuid> {
    let mut found = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.take(bytes).read_to_end(&mut found)?;
    Ok(Uuid::new_v5(&Uuid::NAMESPACE_OID, &found))
}

/// The form of the journal that this version writes and reads.
const FORM: u32 = 1;

/// What a journal held.
struct Kept {
    head: Head,
    head_bytes: u64,
    place: Place,
    tally: Tally,
    /// To the end of what counts. A crash may have left half a line behind it.
    bytes: u64,
}

impl Kept {
    fn new(head: Head, head_bytes: u64) -> Self {
        Self { head, head_bytes, place: Place::default(), tally: Tally::default(), bytes: head_bytes }
    }

    /// `None` when the journal is empty, or has half a first line.
    fn read(journal: &File) -> anyhow::Result<Option<Self>> {
        let mut reader = entries(journal.try_clone()?);
        let Some((line, mut bytes)) = next(&mut reader)? else {
            ensure!(is_torn_head(journal)?, "it has no first line, and does not begin like one");
            return Ok(None);
        };
        let head: Head = serde_json::from_slice(&line)?;
        ensure!(head.tidings_import == FORM, "it was written by another version");
        let mut kept = Self::new(head, bytes);
        while let Some((line, length)) = next(&mut reader)? {
            bytes += length;
            match serde_json::from_slice(&line) {
                Ok(Entry::Refused(_)) => {}
                Ok(Entry::Settled { line, offset, tally }) => {
                    kept = Self { place: Place { line, offset }, tally, bytes, ..kept };
                }
                // A crash of the machine may leave anything at the end. What it stood for is sent again.
                Err(_) => break,
            }
        }
        Ok(Some(kept))
    }
}

/// How every first line begins.
const HEAD: &[u8] = br#"{"tidings_import":"#;

/// Whether this is what a crash leaves of a first line: its beginning, or a file that was made longer and not filled.
fn is_torn_head(mut journal: &File) -> anyhow::Result<bool> {
    let mut kept = Vec::new();
    journal.rewind()?;
    journal.take(LINE_LIMIT_BYTES).read_to_end(&mut kept)?;
    let begins = kept.iter().zip(HEAD).all(|(kept, head)| kept == head);
    Ok((kept.len() as u64) < LINE_LIMIT_BYTES && (begins || kept.iter().all(|byte| *byte == 0)))
}

fn entries(journal: File) -> BufReader<File> {
    BufReader::new(journal)
}

/// The next whole line and its length; `None` at the end, or before a line without one in bounds.
fn next(reader: &mut BufReader<File>) -> anyhow::Result<Option<(Vec<u8>, u64)>> {
    let mut line = Vec::new();
    let length = reader.take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line)? as u64;
    Ok(line.ends_with(b"\n").then_some((line, length)))
}

fn lines(entries: &[impl Serialize]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: &str = "http://127.0.0.1:8080";

    fn input(text: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tidings-import-{}.jsonl", Uuid::new_v4()));
        std::fs::write(&path, text).unwrap();
        path
    }

    fn refused(line: u64) -> RefusedLine {
        RefusedLine { line, refused: Refused::here("body_invalid", "no", vec![]) }
    }

    fn open(input: &Path) -> anyhow::Result<Journal> {
        Journal::open(input, TARGET, false)
    }

    fn told(journal: &Journal) -> Vec<u64> {
        let mut lines = vec![];
        let mut tell = |refused: RefusedLine| {
            lines.push(refused.line);
            Ok(())
        };
        journal.refusals(&mut tell).unwrap();
        lines
    }

    #[test]
    fn it_goes_on_where_it_was_and_half_a_line_does_not_count() {
        let input = input("1\n2\n3\n");
        let mut journal = open(&input).unwrap();
        let (id, place) = (journal.import_id(), Place { line: 2, offset: 4 });
        let tally = Tally { created: 1, refused: 1, ..Tally::default() };
        journal.settle(place, tally, Some(refused(2)));
        journal.write().unwrap();
        // As a crash leaves it: a refusal whose settling was not written, and half a line.
        journal.file.write_all(&lines(&[Entry::Refused(refused(3))]).unwrap()).unwrap();
        journal.file.write_all(b"{\"settled\":{\"li").unwrap();
        drop(journal);
        for _ in 0..2 {
            let journal = open(&input).unwrap();
            assert_eq!((journal.import_id(), journal.place, journal.tally), (id, place, tally));
            assert_eq!(told(&journal), [2]);
            assert!(!journal.is_done());
        }
        let mut journal = open(&input).unwrap();
        journal.begin_at(Place { line: 1, offset: 2 }).unwrap();
        drop(journal);
        let journal = open(&input).unwrap();
        assert_eq!((journal.import_id(), journal.place.line, journal.tally), (id, 1, Tally::default()));
        assert_eq!(told(&journal), [0; 0]);
    }

    /// Whenever a crash comes: behind the first line there may be nothing, or any part of what is written.
    #[test]
    fn beginning_elsewhere_keeps_the_first_line_at_each_step() {
        let input = input("1\n2\n3\n");
        let mut journal = open(&input).unwrap();
        let (id, path) = (journal.import_id(), path_of(&input));
        let head = std::fs::read(&path).unwrap();
        journal.settle(Place { line: 2, offset: 4 }, Tally { refused: 1, ..Tally::default() }, Some(refused(2)));
        journal.write().unwrap();
        drop(journal);
        let mut journal = open(&input).unwrap();
        journal.forget().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), head);
        let place = Place { line: 1, offset: 2 };
        journal.begin_at(place).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for length in head.len()..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let journal = open(&input).unwrap();
            let expected = if length == whole.len() { place } else { Place::default() };
            assert_eq!((journal.import_id(), journal.place), (id, expected), "{length}");
            assert_eq!((journal.tally, told(&journal)), (Tally::default(), vec![]), "{length}");
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_is_the_end_and_another_s_file_is_left_alone() {
        let input = input("1\n2\n");
        let mut journal = open(&input).unwrap();
        let place = Place { line: 1, offset: 2 };
        journal.settle(place, Tally::default(), None);
        journal.write().unwrap();
        let endless = "x".repeat(2 * LINE_LIMIT_BYTES as usize) + "\n";
        journal.file.write_all(endless.as_bytes()).unwrap();
        journal.settle(Place { line: 2, offset: 4 }, Tally::default(), None);
        journal.write().unwrap();
        drop(journal);
        assert_eq!(open(&input).unwrap().place, place);
        std::fs::write(path_of(&input), &endless).unwrap();
        assert!(Journal::open(&input, TARGET, true).is_err());
        assert_eq!(std::fs::read_to_string(path_of(&input)).unwrap(), endless);
    }

    #[test]
    fn it_is_not_taken_for_that_of_another_file_service_or_import() {
        let input = input("1\n2\n");
        let journal = open(&input).unwrap();
        assert!(open(&input).err().unwrap().to_string().contains("under way"));
        let id = journal.import_id();
        drop(journal);
        assert!(Journal::open(&input, "http://elsewhere", false).is_err());
        std::fs::write(&input, "1\n3\n").unwrap();
        assert!(open(&input).is_err());
        assert_ne!(Journal::open(&input, TARGET, true).unwrap().import_id(), id);
        for text in ["somebody's own text\n", "somebody's own text without a line end", "{\"tidings\":1}"] {
            std::fs::write(path_of(&input), text).unwrap();
            assert!(Journal::open(&input, TARGET, true).is_err(), "{text}");
            assert_eq!(std::fs::read_to_string(path_of(&input)).unwrap(), text);
        }
    }

    /// Of a file that is larger than what is kept of its beginning and its ending.
    #[test]
    fn what_was_appended_makes_no_other_file_of_it_and_what_was_changed_does() {
        let text = "123\n".repeat(MARK_BYTES as usize);
        let middle = text.len() / 2;
        let input = input(&text);
        let id = open(&input).unwrap().import_id();
        let head = std::fs::read_to_string(path_of(&input)).unwrap();
        let goes_on = |found: &str| {
            std::fs::write(&input, found).unwrap();
            open(&input).is_ok_and(|journal| journal.import_id() == id && journal.size_bytes() == text.len() as u64)
        };
        // One more line in the middle, as in an export of another day.
        let other = format!("{}1\n{}", &text[..middle], &text[middle..]);
        for (found, is_known) in [
            (&*text, true),
            (&*format!("{text}4\n"), true),
            (&*format!("{text}half a line"), true),
            (&*other, false),
            (&text[..text.len() - 4], false),
            (&*format!("4{}", &text[1..]), false),
        ] {
            assert_eq!(goes_on(found), is_known, "{} bytes", found.len());
        }
        // An earlier version kept no ending: of such a journal only the whole file is known.
        let earlier = head.split_once(",\"ending\":").unwrap().0.to_owned() + "}\n";
        std::fs::write(path_of(&input), earlier).unwrap();
        assert!(goes_on(&text) && !goes_on(&format!("{text}4\n")));
    }

    #[test]
    fn a_file_that_was_empty_is_begun_when_it_has_lines() {
        let input = input("");
        assert!(open(&input).unwrap().is_done());
        std::fs::write(&input, "1\n").unwrap();
        let journal = open(&input).unwrap();
        assert_eq!((journal.place, journal.size_bytes(), journal.is_done()), (Place::default(), 2, false));
    }

    #[test]
    fn a_journal_that_a_crash_left_without_a_whole_first_line_begins_anew() {
        let input = input("1\n2\n");
        drop(open(&input).unwrap());
        let whole = std::fs::read(path_of(&input)).unwrap();
        for torn in [&whole[..0], &whole[..5], &whole[..whole.len() - 1], &[0; 100]] {
            std::fs::write(path_of(&input), torn).unwrap();
            assert_eq!(open(&input).unwrap().place, Place::default());
            assert_eq!(std::fs::read(path_of(&input)).unwrap().len(), whole.len());
        }
    }
}
