//! A witness in a folder on storage that both hosts mount.
//!
//! ```text
//!  FOLDER/identity     which witness this is: 16 bytes in hex
//!  FOLDER/lock         locked (open file description lock) for as long as an entry is read and replaced
//!  FOLDER/VM.entry     one entry a VM, written to a temporary file, fsynced and renamed, the folder fsynced
//! ```
//!
//! The lock makes reading, judging and writing one step; the checksum in an entry finds what is torn. It needs a file system
//! that carries locks between hosts and keeps its promises about fsync and rename (NFS version 4, OCFS2, GFS2). A host that
//! dies with the lock loses it by the file system's own rules, so the next claim may wait until then.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_protocol::record::RecordError;
use ferry_protocol::witness::{Claim, Entry, Ruling, judge};
use ferry_protocol::{VmId, WitnessId};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{Witness, random_identity};
use crate::ports::PortError;

/// How long a claim waits for others to give the lock back.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

const LOCK_STEP: Duration = Duration::from_millis(5);

/// Why a folder can't witness at this moment.
#[derive(Debug, thiserror::Error)]
pub enum FileWitnessError {
    /// A file operation failed.
    #[error("can't {action} {path}; is the shared storage mounted here?")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{0} has been locked by somebody else for {secs} s; is a host that was lost still holding it?", secs = LOCK_PATIENCE.as_secs())]
    Locked(PathBuf),
    /// An entry is no whole entry.
    #[error("{path} can't be trusted, so nothing is decided by it; decide with 'ferry resolve'")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// The identity can't be read.
    #[error("{0} does not hold the identity of a witness")]
    Identity(PathBuf),
}

/// A witness in a folder.
#[derive(Debug)]
pub struct FileWitness {
    folder: PathBuf,
}

/// What is held while an entry is read and replaced; closing the file gives it back.
struct Lock {
    _file: File,
}

impl FileWitness {
    /// The witness in `folder`, which is made when it is first needed; what it is in must exist.
    #[must_use]
    pub const fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileWitnessError {
        let path = path.to_owned();
        move |source| FileWitnessError::Io { action, path, source }
    }

    fn lock(&self) -> Result<Lock, FileWitnessError> {
        match fs::create_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Self::io("make the folder", &self.folder)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let path = self.folder.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Self::io("open", &path))?;
        let mut waited = Duration::ZERO;
        loop {
            match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => return Ok(Lock { _file: file }),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) if waited < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_STEP);
                    waited += LOCK_STEP;
                }
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
                    return Err(FileWitnessError::Locked(path));
                }
                Err(error) => return Err(Self::io("lock", &path)(error.into())),
            }
        }
    }

    /// Replaces `name` durably; only with the lock.
    fn write(&self, _lock: &Lock, name: &str, bytes: &[u8]) -> Result<(), FileWitnessError> {
        let (path, temporary) = (self.folder.join(name), self.folder.join(format!("{name}-new")));
        let mut file = File::create(&temporary).map_err(Self::io("create", &temporary))?;
        file.write_all(bytes).map_err(Self::io("write", &temporary))?;
        file.sync_all().map_err(Self::io("sync", &temporary))?;
        fs::rename(&temporary, &path).map_err(Self::io("replace", &path))?;
        let folder = File::open(&self.folder).and_then(|folder| folder.sync_all());
        folder.map_err(Self::io("sync the folder", &self.folder))
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, FileWitnessError> {
        let path = self.folder.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Self::io("read", &path)(error)),
        }
    }

    fn entry(&self, vm: VmId) -> Result<Option<Entry>, FileWitnessError> {
        let name = entry_name(vm);
        let Some(bytes) = self.read(&name)? else { return Ok(None) };
        let damaged = |source| FileWitnessError::Damaged { path: self.folder.join(&name), source };
        Entry::decode(&bytes).map(Some).map_err(damaged)
    }
}

fn entry_name(vm: VmId) -> String {
    format!("{vm}.entry")
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

impl Witness for FileWitness {
    fn id(&self) -> Result<WitnessId, PortError> {
        const NAME: &str = "identity";
        let lock = self.lock()?;
        if let Some(bytes) = self.read(NAME)? {
            let text = String::from_utf8_lossy(&bytes);
            // A VM's identity has the same form.
            let id = VmId::from_hex(text.trim()).map(|id| WitnessId(id.0));
            return Ok(id.ok_or_else(|| FileWitnessError::Identity(self.folder.join(NAME)))?);
        }
        let id = random_identity()?;
        self.write(&lock, NAME, id.to_string().as_bytes())?;
        Ok(id)
    }

    fn probe(&self) -> Result<(), PortError> {
        let lock = self.lock()?;
        Ok(self.write(&lock, "probe", &[0; 64])?)
    }

    fn claim(&self, claim: &Claim) -> Result<Ruling, PortError> {
        let lock = self.lock()?;
        let judgement = judge(claim, self.entry(claim.vm)?.as_ref())?;
        if let Some(entry) = judgement.entry {
            self.write(&lock, &entry_name(claim.vm), &entry.encode())?;
        }
        Ok(judgement.ruling)
    }
}

impl fmt::Display for FileWitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file:{}", self.folder.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_protocol::witness::Wish;
    use ferry_protocol::{Epoch, MigrationId};

    fn claim(wish: Wish) -> Claim {
        Claim { vm: VmId([1; 16]), epoch: Epoch::new(2), migration: MigrationId([3; 16]), wish }
    }

    #[test]
    fn two_hosts_that_ask_at_once_are_told_the_same() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("witness");
            let ask = |wish| {
                let witness = FileWitness::new(path.clone());
                std::thread::spawn(move || witness.claim(&claim(wish)).unwrap())
            };
            let (target, source) = (ask(Wish::Run), ask(Wish::TakeBack));
            assert_eq!(target.join().unwrap(), source.join().unwrap());
        }
    }

    #[test]
    fn a_witness_is_known_by_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let id = |path: &Path| FileWitness::new(path.to_owned()).id().unwrap();
        assert_eq!(id(&one), id(&one));
        assert_ne!(id(&one), id(&other));
        FileWitness::new(one).probe().unwrap();
    }

    #[test]
    fn a_torn_entry_decides_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let witness = FileWitness::new(folder.path().to_owned());
        assert_eq!(witness.claim(&claim(Wish::Run)).unwrap(), Ruling::Target);
        let path = folder.path().join(entry_name(VmId([1; 16])));
        let bytes = fs::read(&path).unwrap();
        for torn in [&bytes[..0], &bytes[..bytes.len() - 1]] {
            fs::write(&path, torn).unwrap();
            for wish in [Wish::Run, Wish::GiveUp, Wish::TakeBack] {
                let error = witness.claim(&claim(wish)).unwrap_err().to_string();
                assert!(error.contains("can't be trusted"), "{error}");
            }
        }
        assert_eq!(fs::read(&path).unwrap().len(), bytes.len() - 1, "it is left as it was");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let witness = FileWitness::new("/nonexistent/shared/witness".into());
        let error = witness.claim(&claim(Wish::Run)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/shared/witness") && error.contains("mounted"), "{error}");
    }

    #[test]
    fn a_lock_that_somebody_holds_is_waited_for_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let witness = FileWitness::new(folder.path().to_owned());
        let lock = witness.lock().unwrap();
        let error = witness.claim(&claim(Wish::Run)).unwrap_err().to_string();
        assert!(error.contains("locked"), "{error}");
        drop(lock);
        assert_eq!(witness.claim(&claim(Wish::Run)).unwrap(), Ruling::Target);
    }
}
