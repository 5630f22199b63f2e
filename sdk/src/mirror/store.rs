//! The SQL of a mirror, and all of it.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value};
use sqlx::{PgConnection, PgExecutor, PgPool, types::Json};
use uuid::Uuid;

use super::Copy;
use crate::{
    envelope::FieldName,
    owner::{Change, Cursor},
};

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
  -- Nor shall the planner's statistics keep anything of him. What they have kept goes when the type is set anew, unless a view stands on it.
  if exists (
    select from pg_attribute
     where attrelid = 'tidings_users'::regclass and attname = 'profile' and attstattarget is distinct from 0
  ) then
    alter table tidings_users alter column profile set statistics 0;
    begin
      alter table tidings_users alter column profile type jsonb;
    exception when feature_not_supported then null;
    end;
  end if;
  create table if not exists tidings_cursor (
    -- One row.
    is_only boolean primary key default true check (is_only),
    -- Empty: at the beginning.
    cursor text not null
  );
  -- Whether the owner has another history than what is held, and whoever is not shown by the end of the feed is to be forgotten.
  alter table tidings_cursor add column if not exists is_anew boolean not null default false;
  -- What is held of a profile: names, or null (of JSON) for all of it. Null: held since before this was noted.
  alter table tidings_cursor add column if not exists fields jsonb;
end
$$
";

/// States of users, each of whom stands here once; nobody is written over who is as new, but for one of version `$5`, and for a living one
/// who is deleted: no id comes back at the owner, so a deletion at a lower version is one of an owner that was set back. With the cursor, if
/// there is one, in one statement: it is kept with what it stands for, and a caller that is cut off leaves no transaction open. It moves on
/// from `$6` only: a pass that has been overtaken, or whose mirror has gone back to the beginning meanwhile, moves nothing.
const KEEP: &str = "
with told as (
  select * from unnest($1::uuid[], $2::bigint[], $3::jsonb[]) as told (id, version, profile)
),
moved as (
  insert into tidings_cursor (cursor)
  select $4::text where $4::text is not null
  on conflict (is_only) do update set cursor = excluded.cursor
   where tidings_cursor.cursor = coalesce($6, '')
)
insert into tidings_users as held (id, version, profile)
select id, version, profile
  from told
 -- Two processes lock the same rows in the same order.
 order by id
on conflict (id) do update
   set version = excluded.version, profile = excluded.profile
 where held.version < excluded.version
    or held.version = $5
    or (excluded.profile is null and held.profile is not null)
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
select nullif(cursor, '') from tidings_cursor
";

/// Back to the beginning, unless another process has gone there already. Every state of the owner's is newer than version 0.
const BEGIN_ANEW: &str = "
with begun as (
  update tidings_cursor
     set cursor = '', is_anew = true
   where cursor = coalesce($1, '')
  returning cursor
)
update tidings_users
   set version = 0
 where exists (select from begun)
";

/// Notes which fields are held; with others than before it goes back to the beginning, as versions do not tell of it.
const NOTE_FIELDS: &str = "
with noted as (
  insert into tidings_cursor as noted (cursor, fields)
  values ('', $1)
  on conflict (is_only) do update
     set fields = excluded.fields,
         cursor = case when noted.fields is null and not noted.is_anew then noted.cursor else '' end,
         is_anew = noted.is_anew or noted.fields is not null
   where noted.fields is distinct from excluded.fields
  returning is_anew
)
update tidings_users
   set version = 0
 where exists (select from noted where is_anew)
";

/// Who still has version 0 was not shown, or could not be fetched.
const END_ANEW: &str = "
with ended as (
  update tidings_cursor
     set is_anew = false
   where is_anew
     -- Another pass has shown other users, or begun anew.
     and cursor = coalesce($2, '')
  returning cursor
)
delete from tidings_users
 where exists (select from ended)
   and version = 0
   and id <> all($1)
";

pub(super) async fn create(pool: &PgPool) -> sqlx::Result<()> {
    sqlx::raw_sql(CREATE).execute(pool).await.map(drop)
}

/// Notes that these fields are held, or all of them; if it was others, everybody is to be fetched anew.
pub(super) async fn note_fields(pool: &PgPool, fields: Option<&BTreeSet<FieldName>>) -> sqlx::Result<()> {
    sqlx::query(NOTE_FIELDS).bind(Json(fields)).execute(pool).await.map(drop)
}

/// A state to keep: no profile, and it is a tombstone.
pub(super) struct State {
    pub id: Uuid,
    pub version: i64,
    pub profile: Option<Map<String, Value>>,
}

impl State {
    /// A user of whom the feed says that he is deleted.
    pub(super) fn tombstone(Change { user_id, version, .. }: &Change) -> Self {
        Self { id: *user_id, version: *version, profile: None }
    }
}

/// From a place in the feed, `None` being its beginning, to a later one.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub from: Option<&'a Cursor>,
    pub to: &'a Cursor,
}

/// Keeps these states, and the step through the feed that they came with. How many were newer than what was held.
pub(super) async fn keep(
    connection: &mut PgConnection,
    states: Vec<State>,
    step: Option<Step<'_>>,
) -> sqlx::Result<u64> {
    keep_all(connection, states, step, None).await
}

/// Keeps a state, also over this version. 1 unless something newer is held.
pub(super) async fn keep_over(connection: &mut PgConnection, state: State, over: Option<i64>) -> sqlx::Result<u64> {
    keep_all(connection, vec![state], None, over).await
}

async fn keep_all(
    connection: &mut PgConnection,
    states: Vec<State>,
    step: Option<Step<'_>>,
    over: Option<i64>,
) -> sqlx::Result<u64> {
    let done = sqlx::query(KEEP)
        .bind(states.iter().map(|state| state.id).collect::<Vec<_>>())
        .bind(states.iter().map(|state| state.version).collect::<Vec<_>>())
        .bind(states.into_iter().map(|state| state.profile.map(Json)).collect::<Vec<_>>())
        .bind(step.map(|step| text(step.to)))
        .bind(over)
        .bind(step.and_then(|step| step.from).map(text))
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
pub(super) async fn held(db: impl PgExecutor<'_>, users: &[Uuid]) -> sqlx::Result<HashMap<Uuid, i64>> {
    let rows: Vec<(Uuid, i64)> = sqlx::query_as(HELD).bind(users).fetch_all(db).await?;
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
    let cursor: Option<Option<String>> = sqlx::query_scalar(CURSOR).fetch_optional(pool).await?;
    Ok(cursor.flatten().map(Cursor))
}

/// Prepares for a full pass through the feed of another history: what is held gives way to whatever is shown. `kept` is the place that the
/// caller has found or left here.
pub(super) async fn begin_anew(pool: &PgPool, kept: Option<&Cursor>) -> sqlx::Result<()> {
    sqlx::query(BEGIN_ANEW).bind(kept.map(text)).execute(pool).await.map(drop)
}

/// Ends such a pass, if there is one: forgets whom it has not shown, but for those who are there and could not be fetched.
pub(super) async fn end_anew(pool: &PgPool, unseen: &[Uuid], kept: Option<&Cursor>) -> sqlx::Result<()> {
    sqlx::query(END_ANEW).bind(unseen).bind(kept.map(text)).execute(pool).await.map(drop)
}

fn text(Cursor(cursor): &Cursor) -> &str {
    cursor
}
