//! For tests: memory of every kind that this host can give.

use super::{GuestRam, available};
use crate::config::{Backing, HugePages, MemoryConfig};

/// One configuration of `size_bytes` for each combination of backing and pages. Those of the host's pool are left out,
/// and said to be, where it has too few for them.
pub(super) fn kinds(size_bytes: u64) -> Vec<MemoryConfig> {
    let mut kinds = Vec::new();
    for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
        for huge_pages in [HugePages::Transparent, HugePages::Off] {
            kinds.push(MemoryConfig { huge_pages, ..MemoryConfig::new(size_bytes, backing) });
        }
        if pool_has(size_bytes) {
            kinds
                .push(MemoryConfig { huge_pages: HugePages::Pool, ..MemoryConfig::new(size_bytes, backing) });
        }
    }
    kinds
}

/// Whether the pool has room for a few guests of this size. A pool is the administrator's to make, so its absence fails
/// no run.
pub(super) fn pool_has(size_bytes: u64) -> bool {
    let free = available::huge_page_pool(None).free;
    // Several tests run at once.
    let enough = free >= 4 * size_bytes.div_ceil(2 << 20);
    if !enough {
        println!("SKIPPED (huge pages of the pool: {free} free; echo 256 > /proc/sys/vm/nr_hugepages)");
    }
    enough
}

/// How many pages may hold something.
pub(super) fn touched_pages(ram: &GuestRam, first: u64, count: u64) -> u64 {
    let mut pages = 0;
    ram.touched(first, count, |_, count| pages += count).unwrap();
    pages
}
