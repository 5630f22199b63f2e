//! The SQL of the master data, and all of it.

use serde_json::value::RawValue;
use sqlx::{PgConnection, PgPool, types::Json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    change::Step,
    model::{Record, Tombstone, User, UserId, Version},
};
use crate::profile::Profile;

/// Keeps and tells in one breath: the users of a batch and the events of all their changes, in one statement.
///
/// This is the only statement that writes `users`, and the only one that adds to `outbox` and `changes`. A user is written if the
/// version that its changes were planned on still holds, and only then are its events added and its entry in `changes` replaced.
/// Each user stands once in the batch, in order of id, so that two instances lock the same rows in the same order.
pub const KEEP: &str = "
with change as (
  select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[])
    as change (user_id, seen, version, profile)
),
created as (
  insert into users (id, version, profile, created_at, updated_at, deleted_at)
  select user_id, version, profile::json,
         case when profile is not null then now() end,
         case when profile is not null then now() end,
         -- Created and deleted within one batch: the tombstone alone.
         case when profile is null then now() end
    from change
   where seen = 0
  on conflict (id) do nothing
  returning id
),
changed as (
  update users
     set version = change.version,
         profile = change.profile::json,
         created_at = case when change.profile is not null then users.created_at end,
         updated_at = case when change.profile is not null then now() end,
         deleted_at = case when change.profile is null then now() end,
         changed_xid = pg_current_xact_id()
    from change
    -- The row as it was. It is at the version seen, if the one to be written is: versions only grow.
    join users before on before.id = change.user_id
   where users.id = change.user_id
     and users.version = change.seen
     and users.deleted_at is null
  returning users.id, before.changed_xid as replaced_xid
),
kept as (
  select id from created
  union all
  select id from changed
),
noted as (
  insert into changes (xid, user_id)
  select pg_current_xact_id(), id from kept
),
replaced as (
  delete from changes
   using changed
   where changes.xid = changed.replaced_xid
     and changes.user_id = changed.id
),
told as (
  insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
  select message_id, event, user_id, version, changed_fields::jsonb, traceparent
    from unnest($5::uuid[], $6::text[], $7::uuid[], $8::bigint[], $9::text[], $10::text[])
      with ordinality as event (message_id, event, user_id, version, changed_fields, traceparent, place)
   where user_id in (select id from kept)
   order by place
)
-- For a user that was not kept: the state that is in the way.
select change.user_id, kept.id is not null as is_kept, now() as at,
       users.version, users.profile, users.created_at, users.updated_at, users.deleted_at
  from change
  left join kept on kept.id = change.user_id
  -- A null key finds nothing and costs nothing.
  left join users on users.id = case when kept.id is null then change.user_id end
";

/// The latest state of each of these users, the living and the dead.
pub const READ: &str = "
select id, version, profile, created_at, updated_at, deleted_at
  from users
 where id = any($1)
";

/// A page of living users in order of id.
pub const LIST: &str = "
select id, version, profile, created_at, updated_at, deleted_at
  from users
 where deleted_at is null
   and id > $1
 order by id
 limit $2
";

/// The session settings that suit [`KEEP`] and [`READ`]: both find a handful of rows by key, whatever the statistics say, and
/// planning them anew would cost more than running them.
pub const BY_KEY: [(&str, &str); 3] =
    [("plan_cache_mode", "force_generic_plan"), ("enable_seqscan", "off"), ("enable_mergejoin", "off")];

/// The changes of one user that are to be written together, each planned on the one before. Never empty.
#[derive(Debug)]
pub struct Stack {
    steps: Vec<Step>,
}

impl Stack {
    pub fn new(bottom: Step) -> Self {
        Self { steps: vec![bottom] }
    }

    pub fn push(&mut self, step: Step) {
        debug_assert_eq!(step.seen, self.top().version(), "a step is planned on the one below it");
        self.steps.push(step);
    }

    /// The state after the last change.
    pub fn top(&self) -> &Record {
        &self.steps[self.steps.len() - 1].after
    }

    pub fn id(&self) -> UserId {
        self.top().id()
    }

    fn seen(&self) -> Version {
        self.steps[0].seen
    }
}

/// What became of a [`Stack`].
#[derive(Debug, Clone)]
pub enum Kept {
    /// All its changes are committed, at this time.
    Done { at: OffsetDateTime },
    /// Somebody else was there first, and left this; nothing of the stack was written.
    Moved(Option<Record>),
}

/// Writes a batch; the answers are in the order of `stacks`.
pub async fn keep(connection: &mut PgConnection, stacks: &mut [Stack]) -> sqlx::Result<Vec<Kept>> {
    stacks.sort_unstable_by_key(Stack::id);
    let column = |of: fn(&Stack) -> i64| stacks.iter().map(of).collect::<Vec<_>>();
    let steps: Vec<&Step> = stacks.iter().flat_map(|stack| &stack.steps).collect();
    let mut rows: Vec<KeptRow> = sqlx::query_as(KEEP)
        .bind(stacks.iter().map(|stack| stack.id().0).collect::<Vec<_>>())
        .bind(column(Stack::seen))
        .bind(column(|stack| stack.top().version()))
        .bind(stacks.iter().map(|stack| stack.top().profile().map(Profile::as_str)).collect::<Vec<_>>())
        .bind(steps.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
        .bind(steps.iter().map(|step| step.event.name()).collect::<Vec<_>>())
        .bind(steps.iter().map(|step| step.after.id().0).collect::<Vec<_>>())
        .bind(steps.iter().map(|step| step.after.version()).collect::<Vec<_>>())
        .bind(steps.iter().map(|step| names(step)).collect::<Vec<_>>())
        .bind(steps.iter().map(|step| step.trace.to_string()).collect::<Vec<_>>())
        // Not fetch_one or fetch_optional anywhere here: they stop at the first row, which comes before the commit.
        .fetch_all(connection)
        .await?;
    rows.sort_unstable_by_key(|row| row.user_id);
    assert_eq!(rows.len(), stacks.len(), "one answer per user");
    rows.into_iter().map(KeptRow::into_kept).collect()
}

fn names(step: &Step) -> String {
    serde_json::to_string(step.event.changed_fields()).expect("names are always JSON")
}

pub async fn read(connection: &mut PgConnection, ids: &[UserId]) -> sqlx::Result<Vec<Record>> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let rows: Vec<UserRow> = sqlx::query_as(READ).bind(ids).fetch_all(connection).await?;
    rows.into_iter().map(UserRow::into_record).collect()
}

/// Up to `limit` living users past `after`.
pub async fn list(pool: &PgPool, after: UserId, limit: i64) -> sqlx::Result<Vec<User>> {
    let rows: Vec<UserRow> = sqlx::query_as(LIST).bind(after.0).bind(limit).fetch_all(pool).await?;
    rows.into_iter()
        .map(|row| match row.into_record()? {
            Record::Living(user) => Ok(user),
            Record::Deleted(_) => Err(impossible("a tombstone in a page of the living")),
        })
        .collect()
}

#[derive(sqlx::FromRow)]
struct KeptRow {
    user_id: Uuid,
    is_kept: bool,
    at: OffsetDateTime,
    version: Option<i64>,
    profile: Option<Json<Box<RawValue>>>,
    created_at: Option<OffsetDateTime>,
    updated_at: Option<OffsetDateTime>,
    deleted_at: Option<OffsetDateTime>,
}

impl KeptRow {
    fn into_kept(self) -> sqlx::Result<Kept> {
        let Self { user_id, is_kept, at, version, profile, created_at, updated_at, deleted_at } = self;
        if is_kept {
            return Ok(Kept::Done { at });
        }
        let Some(version) = version else { return Ok(Kept::Moved(None)) };
        let row = UserRow { id: user_id, version, profile, created_at, updated_at, deleted_at };
        Ok(Kept::Moved(Some(row.into_record()?)))
    }
}

#[derive(sqlx::FromRow)]
struct UserRow {
    id: Uuid,
    version: i64,
    profile: Option<Json<Box<RawValue>>>,
    created_at: Option<OffsetDateTime>,
    updated_at: Option<OffsetDateTime>,
    deleted_at: Option<OffsetDateTime>,
}

impl UserRow {
    fn into_record(self) -> sqlx::Result<Record> {
        let Self { id, version, .. } = self;
        let id = UserId(id);
        match (self.deleted_at, self.profile, self.created_at, self.updated_at) {
            (Some(deleted_at), ..) => Ok(Record::Deleted(Tombstone { id, version, deleted_at })),
            (None, Some(Json(profile)), Some(created_at), Some(updated_at)) => {
                let profile = Profile::from_kept(profile);
                Ok(Record::Living(User { id, version, created_at, updated_at, profile }))
            }
            _ => Err(impossible("a living user without profile or times")),
        }
    }
}

/// A row that the table's constraints rule out.
fn impossible(what: &str) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}
