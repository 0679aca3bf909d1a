//! What travels for a page: nothing but its number where it is zero, an lz4 block, or the page itself.
//!
//! Choosing by link speed (`auto`), deltas and zstd are not here yet; see docs/protocol.md.

use lz4_flex::block;

use crate::frame::LZ4_PAGES_MAX;
use crate::layout::PAGE_BYTES;

/// Whether a page has only zero bytes.
#[must_use]
pub fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    // Pieces of 128 bytes: wide enough for the compiler to use vectors, short enough to stop early.
    page.chunks_exact(128).all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Which encoding the source may use for pages that are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Pages travel as they are.
    #[default]
    None,
    /// Groups of pages travel as lz4 blocks where that is shorter.
    Lz4,
}

/// Packs and unpacks groups of pages, with its own bounded buffers (256 KiB each).
#[derive(Debug, Default)]
pub struct Packer {
    pages: Vec<u8>,
    packed: Vec<u8>,
}

/// The most bytes that a group of pages has.
fn group_bytes_max() -> usize {
    usize::try_from(LZ4_PAGES_MAX).expect("a small number") * PAGE_BYTES
}

impl Packer {
    /// Adds a page to the group.
    ///
    /// # Panics
    /// If the group already has [`LZ4_PAGES_MAX`] pages.
    pub fn add(&mut self, page: &[u8; PAGE_BYTES]) {
        assert!(self.pages.len() < group_bytes_max(), "a group has at most {LZ4_PAGES_MAX} pages");
        self.pages.extend_from_slice(page);
    }

    /// How many pages the group has.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        u64::try_from(self.pages.len() / PAGE_BYTES).expect("usize fits u64")
    }

    /// The group's pages as they were added.
    #[must_use]
    pub fn pages(&self) -> &[u8] {
        &self.pages
    }

    /// Begins a new group.
    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// The group as an lz4 block, if that is shorter than the pages.
    pub fn pack(&mut self) -> Option<&[u8]> {
        self.packed.resize(block::get_maximum_output_size(self.pages.len()), 0);
        let packed_bytes = block::compress_into(&self.pages, &mut self.packed).ok()?;
        (packed_bytes < self.pages.len()).then(|| &self.packed[..packed_bytes])
    }

    /// Unpacks `packed` into the `page_count` pages that it must hold, and hands them out in order.
    ///
    /// # Errors
    /// A sentence, if the block is damaged or holds another number of bytes.
    ///
    /// # Panics
    /// If `page_count` is above [`LZ4_PAGES_MAX`]: the frame's decoder has checked it.
    pub fn unpack(
        &mut self,
        packed: &[u8],
        page_count: u64,
    ) -> Result<impl Iterator<Item = &[u8; PAGE_BYTES]>, String> {
        assert!(page_count <= LZ4_PAGES_MAX, "a group has at most {LZ4_PAGES_MAX} pages");
        let wanted = usize::try_from(page_count).expect("bounded above") * PAGE_BYTES;
        self.pages.resize(wanted, 0);
        let unpacked = block::decompress_into(packed, &mut self.pages).map_err(|error| error.to_string())?;
        if unpacked != wanted {
            return Err(format!("it holds {unpacked} bytes where {wanted} were announced"));
        }
        let (pages, _) = self.pages.as_chunks::<PAGE_BYTES>();
        Ok(pages.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn a_group_reads_back_and_noise_is_not_packed() {
        let mut packer = Packer::default();
        for fill in 0..64 {
            packer.add(&[fill; PAGE_BYTES]);
        }
        let packed = packer.pack().expect("such pages shrink").to_vec();
        assert!(packed.len() < 64 * PAGE_BYTES / 10);
        let mut other = Packer::default();
        let fills: Vec<u8> = other.unpack(&packed, 64).unwrap().map(|page| page[4095]).collect();
        assert_eq!(fills, (0..64).collect::<Vec<u8>>());
        assert!(other.unpack(&packed, 63).is_err(), "a block for 64 pages is none for 63");

        let mut state = 1u32;
        let noise: [u8; PAGE_BYTES] = std::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        });
        let mut packer = Packer::default();
        packer.add(&noise);
        assert_eq!(packer.pack(), None);
    }

    proptest! {
        #[test]
        fn no_block_makes_it_panic(block in proptest::collection::vec(any::<u8>(), 0..300), pages in 0u64..=64) {
            let _ = Packer::default().unpack(&block, pages).map(Iterator::count);
        }
    }
}
