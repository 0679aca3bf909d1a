//! The suite's limits, and what was reached.

use maud::{Markup, html};

use super::{Page, anchor};
use crate::report::limits::{LimitWords, counts};
use crate::results::{LimitResult, Verdict};

/// The table, or nothing if the suite has no limits.
pub(super) fn section(page: &Page<'_>) -> Markup {
    let limits = &page.results.limits;
    html! {
        @if !limits.is_empty() {
            section id="limits" {
                h2 { "Limits" }
                figure class="wide" {
                    figcaption {
                        b { (counts(limits)) ". " }
                        "What the suite expects of its figures. Of several engines the best one counts, on either side; ratios \
                         are of runs beside each other, with 95 % confidence intervals. "
                        "“For sure”: the whole interval is on that side. A limit is missed, too, if any run of the engine did \
                         not move its guest unharmed."
                    }
                    div class="scroll" {
                        table class="limits" {
                            thead {
                                tr {
                                    th scope="col" { "limit" }
                                    th scope="col" class="num" { "bound" }
                                    th scope="col" class="num" { "reached" }
                                    th scope="col" { "met?" }
                                }
                            }
                            tbody { @for limit in limits { (row(limit)) } }
                        }
                    }
                }
            }
        }
    }
}

fn row(result: &LimitResult) -> Markup {
    let words = LimitWords::of(result);
    let class = match result.verdict {
        Verdict::Met => "verdict less",
        Verdict::Missed => "verdict more",
        Verdict::NotMeasured => "none",
    };
    html! {
        tr data-limit=(result.limit.title) data-scenario=(result.limit.scenario) data-value=[result.value] {
            th scope="row" {
                (result.limit.title)
                small {
                    (words.what) ", in "
                    a href=(format!("#s-{}", anchor(&result.limit.scenario))) { (result.limit.scenario) }
                }
                @if let Some(note) = &result.note { small { (note) } }
            }
            td class="num" {
                (words.bound)
                @if let Some(aim) = &words.aim { small { "aim " (aim) } }
            }
            td class="num" {
                b { (words.reached) }
                @if let Some(interval) = &words.interval { small { (interval) } }
            }
            td { span class=(class) { (words.verdict) } }
        }
    }
}
