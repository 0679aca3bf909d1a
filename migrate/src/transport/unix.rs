//! Unix sockets as a migration within one host needs them: a listener that only its own user reaches, and bytes with
//! descriptors beside them.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use ferry_vmm::unix_listener::{SocketFile, listen_at};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// A listener that only its own user reaches: the kernel asks the owner of its file, and who is at the other end of a
/// connection is asked again below.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    file: SocketFile,
}

impl Listener {
    /// Listens at `path`. A socket that is there already is replaced if nobody listens on it any more.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = listen_at(path)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, file })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The next connection of this user, with a name for its other end. Others are turned away.
    pub(crate) async fn accept(&self) -> io::Result<(UnixStream, String)> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let peer = stream.peer_cred()?;
            let pid = peer.pid().map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
            if peer.uid() == nix::unistd::geteuid().as_raw() {
                return Ok((stream, format!("process {pid} of this host")));
            }
            tracing::warn!("process {pid} was turned away: it is of user {}", peer.uid());
        }
    }
}

/// Bytes that arrived, and the descriptors beside them.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) bytes: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// There were more descriptors than anybody sends; the kernel has closed them.
    pub(crate) surplus: bool,
}

/// Room for one descriptor more than may come, so that a surplus one is seen.
const DESCRIPTORS_ROOM: usize = 2;

/// Waits for bytes. None are the end of the stream.
pub(crate) async fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Arrived> {
    stream.async_io(Interest::READABLE, || receive_now(stream.as_fd(), buffer)).await
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the kernel's kinds, of which there will be more")]
fn receive_now(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Arrived> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_ROOM))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        // Credentials come only where they were asked for.
        _ => None,
    });
    let descriptors = rights.flatten().collect();
    Ok(Arrived { bytes: received.bytes, descriptors, surplus: received.flags.contains(ReturnFlags::CTRUNC) })
}

/// Sends all `bytes`, with `descriptor` beside the first of them.
pub(crate) async fn send(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        let beside = descriptor.filter(|_| sent == 0);
        let rest = &bytes[sent..];
        sent += stream.async_io(Interest::WRITABLE, || send_now(stream.as_fd(), rest, beside)).await?;
    }
    Ok(())
}

fn send_now(socket: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptor) = &descriptor {
        let fits = control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
        assert!(fits, "there is room for one descriptor");
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixStream as StdStream;

    #[tokio::test]
    async fn only_its_own_user_can_use_the_socket_and_it_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (connected, accepted) = tokio::join!(UnixStream::connect(&path), listener.accept());
        connected.unwrap();
        assert_eq!(accepted.unwrap().1, format!("process {} of this host", std::process::id()));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed process leaves its socket");
        let first = Listener::bind(&path).unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let _connected = UnixStream::connect(&path).await.expect("the first still listens");
        // One that somebody else has put in place is not removed with the first.
        fs::remove_file(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_bytes_and_a_surplus_is_seen() {
        let (near, far) = StdStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let (near, far) = (UnixStream::from_std(near).unwrap(), UnixStream::from_std(far).unwrap());
        let file = tempfile::tempfile().unwrap();
        send(&near, b"with", Some(file.as_fd())).await.unwrap();
        let mut buffer = [0; 16];
        let arrived = receive(&far, &mut buffer).await.unwrap();
        assert_eq!((&buffer[..arrived.bytes], arrived.descriptors.len()), (&b"with"[..], 1));
        let inode = |file: fs::File| file.metadata().unwrap().ino();
        let same = arrived.descriptors.into_iter().map(|fd| inode(fd.into())).next();
        assert_eq!(same, Some(inode(file.try_clone().unwrap())));

        let many: Vec<_> = std::iter::repeat_n(file.as_fd(), 5).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(near.as_fd(), &[IoSlice::new(b"many")], &mut control, SendFlags::NOSIGNAL).unwrap();
        let arrived = receive(&far, &mut buffer).await.unwrap();
        assert!(arrived.surplus && arrived.descriptors.len() < 5, "{arrived:?}");
        drop(near);
        assert_eq!(receive(&far, &mut buffer).await.unwrap().bytes, 0);
    }
}
