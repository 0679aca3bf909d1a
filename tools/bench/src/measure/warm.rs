//! Memory that the host below has to give first.
//!
//! On a virtual host the first touch of memory that was idle for a while is a fault of the host below and costs many
//! times what a migration costs; and memory that is given back goes to the host below within seconds. So as much memory
//! as a target is about to take is touched beforehand, held, and given back at the moment of the order: the kernel then
//! hands out memory that is there. Before a scenario's first run the same is done with enough for both VMMs, since the
//! kernel need not hand out what it was given back last. No engine's own memory is touched.

use ferry_vmm::{Backing, ClockMode, CpuModel, Machine, MachineConfig, MemoryConfig, SerialTarget};

use procfs::{Current, Meminfo};

/// Memory touched beside the guest's, for buffers.
const EXTRA_MIB: u64 = 128;

/// The most of the machine's available memory that is touched, in percent: the rest is others'.
const AVAILABLE_PERCENT_MAX: u64 = 66;

/// Memory that is there. Dropping it gives it back to the kernel.
#[derive(Debug)]
pub struct WarmMemory {
    _machine: Option<Machine>,
}

impl WarmMemory {
    /// Touches a guest's worth of memory and holds it. Where that is not possible, the run is measured as it is.
    #[must_use]
    pub fn hold(memory_mib: u32) -> Self {
        let wanted_mib = u64::from(memory_mib) + EXTRA_MIB;
        let available = Meminfo::current().ok().and_then(|memory| memory.mem_available);
        let most_mib = available.map_or(wanted_mib, |bytes| (bytes >> 20) * AVAILABLE_PERCENT_MAX / 100);
        let config = MachineConfig {
            memory: MemoryConfig::new(wanted_mib.min(most_mib) << 20, Backing::PrivateAnonymous),
            cpus: 1,
            cpu: CpuModel::default(),
            net: None,
            disks: Vec::new(),
            rng: false,
            serial: SerialTarget::Null,
            clock: ClockMode::default(),
        };
        let machine = Machine::build(&config).ok();
        if let Some(machine) = &machine {
            let ram = machine.ram();
            // Pages that could not be touched are as cold as they would have been.
            let _ = ram.prefault(0, ram.page_count());
        }
        Self { _machine: machine }
    }
}
