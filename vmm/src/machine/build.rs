//! Building a machine: everything is opened, nothing runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::processor::MachineCpu;
use super::{Machine, Phase};
use crate::capability::{self, Capabilities, KvmCallError, KvmError};
use crate::config::{ConfigError, DiskConfig, MachineConfig, MemoryConfig, NetConfig};
use crate::cpu::{self, CpuError};
use crate::devices::power::{InterruptLevel, Power};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mmio::{NOTIFY_OFFSET, WINDOW_BYTES};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::devices::{
    ACPI_INTERRUPT, Bus, MMIO_START, SERIAL_INTERRUPT, SerialError, SerialPort, mmio_interrupt,
};
use crate::disk::{Disk, DiskError};
use crate::memory::dirty_log::DirtyLog;
use crate::memory::{self, GuestRam, MemoryError};
use crate::parking::{Control, Kick};
use crate::tap::{Tap, TapError};
use crate::vcpu::{Vcpu, install_signal_handler};

/// A page for the purpose of [`capability::TSS_ADDRESS`], before it.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No host could build it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM can't be used here.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its processor can't be had here.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Its memory can't be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its tap can't be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A disk can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its serial port can't be had.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// KVM allows fewer vCPUs.
    #[error("this host's KVM allows {max} vCPUs a machine, and {wanted} were asked for")]
    TooManyCpus {
        /// How many were asked for.
        wanted: u8,
        /// How many are allowed.
        max: usize,
    },
    /// A thread or an eventfd could not be made.
    #[error("can't make {what}")]
    Resource {
        /// What was to be made.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl From<KvmCallError> for BuildError {
    fn from(error: KvmCallError) -> Self {
        Self::Kvm(error.into())
    }
}

impl Machine {
    /// Opens everything that the machine consists of, and its threads, which wait.
    ///
    /// # Errors
    /// Says what can't be had and what to do; nothing is left behind.
    pub fn build(config: &MachineConfig) -> Result<Self, BuildError> {
        Self::build_with(config, memory::allocate)
    }

    /// The same on `memory`, the memfd of another process's machine ([`GuestRam::descriptor`]). Nothing is written to
    /// it before [`Machine::run`], so the other machine may run until then, and go on if this one is dropped.
    ///
    /// # Errors
    /// Says what can't be had, or what is wrong with the memory; nothing is left behind.
    pub fn build_on(config: &MachineConfig, memory: OwnedFd) -> Result<Self, BuildError> {
        Self::build_with(config, |config| memory::adopt(config, memory))
    }

    fn build_with(
        config: &MachineConfig,
        memory: impl FnOnce(&MemoryConfig) -> Result<GuestRam, MemoryError>,
    ) -> Result<Self, BuildError> {
        config.check()?;
        let (kvm, capabilities) = capability::open()?;
        check_cpus(config.cpus, capabilities.vcpus_max)?;
        install_signal_handler().map_err(KvmCallError::new("have its vCPUs interrupted by a signal"))?;
        let ram = memory(&config.memory)?;
        let vm = Arc::new(kvm.create_vm().map_err(KvmCallError::new("create a machine"))?);
        create_interrupt_controllers(&vm, &capabilities)?;
        let dirty_log = DirtyLog::register(&vm, &ram, capability::enable_dirty_log_modes(&vm))?;
        let vcpus = (0..config.cpus).map(|index| Vcpu::create(&vm, index).map(Arc::new));
        let vcpus: Vec<_> = vcpus.collect::<Result<_, _>>()?;
        let tsc_khz = vcpus[0].lock().get_tsc_khz().ok();
        let cpu = MachineCpu::choose(config, &kvm, &capabilities, tsc_khz)?;
        cpu::hide_msrs(&vm, capabilities.cpuid.as_slice(), &cpu.shown.leaves)?;
        let Devices { all: devices, net, disks } = Devices::open(config, &ram)?;
        let virtio = devices.iter().map(|device| Arc::clone(device.transport())).collect();
        let power = Power::new(Box::new(AcpiInterrupt { vm: Arc::clone(&vm) }));
        let bus = Bus { serial: SerialPort::open(&config.serial)?, power, virtio };
        connect(&vm, &bus)?;

        let control = Arc::new(Control::new());
        let kicks = vcpus.iter().map(|vcpu| Arc::clone(&vcpu.kick) as Arc<dyn Kick>);
        let devices_kicks = devices.iter().map(|device| device.kick()).chain([bus.serial.kick()]);
        control.set_kicks(kicks.chain(devices_kicks).collect());
        let machine = Self {
            config: config.clone(),
            xsave_bytes: capability::xsave_bytes(&vm),
            capabilities,
            cpu: Mutex::new(cpu),
            clocks: Mutex::default(),
            tsc_khz,
            vcpus,
            bus: Arc::new(bus),
            devices,
            net,
            disks,
            control,
            threads: Mutex::new(Vec::new()),
            dirty_log,
            vm,
            ram,
            phase: Mutex::new(Phase::Created),
            operation: Mutex::new(()),
        };
        machine.spawn_threads()?;
        Ok(machine)
    }

    /// Starts the threads, parked. If one can't be had, dropping the machine ends the others.
    fn spawn_threads(&self) -> Result<(), BuildError> {
        let error = |what| move |source| BuildError::Resource { what, source };
        let mut threads = self.threads.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for vcpu in &self.vcpus {
            let thread = Arc::clone(vcpu).spawn(Arc::clone(&self.control), Arc::clone(&self.bus));
            threads.push(thread.map_err(error("a vCPU's thread"))?);
        }
        for device in &self.devices {
            Arc::clone(device).spawn(&self.control, &mut threads).map_err(error("a device's thread"))?;
        }
        let thread = SerialPort::spawn(Arc::clone(&self.bus), Arc::clone(&self.control));
        threads.push(thread.map_err(error("the serial port's thread"))?);
        Ok(())
    }
}

/// The interrupt of ACPI's fixed hardware. It has a level, so no eventfd will do.
#[derive(Debug)]
struct AcpiInterrupt {
    vm: Arc<VmFd>,
}

impl InterruptLevel for AcpiInterrupt {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.set_irq_line(ACPI_INTERRUPT, asserted) {
            tracing::debug!(%error, asserted, "KVM does not take the level of the power button's interrupt");
        }
    }
}

/// Whether this host's KVM allows a machine so many vCPUs.
fn check_cpus(wanted: u8, max: usize) -> Result<(), BuildError> {
    if usize::from(wanted) > max { Err(BuildError::TooManyCpus { wanted, max }) } else { Ok(()) }
}

fn create_interrupt_controllers(vm: &VmFd, capabilities: &Capabilities) -> Result<(), KvmCallError> {
    vm.set_tss_address(capability::TSS_ADDRESS)
        .map_err(KvmCallError::new("set its task segment's address"))?;
    if capabilities.identity_map_address {
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(KvmCallError::new("set its identity map's address"))?;
    }
    vm.create_irq_chip().map_err(KvmCallError::new("create the interrupt controllers"))?;
    // The dummy speaker port keeps guests that time by it from exiting.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(KvmCallError::new("create the timer"))
}

/// The virtio devices: all of them by window, and again those that the machine deals with by what they are.
struct Devices {
    all: Vec<Arc<dyn VirtioDevice>>,
    net: Option<Arc<Net>>,
    disks: Vec<Arc<Block>>,
}

impl Devices {
    /// Opens them. Their order is the guest's, so it must be the same on every host.
    fn open(config: &MachineConfig, ram: &GuestRam) -> Result<Self, BuildError> {
        let MachineConfig { memory: _, cpus: _, cpu: _, net, disks, rng, serial: _, clock: _ } = config;
        let error = |source| BuildError::Resource { what: "a device's eventfds", source };
        let mut devices = Self { all: Vec::new(), net: None, disks: Vec::new() };
        if let Some(NetConfig { tap, mac }) = net {
            let tap = Tap::attach(tap)?;
            let net = Arc::new(Net::new(devices.slot(), *mac, tap, ram.clone()).map_err(error)?);
            devices.all.push(Arc::clone(&net) as _);
            devices.net = Some(net);
        }
        for config in disks {
            let DiskConfig { path: _, read_only: _, serial, locked: _, taken_over: _ } = config;
            let disk = Disk::open(config)?;
            let block = Block::new(devices.slot(), disk, serial.as_deref(), ram.clone());
            let block = Arc::new(block.map_err(error)?);
            devices.all.push(Arc::clone(&block) as _);
            devices.disks.push(block);
        }
        if *rng {
            devices.all.push(Arc::new(Rng::new(devices.slot(), ram.clone()).map_err(error)?));
        }
        Ok(devices)
    }

    /// The next free window.
    fn slot(&self) -> u8 {
        u8::try_from(self.all.len()).expect("a machine has few devices")
    }
}

/// Connects interrupts and queue notifications with KVM.
fn connect(vm: &VmFd, bus: &Bus) -> Result<(), KvmCallError> {
    let interrupt = |file: &EventFd, line| {
        vm.register_irqfd(file, line).map_err(KvmCallError::new("connect a device's interrupt"))
    };
    interrupt(bus.serial.interrupt(), SERIAL_INTERRUPT)?;
    let mut address = MMIO_START;
    for (window, transport) in (0_u32..).zip(&bus.virtio) {
        interrupt(transport.interrupt(), mmio_interrupt(window))?;
        for (queue, notify) in (0_u32..).zip(transport.notifiers()) {
            vm.register_ioevent(notify, &IoEventAddress::Mmio(address + NOTIFY_OFFSET), queue)
                .map_err(KvmCallError::new("connect a queue's notification"))?;
        }
        address += WINDOW_BYTES;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_vcpus_than_kvm_allows_are_refused_with_both_numbers() {
        check_cpus(4, 4).unwrap();
        let text = check_cpus(5, 4).unwrap_err().to_string();
        assert!(text.contains("allows 4 vCPUs") && text.contains("5 were asked for"), "{text}");
    }
}
