//! The target's door: every connection is asked who and what it is before anybody talks to it.
//!
//! With TLS, whoever shows no certificate that may be a source gets no further. Then a control connection must begin
//! with `Hello`, a data stream with its join; anything else is told so, where it can be, and closed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::Message;
use ferry_protocol::frame::{DATA_MAGIC, JOIN_BYTES, Join};
use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::wire::{CONTROL_MAGIC, WireError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;

use super::CLOSE_TIMEOUT;
use crate::transport::control::{
    ControlError, ControlReader, ControlStream, ControlWriter, Incoming, split, split_behind,
};
use crate::transport::data::DataReader;
use crate::transport::endpoint::ListenAddress;
use crate::transport::security::Security;
use crate::transport::tls::identity::{HostIdentity, Role};
use crate::transport::tls::{Accepted, HANDSHAKE_BYTE, Tls};
use crate::transport::{tcp, unix};

/// How long a connection may take to say who and what it is.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is accepted after accepting has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that have not said yet what they are; more are closed at once.
pub(super) const STRANGERS_MAX: usize = 128;

/// Where connections come in.
#[derive(Debug)]
pub(super) struct Door {
    listener: Listener,
    security: Arc<Security>,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(unix::Listener),
}

/// A connection of which nothing is known yet, with a name for its other end.
pub(super) struct Arrival {
    stream: Stream,
    peer: String,
    security: Arc<Security>,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Door {
    pub(super) fn open(listen: &ListenAddress, security: &Security) -> io::Result<Self> {
        let refused = |error| io::Error::new(io::ErrorKind::PermissionDenied, error);
        security.check_listen(listen).map_err(refused)?;
        let listener = match listen {
            ListenAddress::Tcp(address) => tcp::listen(*address).map(Listener::Tcp)?,
            ListenAddress::Unix(path) => unix::Listener::bind(path).map(Listener::Unix)?,
        };
        Ok(Self { listener, security: Arc::new(security.clone()) })
    }

    pub(super) fn address(&self) -> io::Result<ListenAddress> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().map(ListenAddress::Tcp),
            Listener::Unix(listener) => Ok(ListenAddress::Unix(listener.path().to_owned())),
        }
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<Arrival> {
        let (stream, peer) = match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Stream::Tcp(stream), peer.to_string())
            }
            Listener::Unix(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Stream::Unix(stream), peer)
            }
        };
        Ok(Arrival { stream, peer, security: Arc::clone(&self.security) })
    }
}

/// A connection that has said what it is.
pub(super) enum Knock {
    Hello(Box<Hello>, Link),
    Join(Join, Joining),
}

/// A control connection.
pub(super) struct Link {
    pub(super) peer: String,
    /// What its certificate says, with TLS.
    pub(super) identity: Option<HostIdentity>,
    pub(super) reader: ControlReader,
    pub(super) writer: ControlWriter,
}

impl Link {
    pub(super) async fn refuse(self, abort: Abort) {
        self.writer.send(&Message::Abort(abort));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.writer.finish()).await;
    }
}

/// A data stream whose join has been read.
pub(super) struct Joining {
    pub(super) peer: String,
    /// What its certificate says, with TLS.
    pub(super) identity: Option<HostIdentity>,
    stream: JoiningStream,
}

enum JoiningStream {
    Plain(TcpStream),
    Tls(Box<Accepted>),
}

impl Joining {
    /// The stream for a thread of its own.
    pub(super) fn into_reader(self) -> io::Result<DataReader> {
        let blocking = |stream: TcpStream| {
            let socket = stream.into_std()?;
            tcp::set_up_data(&socket, None)?;
            Ok::<_, io::Error>(socket)
        };
        match self.stream {
            JoiningStream::Plain(stream) => Ok(DataReader::plain(blocking(stream)?)),
            JoiningStream::Tls(accepted) => {
                let (stream, connection) = *accepted;
                Ok(DataReader::tls(blocking(stream)?, connection))
            }
        }
    }
}

/// Has a task of its own find out what a new connection is.
pub(super) fn sort(accepted: io::Result<Arrival>, sorted: &mpsc::Sender<Knock>) {
    let arrival = match accepted {
        Ok(arrival) => arrival,
        Err(error) => {
            // Mostly no file descriptors: asking again at once would only fill the log.
            std::thread::sleep(ACCEPT_PAUSE);
            return tracing::warn!("a connection could not be accepted: {error}");
        }
    };
    let peer = arrival.peer.clone();
    let Ok(slot) = sorted.clone().try_reserve_owned() else {
        return tracing::warn!("{peer} was turned away: too many connections say nothing");
    };
    tokio::spawn(async move {
        match tokio::time::timeout(FIRST_BYTES_TIMEOUT, introduce(arrival)).await {
            Ok(Some(knock)) => drop(slot.send(knock)),
            Ok(None) => {}
            Err(_) => tracing::warn!("{peer} was turned away: it did not say what it wants"),
        }
    });
}

async fn introduce(Arrival { stream, peer, security }: Arrival) -> Option<Knock> {
    let stream = match stream {
        Stream::Tcp(stream) => stream,
        // Memory is handed over there, so there are no data streams, and the kernel has said who it is.
        Stream::Unix(stream) => {
            let (reader, writer) = split(ControlStream::Unix(stream));
            return greet(Link { peer, identity: None, reader, writer }, None).await;
        }
    };
    tcp::set_up(&stream).ok()?;
    let magic = peek(&stream).await?;
    match (security.tls(), magic[0] == HANDSHAKE_BYTE) {
        (Some(tls), true) => introduce_by_tls(stream, peer, tls).await,
        (None, false) => introduce_plainly(stream, peer, magic).await,
        (tls, _) => {
            turn_away(stream, &peer, tls.is_some()).await;
            None
        }
    }
}

/// Looks at the first four bytes.
async fn peek(stream: &TcpStream) -> Option<[u8; 4]> {
    let mut magic = [0; 4];
    loop {
        match stream.peek(&mut magic).await.ok()? {
            0 => return None,
            4 => return Some(magic),
            _ => {}
        }
        // Fewer than four bytes are there yet; they come together or not at all, so this hardly repeats.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Tells a peer that speaks TLS where nobody can answer, or does not where it must. Within TLS's own words the former
/// could not be told, but a ferry understands it.
async fn turn_away(mut stream: TcpStream, peer: &str, tls: bool) {
    let sentence = if tls {
        "this target only talks to hosts with certificates: give the source one ('--tls-dir')"
    } else {
        "this target has no certificate: start its 'ferry receive' with '--tls-dir', or migrate with '--insecure'"
    };
    tracing::warn!("{peer} was turned away: {}", if tls { "it does not speak TLS" } else { "it speaks TLS" });
    let abort = Message::Abort(Abort::new(AbortCode::Forbidden, sentence));
    // What has arrived must be read, or closing would take back what is said here.
    let _ = stream.write_all(&ferry_protocol::wire::encode(&abort)).await;
    let _ = stream.shutdown().await;
    let _ = tokio::io::copy(&mut (&mut stream).take(64 << 10), &mut tokio::io::sink()).await;
}

async fn introduce_plainly(mut stream: TcpStream, peer: String, magic: [u8; 4]) -> Option<Knock> {
    if magic != DATA_MAGIC {
        let (reader, writer) = split(ControlStream::Tcp(stream));
        return greet(Link { peer, identity: None, reader, writer }, None).await;
    }
    let mut join = [0; JOIN_BYTES];
    stream.read_exact(&mut join).await.ok()?;
    let join = read_join(&join, &peer)?;
    Some(Knock::Join(join, Joining { peer, identity: None, stream: JoiningStream::Plain(stream) }))
}

async fn introduce_by_tls(stream: TcpStream, peer: String, tls: &Tls) -> Option<Knock> {
    let (mut stream, identity) = match tls.accept(stream).await {
        Ok(accepted) => accepted,
        Err(error) => {
            tracing::warn!("{peer} was turned away: {error}");
            return None;
        }
    };
    let mut join = [0; JOIN_BYTES];
    let (magic, rest) = join.split_at_mut(CONTROL_MAGIC.len());
    stream.read_exact(magic).await.ok()?;
    if magic != DATA_MAGIC {
        let (reader, writer) = split_behind(ControlStream::Tls(Box::new(stream.into())), magic);
        return greet(Link { peer, identity: Some(identity), reader, writer }, Some(tls)).await;
    }
    stream.read_exact(rest).await.ok()?;
    let join = read_join(&join, &peer)?;
    if let Err(forbidden) = identity.check_role(Role::Source) {
        tracing::warn!("{peer} was turned away: {forbidden}");
        return None;
    }
    let stream = JoiningStream::Tls(Box::new(stream.into_inner()));
    Some(Knock::Join(join, Joining { peer, identity: Some(identity), stream }))
}

fn read_join(bytes: &[u8; JOIN_BYTES], peer: &str) -> Option<Join> {
    Join::decode(bytes).map_err(|error| tracing::warn!("{peer} was turned away: {error}")).ok()
}

/// Takes in a control connection's `Hello`.
async fn greet(mut link: Link, tls: Option<&Tls>) -> Option<Knock> {
    let abort = match link.reader.next().await {
        Ok(Incoming { message: Message::Hello(hello), memory: _ }) => match check(&link, &hello, tls) {
            Ok(()) => return Some(Knock::Hello(Box::new(hello), link)),
            Err(abort) => abort,
        },
        Ok(Incoming { message, memory: _ }) => {
            Abort::new(AbortCode::Protocol, format!("a {:?} came before Hello", message.message_type()))
        }
        Err(error @ ControlError::Wire(WireError::Version(_))) => {
            Abort::new(AbortCode::Version, error.to_string())
        }
        Err(error) => Abort::new(AbortCode::Protocol, error.to_string()),
    };
    tracing::warn!("{} was turned away: {}", link.peer, abort.sentence);
    link.writer.send(&Message::Abort(abort));
    link.writer.finish().await;
    None
}

/// Whether both hosts may move this VM.
fn check(link: &Link, hello: &Hello, tls: Option<&Tls>) -> Result<(), Abort> {
    let (Some(tls), Some(identity)) = (tls, &link.identity) else { return Ok(()) };
    let source = identity.check(Role::Source, &hello.name);
    let both = source.and_then(|()| tls.own().check(Role::Target, &hello.name));
    both.map_err(|forbidden| Abort::new(AbortCode::Forbidden, forbidden.to_string()))
}
