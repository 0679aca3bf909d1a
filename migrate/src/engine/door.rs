//! The target's door: every connection is asked what it is before anybody talks to it. A control connection must begin
//! with `Hello`, a data stream with its join; anything else is told so, where it can be, and closed.

use std::io;
use std::time::Duration;

use ferry_protocol::Message;
use ferry_protocol::frame::{DATA_MAGIC, JOIN_BYTES, Join};
use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::wire::WireError;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::CLOSE_TIMEOUT;
use crate::transport::control::{ControlError, ControlReader, ControlStream, ControlWriter, Incoming, split};
use crate::transport::endpoint::ListenAddress;
use crate::transport::{tcp, unix};

/// How long a connection may take to say what it is.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is accepted after accepting has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that have not said yet what they are; more are closed at once.
pub(super) const STRANGERS_MAX: usize = 128;

/// Where connections come in.
#[derive(Debug)]
pub(super) enum Door {
    Tcp(TcpListener),
    Unix(unix::Listener),
}

impl Door {
    pub(super) fn open(listen: &ListenAddress) -> io::Result<Self> {
        match listen {
            ListenAddress::Tcp(address) => tcp::listen(*address).map(Self::Tcp),
            ListenAddress::Unix(path) => unix::Listener::bind(path).map(Self::Unix),
        }
    }

    pub(super) fn address(&self) -> io::Result<ListenAddress> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(ListenAddress::Tcp),
            Self::Unix(listener) => Ok(ListenAddress::Unix(listener.path().to_owned())),
        }
    }

    /// The next connection, with a name for its other end.
    pub(super) async fn accept(&self) -> io::Result<(ControlStream, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((ControlStream::Tcp(stream), peer.to_string()))
            }
            Self::Unix(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((ControlStream::Unix(stream), peer))
            }
        }
    }
}

/// A connection that has said what it is.
pub(super) enum Knock {
    Hello(Box<Hello>, Link),
    Join(Join, TcpStream),
}

pub(super) struct Link {
    pub(super) peer: String,
    pub(super) reader: ControlReader,
    pub(super) writer: ControlWriter,
}

impl Link {
    pub(super) async fn refuse(self, abort: Abort) {
        self.writer.send(&Message::Abort(abort));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.writer.finish()).await;
    }
}

/// Has a task of its own find out what a new connection is.
pub(super) fn sort(accepted: io::Result<(ControlStream, String)>, sorted: &mpsc::Sender<Knock>) {
    let (stream, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => {
            // Mostly no file descriptors: asking again at once would only fill the log.
            std::thread::sleep(ACCEPT_PAUSE);
            return tracing::warn!("a connection could not be accepted: {error}");
        }
    };
    let Ok(slot) = sorted.clone().try_reserve_owned() else {
        return tracing::warn!("{peer} was turned away: too many connections say nothing");
    };
    tokio::spawn(async move {
        match tokio::time::timeout(FIRST_BYTES_TIMEOUT, introduce(stream, &peer)).await {
            Ok(Some(knock)) => drop(slot.send(knock)),
            Ok(None) => {}
            Err(_) => tracing::warn!("{peer} was turned away: it did not say what it wants"),
        }
    });
}

async fn introduce(stream: ControlStream, peer: &str) -> Option<Knock> {
    let mut stream = match stream {
        ControlStream::Tcp(stream) => stream,
        // Memory is handed over there, so there are no data streams.
        ControlStream::Unix(_) => return greet(stream, peer).await,
    };
    tcp::set_up(&stream).ok()?;
    let mut magic = [0; 4];
    loop {
        match stream.peek(&mut magic).await.ok()? {
            0 => return None,
            4 => break,
            _ => {}
        }
        // Fewer than four bytes are there yet; they come together or not at all, so this hardly repeats.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if magic == DATA_MAGIC {
        let mut join = [0; JOIN_BYTES];
        stream.read_exact(&mut join).await.ok()?;
        return match Join::decode(&join) {
            Ok(join) => Some(Knock::Join(join, stream)),
            Err(error) => {
                tracing::warn!("{peer} was turned away: {error}");
                None
            }
        };
    }
    greet(ControlStream::Tcp(stream), peer).await
}

/// Takes in a control connection's `Hello`.
async fn greet(stream: ControlStream, peer: &str) -> Option<Knock> {
    let (mut reader, writer) = split(stream);
    let abort = match reader.next().await {
        Ok(Incoming { message: Message::Hello(hello), memory: _ }) => {
            let link = Link { peer: peer.to_string(), reader, writer };
            return Some(Knock::Hello(Box::new(hello), link));
        }
        Ok(Incoming { message, memory: _ }) => {
            Abort::new(AbortCode::Protocol, format!("a {:?} came before Hello", message.message_type()))
        }
        Err(error @ ControlError::Wire(WireError::Version(_))) => {
            Abort::new(AbortCode::Version, error.to_string())
        }
        Err(error) => Abort::new(AbortCode::Protocol, error.to_string()),
    };
    tracing::warn!("{peer} was turned away: {}", abort.sentence);
    writer.send(&Message::Abort(abort));
    writer.finish().await;
    None
}
