//! Tables: the values to look for, and every place in the database where none may be.

use futures_util::TryStreamExt;
use sqlx::{AssertSqlSafe, PgConnection, Row};
use uuid::Uuid;

use super::{
    needles::Needles,
    report::{Found, Report},
};
use crate::db::Trouble;

/// Rows of one table, at most.
const MOST_ROWS: u64 = 1_000_000;
/// Pages of the table of users that are drawn: enough for any number of values that may be asked for.
const PAGES: f64 = 500.0;

/// Living users from pages drawn at random, in random order.
pub const SAMPLE: &str = "
select id, to_jsonb(users) as row
  from users tablesample system (least(100, 100 * $1 / greatest(pg_relation_size('users') / 8192.0, 1))::real)
 where deleted_at is null
 order by random()
 limit $2
";

/// Tables and their columns that could hold a text. Ids, numbers and times cannot.
pub const COLUMNS: &str = "
select quote_ident(namespace.nspname) || '.' || quote_ident(class.relname) as table,
       array_agg(quote_ident(attribute.attname) order by attribute.attnum) as columns,
       array_agg(type.typname = 'bytea' order by attribute.attnum) as are_bytes
  from pg_class as class
  join pg_namespace as namespace on namespace.oid = class.relnamespace
  join pg_attribute as attribute on attribute.attrelid = class.oid and attribute.attnum > 0 and not attribute.attisdropped
  join pg_type as type on type.oid = attribute.atttypid
 where class.relkind in ('r', 'm')
   and namespace.nspname not in ('pg_catalog', 'information_schema')
   and namespace.nspname not like 'pg_toast%'
   and class.oid <> 'users'::regclass
   and type.typname not in ('uuid', 'int2', 'int4', 'int8', 'float4', 'float8', 'bool', 'timestamptz', 'timestamp', 'date', 'xid8', 'oid')
 group by 1
 order by 1
";

/// What ANALYZE has kept of the columns of every table, the users' too: it stays when the rows that it is from are gone.
pub const STATISTICS: &str = "
select quote_ident(schemaname) || '.' || quote_ident(tablename) as table,
       quote_ident(attname) as column,
       concat_ws(' ', most_common_vals::text, histogram_bounds::text, most_common_elems::text) as kept
  from pg_stats
 where schemaname not in ('pg_catalog', 'information_schema')
 order by 1, 2
";

/// Takes values of users drawn at random.
pub async fn sample(db: &mut PgConnection, values: usize) -> sqlx::Result<Needles> {
    let limit = i64::try_from(values).unwrap_or(i64::MAX);
    let rows: Vec<(Uuid, sqlx::types::Json<serde_json::Value>)> =
        sqlx::query_as(SAMPLE).bind(PAGES).bind(limit).fetch_all(db).await?;
    let mut needles = Needles::default();
    for (user_id, row) in rows {
        needles.take(user_id, &row, values);
    }
    Ok(needles)
}

/// Looks through every table but that of the users, and through the planner's statistics of all; not of those named.
pub async fn scan(db: &mut PgConnection, needles: &Needles, but: &[String], report: &mut Report) -> sqlx::Result<()> {
    let tables: Vec<(String, Vec<String>, Vec<bool>)> = sqlx::query_as(COLUMNS).fetch_all(&mut *db).await?;
    for (table, columns, are_bytes) in tables {
        let name = short(&table);
        if is_named(&table, but) {
            continue;
        }
        let (mut rows, mut found) = (0, Found::default());
        let read = scan_table(db, needles, (&table, name), (&columns, &are_bytes), &mut rows, &mut found).await;
        let but = (rows == MOST_ROWS).then(|| format!("and no more than the first {MOST_ROWS}"));
        report.scanned(format!("table {name}, rows"), rows, found, but);
        report.looked_at(format!("table {name}"), read.map_err(|error| Trouble::from(error).into()));
    }
    scan_statistics(db, needles, but, report).await
}

async fn scan_statistics(
    db: &mut PgConnection,
    needles: &Needles,
    but: &[String],
    report: &mut Report,
) -> sqlx::Result<()> {
    let columns: Vec<(String, String, String)> = sqlx::query_as(STATISTICS).fetch_all(db).await?;
    let (mut count, mut found) = (0, Found::default());
    for (table, column, kept) in columns.iter().filter(|(table, ..)| !is_named(table, but)) {
        count += 1;
        found.note(format!("statistics of {}.{column}", short(table)), &needles.found_in(kept.as_bytes()));
    }
    report.scanned("statistics, columns", count, found, None);
    Ok(())
}

fn short(table: &str) -> &str {
    table.strip_prefix("public.").unwrap_or(table)
}

fn is_named(table: &str, names: &[String]) -> bool {
    names.iter().any(|name| name == table || name == short(table))
}

async fn scan_table(
    db: &mut PgConnection,
    needles: &Needles,
    (table, name): (&str, &str),
    (columns, are_bytes): (&[String], &[bool]),
    count: &mut u64,
    found: &mut Found,
) -> sqlx::Result<()> {
    let as_bytes = |(column, is_bytes): (&String, &bool)| {
        if *is_bytes { column.clone() } else { format!("convert_to({column}::text, 'UTF8')") }
    };
    let values: Vec<String> = columns.iter().zip(are_bytes).map(as_bytes).collect();
    // Names that the database itself has quoted.
    let select = AssertSqlSafe(format!("select {} from {table} limit {MOST_ROWS}", values.join(", ")));
    let mut rows = sqlx::query(select).fetch(db);
    while let Some(row) = rows.try_next().await? {
        *count += 1;
        for (place, column) in columns.iter().enumerate() {
            let value: Option<Vec<u8>> = row.try_get(place)?;
            found.note(format!("table {name}.{column}"), &needles.found_in(&value.unwrap_or_default()));
        }
    }
    Ok(())
}
