//! Guest memory by page index: reading and writing pages. Zeroing them is in [`super::zero`], asking which were touched
//! in [`super::touched`].
//!
//! The guest may run meanwhile. Reading a page that it writes gives some mix of old and new bytes; the
//! dirty log then has the page again, so a migration sends it again. Writing pages is for a machine
//! that does not run: a target's, before it resumes.
//!
//! Writes made here do not mark pages dirty: they are the receiver's. Devices write through
//! [`GuestRam::tracked`], which does.

// UNSAFETY: guest memory is a foreign mapping that a guest changes; it is reached by raw pointers.
#![expect(unsafe_code, reason = "guest memory is reached by raw pointers")]

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::mapping::Mapping;
use super::pagemap::Pagemap;
use super::{PAGE_BYTES, TrackedMemory};
use crate::config::{Backing, HugePages, MemoryConfig};

/// [`PAGE_BYTES`] as a length.
pub(super) const PAGE: u64 = PAGE_BYTES as u64;

/// Bytes of a huge page.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A stretch of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length, a multiple of the page size.
    pub bytes: u64,
}

/// Why guest memory can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The pages are not in this machine's memory.
    #[error("pages {first} and {count} on are outside the guest's memory of {pages} pages")]
    OutOfRange {
        /// The first page asked for.
        first: u64,
        /// How many.
        count: u64,
        /// How many there are.
        pages: u64,
    },
    /// Giving memory back to the host failed.
    #[error("can't zero {bytes} bytes of guest memory")]
    Zero {
        /// How many bytes.
        bytes: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl From<RamError> for io::Error {
    fn from(error: RamError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

/// A machine's memory. Clones share it; it stays mapped until the last one is dropped.
#[derive(Clone, Debug)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: TrackedMemory,
    /// What `memory` lies in; it is dropped after it.
    _mappings: Vec<Mapping>,
    regions: Vec<RamRegion>,
    pages: u64,
    backing: Backing,
    huge_pages: HugePages,
    node: Option<u32>,
    pagemap: OnceLock<Pagemap>,
}

/// Pages that are contiguous on the host, too. The pointer is valid for `bytes` as long as the
/// [`GuestRam`] that gave it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) pointer: *mut u8,
    pub(super) bytes: usize,
    /// Where it starts in the file that backs it, if one does.
    pub(super) file_offset: u64,
}

impl GuestRam {
    /// `config` says what the memory is, not what was wished for.
    pub(super) fn new(
        memory: TrackedMemory,
        mappings: Vec<Mapping>,
        regions: Vec<RamRegion>,
        config: &MemoryConfig,
    ) -> Self {
        let MemoryConfig { size_bytes: _, backing, huge_pages, node } = *config;
        let pages = regions.iter().map(|region| region.bytes / PAGE).sum();
        Self {
            inner: Arc::new(Inner {
                memory,
                _mappings: mappings,
                regions,
                pages,
                backing,
                huge_pages,
                node,
                pagemap: OnceLock::new(),
            }),
        }
    }

    /// How many pages there are; indices go from 0 to one less.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.inner.pages
    }

    /// The regions that page indices run through, in order.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }

    /// The page that holds guest-physical address `gpa`.
    #[must_use]
    pub fn page_of_gpa(&self, gpa: u64) -> Option<u64> {
        let mut first = 0;
        for region in &self.inner.regions {
            if let Some(offset) = gpa.checked_sub(region.gpa)
                && offset < region.bytes
            {
                return Some(first + offset / PAGE);
            }
            first += region.bytes / PAGE;
        }
        None
    }

    /// Calls `f` with the index and the bytes of each of `count` pages from `first` on, without copying.
    ///
    /// A page may change while `f` looks at it, if the guest runs; see the module's description.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`] before the first call.
    pub fn for_each_page(
        &self,
        first: u64,
        count: u64,
        mut f: impl FnMut(u64, &[u8; PAGE_BYTES]),
    ) -> Result<(), RamError> {
        let mut page = first;
        for span in self.spans(first, count)? {
            for offset in (0..span.bytes).step_by(PAGE_BYTES) {
                // SAFETY: `offset` is below the span's length, so the result lies in the same mapping.
                let pointer = unsafe { span.pointer.add(offset) };
                prefetch(span.pointer.wrapping_add(offset + PAGE_BYTES), span.bytes - offset > PAGE_BYTES);
                // SAFETY: the page is mapped for as long as `self`, and any bytes are a valid array. The
                // guest (another address space) may change them meanwhile; callers only hash, compare,
                // encode or copy them, and the dirty log makes them come back for what they missed.
                let bytes = unsafe { &*pointer.cast::<[u8; PAGE_BYTES]>() };
                f(page, bytes);
                page += 1;
            }
        }
        Ok(())
    }

    /// Copies a page out.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`].
    pub fn read_page(&self, page: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), RamError> {
        for span in self.spans(page, 1)? {
            // SAFETY: one page has one span of a page's length, mapped as long as `self`; `into` is a
            // Rust object elsewhere, so the two don't overlap.
            unsafe { std::ptr::copy_nonoverlapping(span.pointer, into.as_mut_ptr(), PAGE_BYTES) };
        }
        Ok(())
    }

    /// Overwrites a page. The machine must not run.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`].
    pub fn write_page(&self, page: u64, bytes: &[u8; PAGE_BYTES]) -> Result<(), RamError> {
        for span in self.spans(page, 1)? {
            // SAFETY: as in `read_page`, the other way; nobody else holds a reference, because
            // `for_each_page` lends them only during a call and a target has one writer a page.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.pointer, PAGE_BYTES) };
        }
        Ok(())
    }

    /// Overwrites part of a page, from its byte `at` on. The machine must not run.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`].
    ///
    /// # Panics
    /// If the page ends before `bytes` do.
    pub fn patch_page(&self, page: u64, at: usize, bytes: &[u8]) -> Result<(), RamError> {
        assert!(
            at <= PAGE_BYTES && bytes.len() <= PAGE_BYTES - at,
            "{} bytes at {at} of a page",
            bytes.len()
        );
        for span in self.spans(page, 1)? {
            let to = span.pointer.wrapping_add(at);
            // SAFETY: as in `write_page`; the assertion above keeps the bytes inside the page.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
        Ok(())
    }

    /// What holds the memory here, in words: `private, transparent huge pages`.
    #[must_use]
    pub fn kind(&self) -> String {
        let backing = match self.inner.backing {
            Backing::PrivateAnonymous => "private",
            Backing::SharedMemfd => "shared (memfd)",
        };
        let pages = match (self.inner.huge_pages, self.inner.backing) {
            (HugePages::Transparent, Backing::PrivateAnonymous) => "transparent huge pages",
            (HugePages::Transparent, Backing::SharedMemfd) => "pages by the host's policy",
            (HugePages::Off, _) => "4 KiB pages",
            (HugePages::Pool | HugePages::PoolIfFree, _) => "2 MiB pages of the host's pool",
        };
        let node = self.inner.node.map_or_else(String::new, |node| format!(", NUMA node {node}"));
        format!("{backing}, {pages}{node}")
    }

    /// The size of its pages on this host, never [`HugePages::PoolIfFree`].
    #[must_use]
    pub fn huge_pages(&self) -> HugePages {
        self.inner.huge_pages
    }

    /// What holds the bytes on the host.
    pub(super) fn backing(&self) -> Backing {
        self.inner.backing
    }

    /// The file that holds all regions end to end, if one does.
    pub(super) fn file(&self) -> Option<&File> {
        self.inner.memory.iter().find_map(|region| region.file_offset()).map(FileOffset::file)
    }

    /// Opens what tells which pages were ever touched, so that threads that may not open files can ask. Where that fails,
    /// whoever asks is told.
    pub fn open_page_tables(&self) {
        let _ = self.pagemap();
    }

    /// This process's page tables; opened when first asked for.
    pub(super) fn pagemap(&self) -> io::Result<&Pagemap> {
        if self.inner.pagemap.get().is_none() {
            // Two threads may both open it; one of the two files is closed again.
            let _ = self.inner.pagemap.set(Pagemap::open()?);
        }
        Ok(self.inner.pagemap.get().expect("it was set"))
    }

    /// The memory as devices see it: writes through it mark pages dirty.
    pub(crate) fn tracked(&self) -> &TrackedMemory {
        &self.inner.memory
    }

    /// Address of each region on the host, beside it.
    pub(crate) fn host_regions(&self) -> impl Iterator<Item = (RamRegion, u64)> {
        let addresses = self.inner.memory.iter().map(|region| region.as_ptr().expose_provenance() as u64);
        self.inner.regions.iter().copied().zip(addresses)
    }

    /// The host ranges of `count` pages from `first` on, in order: at most one a region.
    pub(super) fn spans(&self, first: u64, count: u64) -> Result<impl Iterator<Item = Span>, RamError> {
        let pages = self.inner.pages;
        let end = first.checked_add(count).filter(|end| *end <= pages);
        let end = end.ok_or(RamError::OutOfRange { first, count, pages })?;
        let mut region_first = 0;
        Ok(self.inner.memory.iter().filter_map(move |region| {
            let region_pages = region.len() / PAGE;
            let from = first.max(region_first);
            let to = end.min(region_first + region_pages);
            let offset = from.saturating_sub(region_first) * PAGE;
            let file_offset = region_first * PAGE + offset;
            region_first += region_pages;
            if from >= to {
                return None;
            }
            let bytes = usize::try_from((to - from) * PAGE).expect("a mapped region fits the address space");
            let slice = region.get_slice(MemoryRegionAddress(offset), bytes);
            let pointer = slice.expect("the range was checked").ptr_guard_mut().as_ptr();
            Some(Span { pointer, bytes, file_offset })
        }))
    }
}

/// Has the processor fetch the next page while this one is being looked at: its own prefetching stops where a page ends,
/// and pages of a guest mostly come from memory. Makes taking the digest of cold pages 1.6 times as fast.
#[inline]
fn prefetch(page: *const u8, exists: bool) {
    const LINE_BYTES: usize = 64;
    if exists {
        for line in (0..PAGE_BYTES).step_by(LINE_BYTES) {
            // SAFETY: a prefetch is a hint that never faults, and the page lies in the span that the caller goes
            // through.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(page.wrapping_add(line).cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HIGH_MEMORY_START, LOW_MEMORY_END, allocate};
    use super::*;

    const BACKINGS: [Backing; 2] = [Backing::PrivateAnonymous, Backing::SharedMemfd];

    fn ram(size_bytes: u64, backing: Backing) -> GuestRam {
        allocate(&MemoryConfig::new(size_bytes, backing)).unwrap()
    }

    #[test]
    fn page_indices_skip_the_hole() {
        let ram = ram(LOW_MEMORY_END + (8 << 20), Backing::PrivateAnonymous);
        let low_pages = LOW_MEMORY_END / PAGE;
        assert_eq!(ram.page_count(), low_pages + 2048);
        assert_eq!(ram.page_of_gpa(4097), Some(1));
        assert_eq!(ram.page_of_gpa(LOW_MEMORY_END - 1), Some(low_pages - 1));
        assert_eq!(ram.page_of_gpa(LOW_MEMORY_END), None);
        assert_eq!(ram.page_of_gpa(HIGH_MEMORY_START), Some(low_pages));
        assert_eq!(ram.page_of_gpa(HIGH_MEMORY_START + (8 << 20)), None);
    }

    #[test]
    fn pages_across_the_hole_read_back_in_order() {
        for backing in BACKINGS {
            let ram = ram(LOW_MEMORY_END + (8 << 20), backing);
            let edge = LOW_MEMORY_END / PAGE;
            for (page, fill) in [(edge - 1, 7), (edge, 9)] {
                ram.write_page(page, &[fill; PAGE_BYTES]).unwrap();
            }
            let mut seen = Vec::new();
            ram.for_each_page(edge - 2, 4, |page, bytes| seen.push((page, bytes[5]))).unwrap();
            assert_eq!(seen, [(edge - 2, 0), (edge - 1, 7), (edge, 9), (edge + 1, 0)]);
        }
    }

    #[test]
    fn pages_outside_are_refused() {
        let ram = ram(4 << 20, Backing::PrivateAnonymous);
        for (first, count) in [(0, 1025), (1024, 1), (u64::MAX, 2)] {
            let error = ram.for_each_page(first, count, |_, _| panic!("no page")).unwrap_err();
            assert!(matches!(error, RamError::OutOfRange { pages: 1024, .. }), "{error}");
        }
        ram.for_each_page(1024, 0, |_, _| panic!("no page")).unwrap();
    }
}
