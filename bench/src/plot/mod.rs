//! Plot: pictures, and the table of docs/performance.md, from the results that are kept.
//!
//! Promise: the document says no figure that is not in bench/results; a test holds the one against the other.

mod chart;
mod document;

use std::{fs, path::Path};

use anyhow::Context;

use crate::{
    figures::Spread,
    measures::ALL,
    report::{Curve, Row},
    results::{Judged, Results},
};
use chart::{Line, Panel, Point, X};

const DOCUMENT: &str = "docs/performance.md";
const PICTURES: &str = "docs/performance";

/// From the root of the repository.
pub fn write(root: &Path, results: &Path) -> anyhow::Result<()> {
    let all = read_all(results)?;
    let pictures = root.join(PICTURES);
    fs::create_dir_all(&pictures)?;
    for results in &all {
        let panels = panels(results);
        if !panels.is_empty() {
            fs::write(pictures.join(format!("{}.svg", results.measure)), chart::svg(&panels))?;
        }
    }
    let path = root.join(DOCUMENT);
    let document = fs::read_to_string(&path).with_context(|| format!("cannot read {DOCUMENT}"))?;
    Ok(fs::write(path, document::with_figures(&document, &figures(&all))?)?)
}

fn figures(all: &[Results]) -> String {
    document::figures(all, |results| !panels(results).is_empty())
}

/// Of what was ever measured, in the order of the measures.
fn read_all(folder: &Path) -> anyhow::Result<Vec<Results>> {
    ALL.iter().filter_map(|measure| Results::read(folder, measure.name).transpose()).collect()
}

/// What there is to see.
fn panels(results: &Results) -> Vec<Panel> {
    let rows: Vec<&Row> = results.rows.iter().map(|Judged { row, .. }| row).collect();
    let mut panels = match results.measure.as_str() {
        "patch" | "get" => by_connections(&rows),
        "latency" => percentiles(&rows),
        "growth" => return by_size(&results.curves),
        _ => vec![],
    };
    panels.extend(over_time(&results.curves));
    panels
}

/// Rates and latencies over the number of connections.
fn by_connections(rows: &[&Row]) -> Vec<Panel> {
    let panel = |title: &str, ending: &str, y_unit: &str, is_y_logarithmic| {
        let chosen: Vec<_> = rows.iter().filter_map(|row| Some((connections(row, ending)?, *row))).collect();
        let title = title.to_owned();
        Panel { title, y_unit: y_unit.to_owned(), is_y_logarithmic, ..side_by_side(&chosen, "connections") }
    };
    vec![panel("Requests a second", "", "1/s", false), panel("Latency, 99th percentile", ", p99", "ms", true)]
}

/// `32` of the case `32 connections, p99`, when that is what it ends with.
fn connections(row: &Row, ending: &str) -> Option<String> {
    let (number, rest) = row.case.split_once(" connection")?;
    (rest.trim_start_matches('s') == ending).then(|| number.to_owned())
}

/// One panel per rate.
fn percentiles(rows: &[&Row]) -> Vec<Panel> {
    let named = |row: &&Row| -> Option<(String, String)> {
        let (rate, percentile) = row.case.split_once("/s, p")?;
        Some((rate.to_owned(), format!("p{percentile}")))
    };
    let mut rates: Vec<String> = rows.iter().filter_map(|row| Some(named(row)?.0)).collect();
    rates.dedup();
    let panel = |rate: &String| {
        let of_rate =
            rows.iter().filter_map(|row| named(row).filter(|(of, _)| of == rate).map(|(_, name)| (name, *row)));
        Panel {
            title: format!("Change to consumer at {rate}/s"),
            y_unit: "ms".to_owned(),
            is_y_logarithmic: true,
            ..side_by_side(&of_rate.collect::<Vec<_>>(), "percentile")
        }
    };
    rates.iter().map(panel).collect()
}

/// The service and its limit over the same names.
fn side_by_side(rows: &[(String, &Row)], what: &'static str) -> Panel {
    let line = |name: &str, is_limit, samples: &dyn Fn(&Row) -> Vec<f64>| Line {
        name: name.to_owned(),
        is_limit,
        points: (0..).map(f64::from).zip(rows).filter_map(|(x, (_, row))| point(x, &samples(row))).collect(),
    };
    let limit = rows.iter().find_map(|(_, row)| row.limit.as_ref()).map_or("", |limit| limit.name.as_str());
    let limits = |row: &Row| row.limit.as_ref().map(|limit| limit.samples.clone()).unwrap_or_default();
    Panel {
        title: String::new(),
        x: X::Names(rows.iter().map(|(name, _)| name.clone()).collect(), what),
        y_unit: String::new(),
        is_y_logarithmic: false,
        lines: vec![line("tidings", false, &|row| row.service.clone()), line(limit, true, &limits)],
    }
}

fn point(x: f64, samples: &[f64]) -> Option<Point> {
    let Spread { median, min, max } = Spread::of(samples)?;
    Some(Point { x, y: median, range: (min, max) })
}

/// Curves over time, one panel for all that stand beside each other.
fn over_time(curves: &[Curve]) -> Vec<Panel> {
    let point = |&(x, y): &(f64, f64)| Point { x, y, range: (y, y) };
    let line = |curve: &Curve| Line {
        name: curve.name.clone(),
        is_limit: curve.is_limit,
        points: curve.points.iter().map(point).collect(),
    };
    let mut panels: Vec<(&Curve, Vec<Line>)> = vec![];
    for curve in curves {
        let units = |other: &Curve| (other.of.clone(), other.x_unit.clone(), other.y_unit.clone());
        match panels.iter_mut().find(|(first, _)| units(first) == units(curve)) {
            Some((_, lines)) => lines.push(line(curve)),
            None => panels.push((curve, vec![line(curve)])),
        }
    }
    let panel = |(first, lines): (&Curve, Vec<Line>)| Panel {
        title: if first.of.is_empty() { "Over time".to_owned() } else { first.of.clone() },
        x: X::Numbers(first.x_unit.clone()),
        y_unit: first.y_unit.clone(),
        is_y_logarithmic: false,
        lines,
    };
    panels.into_iter().map(panel).collect()
}

/// What each step costs, over the powers of ten.
fn by_size(curves: &[Curve]) -> Vec<Panel> {
    let Some(first) = curves.first() else { return vec![] };
    let sizes = first.points.iter().map(|(rows, _)| format!("{rows:.0}")).collect();
    let line = |curve: &Curve| Line {
        name: curve.name.clone(),
        is_limit: false,
        points: (0..).map(f64::from).zip(&curve.points).map(|(x, &(_, y))| Point { x, y, range: (y, y) }).collect(),
    };
    vec![Panel {
        title: "A step over the size of the tables".to_owned(),
        x: X::Names(sizes, "rows"),
        y_unit: first.y_unit.clone(),
        is_y_logarithmic: true,
        lines: curves.iter().map(line).collect(),
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_says_what_the_results_say() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let document = fs::read_to_string(root.join(DOCUMENT)).unwrap();
        let all = read_all(&root.join("bench/results")).unwrap();
        let written = document::with_figures(&document, &figures(&all)).unwrap();
        assert!(written == document, "docs/performance.md has other figures than bench/results: ./dev bench plot");
    }
}
