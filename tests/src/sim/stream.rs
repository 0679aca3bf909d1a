//! One data stream: a sender that goes through a round's pages group by group, and a receiver that writes them
//! into the target's memory. Frames are the real ones, encoded and decoded.
//!
//! As in the engine a page is looked at first (for its digest, for being zero, for packing) and, if it travels raw,
//! read again when it is written: the running guest may have written it in between.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ferry_protocol::digest::ChunkDigests;
use ferry_protocol::encode::pack::{Method, Packed, Unpacker};
use ferry_protocol::encode::{self, Encoded, Encoder, SentChunk, SignatureBudget, Way, delta};
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, FrameError};
use ferry_protocol::page::Compression;
use ferry_protocol::source::RoundSent;
use ferry_protocol::{
    CHUNK_PAGES, ChunkIndex, MemoryDigest, PAGE_BYTES, PageBitmap, PageDigest, PageMask, PageRange,
    StreamIndex,
};

use super::fault::{Fate, Injection, Round};
use super::memory::{Memory, Page};

/// A piece of a round.
#[derive(Debug)]
enum Piece {
    /// Up to 64 pages of a chunk.
    Group(ChunkIndex, PageMask),
    Fence(u32),
}

/// A piece that has been looked at and is to be written next.
#[derive(Debug)]
enum Looked {
    Lent(ChunkIndex, PageMask),
    /// Whole frames.
    Bytes(Vec<u8>),
    Fence(u32),
}

/// Signatures that a simulated source may hold: fewer than its guest has pages, so that some pages have none.
const SIGNATURES: u64 = 40;

/// The source's end.
#[derive(Debug)]
pub(super) struct Sender {
    stream: StreamIndex,
    streams: u16,
    compression: Compression,
    encoder: Encoder,
    sent_chunks: BTreeMap<ChunkIndex, SentChunk>,
    budget: Arc<SignatureBudget>,
    digest: MemoryDigest,
    pieces: VecDeque<Piece>,
    looked: Vec<Looked>,
    /// Whether the pages of this round have been sent before.
    again: bool,
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
    pub(super) fn new(stream: StreamIndex, streams: u16, compression: Compression) -> Self {
        Self {
            stream,
            streams,
            compression,
            encoder: Encoder::default(),
            sent_chunks: BTreeMap::new(),
            budget: SignatureBudget::new(SIGNATURES * delta::Signature::BYTES),
            digest: MemoryDigest::ZERO,
            pieces: VecDeque::new(),
            looked: Vec::new(),
            again: false,
            sent: RoundSent::default(),
        }
    }

    /// Goes on with another stream: what was under way is gone, and the sum is that of all pages as last sent.
    pub(super) fn reopen(&mut self) {
        self.pieces.clear();
        self.looked.clear();
        let digests = self.sent_chunks.values().map(SentChunk::digest);
        self.digest = digests.fold(MemoryDigest::ZERO, MemoryDigest::combine);
    }

    /// Nothing is known any more of what the target has of these pages.
    pub(super) fn forget(&mut self, lacking: &PageBitmap) {
        for (chunk, mask) in lacking.chunks() {
            if let Some(sent) = self.sent_chunks.get_mut(&chunk) {
                sent.forget_pages(&mask);
            }
        }
    }

    /// Begins a round.
    pub(super) fn begin(&mut self, pages: &PageBitmap, fence: u32, first: bool) {
        assert!(self.pieces.is_empty() && self.looked.is_empty(), "rounds follow each other");
        self.sent = RoundSent::default();
        self.again = !first;
        for (chunk, mask) in pages.chunks().filter(|(chunk, _)| chunk.stream(self.streams) == self.stream) {
            for (index, word) in mask.0.into_iter().enumerate().filter(|(_, word)| *word != 0) {
                let mut group = PageMask::EMPTY;
                group.0[index] = word;
                self.pieces.push_back(Piece::Group(chunk, group));
            }
        }
        self.pieces.push_back(Piece::Fence(fence));
    }

    /// Looks at the next piece.
    pub(super) fn look(&mut self, memory: &Memory) {
        assert!(self.looked.is_empty(), "what was looked at is written first");
        match self.pieces.pop_front().expect("a sender looks while there is something left") {
            Piece::Group(chunk, group) => self.look_at(chunk, group, memory),
            Piece::Fence(fence) => self.looked.push(Looked::Fence(fence)),
        }
    }

    fn look_at(&mut self, chunk: ChunkIndex, group: PageMask, memory: &Memory) {
        let method = match self.compression {
            Compression::None => Method::None,
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd(level) => Method::Zstd(level),
            // The real controller goes by time; here groups take turns.
            Compression::Auto => [Method::None, Method::Lz4, Method::Zstd(1)][self.pieces.len() % 3],
        };
        // Odd chunks are lent in the first round, even ones are remembered from it on.
        let way = Way { method, remember: self.again || chunk.number().is_multiple_of(2), verify: true };
        let read = |range: PageRange, visit: &mut dyn FnMut(u64, &Page)| {
            (range.first()..range.first() + range.count()).for_each(|page| visit(page, memory.page(page)));
        };
        let Self { sent_chunks, budget, looked, .. } = self;
        let sent = sent_chunks.entry(chunk).or_insert_with(|| SentChunk::new(Arc::clone(budget)));
        let encoded = self.encoder.encode_into((chunk, &group), way, sent, &read, &mut |piece| {
            looked.push(match piece {
                encode::Piece::Lent(chunk, mask) => Looked::Lent(chunk, mask),
                encode::Piece::Bytes(bytes) => Looked::Bytes(bytes.to_vec()),
            });
        });
        let Encoded { raw_pages, zero_pages, packed_pages, delta_pages, unchanged_pages, digest, .. } =
            encoded;
        self.sent.raw_pages += raw_pages;
        self.sent.zero_pages += zero_pages;
        self.sent.packed_pages += packed_pages;
        self.sent.delta_pages += delta_pages;
        self.sent.unchanged_pages += unchanged_pages;
        self.digest = self.digest.combine(digest);
    }

    /// Writes what was looked at.
    pub(super) fn write(&mut self, memory: &Memory) -> Written {
        let mut written = Written { bytes: Vec::new(), sent: None };
        for looked in std::mem::take(&mut self.looked) {
            match looked {
                Looked::Lent(chunk, mask) => {
                    written.bytes.extend_from_slice(&Frame::Raw { chunk, mask }.encode());
                    pages_of(chunk, &mask)
                        .for_each(|page| written.bytes.extend_from_slice(memory.page(page)));
                }
                Looked::Bytes(bytes) => written.bytes.extend_from_slice(&bytes),
                Looked::Fence(fence) => {
                    written.bytes.extend_from_slice(&Frame::Fence(fence).encode());
                    self.sent.digest = self.digest;
                    written.sent = Some(self.sent);
                }
            }
        }
        self.sent.wire_bytes += u64::try_from(written.bytes.len()).expect("usize fits u64");
        if let Some(sent) = &mut written.sent {
            sent.wire_bytes = self.sent.wire_bytes;
        }
        written
    }
}

/// The target's end.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Fences that have come on this stream.
    fences: u32,
    /// Behind how many fences each page came last.
    arrived: BTreeMap<u64, u32>,
    digests: BTreeMap<u64, ChunkDigests>,
    digest: MemoryDigest,
    unpacker: Unpacker,
}

impl Receiver {
    pub(super) fn new() -> Self {
        let (digests, digest) = (BTreeMap::new(), MemoryDigest::ZERO);
        let (fences, arrived) = (0, BTreeMap::new());
        Self { fences, arrived, digests, digest, unpacker: Unpacker::default() }
    }

    /// Goes on with another stream.
    pub(super) fn reopen(&mut self) {
        self.fences = 0;
        self.arrived.clear();
    }

    pub(super) const fn fences(&self) -> u32 {
        self.fences
    }

    pub(super) const fn digest(&self) -> MemoryDigest {
        self.digest
    }

    /// The pages that have come behind so many fences.
    pub(super) fn arrived(&self, fences: u32) -> impl Iterator<Item = u64> {
        self.arrived.iter().filter(move |(_, behind)| **behind == fences).map(|(page, _)| *page)
    }

    /// The first page that these frames name.
    pub(super) fn first_page(bytes: &[u8], page_count: u64) -> Option<u64> {
        match Frame::decode(bytes.first_chunk::<FRAME_HEADER_BYTES>()?, page_count).ok()? {
            Frame::Raw { chunk, mask }
            | Frame::Zero { chunk, mask }
            | Frame::Lz4 { chunk, mask, .. }
            | Frame::Zstd { chunk, mask, .. }
            | Frame::Delta { chunk, mask, .. } => pages_of(chunk, &mask).next(),
            Frame::Fence(_) => None,
        }
    }

    /// The connection breaks in the middle of these frames: of a raw page half is written, and nobody knows of it.
    pub(super) fn tear(bytes: &[u8], memory: &mut Memory) {
        let Some((header, body)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else { return };
        if let Ok(Frame::Raw { chunk, mask }) = Frame::decode(header, memory.page_count())
            && let Some(page) = pages_of(chunk, &mask).next()
        {
            memory.page_mut(page)[..PAGE_BYTES / 2].copy_from_slice(&body[..PAGE_BYTES / 2]);
        }
    }

    /// Takes in whole frames; the fence's number and the digest, if the last was one.
    pub(super) fn receive(
        &mut self,
        mut bytes: &[u8],
        memory: &mut Memory,
        round: Round,
        injection: &mut Injection,
    ) -> Result<Option<(u32, MemoryDigest)>, FrameError> {
        let mut fence = None;
        while let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() {
            let body_bytes = u32::from_le_bytes(header[4..8].try_into().expect("four bytes"));
            let (body, rest) = rest.split_at(usize::try_from(body_bytes).expect("u32 fits usize"));
            fence = self.receive_frame(header, body, memory, round, injection)?;
            bytes = rest;
        }
        Ok(fence)
    }

    fn receive_frame(
        &mut self,
        header: &[u8; FRAME_HEADER_BYTES],
        body: &[u8],
        memory: &mut Memory,
        round: Round,
        injection: &mut Injection,
    ) -> Result<Option<(u32, MemoryDigest)>, FrameError> {
        let mut unpacker = std::mem::take(&mut self.unpacker);
        match Frame::decode(header, memory.page_count())? {
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
            frame @ (Frame::Lz4 { chunk, mask, .. } | Frame::Zstd { chunk, mask, .. }) => {
                let how = if matches!(frame, Frame::Zstd { .. }) { Packed::Zstd } else { Packed::Lz4 };
                let pages = unpacker
                    .unpack(body, how, mask.count())
                    .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
                for (page, bytes) in pages_of(chunk, &mask).zip(pages) {
                    self.place(page, bytes, memory, round, injection);
                }
            }
            Frame::Delta { chunk, mask, .. } => {
                let mut pages: Vec<(u64, Page)> =
                    pages_of(chunk, &mask).map(|page| (page, *memory.page(page))).collect();
                let changes = delta::changes(body, mask.count())
                    .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
                for change in changes {
                    let to = &mut pages[change.nth_page].1[change.at..change.at + change.bytes.len()];
                    to.copy_from_slice(change.bytes);
                }
                for (page, bytes) in pages {
                    self.place(page, &bytes, memory, round, injection);
                }
            }
            Frame::Fence(fence) => {
                self.unpacker = unpacker;
                self.fences += 1;
                return Ok(Some((fence, self.digest)));
            }
        }
        self.unpacker = unpacker;
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
        self.arrived.insert(page, self.fences);
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
        let digests = self.digests.entry(page / CHUNK_PAGES).or_default();
        let change = digests.set(page % CHUNK_PAGES, PageDigest::of(page, memory.page(page)));
        self.digest = self.digest.combine(change);
    }
}

fn pages_of(chunk: ChunkIndex, mask: &PageMask) -> impl Iterator<Item = u64> + use<> {
    chunk.ranges(mask).flat_map(|range: PageRange| range.first()..range.first() + range.count())
}
