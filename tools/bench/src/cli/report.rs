//! `ferry-bench report` and `compare`: what results say, and whether two say the same.

use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::compare::agree::agree;
use crate::compare::{METRICS, Options, compare};
use crate::report::{csv, html, terminal};
use crate::results::{self, Metric, Results};

/// Columns of a summary that does not go to a terminal.
const COLUMNS_ELSEWHERE: u16 = 120;

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Results of `ferry-bench suite`
    #[arg(value_name = "RESULTS.json")]
    results: PathBuf,
    /// Where to write the page with all figures
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where to write a row a run
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Results as they were
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// Results as they are now
    #[arg(value_name = "B.json")]
    after: PathBuf,
    /// Compare this metric, by its name in the JSON; may be given several times [default: total_ms,
    /// downtime_guest_ms, cpu_s, wire_bytes and what clients saw]
    #[arg(long = "metric", value_name = "NAME", value_parser = metric)]
    metrics: Vec<Metric>,
    /// Changes of up to so many percent are as good as none
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0, value_parser = percent)]
    allow: f64,
    /// Compare the ratios between engines instead: do two runs of one suite agree?
    #[arg(long, conflicts_with = "allow")]
    ratios: bool,
    /// Show comparisons without a change, too
    #[arg(long)]
    all: bool,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

fn metric(name: &str) -> Result<Metric, String> {
    Metric::from_name(name).ok_or_else(|| {
        let known = Metric::ALL.map(Metric::name).join(", ");
        format!("there is no such metric; there are {known}")
    })
}

fn percent(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "give a number".to_owned())?;
    if (0.0..=1000.0).contains(&value) { Ok(value) } else { Err("give 0 to 1000".to_owned()) }
}

/// Shows the summary, and writes what was asked for.
pub(super) fn run_report(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let results = results::load(&args.results)?;
    say(&summary(&results))?;
    if let Some(path) = &args.html {
        write_html(path, &results)?;
    }
    if let Some(path) = &args.csv {
        write_csv(path, &results)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the JSON Schema of results, derived from the types that are written.
pub(super) fn run_schema() -> anyhow::Result<ExitCode> {
    say(&(serde_json::to_string_pretty(&schemars::schema_for!(Results))? + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes to the output; a reader that has seen enough is no error.
fn say(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("can't write to the output")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The summary, as wide as the terminal.
pub(super) fn summary(results: &Results) -> String {
    let columns = console::Term::stdout().size_checked().map_or(COLUMNS_ELSEWHERE, |(_, columns)| columns);
    terminal::summary(results, usize::from(columns))
}

/// Writes the page, and says so.
pub(super) fn write_html(path: &Path, results: &Results) -> anyhow::Result<()> {
    std::fs::write(path, html::page(results)).with_context(|| format!("can't write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// Writes a row a run, and says so.
pub(super) fn write_csv(path: &Path, results: &Results) -> anyhow::Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("can't write {}", path.display()))?;
    csv::write(results, BufWriter::new(file)).with_context(|| format!("can't write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// Compares. 0: nothing worse, or ratios agree; 1: something is worse, or too many are apart; 2: something could not be
/// compared.
pub(super) fn run_compare(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let [before, after] = match [&args.before, &args.after].map(|path| results::load(path)) {
        [Ok(before), Ok(after)] => [before, after],
        [Err(error), _] | [_, Err(error)] => {
            eprintln!("ferry-bench: {:#}", anyhow::Error::from(error));
            return Ok(ExitCode::from(2));
        }
    };
    let metrics = if args.metrics.is_empty() { METRICS.to_vec() } else { args.metrics.clone() };
    let (json, text, code) = if args.ratios {
        let found = agree(&before, &after, &metrics);
        (serde_json::to_string_pretty(&found)?, found.to_terminal(), found.exit_code())
    } else {
        let found = compare(&before, &after, &Options { metrics, allow_percent: args.allow });
        (serde_json::to_string_pretty(&found)?, found.to_terminal(args.all), found.exit_code())
    };
    say(&if args.json { json + "\n" } else { text })?;
    Ok(ExitCode::from(code))
}
