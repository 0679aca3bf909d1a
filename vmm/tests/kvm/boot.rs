//! Kernels that look from inside at what they were given: by Linux's 64-bit protocol and by PVH, with ACPI.

use std::path::Path;
use std::time::Duration;

use crate::power_button::{SWITCHES_OFF, WAITS_FOR_THE_BUTTON};
use crate::support::*;
use crate::tiny_linux::{bzimage, elf_without_note};
use ferry_vmm::{BootSource, Kernel, Machine, MachineConfig, MachineEvent, MachineStatus, RunError};

const MEMORY_BYTES: u64 = 16 << 20;

/// Where these guests leave what they found.
const FOUND_ADDRESS: u64 = COUNTER_ADDRESS;

/// In 64-bit mode with the boot parameters in RSI: notes what it finds in them, and switches off by the register that
/// ACPI's tables name.
const LOOKING_AROUND: &[u8] = &[
    0x48, 0x8b, 0x7e, 0x70, // mov rdi, [rsi + 0x70]: ACPI's root pointer
    0x48, 0x8b, 0x07, // mov rax, [rdi]
    0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // mov [FOUND], rax
    0x8b, 0x86, 0x02, 0x02, 0x00, 0x00, // mov eax, [rsi + 0x202]: the setup header's magic
    0x89, 0x04, 0x25, 0x08, 0x00, 0x20, 0x00, // mov [FOUND + 8], eax
    0x0f, 0xb6, 0x86, 0xe8, 0x01, 0x00, 0x00, // movzx eax, byte [rsi + 0x1e8]: E820 ranges
    0x89, 0x04, 0x25, 0x0c, 0x00, 0x20, 0x00, // mov [FOUND + 12], eax
    0x8b, 0x86, 0x18, 0x02, 0x00, 0x00, // mov eax, [rsi + 0x218]: the initial RAM disk
    0x8a, 0x00, // mov al, [rax]
    0x88, 0x04, 0x25, 0x10, 0x00, 0x20, 0x00, // mov [FOUND + 16], al
    0x48, 0x8b, 0x5f, 0x18, // mov rbx, [rdi + 24]: the XSDT
    0x48, 0x8b, 0x5b, 0x24, // mov rbx, [rbx + 36]: the FADT
    0x8b, 0x53, 0x40, // mov edx, [rbx + 64]: PM1a control
    0x66, 0xb8, 0x00, 0x34, // mov ax, 0x3400: sleep type 5, now
    0x66, 0xef, // out dx, ax
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
];

const PATIENCE: Duration = Duration::from_secs(10);

/// What boots `image` with an initial RAM disk that begins with 0x5a.
fn with_initrd(directory: &Path, image: &[u8]) -> BootSource {
    let initrd = directory.join("initrd");
    std::fs::write(&initrd, [0x5a; 10_000]).unwrap();
    BootSource { initrd: Some(initrd), ..boot_source(directory, image) }
}

#[test]
fn linux_is_entered_in_64_bits_and_finds_memory_initrd_and_acpi() {
    if !kvm_or_skip() {
        return;
    }
    for (kind, image) in [("bzImage", bzimage(LOOKING_AROUND)), ("ELF", elf_without_note(LOOKING_AROUND))] {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::build(&config(MEMORY_BYTES)).unwrap();
        machine.load(&with_initrd(directory.path(), &image)).unwrap();
        machine.run().unwrap();
        assert_eq!(machine.next_event(PATIENCE), Some(MachineEvent::Shutdown), "{kind}");
        let found = |offset: u64| read_u32(&machine.ram(), FOUND_ADDRESS + offset).to_le_bytes();
        assert_eq!([found(0), found(4)].concat(), b"RSD PTR ", "{kind}");
        assert_eq!(&found(8), b"HdrS", "{kind}");
        assert_eq!(found(12), [3, 0, 0, 0], "{kind}: E820 ranges");
        assert_eq!(found(16)[0], 0x5a, "{kind}: the initial RAM disk");
    }
}

#[test]
fn a_guest_shuts_down_by_its_power_button_here_and_where_it_has_moved() {
    if !kvm_or_skip() {
        return;
    }
    let here = machine_with(&config(MEMORY_BYTES), &[WAITS_FOR_THE_BUTTON, SWITCHES_OFF].concat());
    assert!(matches!(here.press_power_button(), Err(RunError::WrongStatus { .. })), "it has not started");
    here.run().unwrap();
    let_count(&here, 10);
    here.pause().unwrap();
    let error = here.press_power_button().unwrap_err().to_string();
    assert!(error.contains("shut down") && error.contains("paused"), "{error}");
    let state = here.save_state().unwrap();
    let there = Machine::build(&config(MEMORY_BYTES)).unwrap();
    copy_memory(&here.ram(), &there.ram());
    there.restore_state(&state).unwrap();
    for machine in [&here, &there] {
        machine.run().unwrap();
        let_count(machine, 10);
        machine.press_power_button().unwrap();
        assert_eq!(machine.next_event(PATIENCE), Some(MachineEvent::Shutdown));
        assert_eq!(machine.status(), MachineStatus::Stopped);
        assert!(matches!(machine.press_power_button(), Err(RunError::Ended { .. })));
    }
}

#[test]
fn a_guest_without_acpi_is_said_not_to_listen_to_its_button() {
    if !kvm_or_skip() {
        return;
    }
    let machine = machine_with(&config(MEMORY_BYTES), COUNTING);
    machine.run().unwrap();
    let_count(&machine, 10);
    let error = machine.press_power_button().unwrap_err();
    assert!(matches!(error, RunError::NoPowerButton), "{error}");
    let_count(&machine, 10);
}

#[test]
fn more_vcpus_than_can_be_are_refused_with_the_figures() {
    if !kvm_or_skip() {
        return;
    }
    let refusal = |cpus| {
        let config = MachineConfig { cpus, ..config(MEMORY_BYTES) };
        Machine::build(&config).unwrap_err().to_string()
    };
    for cpus in [0, 65, 255] {
        let error = refusal(cpus);
        assert!(error.contains(&format!("{cpus} vCPUs")) && error.contains("64"), "{error}");
    }
}

#[test]
fn a_kernel_that_cannot_be_loaded_leaves_a_machine_that_cannot_run() {
    if !kvm_or_skip() {
        return;
    }
    let machine = Machine::build(&config(MEMORY_BYTES)).unwrap();
    let kernel = Kernel::Image { name: "scrap", bytes: &[0x5a; 4096] };
    let boot = BootSource { kernel, initrd: None, cmdline: String::new(), acpi: true };
    let error = machine.load(&boot).unwrap_err().to_string();
    assert!(error.contains("scrap"), "{error}");
    assert!(matches!(machine.run(), Err(RunError::NothingLoaded)));
}
