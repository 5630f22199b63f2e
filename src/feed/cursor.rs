//! Where a reader of the feed stands. Pure.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

/// A history of a database: a restore or a failover begins another, in which the same numbers may stand for other transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch {
    /// Of the cluster, the database and the table in it.
    pub home: i64,
    /// Of the write-ahead log; another one after each promotion and each recovery to a point in time.
    pub timeline: i32,
}

/// A place in the feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    pub xid: i64,
    pub user: Uuid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub epoch: Epoch,
    pub place: Place,
}

/// The first byte: a later form of the cursor has another.
const FORM: u8 = 1;
const LENGTH: usize = 1 + 8 + 4 + 8 + 16;

impl Cursor {
    pub fn to_text(self) -> String {
        let Self { epoch: Epoch { home, timeline }, place: Place { xid, user } } = self;
        let parts: [&[u8]; 5] =
            [&[FORM], &home.to_be_bytes(), &timeline.to_be_bytes(), &xid.to_be_bytes(), user.as_bytes()];
        URL_SAFE_NO_PAD.encode(parts.concat())
    }

    /// `None` when this is no cursor of ours.
    pub fn from_text(text: &str) -> Option<Self> {
        let bytes: [u8; LENGTH] = URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (form, rest) = bytes.split_first_chunk::<1>()?;
        let (home, rest) = rest.split_first_chunk()?;
        let (timeline, rest) = rest.split_first_chunk()?;
        let (xid, user) = rest.split_first_chunk()?;
        let epoch = Epoch { home: i64::from_be_bytes(*home), timeline: i32::from_be_bytes(*timeline) };
        let place = Place { xid: i64::from_be_bytes(*xid), user: Uuid::from_slice(user).ok()? };
        (*form == [FORM] && place.xid >= 0).then_some(Self { epoch, place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_was_and_nothing_else_is_one() {
        let epoch = Epoch { home: -7_000_000_000_000_000_001, timeline: 3 };
        let cursor = Cursor { epoch, place: Place { xid: i64::MAX, user: Uuid::from_u128(5) } };
        let text = cursor.to_text();
        assert_eq!(Cursor::from_text(&text), Some(cursor));
        let of_another_form = format!("Ag{}", &text[2..]);
        for wrong in ["", "!", &text[1..], &format!("{text}AAAA"), &of_another_form] {
            assert_eq!(Cursor::from_text(wrong), None, "{wrong}");
        }
        let negative = Cursor { place: Place { xid: -1, ..cursor.place }, ..cursor };
        assert_eq!(Cursor::from_text(&negative.to_text()), None);
    }
}
