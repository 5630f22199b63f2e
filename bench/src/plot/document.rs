//! Document: the figures of docs/performance.md, between two marks. Pure.

use std::fmt::Write;

use anyhow::Context;

use crate::{
    figures::Spread,
    results::{Judged, Results},
    table::{spread, verdict},
};

const BEGIN: &str = "<!-- figures: written by `./dev bench plot` -->";
const END: &str = "<!-- end of figures -->";

/// The document with these figures between its marks, whatever stood there.
pub fn with_figures(document: &str, figures: &str) -> anyhow::Result<String> {
    let (before, rest) = document.split_once(BEGIN).with_context(|| format!("the document has no {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("the document has no {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{figures}\n{END}{after}"))
}

/// A chapter per measure, with its picture if it has one.
pub fn figures(all: &[Results], has_picture: impl Fn(&Results) -> bool) -> String {
    all.iter().map(|results| chapter(results, has_picture(results))).collect::<Vec<_>>().join("\n")
}

fn chapter(results: &Results, has_picture: bool) -> String {
    let Results { measure, machine, users, rounds, seconds, .. } = results;
    let date = results.taken_at.date();
    let mut text = format!("### {measure}\n\n");
    if has_picture {
        let _ = writeln!(text, "![{measure}](performance/{measure}.svg)\n");
    }
    let _ = writeln!(
        text,
        "{date}, commit {}, Postgres {}, RabbitMQ {}, {} cores, {users} users, {rounds} rounds of {seconds} s; load before {:.1}.\n",
        machine.commit, machine.postgres, machine.rabbitmq, machine.cores, machine.load_before
    );
    text.push_str("| case | unit | service | limit | ratio | goal |\n|---|---|---:|---:|---:|---|\n");
    for Judged { row, .. } in &results.rows {
        let limit = row.limit.as_ref();
        let limit = limit.map(|limit| format!("{} {}", limit.name, spread(Spread::of(&limit.samples))));
        let (service, ratio) = (spread(Spread::of(&row.service)), spread(row.ratio()));
        let (limit, goal) = (limit.unwrap_or_default(), verdict(row).replace("MISSED", "**missed**"));
        let _ = writeln!(text, "| {} | {} | {service} | {limit} | {ratio} | {goal} |", row.case, row.unit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_written_anew() {
        let document = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let written = with_figures(&document, "new\n").unwrap();
        assert_eq!(written, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(with_figures(&written, "new\n").unwrap(), written);
    }
}
