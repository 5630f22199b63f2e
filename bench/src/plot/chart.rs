//! Chart: lines over an axis, as SVG. Pure.
//!
//! Not here, on purpose: a library. Lines, whiskers and two kinds of scales are less than what it would take to set one up.

use std::fmt::Write;

/// One picture of one or more panels, side by side.
pub struct Panel {
    pub title: String,
    pub x: X,
    pub y_unit: String,
    pub is_y_logarithmic: bool,
    pub lines: Vec<Line>,
}

pub enum X {
    /// Names, as far apart as they come; a point's `x` is the place of one.
    Names(Vec<String>, &'static str),
    Numbers(String),
}

pub struct Line {
    pub name: String,
    /// One colour for what the service did, another for the limit, in all pictures.
    pub is_limit: bool,
    pub points: Vec<Point>,
}

#[derive(Clone, Copy)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// The least and the most of any round.
    pub range: (f64, f64),
}

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 46.0;
/// From the palette of Okabe and Ito, which also those can tell apart who do not see all colours.
const OURS: [&str; 3] = ["#0072b2", "#009e73", "#56b4e9"];
const LIMITS: [&str; 3] = ["#d55e00", "#cc79a7", "#e69f00"];

pub fn svg(panels: &[Panel]) -> String {
    let width = WIDTH * panels.len() as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {HEIGHT}\" width=\"{width}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    for (number, panel) in panels.iter().enumerate() {
        let _ = writeln!(text, "<g transform=\"translate({} 0)\">", WIDTH * number as f64);
        panel.draw(&mut text);
        text.push_str("</g>\n");
    }
    text + "</svg>\n"
}

impl Panel {
    fn draw(&self, text: &mut String) {
        label(
            text,
            LEFT,
            20.0,
            "start",
            "#000000",
            &format!("<tspan font-weight=\"bold\">{}</tspan>", escape(&self.title)),
        );
        label(text, LEFT - 6.0, TOP - 8.0, "end", "#555555", &escape(&self.y_unit));
        let y = self.y_scale();
        for (tick, name) in y.ticks() {
            let at = y.at(tick);
            line(text, (LEFT, at), (WIDTH - RIGHT, at), "#dddddd", 1.0);
            label(text, LEFT - 6.0, at + 4.0, "end", "#555555", &name);
        }
        let x = self.draw_x(text);
        let (mut ours, mut limits) = (OURS.iter().cycle(), LIMITS.iter().cycle());
        let mut legend_at = LEFT;
        for drawn in &self.lines {
            let colour = if drawn.is_limit { limits.next() } else { ours.next() }.unwrap_or(&"#000000");
            drawn.draw(text, &x, &y, colour);
            line(text, (legend_at, 36.0), (legend_at + 16.0, 36.0), colour, 2.5);
            label(text, legend_at + 20.0, 40.0, "start", "#000000", &escape(&drawn.name));
            legend_at += 34.0 + 6.6 * drawn.name.chars().count() as f64;
        }
    }

    fn draw_x(&self, text: &mut String) -> Scale {
        let bottom = HEIGHT - BOTTOM;
        line(text, (LEFT, bottom), (WIDTH - RIGHT, bottom), "#555555", 1.0);
        let (scale, ticks, unit) = match &self.x {
            X::Names(names, unit) => {
                let scale =
                    Scale { low: -0.5, high: names.len() as f64 - 0.5, from: LEFT, to: WIDTH - RIGHT, is_log: false };
                (scale, (0..).map(f64::from).zip(names.iter().cloned()).collect(), (*unit).to_owned())
            }
            X::Numbers(unit) => {
                let highest = self.points().map(|point| point.x).fold(0.0, f64::max);
                let scale = Scale { low: 0.0, high: highest.max(1e-9), from: LEFT, to: WIDTH - RIGHT, is_log: false };
                (scale, scale.ticks(), unit.clone())
            }
        };
        for (tick, name) in ticks {
            label(text, scale.at(tick), bottom + 16.0, "middle", "#555555", &escape(&name));
        }
        label(text, f64::midpoint(LEFT, WIDTH - RIGHT), bottom + 34.0, "middle", "#555555", &escape(&unit));
        scale
    }

    fn y_scale(&self) -> Scale {
        let highest = self.points().map(|point| point.range.1).fold(0.0, f64::max).max(1e-9);
        let lowest = self.points().map(|point| point.range.0).filter(|low| *low > 0.0).fold(highest, f64::min);
        let (low, high) = if self.is_y_logarithmic { (lowest * 0.8, highest * 1.25) } else { (0.0, highest * 1.05) };
        Scale { low, high, from: HEIGHT - BOTTOM, to: TOP, is_log: self.is_y_logarithmic }
    }

    fn points(&self) -> impl Iterator<Item = &Point> {
        self.lines.iter().flat_map(|line| &line.points)
    }
}

impl Line {
    fn draw(&self, text: &mut String, x: &Scale, y: &Scale, colour: &str) {
        let places: Vec<String> =
            self.points.iter().map(|point| format!("{:.1},{:.1}", x.at(point.x), y.at(point.y))).collect();
        let path = places.join(" ");
        let _ = writeln!(text, "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
        for point in &self.points {
            let (at, (low, high)) = (x.at(point.x), point.range);
            if low < high {
                line(text, (at, y.at(low)), (at, y.at(high)), colour, 1.0);
            }
            // Where points are many, the line says it all.
            if self.points.len() <= 12 {
                let _ =
                    writeln!(text, "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", y.at(point.y));
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    is_log: bool,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let share = if self.is_log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share * (self.to - self.from)
    }

    /// Round numbers within, and how they are written.
    fn ticks(&self) -> Vec<(f64, String)> {
        let values: Vec<f64> = if self.is_log {
            let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let steps = exponents.flat_map(|exponent| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(exponent)));
            steps.filter(|value| (self.low..=self.high).contains(value)).collect()
        } else {
            let step = round_step((self.high - self.low) / 5.0);
            (0..).map(|number| f64::from(number) * step).take_while(|value| *value <= self.high).collect()
        };
        values.into_iter().map(|value| (value, number(value))).collect()
    }
}

/// The next of 1, 2, 5, 10, ..
fn round_step(about: f64) -> f64 {
    let power = 10_f64.powf(about.log10().floor());
    [1.0, 2.0, 5.0].map(|step| step * power).into_iter().find(|step| *step >= about).unwrap_or(10.0 * power)
}

fn number(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{}M", value / 1e6),
        _ if value >= 10_000.0 => format!("{}k", value / 1e3),
        _ if value >= 10.0 || value == 0.0 => format!("{value:.0}"),
        _ => format!("{}", (value * 1e4).round() / 1e4),
    }
}

fn line(text: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        text,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
    );
}

/// `what` is XML already.
fn label(text: &mut String, x: f64, y: f64, anchor: &str, colour: &str, what: &str) {
    let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{what}</text>");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let linear = Scale { low: 0.0, high: 10_500.0, from: 0.0, to: 1.0, is_log: false };
        let names: Vec<String> = linear.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["0", "5000", "10k"]);
        let log = Scale { low: 0.4, high: 30.0, is_log: true, ..linear };
        let names: Vec<String> = log.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["0.5", "1", "2", "5", "10", "20"]);
        assert!((log.at(log.high) - 1.0).abs() < 1e-9);
    }
}
