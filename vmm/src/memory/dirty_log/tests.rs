//! The log of memory that no guest runs in.

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::capability;
use crate::config::{Backing, HugePages, MemoryConfig};
use crate::memory::{self, HIGH_MEMORY_START, LOW_MEMORY_END};

const LOW_PAGES: u64 = LOW_MEMORY_END / PAGE_BYTES as u64;

const NONE: [u64; 0] = [];

/// What a log is read of: memory of two regions, the second of which ends inside a chunk.
struct Logged {
    vm: VmFd,
    ram: GuestRam,
    log: DirtyLog,
}

impl Logged {
    /// Without the modes, KVM's log begins empty and protects everything.
    fn new(kvm: &Kvm, backing: Backing, modes: bool) -> Self {
        let vm = kvm.create_vm().unwrap();
        let config = MemoryConfig::new(LOW_MEMORY_END + (9 << 20), backing);
        let ram = memory::allocate(&MemoryConfig { huge_pages: HugePages::Off, ..config }).unwrap();
        let none = DirtyLogMode { manual_protect: false, initially_set: false };
        let modes = if modes { capability::enable_dirty_log_modes(&vm) } else { none };
        let log = DirtyLog::register(&vm, &ram, modes).unwrap();
        Self { vm, ram, log }
    }

    fn start(&self) {
        self.log.start(&self.vm, &self.ram).unwrap();
    }

    /// Writes as a guest does where its log is not cleared yet: the page is touched, and no bit tells.
    fn touch(&self, page: u64) {
        self.ram.write_page(page, &[1; PAGE_BYTES]).unwrap();
    }

    fn write_as_device(&self, page: u64) {
        let gpa = page * PAGE_BYTES as u64;
        let gpa = if page < LOW_PAGES { gpa } else { gpa - LOW_MEMORY_END + HIGH_MEMORY_START };
        self.ram.tracked().write_obj(1_u8, GuestAddress(gpa + 7)).unwrap();
    }

    fn collect_and(&self, asked: &mut dyn FnMut()) -> Vec<u64> {
        let mut words = vec![0; words_of(self.ram.page_count())];
        let count = self.log.collect_and(&self.vm, &self.ram, &mut words, asked).unwrap();
        let is_set = |page: &u64| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
        let pages: Vec<u64> = (0..self.ram.page_count()).filter(is_set).collect();
        assert_eq!(count, pages.len() as u64);
        pages
    }

    fn collect(&self) -> Vec<u64> {
        self.collect_and(&mut || {})
    }
}

fn kvm() -> Option<Kvm> {
    let kvm = Kvm::new();
    if kvm.is_err() {
        println!("SKIPPED tier kvm: can't open /dev/kvm");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm");
    }
    kvm.ok()
}

#[test]
fn writes_by_devices_are_reported_at_their_page_index_in_both_regions() {
    let Some(kvm) = kvm() else { return };
    for modes in [true, false] {
        let logged = Logged::new(&kvm, Backing::PrivateAnonymous, modes);
        logged.start();
        assert_eq!(logged.collect(), NONE, "nothing was ever touched");
        let written = [5, LOW_PAGES - 1, LOW_PAGES, LOW_PAGES + 2303];
        // In chunks that nobody has touched before, and then in the same ones again.
        for _ in 0..2 {
            written.iter().for_each(|page| logged.write_as_device(*page));
            assert_eq!(logged.collect(), written);
            assert_eq!(logged.collect(), NONE);
        }
        let Logged { vm, ram, log } = &logged;
        let error = log.collect(vm, ram, &mut [0; 9]).unwrap_err();
        assert!(matches!(error, DirtyLogError::WrongLength { .. }), "{error}");
    }
}

#[test]
fn what_was_touched_is_reported_once_and_the_rest_when_it_is_touched() {
    let Some(kvm) = kvm() else { return };
    for backing in [Backing::PrivateAnonymous, Backing::SharedMemfd] {
        let logged = Logged::new(&kvm, backing, true);
        let before = [3, 511, 512 * 7 + 100, LOW_PAGES - 1];
        let later = [LOW_PAGES, LOW_PAGES + 513, LOW_PAGES + 2303];
        before.iter().for_each(|page| logged.touch(*page));
        logged.start();
        assert_eq!(logged.collect(), before, "{backing:?}");
        assert_eq!(logged.collect(), NONE, "{backing:?}");
        later.iter().for_each(|page| logged.touch(*page));
        assert_eq!(logged.collect(), later, "{backing:?}");
        assert_eq!(logged.collect(), NONE, "{backing:?}: they were cleared");
        logged.log.stop(&logged.vm, &logged.ram).unwrap();
        logged.start();
        assert_eq!(logged.collect(), [&before[..], &later].concat(), "{backing:?}: anew");
    }
}

#[test]
fn a_log_that_begins_empty_reports_what_was_touched_too() {
    let Some(kvm) = kvm() else { return };
    let logged = Logged::new(&kvm, Backing::PrivateAnonymous, false);
    let touched = [3, 512 * 7 + 100, LOW_PAGES + 2303];
    touched.iter().for_each(|page| logged.touch(*page));
    logged.start();
    assert_eq!(logged.collect(), touched);
    assert_eq!(logged.collect(), NONE);
}

#[test]
fn writes_between_the_question_and_the_clearing_are_reported() {
    let Some(kvm) = kvm() else { return };
    let logged = Logged::new(&kvm, Backing::PrivateAnonymous, true);
    logged.touch(1000);
    let uncleared = || [512, 1024, 2048, LOW_PAGES].map(|first| logged.log.is_uncleared(first));
    assert_eq!(uncleared(), [false; 4], "the log is off");
    logged.start();
    // One in the chunk that is about to be cleared, and one in a chunk that is not.
    let found = logged.collect_and(&mut || [1001, 2048].iter().for_each(|page| logged.touch(*page)));
    assert_eq!(found, [1000, 1001]);
    assert_eq!(uncleared(), [false, true, true, true]);
    logged.touch(LOW_PAGES + 9);
    assert_eq!(logged.collect(), [2048, LOW_PAGES + 9]);
    assert_eq!(uncleared(), [false, true, false, false]);
    assert_eq!(logged.collect(), NONE);
}

#[test]
fn clearing_goes_by_dirty_pages_and_leaves_none_out() {
    let pieces = |dirty: &[u64]| {
        let mut pieces = Vec::new();
        while let Some(piece) = next_piece(dirty, pieces.last().map_or(0, |last: &Range<usize>| last.end)) {
            pieces.push(piece);
        }
        pieces
    };
    assert!(pieces(&[]).is_empty());
    assert!(pieces(&[0; 9]).is_empty());
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
fn a_range_sets_its_bits_and_no_others() {
    let mut words = [0; 3];
    assert_eq!(set_range(&mut words, 3..3), 0);
    assert_eq!(set_range(&mut words, 63..129), 66);
    assert_eq!(words, [1 << 63, u64::MAX, 1]);
    assert_eq!(set_range(&mut words, 60..66), 3);
    assert_eq!(words, [0xf << 60, u64::MAX, 1]);
    assert_eq!(set_range(&mut words, 0..192), 192 - 69);
}

#[test]
fn runs_are_those_of_marked_chunks() {
    let runs = |marked: &[bool]| runs(marked).collect::<Vec<_>>();
    assert!(runs(&[]).is_empty());
    assert!(runs(&[false; 3]).is_empty());
    assert_eq!(runs(&[true, true, false, false, true]), [0..2, 4..5]);
}
