//! How many pages may be handled by now, to keep a rate.
//!
//! Time is the guest's TSC. After a pause (a migration, say) at most [`BURST_MS`] worth of pages is made up for.

use crate::workload::Rate;

/// Longest stretch of time that is made up for, in milliseconds.
pub const BURST_MS: u64 = 10;

/// Pages in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Fractions of a TSC tick in which credit is counted, so that high rates don't suffer from rounding.
const FRACTION_BITS: u32 = 8;

/// Credit that grows with time and is spent page by page.
#[derive(Debug, Clone)]
pub struct Quota {
    /// Price of a page, in fractions of a tick; 0 for no limit.
    price: u64,
    credit: u64,
    credit_max: u64,
    last_tsc: u64,
}

impl Quota {
    /// A quota for `rate` pages by a TSC of `tsc_khz`, without credit at `now_tsc`.
    #[must_use]
    pub const fn new(rate: Rate, tsc_khz: u64, now_tsc: u64) -> Self {
        let second = (tsc_khz * 1_000) << FRACTION_BITS;
        let price = match rate {
            Rate::Max => 0,
            Rate::MibPerSecond(rate) => second / (rate as u64 * PAGES_PER_MIB),
        };
        Self { price, credit: 0, credit_max: (tsc_khz * BURST_MS) << FRACTION_BITS, last_tsc: now_tsc }
    }

    /// Adds the credit for the time until `now_tsc`.
    pub fn refill(&mut self, now_tsc: u64) {
        // A TSC that went backwards, on another host, gives no credit.
        let elapsed = now_tsc.saturating_sub(self.last_tsc).min(self.credit_max);
        self.credit = (self.credit + (elapsed << FRACTION_BITS)).min(self.credit_max);
        self.last_tsc = now_tsc;
    }

    /// Spends the price of a page, if there is credit for it.
    pub fn take(&mut self) -> bool {
        match self.credit.checked_sub(self.price) {
            Some(rest) => {
                self.credit = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u64 = 2_600_000;

    fn spend(quota: &mut Quota) -> u64 {
        (0..1_000_000).take_while(|_| quota.take()).count() as u64
    }

    #[test]
    fn a_second_of_ticks_gives_a_second_of_pages() {
        for rate in [1, 32, 500, 20_000] {
            let mut quota = Quota::new(Rate::MibPerSecond(rate), KHZ, 0);
            let pages: u64 = (1..=1_000)
                .map(|ms| {
                    quota.refill(ms * KHZ);
                    spend(&mut quota)
                })
                .sum();
            let wanted = u64::from(rate) * PAGES_PER_MIB;
            assert!(
                pages.abs_diff(wanted) <= wanted / 100,
                "{rate} MiB/s: {pages} pages instead of {wanted}"
            );
        }
    }

    #[test]
    fn a_long_gap_is_not_made_up_for() {
        let mut quota = Quota::new(Rate::MibPerSecond(100), KHZ, 0);
        quota.refill(5_000 * KHZ);
        assert_eq!(spend(&mut quota), 256);
        quota.refill(0);
        assert_eq!(spend(&mut quota), 0);
    }

    #[test]
    fn no_limit_is_no_limit() {
        assert_eq!(spend(&mut Quota::new(Rate::Max, KHZ, 0)), 1_000_000);
    }
}
