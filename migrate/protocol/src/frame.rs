//! The data streams' framing: which pages of one chunk follow, and in what form.
//!
//! ```text
//!  0       1       2         4           8        16          80        84
//!  +-------+-------+---------+-----------+--------+-----------+---------+----------------+
//!  | 0xF7  | kind  | zero    | length    | chunk  | page mask | crc32c  | body (length)  |
//!  +-------+-------+---------+-----------+--------+-----------+---------+----------------+
//!    u8      u8      u16 LE    u32 LE      u64 LE   512 bits    u32 LE
//! ```
//!
//! A frame speaks of one chunk of 512 pages; bit `n` of the mask (eight u64 LE) is the chunk's page `n`.
//! The body has the pages in ascending order. The checksum covers the header only: the memory digest covers
//! the pages. A fence carries its number in the chunk field and says that everything sent before it on this
//! stream has been sent.
//!
//! A stream begins with a join:
//!
//! ```text
//!  0        4         6        8               24        28              60       64
//!  +--------+---------+--------+---------------+---------+---------------+--------+
//!  | "FRRJ" | version | stream | migration     | session | proof         | crc32c |
//!  +--------+---------+--------+---------------+---------+---------------+--------+
//!    bytes    u16 LE    u16 LE   16 bytes        u32 LE    32 bytes        u32 LE
//! ```
//!
//! The checksum covers what stands before it; [`crate::admission`] says what is proved.

use crate::admission::Proof;
use crate::bitmap::{CHUNK_PAGES, ChunkIndex, PageMask};
use crate::ident::MigrationId;
use crate::layout::PAGE_BYTES_U64;
use crate::wire::{VERSION_NEWEST, VERSION_OLDEST};

/// What every data stream begins with.
pub const DATA_MAGIC: [u8; 4] = *b"FRRJ";

/// What a data stream without a proof began with, in the first ferries. It is refused by name.
pub const UNPROVED_MAGIC: [u8; 4] = *b"FRRD";

/// Bytes of a stream's join.
pub const JOIN_BYTES: usize = 64;

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 84;

/// The most pages in one packed or delta frame, so that unpacking takes a bounded buffer (512 KiB).
pub const GROUP_PAGES_MAX: u64 = 128;

const FRAME_MARK: u8 = 0xF7;

/// Why bytes on a data stream are no frame. The stream can't be read any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a frame at all.
    #[error("a data stream lost its framing (a frame began with {0:#04x})")]
    Mark(u8),
    /// The header's checksum is wrong.
    #[error("a frame's header arrived damaged (its checksum is wrong)")]
    Checksum,
    /// A kind that this version does not have, or reserved bits that are not zero.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// A chunk or pages beyond the guest's memory, or no page at all.
    #[error("a frame names pages of chunk {chunk} that a guest with {page_count} pages does not have")]
    Pages {
        /// The chunk that was named.
        chunk: u64,
        /// How many pages the guest has.
        page_count: u64,
    },
    /// The body's length does not fit the kind and the number of pages.
    #[error("a frame of {pages} pages can't have a body of {body_bytes} bytes")]
    Length {
        /// How many pages the mask names.
        pages: u64,
        /// The body's length.
        body_bytes: u32,
    },
    /// A packed body does not unpack to the announced pages, or a delta does not fit them.
    #[error("the packed pages of chunk {chunk} can't be unpacked: {cause}")]
    Packed {
        /// The chunk they belong to.
        chunk: u64,
        /// What the decoder said.
        cause: String,
    },
    /// The join that opens a stream is not one.
    #[error("a connection is no data stream of this protocol: {0}")]
    Join(&'static str),
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Pages as they are; the body has 4096 bytes for each.
    Raw {
        /// Whose pages.
        chunk: ChunkIndex,
        /// Which pages.
        mask: PageMask,
    },
    /// Pages of zeroes; no body.
    Zero {
        /// Whose pages.
        chunk: ChunkIndex,
        /// Which pages.
        mask: PageMask,
    },
    /// Pages as one lz4 block of `body_bytes`; at most [`GROUP_PAGES_MAX`].
    Lz4 {
        /// Whose pages.
        chunk: ChunkIndex,
        /// Which pages.
        mask: PageMask,
        /// The block's length, less than the pages it holds.
        body_bytes: u32,
    },
    /// The same as one zstd frame.
    Zstd {
        /// Whose pages.
        chunk: ChunkIndex,
        /// Which pages.
        mask: PageMask,
        /// The frame's length, less than the pages it holds.
        body_bytes: u32,
    },
    /// The blocks that have changed in pages that were sent before; at most [`GROUP_PAGES_MAX`]. See
    /// [`crate::encode::delta`] for the body.
    Delta {
        /// Whose pages.
        chunk: ChunkIndex,
        /// Which pages.
        mask: PageMask,
        /// The body's length.
        body_bytes: u32,
    },
    /// Everything before it has been sent.
    Fence(
        /// Counted from 1 within a migration.
        u32,
    ),
}

const KIND_RAW: u8 = 1;
const KIND_ZERO: u8 = 2;
const KIND_LZ4: u8 = 3;
const KIND_FENCE: u8 = 4;
const KIND_ZSTD: u8 = 5;
const KIND_DELTA: u8 = 6;

impl Frame {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let (kind, body_bytes, chunk, mask) = match *self {
            Self::Raw { chunk, mask } => (KIND_RAW, raw_bytes(&mask), chunk.number(), mask),
            Self::Zero { chunk, mask } => (KIND_ZERO, 0, chunk.number(), mask),
            Self::Lz4 { chunk, mask, body_bytes } => (KIND_LZ4, body_bytes, chunk.number(), mask),
            Self::Zstd { chunk, mask, body_bytes } => (KIND_ZSTD, body_bytes, chunk.number(), mask),
            Self::Delta { chunk, mask, body_bytes } => (KIND_DELTA, body_bytes, chunk.number(), mask),
            Self::Fence(fence) => (KIND_FENCE, 0, u64::from(fence), PageMask::EMPTY),
        };
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[0] = FRAME_MARK;
        bytes[1] = kind;
        bytes[4..8].copy_from_slice(&body_bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&chunk.to_le_bytes());
        for (to, word) in bytes[16..80].chunks_exact_mut(8).zip(mask.0) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[..80]);
        bytes[80..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header that arrived for a guest of `page_count` pages. Any stream may carry any chunk, since no round begins
    /// before all streams have reached the fence of the last.
    ///
    /// # Errors
    /// [`FrameError`] for anything that this guest can't have.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES], page_count: u64) -> Result<Self, FrameError> {
        let (head, crc) = bytes.split_at(80);
        if head[0] != FRAME_MARK {
            return Err(FrameError::Mark(head[0]));
        }
        if crc32c::crc32c(head).to_le_bytes() != crc {
            return Err(FrameError::Checksum);
        }
        let body_bytes = u32::from_le_bytes(array(&head[4..8]));
        let number = u64::from_le_bytes(array(&head[8..16]));
        let mut mask = PageMask::EMPTY;
        for (word, from) in mask.0.iter_mut().zip(head[16..80].chunks_exact(8)) {
            *word = u64::from_le_bytes(array(from));
        }
        if head[1] == KIND_FENCE && head[2..4] == [0, 0] {
            let fence = u32::try_from(number).ok().filter(|_| mask.is_empty() && body_bytes == 0);
            return fence.map(Self::Fence).ok_or(FrameError::Length { pages: mask.count(), body_bytes });
        }
        let chunk = ChunkIndex::new(number, page_count)
            .filter(|chunk| mask.last().is_some_and(|last| chunk.first_page() + last < page_count))
            .ok_or(FrameError::Pages { chunk: number, page_count })?;
        let pages = mask.count();
        let length = FrameError::Length { pages, body_bytes };
        match (head[1], head[2], head[3]) {
            (KIND_RAW, 0, 0) if body_bytes == raw_bytes(&mask) => Ok(Self::Raw { chunk, mask }),
            (KIND_ZERO, 0, 0) if body_bytes == 0 => Ok(Self::Zero { chunk, mask }),
            (KIND_LZ4, 0, 0) if is_packed_length(pages, body_bytes) => {
                Ok(Self::Lz4 { chunk, mask, body_bytes })
            }
            (KIND_ZSTD, 0, 0) if is_packed_length(pages, body_bytes) => {
                Ok(Self::Zstd { chunk, mask, body_bytes })
            }
            (KIND_DELTA, 0, 0) if is_delta_length(pages, body_bytes) => {
                Ok(Self::Delta { chunk, mask, body_bytes })
            }
            (KIND_RAW | KIND_ZERO | KIND_LZ4 | KIND_ZSTD | KIND_DELTA, 0, 0) => Err(length),
            (kind, ..) => Err(FrameError::Kind(kind)),
        }
    }
}

fn raw_bytes(mask: &PageMask) -> u32 {
    u32::try_from(mask.count() * PAGE_BYTES_U64).expect("512 pages are 2 MiB")
}

/// Packed pages are shorter than the pages.
fn is_packed_length(pages: u64, body_bytes: u32) -> bool {
    (1..=GROUP_PAGES_MAX).contains(&pages) && (1..pages * PAGE_BYTES_U64).contains(&u64::from(body_bytes))
}

/// A delta has a word for each page and then whole blocks, at most the pages themselves.
fn is_delta_length(pages: u64, body_bytes: u32) -> bool {
    let (words, body) = (4 * pages, u64::from(body_bytes));
    (1..=GROUP_PAGES_MAX).contains(&pages) && (words..=words + pages * PAGE_BYTES_U64).contains(&body)
}

const _: () = assert!(CHUNK_PAGES == 512, "the mask has 512 bits");

/// What opens a data stream: which migration, which of its streams, and the proof that it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// The migration that the control connection announced.
    pub migration: MigrationId,
    /// The stream's number, not checked against the number of streams yet.
    pub stream: u16,
    /// Which of the migration's sets of streams it belongs to: 0, and after each interruption the number that
    /// [`crate::message::Resume`] has announced. A stream that was under way when the link broke is thereby known as late.
    pub session: u32,
    /// Made with the key that the target has given the source; not checked yet.
    pub proof: Proof,
}

impl Join {
    /// The join's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; JOIN_BYTES] {
        let mut bytes = [0; JOIN_BYTES];
        bytes[0..4].copy_from_slice(&DATA_MAGIC);
        bytes[4..6].copy_from_slice(&VERSION_NEWEST.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.stream.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.migration.0);
        bytes[24..28].copy_from_slice(&self.session.to_le_bytes());
        bytes[28..60].copy_from_slice(&self.proof.0);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a join.
    ///
    /// # Errors
    /// [`FrameError::Join`] says what is wrong with it.
    pub fn decode(bytes: &[u8; JOIN_BYTES]) -> Result<Self, FrameError> {
        if bytes[0..4] != DATA_MAGIC {
            return Err(FrameError::Join("it begins with other bytes"));
        }
        if crc32c::crc32c(&bytes[..60]).to_le_bytes() != bytes[60..] {
            return Err(FrameError::Join("its checksum is wrong"));
        }
        let version = u16::from_le_bytes(array(&bytes[4..6]));
        if !(VERSION_OLDEST..=VERSION_NEWEST).contains(&version) {
            return Err(FrameError::Join("it speaks another version"));
        }
        let stream = u16::from_le_bytes(array(&bytes[6..8]));
        let session = u32::from_le_bytes(array(&bytes[24..28]));
        let proof = Proof(array(&bytes[28..60]));
        Ok(Self { migration: MigrationId(array(&bytes[8..24])), stream, session, proof })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 2 * CHUNK_PAGES + 10;

    fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Frame, FrameError> {
        Frame::decode(bytes, PAGES)
    }

    fn mask(offsets: impl IntoIterator<Item = u64>) -> PageMask {
        let mut mask = PageMask::EMPTY;
        offsets.into_iter().for_each(|offset| mask.insert(offset));
        mask
    }

    fn chunk(index: u64) -> ChunkIndex {
        ChunkIndex::new(index, 100 * CHUNK_PAGES).unwrap()
    }

    #[test]
    fn every_kind_reads_back() {
        for frame in [
            Frame::Raw { chunk: chunk(0), mask: mask([0, 511]) },
            Frame::Zero { chunk: chunk(2), mask: mask(0..10) },
            Frame::Lz4 { chunk: chunk(0), mask: mask(3..67), body_bytes: 1000 },
            Frame::Zstd { chunk: chunk(0), mask: mask(3..131), body_bytes: 1000 },
            Frame::Delta { chunk: chunk(2), mask: mask(0..3), body_bytes: 12 + 128 },
            Frame::Fence(17),
        ] {
            assert_eq!(decode(&frame.encode()), Ok(frame));
        }
    }

    #[test]
    fn what_this_guest_can_not_have_is_refused() {
        let refused = |frame: Frame| decode(&frame.encode()).unwrap_err();
        let beyond = Frame::Zero { chunk: chunk(2), mask: mask([10]) };
        assert_eq!(refused(beyond), FrameError::Pages { chunk: 2, page_count: PAGES });
        let far = Frame::Raw { chunk: chunk(99), mask: mask([0]) };
        assert!(matches!(refused(far), FrameError::Pages { chunk: 99, .. }));
        let none = Frame::Raw { chunk: chunk(0), mask: PageMask::EMPTY };
        assert!(matches!(refused(none), FrameError::Pages { .. }));
        let many = Frame::Lz4 { chunk: chunk(0), mask: mask(0..129), body_bytes: 1000 };
        assert!(matches!(refused(many), FrameError::Length { pages: 129, .. }));
        let wordless = Frame::Delta { chunk: chunk(0), mask: mask(0..3), body_bytes: 11 };
        assert!(matches!(refused(wordless), FrameError::Length { pages: 3, .. }));
        let more = Frame::Delta { chunk: chunk(0), mask: mask([0]), body_bytes: 4101 };
        assert!(matches!(refused(more), FrameError::Length { pages: 1, .. }));
        let grown = Frame::Lz4 { chunk: chunk(0), mask: mask([1]), body_bytes: 4096 };
        assert!(matches!(refused(grown), FrameError::Length { .. }));
    }

    #[test]
    fn damage_is_found() {
        let good = Frame::Raw { chunk: chunk(0), mask: mask([5]) }.encode();
        for at in 1..FRAME_HEADER_BYTES {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert_eq!(decode(&bad), Err(FrameError::Checksum), "byte {at}");
        }
        let mut bad = good;
        bad[0] = 0;
        assert_eq!(decode(&bad), Err(FrameError::Mark(0)));
    }

    #[test]
    fn joins_read_back() {
        let join = Join { migration: MigrationId([3; 16]), stream: 5, session: 7, proof: Proof([8; 32]) };
        let bytes = join.encode();
        assert_eq!(Join::decode(&bytes), Ok(join));
        for at in 0..JOIN_BYTES {
            let mut bad = bytes;
            bad[at] ^= 1;
            assert!(Join::decode(&bad).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), FRAME_HEADER_BYTES)) {
            let _ = decode(bytes.as_slice().try_into().unwrap());
            // The same with a right checksum, so that the fields behind it are reached.
            bytes[0] = FRAME_MARK;
            bytes[1] %= 8;
            let crc = crc32c::crc32c(&bytes[..80]);
            bytes[80..].copy_from_slice(&crc.to_le_bytes());
            let _ = decode(bytes.as_slice().try_into().unwrap());
        }
    }
}
