//! The test behind `cargo xtask linux-guest test`: boots a real Linux, migrates it back and forth under each load with
//! clients at work, and checks memory, clocks and disk from inside, and clients and wall clock from outside.
//!
//! Its last line is `linux guest: N migrations, 0 errors`; with any error the exit code is not zero. Where a part can't
//! run, it says SKIPPED and why, which under `CI=true` is an error.

mod agent;
mod back_end;
mod guest;
mod scenario;
mod wall_clock;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ferry_lab::{Lab, LabClock};

use guest::{Images, Variant};
use scenario::Outcome;

#[derive(Debug, Parser)]
struct Cli {
    /// The command 'ferry'
    #[arg(long)]
    ferry: PathBuf,
    /// The folder with the kernels and the initramfs
    #[arg(long)]
    images: PathBuf,
    /// Only this kernel
    #[arg(long, value_enum)]
    variant: Option<Variant>,
    /// Migrations under each load
    #[arg(long, default_value_t = 5)]
    migrations: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let possible = ferry_tests::tier::has_kvm("linux guest") && ferry_tests::tier::is_root("linux guest");
    if !possible {
        return ExitCode::SUCCESS;
    }
    let clock = LabClock::start();
    let images = Images { ferry: cli.ferry, folder: cli.images };
    let variants = cli.variant.map_or_else(|| Variant::ALL.to_vec(), |variant| vec![variant]);
    // At the same time: most of it is waiting, and guests that compete for processors meet more of what can go wrong.
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let start = |variant: Variant| {
            let images = &images;
            scope.spawn(move || run(images, variant, clock, cli.migrations))
        };
        let threads: Vec<_> = variants.into_iter().map(start).collect();
        let panicked = |_| Outcome::failed("the test of a variant panicked; its message is above");
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    let migrations: u32 = outcomes.iter().map(|outcome| outcome.migrations).sum();
    let errors: Vec<&String> = outcomes.iter().flat_map(|outcome| &outcome.errors).collect();
    for error in &errors {
        println!("error: {error}");
    }
    println!("linux guest: {migrations} migrations, {} errors", errors.len());
    if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(images: &Images, variant: Variant, clock: LabClock, migrations: u32) -> Outcome {
    match Lab::new() {
        Ok(lab) => scenario::run(&lab, images, variant, clock, migrations),
        Err(error) => Outcome::failed(&format!("{variant:?}: no lab: {error}")),
    }
}
