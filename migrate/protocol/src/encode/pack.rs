//! Packing: a group of up to 128 pages as one lz4 block or one zstd frame, so that compression sees more than a page.

use lz4_flex::block;
use zstd::bulk::{Compressor, Decompressor};

use crate::bitmap::{ChunkIndex, PageMask};
use crate::frame::{FRAME_HEADER_BYTES, Frame, GROUP_PAGES_MAX};
use crate::layout::PAGE_BYTES;

/// The highest zstd level that is worth its time on any link that pages travel on.
pub const ZSTD_LEVEL_MAX: u8 = 9;

/// What full pages are packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// Nothing.
    #[default]
    None,
    /// lz4 blocks.
    Lz4,
    /// zstd frames of this level, 1 to [`ZSTD_LEVEL_MAX`].
    Zstd(u8),
}

/// The most bytes of pages that a group has: 512 KiB.
fn group_bytes_max() -> usize {
    usize::try_from(GROUP_PAGES_MAX).expect("a small number") * PAGE_BYTES
}

/// Packs groups of pages, with its own bounded buffers (512 KiB each).
#[derive(Default)]
pub struct Packer {
    pages: Vec<u8>,
    /// A frame: room for its header, then what the pages were packed to.
    frame: Vec<u8>,
    method: Method,
    zstd: Option<(u8, Compressor<'static>)>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl Packer {
    /// Adds a page to the group.
    ///
    /// # Panics
    /// If the group already has [`GROUP_PAGES_MAX`] pages.
    pub fn add(&mut self, page: &[u8; PAGE_BYTES]) {
        assert!(self.pages.len() < group_bytes_max(), "a group has at most {GROUP_PAGES_MAX} pages");
        self.pages.extend_from_slice(page);
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

    /// The packed group, if that is shorter than its pages by a twentieth at least.
    pub fn pack(&mut self, method: Method) -> Option<&[u8]> {
        self.method = method;
        // Not a byte more than what is of use: packing stops early where pages do not shrink.
        let most = self.pages.len() - self.pages.len() / 20;
        let packed_bytes = match method {
            Method::None => None,
            Method::Lz4 => {
                let bound = block::get_maximum_output_size(self.pages.len());
                self.frame.resize(FRAME_HEADER_BYTES + bound, 0);
                block::compress_into(&self.pages, &mut self.frame[FRAME_HEADER_BYTES..]).ok()
            }
            Method::Zstd(level) => {
                self.frame.resize(FRAME_HEADER_BYTES + most, 0);
                let compressor = match &mut self.zstd {
                    Some((at, compressor)) if *at == level => compressor,
                    zstd => {
                        let new = Compressor::new(i32::from(level)).expect("zstd has every level from 1 on");
                        &mut zstd.insert((level, new)).1
                    }
                };
                compressor.compress_to_buffer(&self.pages, &mut self.frame[FRAME_HEADER_BYTES..]).ok()
            }
        };
        let packed_bytes = packed_bytes.filter(|bytes| *bytes <= most)?;
        self.frame.truncate(FRAME_HEADER_BYTES + packed_bytes);
        Some(&self.frame[FRAME_HEADER_BYTES..])
    }

    /// The whole frame of the group that was packed last.
    pub(super) fn frame(&mut self, chunk: ChunkIndex, mask: PageMask) -> &[u8] {
        let body_bytes = u32::try_from(self.frame.len() - FRAME_HEADER_BYTES).expect("a group is small");
        let frame = match self.method {
            Method::Zstd(_) => Frame::Zstd { chunk, mask, body_bytes },
            Method::Lz4 | Method::None => Frame::Lz4 { chunk, mask, body_bytes },
        };
        self.frame[..FRAME_HEADER_BYTES].copy_from_slice(&frame.encode());
        &self.frame
    }
}

/// What a group was packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// An lz4 block.
    Lz4,
    /// A zstd frame.
    Zstd,
}

/// Unpacks groups of pages, with a bounded buffer (512 KiB).
#[derive(Default)]
pub struct Unpacker {
    pages: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl Unpacker {
    /// Unpacks `packed` into the `page_count` pages that it must hold, and hands them out in order.
    ///
    /// # Errors
    /// A sentence, if the block is damaged or holds another number of bytes.
    ///
    /// # Panics
    /// If `page_count` is above [`GROUP_PAGES_MAX`]: the frame's decoder has checked it.
    pub fn unpack(
        &mut self,
        packed: &[u8],
        how: Packed,
        page_count: u64,
    ) -> Result<impl Iterator<Item = &[u8; PAGE_BYTES]>, String> {
        assert!(page_count <= GROUP_PAGES_MAX, "a group has at most {GROUP_PAGES_MAX} pages");
        let wanted = usize::try_from(page_count).expect("bounded above") * PAGE_BYTES;
        self.pages.resize(wanted, 0);
        let unpacked = match how {
            Packed::Lz4 => {
                block::decompress_into(packed, &mut self.pages).map_err(|error| error.to_string())?
            }
            Packed::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Decompressor::new().map_err(|error| error.to_string())?),
                };
                zstd.decompress_to_buffer(packed, &mut self.pages[..]).map_err(|error| error.to_string())?
            }
        };
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
    fn a_group_reads_back_and_noise_is_not_packed() {
        for (method, how) in
            [(Method::Lz4, Packed::Lz4), (Method::Zstd(1), Packed::Zstd), (Method::Zstd(3), Packed::Zstd)]
        {
            let mut packer = Packer::default();
            for fill in 0..128 {
                packer.add(&[fill; PAGE_BYTES]);
            }
            let packed = packer.pack(method).expect("such pages shrink").to_vec();
            assert!(packed.len() < 128 * PAGE_BYTES / 10);
            let mut other = Unpacker::default();
            let fills: Vec<u8> = other.unpack(&packed, how, 128).unwrap().map(|page| page[4095]).collect();
            assert_eq!(fills, (0..128).collect::<Vec<u8>>());
            assert!(other.unpack(&packed, how, 127).is_err(), "a block for 128 pages is none for 127");

            let mut state = 1u32;
            let noise: [u8; PAGE_BYTES] = std::array::from_fn(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_le_bytes()[3]
            });
            let mut packer = Packer::default();
            packer.add(&noise);
            assert_eq!(packer.pack(method), None);
        }
    }

    proptest! {
        #[test]
        fn no_block_makes_it_panic(
            block in proptest::collection::vec(any::<u8>(), 0..300),
            pages in 0u64..=128,
            zstd: bool,
        ) {
            let how = if zstd { Packed::Zstd } else { Packed::Lz4 };
            let mut block = block;
            if zstd {
                // The magic of a frame, so that what is behind it is reached.
                block.splice(0..0, 0xFD2F_B528_u32.to_le_bytes());
            }
            let _ = Unpacker::default().unpack(&block, how, pages).map(Iterator::count);
        }
    }
}
