//! In which order a pass visits the pages of the dirtied set.
//!
//! Both orders visit every page exactly once a pass: that is what makes the expected content of
//! each page known. The random one is a keyed permutation, not a random draw, and needs no memory.

use crate::content::mix;

/// Walks the page numbers `0..pages` once, in increasing or in shuffled order.
///
/// Shuffling permutes `0..2^k` by invertible steps (odd multiplication, xor with a right shift) and
/// passes over the numbers that are not pages; `2^k` is less than twice `pages`.
#[derive(Debug, Clone)]
pub struct PageOrder {
    pages: u64,
    next: u64,
    key: Option<u64>,
    bits: u32,
}

impl PageOrder {
    /// Increasing order.
    #[must_use]
    pub const fn linear(pages: u64) -> Self {
        Self { pages, next: 0, key: None, bits: 0 }
    }

    /// A shuffled order that is different for every `pass`.
    #[must_use]
    pub const fn random(pages: u64, pass: u64) -> Self {
        let bits = if pages <= 2 { 1 } else { 64 - (pages - 1).leading_zeros() };
        Self { pages, next: 0, key: Some(mix(pass ^ 0x6f72_6465_7200_0007)), bits }
    }

    /// A bijection on `bits`-bit numbers.
    const fn shuffle(&self, index: u64, key: u64) -> u64 {
        let mask = (1 << self.bits) - 1;
        let shift = self.bits.div_ceil(2);
        let mut x = (index ^ key) & mask;
        x = x.wrapping_mul(key | 1) & mask;
        x ^= x >> shift;
        x = x.wrapping_mul((key >> 32) | 1) & mask;
        x ^= x >> shift;
        x.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask
    }
}

impl Iterator for PageOrder {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let Some(key) = self.key else {
            let page = self.next;
            self.next += 1;
            return (page < self.pages).then_some(page);
        };
        while self.next < 1 << self.bits {
            let page = self.shuffle(self.next, key);
            self.next += 1;
            if page < self.pages {
                return Some(page);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn every_page_once(pages in 1u64..5_000, pass in any::<u64>()) {
            let mut seen: Vec<u64> = PageOrder::random(pages, pass).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..pages).collect::<Vec<_>>());
        }
    }

    #[test]
    fn passes_differ_and_neighbours_are_far_apart() {
        let first: Vec<u64> = PageOrder::random(4_096, 1).collect();
        let second: Vec<u64> = PageOrder::random(4_096, 2).collect();
        assert_ne!(first, second);
        let near = first.windows(2).filter(|w| w[0].abs_diff(w[1]) <= 1).count();
        assert!(near < 64, "{near} of 4096 steps go to a neighbour");
        assert_eq!(PageOrder::linear(3).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
