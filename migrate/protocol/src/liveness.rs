//! Whether the other side is still there: it counts as silent once nothing was heard of it over several ticks in a row.
//!
//! Ticks are counted, not time: whoever is stopped or starved for a while finds, when it goes on, one tick that is late and
//! what has arrived meanwhile, instead of a peer that has said nothing for all that time.

use std::time::Duration;

use crate::time::Timestamp;

/// How often the source pings.
pub const TICK: Duration = Duration::from_secs(1);

/// So many ticks without a word mean that the other side is silent: 5 to 6 seconds. A busy host gets its turn within tens
/// of milliseconds, TCP repeats what was lost within three; and where it is a false alarm, what follows is a
/// reconnection that costs a few round trips.
pub const SILENT_TICKS_MAX: u32 = 5;

/// The token of the pings that only ask for a sign. Those of rounds have the round's number, which is shorter.
pub(crate) const TOKEN: u64 = u64::MAX;

/// What a tick came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tick {
    /// It is not time yet.
    NotYet,
    /// The other side is to be asked for a sign.
    Ask,
    /// It has been silent for too long.
    Silent,
}

/// Counts ticks since the other side was heard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Liveness {
    next: Timestamp,
    unheard: u32,
}

impl Liveness {
    /// Begins at `now`, as if it had just been heard.
    pub(crate) fn new(now: Timestamp) -> Self {
        Self { next: now + TICK, unheard: 0 }
    }

    pub(crate) const fn heard(&mut self) {
        self.unheard = 0;
    }

    /// When the next tick is due.
    pub(crate) const fn due(&self) -> Timestamp {
        self.next
    }

    pub(crate) fn tick(&mut self, now: Timestamp) -> Tick {
        if now < self.next {
            return Tick::NotYet;
        }
        self.next = now + TICK;
        self.unheard += 1;
        if self.unheard > SILENT_TICKS_MAX { Tick::Silent } else { Tick::Ask }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Timestamp {
        Timestamp::from_origin(Duration::from_secs(s))
    }

    #[test]
    fn silence_is_noticed_after_some_ticks_and_a_word_starts_anew() {
        let mut liveness = Liveness::new(at(0));
        assert_eq!(liveness.tick(at(0)), Tick::NotYet);
        for s in 1..=5 {
            assert_eq!(liveness.tick(at(s)), Tick::Ask, "{s}");
        }
        liveness.heard();
        for s in 6..=10 {
            assert_eq!(liveness.tick(at(s)), Tick::Ask, "{s}");
        }
        assert_eq!(liveness.tick(at(11)), Tick::Silent);
    }

    #[test]
    fn whoever_was_stopped_itself_does_not_blame_the_other() {
        let mut liveness = Liveness::new(at(0));
        assert_eq!(liveness.tick(at(3600)), Tick::Ask);
        assert_eq!(liveness.tick(at(3600)), Tick::NotYet);
    }
}
