//! Outbox: where keeping and telling meet. Events that are committed and not yet confirmed by the broker.
//!
//! Promise: a row leaves this table only when its message was confirmed.
//! Not here, on purpose: adding a row. The one statement that does so also writes the user (`users::store`).

mod bell;
mod lag;

pub use bell::{AT_HAND, Bell, Heard};
pub use lag::{Floor, LAG, Lag, Place, lag};

use sqlx::{PgConnection, types::Json};
use tidings_sdk::envelope::{Event, FieldName, Notice};
use time::OffsetDateTime;
use uuid::Uuid;

/// Place of an event in the outbox: the order of leaving, not of commit.
pub type OutboxId = i64;

/// An event at rest.
#[derive(Debug, Clone)]
pub struct Entry {
    pub id: OutboxId,
    pub notice: Notice,
}

/// An event that the broker has confirmed. Its place alone does not tell which one it was.
#[derive(Debug, Clone, Copy)]
pub struct Confirmed {
    pub id: OutboxId,
    pub message_id: Uuid,
}

/// The events past a place, in order, and those at places that were empty (or came back) when they were passed. The places that
/// are asked for again are few, and a place whose transaction rolled back stays empty.
pub const CLAIM: &str = "
(
  select id, message_id, event, user_id, version, changed_fields, occurred_at, traceparent
    from outbox
   where id > $1
   order by id
   limit $2
)
union all
(
  select id, message_id, event, user_id, version, changed_fields, occurred_at, traceparent
    from outbox
   where id = any($3)
)
order by id
";

/// The oldest events whatever their place, except those under way: finds what a transaction committed long after it took its id.
pub const SWEEP: &str = "
select id, message_id, event, user_id, version, changed_fields, occurred_at, traceparent
  from outbox
 where id <= $1
   and id <> all($3)
 order by id
 limit $2
";

/// Forgets what the broker has confirmed, and nothing that has taken its place: a standby that took over may give out ids anew.
pub const SETTLE: &str = "
delete from outbox
 where id = any($1)
   -- Hashed, as it is no join: comparing each of two thousand with each takes long.
   and ((id, message_id) in (select * from unnest($1::bigint[], $2::uuid[]))) is true
";

/// The session settings that suit [`CLAIM`], [`SWEEP`] and [`SETTLE`]: each goes by id, whatever the statistics say. They are of an empty
/// table until the first vacuum, and a deletion of two thousand out of fifty thousand that reads the whole table takes seconds.
pub const BY_PLACE: [(&str, &str); 2] = [("enable_seqscan", "off"), ("enable_bitmapscan", "off")];

/// The last id given out so far; 0 before the first.
pub const LAST_ID: &str = "
select coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass), 0)
";

pub async fn claim(
    connection: &mut PgConnection,
    past: OutboxId,
    limit: usize,
    again: &[OutboxId],
) -> sqlx::Result<Vec<Entry>> {
    fetch(connection, CLAIM, past, limit, again).await
}

pub async fn sweep(
    connection: &mut PgConnection,
    up_to: OutboxId,
    limit: usize,
    under_way: &[OutboxId],
) -> sqlx::Result<Vec<Entry>> {
    fetch(connection, SWEEP, up_to, limit, under_way).await
}

async fn fetch(
    connection: &mut PgConnection,
    query: &'static str,
    place: OutboxId,
    limit: usize,
    ids: &[OutboxId],
) -> sqlx::Result<Vec<Entry>> {
    let rows: Vec<Row> = sqlx::query_as(query).bind(place).bind(limit as i64).bind(ids).fetch_all(connection).await?;
    rows.into_iter().map(Row::into_entry).collect()
}

pub async fn last_id(connection: &mut PgConnection) -> sqlx::Result<OutboxId> {
    sqlx::query_scalar(LAST_ID).fetch_one(connection).await
}

/// Deletes confirmed events. Those that are gone already were settled by another relay.
pub async fn settle(connection: &mut PgConnection, confirmed: &[Confirmed]) -> sqlx::Result<()> {
    let (ids, message_ids): (Vec<_>, Vec<_>) = confirmed.iter().map(|event| (event.id, event.message_id)).unzip();
    sqlx::query(SETTLE).bind(ids).bind(message_ids).execute(connection).await.map(drop)
}

#[derive(sqlx::FromRow)]
struct Row {
    id: i64,
    message_id: Uuid,
    event: String,
    user_id: Uuid,
    version: i64,
    changed_fields: Json<Vec<FieldName>>,
    occurred_at: OffsetDateTime,
    traceparent: String,
}

impl Row {
    fn into_entry(self) -> sqlx::Result<Entry> {
        let Self { id, message_id, event, user_id, version, changed_fields, occurred_at, traceparent } = self;
        let event = Event::from_name(&event, changed_fields.0)
            .ok_or_else(|| sqlx::Error::Decode(format!("outbox row {id} has an unknown event").into()))?;
        let traceparent = traceparent.parse().ok();
        Ok(Entry { id, notice: Notice { message_id, user_id, version, event, occurred_at, traceparent } })
    }
}
