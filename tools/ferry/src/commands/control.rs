//! `ferry info`, `pause`, `resume`, `shutdown`, `stop` and `bandwidth`: one request each.

use std::process::ExitCode;

use hyper::Method;

use super::resolve;
use crate::api::{self, BandwidthRequest, RefusedSystemCall, VmInfo};
use crate::cli::{BandwidthArgs, NameArgs};
use crate::client;
use crate::quantity::show_bytes;
use crate::state_dir::StateDir;

pub(crate) async fn info(args: NameArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    // Without a process there is still what it has left on disk.
    let info = match client::call(&state, &args.name, Method::GET, api::VM).await {
        Ok(info) => info,
        Err(error) => resolve::info_of_records(&state, &args.name)?.ok_or(error)?,
    };
    if args.output.json {
        println!("{}", serde_json::to_string_pretty(&info)?);
        return Ok(ExitCode::SUCCESS);
    }
    print(&info);
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn pause(args: NameArgs) -> anyhow::Result<ExitCode> {
    change(args, api::PAUSE).await
}

pub(crate) async fn resume(args: NameArgs) -> anyhow::Result<ExitCode> {
    change(args, api::RESUME).await
}

/// Presses the power button. What comes of it is the guest's to decide, so it is not waited for.
pub(crate) async fn shutdown(args: NameArgs) -> anyhow::Result<ExitCode> {
    let info = ask(&args, Method::PUT, api::POWER_BUTTON).await?;
    if args.output.json {
        println!("{}", serde_json::to_string(&info)?);
    } else {
        println!("{}: asked to shut down", info.name);
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn stop(args: NameArgs) -> anyhow::Result<ExitCode> {
    change(args, api::STOP).await
}

/// Changes the bandwidth of a migration under way.
pub(crate) async fn bandwidth(args: BandwidthArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    let request = BandwidthRequest { bytes_per_s: args.rate.0 };
    client::tell_with(&state, &args.name, Method::PUT, api::MIGRATION_BANDWIDTH, Some(&request)).await?;
    if args.output.json {
        println!("{}", serde_json::to_string(&request)?);
    } else {
        let rate = request
            .bytes_per_s
            .map_or_else(|| "no limit".to_owned(), |rate| format!("{}/s", show_bytes(rate)));
        println!("{}: {rate}", args.name);
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(args: &NameArgs, method: Method, path: &str) -> anyhow::Result<VmInfo> {
    let state = StateDir::from_environment()?;
    client::call(&state, &args.name, method, path).await
}

async fn change(args: NameArgs, path: &str) -> anyhow::Result<ExitCode> {
    let info = ask(&args, Method::PUT, path).await?;
    if args.output.json {
        println!("{}", serde_json::to_string(&info)?);
    } else {
        println!("{}: {}", info.name, info.state);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(info: &VmInfo) {
    let row = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            println!("{label:<10} {value}");
        }
    };
    row("name", Some(info.name.clone()));
    row("state", Some(info.state.to_string()));
    row("id", info.id.clone());
    row("epoch", info.epoch.map(|epoch| epoch.to_string()));
    row("memory", info.memory_bytes.map(show_bytes));
    row("backing", info.memory_kind.clone());
    row("vCPUs", info.cpus.map(|cpus| cpus.to_string()));
    row("CPU profile", info.cpu_profile.clone());
    row("shows through", Some(info.cpu_leaks.join(" ")).filter(|leaks| !leaks.is_empty()));
    if let Some(network) = &info.network {
        row("tap", Some(network.tap.clone()));
        row("mac", Some(network.mac.clone()));
        let addresses: Vec<String> = network.addresses.iter().map(ToString::to_string).collect();
        row("addresses", Some(addresses.join(", ")).filter(|text| !text.is_empty()));
    }
    row("terminal", info.terminal.clone());
    for RefusedSystemCall { thread, system_call, count } in &info.refused_system_calls {
        row("refused", Some(format!("{system_call} to a {thread} thread, {count} times")));
    }
    let turned_away = info.turned_away.filter(|counts| counts.connections + counts.streams > 0);
    row(
        "turned away",
        turned_away
            .map(|counts| format!("{} connections, {} data streams", counts.connections, counts.streams)),
    );
    row("listens", info.listen.clone());
    row("witness", info.witness.clone());
    row("process", Some(info.pid).filter(|pid| *pid > 0).map(|pid| pid.to_string()));
    row("note", info.note.clone());
}
