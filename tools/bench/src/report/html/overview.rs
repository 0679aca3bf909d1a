//! The heading, and all results at a glance: ratios as a figure, medians with spreads and ratios as a table.

use std::cmp::Ordering;

use maud::{Markup, html};

use super::{Page, anchor, legend};
use crate::report::number::{self, digits, heading as metric_heading, value_of};
use crate::report::plots::{boxes, forest};
use crate::report::takes_part;
use crate::results::{Distribution, EngineSummary, Metric, ScenarioResult};
use crate::stats::{RatioView, ratio_of};

/// The columns of the table.
const COLUMNS: [Metric; 6] = [
    Metric::TotalMs,
    Metric::DowntimeGuestMs,
    Metric::CpuS,
    Metric::WireBytes,
    Metric::PeakMemoryBytes,
    Metric::SlowDown,
];

/// Title, purpose, and where the figures come from.
pub(super) fn heading(page: &Page<'_>) -> Markup {
    let results = page.results;
    let machine = &results.machine;
    html! {
        header {
            h1 { (results.title) }
            p class="lead" { (results.summary) }
            dl class="facts" {
                dt { "Measured" }
                dd { (number::moment(results.began_unix_s)) ", in " (number::span(results.took_s)) }
                dt { "Machine" }
                dd {
                    (machine.cpu) ", " (machine.cores) " processors, "
                    (digits(machine.memory_bytes as f64 / number::MIB / 1024.0)) " GiB, Linux " (machine.kernel)
                    ", " (machine.kvm)
                }
                dt { "Quiet?" }
                dd { (quiet(page)) }
                dt { "Engines" }
                dd { (engines(page)) }
                dt { "Command" }
                dd { code { (results.command.join(" ")) } }
                dt { "Harness" }
                dd { "ferry-bench " (machine.ferry) ", suite " (results.suite) ", schema " (results.schema) }
            }
        }
    }
}

/// Whether the figures can be trusted to be the engines' own.
fn quiet(page: &Page<'_>) -> Markup {
    let runs = || page.results.scenarios.iter().flat_map(|scenario| &scenario.runs);
    let all = runs().count();
    let noisy: Vec<_> = runs().map(|run| run.measures.idleness).filter(|idleness| !idleness.quiet).collect();
    let most = |figure: fn(&crate::results::Idleness) -> f64| {
        digits(noisy.iter().map(figure).fold(0.0, f64::max) * 100.0)
    };
    html! {
        @if noisy.is_empty() {
            "Yes: in none of " (all) " runs did others use the machine."
        } @else {
            strong { "Not always: " (noisy.len()) " of " (all) " runs" }
            " had company. Others used up to " (most(|idleness| idleness.others_before.max(idleness.others_during)))
            " % of all CPU time, and the hypervisor below took up to " (most(|idleness| idleness.steal_during))
            " %. These runs count, and are hollow in the box plots."
        }
    }
}

fn engines(page: &Page<'_>) -> Markup {
    html! {
        @for (index, engine) in page.results.engines.iter().enumerate() {
            @if index > 0 { "; " }
            (engine.name)
            @match (&engine.absent, &engine.version) {
                (Some(_), _) => em { " (absent)" },
                (None, Some(version)) => { " (" (version) ")" },
                (None, None) => {},
            }
        }
    }
}

/// Figure and table of everything.
pub(super) fn section(page: &Page<'_>) -> Markup {
    let others = page.cast.order().filter(|name| {
        Some(*name) != page.reference
            && page.results.scenarios.iter().any(|scenario| takes_part(scenario, name))
    });
    html! {
        section id="overview" {
            h2 { "Overview" }
            @if let Some(reference) = page.reference {
                @if let Some(figure) = forest::plot(page.results, reference, &page.cast) {
                    figure class="wide" {
                        figcaption {
                            b { "Every engine beside " (reference) ". " }
                            "Ratios of runs made beside each other, on logarithmic axes, with 95 % confidence \
                             intervals; left of 1 (shaded) is better. Filled marks: the interval excludes 1. Hollow: it \
                             does not, or there are too few pairs for one. Arrows: it goes on."
                        }
                        (legend(&page.cast, others))
                        div class="scroll" { (figure) }
                    }
                }
            }
            (table(page))
        }
    }
}

fn table(page: &Page<'_>) -> Markup {
    html! {
        figure class="wide" {
            figcaption {
                b { "All scenarios. " }
                "Median over the runs that moved their guest, the least and the largest below it"
                @if let Some(reference) = page.reference {
                    ", then the ratio to " (reference) " with its 95 % confidence interval. "
                    span class="verdict less" { "▼ less" } " and " span class="verdict more" { "▲ more" }
                    " mark intervals that exclude 1; less is better everywhere."
                } @else { "." }
            }
            div class="scroll" {
                table class="summary" {
                    thead {
                        tr {
                            th scope="col" { "scenario" }
                            th scope="col" { "engine" }
                            @for metric in COLUMNS { th scope="col" class="num" { (metric_heading(metric)) } }
                        }
                    }
                    @for scenario in &page.results.scenarios { (rows(page, scenario)) }
                }
            }
        }
    }
}

fn rows(page: &Page<'_>, scenario: &ScenarioResult) -> Markup {
    let engines = boxes::engines(scenario, &page.cast);
    html! {
        tbody {
            @for (index, engine) in engines.iter().enumerate() {
                @if let Some(summary) = scenario.engines.iter().find(|summary| summary.engine == *engine) {
                    tr {
                        @if index == 0 {
                            th scope="rowgroup" rowspan=(engines.len()) {
                                a href=(format!("#s-{}", anchor(&scenario.scenario.name))) { (scenario.scenario.title) }
                            }
                        }
                        th scope="row" title=(engine) {
                            (engine)
                            small class=(if summary.moved < summary.runs { "bad" } else { "" }) {
                                (summary.moved) " of " (summary.runs) " moved"
                            }
                        }
                        @for metric in COLUMNS { (cell(page, scenario, summary, metric)) }
                    }
                }
            }
        }
    }
}

fn cell(page: &Page<'_>, scenario: &ScenarioResult, summary: &EngineSummary, metric: Metric) -> Markup {
    let found = summary.metrics.iter().find(|(of, _)| *of == metric).map(|(_, found)| found);
    let Some(found) = found else {
        return html! { td class="num none" { "–" } };
    };
    let ratio = page
        .reference
        .filter(|reference| *reference != summary.engine)
        .and_then(|reference| ratio_of(scenario, metric, &summary.engine, reference));
    html! {
        td class="num" data-scenario=(scenario.scenario.name) data-engine=(summary.engine) data-metric=(metric.name())
            data-median=(found.p50) {
            b { (value_of(metric, found.p50)) }
            (spread(metric, found))
            @if let Some(view) = ratio { (verdict(view)) }
        }
    }
}

fn spread(metric: Metric, found: &Distribution) -> Markup {
    html! {
        @if found.count > 1 {
            small { (value_of(metric, found.min)) " – " (value_of(metric, found.max)) }
        } @else {
            small { "one run" }
        }
    }
}

fn verdict(view: RatioView) -> Markup {
    let (class, sign) = match view.shows() {
        Some(Ordering::Less) => ("verdict less", "▼ "),
        Some(Ordering::Greater) => ("verdict more", "▲ "),
        Some(Ordering::Equal) | None => ("verdict", ""),
    };
    html! {
        small class=(class) data-ratio=(view.ratio) title=(forest::tell(view)) {
            (sign) "×" (number::ratio(view.ratio))
            @if let Some((low, high)) = view.ci95 {
                " (" (number::ratio(low)) "–" (number::ratio(high)) ")"
            }
        }
    }
}
