//! The SQL of a mirror, and all of it.

use std::collections::HashMap;

use serde_json::{Map, Value};
use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

use super::Copy;
use crate::owner::Cursor;

/// Two processes that start together would both find no table: the lock makes one wait for the other.
const CREATE: &str = "
do $$
begin
  perform pg_advisory_xact_lock(hashtext('tidings mirror'));
  create table if not exists tidings_users (
    id uuid primary key,
    -- What is compared before anything is written.
    version bigint not null,
    -- Null once the user is deleted: the row then only keeps older news from bringing him back.
    profile jsonb
  );
  create table if not exists tidings_cursor (
    -- One row.
    is_only boolean primary key default true check (is_only),
    cursor text not null
  );
end
$$
";

/// States of users, each of whom stands here once; nobody is written over who is as new. With the cursor, if there is one, in one
/// statement: it is kept with what it stands for, and a caller that is cut off leaves no transaction open.
const KEEP: &str = "
with told as (
  select * from unnest($1::uuid[], $2::bigint[], $3::jsonb[]) as told (id, version, profile)
),
moved as (
  insert into tidings_cursor (cursor)
  select $4::text where $4::text is not null
  on conflict (is_only) do update set cursor = excluded.cursor
)
insert into tidings_users as held (id, version, profile)
select id, version, profile
  from told
 -- Two processes lock the same rows in the same order.
 order by id
on conflict (id) do update
   set version = excluded.version, profile = excluded.profile
 where held.version < excluded.version
";

const GET: &str = "
select version, profile
  from tidings_users
 where id = $1
   and profile is not null
";

const HELD: &str = "
select id, version
  from tidings_users
 where id = any($1)
";

const LIVING: &str = "
select id, version
  from tidings_users
 where profile is not null
   and id > $1
 order by id
 limit $2
";

const COUNT_LIVING: &str = "
select count(*)
  from tidings_users
 where profile is not null
";

/// Only what was looked at before: news that came meanwhile is newer than whatever led here.
const DROP: &str = "
delete from tidings_users
 where id = $1
   and version = $2
";

const CURSOR: &str = "
select cursor from tidings_cursor
";

const FORGET_CURSOR: &str = "
delete from tidings_cursor
";

pub(super) async fn create(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::raw_sql(CREATE).execute(pool).await.map(drop)
}

/// A state to keep: no profile, and it is a tombstone.
pub(super) struct State {
    pub id: Uuid,
    pub version: i64,
    pub profile: Option<Map<String, Value>>,
}

/// Keeps these states, and the place in the feed that they came from. How many were newer than what was held.
pub(super) async fn keep(
    connection: &mut PgConnection,
    states: Vec<State>,
    cursor: Option<&Cursor>,
) -> sqlx::Result<u64> {
    let done = sqlx::query(KEEP)
        .bind(states.iter().map(|state| state.id).collect::<Vec<_>>())
        .bind(states.iter().map(|state| state.version).collect::<Vec<_>>())
        .bind(states.into_iter().map(|state| state.profile.map(Json)).collect::<Vec<_>>())
        .bind(cursor.map(|Cursor(cursor)| cursor))
        .execute(connection)
        .await?;
    Ok(done.rows_affected())
}

pub(super) async fn get(connection: &mut PgConnection, user: Uuid) -> sqlx::Result<Option<Copy>> {
    let row: Option<(i64, Json<Map<String, Value>>)> =
        sqlx::query_as(GET).bind(user).fetch_optional(connection).await?;
    Ok(row.map(|(version, Json(profile))| Copy { version, profile }))
}

/// The versions held of these users, the deleted ones included.
pub(super) async fn held(pool: &PgPool, users: &[Uuid]) -> sqlx::Result<HashMap<Uuid, i64>> {
    let rows: Vec<(Uuid, i64)> = sqlx::query_as(HELD).bind(users).fetch_all(pool).await?;
    Ok(rows.into_iter().collect())
}

/// Up to `limit` living users past `after`, in order of id.
pub(super) async fn living(pool: &PgPool, after: Uuid, limit: i64) -> sqlx::Result<Vec<(Uuid, i64)>> {
    sqlx::query_as(LIVING).bind(after).bind(limit).fetch_all(pool).await
}

pub(super) async fn count_living(pool: &PgPool) -> sqlx::Result<u64> {
    let count: i64 = sqlx::query_scalar(COUNT_LIVING).fetch_one(pool).await?;
    Ok(count.cast_unsigned())
}

/// Drops a user at this version, tombstone or not.
pub(super) async fn drop_at(pool: &PgPool, user: Uuid, version: i64) -> sqlx::Result<()> {
    sqlx::query(DROP).bind(user).bind(version).execute(pool).await.map(drop)
}

pub(super) async fn cursor(pool: &PgPool) -> sqlx::Result<Option<Cursor>> {
    let cursor: Option<String> = sqlx::query_scalar(CURSOR).fetch_optional(pool).await?;
    Ok(cursor.map(Cursor))
}

pub(super) async fn forget_cursor(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::query(FORGET_CURSOR).execute(pool).await.map(drop)
}
