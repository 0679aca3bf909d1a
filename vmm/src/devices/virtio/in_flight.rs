//! Requests that a device works on without holding its registers: a reset waits for them, so that nothing is written to
//! guest memory once the driver has seen it done (virtio 1.2, section 2.4.1).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How many requests are under way.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    count: Mutex<usize>,
    none: Condvar,
}

/// A request under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Ticket<'a>(&'a InFlight);

impl InFlight {
    /// Counts a request. Called with the registers locked, so that none begins once a reset has stopped the device.
    pub(crate) fn begin(&self) -> Ticket<'_> {
        *self.lock() += 1;
        Ticket(self)
    }

    /// Returns when none is under way. Must be called without the registers locked, which each request needs to end.
    pub(crate) fn wait_until_none(&self) {
        let count = self.lock();
        drop(self.none.wait_while(count, |count| *count > 0).unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}
