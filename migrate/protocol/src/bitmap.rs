//! Sets of guest pages: [`PageBitmap`] for a whole guest, [`PageMask`] for one chunk of 2 MiB, and
//! [`PageRange`] for a run. Each knows its bounds, so that no raw pair of numbers travels further.

use crate::ident::StreamIndex;
use crate::layout::MemoryLayout;

/// Pages of a chunk: 2 MiB, the unit that is tied to a data stream.
pub const CHUNK_PAGES: u64 = 512;

/// The same as the length of an array.
pub(crate) const CHUNK_SLOTS: usize = 512;

const WORD_PAGES: u64 = 64;
const CHUNK_WORDS: usize = 8;

/// A run of pages that lies inside its guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    first: u64,
    count: u64,
}

impl PageRange {
    /// The `count` pages from `first`; `None` if there are none or they do not lie inside `layout`.
    #[must_use]
    pub fn new(first: u64, count: u64, layout: &MemoryLayout) -> Option<Self> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= layout.page_count()).then_some(Self { first, count })
    }

    /// At most `count_max` of these pages, from the one on that `skipped` others stand before; `None` if nothing is left.
    #[must_use]
    pub fn part(self, skipped: u64, count_max: u64) -> Option<Self> {
        let count = self.count.checked_sub(skipped)?.min(count_max);
        (count > 0).then_some(Self { first: self.first + skipped, count })
    }

    /// The first page.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// How many pages.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.count
    }
}

/// Which chunk of [`CHUNK_PAGES`] pages, from 0. Only a bitmap or a frame check makes one, so it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(u64);

impl ChunkIndex {
    /// Chunk `index` of a guest with `page_count` pages; `None` beyond its end.
    #[must_use]
    pub fn new(index: u64, page_count: u64) -> Option<Self> {
        (index < page_count.div_ceil(CHUNK_PAGES)).then_some(Self(index))
    }

    /// The plain number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The chunk's first page.
    #[must_use]
    pub const fn first_page(self) -> u64 {
        self.0 * CHUNK_PAGES
    }

    /// The runs of consecutive pages that `mask` names in this chunk, in ascending order.
    pub fn ranges(self, mask: &PageMask) -> impl Iterator<Item = PageRange> + use<> {
        mask.runs().map(move |(offset, count)| PageRange { first: self.first_page() + offset, count })
    }

    /// The one stream, of `streams`, on which this chunk's pages travel. A newer copy of a page thus
    /// always follows the older one in one TCP stream and can't be overtaken by it.
    ///
    /// # Panics
    /// If `streams` is zero.
    #[must_use]
    pub fn stream(self, streams: u16) -> StreamIndex {
        let index = u16::try_from(self.0 % u64::from(streams)).expect("less than a u16");
        StreamIndex::new(index, streams).expect("a remainder is less than its divisor")
    }
}

/// A set of pages within one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageMask(pub [u64; CHUNK_WORDS]);

impl PageMask {
    /// No page.
    pub const EMPTY: Self = Self([0; CHUNK_WORDS]);

    /// Adds page `offset` of the chunk.
    ///
    /// # Panics
    /// If `offset` is not below [`CHUNK_PAGES`].
    pub fn insert(&mut self, offset: u64) {
        let (word, bit) = split(offset);
        self.0[word] |= bit;
    }

    /// Whether page `offset` of the chunk is in the set.
    #[must_use]
    pub fn contains(&self, offset: u64) -> bool {
        let (word, bit) = split(offset);
        self.0.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Removes page `offset` of the chunk, if it is in the set.
    pub fn remove(&mut self, offset: u64) {
        let (word, bit) = split(offset);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    /// The offsets of the pages in the set, in ascending order.
    pub fn offsets(&self) -> impl Iterator<Item = u64> + use<> {
        self.runs().flat_map(|(first, count)| first..first + count)
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; CHUNK_WORDS]
    }

    /// The runs of consecutive pages, as (offset, count), in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        Runs { words: self.0, at: 0 }
    }

    /// The offset of the last page in the set.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        let index = self.0.iter().rposition(|&word| word != 0)?;
        let high = 63 - u64::from(self.0[index].leading_zeros());
        Some(word_base(index) + high)
    }
}

/// Iterates over runs of set bits; shared by masks and whole bitmaps through their words.
struct Runs<W> {
    words: W,
    at: u64,
}

impl<W: AsRef<[u64]>> Iterator for Runs<W> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let words = self.words.as_ref();
        let start = next_bit(words, self.at, false)?;
        let end = next_bit(words, start, true).unwrap_or_else(|| word_base(words.len()));
        self.at = end;
        Some((start, end - start))
    }
}

/// The first bit at or after `from` that is set (or clear, if `inverted`).
fn next_bit(words: &[u64], from: u64, inverted: bool) -> Option<u64> {
    let (mut index, _) = split(from);
    let mut keep = u64::MAX << (from % WORD_PAGES);
    while let Some(&word) = words.get(index) {
        let candidates = (if inverted { !word } else { word }) & keep;
        if candidates != 0 {
            return Some(word_base(index) + u64::from(candidates.trailing_zeros()));
        }
        keep = u64::MAX;
        index += 1;
    }
    None
}

fn split(page: u64) -> (usize, u64) {
    let word = usize::try_from(page / WORD_PAGES).expect("a bitmap's index fits the address space");
    (word, 1 << (page % WORD_PAGES))
}

fn word_base(index: usize) -> u64 {
    u64::try_from(index).expect("usize fits u64") * WORD_PAGES
}

/// A set of a guest's pages, one bit a page. Bits beyond the last page are always clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    page_count: u64,
}

/// A dirty log named pages that the guest does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a bitmap of {words} words can't describe {page_count} pages, or names pages beyond them")]
pub struct BitmapError {
    words: usize,
    page_count: u64,
}

impl PageBitmap {
    /// No page of a guest with `page_count` pages.
    #[must_use]
    pub fn empty(page_count: u64) -> Self {
        Self { words: vec![0; Self::words_for(page_count)], page_count }
    }

    /// Every page of a guest with `page_count` pages.
    #[must_use]
    pub fn full(page_count: u64) -> Self {
        let mut words = vec![u64::MAX; Self::words_for(page_count)];
        if let (Some(last), rest @ 1..) = (words.last_mut(), page_count % WORD_PAGES) {
            *last = (1 << rest) - 1;
        }
        Self { words, page_count }
    }

    /// Takes the words of a dirty log: bit `n % 64` of word `n / 64` is page `n`.
    ///
    /// # Errors
    /// If the number of words is not that of `page_count` pages or a page beyond the last one is named.
    pub fn from_words(words: Vec<u64>, page_count: u64) -> Result<Self, BitmapError> {
        let spare = match page_count % WORD_PAGES {
            0 => 0,
            rest => u64::MAX << rest,
        };
        let fits = words.len() == Self::words_for(page_count);
        if !fits || words.last().is_some_and(|last| last & spare != 0) {
            return Err(BitmapError { words: words.len(), page_count });
        }
        Ok(Self { words, page_count })
    }

    /// How many words a guest of `page_count` pages takes.
    #[must_use]
    pub fn words_for(page_count: u64) -> usize {
        usize::try_from(page_count.div_ceil(WORD_PAGES)).expect("a bitmap fits the address space")
    }

    /// How many pages the guest has, in the set or not.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.page_count
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds `page`.
    ///
    /// # Panics
    /// If the guest has no such page.
    pub fn insert(&mut self, page: u64) {
        assert!(page < self.page_count, "page {page} of a guest with {}", self.page_count);
        let (word, bit) = split(page);
        self.words[word] |= bit;
    }

    /// Removes `page`, if it is in the set.
    pub fn remove(&mut self, page: u64) {
        let (word, bit) = split(page);
        if let Some(word) = self.words.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let (word, bit) = split(page);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// If the two are of guests of different sizes.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.page_count, other.page_count, "bitmaps of one guest");
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to |= from;
        }
    }

    /// Adds the pages of `range`.
    ///
    /// # Panics
    /// If the guest has no such pages.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(
            range.first + range.count <= self.page_count,
            "{range:?} of a guest with {}",
            self.page_count
        );
        let (mut page, end) = (range.first, range.first + range.count);
        while page < end {
            let (word, _) = split(page);
            let pages = (WORD_PAGES - page % WORD_PAGES).min(end - page);
            let ones = if pages == WORD_PAGES { u64::MAX } else { (1 << pages) - 1 };
            self.words[word] |= ones << (page % WORD_PAGES);
            page += pages;
        }
    }

    /// Adds the pages `mask` of `chunk`.
    ///
    /// # Panics
    /// If the guest has no such pages.
    pub fn insert_chunk(&mut self, chunk: ChunkIndex, mask: &PageMask) {
        chunk.ranges(mask).for_each(|range| self.insert_range(range));
    }

    /// Removes every page of `other`.
    ///
    /// # Panics
    /// If the two are of guests of different sizes.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.page_count, other.page_count, "bitmaps of one guest");
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to &= !from;
        }
    }

    /// The chunks that have pages in the set, each with its pages, in ascending order.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkIndex, PageMask)> + '_ {
        self.words.chunks(CHUNK_WORDS).zip(0..).filter_map(|(words, index)| {
            let mut mask = PageMask::EMPTY;
            mask.0[..words.len()].copy_from_slice(words);
            (!mask.is_empty()).then_some((ChunkIndex(index), mask))
        })
    }

    /// The pages of `chunk` that are in the set.
    #[must_use]
    pub fn chunk(&self, chunk: ChunkIndex) -> PageMask {
        let first = usize::try_from(chunk.0).map_or(self.words.len(), |index| index * CHUNK_WORDS);
        let words = self.words.get(first..).unwrap_or_default();
        let mut mask = PageMask::EMPTY;
        mask.0.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        mask
    }

    /// The runs of consecutive pages in the set, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        Runs { words: &self.words, at: 0 }.map(|(first, count)| PageRange { first, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn full_has_no_page_beyond_the_last() {
        for pages in [1, 63, 64, 65, 512, 513, 1000] {
            let full = PageBitmap::full(pages);
            assert_eq!(full.count(), pages);
            assert!(!full.contains(pages));
            assert_eq!(full.ranges().collect::<Vec<_>>(), [PageRange { first: 0, count: pages }]);
        }
    }

    #[test]
    fn words_that_name_absent_pages_are_refused() {
        assert!(PageBitmap::from_words(vec![1 << 10], 10).is_err());
        assert!(PageBitmap::from_words(vec![0, 0], 10).is_err());
        assert!(PageBitmap::from_words(vec![1 << 9], 10).is_ok());
    }

    #[test]
    fn ranges_outside_the_layout_are_refused() {
        let layout = MemoryLayout::new(vec![crate::Region { gpa: 0, bytes: 0x8000 }]).unwrap();
        assert!(PageRange::new(0, 8, &layout).is_some());
        assert!(PageRange::new(0, 0, &layout).is_none());
        assert!(PageRange::new(1, 8, &layout).is_none());
        assert!(PageRange::new(u64::MAX, 2, &layout).is_none());
    }

    #[test]
    fn a_chunk_always_takes_the_same_stream() {
        let chunk = ChunkIndex::new(7, 8 * CHUNK_PAGES).unwrap();
        assert_eq!(chunk.stream(4).number(), 3);
        assert_eq!(ChunkIndex::new(8, 8 * CHUNK_PAGES), None);
    }

    proptest! {
        #[test]
        fn runs_chunks_and_pages_agree(pages in proptest::collection::btree_set(0u64..2000, 0..300)) {
            let mut bitmap = PageBitmap::empty(2000);
            pages.iter().for_each(|&page| bitmap.insert(page));
            prop_assert_eq!(bitmap.count(), u64::try_from(pages.len()).unwrap());
            let by_range: Vec<u64> =
                bitmap.ranges().flat_map(|r| r.first()..r.first() + r.count()).collect();
            prop_assert_eq!(&by_range, &pages.iter().copied().collect::<Vec<_>>());
            let by_chunk: Vec<u64> = bitmap
                .chunks()
                .flat_map(|(chunk, mask)| {
                    mask.runs().flat_map(move |(o, n)| (o..o + n).map(move |o| chunk.first_page() + o))
                })
                .collect();
            prop_assert_eq!(by_chunk, by_range);
            let mut again = PageBitmap::empty(2000);
            bitmap.ranges().for_each(|range| again.insert_range(range));
            prop_assert_eq!(&again, &bitmap);
            let mut again = PageBitmap::empty(2000);
            bitmap.chunks().for_each(|(chunk, mask)| again.insert_chunk(chunk, &mask));
            prop_assert_eq!(&again, &bitmap);
            let mut rest = PageBitmap::full(2000);
            rest.subtract(&bitmap);
            prop_assert_eq!(rest.count(), 2000 - bitmap.count());
            prop_assert!(pages.iter().all(|&page| !rest.contains(page)));
            for (_, mask) in bitmap.chunks() {
                let last = mask.runs().last().map(|(offset, count)| offset + count - 1);
                prop_assert_eq!(mask.last(), last);
            }
        }
    }
}
