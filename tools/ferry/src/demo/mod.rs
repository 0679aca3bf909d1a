//! `ferry demo`: the main job in one command, after Clark et al. (NSDI 2005): a web server of 800 MiB is loaded
//! with requests for a file of 512 KiB and moves to another host meanwhile.
//!
//! The hosts are real `ferry run` and `ferry receive` processes; with root they stand in network namespaces of
//! their own (network.rs), without it on loopback with a guest that dirties memory (local.rs). Namespaces are
//! anonymous and the processes end with this one, so nothing is left whatever happens.

mod hosts;
mod local;
mod network;
mod result;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::LabClock;
use ferry_migrate::MigrateOptions;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::report::{MigrationReport, ms};
use hyper::Method;
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{self, GuestReport, MigrationEvent, MigrationRequest, OnTimeoutWord};
use crate::cli::DemoArgs;
use crate::client;
use crate::commands::migrate::{HEADING, round_line};
use hosts::HostProcess;

/// The VM's name on both hosts.
const NAME: &str = "web";

/// How long the guest is watched before the migration and after it.
const WATCH: Duration = Duration::from_secs(2);

pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        bail!(
            "the demo runs a real VM and needs /dev/kvm: {error} (load the kvm module, or join the group 'kvm')"
        );
    }
    let work = async {
        if nix::unistd::geteuid().is_root() && !args.no_network {
            network::run(&args).await
        } else {
            local::run(&args).await
        }
    };
    // Dropping what is under way ends the host processes and with them the namespaces.
    let mut terminate = signal(SignalKind::terminate())?;
    let result = tokio::select! {
        result = work => result?,
        _ = tokio::signal::ctrl_c() => bail!("interrupted; everything the demo made is gone"),
        _ = terminate.recv() => bail!("terminated; everything the demo made is gone"),
    };
    result.print(columns());
    std::fs::write(&args.plot, result.plot.to_html())
        .with_context(|| format!("can't write the plot {}", args.plot.display()))?;
    println!("\nplot: {}", args.plot.display());
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&result)?;
        std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?;
        println!("json: {}", path.display());
    }
    Ok(if result.kept_its_promises() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How wide the terminal is, within reason.
fn columns() -> usize {
    let width = std::io::stdout().is_terminal().then(|| console::Term::stdout().size().1);
    width.map_or(100, |width| usize::from(width).clamp(40, 160))
}

/// A migration as the demo saw it, with times on its own clock.
struct Seen {
    report: MigrationReport,
    began_ms: f64,
    /// When each round ended.
    rounds_ended_ms: Vec<f64>,
    handed_ms: f64,
}

/// Migrates the VM of `source` to `target` and prints round by round how that goes.
async fn migrate(
    source: &HostProcess,
    target: &str,
    budget: Duration,
    clock: LabClock,
) -> anyhow::Result<Seen> {
    let request = MigrationRequest {
        target: target.to_owned(),
        downtime_ms: ms(budget),
        streams: MigrateOptions::streams_to_choose_from(),
        adapt_streams: true,
        compress: Compression::Auto.to_string(),
        bandwidth_bytes_per_s: None,
        verify: true,
        verify_whole: false,
        reconnect_ms: 30_000.0,
        timeout_ms: 60_000.0,
        on_timeout: OnTimeoutWord::Cancel,
        tls_dir: None,
        // The demo's hosts are alone on their network.
        insecure: true,
    };
    let began_ms = clock.now_ms();
    let (mut rounds_ended_ms, mut handed_ms) = (Vec::new(), began_ms);
    let mut events =
        client::events(&source.state, &source.name, Method::POST, api::MIGRATION, Some(&request)).await?;
    println!("{HEADING}");
    while let Some(event) = events.next().await? {
        match event {
            MigrationEvent::RoundDone(round) => {
                rounds_ended_ms.push(clock.now_ms());
                println!("{}", round_line(&round));
            }
            MigrationEvent::Handed => handed_ms = clock.now_ms(),
            MigrationEvent::Moved(report) => {
                return Ok(Seen { report, began_ms, rounds_ended_ms, handed_ms });
            }
            MigrationEvent::LetGo { reason } | MigrationEvent::Failed { reason } => {
                bail!("the migration failed: {reason}")
            }
            MigrationEvent::InDoubt { reason } => println!("in doubt: {reason}"),
            MigrationEvent::Started { .. }
            | MigrationEvent::Negotiated { .. }
            | MigrationEvent::RoundStarted { .. }
            | MigrationEvent::Transferred { .. }
            | MigrationEvent::Stopping { .. }
            | MigrationEvent::Paused
            | MigrationEvent::Reconnecting { .. }
            | MigrationEvent::Reconnected(_)
            | MigrationEvent::Undoing { .. } => {}
        }
    }
    bail!("the source ended in the middle of the migration")
}

/// The guest's own report, from the host that has it.
async fn guest(host: &HostProcess) -> anyhow::Result<GuestReport> {
    client::call(&host.state, &host.name, Method::GET, api::GUEST).await
}

/// Waits until the guest does its job.
async fn until_ready(host: &HostProcess) -> anyhow::Result<GuestReport> {
    for _ in 0..600 {
        if let Ok(report) = guest(host).await {
            if let Some(fault) = &report.fault {
                bail!("the guest gave up: {fault}");
            }
            if report.ready {
                return Ok(report);
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the guest was not ready within a minute")
}

/// The longest gap between two heartbeats since `before`, in ms: the downtime as the guest saw it.
fn guest_gap_ms(before: &GuestReport, after: &GuestReport) -> f64 {
    let since = after.gaps.iter().filter(|gap| gap.start_tsc >= before.heartbeat_tsc);
    since.map(|gap| gap.ms).fold(0.0, f64::max)
}
