//! `ferry-bench simulate`: its arguments, and what they lead to.

mod arguments;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};

use self::arguments::{FileArgs, GuestArgs, LinkArgs, SettingsArgs, write_json};
use super::calibrate::{self, HoldOut};
use super::curves::{self, Varied};
use super::evacuation::report::EvacuationReport;
use super::evacuation::{self, evacuate};
use super::hardware::{Hardware, HardwareFile};
use super::one::One;
use super::run::{Pair, migrate_one};
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
    /// Simulates one migration and shows its rounds
    One(OneArgs),
    /// Simulates many migrations and draws time and downtime along one quantity after another
    Curves(CurvesArgs),
    /// Simulates how a rack or a site is emptied
    Evacuate(EvacuateArgs),
    /// Derives the model's parameters from real runs of a suite, and says how far off it is on others
    Calibrate(CalibrateArgs),
}

/// Arguments of `simulate one`.
#[derive(Debug, Args)]
struct OneArgs {
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    /// Let costs scatter as they do in real runs
    #[arg(long)]
    scattered: bool,
    /// Model each page of guests above 1 TiB, too, instead of larger ones: takes seconds a round
    #[arg(long)]
    exact: bool,
    #[command(flatten)]
    files: FileArgs,
}

/// Arguments of `simulate curves`.
#[derive(Debug, Args)]
struct CurvesArgs {
    /// What is varied; all of these if not given
    #[arg(long = "only", value_enum)]
    only: Vec<Varied>,
    #[command(flatten)]
    files: FileArgs,
}

/// Arguments of `simulate evacuate`.
#[derive(Debug, Args)]
struct EvacuateArgs {
    /// A site that comes along (rack, site), or a TOML file
    site: String,
    /// The most migrations away from a host at a time, instead of the site's own
    #[arg(long)]
    out_max: Option<u32>,
    /// The most migrations to a host at a time, instead of the site's own
    #[arg(long)]
    in_max: Option<u32>,
    /// The most migrations at a time in all, instead of the site's own
    #[arg(long)]
    at_once_max: Option<NonZeroUsize>,
    #[command(flatten)]
    files: FileArgs,
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

/// How often an evacuation says how many VMs are left.
const PROGRESS_EVERY: usize = 200;

/// Does what the arguments ask for.
///
/// # Errors
/// Whatever went wrong, in words.
pub fn run(args: &SimulateArgs) -> anyhow::Result<ExitCode> {
    match &args.task {
        SimulateTask::One(args) => run_one(args),
        SimulateTask::Curves(args) => run_curves(args),
        SimulateTask::Evacuate(args) => run_evacuate(args),
        SimulateTask::Calibrate(args) => run_calibrate(args),
    }
}

fn run_one(args: &OneArgs) -> anyhow::Result<ExitCode> {
    let parameters = args.files.parameters(args.scattered)?;
    let (guest, mut facts) = args.guest.guest()?;
    let (pair, link) = args.link.pair()?;
    let pair = Pair { page_scale: args.exact.then_some(1), ..pair };
    let (settings, asked) = args.settings.settings(&pair, &parameters.hardware)?;
    facts.extend([link, asked]);
    let run = migrate_one(&guest, settings, pair, &parameters.hardware, args.files.seed)?;
    let one = One::new(run, args.settings.budget_ms(), facts, parameters);
    print!("{}", one.terminal());
    args.files.write(&one, || one.html())?;
    Ok(ExitCode::SUCCESS)
}

fn run_curves(args: &CurvesArgs) -> anyhow::Result<ExitCode> {
    let parameters = args.files.parameters(false)?;
    let varied: &[Varied] = if args.only.is_empty() { &Varied::ALL } else { &args.only };
    let all = curves::count(varied);
    let progress = |done: usize| {
        if done.is_multiple_of(10) || done == all {
            eprintln!("{done} of {all} migrations");
        }
    };
    let curves = curves::simulate(varied, parameters, &progress)?;
    print!("{}", curves.terminal());
    args.files.write(&curves, || curves.html())?;
    Ok(ExitCode::SUCCESS)
}

fn run_evacuate(args: &EvacuateArgs) -> anyhow::Result<ExitCode> {
    let mut site = evacuation::site::load(&args.site)?;
    let limits = [(args.out_max, &mut site.host.out_max), (args.in_max, &mut site.host.in_max)];
    for (asked, limit) in limits {
        if let Some(asked) = asked {
            anyhow::ensure!(asked > 0, "a host that takes part has one migration at least");
            *limit = asked;
        }
    }
    site.plan.at_once_max = args.at_once_max.or(site.plan.at_once_max);
    let parameters = args.files.parameters(true)?;
    let seed = args.files.seed.wrapping_add(site.seed);
    let mut shown = usize::MAX;
    let evacuation = evacuate(&site, &parameters.hardware, seed, |left| {
        if left.is_multiple_of(PROGRESS_EVERY) && left != shown {
            shown = left;
            eprintln!("{left} VMs left");
        }
    })?;
    let report = EvacuationReport::new(&site, seed, evacuation, parameters);
    print!("{}", report.terminal());
    args.files.write(&report, || report.html())?;
    Ok(ExitCode::SUCCESS)
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
