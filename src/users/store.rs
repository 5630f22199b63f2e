//! The SQL of the master data, and all of it.

use std::collections::{HashMap, HashSet};

use serde_json::value::RawValue;
use sqlx::{
    Connection, FromRow, PgConnection, PgPool, Postgres,
    postgres::{PgArguments, PgRow},
    query::QueryAs,
    types::Json,
};
use tidings_sdk::envelope::Notice;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    change::Step,
    model::{ExternalId, Record, Tombstone, User, UserId, Version},
    repeat::{Claim, Outcome, Remembered},
};
use crate::{
    outbox::{Entry, OutboxId},
    profile::Profile,
};

/// The events of those users who are kept, in order. Of both statements below.
macro_rules! tell_of_kept {
    () => {
        "
  insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
  select message_id, event, user_id, version, changed_fields::jsonb, traceparent
    from unnest($5::uuid[], $6::text[], $7::uuid[], $8::bigint[], $9::text[], $10::text[])
      with ordinality as event (message_id, event, user_id, version, changed_fields, traceparent, place)
   where (user_id in (select id from kept)) is true
   order by place
  returning id, message_id, occurred_at
"
    };
}

/// Keeps and tells in one breath a batch of amendments alone, which is nearly every one: the users, and the events of all their
/// changes.
///
/// It and [`KEEP`] are the only ones that write `users`, and that add to `outbox` and `changes`. A user is written if the version that
/// his changes were planned on still holds, and only then are his events added and his entry in `changes` replaced. Each user stands
/// once in the batch, in order of id, so that two instances lock the same rows in the same order.
///
/// Gives back the events that were added: who has none was not written.
///
/// Nothing in it leaves the planner a choice between reading by key and reading an index whole, which it would make by statistics
/// that a young table does not have: a set is looked into by a hashed `in (..) is true`, not joined, and no condition invites a
/// partial index.
pub const AMEND: &str = concat!(
    "
with kept as (
  update users
     set version = asked.version,
         profile = asked.profile::json,
         updated_at = now(),
         changed_xid = pg_current_xact_id()
    from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[]) as asked (user_id, seen, version, profile)
    -- The row as it was. It is at the version seen, if the one to be written is: versions only grow.
    join users before on before.id = asked.user_id
   where users.id = asked.user_id
     -- And lives, as it did when it was seen.
     and users.version = asked.seen
  returning users.id, before.changed_xid as replaced_xid
),
noted as (
  insert into changes (xid, user_id)
  select pg_current_xact_id(), id from kept
),
replaced as (
  delete from changes
   using kept
   where changes.xid = kept.replaced_xid
     and changes.user_id = kept.id
)",
    tell_of_kept!()
);

/// Keeps and tells any batch, as [`AMEND`] does one of amendments: users are created and deleted too, get external ids, and their
/// requests are remembered. What that needs would cost every amendment.
///
/// Whoever claims an external id that somebody has is not written. Of two who claim the same at once the index fails the batch.
pub const KEEP: &str = concat!(
    "
with asked as (
  select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $11::text[])
    as asked (user_id, seen, version, profile, external_id)
),
-- Of those who get an external id that they did not have: who gets one that is taken.
taken as (
  select user_id
    from unnest($12::uuid[], $13::text[]) as claim (user_id, external_id)
   where user_id <> (select id from users where users.external_id = claim.external_id)
),
change as (
  select * from asked
   where user_id not in (select user_id from taken)
),
created as (
  insert into users (id, version, profile, external_id, created_at, updated_at, deleted_at)
  select user_id, version, profile::json, external_id,
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
         external_id = change.external_id,
         created_at = case when change.profile is not null then users.created_at end,
         updated_at = case when change.profile is not null then now() end,
         deleted_at = case when change.profile is null then now() end,
         changed_xid = pg_current_xact_id()
    from change
    join users before on before.id = change.user_id
   where users.id = change.user_id
     and users.version = change.seen
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
told as (",
    tell_of_kept!(),
    "),
-- Requests that may come again. One that did, on another instance, fails the batch by its key.
remembered as (
  insert into idempotency_keys (key, salt, fingerprint, outcome, user_id, version)
  select key, salt, fingerprint, outcome, user_id, version
    from unnest($14::bytea[], $15::bytea[], $16::bytea[], $17::text[], $18::uuid[], $19::bigint[])
      as claim (key, salt, fingerprint, outcome, user_id, version)
   where (user_id in (select id from kept)) is true
)
-- For a user that was not kept: the state that is in the way.
select asked.user_id, asked.user_id in (select id from kept) as is_kept,
       asked.user_id in (select user_id from taken) as is_taken, now() as at,
       -- Once: where the events are, in order of message id.
       case when asked.user_id = ($1::uuid[])[1] then array(select id from told order by message_id) end as told,
       users.version, users.profile, users.external_id, users.created_at, users.updated_at, users.deleted_at
  from asked
  -- A null key finds nothing and costs nothing.
  left join users on users.id = case when not (asked.user_id in (select id from kept)) then asked.user_id end
"
);

/// Takes the hashes of requests about these users away, who are deleted: not even that of what was written stays. After [`KEEP`], in its
/// transaction: it sees what was remembered while [`KEEP`] waited for the users' rows.
pub const FORGET: &str = "
update idempotency_keys
   set fingerprint = null
 where user_id = any($1)
   and fingerprint is not null
";

/// What a request came to that was decided before.
pub const RECALL: &str = "
select salt, fingerprint, outcome, user_id, version, kept_at
  from idempotency_keys
 where key = $1
";

/// Remembers a request that came to nothing. The first one counts. Of a deleted user not even a hash of what was written stays: a deletion
/// that is under way is waited for, and one that comes waits, and finds what is remembered here.
pub const REMEMBER: &str = "
with person as (
  select deleted_at from users where id = $5 for share
)
insert into idempotency_keys (key, salt, fingerprint, outcome, user_id, version)
values ($1, $2, case when not exists (select from person where deleted_at is not null) then $3::bytea end, $4, $5, $6)
on conflict (key) do nothing
";

/// Lets the oldest go of those that were kept for a day, by the database's clock and by ours: one that jumped lets nothing go early.
pub const PURGE: &str = "
delete from idempotency_keys
 -- By place: what was kept at about the same time lies side by side, where the index of keys is as wide as the table.
 where ctid = any(array(select ctid
                          from idempotency_keys
                         where kept_at < least(now(), $2) - interval '24 hours'
                         order by kept_at
                         limit $1
                           for update skip locked))
";

/// The key that each idempotency key has once.
pub const IDEMPOTENCY_KEYS: &str = "idempotency_keys_pkey";

/// The index that has each external id once.
pub const EXTERNAL_IDS: &str = "users_external_id";

/// The latest state of each of these users, the living and the dead.
pub const READ: &str = "
select id, version, profile, external_id, created_at, updated_at, deleted_at
  from users
 where id = any($1)
";

/// A page of living users in order of id.
pub const LIST: &str = "
select id, version, profile, external_id, created_at, updated_at, deleted_at
  from users
 where deleted_at is null
   and id > $1
 order by id
 limit $2
";

/// The living user whom other systems know by this id.
pub const FIND: &str = "
select id, version, profile, external_id, created_at, updated_at, deleted_at
  from users
 where external_id = $1
";

/// The session settings that suit [`AMEND`], [`KEEP`] and [`READ`]: they find a handful of rows by key, whatever the statistics say, and
/// planning them anew would cost more than running them.
pub const BY_KEY: [(&str, &str); 4] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_mergejoin", "off"),
    ("enable_hashjoin", "off"),
];

/// The changes of one user that are to be written together, each planned on the one before. Never empty.
#[derive(Debug)]
pub struct Stack {
    steps: Vec<Step>,
}

impl Stack {
    pub fn new(bottom: Step) -> Self {
        Self { steps: vec![bottom] }
    }

    /// Puts `step` on top. False, and it is left out, when an external id has changed in this stack before: what is not written
    /// cannot be found to be taken.
    pub fn push(&mut self, step: Step) -> bool {
        debug_assert_eq!(step.seen, self.top().version(), "a step is planned on the one below it");
        let fits = !(step.renames && self.renames());
        if fits {
            self.steps.push(step);
        }
        fits
    }

    fn renames(&self) -> bool {
        self.steps.iter().any(|step| step.renames)
    }

    fn is_deleted(&self) -> bool {
        self.top().profile().is_none()
    }

    /// Whether [`AMEND`] suffices.
    fn is_amendment(&self) -> bool {
        self.seen() > 0 && !self.is_deleted() && self.steps.iter().all(|step| !step.renames && step.claim.is_none())
    }

    /// The external id that is new with this stack.
    fn claim(&self) -> Option<&ExternalId> {
        self.top().external_id().filter(|_| self.renames())
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
    /// Somebody else was there first; nothing of the stack was written.
    Outdated,
    /// The same, and this is what he left.
    Moved(Option<Record>),
    /// Somebody else has the external id that it claims; nothing of the stack was written, over this.
    Taken(Option<Record>),
    /// A request of it was made before under the same idempotency key; nothing of the stack was written.
    Repeated,
}

/// What became of a batch.
#[derive(Debug)]
pub struct Written {
    /// In the order of the stacks.
    pub kept: Vec<Kept>,
    /// The events that are committed now, in order.
    pub told: Vec<Entry>,
}

/// Writes a batch.
pub async fn keep(connection: &mut PgConnection, stacks: &mut [Stack]) -> sqlx::Result<Written> {
    stacks.sort_unstable_by_key(Stack::id);
    let batch = Batch::new(stacks);
    if stacks.iter().all(Stack::is_amendment) {
        amend(connection, &batch).await
    } else {
        keep_any(connection, &batch).await
    }
}

/// What both statements are given.
struct Batch<'a> {
    stacks: &'a [Stack],
    /// With the id of each one's message.
    steps: Vec<(&'a Step, Uuid)>,
}

type Statement<'a, Row> = QueryAs<'a, Postgres, Row, PgArguments>;

impl<'a> Batch<'a> {
    fn new(stacks: &'a [Stack]) -> Self {
        let steps = stacks.iter().flat_map(|stack| &stack.steps).map(|step| (step, Uuid::now_v7())).collect();
        Self { stacks, steps }
    }

    fn statement<Row: for<'r> FromRow<'r, PgRow>>(&self, sql: &'static str) -> Statement<'a, Row> {
        sqlx::query_as(sql)
            .bind(self.of_stacks(|stack| stack.id().0))
            .bind(self.of_stacks(Stack::seen))
            .bind(self.of_stacks(|stack| stack.top().version()))
            .bind(self.of_stacks(|stack| stack.top().profile().map(Profile::as_str)))
            .bind(self.steps.iter().map(|(_, message_id)| *message_id).collect::<Vec<_>>())
            .bind(self.of_steps(|step| step.event.name()))
            .bind(self.of_steps(|step| step.after.id().0))
            .bind(self.of_steps(|step| step.after.version()))
            .bind(self.of_steps(names))
            .bind(self.of_steps(|step| step.trace.to_string()))
    }

    fn of_stacks<T>(&self, of: impl FnMut(&'a Stack) -> T) -> Vec<T> {
        self.stacks.iter().map(of).collect()
    }

    fn of_steps<T>(&self, mut of: impl FnMut(&'a Step) -> T) -> Vec<T> {
        self.steps.iter().map(|(step, _)| of(step)).collect()
    }
}

async fn amend(connection: &mut PgConnection, batch: &Batch<'_>) -> sqlx::Result<Written> {
    // Not fetch_one or fetch_optional anywhere here: they stop at the first row, which comes before the commit.
    let rows: Vec<(OutboxId, Uuid, OffsetDateTime)> = batch.statement(AMEND).fetch_all(connection).await?;
    let rows: HashMap<Uuid, (OutboxId, OffsetDateTime)> =
        rows.into_iter().map(|(id, message_id, at)| (message_id, (id, at))).collect();
    let mut told = Vec::with_capacity(rows.len());
    let mut kept = HashMap::with_capacity(batch.stacks.len());
    for (step, message_id) in &batch.steps {
        if let Some(&(id, at)) = rows.get(message_id) {
            told.push(Entry { id, notice: notice(step, *message_id, at) });
            kept.insert(step.after.id(), at);
        }
    }
    told.sort_unstable_by_key(|entry| entry.id);
    let kept = batch.of_stacks(|stack| kept.get(&stack.id()).map_or(Kept::Outdated, |&at| Kept::Done { at }));
    Ok(Written { kept, told })
}

async fn keep_any(connection: &mut PgConnection, batch: &Batch<'_>) -> sqlx::Result<Written> {
    let stacks = batch.stacks;
    let named: Vec<(Uuid, &str)> =
        stacks.iter().filter_map(|stack| Some((stack.id().0, stack.claim()?.as_str()))).collect();
    let keyed: Vec<(&Claim, &Step, &Stack)> = stacks
        .iter()
        .flat_map(|stack| stack.steps.iter().filter_map(move |step| Some((step.claim.as_ref()?, step, stack))))
        .collect();
    // Of a deleted user not even a hash of what was written stays.
    let fingerprint = |claim: &Claim, stack: &Stack| (!stack.is_deleted()).then(|| claim.fingerprint.to_vec());
    let statement: Statement<KeptRow> = batch
        .statement(KEEP)
        .bind(batch.of_stacks(|stack| stack.top().external_id().map(ExternalId::as_str)))
        .bind(named.iter().map(|(user, _)| *user).collect::<Vec<_>>())
        .bind(named.iter().map(|(_, external_id)| (*external_id).to_owned()).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(claim, ..)| claim.key.to_vec()).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(claim, ..)| claim.salt.to_vec()).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(claim, _, stack)| fingerprint(claim, stack)).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(_, step, _)| Outcome::of(step).as_str()).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(_, step, _)| step.after.id().0).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(_, step, _)| step.after.version()).collect::<Vec<_>>());
    let mut rows = if stacks.iter().any(Stack::is_deleted) {
        let mut transaction = connection.begin().await?;
        let rows = statement.fetch_all(&mut *transaction).await?;
        let kept: HashSet<Uuid> = rows.iter().filter(|row| row.is_kept).map(|row| row.user_id).collect();
        let deleted = stacks.iter().filter(|stack| stack.is_deleted()).map(|stack| stack.id().0);
        let gone: Vec<Uuid> = deleted.filter(|user| kept.contains(user)).collect();
        sqlx::query(FORGET).bind(gone).execute(&mut *transaction).await?;
        transaction.commit().await?;
        rows
    } else {
        statement.fetch_all(connection).await?
    };
    rows.sort_unstable_by_key(|row| row.user_id);
    assert_eq!(rows.len(), stacks.len(), "one answer per user");
    let places = rows[0].told.take().unwrap_or_default();
    let of_stacks = stacks.iter().zip(&rows).flat_map(|(stack, row)| stack.steps.iter().map(move |_| row));
    let told = batch.steps.iter().zip(of_stacks).filter(|(_, row)| row.is_kept);
    let told = placed(places, told.map(|((step, message_id), row)| notice(step, *message_id, row.at)).collect());
    let kept = rows.into_iter().map(KeptRow::into_kept).collect::<sqlx::Result<_>>()?;
    Ok(Written { kept, told })
}

/// `places` are in order of message id.
fn placed(places: Vec<OutboxId>, mut notices: Vec<Notice>) -> Vec<Entry> {
    assert_eq!(places.len(), notices.len(), "one event per change");
    notices.sort_unstable_by_key(|notice| notice.message_id);
    let mut told: Vec<Entry> = places.into_iter().zip(notices).map(|(id, notice)| Entry { id, notice }).collect();
    told.sort_unstable_by_key(|entry| entry.id);
    told
}

fn notice(step: &Step, message_id: Uuid, at: OffsetDateTime) -> Notice {
    Notice {
        message_id,
        user_id: step.after.id().0,
        version: step.after.version(),
        event: step.event.clone(),
        occurred_at: at,
        traceparent: Some(step.trace),
    }
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
    rows.into_iter().map(UserRow::into_user).collect()
}

pub async fn find(pool: &PgPool, external_id: &ExternalId) -> sqlx::Result<Option<User>> {
    let row: Option<UserRow> = sqlx::query_as(FIND).bind(external_id.as_str()).fetch_optional(pool).await?;
    row.map(UserRow::into_user).transpose()
}

pub async fn recall(pool: &PgPool, claim: &Claim) -> sqlx::Result<Option<Remembered>> {
    let row: Option<RememberedRow> = sqlx::query_as(RECALL).bind(claim.key.as_slice()).fetch_optional(pool).await?;
    row.map(RememberedRow::into_remembered).transpose()
}

/// False when the key was remembered before.
pub async fn remember(
    pool: &PgPool,
    claim: &Claim,
    outcome: Outcome,
    user: UserId,
    version: Version,
) -> sqlx::Result<bool> {
    sqlx::query(REMEMBER)
        .bind(claim.key.as_slice())
        .bind(claim.salt.as_slice())
        .bind(claim.fingerprint.as_slice())
        .bind(outcome.as_str())
        .bind(user.0)
        .bind(version)
        .execute(pool)
        .await
        .map(|done| done.rows_affected() == 1)
}

/// How many went. `now`: by our clock.
pub async fn purge(connection: &mut PgConnection, limit: i64, now: OffsetDateTime) -> sqlx::Result<u64> {
    Ok(sqlx::query(PURGE).bind(limit).bind(now).execute(connection).await?.rows_affected())
}

#[derive(sqlx::FromRow)]
struct RememberedRow {
    salt: Vec<u8>,
    fingerprint: Option<Vec<u8>>,
    outcome: String,
    user_id: Uuid,
    version: i64,
    kept_at: OffsetDateTime,
}

impl RememberedRow {
    fn into_remembered(self) -> sqlx::Result<Remembered> {
        let fits = || impossible("an idempotency key with a hash of another length");
        Ok(Remembered {
            salt: self.salt.try_into().map_err(|_| fits())?,
            fingerprint: self.fingerprint.map(|hash| hash.try_into().map_err(|_| fits())).transpose()?,
            outcome: Outcome::from_kept(&self.outcome).ok_or_else(|| impossible("an outcome that there is none of"))?,
            user_id: UserId(self.user_id),
            version: self.version,
            at: self.kept_at,
        })
    }
}

#[derive(sqlx::FromRow)]
struct KeptRow {
    user_id: Uuid,
    is_kept: bool,
    is_taken: bool,
    at: OffsetDateTime,
    told: Option<Vec<OutboxId>>,
    version: Option<i64>,
    profile: Option<Json<Box<RawValue>>>,
    external_id: Option<String>,
    created_at: Option<OffsetDateTime>,
    updated_at: Option<OffsetDateTime>,
    deleted_at: Option<OffsetDateTime>,
}

impl KeptRow {
    fn into_kept(self) -> sqlx::Result<Kept> {
        let (is_taken, at) = (self.is_taken, self.at);
        if self.is_kept {
            return Ok(Kept::Done { at });
        }
        let now = self.into_user().map(UserRow::into_record).transpose()?;
        Ok(if is_taken { Kept::Taken(now) } else { Kept::Moved(now) })
    }

    fn into_user(self) -> Option<UserRow> {
        let Self { user_id: id, version, profile, external_id, created_at, updated_at, deleted_at, .. } = self;
        Some(UserRow { id, version: version?, profile, external_id, created_at, updated_at, deleted_at })
    }
}

#[derive(sqlx::FromRow)]
struct UserRow {
    id: Uuid,
    version: i64,
    profile: Option<Json<Box<RawValue>>>,
    external_id: Option<String>,
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
                let external_id = self.external_id.map(ExternalId::from_kept);
                let profile = Profile::from_kept(profile);
                Ok(Record::Living(User { id, version, created_at, updated_at, external_id, profile }))
            }
            _ => Err(impossible("a living user without profile or times")),
        }
    }

    fn into_user(self) -> sqlx::Result<User> {
        match self.into_record()? {
            Record::Living(user) => Ok(user),
            Record::Deleted(_) => Err(impossible("a tombstone among the living")),
        }
    }
}

/// A row that the table's constraints rule out.
fn impossible(what: &str) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}
