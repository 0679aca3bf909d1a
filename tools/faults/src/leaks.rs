//! What a process holds, and what is left of processes that have ended.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use ferry_lab::network::lab::TAP;
use ferry_lab::{Links, Namespace};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::host::{Host, NAME};
use crate::process::wait_for;

/// How much more memory a process may have than before: what allocators keep, in one arena a thread, half of a guest.
const MEMORY_KIB_SLACK: u64 = 32 << 10;

/// How long a process may take to let go of what it no longer needs.
const LET_GO_PATIENCE: Duration = Duration::from_secs(6);

/// The state of a connection in /proc/net/tcp that only the kernel remembers.
const TIME_WAIT: &str = "06";

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    threads: BTreeMap<String, usize>,
    files: BTreeMap<String, usize>,
    memory_kib: u64,
}

/// A descriptor's target without what differs each time.
fn kind(target: &str) -> String {
    target.split(":[").next().unwrap_or(target).to_owned()
}

impl Census {
    /// What process `pid` holds now.
    ///
    /// # Errors
    /// If it has ended.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let (mut threads, mut files) = (BTreeMap::new(), BTreeMap::new());
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            // The runtime's threads come and go as it likes.
            if !name.starts_with("tokio-rt") {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        for file in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let Ok(target) = fs::read_link(file.path()) else { continue };
            let kind = kind(&target.to_string_lossy());
            // Opened by a machine's first migration and kept with its memory.
            if !kind.ends_with("/pagemap") {
                *files.entry(kind).or_default() += 1;
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        // Not the pages of the program itself, of which more come in with every path that is taken for the first time.
        let own = |name: &str| {
            let memory = status.lines().find_map(|line| line.strip_prefix(name));
            memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        };
        let memory = own("RssAnon:").zip(own("RssShmem:")).map(|(anonymous, shared)| anonymous + shared);
        Ok(Self { threads, files, memory_kib: memory.context("no RssAnon")? })
    }

    /// What there is more of than `before`.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let more =
            |now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>, what: &str| -> Vec<String> {
                let grown =
                    now.iter().filter(|(name, count)| **count > then.get(*name).copied().unwrap_or(0));
                grown.map(|(name, count)| format!("{count} {what} '{name}'")).collect()
            };
        let mut all = more(&self.threads, &before.threads, "threads");
        all.extend(more(&self.files, &before.files, "files"));
        if self.memory_kib > before.memory_kib + MEMORY_KIB_SLACK {
            all.push(format!("{} KiB of memory instead of {}", self.memory_kib, before.memory_kib));
        }
        all
    }
}

/// What process `pid` still holds beyond `before` when it has had its time to let go.
#[must_use]
pub fn kept(pid: u32, before: &Census) -> Vec<String> {
    let mut last = Vec::new();
    let clean = wait_for("it to let go", LET_GO_PATIENCE, || {
        last = Census::of(pid)?.beyond(before);
        Ok(last.is_empty().then_some(()))
    });
    if clean.is_ok() { Vec::new() } else { last }
}

/// What is left on a host whose processes have ended.
///
/// # Errors
/// If that can't be found out.
pub fn left_behind(host: &Host<'_>) -> anyhow::Result<Vec<String>> {
    let side = host.side;
    let mut left: Vec<String> =
        odd_files(&host.state)?.into_iter().map(|file| format!("the file {file} at the {side}")).collect();
    left.extend(open_sockets(host.namespace)?.into_iter().map(|socket| format!("{socket} at the {side}")));
    let interfaces = Links::of(host.namespace).names()?;
    if interfaces.len() != INTERFACES {
        left.push(format!("the interfaces {interfaces:?} at the {side}"));
    }
    let attached =
        host.namespace.run(|| ferry_vmm::tap::Tap::attach(TAP).map(drop).map_err(|e| e.to_string()))?;
    if let Err(why) = attached {
        left.push(format!("the tap at the {side}: {why}"));
    }
    Ok(left)
}

/// lo, br0, uplink and tap0.
const INTERFACES: usize = 4;

/// Files of a state folder that nobody needs any more.
fn odd_files(state: &Path) -> anyhow::Result<Vec<String>> {
    let mut odd = Vec::new();
    for entry in fs::read_dir(state)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != format!("{NAME}.lock") && !name.ends_with(".record") {
            odd.push(name);
        }
    }
    Ok(odd)
}

/// TCP sockets in a namespace, but those that only the kernel remembers.
fn open_sockets(namespace: &Namespace) -> anyhow::Result<Vec<String>> {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let open = lines.filter(|words| words.get(3).is_some_and(|state| *state != TIME_WAIT));
    // The last of a closed connection may still be on its way out; a port that is listened on is not.
    let kept = open.filter(|words| words.get(9).is_some_and(|inode| *inode != "0"));
    Ok(kept.map(|words| format!("the socket {} (state {})", words[1], words[3])).collect())
}

/// Whether somebody still has a lock on the file at `path`.
///
/// # Errors
/// If that can't be asked.
pub fn is_locked(path: &Path) -> anyhow::Result<bool> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    // All of the file, and beyond.
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK)?,
        l_whence: i16::try_from(libc::SEEK_SET)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(false),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_holds_beyond_what_it_held_is_named() {
        let pid = std::process::id();
        let before = Census::of(pid).unwrap();
        assert_eq!(before.beyond(&before), Vec::<String>::new());
        let file = tempfile::NamedTempFile::new().unwrap();
        let (_near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let beyond = Census::of(pid).unwrap().beyond(&before).join(", ");
        assert!(beyond.contains("'socket'"), "{beyond}");
        assert!(beyond.contains(&file.path().display().to_string()), "{beyond}");
    }

    #[test]
    fn a_lock_on_a_file_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_locked(file.path()).unwrap());
        let held = fs::OpenOptions::new().write(true).open(file.path()).unwrap();
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: 100,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&held, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(is_locked(file.path()).unwrap());
    }
}
