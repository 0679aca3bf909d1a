//! The guest's wall clock beside the host's.
//!
//! An answer takes tens of milliseconds where ring 0 is interpreted, and nobody knows when in between the guest read its clock.
//! So every comparison is an interval, and what counts is whether intervals still overlap.

use std::time::UNIX_EPOCH;

use ferry_lab::LabClock;

use crate::agent::Agent;

/// How often it is asked; the quickest answer counts.
const ATTEMPTS: usize = 5;

/// How far the host's own clock may be slewed against the guest's in the minutes that the test takes.
const SLEW_NS: i64 = 20_000_000;

/// How far the guest's wall clock is ahead of the host's: somewhere between these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) least_ns: i64,
    pub(crate) most_ns: i64,
}

impl Ahead {
    /// Asks the guest.
    pub(crate) fn measure(agent: &mut Agent, clock: LabClock) -> anyhow::Result<Self> {
        let mut best: Option<Self> = None;
        for _ in 0..ATTEMPTS {
            let before_ns = host_ns(clock);
            let guest_ns = Agent::number(&agent.ask("now")?, "realtime_ns")?;
            let ahead = Self { least_ns: guest_ns - host_ns(clock), most_ns: guest_ns - before_ns };
            if best.is_none_or(|best| ahead.width_ns() < best.width_ns()) {
                best = Some(ahead);
            }
        }
        Ok(best.expect("at least one attempt"))
    }

    /// How far apart two measurements are at least.
    pub(crate) fn apart_ns(self, other: Self) -> i64 {
        (self.least_ns - other.most_ns).max(other.least_ns - self.most_ns).max(0)
    }

    /// Whether both can be of one clock that nobody has set meanwhile.
    pub(crate) fn agrees_with(self, other: Self) -> bool {
        self.apart_ns(other) <= SLEW_NS
    }

    fn width_ns(self) -> i64 {
        self.most_ns - self.least_ns
    }
}

/// The host's wall clock, in nanoseconds since 1970.
fn host_ns(clock: LabClock) -> i64 {
    let time = clock.origin_unix() + clock.now();
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(least_ms: i64, most_ms: i64) -> Ahead {
        Ahead { least_ns: least_ms * 1_000_000, most_ns: most_ms * 1_000_000 }
    }

    #[test]
    fn intervals_that_overlap_are_not_apart() {
        assert_eq!(ahead(-10, 10).apart_ns(ahead(5, 30)), 0);
        assert_eq!(ahead(-10, 10).apart_ns(ahead(15, 30)), 5_000_000);
        assert_eq!(ahead(15, 30).apart_ns(ahead(-10, 10)), 5_000_000);
        assert!(ahead(-10, 10).agrees_with(ahead(29, 60)));
        assert!(!ahead(-10, 10).agrees_with(ahead(31, 60)));
    }
}
