//! Whether the host can hold a guest's memory.
//!
//! Guest memory is mapped without reserving it, so the kernel would hand it out until a process gets
//! killed. This check refuses first. It can't see what others will take later. Huge pages of the host's pool are
//! reserved when they are mapped; what is said of them here makes for a better message than the kernel's.

use std::fs;
use std::path::Path;

use super::MemoryError;

/// Checks that the host has `wanted` bytes of memory available now (MemAvailable in /proc/meminfo: free
/// memory and what the kernel can reclaim without swapping). A target calls it before the first page
/// arrives, [`Machine::build`](crate::Machine::build) calls it itself.
///
/// # Errors
/// [`MemoryError::NotEnoughMemory`] with both figures; [`MemoryError::Io`] if /proc can't be read.
pub fn check_available(wanted: u64) -> Result<(), MemoryError> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|source| MemoryError::Io {
        action: "read /proc/meminfo",
        bytes: wanted,
        source,
    })?;
    // A kernel too old for the field gives nothing to judge by.
    match available_bytes(&text) {
        Some(available) if available < wanted => Err(MemoryError::NotEnoughMemory { wanted, available }),
        Some(_) | None => Ok(()),
    }
}

/// Where the kernel tells of its pool of 2 MiB pages.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The host's pool of huge pages of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pool {
    /// Pages that nobody has and nobody has reserved.
    pub(super) free: u64,
    /// All of them.
    pub(super) total: u64,
}

/// What the pool has now; on one NUMA node if that is given. A host without a pool has none free.
pub(super) fn huge_page_pool(node: Option<u32>) -> Pool {
    let read = |folder: &Path, name: &str| -> Option<u64> {
        fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
    };
    let host = Path::new(POOL);
    let unreserved = |free: u64| free.saturating_sub(read(host, "resv_hugepages").unwrap_or(0));
    let free = unreserved(read(host, "free_hugepages").unwrap_or(0));
    let total = read(host, "nr_hugepages").unwrap_or(0);
    let Some(node) = node else { return Pool { free, total } };
    let folder = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB");
    let folder = Path::new(&folder);
    // Reservations are not counted by node, so all of them may be meant for this one.
    let free_here = unreserved(read(folder, "free_hugepages").unwrap_or(0));
    Pool { free: free.min(free_here), total: read(folder, "nr_hugepages").unwrap_or(0) }
}

/// The numbers of a kernel's list such as `0-3,8`.
pub(super) fn numbers_in(list: &str) -> Vec<u32> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<u32>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_figure() {
        let text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   22345678 kB\nBuffers: 5 kB\n";
        assert_eq!(available_bytes(text), Some(22_345_678 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn reads_the_kernels_lists() {
        assert_eq!(numbers_in("0"), [0]);
        assert_eq!(numbers_in("0-2,8"), [0, 1, 2, 8]);
        assert!(numbers_in("").is_empty());
    }
}
