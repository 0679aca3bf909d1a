//! Guest memory by page index: reading, writing and zeroing pages.
//!
//! The guest may run meanwhile. Reading a page that it writes gives some mix of old and new bytes; the
//! dirty log then has the page again, so a migration sends it again. Writing pages is for a machine
//! that does not run: a target's, before it resumes.
//!
//! Writes made here do not mark pages dirty: they are the receiver's. Devices write through
//! [`GuestRam::tracked`], which does.

// UNSAFETY: guest memory is a foreign mapping that a guest changes; it is reached by raw pointers.
#![expect(unsafe_code, reason = "guest memory is reached by raw pointers")]

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{PAGE_BYTES, TrackedMemory};
use crate::config::Backing;

const PAGE: u64 = PAGE_BYTES as u64;

/// Bytes of a huge page. Zeroing gives whole ones back to the host and clears the rest in place.
const HUGE_PAGE_BYTES: usize = 2 << 20;

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
    regions: Vec<RamRegion>,
    pages: u64,
    backing: Backing,
}

/// Pages that are contiguous on the host, too. The pointer is valid for `bytes` as long as the
/// [`GuestRam`] that gave it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) pointer: *mut u8,
    pub(super) bytes: usize,
    /// Where it starts in the file that backs it, if one does.
    file_offset: u64,
}

impl GuestRam {
    pub(super) fn new(memory: TrackedMemory, regions: Vec<RamRegion>, backing: Backing) -> Self {
        let pages = regions.iter().map(|region| region.bytes / PAGE).sum();
        Self { inner: Arc::new(Inner { memory, regions, pages, backing }) }
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

    /// Makes `count` pages from `first` on read as zero. The machine must not run.
    ///
    /// Pages that were never touched stay so: whole huge pages (and any page of a memfd) are given back
    /// to the host, which takes a call and no memory; the rest is read first, which maps the host's
    /// shared zero page at most, and written only where it differs.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`], or the kernel refused to take the memory back.
    pub fn zero_pages(&self, first: u64, count: u64) -> Result<(), RamError> {
        for span in self.spans(first, count)? {
            match self.inner.backing {
                Backing::SharedMemfd => self.punch_hole(span)?,
                Backing::PrivateAnonymous => {
                    let start = span.pointer.addr();
                    let head = start.next_multiple_of(HUGE_PAGE_BYTES).min(start + span.bytes) - start;
                    let whole = (span.bytes - head) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
                    clear_in_place(span.part(0, head));
                    give_back(span.part(head, whole))?;
                    clear_in_place(span.part(head + whole, span.bytes - head - whole));
                }
            }
        }
        Ok(())
    }

    /// Has the host provide memory for the pages now, instead of at first touch, where the kernel can
    /// (MADV_POPULATE_WRITE, Linux 5.14); elsewhere it does nothing.
    ///
    /// # Errors
    /// The pages are out of range, or the host has no memory left.
    pub fn prefault(&self, first: u64, count: u64) -> io::Result<()> {
        for span in self.spans(first, count)? {
            // SAFETY: the range is a live mapping of ours; populating it changes no byte.
            let done = unsafe { libc::madvise(span.pointer.cast(), span.bytes, libc::MADV_POPULATE_WRITE) };
            if done != 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The file that holds all regions end to end, if one does.
    pub(super) fn file(&self) -> Option<&std::fs::File> {
        let file = self.inner.memory.iter().find_map(|region| region.file_offset())?;
        Some(file.file())
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

    pub(super) fn advise_huge_pages(&self) {
        if self.inner.backing != Backing::PrivateAnonymous {
            return;
        }
        for region in self.inner.memory.iter() {
            // Without huge pages the guest runs slower, and that is all: the result doesn't matter.
            // SAFETY: the range is a live mapping of ours; the advice changes no byte.
            unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
        }
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

    fn punch_hole(&self, span: Span) -> Result<(), RamError> {
        let error = |source| RamError::Zero { bytes: span.bytes, source };
        let file = self.file().ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
        let number = |value: u64| i64::try_from(value).expect("below MEMORY_BYTES_MAX");
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file.as_fd(), mode, number(span.file_offset), number(span.bytes as u64))
            .map_err(|errno| error(errno.into()))
    }
}

impl Span {
    fn part(self, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= self.bytes, "a part lies inside its span");
        Self {
            pointer: self.pointer.wrapping_add(offset),
            bytes,
            file_offset: self.file_offset + offset as u64,
        }
    }
}

/// Zeroes pages by writing those that aren't zero yet.
fn clear_in_place(span: Span) {
    for offset in (0..span.bytes).step_by(PAGE_BYTES) {
        let pointer = span.pointer.wrapping_add(offset);
        // SAFETY: the page lies in the span, which is mapped; the machine does not run, so nobody
        // writes.
        let words = unsafe { &*pointer.cast::<[u64; PAGE_BYTES / 8]>() };
        let is_zero = words.iter().fold(0, |all, word| all | word) == 0;
        if !is_zero {
            // SAFETY: as above, and the reference `words` is no longer used.
            unsafe { pointer.write_bytes(0, PAGE_BYTES) };
        }
    }
}

/// Drops private anonymous pages; they read as zero afterwards.
fn give_back(span: Span) -> Result<(), RamError> {
    if span.bytes == 0 {
        return Ok(());
    }
    // SAFETY: the range lies in our own private mapping, and no reference into it lives across this.
    let done = unsafe { libc::madvise(span.pointer.cast(), span.bytes, libc::MADV_DONTNEED) };
    if done == 0 {
        Ok(())
    } else {
        Err(RamError::Zero { bytes: span.bytes, source: io::Error::last_os_error() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HIGH_MEMORY_START, LOW_MEMORY_END, allocate};
    use super::*;
    use crate::config::MemoryConfig;

    const BACKINGS: [Backing; 2] = [Backing::PrivateAnonymous, Backing::SharedMemfd];

    fn ram(size_bytes: u64, backing: Backing) -> GuestRam {
        allocate(&MemoryConfig { size_bytes, backing }).unwrap()
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

    #[test]
    fn zeroed_pages_read_as_zero_and_their_neighbours_do_not() {
        for backing in BACKINGS {
            let ram = ram(16 << 20, backing);
            let pages = ram.page_count();
            for page in 0..pages {
                ram.write_page(page, &[0xab; PAGE_BYTES]).unwrap();
            }
            for (first, count) in [(3, 1), (10, 2000), (4000, 96)] {
                ram.zero_pages(first, count).unwrap();
            }
            ram.for_each_page(0, pages, |page, bytes| {
                let zeroed = page == 3 || (10..2010).contains(&page) || page >= 4000;
                let expected = if zeroed { 0 } else { 0xab };
                assert!(bytes.iter().all(|byte| *byte == expected), "{backing:?} page {page}");
            })
            .unwrap();
        }
    }

    #[test]
    fn zeroing_untouched_memory_takes_none() {
        let ram = ram(256 << 20, Backing::PrivateAnonymous);
        ram.zero_pages(1, ram.page_count() - 2).unwrap();
        let mut resident = vec![0_u8; 65_536];
        let span = ram.spans(0, ram.page_count()).unwrap().next().unwrap();
        // SAFETY: mincore writes one byte a page of the live mapping into a vector of that length.
        let done = unsafe { libc::mincore(span.pointer.cast(), span.bytes, resident.as_mut_ptr()) };
        assert_eq!(done, 0);
        let edges = 2 * HUGE_PAGE_BYTES / PAGE_BYTES;
        let touched = resident.iter().filter(|byte| **byte & 1 != 0).count();
        assert!(touched <= edges, "{touched} pages");
    }

    #[test]
    fn prefault_provides_memory_and_keeps_its_bytes() {
        let ram = ram(8 << 20, Backing::PrivateAnonymous);
        ram.write_page(5, &[3; PAGE_BYTES]).unwrap();
        ram.prefault(0, ram.page_count()).unwrap();
        let mut page = [0; PAGE_BYTES];
        ram.read_page(5, &mut page).unwrap();
        assert_eq!(page, [3; PAGE_BYTES]);
    }
}
