//! TLS 1.3 on control connections and data streams. Both sides show certificates of one authority, and each checks what
//! the other's says of it ([`identity`]).
//!
//! ```text
//!  DIR/ca.pem      the authorities that this host trusts
//!  DIR/host.pem    this host's certificate, and those between it and the authority if there are any
//!  DIR/host.key    its private key, for its owner's eyes only
//! ```
//!
//! The address or name that a source was told to connect to must stand in the target's certificate, as everywhere. Nothing
//! is resumed and nothing is sent early: every connection is a full handshake, so that what a certificate says is always
//! looked at.

pub mod identity;
mod load;
mod renewal;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::TcpStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, ServerConfig, ServerConnection,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use identity::{Forbidden, HostIdentity, IdentityError, Role};
pub use renewal::Credentials;

/// The files in a host's folder.
pub const CA_FILE: &str = "ca.pem";
/// This host's certificate, followed by those between it and the authority.
pub const CERTIFICATE_FILE: &str = "host.pem";
/// The certificate's private key.
pub const KEY_FILE: &str = "host.key";

/// What a TLS record of the handshake begins with.
pub(crate) const HANDSHAKE_BYTE: u8 = 0x16;

/// What both sides say they speak within TLS, so that a certificate's owner can't be lured into another protocol.
const PROTOCOL: &[u8] = b"ferry";

/// Why this host's own certificate and key can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not there, or can't be read.
    #[error("can't read {}: {cause}; 'ferry cert issue' makes what belongs into this folder", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Others than its owner may read the key.
    #[error(
        "others may read the private key {} (mode {mode:04o}): 'chmod 600 {}', and issue a new one if they did",
        file.display(),
        file.display()
    )]
    Exposed {
        /// The key's file.
        file: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file holds something else than it should.
    #[error("{} is unusable: {why}", file.display())]
    Content {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The certificate is not one that peers would take.
    #[error("this host's certificate {} is no use to anybody: {why}", file.display())]
    Own {
        /// The certificate's file.
        file: PathBuf,
        /// Why peers would refuse it.
        why: String,
    },
    /// The certificate does not allow what this host is to do.
    #[error("{}: {forbidden}", file.display())]
    Forbidden {
        /// The certificate's file.
        file: PathBuf,
        /// What it does not allow.
        forbidden: Forbidden,
    },
}

/// Why no connection came about, or was ended at once.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(io::Error),
    #[error("{}", in_words(.0))]
    Tls(rustls::Error),
    #[error("{0}")]
    Identity(#[from] IdentityError),
    #[error("{0}")]
    Forbidden(#[from] Forbidden),
    #[error("another host answers than before")]
    OtherHost,
    #[error("'{0}' is neither a host name nor an address that a certificate could be for")]
    ServerName(String),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(inner) => Self::Tls(inner.clone()),
            None => Self::Io(error),
        }
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

/// What a failed handshake means for people. The library's kinds will become more.
#[expect(clippy::wildcard_enum_match_arm, reason = "the library's kinds, of which there will be more")]
pub(crate) fn in_words(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(why) => {
            format!("its certificate was refused here: {}", of_certificate(why))
        }
        rustls::Error::NoCertificatesPresented => "it showed no certificate".to_owned(),
        rustls::Error::AlertReceived(alert) => of_alert(*alert),
        rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. } => {
            "the other side does not speak TLS; it needs a certificate as well ('ferry receive --tls-dir')"
                .to_owned()
        }
        other => format!("TLS failed: {other}"),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's kinds, of which there will be more")]
fn of_certificate(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            format!("it is of another authority than those in this host's {CA_FILE}")
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is not made for this role".to_owned()
        }
        other => other.to_string(),
    }
}

/// A peer says no more than a number about what it did not like.
#[expect(clippy::wildcard_enum_match_arm, reason = "numbers of a registry that grows")]
fn of_alert(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateExpired => "it is not valid now",
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is of another authority than the peer trusts"
        }
        AlertDescription::CertificateRevoked => "it was revoked",
        AlertDescription::UnsupportedCertificate => "it is not made for this role",
        AlertDescription::CertificateRequired => "none was shown",
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => "its log says why",
        other => return format!("the other side ended the TLS handshake ({other:?})"),
    };
    format!("the other side refused this host's certificate: {why}")
}

/// This host's certificate, its key, and whom it trusts.
#[derive(Clone)]
pub struct Tls {
    folder: PathBuf,
    own: HostIdentity,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("folder", &self.folder)
            .field("host", &self.own.host())
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads [`CA_FILE`], [`CERTIFICATE_FILE`] and [`KEY_FILE`] in `folder`.
    ///
    /// # Errors
    /// [`TlsError`] names the file and what is wrong with it. A certificate that no peer would take (expired, of another
    /// authority, without a name) is refused here, where its owner sees it.
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        load::load(folder)
    }

    /// What this host's certificate says of it.
    #[must_use]
    pub const fn own(&self) -> &HostIdentity {
        &self.own
    }

    /// The folder that it was read from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether this host may have `role` at all.
    ///
    /// # Errors
    /// That its own certificate does not allow it.
    pub fn check_own_role(&self, role: Role) -> Result<(), TlsError> {
        let file = self.folder.join(CERTIFICATE_FILE);
        self.own.check_role(role).map_err(|forbidden| TlsError::Forbidden { file, forbidden })
    }

    /// Speaks TLS on `stream` as the source, to a host whose certificate must be for `name`.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        name: ServerName<'static>,
    ) -> Result<(tokio_rustls::TlsStream<TcpStream>, HostIdentity), HandshakeError> {
        let stream = TlsConnector::from(Arc::clone(&self.client)).connect(name, stream).await?;
        let peer = peer_of(stream.get_ref().1.peer_certificates())?;
        Ok((stream.into(), peer))
    }

    /// The same on a socket that blocks, for at most about `within` for each of its few messages.
    pub(crate) fn connect_blocking(
        &self,
        socket: &mut StdStream,
        name: ServerName<'static>,
        within: Duration,
    ) -> Result<(ClientConnection, HostIdentity), HandshakeError> {
        let mut connection = ClientConnection::new(Arc::clone(&self.client), name)?;
        socket.set_read_timeout(Some(within))?;
        while connection.is_handshaking() {
            connection.complete_io(socket)?;
        }
        socket.set_read_timeout(None)?;
        let peer = peer_of(connection.peer_certificates())?;
        Ok((connection, peer))
    }

    /// Speaks TLS on `stream` as the target.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, HostIdentity), HandshakeError> {
        let stream = TlsAcceptor::from(Arc::clone(&self.server)).accept(stream).await?;
        let peer = peer_of(stream.get_ref().1.peer_certificates())?;
        Ok((stream, peer))
    }
}

fn peer_of(
    certificates: Option<&[rustls::pki_types::CertificateDer<'static>]>,
) -> Result<HostIdentity, HandshakeError> {
    let leaf = certificates.and_then(<[_]>::first).ok_or(rustls::Error::NoCertificatesPresented)?;
    Ok(HostIdentity::of(leaf)?)
}

/// The name that a target's certificate must be for: the host part of `host:port` as the operator said it.
pub(crate) fn server_name(target: &str) -> Result<ServerName<'static>, HandshakeError> {
    let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(host.to_owned()).map_err(|_| HandshakeError::ServerName(host.to_owned()))
}

/// Whether a certificate can be for this address: one of IP, or a name as in DNS without a final dot.
#[must_use]
pub fn is_address(text: &str) -> bool {
    ServerName::try_from(text).is_ok() && !text.ends_with('.')
}

/// The receiving end of a stream after its handshake: what of it is decrypted already comes out of here.
pub(crate) type Accepted = (TcpStream, ServerConnection);
