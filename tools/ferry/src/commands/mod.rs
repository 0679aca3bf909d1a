//! One file a subcommand; `control.rs` has the small ones.

pub(crate) mod cert;
pub(crate) mod console;
pub(crate) mod control;
pub(crate) mod list;
pub(crate) mod migrate;
pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod run;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use ferry_migrate::machine::MigratableMachine;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::host::{Life, VmHost, confined};

/// A line on standard output. That nobody reads any more must never cost a VM.
pub(crate) fn out(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on standard error, likewise.
pub(crate) fn err(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Ends this process when its standard input closes.
fn exit_with_stdin() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(3);
    });
}

/// Warns of what a profile can't hide on this host, where that is something.
fn say_leaks(machine: &MigratableMachine) {
    let machine = machine.machine();
    let leaks = machine.leaked_features();
    if !leaks.is_empty() {
        tracing::warn!(
            "this host's KVM shows the guest {} features of its processor that it was told to hide (profile {}), so the \
             guest can only move to hosts that have them too; 'ferry info' lists them",
            leaks.len(),
            machine.cpu_profile()
        );
    }
    if let Some(reason) = machine.leaks_unknown() {
        tracing::warn!(
            "it could not be found out whether this host's KVM hides features as it is told: {reason}"
        );
    }
}

/// The signals that ask a host process to end. Watched from before it says that it is up, so that whoever was told
/// can end it in order.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn watch() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Stays until the VM is gone; a signal stops it.
async fn stay(host: Arc<VmHost>, mut signals: Signals, json: bool) -> anyhow::Result<ExitCode> {
    let mut refusals = confined::Refusals::default();
    loop {
        tokio::select! {
            () = host.until_ended() => break,
            () = signals.next() => {}
            () = refusals.wait() => {
                refusals.say();
                continue;
            }
        }
        let stopping = Arc::clone(&host);
        let stopped =
            tokio::task::spawn_blocking(move || stopping.stop("it was stopped by a signal")).await?;
        if let Err(refused) = stopped {
            err(format_args!("ferry: {}", refused.0));
        }
    }
    refusals.say();
    let (text, failed) = match &*host.life() {
        Life::Ended { reason, failed } => (reason.clone(), *failed),
        Life::Gone { target, .. } => (format!("it has moved to {target}"), false),
        Life::Waiting { .. } | Life::Receiving { .. } | Life::Here(_) => ("it ended".to_owned(), true),
    };
    if json {
        out(serde_json::json!({ "event": "ended", "name": host.name.as_str(), "reason": text }));
    } else {
        err(format_args!("{}: {text}", host.name));
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
