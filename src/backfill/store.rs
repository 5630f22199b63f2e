//! The SQL of backfills, and all of it. Of users it reads ids, versions and times, never a profile.

use sqlx::{PgConnection, PgExecutor, PgPool};
use tidings_sdk::subscription::{Subscription, SubscriptionName};
use time::OffsetDateTime;
use uuid::Uuid;

use super::model::{Backfill, Passed, Plan, State, WaitingFor, Whom};

pub const KNOWN: &str = "
select exists (select from subscriptions where name = $1)
";

/// Starts a backfill in place of an earlier one that is over; no row when one is under way.
pub const START: &str = "
insert into backfills (subscription, id, state, user_ids, changed_since, rate_per_s, max_waiting, up_to, total, total_is_estimate)
select $1, $2, 'running', $3, $4, $5, $6,
       coalesce((select id from users order by id desc limit 1), '00000000-0000-0000-0000-000000000000'),
       coalesce(cardinality($3::uuid[]), case when counted.users < $7 then counted.users else greatest(counted.users, estimate.users) end),
       $3 is null and counted.users >= $7
  from (select count(*) as users from (select from users limit $7) as first_rows) as counted,
       (select reltuples::bigint as users from pg_class where oid = 'users'::regclass) as estimate
on conflict (subscription) do update
   set id = excluded.id, state = 'running', waiting_for = null, user_ids = excluded.user_ids, changed_since = excluded.changed_since,
       rate_per_s = excluded.rate_per_s, max_waiting = excluded.max_waiting, cursor = null, up_to = excluded.up_to,
       sent = 0, skipped = 0, total = excluded.total, total_is_estimate = excluded.total_is_estimate,
       started_at = now(), finished_at = null, updated_at = now()
 where backfills.state in ('done', 'cancelled')
returning id
";

/// Begins a backfill anew that has told, or was to tell, what was lost since $3: in one with whoever changed since then.
pub const BEGIN_ANEW: &str = "
update backfills
   set id = $2, state = 'running', waiting_for = null,
       -- Everybody stays everybody.
       changed_since = case when user_ids is not null or changed_since is not null then least(changed_since, $3) end,
       cursor = null,
       up_to = coalesce((select id from users order by id desc limit 1), '00000000-0000-0000-0000-000000000000'),
       sent = 0, skipped = 0,
       total = case when counted.users < $4 then counted.users else greatest(counted.users, estimate.users) end,
       total_is_estimate = counted.users >= $4,
       started_at = now(), finished_at = null, updated_at = now()
  from (select count(*) as users from (select from users limit $4) as first_rows) as counted,
       (select reltuples::bigint as users from pg_class where oid = 'users'::regclass) as estimate
 where subscription = $1
   and (state in ('running', 'paused') or (state = 'done' and finished_at >= $3))
returning id
";

/// Users counted one by one before [`START`] and [`BEGIN_ANEW`] estimate.
const COUNT_LIMIT: i64 = 100_000;

pub const FIND: &str = "
select id, state, case when state = 'running' then waiting_for end as waiting_for, rate_per_s, max_waiting, changed_since, sent, skipped, total, total_is_estimate, started_at, finished_at
  from backfills
 where subscription = $1
";

/// Moves a backfill from one of the states $2 to $3; no row when it is in another.
pub const TURN: &str = "
update backfills
   set state = $3,
       -- Who walks has told it, and tells it anew only when it is another thing: also when he heard nothing of a pause that was short.
       waiting_for = case when $3 <> 'cancelled' then waiting_for end,
       rate_per_s = coalesce($4, rate_per_s),
       finished_at = case when $3 = 'cancelled' then coalesce(finished_at, now()) end,
       updated_at = now()
 where subscription = $1
   and state = any($2)
returning id
";

/// Everything that is to be carried on, the oldest first.
pub const RUNNING: &str = "
select b.subscription, b.id, b.user_ids, b.changed_since, b.rate_per_s, b.max_waiting, b.cursor, b.up_to, b.waiting_for,
       s.routing_keys, s.fields
  from backfills b
  join subscriptions s on s.name = b.subscription
 where b.state = 'running'
 order by b.started_at, b.subscription
";

/// The next users past a place, living and dead.
pub const WALK: &str = "
select id as user_id, version, coalesce(updated_at, deleted_at) as at, deleted_at is not null as is_deleted
  from users
 where id > $1
   and id <= $2
 order by id
 limit $3
";

/// Those of these ids that there are.
pub const THESE: &str = "
select id as user_id, version, coalesce(updated_at, deleted_at) as at, deleted_at is not null as is_deleted
  from users
 where id = any($1)
 order by id
";

/// Notes how far it is: only on top of what this runner noted before, so that one that was frozen cannot turn back its successor.
pub const MOVE_ON: &str = "
update backfills
   set cursor = $3,
       sent = sent + $4,
       skipped = skipped + $5,
       waiting_for = null,
       updated_at = now()
 where id = $1
   and cursor is not distinct from $2
   and state <> 'done'
";

pub const FINISH: &str = "
update backfills
   set state = 'done',
       waiting_for = null,
       total = sent + skipped,
       total_is_estimate = false,
       finished_at = now(),
       updated_at = now()
 where id = $1
   and state = 'running'
";

pub const WAIT: &str = "
update backfills
   set waiting_for = $2,
       updated_at = now()
 where id = any($1)
   and state = 'running'
   and waiting_for is distinct from $2
";

/// A backfill that is to be carried on.
#[derive(Debug, Clone)]
pub struct Running {
    pub id: Uuid,
    pub subscription: Subscription,
    /// In order; `None`: every user.
    pub user_ids: Option<Vec<Uuid>>,
    /// Only who changed since then; with `user_ids` these besides.
    pub changed_since: Option<OffsetDateTime>,
    pub rate_per_s: i32,
    pub max_waiting: i32,
    pub cursor: Option<Uuid>,
    pub up_to: Uuid,
    pub waiting_for: Option<WaitingFor>,
}

pub async fn is_known(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<bool> {
    sqlx::query_scalar(KNOWN).bind(name.as_str()).fetch_one(pool).await
}

/// False when one is under way.
pub async fn start<'e>(on: impl PgExecutor<'e>, name: &SubscriptionName, plan: &Plan) -> sqlx::Result<bool> {
    let (user_ids, changed_since) = match &plan.users {
        Whom::All => (None, None),
        Whom::These(ids) => (Some(ids), None),
        Whom::ChangedSince(since) => (None, Some(since)),
    };
    let start = sqlx::query(START).bind(name.as_str()).bind(Uuid::now_v7()).bind(user_ids).bind(changed_since);
    let started = start.bind(plan.rate_per_s).bind(plan.max_waiting).bind(COUNT_LIMIT).fetch_all(on).await?;
    Ok(!started.is_empty())
}

/// False when there is none to begin anew.
pub async fn begin_anew(
    connection: &mut PgConnection,
    name: &SubscriptionName,
    since: OffsetDateTime,
) -> sqlx::Result<bool> {
    let begin = sqlx::query(BEGIN_ANEW).bind(name.as_str()).bind(Uuid::now_v7()).bind(since).bind(COUNT_LIMIT);
    Ok(!begin.fetch_all(connection).await?.is_empty())
}

pub async fn find(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<Option<Backfill>> {
    let found: Option<Row> = sqlx::query_as(FIND).bind(name.as_str()).fetch_optional(pool).await?;
    found.map(Row::into_backfill).transpose()
}

/// False when it is in none of the states `from`.
pub async fn turn(
    pool: &PgPool,
    name: &SubscriptionName,
    from: &[&str],
    to: &str,
    rate_per_s: Option<i32>,
) -> sqlx::Result<bool> {
    let turn = sqlx::query(TURN).bind(name.as_str()).bind(from).bind(to).bind(rate_per_s);
    Ok(!turn.fetch_all(pool).await?.is_empty())
}

pub async fn running(connection: &mut PgConnection) -> sqlx::Result<Vec<Running>> {
    let rows: Vec<RunningRow> = sqlx::query_as(RUNNING).fetch_all(connection).await?;
    rows.into_iter().map(RunningRow::into_running).collect()
}

pub async fn walk(connection: &mut PgConnection, past: Uuid, up_to: Uuid, limit: usize) -> sqlx::Result<Vec<Passed>> {
    sqlx::query_as(WALK).bind(past).bind(up_to).bind(limit as i64).fetch_all(connection).await
}

pub async fn these(connection: &mut PgConnection, ids: &[Uuid]) -> sqlx::Result<Vec<Passed>> {
    sqlx::query_as(THESE).bind(ids).fetch_all(connection).await
}

/// False when somebody else moved it meanwhile.
pub async fn move_on(
    connection: &mut PgConnection,
    id: Uuid,
    from: Option<Uuid>,
    to: Option<Uuid>,
    sent: i64,
    skipped: i64,
) -> sqlx::Result<bool> {
    let moved = sqlx::query(MOVE_ON).bind(id).bind(from).bind(to).bind(sent).bind(skipped).execute(connection).await?;
    Ok(moved.rows_affected() == 1)
}

pub async fn finish(connection: &mut PgConnection, id: Uuid) -> sqlx::Result<()> {
    sqlx::query(FINISH).bind(id).execute(connection).await.map(drop)
}

pub async fn wait(connection: &mut PgConnection, ids: &[Uuid], why: WaitingFor) -> sqlx::Result<()> {
    sqlx::query(WAIT).bind(ids).bind(why.as_str()).execute(connection).await.map(drop)
}

#[derive(sqlx::FromRow)]
struct Row {
    id: Uuid,
    state: String,
    waiting_for: Option<String>,
    rate_per_s: i32,
    max_waiting: i32,
    changed_since: Option<OffsetDateTime>,
    sent: i64,
    skipped: i64,
    total: i64,
    total_is_estimate: bool,
    started_at: OffsetDateTime,
    finished_at: Option<OffsetDateTime>,
}

impl Row {
    fn into_backfill(self) -> sqlx::Result<Backfill> {
        let waiting_for = self.waiting_for.as_deref().and_then(WaitingFor::from_name);
        let state = match self.state.as_str() {
            "running" if waiting_for.is_some() => State::Waiting,
            "running" => State::Running,
            "paused" => State::Paused,
            "done" => State::Done,
            "cancelled" => State::Cancelled,
            _ => return Err(sqlx::Error::Decode("a backfill in an unknown state".into())),
        };
        Ok(Backfill {
            id: self.id,
            state,
            waiting_for,
            rate_per_s: self.rate_per_s,
            max_waiting: self.max_waiting,
            changed_since: self.changed_since,
            sent: self.sent,
            skipped: self.skipped,
            total: self.total,
            total_is_estimate: self.total_is_estimate,
            started_at: self.started_at,
            finished_at: self.finished_at,
        })
    }
}

#[derive(sqlx::FromRow)]
struct RunningRow {
    subscription: String,
    id: Uuid,
    user_ids: Option<Vec<Uuid>>,
    changed_since: Option<OffsetDateTime>,
    rate_per_s: i32,
    max_waiting: i32,
    cursor: Option<Uuid>,
    up_to: Uuid,
    waiting_for: Option<String>,
    routing_keys: Vec<String>,
    fields: Vec<String>,
}

impl RunningRow {
    fn into_running(self) -> sqlx::Result<Running> {
        let Self { id, user_ids, changed_since, rate_per_s, max_waiting, cursor, up_to, .. } = self;
        let subscription = Subscription {
            name: self.subscription.parse().map_err(decode)?,
            keys: self.routing_keys.iter().map(|key| key.parse()).collect::<Result<_, _>>().map_err(decode)?,
            fields: self.fields.iter().map(|field| field.parse()).collect::<Result<_, _>>().map_err(decode)?,
        };
        let waiting_for = self.waiting_for.as_deref().and_then(WaitingFor::from_name);
        Ok(Running { id, subscription, user_ids, changed_since, rate_per_s, max_waiting, cursor, up_to, waiting_for })
    }
}

fn decode(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}
