//! What moving pages through a socket needs of the kernel and only its C interface has.
//!
//! What the pages mean, and how connections are made, is others' business.

// UNSAFETY: socket options that no safe wrapper has, and a read into buffers that the caller vouches for.
#![expect(unsafe_code, reason = "getsockopt, setsockopt and recvmsg take raw pointers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a receiver waits for a good part of what is to come before it takes what there is.
const GATHER_MS_MAX: u8 = 20;

/// TCP_INFO as far as it is wanted here: 24 words, of which number 21 is `tcpi_busy_time` in µs (Linux 4.10).
type TcpInfo = [u64; 24];
const BUSY_TIME_WORD: usize = 21;

/// How long the connection has had something to send that was not acknowledged yet, since it was made; `None` for what
/// is no TCP connection.
#[must_use]
pub fn tcp_busy_time(socket: BorrowedFd<'_>) -> Option<Duration> {
    let mut info: TcpInfo = [0; 24];
    let mut bytes = libc::socklen_t::try_from(size_of::<TcpInfo>()).expect("192");
    // SAFETY: the kernel writes at most `bytes` bytes, the size of `info`, which is valid with any content.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    (done == 0).then(|| Duration::from_micros(info[BUSY_TIME_WORD]))
}

/// A socket whose receiver is woken only when much has arrived, which costs a fraction of being woken for every segment.
/// Dropping it makes the socket what it was.
pub(crate) struct Gathering<'a> {
    socket: BorrowedFd<'a>,
    /// What SO_RCVLOWAT is.
    low_water_bytes: usize,
}

impl<'a> Gathering<'a> {
    pub(crate) fn new(socket: BorrowedFd<'a>) -> Self {
        Self { socket, low_water_bytes: 1 }
    }

    /// Waits until `bytes` can be read at once, or for a while; the latter also where the descriptor can't do it. A read
    /// that blocks must not follow: the kernel wakes it for as many bytes again, and fewer may be to come.
    pub(crate) fn wait_for(&mut self, bytes: usize) {
        if self.set_low_water(bytes).is_err() {
            return;
        }
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        // Whatever it says, reading says more.
        let _ = poll(&mut polled, PollTimeout::from(GATHER_MS_MAX));
    }

    /// Makes reads that block safe again.
    pub(crate) fn end(&mut self) {
        // It could be set before, so it can be set again.
        let _ = self.set_low_water(1);
    }

    fn set_low_water(&mut self, bytes: usize) -> io::Result<()> {
        if bytes == self.low_water_bytes {
            return Ok(());
        }
        let value = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
        let value_bytes = libc::socklen_t::try_from(size_of_val(&value)).expect("4");
        // SAFETY: the kernel reads one int, which `value` is.
        let done = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const value).cast(),
                value_bytes,
            )
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        self.low_water_bytes = bytes;
        Ok(())
    }
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads what there is into `buffers`, without waiting; 0 bytes are the end.
///
/// # Errors
/// `WouldBlock` if nothing is there, and what else the kernel says.
///
/// # Safety
/// For the length of the call each buffer is memory that may be written to and that nobody holds a reference into.
pub(crate) unsafe fn receive_now(socket: BorrowedFd<'_>, buffers: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: a header of null pointers and zero lengths is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_mut_ptr();
    message.msg_iovlen = buffers.len();
    // SAFETY: the header names `buffers` and its length, and the caller vouches for what they point to.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
