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
mod ram;
mod transfer;

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub use available::check_available;
pub use dirty_log::DirtyLogError;
pub use handed_over::HandOverError;
pub(crate) use handed_over::adopt;
pub use ram::{GuestRam, RamError, RamRegion};

use crate::config::{Backing, MemoryConfig};

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

// The second region starts at a word boundary of every dirty bitmap.
const _: () = assert!((LOW_MEMORY_END / PAGE_BYTES as u64).is_multiple_of(64));

/// Guest memory whose writes by devices are tracked by page.
pub(crate) type TrackedMemory = GuestMemoryMmap<AtomicBitmap>;

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

/// Maps memory for a guest; nothing of it is touched.
///
/// # Errors
/// [`MemoryError::NotEnoughMemory`] where the host has less available than the guest may use.
pub(crate) fn allocate(config: &MemoryConfig) -> Result<GuestRam, MemoryError> {
    check_available(config.size_bytes)?;
    let file = match config.backing {
        Backing::PrivateAnonymous => None,
        Backing::SharedMemfd => Some(make_memfd(config.size_bytes)?),
    };
    map(config, file)
}

/// Maps anonymous memory, or all regions end to end from `file`.
fn map(config: &MemoryConfig, file: Option<File>) -> Result<GuestRam, MemoryError> {
    let regions = regions_of(config.size_bytes);
    let mut mapped = Vec::with_capacity(regions.len());
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
        let kind = if backing.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let mapping = MmapRegion::<AtomicBitmap>::build(
            backing,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            kind | libc::MAP_NORESERVE,
        )
        .map_err(|error| map_error(error.into()))?;
        let base = GuestAddress(region.gpa);
        mapped.push(GuestRegionMmap::new(mapping, base).ok_or_else(|| map_error("it overflows".into()))?);
        file_offset += region.bytes;
    }
    let memory = TrackedMemory::from_regions(mapped)
        .map_err(|error| MemoryError::Map { bytes: config.size_bytes, source: error.into() })?;
    let ram = GuestRam::new(memory, regions, config.backing);
    ram.advise_huge_pages();
    Ok(ram)
}

fn make_memfd(bytes: u64) -> Result<File, MemoryError> {
    let io_error = |action| move |errno: nix::Error| MemoryError::Io { action, bytes, source: errno.into() };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create(c"ferry-guest-memory", flags).map_err(io_error("make a memfd"))?;
    let length = i64::try_from(bytes).expect("MEMORY_BYTES_MAX is far below 2^63");
    ftruncate(&file, length).map_err(io_error("size a memfd"))?;
    // Whoever it is handed to must be able to rely on its length.
    fcntl(&file, FcntlArg::F_ADD_SEALS(handed_over::SEALS)).map_err(io_error("seal a memfd"))?;
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
        let config = MemoryConfig { size_bytes: MEMORY_BYTES_MAX, backing: Backing::PrivateAnonymous };
        let error = allocate(&config).unwrap_err();
        assert!(matches!(error, MemoryError::NotEnoughMemory { wanted: MEMORY_BYTES_MAX, .. }), "{error}");
    }
}
