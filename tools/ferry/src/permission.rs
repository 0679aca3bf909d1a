//! What to do where the system does not let a process that hosts a VM do what its user could do by hand: such a process has given
//! up its capabilities, so that root's power over others' files, and over ports below 1024, is gone.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ferry_migrate::ListenAddress;
use nix::errno::Errno;

/// Ports that need a capability.
const PRIVILEGED: std::ops::Range<u16> = 1..1024;

/// Whether it was the operating system that did not let it.
fn is_denied(error: &io::Error) -> bool {
    [Errno::EACCES, Errno::EPERM].iter().any(|&denied| error.raw_os_error() == Some(denied as i32))
}

/// The ways out for a process that may not use `path`, or nothing where `error` is another one: to be put behind the error.
pub(crate) fn way_out_of(path: &Path, error: &io::Error) -> String {
    if !is_denied(error) {
        return String::new();
    }
    let user = nix::unistd::geteuid();
    // What is there of it: the rest is missing, or hidden.
    let there = path.ancestors().find_map(|path| Some((path, path.metadata().ok()?.uid())));
    let Some((place, owner)) = there else { return String::new() };
    let why = if user.is_root() { "gives up root's capabilities, so it" } else { "runs as its user, who" };
    format!(
        "; a process that hosts a VM {why} must be let in by the files themselves: {} belongs to user {owner}, this process to \
         user {user} ('chown -R {user} {}', or take a folder of that user)",
        place.display(),
        place.display()
    )
}

/// Why something can't be done with `path`, and what to do.
pub(crate) fn cannot(what: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!("can't {what} {}: {error}{}", path.display(), way_out_of(path, error))
}

/// Why there is no listener at `listen`, and what to do.
pub(crate) fn no_listener(listen: &ListenAddress, error: &io::Error) -> anyhow::Error {
    let way_out = match listen {
        ListenAddress::Tcp(address) if error.kind() == io::ErrorKind::AddrInUse => {
            let port = address.port();
            format!(
                "; 'ss -ltnp sport = :{port}' shows who listens there: end that, or take another port with --listen (0 for any \
                 that is free)"
            )
        }
        ListenAddress::Tcp(address) if is_denied(error) && PRIVILEGED.contains(&address.port()) => {
            "; ports below 1024 need a capability, and a process that hosts a VM gives up all of them before it listens: take a \
             port from 1024 on"
                .to_owned()
        }
        ListenAddress::Tcp(_) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            "; no interface of this host has that address ('ip address' shows which there are)".to_owned()
        }
        ListenAddress::Tcp(_) => String::new(),
        ListenAddress::Unix(path) => way_out_of(path, error),
    };
    anyhow::anyhow!("can't listen on {listen}: {error}{way_out}")
}
