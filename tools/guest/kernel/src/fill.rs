//! Filling memory once, and verifying it slowly for ever after.

use crate::content::{check_filled, write_filled};
use crate::machine::{memory::Pages, memory::Ram, report};
use crate::pulse::Pulse;
use ferry_guest_abi::content::fill_kind;
use ferry_guest_abi::quota::Quota;
use ferry_guest_abi::report::offset;
use ferry_guest_abi::workload::{Fill, Rate, Shares};

/// Pages written or checked between two heartbeats.
const BATCH: u64 = 16;

/// Memory that was filled, and how far verification has come.
pub struct Filled {
    pages: Pages,
    shares: Shares,
    quota: Option<Quota>,
    next: u64,
}

/// Fills memory as asked. Takes what it needs from `ram`.
pub fn fill(job: &Fill, ram: &mut Ram, pulse: &mut Pulse) -> Filled {
    let pages = ram.take(job.mib, "fill");
    for number in 0..pages.len() {
        if number.is_multiple_of(BATCH) {
            pulse.beat();
            report::set(offset::PAGES_FILLED, number);
        }
        write_filled(pages.page(number), number, fill_kind(number, job.shares));
    }
    report::set(offset::PAGES_FILLED, pages.len());
    let verifies = job.verify_mib_s > 0 && pages.len() > 0;
    let quota =
        verifies.then(|| Quota::new(Rate::MibPerSecond(job.verify_mib_s), pulse.tsc_khz(), pulse.beat()));
    Filled { pages, shares: job.shares, quota, next: 0 }
}

impl Filled {
    /// Verifies as many pages as are due at TSC `now`, a batch at most. Says whether any were.
    pub fn verify_some(&mut self, now: u64) -> bool {
        let Some(quota) = &mut self.quota else { return false };
        quota.refill(now);
        let mut worked = false;
        for _ in 0..BATCH {
            if !quota.take() {
                break;
            }
            check_filled(self.pages.page(self.next), self.next, fill_kind(self.next, self.shares));
            self.next = (self.next + 1) % self.pages.len();
            worked = true;
        }
        worked
    }
}
