//! What this program does in processes of its own: `bench-worker KIND ...`, for the harness alone.
//!
//! Both `ferry-bench` and `ferry` hand over to [`main`] if their first argument is [`WORD`].

pub mod ferry;
pub mod tcp;

use std::ffi::{CString, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;

use anyhow::{Context, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::execvp;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first argument of a worker.
pub const WORD: &str = "bench-worker";

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Names the program that hands over to [`main`], for callers that don't do so themselves, such as tests. The first
/// name given counts.
pub fn use_program(program: PathBuf) {
    PROGRAM.get_or_init(|| program);
}

/// The program that workers are started from: the one named, or else this process's own.
///
/// # Errors
/// If the kernel does not say which program this is.
pub fn program() -> io::Result<PathBuf> {
    PROGRAM.get().cloned().map_or_else(std::env::current_exe, Ok)
}

/// Runs the worker that `arguments`, those after [`WORD`], describe; what keeps it from its work goes to standard error.
#[must_use]
pub fn main(arguments: &[OsString]) -> ExitCode {
    run(arguments.to_vec()).unwrap_or_else(|error| {
        eprintln!("{WORD}: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let mut arguments = arguments.into_iter();
    let kind = arguments.next().context("a worker needs to know its work")?;
    // The parent is the thread of a namespace that lives as long as the harness needs the worker.
    set_pdeathsig(Signal::SIGKILL).context("the kernel does not tie this process to its parent")?;
    match kind.to_str() {
        Some("exec") => exec(arguments.collect()),
        Some("ferry-source") => ferry::source(&order(arguments.next())?),
        Some("ferry-target") => ferry::target(&order(arguments.next())?),
        Some("tcp-source") => tcp::source(&order(arguments.next())?),
        Some("tcp-target") => tcp::target(&order(arguments.next())?),
        _ => bail!("there is no worker '{}'", kind.display()),
    }
}

fn order(argument: Option<OsString>) -> anyhow::Result<String> {
    argument.and_then(|order| order.into_string().ok()).context("an order is missing")
}

fn parse<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    serde_json::from_str(text).with_context(|| format!("not an order: {text}"))
}

fn say(said: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(said)?;
    line.push('\n');
    io::stdout().write_all(line.as_bytes()).context("the harness does not listen any more")
}

/// Becomes another program.
fn exec(command: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let words: Vec<CString> =
        command.into_iter().map(|word| CString::new(word.into_vec())).collect::<Result<_, _>>()?;
    let program = words.first().context("exec needs a program")?;
    let Err(error) = execvp(program, &words);
    Err(error).with_context(|| format!("can't start {}", program.to_string_lossy()))
}
