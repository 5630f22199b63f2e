//! The SQL of the registry, and all of it.

use std::{collections::BTreeSet, str::FromStr, time::Duration};

use sqlx::PgConnection;
use tidings_sdk::subscription::{Subscription, SubscriptionName};
use time::OffsetDateTime;

use super::model::{Registered, Registration, Seen};

/// Subscriptions at one time.
pub const MOST: i64 = 1_000;
/// Of one client that is no administrator.
pub const MOST_OF_ONE: i64 = 100;

/// One subscription, or all of them by name.
pub const FIND: &str = "
select name, routing_keys, fields, owner, purpose, created_at, updated_at, revision, declared_revision, bound_keys, bound_fields,
       has_fields_exchange, expires_after_s, client, unattended_since, consumer_seen_at, waiting_since, last_activity_at, lost_at, missing_since, recovered_at,
       expiry_warned_at,
       -- Collected already; those that lie in NAME.dead come on top. Counted as far as anybody reads.
       (select count(*) from (select from dead_letters where subscription = name limit 100000) as first_ones) as dead_letters,
       now() as as_of
  from subscriptions
 where $1::text is null or name = $1
 order by name
 limit $2
";

/// Registers. Gives nothing back when another owner or client has the name, or when there are too many.
pub const PUT: &str = "
insert into subscriptions as held
       (name, routing_keys, fields, owner, purpose, expires_after_s, bound_keys, bound_fields, client)
select $1, $2, $3, $4, $5, $6, $2, $3, $8
 where exists (select from subscriptions where name = $1)
    or ((select count(*) from subscriptions) < $7
        and ($9 or (select count(*) from subscriptions where client = $8) < $10))
on conflict (name) do update
   set routing_keys = excluded.routing_keys,
       fields = excluded.fields,
       purpose = excluded.purpose,
       expires_after_s = excluded.expires_after_s,
       client = coalesce(excluded.client, held.client),
       -- What was bound stays so until it is unbound.
       bound_keys = array(select distinct unnest(held.bound_keys || excluded.routing_keys)),
       bound_fields = array(select distinct unnest(held.bound_fields || excluded.fields)),
       revision = held.revision + 1,
       updated_at = now(),
       -- Counted anew from a new wish.
       expiry_warned_at = null
 where held.owner = excluded.owner
   -- An operator may, a client only what it stands for.
   and ($9 or held.client = excluded.client)
returning revision
";

/// The broker has this revision, and nothing else is bound. Not so while news is missing of which who declared it does not know: it was
/// noted meanwhile, and the next who declares makes it good.
pub const MARK_DECLARED: &str = "
update subscriptions
   set declared_revision = revision, bound_keys = routing_keys, bound_fields = fields,
       has_fields_exchange = cardinality(fields) > 0
 where name = $1 and revision = $2
   and (declared_revision > 0 or missing_since is not distinct from $3)
";

/// Takes a registration back that the broker refused: to what it was before, if it was there.
pub const TAKE_BACK: &str = "
update subscriptions
   set routing_keys = $3, fields = $4, purpose = $5, expires_after_s = $6, updated_at = $7, client = $8
 where name = $1 and revision = $2
";

pub const FORGET: &str = "
delete from subscriptions
 where name = $1 and revision = $2
";

/// For one change of one subscription at a time, whichever instance makes it.
pub const LOCK: &str = "
select pg_advisory_lock($1, hashtext($2))
";

pub const UNLOCK: &str = "
select pg_advisory_unlock($1, hashtext($2))
";

/// What the watch has seen, of the registrations that it looked at.
pub const OBSERVE: &str = "
update subscriptions
   set unattended_since = seen.unattended_since,
       consumer_seen_at = seen.consumer_seen_at,
       waiting_since = seen.waiting_since,
       last_activity_at = seen.last_activity_at,
       expiry_warned_at = seen.expiry_warned_at
  from unnest($1::text[], $2::bigint[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[], $7::timestamptz[])
    as seen (name, revision, unattended_since, consumer_seen_at, waiting_since, last_activity_at, expiry_warned_at)
 where subscriptions.name = seen.name and subscriptions.revision = seen.revision
";

/// A queue that the broker had is gone, or none of them is bound any more. A loss that was not made good goes on since it began.
pub const MARK_LOST: &str = "
update subscriptions
   set lost_at = now(),
       missing_since = case
         when lost_at is not null and (recovered_at is null or recovered_at < lost_at) then missing_since
         -- What lay in it is missing too. It was last seen by itself or when all were, unless it came later.
         else least(waiting_since, greatest(seen_at, (select looked_at from subscriptions_looked_at), created_at))
       end,
       declared_revision = 0
 where ($1::text is null or name = $1) and declared_revision > 0
returning missing_since
";

/// What was lost was made good.
pub const RECOVERED: &str = "
update subscriptions
   set recovered_at = now()
 where name = $1
";

/// When the watch has seen all queues.
pub const LOOKED: &str = "
insert into subscriptions_looked_at (looked_at) values ($1)
on conflict (only_row) do update set looked_at = excluded.looked_at
";

/// When it has seen these, while others are kept from its sight.
pub const SAW: &str = "
update subscriptions
   set seen_at = $2
 where name = any($1)
";

/// Space of those locks among the advisory locks of a database: "subs" in ASCII.
const LOCK_SPACE: i32 = 0x73_75_62_73;

pub async fn lock(connection: &mut PgConnection, name: &SubscriptionName) -> sqlx::Result<()> {
    sqlx::query(LOCK).bind(LOCK_SPACE).bind(name.as_str()).execute(connection).await.map(drop)
}

pub async fn find<'e>(
    from: impl sqlx::PgExecutor<'e>,
    name: Option<&SubscriptionName>,
) -> sqlx::Result<Vec<Registered>> {
    let name = name.map(SubscriptionName::as_str);
    let rows: Vec<Row> = sqlx::query_as(FIND).bind(name).bind(MOST).fetch_all(from).await?;
    rows.into_iter().map(Row::into_registered).collect()
}

/// The new revision; `None` when it may not be registered.
pub async fn put(connection: &mut PgConnection, wish: &Registration, by_operator: bool) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(PUT)
        .bind(wish.subscription.name.as_str())
        .bind(texts(&wish.subscription.keys))
        .bind(texts(&wish.subscription.fields))
        .bind(&wish.owner)
        .bind(&wish.purpose)
        .bind(wish.expires_after.map(seconds))
        .bind(MOST)
        .bind(&wish.client)
        .bind(by_operator)
        .bind(MOST_OF_ONE)
        .fetch_optional(connection)
        .await
}

pub async fn mark_declared(
    connection: &mut PgConnection,
    name: &SubscriptionName,
    revision: i64,
    owed_since: Option<OffsetDateTime>,
) -> sqlx::Result<bool> {
    let marked =
        sqlx::query(MARK_DECLARED).bind(name.as_str()).bind(revision).bind(owed_since).execute(connection).await?;
    Ok(marked.rows_affected() == 1)
}

pub async fn take_back(connection: &mut PgConnection, before: &Registered, revision: i64) -> sqlx::Result<()> {
    let wish = &before.registration;
    sqlx::query(TAKE_BACK)
        .bind(before.name().as_str())
        .bind(revision)
        .bind(texts(&wish.subscription.keys))
        .bind(texts(&wish.subscription.fields))
        .bind(&wish.purpose)
        .bind(wish.expires_after.map(seconds))
        .bind(before.updated_at)
        .bind(&wish.client)
        .execute(connection)
        .await
        .map(drop)
}

pub async fn forget(connection: &mut PgConnection, name: &SubscriptionName, revision: i64) -> sqlx::Result<bool> {
    let forgotten = sqlx::query(FORGET).bind(name.as_str()).bind(revision).execute(connection).await?;
    Ok(forgotten.rows_affected() == 1)
}

pub async fn unlock(connection: &mut PgConnection, name: &SubscriptionName) -> sqlx::Result<()> {
    sqlx::query(UNLOCK).bind(LOCK_SPACE).bind(name.as_str()).execute(connection).await.map(drop)
}

/// Since when news may be missing; `None` when the broker was not known to have it.
pub async fn mark_lost(connection: &mut PgConnection, name: &SubscriptionName) -> sqlx::Result<Option<OffsetDateTime>> {
    sqlx::query_scalar(MARK_LOST).bind(name.as_str()).fetch_optional(connection).await
}

/// The same of all; how many there are.
pub async fn mark_all_lost(connection: &mut PgConnection) -> sqlx::Result<u64> {
    Ok(sqlx::query(MARK_LOST).bind(None::<&str>).execute(connection).await?.rows_affected())
}

/// False when it is not registered.
pub async fn recovered<'e>(on: impl sqlx::PgExecutor<'e>, name: &SubscriptionName) -> sqlx::Result<bool> {
    Ok(sqlx::query(RECOVERED).bind(name.as_str()).execute(on).await?.rows_affected() == 1)
}

pub async fn looked(connection: &mut PgConnection, at: OffsetDateTime) -> sqlx::Result<()> {
    sqlx::query(LOOKED).bind(at).execute(connection).await.map(drop)
}

pub async fn saw(connection: &mut PgConnection, names: &[&SubscriptionName], at: OffsetDateTime) -> sqlx::Result<()> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    sqlx::query(SAW).bind(names).bind(at).execute(connection).await.map(drop)
}

/// Keeps what the watch has seen.
pub async fn observe(connection: &mut PgConnection, rows: &[Registered]) -> sqlx::Result<()> {
    let times = |of: fn(&Seen) -> Option<OffsetDateTime>| rows.iter().map(|row| of(&row.seen)).collect::<Vec<_>>();
    sqlx::query(OBSERVE)
        .bind(rows.iter().map(|row| row.name().to_string()).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.revision).collect::<Vec<_>>())
        .bind(times(|seen| seen.unattended_since))
        .bind(times(|seen| seen.consumer_seen_at))
        .bind(times(|seen| seen.waiting_since))
        .bind(times(|seen| seen.last_activity_at))
        .bind(times(|seen| seen.expiry_warned_at))
        .execute(connection)
        .await
        .map(drop)
}

fn texts<T: ToString>(names: &BTreeSet<T>) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    routing_keys: Vec<String>,
    fields: Vec<String>,
    owner: String,
    purpose: String,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    revision: i64,
    declared_revision: i64,
    bound_keys: Vec<String>,
    bound_fields: Vec<String>,
    has_fields_exchange: bool,
    expires_after_s: Option<i64>,
    client: Option<String>,
    unattended_since: Option<OffsetDateTime>,
    consumer_seen_at: Option<OffsetDateTime>,
    waiting_since: Option<OffsetDateTime>,
    last_activity_at: Option<OffsetDateTime>,
    lost_at: Option<OffsetDateTime>,
    missing_since: Option<OffsetDateTime>,
    recovered_at: Option<OffsetDateTime>,
    expiry_warned_at: Option<OffsetDateTime>,
    dead_letters: i64,
    as_of: OffsetDateTime,
}

impl Row {
    fn into_registered(self) -> sqlx::Result<Registered> {
        let name: SubscriptionName = parse(&self.name)?;
        Ok(Registered {
            registration: Registration {
                subscription: subscription(name.clone(), &self.routing_keys, &self.fields)?,
                owner: self.owner,
                purpose: self.purpose,
                expires_after: self.expires_after_s.map(|seconds| Duration::from_secs(seconds.unsigned_abs())),
                client: self.client,
            },
            revision: self.revision,
            declared_revision: self.declared_revision,
            bound: subscription(name, &self.bound_keys, &self.bound_fields)?,
            has_fields_exchange: self.has_fields_exchange,
            created_at: self.created_at,
            updated_at: self.updated_at,
            dead_letters: u32::try_from(self.dead_letters).unwrap_or(u32::MAX),
            seen: Seen {
                unattended_since: self.unattended_since,
                consumer_seen_at: self.consumer_seen_at,
                waiting_since: self.waiting_since,
                last_activity_at: self.last_activity_at,
                lost_at: self.lost_at,
                missing_since: self.missing_since,
                recovered_at: self.recovered_at,
                expiry_warned_at: self.expiry_warned_at,
            },
            as_of: self.as_of,
        })
    }
}

fn subscription(name: SubscriptionName, keys: &[String], fields: &[String]) -> sqlx::Result<Subscription> {
    let keys = keys.iter().map(|key| parse(key)).collect::<sqlx::Result<_>>()?;
    let fields = fields.iter().map(|field| parse(field)).collect::<sqlx::Result<_>>()?;
    Ok(Subscription { name, keys, fields })
}

/// What was written by us; something else was put there by hand.
fn parse<T: FromStr>(text: &str) -> sqlx::Result<T> {
    text.parse().map_err(|_| sqlx::Error::Decode(format!("a subscription holds {text:?}").into()))
}
