//! Writing pages at a steady rate, each time checking first that the last pass's write is still there.

use crate::content::{check_random, check_word, write_random};
use crate::fill::Filled;
use crate::machine::{memory::Page, memory::Pages, memory::Ram, report};
use crate::pulse::Pulse;
use ferry_guest_abi::content::{RandomWords, dirty_slot};
use ferry_guest_abi::order::PageOrder;
use ferry_guest_abi::quota::Quota;
use ferry_guest_abi::report::offset;
use ferry_guest_abi::workload::{Dirty, Order, Write};

/// Pages written between two heartbeats.
const BATCH: u64 = 16;

/// With one word a page, the rest of every so-manieth page is checked as well.
const FULL_CHECK_EVERY: u64 = 8;

/// The working set, and where in which pass the writing stands.
struct Set {
    pages: Pages,
    order: Order,
    write: Write,
    pass: u64,
    walk: PageOrder,
    written: u64,
}

/// Dirties pages for ever.
pub fn run(job: &Dirty, ram: &mut Ram, filled: &mut Filled, pulse: &mut Pulse) -> ! {
    let pages = ram.take(job.set_mib, "the dirty working set");
    for number in 0..pages.len() {
        if number.is_multiple_of(BATCH) {
            pulse.beat();
        }
        write_random(pages.page(number), RandomWords::dirtied(number, 0));
    }
    let mut set = Set::new(pages, job);
    pulse.ready();
    let mut quota = Quota::new(job.rate, pulse.tsc_khz(), pulse.beat());
    loop {
        let now = pulse.beat();
        quota.refill(now);
        let mut worked = false;
        for _ in 0..BATCH {
            if !quota.take() {
                break;
            }
            set.write_next();
            worked = true;
        }
        report::set(offset::PAGES_WRITTEN, set.written);
        if !(filled.verify_some(now) || worked) {
            pulse.halt();
        }
    }
}

impl Set {
    fn new(pages: Pages, job: &Dirty) -> Self {
        let walk = PageOrder::linear(0);
        let mut set = Self { pages, order: job.order, write: job.write, pass: 0, walk, written: 0 };
        set.begin_pass();
        set
    }

    fn begin_pass(&mut self) {
        self.pass += 1;
        self.walk = match self.order {
            Order::Linear => PageOrder::linear(self.pages.len()),
            Order::Random => PageOrder::random(self.pages.len(), self.pass),
        };
    }

    /// Checks and rewrites the next page of the pass.
    fn write_next(&mut self) {
        let number = match self.walk.next() {
            Some(number) => number,
            None => {
                report::set(offset::PASSES, self.pass);
                self.begin_pass();
                // A set has at least 256 pages, so a pass has a first one.
                self.walk.next().unwrap_or(0)
            }
        };
        let page = self.pages.page(number);
        match self.write {
            Write::Page => {
                check_random(page, RandomWords::dirtied(number, self.pass - 1), None);
                write_random(page, RandomWords::dirtied(number, self.pass));
            }
            Write::Word => self.write_word(page, number),
        }
        self.written += 1;
    }

    fn write_word(&self, page: Page, number: u64) {
        let slot = dirty_slot(number);
        check_word(page, slot, RandomWords::dirtied(number, self.pass - 1).word(slot));
        if (number + self.pass).is_multiple_of(FULL_CHECK_EVERY) {
            check_random(page, RandomWords::dirtied(number, 0), Some(slot));
        }
        page.write(slot, RandomWords::dirtied(number, self.pass).word(slot));
    }
}
