//! Where a host keeps its VMs' sockets, locks and records: `$FERRY_STATE_DIR`, else /run/ferry as root, else
//! `$XDG_RUNTIME_DIR/ferry`.
//!
//! ```text
//!  web.sock        the control API of the process that hosts VM 'web'
//!  web.console     the serial console of VM 'web', for 'ferry console'
//!  web.lock        locked by that process as long as it lives; never removed, so that it can't be locked twice
//!  web.ID.record   the durable record of who owns the VM with that identity, as far as 'web' had to do with it
//! ```

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Context, bail};
use ferry_migrate::FileRecords;
use ferry_migrate::protocol::VmName;
use nix::fcntl::{Flock, FlockArg};

use crate::permission;

/// The folder.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// The folder that the environment names.
    pub(crate) fn from_environment() -> anyhow::Result<Self> {
        if let Some(folder) = std::env::var_os("FERRY_STATE_DIR").filter(|folder| !folder.is_empty()) {
            return Ok(Self(folder.into()));
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(Self("/run/ferry".into()));
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(folder) => Ok(Self(PathBuf::from(folder).join("ferry"))),
            None => bail!(
                "there is no folder for ferry's sockets and records: set FERRY_STATE_DIR (or XDG_RUNTIME_DIR), \
                 or run as root"
            ),
        }
    }

    /// The folder `folder`.
    pub(crate) fn at(folder: &std::path::Path) -> Self {
        Self(folder.to_owned())
    }

    /// The path of `name`'s control socket.
    pub(crate) fn socket(&self, name: &VmName) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// The path of `name`'s console socket.
    pub(crate) fn console(&self, name: &VmName) -> PathBuf {
        self.0.join(format!("{name}.console"))
    }

    /// `name`'s durable records.
    pub(crate) fn records(&self, name: &VmName) -> FileRecords {
        FileRecords::new(self.0.clone(), name.clone())
    }

    /// Takes `name` for this process; it is free again when the lock is dropped or the process dies.
    pub(crate) fn claim(&self, name: &VmName) -> anyhow::Result<NameLock> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(|error| permission::cannot("make the state folder", &self.0, &error))?;
        self.warn_if_open_to_others();
        let path = self.0.join(format!("{name}.lock"));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| permission::cannot("open", &path, &error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                // A socket that is still there belongs to a process that has died.
                let sockets = [self.socket(name), self.console(name)];
                sockets.iter().for_each(|socket| drop(fs::remove_file(socket)));
                // And so does a record that was never finished.
                self.records(name).remove_unfinished();
                Ok(NameLock { sockets, _lock: lock })
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "the name '{name}' is taken: a ferry process hosts it already (see 'ferry info {name}'); \
                 choose another --name or stop that one with 'ferry stop {name}'"
            ),
            Err((_, error)) => Err(error).with_context(|| format!("can't lock {}", path.display())),
        }
    }

    /// Whoever may write to a folder that was there already can take a VM's socket or record away.
    fn warn_if_open_to_others(&self) {
        let mode = fs::metadata(&self.0).map_or(0, |metadata| metadata.mode());
        let sticky = mode & 0o1000 != 0;
        if mode & 0o022 != 0 && !sticky {
            let folder = self.0.display();
            tracing::warn!(
                "others may write to the state folder {folder} (mode {:o}): chmod 700 it",
                mode & 0o7777
            );
        }
    }

    /// The names whose sockets exist, in order.
    pub(crate) fn names(&self) -> anyhow::Result<Vec<VmName>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("can't read {}", self.0.display())),
        };
        let mut names: Vec<VmName> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let is_socket = path.extension().is_some_and(|extension| extension == "sock");
                is_socket.then(|| path.file_stem()?.to_str()?.parse().ok()).flatten()
            })
            .collect();
        names.sort();
        Ok(names)
    }
}

/// A name that this process has.
#[derive(Debug)]
pub(crate) struct NameLock {
    sockets: [PathBuf; 2],
    _lock: Flock<File>,
}

impl Drop for NameLock {
    fn drop(&mut self) {
        self.sockets.iter().for_each(|socket| drop(fs::remove_file(socket)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir(folder.path().join("state"));
        let name: VmName = "web".parse().unwrap();
        let lock = state.claim(&name).unwrap();
        let error = state.claim(&name).unwrap_err().to_string();
        assert!(error.contains("'web' is taken"), "{error}");
        drop(lock);
        state.claim(&name).unwrap();
    }

    #[test]
    fn only_sockets_are_names() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["b.sock", "a.sock", "a.lock", "a.record", ".x.sock"] {
            fs::write(folder.path().join(file), "").unwrap();
        }
        let names = StateDir(folder.path().into()).names().unwrap();
        assert_eq!(names.iter().map(VmName::as_str).collect::<Vec<_>>(), ["a", "b"]);
    }
}
