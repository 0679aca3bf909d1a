//! Life cycle, state and dirty log.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use crate::support::*;
use ferry_vmm::{
    Backing, HugePages, Machine, MachineConfig, MachineEvent, MachineStatus, RunError, SerialTarget,
    StateError,
};

const MEMORY_BYTES: u64 = 16 << 20;

/// The first of the pages that the counting guest touches in turn.
const TOUCHED_ADDRESS: u64 = 0x30_0000;
const TOUCHED_PAGES: u64 = 256;

#[test]
fn a_guest_prints_counts_pauses_and_resumes() {
    if !kvm_or_skip() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console");
    let mut config = config(MEMORY_BYTES);
    config.serial = SerialTarget::File(console.clone());
    let machine = machine_with(&config, COUNTING);
    assert_eq!(machine.status(), MachineStatus::Created);
    machine.run().unwrap();
    let_count(&machine, 1000);
    wait_until("the guest's word is in the file", || std::fs::read(&console).unwrap() == b"A");
    for _ in 0..50 {
        machine.pause().unwrap();
        let count = counter(&machine);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(counter(&machine), count, "a paused guest went on");
        assert_eq!(machine.status(), MachineStatus::Paused);
        machine.run().unwrap();
        let_count(&machine, 10);
    }
    assert_eq!(std::fs::read(&console).unwrap(), b"A", "the guest started again");
    machine.stop();
    machine.stop();
    assert_eq!(machine.status(), MachineStatus::Stopped);
    assert!(matches!(machine.run(), Err(RunError::WrongStatus { .. })));
}

#[test]
fn a_saved_guest_continues_in_another_machine() {
    if !kvm_or_skip() {
        return;
    }
    for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
        let mut config = config(MEMORY_BYTES);
        config.memory.backing = backing;
        let source = machine_with(&config, COUNTING);
        source.run().unwrap();
        let_count(&source, 5000);
        source.pause().unwrap();
        let state = source.save_state().unwrap();

        let target = Machine::build(&config).unwrap();
        copy_memory(&source.ram(), &target.ram());
        target.restore_state(&state).unwrap();
        assert_eq!(target.status(), MachineStatus::Created);
        target.run().unwrap();
        let count = counter(&source);
        let_count(&target, 5000);
        assert_eq!(counter(&source), count, "the source went on");
        target.pause().unwrap();
        // What the guest does is determined by its registers and memory: counts per page add up.
        let ram = target.ram();
        let touched = (0..TOUCHED_PAGES).map(|page| read_u32(&ram, TOUCHED_ADDRESS + page * 4096));
        let sum: u32 = touched.sum();
        assert!(counter(&target) - sum <= 1, "{} counted, {sum} in pages", counter(&target));
    }
}

#[test]
fn restoring_and_saving_again_gives_the_same_state() {
    if !kvm_or_skip() {
        return;
    }
    let mut config = config(MEMORY_BYTES);
    config.cpus = 2;
    let source = machine_with(&config, COUNTING);
    source.run().unwrap();
    let_count(&source, 5000);
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    let target = Machine::build(&config).unwrap();
    copy_memory(&source.ram(), &target.ram());
    target.restore_state(&state).unwrap();
    target.run().unwrap();
    target.pause().unwrap();
    target.save_state().unwrap();
}

#[test]
fn the_dirty_log_reports_what_was_touched_once_and_then_what_changed() {
    if !kvm_or_skip() {
        return;
    }
    let machine = machine_with(&config(MEMORY_BYTES), COUNTING);
    let ram = machine.ram();
    let pages = ram.page_count();
    let mut dirty = vec![0_u64; usize::try_from(pages.div_ceil(64)).unwrap()];
    machine.run().unwrap();
    let_count(&machine, 1000);
    assert!(machine.collect_dirty(&mut dirty).is_err(), "it was not started");
    machine.start_dirty_log().unwrap();
    assert!(machine.start_dirty_log().is_err(), "it is in use");
    let touched = machine.collect_dirty(&mut dirty).unwrap();
    assert!((TOUCHED_PAGES..=pages).contains(&touched), "{touched}");
    ram.for_each_page(0, pages, |page, bytes| {
        let named = dirty[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
        assert!(named || bytes.iter().all(|byte| *byte == 0), "page {page} holds something");
    })
    .unwrap();
    assert_eq!(machine.collect_dirty(&mut dirty).unwrap(), 0, "set bits count once");

    let mut rounds = 0;
    let mut seen = 0;
    while seen < 257 && rounds < 20 {
        dirty.fill(0);
        let_count(&machine, 1000);
        machine.collect_dirty(&mut dirty).unwrap();
        seen = dirty.iter().map(|word| word.count_ones()).sum();
        rounds += 1;
    }
    let first = TOUCHED_ADDRESS / 4096;
    let expected = (first..first + TOUCHED_PAGES).chain([COUNTER_ADDRESS / 4096]);
    for page in expected {
        let word = usize::try_from(page / 64).unwrap();
        assert!(dirty[word] >> (page % 64) & 1 == 1, "page {page} is missing");
    }
    assert_eq!(seen, 257, "pages that nobody wrote were reported");

    machine.pause().unwrap();
    machine.collect_dirty(&mut dirty).unwrap();
    dirty.fill(0);
    assert_eq!(machine.collect_dirty(&mut dirty).unwrap(), 0, "a paused guest dirtied pages");
    machine.stop_dirty_log().unwrap();
    assert!(machine.stop_dirty_log().is_err());
}

/// Where a guest finds the address that it is to write to.
const ORDER_ADDRESS: u64 = 0x21_0000;

/// Counts at COUNTER_ADDRESS and writes the order to the address that it names, if it is not zero.
const WRITING_TO_ORDER: &[u8] = &[
    0xa1, 0x00, 0x00, 0x21, 0x00, // next: mov eax, [ORDER_ADDRESS]
    0x85, 0xc0, // test eax, eax
    0x74, 0x02, // jz skip
    0x89, 0x00, // mov [eax], eax
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // skip: inc dword [COUNTER_ADDRESS]
    0xeb, 0xed, // jmp next
];

#[test]
fn a_sparse_guest_costs_what_it_touched_and_later_touches_are_reported() {
    if !kvm_or_skip() {
        return;
    }
    for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
        let mut config = config(64 << 20);
        config.memory.backing = backing;
        config.memory.huge_pages = HugePages::Off;
        let machine = machine_with(&config, WRITING_TO_ORDER);
        let ram = machine.ram();
        let collect = || {
            let mut words = vec![0_u64; usize::try_from(ram.page_count().div_ceil(64)).unwrap()];
            machine.collect_dirty(&mut words).unwrap();
            let is_set = |page: &u64| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
            (0..ram.page_count()).filter(is_set).collect::<Vec<_>>()
        };
        let write_at = |address: u32| {
            machine.pause().unwrap();
            let mut page = [0; ferry_vmm::PAGE_BYTES];
            page[..4].copy_from_slice(&address.to_le_bytes());
            ram.write_page(ORDER_ADDRESS / 4096, &page).unwrap();
            machine.run().unwrap();
            let_count(&machine, 10);
        };
        machine.run().unwrap();
        let_count(&machine, 10);
        machine.start_dirty_log().unwrap();
        let first = collect();
        assert!(first.contains(&(COUNTER_ADDRESS / 4096)), "{backing:?}: {first:?}");
        assert!(first.iter().all(|page| *page < 4096), "{backing:?}: {first:?}");
        // An untouched page of a chunk in use; one of an untouched chunk, and its neighbour; the last one.
        for address in [0x3f_5000_u32, 0x200_7008, 0x200_8000, 0x3ff_f000] {
            write_at(address);
            for round in 0..2 {
                let found = collect();
                assert!(found.contains(&u64::from(address / 4096)), "{backing:?} {address:#x}: {found:?}");
                assert!(found.len() <= 3, "{backing:?} {address:#x}: {found:?}");
                assert_eq!(read_u32(&ram, address.into()), address, "round {round}");
                let_count(&machine, 10);
            }
        }
        // What stays uncleared until the vCPUs are paused.
        write_at(0x280_0000);
        machine.pause().unwrap();
        assert!(collect().contains(&0x2800), "{backing:?}");
        assert_eq!(collect(), [0; 0], "{backing:?}: a paused guest");
    }
}

/// Where the second vCPU starts, and where it counts.
const SECOND_START: u32 = 0x8000;
const SECOND_COUNTER: u32 = 0x9000;

/// Starts the second vCPU by INIT and SIPI, then goes on as the counting guest.
fn starting_a_second_vcpu() -> Vec<u8> {
    let mut code = Vec::new();
    let mut store = |address: u32, value: u32| {
        code.extend([0xc7, 0x05]); // mov dword [address], value
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    // In real mode: xor ax, ax; mov ds, ax; next: inc word [SECOND_COUNTER]; jmp next.
    for (offset, word) in [(0, 0xd88e_c031), (4, 0x9000_06ff), (8, 0x0000_faeb)] {
        store(SECOND_START + offset, word);
    }
    store(0xfee0_00f0, 0x1ff); // the local APIC is enabled
    for command in [0x4500, 0x4600 | SECOND_START >> 12] {
        store(0xfee0_0310, 1 << 24);
        store(0xfee0_0300, command);
    }
    code.extend(COUNTING);
    code
}

#[test]
fn two_vcpus_run_pause_and_continue_elsewhere() {
    if !kvm_or_skip() {
        return;
    }
    let mut config = config(MEMORY_BYTES);
    config.cpus = 2;
    let both_count = |machine: &Machine| {
        let second = || read_u32(&machine.ram(), SECOND_COUNTER.into());
        let before = second();
        let_count(machine, 100);
        wait_until("the second vCPU counts", || second() != before);
    };
    let source = machine_with(&config, &starting_a_second_vcpu());
    source.run().unwrap();
    both_count(&source);
    source.pause().unwrap();
    let counts = |machine: &Machine| (counter(machine), read_u32(&machine.ram(), SECOND_COUNTER.into()));
    let before = counts(&source);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(counts(&source), before);
    let target = Machine::build(&config).unwrap();
    copy_memory(&source.ram(), &target.ram());
    target.restore_state(&source.save_state().unwrap()).unwrap();
    target.run().unwrap();
    both_count(&target);
    source.run().unwrap();
    both_count(&source);
}

#[test]
fn what_the_dirty_log_reports_is_enough_to_copy_a_running_guest() {
    if !kvm_or_skip() {
        return;
    }
    let source = machine_with(&config(MEMORY_BYTES), COUNTING);
    let target = Machine::build(&config(MEMORY_BYTES)).unwrap();
    let (from, to) = (source.ram(), target.ram());
    let pages = from.page_count();
    let words = usize::try_from(pages.div_ceil(64)).unwrap();
    let copy_dirty = |machine: &Machine| {
        let mut dirty = vec![0_u64; words];
        machine.collect_dirty(&mut dirty).unwrap();
        for page in 0..pages {
            if dirty[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1 {
                from.for_each_page(page, 1, |page, bytes| to.write_page(page, bytes).unwrap()).unwrap();
            }
        }
    };
    source.run().unwrap();
    source.start_dirty_log().unwrap();
    for _ in 0..20 {
        let_count(&source, 50);
        copy_dirty(&source);
    }
    source.pause().unwrap();
    copy_dirty(&source);
    from.for_each_page(0, pages, |page, bytes| {
        let mut copy = [0; ferry_vmm::PAGE_BYTES];
        to.read_page(page, &mut copy).unwrap();
        assert!(*bytes == copy, "page {page} differs");
    })
    .unwrap();
    target.restore_state(&source.save_state().unwrap()).unwrap();
    target.run().unwrap();
    let_count(&target, 1000);
}

#[test]
fn guests_end_themselves_in_every_way() {
    if !kvm_or_skip() {
        return;
    }
    // out 0xf4; keyboard reset; triple fault (an interrupt without a table); ACPI's two registers.
    let switch_off: &[u8] = &[0xb0, 0, 0xe6, 0xf4, 0xf4];
    let keyboard: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    let triple_fault: &[u8] = &[0x0f, 0x0b];
    let acpi_off: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4];
    let acpi_reset: &[u8] = &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4];
    for (code, event) in [
        (acpi_off, MachineEvent::Shutdown),
        (acpi_reset, MachineEvent::Reset),
        (switch_off, MachineEvent::Shutdown),
        (keyboard, MachineEvent::Reset),
        (triple_fault, MachineEvent::Reset),
    ] {
        let mut config = config(MEMORY_BYTES);
        config.cpus = 2;
        let machine = machine_with(&config, code);
        machine.run().unwrap();
        assert_eq!(machine.next_event(Duration::from_secs(10)), Some(event));
        assert_eq!(machine.status(), MachineStatus::Stopped);
        assert!(matches!(machine.pause(), Err(RunError::Ended { .. })));
        assert!(matches!(machine.run(), Err(RunError::WrongStatus { .. })));
    }
}

#[test]
fn a_guest_that_kvm_cannot_run_is_a_fault_with_its_address() {
    if !kvm_or_skip() {
        return;
    }
    // Jumps to where there is no memory.
    let machine = machine_with(&config(MEMORY_BYTES), &[0xb8, 0, 0, 0, 0xd8, 0xff, 0xe0]);
    machine.run().unwrap();
    let event = machine.next_event(Duration::from_secs(10)).unwrap();
    let MachineEvent::Fault { vcpu: 0, reason } = event else { panic!("{event:?}") };
    assert!(reason.contains("RIP 0xd8000000"), "{reason}");
    assert!(matches!(machine.status(), MachineStatus::Faulted { vcpu: 0, .. }));
}

#[test]
fn a_halted_guest_pauses_at_once_and_stays_halted() {
    if !kvm_or_skip() {
        return;
    }
    let machine = machine_with(&config(MEMORY_BYTES), &[0xf4, 0xeb, 0xfd]);
    machine.run().unwrap();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(1));
        machine.pause().unwrap();
        let state = machine.save_state().unwrap();
        assert!(!state.is_empty());
        machine.run().unwrap();
    }
}

#[test]
fn state_only_moves_between_the_right_machines_at_the_right_time() {
    if !kvm_or_skip() {
        return;
    }
    let empty = Machine::build(&config(MEMORY_BYTES)).unwrap();
    assert!(matches!(empty.save_state(), Err(StateError::WrongStatus { .. })));
    let source = machine_with(&config(MEMORY_BYTES), COUNTING);
    source.run().unwrap();
    assert!(matches!(source.save_state(), Err(StateError::WrongStatus { .. })));
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    assert!(matches!(source.restore_state(&state), Err(StateError::WrongStatus { .. })));

    let bigger = Machine::build(&config(2 * MEMORY_BYTES)).unwrap();
    assert!(matches!(bigger.restore_state(&state), Err(StateError::OtherMachine { .. })));
    let target = Machine::build(&config(MEMORY_BYTES)).unwrap();
    assert!(matches!(target.run(), Err(RunError::NothingLoaded)));
    for length in [0, 3, 12, state.len() / 2, state.len() - 1] {
        assert!(target.restore_state(&state[..length]).is_err());
    }
    let mut damaged = state.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    assert!(matches!(target.restore_state(&damaged), Err(StateError::Checksum { .. })));
    assert_eq!(target.status(), MachineStatus::Created);
    copy_memory(&source.ram(), &target.ram());
    target.restore_state(&state).unwrap();
    target.run().unwrap();
    let_count(&target, 100);
}

/// Says 'A' for ever.
const TALKING: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'A', 0xee, 0xeb, 0xfd];

#[test]
fn a_guest_whose_console_nobody_reads_still_pauses_and_stops() {
    if !kvm_or_skip() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut options = std::fs::File::options();
    let mut pipe = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    while pipe.write(&[0; 4096]).is_ok() {}
    let (done, returned) = std::sync::mpsc::channel();
    let machine = move || {
        let machine = machine_with(
            &MachineConfig { serial: SerialTarget::File(path), ..config(MEMORY_BYTES) },
            TALKING,
        );
        machine.run().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        machine.pause().unwrap();
        machine.stop();
        drop(machine);
        done.send(()).unwrap();
    };
    std::thread::spawn(machine);
    returned.recv_timeout(Duration::from_secs(20)).expect("it pauses, stops and goes away");
}

/// Where the guest below asks KVM for the wall clock.
const WALL_CLOCK_ADDRESS: u64 = 0x21_0000;

/// Asks for the wall clock by MSR, then counts at COUNTER_ADDRESS.
const ASKING_FOR_THE_WALL_CLOCK: &[u8] = &[
    0xb9, 0x00, 0x4d, 0x56, 0x4b, // mov ecx, 0x4b564d00 (MSR_KVM_WALL_CLOCK_NEW)
    0xb8, 0x00, 0x00, 0x21, 0x00, // mov eax, WALL_CLOCK_ADDRESS
    0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0xbb, 0x00, 0x00, 0x20, 0x00, // mov ebx, COUNTER_ADDRESS
    0xff, 0x03, // next: inc dword [ebx]
    0xeb, 0xfc, // jmp next
];

fn shared_config() -> MachineConfig {
    let mut config = config(MEMORY_BYTES);
    config.memory.backing = Backing::SharedMemfd;
    config
}

/// Every byte of its memory.
fn bytes_of(machine: &Machine) -> Vec<u8> {
    let ram = machine.ram();
    let mut all = Vec::new();
    ram.for_each_page(0, ram.page_count(), |_, bytes| all.extend_from_slice(bytes)).unwrap();
    all
}

#[test]
fn restoring_on_memory_of_another_machine_writes_nothing_to_it() {
    if !kvm_or_skip() {
        return;
    }
    let source = machine_with(&shared_config(), ASKING_FOR_THE_WALL_CLOCK);
    source.run().unwrap();
    let_count(&source, 100);
    let target = Machine::build_on(&shared_config(), source.ram().descriptor().unwrap()).unwrap();
    let_count(&source, 100);
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    // What KVM has written there at the guest's wish: that it wants to do so again is what is to be seen.
    let page = source.ram().page_of_gpa(WALL_CLOCK_ADDRESS).unwrap();
    assert_ne!(read_u32(&source.ram(), WALL_CLOCK_ADDRESS + 4), 0, "the guest was told the time");
    source.ram().write_page(page, &[0; ferry_vmm::PAGE_BYTES]).unwrap();
    let before = bytes_of(&source);
    target.restore_state(&state).unwrap();
    assert!(bytes_of(&source) == before, "restoring has written to memory that is not the target's yet");

    // Had the handover failed here, the guest would go on at the source as if nothing had been.
    source.run().unwrap();
    let_count(&source, 100);
    source.pause().unwrap();
    source.stop();
    let count = counter(&source);
    drop(source);
    // The state is a little older than the memory by now, which a guest that only counts does not mind.
    target.run().unwrap();
    let_count(&target, 100);
    assert!(counter(&target) > count, "it counts on in the same memory");
    assert_ne!(read_u32(&target.ram(), WALL_CLOCK_ADDRESS + 4), 0, "the guest is told the time when it runs");
}
