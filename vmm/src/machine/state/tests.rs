//! Descriptions, and a state that survives KVM unchanged.

use kvm_bindings::{Msrs, kvm_msr_entry};

use super::*;
use crate::config::{BootSource, Kernel, SerialTarget};
use crate::cpu::{CpuModel, CpuProfile};
use crate::tiny_kernel::elf;

/// Loads recognisable values into registers and devices and halts for good, interrupts off.
pub(super) const HALTING: &[u8] = &[
    0xb0, 0xa5, // mov al, 0xa5
    0xe6, 0x21, // out 0x21, al: the first interrupt controller's mask
    0xb0, 0x34, // mov al, 0x34
    0xe6, 0x43, // out 0x43, al: the timer's mode
    0x66, 0xba, 0xff, 0x03, // mov dx, 0x3ff
    0xee, // out dx, al: the serial port's scratch register
    0xb8, 0x44, 0x33, 0x22, 0x11, // mov eax, 0x11223344
    0xb9, 0x88, 0x77, 0x66, 0x55, // mov ecx, 0x55667788
    0x0f, 0x23, 0xc1, // mov dr0, ecx
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
];

const MSR_SYSENTER_EIP: u32 = 0x176;
const SYSENTER_EIP: u64 = 0xffff_8000_1234_5678;

/// MSRs that KVM does not list: a memory type range and a machine check's address.
const MSR_MTRR_BASE_0: u32 = 0x200;
const MTRR_BASE_0: u64 = 0x4000_0006;
const MSR_MACHINE_CHECK_0_ADDRESS: u32 = 0x402;
const MACHINE_CHECK_0_ADDRESS: u64 = 0x1234_5000;

const KEPT_MSRS: [(u32, u64); 3] = [
    (MSR_SYSENTER_EIP, SYSENTER_EIP),
    (MSR_MTRR_BASE_0, MTRR_BASE_0),
    (MSR_MACHINE_CHECK_0_ADDRESS, MACHINE_CHECK_0_ADDRESS),
];

/// Offsets in the extended state (Intel SDM, volume 1, section 13.4), and its bit for vector registers.
const XSAVE_XMM3: usize = 160 + 3 * 16;
const XSAVE_IN_USE: usize = 512;
const XSAVE_SSE: u8 = 2;

/// Changes on its own, or has no effect while the guest is halted.
const MSRS_IN_MOTION: [u32; 1] = [0x10];

pub(super) fn config() -> MachineConfig {
    MachineConfig {
        memory: MemoryConfig::new(16 << 20, Backing::PrivateAnonymous),
        cpus: 2,
        cpu: CpuModel::default(),
        net: None,
        disks: Vec::new(),
        rng: false,
        serial: SerialTarget::Null,
        clock: ClockMode::default(),
    }
}

pub(super) fn kvm_or_skip() -> bool {
    let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") else { return true };
    println!("SKIPPED tier kvm: can't open /dev/kvm: {error}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm: {error}");
    false
}

#[test]
fn a_description_becomes_a_configuration_with_local_choices() {
    let describe = |net_mac| {
        let mut writer = Writer::new();
        let shape = MachineShape { memory_bytes: 1 << 30, shared_memory: true, cpus: 3, net_mac };
        writer.add(&shape).unwrap();
        writer.finish().unwrap()
    };
    let local = |tap: Option<&str>| LocalChoices {
        tap: tap.map(Into::into),
        disks: Vec::new(),
        serial: SerialTarget::Stdio,
        memory: MemoryChoices::default(),
        cpu: CpuProfile::default(),
    };
    let with_net = describe(Some([2, 0, 0, 0, 0, 7]));
    let config = Machine::config_from_description(&with_net, local(Some("tap9"))).unwrap();
    assert_eq!(
        config,
        MachineConfig {
            memory: MemoryConfig::new(1 << 30, Backing::SharedMemfd),
            cpus: 3,
            cpu: CpuModel::default(),
            net: Some(NetConfig { tap: "tap9".into(), mac: [2, 0, 0, 0, 0, 7] }),
            disks: Vec::new(),
            rng: false,
            serial: SerialTarget::Stdio,
            clock: ClockMode::Realtime,
        }
    );
    let error = Machine::config_from_description(&with_net, local(None)).unwrap_err();
    assert!(error.to_string().contains("02:00:00:00:00:07"), "{error}");
    let error = Machine::config_from_description(&describe(None), local(Some("tap9"))).unwrap_err();
    assert!(error.to_string().contains("tap9"), "{error}");
    let error = Machine::config_from_description(b"nonsense", local(None)).unwrap_err();
    assert!(matches!(error, StateError::Magic), "{error}");
    let impossible = describe(Some([0xff; 6]));
    let error = Machine::config_from_description(&impossible, local(Some("tap9"))).unwrap_err();
    assert!(matches!(error, StateError::Config(_)), "{error}");
}

#[test]
fn a_description_carries_its_wish_for_pages_and_a_target_may_decide_otherwise() {
    let describe = |pages: Option<u8>, version: u16| {
        let mut writer = Writer::new();
        let shape = MachineShape { memory_bytes: 1 << 30, shared_memory: true, cpus: 1, net_mac: None };
        writer.add(&shape).unwrap();
        if let Some(huge_pages) = pages {
            writer.add(&MemoryPages { huge_pages }).unwrap();
        }
        let mut bytes = writer.finish().unwrap();
        if version != 1 {
            // The second section's header is 12 bytes and its body one.
            let at = bytes.len() - 11;
            bytes[at..at + 2].copy_from_slice(&version.to_le_bytes());
        }
        bytes
    };
    let memory_of = |description: &[u8], memory| {
        let local = LocalChoices {
            tap: None,
            disks: Vec::new(),
            serial: SerialTarget::Null,
            memory,
            cpu: CpuProfile::default(),
        };
        Machine::config_from_description(description, local).unwrap().memory
    };
    let wishes = [
        (None, 1, HugePages::Transparent),
        (Some(MemoryPages::OFF), 1, HugePages::Off),
        (Some(MemoryPages::POOL_2_MIB), 1, HugePages::PoolIfFree),
        // What a later version may write.
        (Some(99), 1, HugePages::Transparent),
        (Some(MemoryPages::OFF), 2, HugePages::Transparent),
    ];
    for (wish, version, expected) in wishes {
        let memory = memory_of(&describe(wish, version), MemoryChoices::default());
        assert_eq!((memory.huge_pages, memory.node), (expected, None), "{wish:?} version {version}");
    }
    let choices = MemoryChoices {
        backing: Some(Backing::PrivateAnonymous),
        huge_pages: Some(HugePages::Pool),
        node: Some(3),
    };
    let memory = memory_of(&describe(Some(MemoryPages::OFF), 1), choices);
    let expected = MemoryConfig {
        size_bytes: 1 << 30,
        backing: Backing::PrivateAnonymous,
        huge_pages: HugePages::Pool,
        node: Some(3),
    };
    assert_eq!(memory, expected);
}

#[test]
fn a_machine_that_did_without_the_pool_goes_on_wishing() {
    if !kvm_or_skip() {
        return;
    }
    let mut config = config();
    assert_eq!(
        Machine::build(&config).unwrap().description(),
        {
            let mut writer = Writer::new();
            let machine = Machine::build(&config).unwrap();
            writer.add(&machine.shape()).unwrap();
            writer.add(&machine.shown_cpu()).unwrap();
            writer.add(&StateSections::of(&machine.state_sections())).unwrap();
            writer.finish().unwrap()
        },
        "a plain machine's description has nothing that older versions must know"
    );
    // Never a whole number of huge pages, so it can't have them.
    config.memory.size_bytes = (16 << 20) + 4096;
    config.memory.huge_pages = HugePages::PoolIfFree;
    let machine = Machine::build(&config).unwrap();
    assert!(machine.memory_kind().contains("too few"), "{}", machine.memory_kind());
    let local = LocalChoices {
        tap: None,
        disks: Vec::new(),
        serial: SerialTarget::Null,
        memory: MemoryChoices::default(),
        cpu: CpuProfile::default(),
    };
    let next = Machine::config_from_description(&machine.description(), local).unwrap();
    assert_eq!(next.memory.huge_pages, HugePages::PoolIfFree);
}

#[test]
fn a_state_comes_back_from_kvm_as_it_went_in() {
    if kvm_or_skip() {
        goes_in_and_comes_back(false);
    }
}

/// As after a link that broke when the target had all: the guest has gone on at the source, and comes once more.
#[test]
fn a_later_state_takes_the_place_of_one_that_never_ran() {
    if kvm_or_skip() {
        goes_in_and_comes_back(true);
    }
}

fn goes_in_and_comes_back(after_another: bool) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, elf(HALTING)).unwrap();
    let source = Machine::build(&config()).unwrap();
    let boot = BootSource { kernel: Kernel::File(kernel), initrd: None, cmdline: String::new(), acpi: false };
    source.load(&boot).unwrap();
    let target = Machine::build(&config()).unwrap();
    let copy_memory = || {
        let (from, to) = (source.ram(), target.ram());
        from.for_each_page(0, to.page_count(), |page, bytes| to.write_page(page, bytes).unwrap()).unwrap();
    };
    if after_another {
        copy_memory();
        target.restore_state(&source.save_state().unwrap()).unwrap();
    }
    set_what_no_guest_here_can(&source);
    source.run().unwrap();
    pause_when_halted(&source);
    let first = source.save_state().unwrap();

    copy_memory();
    target.restore_state(&first).unwrap();
    target.run().unwrap();
    target.pause().unwrap();
    let second = target.save_state().unwrap();

    let first = source.decode(&first).unwrap();
    let second = source.decode(&second).unwrap();
    assert_eq!(first.irqchip, second.irqchip);
    let fresh = Machine::build(&config()).unwrap();
    assert_ne!(first.irqchip, fresh.save_irqchip().unwrap());
    let mode = |pit: &Pit| -> u8 {
        let state: kvm_bindings::kvm_pit_state2 = from_abi_bytes("pit", &pit.state).unwrap();
        state.channels[0].mode
    };
    assert_eq!((mode(&first.pit), mode(&second.pit)), (2, 2));
    assert_eq!(second.serial.scratch, 0x34);
    assert_eq!(first.serial, second.serial);
    assert!(second.clock.guest_ns > first.clock.guest_ns, "the clock went back");
    for (first, second) in first.vcpus.into_iter().zip(second.vcpus) {
        assert_same_vcpu(first, second);
    }
}

/// Pauses a machine whose first vCPU halts for good, once it does.
pub(super) fn pause_when_halted(machine: &Machine) {
    for _ in 0..500 {
        std::thread::sleep(std::time::Duration::from_millis(20));
        machine.pause().unwrap();
        let state = machine.vcpus[0].lock().get_mp_state().unwrap();
        if state.mp_state == kvm_bindings::KVM_MP_STATE_HALTED {
            return;
        }
        machine.run().unwrap();
    }
    panic!("the guest has not halted in 10 s");
}

/// Registers that take instructions which not every KVM back end has in ring 0.
fn set_what_no_guest_here_can(machine: &Machine) {
    let fd = machine.vcpus[0].lock();
    let context = machine.state_context();
    let mut saved = vcpu::save(0, &fd, context).unwrap();
    saved.xsave[XSAVE_XMM3..XSAVE_XMM3 + 16].fill(0x5a);
    saved.xsave[XSAVE_IN_USE] |= XSAVE_SSE;
    vcpu::restore(&fd, &saved, context, vcpu::TscPlan::default()).unwrap();
    let entries = KEPT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() });
    assert_eq!(fd.set_msrs(&Msrs::from_entries(&entries).unwrap()).unwrap(), entries.len());
}

fn assert_same_vcpu(mut first: SavedVcpu, mut second: SavedVcpu) {
    let regs: kvm_bindings::kvm_regs = from_abi_bytes("vcpu", &second.regs).unwrap();
    let dr: kvm_bindings::kvm_debugregs = from_abi_bytes("vcpu", &second.debugregs).unwrap();
    if second.index == 0 {
        assert_eq!((regs.rax, regs.rcx, dr.db[0]), (0x1122_3344, 0x5566_7788, 0x5566_7788));
        for kept in KEPT_MSRS {
            assert!(second.msrs.contains(&kept), "{kept:x?} is lost");
        }
        assert!(second.xsave.windows(16).any(|bytes| bytes == [0x5a; 16]), "a vector register is lost");
    }
    let tsc =
        |saved: &SavedVcpu| saved.msrs.iter().find(|(index, _)| *index == 0x10).map(|(_, value)| *value);
    assert!(tsc(&second) > tsc(&first), "the TSC went back");
    for saved in [&mut first, &mut second] {
        saved.msrs.retain(|(index, _)| !MSRS_IN_MOTION.contains(index));
        saved.tsc_offset = None;
    }
    assert!(first.msrs.len() > 10, "only {} MSRs were saved", first.msrs.len());
    assert_eq!(first, second);
}

/// Whether ACPI's interrupt is asserted at the I/O APIC.
fn is_acpi_interrupt_asserted(machine: &Machine) -> bool {
    let chip: kvm_irqchip = from_abi_bytes("irqchip", &machine.save_irqchip().unwrap().ioapic).unwrap();
    // Base address (8), register select, id, and then the interrupt requests.
    let bytes = to_abi_bytes(&chip);
    let at = std::mem::offset_of!(kvm_irqchip, chip) + 16;
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) & (1 << crate::devices::ACPI_INTERRUPT) != 0
}

#[test]
fn a_press_of_the_power_button_that_nobody_has_seen_yet_moves_with_the_machine() {
    if !kvm_or_skip() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, elf(HALTING)).unwrap();
    let source = Machine::build(&config()).unwrap();
    let boot = BootSource { kernel: Kernel::File(kernel), initrd: None, cmdline: String::new(), acpi: true };
    source.load(&boot).unwrap();
    source.bus.port_write(0x602, &[0, 1]);
    source.run().unwrap();
    assert!(!is_acpi_interrupt_asserted(&source));
    source.press_power_button().unwrap();
    assert!(is_acpi_interrupt_asserted(&source));
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    let target = Machine::build(&config()).unwrap();
    target.restore_state(&state).unwrap();
    assert!(is_acpi_interrupt_asserted(&target));
    // The target's driver acknowledges.
    target.bus.port_write(0x600, &[0, 1]);
    assert!(!is_acpi_interrupt_asserted(&target), "the line stays asserted");
    let without = Machine::build(&config()).unwrap();
    assert!(without.decode(&state).unwrap().power.is_some());
}
