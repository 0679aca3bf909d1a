//! What can be said about a page by looking at it, and what the operator may ask for. What then travels for it is
//! decided in [`crate::encode`].

use std::fmt;
use std::str::FromStr;

use crate::encode::pack::ZSTD_LEVEL_MAX;
use crate::layout::PAGE_BYTES;

/// A page of zeroes, to compare with.
static ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Whether a page has only zero bytes.
#[must_use]
pub fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    // The C library compares with the widest vectors that the processor has, chosen at run time, and stops at the first
    // difference.
    *page == ZERO
}

/// Which encoding the source may use for pages that are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As the link and the processor's time make worth it, chosen anew all the time.
    #[default]
    Auto,
    /// Pages travel as they are, also when they come again.
    None,
    /// Groups of pages travel as lz4 blocks where that is shorter.
    Lz4,
    /// Groups of pages travel as zstd frames of this level where that is shorter.
    Zstd(u8),
}

/// Whether packing a page may be worth trying, by how many different bytes 256 of it have: text and program code
/// have fewer than half of all, noise and what is compressed or encrypted already has about 162. Costs 60 ns.
#[must_use]
pub fn seems_packable(page: &[u8; PAGE_BYTES]) -> bool {
    let mut seen = [0u64; 4];
    // Eight pieces, spread over the page.
    for piece in page.chunks_exact(PAGE_BYTES / 8) {
        for &byte in &piece[..32] {
            seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
        }
    }
    seen.iter().map(|word| word.count_ones()).sum::<u32>() < 140
}

/// What an operator wrote is no way to pack pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no way to pack pages; give auto, none, lz4, zstd, or zstd:LEVEL with a level from 1 to {ZSTD_LEVEL_MAX}"
)]
pub struct UnknownCompression(String);

/// The level of plain `zstd`.
const ZSTD_LEVEL_DEFAULT: u8 = 1;

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownCompression(text.to_owned());
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "none" => Ok(Self::None),
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd(ZSTD_LEVEL_DEFAULT)),
            Some(("zstd", level)) => {
                let level = level.parse().ok().filter(|level| (1..=ZSTD_LEVEL_MAX).contains(level));
                level.map(Self::Zstd).ok_or_else(unknown)
            }
            None | Some(_) => Err(unknown()),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut page = [0; PAGE_BYTES];
        assert!(is_zero(&page));
        for at in [0, 127, 128, 2048, PAGE_BYTES - 1] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    #[test]
    fn words_seem_packable_and_noise_does_not() {
        let words = b"the guest goes on at the source until the commit is durable; ";
        let text: [u8; PAGE_BYTES] = std::array::from_fn(|at| words[at % words.len()]);
        assert!(seems_packable(&text));
        let mut state = 1u32;
        let noise: [u8; PAGE_BYTES] = std::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        });
        assert!(!seems_packable(&noise));
    }

    #[test]
    fn ways_to_pack_read_back() {
        for way in [
            Compression::Auto,
            Compression::None,
            Compression::Lz4,
            Compression::Zstd(1),
            Compression::Zstd(9),
        ] {
            assert_eq!(way.to_string().parse(), Ok(way));
        }
        assert_eq!("zstd".parse(), Ok(Compression::Zstd(1)));
        for bad in ["", "gzip", "zstd:", "zstd:0", "zstd:10", "zstd:-1", "lz4:1"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
