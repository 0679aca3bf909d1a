//! Curves: what changes along an axis.

use maud::{Markup, html};

use super::{Page, legend};
use crate::report::plots::curve::Sweep;
use crate::scenario::Axis;

/// All sweeps, or nothing if the suite has none.
pub(super) fn section(page: &Page<'_>) -> Markup {
    let sweeps = Sweep::all(&page.results.scenarios);
    html! {
        @if !sweeps.is_empty() {
            section id="sweeps" {
                h2 { "Sweeps" }
                @for sweep in &sweeps { (figures(page, sweep)) }
            }
        }
    }
}

fn figures(page: &Page<'_>, sweep: &Sweep<'_>) -> Markup {
    let heading = match sweep.axis {
        Axis::DirtyRateMibS => "Against the guest's dirty rate",
        Axis::MemoryMib => "Against the guest's size",
        Axis::DowntimeMs => "Against the downtime budget",
        Axis::LinkMbitS => "Against the link's rate",
    };
    let first = sweep.points.first().map(|(_, scenario)| &scenario.scenario);
    html! {
        h3 { (heading) " " span class="name" { (sweep.name) } }
        figure class="wide" {
            figcaption {
                "Medians joined, every run as a dot, bars from the least to the largest. Engines are a little apart where \
                 they share a value. A cross above: the engine moved no guest there."
                @if let Some(scenario) = first { " First point: " (scenario.title) "." }
            }
            (legend(&page.cast, sweep.engines(&page.cast)))
            div class="grid" {
                @for metric in sweep.metrics() {
                    @if let Some(figure) = sweep.plot(metric, &page.cast) {
                        div class="scroll" { (figure) }
                    }
                }
            }
        }
    }
}
