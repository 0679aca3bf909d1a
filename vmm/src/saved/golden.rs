//! Golden state files: every section in every version that is read, as bytes that never change again.
//!
//! `vmm/tests/golden/state-NAME-vVERSION.bin` is an envelope with one section of made-up values. A new version of a section gets a new
//! file: `FERRY_WRITE_GOLDEN=1 cargo test -p ferry-vmm golden` writes those that are missing, and never changes one.

use std::path::PathBuf;

use super::sections::{
    ALL, Clock, Cpu, CpuidLeaf, DescribedDisk, HostInstant, Irqchip, MachineShape, MemoryPages,
    NetworkFeatures, Pit, Power, SectionVersion, Serial, StateSections, Time, Vcpu, VirtioBlock, VirtioMmio,
    VirtioRng, Virtqueue,
};
use super::*;

fn path(name: &str, version: u16) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    folder.join(format!("state-{name}-v{version}.bin"))
}

/// The file holds `section` as it is written now.
fn written<S: Section + PartialEq + std::fmt::Debug>(section: &S, seen: &mut Vec<(u16, u16)>) {
    let mut writer = Writer::new();
    writer.add(section).unwrap();
    let bytes = writer.finish().unwrap();
    let path = path(S::NAME, S::VERSION);
    if !path.exists() && std::env::var_os("FERRY_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(bytes, golden, "{} has changed without a new version", S::NAME);
    read(section, S::VERSION, seen);
}

/// The file of that version reads as `section`.
fn read<S: Section + PartialEq + std::fmt::Debug>(section: &S, version: u16, seen: &mut Vec<(u16, u16)>) {
    let path = path(S::NAME, version);
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(
        golden[HEADER_BYTES + 2..][..2],
        version.to_le_bytes(),
        "{} is of another version",
        path.display()
    );
    assert_eq!(Reader::new(&golden).unwrap().one::<S>().unwrap(), *section, "{}", path.display());
    seen.push((S::KIND, version));
}

/// Bytes that tell their place.
fn bytes(first: u8, count: usize) -> Vec<u8> {
    (first..=u8::MAX).cycle().take(count).collect()
}

fn leaf(function: u32) -> CpuidLeaf {
    CpuidLeaf { function, index: 1, flags: 1, eax: 2, ebx: 3, ecx: 4, edx: u32::MAX }
}

fn vcpu() -> Vcpu {
    Vcpu {
        index: 1,
        cpuid: vec![bytes(1, 40), bytes(2, 40)],
        mp_state: 3,
        regs: bytes(3, 144),
        sregs: bytes(4, 312),
        xsave: bytes(5, 4096),
        xcrs: bytes(6, 392),
        debugregs: bytes(7, 128),
        lapic: bytes(8, 1024),
        events: bytes(9, 64),
        msrs: vec![(0x10, 1 << 40), (0xc000_0080, 0xd01)],
        tsc_khz: Some(2_596_138),
        tsc_offset: Some(u64::MAX - 7),
    }
}

fn virtio() -> VirtioMmio {
    let queue = Virtqueue {
        size: 256,
        ready: true,
        next_avail: 7,
        next_used: 6,
        event_idx: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
    };
    VirtioMmio {
        slot: 0,
        device_type: 1,
        status: 15,
        interrupt_status: 1,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << 32,
        queue_select: 1,
        config_generation: 0,
        queues: vec![queue.clone(), Virtqueue { ready: false, ..queue }],
    }
}

fn serial() -> Serial {
    Serial {
        baud_divisor_low: 1,
        baud_divisor_high: 2,
        interrupt_enable: 3,
        interrupt_identification: 4,
        line_control: 5,
        line_status: 6,
        modem_control: 7,
        modem_status: 8,
        scratch: 9,
        in_buffer: b"typed".to_vec(),
    }
}

/// What some machines have and others haven't.
fn written_devices(seen: &mut Vec<(u16, u16)>) {
    let disk = DescribedDisk {
        path: b"/shared/web.img".to_vec(),
        size_bytes: 8 << 30,
        read_only: true,
        serial: Some("web-1".into()),
        mark: Some(1 << 60),
    };
    written(&disk, seen);
    written(&VirtioBlock { size_bytes: 8 << 30, read_only: false, serial: None }, seen);
    written(&VirtioRng {}, seen);
    written(&Power { status: 0x100, enable: 0x120, control: 1 }, seen);
    written(&NetworkFeatures { used: 1 << 15 | 1 }, seen);
}

#[test]
fn every_version_that_is_read_has_a_golden_file_and_reads_from_it() {
    let mut seen = Vec::new();
    let mac = Some([2, 0, 0, 0, 0, 7]);
    let shape = MachineShape { memory_bytes: 3 << 30, shared_memory: true, cpus: 4, net_mac: mac };
    written(&shape, &mut seen);
    written(&MemoryPages { huge_pages: MemoryPages::POOL_2_MIB }, &mut seen);
    let cpu = Cpu {
        profile: "x86-64-v3".into(),
        leaves: vec![leaf(0), leaf(7)],
        leaked: vec![leaf(0x8000_0001)],
        arch_capabilities: Some(1 << 62),
        tsc_khz: Some(2_596_138),
    };
    written(&cpu, &mut seen);
    let clock = SectionVersion { kind: 19, version: 3, name: "clock".into() };
    written(&StateSections { sections: vec![clock] }, &mut seen);
    written(&Time { clock: Time::MONOTONIC }, &mut seen);
    written(&vcpu(), &mut seen);
    written(
        &Irqchip { pic_master: bytes(1, 520), pic_slave: bytes(2, 520), ioapic: bytes(3, 520) },
        &mut seen,
    );
    written(&Pit { state: bytes(1, 112) }, &mut seen);
    let host = Some(HostInstant { realtime_ns: 1_700_000_000_000_000_000, tsc: 1 << 50 });
    let realtime_ns = host.map(|host| host.realtime_ns);
    let clock = Clock { guest_ns: 1 << 33, host, host_tsc_khz: Some(2_596_138), realtime_ns };
    read(&clock, 2, &mut seen);
    written(&clock, &mut seen);
    written(&serial(), &mut seen);
    written(&virtio(), &mut seen);
    written_devices(&mut seen);
    for (kind, known) in ALL {
        for version in known.oldest..=known.version {
            assert!(seen.contains(&(*kind, version)), "{} version {version} has no golden file", known.name);
        }
    }
}
