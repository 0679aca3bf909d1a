//! `ferry-bench simulate`: its arguments, and what they lead to.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::calibrate::{self, HoldOut};
use super::hardware::{Hardware, HardwareFile};
use crate::results::Results;

/// Arguments of `simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    #[command(subcommand)]
    task: SimulateTask,
}

/// What can be simulated.
#[derive(Debug, Subcommand)]
enum SimulateTask {
    /// Derives the model's parameters from real runs of a suite, and says how far off it is on others
    Calibrate(CalibrateArgs),
}

/// Arguments of `simulate calibrate`.
#[derive(Debug, Args)]
struct CalibrateArgs {
    /// Results of `ferry-bench suite`
    #[arg(required = true, value_name = "RESULTS.json")]
    results: Vec<PathBuf>,
    /// Which runs are kept back to be predicted
    #[arg(long, value_enum, default_value_t)]
    hold_out: HoldOut,
    /// Use runs on a machine that was not quiet, too
    #[arg(long)]
    all: bool,
    /// Where to write the parameters, for --hardware of the others
    #[arg(long, value_name = "FILE.json")]
    out: Option<PathBuf>,
    /// Where to write everything that was found
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Does what the arguments ask for.
///
/// # Errors
/// Whatever went wrong, in words.
pub fn run(args: &SimulateArgs) -> anyhow::Result<ExitCode> {
    match &args.task {
        SimulateTask::Calibrate(args) => run_calibrate(args),
    }
}

fn run_calibrate(args: &CalibrateArgs) -> anyhow::Result<ExitCode> {
    let read = |path: &PathBuf| -> anyhow::Result<(String, Results)> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("can't read {name}"))?;
        let results = serde_json::from_str(&text).with_context(|| format!("{name} has no results"))?;
        Ok((name, results))
    };
    let results = args.results.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let calibrated = calibrate::calibrate(&results, args.hold_out, args.all, Hardware::default())?;
    print!("{}", calibrate::report::terminal(&calibrated));
    if let Some(path) = &args.out {
        write_json(path, &calibrated.file)?;
        HardwareFile::load(path)?;
    }
    if let Some(path) = &args.json {
        write_json(path, &calibrated)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text + "\n").with_context(|| format!("can't write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}
