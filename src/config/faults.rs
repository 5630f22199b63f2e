//! What is wrong with settings, and what would be right.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::builder::{OsStringValueParser, TypedValueParser};
use secrecy::SecretString;

/// Gathers what is wrong, so that the operator hears of everything at once.
#[derive(Debug, Default)]
pub struct Faults(Vec<String>);

/// All settings that are wrong, each with what would be right.
#[derive(Debug)]
pub struct WrongSettings(Vec<String>);

impl fmt::Display for WrongSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} setting{} wrong", if count == 1 { " is" } else { "s are" })?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for WrongSettings {}

impl Faults {
    /// `outcome`, or a fault of `setting` noted.
    pub fn note<T, E: fmt::Display>(&mut self, setting: &str, outcome: Result<T, E>) -> Option<T> {
        outcome.map_err(|error| self.0.push(format!("{setting}: {error:#}"))).ok()
    }

    /// Ends the gathering.
    ///
    /// # Errors
    /// When anything was noted.
    pub fn none(self) -> Result<(), WrongSettings> {
        if self.0.is_empty() { Ok(()) } else { Err(WrongSettings(self.0)) }
    }
}

/// A hundred years: so long that nobody means it, and short enough to be added to a date, here and in the database.
const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 60 * 60);

/// A time such as `90s`, `10m`, `12h` or `7d`.
///
/// # Errors
/// When it is none, nothing, or more than a hundred years.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    const WRONG: &str = "expected a number and a unit, such as 30s, 10m, 12h or 7d, and 36500d at most";
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or(WRONG)?;
    let unit_s = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err(WRONG),
    };
    let number: u32 = number.parse().map_err(|_| WRONG)?;
    let duration = Duration::from_secs(u64::from(number) * unit_s);
    if (1..=LONGEST.as_secs()).contains(&duration.as_secs()) { Ok(duration) } else { Err(WRONG) }
}

/// So many that nobody means it, and few enough for a semaphore.
const LARGEST_NUMBER: usize = 1_000_000;

pub(super) fn number(text: &str) -> Result<usize, &'static str> {
    let number = text.parse().ok().filter(|number| (1..=LARGEST_NUMBER).contains(number));
    number.ok_or("expected a number from 1 to 1000000")
}

/// A flag's value, which is a text when it comes from the environment.
pub(super) fn switch(text: &str) -> Result<bool, &'static str> {
    text.parse().map_err(|_| "expected true or false")
}

/// Takes any path, also an empty one: clap's own parser would refuse that before any other fault is found.
pub(super) fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// A file's path that was given.
pub(super) fn named(file: &Path) -> Result<&Path, &'static str> {
    if file.as_os_str().is_empty() { Err("is empty; name a file, or leave the setting away") } else { Ok(file) }
}

/// A secret, in a file or in the environment. Where both are set, the file counts.
pub(super) struct Secret<'a> {
    pub name: &'static str,
    pub file: Option<&'a PathBuf>,
}

impl Secret<'_> {
    /// The setting that it comes from, which is to blame for what is wrong with it.
    pub fn setting(&self) -> String {
        format!("{}{}", self.name, if self.file.is_some() { "_FILE" } else { "" })
    }

    /// What it says, once it is parsed.
    pub fn parse<T, E: fmt::Display>(
        &self,
        faults: &mut Faults,
        parse: impl FnOnce(&SecretString) -> Result<T, E>,
    ) -> Option<T> {
        let text = faults.note(&self.setting(), self.read())?;
        faults.note(&self.setting(), parse(&text))
    }

    /// The same for one that need not be there: then it says nothing.
    pub fn parse_if_set<T, E: fmt::Display>(
        &self,
        faults: &mut Faults,
        parse: impl FnOnce(&SecretString) -> Result<T, E>,
    ) -> Option<Option<T>> {
        if self.is_set() { self.parse(faults, parse).map(Some) } else { Some(None) }
    }

    pub fn is_set(&self) -> bool {
        self.file.is_some() || std::env::var_os(self.name).is_some()
    }

    fn read(&self) -> Result<SecretString, String> {
        let name = self.name;
        let text = match self.file {
            Some(file) => {
                fs::read_to_string(named(file)?).map_err(|error| format!("cannot read {}: {error}", file.display()))?
            }
            None => std::env::var(name)
                .map_err(|_| format!("is not set; set it, or {name}_FILE to a file that holds it"))?,
        };
        let text = text.trim();
        if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_has_a_unit_and_an_end() {
        let seconds = |text| duration(text).map(|duration| duration.as_secs()).ok();
        assert_eq!(["90s", "10m", "12h", "7d"].map(seconds), [90, 600, 43_200, 604_800].map(Some));
        assert_eq!(seconds("36500d"), Some(3_153_600_000));
        for wrong in ["", "s", "7", "-1s", "1w", "0s", "ä", "36501d", "876001h", "9999999d", "5000000000s"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }
}
