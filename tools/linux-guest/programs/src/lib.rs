//! What the programs inside the Linux guest and the test outside agree on: the contents of pages and disk blocks,
//! and the lines that they exchange.
//!
//! Nothing here uses instructions beyond plain x86-64 or crates that look for them: on KVM's PVM back end the guest's
//! kernel saves only the registers of SSE when it switches tasks (see docs/linux-guest.md).

pub mod blocks;
pub mod lines;
pub mod stamps;

/// The TCP port on which the agent listens.
pub const AGENT_PORT: u16 = 7000;

/// The bytes of a page of memory, and of a block of the disk.
pub const PAGE_BYTES: usize = 4096;

/// The 64-bit words of a page or block.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// A page of memory or block of a disk, aligned as O_DIRECT needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page(pub [u64; PAGE_WORDS]);

impl Page {
    /// A page of zeros.
    pub const ZERO: Self = Self([0; PAGE_WORDS]);
}

/// Spreads a number over all 64 bits (the finaliser of SplitMix64, Steele et al. 2014).
#[must_use]
pub fn spread(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `words` with a pattern that belongs to `seed` alone, and differs in every word.
pub fn fill(seed: u64, words: &mut [u64]) {
    let mut word = spread(seed);
    for place in words {
        *place = word;
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
}

/// The first place where `words` are not what [`fill`] has written for `seed`.
#[must_use]
pub fn first_difference(seed: u64, words: &[u64]) -> Option<usize> {
    let mut word = spread(seed);
    words.iter().position(|found| {
        let expected = word;
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        *found != expected
    })
}
