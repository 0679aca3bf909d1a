//! One downtime as everybody saw it: the engine, the guest, and a client by three protocols, side by side.
//!
//! Each line is one witness of one engine: all runs as faint dots, their range, the median as a mark.

use maud::{Markup, html};

use super::boxes::engines;
use super::scale::Scale;
use super::{MARK_RADIUS, NAME_CHARACTER_WIDTH, budget_line, figure, fitting, mark, px, x_axis};
use crate::report::cast::{Cast, Look};
use crate::report::number::{digits, with_unit};
use crate::results::{Metric, ScenarioResult};
use crate::stats::interval::median;

const WIDTH: f64 = 760.0;
const ROW: f64 = 16.0;
const GAP: f64 = 9.0;
const ABOVE: f64 = 20.0;
const BELOW: f64 = 36.0;
const RIGHT: f64 = 58.0;
const WITNESS_WIDTH: f64 = 96.0;
const NAME_WIDTH_MAX: f64 = 140.0;

/// The witnesses, with their names in the figure.
const WITNESSES: [(Metric, &str); 5] = [
    (Metric::DowntimeEngineMs, "engine's word"),
    (Metric::DowntimeGuestMs, "guest"),
    (Metric::UdpGapMs, "UDP client"),
    (Metric::TcpStallMs, "TCP client"),
    (Metric::HttpGapMs, "HTTP client"),
];

struct Line<'a> {
    engine: &'a str,
    look: Look,
    metric: Metric,
    witness: &'static str,
    /// Whether it is the engine's first.
    first: bool,
    values: Vec<f64>,
    y: f64,
}

/// The plot, or nothing if nobody saw a downtime.
pub(crate) fn plot(scenario: &ScenarioResult, cast: &Cast) -> Option<Markup> {
    let (lines, bottom) = lines(scenario, cast);
    if lines.is_empty() {
        return None;
    }
    let longest = lines.iter().map(|line| line.engine.chars().count()).max().unwrap_or(0) as f64;
    let names = (longest * NAME_CHARACTER_WIDTH).min(NAME_WIDTH_MAX) + 12.0;
    let left = names + WITNESS_WIDTH;
    let budget = scenario.scenario.downtime_ms;
    let values = lines.iter().flat_map(|line| line.values.iter().copied());
    let scale = Scale::showing(values.chain([budget]), (left, WIDTH - RIGHT));
    let describe = format!("Downtime by witness: {}", scenario.scenario.title);
    Some(figure(
        WIDTH,
        bottom + BELOW,
        &describe,
        html! {
            g data-figure="witness" data-scenario=(scenario.scenario.name) data-factor="1" {
                (x_axis(&scale, (ABOVE, bottom), "downtime, ms"))
                @for line in &lines {
                    (line.draw(&scale, names, left))
                }
                (budget_line(scale.at(budget), (ABOVE, bottom), budget, (left, WIDTH)))
            }
        },
    ))
}

fn lines<'a>(scenario: &'a ScenarioResult, cast: &Cast) -> (Vec<Line<'a>>, f64) {
    let mut lines = Vec::new();
    let mut y = ABOVE + GAP;
    for engine in engines(scenario, cast) {
        let mut first = true;
        for (metric, witness) in WITNESSES {
            let values = crate::stats::values_of(&scenario.runs, engine, metric);
            if values.is_empty() {
                continue;
            }
            lines.push(Line { engine, look: cast.look(engine), metric, witness, first, values, y });
            first = false;
            y += ROW;
        }
        y += if first { 0.0 } else { GAP };
    }
    (lines, y - GAP)
}

impl Line<'_> {
    fn draw(&self, scale: &Scale, names: f64, left: f64) -> Markup {
        let Some(middle) = median(&self.values) else { return html! {} };
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (class, y) = (&self.look.class, self.y);
        let told = html! {
            title {
                (self.engine) ", " (self.witness) ": median " (with_unit(self.metric, middle)) ", "
                (digits(least)) " to " (digits(most))
            }
        };
        html! {
            g data-engine=(self.engine) data-metric=(self.metric.name()) {
                @if self.first {
                    text class="name" x=(px(names - 8.0)) y=(px(y + 4.0)) text-anchor="end" {
                        (fitting(self.engine, names - 8.0)) title { (self.engine) }
                    }
                }
                text x=(px(left - 8.0)) y=(px(y + 4.0)) text-anchor="end" { (self.witness) }
                g class=(format!("spread {class}")) {
                    line class="whisker" x1=(px(scale.at(least))) x2=(px(scale.at(most))) y1=(px(y)) y2=(px(y)) {}
                    @for value in &self.values {
                        circle class="dot" cx=(px(scale.at(*value))) cy=(px(y)) r="2" data-value=(value) {}
                    }
                }
                (mark(&self.look, (scale.at(middle), y), MARK_RADIUS, false, told))
                text class="figure" x=(px(WIDTH - 4.0)) y=(px(y + 4.0)) text-anchor="end" data-median=(middle) {
                    (digits(middle))
                }
            }
        }
    }
}
