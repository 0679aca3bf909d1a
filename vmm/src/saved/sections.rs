//! The sections of saved state. These types are the format: they are apart from the runtime types, so
//! a change there never changes the format unnoticed. Changing one means a new version of its section.

use serde::{Deserialize, Serialize};

use super::bounded::at_most;
use super::previous::ClockV2;
use super::{OPTIONAL, Section};

/// As many as KVM takes.
const CPUID_LEAVES_MAX: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// More than any KVM lists.
const MSRS_MAX: usize = 4096;

/// More than any device has.
const QUEUES_MAX: usize = 64;

/// What a target must build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineShape {
    pub(crate) memory_bytes: u64,
    pub(crate) shared_memory: bool,
    pub(crate) cpus: u8,
    /// MAC address of the network interface, if there is one.
    pub(crate) net_mac: Option<[u8; 6]>,
}

/// In what pages the machine would have its memory, which a target may grant. Only a description has it, and only if it
/// is not [`MemoryPages::TRANSPARENT`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemoryPages {
    pub(crate) huge_pages: u8,
}

impl MemoryPages {
    pub(crate) const TRANSPARENT: u8 = 0;
    pub(crate) const OFF: u8 = 1;
    pub(crate) const POOL_2_MIB: u8 = 2;
}

/// The features of the network interface that the guest's driver uses. Only a description has it, and only if some
/// target may lack one of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkFeatures {
    pub(crate) used: u64,
}

/// A disk of the machine, as a target has to know it before it builds. Only a description has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescribedDisk {
    /// Where it is at the source: the bytes of an absolute path.
    pub(crate) path: Vec<u8>,
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) serial: Option<String>,
    /// By what a target sees that it has opened the same file, if the source has locked it.
    pub(crate) mark: Option<u64>,
}

/// What the guest was shown of its processor, by its first vCPU. Only a description has it, so that a target can refuse before
/// memory moves; the state has each vCPU's own CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cpu {
    /// The profile with which the machine was started.
    pub(crate) profile: String,
    pub(crate) leaves: Vec<CpuidLeaf>,
    /// Features that showed through on the hosts that it was on.
    pub(crate) leaked: Vec<CpuidLeaf>,
    /// IA32_ARCH_CAPABILITIES, where the guest is told of it.
    pub(crate) arch_capabilities: Option<u64>,
    pub(crate) tsc_khz: Option<u32>,
}

/// kvm_cpuid_entry2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CpuidLeaf {
    pub(crate) function: u32,
    pub(crate) index: u32,
    pub(crate) flags: u32,
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
}

/// One vCPU. Byte vectors are kernel structures of the name; see [`super::abi`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    /// kvm_cpuid_entry2, in order.
    #[serde(deserialize_with = "at_most::<CPUID_LEAVES_MAX, _, _>")]
    pub(crate) cpuid: Vec<Vec<u8>>,
    pub(crate) mp_state: u32,
    pub(crate) regs: Vec<u8>,
    pub(crate) sregs: Vec<u8>,
    /// As KVM_GET_XSAVE or, if longer than 4096 bytes, KVM_GET_XSAVE2 give it.
    pub(crate) xsave: Vec<u8>,
    pub(crate) xcrs: Vec<u8>,
    pub(crate) debugregs: Vec<u8>,
    pub(crate) lapic: Vec<u8>,
    pub(crate) events: Vec<u8>,
    /// Index and value.
    #[serde(deserialize_with = "at_most::<MSRS_MAX, _, _>")]
    pub(crate) msrs: Vec<(u32, u64)>,
    pub(crate) tsc_khz: Option<u32>,
    /// What KVM adds to the host's TSC, where KVM tells.
    pub(crate) tsc_offset: Option<u64>,
}

/// The interrupt controllers: kvm_irqchip of both PICs and the I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Irqchip {
    pub(crate) pic_master: Vec<u8>,
    pub(crate) pic_slave: Vec<u8>,
    pub(crate) ioapic: Vec<u8>,
}

/// The timer: kvm_pit_state2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pit {
    pub(crate) state: Vec<u8>,
}

/// KVM's clock at the moment of saving. Times in ns since boot of the guest and since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clock {
    pub(crate) guest_ns: u64,
    /// Host's wall clock and TSC at the same moment, where KVM gave them.
    pub(crate) host: Option<HostInstant>,
    /// Frequency of the host's TSC, where it is stable.
    pub(crate) host_tsc_khz: Option<u32>,
    /// The host's wall clock at the same moment, whether KVM gave it or not; older versions may not know.
    pub(crate) realtime_ns: Option<u64>,
}

/// How the guest's clocks go on at a target. Only a description has it, and only if it is not [`Time::REALTIME`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Time {
    pub(crate) clock: u8,
}

impl Time {
    pub(crate) const REALTIME: u8 = 0;
    pub(crate) const MONOTONIC: u8 = 1;
}

/// The sections that the machine's state will have, so that a target can refuse before memory moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateSections {
    pub(crate) sections: Vec<SectionVersion>,
}

/// A kind of section, in the version that is written, and what it is called there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SectionVersion {
    pub(crate) kind: u16,
    pub(crate) version: u16,
    pub(crate) name: String,
}

/// A moment by two clocks of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostInstant {
    pub(crate) realtime_ns: u64,
    pub(crate) tsc: u64,
}

/// The first serial port, a 16550.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Serial {
    pub(crate) baud_divisor_low: u8,
    pub(crate) baud_divisor_high: u8,
    pub(crate) interrupt_enable: u8,
    pub(crate) interrupt_identification: u8,
    pub(crate) line_control: u8,
    pub(crate) line_status: u8,
    pub(crate) modem_control: u8,
    pub(crate) modem_status: u8,
    pub(crate) scratch: u8,
    pub(crate) in_buffer: Vec<u8>,
}

/// A virtio device behind its virtio-mmio window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioMmio {
    /// Which window, from the first one on.
    pub(crate) slot: u8,
    pub(crate) device_type: u32,
    pub(crate) status: u32,
    pub(crate) interrupt_status: u32,
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) queue_select: u32,
    pub(crate) config_generation: u32,
    #[serde(deserialize_with = "at_most::<QUEUES_MAX, _, _>")]
    pub(crate) queues: Vec<Virtqueue>,
}

/// A split virtqueue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Virtqueue {
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
    pub(crate) event_idx: bool,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// ACPI's fixed hardware: the PM1 registers. Only there if a guest has touched them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Power {
    pub(crate) status: u16,
    pub(crate) enable: u16,
    pub(crate) control: u16,
}

/// A disk, as its guest was told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioBlock {
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) serial: Option<String>,
}

/// That there is an entropy device: in a description and in a state. It keeps nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioRng {}

/// What is known of a kind of section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) name: &'static str,
    pub(super) oldest: u16,
    pub(super) version: u16,
}

/// What the version before the current one means for a section that has one, and for one that hasn't.
macro_rules! previous {
    (oldest $version:literal) => {
        $version
    };
    (oldest $version:literal, $previous:ty) => {
        $version - 1
    };
    (take $body:ident) => {{
        let _ = $body;
        Err(postcard::Error::WontImplement)
    }};
    (take $body:ident, $previous:ty) => {
        postcard::take_from_bytes::<$previous>($body).map(|(previous, rest)| (previous.into(), rest))
    };
}

macro_rules! sections {
    ($($type:ident = $kind:literal, version $version:literal $(after $previous:ty)?, $name:literal;)*) => {
        $(impl Section for $type {
            const KIND: u16 = $kind;
            const VERSION: u16 = $version;
            const NAME: &'static str = $name;
            const OLDEST: u16 = previous!(oldest $version $(, $previous)?);

            fn take_previous(body: &[u8]) -> Result<(Self, &[u8]), postcard::Error> {
                previous!(take body $(, $previous)?)
            }
        })*

        /// Every kind of section, with its versions.
        #[cfg(test)]
        pub(super) const ALL: &[(u16, Known)] = &[$(($kind, Known {
            name: $name,
            oldest: <$type as Section>::OLDEST,
            version: $version,
        }),)*];

        pub(super) fn known(kind: u16) -> Option<Known> {
            let (name, oldest, version) = match kind {
                $($kind => ($name, <$type as Section>::OLDEST, $version),)*
                _ => return None,
            };
            Some(Known { name, oldest, version })
        }
    };
}

sections! {
    MachineShape = 1, version 1, "machine";
    MemoryPages = 0x8001, version 1, "memory-pages";
    Cpu = 0x8002, version 1, "cpu";
    StateSections = 0x8003, version 1, "state-sections";
    Time = 0x8004, version 1, "time";
    Vcpu = 16, version 1, "vcpu";
    Irqchip = 17, version 1, "irqchip";
    Pit = 18, version 1, "pit";
    Clock = 19, version 3 after ClockV2, "clock";
    Serial = 32, version 1, "serial";
    VirtioMmio = 33, version 1, "virtio-mmio";
    DescribedDisk = 36, version 1, "disk";
    VirtioBlock = 37, version 1, "virtio-blk";
    VirtioRng = 38, version 1, "virtio-rng";
    Power = 40, version 1, "power";
    NetworkFeatures = 48, version 1, "network-features";
}

// The optional bit is part of the kind: an optional section never collides with a mandatory one.
const _: () = assert!(OPTIONAL == 0x8000);
