//! One migration over time, as in the figures of Clark et al. (NSDI 2005): the link's rate, what is left to send, and
//! the guest's work or its client's throughput, below each other on one axis; rounds as bands, the standstill shaded.
//!
//! ```text
//!         round 1          │ 2 │3│▒ standstill
//!   link  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▒
//!   left  ╲╲╲╲╲╲╲╲╲╲╲╲╲╲╲__╲╲_╲___▒
//!   guest ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▒▇▇▇▇▇▇
//! ```

use maud::{Markup, html};

use super::scale::Scale;
use super::{CHARACTER_WIDTH, figure, px, x_axis, y_axis};
use crate::report::cast::Cast;
use crate::report::number::{MIB, PAGE_BYTES, digits};
use crate::results::{Run, Timeline};

const WIDTH: f64 = 700.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 20.0;
/// Room for the standstill's name and the numbers of rounds.
const ABOVE: f64 = 38.0;
const BELOW: f64 = 36.0;
/// Between two panels, with the lower one's name.
const GAP: f64 = 24.0;
/// Heights of the first panel and of the others.
const PANEL: (f64, f64) = (92.0, 54.0);

/// The most samples of a series that are drawn; more are averaged, evenly.
const SAMPLES_MAX: usize = 700;

/// How much is shown before the order and after the end, as a share of the migration.
const AROUND: f64 = 0.12;

/// From this length on the axis is in seconds.
const SECONDS_FROM_MS: f64 = 10_000.0;

/// A standstill is drawn at least this wide.
const STANDSTILL_WIDTH_MIN: f64 = 2.0;

/// What one panel shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Series {
    Link,
    Left,
    Guest,
    Client,
}

impl Series {
    const ALL: [Self; 4] = [Self::Link, Self::Left, Self::Guest, Self::Client];

    fn title(self) -> &'static str {
        match self {
            Self::Link => "on the link, MiB/s",
            Self::Left => "left to send, MiB",
            Self::Guest => "written by the guest, MiB/s",
            Self::Client => "received by clients, MiB/s",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Link => "link_bytes_per_s",
            Self::Left => "dirty_pages",
            Self::Guest => "guest_pages_per_s",
            Self::Client => "client_bytes_per_s",
        }
    }

    fn samples(self, timeline: &Timeline) -> &[(f64, f64)] {
        match self {
            Self::Link => &timeline.link_bytes_per_s,
            Self::Left => &timeline.dirty_pages,
            Self::Guest => &timeline.guest_pages_per_s,
            Self::Client => &timeline.client_bytes_per_s,
        }
    }

    /// From the unit of the results to MiB.
    fn factor(self) -> f64 {
        match self {
            Self::Link | Self::Client => 1.0 / MIB,
            Self::Left | Self::Guest => PAGE_BYTES / MIB,
        }
    }
}

/// The highest values of each series in several runs that are to be compared, in MiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tops([f64; 4]);

impl Tops {
    /// Those of `runs`.
    pub(crate) fn of<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Self {
        Self(Series::ALL.map(|series| {
            let values =
                runs.clone().flat_map(|run| series.samples(&run.timeline).iter().map(|sample| sample.1));
            values.filter(|value| value.is_finite()).fold(0.0, f64::max) * series.factor()
        }))
    }

    fn of_series(&self, series: Series) -> f64 {
        let index = Series::ALL.iter().position(|other| *other == series).unwrap_or(0);
        self.0[index]
    }

    fn panels(&self) -> Vec<Series> {
        Series::ALL.into_iter().filter(|series| self.of_series(*series) > 0.0).collect()
    }

    /// How high a figure with these series is.
    pub(crate) fn height(&self) -> f64 {
        let panels = self.panels().len().max(1) as f64;
        ABOVE + PANEL.0 + (panels - 1.0) * (PANEL.1 + GAP) + BELOW
    }
}

/// The figure of `run`, or nothing if there is nothing to see over time. `tops` makes figures comparable.
pub(crate) fn plot(scenario: &str, run: &Run, tops: &Tops, cast: &Cast) -> Option<Markup> {
    let panels = tops.panels();
    let end_ms =
        run.timeline.done_ms.or(run.measures.total_ms).filter(|end| *end > 0.0 && end.is_finite())?;
    if panels.is_empty() {
        return None;
    }
    let (factor, unit) = if end_ms >= SECONDS_FROM_MS { (1e-3, "s") } else { (1.0, "ms") };
    let ends = (-AROUND * end_ms * factor, (1.0 + AROUND) * end_ms * factor);
    let view = View { run, time: Scale::exactly(ends, (LEFT, WIDTH - RIGHT)), factor, ends };
    let height = tops.height();
    let bottom = height - BELOW;
    let look = cast.look(&run.engine);
    let describe = format!("Migration by {} over time", run.engine);
    Some(figure(
        WIDTH,
        height,
        &describe,
        html! {
            g data-figure="timeline" data-scenario=(scenario) data-engine=(run.engine) data-repetition=(run.repetition)
                data-factor=(factor) {
                (view.rounds(bottom))
                (x_axis(&view.time, (ABOVE, bottom), &format!("since the order to migrate, {unit}")))
                @for (index, series) in panels.iter().enumerate() {
                    (view.panel(*series, index, tops, &look.class))
                }
                (view.standstill(bottom))
                (view.end(end_ms, bottom))
            }
        },
    ))
}

struct View<'a> {
    run: &'a Run,
    time: Scale,
    factor: f64,
    ends: (f64, f64),
}

impl View<'_> {
    fn x(&self, ms: f64) -> f64 {
        self.time.clamped(ms * self.factor)
    }

    fn rounds(&self, bottom: f64) -> Markup {
        let timed = |round: &&crate::results::Round| round.from_ms.is_some() && round.ms.is_some();
        html! {
            @for round in self.run.measures.rounds.iter().filter(timed) {
                @let from_ms = round.from_ms.unwrap_or_default();
                @let ms = round.ms.unwrap_or_default();
                @let (left, right) = (self.x(from_ms), self.x(from_ms + ms));
                g class=(if round.round % 2 == 1 { "round" } else { "round even" }) data-round=(round.round)
                    data-from-ms=(from_ms) data-ms=(ms) {
                    rect x=(px(left)) y=(px(ABOVE - 14.0)) width=(px(right - left)) height=(px(bottom - ABOVE + 14.0)) {
                        title { "round " (round.round) ": " (digits(ms)) " ms" (self.pages(round)) }
                    }
                    @if let Some(label) = round_label(round.round, right - left) {
                        text x=(px(f64::midpoint(left, right))) y=(px(ABOVE - 3.0)) text-anchor="middle" { (label) }
                    }
                }
            }
        }
    }

    fn pages(&self, round: &crate::results::Round) -> String {
        let mib = |pages: u64| digits(pages as f64 * PAGE_BYTES / MIB);
        let sent = round.sent_pages.map_or(String::new(), |pages| format!(", {} MiB sent", mib(pages)));
        let forecast = |ms| format!(", downtime expected of stopping after it: at most {} ms", digits(ms));
        sent + &round.forecast_upper_ms.map_or(String::new(), forecast)
    }

    fn panel(&self, series: Series, index: usize, tops: &Tops, class: &str) -> Markup {
        let top =
            if index == 0 { ABOVE } else { ABOVE + PANEL.0 + GAP + (index as f64 - 1.0) * (PANEL.1 + GAP) };
        let bottom = top + if index == 0 { PANEL.0 } else { PANEL.1 };
        let scale = Scale::from_zero((0.0, tops.of_series(series)), (bottom, top));
        let samples = thinned(series.samples(&self.run.timeline));
        let line = self.line(series, &samples, &scale);
        let class = if series == Series::Link { class } else { "plain" };
        html! {
            g class=(format!("series {class}")) data-series=(series.name()) {
                (y_axis(&scale, (LEFT, WIDTH - RIGHT), if index == 0 { 5 } else { 3 }))
                @if index > 0 {
                    text class="unit" x=(px(LEFT)) y=(px(top - 6.0)) { (series.title()) }
                }
                @if let Some((line, from, to)) = line {
                    path class="area" d=(format!("{line}V{}H{}Z", px(bottom), px(from))) {}
                    path class="line" d=(line) data-until=(px(to)) {}
                } @else {
                    text class="faint" x=(px(LEFT + 8.0)) y=(px(f64::midpoint(top, bottom) + 4.0)) { "not known" }
                }
                line class="rule" x1=(px(LEFT)) x2=(px(WIDTH - RIGHT)) y1=(px(bottom)) y2=(px(bottom)) {}
                @if index == 0 {
                    text class="unit" x=(px(LEFT)) y="12" { (series.title()) }
                }
            }
        }
    }

    /// The samples as a path with its first and last place: steps for rates, a line for what is left.
    fn line(&self, series: Series, samples: &[(f64, f64)], scale: &Scale) -> Option<(String, f64, f64)> {
        // One more on each side, so that lines go to the edges.
        let begin = samples.partition_point(|(ms, _)| ms * self.factor < self.ends.0).saturating_sub(1);
        let end = samples.partition_point(|(ms, _)| ms * self.factor <= self.ends.1) + 1;
        let shown: Vec<(f64, f64)> = samples[begin..end.min(samples.len())]
            .iter()
            .map(|(ms, value)| (self.x(*ms), scale.clamped(value * series.factor())))
            .collect();
        let (first, last) = (shown.first()?, shown.last()?);
        let mut path = format!("M{} {}", px(first.0), px(first.1));
        for pair in shown.windows(2) {
            let (before, here) = (pair[0], pair[1]);
            path.push_str(&match series {
                Series::Left => format!("L{} {}", px(here.0), px(here.1)),
                // A rate that holds until its sample, and one that holds from it on.
                Series::Link | Series::Guest => format!("V{}H{}", px(here.1), px(here.0)),
                Series::Client => format!("H{}V{}", px(here.0), px(here.1)),
            });
            debug_assert!(here.0 >= before.0, "samples are in the order of time");
        }
        Some((path, first.0, last.0))
    }

    fn standstill(&self, bottom: f64) -> Markup {
        let Some((from, to)) = self.run.timeline.standstill else { return html! {} };
        let (left, right) = (self.x(from), self.x(to));
        let width = (right - left).max(STANDSTILL_WIDTH_MIN);
        let name = format!("standstill {} ms", digits(to - from));
        let half = name.chars().count() as f64 * CHARACTER_WIDTH / 2.0;
        // The first panel's name stands on the same line.
        let first = LEFT + Series::Link.title().chars().count() as f64 * CHARACTER_WIDTH;
        let middle = (left + width / 2.0).clamp(first + half, WIDTH - RIGHT - half);
        html! {
            g class="standstill" data-from-ms=(from) data-to-ms=(to) {
                rect x=(px(left)) y=(px(ABOVE - 20.0)) width=(px(width)) height=(px(bottom - ABOVE + 20.0)) {
                    title { (name) ", as the guest saw it" }
                }
                text x=(px(middle)) y="12" text-anchor="middle" { (name) }
            }
        }
    }

    fn end(&self, end_ms: f64, bottom: f64) -> Markup {
        let x = px(self.x(end_ms));
        html! {
            line class="done" x1=(x) x2=(x) y1=(px(ABOVE)) y2=(px(bottom)) data-done-ms=(end_ms) {
                title { "the engine says that it is done: " (digits(end_ms)) " ms" }
            }
        }
    }
}

/// The number of a round, as much of it as has room.
fn round_label(round: u32, width: f64) -> Option<String> {
    let long = format!("round {round}");
    let short = round.to_string();
    [long, short].into_iter().find(|label| label.chars().count() as f64 * CHARACTER_WIDTH + 3.0 <= width)
}

/// At most [`SAMPLES_MAX`] samples: the means of evenly many each, at the time of the last. What is not finite is left
/// out.
fn thinned(samples: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        samples.iter().copied().filter(|(ms, value)| ms.is_finite() && value.is_finite()).collect();
    let each = finite.len().div_ceil(SAMPLES_MAX).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let last = chunk.last()?.0;
        Some((last, chunk.iter().map(|sample| sample.1).sum::<f64>() / chunk.len() as f64))
    };
    finite.chunks(each).filter_map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_samples_are_averaged_and_few_kept() {
        let few = [(1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)];
        assert_eq!(thinned(&few), [(1.0, 2.0), (3.0, 4.0)]);
        let many: Vec<(f64, f64)> = (0..1400).map(|index| (f64::from(index), f64::from(index % 2))).collect();
        let thin = thinned(&many);
        assert_eq!((thin.len(), thin[0], thin[699]), (700, (1.0, 0.5), (1399.0, 0.5)));
    }

    #[test]
    fn rounds_are_named_where_there_is_room() {
        assert_eq!(round_label(1, 100.0).as_deref(), Some("round 1"));
        assert_eq!(round_label(12, 17.0).as_deref(), Some("12"));
        assert_eq!(round_label(12, 8.0), None);
    }
}
