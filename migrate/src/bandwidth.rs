//! The bandwidth cap: one token bucket that all data streams of a migration draw from.
//!
//! Counted are the bytes that ferry writes; TCP and IP headers (about 3 % at an MTU of 1500) come on top.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ferry_protocol::Timestamp;

use crate::ports::Clock;

/// How far ahead a stream may send: a burst of this length at the capped rate.
const BURST: Duration = Duration::from_millis(5);

/// Delays streams so that together they stay under a rate.
pub(crate) struct Bandwidth {
    clock: Arc<dyn Clock>,
    bytes_per_s: Option<u64>,
    /// When everything that was let through would have been sent at exactly the rate.
    paid_until: Mutex<Timestamp>,
    stopped: AtomicBool,
}

/// The longest a stream sleeps before it looks again whether it is still wanted.
const SLEEP_MAX: Duration = Duration::from_millis(50);

impl Bandwidth {
    pub(crate) fn new(bytes_per_s: Option<u64>, clock: Arc<dyn Clock>) -> Self {
        let now = clock.now();
        Self { clock, bytes_per_s, paid_until: Mutex::new(now), stopped: AtomicBool::new(false) }
    }

    /// Waits until `bytes` more may be sent.
    pub(crate) fn wait_for(&self, bytes: u64) {
        let Some(bytes_per_s) = self.bytes_per_s else { return };
        let may_send_at = {
            let mut paid_until = self.paid_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let now = self.clock.now();
            let cost = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / bytes_per_s.max(1));
            *paid_until = now.max(*paid_until) + cost;
            *paid_until
        };
        while !self.stopped.load(Ordering::Relaxed) {
            let wait = may_send_at.since(self.clock.now() + BURST);
            if wait.is_zero() {
                return;
            }
            thread::sleep(wait.min(SLEEP_MAX));
        }
    }

    /// Lets everybody through: the migration is over.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed;
    impl Clock for Fixed {
        fn now(&self) -> Timestamp {
            Timestamp::from_origin(Duration::ZERO)
        }
    }

    #[test]
    fn what_is_sent_is_paid_for_at_the_rate() {
        let bandwidth = Bandwidth::new(Some(100_000_000), Arc::new(Fixed));
        // This clock stands still, so nobody would ever be let through.
        bandwidth.stop();
        (0..10).for_each(|_| bandwidth.wait_for(1_000));
        let paid = bandwidth.paid_until.lock().unwrap().since(Timestamp::default());
        assert_eq!(paid, Duration::from_micros(100));
    }
}
