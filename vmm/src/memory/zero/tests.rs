//! Zeroing on every kind of memory: what reads as zero, what is left alone, and what the host gets back.

use std::os::unix::fs::MetadataExt;

use super::super::test_memory::{kinds, touched_pages};
use super::super::{LOW_MEMORY_END, allocate};
use super::*;
use crate::config::MemoryConfig;

const HUGE_PAGES: u64 = 512;

fn fill(ram: &GuestRam) {
    for page in 0..ram.page_count() {
        ram.write_page(page, &[0xab; PAGE_BYTES]).unwrap();
    }
}

/// Pages that the memory takes on the host: by page tables for private memory, by blocks for a file.
fn taken(ram: &GuestRam) -> u64 {
    match ram.file() {
        None => touched_pages(ram, 0, ram.page_count()),
        Some(file) => file.metadata().unwrap().blocks() * 512 / PAGE_BYTES as u64,
    }
}

/// Pages of private memory that are mapped by huge pages, as far as the kernel tells.
fn huge_mapped(ram: &GuestRam) -> u64 {
    let span = ram.spans(0, ram.page_count()).unwrap().next().unwrap();
    let huge = ram.held(span).unwrap().into_iter().filter(|held| held.huge == Some(true));
    huge.map(|held| ((held.end - held.start) / PAGE_BYTES) as u64).sum()
}

#[test]
fn zeroed_pages_read_as_zero_and_their_neighbours_do_not() {
    for config in kinds(16 << 20) {
        let ram = allocate(&config).unwrap();
        let pages = ram.page_count();
        fill(&ram);
        for (first, count) in [(3, 1), (10, 2000), (4000, 96)] {
            ram.zero_pages(first, count).unwrap();
        }
        ram.for_each_page(0, pages, |page, bytes| {
            let zeroed = page == 3 || (10..2010).contains(&page) || page >= 4000;
            let expected = if zeroed { 0 } else { 0xab };
            assert!(bytes.iter().all(|byte| *byte == expected), "{config:?} page {page}");
        })
        .unwrap();
    }
}

#[test]
fn zeroing_untouched_memory_takes_none() {
    for config in kinds(64 << 20) {
        let ram = allocate(&config).unwrap();
        ram.write_page(5 * HUGE_PAGES, &[1; PAGE_BYTES]).unwrap();
        let before = taken(&ram);
        ram.zero_pages(1, 3 * HUGE_PAGES).unwrap();
        ram.zero_pages(5 * HUGE_PAGES + 1, 4 * HUGE_PAGES).unwrap();
        assert_eq!(taken(&ram), before, "{config:?}");
    }
    let beyond = MemoryConfig::new(LOW_MEMORY_END + (64 << 20), Backing::PrivateAnonymous);
    let ram = allocate(&beyond).unwrap();
    ram.zero_pages(0, ram.page_count()).unwrap();
    assert_eq!(taken(&ram), 0);
}

#[test]
fn what_became_zero_goes_back_to_the_host() {
    for config in kinds(16 << 20) {
        let ram = allocate(&config).unwrap();
        fill(&ram);
        assert_eq!(taken(&ram), ram.page_count(), "{config:?}");
        // Seven whole huge pages, then one page of the first.
        ram.zero_pages(HUGE_PAGES, ram.page_count() - HUGE_PAGES).unwrap();
        let left = match config.huge_pages {
            HugePages::Pool | HugePages::PoolIfFree => ram.page_count(),
            HugePages::Transparent | HugePages::Off => HUGE_PAGES,
        };
        assert_eq!(taken(&ram), left, "{config:?}");
        let huge_before = huge_mapped(&ram);
        ram.zero_pages(7, 1).unwrap();
        let small = huge_before == 0;
        assert_eq!(taken(&ram), left - u64::from(small), "{config:?}, {huge_before} pages in huge ones");
        assert_eq!(huge_mapped(&ram), huge_before, "{config:?}: a huge page was split");
    }
}

#[test]
fn without_page_tables_zeroing_clears_all_the_same() {
    let ram = allocate(&MemoryConfig::new(8 << 20, Backing::PrivateAnonymous)).unwrap();
    fill(&ram);
    let span = ram.spans(3, 3 * HUGE_PAGES).unwrap().next().unwrap();
    release(span, None).unwrap();
    ram.for_each_page(0, ram.page_count(), |page, bytes| {
        let expected = if (3..3 + 3 * HUGE_PAGES).contains(&page) { 0 } else { 0xab };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
    })
    .unwrap();
    // Two whole huge pages are given back, parts of two others stay.
    assert_eq!(taken(&ram), ram.page_count() - 2 * HUGE_PAGES);
}

#[test]
fn gaps_are_what_is_not_held() {
    let ram = allocate(&MemoryConfig::new(8 << 20, Backing::PrivateAnonymous)).unwrap();
    let span = ram.spans(0, 10).unwrap().next().unwrap();
    let start = span.pointer.addr();
    let held = |from: usize, to: usize| Held {
        start: start + from * PAGE_BYTES,
        end: start + to * PAGE_BYTES,
        huge: None,
    };
    let found = |held: &[Held]| -> Vec<(usize, usize)> {
        gaps(span, held)
            .map(|gap| ((gap.pointer.addr() - start) / PAGE_BYTES, gap.bytes / PAGE_BYTES))
            .collect()
    };
    assert_eq!(found(&[]), [(0, 10)]);
    assert_eq!(found(&[held(0, 10)]), []);
    assert_eq!(found(&[held(2, 3), held(3, 7)]), [(0, 2), (7, 3)]);
    assert_eq!(found(&[held(0, 1), held(9, 10)]), [(1, 8)]);
}
