//! The dirty log: which pages changed since the last look.
//!
//! Two sources are OR'd together. KVM logs what the guest writes (and what KVM itself writes for it).
//! Devices of this program write through `vm-memory`, whose bitmap KVM knows nothing of. Forgetting
//! either one corrupts a migrated guest.
//!
//! ```text
//! start ──► collect: what was ever touched ──► collect: what changed since ──► ... ──► stop
//! ```
//!
//! With manual protection, reading KVM's log leaves it as it is, and write protection returns only for
//! what is cleared. Clearing goes by pieces so that the guest never waits long for KVM's lock.
//!
//! # Untouched memory costs nothing
//!
//! With INITIALLY_SET the log begins with every bit set and no page protected, and clearing all of it takes KVM a walk
//! over every page of the guest. So a chunk of 2 MiB stays *uncleared* until some page of it is touched
//! ([`GuestRam::touched`]), and the bits that KVM's log has for it are passed over. Each collect asks for the uncleared
//! chunks:
//!
//! ```text
//! touched? ──no──► the chunk stays uncleared, nothing is reported
//!     └─yes──► clear the whole chunk ──► touched? once more ──► those pages are reported; the chunk's log counts from now on
//! ```
//!
//! What is not reported must read as zero, be it for a page's whole life or until its next report. No page is lost:
//!
//! - **A guest's write before the clearing** has touched its page by the time of the second question, which reports it. The
//!   answer to the first question would not do: it lacks what is written between it and the clearing. KVM maps a page
//!   for writing under the lock that clearing takes, so a write fault comes before it (then the page is there and is
//!   protected again) or after it.
//! - **A guest's write after the clearing** finds its page protected or not mapped, and sets its bit, which the next
//!   collect takes in. If it comes before the second question the page is reported twice, which does no harm. KVM's own
//!   writes for the guest (clocks, emulated instructions) write first and set the bit afterwards: the same two cases.
//! - **A write to a chunk that stays uncleared** touches a page, and the next collect finds the chunk touched. Its bits were
//!   never cleared, so nothing else is remembered of it, nor needs to be.
//! - **The last collect**, while the vCPUs are paused, is like any other, and no write follows it: an uncleared chunk is then
//!   one in which nothing is touched.
//! - **Writes by devices** set bits in a bitmap of this program, which is reported whatever chunk they are in.
//! - **Where touched is coarser** than a page (huge pages; a memfd of the host's pool, of which all counts as touched) or can't
//!   be found out, more is cleared and reported, never less.
//! - **What is touched may become untouched** if the kernel finds it zero and takes it back (splitting huge pages, merging
//!   equal ones). In an uncleared chunk such a page was never reported, so whoever copies only what is reported has zeroes
//!   for it, too ([`DirtyLog::is_uncleared`] tells those who would copy more); in another chunk the log alone decides.
//! - **A call that fails** leaves its chunks uncleared, so that the next collect reports all that is touched in them.
//!
//! `start` begins anew: KVM makes a log with every bit set, every chunk is uncleared, and the devices' bitmap is empty;
//! `stop` forgets it all. Without INITIALLY_SET KVM protects every page when the log is switched on: no chunk is uncleared, and the
//! first collect reports what is touched beside what is logged.

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

use super::{GuestRam, HUGE_PAGE_BYTES, PAGE_BYTES};
use crate::capability::{DirtyLogMode, KvmCallError};

/// Dirty pages after which a clearing call ends (at the next word): some 30 us of KVM's lock. Each of the guest's write
/// faults may wait for one such call, so a guest that writes to many protected pages feels it many times over. Clean
/// pages in between cost next to nothing, so they end no call: scattered pages don't need a call each.
const CLEAR_DIRTY_PAGES: u32 = 1_024;

/// The most that KVM is asked to look at in a call.
const CLEAR_WORDS_MAX: usize = 1 << 16;

const WORD_PAGES: usize = 64;

/// What is cleared for the first time as a whole: a huge page.
const CHUNK_PAGES: usize = HUGE_PAGE_BYTES / PAGE_BYTES;

const CHUNK_WORDS: usize = CHUNK_PAGES / WORD_PAGES;

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
    On(Reading),
}

#[derive(Debug)]
struct Reading {
    /// For each region, which of its chunks are still to be cleared for the first time.
    uncleared: Vec<Vec<bool>>,
    /// What is touched is still to be reported once, although it is protected.
    report_touched: bool,
    /// Holds one region's log.
    scratch: Vec<u64>,
}

/// One slot of KVM's.
#[derive(Debug, Clone, Copy)]
struct Slot<'a> {
    vm: &'a VmFd,
    ram: &'a GuestRam,
    number: u32,
    first_page: u64,
    pages: usize,
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
            State::On(_) => return Err(DirtyLogError::AlreadyStarted),
            State::Off => {}
        }
        for region in ram.tracked().iter() {
            (**region).bitmap().take(|_, _| {});
        }
        if let Err(error) = set_slots(vm, ram, KVM_MEM_LOG_DIRTY_PAGES) {
            // Some slots may log by now; without the log they must not.
            let _ = set_slots(vm, ram, 0);
            return Err(error.into());
        }
        let chunks = ram.regions().iter().map(|region| page_count(region.bytes).div_ceil(CHUNK_PAGES));
        *state = State::On(Reading {
            uncleared: chunks.map(|chunks| vec![self.mode.initially_set; chunks]).collect(),
            report_touched: !self.mode.initially_set,
            scratch: Vec::new(),
        });
        Ok(())
    }

    pub(crate) fn stop(&self, vm: &VmFd, ram: &GuestRam) -> Result<(), DirtyLogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Off => return Err(DirtyLogError::NotStarted),
            State::On(_) => {}
        }
        set_slots(vm, ram, 0)?;
        *state = State::Off;
        Ok(())
    }

    /// Whether the chunk that begins at page `first` is uncleared: none of its pages has been reported, and each one that
    /// is touched by the next call of `collect` will be.
    pub(crate) fn is_uncleared(&self, first: u64) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Off => false,
            // Only the last region can end inside a chunk, so that chunks are counted through.
            State::On(reading) => {
                let mut chunk = usize::try_from(first).expect("a page's index") / CHUNK_PAGES;
                for region in &reading.uncleared {
                    match region.get(chunk) {
                        Some(uncleared) => return *uncleared,
                        None => chunk -= region.len(),
                    }
                }
                false
            }
        }
    }

    /// Sets the bit of every page that changed since the last call, and returns how many bits were not
    /// set before; the first call names what was touched at all. A page's log is cleared before this returns, so a
    /// page read afterwards and changed later is reported again.
    pub(crate) fn collect(&self, vm: &VmFd, ram: &GuestRam, into: &mut [u64]) -> Result<u64, DirtyLogError> {
        self.collect_and(vm, ram, into, &mut || {})
    }

    /// Calls `asked` when it is known which chunks were touched, and none of them is cleared yet.
    fn collect_and(
        &self,
        vm: &VmFd,
        ram: &GuestRam,
        into: &mut [u64],
        asked: &mut dyn FnMut(),
    ) -> Result<u64, DirtyLogError> {
        let needed = words_of(ram.page_count());
        if into.len() != needed {
            return Err(DirtyLogError::WrongLength { words: into.len(), needed });
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Reading { uncleared, report_touched, scratch } = match &mut *state {
            State::Off => return Err(DirtyLogError::NotStarted),
            State::On(reading) => reading,
        };
        let mut newly_set = 0;
        let mut first_page = 0;
        for ((number, region), uncleared) in (0_u32..).zip(ram.tracked().iter()).zip(uncleared) {
            let slot = Slot { vm, ram, number, first_page, pages: page_count(region.len()) };
            first_page += slot.pages as u64;
            // Only the last region can end inside a word, so regions start at word boundaries.
            let first_word = words_of(slot.first_page);
            let words = slot.pages.div_ceil(WORD_PAGES);
            let part = &mut into[first_word..first_word + words];

            scratch.clear();
            scratch.resize(words, 0);
            get_log(vm, number, scratch).map_err(KvmCallError::new("read its dirty log"))?;
            for chunk in runs(uncleared) {
                scratch[words_of_chunks(&chunk, words)].fill(0);
            }
            // The bits are handed out before KVM forgets them: a failure below loses none.
            newly_set += merge(part, scratch);
            if self.mode.manual_protect {
                slot.clear(scratch)?;
            }
            newly_set += slot.clear_touched(uncleared, part, scratch, asked)?;
            (**region).bitmap().take(|index, bits| newly_set += merge(&mut part[index..=index], &[bits]));
            if *report_touched {
                newly_set += slot.report_touched(0..words.div_ceil(CHUNK_WORDS), part);
            }
        }
        *report_touched = false;
        Ok(newly_set)
    }
}

impl Slot<'_> {
    /// Clears the uncleared chunks that were touched, sets the bits of what is touched in them, and returns how many
    /// were not set before. The order is what the module's description is about.
    fn clear_touched(
        self,
        uncleared: &mut [bool],
        into: &mut [u64],
        scratch: &mut [u64],
        asked: &mut dyn FnMut(),
    ) -> Result<u64, KvmCallError> {
        let mut found = vec![false; uncleared.len()];
        for chunks in runs(uncleared) {
            self.touched(chunks, |pages| {
                found[pages.start / CHUNK_PAGES..=(pages.end - 1) / CHUNK_PAGES].fill(true)
            });
        }
        asked();
        scratch.fill(0);
        for chunks in runs(&found) {
            scratch[words_of_chunks(&chunks, into.len())].fill(u64::MAX);
        }
        self.clear(scratch)?;
        let mut newly_set = 0;
        for chunks in runs(&found) {
            newly_set += self.report_touched(chunks.clone(), into);
            uncleared[chunks].fill(false);
        }
        Ok(newly_set)
    }

    fn report_touched(self, chunks: Range<usize>, into: &mut [u64]) -> u64 {
        let mut newly_set = 0;
        self.touched(chunks, |pages| newly_set += set_range(into, pages));
        newly_set
    }

    /// Calls `f` with the runs of pages of these chunks, counted from the slot's first, that may hold something.
    fn touched(self, chunks: Range<usize>, mut f: impl FnMut(Range<usize>)) {
        let from = chunks.start * CHUNK_PAGES;
        let count = (chunks.end * CHUNK_PAGES).min(self.pages) - from;
        let found = self.ram.touched(self.first_page + from as u64, count as u64, |page, count| {
            let [start, count] = [page - self.first_page, count]
                .map(|pages| usize::try_from(pages).expect("they are in memory"));
            f(start..start + count);
        });
        found.expect("the pages are the slot's");
    }

    fn clear(self, dirty: &mut [u64]) -> Result<(), KvmCallError> {
        let cleared = clear_log(self.vm, self.number, self.pages, dirty);
        cleared.map_err(KvmCallError::new("clear its dirty log"))
    }
}

/// The runs of chunks that are marked.
fn runs(marked: &[bool]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    marked.chunk_by(|a, b| a == b).filter_map(move |run| {
        let range = start..start + run.len();
        start = range.end;
        run[0].then_some(range)
    })
}

/// The words of these chunks in a bitmap of `words`, where the last chunk may end early.
fn words_of_chunks(chunks: &Range<usize>, words: usize) -> Range<usize> {
    chunks.start * CHUNK_WORDS..(chunks.end * CHUNK_WORDS).min(words)
}

/// Sets the bits of `pages` and counts those that were not set before.
fn set_range(into: &mut [u64], pages: Range<usize>) -> u64 {
    let mut newly_set = 0;
    let mut page = pages.start;
    while page < pages.end {
        let (index, bit) = (page / WORD_PAGES, page % WORD_PAGES);
        let count = (WORD_PAGES - bit).min(pages.end - page);
        let mask = (u64::MAX >> (WORD_PAGES - count)) << bit;
        newly_set += u64::from((mask & !into[index]).count_ones());
        into[index] |= mask;
        page += count;
    }
    newly_set
}

/// Words of a bitmap with a bit for each of `pages`.
pub(crate) fn words_of(pages: u64) -> usize {
    usize::try_from(pages).expect("guest memory fits the address space").div_ceil(WORD_PAGES)
}

fn page_count(bytes: u64) -> usize {
    usize::try_from(bytes).expect("guest memory fits the address space") / PAGE_BYTES
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
mod tests;
