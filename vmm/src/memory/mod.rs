//! Guest memory: where it lies in the guest's physical address space and what holds it on the host.
//!
//! ```text
//! guest-physical                              page index
//! 0 .................. min(size, 3 GiB)       0 ..
//! 3 GiB .............. 4 GiB                  -   devices, APICs, no memory
//! 4 GiB .............. 4 GiB + rest           continues after the first region
//! ```
//!
//! Callers name memory by page index: the regions end to end, without the hole. [`GuestRam`] reads and
//! writes it, [`dirty_log`] says what changed. Ballooning and memory that starts empty (post-copy) are
//! not here yet.

mod available;
pub(crate) mod dirty_log;
mod handed_over;
mod mapping;
mod pagemap;
mod ram;
#[cfg(test)]
mod test_memory;
mod touched;
mod transfer;
mod written;
mod zero;

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub use available::check_available;
pub use dirty_log::DirtyLogError;
pub use handed_over::HandOverError;
pub(crate) use handed_over::adopt;
pub use ram::{GuestRam, HUGE_PAGE_BYTES, RamError, RamRegion};

use available::{Pool, huge_page_pool};
use mapping::Mapping;
use written::WrittenPages;

use crate::config::{Backing, HugePages, MemoryConfig};

/// Bytes of a page, the unit of the dirty log and of page indices.
pub const PAGE_BYTES: usize = 4096;

/// The least memory of a machine: the first MiB belongs to boot structures, a kernel starts behind it.
pub const MEMORY_BYTES_MIN: u64 = 2 << 20;

/// The most memory of a machine. It bounds what a peer's description can ask of a host.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;

/// Where the hole for devices begins, and the first region of memory ends at the latest.
pub(crate) const LOW_MEMORY_END: u64 = 3 << 30;

/// Where memory goes on behind the hole.
pub(crate) const HIGH_MEMORY_START: u64 = 4 << 30;

// The second region starts at a huge page, and so at a word boundary of every dirty bitmap.
const _: () = assert!(LOW_MEMORY_END.is_multiple_of(HUGE_PAGE_BYTES as u64));

/// Guest memory whose writes by devices are tracked by page.
pub(crate) type TrackedMemory = GuestMemoryMmap<WrittenPages>;

/// Why guest memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host can't give that much now.
    #[error(
        "not enough memory for the guest: it needs {wanted} bytes and the host has {available} available; \
         give the guest less or free some"
    )]
    NotEnoughMemory {
        /// Bytes that the guest needs.
        wanted: u64,
        /// Bytes that the host reports as available.
        available: u64,
    },
    /// The host's pool of huge pages has too few.
    #[error(
        "not enough huge pages for the guest: it needs {wanted} of 2 MiB and the host's pool has {free} free of {total}; \
         set aside more with 'echo {enough} > /proc/sys/vm/nr_hugepages', or leave out hugepages=2M"
    )]
    NotEnoughHugePages {
        /// Pages that the guest needs.
        wanted: u64,
        /// Pages that nobody has or has reserved, on the node that was asked for.
        free: u64,
        /// Pages in the pool.
        total: u64,
        /// How large the pool would have to be.
        enough: u64,
    },
    /// The host has no such NUMA node.
    #[error("this host has no memory on NUMA node {node}; its nodes with memory are {nodes}")]
    NoSuchNode {
        /// The node that was asked for.
        node: u32,
        /// What the host has, as the kernel writes it.
        nodes: String,
    },
    /// A system call failed.
    #[error("can't {action} for {bytes} bytes of guest memory")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The size in question.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The memory could not be mapped.
    #[error("can't map {bytes} bytes of guest memory")]
    Map {
        /// The size in question.
        bytes: u64,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Memory that another process hands over can't be taken.
    #[error(transparent)]
    HandedOver(#[from] HandOverError),
}

/// The regions that `size_bytes` of memory occupies, in guest-physical order.
pub(crate) fn regions_of(size_bytes: u64) -> Vec<RamRegion> {
    let low = size_bytes.min(LOW_MEMORY_END);
    let mut regions = vec![RamRegion { gpa: 0, bytes: low }];
    if size_bytes > low {
        regions.push(RamRegion { gpa: HIGH_MEMORY_START, bytes: size_bytes - low });
    }
    regions
}

/// Maps memory for a guest; nothing of it is touched. Where the pool of huge pages is only preferred and has too few,
/// there will be transparent ones.
///
/// # Errors
/// [`MemoryError::NotEnoughMemory`] or [`MemoryError::NotEnoughHugePages`] where the host has less available than the
/// guest may use, [`MemoryError::NoSuchNode`].
pub(crate) fn allocate(config: &MemoryConfig) -> Result<GuestRam, MemoryError> {
    let mut config = *config;
    config.huge_pages = match config.huge_pages {
        pages @ (HugePages::Transparent | HugePages::Off) => {
            check_available(config.size_bytes)?;
            pages
        }
        HugePages::Pool => {
            check_pool(&config)?;
            HugePages::Pool
        }
        HugePages::PoolIfFree => {
            let pool = MemoryConfig { huge_pages: HugePages::Pool, ..config };
            match check_pool(&pool).and_then(|()| map_new(&pool)) {
                Ok(ram) => return Ok(ram),
                Err(error) => tracing::warn!(%error, "the guest gets transparent huge pages instead"),
            }
            check_available(config.size_bytes)?;
            HugePages::Transparent
        }
    };
    map_new(&config)
}

/// Maps memory that is this process's own until it hands it over.
fn map_new(config: &MemoryConfig) -> Result<GuestRam, MemoryError> {
    let file = match config.backing {
        Backing::PrivateAnonymous => None,
        Backing::SharedMemfd => Some(make_memfd(config)?),
    };
    map(config, file)
}

/// Maps anonymous memory, or all regions end to end from `file`.
fn map(config: &MemoryConfig, file: Option<File>) -> Result<GuestRam, MemoryError> {
    let regions = regions_of(config.size_bytes);
    let (mut mappings, mut mapped) = (Vec::new(), Vec::new());
    let mut file_offset = 0;
    for region in &regions {
        let map_error = |source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map {
            bytes: region.bytes,
            source,
        };
        let bytes = usize::try_from(region.bytes).map_err(|error| map_error(error.into()))?;
        let backing = match &file {
            None => None,
            Some(file) => {
                let file = file.try_clone().map_err(|error| map_error(error.into()))?;
                Some(FileOffset::new(file, file_offset))
            }
        };
        let mapping = Mapping::new(bytes, file.as_ref().map(|file| (file, file_offset)), config)?;
        let base = GuestAddress(region.gpa);
        let region_of_memory = GuestRegionMmap::new(mapping.region(backing, config)?, base);
        mapped.push(region_of_memory.ok_or_else(|| map_error("it overflows".into()))?);
        mappings.push(mapping);
        file_offset += region.bytes;
    }
    let memory = TrackedMemory::from_regions(mapped)
        .map_err(|error| MemoryError::Map { bytes: config.size_bytes, source: error.into() })?;
    Ok(GuestRam::new(memory, mappings, regions, config))
}

/// Whether the pool has a huge page for every 2 MiB of the guest.
fn check_pool(config: &MemoryConfig) -> Result<(), MemoryError> {
    let wanted = config.size_bytes.div_ceil(HUGE_PAGE_BYTES as u64);
    let Pool { free, total } = huge_page_pool(config.node);
    // A guest of no whole number of huge pages can't have them at all; who insists is told before this.
    if free >= wanted && config.size_bytes.is_multiple_of(HUGE_PAGE_BYTES as u64) {
        return Ok(());
    }
    Err(MemoryError::NotEnoughHugePages { wanted, free, total, enough: total + wanted.saturating_sub(free) })
}

fn make_memfd(config: &MemoryConfig) -> Result<File, MemoryError> {
    let bytes = config.size_bytes;
    let io_error = |action| move |errno: nix::Error| MemoryError::Io { action, bytes, source: errno.into() };
    let pages = match config.huge_pages {
        HugePages::Pool => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        HugePages::Transparent | HugePages::Off | HugePages::PoolIfFree => MFdFlags::empty(),
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | pages;
    let file = memfd_create(c"ferry-guest-memory", flags).map_err(io_error("make a memfd"))?;
    let length = i64::try_from(bytes).expect("MEMORY_BYTES_MAX is far below 2^63");
    ftruncate(&file, length).map_err(io_error("size a memfd"))?;
    // Whoever it is handed to must be able to rely on its length. Before Linux 4.16 memfds of the pool have no seals: the
    // machine runs all the same, and whoever it is handed to refuses it.
    match fcntl(&file, FcntlArg::F_ADD_SEALS(handed_over::SEALS)) {
        Err(Errno::EINVAL) if config.huge_pages == HugePages::Pool => {}
        sealed => _ = sealed.map_err(io_error("seal a memfd"))?,
    }
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_device_hole() {
        assert_eq!(regions_of(1 << 30), [RamRegion { gpa: 0, bytes: 1 << 30 }]);
        assert_eq!(regions_of(3 << 30), [RamRegion { gpa: 0, bytes: 3 << 30 }]);
        assert_eq!(
            regions_of((3 << 30) + 4096),
            [RamRegion { gpa: 0, bytes: 3 << 30 }, RamRegion { gpa: 4 << 30, bytes: 4096 }]
        );
    }

    #[test]
    fn more_memory_than_any_host_has_is_refused_before_it_is_mapped() {
        let config = MemoryConfig::new(MEMORY_BYTES_MAX, Backing::PrivateAnonymous);
        let error = allocate(&config).unwrap_err();
        assert!(matches!(error, MemoryError::NotEnoughMemory { wanted: MEMORY_BYTES_MAX, .. }), "{error}");
    }

    #[test]
    fn a_pool_with_too_few_huge_pages_is_refused_with_what_to_do_or_done_without() {
        let size_bytes = 1 << 40;
        let mut config = MemoryConfig::new(size_bytes, Backing::PrivateAnonymous);
        config.huge_pages = HugePages::Pool;
        let text = allocate(&config).unwrap_err().to_string();
        let Pool { free, total } = huge_page_pool(None);
        let enough = total + (size_bytes >> 21) - free;
        for part in
            ["needs 524288", &format!("{free} free"), &format!("echo {enough} > /proc/sys/vm/nr_hugepages")]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        // More than any test leaves free, and little enough for transparent ones.
        config.size_bytes = (free + 64) << 21;
        config.huge_pages = HugePages::PoolIfFree;
        let ram = allocate(&config).unwrap();
        assert_eq!(ram.huge_pages(), HugePages::Transparent);
        assert_eq!(ram.kind(), "private, transparent huge pages");
    }

    #[test]
    fn what_was_asked_for_is_what_there_is() {
        for config in test_memory::kinds(16 << 20) {
            let ram = allocate(&config).unwrap();
            assert_eq!(ram.huge_pages(), config.huge_pages);
            ram.prefault(0, ram.page_count()).unwrap();
            let address = ram.host_regions().next().unwrap().1;
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let ours = smaps.split_once(&format!("{address:x}-")).expect("it is mapped").1;
            let kib = |name: &str| -> u64 {
                let line = ours.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            };
            let (thp, page) = (kib("AnonHugePages:"), kib("KernelPageSize:"));
            let expected = match (config.huge_pages, config.backing) {
                (HugePages::Transparent, Backing::PrivateAnonymous) => (16 << 10, 4),
                (HugePages::Transparent, Backing::SharedMemfd) | (HugePages::Off, _) => (0, 4),
                (HugePages::Pool | HugePages::PoolIfFree, _) => (0, 2048),
            };
            assert_eq!((thp, page), expected, "{config:?}");
        }
    }
}
