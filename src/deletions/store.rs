//! The SQL of deletion receipts, and all of it. Tombstones are written with the users (`users::store`).

use std::{sync::Arc, time::Duration};

use sqlx::{PgConnection, PgExecutor, PgPool};
use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;
use uuid::Uuid;

use super::model::{Confirmation, Deletion, How, Lateness, Overdue, Place, Recorded, State};

/// The session settings that suit these statements: each finds rows by key, or walks an index from a place on, in a table of any size.
pub const BY_INDEX: [(&str, &str); 6] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// Notes from when on, or until when, a subscription is told of deletions. Does nothing when that is so already.
pub const DUTY: &str = "
with ended as (
  update deletion_duties
     -- A clock that was set back ends none before it began.
     set until = greatest(now(), since)
   where subscription = $1
     and until is null
     and not $2
)
insert into deletion_duties (subscription)
select $1
 where $2
   and not exists (select from deletion_duties where subscription = $1 and until is null)
on conflict do nothing
";

/// Keeps a batch of receipts, and says of each what there was to confirm.
pub const RECORD: &str = "
with asked as (
  select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[])
    with ordinality as asked (user_id, subscription, how, client, place)
),
judged as (
  select asked.user_id, asked.subscription, asked.how, asked.place, users.version, users.deleted_at,
         subscriptions.name is not null as is_registered
    from asked
    left join users on users.id = asked.user_id
    left join subscriptions
      on subscriptions.name = asked.subscription
     -- Null: an administrator, or observed.
     and (asked.client is null or subscriptions.client = asked.client)
),
kept as (
  insert into deletion_receipts (user_id, subscription, deleted_at, confirmed_at, how)
  -- Each row once, and two instances in the same order.
  select distinct on (user_id, subscription) user_id, subscription, deleted_at, now(), how
    from judged
   where deleted_at is not null
     and is_registered
     -- Said already: not even a lock on the row.
     and not exists (
       select
         from deletion_receipts as held
        where held.user_id = judged.user_id
          and held.subscription = judged.subscription
          and (held.how = 'receipt' or held.how = judged.how)
     )
   -- Of two the stronger: 'receipt' sorts after 'fetched'.
   order by user_id, subscription, how desc
  on conflict (user_id, subscription) do update
     set confirmed_at = excluded.confirmed_at, how = excluded.how
   where deletion_receipts.how is null
      or (deletion_receipts.how = 'fetched' and excluded.how = 'receipt')
)
select version, deleted_at, is_registered
  from judged
 order by place
";

/// A user, with those who have to confirm his deletion and those who have.
pub const FIND: &str = "
select users.version, users.deleted_at, now() as as_of, concerned.subscription, receipt.confirmed_at, receipt.how
  from users
  left join lateral (
    select duty.subscription
      from deletion_duties as duty
     where duty.since <= users.deleted_at
       and (duty.until is null or duty.until > users.deleted_at)
    union
    select confirmed.subscription
      from deletion_receipts as confirmed
     where confirmed.user_id = users.id
       and confirmed.confirmed_at is not null
  ) as concerned on true
  left join deletion_receipts as receipt
    on receipt.user_id = users.id
   and receipt.subscription = concerned.subscription
   and receipt.confirmed_at is not null
 where users.id = $1
 order by concerned.subscription
";

/// Writes down who is late with the next deletions that are older than the deadline. Gives nothing back when there are none.
pub const LATE: &str = "
with passed as materialized (
  select deleted_at, id
    from users
   where deleted_at is not null
     and (deleted_at, id) > ($1::timestamptz, $2::uuid)
     and deleted_at <= now() - make_interval(secs => $3)
   order by deleted_at, id
   limit $4
),
late as (
  insert into deletion_receipts (user_id, subscription, deleted_at)
  select passed.id, duty.subscription, passed.deleted_at
    from passed
    join deletion_duties as duty
      on duty.since <= passed.deleted_at
     and (duty.until is null or duty.until > passed.deleted_at)
   where not exists (
     select
       from deletion_receipts as held
      where held.user_id = passed.id
        and held.subscription = duty.subscription
   )
   order by passed.id, duty.subscription
  -- Confirmed this very moment.
  on conflict (user_id, subscription) do nothing
  returning subscription
)
select deleted_at, id, (select count(*) from passed) as passed, (select count(*) from late) as late
  from passed
 order by deleted_at desc, id desc
 limit 1
";

pub const LOOKED_AT: &str = "
select deleted_at, user_id
  from deletions_looked_at
";

/// Moves on, and not past what may still be committed: `deleted_at` is when the deletion began.
pub const LOOKED: &str = "
update deletions_looked_at
   set deleted_at = least($1::timestamptz, now() - make_interval(secs => $3)),
       user_id = case when $1 <= now() - make_interval(secs => $3) then $2::uuid else '00000000-0000-0000-0000-000000000000'::uuid end
 where deleted_at < least($1, now() - make_interval(secs => $3))
";

/// Takes away what subscriptions owed that are not there any more, or were registered anew since. Looks at the oldest of each
/// subscription alone, however much the others owe.
pub const RELEASE: &str = "
with recursive owing as (
  (
    select subscription, deleted_at
      from deletion_receipts
     where confirmed_at is null
     order by subscription, deleted_at
     limit 1
  )
  union all
  select next.subscription, next.deleted_at
    from owing
   cross join lateral (
     select subscription, deleted_at
       from deletion_receipts
      where confirmed_at is null
        and subscription > owing.subscription
      order by subscription, deleted_at
      limit 1
   ) as next
),
released as (
  select owing.subscription, coalesce(min(duty.since), 'infinity') as before
    from owing
    left join deletion_duties as duty on duty.subscription = owing.subscription
   group by owing.subscription, owing.deleted_at
  having owing.deleted_at < coalesce(min(duty.since), 'infinity')
),
doomed as (
  select late.user_id, late.subscription
    from released
   cross join lateral (
     select user_id, subscription
       from deletion_receipts
      where confirmed_at is null
        and subscription = released.subscription
        and deleted_at < released.before
      order by deleted_at
      limit $1
   ) as late
)
delete from deletion_receipts
 using doomed
 where deletion_receipts.user_id = doomed.user_id
   and deletion_receipts.subscription = doomed.subscription
   and deletion_receipts.confirmed_at is null
";

/// A page of deletions that somebody is late with, the oldest first.
pub const OVERDUE: &str = "
select page.deleted_at, page.user_id, page.subscriptions, users.version
  from (
    select late.deleted_at, late.user_id, array_agg(late.subscription order by late.subscription) as subscriptions
      from deletion_receipts as late
     where late.confirmed_at is null
       and (late.deleted_at, late.user_id) > ($1::timestamptz, $2::uuid)
       and late.deleted_at <= now() - make_interval(secs => $3)
       and exists (
         select
           from deletion_duties as duty
          where duty.subscription = late.subscription
            and duty.since <= late.deleted_at
       )
     group by late.deleted_at, late.user_id
     order by late.deleted_at, late.user_id
     limit $4
  ) as page
  join users on users.id = page.user_id
 order by page.deleted_at, page.user_id
";

/// How late each subscription is that is, or was, told of deletions. Counted up to a limit: the cost of looking must not grow with
/// the trouble.
pub const LATENESS: &str = "
select duty.subscription,
       (
         select count(*)
           from (
             select
               from deletion_receipts as late
              where late.subscription = duty.subscription
                and late.confirmed_at is null
                and late.deleted_at >= duty.since
                and late.deleted_at <= now() - make_interval(secs => $1)
              limit $2
           ) as first_ones
       ) as overdue,
       coalesce((
         select extract(epoch from now() - late.deleted_at)::double precision
           from deletion_receipts as late
          where late.subscription = duty.subscription
            and late.confirmed_at is null
            and late.deleted_at >= duty.since
            and late.deleted_at <= now() - make_interval(secs => $1)
          order by late.deleted_at
          limit 1
       ), 0) as oldest_seconds
  from (select subscription, min(since) as since from deletion_duties group by subscription) as duty
 order by duty.subscription
";

/// Late deletions of one subscription that [`LATENESS`] counts; more show as this many.
const COUNT_LIMIT: i64 = 10_000;
/// A deletion is committed, or given up, within this time after it began: the writer's statements end after 5 s.
const COMMITTED_AFTER_S: f64 = 60.0;

/// Whether a subscription has not confirmed a deletion whose deadline has passed.
pub const IS_LATE: &str = "
select exists (select from deletion_receipts where subscription = $1 and confirmed_at is null)
";

pub async fn is_late<'e>(on: impl PgExecutor<'e>, name: &SubscriptionName) -> sqlx::Result<bool> {
    sqlx::query_scalar(IS_LATE).bind(name.as_str()).fetch_one(on).await
}

pub async fn settle_duty<'e>(
    on: impl PgExecutor<'e>,
    name: &SubscriptionName,
    hears_deletions: bool,
) -> sqlx::Result<()> {
    sqlx::query(DUTY).bind(name.as_str()).bind(hears_deletions).execute(on).await.map(drop)
}

/// A receipt as it was given.
#[derive(Debug, Clone)]
pub struct Asked {
    pub user_id: Uuid,
    pub subscription: SubscriptionName,
    /// Who has to stand for the subscription; `None` when that is known.
    pub client: Option<Arc<str>>,
    pub how: How,
}

/// Keeps a batch; the answers are in its order.
pub async fn record<'a>(
    connection: &mut PgConnection,
    batch: impl Iterator<Item = &'a Asked> + Clone,
) -> sqlx::Result<Vec<Recorded>> {
    let rows: Vec<(Option<i64>, Option<OffsetDateTime>, bool)> = sqlx::query_as(RECORD)
        .bind(batch.clone().map(|asked| asked.user_id).collect::<Vec<_>>())
        .bind(batch.clone().map(|asked| asked.subscription.as_str()).collect::<Vec<_>>())
        .bind(batch.clone().map(|asked| asked.how.as_str()).collect::<Vec<_>>())
        .bind(batch.map(|asked| asked.client.as_deref()).collect::<Vec<_>>())
        .fetch_all(connection)
        .await?;
    let judge = |(version, deleted_at, is_registered)| match (version, deleted_at, is_registered) {
        (_, _, false) => Recorded::UnknownSubscription,
        (None, ..) => Recorded::UnknownUser,
        (Some(version), None, true) => Recorded::Living(version),
        (Some(_), Some(_), true) => Recorded::Kept,
    };
    Ok(rows.into_iter().map(judge).collect())
}

/// What is kept under an id.
#[derive(Debug)]
pub enum Found {
    Deletion(Deletion),
    /// A user at this version, who lives.
    Living(i64),
    Nobody,
}

#[derive(sqlx::FromRow)]
struct Row {
    version: i64,
    deleted_at: Option<OffsetDateTime>,
    as_of: OffsetDateTime,
    subscription: Option<String>,
    confirmed_at: Option<OffsetDateTime>,
    how: Option<String>,
}

pub async fn find(pool: &PgPool, user_id: Uuid, deadline: Duration) -> sqlx::Result<Found> {
    let rows: Vec<Row> = sqlx::query_as(FIND).bind(user_id).fetch_all(pool).await?;
    let Some(&Row { version, deleted_at, .. }) = rows.first() else { return Ok(Found::Nobody) };
    let Some(deleted_at) = deleted_at else { return Ok(Found::Living(version)) };
    let confirmations = rows.into_iter().filter_map(|row| {
        let state = match (row.confirmed_at, row.how.as_deref().and_then(How::from_name)) {
            (Some(at), Some(how)) => State::Confirmed { at, how },
            _ => State::owed(deleted_at, deadline, row.as_of),
        };
        Some(Confirmation { subscription: row.subscription?, state })
    });
    Ok(Found::Deletion(Deletion { user_id, version, deleted_at, confirmations: confirmations.collect() }))
}

pub async fn overdue(pool: &PgPool, after: Place, deadline: Duration, limit: i64) -> sqlx::Result<Vec<Overdue>> {
    let page = sqlx::query_as(OVERDUE).bind(after.deleted_at).bind(after.user_id).bind(deadline.as_secs_f64());
    let rows: Vec<(OffsetDateTime, Uuid, Vec<String>, i64)> = page.bind(limit).fetch_all(pool).await?;
    let row = |(deleted_at, user_id, subscriptions, version)| Overdue { user_id, version, deleted_at, subscriptions };
    Ok(rows.into_iter().map(row).collect())
}

pub async fn lateness(pool: &PgPool, deadline: Duration) -> sqlx::Result<Vec<Lateness>> {
    let rows: Vec<(String, i64, f64)> =
        sqlx::query_as(LATENESS).bind(deadline.as_secs_f64()).bind(COUNT_LIMIT).fetch_all(pool).await?;
    let row = |(subscription, overdue, oldest_seconds)| Lateness { subscription, overdue, oldest_seconds };
    Ok(rows.into_iter().map(row).collect())
}

pub async fn looked_at(connection: &mut PgConnection) -> sqlx::Result<Place> {
    let (deleted_at, user_id) = sqlx::query_as(LOOKED_AT).fetch_one(connection).await?;
    Ok(Place { deleted_at, user_id })
}

/// Deletions that were looked at, and what came of it.
#[derive(Debug)]
pub struct Looked {
    pub last: Place,
    pub passed: i64,
    /// Confirmations found missing.
    pub late: i64,
}

pub async fn late(
    connection: &mut PgConnection,
    after: Place,
    deadline: Duration,
    limit: i64,
) -> sqlx::Result<Option<Looked>> {
    let late = sqlx::query_as(LATE).bind(after.deleted_at).bind(after.user_id).bind(deadline.as_secs_f64());
    let rows: Vec<(OffsetDateTime, Uuid, i64, i64)> = late.bind(limit).fetch_all(connection).await?;
    let looked = |(deleted_at, user_id, passed, late)| Looked { last: Place { deleted_at, user_id }, passed, late };
    Ok(rows.into_iter().next().map(looked))
}

pub async fn looked(connection: &mut PgConnection, up_to: Place) -> sqlx::Result<()> {
    let looked = sqlx::query(LOOKED).bind(up_to.deleted_at).bind(up_to.user_id).bind(COMMITTED_AFTER_S);
    looked.execute(connection).await.map(drop)
}

pub async fn release(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    Ok(sqlx::query(RELEASE).bind(limit).execute(connection).await?.rows_affected())
}
