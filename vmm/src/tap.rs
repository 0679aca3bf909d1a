//! Tap interfaces: attaching to one, and making persistent ones for test hosts.
//!
//! A tap is attached exclusively, so two machines can never share one: the kernel answers the second
//! with EBUSY. Every frame carries a virtio-net header of 12 bytes. What the tap could leave undone in the frames that it
//! hands out (checksums, segmentation) is found out at the start, and stays off until it is asked for.
//!
//! This module does not configure addresses, bridges or link state: that is the operator's side.

// UNSAFETY: the tun driver is configured by ioctls that nix does not wrap.
#![expect(unsafe_code, reason = "TUNSETIFF and its relatives are raw ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::net::if_::if_nametoindex;

/// Bytes of the virtio-net header in front of every frame that is read from or written to a [`Tap`].
pub const VNET_HEADER_BYTES: usize = 12;

/// The longest interface name that Linux takes, without the terminating zero.
pub const INTERFACE_NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Why a tap could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty, too long, or has a character that Linux refuses.
    #[error("'{name}' can't be an interface name (1 to {INTERFACE_NAME_BYTES_MAX} bytes, no '/' or space)")]
    Name {
        /// The name as given.
        name: String,
    },
    /// There is no interface of that name in this network namespace.
    #[error(
        "there is no interface '{name}' in this network namespace; make one with: ip tuntap add {name} mode tap"
    )]
    Missing {
        /// The interface that was asked for.
        name: String,
    },
    /// Another process holds the tap.
    #[error("tap '{name}' is in use by another process; stop that one or give this machine another tap")]
    Busy {
        /// The interface that was asked for.
        name: String,
    },
    /// The interface exists but is no tap.
    #[error("interface '{name}' is not a tap")]
    NotATap {
        /// The interface that was asked for.
        name: String,
    },
    /// A system call failed otherwise.
    #[error("can't {action} tap '{name}'")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The interface that was asked for.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What a tap's reader can take over from the host's network stack: frames then come with unfinished checksums, or as
/// large ones that stand for many. As in the kernel's linux/if_tun.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapOffloads(libc::c_uint);

impl TapOffloads {
    /// Nothing: every frame is whole and fits the link.
    pub const NONE: Self = Self(0);
    /// Checksums of TCP and UDP. The others need it.
    pub const CHECKSUM: Self = Self(libc::TUN_F_CSUM);
    /// Segmentation of TCP over IPv4.
    pub const TCP4: Self = Self(libc::TUN_F_TSO4);
    /// Segmentation of TCP over IPv6.
    pub const TCP6: Self = Self(libc::TUN_F_TSO6);
    /// The same where TCP reports congestion.
    pub const TCP_ECN: Self = Self(libc::TUN_F_TSO_ECN);
    /// Segmentation of UDP, over both; Linux 6.2 and newer.
    pub const UDP: Self = Self(libc::TUN_F_USO4 | libc::TUN_F_USO6);

    /// What a tap is asked for at the start, from the most to the least that kernels have had.
    const LADDER: [Self; 4] = [
        Self(Self::ALL_TCP.0 | Self::UDP.0),
        Self::ALL_TCP,
        Self(Self::CHECKSUM.0 | Self::TCP4.0 | Self::TCP6.0),
        Self::CHECKSUM,
    ];

    const ALL_TCP: Self = Self(Self::CHECKSUM.0 | Self::TCP4.0 | Self::TCP6.0 | Self::TCP_ECN.0);

    /// Both together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// An attached tap, non-blocking, with virtio-net headers. Dropping it detaches it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    supported: TapOffloads,
}

impl Tap {
    /// Attaches to the existing tap `name` in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`TapError::Missing`], [`TapError::Busy`] and [`TapError::NotATap`] tell those cases apart.
    pub fn attach(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        if if_nametoindex(name).is_err() {
            return Err(TapError::Missing { name: name.into() });
        }
        let mut tap = Self::open(name)?;
        let header_bytes = i32::try_from(VNET_HEADER_BYTES).expect("12 fits");
        // SAFETY: TUNSETVNETHDRSZ reads one int from the pointer, which outlives the call.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) };
        tap.check("set the header size of", done)?;
        let is_taken = |offloads: &TapOffloads| tap.set_offloads(*offloads).is_ok();
        tap.supported = TapOffloads::LADDER.into_iter().find(is_taken).unwrap_or_default();
        tap.set_offloads(TapOffloads::NONE)?;
        Ok(tap)
    }

    /// Which offloads this host's tun driver has.
    #[must_use]
    pub fn supported_offloads(&self) -> TapOffloads {
        self.supported
    }

    /// Has the frames that come from now on left as unfinished as the reader can take them, and no more.
    ///
    /// # Errors
    /// The driver lacks one of them; nothing has changed then.
    pub fn set_offloads(&self, offloads: TapOffloads) -> Result<(), TapError> {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, offloads.0) };
        self.check("set the offloads of", done)
    }

    /// Makes the persistent tap `name`, or takes an existing one, and detaches again.
    ///
    /// # Errors
    /// As [`Tap::attach`], and whatever the kernel says of making one (it takes CAP_NET_ADMIN).
    pub fn make_persistent(name: &str) -> Result<(), TapError> {
        check_name(name)?;
        let tap = Self::open(name)?;
        // SAFETY: TUNSETPERSIST takes its flag by value.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1) };
        tap.check("keep", done)
    }

    /// A second handle of a tap that is attached already, as if its driver had these offloads.
    #[cfg(test)]
    pub(crate) fn from_parts(file: File, name: &str, supported: TapOffloads) -> Self {
        Self { file, name: name.into(), supported }
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that frames are read from and written to, each with its header.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    fn open(name: &str) -> Result<Self, TapError> {
        let io_error = |action, source: io::Error| TapError::Io { action, name: name.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|source| io_error("open /dev/net/tun for", source))?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // SAFETY: ifreq is plain C data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("the three flags fit");
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if done < 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy { name: name.into() },
                Some(libc::EINVAL) => TapError::NotATap { name: name.into() },
                _ => io_error("attach to", source),
            });
        }
        Ok(Self { file, name: name.into(), supported: TapOffloads::NONE })
    }

    fn check(&self, action: &'static str, done: libc::c_int) -> Result<(), TapError> {
        if done < 0 {
            let source = io::Error::last_os_error();
            return Err(TapError::Io { action, name: self.name.clone(), source });
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let fits = (1..=INTERFACE_NAME_BYTES_MAX).contains(&name.len());
    let clean = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if fits && clean { Ok(()) } else { Err(TapError::Name { name: name.into() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "with space", "a/b", "sixteen-bytes-xx", "täp"] {
            assert!(matches!(Tap::attach(name), Err(TapError::Name { .. })), "{name}");
        }
        let error = Tap::attach("no-such-tap").unwrap_err();
        assert!(matches!(&error, TapError::Missing { name } if name == "no-such-tap"), "{error}");
    }
}
