//! A disk on this host: its file, its size, and the locks by which one machine owns it.
//!
//! ```text
//!            open                 let_go                take
//!  starts ─────────► Owned ──────────────► LetGo ─────────────► Owned
//!            open                  take                    close
//!  target ─────────► Intended ───────────► Owned      any ─────────► Closed
//! ```
//!
//! Bytes go through the host's page cache. Images with a format of their own (qcow2), several writers at once, and block devices
//! whose locks reach other hosts (SCSI reservations) are not here.

mod lock;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use self::lock::{INTENT, OWNER, Sharing, Span};
use crate::config::{DiskConfig, SourceDisk};

/// Bytes of a sector, the unit in which guests address a disk.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Zeroes written at once where the file system can't make them itself.
const ZEROES: &[u8] = &[0; 64 << 10];

/// Why a disk can't be had, or not be used any more.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It can't be opened.
    #[error("can't open disk '{}' to {access}{}", path.display(), hint(*is_taken_over))]
    Open {
        /// Its path.
        path: PathBuf,
        /// What for.
        access: &'static str,
        /// Whether it is the disk of a machine that comes from another host.
        is_taken_over: bool,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is something else than a file or a block device.
    #[error("'{}' can't be a disk: it is neither a file nor a block device", path.display())]
    NotADisk {
        /// Its path.
        path: PathBuf,
    },
    /// It has no whole number of sectors, or none.
    #[error(
        "'{}' can't be a disk: its {size_bytes} bytes are no whole number of sectors of {SECTOR_BYTES} bytes; \
         make it larger with 'truncate --size'", path.display()
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// It has another size than at the source.
    #[error(
        "disk '{}' has {size_bytes} bytes here and {expected} at the source, so it is not the same disk", path.display()
    )]
    OtherSize {
        /// Its path.
        path: PathBuf,
        /// Its size here.
        size_bytes: u64,
        /// Its size there.
        expected: u64,
    },
    /// Another process has it locked.
    #[error(
        "disk '{}' is in use by another machine, on this host or another one; stop that one, or give this machine \
         another disk", path.display()
    )]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// A target is about to take it over.
    #[error(
        "disk '{}' is being taken over by a host that a machine migrates to; wait until that is done, or end it there",
        path.display()
    )]
    Awaited {
        /// Its path.
        path: PathBuf,
    },
    /// The source's lock can't be seen in the file that was opened.
    #[error(
        "disk '{}' is not the file that the source uses: the source's lock is not to be seen here; give the path of the \
         shared one with --disk path=.., with lock=off where the storage does not carry locks between hosts",
        path.display()
    )]
    NotTheSources {
        /// Its path.
        path: PathBuf,
    },
    /// The machine was stopped.
    #[error("disk '{}' was let go of with its machine", path.display())]
    Closed {
        /// Its path.
        path: PathBuf,
    },
    /// A lock could not be asked for.
    #[error(
        "can't lock disk '{}'; where its file system has no locks, lock=off leaves it to you that nobody else uses it",
        path.display()
    )]
    Lock {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What was written could not be brought to the storage.
    #[error("can't bring all that was written to disk '{}' to its storage", path.display())]
    Flush {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn hint(is_taken_over: bool) -> &'static str {
    if is_taken_over {
        "; a machine's disks must be on storage that both hosts share: give their paths here with --disk path=.."
    } else {
        ""
    }
}

/// What is held of a disk's locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// Nothing, by the operator's wish.
    Off,
    /// The intent: another machine still owns it.
    Intended,
    /// The ownership.
    Owned,
    /// Nothing any more: another machine may own it by now.
    LetGo,
    /// Nothing ever again.
    Closed,
}

/// An opened disk. Dropping it gives back its locks.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    file: File,
    read_only: bool,
    size_bytes: u64,
    /// Where this machine's mark is, if anything is locked.
    mark: Option<u64>,
    hold: Mutex<Hold>,
}

impl Disk {
    /// Opens a disk, and owns it or, if it is to be taken over, intends to.
    pub(crate) fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let DiskConfig { path, read_only, serial: _, locked, taken_over } = config;
        let file = open_file(path, *read_only, taken_over.is_some())?;
        let size_bytes = (&file).seek(SeekFrom::End(0)).map_err(|source| DiskError::Open {
            path: path.clone(),
            access: "find its end",
            is_taken_over: taken_over.is_some(),
            source,
        })?;
        let mut disk = Self {
            path: path.clone(),
            file,
            read_only: *read_only,
            size_bytes,
            mark: None,
            hold: Mutex::new(Hold::Off),
        };
        // Before anything of a file is told to a peer, the peer has to show that it has the same one.
        if *locked {
            disk.lock_first(taken_over.as_ref())?;
        }
        disk.check_size(taken_over.as_ref())?;
        if taken_over.is_some() {
            disk.forget_cached();
        }
        Ok(disk)
    }

    fn lock_first(&mut self, taken_over: Option<&SourceDisk>) -> Result<(), DiskError> {
        if let Some(SourceDisk { size_bytes: _, mark }) = taken_over {
            let seen = match mark {
                Some(mark) => lock::is_locked_elsewhere(&self.file, lock::mark(*mark))
                    .map_err(|source| self.lock_error(source))?,
                None => false,
            };
            if !seen {
                return Err(DiskError::NotTheSources { path: self.path.clone() });
            }
        }
        if !self.try_lock(INTENT)? {
            return Err(DiskError::Awaited { path: self.path.clone() });
        }
        if taken_over.is_some() {
            *self.hold() = Hold::Intended;
        } else {
            if !self.try_lock(OWNER)? {
                return Err(DiskError::InUse { path: self.path.clone() });
            }
            *self.hold() = Hold::Owned;
            lock::unlock(&self.file, INTENT).map_err(|source| self.lock_error(source))?;
        }
        let number =
            getrandom::u64().map_err(|error| self.lock_error(io::Error::other(error.to_string())))?;
        // Should another machine have drawn the same number, a target could take its disk for this one's.
        if !self.try_lock(lock::mark(number))? && !self.read_only {
            return Err(DiskError::InUse { path: self.path.clone() });
        }
        self.mark = Some(number);
        Ok(())
    }

    fn check_size(&self, taken_over: Option<&SourceDisk>) -> Result<(), DiskError> {
        let (path, size_bytes) = (self.path.clone(), self.size_bytes);
        match taken_over {
            Some(SourceDisk { size_bytes: expected, mark: _ }) if *expected != size_bytes => {
                Err(DiskError::OtherSize { path, size_bytes, expected: *expected })
            }
            Some(_) | None if size_bytes == 0 || size_bytes % SECTOR_BYTES != 0 => {
                Err(DiskError::Size { path, size_bytes })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Drops what this host remembers of the disk from before: another one has written to it. File systems that hosts share do
    /// that themselves, block devices do not.
    fn forget_cached(&self) {
        // It is advice: pages that are being read just now stay, and nobody reads a disk that a guest has mounted elsewhere.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What a target has to know of it.
    pub(crate) fn as_source(&self) -> SourceDisk {
        SourceDisk { size_bytes: self.size_bytes, mark: self.mark }
    }

    /// Owns the disk, for which nobody else may own it; false if there was nothing to do.
    pub(crate) fn take(&self) -> Result<bool, DiskError> {
        let mut hold = self.hold();
        match *hold {
            Hold::Off | Hold::Owned => return Ok(false),
            Hold::Closed => return Err(DiskError::Closed { path: self.path.clone() }),
            Hold::Intended | Hold::LetGo => {}
        }
        if !self.try_lock(OWNER)? {
            return Err(DiskError::InUse { path: self.path.clone() });
        }
        if *hold == Hold::Intended {
            // It stays locked with the rest if this fails, and only keeps others from intending.
            let _ = lock::unlock(&self.file, INTENT);
        }
        *hold = Hold::Owned;
        Ok(true)
    }

    /// Gives up the ownership, if there is one. The caller has flushed the disk.
    pub(crate) fn let_go(&self) -> Result<(), DiskError> {
        let mut hold = self.hold();
        if *hold == Hold::Owned {
            lock::unlock(&self.file, OWNER).map_err(|source| self.lock_error(source))?;
            *hold = Hold::LetGo;
        }
        Ok(())
    }

    /// Lets go of everything for good; what is only in this host's memory is brought to the storage before.
    pub(crate) fn close(&self) -> Result<(), DiskError> {
        let mut hold = self.hold();
        let flushed = match std::mem::replace(&mut *hold, Hold::Closed) {
            Hold::Off | Hold::Owned => self.flush(),
            // Nothing was written here since another machine could own it.
            Hold::Intended | Hold::LetGo | Hold::Closed => Ok(()),
        };
        let unlocked = lock::unlock(&self.file, lock::ALL).map_err(|source| self.lock_error(source));
        flushed.and(unlocked)
    }

    /// Returns once everything written is on the storage.
    pub(crate) fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.sync().map_err(|source| DiskError::Flush { path: self.path.clone(), source })
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Lets the storage forget a range, where it can.
    pub(crate) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.punch(offset, length) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            other => other.map_err(Into::into),
        }
    }

    /// Makes a range read as zeroes, and frees its storage if `may_unmap`.
    pub(crate) fn write_zeroes(&self, mut offset: u64, mut length: u64, may_unmap: bool) -> io::Result<()> {
        let made = if may_unmap {
            self.punch(offset, length)
        } else {
            self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length)
        };
        match made {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
            other => return other.map_err(Into::into),
        }
        while length > 0 {
            let piece = ZEROES.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            self.write_at(&ZEROES[..piece], offset)?;
            (offset, length) = (offset + piece as u64, length - piece as u64);
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> nix::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length)
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, length: u64) -> nix::Result<()> {
        let signed = |value| i64::try_from(value).map_err(|_| Errno::EFBIG);
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, signed(offset)?, signed(length)?)
    }

    fn try_lock(&self, span: Span) -> Result<bool, DiskError> {
        let sharing = if self.read_only { Sharing::Shared } else { Sharing::Exclusive };
        lock::try_lock(&self.file, span, sharing).map_err(|source| self.lock_error(source))
    }

    fn lock_error(&self, source: io::Error) -> DiskError {
        DiskError::Lock { path: self.path.clone(), source }
    }

    fn hold(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a file or a block device, and nothing else: a path may come from a peer.
fn open_file(path: &Path, read_only: bool, is_taken_over: bool) -> Result<File, DiskError> {
    let access = if read_only { "read it" } else { "read and write it" };
    let error = |source| DiskError::Open { path: path.to_owned(), access, is_taken_over, source };
    let is_disk = |kind: std::fs::FileType| kind.is_file() || kind.is_block_device();
    let not_a_disk = || DiskError::NotADisk { path: path.to_owned() };
    // Opening alone can do something to other things, as to a tape.
    if !is_disk(std::fs::metadata(path).map_err(error)?.file_type()) {
        return Err(not_a_disk());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(error)?;
    if is_disk(file.metadata().map_err(error)?.file_type()) { Ok(file) } else { Err(not_a_disk()) }
}

#[cfg(test)]
mod tests;
