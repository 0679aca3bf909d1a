//! The process that hosts one VM: what it knows of it, and what its control API may do to it.
//!
//! ```text
//!  Waiting --a source comes--> Receiving --Running--> Here --migrate--> Here{migration} --> Gone
//!     ^                            |                    |
//!     '------- given up -----------'                    '--stop, shutdown, fault--> Ended
//! ```
//!
//! Starting and receiving are in `commands/`; the HTTP side is in `server.rs`.

pub(crate) mod confined;
pub(crate) mod console;
pub(crate) mod migration;
pub(crate) mod opener;
pub(crate) mod server;
pub(crate) mod witness;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferry_guest_abi::{REPORT_GPA, Report, report::Stage};
use ferry_migrate::machine::MigratableMachine;
use ferry_migrate::ports::{Clock, RecordStore, SystemClock};
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::source::Resolution;
use ferry_migrate::protocol::{Epoch, PAGE_BYTES, VmId, VmName};
use ferry_migrate::witness::Witness;
use ferry_migrate::{FileRecords, TurnedAway};
use ferry_vmm::{MachineEvent, MachineStatus};
use tokio::sync::watch;

use crate::api::{GuestGap, GuestReport, NetworkInfo, TurnedAwayInfo, VmInfo, VmState};
use migration::MigrationTask;

/// A VM that is here.
#[derive(Debug, Clone)]
pub(crate) struct Here {
    pub(crate) machine: MigratableMachine,
    pub(crate) vm: VmId,
    pub(crate) epoch: Epoch,
    pub(crate) tap: Option<String>,
    pub(crate) migration: Option<Arc<MigrationTask>>,
}

/// What the process is doing.
#[derive(Debug, Clone)]
pub(crate) enum Life {
    /// It waits for a VM.
    Waiting { listen: String, note: Option<String> },
    /// A VM is coming.
    Receiving { listen: String, vm: VmId },
    /// A VM is here.
    Here(Box<Here>),
    /// It has moved.
    Gone { target: String, last: Arc<MigrationTask> },
    /// It has ended, for this reason.
    Ended { reason: String, failed: bool },
}

/// How long is waited for a receiver or a migration to give up, in steps.
const STOP_PATIENCE_STEPS: u32 = 300;
const STOP_STEP: Duration = Duration::from_millis(10);

/// Why something can't be done now, in a sentence for the caller.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

/// The host process.
#[derive(Debug)]
pub(crate) struct VmHost {
    pub(crate) name: VmName,
    pub(crate) records: Arc<FileRecords>,
    pub(crate) clock: Arc<dyn Clock>,
    /// The folder with this host's certificate, if one was said or there was one when this process began.
    pub(crate) tls_folder: OnceLock<PathBuf>,
    /// Whom the receiver has turned away, in a process that has one.
    pub(crate) turned_away: OnceLock<Arc<TurnedAway>>,
    pub(crate) witness: Option<Arc<dyn Witness>>,
    life: Mutex<Life>,
    /// Held by whatever changes what the VM does, from looking whether it may to having done it.
    change: Mutex<()>,
    /// Set once when the process is to end.
    ended: watch::Sender<bool>,
    /// Set when a waiting receiver is to stop waiting.
    pub(crate) stop_waiting: watch::Sender<bool>,
}

impl VmHost {
    /// A host in the state `life`.
    pub(crate) fn new(
        name: VmName,
        records: FileRecords,
        witness: Option<Arc<dyn Witness>>,
        life: Life,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            records: Arc::new(records),
            clock: Arc::new(SystemClock::default()),
            tls_folder: OnceLock::new(),
            turned_away: OnceLock::new(),
            witness,
            life: Mutex::new(life),
            change: Mutex::default(),
            ended: watch::channel(false).0,
            stop_waiting: watch::channel(false).0,
        })
    }

    pub(crate) fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds off all others that change what the VM does.
    pub(crate) fn change(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the state; ending states end the process, and nothing comes after them.
    pub(crate) fn set_life(&self, life: Life) {
        let ends = |life: &Life| matches!(life, Life::Ended { .. } | Life::Gone { .. });
        let ended = {
            let mut now = self.life();
            if ends(&now) {
                // News of an attempt that was given up because the process is to end.
                return;
            }
            *now = life;
            ends(&now)
        };
        if ended {
            self.ended.send_replace(true);
        }
    }

    /// Returns once the process is to end.
    pub(crate) async fn until_ended(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as `self`.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// The VM, if it is here.
    pub(crate) fn here(&self) -> Result<Here, Refused> {
        match &*self.life() {
            Life::Here(here) => Ok((**here).clone()),
            Life::Waiting { .. } | Life::Receiving { .. } => {
                Err(Refused(format!("'{}' has no VM yet: it waits for one to migrate here", self.name)))
            }
            Life::Gone { target, .. } => Err(Refused(format!("'{}' has moved to {target}", self.name))),
            Life::Ended { reason, .. } => Err(Refused(format!("'{}' has ended: {reason}", self.name))),
        }
    }

    /// `GET /api/v1/vm`.
    pub(crate) fn info(&self) -> VmInfo {
        let mut info = VmInfo {
            name: self.name.to_string(),
            state: VmState::Stopped,
            pid: std::process::id(),
            id: None,
            epoch: None,
            memory_bytes: None,
            memory_kind: None,
            cpus: None,
            cpu_profile: None,
            cpu_leaks: Vec::new(),
            network: None,
            terminal: None,
            witness: self.witness.as_ref().map(ToString::to_string),
            refused_system_calls: confined::refused_system_calls(),
            turned_away: self.turned_away.get().map(|counts| TurnedAwayInfo {
                connections: counts.connections(),
                streams: counts.streams(),
            }),
            listen: None,
            note: None,
        };
        match self.life().clone() {
            Life::Waiting { listen, note } => {
                (info.state, info.listen, info.note) = (VmState::Waiting, Some(listen), note);
            }
            Life::Receiving { listen, vm } => {
                info.state = VmState::Receiving;
                (info.listen, info.id) = (Some(listen), Some(vm.to_string()));
            }
            Life::Here(here) => describe(&here, &mut info),
            Life::Gone { target, last } => {
                let unverified =
                    if last.is_verified() { "" } else { "; its memory was NOT VERIFIED on the way" };
                let note = format!("it runs at {target} now{unverified}");
                (info.state, info.note) = (VmState::Moved, Some(note));
            }
            Life::Ended { reason, .. } => info.note = Some(reason),
        }
        info
    }

    /// The workload guest's own report.
    pub(crate) fn guest_report(&self) -> Result<GuestReport, Refused> {
        let here = self.here()?;
        let ram = here.machine.machine().ram();
        let mut bytes = [0; PAGE_BYTES];
        let page = ram.page_of_gpa(REPORT_GPA).ok_or(Refused("the guest has too little memory".into()))?;
        ram.read_page(page, &mut bytes).map_err(|error| Refused(error.to_string()))?;
        let report = Report::parse(&bytes).map_err(|error| {
            Refused(format!("this is not the workload guest, or it is not up yet: {error}"))
        })?;
        Ok(show_report(&report))
    }

    /// Pauses the VM; one that is paused stays so.
    pub(crate) fn pause(&self) -> Result<(), Refused> {
        let _change = self.change();
        let here = self.not_migrating("pause")?;
        if here.machine.machine().status() == MachineStatus::Paused {
            return Ok(());
        }
        here.machine.machine().pause().map_err(|error| Refused(format!("it can't be paused: {error}")))
    }

    /// Resumes it; one that runs goes on.
    pub(crate) fn resume(&self) -> Result<(), Refused> {
        let _change = self.change();
        let here = self.not_migrating("resume")?;
        if here.machine.machine().status() == MachineStatus::Running {
            return Ok(());
        }
        here.machine.machine().run().map_err(|error| Refused(format!("it can't be resumed: {error}")))
    }

    /// Presses the VM's power button. During a migration too: the guest takes the press along.
    pub(crate) fn press_power_button(&self) -> Result<(), Refused> {
        let here = self.here()?;
        here.machine.machine().press_power_button().map_err(|error| Refused(error.to_string()))
    }

    /// Has the operator's decision end a handover that is in doubt. What comes of it shows in the migration's events.
    pub(crate) fn resolve(&self, resolution: Resolution) -> Result<(), Refused> {
        let name = &self.name;
        let nothing = |why: String| Err(Refused(format!("there is nothing to resolve: {why}")));
        match &*self.life() {
            Life::Here(here) => match &here.migration {
                Some(migration) if migration.in_doubt() => {
                    migration.resolve(resolution);
                    Ok(())
                }
                Some(migration) if !migration.is_over() => nothing(format!(
                    "'{name}' is migrating and this host still owns it; 'ferry migrate {name} --cancel' gives it up"
                )),
                Some(_) | None => nothing(format!(
                    "this host owns '{name}', by its record and by what it does; 'ferry stop {name}' ends it"
                )),
            },
            Life::Gone { target, .. } => nothing(format!("'{name}' runs at {target}, which has said so")),
            Life::Waiting { .. } => nothing(format!("'{name}' waits for a VM and owns none")),
            Life::Receiving { .. } => nothing(format!(
                "'{name}' is being received: the source owns it, and decides; 'ferry stop {name}' has this target give up"
            )),
            Life::Ended { reason, .. } => nothing(format!("'{name}' has ended: {reason}")),
        }
    }

    fn not_migrating(&self, what: &str) -> Result<Here, Refused> {
        let here = self.here()?;
        match &here.migration {
            Some(migration) if migration.in_doubt() => Err(Refused(format!(
                "'{}' is in doubt: it was handed over, but the target can't be reached to say whether it runs there; \
                 nothing can be done with it here until the target answers, or you decide with 'ferry resolve {}'",
                self.name, self.name
            ))),
            Some(migration) if !migration.is_over() => Err(Refused(format!(
                "'{}' is migrating; {what} it afterwards, or cancel with 'ferry migrate {} --cancel'",
                self.name, self.name
            ))),
            Some(_) | None => Ok(here),
        }
    }

    /// Ends the VM, or the waiting for one. Blocks until its threads are gone.
    pub(crate) fn stop(&self, reason: &str) -> Result<(), Refused> {
        let life = self.life().clone();
        match life {
            Life::Waiting { .. } | Life::Receiving { .. } => self.stop_receiving(),
            Life::Here(_) => {
                let _change = self.change();
                let here = self.not_migrating("stop")?;
                here.machine.machine().stop();
                self.record(&here, Standing::Stopped);
                self.set_life(Life::Ended { reason: reason.to_owned(), failed: false });
                Ok(())
            }
            Life::Gone { .. } | Life::Ended { .. } => Ok(()),
        }
    }

    /// Has the receiver give up, and waits for what comes of it: at the last moment the VM may arrive all the same.
    fn stop_receiving(&self) -> Result<(), Refused> {
        self.stop_waiting.send_replace(true);
        for _ in 0..STOP_PATIENCE_STEPS {
            match &*self.life() {
                Life::Waiting { .. } | Life::Receiving { .. } => {}
                Life::Here(_) => {
                    return Err(Refused(format!("'{}' has just arrived; stop it again", self.name)));
                }
                Life::Gone { .. } | Life::Ended { .. } => return Ok(()),
            }
            std::thread::sleep(STOP_STEP);
        }
        Err(Refused(format!(
            "'{}' is being handed over at this moment; look again with 'ferry info'",
            self.name
        )))
    }

    /// A VM is coming.
    pub(crate) fn receives(&self, vm: VmId) {
        let mut life = self.life();
        if let Life::Waiting { listen, .. } | Life::Receiving { listen, .. } = &*life {
            *life = Life::Receiving { listen: listen.clone(), vm };
        }
    }

    /// The receiver has ended without a VM.
    pub(crate) fn not_received(&self, reason: String, failed: bool) {
        self.set_life(Life::Ended { reason, failed });
    }

    /// An attempt was given up. A newer one may have begun already.
    pub(crate) fn waits_again(&self, listen: &str, note: String) {
        if let life @ Life::Receiving { .. } = &mut *self.life() {
            *life = Life::Waiting { listen: listen.to_owned(), note: Some(note) };
        }
    }

    /// Writes down that the VM has ended here; if that fails the old record only says that it ran.
    fn record(&self, here: &Here, standing: Standing) {
        // By which migration it came is kept: that migration's source may still have to be told.
        let arrived_by = self.records.load(here.vm).ok().flatten().and_then(|record| record.arrived_by);
        let own = Record::of_own(here.vm, self.name.clone(), here.epoch, standing);
        let record = Record { arrived_by, ..own };
        if let Err(error) = self.records.store(&record) {
            tracing::warn!("the record of '{}' can't be brought up to date: {error}", self.name);
        }
    }

    /// Watches the machine on a thread of its own, and ends the process when the guest does.
    pub(crate) fn watch(self: &Arc<Self>, machine: &MigratableMachine) {
        let (host, machine) = (Arc::clone(self), Arc::clone(machine.machine()));
        std::thread::spawn(move || {
            loop {
                // Looked at first: an event comes before the status that it leads to, and must not be missed.
                let stopped = machine.status() == MachineStatus::Stopped;
                let Some(event) = machine.next_event(Duration::from_millis(200)) else {
                    if stopped {
                        return;
                    }
                    continue;
                };
                let (reason, failed) = match event {
                    MachineEvent::Shutdown => ("the guest has shut down".to_owned(), false),
                    MachineEvent::Reset => ("the guest has reset itself".to_owned(), false),
                    MachineEvent::Fault { vcpu, reason } => {
                        (format!("vCPU {vcpu} can't go on: {reason}"), true)
                    }
                };
                machine.stop();
                if let Ok(here) = host.here() {
                    give_up_migration(&here, &reason);
                    host.record(&here, Standing::Stopped);
                    host.set_life(Life::Ended { reason, failed });
                }
                return;
            }
        });
    }
}

/// Has a migration under way end with its guest, which it would otherwise go on copying, and gives it time to tell both
/// its target and whoever watches it.
fn give_up_migration(here: &Here, reason: &str) {
    let Some(migration) = &here.migration else { return };
    migration.cancel_ended(reason);
    for _ in 0..STOP_PATIENCE_STEPS {
        if migration.is_over() {
            return;
        }
        std::thread::sleep(STOP_STEP);
    }
}

fn describe(here: &Here, info: &mut VmInfo) {
    let machine = here.machine.machine();
    let migrating = here.migration.as_ref().filter(|migration| !migration.is_over());
    info.state = match (machine.status(), migrating) {
        (_, Some(migration)) if migration.in_doubt() => VmState::InDoubt,
        (_, Some(_)) => VmState::Migrating,
        (MachineStatus::Running, None) => VmState::Running,
        (MachineStatus::Stopped | MachineStatus::Faulted { .. }, None) => VmState::Stopped,
        (MachineStatus::Created | MachineStatus::Paused, None) => VmState::Paused,
    };
    info.id = Some(here.vm.to_string());
    info.epoch = Some(here.epoch.number());
    info.memory_bytes = Some(machine.ram().regions().iter().map(|region| region.bytes).sum());
    info.memory_kind = Some(machine.memory_kind());
    info.cpus = Some(machine.config().cpus);
    info.cpu_profile = Some(machine.cpu_profile());
    info.cpu_leaks = machine.leaked_features();
    info.terminal = machine.terminal().map(|path| path.display().to_string());
    info.note = here.migration.as_ref().and_then(|migration| migration.note());
    if let (Some(mac), Some(tap)) = (machine.mac(), &here.tap) {
        let network = here.machine.network();
        let ipv4 = network.ipv4.into_iter().map(std::net::IpAddr::from);
        let ipv6 = network.ipv6.into_iter().map(std::net::IpAddr::from);
        info.network = Some(NetworkInfo {
            tap: tap.clone(),
            mac: mac.map(|byte| format!("{byte:02x}")).join(":"),
            addresses: ipv4.chain(ipv6).collect(),
        });
    }
}

fn show_report(report: &Report) -> GuestReport {
    let ms = |ticks| report.gap_ms(ticks).unwrap_or_default();
    GuestReport {
        ready: report.stage == Stage::Ready,
        mode: format!("{:?}", report.mode).to_lowercase(),
        heartbeats: report.heartbeat_count,
        heartbeat_tsc: report.heartbeat_tsc,
        tsc_khz: report.tsc_khz,
        largest_gap_ms: ms(report.largest_gap.length_ticks),
        gaps: report
            .gaps()
            .iter()
            .map(|gap| GuestGap { start_tsc: gap.start_tsc, ms: ms(gap.length_ticks) })
            .collect(),
        pages_written: report.pages_written,
        pages_checked: report.pages_checked,
        errors: report.errors,
        http_requests: report.http_requests,
        udp_echoes: report.udp_echoes,
        fault: match report.stage {
            Stage::Failed => Some(report.text().to_owned()),
            Stage::Faulted => report.fault.map(|fault| format!("{fault:x?}")),
            Stage::Booting | Stage::Filling | Stage::Ready => None,
        },
    }
}
