//! Who may be spoken to, and how: by TLS with certificates, or without, on loopback or anywhere. [`Dialer`] is the source's
//! way out; the target's way in is the engine's door.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream as StdStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ferry_protocol::VmName;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};

use super::control::ControlStream;
use super::data::DataWriter;
use super::endpoint::{Endpoint, ListenAddress};
use super::tcp;
use super::tls::identity::{HostIdentity, Role};
use super::tls::{Credentials, HandshakeError, Tls, server_name};

/// How connections are secured.
#[derive(Debug, Clone, Default)]
pub enum Security {
    /// TLS 1.3, with a certificate on each side, on every TCP connection.
    Tls(Credentials),
    /// Nothing, and so only to addresses that never leave this host.
    #[default]
    LoopbackOnly,
    /// Nothing, because the operator has said so: whoever reaches the port can offer a VM, and whoever sees the network
    /// sees and can change the guest's memory.
    Insecure,
}

/// What is refused without TLS.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecurityError {
    /// A target would take VMs from whoever can reach it.
    #[error(
        "without TLS anybody who reaches {0} could offer a VM and see its memory: give this host a certificate (--tls-dir; \
         'ferry cert' makes one), or say --insecure if only your own hosts reach that network"
    )]
    Listen(SocketAddr),
    /// Guest memory would cross a network for all to see.
    #[error(
        "without TLS guest memory would cross the network to {0} for all to see: give this host a certificate (--tls-dir; \
         'ferry cert' makes one), or say --insecure if only your own hosts reach that network"
    )]
    Connect(SocketAddr),
}

impl Security {
    /// Whether a target may listen there. Unix sockets are for this host and user anyway.
    ///
    /// # Errors
    /// That it may not without TLS, with the ways out.
    pub fn check_listen(&self, listen: &ListenAddress) -> Result<(), SecurityError> {
        match (self, listen) {
            (Self::LoopbackOnly, ListenAddress::Tcp(address)) if !is_loopback(address.ip()) => {
                Err(SecurityError::Listen(*address))
            }
            (Self::Tls(_) | Self::LoopbackOnly | Self::Insecure, _) => Ok(()),
        }
    }

    fn check_connect(&self, address: SocketAddr) -> Result<(), SecurityError> {
        match self {
            Self::LoopbackOnly if !is_loopback(address.ip()) => Err(SecurityError::Connect(address)),
            Self::Tls(_) | Self::LoopbackOnly | Self::Insecure => Ok(()),
        }
    }

    /// The certificate, if there is one.
    #[must_use]
    pub const fn tls(&self) -> Option<&Credentials> {
        match self {
            Self::Tls(tls) => Some(tls),
            Self::LoopbackOnly | Self::Insecure => None,
        }
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// Why a source has no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("{0}; is 'ferry receive --listen' running there?")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Insecure(#[from] SecurityError),
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
}

/// Makes a migration's connections: all to the host that was reached first, and all to one that may take this VM.
pub(crate) struct Dialer {
    security: Security,
    target: Endpoint,
    vm: VmName,
    /// Where the first control connection led.
    pinned: OnceLock<SocketAddr>,
    /// Which certificate was shown and which was seen there, last.
    met: Mutex<Option<(Arc<Tls>, HostIdentity)>>,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("target", &self.target).finish_non_exhaustive()
    }
}

impl Dialer {
    pub(crate) const fn new(security: Security, target: Endpoint, vm: VmName) -> Self {
        Self { security, target, vm, pinned: OnceLock::new(), met: Mutex::new(None) }
    }

    /// Where to connect: to the host that was reached first, once there is one.
    pub(crate) fn address(&self) -> String {
        self.pinned.get().map_or_else(|| self.target.to_string(), ToString::to_string)
    }

    /// Makes a control connection.
    pub(crate) async fn control(&self) -> Result<ControlStream, DialError> {
        let connecting = async {
            match &self.target {
                Endpoint::Tcp(target) => self.control_by_tcp(target).await,
                Endpoint::Unix(path) => Ok(ControlStream::Unix(UnixStream::connect(path).await?)),
            }
        };
        tokio::time::timeout(tcp::CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| DialError::Io(io::ErrorKind::TimedOut.into()))?
    }

    async fn control_by_tcp(&self, target: &str) -> Result<ControlStream, DialError> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in tokio::net::lookup_host(self.address()).await? {
            match self.control_at(address, target).await {
                Ok(stream) => {
                    let _ = self.pinned.set(address);
                    return Ok(stream);
                }
                Err(DialError::Io(error)) => failed = error,
                // Somebody is there, and is not to be gone past.
                Err(error @ (DialError::Insecure(_) | DialError::Handshake(_))) => return Err(error),
            }
        }
        Err(failed.into())
    }

    async fn control_at(&self, address: SocketAddr, target: &str) -> Result<ControlStream, DialError> {
        // Before anything is sent there, even a greeting.
        self.security.check_connect(address)?;
        let stream = TcpStream::connect(address).await?;
        tcp::set_up(&stream)?;
        let Some(tls) = self.security.tls().cloned() else { return Ok(ControlStream::Tcp(stream)) };
        // It may have been renewed since the last time.
        let current = tokio::task::spawn_blocking(move || tls.current()).await;
        let tls = current.map_err(io::Error::other)?;
        let (stream, peer) = tls.connect(stream, server_name(target)?).await?;
        peer.check(Role::Target, &self.vm).map_err(HandshakeError::from)?;
        *self.met.lock().unwrap_or_else(PoisonError::into_inner) = Some((tls, peer));
        Ok(ControlStream::Tls(Box::new(stream)))
    }

    /// Makes a data stream to the host that the control connection has reached. Blocks.
    pub(crate) fn data(&self, stall_max: Duration) -> Result<DataWriter, DialError> {
        let mut socket = self.socket()?;
        tcp::set_up_data(&socket, Some(stall_max))?;
        let (Security::Tls(_), Endpoint::Tcp(target)) = (&self.security, &self.target) else {
            return Ok(DataWriter::plain(socket));
        };
        let name: ServerName<'static> = server_name(target)?;
        // The target asks for the very certificate of the control connection.
        let met = self.met.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (tls, known) = met.ok_or(HandshakeError::OtherHost)?;
        let (connection, peer) = tls.connect_blocking(&mut socket, name, tcp::CONNECT_TIMEOUT)?;
        // Its own may have been renewed in between.
        if known.host() != peer.host() {
            return Err(HandshakeError::OtherHost.into());
        }
        peer.check(Role::Target, &self.vm).map_err(HandshakeError::from)?;
        Ok(DataWriter::tls(socket, connection))
    }

    fn socket(&self) -> Result<StdStream, DialError> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.address().to_socket_addrs()? {
            self.security.check_connect(address)?;
            match StdStream::connect_timeout(&address, tcp::CONNECT_TIMEOUT) {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            }
        }
        Err(failed.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_tls_only_loopback_is_listened_on() {
        let check = |security: &Security, address: &str| security.check_listen(&address.parse().unwrap());
        for loopback in ["127.0.0.1:0", "127.9.9.9:1", "[::1]:4444", "[::ffff:127.0.0.1]:1", "unix:/run/a"] {
            check(&Security::LoopbackOnly, loopback).unwrap();
        }
        for open in ["0.0.0.0:4444", "[::]:4444", "10.0.0.2:4444", "[::ffff:10.0.0.2]:1"] {
            let text = check(&Security::LoopbackOnly, open).unwrap_err().to_string();
            assert!(text.contains("--tls-dir") && text.contains("--insecure"), "{text}");
            check(&Security::Insecure, open).unwrap();
        }
    }

    #[tokio::test]
    async fn without_tls_nothing_is_sent_beyond_loopback() {
        let dialer =
            Dialer::new(Security::LoopbackOnly, "192.0.2.1:4444".parse().unwrap(), "web".parse().unwrap());
        let text = dialer.control().await.unwrap_err().to_string();
        assert!(text.contains("192.0.2.1") && text.contains("--insecure"), "{text}");
        let text = dialer.data(Duration::from_secs(1)).map(drop).unwrap_err().to_string();
        assert!(text.contains("--insecure"), "{text}");
    }
}
