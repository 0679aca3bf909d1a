//! Calibration: derives parameters from one part of ferry's real runs, predicts the others, and says how far off.
//!
//! ```text
//!  RESULTS.json ──> runs of ferry that moved ──┬─ even repetitions ──> observations ──> fit ──> parameters
//!                                              └─ odd repetitions ───────────────────────────> errors
//! ```
//!
//! A prediction knows only what the scenario says: guest, link, settings. It has no noise; real runs do, so the error is
//! given beside the one that the median of the runs themselves would have.

mod fit;
mod observe;
pub mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;

use self::fit::{fit, median, quantile};
use self::observe::{Observation, observations};
use super::hardware::{Calibration, ErrorFigures, Hardware, HardwareFile};
use super::real::{self, RealOrder};
use super::run::{Ending, migrate_one};
use crate::results::{Outcome, Results, Run};
use crate::scenario::EngineKind;

/// Which runs are kept back to be predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HoldOut {
    /// Every other repetition of every scenario.
    #[default]
    Repetitions,
    /// One scenario after another, with parameters from all the others.
    Scenarios,
}

/// Why nothing can be calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// Too little to derive anything from, or nothing to check it with.
    #[error(
        "{fitted} runs to derive parameters from and {predicted} to predict are too few: give results with ferry's \
         migrations in several repetitions{}", if .left_out.is_empty() { String::new() } else { format!(" (left out: {})", .left_out.join("; ")) }
    )]
    TooFew {
        /// Runs that parameters would come from.
        fitted: usize,
        /// Runs that would be predicted.
        predicted: usize,
        /// What was not used and why.
        left_out: Vec<String>,
    },
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibrated {
    /// The parameters from the fitted runs, with the errors: what the other subcommands take.
    pub file: HardwareFile,
    /// Which runs were predicted.
    pub hold_out: HoldOut,
    /// Runs that count although the machine was not quiet.
    pub runs_not_quiet: u32,
    /// Scenarios and runs that were not used, and why.
    pub left_out: Vec<String>,
    /// The errors by scenario and engine.
    pub groups: Vec<GroupErrors>,
    /// The errors over all predicted runs.
    pub errors: Errors,
}

/// The errors of one quantity after another.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Errors {
    /// Total time.
    pub total: ErrorFigures,
    /// Downtime, by ferry's own word.
    pub downtime: ErrorFigures,
    /// Downtime, as the guest saw it.
    pub downtime_guest: ErrorFigures,
}

/// One scenario and engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupErrors {
    /// The scenario.
    pub scenario: String,
    /// The engine, which stands for its settings.
    pub engine: String,
    /// The predicted total time, in ms.
    pub total_ms: Option<f64>,
    /// The predicted downtime by ferry's own word, in ms.
    pub downtime_ms: Option<f64>,
    /// How it was predicted to end.
    pub ending: Ending,
    /// The measured runs that it is compared with: total, downtime by ferry's word and by the guest's, in ms.
    pub measured: Vec<Measured>,
    /// Their errors.
    pub errors: Errors,
}

/// One measured run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Start to end, in ms.
    pub total_ms: f64,
    /// Downtime by ferry's own word, in ms.
    pub downtime_ms: f64,
    /// Downtime as the guest saw it, in ms.
    pub downtime_guest_ms: Option<f64>,
}

/// The heartbeat's period, in ms: a gap between two beats has half of it more than the standstill, on average.
const HEARTBEAT_HALF_MS: f64 = 0.5;

/// The runs of one engine in one scenario.
#[derive(Debug)]
struct Group {
    scenario: String,
    engine: String,
    order: RealOrder,
    runs: Vec<(u32, Run)>,
}

/// Derives parameters from `results` (each with the name of its file) and checks them. Runs on a busy machine count only
/// if `all`.
///
/// # Errors
/// [`CalibrationError`] if there are too few runs.
pub fn calibrate(
    results: &[(String, Results)],
    hold_out: HoldOut,
    all: bool,
    start: Hardware,
) -> Result<Calibrated, CalibrationError> {
    let (groups, left_out) = groups(results, all);
    let seen: Vec<(u32, Observation)> = groups
        .iter()
        .enumerate()
        .flat_map(|(index, group)| {
            group.runs.iter().flat_map(move |(repetition, run)| {
                observations(run, &group.order, index).into_iter().map(|seen| (*repetition, seen))
            })
        })
        .collect();
    let runs = || groups.iter().flat_map(|group| &group.runs);
    let is_fitted = |repetition: u32| repetition.is_multiple_of(2);
    let (fitted, predicted) = match hold_out {
        HoldOut::Repetitions => {
            let fitted = runs().filter(|(repetition, _)| is_fitted(*repetition)).count();
            (fitted, runs().count() - fitted)
        }
        HoldOut::Scenarios => (runs().count(), runs().count()),
    };
    if fitted < 3 || predicted < 3 {
        return Err(CalibrationError::TooFew { fitted, predicted, left_out });
    }
    let derive = |keep: &dyn Fn(u32, &Observation) -> bool| {
        let kept = seen.iter().filter(|(repetition, seen)| keep(*repetition, seen));
        fit(&kept.map(|(_, seen)| seen.clone()).collect::<Vec<_>>(), start)
    };
    let hardware = match hold_out {
        HoldOut::Repetitions => derive(&|repetition, _| is_fitted(repetition)),
        HoldOut::Scenarios => derive(&|_, _| true),
    };
    let checked: Vec<GroupErrors> = groups
        .iter()
        .enumerate()
        .filter_map(|(index, group)| match hold_out {
            HoldOut::Repetitions => check(group, &hardware, &|repetition| !is_fitted(repetition)),
            HoldOut::Scenarios => {
                let name = &group.scenario;
                let others = |_, seen: &Observation| groups[seen.group].scenario != *name;
                debug_assert!(index < groups.len());
                check(group, &derive(&others), &|_| true)
            }
        })
        .collect();
    let errors = all_errors(&checked);
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let calibration = Calibration {
        results: results.iter().map(|(name, _)| name.clone()).collect(),
        machine: results.first().map(|(_, results)| machine(results)).unwrap_or_default(),
        runs_fitted: count(fitted),
        runs_predicted: count(predicted),
        total: errors.total,
        downtime: errors.downtime,
    };
    Ok(Calibrated {
        file: HardwareFile { hardware, calibration: Some(calibration) },
        hold_out,
        runs_not_quiet: count(runs().filter(|(_, run)| !run.measures.idleness.quiet).count()),
        left_out,
        groups: checked,
        errors,
    })
}

fn machine(results: &Results) -> String {
    let machine = &results.machine;
    format!("{}, {} cores, {}, Linux {}", machine.cpu, machine.cores, machine.kvm, machine.kernel)
}

/// ferry's runs by scenario and engine, and what can't be used.
fn groups(results: &[(String, Results)], all: bool) -> (Vec<Group>, Vec<String>) {
    let mut groups: BTreeMap<(String, String), Group> = BTreeMap::new();
    let mut left_out = Vec::new();
    for (_, results) in results {
        let is_ferry = |name: &str| {
            results.engines.iter().any(|engine| engine.name == name && engine.kind == EngineKind::Ferry)
        };
        for scenario in &results.scenarios {
            let name = &scenario.scenario.name;
            for setting in scenario.scenario.engines.iter().filter(|setting| is_ferry(&setting.engine)) {
                let order = match real::order(&scenario.scenario, setting, results.machine.cores) {
                    Ok(order) => order,
                    Err(reason) => {
                        left_out.push(format!("{name} with {}: {reason}", setting.engine));
                        continue;
                    }
                };
                let of_engine = scenario.runs.iter().filter(|run| run.engine == setting.engine);
                let (used, not): (Vec<&Run>, Vec<&Run>) = of_engine
                    .partition(|run| run.outcome == Outcome::Moved && (all || run.measures.idleness.quiet));
                if !not.is_empty() {
                    left_out.push(format!(
                        "{name} with {}: {} runs that did not move or had no quiet machine",
                        setting.engine,
                        not.len()
                    ));
                }
                let group = groups.entry((name.clone(), setting.engine.clone())).or_insert_with(|| Group {
                    scenario: name.clone(),
                    engine: setting.engine.clone(),
                    order,
                    runs: Vec::new(),
                });
                // Alternating by place, so that runs that are left out do not leave one part without any.
                let first = u32::try_from(group.runs.len()).unwrap_or(0);
                group.runs.extend((first..).zip(used.into_iter().cloned()));
            }
        }
    }
    (groups.into_values().filter(|group| !group.runs.is_empty()).collect(), left_out)
}

/// Predicts a group and compares it with its runs of which `held_out` says so; none if there are none.
fn check(group: &Group, hardware: &Hardware, held_out: &dyn Fn(u32) -> bool) -> Option<GroupErrors> {
    let RealOrder { guest, settings, pair } = &group.order;
    let quiet = Hardware { jitter: 0.0, page_jitter: 0.0, ..*hardware };
    let run = migrate_one(guest, *settings, *pair, &quiet, 1).ok()?;
    let measured: Vec<Measured> = group
        .runs
        .iter()
        .filter(|(repetition, _)| held_out(*repetition))
        .filter_map(|(_, run)| {
            let measures = &run.measures;
            let (total_ms, downtime_ms) = (measures.total_ms?, measures.downtime_engine_ms?);
            Some(Measured { total_ms, downtime_ms, downtime_guest_ms: measures.downtime_guest_ms })
        })
        .collect();
    if measured.is_empty() {
        return None;
    }
    // The harness's clock runs from the order to `Running`, as the report's does but for what comes before the core.
    let overhead_ms = hardware.overhead_us / 1e3;
    let total_ms = run.report.as_ref().map(|report| report.total_ms + overhead_ms);
    let downtime_ms = run.report.as_ref().map(|report| report.downtime_ms);
    let downtime_guest_ms = run.standstill.map(|still| still.as_secs_f64() * 1e3 + HEARTBEAT_HALF_MS);
    let figures = |predicted: Option<f64>, of: &dyn Fn(&Measured) -> Option<f64>| {
        let measured: Vec<f64> = measured.iter().filter_map(of).collect();
        predicted.map_or_else(ErrorFigures::default, |predicted| figures(&[(predicted, measured)]))
    };
    let errors = Errors {
        total: figures(total_ms, &|run| Some(run.total_ms)),
        downtime: figures(downtime_ms, &|run| Some(run.downtime_ms)),
        downtime_guest: figures(downtime_guest_ms, &|run| run.downtime_guest_ms),
    };
    Some(GroupErrors {
        scenario: group.scenario.clone(),
        engine: group.engine.clone(),
        total_ms,
        downtime_ms,
        ending: run.ending,
        measured,
        errors,
    })
}

fn all_errors(groups: &[GroupErrors]) -> Errors {
    let pairs = |predicted: &dyn Fn(&GroupErrors) -> Option<f64>, of: &dyn Fn(&Measured) -> Option<f64>| {
        let pairs: Vec<(f64, Vec<f64>)> = groups
            .iter()
            .filter_map(|group| Some((predicted(group)?, group.measured.iter().filter_map(of).collect())))
            .collect();
        figures(&pairs)
    };
    Errors {
        total: pairs(&|group| group.total_ms, &|run| Some(run.total_ms)),
        downtime: pairs(&|group| group.downtime_ms, &|run| Some(run.downtime_ms)),
        downtime_guest: pairs(&|group| group.downtime_ms.map(|ms| ms + HEARTBEAT_HALF_MS), &|run| {
            run.downtime_guest_ms
        }),
    }
}

/// Errors of predictions, each with the measured values that it should have been.
fn figures(pairs: &[(f64, Vec<f64>)]) -> ErrorFigures {
    let relative = |predicted: f64, measured: f64| predicted / measured - 1.0;
    let mut signed = Vec::new();
    let mut own = Vec::new();
    for (predicted, measured) in pairs {
        let middle = median(&mut measured.clone());
        signed.extend(measured.iter().map(|measured| relative(*predicted, *measured)));
        own.extend(measured.iter().map(|measured| relative(middle, *measured).abs()));
    }
    let mut off: Vec<f64> = signed.iter().map(|error| error.abs()).collect();
    ErrorFigures {
        median: quantile(&mut off, 0.5),
        p90: quantile(&mut off, 0.9),
        max: quantile(&mut off, 1.0),
        bias: median(&mut signed),
        spread: median(&mut own),
    }
}
