//! A guest that writes its memory while it runs, a device that does so too, and the logs that must see both.

use std::time::Duration;

use ferry_protocol::{MemoryLayout, PageBitmap, Timestamp};

use super::memory::{Fill, Memory};
use super::random::Random;

/// What a guest does.
#[derive(Debug, Clone)]
pub(super) struct Work {
    /// Pages that it writes a second.
    pub(super) rate: u64,
    /// Pages that its device writes a second.
    pub(super) device_rate: u64,
    /// It writes the pages from `first` on, this many.
    pub(super) first: u64,
    pub(super) working_set: u64,
    /// In how many writes of a hundred it writes a whole page, not a word.
    pub(super) whole_percent: u64,
    /// Shares of the pages that are zero and text at the start; the rest is noise.
    pub(super) zero_percent: u64,
    pub(super) text_percent: u64,
}

/// A guest with its memory and logs, at the source or, without any log, at the target.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: Memory,
    work: Work,
    random: Random,
    runs: bool,
    /// Up to when it has done its work.
    worked_until: Timestamp,
    /// Work that is owed, in pages times nanoseconds a second.
    owed: u128,
    device_owed: u128,
    logging: bool,
    /// What KVM would have logged: the guest's own writes.
    kvm_log: PageBitmap,
    /// What the machine monitor has to log itself: writes that its devices make.
    device_log: PageBitmap,
    /// Pages written so far.
    pub(super) written: u64,
}

/// More writes than this in one step of the world add nothing: a long wait would only cost time.
const WRITES_MAX: u128 = 4_000;

impl Guest {
    /// A guest with filled memory that does not run yet.
    pub(super) fn filled(layout: &MemoryLayout, work: &Work, mut random: Random) -> Self {
        let mut memory = Memory::empty(layout);
        for page in 0..layout.page_count() {
            let share = random.below(100);
            let fill = if share < work.zero_percent {
                Fill::Zero
            } else if share < work.zero_percent + work.text_percent {
                Fill::Text
            } else {
                Fill::Noise
            };
            fill.fill(memory.page_mut(page), &mut random);
        }
        Self::with_memory(memory, work, random)
    }

    /// A guest with this memory that does not run yet.
    pub(super) fn with_memory(memory: Memory, work: &Work, random: Random) -> Self {
        let none = PageBitmap::empty(memory.page_count());
        Self {
            work: work.clone(),
            random,
            runs: false,
            worked_until: Timestamp::default(),
            owed: 0,
            device_owed: 0,
            logging: false,
            kvm_log: none.clone(),
            device_log: none,
            memory,
            written: 0,
        }
    }

    pub(super) const fn runs(&self) -> bool {
        self.runs
    }

    /// Starts or stops it at `now`, devices included.
    pub(super) fn set_runs(&mut self, runs: bool, now: Timestamp) {
        self.advance(now);
        self.runs = runs;
    }

    pub(super) const fn logging(&self) -> bool {
        self.logging
    }

    pub(super) fn set_logging(&mut self, logging: bool) {
        self.logging = logging;
        self.kvm_log = PageBitmap::empty(self.memory.page_count());
        self.device_log = self.kvm_log.clone();
    }

    /// Reads and clears the two logs: (KVM's, the devices').
    pub(super) fn take_logs(&mut self) -> (PageBitmap, PageBitmap) {
        let none = PageBitmap::empty(self.memory.page_count());
        let kvm = std::mem::replace(&mut self.kvm_log, none.clone());
        (kvm, std::mem::replace(&mut self.device_log, none))
    }

    /// Does the work that is due by `now`.
    pub(super) fn advance(&mut self, now: Timestamp) {
        let elapsed = now.since(self.worked_until);
        self.worked_until = self.worked_until.max(now);
        if !self.runs {
            return;
        }
        for _ in 0..due(&mut self.owed, self.work.rate, elapsed) {
            let page = self.work.first + self.random.below(self.work.working_set);
            self.write(page % self.memory.page_count(), false);
        }
        for _ in 0..due(&mut self.device_owed, self.work.device_rate, elapsed) {
            // A device's buffers lie anywhere.
            let page = self.random.below(self.memory.page_count());
            self.write(page, true);
        }
    }

    fn write(&mut self, page: u64, by_device: bool) {
        self.written += 1;
        let to = self.memory.page_mut(page);
        if self.random.percent(self.work.whole_percent) {
            self.random.pick(&[Fill::Zero, Fill::Text, Fill::Noise]).fill(to, &mut self.random);
        } else {
            let word = usize::try_from(self.random.below(512)).expect("below 512");
            to[8 * word..8 * word + 8].copy_from_slice(&self.random.next().to_le_bytes());
        }
        if self.logging {
            let log = if by_device { &mut self.device_log } else { &mut self.kvm_log };
            log.insert(page);
        }
    }
}

/// How many writes are due, leaving the fraction of one for later.
fn due(owed: &mut u128, rate: u64, elapsed: Duration) -> u128 {
    const SECOND: u128 = 1_000_000_000;
    *owed += u128::from(rate) * elapsed.as_nanos();
    let writes = *owed / SECOND;
    *owed %= SECOND;
    writes.min(WRITES_MAX)
}
