//! Disks as a machine's configuration, a description and a target's own choices name them.

use std::path::PathBuf;

/// The most disks of a machine: each has an interrupt line and threads of its own.
pub const DISKS_MAX: usize = 8;

/// The longest serial number of a disk, in bytes of ASCII: what a guest can ask for (virtio 1.2, section 5.2.6).
pub const DISK_SERIAL_BYTES_MAX: usize = 20;

/// A virtio block device on a file or a block device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A raw image, or a block device.
    pub path: PathBuf,
    /// Whether the guest can only read it. Several machines can then have it.
    pub read_only: bool,
    /// What the guest is told as its serial number; at most [`DISK_SERIAL_BYTES_MAX`] printable ASCII characters.
    pub serial: Option<String>,
    /// Whether it is locked against use by others, and only taken over from a source that has it locked. Without locks only
    /// the records of who may run keep two machines from using it.
    pub locked: bool,
    /// What a target knows of the disk that it takes over; `None` for a machine that starts.
    pub taken_over: Option<SourceDisk>,
}

/// The disk of a machine that is to be taken over, as its source sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceDisk {
    /// Its size.
    pub size_bytes: u64,
    /// Where in the file the source holds a lock, as long as its machine lives: by this a target knows that it has opened the
    /// same file. `None` if the source locks nothing.
    pub mark: Option<u64>,
}

/// What a target decides for itself about one disk of a machine that it takes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskChoice {
    /// Where the disk is on this host.
    pub path: PathBuf,
    /// Whether the target expects it to be read-only; as the source has it if `None`.
    pub read_only: Option<bool>,
    /// As [`DiskConfig::locked`].
    pub locked: bool,
}

/// Whether a guest can be told this serial number.
pub(super) fn is_serial(serial: &str) -> bool {
    serial.len() <= DISK_SERIAL_BYTES_MAX && serial.bytes().all(|byte| byte.is_ascii_graphic())
}
