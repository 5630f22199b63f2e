//! The change log: what happened to whom, and what must be there once all of it has happened.
//!
//! Promise: a log that is read is one that can be replayed; what is wrong with another is told with its line, and no value of it.
//! Not here, on purpose: the service's own code for merge patches. What is expected must not come from what is checked.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};
use uuid::Uuid;

pub type Fields = Map<String, Value>;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// What a log says.
#[derive(Default)]
pub struct Changelog {
    pub changes: Vec<Change>,
    /// A person who left and came back has lived twice: deletion is final, so each life is a user with an id of its own.
    pub lives: Vec<Life>,
    pub persons: usize,
    pub tally: Tally,
}

pub struct Change {
    pub line: usize,
    pub person: usize,
    /// Which of [`Changelog::lives`].
    pub life: usize,
    pub op: Op,
}

pub enum Op {
    Create(Fields),
    Update(Fields),
    Delete,
}

pub struct Life {
    pub key: String,
    pub user: Uuid,
    /// How this life ends: the profile, or nothing once it was deleted.
    pub profile: Option<Fields>,
    /// 1, and 1 more with every change that changes something.
    pub version: i64,
}

#[derive(Default)]
pub struct Tally {
    pub creates: usize,
    pub updates: usize,
    pub deletes: usize,
    /// Updates that leave the person as it was.
    pub without_effect: usize,
}

/// Why a log cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("it cannot be opened: {0}")]
    Missing(#[source] io::Error),
    #[error("line {line}: {reason}")]
    Line { line: usize, reason: String },
    #[error("it holds no change")]
    Empty,
}

/// Reads the log in `file`, plain or gzip; `-` is standard input.
pub fn read(file: &Path) -> Result<Changelog, Unreadable> {
    let source: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(File::open(file).map_err(Unreadable::Missing)?),
    };
    let mut source = BufReader::new(source);
    let is_gzip = source.fill_buf().map_err(Unreadable::Missing)?.starts_with(&GZIP_MAGIC);
    let text: Box<dyn Read> = if is_gzip { Box::new(MultiGzDecoder::new(source)) } else { Box::new(source) };
    Reading::default().all(BufReader::new(text))
}

#[derive(Default)]
struct Reading {
    log: Changelog,
    persons: HashMap<String, Person>,
}

struct Person {
    number: usize,
    /// The life that goes on.
    life: Option<usize>,
}

impl Reading {
    fn all(mut self, mut text: impl BufRead) -> Result<Changelog, Unreadable> {
        let mut bytes = vec![];
        for line in 1.. {
            bytes.clear();
            let fault = |reason: String| Unreadable::Line { line, reason };
            let length = text.read_until(b'\n', &mut bytes).map_err(|error| fault(cannot_read(&error)))?;
            if length == 0 {
                break;
            }
            let text = bytes.trim_ascii_end();
            if !text.is_empty() {
                self.line(line, text).map_err(fault)?;
            }
        }
        self.log.persons = self.persons.len();
        if self.log.changes.is_empty() { Err(Unreadable::Empty) } else { Ok(self.log) }
    }

    fn line(&mut self, line: usize, text: &[u8]) -> Result<(), String> {
        // The library's words may quote a value; the place is enough.
        let parsed = serde_json::from_slice(text).map_err(|error| format!("no JSON, see column {}", error.column()))?;
        let Value::Object(mut members) = parsed else { return Err("a change is a JSON object".to_owned()) };
        let key = match members.remove("key") {
            Some(Value::String(key)) if !key.is_empty() => key,
            _ => return Err("\"key\" is missing or no string".to_owned()),
        };
        let op = match members.get("op").and_then(Value::as_str) {
            Some("create") => Op::Create(object(&mut members, "profile")?),
            Some("update") => Op::Update(object(&mut members, "patch")?),
            Some("delete") => Op::Delete,
            _ => return Err("\"op\" is one of create, update and delete".to_owned()),
        };
        self.change(line, key, op)
    }

    fn change(&mut self, line: usize, key: String, op: Op) -> Result<(), String> {
        let (number, lives) = (self.persons.len(), self.log.lives.len());
        let person = self.persons.entry(key.clone()).or_insert(Person { number, life: None });
        let life = match (&op, person.life) {
            (Op::Create(profile), None) => {
                let user = Uuid::new_v4();
                self.log.lives.push(Life { key, user, profile: Some(profile.clone()), version: 1 });
                self.log.tally.creates += 1;
                lives
            }
            (Op::Create(_), Some(_)) => return Err(format!("{key} is created, and is there already")),
            (Op::Update(_) | Op::Delete, None) => return Err(format!("{key} is changed, and is not there")),
            (Op::Update(patch), Some(life)) => {
                self.log.tally.updates += 1;
                self.log.tally.without_effect += usize::from(!self.log.lives[life].amend(patch));
                life
            }
            (Op::Delete, Some(life)) => {
                self.log.tally.deletes += 1;
                self.log.lives[life].end();
                life
            }
        };
        person.life = if matches!(op, Op::Delete) { None } else { Some(life) };
        self.log.changes.push(Change { line, person: person.number, life, op });
        Ok(())
    }
}

impl Life {
    /// False when nothing changes.
    fn amend(&mut self, patch: &Fields) -> bool {
        let profile = self.profile.get_or_insert_default();
        let before = profile.clone();
        merge(profile, patch);
        let changes = *profile != before;
        self.version += i64::from(changes);
        changes
    }

    fn end(&mut self) {
        self.profile = None;
        self.version += 1;
    }
}

/// RFC 7396: an object is merged member by member, null takes a member away, anything else takes the place of what was there.
fn merge(target: &mut Fields, patch: &Fields) {
    for (name, change) in patch {
        match change {
            Value::Null => {
                target.remove(name);
            }
            Value::Object(inner) => {
                let place = target.entry(name).or_insert(Value::Null);
                if !place.is_object() {
                    *place = Value::Object(Fields::new());
                }
                if let Value::Object(place) = place {
                    merge(place, inner);
                }
            }
            value => {
                target.insert(name.clone(), value.clone());
            }
        }
    }
}

fn object(members: &mut Fields, name: &str) -> Result<Fields, String> {
    match members.remove(name) {
        Some(Value::Object(fields)) => Ok(fields),
        _ => Err(format!("{name:?} is missing or no object")),
    }
}

fn cannot_read(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the gzip data ends before its end; is the file whole?".to_owned(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => "the gzip data is damaged".to_owned(),
        _ => format!("it cannot be read on: {error}"),
    }
}
