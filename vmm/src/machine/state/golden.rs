//! A golden state of a whole machine: what was saved once is restored by every version that promises to.
//!
//! `vmm/tests/golden/machine-1.bin` is a halted guest with two vCPUs, without what ties it to a host: no CPUID, no
//! frequency, a few MSRs, and the clock in version 2. It is written if it is missing and `FERRY_WRITE_GOLDEN` is set.

use std::path::PathBuf;

use super::tests::{HALTING, config, kvm_or_skip, pause_when_halted};
use super::*;
use crate::config::{BootSource, Kernel};
use crate::tiny_kernel::elf;

/// Where system calls of 32-bit code enter: MSRs of every x86 processor.
const KEPT_MSRS: [(u32, u64); 2] = [(0x174, 0x10), (0x176, 0x1234_5678)];

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/machine-1.bin")
}

/// Saves a new machine and takes out what ties it to this host.
fn write() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, elf(HALTING)).unwrap();
    let source = Machine::build(&config()).unwrap();
    let boot = BootSource { kernel: Kernel::File(kernel), initrd: None, cmdline: String::new(), acpi: false };
    source.load(&boot).unwrap();
    source.run().unwrap();
    pause_when_halted(&source);
    let saved = source.decode(&source.save_state().unwrap()).unwrap();
    let mut writer = Writer::new();
    writer.add(&source.shape()).unwrap();
    writer.add(&saved.irqchip).unwrap();
    writer.add(&saved.pit).unwrap();
    for mut vcpu in saved.vcpus {
        vcpu.cpuid.clear();
        (vcpu.tsc_khz, vcpu.tsc_offset) = (None, None);
        vcpu.msrs = KEPT_MSRS.to_vec();
        vcpu.xsave.truncate(4096);
        writer.add(&vcpu).unwrap();
    }
    writer.add(&saved.serial).unwrap();
    let mut bytes = writer.finish().unwrap();
    // The clock as version 2 wrote it: its golden file is one section behind a header of 12 bytes.
    let clock = path().with_file_name("state-clock-v2.bin");
    bytes.extend_from_slice(&std::fs::read(clock).unwrap()[12..]);
    bytes[6] += 1;
    let total = u32::try_from(bytes.len()).unwrap();
    bytes[8..12].copy_from_slice(&total.to_le_bytes());
    std::fs::write(path(), bytes).unwrap();
}

#[test]
fn the_golden_machine_is_restored_and_runs() {
    if !kvm_or_skip() {
        return;
    }
    if !path().exists() && std::env::var_os("FERRY_WRITE_GOLDEN").is_some() {
        write();
    }
    let golden = std::fs::read(path()).unwrap();
    let machine = Machine::build(&config()).unwrap();
    machine.restore_state(&golden).unwrap();
    machine.run().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    machine.pause().unwrap();
    let now = machine.decode(&machine.save_state().unwrap()).unwrap();
    let then = machine.decode(&golden).unwrap();
    assert_eq!(then.clock.guest_ns, 1 << 33);
    assert!(now.clock.guest_ns > then.clock.guest_ns);
    assert_eq!((&now.irqchip, &now.serial), (&then.irqchip, &then.serial));
    assert_eq!(now.vcpus.len(), 2);
    for (now, then) in now.vcpus.iter().zip(&then.vcpus) {
        assert_eq!((&now.regs, &now.sregs, now.mp_state), (&then.regs, &then.sregs, then.mp_state));
        assert!(KEPT_MSRS.iter().all(|kept| now.msrs.contains(kept)), "an MSR is lost");
    }
    let regs: kvm_bindings::kvm_regs = from_abi_bytes("vcpu", &now.vcpus[0].regs).unwrap();
    assert_eq!((regs.rax, regs.rcx), (0x1122_3344, 0x5566_7788));
}
