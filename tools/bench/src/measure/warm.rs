//! Memory that the host below has to give first.
//!
//! On a virtual host the first touch of memory that was idle for a while is a fault of the host below and costs many
//! times what a migration costs. So as much memory as a target is about to take is touched and given back right before
//! each timed run: the kernel then hands out memory that is there. No engine's own memory is touched.

use ferry_vmm::{Backing, Machine, MachineConfig, MemoryConfig, SerialTarget};

/// Memory touched beside the guest's, for buffers.
const EXTRA_MIB: u64 = 128;

/// Touches a guest's worth of memory and gives it back. Where that is not possible, the run is measured as it is.
pub fn touch(memory_mib: u32) {
    let config = MachineConfig {
        memory: MemoryConfig {
            size_bytes: (u64::from(memory_mib) + EXTRA_MIB) << 20,
            backing: Backing::PrivateAnonymous,
        },
        cpus: 1,
        net: None,
        serial: SerialTarget::Null,
    };
    let touched = Machine::build(&config).map(|machine| {
        let ram = machine.ram();
        ram.prefault(0, ram.page_count())
    });
    drop(touched);
}
