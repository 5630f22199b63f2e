//! `tidings import`.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use tidings_sdk::trust::Trust;
use uuid::Uuid;

use super::{
    Api, Faults,
    faults::{Secret, path},
    schema,
};
use crate::{import::journal_of, profile::Schema};

pub(super) const IMPORT_HELP: &str = "\
A line is {\"id\": UUID, \"external_id\": TEXT, \"profile\": {..}}; id and external_id
may be left out.
  with id           the user gets this id, or is replaced under it
  with external_id  the user who has it is replaced; if there is none, one is
                    created; but where nobody has it any more to whom an import
                    gave it, the line is refused (external_id_changed): it needs
                    the external_id of now, or an id
  with neither      a user is created, and once only as long as the journal is
                    there

Examples:
  tidings import --dry-run users.jsonl  # what is wrong with it; sends nothing
  tidings import users.jsonl --report refused.jsonl
  zcat users.jsonl.gz | tidings import -  # no journal: keep its --import-id
  TIDINGS_URL=https://users.example.org TIDINGS_API_KEY_FILE=/run/secrets/key \\
    tidings import users.jsonl";

#[derive(Debug, Args)]
pub struct Import {
    /// The file, or - for standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub api: Api,
    /// Users sent at once, in up to four requests of up to 500.
    #[arg(long, default_value_t = 1000, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=2000))]
    pub concurrency: u16,
    /// Write every refused line into this file, one JSON object a line. Without: the first 20 are shown.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Begin at this line, counted from 1, whatever the journal says.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub from_line: Option<u64>,
    /// Of standard input: what an earlier import of the same lines said. Users of lines that have neither id nor external_id are made from
    /// it and the line's number, so that none is created a second time.
    #[arg(long, value_name = "UUID")]
    pub import_id: Option<String>,
    /// Forget the journal and begin anew. Users of lines that have neither id nor external_id are created a second time.
    #[arg(long, conflicts_with = "from_line")]
    pub restart: bool,
    /// Send nothing; say what is wrong with the lines. With TIDINGS_PROFILE_SCHEMA also what that schema would refuse.
    #[arg(long)]
    pub dry_run: bool,
    /// File that holds a UUID: the ids of users that bring only an external_id are made from it and the external_id. Keep it to
    /// yourself: with it, the external_id can be guessed from the id, which stands in every notice. The UUID itself is given by
    /// TIDINGS_IMPORT_NAMESPACE only. Without either: a random one per journal.
    #[arg(long, env = "TIDINGS_IMPORT_NAMESPACE_FILE", value_name = "FILE", value_parser = path())]
    pub namespace_file: Option<PathBuf>,
    /// JSON Schema file that decides what a profile may hold, for --dry-run.
    #[arg(long, env = "TIDINGS_PROFILE_SCHEMA", value_name = "FILE", value_parser = path())]
    pub profile_schema: Option<PathBuf>,
}

pub(super) const NAMESPACE: &str = "TIDINGS_IMPORT_NAMESPACE";

/// What an import needs to begin.
pub struct ImportSettings {
    pub input: Input,
    /// Of the file; unknown for standard input.
    pub size_bytes: Option<u64>,
    pub url: String,
    pub key: Option<SecretString>,
    pub trust: Trust,
    pub concurrency: usize,
    pub namespace: Option<Uuid>,
    /// For standard input, which has no journal to keep one.
    pub import_id: Option<Uuid>,
    /// For a dry run, if one was named.
    pub schema: Option<Schema>,
}

#[derive(Clone)]
pub enum Input {
    File(PathBuf),
    Stdin,
}

impl Import {
    pub fn parse(&self, faults: &mut Faults) -> Option<ImportSettings> {
        let file = self.file().map_err(|error| format!("cannot read {}: {error}", self.file.display()));
        let file = faults.note("FILE", file);
        let (url, key) = (self.api.address(faults), self.api.key(faults));
        let trust = self.api.trust(faults);
        let namespace = Secret { name: NAMESPACE, file: self.namespace_file.as_ref() };
        let namespace =
            namespace.parse_if_set(faults, |text| Uuid::parse_str(text.expose_secret()).map_err(|_| "expected a UUID"));
        let import_id = self.import_id.as_deref().map(Uuid::parse_str).transpose();
        let import_id = faults.note("--import-id", import_id.map_err(|_| "expected a UUID"));
        let schema = self.profile_schema.as_deref().filter(|_| self.dry_run);
        let schema = schema.and_then(|file| self::schema(Some(file), faults));
        let (input, size_bytes) = file?;
        if self.import_id.is_some() && matches!(input, Input::File(_)) {
            faults.note::<(), _>("--import-id", Err("is for standard input: a file has a journal, which keeps it"));
        }
        if self.report.as_deref().is_some_and(|report| self.reads(report)) {
            faults.note::<(), _>("--report", Err("is a file that is read or the journal; what is there would be lost"));
        }
        let concurrency = self.concurrency.into();
        let (url, trust, namespace, import_id) = (url?, trust?, namespace?, import_id?);
        Some(ImportSettings { input, size_bytes, url, key, trust, concurrency, namespace, import_id, schema })
    }

    fn file(&self) -> std::io::Result<(Input, Option<u64>)> {
        if self.file.as_os_str() == "-" {
            return Ok((Input::Stdin, None));
        }
        let file = fs::File::open(&self.file)?.metadata()?;
        if !file.is_file() {
            return Err(std::io::Error::other("it is no file; give what is piped as -"));
        }
        Ok((Input::File(self.file.clone()), Some(file.len())))
    }

    /// Whether `path` is what it reads from.
    fn reads(&self, path: &Path) -> bool {
        let named = [&self.api.api_key_file, &self.api.ca_file, &self.namespace_file, &self.profile_schema];
        if named.into_iter().flatten().any(|file| is_same(path, file)) {
            return true;
        }
        if self.file.as_os_str() == "-" {
            return is_same(path, Path::new("/dev/stdin"));
        }
        is_same(path, &self.file) || is_same(path, &journal_of(&self.file))
    }
}

/// Whether both lead to one file, or will when it is there.
fn is_same(one: &Path, other: &Path) -> bool {
    let found = |path: &Path| fs::metadata(path).ok().filter(fs::Metadata::is_file);
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some((fs::canonicalize(folder).ok()?, path.file_name()?.to_owned()))
    };
    match (found(one), found(other)) {
        (Some(one), Some(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        (None, None) => place(one).is_some_and(|one| Some(one) == place(other)),
        _ => false,
    }
}
