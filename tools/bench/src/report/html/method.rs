//! How the figures came about: what each measure is, and what the statistics are.

use maud::{Markup, html};

use super::Page;
use crate::results::Metric;

/// Notes on method.
pub(super) fn section(page: &Page<'_>) -> Markup {
    html! {
        section id="method" {
            h2 { "Method" }
            p {
                "All engines migrate the same guest, booted from the same file, between two processes on this machine. In \
                 each repetition every engine makes one run, in turn, so that whatever drifts hits all alike. Before each \
                 run the memory that the target will need is touched and the machine is left until it is quiet. Engines are \
                 only ordered and listened to; what a migration costs is measured from outside, the same way for all."
            }
            dl class="facts method" {
                @for metric in Metric::ALL {
                    dt { (metric.title()) } dd { (metric.method()) }
                }
            }
            p {
                "Runs that did not move their guest, or harmed it, count as failures and in nothing else. Medians are given \
                 with the least and the largest, not with averages alone."
            }
            p {
                b { "Ratios " } "are medians of the ratios within each repetition, and need not be the ratio of two medians in \
                 the table. "
                b { "Intervals " } "are 95 % confidence intervals, from three values on. With so few values the usual ones \
                 promise too much: a bootstrapped median of three holds the truth in 75 % of all cases. These span both the \
                 bootstrap's interval of the median and Student's of the mean, of logarithms where values are above zero; in \
                 simulations with heavy-tailed noise they hold it in 93 % or more for 3 to 10 values. Nothing is corrected for \
                 how many ratios there are: of twenty that are truly 1, one may be marked."
            }
            p {
                "The figures of a shared machine move from run to run, and those of different machines can't be compared at \
                 all; ratios within one report can. "
                @if let Some(reference) = page.reference { "Ratios here are to " (reference) ", at equal budgets." }
            }
            p {
                "Every mark carries its value in " code { "data-" } " attributes; the results themselves are in this file as \
                 JSON, in the element " code { "#" (super::DATA_ID) } ", without the timelines of runs that no figure shows."
            }
        }
    }
}
