//! `ferry list`: what this host has.

use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;

use crate::api::{self, VmInfo};
use crate::cli::Output;
use crate::client;
use crate::quantity::show_bytes;
use crate::state_dir::StateDir;

/// How long one host process may take to answer before it is left out.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) async fn run(output: Output) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    let mut infos: Vec<VmInfo> = Vec::new();
    for name in state.names()? {
        let asked = client::call(&state, &name, Method::GET, api::VM);
        match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
            Ok(Ok(info)) => infos.push(info),
            // A socket without a process is what a killed one leaves; its name can be taken again.
            Ok(Err(error)) => tracing::info!("'{name}' is left out: {error:#}"),
            Err(_) => eprintln!("ferry: '{name}' did not answer within {} s", ANSWER_TIMEOUT.as_secs()),
        }
    }
    if output.json {
        println!("{}", serde_json::to_string_pretty(&infos)?);
        return Ok(ExitCode::SUCCESS);
    }
    if infos.is_empty() {
        println!("no VMs; start one with: ferry run --name web --guest 'dirty rate=100 set=64'");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:<20} {:<10} {:>10} {:>5} {:>6} {:>8}",
        "NAME", "STATE", "MEMORY", "vCPUs", "EPOCH", "PROCESS"
    );
    for info in infos {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        println!(
            "{:<20} {:<10} {:>10} {:>5} {:>6} {:>8}",
            info.name,
            info.state,
            or_dash(info.memory_bytes.map(show_bytes)),
            or_dash(info.cpus.map(|cpus| cpus.to_string())),
            or_dash(info.epoch.map(|epoch| epoch.to_string())),
            info.pid,
        );
    }
    Ok(ExitCode::SUCCESS)
}
