//! `cargo xtask`: the gate and the chores of the repository.
//!
//! - `cargo xtask ci`: formatting, lints, documentation, tidiness. Tests are `cargo test --workspace`.
//! - `cargo xtask tidy`: the rules of this repository that no other tool checks.
//! - `cargo xtask faults`: kills, stalls and cuts off real migrations at every step.
//! - `cargo xtask model`: searches every order of events in a handover.
//! - `cargo xtask sim`: the seeded simulation at length, or one seed of it with a trace.
//! - `cargo xtask fuzz`: bent input for every decoder that a peer reaches.
//! - `cargo xtask linux-guest [test]`: the Linux kernels and the initramfs of the tests, and their test.

mod linux_guest;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Formatting, lints, documentation and tidiness of the whole workspace and the guest
    Ci,
    /// The rules of this repository that no other tool checks
    Tidy,
    /// Kill, stall and cut off real migrations at every step; needs root and /dev/kvm
    Faults {
        /// What to pass on to the campaign: --count N, --seed N, --only N,.., --jobs N
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Search every order of events in a handover
    Model {
        /// What to pass on; '--help' tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Play the seeded simulation: '--seeds N' of them, or one with a trace by '--seed N'
    Sim {
        /// What to pass on; '--help' tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Throw bent input at every decoder that a peer reaches, for '--seconds N'
    Fuzz {
        /// What to pass on; '--help' tells
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build the Linux guest's kernels and initramfs under target/linux-guest
    LinuxGuest {
        #[command(subcommand)]
        task: Option<LinuxGuestTask>,
    },
}

#[derive(Debug, Subcommand)]
enum LinuxGuestTask {
    /// Build them, boot them and migrate them under load
    Test {
        /// What to pass on to the test; '-- --help' tells
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Ci => ci(),
        Task::Tidy => tidy_up(),
        Task::Faults { arguments } => faults(&arguments),
        Task::Model { arguments } => return program(&["--release", "-p", "ferry-model"], &arguments),
        Task::Sim { arguments } => {
            return program(&["-p", "ferry-tests", "--bin", "ferry-sim"], &arguments);
        }
        Task::Fuzz { arguments } => {
            return program(&["-p", "ferry-fuzz", "--bin", "ferry-fuzz"], &arguments);
        }
        Task::LinuxGuest { task: None } => linux_guest::build(&root()),
        Task::LinuxGuest { task: Some(LinuxGuestTask::Test { arguments }) } => {
            linux_guest::test(&root(), &arguments)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ci() -> anyhow::Result<()> {
    let guest = root().join("tools/guest/kernel");
    let warnings = [("RUSTDOCFLAGS", "-D warnings")];
    let top = root();
    step("formatting", &["fmt", "--all", "--check"], &top, &[])?;
    step("formatting of the guest", &["fmt", "--check"], &guest, &[])?;
    tidy_up()?;
    step("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &top, &[])?;
    // What only test builds have is not looked at above.
    let fault_points = ["clippy", "-p", "ferry", "--features", "fault-points", "--", "-D", "warnings"];
    step("lints of the fault points", &fault_points, &top, &[])?;
    let target = top.join("target/guest-lints");
    let target = target.to_str().context("the repository's path is not Unicode")?;
    // The guest is no member of the workspace: it has a target and a linker script of its own.
    step("lints of the guest", &["clippy", "--target-dir", target, "--", "-D", "warnings"], &guest, &[])?;
    step("documentation", &["doc", "--workspace", "--no-deps", "--document-private-items"], &top, &warnings)
}

/// Runs a program of this repository, whose exit code is this one's.
fn program(which: &[&str], arguments: &[String]) -> ExitCode {
    let status = Command::new(env!("CARGO"))
        .args(["run", "--quiet"])
        .args(which)
        .arg("--")
        .args(arguments)
        .current_dir(root())
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {which:?} can't be run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn tidy_up() -> anyhow::Result<()> {
    println!("xtask: tidiness");
    let complaints = tidy::check(&root())?;
    for complaint in &complaints {
        println!("  {complaint}");
    }
    if complaints.is_empty() { Ok(()) } else { bail!("{} places are untidy", complaints.len()) }
}

fn faults(arguments: &[String]) -> anyhow::Result<()> {
    let run = ["run", "--package", "ferry-faults", "--"].map(str::to_owned);
    let all = [&run[..], arguments].concat();
    step("faults", &all.iter().map(String::as_str).collect::<Vec<_>>(), &root(), &[])
}

fn step(what: &str, arguments: &[&str], folder: &Path, environment: &[(&str, &str)]) -> anyhow::Result<()> {
    println!("xtask: {what}");
    let status = Command::new(env!("CARGO"))
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(folder)
        .status()
        .with_context(|| format!("cargo {} can't be run", arguments.join(" ")))?;
    if status.success() { Ok(()) } else { bail!("{what}: cargo {} failed", arguments.join(" ")) }
}

fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.ancestors().nth(2).expect("tools/xtask lies two folders deep").to_owned()
}
