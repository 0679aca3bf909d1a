//! The control connection: messages in and out of a TCP stream, by two tasks.

use ferry_protocol::Message;
use ferry_protocol::wire::{self, Decoder, WireError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Why a control connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
}

/// Reads messages.
#[derive(Debug)]
pub(crate) struct ControlReader {
    half: OwnedReadHalf,
    decoder: Decoder,
}

impl ControlReader {
    /// The next message.
    pub(crate) async fn next(&mut self) -> Result<Message, ControlError> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let got = self.half.read(&mut buffer).await?;
            if got == 0 {
                return Err(ControlError::Closed);
            }
            self.decoder.push(&buffer[..got]);
        }
    }
}

/// Messages that may wait to be written. A peer that does not read what it asks for is cut off beyond that.
const QUEUED_MAX: usize = 256;

/// Queues messages; a task writes them. Dropping it closes the connection once all are written.
#[derive(Debug)]
pub(crate) struct ControlWriter {
    queue: mpsc::Sender<Vec<u8>>,
    task: JoinHandle<()>,
}

impl ControlWriter {
    /// Queues `message`. If the connection is gone the message is dropped; the reader says so.
    pub(crate) fn send(&self, message: &Message) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(wire::encode(message)) {
            tracing::warn!("the peer does not read what it asks for; the connection is given up");
            self.task.abort();
        }
    }

    /// Waits until all queued messages are written, then closes the writing side.
    pub(crate) async fn finish(self) {
        drop(self.queue);
        let _ = self.task.await;
    }
}

/// Messages that a connection's reader may hand on before the engine has dealt with them. A peer that sends faster is
/// slowed down by TCP instead of filling this host's memory.
pub(crate) const UNHANDLED_MAX: usize = 64;

/// Splits a connection into its two ends.
pub(crate) fn split(stream: TcpStream) -> (ControlReader, ControlWriter) {
    let (read, write) = stream.into_split();
    let (queue, messages) = mpsc::channel(QUEUED_MAX);
    let task = tokio::spawn(write_all(write, messages));
    (ControlReader { half: read, decoder: Decoder::default() }, ControlWriter { queue, task })
}

async fn write_all(mut half: OwnedWriteHalf, mut messages: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = messages.recv().await {
        if half.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = half.shutdown().await;
}
