//! `ferry-faults`, which `cargo xtask faults` runs: a campaign of faults, or one of it again.

use std::process::ExitCode;

use clap::Parser;
use ferry_faults::campaign::{self, Judged};
use ferry_faults::{plan, program, summary};

/// How many at the same time: mostly they wait.
const AT_ONCE: usize = 3;

/// Kills, stalls and cuts off real migrations at every step, and sees from outside what becomes of the guest.
#[derive(Debug, Parser)]
struct Cli {
    /// How many faults
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// The campaign's seed; without it, a new one
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults of it, by number
    #[arg(long, value_delimiter = ',')]
    only: Vec<u64>,
    /// Only say which faults these are
    #[arg(long)]
    list: bool,
    /// How many at the same time
    #[arg(long, default_value_t = AT_ONCE)]
    jobs: usize,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let seed = match cli.seed {
        Some(seed) => seed,
        None => u64::from(getrandom::u32().map_err(|error| anyhow::anyhow!("no random seed: {error}"))?),
    };
    let numbers: Vec<u64> = if cli.only.is_empty() { (0..cli.count).collect() } else { cli.only.clone() };
    if cli.list {
        numbers.iter().for_each(|number| println!("{}", plan::fault(seed, *number)));
        return Ok(ExitCode::SUCCESS);
    }
    let program = program::with_fault_points()?;
    println!("faults: seed {seed}, {} faults, {} at a time", numbers.len(), cli.jobs);
    let tell = |judged: &Judged| {
        println!("{}: {} ({:.1} s)", judged.fault, judged.verdict, judged.took.as_secs_f64());
    };
    let judged = campaign::run(seed, &numbers, cli.jobs.max(1), &program, &tell)?;
    println!("\n{}", summary::table(&judged));
    let failed: Vec<&Judged> = judged.iter().filter(|judged| !judged.verdict.is_good()).collect();
    for judged in &failed {
        println!("FAILED {}: {}", judged.fault, judged.verdict);
        println!("  again: cargo xtask faults --seed {seed} --only {}", judged.fault.number);
    }
    println!("{}", summary::endings(&judged));
    println!("{}", summary::last_line(&judged));
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
