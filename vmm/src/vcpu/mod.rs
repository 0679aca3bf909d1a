//! vCPUs: one thread each, which runs the guest, hands its exits to the bus and parks on request.
//!
//! A thread holds its vCPU's lock while it runs; a parked machine's vCPUs can be locked by whoever
//! saves or restores them. What CPUID shows is `cpu`'s; throttling is not here yet.

mod kick;
mod state;
mod time;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

pub(crate) use kick::{VcpuKick, install_signal_handler};
pub(crate) use state::{StateContext, restore, save, set_before_run};
#[cfg(test)]
pub(crate) use time::get_tsc_offset;
pub(crate) use time::{TimedState, TscPlan, set_back, set_time};

use crate::capability::KvmCallError;
use crate::confine::{self, Role};
use crate::devices::{Bus, PortEffect};
use crate::parking::{Control, Kick, MachineEvent, PanicGuard};

/// A vCPU, apart from its thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    fd: Mutex<VcpuFd>,
    /// MSRs of a restored state that are set when the guest first runs here.
    deferred: Mutex<Vec<(u32, u64)>>,
    pub(crate) kick: Arc<VcpuKick>,
}

/// Why a vCPU returned from running.
#[derive(Debug)]
enum Left {
    ToPark,
    Ended(MachineEvent),
}

impl Vcpu {
    pub(crate) fn create(vm: &VmFd, index: u8) -> Result<Self, KvmCallError> {
        let fd = vm.create_vcpu(u64::from(index)).map_err(KvmCallError::new("create a vCPU"))?;
        let kick = VcpuKick::new(&fd).map_err(KvmCallError::new("map a vCPU's run structure"))?;
        Ok(Self { index, fd: Mutex::new(fd), deferred: Mutex::default(), kick: Arc::new(kick) })
    }

    /// The vCPU, once its thread is parked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps MSRs until [`Vcpu::set_deferred`].
    pub(crate) fn defer(&self, msrs: Vec<(u32, u64)>) {
        *self.deferred.lock().unwrap_or_else(PoisonError::into_inner) = msrs;
    }

    /// The MSRs that were deferred and are still to be set.
    pub(crate) fn deferred(&self) -> Vec<(u32, u64)> {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets what was deferred, just before the guest runs. What KVM refuses is only said: the guest is this host's by
    /// now, and one that wants the wall clock sets its MSR anew each time.
    pub(crate) fn set_deferred(&self) {
        let deferred = std::mem::take(&mut *self.deferred.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = set_before_run(&self.lock(), self.index, &deferred) {
            tracing::warn!(vcpu = self.index, %error, "the guest's wall clock could not be set");
        }
    }

    pub(crate) fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmCallError> {
        self.lock().set_cpuid2(cpuid).map_err(KvmCallError::new("set a vCPU's CPUID"))
    }

    /// Starts its thread, parked.
    pub(crate) fn spawn(
        self: Arc<Self>,
        control: Arc<Control>,
        bus: Arc<Bus>,
    ) -> std::io::Result<JoinHandle<()>> {
        control.add_thread();
        let on_failure = Arc::clone(&control);
        let thread = thread::Builder::new().name(format!("vcpu{}", self.index)).spawn(move || {
            let guard = PanicGuard { control, vcpu: self.index, what: "vCPU" };
            let control = &guard.control;
            confine::enter(Role::Vcpu);
            let _signalled = self.kick.set_thread();
            // Whoever built the machine may have blocked it, and threads inherit that.
            if let Err(error) = kick::unblock_signal() {
                tracing::error!(%error, "the vCPU can't be interrupted by its signal");
            }
            while control.park(&*self.kick) {
                let left = self.run_until_left(control, &bus);
                match left {
                    Left::ToPark => {}
                    Left::Ended(event) => control.end(event),
                }
            }
        });
        if thread.is_err() {
            on_failure.remove_thread();
        }
        thread
    }

    /// Runs the guest until the machine is to park or ends itself.
    ///
    /// KVM completes a port or MMIO access when it is entered again. A kick makes it return with EINTR
    /// only after that, so a vCPU that parks on EINTR has no access pending and its state is whole.
    #[expect(clippy::wildcard_enum_match_arm, reason = "exits of every architecture: the rest is a fault")]
    fn run_until_left(&self, control: &Control, bus: &Bus) -> Left {
        let mut fd = self.lock();
        loop {
            let exit = match fd.run() {
                Ok(exit) => exit,
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN if control.should_park() => return Left::ToPark,
                    libc::EINTR | libc::EAGAIN => continue,
                    _ => return self.fault(&mut fd, &format!("KVM_RUN failed: {error}")),
                },
            };
            let reason = match exit {
                VcpuExit::IoIn(port, data) => {
                    bus.port_read(port, data);
                    continue;
                }
                VcpuExit::IoOut(port, data) => match bus.port_write(port, data) {
                    PortEffect::None => continue,
                    PortEffect::Shutdown => return Left::Ended(MachineEvent::Shutdown),
                    PortEffect::Reset => return Left::Ended(MachineEvent::Reset),
                },
                VcpuExit::MmioRead(address, data) => {
                    bus.mmio_read(address, data);
                    continue;
                }
                VcpuExit::MmioWrite(address, data) => {
                    bus.mmio_write(address, data);
                    continue;
                }
                VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => continue,
                VcpuExit::Shutdown => return Left::Ended(MachineEvent::Reset),
                VcpuExit::InternalError => internal_error(&mut fd),
                VcpuExit::FailEntry(reason, cpu) => {
                    format!("the processor refused to enter the guest: {reason:#x} on CPU {cpu}")
                }
                VcpuExit::SystemEvent(kind, _) => format!("unexpected system event {kind}"),
                VcpuExit::MemoryFault { flags, gpa, size } => {
                    format!("memory fault at {gpa:#x}, {size} bytes, flags {flags:#x}")
                }
                VcpuExit::Unsupported(number) => format!("unknown exit {number}"),
                other => format!("unexpected exit {other:?}"),
            };
            return self.fault(&mut fd, &reason);
        }
    }

    fn fault(&self, fd: &mut VcpuFd, reason: &str) -> Left {
        let at = match fd.get_regs() {
            Ok(regs) => format!("{reason}, at RIP {:#x}", regs.rip),
            Err(_) => reason.to_owned(),
        };
        tracing::error!(vcpu = self.index, reason = at, "the vCPU can't go on");
        Left::Ended(MachineEvent::Fault { vcpu: self.index, reason: at })
    }
}

/// What KVM tells about an exit of its own.
fn internal_error(fd: &mut VcpuFd) -> String {
    let details = kick::internal_error(fd);
    let name = match details.suberror {
        1 => "instruction emulation failed",
        2 => "simultaneous exceptions",
        3 => "delivery of an event failed",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    let data: Vec<String> = details.data.iter().map(|word| format!("{word:#x}")).collect();
    format!("KVM internal error {} ({name}), data [{}]", details.suberror, data.join(", "))
}

impl Kick for VcpuKick {
    fn kick(&self) {
        self.request_exit();
    }

    fn reset(&self) {
        self.clear();
    }
}
