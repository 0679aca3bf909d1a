//! What did not work, and who was not there.

use maud::{Markup, html};

use super::Page;
use crate::results::{Outcome, Run};

/// Runs of one engine in one scenario that ended alike.
struct Case<'a> {
    scenario: &'a str,
    engine: &'a str,
    what: &'static str,
    reason: String,
    repetitions: Vec<u32>,
    of: usize,
}

/// Failures and absent engines; says so if there are none.
pub(super) fn section(page: &Page<'_>) -> Markup {
    let cases = cases(page);
    let absent: Vec<_> = page
        .results
        .engines
        .iter()
        .filter_map(|engine| Some((&engine.name, engine.absent.as_ref()?)))
        .collect();
    html! {
        section id="failures" {
            h2 { "What did not work" }
            @if cases.is_empty() {
                p { "Every run moved its guest unharmed." }
            } @else {
                div class="scroll" {
                    table class="failures" {
                        thead {
                            tr {
                                th scope="col" { "scenario" }
                                th scope="col" { "engine" }
                                th scope="col" { "outcome" }
                                th scope="col" { "repetitions" }
                                th scope="col" { "reason" }
                            }
                        }
                        tbody { @for case in &cases { (row(case)) } }
                    }
                }
            }
            @if !absent.is_empty() {
                h3 { "Absent engines" }
                dl class="facts" {
                    @for (name, reason) in absent { dt { (name) } dd { (reason) } }
                }
            }
        }
    }
}

fn row(case: &Case<'_>) -> Markup {
    let numbers: Vec<String> = case.repetitions.iter().map(|number| (number + 1).to_string()).collect();
    html! {
        tr data-scenario=(case.scenario) data-engine=(case.engine) data-count=(case.repetitions.len()) {
            td { (case.scenario) }
            td { (case.engine) }
            td class="bad" { (case.what) }
            td { (numbers.join(", ")) " of " (case.of) }
            td { (case.reason) }
        }
    }
}

fn cases<'a>(page: &Page<'a>) -> Vec<Case<'a>> {
    let mut cases: Vec<Case<'a>> = Vec::new();
    for scenario in &page.results.scenarios {
        for run in &scenario.runs {
            let Some((what, reason)) = trouble(run) else { continue };
            let same = |case: &&mut Case<'_>| {
                case.scenario == scenario.scenario.name
                    && case.engine == run.engine
                    && case.what == what
                    && case.reason == reason
            };
            if let Some(case) = cases.iter_mut().find(same) {
                case.repetitions.push(run.repetition);
                continue;
            }
            let of = scenario.runs.iter().filter(|other| other.engine == run.engine).count();
            cases.push(Case {
                scenario: &scenario.scenario.name,
                engine: &run.engine,
                what,
                reason,
                repetitions: vec![run.repetition],
                of,
            });
        }
    }
    cases
}

/// What is wrong with a run, and why; nothing if all is well.
fn trouble(run: &Run) -> Option<(&'static str, String)> {
    match &run.outcome {
        Outcome::Moved => run.harm().map(|harm| ("guest harmed", harm)),
        Outcome::NotConverged => Some((
            "did not converge",
            "the guest dirtied memory faster than it could be sent, until the time was up".to_owned(),
        )),
        Outcome::Unsupported { reason } => Some(("not supported", reason.clone())),
        Outcome::Failed { reason } => Some(("failed", reason.clone())),
    }
}
