//! Which pages may hold something, told without reading or allocating any, and memory provided before it is used.
//!
//! A source that reads a page which nobody ever wrote makes its host map one (in a memfd even allocate it) only to
//! find zeroes. [`GuestRam::touched`] leaves such pages out:
//!
//! | memory | asked | may hold something |
//! |---|---|---|
//! | private | this process's page tables ([`super::pagemap`]) | present or swapped, except the shared zero page |
//! | memfd | SEEK_DATA and SEEK_HOLE of the file | allocated or swapped, whoever has it mapped |
//!
//! A memfd of the host's pool (hugetlbfs) does not tell holes from data: unless it is all hole, all of it counts as
//! touched. The page tables would not do for a memfd: another process, or this one before it was handed the file, may have
//! written pages that are not mapped here. Whatever can't be found out counts as touched.
//!
//! # Why a source may trust it while the guest runs
//!
//! It resets the dirty log of the pages first and asks afterwards. A write before the reset has touched its page by
//! the time of the question; a write after the reset is in the log, and the page comes again in the next round. That holds
//! for KVM's log although pages may be writable at first (with INITIALLY_SET nothing is write-protected when logging
//! begins): what protects a page is the reset, so a page that could still be written unnoticed has not been reset
//! yet, and is still dirty. The other order loses a write that falls between question and reset.

// UNSAFETY: memory is populated by its address.
#![expect(unsafe_code, reason = "madvise takes raw addresses, and the fallback touches guest memory")]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::PAGE_BYTES;
use super::ram::{GuestRam, PAGE, RamError, Span};
use crate::config::{Backing, HugePages};

impl GuestRam {
    /// Calls `f` with first page and count of each run, ascending, of those of the `count` pages from `first` on that
    /// may hold something else than zeroes. Pages that it leaves out read as zero, unless they are written meanwhile:
    /// see the module's description. It costs about a microsecond a call and a run, however many pages are left out.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`] before the first call.
    pub fn touched(&self, first: u64, count: u64, mut f: impl FnMut(u64, u64)) -> Result<(), RamError> {
        let mut page = first;
        let mut run = Run { first: page, count: 0 };
        for span in self.spans(first, count)? {
            let pages = span.bytes as u64 / PAGE;
            let end = page + pages;
            let mut known_to = page;
            let found = self.touched_in_span(span, &mut |from, to| {
                run.add(page + from, to - from, &mut f);
                known_to = page + to;
            });
            if let Err(error) = found {
                // Nothing is known of the rest, so it may hold anything.
                tracing::debug!(%error, "can't find out which guest memory was touched");
                run.add(known_to, end - known_to, &mut f);
            }
            page = end;
        }
        run.flush(&mut f);
        Ok(())
    }

    /// Calls `f` with runs of pages, counted from the span's start.
    fn touched_in_span(&self, span: Span, f: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let file = match self.backing() {
            Backing::PrivateAnonymous => {
                let start = span.pointer.addr();
                let page = |address: usize| ((address - start) / PAGE_BYTES) as u64;
                return self
                    .pagemap()?
                    .held(span.addresses(), &mut |held| f(page(held.start), page(held.end)));
            }
            Backing::SharedMemfd => self.file().ok_or(io::ErrorKind::NotFound)?,
        };
        match self.huge_pages() {
            HugePages::Pool | HugePages::PoolIfFree => {
                if file.metadata()?.blocks() > 0 {
                    f(0, span.bytes as u64 / PAGE);
                }
                Ok(())
            }
            HugePages::Transparent | HugePages::Off => {
                data_in_file(file, span.file_offset, span.file_offset + span.bytes as u64, f)
            }
        }
    }

    /// Has the host provide memory for `count` pages from `first` on now, instead of at first touch, which is for a
    /// target that knows which pages will come. No byte changes, even if others write to the pages meanwhile.
    ///
    /// # Errors
    /// The pages are out of range, or the host has no memory left; part of them may have been provided.
    pub fn prefault(&self, first: u64, count: u64) -> io::Result<()> {
        for span in self.spans(first, count)? {
            // SAFETY: the range is a live mapping of ours; populating it changes no byte.
            let done = unsafe { libc::madvise(span.pointer.cast(), span.bytes, libc::MADV_POPULATE_WRITE) };
            if done != 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
                // Before Linux 5.14.
                touch(span);
            }
        }
        Ok(())
    }
}

/// Writes to each page of the span without changing it.
fn touch(span: Span) {
    for offset in (0..span.bytes).step_by(PAGE_BYTES) {
        let pointer = span.pointer.wrapping_add(offset);
        // SAFETY: the byte is mapped as long as the GuestRam that gave the span, and an atomic access is one that may
        // race with others.
        let byte = unsafe { AtomicU8::from_ptr(pointer) };
        // Zero becomes zero, and anything else is memory that is there already. Adding or or-ing a zero would not do:
        // the compiler makes a mere read of it.
        let _ = byte.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Joins runs that touch each other.
struct Run {
    first: u64,
    count: u64,
}

impl Run {
    fn add(&mut self, first: u64, count: u64, f: &mut impl FnMut(u64, u64)) {
        if self.first + self.count == first {
            self.count += count;
        } else {
            self.flush(f);
            *self = Self { first, count };
        }
    }

    fn flush(&self, f: &mut impl FnMut(u64, u64)) {
        if self.count > 0 {
            f(self.first, self.count);
        }
    }
}

/// Calls `f` with the runs of pages, counted from `start`, that have data in the file between two offsets.
fn data_in_file(file: impl AsFd, start: u64, end: u64, f: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
    let seek = |offset: u64, whence| -> nix::Result<u64> {
        let offset = i64::try_from(offset).expect("below MEMORY_BYTES_MAX");
        lseek(&file, offset, whence).map(|found| u64::try_from(found).expect("an offset is not negative"))
    };
    let mut at = start;
    while at < end {
        at = match seek(at, Whence::SeekData) {
            Ok(data) => data,
            // No data from here on.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if at >= end {
            break;
        }
        let hole = seek(at, Whence::SeekHole)?.min(end);
        f((at - start) / PAGE, (hole - start).div_ceil(PAGE));
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::super::pagemap::Pagemap;
    use super::super::{LOW_MEMORY_END, allocate};
    use super::*;
    use crate::config::MemoryConfig;

    const MIB: u64 = 1 << 20;
    const HUGE_PAGES: u64 = 512;

    fn ram(size_bytes: u64, backing: Backing) -> GuestRam {
        allocate(&MemoryConfig::new(size_bytes, backing)).unwrap()
    }

    fn touched(ram: &GuestRam, first: u64, count: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        ram.touched(first, count, |first, count| runs.push((first, count))).unwrap();
        runs
    }

    fn contains(runs: &[(u64, u64)], page: u64) -> bool {
        runs.iter().any(|(first, count)| (*first..first + count).contains(&page))
    }

    #[test]
    fn untouched_memory_is_left_out_and_written_pages_are_not() {
        let edge = LOW_MEMORY_END / PAGE;
        for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
            let ram = ram(LOW_MEMORY_END + 64 * MIB, backing);
            assert_eq!(touched(&ram, 0, ram.page_count()), [], "{backing:?}");
            let written = [3, 4 * HUGE_PAGES + 7, 4 * HUGE_PAGES + 8, edge - 1, edge, ram.page_count() - 1];
            for page in written {
                ram.write_page(page, &[1; PAGE_BYTES]).unwrap();
            }
            let runs = touched(&ram, 0, ram.page_count());
            for page in written {
                assert!(contains(&runs, page), "{backing:?} page {page}: {runs:?}");
            }
            // A huge page may have come for one of its pages, but no more than that.
            for page in [HUGE_PAGES, 5 * HUGE_PAGES, edge - HUGE_PAGES - 1, edge + HUGE_PAGES] {
                assert!(!contains(&runs, page), "{backing:?} page {page}: {runs:?}");
            }
            assert_eq!(touched(&ram, HUGE_PAGES, HUGE_PAGES), []);
            let part = touched(&ram, edge - 1, 2);
            assert_eq!(part, [(edge - 1, 2)], "a run goes on through the hole");
        }
    }

    #[test]
    fn reading_does_not_touch() {
        let ram = ram(16 * MIB, Backing::PrivateAnonymous);
        ram.for_each_page(0, ram.page_count(), |_, bytes| assert_eq!(bytes[9], 0)).unwrap();
        let mut small_pages = 0;
        ram.touched(0, ram.page_count(), |_, count| small_pages += count).unwrap();
        // The shared zero page is never counted where it is mapped as small pages; a huge zero page may be, because
        // the kernel does not tell it from others.
        assert!(small_pages == 0 || small_pages == ram.page_count(), "{small_pages}");
    }

    #[test]
    fn an_older_kernel_gives_the_same_answer() {
        let ram = ram(16 * MIB, Backing::PrivateAnonymous);
        for page in [0, 1, 2 * HUGE_PAGES + 100, 8 * HUGE_PAGES - 1] {
            ram.write_page(page, &[1; PAGE_BYTES]).unwrap();
        }
        let span = ram.spans(0, ram.page_count()).unwrap().next().unwrap();
        let start = span.pointer.addr();
        let bytes_of = |pagemap: &Pagemap| {
            let mut pages = vec![false; span.bytes / PAGE_BYTES];
            let mark = &mut |held: super::super::pagemap::Held| {
                pages[(held.start - start) / PAGE_BYTES..(held.end - start) / PAGE_BYTES].fill(true);
            };
            pagemap.held(start..start + span.bytes, mark).unwrap();
            pages
        };
        let (new, old) = (Pagemap::open().unwrap(), Pagemap::open_without_scan().unwrap());
        assert_eq!(bytes_of(&new), bytes_of(&old));
    }

    #[test]
    fn a_file_written_by_somebody_else_is_touched() {
        let ram = ram(16 * MIB, Backing::SharedMemfd);
        // Not through this mapping: the page tables know nothing of it.
        ram.file().unwrap().write_all_at(&[7; 10], 100 * PAGE + 5).unwrap();
        assert_eq!(touched(&ram, 0, ram.page_count()), [(100, 1)]);
        assert_eq!(touched(&ram, 100, 1), [(100, 1)]);
        assert_eq!(touched(&ram, 101, 50), []);
    }

    #[test]
    fn pages_in_swap_are_touched() {
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().count() < 2 {
            println!("SKIPPED: this host has no swap");
            return;
        }
        for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
            let ram = ram(16 * MIB, backing);
            for page in 0..ram.page_count() {
                ram.write_page(page, &[u8::try_from(page % 250).unwrap() + 1; PAGE_BYTES]).unwrap();
            }
            let span = ram.spans(0, ram.page_count()).unwrap().next().unwrap();
            // SAFETY: the range is a live mapping; paging it out changes no byte.
            let done = unsafe { libc::madvise(span.pointer.cast(), span.bytes, libc::MADV_PAGEOUT) };
            assert_eq!(done, 0);
            let mut entries = vec![0; span.bytes / PAGE_BYTES * 8];
            let at = (span.pointer.addr() / PAGE_BYTES * 8) as u64;
            fs::File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, at).unwrap();
            // Bit 63 of an entry: present.
            let swapped = entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 == 0).count();
            println!("{backing:?}: {swapped} of {} pages are in swap", ram.page_count());
            assert_eq!(touched(&ram, 0, ram.page_count()), [(0, ram.page_count())]);
        }
    }

    #[test]
    fn prefaulted_memory_is_there_and_keeps_its_bytes() {
        for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
            let ram = ram(8 * MIB, backing);
            ram.write_page(5, &[3; PAGE_BYTES]).unwrap();
            ram.prefault(0, HUGE_PAGES).unwrap();
            assert_eq!(touched(&ram, 0, ram.page_count()), [(0, HUGE_PAGES)], "{backing:?}");
            let second = ram.spans(HUGE_PAGES, HUGE_PAGES).unwrap().next().unwrap();
            // What an older kernel gets.
            touch(second);
            assert_eq!(touched(&ram, 0, ram.page_count()), [(0, 2 * HUGE_PAGES)], "{backing:?}");
            let mut page = [0; PAGE_BYTES];
            ram.read_page(5, &mut page).unwrap();
            assert_eq!(page, [3; PAGE_BYTES]);
            let error = ram.prefault(ram.page_count(), 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
