//! Rights: what deploy/postgres-grants.sql gives a role, and whether this session's has it.
//!
//! Promise: whatever the file gives is asked for; there is no second list of it.
//! Not here, on purpose: whether a role may more than that (see `tests/it/rights.rs`).

use sqlx::PgConnection;

const GRANTS: &str = include_str!("../../deploy/postgres-grants.sql");

/// Whose rights a process needs that serves the API, and one that relays: as the file names them, which a deployment need not.
pub const API_ROLE: &str = "tidings_api";
pub const RELAY_ROLE: &str = "tidings_relay";

/// Which of these rights the session's role lacks. Who owns a table has them all, and so has a superuser.
pub const LACKING: &str = "
select distinct privilege || ' on ' || relation as lacking
  from unnest($1::text[], $2::text[], $3::text[]) as given (privilege, relation, part)
 where not case
         when part is null then has_table_privilege(relation, privilege)
         else has_column_privilege(relation, part, privilege)
       end
 order by lacking
";

/// A privilege, on which table or sequence, and on which column of it if not on all.
type Right = (&'static str, &'static str, Option<&'static str>);

/// What this session's role lacks of the rights of these, such as `update on subscriptions`.
pub async fn lacking(connection: &mut PgConnection, roles: &[&str]) -> sqlx::Result<Vec<String>> {
    let (privileges, relations, columns): (Vec<_>, Vec<_>, Vec<_>) = given_to(roles).into_iter().collect();
    sqlx::query_scalar(LACKING).bind(privileges).bind(relations).bind(columns).fetch_all(connection).await
}

fn given_to(roles: &[&str]) -> Vec<Right> {
    let mut rights = vec![];
    for (what, relation, to) in grants() {
        if !to.split(", ").any(|role| roles.contains(&role)) {
            continue;
        }
        match what.split_once(" (") {
            Some((privilege, columns)) => {
                let columns = columns.trim_end_matches(')').split(',').map(str::trim);
                rights.extend(columns.map(|column| (privilege, relation, Some(column))));
            }
            None => rights.extend(what.split(", ").map(|privilege| (privilege, relation, None))),
        }
    }
    rights
}

/// What the file gives on each table or sequence, and to whom. These lines of it are indented.
fn grants() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    GRANTS.split(';').filter_map(|statement| {
        let (_, grant) = statement.split_once("\n  grant ")?;
        let (what, on) = grant.split_once(" on ")?;
        let (relation, to) = on.split_once(" to ")?;
        Some((what, relation.trim_start_matches("sequence "), to))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_grant_of_the_file_is_passed_over() {
        let is_grant = |line: &&str| line.trim_start().starts_with("grant ") && !line.contains(" on schema ");
        assert_eq!(grants().count(), GRANTS.lines().filter(is_grant).count());
        assert!(grants().all(|(what, ..)| what.matches('(').count() <= 1), "columns of one privilege in a grant");
    }

    #[test]
    fn rights_are_read_off_as_the_file_gives_them() {
        let (api, relay) = (given_to(&[API_ROLE]), given_to(&[RELAY_ROLE]));
        for right in [
            ("delete", "outbox", None),
            ("select", "outbox_id_seq", None),
            ("update", "subscriptions", Some("declared_revision")),
            ("update", "subscriptions", Some("last_activity_at")),
            ("update", "subscriptions", Some("missing_since")),
            ("select", "_sqlx_migrations", Some("version")),
        ] {
            assert!(relay.contains(&right), "{right:?}: {relay:?}");
        }
        assert!(api.contains(&("update", "subscriptions", None)), "{api:?}");
        assert!(relay.iter().all(|(_, relation, _)| *relation != "clients"), "{relay:?}");
        assert_eq!(given_to(&[API_ROLE, RELAY_ROLE]).len() + 1, api.len() + relay.len(), "one grant is of both");
    }
}
