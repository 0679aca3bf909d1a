//! What arrived when: bytes in buckets of 10 ms, and the longest silences between events.
//!
//! All times count from the origin of the [`LabClock`](crate::LabClock) that produced them. Drawing
//! is [`plot`](crate::plot)'s part.

use serde::Serialize;

/// The width of one bucket of a [`Timeline`], in milliseconds.
pub const BUCKET_MS: u64 = 10;

/// The most buckets a timeline holds: two hours. What comes later is left out of it.
pub const BUCKETS_MAX: usize = 2 * 3600 * 100;

/// The most silences that a [`GapTracker`] lists, longest or not.
pub const GAPS_LISTED_MAX: usize = 1000;

const BYTES_PER_MIB: f64 = 1024.0 * 1024.0;

/// Bytes over time.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Timeline {
    /// Bytes in each bucket of [`BUCKET_MS`], the first starting at the clock's origin.
    pub bytes: Vec<u64>,
}

impl Timeline {
    /// Counts `bytes` that arrived at `at_us` microseconds.
    pub fn add(&mut self, at_us: u64, bytes: u64) {
        let bucket = usize::try_from(at_us / (BUCKET_MS * 1000)).unwrap_or(usize::MAX);
        if bucket >= BUCKETS_MAX {
            return;
        }
        if bucket >= self.bytes.len() {
            self.bytes.resize(bucket + 1, 0);
        }
        self.bytes[bucket] += bytes;
    }

    /// The throughput as points `(t_ms, mib_per_s)`, each for the `step_ms` that begin there.
    /// `step_ms` is rounded up to whole buckets. The last bucket ended in its middle, when the last
    /// byte came, and would look like a drop: it is left out, as is a last step that is not full.
    #[must_use]
    pub fn samples(&self, step_ms: u64) -> Vec<(f64, f64)> {
        let per_step = step_ms.div_ceil(BUCKET_MS).max(1);
        let step_s = (per_step * BUCKET_MS) as f64 / 1e3;
        let full = &self.bytes[..self.bytes.len().saturating_sub(1)];
        let steps = full.chunks_exact(usize::try_from(per_step).unwrap_or(usize::MAX));
        let rates = steps.map(|step| step.iter().sum::<u64>() as f64 / BYTES_PER_MIB / step_s);
        rates.enumerate().map(|(index, rate)| (index as f64 * step_s * 1e3, rate)).collect()
    }
}

/// A silence between two events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Gap {
    /// When the last event before it happened, in milliseconds.
    pub from_ms: f64,
    /// How long it lasted, in milliseconds.
    pub ms: f64,
}

impl Gap {
    fn between_us(from_us: u64, to_us: u64) -> Self {
        Self { from_ms: from_us as f64 / 1e3, ms: to_us.saturating_sub(from_us) as f64 / 1e3 }
    }
}

/// Finds the longest silence in a series of events, and lists those that are worth a look.
#[derive(Debug, Clone)]
pub struct GapTracker {
    last_us: u64,
    longest: Gap,
    listed_from_ms: f64,
    listed: Vec<Gap>,
}

impl GapTracker {
    /// Starts at `now_us`, as if there were an event: silence counts from here. Gaps of
    /// `listed_from_ms` milliseconds and more are listed.
    #[must_use]
    pub fn start(now_us: u64, listed_from_ms: f64) -> Self {
        let longest = Gap::between_us(now_us, now_us);
        Self { last_us: now_us, longest, listed_from_ms, listed: Vec::new() }
    }

    /// An event happened, or the series ends.
    pub fn event(&mut self, now_us: u64) {
        let gap = Gap::between_us(self.last_us, now_us);
        if gap.ms > self.longest.ms {
            self.longest = gap;
        }
        if gap.ms >= self.listed_from_ms && self.listed.len() < GAPS_LISTED_MAX {
            self.listed.push(gap);
        }
        self.last_us = self.last_us.max(now_us);
    }

    /// The longest gap between two events.
    #[must_use]
    pub fn longest(&self) -> Gap {
        self.longest
    }

    /// The longest gap, counting the one that lasts at `now_us`.
    #[must_use]
    pub fn longest_at(&self, now_us: u64) -> Gap {
        let open = Gap::between_us(self.last_us, now_us);
        if open.ms > self.longest.ms { open } else { self.longest }
    }

    /// The listed gaps, in order of time.
    #[must_use]
    pub fn listed(&self) -> &[Gap] {
        &self.listed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_per_second_whatever_the_step() {
        let mut timeline = Timeline::default();
        for at_ms in 0..=40 {
            timeline.add(at_ms * 1000, 1 << 20);
        }
        assert_eq!(timeline.samples(10).len(), 4);
        for (_, rate) in timeline.samples(10).into_iter().chain(timeline.samples(20)) {
            assert!((rate - 1000.0).abs() < 1e-6, "{rate}");
        }
        assert!((timeline.samples(20)[1].0 - 20.0).abs() < 1e-6);
        assert_eq!(timeline.samples(30).len(), 1, "the last 10 ms are no full step");
        assert!(Timeline::default().samples(10).is_empty());
    }

    #[test]
    fn a_far_event_takes_no_memory() {
        let mut timeline = Timeline::default();
        timeline.add(u64::MAX, 1);
        assert!(timeline.bytes.is_empty());
    }

    #[test]
    fn the_longest_gap_counts_from_the_start_and_to_the_present() {
        let mut gaps = GapTracker::start(1_000, 5.0);
        gaps.event(9_000);
        assert_eq!(gaps.longest(), Gap { from_ms: 1.0, ms: 8.0 });
        gaps.event(10_000);
        gaps.event(14_000);
        assert_eq!(gaps.longest(), Gap { from_ms: 1.0, ms: 8.0 });
        assert_eq!(gaps.longest_at(30_000), Gap { from_ms: 14.0, ms: 16.0 });
        assert_eq!(gaps.listed(), [Gap { from_ms: 1.0, ms: 8.0 }]);
    }
}
