//! Box plots: one metric of one scenario, engines below each other, every run as a dot.
//!
//! The box goes from the first quartile to the third, the line in it is the median, the whiskers reach the least and
//! the largest. With fewer than five runs there is no box, which would show more than there is.

use maud::{Markup, html};

use super::scale::Scale;
use super::{NAME_CHARACTER_WIDTH, budget_line, figure, fitting, mark, px, row, x_axis};
use crate::report::cast::{Cast, Look};
use crate::report::number::{shown, value_of, with_unit};
use crate::results::{Metric, Outcome, Run, ScenarioResult};
use crate::stats::interval::median;

const WIDTH: f64 = 470.0;
const ROW: f64 = 30.0;
const ABOVE: f64 = 20.0;
const BELOW: f64 = 36.0;
/// Room for the median's figure.
const RIGHT: f64 = 58.0;
const NAME_WIDTH_MAX: f64 = 128.0;

/// The fewest values that a box is drawn of.
const BOX_MIN: usize = 5;

/// How far dots lie off the middle of their row, in turn, so that equal ones can be told apart.
const JITTER: [f64; 5] = [0.0, -4.5, 4.5, -2.2, 2.2];

/// The engines of a scenario that ran, in the order of legends.
pub(crate) fn engines<'a>(scenario: &'a ScenarioResult, cast: &Cast) -> Vec<&'a str> {
    let mut engines: Vec<&str> = scenario.engines.iter().map(|engine| engine.engine.as_str()).collect();
    engines.sort_by_key(|engine| cast.rank(engine));
    engines
}

/// The plot of `metric`, or nothing if no run has it.
pub(crate) fn plot(scenario: &ScenarioResult, metric: Metric, cast: &Cast) -> Option<Markup> {
    let rows: Vec<Row<'_>> = engines(scenario, cast)
        .into_iter()
        .map(|engine| Row { engine, look: cast.look(engine), scenario, metric })
        .collect();
    let values: Vec<f64> = rows.iter().flat_map(|row| row.values()).collect();
    if values.is_empty() {
        return None;
    }
    let factor = shown(metric).factor;
    let budget = (metric == Metric::DowntimeGuestMs).then_some(scenario.scenario.downtime_ms);
    let longest = rows.iter().map(|row| row.engine.chars().count()).max().unwrap_or(0) as f64;
    let left = (longest * NAME_CHARACTER_WIDTH).min(NAME_WIDTH_MAX) + 10.0;
    let scale =
        Scale::showing(values.into_iter().chain(budget).map(|value| value * factor), (left, WIDTH - RIGHT));
    let bottom = ABOVE + rows.len() as f64 * ROW;
    let describe = format!("{} by engine: {}", metric.title(), scenario.scenario.title);
    Some(figure(
        WIDTH,
        bottom + BELOW,
        &describe,
        html! {
            g data-figure="boxes" data-scenario=(scenario.scenario.name) data-metric=(metric.name())
                data-factor=(factor) {
                (x_axis(&scale, (ABOVE, bottom), &format!("{}, {}", metric.title(), shown(metric).unit)))
                @for (index, line) in rows.iter().enumerate() {
                    (line.draw(&scale, row(ABOVE, index, ROW), left))
                }
                @if let Some(budget) = budget {
                    (budget_line(scale.at(budget * factor), (ABOVE, bottom), budget, (left, WIDTH)))
                }
            }
        },
    ))
}

struct Row<'a> {
    engine: &'a str,
    look: Look,
    scenario: &'a ScenarioResult,
    metric: Metric,
}

impl Row<'_> {
    /// The sound runs that have the metric.
    fn runs(&self) -> impl Iterator<Item = (&Run, f64)> {
        let runs = self.scenario.runs.iter().filter(|run| run.engine == self.engine && run.is_sound());
        runs.filter_map(|run| Some((run, self.metric.of(&run.measures)?)))
    }

    fn values(&self) -> Vec<f64> {
        self.runs().map(|(_, value)| value).collect()
    }

    fn draw(&self, scale: &Scale, y: f64, left: f64) -> Markup {
        let factor = shown(self.metric).factor;
        let mut values = self.values();
        values.sort_unstable_by(f64::total_cmp);
        let middle = median(&values);
        html! {
            g data-engine=(self.engine) {
                text class="name" x=(px(left - 8.0)) y=(px(y + 4.0)) text-anchor="end" {
                    (fitting(self.engine, left - 8.0)) title { (self.engine) }
                }
                @if let Some(middle) = middle {
                    (spread(&self.look.class, &values, middle, factor, scale, y))
                    @for (index, (run, value)) in self.runs().enumerate() {
                        @let place = (scale.at(value * factor), y + JITTER[index % JITTER.len()]);
                        @let told = html! {
                            title { (self.tell(run, value)) }
                        };
                        g class="run" data-repetition=(run.repetition) data-value=(value) {
                            (mark(&self.look, place, 2.7, !run.measures.idleness.quiet, told))
                        }
                    }
                    text class="figure" x=(px(WIDTH - 4.0)) y=(px(y + 4.0)) text-anchor="end" data-median=(middle) {
                        (value_of(self.metric, middle))
                    }
                } @else {
                    text class="faint" x=(px(left + 8.0)) y=(px(y + 4.0)) { (why_empty(self.scenario, self.engine)) }
                }
            }
        }
    }

    fn tell(&self, run: &Run, value: f64) -> String {
        let noisy = if run.measures.idleness.quiet { "" } else { " (the machine was not quiet)" };
        format!(
            "{}, repetition {}: {}{noisy}",
            self.engine,
            run.repetition + 1,
            with_unit(self.metric, value)
        )
    }
}

/// Whiskers, and the box of at least [`BOX_MIN`] sorted values.
fn spread(class: &str, sorted: &[f64], middle: f64, factor: f64, scale: &Scale, y: f64) -> Markup {
    let at = |value: f64| scale.at(value * factor);
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else { return html! {} };
    let (low, high) = (at(quartile(sorted, 0.25)), at(quartile(sorted, 0.75)));
    html! {
        g class=(format!("spread {class}")) {
            line class="whisker" x1=(px(at(*first))) x2=(px(at(*last))) y1=(px(y)) y2=(px(y)) {}
            @if sorted.len() >= BOX_MIN {
                rect class="box" x=(px(low)) y=(px(y - 9.0)) width=(px((high - low).max(0.5))) height="18" {}
            }
            line class="median" x1=(px(at(middle))) x2=(px(at(middle))) y1=(px(y - 9.0)) y2=(px(y + 9.0)) {}
        }
    }
}

/// The value at `share` of `sorted`, between two where it falls there (type 7 of Hyndman and Fan 1996).
fn quartile(sorted: &[f64], share: f64) -> f64 {
    let place = (sorted.len() as f64 - 1.0) * share;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the length")]
    let index = place.floor() as usize;
    let next = sorted[(index + 1).min(sorted.len() - 1)];
    sorted[index] + (next - sorted[index]) * place.fract()
}

/// Why there is nothing to draw of an engine.
pub(crate) fn why_empty(scenario: &ScenarioResult, engine: &str) -> &'static str {
    let mut outcomes = scenario.runs.iter().filter(|run| run.engine == engine).map(|run| &run.outcome);
    match outcomes.next_back() {
        Some(Outcome::Moved) => "not measured",
        Some(Outcome::NotConverged) => "did not converge",
        Some(Outcome::Unsupported { .. }) => "not supported",
        Some(Outcome::Failed { .. }) => "failed",
        None => "did not run",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_values() {
        let sorted = [1.0, 2.0, 3.0, 4.0, 10.0];
        assert_eq!((quartile(&sorted, 0.25), quartile(&sorted, 0.75)), (2.0, 4.0));
        assert_eq!(quartile(&[1.0, 2.0], 0.25), 1.25);
        assert_eq!(quartile(&[7.0], 0.75), 7.0);
    }
}
