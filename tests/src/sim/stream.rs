//! One data stream: a sender that goes through a round's pages group by group, and a receiver that writes them
//! into the target's memory. Frames are the real ones, encoded and decoded.
//!
//! As in the engine a page is looked at first (for its digest, for being zero, for packing) and, if it travels raw,
//! read again when it is written: the running guest may have written it in between.

use std::collections::VecDeque;

use ferry_protocol::digest::DigestTable;
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, FrameError};
use ferry_protocol::page::{Compression, Packer, is_zero};
use ferry_protocol::source::RoundSent;
use ferry_protocol::{
    ChunkIndex, MemoryDigest, PAGE_BYTES, PageBitmap, PageDigest, PageMask, PageRange, StreamIndex,
};

use super::fault::{Fate, Injection, Round};
use super::memory::{Memory, Page};

/// A piece of a round.
#[derive(Debug)]
enum Piece {
    /// Up to 64 pages of a chunk.
    Group(ChunkIndex, PageMask),
    /// Those of the chunk's groups before that were found to be zero.
    Zeroes(ChunkIndex),
    Fence(u32),
}

/// A piece that has been looked at and is to be written next.
#[derive(Debug)]
enum Looked {
    Raw(ChunkIndex, PageMask),
    /// Whole frames.
    Bytes(Vec<u8>),
    Fence(u32),
}

/// The source's end.
#[derive(Debug)]
pub(super) struct Sender {
    stream: StreamIndex,
    streams: u16,
    compression: Compression,
    digests: DigestTable,
    packer: Packer,
    pieces: VecDeque<Piece>,
    zeroes: PageMask,
    looked: Option<Looked>,
    sent: RoundSent,
}

/// What a sender has written.
#[derive(Debug)]
pub(super) struct Written {
    /// Goes onto the link; may be empty.
    pub(super) bytes: Vec<u8>,
    /// The round, if that was its end.
    pub(super) sent: Option<RoundSent>,
}

impl Sender {
    pub(super) fn new(stream: StreamIndex, streams: u16, compression: Compression, page_count: u64) -> Self {
        Self {
            stream,
            streams,
            compression,
            digests: DigestTable::new(slot(page_count)),
            packer: Packer::default(),
            pieces: VecDeque::new(),
            zeroes: PageMask::EMPTY,
            looked: None,
            sent: RoundSent::default(),
        }
    }

    /// Begins a round.
    pub(super) fn begin(&mut self, pages: &PageBitmap, fence: u32) {
        assert!(self.pieces.is_empty() && self.looked.is_none(), "rounds follow each other");
        self.sent = RoundSent::default();
        for (chunk, mask) in pages.chunks().filter(|(chunk, _)| chunk.stream(self.streams) == self.stream) {
            for (index, word) in mask.0.into_iter().enumerate().filter(|(_, word)| *word != 0) {
                let mut group = PageMask::EMPTY;
                group.0[index] = word;
                self.pieces.push_back(Piece::Group(chunk, group));
            }
            self.pieces.push_back(Piece::Zeroes(chunk));
        }
        self.pieces.push_back(Piece::Fence(fence));
    }

    /// Looks at the next piece.
    pub(super) fn look(&mut self, memory: &Memory) {
        let looked = match self.pieces.pop_front().expect("a sender looks while there is something left") {
            Piece::Group(chunk, group) => self.look_at(chunk, group, memory),
            Piece::Zeroes(chunk) => {
                let mask = std::mem::take(&mut self.zeroes);
                self.sent.zero_pages += mask.count();
                let frame = (!mask.is_empty()).then(|| Frame::Zero { chunk, mask }.encode().to_vec());
                Looked::Bytes(frame.unwrap_or_default())
            }
            Piece::Fence(fence) => Looked::Fence(fence),
        };
        assert!(self.looked.replace(looked).is_none(), "what was looked at is written first");
    }

    fn look_at(&mut self, chunk: ChunkIndex, mut group: PageMask, memory: &Memory) -> Looked {
        self.packer.clear();
        for page in pages_of(chunk, &group) {
            let bytes = memory.page(page);
            self.digests.set(slot(page), PageDigest::of(page, bytes));
            if is_zero(bytes) {
                self.zeroes.insert(page - chunk.first_page());
            } else {
                self.packer.add(bytes);
            }
        }
        for (word, zero) in group.0.iter_mut().zip(self.zeroes.0) {
            *word &= !zero;
        }
        if self.compression == Compression::Lz4
            && !group.is_empty()
            && let Some(packed) = self.packer.pack()
        {
            self.sent.packed_pages += group.count();
            let body_bytes = u32::try_from(packed.len()).expect("at most 256 KiB");
            let header = Frame::Lz4 { chunk, mask: group, body_bytes }.encode();
            return Looked::Bytes([&header, packed].concat());
        }
        Looked::Raw(chunk, group)
    }

    /// Writes what was looked at.
    pub(super) fn write(&mut self, memory: &Memory) -> Written {
        let bytes = match self.looked.take().expect("looked at before") {
            Looked::Raw(_, mask) if mask.is_empty() => Vec::new(),
            Looked::Raw(chunk, mask) => {
                self.sent.raw_pages += mask.count();
                let mut bytes = Frame::Raw { chunk, mask }.encode().to_vec();
                pages_of(chunk, &mask).for_each(|page| bytes.extend_from_slice(memory.page(page)));
                bytes
            }
            Looked::Bytes(bytes) => bytes,
            Looked::Fence(fence) => {
                let bytes = Frame::Fence(fence).encode().to_vec();
                self.sent.wire_bytes += u64::try_from(bytes.len()).expect("usize fits u64");
                self.sent.digest = self.digests.sum();
                return Written { bytes, sent: Some(self.sent) };
            }
        };
        self.sent.wire_bytes += u64::try_from(bytes.len()).expect("usize fits u64");
        Written { bytes, sent: None }
    }
}

/// The target's end.
#[derive(Debug)]
pub(super) struct Receiver {
    stream: StreamIndex,
    streams: u16,
    digests: DigestTable,
    packer: Packer,
}

impl Receiver {
    pub(super) fn new(stream: StreamIndex, streams: u16, page_count: u64) -> Self {
        Self { stream, streams, digests: DigestTable::new(slot(page_count)), packer: Packer::default() }
    }

    /// Takes in one frame; the fence's number and the digest, if it was one.
    pub(super) fn receive(
        &mut self,
        bytes: &[u8],
        memory: &mut Memory,
        round: Round,
        injection: &mut Injection,
    ) -> Result<Option<(u32, MemoryDigest)>, FrameError> {
        let (header, body) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().expect("a whole frame");
        let mut packer = std::mem::take(&mut self.packer);
        match Frame::decode(header, memory.page_count(), self.stream, self.streams)? {
            Frame::Raw { chunk, mask } => {
                let (pages, _) = body.as_chunks::<PAGE_BYTES>();
                for (page, bytes) in pages_of(chunk, &mask).zip(pages) {
                    self.place(page, bytes, memory, round, injection);
                }
            }
            Frame::Zero { chunk, mask } => {
                for page in pages_of(chunk, &mask) {
                    self.place(page, &[0; PAGE_BYTES], memory, round, injection);
                }
            }
            Frame::Lz4 { chunk, mask, .. } => {
                let pages = packer
                    .unpack(body, mask.count())
                    .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
                for (page, bytes) in pages_of(chunk, &mask).zip(pages) {
                    self.place(page, bytes, memory, round, injection);
                }
            }
            Frame::Fence(fence) => return Ok(Some((fence, self.digests.sum()))),
        }
        self.packer = packer;
        Ok(None)
    }

    /// Writes a page and takes its digest from where it now lies, not from the buffer that it came in.
    fn place(
        &mut self,
        page: u64,
        bytes: &Page,
        memory: &mut Memory,
        round: Round,
        injection: &mut Injection,
    ) {
        let old = *memory.page(page);
        match injection.fate(round, page, memory.page_count(), &old, bytes) {
            Fate::Kept => *memory.page_mut(page) = *bytes,
            Fate::Dropped => return,
            Fate::Misplaced(neighbour) => *memory.page_mut(neighbour) = *bytes,
            Fate::Corrupt(at) => {
                *memory.page_mut(page) = *bytes;
                memory.page_mut(page)[at] ^= 1;
            }
            Fate::Stale => *memory.page_mut(page) = old,
        }
        self.digests.set(slot(page), PageDigest::of(page, memory.page(page)));
    }
}

fn pages_of(chunk: ChunkIndex, mask: &PageMask) -> impl Iterator<Item = u64> + use<> {
    chunk.ranges(mask).flat_map(|range: PageRange| range.first()..range.first() + range.count())
}

fn slot(page: u64) -> usize {
    usize::try_from(page).expect("a small guest")
}
