//! Deltas: of a page that was sent before, only the blocks that have changed.
//!
//! The body of a delta frame has, for each page in ascending order, which of its 32 blocks follow (u32 LE, bit `n` is
//! the block at byte `128 n`); after these words come the blocks themselves, in the same order.
//!
//! ```text
//!  +----------+----------+-----+---------------+---------------+-----+
//!  | blocks   | blocks   | ... | block         | block         | ... |
//!  | of page 1| of page 2|     | of page 1     | of page 1 or 2|     |
//!  +----------+----------+-----+---------------+---------------+-----+
//!    u32 LE     u32 LE           128 bytes       128 bytes
//! ```
//!
//! The source does not keep the pages that it sent but a [`Signature`] of each: 64 bits of xxh3 for each block. That is a
//! sixteenth of the memory that the pages would take, so that the pages which a guest dirties again and again fit where
//! a cache of pages would not; a delta is up to a block larger than the bytes that changed. A changed block whose hash is
//! the old one would be missed, once in 2^64 changes; the memory digest then finds it before the guest resumes.

use twox_hash::XxHash3_64;

use crate::bitmap::{ChunkIndex, PageMask};
use crate::frame::{FRAME_HEADER_BYTES, Frame};
use crate::layout::PAGE_BYTES;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 128;

/// Blocks of a page.
pub const PAGE_BLOCKS: usize = PAGE_BYTES / BLOCK_BYTES;

/// With more blocks changed than this a page travels whole.
pub const DELTA_BLOCKS_MAX: u32 = 24;

/// What is remembered of a page that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signature([u64; PAGE_BLOCKS]);

impl Signature {
    /// Bytes that one takes.
    pub const BYTES: u64 = 8 * PAGE_BLOCKS as u64;

    /// The signature of a page.
    #[must_use]
    pub fn of(page: &[u8; PAGE_BYTES]) -> Self {
        let (blocks, _) = page.as_chunks::<BLOCK_BYTES>();
        let mut hashes = [0; PAGE_BLOCKS];
        for (hash, block) in hashes.iter_mut().zip(blocks) {
            *hash = XxHash3_64::oneshot(block);
        }
        Self(hashes)
    }

    /// Which blocks of a page with signature `new` are not those of this one: bit `n` is block `n`.
    #[must_use]
    pub fn differing(&self, new: &Self) -> u32 {
        let differ = self.0.iter().zip(&new.0).map(|(old, new)| u32::from(old != new));
        differ.enumerate().fold(0, |mask, (block, differs)| mask | differs << block)
    }
}

/// Collects the deltas of a group.
#[derive(Debug, Default)]
pub(super) struct Builder {
    masks: Vec<u8>,
    blocks: Vec<u8>,
    frame: Vec<u8>,
}

impl Builder {
    pub(super) fn clear(&mut self) {
        self.masks.clear();
        self.blocks.clear();
    }

    pub(super) fn add(&mut self, page: &[u8; PAGE_BYTES], changed: u32) {
        self.masks.extend_from_slice(&changed.to_le_bytes());
        for (_, block) in blocks_of(changed).zip(select(page, changed)) {
            self.blocks.extend_from_slice(block);
        }
    }

    pub(super) fn frame(&mut self, chunk: ChunkIndex, mask: PageMask) -> &[u8] {
        let body_bytes = u32::try_from(self.masks.len() + self.blocks.len()).expect("a group is small");
        self.frame.clear();
        self.frame.reserve(FRAME_HEADER_BYTES + self.masks.len() + self.blocks.len());
        self.frame.extend_from_slice(&Frame::Delta { chunk, mask, body_bytes }.encode());
        self.frame.extend_from_slice(&self.masks);
        self.frame.extend_from_slice(&self.blocks);
        &self.frame
    }
}

fn select(page: &[u8; PAGE_BYTES], changed: u32) -> impl Iterator<Item = &[u8; BLOCK_BYTES]> {
    let (blocks, _) = page.as_chunks::<BLOCK_BYTES>();
    blocks_of(changed).map(|block| &blocks[block])
}

fn blocks_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..PAGE_BLOCKS).filter(move |block| mask >> block & 1 == 1)
}

/// A block that has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<'a> {
    /// The page's place among those that the frame names.
    pub nth_page: usize,
    /// Where in the page, in bytes.
    pub at: usize,
    /// The new bytes.
    pub bytes: &'a [u8; BLOCK_BYTES],
}

/// Takes the body of a delta frame of `page_count` pages apart.
///
/// # Errors
/// A sentence, if the body's length does not fit the blocks that it names. Nothing may be applied then.
pub fn changes(body: &[u8], page_count: u64) -> Result<impl Iterator<Item = Change<'_>>, String> {
    let pages = usize::try_from(page_count).map_err(|_| "too many pages".to_owned())?;
    let Some((masks, blocks)) = body.split_at_checked(4 * pages) else {
        return Err(format!("{} bytes are too few for {page_count} pages", body.len()));
    };
    let (masks, _) = masks.as_chunks::<4>();
    let named: u64 = masks.iter().map(|mask| u64::from(u32::from_le_bytes(*mask).count_ones())).sum();
    let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
    if !rest.is_empty() || u64::try_from(blocks.len()).ok() != Some(named) {
        return Err(format!("it names {named} blocks and holds {}", blocks.len()));
    }
    let places = masks.iter().enumerate().flat_map(|(nth_page, mask)| {
        blocks_of(u32::from_le_bytes(*mask)).map(move |block| (nth_page, block * BLOCK_BYTES))
    });
    Ok(places.zip(blocks).map(|((nth_page, at), bytes)| Change { nth_page, at, bytes }))
}
