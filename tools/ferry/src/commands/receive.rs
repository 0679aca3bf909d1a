//! `ferry receive`: an empty host process that takes in one VM and becomes it.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow};
use ferry_migrate::machine::{MachineHost, MigratableMachine};
use ferry_migrate::ports::RecordStore;
use ferry_migrate::protocol::VmId;
use ferry_migrate::protocol::record::Standing;
use ferry_migrate::protocol::target::Progress;
use ferry_migrate::{ReceiveOptions, Receiver};
use ferry_vmm::LocalChoices;
use tokio::sync::mpsc;

use super::{Signals, exit_with_stdin, stay};
use crate::cli::ReceiveArgs;
use crate::host::{Here, Life, VmHost, server};
use crate::state_dir::StateDir;

pub(crate) async fn run(args: ReceiveArgs) -> anyhow::Result<ExitCode> {
    if args.exit_with_stdin {
        exit_with_stdin();
    }
    let json = args.output.json;
    let state = StateDir::from_environment()?;
    let _lock = state.claim(&args.name)?;
    let tap = args.net.as_ref().map(|net| net.tap.clone());
    if let Some(tap) = &tap {
        // Found out now rather than when a VM comes; it is let go of again until then.
        ferry_vmm::tap::Tap::attach(tap)?;
    }
    let records = state.records(&args.name);
    records.load().map_err(|error| anyhow!(error)).with_context(|| {
        format!("'{}' is in doubt; once you know that no other host runs it, remove the record", args.name)
    })?;
    let host = VmHost::new(args.name, records, Life::Waiting { listen: args.listen.to_string(), note: None });

    let built: Arc<Mutex<Option<MigratableMachine>>> = Arc::default();
    let machine_host = {
        let built = Arc::clone(&built);
        let local = LocalChoices { tap: tap.clone(), serial: args.serial };
        MachineHost::new(
            local,
            Box::new(move |machine| {
                *built.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine.clone());
            }),
        )
    };
    let (updates, inbox) = mpsc::unbounded_channel();
    let options = ReceiveOptions { listen: args.listen, host: host_name(), name: None };
    let mut receiver = Receiver::bind(
        options,
        Arc::new(machine_host),
        Arc::clone(&host.records) as _,
        Arc::clone(&host.clock),
        updates,
    )
    .with_context(|| format!("can't listen on {}", args.listen))?;
    let listen = receiver.local_address()?.to_string();
    host.set_life(Life::Waiting { listen: listen.clone(), note: None });
    let signals = Signals::watch()?;
    let listener = server::bind(&state, &host)?;
    let server = tokio::spawn(server::serve(Arc::clone(&host), listener));
    say(json, &host, "listening", &format!("waiting for a VM on {listen}"), &[("address", &listen)]);

    let follower = Follower { host: Arc::clone(&host), listen, tap, built, json };
    let follower = tokio::spawn(follower.run(inbox));
    let cancel = host.stop_waiting.subscribe();
    let waiting = tokio::spawn(async move { receiver.receive(cancel).await });
    let ender = Arc::clone(&host);
    tokio::spawn(async move {
        // The receiver goes on answering the source after the guest runs; only its giving up ends the process.
        if let Ok(Ok(None)) = waiting.await {
            let reason = "it was stopped while waiting".to_owned();
            ender.set_life(Life::Ended { reason, failed: false });
        }
    });
    let code = stay(host, signals, json).await?;
    follower.abort();
    server.await??;
    Ok(code)
}

fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// Keeps the host's state true to what the receiver tells.
struct Follower {
    host: Arc<VmHost>,
    listen: String,
    tap: Option<String>,
    built: Arc<Mutex<Option<MigratableMachine>>>,
    json: bool,
}

impl Follower {
    async fn run(self, mut inbox: mpsc::UnboundedReceiver<Progress>) {
        let mut coming = None;
        while let Some(progress) = inbox.recv().await {
            match progress {
                Progress::Greeted { vm, name } => {
                    coming = Some(vm);
                    self.host.set_life(Life::Receiving { listen: self.listen.clone(), vm });
                    let text = format!("'{name}' is coming");
                    say(self.json, &self.host, "greeted", &text, &[("vm", &vm.to_string())]);
                }
                Progress::Receiving | Progress::Prepared => {}
                Progress::InDoubt => {
                    let text = "the source is gone at the last moment; waiting for it to come back";
                    say(self.json, &self.host, "in-doubt", text, &[]);
                }
                Progress::Running => self.here(coming, None),
                Progress::CannotRun { reason } => self.here(coming, Some(reason)),
                Progress::GivenUp { reason } => {
                    // The machine that was being filled, and with it its memory.
                    drop(self.built.lock().unwrap_or_else(PoisonError::into_inner).take());
                    let note = format!("the last attempt was given up: {reason}");
                    say(self.json, &self.host, "given-up", &note, &[("reason", &reason)]);
                    let listen = self.listen.clone();
                    self.host.set_life(Life::Waiting { listen, note: Some(note) });
                }
            }
        }
    }

    /// The VM is this host's from now on.
    fn here(&self, vm: Option<VmId>, failure: Option<String>) {
        let machine = self.built.lock().unwrap_or_else(PoisonError::into_inner).take();
        let record = self.host.records.load().ok().flatten();
        let (Some(machine), Some(vm), Some(record)) = (machine, vm, record) else { return };
        debug_assert_eq!(record.standing, Standing::Running, "written before the guest was started");
        let here = Here {
            machine: machine.clone(),
            vm,
            epoch: record.epoch,
            tap: self.tap.clone(),
            migration: None,
        };
        self.host.set_life(Life::Here(Box::new(here)));
        match failure {
            None => {
                self.host.watch(&machine);
                let epoch = record.epoch.to_string();
                let text = format!("running here now (epoch {epoch})");
                say(self.json, &self.host, "running", &text, &[("epoch", &epoch)]);
            }
            Some(reason) => {
                let text = format!("the VM is here, but can't run: {reason}");
                say(self.json, &self.host, "cannot-run", &text, &[("reason", &reason)]);
            }
        }
    }
}

/// Says what happened, for people or for scripts.
fn say(json: bool, host: &VmHost, event: &str, text: &str, fields: &[(&str, &str)]) {
    if json {
        let mut value = serde_json::json!({ "event": event, "name": host.name.as_str() });
        for (key, field) in fields {
            value[*key] = (*field).into();
        }
        println!("{value}");
    } else {
        eprintln!("{}: {text}", host.name);
    }
}
