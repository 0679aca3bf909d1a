//! The target's door: every connection is asked who and what it is before anybody talks to it.
//!
//! With TLS, whoever shows no certificate that may be a source gets no further. Then a control connection must begin
//! with `Hello`, a data stream with its join; anything else is told so, where it can be, and closed.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use ferry_protocol::Message;
use ferry_protocol::frame::{DATA_MAGIC, JOIN_BYTES, Join, UNPROVED_MAGIC};
use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::wire::{CONTROL_MAGIC, WireError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::CLOSE_TIMEOUT;
use super::lobby::{AddressGroup, Lobby, Place, TurnedAway};
use crate::transport::control::{
    ControlError, ControlReader, ControlStream, ControlWriter, Incoming, split, split_behind,
};
use crate::transport::data::DataReader;
use crate::transport::endpoint::ListenAddress;
use crate::transport::security::Security;
use crate::transport::tls::identity::{HostIdentity, Role};
use crate::transport::tls::{Accepted, Credentials, HANDSHAKE_BYTE, Tls};
use crate::transport::{tcp, unix};

/// How long a connection may take to say who and what it is.
pub(super) const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is accepted after accepting has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The longest first message, far above any `Hello`: whoever says more has not even said who it is.
const HELLO_BYTES_MAX: usize = 4096;

/// Where connections come in.
#[derive(Debug)]
pub(super) struct Door {
    listener: Listener,
    security: Arc<Security>,
    lobby: Arc<Lobby>,
    /// Until when nothing is accepted, after accepting has failed.
    pause: Mutex<Option<Pin<Box<Sleep>>>>,
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
    turned_away: Arc<TurnedAway>,
    /// Kept for as long as nothing is known of it.
    place: Place,
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
        Ok(Self {
            listener,
            security: Arc::new(security.clone()),
            lobby: Arc::default(),
            pause: Mutex::default(),
        })
    }

    pub(super) fn address(&self) -> io::Result<ListenAddress> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().map(ListenAddress::Tcp),
            Listener::Unix(listener) => Ok(ListenAddress::Unix(listener.path().to_owned())),
        }
    }

    /// Who was turned away so far.
    pub(super) fn turned_away(&self) -> Arc<TurnedAway> {
        Arc::clone(&self.lobby.turned_away)
    }

    /// The next connection. Whoever stops waiting for it has lost nothing.
    pub(super) async fn accept(&self) -> Arrival {
        loop {
            std::future::poll_fn(|context| self.poll_pause(context)).await;
            match self.try_accept().await {
                Ok(arrival) => return arrival,
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    // Mostly no file descriptors: asking again at once would only fill the log.
                    let pause = Box::pin(tokio::time::sleep(ACCEPT_PAUSE));
                    *self.pause.lock().unwrap_or_else(PoisonError::into_inner) = Some(pause);
                }
            }
        }
    }

    fn poll_pause(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        match pause.as_mut().map(|pause| pause.as_mut().poll(context)) {
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => *pause = None,
            None => {}
        }
        Poll::Ready(())
    }

    async fn try_accept(&self) -> io::Result<Arrival> {
        let (stream, peer, group) = match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Stream::Tcp(stream), peer.to_string(), peer.ip().into())
            }
            Listener::Unix(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Stream::Unix(stream), peer, AddressGroup::ThisHost)
            }
        };
        let (security, turned_away) = (Arc::clone(&self.security), self.turned_away());
        Ok(Arrival { stream, peer, security, turned_away, place: self.lobby.enter(group) })
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
pub(super) fn sort(arrival: Arrival, sorted: &mpsc::Sender<Knock>) {
    let Arrival { stream, peer, security, turned_away, place } = arrival;
    let sorted = sorted.clone();
    tokio::spawn(async move {
        let caller = Caller { peer: peer.clone(), turned_away: Arc::clone(&turned_away) };
        let introducing = async {
            if let Some(knock) = introduce(stream, caller, &security).await {
                let _ = sorted.send(knock).await;
            }
        };
        // It is a stranger until it has been handed on.
        tokio::select! {
            () = place.lost() => turned_away.connection(&peer, "it said nothing, and others wait as well"),
            said = tokio::time::timeout(FIRST_BYTES_TIMEOUT, introducing) => {
                if said.is_err() {
                    turned_away.connection(&peer, "it did not say what it wants in time");
                }
            }
        }
    });
}

async fn introduce(stream: Stream, caller: Caller, security: &Security) -> Option<Knock> {
    let stream = match stream {
        Stream::Tcp(stream) => stream,
        // Memory is handed over there, so there are no data streams, and the kernel has said who it is.
        Stream::Unix(stream) => {
            let (reader, writer) = split(ControlStream::Unix(stream));
            return caller.greet((reader, writer), None).await;
        }
    };
    tcp::set_up(&stream).ok()?;
    let Some(magic) = peek(&stream).await else {
        caller.turned_away("it has left without a word");
        return None;
    };
    match (security.tls(), magic[0] == HANDSHAKE_BYTE) {
        (Some(tls), true) => caller.introduce_by_tls(stream, tls.clone()).await,
        (None, false) => caller.introduce_plainly(stream, magic).await,
        (tls, _) => {
            caller.turned_away(if tls.is_some() { "it does not speak TLS" } else { "it speaks TLS" });
            turn_away(stream, tls.is_some()).await;
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
async fn turn_away(mut stream: TcpStream, tls: bool) {
    let sentence = if tls {
        "this target only talks to hosts with certificates: give the source one ('--tls-dir')"
    } else {
        "this target has no certificate: start its 'ferry receive' with '--tls-dir', or migrate with '--insecure'"
    };
    let abort = Message::Abort(Abort::new(AbortCode::Forbidden, sentence));
    // What has arrived must be read, or closing would take back what is said here.
    let _ = stream.write_all(&ferry_protocol::wire::encode(&abort)).await;
    let _ = stream.shutdown().await;
    let _ = tokio::io::copy(&mut (&mut stream).take(64 << 10), &mut tokio::io::sink()).await;
}

/// Who is being asked.
struct Caller {
    peer: String,
    turned_away: Arc<TurnedAway>,
}

impl Caller {
    fn turned_away(&self, why: impl std::fmt::Display) {
        self.turned_away.connection(&self.peer, why);
    }

    async fn introduce_plainly(self, mut stream: TcpStream, magic: [u8; 4]) -> Option<Knock> {
        if magic == UNPROVED_MAGIC {
            self.turned_away(
                "its data stream has no proof that it belongs to a migration; update ferry there",
            );
            return None;
        }
        if magic != DATA_MAGIC {
            return self.greet(split(ControlStream::Tcp(stream)), None).await;
        }
        let mut join = [0; JOIN_BYTES];
        self.said(stream.read_exact(&mut join).await)?;
        let join = self.said(Join::decode(&join))?;
        let stream = JoiningStream::Plain(stream);
        Some(Knock::Join(join, Joining { peer: self.peer, identity: None, stream }))
    }

    async fn introduce_by_tls(self, stream: TcpStream, credentials: Credentials) -> Option<Knock> {
        // It reads files if they have changed.
        let tls = tokio::task::spawn_blocking(move || credentials.current()).await.ok()?;
        let (mut stream, identity) = self.said(tls.accept(stream).await)?;
        let mut join = [0; JOIN_BYTES];
        let (magic, rest) = join.split_at_mut(CONTROL_MAGIC.len());
        self.said(stream.read_exact(magic).await)?;
        if magic != DATA_MAGIC {
            let ends = split_behind(ControlStream::Tls(Box::new(stream.into())), magic);
            return self.greet(ends, Some((&tls, identity))).await;
        }
        self.said(stream.read_exact(rest).await)?;
        let join = self.said(Join::decode(&join))?;
        self.said(identity.check_role(Role::Source))?;
        let stream = JoiningStream::Tls(Box::new(stream.into_inner()));
        Some(Knock::Join(join, Joining { peer: self.peer, identity: Some(identity), stream }))
    }

    /// What came of asking; a failure is counted.
    fn said<T, E: std::fmt::Display>(&self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.turned_away(error)).ok()
    }

    /// Takes in a control connection's `Hello`.
    async fn greet(
        self,
        (mut reader, writer): (ControlReader, ControlWriter),
        tls: Option<(&Tls, HostIdentity)>,
    ) -> Option<Knock> {
        let abort = match reader.next_within(HELLO_BYTES_MAX).await {
            Ok(Incoming { message: Message::Hello(hello), memory: _ }) => match check(tls.as_ref(), &hello) {
                Ok(()) => {
                    let identity = tls.map(|(_, identity)| identity);
                    return Some(Knock::Hello(
                        Box::new(hello),
                        Link { peer: self.peer, identity, reader, writer },
                    ));
                }
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
        self.turned_away(&abort.sentence);
        writer.send(&Message::Abort(abort));
        writer.finish().await;
        None
    }
}

/// Whether both hosts may move this VM.
fn check(tls: Option<&(&Tls, HostIdentity)>, hello: &Hello) -> Result<(), Abort> {
    let Some((tls, identity)) = tls else { return Ok(()) };
    let source = identity.check(Role::Source, &hello.name);
    let both = source.and_then(|()| tls.own().check(Role::Target, &hello.name));
    both.map_err(|forbidden| Abort::new(AbortCode::Forbidden, forbidden.to_string()))
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;

    use super::*;

    #[tokio::test]
    async fn a_door_that_can_not_accept_waits_by_a_timer() {
        let listen = "127.0.0.1:0".parse().unwrap();
        let door = Door::open(&listen, &Security::LoopbackOnly).unwrap();
        let Listener::Tcp(listener) = &door.listener else { unreachable!("it was opened as such") };
        // From now on accepting fails, each time.
        SockRef::from(listener).shutdown(std::net::Shutdown::Both).unwrap();
        let is_pausing = || door.pause.lock().unwrap().is_some();
        let mut waited_for = 0;
        while waited_for < 3 {
            // What else there is to do is done meanwhile, and is not asked about this over and over.
            tokio::select! {
                biased;
                _ = door.accept() => unreachable!("nobody can come"),
                () = tokio::time::sleep(ACCEPT_PAUSE) => waited_for += u32::from(is_pausing()),
            }
        }
    }
}
