//! The pages that devices of this program wrote, a bit each.
//!
//! What differs from `vm-memory`'s own bitmap is how it is taken: a word is only exchanged where a bit is set. Exchanging
//! every word of a large guest costs far more than looking at it, and few are ever set.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE_BYTES;

const WORD_PAGES: usize = 64;

/// A bit for each page of a region. Offsets are in bytes from the region's start.
#[derive(Debug, Default)]
pub(crate) struct WrittenPages {
    pages: usize,
    words: Vec<AtomicU64>,
}

impl WrittenPages {
    /// Calls `f` with index and bits of each word that has a bit set, and clears it.
    ///
    /// A device sets the bit after it wrote, and exchanging the word orders both before what follows here: a bit that
    /// is taken is that of a page whose new bytes can be read. One that is missed is there the next time.
    pub(crate) fn take(&self, mut f: impl FnMut(usize, u64)) {
        for (index, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                f(index, word.swap(0, Ordering::SeqCst));
            }
        }
    }
}

impl Bitmap for WrittenPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let end = offset.saturating_add(len - 1) / PAGE_BYTES + 1;
        // As the trait wants it, pages outside are passed over.
        for page in offset / PAGE_BYTES..end.min(self.pages) {
            self.words[page / WORD_PAGES].fetch_or(1 << (page % WORD_PAGES), Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        let word = self.words.get(page / WORD_PAGES).map_or(0, |word| word.load(Ordering::SeqCst));
        word >> (page % WORD_PAGES) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for WrittenPages {
    type S = RefSlice<'a, Self>;
}

impl NewBitmap for WrittenPages {
    fn with_len(bytes: usize) -> Self {
        let pages = bytes.div_ceil(PAGE_BYTES);
        let words = pages.div_ceil(WORD_PAGES);
        Self { pages, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(pages: &WrittenPages) -> Vec<(usize, u64)> {
        let mut words = Vec::new();
        pages.take(|index, bits| words.push((index, bits)));
        words
    }

    #[test]
    fn pages_are_taken_once() {
        let pages = WrittenPages::with_len(200 * PAGE_BYTES);
        assert!(taken(&pages).is_empty());
        pages.mark_dirty(5 * PAGE_BYTES - 1, 2);
        pages.mark_dirty(63 * PAGE_BYTES, 2 * PAGE_BYTES);
        pages.slice_at(128 * PAGE_BYTES).mark_dirty(71 * PAGE_BYTES + 9, 1);
        pages.mark_dirty(9 * PAGE_BYTES, 0);
        assert!(pages.dirty_at(4 * PAGE_BYTES) && !pages.dirty_at(6 * PAGE_BYTES));
        assert_eq!(taken(&pages), [(0, 0b11 << 4 | 1 << 63), (1, 1), (3, 1 << 7)]);
        assert!(taken(&pages).is_empty());
    }

    #[test]
    fn pages_outside_are_passed_over() {
        let pages = WrittenPages::with_len(70 * PAGE_BYTES);
        pages.mark_dirty(69 * PAGE_BYTES, usize::MAX);
        pages.mark_dirty(70 * PAGE_BYTES, 1);
        assert!(!pages.dirty_at(70 * PAGE_BYTES) && !pages.dirty_at(200 * PAGE_BYTES));
        assert_eq!(taken(&pages), [(1, 1 << 5)]);
    }

    #[test]
    fn nothing_is_lost_while_it_is_taken() {
        let pages = WrittenPages::with_len(64 * 64 * PAGE_BYTES);
        let mut seen = vec![0_u64; 64];
        std::thread::scope(|scope| {
            let writer =
                scope.spawn(|| (0..4096).rev().for_each(|page| pages.mark_dirty(page * PAGE_BYTES, 1)));
            while !writer.is_finished() {
                pages.take(|index, bits| seen[index] |= bits);
            }
        });
        pages.take(|index, bits| seen[index] |= bits);
        assert_eq!(seen, [u64::MAX; 64]);
    }
}
