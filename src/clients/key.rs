//! Keys: `tdg_<id>_<secret>`. The id is for everybody's eyes, the secret for its client's alone.
//!
//! Promise: a secret has 256 random bits, is shown once, and prints nothing of itself.

use std::{fmt, str::FromStr};

use secrecy::SecretString;
use sha2::{Digest, Sha256};

const MARK: &str = "tdg_";
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;

/// The part of a key that names it: 16 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(String);

impl KeyId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// An id as it was kept.
    pub(super) fn from_kept(id: String) -> Self {
        Self(id)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key as its client sends it, with the secret already hashed.
pub struct Key {
    pub id: KeyId,
    pub sha256: [u8; 32],
}

/// Shows which key, never what opens.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

/// Not a key. Says nothing of what it was instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key is tdg_, 16 hex digits, _ and 64 hex digits")]
pub struct InvalidKey;

impl Key {
    /// Whether `text` means to be a key of ours.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(MARK)
    }

    /// A new key, and its text: the only time that it can be had.
    ///
    /// # Errors
    /// When the operating system has no random bits.
    pub fn generate() -> Result<(Self, SecretString), getrandom::Error> {
        let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut secret)?;
        let text = format!("{MARK}{}_{}", hex(&id), hex(&secret));
        let key = text.parse().expect("a key that was just made is one");
        Ok((key, text.into()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let (id, secret) = text.strip_prefix(MARK).and_then(|rest| rest.split_once('_')).ok_or(InvalidKey)?;
        let is_hex = |part: &str, bytes: usize| {
            part.len() == 2 * bytes && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if is_hex(id, ID_BYTES) && is_hex(secret, SECRET_BYTES) {
            Ok(Self { id: KeyId(id.to_owned()), sha256: Sha256::digest(secret).into() })
        } else {
            Err(InvalidKey)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn a_key_is_read_as_it_was_made_and_shows_nothing() {
        let (key, text) = Key::generate().unwrap();
        let text = text.expose_secret();
        let read: Key = text.parse().unwrap();
        assert_eq!((&read.id, read.sha256), (&key.id, key.sha256));
        assert_eq!(text.len(), "tdg_".len() + 16 + 1 + 64);
        let secret = text.rsplit('_').next().unwrap();
        assert!(!format!("{key:?}").contains(&secret[..8]) && format!("{key:?}").contains(key.id.as_str()));
        assert_ne!(Key::generate().unwrap().0.id, key.id);
    }

    #[test]
    fn nothing_else_is_a_key() {
        let good = format!("tdg_{}_{}", "0a".repeat(8), "1b".repeat(32));
        assert!(good.parse::<Key>().is_ok());
        for wrong in [
            String::new(),
            "tdg_".to_owned(),
            good.to_uppercase(),
            good.replace("tdg_", ""),
            format!("{good}0"),
            good[..good.len() - 1].to_owned(),
            good.replace('_', "-"),
            good.replacen("0a", "_a", 1),
            format!(" {good}"),
        ] {
            assert!(wrong.parse::<Key>().is_err(), "{wrong}");
        }
    }
}
