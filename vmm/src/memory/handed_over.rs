//! Guest memory that another process of this host hands over: the same memfd, mapped here as well.
//!
//! Whoever hands it over may be wrong or mean harm, so the descriptor is checked before it is mapped: a page beyond
//! the end of a file that somebody cuts short would end this process with SIGBUS. Nothing here writes to the memory:
//! until the handover is committed it is the other process's guest that runs on it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::{GuestRam, MemoryError, map};
use crate::config::{Backing, HugePages, MemoryConfig};

/// What every memfd of guest memory is sealed with: nobody can change its length, or take these seals off.
pub(super) const SEALS: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Seals without which its length can't be relied on.
const SEALS_NEEDED: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

/// Seals with which it can't be a guest's memory.
const SEALS_FORBIDDEN: SealFlag = SealFlag::F_SEAL_WRITE.union(SealFlag::F_SEAL_FUTURE_WRITE);

/// Why memory can't be handed over, or taken.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// It is private to its process.
    #[error(
        "the VM's memory is private to its process, so it can't be handed over to another; start the VM with \
         --memory size=..,shared=on, or migrate it over TCP"
    )]
    Private,
    /// The description that came with it asks for private memory.
    #[error("memory was handed over for a machine whose memory is private; the two don't belong together")]
    NotShared,
    /// It is no memfd, or can't be sealed.
    #[error("what was handed over as guest memory is no memfd that can be sealed")]
    NoMemfd(#[source] io::Error),
    /// Its length can change, or it can't be written.
    #[error(
        "the memfd that was handed over as guest memory is sealed with {found:#x}, where at least {SEALS_NEEDED:?} \
         and none of {SEALS_FORBIDDEN:?} is needed"
    )]
    Seals {
        /// Its seals, as fcntl(2) numbers them.
        found: i32,
    },
    /// It was opened for reading only.
    #[error("the memfd that was handed over as guest memory can't be written")]
    ReadOnly,
    /// It is not as long as the machine's memory.
    #[error("the memfd that was handed over has {found} bytes, where the machine's memory has {wanted}")]
    Length {
        /// Its length in bytes.
        found: i64,
        /// What the machine needs, in bytes.
        wanted: u64,
    },
    /// A system call failed.
    #[error("can't {action} the memfd of guest memory")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Maps memory that is handed over; nothing of it is touched. The pages and the node are what they are already: of
/// `config` only a wish for 4 KiB pages counts, for the mapping here.
///
/// # Errors
/// [`MemoryError::HandedOver`] says what is wrong with it; the descriptor is closed then.
pub(crate) fn adopt(config: &MemoryConfig, memory: OwnedFd) -> Result<GuestRam, MemoryError> {
    if config.backing != Backing::SharedMemfd {
        return Err(HandOverError::NotShared.into());
    }
    check(&memory, config.size_bytes)?;
    let huge_pages = match (in_huge_pages(&memory)?, config.huge_pages) {
        (true, _) => HugePages::Pool,
        (false, HugePages::Off) => HugePages::Off,
        (false, HugePages::Transparent | HugePages::Pool | HugePages::PoolIfFree) => HugePages::Transparent,
    };
    // Binding a memfd to a node binds it for the process that it still belongs to, too.
    let config = MemoryConfig { huge_pages, node: None, ..*config };
    map(&config, Some(File::from(memory)))
}

/// Whether the memfd's pages come from the host's pool of huge pages.
fn in_huge_pages(memory: &OwnedFd) -> Result<bool, HandOverError> {
    let found = fstatfs(memory)
        .map_err(|errno| HandOverError::Io { action: "find the page size of", source: errno.into() })?;
    Ok(found.filesystem_type() == HUGETLBFS_MAGIC)
}

fn check(memory: &OwnedFd, wanted: u64) -> Result<(), HandOverError> {
    let found = fcntl(memory, FcntlArg::F_GET_SEALS).map_err(|errno| HandOverError::NoMemfd(errno.into()))?;
    let seals = SealFlag::from_bits_truncate(found);
    if !seals.contains(SEALS_NEEDED) || seals.intersects(SEALS_FORBIDDEN) {
        return Err(HandOverError::Seals { found });
    }
    let io_error = |action| move |errno: nix::Error| HandOverError::Io { action, source: errno.into() };
    let flags = fcntl(memory, FcntlArg::F_GETFL).map_err(io_error("look at"))?;
    if OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(HandOverError::ReadOnly);
    }
    let found = fstat(memory).map_err(io_error("measure"))?.st_size;
    if u64::try_from(found) != Ok(wanted) {
        return Err(HandOverError::Length { found, wanted });
    }
    Ok(())
}

impl GuestRam {
    /// A descriptor of the memory, for another process to map. It holds the regions end to end.
    ///
    /// # Errors
    /// [`HandOverError::Private`] unless the machine was configured with [`Backing::SharedMemfd`].
    pub fn descriptor(&self) -> Result<OwnedFd, HandOverError> {
        let file = self.file().ok_or(HandOverError::Private)?;
        let copy = file.try_clone().map_err(|source| HandOverError::Io { action: "duplicate", source })?;
        Ok(copy.into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::super::test_memory::pool_has;
    use super::super::{LOW_MEMORY_END, PAGE_BYTES, allocate};
    use super::*;

    const BYTES: u64 = 4 << 20;

    fn config(backing: Backing) -> MemoryConfig {
        MemoryConfig::new(BYTES, backing)
    }

    fn memfd(bytes: u64, seals: SealFlag) -> OwnedFd {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"test", flags).unwrap();
        ftruncate(&file, i64::try_from(bytes).unwrap()).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    fn refusal(memory: OwnedFd) -> HandOverError {
        let error = adopt(&config(Backing::SharedMemfd), memory).unwrap_err();
        let MemoryError::HandedOver(error) = error else { panic!("{error}") };
        error
    }

    #[test]
    fn both_sides_have_the_same_memory_and_neither_needs_the_other() {
        // Through the hole, so that the second region's place in the file is seen to be right.
        let config = MemoryConfig::new(LOW_MEMORY_END + BYTES, Backing::SharedMemfd);
        let source = allocate(&config).unwrap();
        let last = source.page_count() - 1;
        source.write_page(5, &[1; PAGE_BYTES]).unwrap();
        source.write_page(last, &[2; PAGE_BYTES]).unwrap();
        let target = adopt(&config, source.descriptor().unwrap()).unwrap();
        target.write_page(6, &[3; PAGE_BYTES]).unwrap();
        let fill = |ram: &GuestRam, page| {
            let mut bytes = [0; PAGE_BYTES];
            ram.read_page(page, &mut bytes).unwrap();
            bytes[9]
        };
        for ram in [&source, &target] {
            assert_eq!([fill(ram, 5), fill(ram, 6), fill(ram, 7), fill(ram, last)], [1, 3, 0, 2]);
        }
        drop(source);
        assert_eq!([fill(&target, 5), fill(&target, 6), fill(&target, last)], [1, 3, 2]);
        // And on to the next, from memory that was itself handed over.
        let next = adopt(&config, target.descriptor().unwrap()).unwrap();
        assert_eq!(fill(&next, last), 2);
    }

    #[test]
    fn pages_of_the_hosts_pool_stay_what_they_are() {
        let mut config = config(Backing::SharedMemfd);
        config.huge_pages = HugePages::Pool;
        if !pool_has(BYTES) {
            return;
        }
        let source = allocate(&config).unwrap();
        source.write_page(5, &[1; PAGE_BYTES]).unwrap();
        // The target's own wishes don't change what the memory is.
        for huge_pages in [HugePages::Off, HugePages::Transparent, HugePages::PoolIfFree] {
            config.huge_pages = huge_pages;
            let target = adopt(&config, source.descriptor().unwrap()).unwrap();
            assert_eq!(target.huge_pages(), HugePages::Pool);
            let mut bytes = [0; PAGE_BYTES];
            target.read_page(5, &mut bytes).unwrap();
            assert_eq!(bytes, [1; PAGE_BYTES]);
        }
        ftruncate(source.descriptor().unwrap(), 8 << 20).unwrap_err();
        // And the other way round: small pages stay small where the pool was asked for.
        let small = allocate(&MemoryConfig::new(BYTES, Backing::SharedMemfd)).unwrap();
        config.huge_pages = HugePages::Pool;
        let target = adopt(&config, small.descriptor().unwrap()).unwrap();
        assert_eq!(target.huge_pages(), HugePages::Transparent);
    }

    #[test]
    fn its_length_can_not_be_changed_by_whoever_has_it() {
        let descriptor = allocate(&config(Backing::SharedMemfd)).unwrap().descriptor().unwrap();
        for bytes in [0, 4096, 8 << 20] {
            ftruncate(&descriptor, bytes).unwrap_err();
        }
        fcntl(&descriptor, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap_err();
    }

    #[test]
    fn private_memory_says_what_to_do() {
        let error = allocate(&config(Backing::PrivateAnonymous)).unwrap().descriptor().unwrap_err();
        assert!(error.to_string().contains("shared=on"), "{error}");
        let shared = memfd(BYTES, SEALS);
        let error = adopt(&config(Backing::PrivateAnonymous), shared).unwrap_err();
        assert!(matches!(error, MemoryError::HandedOver(HandOverError::NotShared)), "{error}");
    }

    #[test]
    fn what_could_change_under_the_guest_is_refused() {
        for seals in [
            SealFlag::empty(),
            SealFlag::F_SEAL_SHRINK,
            SealFlag::F_SEAL_GROW,
            SEALS.union(SealFlag::F_SEAL_FUTURE_WRITE),
            SEALS.union(SealFlag::F_SEAL_WRITE),
        ] {
            let error = refusal(memfd(BYTES, seals));
            assert!(matches!(error, HandOverError::Seals { .. }), "{seals:?}: {error}");
        }
        adopt(&config(Backing::SharedMemfd), memfd(BYTES, SEALS_NEEDED)).unwrap();
    }

    #[test]
    fn what_is_no_memfd_of_that_length_is_refused() {
        for bytes in [0, BYTES - 4096, BYTES + 4096] {
            let error = refusal(memfd(bytes, SEALS));
            assert!(matches!(error, HandOverError::Length { wanted: BYTES, .. }), "{error}");
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0; usize::try_from(BYTES).unwrap()]).unwrap();
        // A file on tmpfs can be asked for its seals and has none that would do; any other can't even be asked.
        let error = refusal(file.into());
        assert!(matches!(error, HandOverError::NoMemfd(_) | HandOverError::Seals { .. }), "{error}");
        let error = refusal(File::open("/dev/null").unwrap().into());
        assert!(matches!(error, HandOverError::NoMemfd(_)), "{error}");
        let writable = memfd(BYTES, SEALS);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writable));
        let error = refusal(File::open(path).unwrap().into());
        assert!(matches!(error, HandOverError::ReadOnly), "{error}");
    }
}
