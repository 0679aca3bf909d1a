//! Receiving: each stream's thread reads frames and writes their pages into guest memory.
//!
//! Everything the peer names has been checked by [`Frame::decode`] before it is used; a thread holds at most one
//! packed group (512 KiB) besides guest memory.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_protocol::bitmap::CHUNK_PAGES;
use ferry_protocol::digest::ChunkDigests;
use ferry_protocol::encode::delta;
use ferry_protocol::encode::pack::{Packed, Unpacker};
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, FrameError};
use ferry_protocol::message::AbortCode;
use ferry_protocol::{ChunkIndex, MemoryDigest, PageBitmap, PageDigest, PageMask, PageRange};

use crate::fault::{self, Step, TargetStep};
use crate::ports::GuestPages;
use crate::transport::data::DataReader;

/// What a receiving stream reports.
#[derive(Debug)]
pub(crate) enum StreamEvent {
    Fence { fence: u32, digest: MemoryDigest },
    Failed(StreamError),
}

/// Why a receiving stream ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
}

impl StreamError {
    /// Whether the peer broke the protocol or only the connection.
    pub(crate) const fn code(&self) -> AbortCode {
        match self {
            Self::Io(_) => AbortCode::Internal,
            Self::Frame(_) => AbortCode::Protocol,
        }
    }
}

/// How a stream takes part in what is received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Whether digests are taken.
    pub(crate) verify: bool,
    /// The number of the set of streams that it belongs to.
    pub(crate) session: u32,
    /// The digest that its own sum begins with.
    pub(crate) digest: MemoryDigest,
}

/// Reads frames until the stream ends, which it always does with [`StreamEvent::Failed`]; how many fences came.
pub(crate) fn receive_stream(
    reader: DataReader,
    pages: Arc<dyn GuestPages>,
    received: Arc<ReceivedMemory>,
    Part { verify, session, digest }: Part,
    report: &dyn Fn(StreamEvent),
) -> u32 {
    let page_count = pages.layout().page_count();
    let mut receiver = Receiver {
        reader,
        pages,
        page_count,
        verify,
        received,
        digest,
        round: Round { session, fences: 0 },
        unpacker: Unpacker::default(),
        body: Vec::new(),
    };
    loop {
        match receiver.next_frame() {
            Ok(None) => {}
            Ok(Some(fence)) => {
                receiver.round.fences += 1;
                report(StreamEvent::Fence { fence, digest: receiver.digest });
            }
            Err(error) => {
                report(StreamEvent::Failed(error));
                return receiver.round.fences;
            }
        }
    }
}

/// What arrived of a guest's memory, shared by all streams: a chunk may come by another one in the next round.
#[derive(Debug)]
pub(crate) struct ReceivedMemory {
    chunks: Vec<Mutex<ReceivedChunk>>,
}

impl ReceivedMemory {
    pub(crate) fn new(page_count: u64) -> Self {
        Self { chunks: (0..page_count.div_ceil(CHUNK_PAGES)).map(|_| Mutex::default()).collect() }
    }

    /// The pages that have arrived as a whole in the round behind so many fences of the set of streams with this number,
    /// and the digest of all pages. Its streams have ended.
    pub(crate) fn arrived(&self, page_count: u64, session: u32, fences: u32) -> (PageBitmap, MemoryDigest) {
        let (mut pages, mut digest) = (PageBitmap::empty(page_count), MemoryDigest::ZERO);
        for number in 0.. {
            let Some(index) = ChunkIndex::new(number, page_count) else { break };
            let chunk = self.chunk(index);
            if let Some(digests) = &chunk.digests {
                digest = digest.combine(digests.sum());
            }
            if chunk.round == (Round { session, fences }) {
                pages.insert_chunk(index, &chunk.arrived);
            }
        }
        (pages, digest)
    }

    /// A chunk, for the stream that has a frame of it.
    fn chunk(&self, chunk: ChunkIndex) -> MutexGuard<'_, ReceivedChunk> {
        let index = usize::try_from(chunk.number()).expect("a chunk's number fits the address space");
        self.chunks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a chunk.
#[derive(Debug, Default)]
struct ReceivedChunk {
    /// Only chunks that something arrived for take memory.
    digests: Option<ChunkDigests>,
    /// Pages that something was written to: the others are zero, as they were when the machine was built.
    filled: PageMask,
    /// The round in which something arrived last.
    round: Round,
    /// Pages that arrived in it as a whole.
    arrived: PageMask,
}

impl ReceivedChunk {
    /// These pages are here now, in `round`.
    fn arrive(&mut self, mask: &PageMask, round: Round) {
        if std::mem::replace(&mut self.round, round) != round {
            self.arrived = PageMask::EMPTY;
        }
        join(&mut self.arrived, mask);
    }
}

fn join(to: &mut PageMask, more: &PageMask) {
    to.0.iter_mut().zip(more.0).for_each(|(to, more)| *to |= more);
}

/// A round as a stream counts it: a set of streams, and how many fences it has seen. All streams of a set see the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Round {
    session: u32,
    fences: u32,
}

struct Receiver {
    reader: DataReader,
    pages: Arc<dyn GuestPages>,
    page_count: u64,
    /// Whether anybody wants to compare digests.
    verify: bool,
    received: Arc<ReceivedMemory>,
    digest: MemoryDigest,
    round: Round,
    unpacker: Unpacker,
    /// The body of a packed or delta frame.
    body: Vec<u8>,
}

impl Receiver {
    /// Takes in one frame; the fence's number if it was one.
    fn next_frame(&mut self) -> Result<Option<u32>, StreamError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        self.reader.read_exact(&mut header)?;
        match Frame::decode(&header, self.page_count)? {
            Frame::Raw { chunk, mask } => self.raw(chunk, &mask)?,
            Frame::Zero { chunk, mask } => self.zero(chunk, &mask)?,
            Frame::Lz4 { chunk, mask, body_bytes } => self.packed(chunk, &mask, body_bytes, Packed::Lz4)?,
            Frame::Zstd { chunk, mask, body_bytes } => self.packed(chunk, &mask, body_bytes, Packed::Zstd)?,
            Frame::Delta { chunk, mask, body_bytes } => self.delta(chunk, &mask, body_bytes)?,
            Frame::Fence(fence) => return Ok(Some(fence)),
        }
        Ok(None)
    }

    fn raw(&mut self, chunk: ChunkIndex, mask: &PageMask) -> Result<(), StreamError> {
        let ranges: Vec<PageRange> = chunk.ranges(mask).collect();
        // Before: what is written half-way when the connection breaks is not zero any more.
        join(&mut self.received.chunk(chunk).filled, mask);
        self.reader.receive(&*self.pages, &ranges)?;
        self.take_digests(chunk, mask);
        Ok(())
    }

    /// Takes the digests of what stands in memory, so that a page that landed elsewhere is found.
    fn take_digests(&mut self, chunk: ChunkIndex, mask: &PageMask) {
        if fault::damages(Step::Target(TargetStep::FrameArrives))
            && let Some(range) = chunk.ranges(mask).next()
        {
            self.pages.patch(range.first(), 0, b"damaged");
        }
        let received = Arc::clone(&self.received);
        let mut received = received.chunk(chunk);
        join(&mut received.filled, mask);
        received.arrive(mask, self.round);
        if !self.verify {
            return;
        }
        let digests = received.digests.get_or_insert_default();
        for range in chunk.ranges(mask) {
            self.pages.for_each_page(range, &mut |page, bytes| {
                let change = digests.set(page - chunk.first_page(), PageDigest::of(page, bytes));
                self.digest = self.digest.combine(change);
            });
        }
    }

    fn zero(&mut self, chunk: ChunkIndex, mask: &PageMask) -> Result<(), StreamError> {
        // Memory that nothing was written to is neither looked at nor given back.
        let mut received = self.received.chunk(chunk);
        received.arrive(mask, self.round);
        let ReceivedChunk { digests, filled, .. } = &mut *received;
        let mut filled_before = *mask;
        filled_before.0.iter_mut().zip(filled.0).for_each(|(word, filled)| *word &= filled);
        for range in chunk.ranges(&filled_before) {
            self.pages.zero(range)?;
        }
        for offset in filled_before.offsets() {
            filled.remove(offset);
            if let Some(digests) = digests {
                self.digest = self.digest.combine(digests.set(offset, PageDigest::ZERO_PAGE));
            }
        }
        Ok(())
    }

    /// Reads a frame's body, whose length its header's check has bounded.
    fn read_body(&mut self, body_bytes: u32) -> io::Result<()> {
        self.body.resize(usize::try_from(body_bytes).expect("u32 fits usize"), 0);
        self.reader.read_exact(&mut self.body)
    }

    fn packed(
        &mut self,
        chunk: ChunkIndex,
        mask: &PageMask,
        body_bytes: u32,
        how: Packed,
    ) -> Result<(), StreamError> {
        self.read_body(body_bytes)?;
        let unpacked = self
            .unpacker
            .unpack(&self.body, how, mask.count())
            .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
        for (offset, bytes) in mask.offsets().zip(unpacked) {
            self.pages.write(chunk.first_page() + offset, bytes);
        }
        self.take_digests(chunk, mask);
        Ok(())
    }

    fn delta(&mut self, chunk: ChunkIndex, mask: &PageMask, body_bytes: u32) -> Result<(), StreamError> {
        self.read_body(body_bytes)?;
        let changes = delta::changes(&self.body, mask.count())
            .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
        let pages: Vec<u64> = mask.offsets().map(|offset| chunk.first_page() + offset).collect();
        for change in changes {
            self.pages.patch(pages[change.nth_page], change.at, change.bytes);
        }
        self.take_digests(chunk, mask);
        Ok(())
    }
}
