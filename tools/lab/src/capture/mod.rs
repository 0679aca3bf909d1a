//! Packet capture on one interface of a namespace, with the kernel's time stamps.
//!
//! A filter in the kernel keeps what is out of scope from being copied at all: a capture of
//! announcements must not lose them among gigabits of other traffic, nor slow that down.

mod frame;

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use socket2::{SockFilter, Socket};

use frame::{ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_RARP, ICMPV6_ADVERTISEMENT, NEXT_HEADER_ICMPV6};
pub use frame::{Frame, FrameKind};

use crate::clock::LabClock;
use crate::namespace::{Namespace, NamespaceError};

/// The most bytes of a frame that are kept.
pub const SNAP_BYTES: usize = 256;

/// The most frames that a capture keeps; all are counted.
pub const FRAMES_MAX: usize = 100_000;

/// Room in the kernel for frames that are not read yet.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// How often the capturing thread looks whether it is to end.
const RECEIVE_TIMEOUT_MS: i64 = 20;

/// How often [`Capture::wait_for`] looks for new frames.
const WAIT_STEP: Duration = Duration::from_millis(1);

/// The type of a captured packet that its own host sent (`PACKET_OUTGOING`).
const PACKET_OUTGOING: u8 = 4;

/// Why a capture could not start.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The namespace could not be entered, or the thread not started.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// There is no such interface.
    #[error("can't capture on '{interface}': there is no such interface in the namespace of '{host}'")]
    Missing {
        /// The interface that was asked for.
        interface: String,
        /// The namespace's label.
        host: String,
    },
    /// The packet socket could not be made.
    #[error("can't capture on '{interface}' in the namespace of '{host}'; it takes root (CAP_NET_RAW)")]
    Socket {
        /// The interface that was asked for.
        interface: String,
        /// The namespace's label.
        host: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which frames the kernel hands over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    Everything,
    /// ARP, RARP and IPv6 neighbour advertisements.
    Announcements,
}

/// What a capture has seen.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// The first frames that its filter let pass, at most [`FRAMES_MAX`], in order of arrival.
    pub frames: Vec<Frame>,
    /// Frames that passed the filter beyond those.
    pub left_out: u64,
}

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    clock: LabClock,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    running: AtomicBool,
    captured: Mutex<Captured>,
}

impl Capture {
    /// Captures frames within `scope` that pass `filter`, sent or received by `interface`.
    ///
    /// What the interface sees after this returns is captured.
    ///
    /// # Errors
    /// [`CaptureError::Missing`] if there is no such interface.
    pub fn start(
        namespace: &Namespace,
        clock: LabClock,
        interface: &str,
        scope: Scope,
        filter: impl Fn(&Frame) -> bool + Send + 'static,
    ) -> Result<Self, CaptureError> {
        let host = || namespace.label().to_owned();
        let (socket, index) = namespace
            .run(|| open(interface, scope))?
            .map_err(|source| CaptureError::Socket { interface: interface.into(), host: host(), source })?
            .ok_or_else(|| CaptureError::Missing { interface: interface.into(), host: host() })?;
        let captured = Mutex::new(Captured::default());
        let shared = Arc::new(Shared { running: AtomicBool::new(true), captured });
        let for_thread = Arc::clone(&shared);
        let thread = namespace.start_thread("capture", move || {
            while for_thread.running.load(Ordering::Relaxed) {
                let Some(frame) = receive(&socket, index, clock) else { continue };
                if filter(&frame) {
                    for_thread.keep(frame);
                }
            }
        })?;
        Ok(Self { clock, shared, thread: Some(thread) })
    }

    /// What it has seen so far.
    #[must_use]
    pub fn snapshot(&self) -> Captured {
        self.shared.captured().clone()
    }

    /// Waits until it has seen a frame that `wanted` says yes to, for at most `timeout`; returns the
    /// first such frame.
    #[must_use]
    pub fn wait_for(&self, timeout: Duration, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let deadline = self.clock.now() + timeout;
        let mut seen = 0;
        loop {
            {
                let captured = self.shared.captured();
                if let Some(frame) = captured.frames[seen..].iter().find(|frame| wanted(frame)) {
                    return Some(frame.clone());
                }
                seen = captured.frames.len();
            }
            if self.clock.now() >= deadline {
                return None;
            }
            thread::sleep(WAIT_STEP);
        }
    }

    /// Ends the capture and returns what it has seen.
    #[must_use]
    pub fn stop(mut self) -> Captured {
        self.end();
        std::mem::take(&mut *self.shared.captured())
    }

    fn end(&mut self) {
        self.shared.running.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn captured(&self) -> MutexGuard<'_, Captured> {
        self.captured.lock().expect("nothing panics while it holds the lock")
    }

    fn keep(&self, frame: Frame) {
        let mut captured = self.captured();
        if captured.frames.len() < FRAMES_MAX {
            captured.frames.push(frame);
        } else {
            captured.left_out += 1;
        }
    }
}

/// A packet socket on `interface` and that one's index, or `None` if there is no such interface.
fn open(interface: &str, scope: Scope) -> io::Result<Option<(Socket, usize)>> {
    let address = getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.as_ref().and_then(|address| address.as_link_addr()).copied());
    let Some(address) = address else { return Ok(None) };
    let socket = Socket::from(socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )?);
    socket.attach_filter(&kernel_filter(scope))?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(RECEIVE_TIMEOUT_MS))?;
    // The address carries no protocol, so the socket keeps the one it was made with.
    bind(socket.as_raw_fd(), &address)?;
    Ok(Some((socket, address.ifindex())))
}

/// The next frame of the interface, or `None` if there was none for a while.
fn receive(socket: &Socket, index: usize, clock: LabClock) -> Option<Frame> {
    let mut bytes = [0; SNAP_BYTES];
    let mut control = cmsg_space!(TimeSpec);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message =
        match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty()) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            Err(_) => {
                // The interface is down or gone. It may come back, and until then this must not spin.
                thread::sleep(WAIT_STEP);
                return None;
            }
        };
    let address = message.address?;
    // Until it was bound, the socket heard every interface.
    if address.ifindex() != index {
        return None;
    }
    let stamp = message.cmsgs().ok()?.find_map(|control| {
        if let ControlMessageOwned::ScmTimestampns(stamp) = control { Some(stamp) } else { None }
    });
    let at_us = stamp.and_then(|stamp| stamp_us(clock, stamp)).unwrap_or_else(|| clock.now_us());
    let length = message.bytes;
    Some(Frame { at_us, outgoing: address.pkttype() == PACKET_OUTGOING, bytes: bytes[..length].to_vec() })
}

fn stamp_us(clock: LabClock, stamp: TimeSpec) -> Option<u64> {
    let time = SystemTime::UNIX_EPOCH + Duration::from(stamp);
    u64::try_from(clock.since_origin(time).as_micros()).ok()
}

// Classic BPF: load a halfword or a byte at a fixed place, jump if equal, return so many bytes.
const LOAD_HALFWORD: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

fn kernel_filter(scope: Scope) -> Vec<SockFilter> {
    let keep = SockFilter::new(RETURN, 0, 0, u32::try_from(SNAP_BYTES).unwrap_or(u32::MAX));
    match scope {
        Scope::Everything => vec![keep],
        Scope::Announcements => {
            let load = |code, at| SockFilter::new(code, 0, 0, at);
            // Jumps count from the next instruction: 8 keeps, 9 drops.
            let jump = |value: u32, equal, other| SockFilter::new(JUMP_IF_EQUAL, equal, other, value);
            vec![
                load(LOAD_HALFWORD, 12),
                jump(ETHERTYPE_ARP.into(), 6, 0),
                jump(ETHERTYPE_RARP.into(), 5, 0),
                jump(ETHERTYPE_IPV6.into(), 0, 5),
                load(LOAD_BYTE, 20),
                jump(NEXT_HEADER_ICMPV6.into(), 0, 3),
                load(LOAD_BYTE, 54),
                jump(ICMPV6_ADVERTISEMENT.into(), 0, 1),
                keep,
                SockFilter::new(RETURN, 0, 0, 0),
            ]
        }
    }
}
