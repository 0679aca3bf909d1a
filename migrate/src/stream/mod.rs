//! The data streams: one thread and one socket each, pages straight from and into guest memory.

mod encoders;
mod receive;
mod send;
mod sender;
mod sent;

pub(crate) use receive::{ReceivedMemory, StreamEvent, receive_stream};
pub(crate) use send::{SenderOptions, Senders, StreamSettings, TransferCounters};
