//! What a target makes of a saved state: decoding it, which takes no machine, and restoring it on this host's KVM.
//!
//! Restoring is done as in a handover between processes of one host, on memory that belongs to another machine until the new one
//! runs: whatever the state says, not a byte of it may change. What is restored does not run here.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use ferry_protocol::{MemoryDigest, PAGE_BYTES, PageDigest};
use ferry_vmm::{
    Backing, BootSource, CPUS_MAX, ClockMode, CpuModel, DiskConfig, GuestRam, Kernel, Machine, MachineConfig,
    MemoryConfig, SavedState, SerialTarget, StateError,
};

use crate::bytes::Taker;
use crate::states::{Section, bent, sections, state};

#[path = "../../../vmm/tests/support/elf.rs"]
mod tiny_kernel;

/// Sections as ferry has saved them: a machine, and what some machines have besides.
const GOLDEN: [&[u8]; 5] = [
    include_bytes!("../../../vmm/tests/golden/machine-1.bin"),
    include_bytes!("../../../vmm/tests/golden/state-power-v1.bin"),
    include_bytes!("../../../vmm/tests/golden/state-virtio-mmio-v1.bin"),
    include_bytes!("../../../vmm/tests/golden/state-virtio-blk-v1.bin"),
    include_bytes!("../../../vmm/tests/golden/state-virtio-rng-v1.bin"),
];

/// What may be said of a state at most: it goes to the peer, and into logs.
const ERROR_BYTES_MAX: usize = 4096;

/// Of the machines that are restored.
const MEMORY_BYTES: u64 = 4 << 20;
const DISK_BYTES: u64 = 1 << 20;

/// Stops at once: interrupts off, `hlt` for ever.
const HALTING: &[u8] = &[0xf4, 0xeb, 0xfd];

/// A state, whole or bent; whether it is one.
///
/// # Panics
/// If what is said of it, or what was read of it, is beyond its bounds.
#[must_use]
pub fn is_decoded(bytes: &[u8]) -> bool {
    let mut taker = Taker(bytes);
    let bytes = match taker.byte() % 4 {
        0 => taker.0.to_vec(),
        1 => state(&sections(taker.0)),
        _ => {
            let golden = GOLDEN.iter().flat_map(|bytes| sections(bytes)).collect();
            state(&bent(golden, &mut taker))
        }
    };
    match SavedState::decode(&bytes) {
        Ok(saved) => assert!(saved.cpus() <= CPUS_MAX),
        Err(error) => {
            check_error(&error);
            return false;
        }
    }
    true
}

fn check_error(error: &StateError) {
    let mut length = error.to_string().len();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        length += error.to_string().len();
        cause = error.source();
    }
    assert!(length <= ERROR_BYTES_MAX, "{length} bytes are said of a state");
}

/// A machine on whose memory others are restored.
#[derive(Debug)]
struct Bench {
    config: MachineConfig,
    owner: Machine,
    digest: MemoryDigest,
    /// The owner's state.
    saved: Vec<Section>,
    /// The disk: a file without a name.
    _disk: Option<File>,
}

/// Restores a state, whole or bent, on memory of another machine; whether it was taken. `None` where there is no KVM.
///
/// # Panics
/// If that memory has changed, or the restored machine can't be saved again.
#[must_use]
pub fn is_restored(bytes: &[u8]) -> Option<bool> {
    let mut taker = Taker(bytes);
    let how = taker.byte();
    let bench = bench(how % 2 == 1)?;
    let sections = match how / 2 % 4 {
        0 => sections(taker.0),
        _ => bent(bench.saved.clone(), &mut taker),
    };
    let memory = bench.owner.ram().descriptor().expect("its memory can be shared");
    let machine = Machine::build_on(&bench.config, memory).expect("one like it has been built");
    let restored = machine.restore_state(&state(&sections));
    match &restored {
        Ok(()) => {
            let again = machine.save_state().expect("what was restored can be saved");
            SavedState::decode(&again).expect("what was saved can be decoded");
        }
        Err(error) => check_error(error),
    }
    drop(machine);
    assert!(digest(&bench.owner.ram()) == bench.digest, "memory has changed: {restored:?}");
    Some(restored.is_ok())
}

/// The bench, without devices or with them.
fn bench(with_devices: bool) -> Option<&'static Bench> {
    static BENCHES: [OnceLock<Option<Bench>>; 2] = [const { OnceLock::new() }; 2];
    BENCHES[usize::from(with_devices)].get_or_init(|| has_kvm().then(|| Bench::new(with_devices))).as_ref()
}

fn has_kvm() -> bool {
    let Err(error) = File::options().read(true).write(true).open(Path::new("/dev/kvm")) else { return true };
    eprintln!("SKIPPED restoring states: can't open /dev/kvm: {error}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm: {error}");
    false
}

impl Bench {
    fn new(with_devices: bool) -> Self {
        let disk = with_devices.then(|| {
            let disk = tempfile::tempfile().expect("a file for a disk");
            disk.set_len(DISK_BYTES).expect("room for a disk");
            disk
        });
        let config = config(disk.as_ref());
        let owner = Machine::build(&config).expect("a small machine can be built");
        let ram = owner.ram();
        for page in 0..ram.page_count() {
            let filled = [page.to_le_bytes()[0] | 1; PAGE_BYTES];
            ram.write_page(page, &filled).expect("a page of its memory");
        }
        let bytes = tiny_kernel::elf(HALTING).leak();
        let kernel = Kernel::Image { name: "halting", bytes };
        let boot = BootSource { kernel, initrd: None, cmdline: String::new(), acpi: false };
        owner.load(&boot).expect("a tiny kernel");
        owner.run().expect("it runs");
        std::thread::sleep(Duration::from_millis(50));
        owner.pause().expect("it is paused");
        let saved = sections(&owner.save_state().expect("a paused machine can be saved"));
        Self { digest: digest(&ram), config, owner, saved, _disk: disk }
    }
}

fn config(disk: Option<&File>) -> MachineConfig {
    let disks = disk.map(|disk| DiskConfig {
        path: format!("/proc/self/fd/{}", disk.as_raw_fd()).into(),
        read_only: false,
        serial: Some("disk-1".to_owned()),
        // Two machines of this process have it, of which none runs.
        locked: false,
        taken_over: None,
    });
    MachineConfig {
        memory: MemoryConfig::new(MEMORY_BYTES, Backing::SharedMemfd),
        cpus: 1 + u8::from(disk.is_some()),
        cpu: CpuModel::default(),
        net: None,
        rng: disks.is_some(),
        disks: disks.into_iter().collect(),
        serial: SerialTarget::Null,
        clock: ClockMode::default(),
    }
}

fn digest(ram: &GuestRam) -> MemoryDigest {
    let mut sum = MemoryDigest::ZERO;
    let seen = ram.for_each_page(0, ram.page_count(), |page, bytes| {
        sum = sum.combine(PageDigest::of(page, bytes).alone());
    });
    seen.expect("all of its pages");
    sum
}
