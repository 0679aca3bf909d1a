//! The memory load: rewrites pages at a rate, and checks each one first.
//!
//! One half of the pages is hot: it is rewritten in an order that jumps about. The other half is written once, so that
//! a migration sends it once, and is checked in turn all the while. What has to stand in a page comes from a table
//! apart from the pages.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, ensure};
use ferry_linux_guest_programs::lines::Answer;
use ferry_linux_guest_programs::{Page, spread, stamps};

use crate::loads::{Errors, Options, Workers};

/// How often a batch of pages is rewritten. Each sleep is a system call, which is slow on KVM's PVM back end.
const PERIOD: Duration = Duration::from_millis(20);

/// The most memory that may be asked for, in MiB.
const MIB_MAX: u64 = 1 << 14;

#[derive(Debug, Default)]
struct Counts {
    checked: AtomicU64,
    written: AtomicU64,
    errors: Errors,
}

/// The load, running.
#[derive(Debug)]
pub(crate) struct Memory {
    counts: Arc<Counts>,
    workers: Workers,
    last: Receiver<()>,
}

impl Memory {
    /// Starts it: `mib=` MiB (8), `rate=` pages a second (1000).
    ///
    /// # Errors
    /// What can't be had.
    pub(crate) fn start(options: &Options) -> anyhow::Result<Self> {
        let (mib, rate) = (options.number("mib", 8)?, options.number("rate", 1000)?);
        ensure!((1..=MIB_MAX).contains(&mib), "give mib=1 to {MIB_MAX}");
        let pages = usize::try_from(mib * 256).context("more pages than can be addressed")?;
        let counts = Arc::new(Counts::default());
        let (finished, last) = sync_channel(1);
        let (filled, ready) = sync_channel(1);
        let for_thread = Arc::clone(&counts);
        let workers = Workers::start(
            "memory",
            [move |stop: &AtomicBool| {
                let mut region = Region::new(pages, &for_thread);
                // Nobody waits for these if the agent ends meanwhile.
                let _ = filled.send(());
                region.work(rate, stop);
                region.check_all();
                let _ = finished.send(());
            }],
        )?;
        ready.recv().context("the memory load ended before it began")?;
        Ok(Self { counts, workers, last })
    }

    /// What it has done so far.
    pub(crate) fn report(&self) -> Answer {
        self.counts.report()
    }

    /// Ends it, once all of its pages have been checked.
    pub(crate) fn stop(self) -> Answer {
        let Self { counts, workers, last } = self;
        workers.stop(&counts.errors);
        if last.try_recv().is_err() {
            counts.errors.note("the last check of all pages was not done".into());
        }
        counts.report()
    }
}

impl Counts {
    fn report(&self) -> Answer {
        let Self { checked, written, errors } = self;
        Answer::default()
            .with("checked", checked.load(Ordering::Relaxed))
            .with("written", written.load(Ordering::Relaxed))
            .with("errors", errors.count())
            .noting(&errors.first())
    }
}

/// The pages and what has to stand in them.
struct Region<'a> {
    pages: Vec<Page>,
    /// By page number.
    generations: Vec<u64>,
    counts: &'a Counts,
}

impl<'a> Region<'a> {
    fn new(pages: usize, counts: &'a Counts) -> Self {
        let mut region = Self { pages: vec![Page::ZERO; pages], generations: vec![0; pages], counts };
        for number in 0..pages {
            region.write(number);
        }
        region
    }

    fn work(&mut self, rate: u64, stop: &AtomicBool) {
        let hot = self.pages.len() / 2;
        let cold = self.pages.len() - hot;
        let batch = (rate * u64::try_from(PERIOD.as_millis()).unwrap_or(1)).div_ceil(1000);
        let mut step = 0_u64;
        while !stop.load(Ordering::SeqCst) {
            for _ in 0..batch {
                step += 1;
                let number = usize::try_from(spread(step) % hot.max(1) as u64).unwrap_or_default();
                self.check(number);
                self.write(number);
                self.check(hot + usize::try_from(step % cold as u64).unwrap_or_default());
            }
            std::thread::sleep(PERIOD);
        }
    }

    fn check_all(&self) {
        (0..self.pages.len()).for_each(|number| self.check(number));
    }

    fn check(&self, number: usize) {
        // The compiler must not conclude from earlier writes what stands there: that is the question.
        let page = black_box(&self.pages[number]);
        if let Err(wrong) = stamps::verify(page, number as u64, self.generations[number]) {
            self.counts.errors.note(format!("memory at {:p}: {wrong}", &raw const self.pages[number]));
        }
        self.counts.checked.fetch_add(1, Ordering::Relaxed);
    }

    fn write(&mut self, number: usize) {
        self.generations[number] += 1;
        stamps::write(black_box(&mut self.pages[number]), number as u64, self.generations[number]);
        self.counts.written.fetch_add(1, Ordering::Relaxed);
    }
}
