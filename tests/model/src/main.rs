//! Searches the handover and says what was found; `cargo xtask model` runs it.

use std::process::ExitCode;

use clap::Parser;
use ferry_model::{Mistake, Settings, Summary, search};

/// Search every order of events in a handover. Without bounds, all that continuous integration searches
#[derive(Debug, Parser)]
struct Arguments {
    /// Migrations that are begun, one after another
    #[arg(long, requires = "faults")]
    attempts: Option<u8>,
    /// Things that go wrong in all
    #[arg(long, requires = "attempts")]
    faults: Option<u8>,
    /// With a witness
    #[arg(long, requires = "attempts")]
    witness: bool,
    /// With data streams, and links that are made again
    #[arg(long, requires = "attempts")]
    streams: bool,
    /// How often the guest writes its memory meanwhile
    #[arg(long, requires = "streams", default_value_t = 0)]
    writes: u8,
    /// Stop after so many steps
    #[arg(long, requires = "attempts")]
    steps: Option<usize>,
    /// Build in a mistake, which must be found
    #[arg(long, requires = "attempts")]
    mistake: Option<Mistake>,
}

fn main() -> ExitCode {
    let Arguments { attempts, faults, witness, streams, writes, steps, mistake } = Arguments::parse();
    let searches = match (attempts, faults) {
        (Some(attempts), Some(faults)) => {
            vec![Settings { attempts, faults, witness, streams, writes, steps, mistake }]
        }
        (_, None) | (None, _) => ferry_model::SEARCHES.to_vec(),
    };
    let summaries: Vec<Summary> = searches.into_iter().map(search_and_show).collect();
    let states: usize = summaries.iter().map(|summary| summary.states).sum();
    let depth = summaries.iter().map(|summary| summary.depth).max().unwrap_or_default();
    let properties = summaries.iter().map(|summary| summary.properties).max().unwrap_or_default();
    let well = summaries.iter().all(|summary| summary.breaches.is_empty() && summary.complete);
    let held = if well { "all held" } else { "NOT all held" };
    println!("model: {states} states, depth {depth}, {properties} properties in each, {held}");
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn search_and_show(settings: Settings) -> Summary {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let summary = search(settings, threads);
    for breach in &summary.breaches {
        println!("{} does not hold after", breach.property);
        breach.steps.iter().for_each(|step| println!("  {step:?}"));
        println!("and then, without further faults,");
        breach.then.iter().for_each(|step| println!("  {step:?}"));
        println!("{}", breach.world);
    }
    let Settings { attempts, faults, witness, streams, writes, .. } = settings;
    let witness = if witness { "a witness" } else { "no witness" };
    let memory = if streams { format!("streams, {writes} writes") } else { "memory handed over".to_owned() };
    println!("{attempts} migrations, {faults} faults, {witness}, {memory}: {summary}");
    summary
}
