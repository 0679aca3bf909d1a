//! Receiving: each stream's thread reads frames and writes their pages into guest memory.
//!
//! Everything the peer names has been checked by [`Frame::decode`] before it is used; a thread holds at most one
//! packed group (256 KiB) besides guest memory.

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use ferry_protocol::digest::DigestTable;
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, FrameError};
use ferry_protocol::layout::PAGE_BYTES;
use ferry_protocol::message::AbortCode;
use ferry_protocol::page::Packer;
use ferry_protocol::{ChunkIndex, MemoryDigest, PageDigest, PageMask, PageRange, StreamIndex};

use super::{digest_slot, digest_slots};
use crate::ports::GuestPages;

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
    socket: TcpStream,
    pages: Arc<dyn GuestPages>,
    stream: StreamIndex,
    streams: u16,
    verify: bool,
    report: &dyn Fn(StreamEvent),
) {
    let page_count = pages.layout().page_count();
    let digests = verify.then(|| DigestTable::new(digest_slots(page_count, streams)));
    let mut receiver =
        Receiver { socket, pages, page_count, stream, streams, digests, packer: Packer::default() };
    loop {
        match receiver.next_frame() {
            Ok(None) => {}
            Ok(Some(fence)) => report(StreamEvent::Fence { fence, digest: receiver.digest() }),
            Err(error) => return report(StreamEvent::Failed(error)),
        }
    }
}

struct Receiver {
    socket: TcpStream,
    pages: Arc<dyn GuestPages>,
    page_count: u64,
    stream: StreamIndex,
    streams: u16,
    /// Of the stream's pages as last received, if anybody wants to compare them.
    digests: Option<DigestTable>,
    packer: Packer,
}

impl Receiver {
    fn digest(&self) -> MemoryDigest {
        self.digests.as_ref().map_or(MemoryDigest::ZERO, DigestTable::sum)
    }

    /// Takes in one frame; the fence's number if it was one.
    fn next_frame(&mut self) -> Result<Option<u32>, StreamError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        self.socket.read_exact(&mut header)?;
        match Frame::decode(&header, self.page_count, self.stream, self.streams)? {
            Frame::Raw { chunk, mask } => self.raw(chunk, &mask)?,
            Frame::Zero { chunk, mask } => self.zero(chunk, &mask)?,
            Frame::Lz4 { chunk, mask, body_bytes } => self.packed(chunk, &mask, body_bytes)?,
            Frame::Fence(fence) => return Ok(Some(fence)),
        }
        Ok(None)
    }

    fn raw(&mut self, chunk: ChunkIndex, mask: &PageMask) -> Result<(), StreamError> {
        let ranges: Vec<PageRange> = chunk.ranges(mask).collect();
        self.pages.receive(self.socket.as_fd(), &ranges)?;
        self.take_digests(chunk, mask);
        Ok(())
    }

    /// Takes the digests of what stands in memory, so that a page that landed elsewhere is found.
    fn take_digests(&mut self, chunk: ChunkIndex, mask: &PageMask) {
        let (Some(digests), streams) = (&mut self.digests, self.streams) else { return };
        for range in chunk.ranges(mask) {
            self.pages.for_each_page(range, &mut |page, bytes| {
                digests.set(digest_slot(page, streams), PageDigest::of(page, bytes));
            });
        }
    }

    fn zero(&mut self, chunk: ChunkIndex, mask: &PageMask) -> Result<(), StreamError> {
        const ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        for range in chunk.ranges(mask) {
            self.pages.zero(range)?;
            let Some(digests) = &mut self.digests else { continue };
            // Not read back: that would map memory which a sparse guest never uses.
            for page in range.first()..range.first() + range.count() {
                digests.set(digest_slot(page, self.streams), PageDigest::of(page, &ZERO));
            }
        }
        Ok(())
    }

    fn packed(&mut self, chunk: ChunkIndex, mask: &PageMask, body_bytes: u32) -> Result<(), StreamError> {
        let body_bytes = usize::try_from(body_bytes).expect("checked to be below 256 KiB");
        let mut packed = vec![0; body_bytes];
        self.socket.read_exact(&mut packed)?;
        let unpacked = self
            .packer
            .unpack(&packed, mask.count())
            .map_err(|cause| FrameError::Packed { chunk: chunk.number(), cause })?;
        let pages = chunk.ranges(mask).flat_map(|range| range.first()..range.first() + range.count());
        for (page, bytes) in pages.zip(unpacked) {
            self.pages.write(page, bytes);
        }
        self.take_digests(chunk, mask);
        Ok(())
    }
}
