//! What the tests on real KVM share: tiny guests, machines around them, and the rule for hosts without
//! KVM.

pub(crate) mod elf;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use elf::elf;
use ferry_vmm::{
    Backing, BootSource, ClockMode, CpuModel, GuestRam, Kernel, Machine, MachineConfig, MemoryConfig,
    PAGE_BYTES, SerialTarget,
};

/// Where the counting guest counts.
pub(crate) const COUNTER_ADDRESS: u64 = 0x20_0000;

/// Whether tests on KVM can run; says so if not, and fails under CI.
pub(crate) fn kvm_or_skip() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED tier kvm: can't open /dev/kvm: {error}");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm: {error}");
            false
        }
    }
}

/// Says 'A' on the serial port, then counts at COUNTER_ADDRESS and, with interrupts off, increments the
/// first word of 256 pages from 3 MiB on in turn.
pub(crate) const COUNTING: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xb0, b'A', // mov al, 'A'
    0xee, // out dx, al
    0xbb, 0x00, 0x00, 0x20, 0x00, // mov ebx, COUNTER_ADDRESS
    0xff, 0x03, // next: inc dword [ebx]
    0x8b, 0x03, // mov eax, [ebx]
    0x25, 0xff, 0x00, 0x00, 0x00, // and eax, 255
    0xc1, 0xe0, 0x0c, // shl eax, 12
    0xff, 0x80, 0x00, 0x00, 0x30, 0x00, // inc dword [eax + 0x300000]
    0xeb, 0xec, // jmp next
];

/// Writes an image into a file and returns what boots it.
pub(crate) fn boot_source(directory: &Path, image: &[u8]) -> BootSource {
    let path = directory.join("kernel");
    File::create(&path).unwrap().write_all(image).unwrap();
    BootSource { kernel: Kernel::File(path), initrd: None, cmdline: String::new(), acpi: true }
}

pub(crate) fn config(memory_bytes: u64) -> MachineConfig {
    MachineConfig {
        memory: MemoryConfig::new(memory_bytes, Backing::PrivateAnonymous),
        cpus: 1,
        cpu: CpuModel::default(),
        clock: ClockMode::default(),
        net: None,
        disks: Vec::new(),
        rng: false,
        serial: SerialTarget::Null,
    }
}

/// A machine with `code` loaded; it does not run yet.
pub(crate) fn machine_with(config: &MachineConfig, code: &[u8]) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::build(config).unwrap();
    machine.load(&boot_source(directory.path(), &elf(code))).unwrap();
    machine
}

pub(crate) fn read_u32(ram: &GuestRam, gpa: u64) -> u32 {
    let page = ram.page_of_gpa(gpa).unwrap();
    let mut bytes = [0; PAGE_BYTES];
    ram.read_page(page, &mut bytes).unwrap();
    let offset = usize::try_from(gpa).unwrap() % PAGE_BYTES;
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub(crate) fn counter(machine: &Machine) -> u32 {
    read_u32(&machine.ram(), COUNTER_ADDRESS)
}

/// Waits until `condition` holds; fails after 10 s.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("this never came true: {what}");
}

/// Waits until the counting guest has counted `count` further.
pub(crate) fn let_count(machine: &Machine, count: u32) {
    let start = counter(machine);
    wait_until("the guest counts", || counter(machine).wrapping_sub(start) >= count);
}

pub(crate) fn copy_memory(from: &GuestRam, to: &GuestRam) {
    from.for_each_page(0, from.page_count(), |page, bytes| to.write_page(page, bytes).unwrap()).unwrap();
}
