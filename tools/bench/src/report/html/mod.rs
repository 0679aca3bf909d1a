//! The report as one HTML file that needs nothing else: inline SVG and style, no script that runs, no network.
//!
//! ```text
//!  heading      what, when, where, how, whether the machine was quiet
//!  overview     ratios of all engines in all scenarios; a table of medians, spreads and ratios
//!  limits       what the suite expects, and what was reached
//!  sweeps       curves along an axis
//!  scenarios    box plots, who saw which downtime, a timeline of the median run of each engine
//!  failures     what did not work, who was absent
//!  method       what each measure is and where it comes from
//!  data         the results themselves as JSON
//! ```
//!
//! It is light or dark as its reader prefers, and prints. Everything that comes from results is escaped by maud; the
//! JSON has no `<` in it.

mod failures;
mod limits;
mod method;
mod overview;
mod scenario;
mod sweeps;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::cast::Cast;
use super::plots::{MARK_RADIUS, mark};
use super::{median_run, reference};
use crate::results::{Results, Timeline};

pub(crate) const STYLE: &str = include_str!("style.css");

/// The id of the element with the results as JSON.
pub const DATA_ID: &str = "results";

/// What every section needs.
struct Page<'a> {
    results: &'a Results,
    cast: Cast,
    /// The engine that others are held against.
    reference: Option<&'a str>,
}

/// The whole file.
#[must_use]
pub fn page(results: &Results) -> String {
    let page = Page {
        results,
        cast: Cast::of(results),
        reference: reference(results).map(|engine| engine.name.as_str()),
    };
    let html = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (results.title) }
                // Browsers ask for an icon elsewhere unless there is one here.
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    (overview::heading(&page))
                    (limits::section(&page))
                    (overview::section(&page))
                    (sweeps::section(&page))
                    (scenario::section(&page))
                    (failures::section(&page))
                    (method::section(&page))
                }
                (data(results))
            }
        }
    };
    html.into_string()
}

/// The results as JSON, with the timelines of those runs alone that are drawn.
fn data(results: &Results) -> Markup {
    // Inside a script element only `<` could end it or begin a comment; in JSON it stands in strings alone.
    let json = serde_json::to_string(&drawn(results)).unwrap_or_else(|_| "null".to_owned());
    let json = json.replace('<', "\\u003c");
    html! {
        script type="application/json" id=(DATA_ID) { (PreEscaped(json)) }
    }
}

/// `results` as the page holds them: the timelines of runs that no figure shows are empty.
#[must_use]
pub fn drawn(results: &Results) -> Results {
    let mut kept = results.clone();
    for (scenario, original) in kept.scenarios.iter_mut().zip(&results.scenarios) {
        for (run, source) in scenario.runs.iter_mut().zip(&original.runs) {
            if !median_run(original, &source.engine).is_some_and(|shown| std::ptr::eq(shown, source)) {
                run.timeline = Timeline::default();
            }
        }
    }
    kept
}

/// The marks of `engines` with their names.
fn legend<'a>(cast: &Cast, engines: impl IntoIterator<Item = &'a str>) -> Markup {
    html! {
        ul class="legend" {
            @for engine in engines {
                li {
                    svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true" {
                        (mark(&cast.look(engine), (0.0, 0.0), MARK_RADIUS + 0.6, false, html! {}))
                    }
                    (engine)
                }
            }
        }
    }
}

/// `text` as part of an `id`: letters, digits and hyphens.
fn anchor(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect()
}
