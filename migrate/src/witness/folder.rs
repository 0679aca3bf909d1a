//! The folder of a file witness, as a descriptor: whatever becomes of its path meanwhile (another file system over it, or none
//! any more), everything that is done through one of these is done in one place.
//!
//! Files come into it whole or not at all, and never in the place of others: written under a name of their own, fsynced, then
//! linked. What the files mean is [`super::file`]'s.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{AtFlags, Dir, Mode, OFlags};

use super::file::FileWitnessError;
use super::random_identity;

/// How long is waited for others to give the lock back.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(2);

const LOCK_STEP: Duration = Duration::from_millis(5);

/// The file that is locked.
const LOCK: &str = "lock";

/// What the names of files begin with that are not yet, or not any more, of use to anybody.
const TEMPORARY: &str = "new-";

/// Longer than any file of a witness.
const FILE_BYTES_MAX: u64 = 4096;

/// A folder that is open.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    descriptor: OwnedFd,
}

/// Keeps claims out of each other's way until it is dropped. No decision rests on it: the file system may have withdrawn it.
#[derive(Debug)]
pub(super) struct Lock {
    _file: OwnedFd,
}

type Done<T> = Result<T, FileWitnessError>;

impl Folder {
    /// Opens the folder at `path`.
    pub(super) fn open(path: &Path) -> Done<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(descriptor) => Ok(Self { path: path.to_owned(), descriptor }),
            Err(error) => Err(failed("open the folder", path)(error.into())),
        }
    }

    /// The same, of one that is made if there is none yet; what it is in must exist.
    pub(super) fn make(path: &Path) -> Done<Self> {
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make the folder", path)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let folder = Self::open(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        folder.descriptor_of(LOCK, flags).map_err(folder.failed("make", LOCK))?;
        Ok(folder)
    }

    /// Locks it; `None` if there is nothing to lock, so that it is no witness's.
    pub(super) fn lock(&self) -> Done<Option<Lock>> {
        let file = match self.descriptor_of(LOCK, OFlags::RDWR | OFlags::CLOEXEC) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("open", LOCK)(error)),
        };
        let mut waited = Duration::ZERO;
        loop {
            match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => return Ok(Some(Lock { _file: file })),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) if waited < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_STEP);
                    waited += LOCK_STEP;
                }
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
                    return Err(FileWitnessError::Locked(self.path_of(LOCK)));
                }
                Err(error) => return Err(self.failed("lock", LOCK)(error.into())),
            }
        }
    }

    /// What `name` holds; `None` if there is none.
    pub(super) fn read(&self, name: &str) -> Done<Option<Vec<u8>>> {
        match self.descriptor_of(name, OFlags::RDONLY | OFlags::CLOEXEC) {
            Ok(file) => {
                let mut bytes = Vec::new();
                let read = File::from(file).take(FILE_BYTES_MAX).read_to_end(&mut bytes);
                read.map_err(self.failed("read", name))?;
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("open", name)(error)),
        }
    }

    /// Makes `name` with `bytes` in it, unless there is one: says whether it was made here. It is durable after [`Folder::sync`].
    ///
    /// A network file system may answer that there is one where it has made it itself and the answer was lost: whoever reads it
    /// then finds its own bytes.
    pub(super) fn put_new(&self, name: &str, bytes: &[u8]) -> Done<bool> {
        let temporary = self.temporary()?;
        let written = self.write_and_link(&temporary, name, bytes);
        // One that stays behind is removed by a later tidying.
        let _ = self.remove(&temporary);
        written
    }

    fn write_and_link(&self, temporary: &str, name: &str, bytes: &[u8]) -> Done<bool> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = self.descriptor_of(temporary, flags).map_err(self.failed("make", temporary))?;
        let mut file = File::from(file);
        file.write_all(bytes).map_err(self.failed("write", temporary))?;
        file.sync_all().map_err(self.failed("sync", temporary))?;
        drop(file);
        match rustix::fs::linkat(&self.descriptor, temporary, &self.descriptor, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::EXIST) => Ok(false),
            Err(error) => Err(self.failed("make", name)(error.into())),
        }
    }

    /// Does what [`Folder::put_new`] and [`Folder::sync`] do, and leaves nothing.
    pub(super) fn rehearse(&self, bytes: &[u8]) -> Done<()> {
        let name = self.temporary()?;
        self.put_new(&name, bytes)?;
        self.sync()?;
        self.remove(&name)
    }

    fn temporary(&self) -> Done<String> {
        let id = random_identity().map_err(failed("name a file in", &self.path))?;
        Ok(format!("{TEMPORARY}{id}"))
    }

    /// Makes durable what `name` holds, whoever has written it.
    pub(super) fn sync_file(&self, name: &str) -> Done<()> {
        let file = self.descriptor_of(name, OFlags::RDONLY | OFlags::CLOEXEC);
        let synced = file.and_then(|file| Ok(rustix::fs::fdatasync(file)?));
        synced.map_err(self.failed("sync", name))
    }

    /// Makes durable which files there are.
    pub(super) fn sync(&self) -> Done<()> {
        rustix::fs::fsync(&self.descriptor)
            .map_err(|error| failed("sync the folder", &self.path)(error.into()))
    }

    /// The files' names.
    pub(super) fn names(&self) -> Done<Vec<String>> {
        let listed = Dir::read_from(&self.descriptor).and_then(|names| {
            names.map(|name| Ok(name?.file_name().to_str().map(str::to_owned))).collect::<Result<Vec<_>, _>>()
        });
        let names = listed.map_err(|error| failed("list the folder", &self.path)(error.into()))?;
        // What is not even text is no file of a witness.
        Ok(names.into_iter().flatten().collect())
    }

    /// Removes `name`, if there is one.
    pub(super) fn remove(&self, name: &str) -> Done<()> {
        match rustix::fs::unlinkat(&self.descriptor, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("remove", name)(error.into())),
        }
    }

    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn descriptor_of(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(&self.descriptor, name, flags, Mode::from_raw_mode(0o666))?)
    }

    fn failed(&self, action: &'static str, name: &str) -> impl FnOnce(io::Error) -> FileWitnessError {
        failed(action, &self.path_of(name))
    }
}

/// Whether a file of this name was left by somebody who did not come to its end. Whoever holds the lock may remove it: one that
/// was partitioned away with it finds its file gone, and decides nothing.
pub(super) fn is_left_over(name: &str) -> bool {
    name.starts_with(TEMPORARY)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileWitnessError + use<> {
    let path = path.to_owned();
    move |source| FileWitnessError::Io { action, path, source }
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
