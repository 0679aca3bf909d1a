//! Runs a suite: every scenario, every repetition, every engine in turn.
//!
//! ```text
//! scenario 1   repetition 0: ferry, qemu     repetition 1: qemu, ferry     ...
//!              each run: hosts, pair, guest ready, clients, warm memory, quiet machine,
//!                        watch │ migrate │ watch, all gone
//! ```
//!
//! The engines' order rotates from repetition to repetition, so that drift of the machine and traces of whoever ran
//! before hit all alike. A run that fails is a result like any other.

mod machine;
mod run;

use std::ffi::OsStr;
use std::path::Path;

use ferry_lab::LabClock;

use crate::engine::{self, Engine};
use crate::measure::warm::WarmMemory;
use crate::results::{EngineInfo, Results, Run, SCHEMA, ScenarioResult};
use crate::scenario::{Scenario, Suite};
use crate::stats;

/// So many guests' worth of memory is touched before a scenario begins; see [`crate::measure::warm`].
const WARM_GUESTS: u32 = 3;

/// What a runner tells while it works.
pub trait Progress {
    /// A run begins.
    fn begins(&mut self, scenario: &Scenario, engine: &str, repetition: u32);
    /// It has ended.
    fn ended(&mut self, run: &Run);
    /// A scenario is through.
    fn scenario_done(&mut self, result: &ScenarioResult);
}

/// Which part of a suite to run.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only scenarios whose name contains one of these; all if there is none.
    pub scenarios: Vec<String>,
    /// Only these engines; all if there is none.
    pub engines: Vec<String>,
    /// So many repetitions instead of each scenario's own.
    pub repetitions: Option<u32>,
}

/// Why a suite could not be run at all.
#[derive(Debug, thiserror::Error)]
pub enum SuiteRunError {
    /// The kernel file for the guests can't be written.
    #[error("can't write the workload guest to {folder}")]
    Guest {
        /// Where it was tried.
        folder: String,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// Nothing is left to run.
    #[error("no scenario of suite '{suite}' has that name and one of these engines")]
    Nothing {
        /// The suite.
        suite: String,
    },
}

/// Runs `suite` and returns everything that was found.
///
/// # Errors
/// [`SuiteRunError`] before anything has been measured. What fails later is part of the results.
pub fn run(
    suite: &Suite,
    selection: &Selection,
    progress: &mut dyn Progress,
) -> Result<Results, SuiteRunError> {
    let clock = LabClock::start();
    let engines: Vec<Box<dyn Engine>> = suite.engines.iter().map(engine::find).collect();
    let scenarios = select(suite, selection);
    if scenarios.is_empty() {
        return Err(SuiteRunError::Nothing { suite: suite.name.clone() });
    }
    let folder = guest_folder()?;
    let mut results = Results {
        schema: SCHEMA,
        suite: suite.name.clone(),
        title: suite.title.clone(),
        summary: suite.summary.clone(),
        began_unix_s: unix_s(clock),
        took_s: 0.0,
        command: std::env::args().collect(),
        machine: machine::info(),
        engines: used_engines(&engines, &scenarios),
        scenarios: Vec::new(),
        limits: Vec::new(),
    };
    for scenario in scenarios {
        let result = run_scenario(&scenario, &engines, folder.path(), clock, progress);
        progress.scenario_done(&result);
        results.scenarios.push(result);
    }
    let limits: Vec<_> = suite
        .limits
        .iter()
        .filter(|limit| results.scenarios.iter().any(|result| result.scenario.name == limit.scenario))
        .cloned()
        .collect();
    results.limits = stats::limits::judge(&limits, &results.scenarios, &results.engines);
    results.took_s = clock.now().as_secs_f64();
    Ok(results)
}

fn unix_s(clock: LabClock) -> u64 {
    clock.origin_unix().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A folder in memory, as VMMs have their state on hosts, with the guest's kernel in it.
fn guest_folder() -> Result<tempfile::TempDir, SuiteRunError> {
    let in_memory = Path::new("/run");
    let folder = tempfile::Builder::new().prefix("ferry-bench.").tempdir_in(in_memory);
    let failed = |source| SuiteRunError::Guest { folder: in_memory.display().to_string(), source };
    let folder = folder.or_else(|_| tempfile::tempdir()).map_err(failed)?;
    std::fs::write(folder.path().join(run::KERNEL), ferry_guest_image::WORKLOAD_GUEST).map_err(failed)?;
    Ok(folder)
}

fn select(suite: &Suite, selection: &Selection) -> Vec<Scenario> {
    let named = |scenario: &&Scenario| {
        selection.scenarios.is_empty() || selection.scenarios.iter().any(|part| scenario.name.contains(part))
    };
    let mut scenarios: Vec<Scenario> = suite.scenarios.iter().filter(named).cloned().collect();
    for scenario in &mut scenarios {
        if !selection.engines.is_empty() {
            scenario.engines.retain(|setting| selection.engines.contains(&setting.engine));
        }
        scenario.repetitions = selection.repetitions.unwrap_or(scenario.repetitions);
    }
    scenarios.retain(|scenario| !scenario.engines.is_empty());
    scenarios
}

fn used_engines(engines: &[Box<dyn Engine>], scenarios: &[Scenario]) -> Vec<EngineInfo> {
    let used = |info: &&EngineInfo| {
        scenarios.iter().flat_map(|scenario| &scenario.engines).any(|setting| setting.engine == info.name)
    };
    engines.iter().map(|engine| engine.info()).filter(used).cloned().collect()
}

fn run_scenario(
    scenario: &Scenario,
    engines: &[Box<dyn Engine>],
    folder: &Path,
    clock: LabClock,
    progress: &mut dyn Progress,
) -> ScenarioResult {
    let here: Vec<_> = scenario
        .engines
        .iter()
        .filter_map(|setting| {
            let engine = engines.iter().find(|engine| engine.info().name == setting.engine)?;
            engine.info().absent.is_none().then_some((engine, setting))
        })
        .collect();
    // What a source, its target and the memory held for it will have in use together.
    drop(WarmMemory::hold(scenario.in_use_mib().saturating_mul(WARM_GUESTS)));
    let mut runs: Vec<Run> = Vec::new();
    for repetition in 0..scenario.repetitions {
        for position in 0..here.len() {
            let turn = (position + usize::try_from(repetition).unwrap_or(0)) % here.len();
            let (engine, setting) = here[turn];
            if run::is_hopeless(&runs, &setting.engine) {
                continue;
            }
            progress.begins(scenario, &setting.engine, repetition);
            let attempt = run::Attempt { scenario, setting, engine: &**engine, repetition, folder, clock };
            let run = attempt.run();
            progress.ended(&run);
            runs.push(run);
        }
    }
    let (engines, ratios) = stats::summarise(&runs);
    ScenarioResult { scenario: scenario.clone(), runs, engines, ratios }
}

/// Whether `program` is in the search path.
#[must_use]
pub fn in_path(program: &OsStr) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
