//! The data streams: one thread and one socket each, pages straight from and into guest memory.

mod encoders;
mod receive;
mod send;
mod sender;
mod sent;
mod whole;

pub(crate) use receive::{Part, ReceivedMemory, StreamEvent, receive_stream};
pub(crate) use send::{How, Opening, SenderOptions, Senders, StreamSettings, TransferCounters};
