//! Tap interfaces: attaching to one, and making persistent ones for test hosts.
//!
//! A tap is attached exclusively, so two machines can never share one: the kernel answers the second
//! with EBUSY. Offloads stay off and every frame carries a virtio-net header of 12 bytes.
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

/// An attached tap, non-blocking, with virtio-net headers. Dropping it detaches it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
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
        let tap = Self::open(name)?;
        let header_bytes = i32::try_from(VNET_HEADER_BYTES).expect("12 fits");
        // SAFETY: TUNSETVNETHDRSZ reads one int from the pointer, which outlives the call.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) };
        tap.check("set the header size of", done)?;
        // SAFETY: TUNSETOFFLOAD takes its flags by value; zero turns every offload off.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, 0) };
        tap.check("turn off the offloads of", done)?;
        Ok(tap)
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

    /// A second handle of a tap that is attached already.
    #[cfg(test)]
    pub(crate) fn from_parts(file: File, name: &str) -> Self {
        Self { file, name: name.into() }
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
        Ok(Self { file, name: name.into() })
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
