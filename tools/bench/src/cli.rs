//! The command line of the harness.

mod report;
mod suite;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::scenario::file;
use crate::simulate::cli::SimulateArgs;

/// Measures live migrations: ferry and its peers on the same guest, side by side.
#[derive(Debug, Parser)]
#[command(name = "ferry-bench", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

/// What the harness can do.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Runs a suite and reports
    Suite(suite::SuiteArgs),
    /// Shows what results say, and writes them as a page or a table
    Report(report::ReportArgs),
    /// Tells whether anything changed for real between two results; exit code 1 if anything is worse
    Compare(report::CompareArgs),
    /// Prints the JSON Schema of results
    Schema,
    /// Drives the same protocol core in virtual time, for what can't be run here
    Simulate(SimulateArgs),
    /// Lists the scenarios of a suite
    List(ListArgs),
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// A suite that comes along, or a TOML file
    suite: String,
}

/// Runs the harness with this process's arguments.
///
/// # Errors
/// Whatever went wrong, in words.
pub fn main() -> anyhow::Result<ExitCode> {
    run(Cli::parse().task)
}

/// Runs one task of the harness.
///
/// # Errors
/// Whatever went wrong, in words.
pub fn run(task: Task) -> anyhow::Result<ExitCode> {
    match task {
        Task::Suite(args) => suite::run(&args),
        Task::Report(args) => report::run_report(&args),
        Task::Compare(args) => report::run_compare(&args),
        Task::Schema => report::run_schema(),
        Task::Simulate(args) => crate::simulate::cli::run(&args),
        Task::List(args) => list(&args),
    }
}

fn list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    for scenario in file::load(&args.suite)?.scenarios {
        println!("{:<24} {}", scenario.name, scenario.title);
    }
    Ok(ExitCode::SUCCESS)
}
