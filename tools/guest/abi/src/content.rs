//! What the guest writes: pure functions from a page's number to its bytes.
//!
//! A page's content depends only on its number (and, for dirtied pages, on the pass), so the guest
//! can tell at any time what a page must hold, and so can a host that reads guest memory.
//! Nothing here touches memory beyond the buffers handed in.

use crate::workload::Shares;

/// Number of 64-bit words in a page.
pub const WORDS: usize = crate::PAGE_SIZE / 8;

/// Seeds keep the kinds of content apart, so that a page of one kind is never right for another.
const SEED_RANDOM: u64 = 0x7261_6e64_6f6d_0001;
const SEED_TEXT: u64 = 0x7465_7874_0000_0002;
const SEED_KIND: u64 = 0x6b69_6e64_0000_0003;
const SEED_DIRTY: u64 = 0x6469_7274_7900_0004;
const SEED_SLOT: u64 = 0x736c_6f74_0000_0005;
const SEED_HTTP: u64 = 0x6874_7470_0000_0006;

/// SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection that looks random.
#[must_use]
pub const fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Incompressible content: `words[i]` is a function of `stream` and `i` alone.
#[derive(Debug, Clone, Copy)]
pub struct RandomWords(u64);

impl RandomWords {
    /// Content of filled random page `page`.
    #[must_use]
    pub const fn filled(page: u64) -> Self {
        Self(mix(page ^ SEED_RANDOM))
    }

    /// Content of page `page` of the dirtied set after pass `pass` (0: before the first).
    #[must_use]
    pub const fn dirtied(page: u64, pass: u64) -> Self {
        Self(mix(page ^ mix(pass ^ SEED_DIRTY)))
    }

    /// The word at `index`.
    #[inline]
    #[must_use]
    pub const fn word(self, index: usize) -> u64 {
        // Two rounds of multiply and shift are enough to defeat any compressor, and half the price of `mix`.
        let x = self.0.wrapping_add((index as u64).wrapping_mul(GOLDEN));
        let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x ^ (x >> 29)
    }
}

/// Which word of page `page` the `write=word` workload rewrites.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a remainder of a usize fits one")]
pub const fn dirty_slot(page: u64) -> usize {
    (mix(page ^ SEED_SLOT) % WORDS as u64) as usize
}

/// What kind of content a filled page has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillKind {
    /// All bytes zero.
    Zero,
    /// English-like words: what lz4 halves, roughly.
    Text,
    /// Incompressible.
    Random,
}

/// The kind of filled page `page`: a hash of its number, so that kinds are interleaved as in a real guest.
#[must_use]
pub const fn fill_kind(page: u64, shares: Shares) -> FillKind {
    let percent = mix(page ^ SEED_KIND) % 100;
    if percent < shares.zero_percent() as u64 {
        FillKind::Zero
    } else if percent < (shares.zero_percent() + shares.text_percent()) as u64 {
        FillKind::Text
    } else {
        FillKind::Random
    }
}

/// Sixty-four common fragments, so that one 6-bit draw picks one.
const FRAGMENTS: [&[u8]; 64] = [
    b"the ",
    b"of ",
    b"and ",
    b"to ",
    b"in ",
    b"a ",
    b"is ",
    b"that ",
    b"for ",
    b"it ",
    b"as ",
    b"was ",
    b"with ",
    b"be ",
    b"by ",
    b"on ",
    b"not ",
    b"he ",
    b"his ",
    b"but ",
    b"at ",
    b"are ",
    b"this ",
    b"have ",
    b"from ",
    b"or ",
    b"had ",
    b"an ",
    b"they ",
    b"which ",
    b"one ",
    b"were ",
    b"all ",
    b"we ",
    b"when ",
    b"there ",
    b"can ",
    b"more ",
    b"if ",
    b"has ",
    b"page ",
    b"memory ",
    b"machine ",
    b"migration ",
    b"network ",
    b"server ",
    b"request ",
    b"connection ",
    b"ferry ",
    b"river ",
    b"harbour ",
    b"passage ",
    b"guest ",
    b"host ",
    b"between ",
    b"downtime ",
    b"source ",
    b"target ",
    b"round ",
    b"stream ",
    b", ",
    b". ",
    b"; ",
    b"\n",
];

/// Writes the text-like content of filled page `page` into `out`.
///
/// Words come from a small vocabulary with a number mixed in now and then, which makes lz4 reach
/// about half and zstd about a third, as on real text.
pub fn text_page(page: u64, out: &mut [u8; crate::PAGE_SIZE]) {
    let mut state = mix(page ^ SEED_TEXT);
    let mut at = 0;
    while at < out.len() {
        state = state.wrapping_add(GOLDEN);
        let mut draw = mix(state);
        for _ in 0..8 {
            let fragment = FRAGMENTS[(draw & 63) as usize];
            at = append(out, at, fragment);
            draw >>= 6;
        }
        let number = [hex(draw), hex(draw >> 4), hex(draw >> 8), hex(draw >> 12), b' '];
        at = append(out, at, &number);
    }
}

const fn hex(value: u64) -> u8 {
    b"0123456789abcdef"[(value & 15) as usize]
}

/// Copies as much of `bytes` as still fits behind `at`, and says where the next piece goes.
fn append(out: &mut [u8], at: usize, bytes: &[u8]) -> usize {
    let end = (at + bytes.len()).min(out.len());
    if let Some(room) = out.get_mut(at..end) {
        room.copy_from_slice(&bytes[..room.len()]);
    }
    end
}

/// The byte at `offset` of the file that the `http` workload serves.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "one byte of the word is what is wanted")]
pub const fn http_file_byte(offset: usize) -> u8 {
    (mix((offset as u64 / 8) ^ SEED_HTTP) >> (8 * (offset % 8))) as u8
}

/// Writes the part of the served file that starts at `offset` into `out`.
pub fn http_file_part(offset: usize, out: &mut [u8]) {
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = http_file_byte(offset + i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use std::collections::HashSet;
    use std::vec::Vec;

    fn random_page(page: u64) -> Vec<u8> {
        (0..WORDS).flat_map(|i| RandomWords::filled(page).word(i).to_le_bytes()).collect()
    }

    #[test]
    fn random_pages_do_not_compress_and_differ() {
        let pages: Vec<u8> = (0..64).flat_map(random_page).collect();
        let packed = lz4_flex::compress(&pages);
        assert!(packed.len() >= pages.len(), "{} bytes shrank to {}", pages.len(), packed.len());
        let firsts: HashSet<u64> = (0..10_000).map(|p| RandomWords::filled(p).word(0)).collect();
        assert_eq!(firsts.len(), 10_000);
    }

    #[test]
    fn text_pages_compress_about_as_text_does() {
        let mut page = [0; PAGE_SIZE];
        let (mut packed, mut plain) = (0, 0);
        for number in 0..64 {
            text_page(number, &mut page);
            assert!(page.iter().all(|b| b.is_ascii() && *b != 0));
            packed += lz4_flex::compress(&page).len();
            plain += page.len();
        }
        let ratio = plain as f64 / packed as f64;
        assert!((1.5..2.2).contains(&ratio), "lz4 ratio {ratio}");
    }

    #[test]
    fn kinds_follow_the_shares() {
        let shares = Shares::new(25, 50, 25).unwrap();
        let mut count = [0u32; 3];
        for page in 0..100_000 {
            match fill_kind(page, shares) {
                FillKind::Zero => count[0] += 1,
                FillKind::Text => count[1] += 1,
                FillKind::Random => count[2] += 1,
            }
        }
        for (got, want) in count.iter().zip([25_000u32, 50_000, 25_000]) {
            assert!(got.abs_diff(want) < 1_000, "{count:?}");
        }
    }

    #[test]
    fn passes_change_every_word() {
        let (before, after) = (RandomWords::dirtied(7, 1), RandomWords::dirtied(7, 2));
        assert!((0..WORDS).all(|i| before.word(i) != after.word(i)));
    }

    #[test]
    fn the_served_file_reads_the_same_in_any_split() {
        let mut whole = [0; 100];
        http_file_part(1_003, &mut whole);
        let mut parts = [0; 100];
        http_file_part(1_003, &mut parts[..37]);
        http_file_part(1_040, &mut parts[37..]);
        assert_eq!(whole, parts);
    }
}
