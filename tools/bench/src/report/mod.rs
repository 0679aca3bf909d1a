//! Results as people read them: one HTML file with figures, a CSV file, a summary for the terminal.
//!
//! ```text
//!              ┌─> html/ (page) ─> plots/ (figures as SVG)
//!  Results ──> ┼─> csv            one row a run, one column a measure
//!              └─> terminal       medians, spreads and ratios at 80 to 120 columns
//! ```
//!
//! All of them show what [`crate::stats`] found and compute nothing of their own besides quartiles of box plots.
//! Every text of results is taken as foreign: it is escaped where it is shown.

pub mod cast;
pub mod csv;
pub mod html;
pub mod limits;
pub mod number;
pub(crate) mod plots;
pub mod terminal;

use crate::results::{EngineInfo, Results, ScenarioResult};
use crate::scenario::EngineKind;

/// The engine that others are held against: the first that is QEMU and took part, or else the first that took part.
#[must_use]
pub fn reference(results: &Results) -> Option<&EngineInfo> {
    let ran = |engine: &&EngineInfo| {
        engine.absent.is_none() && results.scenarios.iter().any(|scenario| takes_part(scenario, &engine.name))
    };
    let plain = |engine: &&EngineInfo| engine.kind == EngineKind::Qemu;
    results.engines.iter().filter(ran).find(plain).or_else(|| results.engines.iter().find(ran))
}

/// Whether `engine` has run in `scenario`.
fn takes_part(scenario: &ScenarioResult, engine: &str) -> bool {
    scenario.engines.iter().any(|summary| summary.engine == engine)
}

/// The engine's median run of those that moved their guest unharmed, by total time.
#[must_use]
pub fn median_run<'a>(scenario: &'a ScenarioResult, engine: &str) -> Option<&'a crate::results::Run> {
    let mut runs: Vec<_> =
        scenario.runs.iter().filter(|run| run.engine == engine && run.is_sound()).collect();
    let total = |run: &crate::results::Run| run.measures.total_ms.unwrap_or(f64::INFINITY);
    runs.sort_by(|a, b| total(a).total_cmp(&total(b)));
    runs.get(runs.len().checked_sub(1)? / 2).copied()
}
