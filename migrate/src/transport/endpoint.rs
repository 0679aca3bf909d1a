//! Where a target listens and where a source finds it: `host:port` between hosts, `unix:/path` within one.
//!
//! Texts are parsed here, once; nothing else looks into them.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// What a Unix socket's name begins with.
const UNIX: &str = "unix:";

/// The longest path that a Unix socket can have, in bytes: sockaddr_un holds 108 with the closing zero.
const PATH_BYTES_MAX: usize = 107;

/// The longest TCP target: a host name of 253 bytes, a colon and a port.
const HOST_BYTES_MAX: usize = 259;

/// Why a text names no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// There is no port to connect to.
    #[error("the target '{0}' names no port; write HOST:PORT, or unix:/PATH within one host")]
    NoPort(String),
    /// It is longer than any address.
    #[error("a target of {0} bytes is longer than any address")]
    TooLong(usize),
    /// It is no address to listen on.
    #[error("'{0}' is no address to listen on; write IP:PORT, or unix:/PATH for migrations within this host")]
    NoAddress(String),
    /// The path can't be a Unix socket's.
    #[error(
        "'{0}' can't be a Unix socket's path: it must be absolute and have at most {PATH_BYTES_MAX} bytes"
    )]
    Path(String),
}

/// Where a source finds its target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A host name or address with a port. Memory travels page by page.
    Tcp(String),
    /// A Unix socket on this host. Memory is handed over: no page is copied.
    Unix(PathBuf),
}

/// Where a target listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// For migrations from anywhere; port 0 takes a free one.
    Tcp(SocketAddr),
    /// For migrations within this host, by the same user.
    Unix(PathBuf),
}

fn unix_path(text: &str) -> Result<Option<PathBuf>, EndpointError> {
    let Some(path) = text.strip_prefix(UNIX) else { return Ok(None) };
    // An absolute path means the same to both processes.
    let fits = path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0');
    if fits { Ok(Some(path.into())) } else { Err(EndpointError::Path(path.to_owned())) }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = unix_path(text)? {
            return Ok(Self::Unix(path));
        }
        if text.len() > HOST_BYTES_MAX {
            return Err(EndpointError::TooLong(text.len()));
        }
        let port = text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        match port {
            Some(1..) => Ok(Self::Tcp(text.to_owned())),
            Some(0) | None => Err(EndpointError::NoPort(text.to_owned())),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = unix_path(text)? {
            return Ok(Self::Unix(path));
        }
        text.parse().map(Self::Tcp).map_err(|_| EndpointError::NoAddress(text.to_owned()))
    }
}

impl From<SocketAddr> for ListenAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_read_back_as_they_were_written() {
        for text in ["10.0.0.2:4444", "host-b:4444", "[::1]:4444", "unix:/run/ferry/web.socket"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in ["127.0.0.1:0", "[::]:4444", "unix:/run/ferry/web.socket"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_names_nothing_says_how_to_write_it() {
        for bad in ["", "host", "host:", "host:0", "host:70000", "/run/socket"] {
            let text = bad.parse::<Endpoint>().unwrap_err().to_string();
            assert!(text.contains("HOST:PORT") && text.contains("unix:"), "{bad}: {text}");
        }
        for bad in ["", "host:4444", "4444", "/run/socket"] {
            assert!(bad.parse::<ListenAddress>().unwrap_err().to_string().contains("unix:"), "{bad}");
        }
        let long = format!("unix:/{}", "x".repeat(PATH_BYTES_MAX));
        for bad in ["unix:", "unix:relative", "unix:/a\0b", long.as_str()] {
            assert!(matches!(bad.parse::<Endpoint>(), Err(EndpointError::Path(_))), "{bad}");
            assert!(matches!(bad.parse::<ListenAddress>(), Err(EndpointError::Path(_))), "{bad}");
        }
        let name = format!("{}:1", "x".repeat(300));
        assert_eq!(name.parse::<Endpoint>(), Err(EndpointError::TooLong(302)));
    }
}
