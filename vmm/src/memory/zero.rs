//! Making pages zero, and giving back what they took.
//!
//! A target is told of zero pages by the run. Those that nobody touched must stay untouched, and what a page took before it
//! became zero goes back to the host:
//!
//! | memory | untouched | a whole huge page | a small page | a part of a huge page |
//! |---|---|---|---|---|
//! | private | left | given back | given back | cleared in place |
//! | memfd | left | given back | given back | - |
//! | the host's pool | left | cleared in place | - | cleared in place |
//!
//! A huge page is not split to give back a part of it: that would cost the guest more in page table walks than the
//! 4 KiB are worth, and its other pages most likely hold something. Pages of the pool are never given back: they
//! are set aside for guests anyway, and the kernel may take the reservation with them, so that the guest's next write
//! could find none left and kill it.

// UNSAFETY: guest memory is cleared and given back by its address.
#![expect(unsafe_code, reason = "guest memory is reached by raw pointers")]

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::fcntl::{FallocateFlags, fallocate};

use super::PAGE_BYTES;
use super::pagemap::Held;
use super::ram::{GuestRam, HUGE_PAGE_BYTES, RamError, Span};
use crate::config::{Backing, HugePages};

impl GuestRam {
    /// Makes `count` pages from `first` on read as zero. The machine must not run.
    ///
    /// Pages that were never touched stay so, and what others took is given back where that splits no huge page; see the
    /// table in this module.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`], or the kernel refused to take the memory back.
    pub fn zero_pages(&self, first: u64, count: u64) -> Result<(), RamError> {
        for span in self.spans(first, count)? {
            let zeroed = match (self.huge_pages(), self.backing()) {
                (HugePages::Pool | HugePages::PoolIfFree, backing) => self.zero_pool(span, backing),
                (HugePages::Transparent | HugePages::Off, Backing::SharedMemfd) => self.punch_hole(span),
                (HugePages::Transparent | HugePages::Off, Backing::PrivateAnonymous) => {
                    self.zero_private(span)
                }
            };
            zeroed.map_err(|source| RamError::Zero { bytes: span.bytes, source })?;
        }
        Ok(())
    }

    fn zero_private(&self, span: Span) -> io::Result<()> {
        match self.held(span) {
            Ok(held) => held.iter().try_for_each(|held| release(span.between(held), held.huge)),
            // Without page tables to look at, all of it may be held, in whatever pages.
            Err(_) => release(span, None),
        }
    }

    fn zero_pool(&self, span: Span, backing: Backing) -> io::Result<()> {
        let Ok(held) = self.held(span) else {
            clear_in_place(span);
            return Ok(());
        };
        held.iter().for_each(|held| clear_in_place(span.between(held)));
        match backing {
            Backing::PrivateAnonymous => Ok(()),
            // What is not mapped here may still be in the file. Holes stay holes. A part of a huge page is cleared
            // by kernels from 5.19 on.
            Backing::SharedMemfd => gaps(span, &held).try_for_each(|gap| self.punch_hole(gap)),
        }
    }

    /// What of the span holds something, as far as this process has it mapped.
    fn held(&self, span: Span) -> io::Result<Vec<Held>> {
        let mut all = Vec::new();
        self.pagemap()?.held(span.addresses(), &mut |held| all.push(held))?;
        Ok(all)
    }

    fn punch_hole(&self, span: Span) -> io::Result<()> {
        let file = self.file().ok_or(io::ErrorKind::NotFound)?;
        let number = |value: u64| i64::try_from(value).expect("below MEMORY_BYTES_MAX");
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file.as_fd(), mode, number(span.file_offset), number(span.bytes as u64))?;
        Ok(())
    }
}

impl Span {
    pub(super) fn addresses(self) -> Range<usize> {
        self.pointer.addr()..self.pointer.addr() + self.bytes
    }

    fn part(self, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= self.bytes, "a part lies inside its span");
        Self {
            pointer: self.pointer.wrapping_add(offset),
            bytes,
            file_offset: self.file_offset + offset as u64,
        }
    }

    fn between(self, held: &Held) -> Self {
        self.part(held.start - self.pointer.addr(), held.end - held.start)
    }
}

/// The parts of the span that are not held.
fn gaps(span: Span, held: &[Held]) -> impl Iterator<Item = Span> {
    let Range { start, end } = span.addresses();
    let starts = std::iter::once(start).chain(held.iter().map(|held| held.end));
    let ends = held.iter().map(|held| held.start).chain(std::iter::once(end));
    let gaps = starts.zip(ends).filter(|(from, to)| from < to);
    gaps.map(move |(from, to)| span.part(from - start, to - from))
}

/// Zeroes private memory that holds something in huge pages, small ones, or one does not know.
fn release(span: Span, huge: Option<bool>) -> io::Result<()> {
    if huge == Some(false) {
        return give_back(span);
    }
    let Range { start, end } = span.addresses();
    let head = start.next_multiple_of(HUGE_PAGE_BYTES).min(end) - start;
    let whole = (span.bytes - head) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    clear_in_place(span.part(0, head));
    give_back(span.part(head, whole))?;
    clear_in_place(span.part(head + whole, span.bytes - head - whole));
    Ok(())
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
fn give_back(span: Span) -> io::Result<()> {
    if span.bytes == 0 {
        return Ok(());
    }
    // SAFETY: the range lies in our own private mapping, and no reference into it lives across this.
    let done = unsafe { libc::madvise(span.pointer.cast(), span.bytes, libc::MADV_DONTNEED) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
