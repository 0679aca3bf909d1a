//! A minimal KVM machine monitor whose machines can be saved, restored and moved live.
//!
//! This is the only crate of ferry that talks to KVM and the only one with `unsafe` code. It knows
//! nothing of migration: it offers guest memory by page index, a dirty log, and a machine's state as
//! opaque versioned sections, and leaves what to do with them to its caller.
//!
//! [`Machine`] is where to start.

mod boot;
mod capability;
mod config;
pub mod confine;
mod cpu;
mod devices;
mod disk;
pub mod heap;
mod machine;
mod memory;
mod parking;
mod saved;
mod socket;
pub mod tap;
pub mod unix_listener;
mod vcpu;

#[cfg(test)]
#[path = "../tests/support/elf.rs"]
mod tiny_kernel;
#[cfg(test)]
#[path = "../tests/support/bzimage.rs"]
mod tiny_linux;

pub use boot::{BootError, CMDLINE_BYTES_MAX};
pub use capability::{KvmCallError, KvmError};
pub use config::{
    Backing, BootSource, CPUS_MAX, ClockMode, ConfigError, DISK_SERIAL_BYTES_MAX, DISKS_MAX, DiskChoice,
    DiskConfig, HugePages, Kernel, LocalChoices, MachineConfig, MemoryChoices, MemoryConfig, NetConfig,
    SerialTarget, SourceDisk,
};
pub use cpu::{
    CPU_PROFILE_BYTES_MAX, CpuError, CpuModel, CpuProfile, CpuProfileError, MissingFeature, ShownCpu,
};
pub use devices::SerialError;
pub use disk::DiskError;
pub use machine::{BuildError, FrameObserver, Machine, MachineStatus, RunError, SavedState};
pub use memory::{
    DirtyLogError, GuestRam, HUGE_PAGE_BYTES, HandOverError, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MemoryError,
    PAGE_BYTES, RamError, RamRegion, check_available,
};
pub use parking::MachineEvent;
pub use saved::{STATE_BYTES_MAX, StateError};
pub use socket::tcp_busy_time;
