//! A metric along a sweep: engines as curves through their medians, every run as a dot, bars from the least to the
//! largest. Where an engine moved no guest, it has a cross at the upper edge.

use maud::{Markup, html};

use super::scale::{Kind, Scale};
use super::{CHARACTER_WIDTH, MARK_RADIUS, figure, mark, px, y_axis};
use crate::report::cast::{Cast, Look};
use crate::report::number::{heading, shown, whole, with_unit};
use crate::results::{Metric, ScenarioResult};
use crate::scenario::Axis;
use crate::stats::interval::median;
use crate::stats::values_of;

const WIDTH: f64 = 470.0;
const HEIGHT: f64 = 290.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 16.0;
const ABOVE: f64 = 26.0;
const BELOW: f64 = 40.0;

/// Values of the axis that span more than this factor are drawn on a logarithmic scale.
const LOGARITHMIC_FROM: f64 = 6.0;

/// How far engines are moved apart where they share a value of the axis.
const APART: f64 = 7.0;

/// The points of one sweep.
#[derive(Debug)]
pub(crate) struct Sweep<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// What is swept.
    pub(crate) axis: Axis,
    /// Its scenarios with their values, in the order of values.
    pub(crate) points: Vec<(f64, &'a ScenarioResult)>,
}

impl<'a> Sweep<'a> {
    /// All sweeps among `scenarios` that have at least two points.
    pub(crate) fn all(scenarios: &'a [ScenarioResult]) -> Vec<Self> {
        let mut sweeps: Vec<Self> = Vec::new();
        for scenario in scenarios {
            let Some(point) = &scenario.scenario.sweep else { continue };
            match sweeps.iter_mut().find(|sweep| sweep.name == point.name) {
                Some(sweep) => sweep.points.push((point.value, scenario)),
                None => sweeps.push(Self {
                    name: &point.name,
                    axis: point.axis,
                    points: vec![(point.value, scenario)],
                }),
            }
        }
        for sweep in &mut sweeps {
            sweep.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        sweeps.retain(|sweep| sweep.points.len() > 1);
        sweeps
    }

    /// The metrics that are worth a curve along this axis.
    pub(crate) fn metrics(&self) -> [Metric; 4] {
        match self.axis {
            Axis::DirtyRateMibS => [Metric::TotalMs, Metric::DowntimeGuestMs, Metric::CpuS, Metric::SlowDown],
            Axis::MemoryMib => [Metric::TotalMs, Metric::CpuS, Metric::WireBytes, Metric::DowntimeGuestMs],
            Axis::DowntimeMs => [Metric::DowntimeGuestMs, Metric::TotalMs, Metric::CpuS, Metric::WireBytes],
            Axis::LinkMbitS => [Metric::TotalMs, Metric::DowntimeGuestMs, Metric::CpuS, Metric::WireBytes],
        }
    }

    /// The engines that ran at any point, in the order of legends.
    pub(crate) fn engines(&self, cast: &Cast) -> Vec<&'a str> {
        let mut engines: Vec<&str> = Vec::new();
        for engine in self.points.iter().flat_map(|(_, scenario)| &scenario.engines) {
            if !engines.contains(&engine.engine.as_str()) {
                engines.push(&engine.engine);
            }
        }
        engines.sort_by_key(|engine| cast.rank(engine));
        engines
    }

    /// The plot of `metric`, or nothing if no run has it.
    pub(crate) fn plot(&self, metric: Metric, cast: &Cast) -> Option<Markup> {
        let curves: Vec<Curve<'_>> =
            self.engines(cast).into_iter().map(|engine| Curve::of(self, engine, metric, cast)).collect();
        let factor = shown(metric).factor;
        let budgets = self.budgets(metric);
        let values = curves.iter().flat_map(|curve| curve.points.iter().flat_map(|point| &point.values));
        let values: Vec<f64> =
            values.chain(budgets.iter().map(|(_, budget)| budget)).map(|it| it * factor).collect();
        if curves.iter().all(|curve| curve.points.iter().all(|point| point.values.is_empty())) {
            return None;
        }
        let bottom = HEIGHT - BELOW;
        let frame = Frame { x: self.x_scale(), y: Scale::showing(values, (bottom, ABOVE)), factor, metric };
        let describe = format!("{} against {}", metric.title(), self.axis.title());
        Some(figure(
            WIDTH,
            HEIGHT,
            &describe,
            html! {
                g data-figure="curve" data-sweep=(self.name) data-metric=(metric.name()) data-factor=(factor) {
                    text class="unit" x="4" y="12" { (heading(metric)) }
                    (y_axis(&frame.y, (LEFT, WIDTH - RIGHT), 6))
                    (self.values_axis(&frame.x, bottom))
                    (frame.budget(&budgets))
                    @for (index, curve) in curves.iter().enumerate() {
                        (curve.draw(&frame, (index as f64 - (curves.len() as f64 - 1.0) / 2.0) * APART))
                    }
                }
            },
        ))
    }

    /// The budget at each point, for downtimes.
    fn budgets(&self, metric: Metric) -> Vec<(f64, f64)> {
        if metric != Metric::DowntimeGuestMs {
            return Vec::new();
        }
        self.points.iter().map(|(value, scenario)| (*value, scenario.scenario.downtime_ms)).collect()
    }

    fn x_scale(&self) -> Scale {
        let places = (LEFT + 28.0, WIDTH - RIGHT - 28.0);
        let (first, last) = (self.points[0].0, self.points[self.points.len() - 1].0);
        if first > 0.0 && last / first > LOGARITHMIC_FROM {
            return Scale { kind: Kind::Logarithmic, values: (first, last), places };
        }
        Scale::exactly((first, if last > first { last } else { first + 1.0 }), places)
    }

    /// The axis has its marks where there are points.
    fn values_axis(&self, scale: &Scale, bottom: f64) -> Markup {
        let mut free_from = 0.0;
        let marks = self.points.iter().map(|(value, _)| {
            let (x, label) = (scale.at(*value), whole(*value));
            let half = label.chars().count() as f64 * CHARACTER_WIDTH / 2.0 + 3.0;
            let has_room = x - half >= free_from;
            if has_room {
                free_from = x + half;
            }
            (x, has_room.then_some(label))
        });
        let marks: Vec<_> = marks.collect();
        html! {
            g class="axis" {
                line class="rule" x1=(px(LEFT)) x2=(px(WIDTH - RIGHT)) y1=(px(bottom)) y2=(px(bottom)) {}
                @for (x, label) in marks {
                    line class="rule" x1=(px(x)) x2=(px(x)) y1=(px(bottom)) y2=(px(bottom + 4.0)) {}
                    @if let Some(label) = label {
                        text x=(px(x)) y=(px(bottom + 17.0)) text-anchor="middle" { (label) }
                    }
                }
                text class="unit" x=(px(f64::midpoint(LEFT, WIDTH - RIGHT))) y=(px(bottom + 34.0)) text-anchor="middle" {
                    (self.axis.title())
                }
            }
        }
    }
}

struct Frame {
    x: Scale,
    y: Scale,
    factor: f64,
    metric: Metric,
}

impl Frame {
    fn budget(&self, budgets: &[(f64, f64)]) -> Markup {
        let Some(last) = budgets.last() else { return html! {} };
        let place = |(at, budget): &(f64, f64)| format!("{} {}", px(self.x.at(*at)), px(self.y.at(*budget)));
        let path = budgets.iter().map(place).collect::<Vec<_>>().join("L");
        html! {
            g class="budget" {
                path d=(format!("M{path}")) fill="none" {}
                text x=(px(WIDTH - RIGHT)) y=(px(self.y.at(last.1) - 5.0)) text-anchor="end" { "budget" }
            }
        }
    }
}

struct Curve<'a> {
    engine: &'a str,
    look: Look,
    points: Vec<Point<'a>>,
}

struct Point<'a> {
    at: f64,
    scenario: &'a str,
    values: Vec<f64>,
    /// Whether the engine ran there and moved nothing.
    lost: bool,
}

impl<'a> Curve<'a> {
    fn of(sweep: &Sweep<'a>, engine: &'a str, metric: Metric, cast: &Cast) -> Self {
        let point = |(at, scenario): &(f64, &'a ScenarioResult)| {
            let ran = scenario.engines.iter().find(|summary| summary.engine == engine)?;
            let values = values_of(&scenario.runs, engine, metric);
            Some(Point { at: *at, scenario: &scenario.scenario.name, values, lost: ran.moved == 0 })
        };
        Self { engine, look: cast.look(engine), points: sweep.points.iter().filter_map(point).collect() }
    }

    fn draw(&self, frame: &Frame, shift: f64) -> Markup {
        let class = &self.look.class;
        let medians: Vec<(f64, f64)> =
            self.points.iter().filter_map(|point| Some((point.at, median(&point.values)?))).collect();
        let place = |(at, value): &(f64, f64)| (frame.x.at(*at) + shift, frame.y.at(value * frame.factor));
        let path: Vec<String> =
            medians.iter().map(place).map(|(x, y)| format!("{} {}", px(x), px(y))).collect();
        html! {
            g class=(format!("spread {class}")) data-engine=(self.engine) {
                @if path.len() > 1 {
                    path class="curve" d=(format!("M{}", path.join("L"))) {}
                }
                @for point in &self.points {
                    (self.point(point, frame, shift))
                }
            }
        }
    }

    fn point(&self, point: &Point<'_>, frame: &Frame, shift: f64) -> Markup {
        let x = frame.x.at(point.at) + shift;
        let Some(middle) = median(&point.values) else {
            return html! {
                @if point.lost {
                    text class="lost" x=(px(x)) y=(px(ABOVE - 2.0)) text-anchor="middle" {
                        "×" title { (self.engine) " moved no guest here" }
                    }
                }
            };
        };
        let y = |value: f64| frame.y.at(value * frame.factor);
        let least = point.values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = point.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let told = html! {
            title { (self.engine) ": median " (with_unit(frame.metric, middle)) }
        };
        html! {
            g data-scenario=(point.scenario) data-median=(middle) {
                line class="whisker" x1=(px(x)) x2=(px(x)) y1=(px(y(least))) y2=(px(y(most))) {}
                @for value in &point.values {
                    circle class="dot" cx=(px(x)) cy=(px(y(*value))) r="1.8" data-value=(value) {}
                }
                (mark(&self.look, (x, y(middle)), MARK_RADIUS, false, told))
            }
        }
    }
}
