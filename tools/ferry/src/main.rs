//! The command `ferry`: starts VMs, takes them in, moves them away, and shows what they do.
//!
//! ```text
//!  cli.rs        what can be said            quantity.rs   sizes, rates, durations
//!  commands/     one file a subcommand       client.rs     asks a VM's host process
//!  host/         the process that hosts a VM, confined, with its control API (api.rs)
//!  demo/         the whole story in one command
//! ```
//!
//! Everything about moving VMs is in the library `ferry-migrate`; this is what people see of it.

mod api;
mod cli;
mod client;
mod commands;
mod cpu_profile;
mod demo;
mod host;
mod permission;
mod quantity;
mod security;
mod state_dir;
mod terminal;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use cli::{Cli, Command, Output};
use host::opener::Opener;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((word, order)) = arguments.split_first()
        && word == ferry_bench::worker::WORD
    {
        return ferry_bench::worker::main(order);
    }
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FERRY_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        // It would be told with a macro that panics, and a guest must outlive whoever read what its host says.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .init();
    let json = wants_json(&cli.command);
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            if json {
                println!("{}", serde_json::json!({ "error": format!("{error:#}") }));
            }
            eprintln!("ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Run(args) => args.output.json,
        Command::Receive(args) => args.output.json,
        Command::Migrate(args) => args.output.json,
        Command::Bandwidth(args) => args.output.json,
        Command::Resolve(args) => args.output.json,
        Command::List(Output { json }) => *json,
        Command::Info(args)
        | Command::Pause(args)
        | Command::Resume(args)
        | Command::Shutdown(args)
        | Command::Stop(args) => args.output.json,
        Command::Cert(command) => command.output().json,
        // Their JSON goes into files.
        Command::Demo(_) | Command::Bench { .. } => false,
        // It shows what the VM says.
        Command::Console(_) => false,
    }
}

/// Confines this process if it is to host a VM, before any other thread lives.
fn confine(command: &Command) -> anyhow::Result<Option<Opener>> {
    match command {
        Command::Run(args) => Opener::start(args.seccomp.into()).map(Some),
        Command::Receive(args) => Opener::start(args.seccomp.into()).map(Some),
        Command::Migrate(_)
        | Command::List(_)
        | Command::Console(_)
        | Command::Info(_)
        | Command::Resolve(_)
        | Command::Bandwidth(_)
        | Command::Pause(_)
        | Command::Resume(_)
        | Command::Shutdown(_)
        | Command::Stop(_)
        | Command::Cert(_)
        | Command::Demo(_)
        | Command::Bench { .. } => Ok(None),
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let opener = confine(&command)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let code = runtime.block_on(async {
        match command {
            Command::Run(args) => commands::run::run(args, opener.context("it opens devices")?).await,
            Command::Receive(args) => commands::receive::run(args, opener.context("it opens devices")?).await,
            Command::Migrate(args) => commands::migrate::run(args).await,
            Command::Resolve(args) => commands::resolve::run(args).await,
            Command::List(output) => commands::list::run(output).await,
            Command::Console(args) => commands::console::run(args).await,
            Command::Info(args) => commands::control::info(args).await,
            Command::Bandwidth(args) => commands::control::bandwidth(args).await,
            Command::Pause(args) => commands::control::pause(args).await,
            Command::Resume(args) => commands::control::resume(args).await,
            Command::Shutdown(args) => commands::control::shutdown(args).await,
            Command::Stop(args) => commands::control::stop(args).await,
            Command::Cert(command) => commands::cert::run(command),
            Command::Demo(args) => demo::run(args).await,
            // It waits on threads of its own.
            Command::Bench { task } => {
                tokio::task::spawn_blocking(move || ferry_bench::cli::run(*task)).await?
            }
        }
    });
    // A task may still be in a blocking call (a guest that will not stop); the process ends all the same.
    runtime.shutdown_background();
    code
}
