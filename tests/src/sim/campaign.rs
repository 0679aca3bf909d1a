//! Many seeds on all cores, and which of them failed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::world::{Ending, Plan, Report, run};

/// What became of a range of seeds.
#[derive(Debug, Clone, Default)]
pub struct Played {
    /// Of the seeds that did not fail, in no order.
    pub reports: Vec<Report>,
    /// The seeds that failed, ascending; why is on standard error.
    pub failed: Vec<u64>,
}

/// Plays the seeds on all cores.
#[must_use]
pub fn play(seeds: Range<u64>, plan: Plan) -> Played {
    let next = AtomicU64::new(seeds.start);
    let (reports, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed, plan, false))) {
                        Ok(report) => reports.lock().unwrap_or_else(PoisonError::into_inner).push(report),
                        Err(_) => failed.lock().unwrap_or_else(PoisonError::into_inner).push(seed),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_unstable();
    Played { reports: reports.into_inner().unwrap_or_else(PoisonError::into_inner), failed }
}

impl Played {
    /// How many attempts ended in each way.
    #[must_use]
    pub fn endings(&self) -> BTreeMap<String, usize> {
        let mut endings = BTreeMap::new();
        for ending in self.reports.iter().flat_map(|report| &report.endings) {
            *endings.entry(ending.to_string()).or_default() += 1;
        }
        endings
    }

    /// How many seeds have a report that `is` so.
    pub fn count(&self, is: impl Fn(&Report) -> bool) -> usize {
        self.reports.iter().filter(|report| is(report)).count()
    }

    /// How many seeds ended with the guest at the target.
    #[must_use]
    pub fn moved(&self) -> usize {
        self.count(|report| report.endings.last() == Some(&Ending::Moved))
    }
}
