//! The SQL of dead letters, and all of it.

use std::collections::{BTreeMap, HashMap};

use sqlx::{PgPool, types::Json};
use tidings_sdk::{
    envelope::{Event, FieldName, Notice},
    letter::Reason,
    subscription::SubscriptionName,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::model::{DeadLetter, Left, Place, Selection};

/// The subscriptions whose letters are to be collected.
pub const NAMES: &str = "
select name
  from subscriptions
 order by name
";

pub const KNOWN: &str = "
select exists (select from subscriptions where name = $1)
";

/// Keeps a batch of letters of one subscription. One that comes again gets a new place, so that a redrive of its earlier arrival does
/// not take it away; what is no notice never covers up what is one.
pub const KEEP: &str = "
insert into dead_letters (subscription, message_id, user_id, version, event, changed_fields, occurred_at, traceparent,
                          reason, attempts, failed_at, redriven, size_bytes, backfill)
select $1, message_id, user_id, version, event, changed_fields::jsonb, occurred_at, traceparent,
       reason, attempts, failed_at, redriven, size_bytes, backfill
  from unnest($2::uuid[], $3::uuid[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[], $8::text[],
              $9::text[], $10::integer[], $11::timestamptz[], $12::integer[], $13::bigint[], $14::uuid[])
    with ordinality as letter (message_id, user_id, version, event, changed_fields, occurred_at, traceparent,
                               reason, attempts, failed_at, redriven, size_bytes, backfill, arrival)
 order by arrival
on conflict (subscription, message_id) do update
   set place = default,
       user_id = excluded.user_id,
       version = excluded.version,
       event = excluded.event,
       changed_fields = excluded.changed_fields,
       occurred_at = excluded.occurred_at,
       traceparent = excluded.traceparent,
       reason = excluded.reason,
       attempts = greatest(dead_letters.attempts, excluded.attempts),
       failed_at = excluded.failed_at,
       redriven = greatest(dead_letters.redriven, excluded.redriven),
       size_bytes = excluded.size_bytes,
       backfill = excluded.backfill,
       collected_at = excluded.collected_at
 where excluded.event is not null
    or dead_letters.event is null
";

/// A page of letters in the order in which they came.
pub const PAGE: &str = "
select place, message_id, user_id, version, event, changed_fields, occurred_at, traceparent, reason, attempts, failed_at, redriven,
       size_bytes, backfill, greatest(0, extract(epoch from now() - coalesce(failed_at, collected_at)))::bigint as age_s
  from dead_letters
 where subscription = $1
   and place > $2
   and ($3::text is null or reason = $3)
 order by place
 limit $4
";

/// Letters to redrive, in the order in which they came.
pub const TAKE: &str = "
select place, message_id, user_id, version, event, changed_fields, occurred_at, traceparent, reason, attempts, failed_at, redriven,
       size_bytes, backfill, 0::bigint as age_s
  from dead_letters
 where subscription = $1
   and ($2::uuid[] is null or message_id = any($2))
   and ($3::text is null or reason = $3)
   and place > $4
   and place <= $5
   and event is not null
 order by place
 limit $6
";

/// What is left of a selection.
pub const LEFT: &str = "
select count(*) filter (where event is not null) as redrivable,
       count(*) filter (where event is null) as not_redrivable
  from dead_letters
 where subscription = $1
   and ($2::uuid[] is null or message_id = any($2))
   and ($3::text is null or reason = $3)
   and place <= $4
";

/// Forgets letters that are in the queue again. By place: one that has come back meanwhile has a new one, and stays.
pub const DROP: &str = "
delete from dead_letters
 where subscription = $1
   and place = any($2)
";

pub const PURGE: &str = "
delete from dead_letters
 where subscription = $1
   and place in (
     select place
       from dead_letters
      where subscription = $1
        and ($2::text is null or reason = $2)
        and place <= $3
      order by place
      limit $4
   )
";

pub const FORGET: &str = "
delete from dead_letters
 where subscription = $1
   and message_id = $2
";

pub const REASONS: &str = "
select reason, count(*)
  from dead_letters
 where subscription = $1
 group by reason
 order by reason
";

pub const LAST_PLACE: &str = "
select coalesce(max(place), 0)
  from dead_letters
 where subscription = $1
";

/// Letters of each subscription, counted up to a limit.
pub const COUNTS: &str = "
select name,
       (select count(*) from (select from dead_letters where subscription = name limit $1) as first_ones)
  from subscriptions
 order by name
";

/// The same of one.
pub const COUNT: &str = "
select count(*)
  from (select from dead_letters where subscription = $1 limit $2) as first_ones
";

/// Letters of one subscription that are collected, and counted. Whatever a consumer gives up on, or somebody sends with its password,
/// the master data's disk does not fill with it, and no look takes longer. More, from before there was a limit, show as this many.
pub const MOST: i64 = 100_000;

pub async fn names(pool: &PgPool) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar(NAMES).fetch_all(pool).await
}

pub async fn is_known(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<bool> {
    sqlx::query_scalar(KNOWN).bind(name.as_str()).fetch_one(pool).await
}

pub async fn keep(pool: &PgPool, name: &SubscriptionName, letters: &[DeadLetter]) -> sqlx::Result<()> {
    let letters = once_each(letters);
    let notices: Vec<Option<&Notice>> = letters.iter().map(|letter| letter.notice.as_ref()).collect();
    let of_notice = |notice: &Option<&Notice>| notice.map(|notice| notice.user_id);
    sqlx::query(KEEP)
        .bind(name.as_str())
        .bind(letters.iter().map(|letter| letter.message_id).collect::<Vec<_>>())
        .bind(notices.iter().map(of_notice).collect::<Vec<_>>())
        .bind(notices.iter().map(|notice| notice.map(|notice| notice.version)).collect::<Vec<_>>())
        .bind(notices.iter().map(|notice| notice.map(|notice| notice.event.name())).collect::<Vec<_>>())
        .bind(notices.iter().map(|notice| notice.map(names_of)).collect::<Vec<_>>())
        .bind(notices.iter().map(|notice| notice.map(|notice| notice.occurred_at)).collect::<Vec<_>>())
        .bind(notices.iter().map(|notice| notice.and_then(trace_of)).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.reason.as_str()).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.attempts).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.failed_at).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.redriven).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.size_bytes).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.backfill).collect::<Vec<_>>())
        .execute(pool)
        .await
        .map(drop)
}

/// A statement may touch each row once: of several arrivals of one message the one with the most attempts, and rather a notice.
fn once_each(letters: &[DeadLetter]) -> Vec<&DeadLetter> {
    let rank = |letter: &DeadLetter| (letter.notice.is_some(), letter.attempts);
    let mut kept: HashMap<Uuid, usize> = HashMap::with_capacity(letters.len());
    for (arrival, letter) in letters.iter().enumerate() {
        let best = kept.entry(letter.message_id).or_insert(arrival);
        if rank(letter) >= rank(&letters[*best]) {
            *best = arrival;
        }
    }
    let mut arrivals: Vec<usize> = kept.into_values().collect();
    arrivals.sort_unstable();
    arrivals.into_iter().map(|arrival| &letters[arrival]).collect()
}

fn names_of(notice: &Notice) -> String {
    serde_json::to_string(notice.event.changed_fields()).expect("names are always JSON")
}

fn trace_of(notice: &Notice) -> Option<String> {
    notice.traceparent.map(|trace| trace.to_string())
}

pub async fn page(
    pool: &PgPool,
    name: &SubscriptionName,
    after: Place,
    reason: Option<Reason>,
    limit: i64,
) -> sqlx::Result<Vec<DeadLetter>> {
    let page = sqlx::query_as(PAGE).bind(name.as_str()).bind(after).bind(reason.map(Reason::as_str)).bind(limit);
    let rows: Vec<Row> = page.fetch_all(pool).await?;
    rows.into_iter().map(Row::into_letter).collect()
}

pub async fn take(
    pool: &PgPool,
    name: &SubscriptionName,
    selection: &Selection,
    past: Place,
    up_to: Place,
    limit: i64,
) -> sqlx::Result<Vec<DeadLetter>> {
    let (ids, reason) = filters(selection);
    let take = sqlx::query_as(TAKE).bind(name.as_str()).bind(ids).bind(reason);
    let rows: Vec<Row> = take.bind(past).bind(up_to).bind(limit).fetch_all(pool).await?;
    rows.into_iter().map(Row::into_letter).collect()
}

pub async fn left(pool: &PgPool, name: &SubscriptionName, selection: &Selection, up_to: Place) -> sqlx::Result<Left> {
    let (ids, reason) = filters(selection);
    sqlx::query_as(LEFT).bind(name.as_str()).bind(ids).bind(reason).bind(up_to).fetch_one(pool).await
}

fn filters(selection: &Selection) -> (Option<&[Uuid]>, Option<&'static str>) {
    match selection {
        Selection::These(ids) => (Some(ids), None),
        Selection::Reason(reason) => (None, Some(reason.as_str())),
        Selection::All => (None, None),
    }
}

pub async fn forget_redriven(pool: &PgPool, name: &SubscriptionName, places: &[Place]) -> sqlx::Result<()> {
    sqlx::query(DROP).bind(name.as_str()).bind(places).execute(pool).await.map(drop)
}

pub async fn purge(
    pool: &PgPool,
    name: &SubscriptionName,
    reason: Option<Reason>,
    up_to: Place,
    limit: i64,
) -> sqlx::Result<u64> {
    let purge = sqlx::query(PURGE).bind(name.as_str()).bind(reason.map(Reason::as_str)).bind(up_to).bind(limit);
    Ok(purge.execute(pool).await?.rows_affected())
}

/// False when there is no such letter.
pub async fn forget(pool: &PgPool, name: &SubscriptionName, message_id: Uuid) -> sqlx::Result<bool> {
    let forgotten = sqlx::query(FORGET).bind(name.as_str()).bind(message_id).execute(pool).await?;
    Ok(forgotten.rows_affected() == 1)
}

pub async fn by_reason(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<BTreeMap<String, i64>> {
    let counts: Vec<(String, i64)> = sqlx::query_as(REASONS).bind(name.as_str()).fetch_all(pool).await?;
    Ok(counts.into_iter().collect())
}

pub async fn last_place(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<Place> {
    sqlx::query_scalar(LAST_PLACE).bind(name.as_str()).fetch_one(pool).await
}

/// How many more of a subscription's letters may be collected.
pub async fn room(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<i64> {
    let count: i64 = sqlx::query_scalar(COUNT).bind(name.as_str()).bind(MOST).fetch_one(pool).await?;
    Ok(MOST - count)
}

/// Letters of each subscription, up to a limit each.
pub async fn counts(pool: &PgPool) -> sqlx::Result<Vec<(String, i64)>> {
    sqlx::query_as(COUNTS).bind(MOST).fetch_all(pool).await
}

#[derive(sqlx::FromRow)]
struct Row {
    place: Place,
    message_id: Uuid,
    user_id: Option<Uuid>,
    version: Option<i64>,
    event: Option<String>,
    changed_fields: Option<Json<Vec<FieldName>>>,
    occurred_at: Option<OffsetDateTime>,
    traceparent: Option<String>,
    reason: String,
    attempts: i32,
    failed_at: Option<OffsetDateTime>,
    redriven: i32,
    size_bytes: i64,
    backfill: Option<Uuid>,
    age_s: i64,
}

impl Row {
    fn into_letter(self) -> sqlx::Result<DeadLetter> {
        let notice = self.notice()?;
        let Self { place, message_id, attempts, failed_at, redriven, size_bytes, backfill, age_s, .. } = self;
        let reason = Reason::from_name(&self.reason);
        Ok(DeadLetter { place, message_id, notice, backfill, reason, attempts, failed_at, redriven, size_bytes, age_s })
    }

    fn notice(&self) -> sqlx::Result<Option<Notice>> {
        let (Some(event), Some(user_id), Some(version), Some(fields), Some(occurred_at)) =
            (&self.event, self.user_id, self.version, &self.changed_fields, self.occurred_at)
        else {
            return Ok(None);
        };
        let event = Event::from_name(event, fields.0.clone())
            .ok_or_else(|| sqlx::Error::Decode("a dead letter of an unknown event".into()))?;
        let traceparent = self.traceparent.as_ref().and_then(|trace| trace.parse().ok());
        Ok(Some(Notice { message_id: self.message_id, user_id, version, event, occurred_at, traceparent }))
    }
}
