//! The dirty log: which pages changed since the last look.
//!
//! Two sources are OR'd together. KVM logs what the guest writes (and what KVM itself writes for it).
//! Devices of this program write through `vm-memory`, whose bitmap KVM knows nothing of. Forgetting
//! either one corrupts a migrated guest.
//!
//! ```text
//! start ──► collect: every page ──► collect: what changed since ──► ... ──► stop
//! ```
//!
//! With manual protection, reading KVM's log leaves it as it is, and write protection returns only for
//! what is cleared. Clearing goes by pieces so that the guest never waits long for KVM's lock.

// UNSAFETY: memory slots are made of raw addresses, and the log's ioctls take raw pointers.
#![expect(unsafe_code, reason = "KVM's memory slots and logs are raw addresses")]

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use super::{GuestRam, PAGE_BYTES};
use crate::capability::{DirtyLogMode, KvmCallError};

/// Dirty pages after which a clearing call ends (at the next word): some 30 us of KVM's lock. Each of the guest's write
/// faults may wait for one such call, so a guest that writes to many protected pages feels it many times over. Clean
/// pages in between cost next to nothing, so they end no call: scattered pages don't need a call each.
const CLEAR_DIRTY_PAGES: u32 = 1_024;

/// The most that KVM is asked to look at in a call.
const CLEAR_WORDS_MAX: usize = 1 << 16;

const WORD_PAGES: usize = 64;

mod numbers {
    //! Numbers of the ioctls that kvm-ioctls does not wrap, or wraps with an allocation.
    use super::*;
    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// Why the dirty log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// `collect` or `stop` without `start`.
    #[error("the dirty log was not started")]
    NotStarted,
    /// `start` a second time: somebody else is reading the log.
    #[error("the dirty log is already in use, probably by another migration of this machine")]
    AlreadyStarted,
    /// The caller's bitmap has the wrong length.
    #[error("a bitmap of {words} words was given for a log of {needed}")]
    WrongLength {
        /// Words given.
        words: usize,
        /// Words needed.
        needed: usize,
    },
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmCallError),
}

/// A machine's dirty log and its memory slots, one a region.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mode: DirtyLogMode,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Off,
    On {
        /// Every page is still to be reported once.
        report_all: bool,
        /// Holds one region's log.
        scratch: Vec<u64>,
    },
}

impl DirtyLog {
    /// Gives KVM the memory, without a log.
    pub(crate) fn register(vm: &VmFd, ram: &GuestRam, mode: DirtyLogMode) -> Result<Self, KvmCallError> {
        set_slots(vm, ram, 0)?;
        Ok(Self { mode, state: Mutex::new(State::Off) })
    }

    pub(crate) fn start(&self, vm: &VmFd, ram: &GuestRam) -> Result<(), DirtyLogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::On { .. } => return Err(DirtyLogError::AlreadyStarted),
            State::Off => {}
        }
        for region in ram.tracked().iter() {
            (**region).bitmap().reset();
        }
        if let Err(error) = set_slots(vm, ram, KVM_MEM_LOG_DIRTY_PAGES) {
            // Some slots may log by now; without the log they must not.
            let _ = set_slots(vm, ram, 0);
            return Err(error.into());
        }
        *state = State::On { report_all: !self.mode.initially_set, scratch: Vec::new() };
        Ok(())
    }

    pub(crate) fn stop(&self, vm: &VmFd, ram: &GuestRam) -> Result<(), DirtyLogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Off => return Err(DirtyLogError::NotStarted),
            State::On { .. } => {}
        }
        set_slots(vm, ram, 0)?;
        *state = State::Off;
        Ok(())
    }

    /// Sets the bit of every page that changed since the last call, and returns how many bits were not
    /// set before. A page's log is cleared before this returns, so a page read afterwards and
    /// changed later is reported again.
    pub(crate) fn collect(&self, vm: &VmFd, ram: &GuestRam, into: &mut [u64]) -> Result<u64, DirtyLogError> {
        let needed = words_of(ram.page_count());
        if into.len() != needed {
            return Err(DirtyLogError::WrongLength { words: into.len(), needed });
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (report_all, scratch) = match &mut *state {
            State::Off => return Err(DirtyLogError::NotStarted),
            State::On { report_all, scratch } => (report_all, scratch),
        };
        let mut newly_set = 0;
        let mut first_word = 0;
        for (slot, region) in (0_u32..).zip(ram.tracked().iter()) {
            let pages = page_count(region.len());
            let words = pages.div_ceil(WORD_PAGES);
            // Only the last region can end inside a word, so regions start at word boundaries.
            let part = &mut into[first_word..first_word + words];
            first_word += words;

            scratch.clear();
            scratch.resize(words, 0);
            get_log(vm, slot, scratch).map_err(KvmCallError::new("read its dirty log"))?;
            // The bits are handed out before KVM forgets them: a failure below loses none.
            newly_set += merge(part, scratch);
            if self.mode.manual_protect {
                clear_log(vm, slot, pages, scratch).map_err(KvmCallError::new("clear its dirty log"))?;
            }
            newly_set += merge(part, &(**region).bitmap().get_and_reset());
            if *report_all {
                newly_set += merge(part, &all_pages(pages));
            }
        }
        *report_all = false;
        Ok(newly_set)
    }
}

/// Words of a bitmap with a bit for each of `pages`.
pub(crate) fn words_of(pages: u64) -> usize {
    usize::try_from(pages).expect("guest memory fits the address space").div_ceil(WORD_PAGES)
}

fn page_count(bytes: u64) -> usize {
    usize::try_from(bytes).expect("guest memory fits the address space") / PAGE_BYTES
}

fn all_pages(pages: usize) -> Vec<u64> {
    let mut words = vec![u64::MAX; pages.div_ceil(WORD_PAGES)];
    let tail = pages % WORD_PAGES;
    if let Some(last) = words.last_mut()
        && tail != 0
    {
        *last = (1 << tail) - 1;
    }
    words
}

/// ORs `from` into `into` and counts the bits that this set.
fn merge(into: &mut [u64], from: &[u64]) -> u64 {
    let mut newly_set = 0;
    for (into, from) in into.iter_mut().zip(from) {
        newly_set += u64::from((from & !*into).count_ones());
        *into |= from;
    }
    newly_set
}

fn set_slots(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), KvmCallError> {
    for (slot, (region, address)) in (0_u32..).zip(ram.host_regions()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.gpa,
            memory_size: region.bytes,
            userspace_addr: address,
        };
        // SAFETY: the address range is the region's live mapping, which the machine keeps (through its
        // GuestRam) for longer than its vCPUs can run, and the regions don't overlap.
        let done = unsafe { vm.set_user_memory_region(slot) };
        done.map_err(KvmCallError::new("set a memory slot or its logging"))?;
    }
    Ok(())
}

fn get_log(vm: &VmFd, slot: u32, into: &mut [u64]) -> Result<(), errno::Error> {
    let mut request = kvm_dirty_log { slot, ..kvm_dirty_log::default() };
    request.__bindgen_anon_1.dirty_bitmap = into.as_mut_ptr().cast();
    // SAFETY: KVM writes one bit a page of the slot, rounded up to a word, and `into` has that many
    // words.
    let done = unsafe { ioctl_with_mut_ref(vm, numbers::KVM_GET_DIRTY_LOG(), &mut request) };
    if done == 0 { Ok(()) } else { Err(errno::Error::last()) }
}

fn clear_log(vm: &VmFd, slot: u32, pages: usize, dirty: &mut [u64]) -> Result<(), errno::Error> {
    let mut from = 0;
    while let Some(piece) = next_piece(dirty, from) {
        from = piece.end;
        let first = piece.start * WORD_PAGES;
        let words = &mut dirty[piece];
        let count = (words.len() * WORD_PAGES).min(pages - first);
        let mut request = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(count).expect("CLEAR_WORDS_MAX bounds it"),
            first_page: first as u64,
            ..kvm_clear_dirty_log::default()
        };
        request.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        // SAFETY: KVM reads one bit for each of `count` pages, and the piece has at least that many.
        let done = unsafe { ioctl_with_ref(vm, numbers::KVM_CLEAR_DIRTY_LOG(), &request) };
        if done != 0 {
            return Err(errno::Error::last());
        }
    }
    Ok(())
}

/// The words of the next call's pages, from the first dirty one at or behind `from`.
fn next_piece(dirty: &[u64], from: usize) -> Option<Range<usize>> {
    let start = from + dirty[from..].iter().position(|word| *word != 0)?;
    let (mut end, mut pages) = (start, 0);
    for (index, word) in dirty.iter().enumerate().skip(start).take(CLEAR_WORDS_MAX) {
        pages += word.count_ones();
        if *word != 0 {
            end = index + 1;
        }
        if pages >= CLEAR_DIRTY_PAGES {
            break;
        }
    }
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::capability;
    use crate::config::{Backing, MemoryConfig};
    use crate::memory::{self, HIGH_MEMORY_START, LOW_MEMORY_END};

    #[test]
    fn writes_by_devices_are_reported_at_their_page_index_in_both_regions() {
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED tier kvm: can't open /dev/kvm");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let size_bytes = LOW_MEMORY_END + (9 << 20);
        let ram = memory::allocate(&MemoryConfig::new(size_bytes, Backing::PrivateAnonymous)).unwrap();
        let modes = capability::enable_dirty_log_modes(&vm);
        let log = DirtyLog::register(&vm, &ram, modes).unwrap();
        let mut dirty = vec![0; words_of(ram.page_count())];
        log.start(&vm, &ram).unwrap();
        assert_eq!(log.collect(&vm, &ram, &mut dirty).unwrap(), ram.page_count());
        dirty.fill(0);

        let low_pages = LOW_MEMORY_END / PAGE_BYTES as u64;
        let writes = [(5 * 4096 + 7, 5), (LOW_MEMORY_END - 1, low_pages - 1), (HIGH_MEMORY_START, low_pages)];
        for (address, _) in writes {
            ram.tracked().write_obj(1_u8, GuestAddress(address)).unwrap();
        }
        assert_eq!(log.collect(&vm, &ram, &mut dirty).unwrap(), 3);
        for (_, page) in writes {
            let word = usize::try_from(page / 64).unwrap();
            assert_eq!(dirty[word] >> (page % 64) & 1, 1, "page {page}");
        }
        assert_eq!(log.collect(&vm, &ram, &mut dirty).unwrap(), 0);
        let error = log.collect(&vm, &ram, &mut dirty[1..]).unwrap_err();
        assert!(matches!(error, DirtyLogError::WrongLength { .. }), "{error}");
    }

    #[test]
    fn clearing_goes_by_dirty_pages_and_leaves_none_out() {
        let pieces = |dirty: &[u64]| {
            let mut pieces = Vec::new();
            while let Some(piece) = next_piece(dirty, pieces.last().map_or(0, |last: &Range<usize>| last.end))
            {
                pieces.push(piece);
            }
            pieces
        };
        assert_eq!(pieces(&[]), []);
        assert_eq!(pieces(&[0; 9]), []);
        assert_eq!(pieces(&[0, 1, 0, 4, 0]), vec![1_usize..4; 1]);
        // 16 full words are CLEAR_DIRTY_PAGES.
        assert_eq!(pieces(&[u64::MAX; 40]), [0..16, 16..32, 32..40]);
        let mut scattered = vec![0; 4 * CLEAR_WORDS_MAX];
        (0..1_000).for_each(|page| scattered[page * 260] = 2);
        let found = pieces(&scattered);
        assert!(found.len() <= 5, "{} calls for 1,000 pages of 64 GiB", found.len());
        let covered = |word: usize| found.iter().any(|piece| piece.contains(&word));
        assert!((0..1_000).all(|page| covered(page * 260)));
        assert!(found.iter().all(|piece| piece.len() <= CLEAR_WORDS_MAX));
    }

    #[test]
    fn merging_counts_only_what_is_new() {
        let mut into = [0b0011, 0];
        assert_eq!(merge(&mut into, &[0b0110, 1 << 63]), 2);
        assert_eq!(into, [0b0111, 1 << 63]);
        assert_eq!(merge(&mut into, &[0b0111, 1 << 63]), 0);
    }

    #[test]
    fn all_pages_sets_none_beyond_the_end() {
        assert_eq!(all_pages(64), [u64::MAX]);
        assert_eq!(all_pages(65), [u64::MAX, 1]);
        assert_eq!(all_pages(3), [7]);
    }
}
