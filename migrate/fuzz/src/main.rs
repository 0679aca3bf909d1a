//! Fuzzing on a stable toolchain: bends the corpus and makes noise, for so many seconds or inputs, each target in its turn.
//!
//! An input that gets the better of a target is written into the corpus, named on standard error, and ends the run with exit
//! code 1. Without coverage to go by it is blinder than libFuzzer, but it reaches what is behind checksums all the same.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ferry_fuzz::mutate::{bend, noise};
use ferry_fuzz::seeds::{corpus, seeds};
use ferry_fuzz::targets::{FuzzTarget, TARGETS};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The most memory that all this may come to take: no input may have more allocated than it is worth.
const MEMORY_GROWTH_KIB_MAX: u64 = 64 << 10;

/// Inputs between two looks at the clock.
const BATCH: u32 = 64;

/// Throw bent inputs at every decoder that a peer reaches.
#[derive(Debug, Parser)]
struct Arguments {
    /// For how long, all targets together
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target
    #[arg(long)]
    target: Option<String>,
    /// What the inputs are made from; another number makes others
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen: Vec<&FuzzTarget> = TARGETS
        .iter()
        .filter(|target| arguments.target.as_ref().is_none_or(|wanted| wanted == target.name))
        .collect();
    let Some(count) = u32::try_from(chosen.len()).ok().filter(|count| *count > 0) else {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("ferry-fuzz: there is no such target; there are {}", names.join(", "));
        return ExitCode::FAILURE;
    };
    let each = Duration::from_secs(arguments.seconds) / count;
    // A panic is caught and told below, in one line.
    std::panic::set_hook(Box::new(|_| {}));
    let (before, mut inputs, mut failed) = (resident_kib(), 0u64, 0u32);
    for target in chosen {
        match run(target, each, arguments.seed) {
            Ok(tried) => {
                println!("{:<12} {tried:>10} inputs", target.name);
                inputs += tried;
            }
            Err(failure) => {
                failed += 1;
                eprintln!("{:<12} FAILED: {failure}", target.name);
            }
        }
    }
    let grown = resident_kib().saturating_sub(before);
    println!("fuzz: {inputs} inputs for {count} decoders, {failed} failures, {} MiB at most", grown >> 10);
    let within = grown <= MEMORY_GROWTH_KIB_MAX;
    if !within {
        eprintln!("ferry-fuzz: {grown} KiB are more than these inputs are worth");
    }
    if failed == 0 && within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[expect(clippy::disallowed_methods, reason = "it runs for so many seconds of real time")]
fn run(target: &FuzzTarget, each: Duration, seed: u64) -> Result<u64, String> {
    let began = Instant::now();
    let mut pool = seeds(target).map_err(|error| format!("what to begin with can't be read: {error}"))?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut tried = 0;
    for input in &pool {
        attempt(target, input)?;
        tried += 1;
    }
    while began.elapsed() < each {
        for _ in 0..BATCH {
            let other = random.random_range(0..pool.len());
            let mut input = match random.random_range(0..8u8) {
                0 => noise(&mut random),
                _ => pool[random.random_range(0..pool.len())].clone(),
            };
            bend(&mut input, &pool[other], &mut random);
            attempt(target, &input)?;
            tried += 1;
            // Bent ones are bent further, so that more than a step from the seeds is reached.
            if random.random_range(0..64u8) == 0 {
                if pool.len() < 512 {
                    pool.push(input);
                } else {
                    let replaced = random.random_range(256..pool.len());
                    pool[replaced] = input;
                }
            }
        }
    }
    Ok(tried)
}

fn attempt(target: &FuzzTarget, input: &[u8]) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).map_err(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
        match keep(target, input) {
            Ok(path) => format!("{said}; the input is {}", path.display()),
            Err(error) => format!("{said}; the input can't be kept ({error}): {input:02x?}"),
        }
    })
}

/// Writes an input that failed into the corpus, where it is tried first from now on.
fn keep(target: &FuzzTarget, input: &[u8]) -> std::io::Result<PathBuf> {
    let folder = corpus(target);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(format!("failed-{:08x}", crc32c::crc32c(input)));
    std::fs::write(&path, input)?;
    Ok(path)
}

/// The most memory that this process has had at once.
fn resident_kib() -> u64 {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.ok().and_then(|status| status.vmhwm).unwrap_or_default()
}
