//! Table: what was found, for the terminal.

use std::io::{Result, Write};

use crate::{
    figures::Spread,
    report::Row,
    results::{Judged, Results},
};

/// One line per row.
pub fn print(to: &mut impl Write, results: &Results) -> Result<()> {
    line(to, [&results.measure, "unit", "service", "limit", "ratio", "goal"])?;
    for Judged { row, .. } in &results.rows {
        let limit = row.limit.as_ref();
        let limit = limit.map(|limit| format!("{} {}", limit.name, spread(Spread::of(&limit.samples))));
        let service = spread(Spread::of(&row.service));
        let cells = [
            format!("  {}", row.case),
            row.unit.clone(),
            service,
            limit.unwrap_or_default(),
            spread(row.ratio()),
            verdict(row),
        ];
        line(to, cells.each_ref().map(String::as_str))?;
    }
    Ok(())
}

fn line(to: &mut impl Write, [case, unit, service, limit, ratio, goal]: [&str; 6]) -> Result<()> {
    writeln!(to, "{case:<46} {unit:<6} {service:>24} {limit:>38} {ratio:>20}  {goal}")
}

/// `ratio >= 1.25  met`
pub fn verdict(row: &Row) -> String {
    match (row.goal, row.is_met()) {
        (None, _) => String::new(),
        (Some(goal), Some(true)) => format!("{goal}  met"),
        (Some(goal), Some(false)) => format!("{goal}  MISSED"),
        (Some(goal), None) => format!("{goal}  not measured"),
    }
}

/// `1.31 (1.28 .. 1.33)`
pub fn spread(spread: Option<Spread>) -> String {
    let Some(Spread { median, min, max }) = spread else { return String::new() };
    if min == max { figure(median) } else { format!("{} ({} .. {})", figure(median), figure(min), figure(max)) }
}

/// Three digits are more than a shared machine can tell apart.
fn figure(figure: f64) -> String {
    if figure.abs() >= 100.0 { format!("{figure:.0}") } else { format!("{figure:.2}") }
}
