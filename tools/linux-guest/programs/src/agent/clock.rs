//! The clock load: one thread a processor reads all clocks and the time-stamp counter over and over.
//!
//! Three things must hold, migrations or not:
//!
//! - no clock ever steps back, neither on one processor nor between two: what a thread has read is a lower bound for
//!   every later reading of any thread;
//! - CLOCK_MONOTONIC and the counter advance alike: their offset from each other does not jump;
//! - CLOCK_BOOTTIME and CLOCK_REALTIME advance as CLOCK_MONOTONIC does, since nobody sleeps or sets the clock here.
//!
//! Whether the wall clock is right, only somebody outside can tell: [`now`] reads all clocks for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use ferry_linux_guest_programs::lines::Answer;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::loads::{Errors, Options, Workers};

/// How often each processor's thread reads the clocks.
const PERIOD: Duration = Duration::from_millis(10);

/// How long the counter's rate is measured before anything is compared with it.
const CALIBRATION_NS: i64 = 2_000_000_000;

/// A reading during which the counter advanced by more than this was interrupted and compares badly.
const SPAN_CYCLES_MAX: u64 = 100_000;

/// How often a reading that was interrupted is repeated.
const ATTEMPTS: usize = 10;

/// All clocks at one moment, in nanoseconds, and the counter.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// The counter before the clocks were read.
    tsc: u64,
    monotonic_ns: i64,
    realtime_ns: i64,
    boottime_ns: i64,
    /// How far the counter advanced meanwhile.
    span_cycles: u64,
}

impl Reading {
    fn take() -> anyhow::Result<Self> {
        let tsc = read_tsc();
        let monotonic_ns = read_ns(ClockId::CLOCK_MONOTONIC)?;
        let realtime_ns = read_ns(ClockId::CLOCK_REALTIME)?;
        let boottime_ns = read_ns(ClockId::CLOCK_BOOTTIME)?;
        let span_cycles = read_tsc().wrapping_sub(tsc);
        Ok(Self { tsc, monotonic_ns, realtime_ns, boottime_ns, span_cycles })
    }

    /// The one of a few readings that took the shortest.
    fn take_undisturbed() -> anyhow::Result<Self> {
        let mut best = Self::take()?;
        for _ in 1..ATTEMPTS {
            if best.span_cycles <= SPAN_CYCLES_MAX {
                break;
            }
            let next = Self::take()?;
            if next.span_cycles < best.span_cycles {
                best = next;
            }
        }
        Ok(best)
    }
}

/// So many cycles of the counter in so many nanoseconds of the monotonic clock.
#[derive(Clone, Copy, Debug)]
struct Rate {
    cycles: u64,
    ns: i64,
}

impl Rate {
    fn between(first: Reading, last: Reading) -> Self {
        // At least one, for a counter that stands still.
        let cycles = last.tsc.wrapping_sub(first.tsc).max(1);
        Self { cycles, ns: last.monotonic_ns - first.monotonic_ns }
    }

    /// What the monotonic clock advances in `cycles`.
    fn ns(self, cycles: u64) -> i64 {
        let ns = i128::from(cycles) * i128::from(self.ns) / i128::from(self.cycles);
        i64::try_from(ns).unwrap_or(i64::MAX)
    }
}

/// The counter, after everything before it has been done.
///
/// By RDTSCP: the crate's `start` and `stop` overwrite RDX without telling the compiler, so what was there is lost.
fn read_tsc() -> u64 {
    tick_counter::x86_64_processor_id().0
}

fn read_ns(clock: ClockId) -> anyhow::Result<i64> {
    let time = clock_gettime(clock).with_context(|| format!("{clock:?} can't be read"))?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// All clocks now, for a comparison with clocks outside.
///
/// # Errors
/// That a clock can't be read.
pub(crate) fn now() -> anyhow::Result<Answer> {
    let Reading { tsc, monotonic_ns, realtime_ns, boottime_ns, span_cycles } = Reading::take_undisturbed()?;
    Ok(Answer::default()
        .with("monotonic_ns", monotonic_ns)
        .with("realtime_ns", realtime_ns)
        .with("boottime_ns", boottime_ns)
        .with("tsc", tsc)
        .with("span_cycles", span_cycles))
}

/// What no later reading of any thread may be below, and what has been seen.
#[derive(Debug, Default)]
struct Shared {
    tsc: AtomicU64,
    monotonic_ns: AtomicU64,
    readings: AtomicU64,
    /// The largest change of the offset between monotonic clock and counter from one reading to the next.
    jump_ns_max: AtomicU64,
    /// The same for realtime and boottime against the monotonic clock.
    apart_ns_max: AtomicU64,
    /// The longest time between two readings of one thread.
    gap_ns_max: AtomicU64,
    errors: Errors,
}

/// The load, running.
#[derive(Debug)]
pub(crate) struct Clock {
    shared: Arc<Shared>,
    workers: Workers,
}

impl Clock {
    /// Starts it on every processor.
    ///
    /// # Errors
    /// What can't be had.
    pub(crate) fn start(_options: &Options) -> anyhow::Result<Self> {
        let processors = std::thread::available_parallelism().context("how many processors there are")?.get();
        let shared = Arc::new(Shared::default());
        let works = (0..processors).map(|processor| {
            let shared = Arc::clone(&shared);
            move |stop: &AtomicBool| {
                if let Err(error) = shared.watch(processor, stop) {
                    shared.errors.note(format!("processor {processor}: {error:#}"));
                }
            }
        });
        let workers = Workers::start("clock", works)?;
        Ok(Self { shared, workers })
    }

    /// What it has seen so far.
    pub(crate) fn report(&self) -> Answer {
        self.shared.report()
    }

    /// Ends it.
    pub(crate) fn stop(self) -> Answer {
        let Self { shared, workers } = self;
        workers.stop(&shared.errors);
        shared.report()
    }
}

impl Shared {
    fn report(&self) -> Answer {
        let read = |value: &AtomicU64| value.load(Ordering::SeqCst);
        Answer::default()
            .with("readings", read(&self.readings))
            .with("jump_ns_max", read(&self.jump_ns_max))
            .with("apart_ns_max", read(&self.apart_ns_max))
            .with("gap_ns_max", read(&self.gap_ns_max))
            .with("errors", self.errors.count())
            .noting(&self.errors.first())
    }

    fn watch(&self, processor: usize, stop: &AtomicBool) -> anyhow::Result<()> {
        let mut only_here = CpuSet::new();
        only_here.set(processor).context("more processors than a set can name")?;
        sched_setaffinity(Pid::from_raw(0), &only_here).context("can't stay on it")?;
        let first = Reading::take_undisturbed()?;
        let (mut before, mut rate) = (first, None);
        while !stop.load(Ordering::SeqCst) {
            let tsc_floor = self.tsc.load(Ordering::SeqCst);
            let monotonic_floor = self.monotonic_ns.load(Ordering::SeqCst);
            let now = Reading::take_undisturbed()?;
            self.never_back(processor, before, now);
            self.not_below_others(processor, (tsc_floor, monotonic_floor), now);
            self.readings.fetch_add(1, Ordering::SeqCst);
            if rate.is_none() && now.monotonic_ns - first.monotonic_ns > CALIBRATION_NS {
                rate = Some(Rate::between(first, now));
            }
            let undisturbed = before.span_cycles.max(now.span_cycles) <= SPAN_CYCLES_MAX;
            self.compare(before, now, rate.filter(|_| undisturbed));
            before = now;
            std::thread::sleep(PERIOD);
        }
        Ok(())
    }

    fn never_back(&self, processor: usize, before: Reading, now: Reading) {
        let back = |what: &str, before: i64, now: i64| {
            if now < before {
                self.errors
                    .note(format!("{what} stepped back by {} ns on processor {processor}", before - now));
            }
        };
        back("CLOCK_MONOTONIC", before.monotonic_ns, now.monotonic_ns);
        back("CLOCK_REALTIME", before.realtime_ns, now.realtime_ns);
        back("CLOCK_BOOTTIME", before.boottime_ns, now.boottime_ns);
        if now.tsc < before.tsc {
            let cycles = before.tsc - now.tsc;
            self.errors.note(format!("the counter stepped back by {cycles} cycles on processor {processor}"));
        }
    }

    fn not_below_others(&self, processor: usize, (tsc_floor, monotonic_floor): (u64, u64), now: Reading) {
        let monotonic_ns = u64::try_from(now.monotonic_ns).unwrap_or_default();
        if now.tsc < tsc_floor {
            let cycles = tsc_floor - now.tsc;
            self.errors
                .note(format!("the counter of processor {processor} is {cycles} cycles behind another's"));
        }
        if monotonic_ns < monotonic_floor {
            let ns = monotonic_floor - monotonic_ns;
            self.errors.note(format!("CLOCK_MONOTONIC on processor {processor} is {ns} ns behind another's"));
        }
        self.tsc.fetch_max(now.tsc, Ordering::SeqCst);
        self.monotonic_ns.fetch_max(monotonic_ns, Ordering::SeqCst);
    }

    fn compare(&self, before: Reading, now: Reading, rate: Option<Rate>) {
        let monotonic_ns = now.monotonic_ns - before.monotonic_ns;
        self.gap_ns_max.fetch_max(monotonic_ns.unsigned_abs(), Ordering::SeqCst);
        let Some(rate) = rate else { return };
        let by_counter_ns = rate.ns(now.tsc.wrapping_sub(before.tsc));
        self.jump_ns_max.fetch_max((monotonic_ns - by_counter_ns).unsigned_abs(), Ordering::SeqCst);
        for other_ns in [now.realtime_ns - before.realtime_ns, now.boottime_ns - before.boottime_ns] {
            self.apart_ns_max.fetch_max((other_ns - monotonic_ns).unsigned_abs(), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(tsc: u64, monotonic_ns: i64) -> Reading {
        Reading { tsc, monotonic_ns, realtime_ns: monotonic_ns, boottime_ns: monotonic_ns, span_cycles: 100 }
    }

    #[test]
    fn steps_back_are_errors_on_one_processor_and_between_two() {
        let shared = Shared::default();
        shared.never_back(0, reading(100, 100), reading(100, 100));
        shared.not_below_others(0, (50, 50), reading(100, 100));
        assert_eq!(shared.errors.count(), 0);
        shared.never_back(0, reading(100, 100), reading(99, 100));
        assert!(
            shared.errors.first().contains("counter stepped back by 1 cycles"),
            "{}",
            shared.errors.first()
        );
        // Monotonic, realtime and boottime.
        shared.never_back(0, reading(100, 100), reading(100, 99));
        assert_eq!(shared.errors.count(), 4);
        shared.not_below_others(1, (101, 100), reading(100, 100));
        shared.not_below_others(1, (100, 101), reading(100, 100));
        assert_eq!(shared.errors.count(), 6);
        assert_eq!((shared.tsc.into_inner(), shared.monotonic_ns.into_inner()), (100, 100));
    }

    #[test]
    fn a_jump_of_one_clock_against_the_others_is_measured() {
        let shared = Shared::default();
        let rate = Rate::between(reading(0, 0), reading(2_000, 1_000));
        shared.compare(reading(0, 0), reading(2_000_000, 1_000_000), Some(rate));
        assert_eq!(shared.jump_ns_max.load(Ordering::SeqCst), 0);
        shared.compare(reading(0, 0), reading(2_000_000, 1_500_000), Some(rate));
        let mut wall = reading(2_000_000, 1_000_000);
        wall.realtime_ns -= 7;
        shared.compare(reading(0, 0), wall, Some(rate));
        assert_eq!((shared.jump_ns_max.into_inner(), shared.apart_ns_max.into_inner()), (500_000, 7));
        assert_eq!(shared.gap_ns_max.into_inner(), 1_500_000);
    }

    #[test]
    fn the_clocks_of_this_machine_can_be_watched() {
        let clock = Clock::start(&Options::parse("").unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let report = clock.stop();
        assert!(report.number("readings").unwrap() > 0, "{report}");
        assert_eq!(report.number("errors"), Ok(0), "{report}");
        assert!(now().unwrap().number("realtime_ns").unwrap() > 0);
    }
}
