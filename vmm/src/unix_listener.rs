//! A Unix socket that only its own user reaches, and whose file goes with it: for consoles of the serial port, and for
//! whoever else of this host a process listens to.
//!
//! Who may connect is settled by the file's mode; what is said is the caller's business.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Only the user whose process listens may connect.
const MODE: u32 = 0o600;

/// The file of a socket; it is removed when this is dropped, unless somebody else has put another in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a socket can't be removed");
        }
    }
}

/// Listens at `path`, without blocking. A socket that is there already is replaced if nobody listens on it any more.
///
/// # Errors
/// `AddrInUse` if somebody does, `AlreadyExists` if there is a file that is no socket, and what else the kernel says.
pub fn listen_at(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    match bind(socket.as_raw_fd(), &address) {
        Err(Errno::EADDRINUSE) => {
            remove_stale(path)?;
            bind(socket.as_raw_fd(), &address)?;
        }
        other => other?,
    }
    let metadata = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
    // Nobody can connect before it listens, so there is no moment in which others could.
    fs::set_permissions(path, Permissions::from_mode(MODE))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok((UnixListener::from(socket), file))
}

fn remove_stale(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        let text = "there is a file that is no socket; it is left alone";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on it")),
    }
}
