//! The one clock of a lab: every load generator, probe and capture reports times since its origin.
//!
//! It reads real time, as measuring real traffic must. It is no source of time for the engine, which
//! has its own Clock port.

use std::time::{Duration, Instant, SystemTime};

/// A moment that all measurements of a run are counted from. Copies share the origin.
#[derive(Debug, Clone, Copy)]
pub struct LabClock {
    origin: Instant,
    origin_unix: SystemTime,
}

impl LabClock {
    /// A clock whose origin is now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "a lab measures real traffic in real time")]
    pub fn start() -> Self {
        Self { origin: Instant::now(), origin_unix: SystemTime::now() }
    }

    /// Time since the origin.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Time since the origin in microseconds.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.now().as_micros()).unwrap_or(u64::MAX)
    }

    /// Time since the origin in milliseconds, with fractions.
    #[must_use]
    pub fn now_ms(&self) -> f64 {
        self.now().as_secs_f64() * 1e3
    }

    /// The wall-clock time of the origin, for lining up with what other processes report.
    #[must_use]
    pub fn origin_unix(&self) -> SystemTime {
        self.origin_unix
    }

    /// Where a wall-clock time lies on this clock; zero if it is before the origin.
    #[must_use]
    pub fn since_origin(&self, time: SystemTime) -> Duration {
        time.duration_since(self.origin_unix).unwrap_or_default()
    }
}
