//! Machines that move many times within this process: their clocks, their vCPUs' step, and who runs when.

use std::time::Duration;

use super::tests::{HALTING, config, kvm_or_skip};
use super::*;
use crate::config::{BootSource, Kernel, SerialTarget};
use crate::tiny_kernel::elf;
use crate::vcpu::{TimedState, TscPlan};

const MOVES: u32 = 20;

/// What twenty moves may add to the error of a clock, with room for a busy machine: it is the time between two calls, each time.
const ERROR_MAX_NS: i128 = 1_000_000;

fn halting(cpus: u8, clock: ClockMode) -> Machine {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, elf(HALTING)).unwrap();
    let machine = Machine::build(&MachineConfig { cpus, clock, ..config() }).unwrap();
    let boot = BootSource { kernel: Kernel::File(kernel), initrd: None, cmdline: String::new(), acpi: false };
    machine.load(&boot).unwrap();
    machine.run().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    machine
}

/// Moves a running machine as the engine does, but for its memory, which a halted guest does not read.
fn moved(source: &Machine, stands: Duration) -> Machine {
    let local = LocalChoices {
        tap: None,
        disks: Vec::new(),
        serial: SerialTarget::Null,
        memory: MemoryChoices::default(),
        cpu: crate::cpu::CpuProfile::default(),
    };
    let config = Machine::config_from_description(&source.description(), local).unwrap();
    let target = Machine::build(&config).unwrap();
    source.pause().unwrap();
    target.drop_queued_frames();
    std::thread::sleep(stands);
    target.restore_state(&source.save_state().unwrap()).unwrap();
    std::thread::sleep(stands);
    target.run().unwrap();
    target
}

/// The state of a running machine, which is paused for it.
fn state_of(machine: &Machine) -> SavedState {
    machine.pause().unwrap();
    let saved = machine.decode(&machine.save_state().unwrap()).unwrap();
    machine.run().unwrap();
    saved
}

/// The TSC at the moment of the clock, where KVM tells the host's at that moment; otherwise as it was read a little later.
fn tsc_ns(saved: &SavedState) -> i128 {
    let vcpu = &saved.vcpus[0];
    let (_, value) = vcpu.msrs.iter().find(|(index, _)| *index == 0x10).unwrap();
    let exact = saved.clock.host.zip(vcpu.tsc_offset).map(|(host, offset)| host.tsc.wrapping_add(offset));
    i128::from(exact.unwrap_or(*value)) * 1_000_000 / i128::from(vcpu.tsc_khz.unwrap())
}

/// Whether KVM can give a guest a TSC that is not the host's.
fn takes_offsets(machine: &Machine) -> bool {
    let saved = TimedState::of(&state_of(machine).vcpus[0]);
    machine.pause().unwrap();
    let fd = machine.vcpus[0].lock();
    vcpu::set_time(&fd, &saved, TscPlan { offset_change: Some(12_345_678), passed_ns: 0 }).unwrap();
    let taken = vcpu::get_tsc_offset(&fd).zip(saved.offset).map(|(now, then)| now.wrapping_sub(then));
    drop(fd);
    machine.run().unwrap();
    taken == Some(12_345_678)
}

#[test]
fn after_twenty_moves_clocks_are_where_the_hosts_is() {
    if !kvm_or_skip() {
        return;
    }
    let mut machine = halting(2, ClockMode::Realtime);
    let first = state_of(&machine);
    let (mut clock_ns, mut tsc) = (first.clock.guest_ns, tsc_ns(&first));
    let mut last = first.clock.clone();
    for _ in 0..MOVES {
        machine = moved(&machine, Duration::from_millis(5));
        let now = state_of(&machine);
        assert!(now.clock.guest_ns > clock_ns && tsc_ns(&now) > tsc, "a clock went back");
        (clock_ns, tsc, last) = (now.clock.guest_ns, tsc_ns(&now), now.clock);
    }
    let host_ns = i128::from(last.realtime_ns.unwrap()) - i128::from(first.clock.realtime_ns.unwrap());
    let clock_error_ns = i128::from(clock_ns - first.clock.guest_ns) - host_ns;
    let tsc_error_ns = tsc - tsc_ns(&first) - host_ns;
    println!(
        "{MOVES} moves in {} ms: clock {clock_error_ns} ns, TSC {tsc_error_ns} ns off",
        host_ns / 1_000_000
    );
    assert!(clock_error_ns.abs() < ERROR_MAX_NS, "KVM's clock is {clock_error_ns} ns off");
    assert!(tsc_error_ns.abs() < ERROR_MAX_NS, "the TSC is {tsc_error_ns} ns off");
}

#[test]
fn clocks_that_stand_still_notice_nothing_of_a_move() {
    if !kvm_or_skip() {
        return;
    }
    let mut machine = halting(1, ClockMode::Monotonic);
    let first = state_of(&machine);
    let stands = Duration::from_millis(40);
    let mut last = None;
    for _ in 0..3 {
        machine = moved(&machine, stands);
        last = Some(state_of(&machine));
    }
    let last = last.unwrap();
    let host_ns = last.clock.realtime_ns.unwrap() - first.clock.realtime_ns.unwrap();
    // It stood twice in each move; what is left is what it ran.
    let ran_ns = host_ns - 6 * u64::try_from(stands.as_nanos()).unwrap();
    let clock_ns = last.clock.guest_ns - first.clock.guest_ns;
    let tsc = tsc_ns(&last) - tsc_ns(&first);
    println!(
        "{} ms passed; clock {} ms, TSC {} ms",
        host_ns / 1_000_000,
        clock_ns / 1_000_000,
        tsc / 1_000_000
    );
    assert!(clock_ns > 0 && tsc > 0, "a clock went back");
    assert!(clock_ns <= ran_ns, "{clock_ns} ns passed for the guest, which ran for {ran_ns} ns at most");
    if takes_offsets(&machine) {
        assert!(tsc <= i128::from(ran_ns) + ERROR_MAX_NS, "{tsc} ns passed by the TSC, of {ran_ns}");
    } else {
        println!("SKIPPED the TSC standing still: this KVM shows guests the host's own TSC");
    }
}

#[test]
fn vcpus_stay_in_step_and_know_their_place() {
    if !kvm_or_skip() {
        return;
    }
    for cpus in [1, 2, 4] {
        let machine = moved(&halting(cpus, ClockMode::Realtime), Duration::ZERO);
        let saved = state_of(&machine);
        assert_eq!(saved.vcpus.len(), usize::from(cpus));
        in_step(&saved);
        for vcpu in &saved.vcpus {
            let leaves: Vec<kvm_bindings::kvm_cpuid_entry2> =
                vcpu.cpuid.iter().map(|bytes| from_abi_bytes("vcpu", bytes).unwrap()).collect();
            let core = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (0xb, 1));
            let core = core.map(|leaf| (leaf.ebx, leaf.edx));
            assert_eq!(core, Some((u32::from(cpus), u32::from(vcpu.index))), "cores, and which one");
        }
        // Where KVM has no offsets, values that were read one after another.
        machine.pause().unwrap();
        let plan = TscPlan { offset_change: None, passed_ns: 1_000_000 };
        for (vcpu, saved) in machine.vcpus.iter().zip(&saved.vcpus) {
            vcpu::set_time(&vcpu.lock(), &TimedState::of(saved), plan).unwrap();
        }
        in_step(&machine.decode(&machine.save_state().unwrap()).unwrap());
    }
}

/// All vCPUs have the same offset, where KVM tells.
fn in_step(saved: &SavedState) {
    let offsets: Vec<_> = saved.vcpus.iter().map(|vcpu| vcpu.tsc_offset).collect();
    assert!(offsets.iter().all(|offset| *offset == offsets[0]), "out of step: {offsets:x?}");
}

#[test]
fn no_vcpu_runs_before_all_are_restored() {
    if !kvm_or_skip() {
        return;
    }
    let source = halting(4, ClockMode::Realtime);
    source.pause().unwrap();
    let bytes = source.save_state().unwrap();
    let mut saved = source.decode(&bytes).unwrap();
    // The last vCPU can't be restored, so none may run, whatever the first ones were given.
    saved.vcpus[3].xsave.truncate(1);
    let target = Machine::build(&MachineConfig { cpus: 4, ..config() }).unwrap();
    let mut writer = Writer::new();
    writer.add(&target.shape()).unwrap();
    writer.add(&saved.irqchip).unwrap();
    writer.add(&saved.pit).unwrap();
    writer.add(&saved.clock).unwrap();
    saved.vcpus.iter().for_each(|vcpu| writer.add(vcpu).unwrap());
    writer.add(&saved.serial).unwrap();
    let before = target.vcpus[0].lock().get_regs().unwrap();
    let error = target.restore_state(&writer.finish().unwrap()).unwrap_err();
    assert!(error.to_string().contains("extended state"), "{error}");
    assert!(target.run().is_err(), "a machine of which a vCPU is missing must not run");
    let restored = target.vcpus[0].lock().get_regs().unwrap();
    assert_ne!(restored, before, "the first vCPU was restored before the last one was refused");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(target.vcpus[0].lock().get_regs().unwrap(), restored, "it has run");
}
