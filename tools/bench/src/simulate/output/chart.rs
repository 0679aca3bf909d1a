//! One chart: curves or points over two axes, linear or logarithmic, as SVG in the style of the suite's report.

use maud::{Markup, html};

use crate::report::cast::{Look, Mark};
use crate::report::number::digits;
use crate::report::plots::scale::{Kind, Scale};
use crate::report::plots::{MARK_RADIUS, figure, mark, px, x_axis, y_axis};

const WIDTH: f64 = 540.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 18.0;
const ABOVE: f64 = 26.0;

/// Room above the figure for the crosses of one series.
const LOST_ROW: f64 = 10.0;
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
        let lost = |series: &Series| series.points.iter().any(|(_, y)| y.is_none());
        let lost_rows: Vec<usize> =
            (0..self.series.len()).filter(|index| lost(&self.series[*index])).collect();
        let top = ABOVE + lost_rows.len() as f64 * LOST_ROW;
        let (across, up) = ((LEFT, WIDTH - RIGHT), (HEIGHT - BELOW, top));
        let (x, y) = if self.diagonal {
            let both: Vec<f64> = values(0).chain(values(1)).collect();
            (Scale::showing(both.iter().copied(), across), Scale::showing(both, up))
        } else {
            (across_all(values(0), across), Scale::showing(values(1).chain(line), up))
        };
        let drawn = html! {
            text class="unit" x="4" y="14" { (self.y) }
            (x_axis(&x, (top, HEIGHT - BELOW), &self.x))
            (y_axis(&y, (LEFT, WIDTH - RIGHT), 7))
            @if self.diagonal { (diagonal(&x, &y)) }
            @if let Some((at, name)) = &self.line { (level(&y, *at, name)) }
            @for (index, series) in self.series.iter().enumerate() {
                @let row = lost_rows.iter().position(|lost| *lost == index).unwrap_or(0);
                (series.draw(index, &x, &y, ABOVE + (row as f64 + 0.6) * LOST_ROW))
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

/// A scale for the horizontal axis: a linear one ends where the values do.
fn across_all(values: impl Iterator<Item = f64>, places: (f64, f64)) -> Scale {
    let values: Vec<f64> = values.collect();
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scale = Scale::showing(values, places);
    match scale.kind {
        Kind::Linear if most > scale.values.0 => Scale::exactly((scale.values.0, most), places),
        Kind::Linear | Kind::Logarithmic => scale,
    }
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
    /// Crosses stand at `lost_y`, above the figure.
    fn draw(&self, index: usize, x: &Scale, y: &Scale, lost_y: f64) -> Markup {
        let look = look(index);
        let shown: Vec<(f64, f64)> =
            self.points.iter().filter_map(|(at, value)| Some((*at, (*value)?))).collect();
        let path: Vec<String> =
            shown.iter().map(|(at, value)| format!("{} {}", px(x.at(*at)), px(y.at(*value)))).collect();
        let marked = !self.joined || shown.len() <= MARKED_MAX;
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
                    text class="lost" x=(px(x.at(*at))) y=(px(lost_y + 3.0)) text-anchor="middle" {
                        "×" title { (self.name) ": the guest does not move here" }
                    }
                }
            }
        }
    }
}
