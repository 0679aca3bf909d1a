//! `ferry-bench`: the harness as a command of its own; `ferry bench` is the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((word, order)) = arguments.split_first()
        && word == ferry_bench::worker::WORD
    {
        return ferry_bench::worker::main(order);
    }
    ferry_bench::cli::main().unwrap_or_else(|error| {
        eprintln!("ferry-bench: {error:#}");
        ExitCode::FAILURE
    })
}
