//! The heartbeat: proof that the guest runs, and a record of when it did not.
//!
//! Whatever the workload does, it calls [`Pulse::beat`] about every 100 us of work and [`Pulse::halt`] when it has
//! nothing to do. The span between two beats is a gap; long ones are logged in the report page. The
//! guest's TSC is the host's, so the longest gap over a migration is its true downtime.

use crate::machine::{apic, port, report, tsc};
use core::fmt::Write as _;
use ferry_guest_abi::report::{GAP_LOG_LEN, Stage, offset};

/// The state of the heartbeat.
pub struct Pulse {
    tsc_khz: u64,
    gap_min_ticks: u64,
    last: u64,
    elapsed: u64,
    beats: u64,
    halts: u64,
    gaps: u64,
    largest: u64,
}

impl Pulse {
    /// Measures the TSC and starts the tick. Gaps of `gap_min_us` microseconds or more will be logged.
    pub fn calibrate(gap_min_us: u64) -> Self {
        let tsc_khz = apic::measure_tsc_khz();
        apic::start_tick();
        report::set(offset::TSC_KHZ, tsc_khz);
        let gap_min_ticks = tsc_khz.saturating_mul(gap_min_us) / 1_000;
        Self { tsc_khz, gap_min_ticks, last: tsc(), elapsed: 0, beats: 0, halts: 0, gaps: 0, largest: 0 }
    }

    /// TSC ticks a millisecond.
    pub const fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// TSC ticks from the first heartbeat to the last: a clock that never goes backwards.
    pub const fn elapsed_ticks(&self) -> u64 {
        self.elapsed
    }

    /// Declares the main job begun, and forgets the gaps before it.
    pub fn ready(&mut self) {
        self.last = tsc();
        (self.gaps, self.largest) = (0, 0);
        report::set(offset::GAP_COUNT, 0);
        report::set(offset::LARGEST_GAP_TICKS, 0);
        report::set_u32(offset::STAGE, Stage::Ready as u32);
        let _ = writeln!(crate::machine::serial::Serial, "ferry guest: ready");
        self.last = tsc();
    }

    /// Records that the guest runs, and how long it did not. Returns the TSC.
    #[inline]
    pub fn beat(&mut self) -> u64 {
        let now = tsc();
        // A clock that went backwards, across hosts, is no gap.
        let gap = now.saturating_sub(self.last);
        if gap >= self.gap_min_ticks {
            self.log_gap(gap);
        }
        self.last = now;
        self.elapsed += gap;
        self.beats += 1;
        report::set(offset::HEARTBEAT_TSC, now);
        report::set(offset::HEARTBEAT_COUNT, self.beats);
        now
    }

    #[cold]
    fn log_gap(&mut self, gap: u64) {
        let at = offset::GAP_LOG + 16 * (self.gaps as usize % GAP_LOG_LEN);
        report::set(at, self.last);
        report::set(at + 8, gap);
        self.gaps += 1;
        // The count comes last: a host reads no entry that isn't written yet.
        report::set(offset::GAP_COUNT, self.gaps);
        if gap > self.largest {
            self.largest = gap;
            report::set(offset::LARGEST_GAP_START, self.last);
            report::set(offset::LARGEST_GAP_TICKS, gap);
        }
    }

    /// Gives the processor back until the next interrupt: a tick at the latest.
    pub fn halt(&mut self) {
        self.halts += 1;
        report::set(offset::HALTS, self.halts);
        port::halt();
        self.beat();
    }
}
