//! What a machine is made of, and what it boots: plain values, checked before anything is built.
//!
//! Nothing here opens a file or a device.

mod disk;

use std::path::PathBuf;

pub use disk::{DISK_SERIAL_BYTES_MAX, DISKS_MAX, DiskChoice, DiskConfig, SourceDisk};

use crate::cpu::{CpuModel, CpuProfile};
use crate::memory::{HUGE_PAGE_BYTES, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, PAGE_BYTES};

/// The most vCPUs of a machine. APIC ids are 8 bits wide without x2APIC, and 255 is a broadcast; the
/// bound stays well below, where one thread a vCPU still makes sense.
pub const CPUS_MAX: u8 = 64;

/// What to build with [`Machine::build`](crate::Machine::build).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// The guest's memory.
    pub memory: MemoryConfig,
    /// How many vCPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// The processor that the guest is shown.
    pub cpu: CpuModel,
    /// The network interface, if there is one.
    pub net: Option<NetConfig>,
    /// Its disks, at most [`DISKS_MAX`], in the guest's order.
    pub disks: Vec<DiskConfig>,
    /// Whether it has a device that gives the guest random bytes.
    pub rng: bool,
    /// Where the first serial port goes. It is local to a host and never migrates.
    pub serial: SerialTarget,
    /// How the guest's clocks go on when it has moved.
    pub clock: ClockMode,
}

/// How a guest's clocks go on at a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockMode {
    /// By the time that passed: the guest notices that it stood still, and its wall clock is right.
    #[default]
    Realtime,
    /// From where they were: the guest notices nothing, and its wall clock is late by the downtime.
    Monotonic,
}

/// The guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// A multiple of 4096 between [`MEMORY_BYTES_MIN`] and [`MEMORY_BYTES_MAX`]; of [`HUGE_PAGE_BYTES`] where the
    /// pages come from the host's pool.
    pub size_bytes: u64,
    /// What holds the bytes on the host.
    pub backing: Backing,
    /// In pages of which size.
    pub huge_pages: HugePages,
    /// The host's NUMA node that all of it comes from; any if `None`. It is local to a host and never migrates.
    pub node: Option<u32>,
}

impl MemoryConfig {
    /// Memory of any node, with transparent huge pages.
    #[must_use]
    pub const fn new(size_bytes: u64, backing: Backing) -> Self {
        Self { size_bytes, backing, huge_pages: HugePages::Transparent, node: None }
    }
}

/// What holds guest memory on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    PrivateAnonymous,
    /// A memfd, which other processes can map.
    SharedMemfd,
}

/// The size of the pages that guest memory has on the host. The guest never sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Huge pages wherever the host has some to hand: transparent ones for private memory, and what the host's own
    /// policy says (shmem_enabled) for a memfd.
    Transparent,
    /// 4 KiB pages only.
    Off,
    /// 2 MiB pages from the pool that the host's administrator has set aside (hugetlbfs), all of them reserved when the
    /// machine is built, or no machine.
    Pool,
    /// As [`HugePages::Pool`] where the pool has enough, and else as [`HugePages::Transparent`]: what a target builds for a
    /// machine that has had pages of the pool.
    PoolIfFree,
}

/// A virtio network interface on a tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The name of an existing tap in the calling thread's network namespace.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
}

/// Where the first serial port's output goes, and where its input comes from. Consoles can be attached beside it
/// ([`Machine::serve_console`](crate::Machine::serve_console)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// Nowhere.
    Null,
    /// This process's standard output and input. Input is only read while the machine runs.
    Stdio,
    /// This process's standard output; no input.
    Stdout,
    /// A new pseudo terminal ([`Machine::terminal`](crate::Machine::terminal)), both ways.
    Pty,
    /// A Unix socket that is made at this path for this user, both ways, for several connections one after the other
    /// or together.
    Socket(PathBuf),
    /// A file, which is created, or appended to; no input.
    File(PathBuf),
}

/// What a machine starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel: a bzImage, or a 64-bit ELF image (with a PVH entry note, or else entered by Linux's 64-bit boot
    /// protocol).
    pub kernel: Kernel,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; without ACPI the machine appends its virtio-mmio devices.
    pub cmdline: String,
    /// Whether ACPI tables tell the kernel of processors, devices and the power button. A kernel without ACPI looks for
    /// neither, and finds processors by the MP table, which is always there, and devices on its command line. Never
    /// both: a kernel that read both would find each device twice.
    pub acpi: bool,
}

/// Where the kernel's image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// In a file.
    File(PathBuf),
    /// In this program.
    Image {
        /// What to call it in messages.
        name: &'static str,
        /// The image.
        bytes: &'static [u8],
    },
}

/// What a target decides for itself when it takes over a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalChoices {
    /// The tap for the machine's network interface; needed if it has one.
    pub tap: Option<String>,
    /// Where its disks are on this host, one for each; where they are at the source if empty.
    pub disks: Vec<DiskChoice>,
    /// Where the serial port goes on this host.
    pub serial: SerialTarget,
    /// What holds the machine's memory on this host.
    pub memory: MemoryChoices,
    /// What the host offers of its processor at most; a machine whose guest was shown more is refused.
    pub cpu: CpuProfile,
}

/// What a target decides for itself about the memory of a machine that it takes over; `None` is what the source had,
/// for the node: any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryChoices {
    /// What holds the bytes.
    pub backing: Option<Backing>,
    /// In pages of which size.
    pub huge_pages: Option<HugePages>,
    /// From which NUMA node.
    pub node: Option<u32>,
}

/// Why a [`MachineConfig`] can't be built by any host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The memory size is out of bounds or no whole number of pages.
    #[error(
        "a machine can't have {size_bytes} bytes of memory; give a multiple of {PAGE_BYTES} from \
         {MEMORY_BYTES_MIN} to {MEMORY_BYTES_MAX}"
    )]
    MemorySize {
        /// What was asked for.
        size_bytes: u64,
    },
    /// The memory is no whole number of huge pages, but is to come from a pool of them.
    #[error(
        "{size_bytes} bytes of memory are no whole number of huge pages of {HUGE_PAGE_BYTES} bytes; give a multiple \
         of 2M, or leave out hugepages=2M"
    )]
    MemoryInHugePages {
        /// What was asked for.
        size_bytes: u64,
    },
    /// The number of vCPUs is out of bounds.
    #[error("a machine can't have {cpus} vCPUs; give 1 to {CPUS_MAX}")]
    Cpus {
        /// What was asked for.
        cpus: u8,
    },
    /// The MAC address is a group address or all zeroes.
    #[error("{} can't be an interface's MAC address: it must be a unicast address", format_mac(.mac))]
    Mac {
        /// What was asked for.
        mac: [u8; 6],
    },
    /// There are too many disks.
    #[error("a machine can't have {disks} disks; give {DISKS_MAX} at most")]
    Disks {
        /// How many were asked for.
        disks: usize,
    },
    /// A disk's serial number is too long, or has other characters than printable ASCII.
    #[error(
        "'{}' can't be a disk's serial number; give at most {DISK_SERIAL_BYTES_MAX} printable ASCII characters without \
         space", serial.escape_default()
    )]
    DiskSerial {
        /// What was asked for.
        serial: String,
    },
}

impl MachineConfig {
    /// Checks everything that needs no host.
    ///
    /// # Errors
    /// Names the first field that can't be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Self { memory, cpus, cpu: _, net, disks, rng: _, serial: _, clock: _ } = self;
        let MemoryConfig { size_bytes, backing: _, huge_pages, node: _ } = memory;
        let page_bytes = PAGE_BYTES as u64;
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(size_bytes) || size_bytes % page_bytes != 0 {
            return Err(ConfigError::MemorySize { size_bytes: *size_bytes });
        }
        if *huge_pages == HugePages::Pool && size_bytes % HUGE_PAGE_BYTES as u64 != 0 {
            return Err(ConfigError::MemoryInHugePages { size_bytes: *size_bytes });
        }
        if !(1..=CPUS_MAX).contains(cpus) {
            return Err(ConfigError::Cpus { cpus: *cpus });
        }
        if let Some(NetConfig { tap: _, mac }) = net
            && (mac[0] & 1 != 0 || *mac == [0; 6])
        {
            return Err(ConfigError::Mac { mac: *mac });
        }
        if disks.len() > DISKS_MAX {
            return Err(ConfigError::Disks { disks: disks.len() });
        }
        match disks.iter().filter_map(|disk| disk.serial.as_ref()).find(|serial| !disk::is_serial(serial)) {
            Some(serial) => Err(ConfigError::DiskSerial { serial: serial.clone() }),
            None => Ok(()),
        }
    }
}

fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(serial: Option<&str>) -> DiskConfig {
        let serial = serial.map(Into::into);
        DiskConfig { path: "a.img".into(), read_only: false, serial, locked: true, taken_over: None }
    }

    fn config() -> MachineConfig {
        MachineConfig {
            memory: MemoryConfig::new(64 << 20, Backing::PrivateAnonymous),
            cpus: 2,
            cpu: CpuModel::default(),
            net: Some(NetConfig { tap: "tap0".into(), mac: [0x02, 0, 0, 0, 0, 1] }),
            disks: vec![disk(None)],
            rng: true,
            serial: SerialTarget::Null,
            clock: ClockMode::default(),
        }
    }

    #[test]
    fn what_no_host_can_build_is_refused_by_name() {
        assert_eq!(config().check(), Ok(()));
        for size_bytes in [0, MEMORY_BYTES_MIN - 4096, MEMORY_BYTES_MIN + 1, MEMORY_BYTES_MAX + 4096] {
            let mut bad = config();
            bad.memory.size_bytes = size_bytes;
            assert_eq!(bad.check(), Err(ConfigError::MemorySize { size_bytes }));
        }
        let mut bad = config();
        bad.memory.size_bytes += 4096;
        assert_eq!(bad.check(), Ok(()));
        bad.memory.huge_pages = HugePages::Pool;
        assert!(matches!(bad.check(), Err(ConfigError::MemoryInHugePages { .. })));
        for cpus in [0, CPUS_MAX + 1] {
            let mut bad = config();
            bad.cpus = cpus;
            assert_eq!(bad.check(), Err(ConfigError::Cpus { cpus }));
        }
        for serial in ["123456789012345678901", "a b", "\u{e4}", "a\n"] {
            let mut bad = config();
            bad.disks.push(disk(Some(serial)));
            assert_eq!(bad.check(), Err(ConfigError::DiskSerial { serial: serial.into() }));
        }
        let mut bad = config();
        bad.disks = vec![disk(Some("12345678901234567890")); DISKS_MAX];
        assert_eq!(bad.check(), Ok(()));
        bad.disks.push(disk(None));
        assert_eq!(bad.check(), Err(ConfigError::Disks { disks: DISKS_MAX + 1 }));
        for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            let mut bad = config();
            bad.net.as_mut().unwrap().mac = mac;
            let error = bad.check().unwrap_err();
            assert!(error.to_string().contains(&format_mac(&mac)), "{error}");
        }
    }
}
