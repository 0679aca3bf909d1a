//! Guests move between hosts that hold memory differently: every kind to every kind, with a guest that checks its own
//! memory.

use ferry_vmm::{Backing, HugePages, MemoryChoices, MemoryConfig};

use ferry_tests::guest::{boot, config, has_kvm, move_guest_to, one_at_a_time, runtime};

const GUEST_MIB: u64 = 64;

/// Half of it is zero and partly never touched, and it goes on writing.
const WORKLOAD: &str = "dirty rate=100 set=16 fill=24 zero=25 text=50 random=25 verify=500";

/// Every backing with every size of page that this host can give.
fn kinds() -> Vec<(Backing, HugePages)> {
    let mut kinds = Vec::new();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
        kinds.extend([(backing, HugePages::Transparent), (backing, HugePages::Off)]);
        // Source and target have some at the same time.
        if free >= GUEST_MIB {
            kinds.push((backing, HugePages::Pool));
        }
    }
    if free < GUEST_MIB {
        // The administrator's to make, so its absence fails no run.
        println!("SKIPPED (huge pages of the pool: {free} free; echo 160 > /proc/sys/vm/nr_hugepages)");
    }
    kinds
}

#[test]
fn a_guest_moves_between_all_kinds_of_memory() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let kinds = kinds();
    for &(backing, huge_pages) in &kinds {
        let mut first = config(GUEST_MIB, 1, backing);
        first.memory = MemoryConfig { huge_pages, node: Some(0), ..first.memory };
        let mut guest = boot(WORKLOAD, &first);
        // From the first kind to each, and back to it.
        for (to, pages) in kinds.iter().flat_map(|kind| [*kind, (backing, huge_pages)]) {
            let memory = MemoryChoices { backing: Some(to), huge_pages: Some(pages), node: None };
            let from = guest.machine.machine().memory_kind();
            let (moved, summary) =
                runtime.block_on(move_guest_to(guest, memory, |options| options.streams = 2));
            guest = moved;
            let kind = guest.machine.machine().memory_kind();
            assert_eq!(guest.machine.machine().ram().huge_pages(), pages);
            let report = guest.goes_on();
            assert!(report.pages_checked > 0, "the guest does check itself");
            println!("{from} -> {kind}: {:.0} ms", summary.total.as_secs_f64() * 1e3);
        }
    }
}

#[test]
fn what_the_source_had_is_kept_or_done_without() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let mut first = config(GUEST_MIB, 1, Backing::SharedMemfd);
    first.memory.huge_pages = HugePages::Off;
    let guest = boot(WORKLOAD, &first);
    let (guest, _) = runtime.block_on(move_guest_to(guest, MemoryChoices::default(), |_| {}));
    let memory = guest.machine.machine().config().memory;
    assert_eq!(memory, first.memory, "nothing was chosen, so all is as it was");
    guest.goes_on();
    drop(guest);
    // One page more than a whole number of huge pages: no pool can have it, and the guest runs all the same.
    let mut odd = config(GUEST_MIB, 1, Backing::PrivateAnonymous);
    odd.memory.size_bytes += 4096;
    odd.memory.huge_pages = HugePages::PoolIfFree;
    let guest = boot(WORKLOAD, &odd);
    let (guest, _) = runtime.block_on(move_guest_to(guest, MemoryChoices::default(), |_| {}));
    guest.goes_on();
    assert_eq!(guest.machine.machine().config().memory.huge_pages, HugePages::PoolIfFree);
    assert!(guest.machine.machine().memory_kind().contains("too few"));
}
