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
use ferry_protocol::{ChunkIndex, MemoryDigest, PageDigest, PageMask, PageRange};

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

/// Reads frames until the stream ends, which it always does with [`StreamEvent::Failed`]. Digests are taken only if
/// `verify` says so.
pub(crate) fn receive_stream(
    reader: DataReader,
    pages: Arc<dyn GuestPages>,
    received: Arc<ReceivedMemory>,
    verify: bool,
    report: &dyn Fn(StreamEvent),
) {
    let page_count = pages.layout().page_count();
    let mut receiver = Receiver {
        reader,
        pages,
        page_count,
        verify,
        received,
        digest: MemoryDigest::ZERO,
        unpacker: Unpacker::default(),
        body: Vec::new(),
    };
    loop {
        match receiver.next_frame() {
            Ok(None) => {}
            Ok(Some(fence)) => report(StreamEvent::Fence { fence, digest: receiver.digest }),
            Err(error) => return report(StreamEvent::Failed(error)),
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
}

struct Receiver {
    reader: DataReader,
    pages: Arc<dyn GuestPages>,
    page_count: u64,
    /// Whether anybody wants to compare digests.
    verify: bool,
    received: Arc<ReceivedMemory>,
    digest: MemoryDigest,
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
        self.reader.receive(&*self.pages, &ranges)?;
        self.take_digests(chunk, mask);
        Ok(())
    }

    /// Takes the digests of what stands in memory, so that a page that landed elsewhere is found.
    fn take_digests(&mut self, chunk: ChunkIndex, mask: &PageMask) {
        let received = Arc::clone(&self.received);
        let mut received = received.chunk(chunk);
        let ReceivedChunk { digests, filled } = &mut *received;
        filled.0.iter_mut().zip(mask.0).for_each(|(filled, more)| *filled |= more);
        if !self.verify {
            return;
        }
        let digests = digests.get_or_insert_default();
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
        let ReceivedChunk { digests, filled } = &mut *received;
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
