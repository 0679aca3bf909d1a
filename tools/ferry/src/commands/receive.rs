//! `ferry receive`: an empty host process that takes in one VM and becomes it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use ferry_migrate::machine::{MachineHost, MigratableMachine};
use ferry_migrate::ports::{BuildRefusal, GuestPages, PortError, RecordStore, TargetHost, TargetVm};
use ferry_migrate::protocol::message::AbortCode;
use ferry_migrate::protocol::record::Standing;
use ferry_migrate::protocol::target::Progress;
use ferry_migrate::protocol::{MemoryLayout, VmId};
use ferry_migrate::tls::identity::Role;
use ferry_migrate::{ListenAddress, ReceiveOptions, Receiver, Security};
use ferry_vmm::LocalChoices;
use tokio::sync::mpsc;

use super::{Signals, err, exit_with_stdin, out, say_leaks, stay};
use crate::cli::{DiskArg, ReceiveArgs, serial_target};
use crate::host::opener::Opener;
use crate::host::{Here, Life, VmHost, console, server, witness};
use crate::permission;
use crate::security;
use crate::state_dir::StateDir;

pub(crate) async fn run(args: ReceiveArgs, opener: Opener) -> anyhow::Result<ExitCode> {
    if args.exit_with_stdin {
        exit_with_stdin();
    }
    let json = args.output.json;
    let (tls_folder, security) = security_for(&args)?;
    let state = StateDir::from_environment()?;
    let _lock = state.claim(&args.name)?;
    let tap = args.net.as_ref().map(|net| net.tap.clone());
    let opener = Arc::new(opener);
    if let Some(tap) = tap.clone() {
        try_tap(tap, &opener).await?;
    }
    let records = state.records(&args.name);
    records.all().with_context(|| {
        format!("'{}' is in doubt; once you know that no other host runs it, 'ferry resolve {} --discard' sets the record aside", args.name, args.name)
    })?;
    let life = Life::Waiting { listen: args.listen.to_string(), note: None };
    let host = VmHost::new(args.name, records, args.witness.open(), life);
    witness::try_out(host.witness.as_ref()).await?;
    if let Some(folder) = tls_folder {
        let _ = host.tls_folder.set(folder);
    }
    let console = Arc::new(console::bind(&state, &host.name)?);
    let local = LocalChoices {
        tap: tap.clone(),
        disks: args.disks.iter().map(DiskArg::choice).collect(),
        serial: serial_target(&args.serial, args.exit_with_stdin),
        memory: args.memory.unwrap_or_default(),
        cpu: args.cpu,
    };
    let machine_host = ReceivingHost {
        host: Arc::clone(&host),
        opener,
        tap,
        console,
        machines: Arc::new(MachineHost::new(local)),
    };
    let (updates, inbox) = mpsc::unbounded_channel();
    let options = ReceiveOptions {
        listen: args.listen.clone(),
        security,
        host: host_name(),
        name: None,
        witness: host.witness.clone(),
    };
    let receiver = Receiver::bind(
        options,
        Arc::new(machine_host),
        Arc::clone(&host.records) as _,
        Arc::clone(&host.clock),
        updates,
    )
    .map_err(|error| permission::no_listener(&args.listen, &error))?;
    let _ = host.turned_away.set(receiver.turned_away());
    let listen = receiver.local_address()?.to_string();
    host.set_life(Life::Waiting { listen: listen.clone(), note: None });
    let signals = Signals::watch()?;
    let listener = server::bind(&state, &host)?;
    let server = tokio::spawn(server::serve(Arc::clone(&host), listener));
    say(json, &host, "listening", &format!("waiting for a VM on {listen}"), &[("address", &listen)]);

    let follower = Follower { host: Arc::clone(&host), listen, json };
    let follower = tokio::spawn(follower.run(inbox));
    receive(receiver, &host);
    let code = stay(host, signals, json).await?;
    follower.abort();
    server.await??;
    Ok(code)
}

/// Finds out now rather than when a VM comes whether there is such a tap; it is let go of again until then.
async fn try_tap(tap: String, opener: &Arc<Opener>) -> anyhow::Result<()> {
    let opener = Arc::clone(opener);
    let attach = move || ferry_vmm::tap::Tap::attach(&tap).map(drop);
    Ok(tokio::task::spawn_blocking(move || opener.open(attach)).await???)
}

/// Waits for a VM beside everything else; `host` hears if none comes any more.
fn receive(mut receiver: Receiver, host: &Arc<VmHost>) {
    let cancel = host.stop_waiting.subscribe();
    let waiting = tokio::spawn(async move { receiver.receive(cancel).await });
    let ender = Arc::clone(host);
    tokio::spawn(async move {
        // The receiver goes on answering the source after the guest runs, and then has no more to do.
        let (reason, failed) = match waiting.await {
            Ok(Ok(Some(_))) => return,
            Ok(Ok(None)) => ("it was stopped while waiting".to_owned(), false),
            Ok(Err(error)) => (format!("it can't wait any longer: {error}"), true),
            Err(error) => (format!("the receiver failed within itself: {error}"), true),
        };
        ender.not_received(reason, failed);
    });
}

/// Where this host's certificate is, and who is let in. A host that must not be a target is told so now.
fn security_for(args: &ReceiveArgs) -> anyhow::Result<(Option<PathBuf>, Security)> {
    let folder = security::folder(args.security.tls.tls_dir.clone()).map(std::path::absolute).transpose()?;
    let security = match &args.listen {
        ListenAddress::Tcp(_) => security::security(folder.as_deref(), args.security.insecure)?,
        // The kernel says who is at the other end.
        ListenAddress::Unix(_) => Security::LoopbackOnly,
    };
    if let Some(tls) = security.tls() {
        tls.current().check_own_role(Role::Target)?;
    }
    Ok((folder.filter(|_| !args.security.insecure), security))
}

fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// Builds machines for what comes, and makes each the host's own in the moment in which it runs: from then on the
/// guest depends on nobody who only watches.
struct ReceivingHost {
    host: Arc<VmHost>,
    opener: Arc<Opener>,
    tap: Option<String>,
    console: Arc<UnixListener>,
    machines: Arc<MachineHost>,
}

impl ReceivingHost {
    fn opened(
        &self,
        build: impl FnOnce() -> Result<MigratableMachine, BuildRefusal> + Send + 'static,
    ) -> Result<MigratableMachine, BuildRefusal> {
        self.opener
            .open(build)
            .unwrap_or_else(|error| Err(BuildRefusal { code: AbortCode::CannotBuild, cause: error.into() }))
    }

    fn receiving(&self, vm: VmId, machine: MigratableMachine) -> Arc<dyn TargetVm> {
        // Now, and not in the downtime.
        say_leaks(&machine);
        let (host, console) = (Arc::clone(&self.host), Arc::clone(&self.console));
        let opener = Arc::clone(&self.opener);
        Arc::new(ReceivingVm { host, vm, opener, tap: self.tap.clone(), console, machine })
    }
}

impl TargetHost for ReceivingHost {
    fn build(
        &self,
        vm: VmId,
        description: &[u8],
        _: &MemoryLayout,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        self.host.receives(vm);
        let (machines, description) = (Arc::clone(&self.machines), description.to_vec());
        let machine = self.opened(move || machines.build_machine(&description))?;
        Ok(self.receiving(vm, machine))
    }

    fn adopt(
        &self,
        vm: VmId,
        description: &[u8],
        _: &MemoryLayout,
        memory: OwnedFd,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        self.host.receives(vm);
        let (machines, description) = (Arc::clone(&self.machines), description.to_vec());
        let machine = self.opened(move || machines.adopt_machine(&description, memory))?;
        Ok(self.receiving(vm, machine))
    }
}

struct ReceivingVm {
    host: Arc<VmHost>,
    vm: VmId,
    opener: Arc<Opener>,
    tap: Option<String>,
    console: Arc<UnixListener>,
    machine: MigratableMachine,
}

impl TargetVm for ReceivingVm {
    fn pages(&self) -> Arc<dyn GuestPages> {
        TargetVm::pages(&self.machine)
    }

    fn drop_stale_frames(&self) {
        self.machine.drop_stale_frames();
    }

    fn restore(&self, state: &[u8]) -> Result<(), PortError> {
        self.machine.restore(state)
    }

    fn run(&self, runs: bool) -> Result<(), PortError> {
        let vm = self.vm;
        let record = self.host.records.load(vm)?.filter(|record| record.standing == Standing::Running);
        let record = record.ok_or("the record that this host runs it is missing")?;
        console::serve(self.machine.machine(), &self.console);
        self.machine.run(runs)?;
        self.opener.close();
        let tap = self.tap.clone();
        let machine = self.machine.clone();
        let here = Here { machine: machine.clone(), vm, epoch: record.epoch, tap, migration: None };
        self.host.set_life(Life::Here(Box::new(here)));
        self.host.watch(&machine);
        Ok(())
    }

    fn announce(&self, frame: &[u8]) -> std::io::Result<()> {
        self.machine.announce(frame)
    }

    fn discard(&self) {
        self.machine.discard();
    }
}

/// Tells people and scripts what the receiver does.
struct Follower {
    host: Arc<VmHost>,
    listen: String,
    json: bool,
}

impl Follower {
    async fn run(self, mut inbox: mpsc::UnboundedReceiver<Progress>) {
        while let Some(progress) = inbox.recv().await {
            match progress {
                Progress::Greeted { vm, name } => {
                    let text = format!("'{name}' is coming");
                    say(self.json, &self.host, "greeted", &text, &[("vm", &vm.to_string())]);
                }
                Progress::Interrupted { reason } => {
                    let text = format!(
                        "the link broke ({reason}); what has arrived is kept for its source to come back"
                    );
                    say(self.json, &self.host, "interrupted", &text, &[("reason", &reason)]);
                }
                Progress::Receiving | Progress::Prepared => {}
                Progress::InDoubt => {
                    let text = "the source is gone at the last moment; waiting for it to come back";
                    say(self.json, &self.host, "in-doubt", text, &[]);
                }
                Progress::WitnessSilent { reason } => {
                    let text = format!(
                        "the VM was handed over, but the witness can't be asked for leave to run it ({reason}); asking again"
                    );
                    say(self.json, &self.host, "witness-silent", &text, &[("reason", &reason)]);
                }
                Progress::Running => {
                    let epoch = self.host.info().epoch.unwrap_or_default().to_string();
                    let text = format!("running here now (epoch {epoch})");
                    say(self.json, &self.host, "running", &text, &[("epoch", &epoch)]);
                }
                Progress::CannotRun { reason } => {
                    let text = format!("the VM can't run here: {reason}");
                    say(self.json, &self.host, "cannot-run", &text, &[("reason", &reason)]);
                }
                Progress::GivenUp { reason } => {
                    let note = format!("the last attempt was given up: {reason}");
                    say(self.json, &self.host, "given-up", &note, &[("reason", &reason)]);
                    self.host.waits_again(&self.listen, note);
                }
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
        out(&value);
    } else {
        err(format_args!("{}: {text}", host.name));
    }
}
