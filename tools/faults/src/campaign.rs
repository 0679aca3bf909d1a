//! Many faults, a few at a time, each in a lab that is used again as long as its faults end well.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use ferry_lab::{Lab, LabClock};

use crate::plan::{Fault, fault};
use crate::verdict::{Verdict, judge};

/// A fault and what became of it.
#[derive(Debug)]
pub struct Judged {
    /// The fault.
    pub fault: Fault,
    /// The verdict.
    pub verdict: Verdict,
    /// How long it took.
    pub took: Duration,
}

/// Goes through faults `numbers` of the campaign with `seed`, `at_once` of them at the same time; `tell` hears of each.
///
/// # Errors
/// If no lab can be made.
pub fn run(
    seed: u64,
    numbers: &[u64],
    at_once: usize,
    program: &Path,
    tell: &(impl Fn(&Judged) + Sync),
) -> anyhow::Result<Vec<Judged>> {
    let next = AtomicU64::new(0);
    let judged = Mutex::new(Vec::new());
    let work = || -> anyhow::Result<()> {
        let mut lab = None;
        loop {
            let index = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
            let Some(number) = numbers.get(index) else { return Ok(()) };
            let here = match lab.take() {
                Some(lab) => lab,
                None => Lab::new().context("the lab can't be made")?,
            };
            let fault = fault(seed, *number);
            let clock = LabClock::start();
            let verdict = judge(&fault, &here, program);
            // After a failure nobody knows what is left in it.
            lab = verdict.is_good().then_some(here);
            let done = Judged { fault, verdict, took: clock.now() };
            tell(&done);
            judged.lock().expect("nobody panics with it").push(done);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("its panic has been printed"))
    })?;
    let mut judged = judged.into_inner().expect("nobody panics with it");
    judged.sort_by_key(|judged| judged.fault.number);
    Ok(judged)
}
