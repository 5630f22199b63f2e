//! Publishers: what can be sent to the broker when there is no outbox to take it from. The limits of whatever tells.
//!
//! Promise: every message is persistent, mandatory and confirmed, as the service sends it; one that is not, is an error.

mod alone;
mod raw;

pub use alone::Lapin;
pub use raw::{Frames, Raw};

use lapin::BasicProperties;
use tidings_sdk::envelope::{Event, Notice};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::scratch::user;

/// Messages without a confirm at once, as many as the relay has.
pub const WINDOW: usize = 2_000;
/// As it goes out.
pub type Message = (BasicProperties, Vec<u8>);

pub const KEY: &str = "profile.updated";
/// CloudEvents source of every message; as long as that of a usual exchange.
pub const SOURCE: &str = "urn:tidings:masterdata";
pub const FIELD: &str = "job_title";
pub const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// That the n-th user changed.
pub fn change(n: u64) -> Message {
    notice(n, 2, Event::Updated { changed_fields: FIELD.parse().into_iter().collect() }).to_message(SOURCE)
}

/// That the n-th user was created.
pub fn creation(n: u64) -> Message {
    notice(n, 1, Event::Created).to_message(SOURCE)
}

fn notice(n: u64, version: i64, event: Event) -> Notice {
    Notice {
        message_id: Uuid::new_v4(),
        user_id: user(n),
        version,
        event,
        occurred_at: OffsetDateTime::now_utc(),
        traceparent: TRACE.parse().ok(),
    }
}

/// [`change`] of users 0 to `count` - 1 as rows of the outbox, as the service writes them.
pub fn fill_outbox(count: u64) -> String {
    format!(
        "insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
         select gen_random_uuid(), 'profile.updated', {}, 2, '[\"{FIELD}\"]', '{TRACE}'
           from generate_series(0, {count} - 1) as n
          order by n",
        crate::scratch::user_in_sql("n::bigint")
    )
}
