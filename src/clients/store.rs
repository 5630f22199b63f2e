//! The SQL of clients and their keys, and all of it.

use std::{collections::BTreeSet, str::FromStr, time::Duration};

use sqlx::{PgConnection, PgExecutor, PgPool};
use tidings_sdk::{
    envelope::FieldName,
    subscription::{BindingKey, SubscriptionName},
};
use time::OffsetDateTime;

use super::{
    key::{Key, KeyId},
    model::{Client, NewClient, Scope},
};
use crate::{profile::FieldSet, web::Rate};

/// Keys that open something now, by the database's clock.
pub const LIVE_KEYS: &str = "
select id, client, sha256
  from client_keys
 where revoked_at is null
   and (expires_at is null or expires_at > now())
";

/// Clients that may ask, and what their subscriptions declare.
pub const ROSTER: &str = "
select name, scopes, fields, write_fields, rate_limit, takes_tokens,
       array(select subscriptions.name from subscriptions where client = clients.name order by subscriptions.name) as subscriptions,
       array(select distinct unnest(routing_keys) from subscriptions where client = clients.name) as declared_keys,
       array(select distinct unnest(subscriptions.fields) from subscriptions where client = clients.name) as declared_fields
  from clients
 where revoked_at is null
";

pub const USED: &str = "
update client_keys
   set last_used_at = now()
 where id = any($1)
";

/// A new client, or one in place of one that was revoked, whose keys do not come back with the name. Touches nothing when the name is
/// taken.
pub const CREATE: &str = "
with before as (
  update client_keys
     set revoked_at = now()
   where client = (select name from clients where name = $1 and revoked_at is not null)
     and revoked_at is null
)
insert into clients (name, scopes, fields, write_fields, purpose, rate_limit, takes_tokens)
values ($1, $2, $3, $4, $5, $6, $7)
on conflict (name) do update
   set scopes = excluded.scopes,
       fields = excluded.fields,
       write_fields = excluded.write_fields,
       purpose = excluded.purpose,
       rate_limit = excluded.rate_limit,
       takes_tokens = excluded.takes_tokens,
       created_at = now(),
       revoked_at = null
 where clients.revoked_at is not null
";

/// A key, unless its client has two live ones already, or is none.
pub const ISSUE: &str = "
insert into client_keys (id, client, sha256, expires_at)
select $1, name, $3, now() + make_interval(secs => $4)
  from clients
 where name = $2
   and revoked_at is null
   and (select count(*)
          from client_keys
         where client = $2 and revoked_at is null and (expires_at is null or expires_at > now())) < 2
";

/// The other keys of a client end by then, at the latest.
pub const RETIRE: &str = "
update client_keys
   set expires_at = least(expires_at, now() + make_interval(secs => $3))
 where client = $1
   and id <> $2
   and revoked_at is null
";

/// A client and all its keys, in one statement: what breaks in between would leave keys that open as soon as the name is used again.
pub const REVOKE: &str = "
with keys as (
  update client_keys
     set revoked_at = now()
   where client = $1 and revoked_at is null
)
update clients
   set revoked_at = now()
 where name = $1 and revoked_at is null
";

pub const REVOKE_KEY: &str = "
update client_keys
   set revoked_at = now()
 where client = $1 and id = $2 and revoked_at is null
";

/// All clients, the revoked ones last.
pub const FIND: &str = "
select name, scopes, fields, write_fields, purpose, rate_limit, takes_tokens, created_at, revoked_at,
       array(select subscriptions.name from subscriptions where client = clients.name order by subscriptions.name) as subscriptions
  from clients
 order by revoked_at is not null, name
";

/// All keys that were not revoked, the expired included.
pub const KEYS: &str = "
select id, client, created_at, expires_at, last_used_at, coalesce(expires_at <= now(), false) as is_expired
  from client_keys
 where revoked_at is null
 order by client, created_at, id
";

/// Who stands for a subscription.
pub const CLIENT_OF: &str = "
select client
  from subscriptions
 where name = $1
";

/// Fields that somebody declared, and who.
pub const DECLARED: &str = "
select field, string_agg(who, ', ' order by who) as who
  from (select unnest(coalesce(fields, '{}') || coalesce(write_fields, '{}')) as field, 'client ' || name as who
          from clients
         -- To an administrator no list applies.
         where revoked_at is null and not 'admin' = any(scopes)
        union
        select unnest(fields), 'subscription ' || name
          from subscriptions) as declared
 group by field
 order by field
";

/// What each subscription declares, for the record of who reads what.
pub const PROCESSING: &str = "
select name, routing_keys, fields, owner, purpose, client
  from subscriptions
 order by name
";

/// What a client may do, and its list.
pub const GRANTED: &str = "
select scopes, fields
  from clients
 where name = $1 and revoked_at is null
";

/// The fields that a subscription may declare for which this client stands: all that it may ever come to read. `None` when there is no such
/// client, or it was revoked.
///
/// # Errors
/// When the database does not answer.
pub async fn may_declare(on: impl PgExecutor<'_>, client: &str) -> sqlx::Result<Option<FieldSet>> {
    let granted: Option<(Vec<String>, Option<Vec<String>>)> =
        sqlx::query_as(GRANTED).bind(client).fetch_optional(on).await?;
    let Some((scopes, fields)) = granted else { return Ok(None) };
    let is_admin = parsed::<Scope, BTreeSet<_>>(&scopes)?.contains(&Scope::Admin);
    let list = fields.as_deref().map(parsed).transpose()?;
    Ok(Some(if is_admin { FieldSet::All } else { FieldSet::of(list) }))
}

/// A live key as it is kept.
#[derive(sqlx::FromRow)]
pub(super) struct KeyRow {
    pub id: String,
    pub client: String,
    pub sha256: Vec<u8>,
}

/// A client that may ask.
pub(super) struct Asker {
    pub name: String,
    pub scopes: BTreeSet<Scope>,
    pub fields: Option<BTreeSet<FieldName>>,
    pub write_fields: Option<BTreeSet<FieldName>>,
    pub subscriptions: BTreeSet<SubscriptionName>,
    pub declared_keys: Vec<BindingKey>,
    pub declared_fields: BTreeSet<FieldName>,
    pub rate: Option<Rate>,
    pub takes_tokens: bool,
}

#[derive(sqlx::FromRow)]
struct AskerRow {
    name: String,
    scopes: Vec<String>,
    fields: Option<Vec<String>>,
    write_fields: Option<Vec<String>>,
    rate_limit: Option<String>,
    takes_tokens: bool,
    subscriptions: Vec<String>,
    declared_keys: Vec<String>,
    declared_fields: Vec<String>,
}

/// Keys before clients: one whose client is revoked in between opens nothing.
pub(super) async fn roster(connection: &mut PgConnection) -> sqlx::Result<(Vec<KeyRow>, Vec<Asker>)> {
    let keys = sqlx::query_as(LIVE_KEYS).fetch_all(&mut *connection).await?;
    let rows: Vec<AskerRow> = sqlx::query_as(ROSTER).fetch_all(connection).await?;
    let asker = |row: AskerRow| {
        Ok(Asker {
            scopes: parsed(&row.scopes)?,
            fields: row.fields.as_deref().map(parsed).transpose()?,
            write_fields: row.write_fields.as_deref().map(parsed).transpose()?,
            subscriptions: parsed(&row.subscriptions)?,
            declared_keys: parsed(&row.declared_keys)?,
            declared_fields: parsed(&row.declared_fields)?,
            rate: row.rate_limit.as_ref().map(one).transpose()?,
            takes_tokens: row.takes_tokens,
            name: row.name,
        })
    };
    Ok((keys, rows.into_iter().map(asker).collect::<sqlx::Result<_>>()?))
}

/// What was written by us; something else was put there by hand.
pub(super) fn parsed<T: FromStr, C: FromIterator<T>>(texts: &[String]) -> sqlx::Result<C> {
    texts.iter().map(one).collect()
}

fn one<T: FromStr>(text: &String) -> sqlx::Result<T> {
    text.parse().map_err(|_| sqlx::Error::Decode(format!("a client or its subscription holds {text:?}").into()))
}

pub(super) async fn used(connection: &mut PgConnection, keys: &[KeyId]) -> sqlx::Result<()> {
    let ids: Vec<&str> = keys.iter().map(KeyId::as_str).collect();
    sqlx::query(USED).bind(ids).execute(connection).await.map(drop)
}

/// False when the name is taken.
///
/// # Errors
/// When the database does not answer.
pub async fn create(on: impl PgExecutor<'_>, client: &NewClient) -> sqlx::Result<bool> {
    let texts = |fields: &BTreeSet<FieldName>| fields.iter().map(ToString::to_string).collect::<Vec<_>>();
    let created = sqlx::query(CREATE)
        .bind(&client.name)
        .bind(client.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>())
        .bind(client.fields.as_ref().map(texts))
        .bind(client.write_fields.as_ref().map(texts))
        .bind(&client.purpose)
        .bind(client.rate.map(|rate| rate.to_string()))
        .bind(client.takes_tokens)
        .execute(on)
        .await?;
    Ok(created.rows_affected() == 1)
}

/// False when there is no such client, or when it has two live keys.
///
/// # Errors
/// When the database does not answer.
pub async fn issue(
    on: impl PgExecutor<'_>,
    client: &str,
    key: &Key,
    expires_after: Option<Duration>,
) -> sqlx::Result<bool> {
    let issued = sqlx::query(ISSUE)
        .bind(key.id.as_str())
        .bind(client)
        .bind(key.sha256.as_slice())
        .bind(expires_after.map(|after| after.as_secs_f64()))
        .execute(on)
        .await?;
    Ok(issued.rows_affected() == 1)
}

pub(super) async fn retire(on: impl PgExecutor<'_>, client: &str, but: &KeyId, after: Duration) -> sqlx::Result<u64> {
    let retired = sqlx::query(RETIRE).bind(client).bind(but.as_str()).bind(after.as_secs_f64()).execute(on).await?;
    Ok(retired.rows_affected())
}

/// False when there is no such client that was not revoked already.
pub(super) async fn revoke(on: impl PgExecutor<'_>, client: &str) -> sqlx::Result<bool> {
    Ok(sqlx::query(REVOKE).bind(client).execute(on).await?.rows_affected() == 1)
}

/// False when the client has no such key that was not revoked already.
pub(super) async fn revoke_key(on: impl PgExecutor<'_>, client: &str, key: &str) -> sqlx::Result<bool> {
    Ok(sqlx::query(REVOKE_KEY).bind(client).bind(key).execute(on).await?.rows_affected() == 1)
}

/// A key, for those who look after them.
#[derive(Debug, Clone, sqlx::FromRow)]
pub(super) struct KeyFacts {
    pub id: String,
    pub client: String,
    pub created_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub last_used_at: Option<OffsetDateTime>,
    pub is_expired: bool,
}

pub(super) async fn keys(on: impl PgExecutor<'_>) -> sqlx::Result<Vec<KeyFacts>> {
    sqlx::query_as(KEYS).fetch_all(on).await
}

pub(super) async fn find(on: impl PgExecutor<'_>) -> sqlx::Result<Vec<Client>> {
    sqlx::query_as(FIND).fetch_all(on).await
}

/// Who stands for a subscription; the outer `None` when nobody registered the name.
pub(super) async fn client_of(pool: &PgPool, name: &SubscriptionName) -> sqlx::Result<Option<Option<String>>> {
    sqlx::query_scalar(CLIENT_OF).bind(name.as_str()).fetch_optional(pool).await
}

/// Fields that somebody declared, each with everybody who did.
///
/// # Errors
/// When the database does not answer.
pub async fn declared_fields(on: impl PgExecutor<'_>) -> sqlx::Result<Vec<(String, String)>> {
    sqlx::query_as(DECLARED).fetch_all(on).await
}

/// What a subscription declares.
#[derive(sqlx::FromRow)]
pub(super) struct Declaration {
    pub name: String,
    pub routing_keys: Vec<String>,
    pub fields: Vec<String>,
    pub owner: String,
    pub purpose: String,
    pub client: Option<String>,
}

pub(super) async fn processing(on: impl PgExecutor<'_>) -> sqlx::Result<Vec<Declaration>> {
    sqlx::query_as(PROCESSING).fetch_all(on).await
}
