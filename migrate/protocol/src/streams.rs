//! How many of a migration's data streams work: as many as make it faster, found by trying.
//!
//! All streams are connected; those beyond the number that this module names wait. A round's chunks are taken by
//! whichever stream is free, so that the number may change at any time: within a round each chunk travels once, and no
//! round begins before all streams have reached the fence of the last.
//!
//! ```text
//!   settle --window--> measure --window--> more pays? --yes--> one more --> settle
//!                                              '------no---> the best so far, and again in RETRY_AFTER
//! ```
//!
//! Nothing here looks at a clock: times come in.

use std::time::Duration;

use crate::time::Timestamp;

/// The shortest time over which a rate is taken.
const WINDOW_MIN: Duration = Duration::from_millis(40);

/// The fewest bytes over which one is taken: several times what the sockets' buffers hold.
const WINDOW_BYTES_MIN: u64 = 32 << 20;

/// How much faster one more stream must be.
const GAIN_MIN: f64 = 1.05;

/// How long a choice stands before it is questioned.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Finds the number of streams.
#[derive(Debug, Clone)]
pub struct StreamTuner {
    most: u16,
    working: u16,
    /// The number that was best, and its rate in bytes/s.
    best: Option<(u16, f64)>,
    step: Step,
    since: Timestamp,
    bytes_then: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The number has just changed: what is under way still shows the old one.
    Settling,
    Measuring,
    /// Until the choice is questioned.
    Resting,
}

impl StreamTuner {
    /// Begins with one stream of at most `most`, at `now`.
    #[must_use]
    pub const fn new(most: u16, now: Timestamp) -> Self {
        Self { most, working: 1, best: None, step: Step::Settling, since: now, bytes_then: 0 }
    }

    /// How many streams are to work, now that `bytes` have been written in all.
    pub fn step(&mut self, now: Timestamp, bytes: u64) -> u16 {
        if self.most == 1 {
            return 1;
        }
        let elapsed = now.since(self.since);
        let written = bytes.saturating_sub(self.bytes_then);
        match self.step {
            Step::Resting if elapsed >= RETRY_AFTER => {
                self.best = None;
                self.go_on(Step::Settling, now, bytes);
            }
            Step::Settling | Step::Measuring if elapsed < WINDOW_MIN || written < WINDOW_BYTES_MIN => {}
            Step::Settling => self.go_on(Step::Measuring, now, bytes),
            Step::Measuring => self.compare(as_f64(written) / elapsed.as_secs_f64(), now, bytes),
            Step::Resting => {}
        }
        self.working
    }

    /// A round begins or ends: a rate across the pause between two would say nothing.
    pub fn interrupt(&mut self, now: Timestamp, bytes: u64) {
        if self.step == Step::Measuring {
            self.step = Step::Settling;
        }
        if self.step == Step::Settling {
            (self.since, self.bytes_then) = (now, bytes);
        }
    }

    fn compare(&mut self, rate: f64, now: Timestamp, bytes: u64) {
        let better = self.best.is_none_or(|(_, best)| rate > best * GAIN_MIN);
        if better {
            self.best = Some((self.working, rate));
        }
        if better && self.working < self.most {
            self.working += 1;
            return self.go_on(Step::Settling, now, bytes);
        }
        self.working = self.best.map_or(self.working, |(streams, _)| streams);
        self.go_on(Step::Resting, now, bytes);
    }

    const fn go_on(&mut self, step: Step, now: Timestamp, bytes: u64) {
        self.step = step;
        self.since = now;
        self.bytes_then = bytes;
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for `seconds` with so many bytes/s for each number of streams.
    fn run(tuner: &mut StreamTuner, from_ms: u64, seconds: u64, rate: impl Fn(u16) -> u64) -> u16 {
        let (mut bytes, mut working) = (tuner.bytes_then, 1);
        for ms in from_ms..from_ms + seconds * 1000 {
            bytes += rate(working) / 1000;
            working = tuner.step(Timestamp::from_origin(Duration::from_millis(ms)), bytes);
        }
        working
    }

    #[test]
    fn streams_are_added_as_long_as_they_pay() {
        let mut tuner = StreamTuner::new(8, Timestamp::default());
        assert_eq!(run(&mut tuner, 0, 1, |streams| 1_000_000_000 * u64::from(streams.min(3))), 3);
        let mut tuner = StreamTuner::new(2, Timestamp::default());
        assert_eq!(run(&mut tuner, 0, 1, |streams| 1_000_000_000 * u64::from(streams)), 2);
    }

    #[test]
    fn a_link_that_is_full_keeps_one_stream() {
        let mut tuner = StreamTuner::new(8, Timestamp::default());
        assert_eq!(run(&mut tuner, 0, 3, |_| 118_000_000), 1);
    }

    #[test]
    fn a_second_stream_that_is_in_the_way_is_put_aside() {
        let mut tuner = StreamTuner::new(2, Timestamp::default());
        assert_eq!(run(&mut tuner, 0, 1, |streams| 2_000_000_000 / u64::from(streams)), 1);
    }

    #[test]
    fn what_pays_later_is_found_later() {
        let mut tuner = StreamTuner::new(4, Timestamp::default());
        assert_eq!(run(&mut tuner, 0, 1, |_| 1_000_000_000), 1);
        assert_eq!(run(&mut tuner, 1000, 4, |streams| 1_000_000_000 * u64::from(streams)), 4);
    }
}
