//! The digest of guest memory, kept up to date page by page.
//!
//! A page's digest is the 128-bit xxh3 hash of its bytes, seeded with its page number, so that a page
//! that lands in the wrong place counts as wrong. That of a page of zeroes is zero, so that neither side needs to look
//! at memory that holds nothing. The memory's digest is the wrapping sum of all pages'.
//! A page that is sent again replaces its old term, so the sum never takes a pass over memory.
//!
//! It finds what was lost, damaged, misplaced or overtaken between the two memories. It does not protect
//! against a peer that means harm: xxh3 is not a cryptographic hash.

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::bitmap::CHUNK_SLOTS;
use crate::layout::PAGE_BYTES;
use crate::page::is_zero;

/// The digest of one page at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageDigest(u128);

impl PageDigest {
    /// The digest of a page of zeroes, whichever it is.
    pub const ZERO_PAGE: Self = Self(0);

    /// The digest of `bytes` as page number `page`.
    #[must_use]
    pub fn of(page: u64, bytes: &[u8; PAGE_BYTES]) -> Self {
        if is_zero(bytes) { Self::ZERO_PAGE } else { Self::of_filled(page, bytes) }
    }

    /// The same for a page that is known not to be all zeroes.
    pub(crate) fn of_filled(page: u64, bytes: &[u8; PAGE_BYTES]) -> Self {
        // Chooses by the processor's vector instructions, at run time.
        Self(XxHash3_128::oneshot_with_seed(page, bytes))
    }

    /// The digest of a memory of which only this page has been seen.
    #[must_use]
    pub const fn alone(self) -> MemoryDigest {
        MemoryDigest(self.0)
    }
}

/// The digest of a whole memory: the sum of its pages' digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryDigest(u128);

impl MemoryDigest {
    /// The digest of no page at all.
    pub const ZERO: Self = Self(0);

    /// The digest of two disjoint parts of a memory together.
    #[must_use]
    pub fn combine(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
}

impl std::fmt::Display for MemoryDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The digests of a chunk's pages: 16 bytes for each, of the 512.
#[derive(Debug)]
pub struct ChunkDigests(Box<[u128; CHUNK_SLOTS]>);

impl Default for ChunkDigests {
    /// Those of a chunk of which no page has been seen.
    fn default() -> Self {
        Self(Box::new([0; CHUNK_SLOTS]))
    }
}

impl ChunkDigests {
    /// The digest of the chunk's page `offset` as it was last seen.
    ///
    /// # Panics
    /// If a chunk has no such page.
    #[must_use]
    pub fn get(&self, offset: u64) -> PageDigest {
        PageDigest(self.0[index(offset)])
    }

    /// The digest of a memory of which only this chunk has been seen.
    #[must_use]
    pub fn sum(&self) -> MemoryDigest {
        MemoryDigest(self.0.iter().fold(0, |sum: u128, page| sum.wrapping_add(*page)))
    }

    /// Replaces the digest of the chunk's page `offset`, and says by how much the memory's digest changes: what is to be
    /// added to it by [`MemoryDigest::combine`].
    ///
    /// # Panics
    /// If a chunk has no such page.
    pub fn set(&mut self, offset: u64, digest: PageDigest) -> MemoryDigest {
        let old = std::mem::replace(&mut self.0[index(offset)], digest.0);
        MemoryDigest(digest.0.wrapping_sub(old))
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("an offset in a chunk is small")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(fill: u8) -> [u8; PAGE_BYTES] {
        [fill; PAGE_BYTES]
    }

    #[test]
    fn the_order_of_sending_does_not_matter_but_the_place_does() {
        let sum = |pages: &[(u64, u8)]| {
            let mut digests = ChunkDigests::default();
            let changes = pages.iter().map(|&(at, fill)| digests.set(at, PageDigest::of(at, &page(fill))));
            changes.fold(MemoryDigest::ZERO, MemoryDigest::combine)
        };
        let forth = sum(&[(0, 9), (0, 1), (1, 2)]);
        assert_eq!(forth, sum(&[(1, 2), (0, 1)]));
        assert_ne!(forth, sum(&[(0, 2), (1, 1)]), "swapped pages must not go unseen");
    }

    #[test]
    fn the_hash_is_pinned() {
        // Both ends must agree for ever: a change here is a change of the protocol.
        assert_eq!(PageDigest::of(7, &page(0)).alone(), MemoryDigest::ZERO);
        assert_eq!(PageDigest::of(7, &page(1)).alone().to_string(), PINNED_PAGE_OF_ONES_7);
    }

    const PINNED_PAGE_OF_ONES_7: &str = "af34487ccb74140409266074bdf6fc09";
}
