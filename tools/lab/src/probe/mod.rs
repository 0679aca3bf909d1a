//! Probes that watch a VM through a migration: a UDP echo every millisecond, and one TCP connection.
//!
//! A probe reports what it saw, its own lateness included: on a busy machine a prober that was not
//! scheduled must not be mistaken for a VM that was silent.

pub mod tcp;
pub mod udp;

use std::io;
use std::net::SocketAddr;

pub use tcp::{TcpProbe, TcpReport};
pub use udp::{UdpProbe, UdpReport};

use crate::http::HttpError;
use crate::namespace::NamespaceError;

/// Why a probe could not start.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A thread of the probe could not start.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The TCP probe's event loop could not start.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The UDP socket could not be made.
    #[error("can't make a UDP socket towards {target}")]
    Socket {
        /// Where the probe was to send.
        target: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
