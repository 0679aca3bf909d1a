//! What it costs to ask which pages were touched, to read and clear the dirty log, to zero pages, and to provide memory
//! in advance, on a real machine that does not run.
//!
//! The log as a running guest feels it is in `tracking`; bitmap against ring is in ferry-vmm's own benches.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use ferry_tests::guest::{config, has_kvm};
use ferry_vmm::{Backing, HugePages, Machine, PAGE_BYTES};

/// Pages of a chunk, which is what the engine asks for at a time.
const CHUNK_PAGES: u64 = 512;

fn machine(mib: u64, backing: Backing, huge_pages: HugePages) -> Machine {
    let mut config = config(mib, 1, backing);
    config.memory.huge_pages = huge_pages;
    Machine::build(&config).expect("a machine")
}

/// Pages that may hold something, asked for by chunk.
fn touched(machine: &Machine) -> u64 {
    let ram = machine.ram();
    let mut pages = 0;
    for first in (0..ram.page_count()).step_by(CHUNK_PAGES.try_into().expect("512 fits")) {
        let count = CHUNK_PAGES.min(ram.page_count() - first);
        ram.touched(first, count, |_, count| pages += count).expect("it is in range");
    }
    pages
}

fn touched_pages(criterion: &mut Criterion) {
    if !has_kvm() {
        return;
    }
    let mut group = criterion.benchmark_group("touched");
    group.sample_size(20);
    for (name, backing) in [("private", Backing::PrivateAnonymous), ("memfd", Backing::SharedMemfd)] {
        // As much as this host will promise, up to 16 GiB; nothing of it is used.
        let built = [16, 8, 4, 2].into_iter().find_map(|gib| {
            let machine = Machine::build(&config(gib << 10, 1, backing)).ok()?;
            Some((gib, machine))
        });
        let (gib, machine) = built.expect("2 GiB of memory");
        group.bench_function(format!("{name}, {gib} GiB, none"), |bench| {
            bench.iter(|| touched(black_box(&machine)));
        });
        let ram = machine.ram();
        ram.prefault(0, (64 << 20) / PAGE_BYTES as u64).expect("64 MiB");
        for page in (20_000..ram.page_count()).step_by(50_000) {
            ram.write_page(page, &[1; PAGE_BYTES]).expect("it is in range");
        }
        group.bench_function(format!("{name}, {gib} GiB, 64 MiB in a piece and scattered pages"), |bench| {
            bench.iter(|| touched(black_box(&machine)));
        });
    }
    group.finish();
}

fn dirty_log(criterion: &mut Criterion) {
    if !has_kvm() {
        return;
    }
    let mut group = criterion.benchmark_group("dirty-log");
    for gib in [1, 4, 8] {
        let Ok(machine) = Machine::build(&config(gib << 10, 1, Backing::PrivateAnonymous)) else { continue };
        let pages = machine.ram().page_count();
        let mut words = vec![0; usize::try_from(pages.div_ceil(64)).expect("it fits")];
        machine.start_dirty_log().expect("a log");
        machine.collect_dirty(&mut words).expect("every page");
        group.bench_function(format!("read of {gib} GiB, nothing dirty"), |bench| {
            bench.iter(|| machine.collect_dirty(&mut words).expect("a log"));
        });
        group.bench_function(format!("switch on, first read and clear of {gib} GiB, untouched"), |bench| {
            bench.iter(|| {
                machine.stop_dirty_log().expect("it was on");
                machine.start_dirty_log().expect("a log");
                machine.collect_dirty(&mut words).expect("every page")
            });
        });
    }
    group.finish();
}

fn zero_and_prefault(criterion: &mut Criterion) {
    if !has_kvm() {
        return;
    }
    let mut group = criterion.benchmark_group("zero-and-prefault");
    group.sample_size(10);
    let kinds = [
        ("private, huge pages", Backing::PrivateAnonymous, HugePages::Transparent),
        ("private, 4 KiB pages", Backing::PrivateAnonymous, HugePages::Off),
        ("memfd", Backing::SharedMemfd, HugePages::Off),
    ];
    for (name, backing, huge_pages) in kinds {
        let ram = machine(256, backing, huge_pages).ram();
        let all = ram.page_count();
        let empty = || ram.zero_pages(0, all).expect("it is in range");
        let full = || ram.prefault(0, all).expect("256 MiB");
        group.bench_function(format!("prefault 256 MiB, {name}"), |bench| {
            bench.iter_batched(empty, |()| full(), BatchSize::PerIteration);
        });
        group.bench_function(format!("give back 256 MiB, {name}"), |bench| {
            bench.iter_batched(full, |()| empty(), BatchSize::PerIteration);
        });
        empty();
        group.bench_function(format!("zero 256 untouched runs of one page, {name}"), |bench| {
            bench.iter(|| (0..256).for_each(|run| ram.zero_pages(2 * run, 1).expect("it is in range")));
        });
        full();
        group.bench_function(format!("zero 256 zero pages that are in use, {name}"), |bench| {
            bench.iter(|| (0..256).for_each(|run| ram.zero_pages(2 * run, 1).expect("it is in range")));
        });
    }
    group.finish();
}

criterion_group!(benches, touched_pages, dirty_log, zero_and_prefault);
criterion_main!(benches);
