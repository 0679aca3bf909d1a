//! What the tests on real KVM share: tiny guests, machines around them, and the rule for hosts without
//! KVM.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use ferry_vmm::{
    Backing, BootSource, GuestRam, Kernel, Machine, MachineConfig, MemoryConfig, PAGE_BYTES, SerialTarget,
};

/// Where tiny guests are loaded and start.
pub(crate) const CODE_ADDRESS: u32 = 0x10_0000;

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

/// An ELF image with a PVH note around `code`, which starts at CODE_ADDRESS.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const NOTE_OFFSET: u64 = 64 + 2 * 56;
    const CODE_OFFSET: u16 = 0x100;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // executable
    image.extend(62_u16.to_le_bytes()); // x86-64
    image.extend(1_u32.to_le_bytes());
    image.extend(u64::from(CODE_ADDRESS).to_le_bytes());
    image.extend(64_u64.to_le_bytes()); // program headers
    image.extend([0; 12]);
    for word in [64_u16, 56, 2, 0, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    let code_bytes = code.len() as u64;
    let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for word in [offset, address, address, bytes, bytes, 4] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(1, u64::from(CODE_OFFSET), u64::from(CODE_ADDRESS), code_bytes);
    segment(4, NOTE_OFFSET, 0, 20);
    for word in [4_u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(CODE_ADDRESS.to_le_bytes());
    image.resize(usize::from(CODE_OFFSET), 0);
    image.extend(code);
    image
}

/// Writes an image into a file and returns what boots it.
pub(crate) fn boot_source(directory: &Path, image: &[u8]) -> BootSource {
    let path = directory.join("kernel");
    File::create(&path).unwrap().write_all(image).unwrap();
    BootSource { kernel: Kernel::File(path), initrd: None, cmdline: String::new() }
}

pub(crate) fn config(memory_bytes: u64) -> MachineConfig {
    MachineConfig {
        memory: MemoryConfig { size_bytes: memory_bytes, backing: Backing::PrivateAnonymous },
        cpus: 1,
        net: None,
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
