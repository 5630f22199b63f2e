//! Server log: what Postgres would write there of users' values.
//!
//! Promise: each setting of this session that lets values through is named, with what would be right.
//! Not here, on purpose: changing it. These settings belong to whoever runs the server; deploy/postgres-roles.sql has them.

use std::collections::HashMap;

use sqlx::PgConnection;

pub const SETTINGS: &str = "
select name, setting
  from pg_settings
 where name in ('log_error_verbosity', 'log_min_error_statement', 'log_statement', 'log_min_duration_statement',
                'log_min_duration_sample', 'log_transaction_sample_rate', 'log_parameter_max_length',
                'log_parameter_max_length_on_error', 'auto_explain.log_min_duration', 'auto_explain.log_parameter_max_length',
                'pgaudit.log_parameter')
";

/// A line for each setting that is not as it should be.
pub async fn tells(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    let settings: Vec<(String, String)> = sqlx::query_as(SETTINGS).fetch_all(connection).await?;
    Ok(told(&settings.into_iter().collect()))
}

fn told(settings: &HashMap<String, String>) -> Vec<String> {
    // A setting that this server does not have does no harm.
    let is = |name: &str, harmless: &[&str]| settings.get(name).is_none_or(|value| harmless.contains(&value.as_str()));
    let mut found = vec![];
    let mut note = |name: &str, right: &str, why: &str| {
        let value = settings.get(name).map_or("", String::as_str);
        found.push(format!("the database has {name} = {value}, so {why}; set {name} = {right}"));
    };
    if !is("log_error_verbosity", &["terse"]) {
        note("log_error_verbosity", "terse", "its log quotes the row of a failed statement");
    }
    if !is("log_min_error_statement", &["panic"]) {
        note("log_min_error_statement", "panic", "its log quotes the text of a failed statement");
    }
    if !is("log_parameter_max_length_on_error", &["0"]) {
        note("log_parameter_max_length_on_error", "0", "its log quotes the values that a failed statement was given");
    }
    // A statement of ours holds no value in its text; its parameters do.
    if !is("log_parameter_max_length", &["0"]) {
        let why = "its log quotes the values of the statements that it tells";
        if !is("log_statement", &["none", "ddl"]) {
            note("log_statement", "none", why);
        }
        if !is("log_min_duration_statement", &["-1"]) {
            note("log_min_duration_statement", "-1 (or log_parameter_max_length = 0)", why);
        }
        if !is("log_min_duration_sample", &["-1"]) {
            note("log_min_duration_sample", "-1 (or log_parameter_max_length = 0)", why);
        }
        if !is("log_transaction_sample_rate", &["0"]) {
            note("log_transaction_sample_rate", "0 (or log_parameter_max_length = 0)", why);
        }
    }
    if !is("auto_explain.log_min_duration", &["-1"]) && !is("auto_explain.log_parameter_max_length", &["0"]) {
        note("auto_explain.log_parameter_max_length", "0", "its log quotes the values of slow statements");
    }
    if !is("pgaudit.log_parameter", &["off"]) {
        note("pgaudit.log_parameter", "off", "its audit log quotes the values of statements");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(settings: &[(&str, &str)]) -> Vec<String> {
        let quiet = [
            ("log_error_verbosity", "terse"),
            ("log_min_error_statement", "panic"),
            ("log_parameter_max_length_on_error", "0"),
            ("log_parameter_max_length", "-1"),
            ("log_statement", "none"),
            ("log_min_duration_statement", "-1"),
        ];
        let all = quiet.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        told(&all.collect()).iter().map(|line| line.split_whitespace().nth(3).unwrap().to_owned()).collect()
    }

    #[test]
    fn each_setting_that_tells_values_is_named() {
        assert_eq!(names(&[]), [""; 0]);
        for loud in [
            ("log_error_verbosity", "default"),
            ("log_min_error_statement", "error"),
            ("log_parameter_max_length_on_error", "-1"),
            ("log_statement", "all"),
            ("log_statement", "mod"),
            ("log_min_duration_statement", "0"),
            ("log_min_duration_sample", "100"),
            ("log_transaction_sample_rate", "0.5"),
            ("pgaudit.log_parameter", "on"),
        ] {
            assert_eq!(names(&[loud]), [loud.0], "{loud:?}");
        }
        let explained = [("auto_explain.log_min_duration", "0"), ("auto_explain.log_parameter_max_length", "-1")];
        assert_eq!(names(&explained), ["auto_explain.log_parameter_max_length"]);
    }

    #[test]
    fn statements_without_their_values_may_be_logged() {
        let without = ("log_parameter_max_length", "0");
        assert_eq!(names(&[without, ("log_statement", "all"), ("log_min_duration_statement", "0")]), [""; 0]);
        assert_eq!(names(&[("log_statement", "ddl")]), [""; 0]);
    }
}
