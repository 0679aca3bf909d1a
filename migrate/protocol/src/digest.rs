//! The digest of guest memory, kept up to date page by page.
//!
//! A page's digest is the 128-bit xxh3 hash of its bytes, seeded with its page number, so that a page
//! that lands in the wrong place counts as wrong. The memory's digest is the wrapping sum of all pages'.
//! A page that is sent again replaces its old term, so the sum never takes a pass over memory.
//!
//! It finds what was lost, damaged, misplaced or overtaken between the two memories. It does not protect
//! against a peer that means harm: xxh3 is not a cryptographic hash.

use xxhash_rust::xxh3::xxh3_128_with_seed;

use serde::{Deserialize, Serialize};

use crate::layout::PAGE_BYTES;

/// The digest of one page at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageDigest(u128);

impl PageDigest {
    /// The digest of `bytes` as page number `page`.
    #[must_use]
    pub fn of(page: u64, bytes: &[u8; PAGE_BYTES]) -> Self {
        Self(xxh3_128_with_seed(bytes, page))
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

/// The digests of some of a memory's pages, by slot, with their sum. 16 bytes a page.
#[derive(Debug)]
pub struct DigestTable {
    pages: Vec<u128>,
    sum: u128,
}

impl DigestTable {
    /// A table of `slots` pages of which none has been seen.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self { pages: vec![0; slots], sum: 0 }
    }

    /// Replaces the digest in `slot` and brings the sum up to date.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn set(&mut self, slot: usize, digest: PageDigest) {
        let old = std::mem::replace(&mut self.pages[slot], digest.0);
        self.sum = self.sum.wrapping_sub(old).wrapping_add(digest.0);
    }

    /// The sum over all slots.
    #[must_use]
    pub fn sum(&self) -> MemoryDigest {
        MemoryDigest(self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(fill: u8) -> [u8; PAGE_BYTES] {
        [fill; PAGE_BYTES]
    }

    #[test]
    fn the_order_of_sending_does_not_matter_but_the_place_does() {
        let mut forth = DigestTable::new(2);
        forth.set(0, PageDigest::of(0, &page(9)));
        forth.set(0, PageDigest::of(0, &page(1)));
        forth.set(1, PageDigest::of(1, &page(2)));
        let mut back = DigestTable::new(2);
        back.set(1, PageDigest::of(1, &page(2)));
        back.set(0, PageDigest::of(0, &page(1)));
        assert_eq!(forth.sum(), back.sum());
        back.set(0, PageDigest::of(0, &page(2)));
        back.set(1, PageDigest::of(1, &page(1)));
        assert_ne!(forth.sum(), back.sum(), "swapped pages must not go unseen");
    }

    #[test]
    fn the_hash_is_pinned() {
        // Both ends must agree for ever: a change here is a change of the protocol.
        let digest = PageDigest::of(7, &page(0));
        assert_eq!(MemoryDigest(digest.0).to_string(), PINNED_ZERO_PAGE_7);
    }

    const PINNED_ZERO_PAGE_7: &str = "ac64530a495117b273ca3cc0d1a2e107";
}
