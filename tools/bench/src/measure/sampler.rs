//! What happens over time: the wire and the guest, looked at every few milliseconds from a thread of its own.
//!
//! ```text
//!   source runs ────────────┐ standstill ┌──── target runs
//!   heartbeats from source  │            │ heartbeats from target
//!   ─────┬────┬────┬────┬───┴──┬────┬────┴┬────┬────┬──> every 5 ms
//! ```
//!
//! A target's memory is looked at only when the source's heart has stopped, see [`super::guest`]. Times are the
//! lab clock's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_guest_abi::Report;
use ferry_guest_abi::report::Gap;
use ferry_lab::LabClock;

use super::MeasureError;
use super::cost::{self, CostSnapshot, ThreadClock};
use super::counters::InterfaceCounter;
use super::guest::GuestWindow;

const EVERY: Duration = Duration::from_millis(5);

/// The interface is read every so many looks: its table costs more than the guest's page.
const LOOKS_PER_COUNTER: u32 = 4;

/// Threads are listed every so many looks, for those that end later.
const LOOKS_PER_THREADS: u32 = 20;

/// After so many looks without a heartbeat the source counts as stopped; a guest may also just wait for a core.
const STILL_LOOKS: u32 = 3;

/// What to watch.
#[derive(Debug)]
pub struct Watched {
    /// The wire, and the tap whose traffic is not the migration's.
    pub wire: InterfaceCounter,
    /// See [`Watched::wire`].
    pub tap: Option<InterfaceCounter>,
    /// The guest at the source; `None` for guests without a report.
    pub source: Option<GuestWindow>,
    /// Where it goes.
    pub target_pid: u32,
    /// Its memory.
    pub memory_mib: u32,
    /// Where it comes from.
    pub source_pid: u32,
    /// Whether source and target map the same memory, so that each shows the heart of a guest that runs on the other. The
    /// source's then counts only as long as it has vCPU threads.
    pub shared_memory: bool,
    /// The source's vCPU threads; they may end before anybody else can ask what they used.
    pub vcpus: Vec<ThreadClock>,
}

/// A moment of the guest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuestMoment {
    /// When.
    pub at: Duration,
    /// Pages written so far.
    pub pages_written: u64,
}

/// Everything that was seen.
#[derive(Debug, Default)]
pub struct Samples {
    /// Bytes on the wire so far, without the tap's.
    pub wire: Vec<(Duration, u64)>,
    /// The guest.
    pub guest: Vec<GuestMoment>,
    /// The threads of source and target that were ever seen, with what they had used when they were seen last.
    pub threads: [CostSnapshot; 2],
    /// Gaps between heartbeats by the tick at which they began.
    gaps: BTreeMap<u64, Gap>,
    /// A tick and the latest moment that it can have been.
    anchor: Option<(u64, Duration)>,
    tsc_khz: u64,
    still_looks: u32,
    /// The last report of the source and of the target.
    pub last_source: Option<Report>,
    /// See [`Samples::last_source`].
    pub last_target: Option<Report>,
    /// The first report of the target after it had taken over.
    pub first_target: Option<Report>,
}

/// A sampling thread. Dropping it ends it.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Samples>>,
}

impl Sampler {
    /// Begins to look.
    ///
    /// # Errors
    /// [`MeasureError::Thread`].
    pub fn start(watched: Watched, clock: LabClock) -> Result<Self, MeasureError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let look = move || {
            let mut samples = Samples::default();
            let mut target = None;
            let mut looks = 0_u32;
            while !stopped.load(Ordering::Relaxed) {
                if looks.is_multiple_of(LOOKS_PER_COUNTER) {
                    samples.look_at_wire(&watched, clock.now());
                }
                samples.look_at_threads(&watched, looks.is_multiple_of(LOOKS_PER_THREADS));
                samples.look_at_guest(&watched, &mut target, clock);
                looks = looks.wrapping_add(1);
                std::thread::sleep(EVERY);
            }
            samples.look_at_wire(&watched, clock.now());
            samples
        };
        let thread = std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(look)
            .map_err(MeasureError::Thread)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it and gives what it saw.
    #[must_use]
    pub fn stop(mut self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

impl Samples {
    fn look_at_threads(&mut self, watched: &Watched, all: bool) {
        if all {
            for (costs, pid) in self.threads.iter_mut().zip([watched.source_pid, watched.target_pid]) {
                if let Ok(mut now) = cost::snapshot(pid) {
                    now.keep_ended(costs);
                    *costs = now;
                }
            }
        }
        for vcpu in &watched.vcpus {
            if let Some(cpu) = vcpu.cpu() {
                self.threads[0].update(vcpu.id, cpu);
            }
        }
    }

    fn look_at_wire(&mut self, watched: &Watched, now: Duration) {
        let tap = watched.tap.as_ref().map_or(Ok(0), InterfaceCounter::bytes);
        // An interface that is gone has no more traffic.
        if let (Ok(wire), Ok(tap)) = (watched.wire.bytes(), tap) {
            self.wire.push((now, wire.saturating_sub(tap)));
        }
    }

    fn look_at_guest(&mut self, watched: &Watched, target: &mut Option<GuestWindow>, clock: LabClock) {
        let Some(source) = &watched.source else { return };
        let before = self.last_source.as_ref().map_or(0, |report| report.heartbeat_count);
        let elsewhere = watched.shared_memory && watched.vcpus.iter().all(|vcpu| vcpu.cpu().is_none());
        if self.last_target.is_none()
            && !elsewhere
            && let Some(report) = source.report().filter(|report| report.heartbeat_count > before)
        {
            self.take(&report, clock.now());
            self.last_source = Some(report);
            self.still_looks = 0;
            return;
        }
        self.still_looks += 1;
        if self.still_looks < STILL_LOOKS {
            return;
        }
        if target.is_none() {
            *target = GuestWindow::find(watched.target_pid, watched.memory_mib).ok();
        }
        let Some(report) = target.as_ref().and_then(GuestWindow::report) else { return };
        let last = self.last_target.as_ref().map_or(before, |report| report.heartbeat_count);
        if report.heartbeat_count > last {
            self.take(&report, clock.now());
            self.first_target.get_or_insert_with(|| report.clone());
            self.last_target = Some(report);
        }
    }

    fn take(&mut self, report: &Report, now: Duration) {
        self.guest.push(GuestMoment { at: now, pages_written: report.pages_written });
        self.tsc_khz = report.tsc_khz;
        let seen = report.gaps().iter().chain([&report.largest_gap]).filter(|gap| gap.length_ticks > 0);
        self.gaps.extend(seen.map(|gap| (gap.start_tsc, *gap)));
        // The heartbeat that was looked at soonest after it beat ties the clocks together best.
        let better = match self.anchor {
            None => true,
            Some((tick, at)) => {
                let ahead = self.ms(report.heartbeat_tsc.wrapping_sub(tick)) / 1e3;
                report.heartbeat_tsc > tick && now.as_secs_f64() - at.as_secs_f64() < ahead
            }
        };
        if better {
            self.anchor = Some((report.heartbeat_tsc, now));
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "ticks of a few minutes, shown in ms")]
    fn ms(&self, ticks: u64) -> f64 {
        if self.tsc_khz == 0 { 0.0 } else { ticks as f64 / self.tsc_khz as f64 }
    }

    /// The guest's longest gap between heartbeats that ended after the one at `tick`: its length in ms, and when it
    /// began on the lab's clock in ms.
    #[must_use]
    pub fn longest_gap_since(&self, tick: u64) -> Option<(f64, f64)> {
        let since = self.gaps.values().filter(|gap| gap.start_tsc.saturating_add(gap.length_ticks) > tick);
        let longest = since.max_by_key(|gap| gap.length_ticks)?;
        let (anchor, at) = self.anchor?;
        let at_ms = at.as_secs_f64() * 1e3;
        let start = if longest.start_tsc >= anchor {
            at_ms + self.ms(longest.start_tsc - anchor)
        } else {
            at_ms - self.ms(anchor - longest.start_tsc)
        };
        Some((self.ms(longest.length_ticks), start))
    }

    /// Pages that the guest wrote a second between two moments; `None` if it was not seen twice in between.
    #[must_use]
    pub fn guest_rate(&self, from: Duration, to: Duration) -> Option<f64> {
        let within: Vec<_> =
            self.guest.iter().filter(|moment| moment.at >= from && moment.at <= to).collect();
        let (first, last) = (within.first()?, within.last()?);
        let seconds = last.at.saturating_sub(first.at).as_secs_f64();
        (seconds > 0.0).then(|| float(last.pages_written.saturating_sub(first.pages_written)) / seconds)
    }

    /// The rate on the wire, as points of ms since `origin` and bytes/s.
    #[must_use]
    pub fn wire_rates(&self, origin: Duration) -> Vec<(f64, f64)> {
        rates(&self.wire, origin)
    }

    /// The guest's rate of writing, as points of ms since `origin` and pages/s; one in `LOOKS_PER_COUNTER` looks.
    #[must_use]
    pub fn guest_rates(&self, origin: Duration) -> Vec<(f64, f64)> {
        let step = usize::try_from(LOOKS_PER_COUNTER).unwrap_or(1);
        let moments = self.guest.iter().step_by(step);
        rates(&moments.map(|moment| (moment.at, moment.pages_written)).collect::<Vec<_>>(), origin)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

fn rates(counts: &[(Duration, u64)], origin: Duration) -> Vec<(f64, f64)> {
    let rate = |pair: &[(Duration, u64)]| {
        let [(from, before), (to, after)] = pair else { return None };
        let seconds = to.saturating_sub(*from).as_secs_f64();
        let at_ms = (to.as_secs_f64() - origin.as_secs_f64()) * 1e3;
        (seconds > 0.0).then(|| (at_ms, float(after.saturating_sub(*before)) / seconds))
    };
    counts.windows(2).filter_map(rate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn counts_become_rates() {
        let counts = [(100 * MS, 0), (200 * MS, 1000), (200 * MS, 1000), (300 * MS, 1000)];
        let seen: Vec<(f64, f64)> =
            rates(&counts, 100 * MS).into_iter().map(|(ms, rate)| (ms.round(), rate.round())).collect();
        assert_eq!(seen, [(100.0, 10_000.0), (200.0, 0.0)]);
        let samples = Samples {
            guest: (0..10_u32)
                .map(|n| GuestMoment { at: n * 10 * MS, pages_written: u64::from(n) * 5 })
                .collect(),
            ..Samples::default()
        };
        assert_eq!(samples.guest_rate(15 * MS, 55 * MS).map(f64::round), Some(500.0));
        assert_eq!(samples.guest_rate(11 * MS, 12 * MS), None);
    }

    #[test]
    fn the_longest_gap_since_an_order_lies_on_the_clock() {
        let gap = |start_tsc, length_ticks| (start_tsc, Gap { start_tsc, length_ticks });
        let samples = Samples {
            gaps: [gap(1000, 90_000), gap(200_000, 30_000), gap(400_000, 5000)].into(),
            anchor: Some((300_000, 500 * MS)),
            tsc_khz: 1000,
            ..Samples::default()
        };
        assert_eq!(samples.longest_gap_since(0), Some((90.0, 201.0)));
        assert_eq!(samples.longest_gap_since(150_000), Some((30.0, 400.0)));
        assert_eq!(samples.longest_gap_since(300_000), Some((5.0, 600.0)));
        assert_eq!(samples.longest_gap_since(405_000), None);
    }
}
