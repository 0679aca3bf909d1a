//! Who may use a disk: locks on bytes of its file that lie beyond anything a disk holds.
//!
//! ```text
//!  0 ............................. 2^62 - 1    2^62       2^62 + 1 .........
//! │ owner: the machine that runs            │ intent   │ marks: one byte a machine,
//! │ (shared by the readers of a read-only   │ who is   │ at a random place, as long as
//! │ disk)                                   │ about to │ it lives
//!                                             own it
//! ```
//!
//! A machine that starts takes the intent, the ownership, and gives the intent back. A target takes the intent while it is
//! built, sees by the source's mark that both have opened the same file, and the ownership only when it runs: the source
//! has let go of it by then, and nobody could come between because of the intent.
//!
//! They are open file description locks (fcntl, F_OFD_SETLK): they end with the last descriptor of an opened file, also if
//! its process is killed, and two processes of one host see each other like two hosts. Where a file system carries
//! them from host to host (NFS, GFS2, OCFS2, CephFS) they hold between hosts. On a block device they hold within one host only.
//! The owner's range covers what QEMU (bytes 100 to 203) and Cloud Hypervisor (the whole file) lock, so those see it too.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Bytes of a file that are locked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    start: i64,
    length: i64,
}

const INTENT_START: i64 = 1 << 62;

/// What the owner of a disk holds.
pub(super) const OWNER: Span = Span { start: 0, length: INTENT_START };

/// What is held by the one who is about to own it.
pub(super) const INTENT: Span = Span { start: INTENT_START, length: 1 };

/// Whatever is held.
pub(super) const ALL: Span = Span { start: 0, length: 0 };

/// How many places there are for marks.
const MARKS: u64 = 1 << 61;

/// The byte of a mark. Any number names a place: it may come from a peer.
pub(super) fn mark(number: u64) -> Span {
    let place = i64::try_from(number % MARKS).expect("less than 2^61");
    Span { start: INTENT_START + 1 + place, length: 1 }
}

/// Whether others may hold the same lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    Shared,
    Exclusive,
}

/// Takes a lock if nobody else has one that excludes it; taking one again changes nothing.
pub(super) fn try_lock(file: &File, span: Span, sharing: Sharing) -> io::Result<bool> {
    let kind = match sharing {
        Sharing::Shared => libc::F_RDLCK,
        Sharing::Exclusive => libc::F_WRLCK,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&flock(kind, span))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Gives a lock back.
pub(super) fn unlock(file: &File, span: Span) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK, span))).map(drop).map_err(Into::into)
}

/// Whether anybody else holds any lock there.
pub(super) fn is_locked_elsewhere(file: &File, span: Span) -> io::Result<bool> {
    let mut found = flock(libc::F_WRLCK, span);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn flock(kind: i32, Span { start, length }: Span) -> libc::flock {
    let small = |value: i32| i16::try_from(value).expect("fcntl's constants are small");
    libc::flock {
        l_type: small(kind),
        l_whence: small(libc::SEEK_SET),
        l_start: start,
        l_len: length,
        // The kernel wants it so for locks of this kind.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twice() -> (tempfile::TempDir, File, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, other) = (open(), open());
        (directory, one, other)
    }

    #[test]
    fn two_who_opened_the_same_file_exclude_each_other() {
        let (_directory, one, other) = twice();
        for span in [OWNER, INTENT, mark(7), mark(u64::MAX)] {
            assert!(!is_locked_elsewhere(&other, span).unwrap());
            assert!(try_lock(&one, span, Sharing::Exclusive).unwrap());
            assert!(try_lock(&one, span, Sharing::Exclusive).unwrap(), "again");
            assert!(!is_locked_elsewhere(&one, span).unwrap(), "its own is not somebody else's");
            assert!(is_locked_elsewhere(&other, span).unwrap());
            assert!(!try_lock(&other, span, Sharing::Exclusive).unwrap());
            assert!(!try_lock(&other, span, Sharing::Shared).unwrap());
            unlock(&one, span).unwrap();
            assert!(try_lock(&other, span, Sharing::Exclusive).unwrap());
            unlock(&other, span).unwrap();
        }
        assert!(try_lock(&one, OWNER, Sharing::Shared).unwrap());
        assert!(try_lock(&other, OWNER, Sharing::Shared).unwrap(), "readers share");
        drop(one);
        assert!(try_lock(&other, OWNER, Sharing::Exclusive).unwrap(), "it ends with its descriptor");
    }

    #[test]
    fn the_three_kinds_do_not_touch_each_other() {
        let (_directory, one, other) = twice();
        assert!(try_lock(&one, OWNER, Sharing::Exclusive).unwrap());
        assert!(try_lock(&other, INTENT, Sharing::Exclusive).unwrap());
        assert!(try_lock(&one, mark(0), Sharing::Exclusive).unwrap());
        assert!(try_lock(&other, mark(1), Sharing::Exclusive).unwrap());
        assert!(!is_locked_elsewhere(&other, mark(2)).unwrap());
        assert!(is_locked_elsewhere(&other, mark(MARKS)).unwrap(), "numbers wrap around");
    }
}
