//! A machine: memory, vCPUs and devices, and what can be done with all of them together.
//!
//! ```text
//!            load / restore_state           run             pause
//!  build ──► Created ────────────► Created ─────► Running ◄───────► Paused
//!                                                   │  │               │
//!                          the guest ends itself ◄──┘  └──► Stopped ◄──┘  stop
//! ```
//!
//! Calls block and may come from any thread; those that change the status wait for each other. Memory
//! stays readable until the machine and every [`GuestRam`] of it are dropped, also after `stop`: a
//! source keeps it until the target runs.

mod build;
mod clock;
mod disks;
mod network;
mod processor;
mod state;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VmFd;

pub use build::BuildError;
pub use state::SavedState;

use crate::boot::{self, BootError, VirtioWindow};
use crate::capability::Capabilities;
use crate::config::{BootSource, HugePages, MachineConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mmio::WINDOW_BYTES;
pub use crate::devices::virtio::net::FrameObserver;
use crate::devices::virtio::net::Net;
use crate::devices::{Bus, MMIO_START, mmio_interrupt};
use crate::disk::DiskError;
use crate::memory::dirty_log::DirtyLog;
use crate::memory::{DirtyLogError, GuestRam};
use crate::parking::{Control, MachineEvent};
use crate::vcpu::Vcpu;
use clock::Clocks;
use processor::MachineCpu;

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineStatus {
    /// Built, and perhaps loaded or restored; nothing has run.
    Created,
    /// The guest runs.
    Running,
    /// No vCPU and no device touches guest memory.
    Paused,
    /// It was stopped, or the guest switched itself off or reset itself.
    Stopped,
    /// A vCPU can't go on.
    Faulted {
        /// Which one.
        vcpu: u8,
        /// What KVM reported.
        reason: String,
    },
}

/// Why a machine does not run or pause.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Nothing was loaded or restored.
    #[error("can't run the machine: load a kernel or restore a state first")]
    NothingLoaded,
    /// The machine is not in a status for it.
    #[error("can't {action} the machine: it is {status}")]
    WrongStatus {
        /// What was asked for.
        action: &'static str,
        /// What it is.
        status: &'static str,
    },
    /// The guest does not listen to the power button.
    #[error(
        "can't shut down the machine: its guest does not listen to the power button (it has no ACPI driver for it, or \
         has not got so far); stop the machine instead"
    )]
    NoPowerButton,
    /// The guest has ended itself.
    #[error("can't {action} the machine: {how}")]
    Ended {
        /// What was asked for.
        action: &'static str,
        /// How it ended.
        how: String,
    },
    /// A disk of the machine is another's now.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Where a machine is in its life. Whether the guest ended itself is [`Control`]'s to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    /// Loaded or restored.
    Ready,
    Running,
    Paused,
    Stopped,
}

/// A machine on this host's KVM.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    capabilities: Capabilities,
    cpu: Mutex<MachineCpu>,
    clocks: Mutex<Clocks>,
    xsave_bytes: usize,
    tsc_khz: Option<u32>,
    vcpus: Vec<Arc<Vcpu>>,
    bus: Arc<Bus>,
    /// By window.
    devices: Vec<Arc<dyn VirtioDevice>>,
    net: Option<Arc<Net>>,
    disks: Vec<Arc<Block>>,
    control: Arc<Control>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    dirty_log: DirtyLog,
    vm: Arc<VmFd>,
    ram: GuestRam,
    phase: Mutex<Phase>,
    /// Held by calls that change the phase, so that `status` never waits for them.
    operation: Mutex<()>,
}

impl Machine {
    /// Loads a kernel into a machine that was just built.
    ///
    /// # Errors
    /// Names the file and the cause; nothing has run, and the machine should be dropped.
    pub fn load(&self, boot: &BootSource) -> Result<(), BootError> {
        let _operation = self.operate();
        let phase = self.phase();
        if phase != Phase::Created {
            return Err(BootError::WrongStatus { status: phase.name() });
        }
        let entry = boot::load(&self.ram, self.config.cpus, boot, &self.virtio_windows())?;
        for vcpu in &self.vcpus {
            vcpu.set_cpuid(&self.cpuid_of(vcpu.index))?;
            boot::set_boot_registers(&vcpu.lock(), vcpu.index == 0, entry)?;
        }
        self.set_phase(Phase::Ready);
        Ok(())
    }

    /// Runs the guest, for the first time or after a pause.
    ///
    /// # Errors
    /// There is nothing to run, it runs already, it has ended, or another machine has one of its disks.
    pub fn run(&self) -> Result<(), RunError> {
        let _operation = self.operate();
        match self.phase() {
            Phase::Created => return Err(RunError::NothingLoaded),
            Phase::Ready | Phase::Paused => {}
            phase @ (Phase::Running | Phase::Stopped) => {
                return Err(RunError::WrongStatus { action: "run", status: phase.name() });
            }
        }
        if let Some(event) = self.control.ended() {
            return Err(RunError::Ended { action: "run", how: describe(&event) });
        }
        self.take_disks()?;
        self.clocks_run();
        for vcpu in &self.vcpus {
            vcpu.set_deferred();
            // Tells a guest with a paravirtual clock that it was stopped; KVM refuses it for others.
            let _ = vcpu.lock().kvmclock_ctrl();
        }
        for transport in &self.bus.virtio {
            transport.repeat_interrupt();
        }
        self.set_phase(Phase::Running);
        // The guest can't end itself while parked, so this succeeds.
        assert!(self.control.run(), "a parked guest that has not ended can run");
        Ok(())
    }

    /// Pauses the guest. When this returns, no vCPU and no device touches guest memory until `run`.
    ///
    /// # Errors
    /// It does not run, or the guest ended itself before it was paused.
    pub fn pause(&self) -> Result<(), RunError> {
        let _operation = self.operate();
        // First, for a guest that ended itself and was then stopped: how it ended is what its owner wants to know.
        if let Some(event) = self.control.ended() {
            return Err(RunError::Ended { action: "pause", how: describe(&event) });
        }
        let phase = self.phase();
        if phase != Phase::Running {
            return Err(RunError::WrongStatus { action: "pause", status: phase.name() });
        }
        self.control.pause();
        if let Some(event) = self.control.ended() {
            return Err(RunError::Ended { action: "pause", how: describe(&event) });
        }
        self.set_phase(Phase::Paused);
        self.note_pause();
        Ok(())
    }

    /// Presses the guest's power button, on which most guests shut down in their own time.
    ///
    /// # Errors
    /// It does not run, has ended itself, or does not listen to the button.
    pub fn press_power_button(&self) -> Result<(), RunError> {
        let action = "shut down";
        // Also keeps a pause from coming in between: what is pressed is saved.
        let _operation = self.operate();
        let phase = self.phase();
        if phase != Phase::Running {
            return Err(RunError::WrongStatus { action, status: phase.name() });
        }
        if let Some(event) = self.control.ended() {
            return Err(RunError::Ended { action, how: describe(&event) });
        }
        if self.bus.power.press_button() { Ok(()) } else { Err(RunError::NoPowerButton) }
    }

    /// Ends every thread of the machine and lets go of its tap and disks. Memory stays. Doing it again does
    /// nothing.
    pub fn stop(&self) {
        let _operation = self.operate();
        self.control.exit();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the machine had panicked");
            }
        }
        if let Some(net) = &self.net {
            net.close();
        }
        self.close_disks();
        self.set_phase(Phase::Stopped);
    }

    /// What the machine is doing.
    #[must_use]
    pub fn status(&self) -> MachineStatus {
        match (self.control.ended(), self.phase()) {
            (Some(MachineEvent::Fault { vcpu, reason }), _) => MachineStatus::Faulted { vcpu, reason },
            (Some(MachineEvent::Shutdown | MachineEvent::Reset), _) | (None, Phase::Stopped) => {
                MachineStatus::Stopped
            }
            (None, Phase::Created | Phase::Ready) => MachineStatus::Created,
            (None, Phase::Running) => MachineStatus::Running,
            (None, Phase::Paused) => MachineStatus::Paused,
        }
    }

    /// What the machine reports next on its own, waiting for at most `timeout`.
    #[must_use]
    pub fn next_event(&self, timeout: Duration) -> Option<MachineEvent> {
        self.control.next_event(timeout)
    }

    /// What the machine is made of, on this host.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// What holds the guest's memory on this host, in words, and where that is not what the machine would have.
    #[must_use]
    pub fn memory_kind(&self) -> String {
        let kind = self.ram.kind();
        let did_without = self.ram.huge_pages() != HugePages::Pool;
        if self.config.memory.huge_pages == HugePages::PoolIfFree && did_without {
            return format!("{kind} (the host's pool had too few of 2 MiB)");
        }
        kind
    }

    /// Frequency of the guest's TSC in kHz, where the host's is stable.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    /// Starts to log which pages change. The first [`Machine::collect_dirty`] reports every page that was ever touched;
    /// the others read as zero.
    ///
    /// # Errors
    /// The log is in use, or KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), DirtyLogError> {
        self.dirty_log.start(&self.vm, &self.ram)
    }

    /// Sets the bit of every page that the guest or a device changed since the last call (page index n
    /// is bit n % 64 of word n / 64) and returns how many bits were not set before. Bits that are set
    /// stay set.
    ///
    /// Log and protection of those pages are reset first, so a page that is read after this call and
    /// changed later is reported by the next one.
    ///
    /// # Errors
    /// The log was not started, `into` does not have ceil(pages / 64) words, or KVM refuses; what was
    /// set in `into` by then is lost to later calls and must be kept.
    pub fn collect_dirty(&self, into: &mut [u64]) -> Result<u64, DirtyLogError> {
        self.dirty_log.collect(&self.vm, &self.ram, into)
    }

    /// Whether the 2 MiB from page `first` on were untouched at every [`Machine::collect_dirty`] so far, so that what is
    /// touched there by the next one will be reported by it, whenever it was written. Copying any of it before would be
    /// wrong: the host may take back a page that has become zero again, and it is not reported then.
    #[must_use]
    pub fn is_report_due(&self, first: u64) -> bool {
        self.dirty_log.is_uncleared(first)
    }

    /// Stops logging.
    ///
    /// # Errors
    /// The log was not started, or KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), DirtyLogError> {
        self.dirty_log.stop(&self.vm, &self.ram)
    }

    /// The guest's MAC address, if it has a network interface.
    #[must_use]
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.net.as_ref().map(|net| net.mac())
    }

    /// Has `observer` called with every ARP and ICMPv6 frame that the guest sends (without virtio-net
    /// header), on the interface's thread; it replaces an earlier one.
    pub fn set_frame_observer(&self, observer: FrameObserver) {
        if let Some(net) = &self.net {
            net.set_observer(observer);
        }
    }

    /// Writes a frame (without virtio-net header) into the tap as if the guest had sent it.
    ///
    /// # Errors
    /// `NotConnected` without a network interface or after `stop`; else what the tap says.
    pub fn send_to_network(&self, frame: &[u8]) -> io::Result<()> {
        self.net.as_ref().ok_or(io::ErrorKind::NotConnected)?.send(frame)
    }

    /// Throws away the frames that wait in the tap. A target does this when the source pauses, so that
    /// its guest is not handed frames that the source's guest has had already, and so that it is known how long the
    /// guest stands still at most. It does nothing while the machine runs.
    pub fn drop_queued_frames(&self) {
        let _operation = self.operate();
        if self.phase() == Phase::Running {
            return;
        }
        self.note_source_pause();
        if let Some(net) = &self.net {
            net.drop_queued_frames();
        }
    }

    /// Takes in consoles of the serial port from `listener`, while the machine runs: each gets what the guest said last
    /// and all that it says, and what is typed there reaches the guest. They are let go of when the machine is stopped.
    ///
    /// # Errors
    /// The listener can't be made non-blocking, or the port has enough of them.
    pub fn serve_console(&self, listener: UnixListener) -> io::Result<()> {
        self.bus.serial.serve_console(listener)
    }

    /// The pseudo terminal of the serial port, if it was to have one.
    #[must_use]
    pub fn terminal(&self) -> Option<&Path> {
        self.bus.serial.terminal()
    }

    /// Where the guest is to find its virtio devices.
    fn virtio_windows(&self) -> Vec<VirtioWindow> {
        let addresses = (MMIO_START..).step_by(usize::try_from(WINDOW_BYTES).expect("4096"));
        let windows = (0..).map(mmio_interrupt).zip(addresses).take(self.bus.virtio.len());
        windows.map(|(interrupt, address)| VirtioWindow { address, interrupt }).collect()
    }

    fn operate(&self) -> MutexGuard<'_, ()> {
        self.operation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_phase(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "not loaded",
            Self::Ready => "loaded and has not run",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

fn describe(event: &MachineEvent) -> String {
    match event {
        MachineEvent::Shutdown => "the guest has switched itself off".into(),
        MachineEvent::Reset => "the guest has reset itself".into(),
        MachineEvent::Fault { vcpu, reason } => format!("vCPU {vcpu} can't go on: {reason}"),
    }
}
