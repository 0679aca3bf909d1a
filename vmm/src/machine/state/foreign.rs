//! A state that no ferry has saved: what somebody who means harm might have KVM do with it.

use super::tests::{HALTING, config, kvm_or_skip, pause_when_halted};
use super::*;
use crate::PAGE_BYTES;
use crate::config::{BootSource, Kernel};
use crate::tiny_kernel::elf;

/// Hyper-V's interface: its hypercall page and its page for each vCPU are written by KVM as soon as their MSRs are set, even
/// for a guest that was never told of that interface.
const HYPERV_GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERV_HYPERCALL: u32 = 0x4000_0001;
const HYPERV_ASSIST_PAGE: u32 = 0x4000_0073;

/// Where a guest would have either page, with the bit that enables it.
const PAGE_ADDRESS: u64 = 0x20_0000;
const ENABLED: u64 = 1;

fn shared() -> MachineConfig {
    let mut config = config();
    config.memory.backing = Backing::SharedMemfd;
    config
}

#[test]
fn no_msr_that_a_state_names_has_memory_written_before_the_guest_runs() {
    if !kvm_or_skip() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, elf(HALTING)).unwrap();
    let source = Machine::build(&shared()).unwrap();
    let boot = BootSource { kernel: Kernel::File(kernel), initrd: None, cmdline: String::new(), acpi: false };
    source.load(&boot).unwrap();
    let page = source.ram().page_of_gpa(PAGE_ADDRESS).unwrap();
    let filled = [0x5a; PAGE_BYTES];
    source.ram().write_page(page, &filled).unwrap();
    source.run().unwrap();
    pause_when_halted(&source);
    let bytes = source.save_state().unwrap();
    let hypercall = (HYPERV_HYPERCALL, PAGE_ADDRESS | ENABLED);
    let assist = (HYPERV_ASSIST_PAGE, PAGE_ADDRESS | ENABLED);
    // Not every KVM knows the guest's name, without which there is no hypercall page; the others are not set yet.
    for (named, is_taken) in [
        (vec![hypercall], true),
        (vec![assist], true),
        (vec![(HYPERV_GUEST_OS_ID, 1), hypercall, assist], false),
    ] {
        let mut saved = source.decode(&bytes).unwrap();
        let msrs = &mut saved.vcpus[0].msrs;
        msrs.retain(|msr| !(HYPERV_GUEST_OS_ID..=HYPERV_ASSIST_PAGE).contains(&msr.0));
        msrs.extend(&named);
        let mut writer = Writer::new();
        writer.add(&saved.shape).unwrap();
        writer.add(&saved.irqchip).unwrap();
        writer.add(&saved.pit).unwrap();
        writer.add(&saved.clock).unwrap();
        saved.vcpus.iter().for_each(|vcpu| writer.add(vcpu).unwrap());
        writer.add(&saved.serial).unwrap();
        let target = Machine::build_on(&shared(), source.ram().descriptor().unwrap()).unwrap();
        let restored = target.restore_state(&writer.finish().unwrap());
        assert!(restored.is_ok() || !is_taken, "{named:x?}: {restored:?}");
        let mut now = [0; PAGE_BYTES];
        source.ram().read_page(page, &mut now).unwrap();
        assert!(now == filled, "{named:x?} wrote to memory that is not the target's yet: {restored:?}");
    }
}
