//! `ferry-bench suite`: runs, shows how it goes, writes the results.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::results::{Outcome, Results, Run, ScenarioResult};
use crate::runner::{self, Progress, Selection};
use crate::scenario::{Scenario, file};

/// Arguments of `suite`.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// A suite that comes along (standard, memory, smoke), or a TOML file
    suite: String,
    /// Run only scenarios whose name contains this; may be given several times
    #[arg(long = "only", value_name = "PART")]
    only: Vec<String>,
    /// Run only this engine; may be given several times
    #[arg(long = "engine", value_name = "NAME")]
    engines: Vec<String>,
    /// Repetitions, instead of each scenario's own
    #[arg(long, value_name = "N")]
    repetitions: Option<u32>,
    /// Where to write; .json, .html and .csv are appended [default: ferry-bench-SUITE]
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
}

/// Runs a suite. The exit code is a failure if a guest was lost or changed.
pub(super) fn run(args: &SuiteArgs) -> anyhow::Result<ExitCode> {
    let suite = file::load(&args.suite)?;
    let selection = Selection {
        scenarios: args.only.clone(),
        engines: args.engines.clone(),
        repetitions: args.repetitions,
    };
    let out = args.out.clone().unwrap_or_else(|| format!("ferry-bench-{}", suite.name).into());
    let results = runner::run(&suite, &selection, &mut Lines)?;
    write(&out, &results)?;
    Ok(if lost_a_guest(&results) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn write(out: &Path, results: &Results) -> anyhow::Result<()> {
    let path = out.with_added_extension("json");
    let text = serde_json::to_string(results)?;
    std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    print!("{}", super::report::summary(results));
    println!("{}", path.display());
    super::report::write_html(&out.with_added_extension("html"), results)?;
    super::report::write_csv(&out.with_added_extension("csv"), results)
}

/// Whether a guest of ferry's was not well where it should have been.
fn lost_a_guest(results: &Results) -> bool {
    let runs = results.scenarios.iter().flat_map(|scenario| &scenario.runs);
    runs.filter(|run| run.outcome == Outcome::Moved).any(|run| {
        let check = &run.measures.check;
        check.errors.is_some_and(|errors| errors > 0) || check.digest_equal == Some(false)
    })
}

/// One line a run.
struct Lines;

impl Progress for Lines {
    fn begins(&mut self, scenario: &Scenario, engine: &str, repetition: u32) {
        eprint!("{:<20} {engine:<18} {:>2}  ", scenario.name, repetition + 1);
    }

    fn ended(&mut self, run: &Run) {
        let measures = &run.measures;
        let show = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let cpu: f64 = measures.processes.iter().map(|process| process.cpu_engine_s).sum();
        let quiet = if measures.idleness.quiet { "" } else { "  (the machine was not quiet)" };
        match &run.outcome {
            Outcome::Moved => eprintln!(
                "total {:>9} ms   downtime {:>7} ms (engine {:>6})   CPU {cpu:.2} s{quiet}",
                show(measures.total_ms),
                show(measures.downtime_guest_ms),
                show(measures.downtime_engine_ms),
            ),
            Outcome::NotConverged => eprintln!("did not converge{quiet}"),
            Outcome::Unsupported { reason } => eprintln!("not supported: {reason}"),
            Outcome::Failed { reason } => eprintln!("FAILED: {reason}"),
        }
    }

    fn scenario_done(&mut self, _: &ScenarioResult) {}
}
