//! Plays the seeded simulation at length; `cargo xtask sim` starts it.
//!
//! Without a bug every seed must end with the guest on the right bytes at exactly one host. Then a tenth as many seeds are
//! played with each bug in the hosts: whatever harm it does must be caught before the guest runs on it.

use std::process::ExitCode;

use clap::Parser;
use ferry_tests::sim::{Bug, Plan, play, run};

/// Play the seeded simulation.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds to play, from 0
    #[arg(long, default_value_t = 5000)]
    seeds: u64,
    /// Play only this seed, with every step on standard error
    #[arg(long)]
    seed: Option<u64>,
    /// With this bug in the hosts
    #[arg(long, value_parser = bug)]
    bug: Option<Bug>,
    /// The source also reads all of memory before the handover
    #[arg(long)]
    whole: bool,
}

fn bug(word: &str) -> Result<Bug, String> {
    let words: Vec<_> = Bug::all().map(Bug::word).collect();
    Bug::from_word(word).ok_or_else(|| format!("known are {}", words.join(", ")))
}

fn main() -> ExitCode {
    let Arguments { seeds, seed, bug, whole } = Arguments::parse();
    let chosen = Plan { bug, whole: whole.then_some(true) };
    if let Some(seed) = seed {
        println!("{:#?}", run(seed, chosen, true));
        return ExitCode::SUCCESS;
    }
    let mut failed = 0;
    if bug.is_none() {
        let played = play(0..seeds, chosen);
        let reconnections: u32 = played.reports.iter().map(|report| report.reconnections).sum();
        println!(
            "{seeds} seeds: {} moved, {} stayed, {reconnections} reconnections, {} in doubt for a while",
            played.moved(),
            played.reports.len() - played.moved(),
            played.count(|report| report.doubted),
        );
        for (ending, count) in played.endings() {
            println!("  {count:>7} {ending}");
        }
        failed += tell_failed(&played.failed, chosen);
    }
    let bugs: Vec<Bug> = bug.map_or_else(|| Bug::all().collect(), |bug| vec![bug]);
    let (mut harmful, mut missed) = (0, 0);
    for bug in bugs {
        // What a dirty log has missed shows only in memory itself.
        let plan = Plan { bug: Some(bug), whole: bug.is_of_the_log().then_some(true).or(chosen.whole) };
        let played = play(0..(seeds / 10).max(1), plan);
        let harm = played.count(|report| report.harmful);
        let caught = played.count(|report| report.harmful && report.caught);
        println!("  {:<22} {harm:>5} of {} harmful, {caught} caught", bug.word(), played.reports.len());
        harmful += harm;
        missed += harm - caught;
        failed += tell_failed(&played.failed, plan);
    }
    println!("{seeds} seeds: {failed} failed; {harmful} harmful bugs: {missed} missed");
    if failed + missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tell_failed(failed: &[u64], plan: Plan) -> usize {
    if let Some(seed) = failed.first() {
        let bug = plan.bug.map_or_else(String::new, |bug| format!(" --bug {}", bug.word()));
        let whole = if plan.whole == Some(true) { " --whole" } else { "" };
        println!(
            "  FAILED: {failed:?}; play the first again with\n    cargo xtask sim --seed {seed}{bug}{whole}"
        );
    }
    failed.len()
}
