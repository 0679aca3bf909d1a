//! What a downtime was made of: the engine's parts as a stacked bar, with what the guest saw beyond them on top.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{figure, fitting, px};
use crate::report::number::{digits, short_ms};
use crate::results::{Results, Run};

const WIDTH: f64 = 300.0;
const ABOVE: f64 = 36.0;
const BELOW: f64 = 8.0;
const BAR: (f64, f64) = (8.0, 40.0);
/// Where labels begin.
const LABELS: f64 = 66.0;
/// The least distance of two labels.
const LABEL_HEIGHT: f64 = 15.0;

/// Tones of parts in the page's style.
const TONES: usize = 8;

/// What the guest saw and the engine does not count.
const UNTOLD: &str = "not told by the engine";

/// The tones of parts, the same for the same name in all bars of a report.
#[derive(Debug, Default)]
pub(crate) struct Tones(BTreeMap<String, usize>);

impl Tones {
    /// Tones for all parts of `results`, in the order of their first appearance.
    pub(crate) fn of(results: &Results) -> Self {
        let mut tones = BTreeMap::new();
        let runs = results.scenarios.iter().flat_map(|scenario| &scenario.runs);
        for part in runs.flat_map(|run| &run.measures.downtime_parts) {
            let next = tones.len() % TONES;
            tones.entry(part.name.clone()).or_insert(next);
        }
        Self(tones)
    }

    fn class(&self, name: &str) -> String {
        match self.0.get(name) {
            Some(tone) => format!("p{tone}"),
            None if name == UNTOLD => "untold".to_owned(),
            None => "told".to_owned(),
        }
    }
}

struct Segment {
    name: String,
    ms: f64,
    /// Top and bottom of its part of the bar.
    ends: (f64, f64),
    label_y: f64,
}

/// The bar of `run`, as high as its timeline, or nothing if it has no downtime.
pub(crate) fn plot(run: &Run, tones: &Tones, height: f64) -> Option<Markup> {
    let parts = parts(run);
    let whole: f64 = parts.iter().map(|(_, ms)| ms).sum();
    // Also false if it is not a number.
    if !(whole > 0.0 && whole.is_finite()) {
        return None;
    }
    let segments = stack(parts, whole, height);
    let describe = format!("Downtime of {} by part", run.engine);
    let head = match run.measures.downtime_guest_ms {
        Some(ms) => format!("guest saw {} ms", short_ms(ms)),
        None => format!("{} ms by the engine's word", short_ms(whole)),
    };
    Some(figure(
        WIDTH,
        height,
        &describe,
        html! {
            g data-figure="parts" data-engine=(run.engine) data-repetition=(run.repetition) {
                text class="name" x=(px(BAR.0)) y="11" { "downtime by part: " (head) }
                @if let Some(forecast) = run.measures.downtime_forecast_ms {
                    text class="unit" x=(px(BAR.0)) y="25" { "forecast when the guest was stopped: " (short_ms(forecast)) " ms" }
                }
                @for segment in &segments {
                    (draw(segment, tones, whole))
                }
            }
        },
    ))
}

/// The parts from the first to the last, and what the guest saw beyond them.
fn parts(run: &Run) -> Vec<(String, f64)> {
    let measures = &run.measures;
    let mut parts: Vec<(String, f64)> =
        measures.downtime_parts.iter().map(|part| (part.name.clone(), part.ms.max(0.0))).collect();
    if parts.is_empty() {
        parts.extend(measures.downtime_engine_ms.map(|ms| ("told by the engine".to_owned(), ms.max(0.0))));
    }
    let told: f64 = parts.iter().map(|(_, ms)| ms).sum();
    let untold = measures.downtime_guest_ms.map_or(0.0, |guest| guest - told);
    if untold > 0.0 {
        parts.push((UNTOLD.to_owned(), untold));
    }
    parts
}

/// Stacks `parts` from the top down and keeps their labels apart.
fn stack(parts: Vec<(String, f64)>, whole: f64, height: f64) -> Vec<Segment> {
    let mut y = ABOVE;
    let room = height - ABOVE - BELOW;
    let mut segments: Vec<Segment> = parts
        .into_iter()
        .map(|(name, ms)| {
            let ends = (y, y + ms / whole * room);
            y = ends.1;
            Segment { name, ms, ends, label_y: f64::midpoint(ends.0, ends.1) }
        })
        .collect();
    let mut least = ABOVE + LABEL_HEIGHT / 2.0;
    for segment in &mut segments {
        segment.label_y = segment.label_y.max(least);
        least = segment.label_y + LABEL_HEIGHT;
    }
    let mut most = height - BELOW - LABEL_HEIGHT / 2.0;
    for segment in segments.iter_mut().rev() {
        segment.label_y = segment.label_y.min(most);
        most = segment.label_y - LABEL_HEIGHT;
    }
    segments
}

fn draw(segment: &Segment, tones: &Tones, whole: f64) -> Markup {
    let (top, bottom) = segment.ends;
    let middle = f64::midpoint(top, bottom);
    let (bend, label) = (BAR.1 + 8.0, segment.label_y);
    let leader = format!(
        "M{} {}L{} {}L{} {}",
        px(BAR.1),
        px(middle),
        px(bend),
        px(label),
        px(LABELS - 4.0),
        px(label)
    );
    let figure = format!("{} ms", short_ms(segment.ms));
    html! {
        g data-part=(segment.name) data-value=(segment.ms) {
            rect class=(format!("part {}", tones.class(&segment.name))) x=(px(BAR.0)) y=(px(top))
                width=(px(BAR.1 - BAR.0)) height=(px(bottom - top)) {
                title { (segment.name) ": " (figure) " (" (digits(segment.ms / whole * 100.0)) " %)" }
            }
            path class="leader" d=(leader) {}
            text x=(px(LABELS)) y=(px(label + 4.0)) { (fitting(&segment.name, WIDTH - LABELS - 52.0)) }
            text class="figure" x=(px(WIDTH - 4.0)) y=(px(label + 4.0)) text-anchor="end" { (figure) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_apart_and_inside() {
        let parts =
            (0..8).map(|index| (format!("part {index}"), if index == 3 { 100.0 } else { 0.1 })).collect();
        let segments = stack(parts, 100.7, 220.0);
        for pair in segments.windows(2) {
            assert!(pair[1].label_y - pair[0].label_y >= LABEL_HEIGHT - 1e-9);
            assert!((pair[1].ends.0 - pair[0].ends.1).abs() < 1e-9);
        }
        assert!(segments[0].label_y > ABOVE && segments[7].label_y < 220.0);
        assert!((segments[7].ends.1 - (220.0 - BELOW)).abs() < 1e-9);
    }
}
