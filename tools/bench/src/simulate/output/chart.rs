//! One chart: curves or points over two axes, linear or logarithmic, as SVG in the style of the suite's report.

use maud::{Markup, html};

use crate::report::cast::{Look, Mark};
use crate::report::number::digits;
use crate::report::plots::scale::Scale;
use crate::report::plots::{CHARACTER_WIDTH, MARK_RADIUS, figure, mark, px, x_axis, y_axis};

const WIDTH: f64 = 540.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 18.0;
const ABOVE: f64 = 30.0;
const BELOW: f64 = 38.0;

/// Colours for series, apart in lightness as well as in hue: of the families that reports give to engines.
const CLASSES: [&str; 6] = ["f0", "q1", "c1", "f2", "q3", "f3"];

/// A series with at most this many points has a mark at each.
const MARKED_MAX: usize = 24;

/// A chart that is still to be drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// What it shows, for those who can't see it.
    pub describe: String,
    /// The horizontal quantity with its unit.
    pub x: String,
    /// The vertical quantity with its unit.
    pub y: String,
    /// What is drawn.
    pub series: Vec<Series>,
    /// A horizontal line with its name: a budget.
    pub line: Option<(f64, String)>,
    /// Whether equal values of both axes are joined: for what was predicted against what was measured.
    pub diagonal: bool,
}

/// One curve, or points.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Values of both axes, in the order in which they are joined. Without a value the guest did not move.
    pub points: Vec<(f64, Option<f64>)>,
    /// Whether points are joined.
    pub joined: bool,
}

impl Chart {
    /// The chart with its legend.
    #[must_use]
    pub fn draw(&self) -> Markup {
        let values = |index: usize| {
            let points = self.series.iter().flat_map(|series| &series.points);
            points.filter_map(move |(x, y)| if index == 0 { Some(*x) } else { *y })
        };
        let line = self.line.as_ref().map(|(at, _)| *at);
        let (across, up) = ((LEFT, WIDTH - RIGHT), (HEIGHT - BELOW, ABOVE));
        let (x, y) = if self.diagonal {
            let both: Vec<f64> = values(0).chain(values(1)).collect();
            (Scale::showing(both.iter().copied(), across), Scale::showing(both, up))
        } else {
            (Scale::showing(values(0), across), Scale::showing(values(1).chain(line), up))
        };
        let drawn = html! {
            text class="unit" x="4" y="14" { (self.y) }
            (x_axis(&x, (ABOVE, HEIGHT - BELOW), &self.x))
            (y_axis(&y, (LEFT, WIDTH - RIGHT), 7))
            @if self.diagonal { (diagonal(&x, &y)) }
            @if let Some((at, name)) = &self.line { (level(&y, *at, name)) }
            @for (index, series) in self.series.iter().enumerate() {
                (series.draw(index, &x, &y))
            }
        };
        html! {
            (self.legend())
            div class="scroll" { (figure(WIDTH, HEIGHT, &self.describe, drawn)) }
        }
    }

    fn legend(&self) -> Markup {
        html! {
            @if self.series.len() > 1 {
                ul class="legend" {
                    @for (index, series) in self.series.iter().enumerate() {
                        li {
                            svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true" {
                                (mark(&look(index), (0.0, 0.0), MARK_RADIUS + 0.6, false, html! {}))
                            }
                            (series.name)
                        }
                    }
                }
            }
        }
    }
}

fn look(index: usize) -> Look {
    let mark = Mark::ALL[index % Mark::ALL.len()];
    Look { class: CLASSES[index % CLASSES.len()].to_owned(), mark }
}

/// Where both axes have the same value.
fn diagonal(x: &Scale, y: &Scale) -> Markup {
    let (low, high) = (x.values.0.max(y.values.0), x.values.1.min(y.values.1));
    let place = |value: f64| format!("{} {}", px(x.at(value)), px(y.at(value)));
    html! { path class="rule" d=(format!("M{}L{}", place(low), place(high))) fill="none" {} }
}

/// A horizontal line with its name above its right end.
fn level(y: &Scale, at: f64, name: &str) -> Markup {
    html! {
        g class="budget" {
            line x1=(px(LEFT)) x2=(px(WIDTH - RIGHT)) y1=(px(y.at(at))) y2=(px(y.at(at))) {}
            text x=(px(WIDTH - RIGHT)) y=(px(y.at(at) - 5.0)) text-anchor="end" { (name) }
        }
    }
}

impl Series {
    fn draw(&self, index: usize, x: &Scale, y: &Scale) -> Markup {
        let look = look(index);
        let shown: Vec<(f64, f64)> =
            self.points.iter().filter_map(|(at, value)| Some((*at, (*value)?))).collect();
        let path: Vec<String> =
            shown.iter().map(|(at, value)| format!("{} {}", px(x.at(*at)), px(y.at(*value)))).collect();
        let marked = !self.joined || shown.len() <= MARKED_MAX;
        // Where a series has no value its cross stands above the figure, beside those of others.
        let lost_y = ABOVE - 6.0;
        let apart = (index as f64 - 1.5) * CHARACTER_WIDTH;
        html! {
            g class=(look.class) data-series=(self.name) {
                @if self.joined && path.len() > 1 {
                    path class="curve" d=(format!("M{}", path.join("L"))) {}
                }
                @if marked {
                    @for (at, value) in &shown {
                        (mark(&look, (x.at(*at), y.at(*value)), MARK_RADIUS - 0.8, false, html! {
                            title { (self.name) ": " (digits(*at)) ", " (digits(*value)) }
                        }))
                    }
                }
                @for (at, _) in self.points.iter().filter(|(_, value)| value.is_none()) {
                    text class="lost" x=(px(x.at(*at) + apart)) y=(px(lost_y)) text-anchor="middle" {
                        "×" title { (self.name) ": the guest does not move here" }
                    }
                }
            }
        }
    }
}
