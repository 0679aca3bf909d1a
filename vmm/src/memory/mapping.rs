//! Mapping memory for a guest: its alignment, the size of its pages, and its NUMA node.
//!
//! Each region starts at a host address that is a multiple of 2 MiB, as its guest-physical address is: only then can
//! the host's and KVM's page tables both use huge pages. Recent kernels align large mappings by themselves, older ones do
//! not, so it is done here. Nothing is touched, so that all pages come from the node that is set here.

// UNSAFETY: memory is mapped, bound and unmapped by its address.
#![expect(unsafe_code, reason = "mmap, madvise, mbind and munmap take raw addresses")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use vm_memory::bitmap::NewBitmap;
use vm_memory::{FileOffset, MmapRegion, mmap::MmapRegionBuilder};

use super::MemoryError;
use super::available::numbers_in;
use super::ram::HUGE_PAGE_BYTES;
use super::written::WrittenPages;
use crate::config::{Backing, HugePages, MemoryConfig};

/// From the kernel's include/uapi/linux/mempolicy.h.
const MPOL_BIND: libc::c_long = 2;

/// Bits of a word of a node mask.
const WORD_BITS: u32 = u64::BITS;

/// Far more nodes than any host has; it bounds the node mask.
const NODES_MAX: u32 = 1024;

/// A mapping of ours, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: it is only a range of addresses, which no thread owns; access to the memory is its users' business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us, belongs to this value alone, and its users keep it alive.
        unsafe { libc::munmap(self.pointer.cast(), self.bytes) };
    }
}

impl Mapping {
    /// Maps `bytes` of the file from `offset` on, or of anonymous memory, as `config` wants it.
    pub(super) fn new(
        bytes: usize,
        file: Option<(&File, u64)>,
        config: &MemoryConfig,
    ) -> Result<Self, MemoryError> {
        let reserved = reserve_aligned(bytes).map_err(|source| map_error(bytes, source))?;
        let (descriptor, offset) = match file {
            Some((file, offset)) => {
                (file.as_raw_fd(), i64::try_from(offset).expect("below MEMORY_BYTES_MAX"))
            }
            None => (-1, 0),
        };
        // SAFETY: the range is `reserved`, which nobody uses yet and which this replaces.
        let done = unsafe {
            libc::mmap(
                reserved.pointer.cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                mmap_flags(config) | libc::MAP_FIXED,
                descriptor,
                offset,
            )
        };
        if done == libc::MAP_FAILED {
            return Err(map_error(bytes, io::Error::last_os_error()));
        }
        reserved.advise(config)?;
        if let Some(node) = config.node {
            reserved.bind(node)?;
        }
        Ok(reserved)
    }

    /// The memory for `vm-memory`, which does not own it: this value must live longer.
    pub(super) fn region(
        &self,
        file: Option<FileOffset>,
        config: &MemoryConfig,
    ) -> Result<MmapRegion<WrittenPages>, MemoryError> {
        let mut builder = MmapRegionBuilder::new_with_bitmap(self.bytes, WrittenPages::with_len(self.bytes))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(mmap_flags(config));
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        // SAFETY: the pointer is a live mapping of `bytes` bytes with this protection; GuestRam drops the regions before
        // their mappings.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.pointer) };
        builder.build().map_err(|error| MemoryError::Map { bytes: self.bytes as u64, source: error.into() })
    }

    fn advise(&self, config: &MemoryConfig) -> Result<(), MemoryError> {
        let advice = match (config.huge_pages, config.backing) {
            // What else holds: pages of the pool are huge anyway, and for a memfd the host's own policy stands.
            (HugePages::Pool | HugePages::PoolIfFree, _) | (HugePages::Transparent, Backing::SharedMemfd) => {
                return Ok(());
            }
            (HugePages::Transparent, Backing::PrivateAnonymous) => libc::MADV_HUGEPAGE,
            (HugePages::Off, _) => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: the range is a live mapping of ours; the advice changes no byte.
        let done = unsafe { libc::madvise(self.pointer.cast(), self.bytes, advice) };
        let error = io::Error::last_os_error();
        // A kernel without transparent huge pages refuses both: the guest runs slower, or has what it asked for.
        if done == 0 || error.raw_os_error() == Some(libc::EINVAL) {
            return Ok(());
        }
        Err(MemoryError::Io { action: "choose the page size", bytes: self.bytes as u64, source: error })
    }

    fn bind(&self, node: u32) -> Result<(), MemoryError> {
        check_node(node)?;
        let mut mask = vec![0_u64; (node / WORD_BITS + 1) as usize];
        mask[(node / WORD_BITS) as usize] = 1 << (node % WORD_BITS);
        // The kernel reads one bit less than it is told.
        let bits = mask.len() as u64 * u64::from(WORD_BITS) + 1;
        // SAFETY: the range is a live mapping of ours, and the kernel reads `bits - 1` bits of the mask.
        let done = unsafe {
            libc::syscall(libc::SYS_mbind, self.pointer, self.bytes, MPOL_BIND, mask.as_ptr(), bits, 0)
        };
        if done == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        Err(MemoryError::Io { action: "bind to the NUMA node", bytes: self.bytes as u64, source })
    }
}

fn map_error(bytes: usize, source: io::Error) -> MemoryError {
    MemoryError::Map { bytes: bytes as u64, source: source.into() }
}

fn mmap_flags(config: &MemoryConfig) -> libc::c_int {
    let kind = match config.backing {
        Backing::PrivateAnonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        Backing::SharedMemfd => libc::MAP_SHARED,
    };
    match (config.huge_pages, config.backing) {
        // Without MAP_NORESERVE: a page that the pool lacks later would kill the guest.
        (HugePages::Pool, Backing::PrivateAnonymous) => kind | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        (HugePages::Pool, Backing::SharedMemfd) => kind,
        (HugePages::Transparent | HugePages::Off | HugePages::PoolIfFree, _) => kind | libc::MAP_NORESERVE,
    }
}

/// Takes `bytes` of addresses, the first of them a multiple of [`HUGE_PAGE_BYTES`], without any memory.
fn reserve_aligned(bytes: usize) -> io::Result<Mapping> {
    let room = bytes.next_multiple_of(HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let pointer = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if pointer == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let pointer = pointer.cast::<u8>();
    let before = pointer.addr().next_multiple_of(HUGE_PAGE_BYTES) - pointer.addr();
    // What lies before and behind is unmapped by being dropped.
    let used = Mapping { pointer: pointer.wrapping_add(before), bytes };
    let behind = used.pointer.wrapping_add(bytes.next_multiple_of(super::PAGE_BYTES));
    for (pointer, bytes) in
        [(pointer, before), (behind, room - before - (behind.addr() - used.pointer.addr()))]
    {
        if bytes > 0 {
            drop(Mapping { pointer, bytes });
        }
    }
    Ok(used)
}

/// Checks that the host has memory on this node, where it says so.
fn check_node(node: u32) -> Result<(), MemoryError> {
    let nodes = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let known = numbers_in(nodes.trim());
    if node < NODES_MAX && (known.is_empty() || known.contains(&node)) {
        return Ok(());
    }
    Err(MemoryError::NoSuchNode { node, nodes: nodes.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::super::test_memory::kinds;
    use super::super::{LOW_MEMORY_END, PAGE_BYTES, allocate};
    use super::*;

    #[test]
    fn regions_start_at_huge_page_boundaries_of_the_host() {
        for config in kinds(64 << 20) {
            for size_bytes in [2 << 20, 64 << 20, LOW_MEMORY_END + (2 << 20)] {
                let mut config = MemoryConfig { size_bytes, ..config };
                if size_bytes > LOW_MEMORY_END && config.huge_pages == HugePages::Pool {
                    config.huge_pages = HugePages::PoolIfFree;
                }
                let ram = allocate(&config).unwrap();
                for (region, address) in ram.host_regions() {
                    assert_eq!(address % HUGE_PAGE_BYTES as u64, 0, "{config:?}: {region:?} at {address:#x}");
                }
                let last = ram.page_count() - 1;
                ram.write_page(last, &[1; PAGE_BYTES]).unwrap();
            }
        }
        let odd = allocate(&MemoryConfig::new((2 << 20) + 4096, Backing::PrivateAnonymous)).unwrap();
        odd.write_page(512, &[1; PAGE_BYTES]).unwrap();
    }

    #[test]
    fn a_node_that_the_host_does_not_have_is_refused_by_number() {
        let mut config = MemoryConfig::new(1 << 21, Backing::PrivateAnonymous);
        for node in [77, NODES_MAX, u32::MAX] {
            config.node = Some(node);
            let error = Mapping::new(1 << 21, None, &config).unwrap_err();
            assert!(error.to_string().contains(&format!("node {node}")), "{error}");
        }
    }

    #[test]
    fn memory_is_bound_to_its_node() {
        for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
            let mut config = MemoryConfig::new(8 << 20, backing);
            config.node = Some(0);
            let ram = allocate(&config).unwrap();
            let span = ram.spans(0, ram.page_count()).unwrap().next().unwrap();
            let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
            let line = maps.lines().find(|line| line.starts_with(&format!("{:x} ", span.pointer.addr())));
            assert!(line.is_some_and(|line| line.contains(" bind:0")), "{line:?}");
        }
    }
}
