//! The data streams: one thread and one socket each, pages straight from and into guest memory.

mod encoders;
mod receive;
mod send;
mod sender;
mod sent;

pub(crate) use receive::{StreamEvent, receive_stream};
pub(crate) use send::{SenderOptions, Senders, StreamSettings, TransferCounters};

use ferry_protocol::{ChunkIndex, StreamIndex};

/// Whether `chunk` travels on `stream`.
fn belongs(chunk: ChunkIndex, stream: StreamIndex, streams: u16) -> bool {
    chunk.stream(streams) == stream
}
