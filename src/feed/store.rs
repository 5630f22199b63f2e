//! The SQL of the feed, and all of it; the entries in `changes` are written together with the users (`users::store`).

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Change, Entry, State,
    cursor::{Epoch, Place},
};
use crate::users::UserId;

/// The session settings that suit these statements: each walks an index from a place on, whatever the statistics say, and so costs
/// what its page costs, in a table of any size.
pub const IN_ORDER: [(&str, &str); 6] = [
    // Nor is everybody looked at in another order and then sorted.
    ("enable_sort", "off"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// Which history of which database this is, the first transaction that it does not know of yet, and whether there are changes that the
/// feed does not show yet.
pub const EPOCH: &str = "
select system_identifier
         -- A dump that is read into another database of the same cluster begins another history there.
         # (((select oid::bigint from pg_database where datname = current_database()) << 32) | 'changes'::regclass::oid::bigint) as home,
       -- Not the control file's: that one is behind for a while after a promotion.
       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int as timeline,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint as next_xid,
       -- The newest tells of all, however many there are.
       coalesce((select xid from changes order by xid desc limit 1) >= pg_snapshot_xmin(pg_current_snapshot()), false) as is_held_back
  from pg_control_system()
";

/// The latest version of each user past a place, in order of the transactions that made them.
pub const PAGE: &str = "
select changes.xid::text::bigint as xid,
       users.id,
       users.version,
       users.deleted_at is null as is_living,
       coalesce(users.deleted_at, users.updated_at) as at
  from changes
  join users on users.id = changes.user_id
 where (changes.xid, changes.user_id) > ($1::bigint::text::xid8, $2::uuid)
   -- Below the oldest transaction that is still open nothing can come any more. What is past it waits, even if committed.
   and changes.xid < pg_snapshot_xmin(pg_current_snapshot())
 order by changes.xid, changes.user_id
 limit $3
";

/// The next living users in order of id.
pub const LIVING: &str = "
select id, version
  from users
 where deleted_at is null
   and id > $1
 order by id
 limit $2
";

/// The users of a bucket, which is a range of the index `users_digest`.
pub const BUCKET: &str = "
select id, version
  from users
 where deleted_at is null
   and (((get_byte(sha256(uuid_send(id)), 0) << 8) | get_byte(sha256(uuid_send(id)), 1)), id) > ($1::int, $2::uuid)
   and ((get_byte(sha256(uuid_send(id)), 0) << 8) | get_byte(sha256(uuid_send(id)), 1)) < $3
 order by ((get_byte(sha256(uuid_send(id)), 0) << 8) | get_byte(sha256(uuid_send(id)), 1)), id
 limit $4
";

/// Whether there are entries of transactions that are yet to come.
pub const STRANGERS: &str = "
select exists (select from changes where xid >= pg_snapshot_xmax(pg_current_snapshot()))
";

/// Gives them this transaction. Nobody may write users meanwhile.
pub const RESTAMP: &str = "
with strangers as (
  delete from changes
   where xid >= pg_snapshot_xmax(pg_current_snapshot())
  returning user_id
),
stamped as (
  update users
     set changed_xid = pg_current_xact_id()
    from strangers
   where users.id = strangers.user_id
  returning users.id
)
insert into changes (xid, user_id)
select pg_current_xact_id(), id
  from stamped
";

/// The database as it is now.
pub struct Now {
    pub epoch: Epoch,
    pub next_xid: i64,
    /// A transaction that is still open keeps committed changes out of the feed.
    pub is_held_back: bool,
}

/// One moment's picture for several statements.
pub const ONE_MOMENT: &str = "begin transaction isolation level repeatable read, read only";

pub async fn epoch(connection: &mut PgConnection) -> sqlx::Result<Now> {
    let (home, timeline, next_xid, is_held_back) = sqlx::query_as(EPOCH).fetch_one(connection).await?;
    Ok(Now { epoch: Epoch { home, timeline }, next_xid, is_held_back })
}

pub async fn page(connection: &mut PgConnection, after: Place, limit: usize) -> sqlx::Result<Vec<(Place, Change)>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows: Vec<ChangeRow> =
        sqlx::query_as(PAGE).bind(after.xid).bind(after.user).bind(limit).fetch_all(connection).await?;
    Ok(rows.into_iter().map(ChangeRow::into_change).collect())
}

/// Up to `limit` living users past `after`.
pub async fn living(pool: &PgPool, after: Uuid, limit: i64) -> sqlx::Result<Vec<Entry>> {
    sqlx::query_as(LIVING).bind(after).bind(limit).fetch_all(pool).await
}

pub async fn bucket(pool: &PgPool, (place, id): (u32, Uuid), end: u32, limit: i64) -> sqlx::Result<Vec<Entry>> {
    sqlx::query_as(BUCKET).bind(place.cast_signed()).bind(id).bind(end.cast_signed()).bind(limit).fetch_all(pool).await
}

pub async fn has_strangers(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar(STRANGERS).fetch_one(connection).await
}

/// To be called in a transaction.
pub async fn restamp(connection: &mut PgConnection) -> sqlx::Result<u64> {
    sqlx::query("lock table users in share row exclusive mode").execute(&mut *connection).await?;
    Ok(sqlx::query(RESTAMP).execute(connection).await?.rows_affected())
}

#[derive(sqlx::FromRow)]
struct ChangeRow {
    xid: i64,
    id: Uuid,
    version: i64,
    is_living: bool,
    at: OffsetDateTime,
}

impl ChangeRow {
    fn into_change(self) -> (Place, Change) {
        let Self { xid, id, version, is_living, at } = self;
        let state = if is_living { State::Living } else { State::Deleted };
        (Place { xid, user: id }, Change { user_id: UserId(id), version, state, at })
    }
}
