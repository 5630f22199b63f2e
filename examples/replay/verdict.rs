//! The verdict: whether the mirror holds what the log says.
//!
//! Promise: a difference is told by the person's key and the names of fields, never by a value.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use uuid::Uuid;

use crate::{
    changelog::{Changelog, Fields, Life},
    driver::Answers,
    mirror::Held,
};

pub struct Difference {
    key: String,
    what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.what)
    }
}

/// Every life of every person that is not as it should be, in the order of the log.
pub fn differences(log: &Changelog, answers: &Answers, mut held: HashMap<Uuid, Held>) -> Vec<Difference> {
    let mut found = vec![];
    for (life, answer) in log.lives.iter().zip(answers) {
        let what = match answer {
            Err(refused) => Some(refused.to_string()),
            Ok(version) if *version != life.version => {
                Some(format!("the service answered version {version}, the log comes to {}", life.version))
            }
            Ok(_) => difference(life, held.get(&life.user)),
        };
        held.remove(&life.user);
        found.extend(what.map(|what| Difference { key: life.key.clone(), what }));
    }
    found.extend(
        held.into_keys()
            .map(|user| Difference { key: user.to_string(), what: "in the mirror, and nobody of this log".to_owned() }),
    );
    found
}

fn difference(life: &Life, held: Option<&Held>) -> Option<String> {
    let Some(Held { version, profile }) = held else { return Some("not in the mirror".to_owned()) };
    match (&life.profile, profile) {
        _ if *version != life.version => {
            Some(format!("the mirror is at version {version}, the service answered {}", life.version))
        }
        (Some(_), None) => Some("deleted in the mirror, and should live".to_owned()),
        (None, Some(_)) => Some("alive in the mirror, and was deleted".to_owned()),
        (None, None) => None,
        (Some(expected), Some(found)) => {
            let names = differing(expected, found);
            (!names.is_empty()).then(|| format!("differs in {}", names.join(", ")))
        }
    }
}

fn differing<'a>(expected: &'a Fields, found: &'a Fields) -> Vec<&'a str> {
    let names: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    names.into_iter().filter(|name| expected.get(*name) != found.get(*name)).map(String::as_str).collect()
}
