//! `ferry-bench`: the harness as a command of its own; `ferry bench` is the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match arguments.first() {
        Some(word) if word == ferry_bench::worker::WORD => ferry_bench::worker::run(arguments[1..].to_vec()),
        _ => ferry_bench::cli::main(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("ferry-bench: {error:#}");
        ExitCode::FAILURE
    })
}
