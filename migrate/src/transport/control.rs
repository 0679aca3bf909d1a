//! The control connection: messages in and out of a TCP, TLS or Unix stream, by two tasks.
//!
//! A Unix stream carries one descriptor: that of guest memory, beside the message `HandOver`. Any other ends the
//! connection, and whatever came is closed.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ferry_protocol::Message;
use ferry_protocol::wire::{self, BODY_BYTES_MAX, Decoder, WireError};
use socket2::SockRef;
use tokio::io::{self as tokio_io, AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsStream;

use super::tls::HandshakeError;
use super::unix;
use crate::fault;

/// Why a control connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Tls(#[from] HandshakeError),
    #[error("the peer says that it hands memory over, but no descriptor of it came")]
    NoDescriptor,
    #[error("the peer sent descriptors that nobody asked for")]
    SurplusDescriptors,
}

/// A connection of any kind.
#[derive(Debug)]
pub(crate) enum ControlStream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

#[derive(Debug)]
enum ReadHalf {
    Tcp(OwnedReadHalf),
    Tls(tokio_io::ReadHalf<TlsStream<TcpStream>>),
    Unix { stream: Arc<UnixStream>, descriptor: Option<OwnedFd> },
}

/// Reads messages.
#[derive(Debug)]
pub(crate) struct ControlReader {
    half: ReadHalf,
    decoder: Decoder,
}

/// A message, with the descriptor beside it.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) message: Message,
    /// That of guest memory, always with `HandOver` on a Unix stream, never otherwise.
    pub(crate) memory: Option<OwnedFd>,
}

impl ControlReader {
    /// Whether descriptors can come.
    pub(crate) const fn carries_descriptors(&self) -> bool {
        matches!(self.half, ReadHalf::Unix { .. })
    }

    /// The next message.
    pub(crate) async fn next(&mut self) -> Result<Incoming, ControlError> {
        self.next_within(BODY_BYTES_MAX).await
    }

    /// The next message, whose body may have so many bytes. More are not even waited for.
    pub(crate) async fn next_within(&mut self, body_bytes_max: usize) -> Result<Incoming, ControlError> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            if let Some(message) = self.decoder.next_within(body_bytes_max)? {
                return self.half.with_descriptor(message);
            }
            let got = self.half.read(&mut buffer, self.decoder.is_empty()).await?;
            if got == 0 {
                return Err(ControlError::Closed);
            }
            self.decoder.push(&buffer[..got]);
        }
    }
}

impl ReadHalf {
    /// Reads bytes. `between_messages` says that no part of a message is waiting for its rest.
    async fn read(&mut self, buffer: &mut [u8], between_messages: bool) -> Result<usize, ControlError> {
        let (stream, descriptor) = match self {
            Self::Tcp(half) => return Ok(half.read(buffer).await?),
            Self::Tls(half) => {
                return match half.read(buffer).await {
                    // It ended without saying so within TLS: whatever is missing of a message is not taken.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
                    Err(error) => Err(HandshakeError::from(error).into()),
                    Ok(got) => Ok(got),
                };
            }
            Self::Unix { stream, descriptor } => (stream, descriptor),
        };
        // It came beside a message that has no use for one.
        if between_messages && descriptor.is_some() {
            return Err(ControlError::SurplusDescriptors);
        }
        let arrived = unix::receive(stream, buffer).await?;
        for new in arrived.descriptors {
            if descriptor.replace(new).is_some() {
                return Err(ControlError::SurplusDescriptors);
            }
        }
        if arrived.surplus { Err(ControlError::SurplusDescriptors) } else { Ok(arrived.bytes) }
    }

    fn with_descriptor(&mut self, message: Message) -> Result<Incoming, ControlError> {
        let memory = match (self, &message) {
            (Self::Unix { descriptor, .. }, Message::HandOver(_)) => {
                Some(descriptor.take().ok_or(ControlError::NoDescriptor)?)
            }
            (Self::Unix { .. } | Self::Tcp(_) | Self::Tls(_), _) => None,
        };
        Ok(Incoming { message, memory })
    }
}

/// Messages that may wait to be written. A peer that does not read what it asks for is cut off beyond that.
const QUEUED_MAX: usize = 256;

/// A message on its way out.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    memory: Option<OwnedFd>,
}

/// Queues messages; a task writes them. Dropping it closes the connection once all are written.
#[derive(Debug)]
pub(crate) struct ControlWriter {
    queue: mpsc::Sender<Outgoing>,
    task: JoinHandle<()>,
}

impl ControlWriter {
    /// Queues `message`. If the connection is gone the message is dropped; the reader says so.
    pub(crate) fn send(&self, message: &Message) {
        self.send_beside(message, None);
    }

    /// The same, with the descriptor of guest memory beside it. On a TCP stream the descriptor is closed.
    pub(crate) fn send_beside(&self, message: &Message, memory: Option<OwnedFd>) {
        let outgoing = Outgoing { bytes: wire::encode(message), memory };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(outgoing) {
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
/// slowed down by its socket instead of filling this host's memory.
pub(crate) const UNHANDLED_MAX: usize = 64;

/// The writing side, which is closed when it is dropped.
enum WriteHalf {
    Tcp(OwnedWriteHalf),
    Tls(tokio_io::WriteHalf<TlsStream<TcpStream>>),
    Unix(Arc<UnixStream>),
}

impl WriteHalf {
    async fn write_all(&mut self, Outgoing { bytes, memory }: Outgoing) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.write_all(&bytes).await?,
            Self::Tls(half) => {
                half.write_all(&bytes).await?;
                half.flush().await?;
            }
            Self::Unix(stream) => unix::send(stream, &bytes, memory.as_ref().map(AsFd::as_fd)).await?,
        }
        fault::sent(&bytes);
        Ok(())
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        match self {
            // tokio does it, or [`write_all`] has said goodbye within TLS.
            Self::Tcp(_) | Self::Tls(_) => {}
            Self::Unix(stream) => drop(SockRef::from(stream.as_ref()).shutdown(Shutdown::Write)),
        }
    }
}

/// Splits a connection into its two ends.
pub(crate) fn split(stream: ControlStream) -> (ControlReader, ControlWriter) {
    split_behind(stream, &[])
}

/// The same, of a connection of which `first` has been read.
pub(crate) fn split_behind(stream: ControlStream, first: &[u8]) -> (ControlReader, ControlWriter) {
    let (read, write) = match stream {
        ControlStream::Tcp(stream) => {
            let (read, write) = stream.into_split();
            (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
        }
        ControlStream::Tls(stream) => {
            let (read, write) = tokio_io::split(*stream);
            (ReadHalf::Tls(read), WriteHalf::Tls(write))
        }
        ControlStream::Unix(stream) => {
            let stream = Arc::new(stream);
            (ReadHalf::Unix { stream: Arc::clone(&stream), descriptor: None }, WriteHalf::Unix(stream))
        }
    };
    let (queue, messages) = mpsc::channel(QUEUED_MAX);
    let task = tokio::spawn(write_all(write, messages));
    let mut decoder = Decoder::default();
    decoder.push(first);
    (ControlReader { half: read, decoder }, ControlWriter { queue, task })
}

async fn write_all(mut half: WriteHalf, mut messages: mpsc::Receiver<Outgoing>) {
    while let Some(outgoing) = messages.recv().await {
        if half.write_all(outgoing).await.is_err() {
            return;
        }
    }
    if let WriteHalf::Tls(half) = &mut half {
        let _ = half.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_protocol::message::HandOver;

    fn hand_over() -> Message {
        Message::HandOver(HandOver { description: vec![1; 50_000], regions: Vec::new() })
    }

    fn pair() -> (UnixStream, ControlReader) {
        let (near, far) = UnixStream::pair().unwrap();
        (near, split(ControlStream::Unix(far)).0)
    }

    fn descriptor() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[tokio::test]
    async fn memory_comes_with_its_message_and_only_with_that() {
        let (near, far) = UnixStream::pair().unwrap();
        let (_reader, writer) = split(ControlStream::Unix(near));
        let (mut reader, _writer) = split(ControlStream::Unix(far));
        writer.send(&Message::Ping(1));
        writer.send_beside(&hand_over(), Some(descriptor()));
        writer.send(&Message::Ping(2));
        let mut seen = Vec::new();
        for _ in 0..3 {
            let Incoming { message, memory } = reader.next().await.unwrap();
            seen.push((message.message_type().number(), memory.is_some()));
        }
        assert_eq!(seen, [(15, false), (17, true), (15, false)]);
        writer.finish().await;
        assert!(matches!(reader.next().await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn memory_that_does_not_come_is_missed() {
        let (near, mut reader) = pair();
        let bytes = wire::encode(&hand_over());
        let (sent, read) = tokio::join!(unix::send(&near, &bytes, None), reader.next());
        sent.unwrap();
        assert!(matches!(read, Err(ControlError::NoDescriptor)), "{read:?}");
    }

    #[tokio::test]
    async fn descriptors_that_nobody_asked_for_end_the_connection() {
        // Beside a message that has no use for one.
        let (near, mut reader) = pair();
        let descriptor = descriptor();
        unix::send(&near, &wire::encode(&Message::Ping(1)), Some(descriptor.as_fd())).await.unwrap();
        assert!(matches!(reader.next().await.unwrap().message, Message::Ping(1)));
        let read = reader.next().await;
        assert!(matches!(read, Err(ControlError::SurplusDescriptors)), "{read:?}");
        // A second one for the same message.
        let (near, mut reader) = pair();
        let bytes = wire::encode(&hand_over());
        unix::send(&near, &bytes[..10], Some(descriptor.as_fd())).await.unwrap();
        unix::send(&near, &bytes[10..20], Some(descriptor.as_fd())).await.unwrap();
        let read = reader.next().await;
        assert!(matches!(read, Err(ControlError::SurplusDescriptors)), "{read:?}");
    }
}
