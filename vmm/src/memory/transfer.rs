//! Pages between guest memory and a file descriptor, without a copy in user space.
//!
//! The descriptor is expected to block. What the bytes mean is the caller's business.

// UNSAFETY: the kernel reads and writes guest memory through raw pointers.
#![expect(unsafe_code, reason = "writev and read take raw pointers into guest memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::ram::{GuestRam, Span};
use crate::socket::{Gathering, receive_now};

/// Buffers that the kernel takes in one vectored write.
const IOVECS_MAX: usize = 1024;

/// A receiver sleeps until so much has arrived, if so much is to come: by measurement, see docs/performance.md.
const GATHER_BYTES: usize = 256 << 10;

/// Less than this is read as it comes.
const GATHER_BYTES_MIN: usize = 64 << 10;

impl GuestRam {
    /// Writes `prefix`, then the pages of `runs` (first page and count of each), to `fd`, straight from
    /// guest memory, and returns how many bytes that were. It goes on after interrupts and short
    /// writes. A page that the guest changes meanwhile is dirty again and must be sent again.
    ///
    /// # Errors
    /// `TimedOut` when the descriptor's send timeout expired, `InvalidInput` for pages out of range, and
    /// what the kernel says otherwise. Part of the bytes may have been written.
    pub fn send_pages(&self, fd: BorrowedFd<'_>, prefix: &[u8], runs: &[(u64, u64)]) -> io::Result<u64> {
        let mut buffers = Vec::with_capacity(runs.len() + 2);
        if !prefix.is_empty() {
            buffers.push(libc::iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
        }
        for &(first, count) in runs {
            for Span { pointer, bytes, .. } in self.spans(first, count)? {
                buffers.push(libc::iovec { iov_base: pointer.cast(), iov_len: bytes });
            }
        }
        write_all(fd, &mut buffers)
    }

    /// Fills the pages of `runs` (first page and count of each) with what arrives on `fd`, straight into guest memory.
    /// The machine must not run.
    ///
    /// # Errors
    /// `UnexpectedEof` if the peer closes first, `TimedOut` when the descriptor's receive timeout
    /// expired, `InvalidInput` for pages out of range, and what the kernel says otherwise. Part of the
    /// pages may have been written.
    pub fn receive_pages(&self, fd: BorrowedFd<'_>, runs: &[(u64, u64)]) -> io::Result<()> {
        let mut buffers = Vec::with_capacity(runs.len() + 1);
        for &(first, count) in runs {
            for Span { pointer, bytes, .. } in self.spans(first, count)? {
                buffers.push(libc::iovec { iov_base: pointer.cast(), iov_len: bytes });
            }
        }
        read_all(fd, &mut buffers)
    }
}

fn read_all(fd: BorrowedFd<'_>, mut buffers: &mut [libc::iovec]) -> io::Result<()> {
    let mut left_bytes: usize = buffers.iter().map(|buffer| buffer.iov_len).sum();
    let mut gathering = Gathering::new(fd);
    while !buffers.is_empty() {
        let count = buffers.len().min(IOVECS_MAX);
        let mut got = None;
        if left_bytes >= GATHER_BYTES_MIN {
            gathering.wait_for(left_bytes.min(GATHER_BYTES));
            // SAFETY: the buffers are guest memory, mapped as long as the caller's `self`, and nobody holds a reference
            // into pages that are being received.
            got = unsafe { receive_now(fd, &mut buffers[..count]) }.ok();
        }
        let got = match got {
            Some(got) => got,
            // Nothing yet, or no socket: the read that waits as long as it must says which, and why.
            None => {
                gathering.end();
                let count = libc::c_int::try_from(count).expect("IOVECS_MAX fits");
                // SAFETY: as above; the kernel writes no further than each buffer's length.
                let got = unsafe { libc::readv(fd.as_raw_fd(), buffers.as_ptr(), count) };
                let Ok(got) = usize::try_from(got) else {
                    retry_or_fail()?;
                    continue;
                };
                got
            }
        };
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left_bytes -= got;
        buffers = advance(buffers, got);
    }
    Ok(())
}

fn write_all(fd: BorrowedFd<'_>, mut buffers: &mut [libc::iovec]) -> io::Result<u64> {
    let mut written_bytes: u64 = 0;
    while !buffers.is_empty() {
        let count = buffers.len().min(IOVECS_MAX);
        let count_c = libc::c_int::try_from(count).expect("IOVECS_MAX fits");
        // SAFETY: the array holds `count` buffers, each either the caller's prefix or mapped guest
        // memory, all of which outlive the call; the kernel only reads them.
        let written = unsafe { libc::writev(fd.as_raw_fd(), buffers.as_ptr(), count_c) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                written_bytes += written as u64;
                buffers = advance(buffers, written);
            }
            Err(_) => retry_or_fail()?,
        }
    }
    Ok(written_bytes)
}

/// Drops the first `bytes` of `buffers`.
fn advance(mut buffers: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while let Some(first) = buffers.first_mut() {
        if bytes < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(bytes);
            first.iov_len -= bytes;
            break;
        }
        bytes -= first.iov_len;
        buffers = &mut buffers[1..];
    }
    buffers
}

/// Looks at why the last system call failed.
fn retry_or_fail() -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINTR) => Ok(()),
        // A blocking socket answers EAGAIN when its SO_SNDTIMEO or SO_RCVTIMEO expired.
        Some(libc::EAGAIN) => Err(io::ErrorKind::TimedOut.into()),
        Some(_) | None => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::super::{LOW_MEMORY_END, PAGE_BYTES, allocate};
    use super::*;
    use crate::config::{Backing, MemoryConfig};

    fn ram(size_bytes: u64) -> GuestRam {
        allocate(&MemoryConfig::new(size_bytes, Backing::PrivateAnonymous)).unwrap()
    }

    #[test]
    fn pages_travel_through_a_socket_with_short_writes() {
        let (source, target) = (ram(16 << 20), ram(16 << 20));
        for page in 0..source.page_count() {
            let fill = u8::try_from(page % 251).unwrap();
            source.write_page(page, &[fill; PAGE_BYTES]).unwrap();
        }
        // Every second page: more buffers than the kernel takes at once, and a socket that holds few.
        let runs: Vec<_> = (0..source.page_count()).step_by(2).map(|page| (page, 1)).collect();
        let (from, mut to) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || source.send_pages(from.as_fd(), b"prefix", &runs).unwrap());
        let mut prefix = [0; 6];
        to.read_exact(&mut prefix).unwrap();
        assert_eq!(&prefix, b"prefix");
        for page in (0..target.page_count()).step_by(2) {
            target.receive_pages(to.as_fd(), &[(page, 1)]).unwrap();
        }
        assert_eq!(sender.join().unwrap(), 6 + (8 << 20));
        target
            .for_each_page(0, target.page_count(), |page, bytes| {
                let expected = if page % 2 == 0 { u8::try_from(page % 251).unwrap() } else { 0 };
                assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
            })
            .unwrap();
    }

    #[test]
    fn a_run_across_the_hole_is_sent_whole() {
        let ram = ram(LOW_MEMORY_END + (4 << 20));
        let edge = LOW_MEMORY_END / PAGE_BYTES as u64;
        ram.write_page(edge - 1, &[1; PAGE_BYTES]).unwrap();
        ram.write_page(edge, &[2; PAGE_BYTES]).unwrap();
        let (from, mut to) = UnixStream::pair().unwrap();
        assert_eq!(ram.send_pages(from.as_fd(), b"", &[(edge - 1, 2)]).unwrap(), 8192);
        let mut bytes = [0; 8192];
        to.read_exact(&mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[4095], bytes[4096], bytes[8191]), (1, 1, 2, 2));
    }

    #[test]
    fn a_closed_peer_and_a_silent_one_are_told_apart() {
        let ram = ram(4 << 20);
        let (from, to) = UnixStream::pair().unwrap();
        to.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        assert_eq!(ram.receive_pages(to.as_fd(), &[(0, 1)]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(from);
        assert_eq!(
            ram.receive_pages(to.as_fd(), &[(0, 1)]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let error = ram.receive_pages(to.as_fd(), &[(1024, 1)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    fn low_water_bytes(socket: &TcpStream) -> libc::c_int {
        let mut value = 0;
        let mut bytes = libc::socklen_t::try_from(size_of_val(&value)).unwrap();
        // SAFETY: the kernel writes one int, which `value` is.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw mut value).cast(),
                &raw mut bytes,
            )
        };
        assert_eq!(done, 0);
        value
    }

    #[test]
    fn what_comes_in_pieces_is_taken_whole_and_leaves_the_socket_as_it_was() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut to, _) = listener.accept().unwrap();
        to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let bytes: Vec<u8> = (0..100 * PAGE_BYTES).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let expected = bytes.clone();
        let sender = thread::spawn(move || {
            // More than is gathered at once, a rest that is less, and later still something else.
            let pieces = [(&bytes[..GATHER_BYTES + 5], 5), (&bytes[GATHER_BYTES + 5..], 50), (b"next", 0)];
            for (piece, pause_ms) in pieces {
                from.write_all(piece).unwrap();
                thread::sleep(Duration::from_millis(pause_ms));
            }
            // Open until the other side is done: its end would wake a reader that nothing else does.
            from
        });
        let ram = ram(4 << 20);
        ram.receive_pages(to.as_fd(), &[(3, 100)]).unwrap();
        assert_eq!(low_water_bytes(&to), 1);
        let mut next = [0; 4];
        to.read_exact(&mut next).unwrap();
        assert_eq!(&next, b"next");
        sender.join().unwrap();
        ram.for_each_page(3, 100, |page, got| {
            let at = usize::try_from(page - 3).unwrap() * PAGE_BYTES;
            assert!(got[..] == expected[at..at + PAGE_BYTES], "page {page}");
        })
        .unwrap();
    }

    #[test]
    fn a_peer_that_takes_nothing_times_out() {
        let ram = ram(4 << 20);
        let (from, _to) = UnixStream::pair().unwrap();
        from.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        let error = ram.send_pages(from.as_fd(), b"", &[(0, 1024)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
