//! All ratios to the reference engine at a glance: a row an engine in a scenario, a column a metric, the ratio as a
//! mark with its interval. Filled marks differ from 1 for certain (95 %), hollow ones may not.

use maud::{Markup, html};

use super::scale::{Kind, Scale};
use super::{MARK_RADIUS, figure, fitting, mark, px, row, x_axis};
use crate::report::cast::Cast;
use crate::report::number;
use crate::results::{Metric, Results, ScenarioResult};
use crate::stats::{RatioView, ratio_of};

const SCENARIO_WIDTH: f64 = 150.0;
const ENGINE_WIDTH: f64 = 112.0;
const COLUMN: f64 = 206.0;
const COLUMN_GAP: f64 = 18.0;
const ROW: f64 = 17.0;
const ABOVE: f64 = 44.0;
const BELOW: f64 = 34.0;

/// The ends of intervals are drawn up to this factor beyond the outermost ratio, and as arrows from there on.
const BEYOND: f64 = 1.6;

struct Row<'a> {
    scenario: &'a ScenarioResult,
    engine: &'a str,
    /// Whether it is the scenario's first.
    first: bool,
    ratios: Vec<(Metric, RatioView)>,
}

/// The plot, or nothing if there is no ratio to `reference`.
pub(crate) fn plot(results: &Results, reference: &str, cast: &Cast) -> Option<Markup> {
    let rows = rows(results, reference, cast);
    if rows.is_empty() {
        return None;
    }
    let left = SCENARIO_WIDTH + ENGINE_WIDTH;
    let width = left + COLUMN * Metric::MAIN.len() as f64;
    let bottom = ABOVE + rows.len() as f64 * ROW;
    let describe = format!("Ratios to {reference} of all engines in all scenarios");
    Some(figure(
        width,
        bottom + BELOW,
        &describe,
        html! {
            g data-figure="forest" data-to=(reference) {
                @for (index, line) in rows.iter().enumerate() {
                    (labels(line, cast, ABOVE + index as f64 * ROW, width))
                }
                @for (index, metric) in Metric::MAIN.into_iter().enumerate() {
                    @let from = left + index as f64 * COLUMN + COLUMN_GAP;
                    (column(&rows, metric, (from, from + COLUMN - COLUMN_GAP - 6.0), bottom, cast))
                }
            }
        },
    ))
}

fn rows<'a>(results: &'a Results, reference: &str, cast: &Cast) -> Vec<Row<'a>> {
    let mut rows = Vec::new();
    for scenario in &results.scenarios {
        let mut first = true;
        for engine in super::boxes::engines(scenario, cast) {
            if engine == reference {
                continue;
            }
            let ratio = |metric| Some((metric, ratio_of(scenario, metric, engine, reference)?));
            let ratios: Vec<_> = Metric::MAIN.into_iter().filter_map(ratio).collect();
            if !ratios.is_empty() {
                rows.push(Row { scenario, engine, first, ratios });
                first = false;
            }
        }
    }
    rows
}

fn labels(line: &Row<'_>, cast: &Cast, top: f64, width: f64) -> Markup {
    let y = top + ROW / 2.0;
    let name = &line.scenario.scenario.name;
    html! {
        @if line.first {
            line class="grid" x1="0" x2=(px(width)) y1=(px(top)) y2=(px(top)) {}
            text class="name" x="2" y=(px(y + 4.0)) {
                (fitting(name, SCENARIO_WIDTH - 8.0)) title { (line.scenario.scenario.title) }
            }
        }
        (mark(&cast.look(line.engine), (SCENARIO_WIDTH + 6.0, y), 3.6, false, html! {}))
        text x=(px(SCENARIO_WIDTH + 15.0)) y=(px(y + 4.0)) {
            (fitting(line.engine, ENGINE_WIDTH - 10.0)) title { (line.engine) }
        }
    }
}

fn column(rows: &[Row<'_>], metric: Metric, places: (f64, f64), bottom: f64, cast: &Cast) -> Markup {
    let of = |line: &Row<'_>| line.ratios.iter().find(|(of, _)| *of == metric).map(|(_, ratio)| *ratio);
    let ratios: Vec<f64> = rows.iter().filter_map(of).map(|view| view.ratio).collect();
    let least = ratios.iter().copied().fold(1.0, f64::min) / BEYOND;
    let most = ratios.iter().copied().fold(1.0, f64::max) * BEYOND;
    let scale = Scale { kind: Kind::Logarithmic, values: (least, most), places };
    let one = px(scale.at(1.0));
    let heading = number::heading(metric);
    let heading = heading.split(',').next().unwrap_or_default();
    html! {
        g data-metric=(metric.name()) {
            text class="name" x=(px(f64::midpoint(places.0, places.1))) y="14" text-anchor="middle" {
                @if metric == Metric::DowntimeGuestMs { "downtime, as the guest saw it" } @else { (heading) }
            }
            text class="faint" x=(px(scale.at(1.0) - 8.0)) y="33" text-anchor="end" { "◂ less" }
            text class="faint" x=(px(scale.at(1.0) + 8.0)) y="33" { "more ▸" }
            rect class="better" x=(px(places.0)) y=(px(ABOVE - 4.0)) width=(px(scale.at(1.0) - places.0))
                height=(px(bottom - ABOVE + 4.0)) {}
            (x_axis(&scale, (ABOVE - 4.0, bottom), "ratio"))
            line class="one" x1=(one) x2=(one) y1=(px(ABOVE - 8.0)) y2=(px(bottom)) {}
            @for (index, line) in rows.iter().enumerate() {
                @if let Some(view) = of(line) {
                    (point(line, view, &scale, row(ABOVE, index, ROW), cast))
                }
            }
        }
    }
}

fn point(line: &Row<'_>, view: RatioView, scale: &Scale, y: f64, cast: &Cast) -> Markup {
    let look = cast.look(line.engine);
    let certain = view.shows().is_some_and(|order| order != std::cmp::Ordering::Equal);
    let told = html! {
        title { (line.scenario.scenario.name) ", " (line.engine) ": " (tell(view)) }
    };
    html! {
        g data-scenario=(line.scenario.scenario.name) data-engine=(line.engine) data-ratio=(view.ratio)
            data-low=[view.ci95.map(|ends| ends.0)] data-high=[view.ci95.map(|ends| ends.1)] {
            @if let Some((low, high)) = view.ci95 {
                g class=(format!("spread {}", look.class)) {
                    line class="whisker" x1=(px(scale.clamped(low))) x2=(px(scale.clamped(high))) y1=(px(y)) y2=(px(y)) {}
                    @for (end, sign) in [(low, -1.0), (high, 1.0)] {
                        @if scale.shows(end) {
                            @let x = px(scale.at(end));
                            line class="whisker" x1=(x) x2=(x) y1=(px(y - 3.0)) y2=(px(y + 3.0)) {}
                        } @else {
                            @let (x, back) = (scale.clamped(end), scale.clamped(end) - sign * 4.0);
                            path class="whisker" fill="none"
                                d=(format!("M{} {}L{} {}L{} {}", px(back), px(y - 3.5), px(x), px(y), px(back), px(y + 3.5))) {}
                        }
                    }
                }
            }
            (mark(&look, (scale.at(view.ratio), y), MARK_RADIUS, !certain, told))
        }
    }
}

/// A ratio with its interval in words.
pub(crate) fn tell(view: RatioView) -> String {
    let ratio = number::ratio(view.ratio);
    match view.ci95 {
        Some((low, high)) => {
            format!("{ratio} ({} to {}, {} pairs)", number::ratio(low), number::ratio(high), view.pairs)
        }
        None => format!("{ratio} (no interval of {} pairs)", view.pairs),
    }
}
