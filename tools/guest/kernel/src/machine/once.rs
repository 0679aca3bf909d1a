//! Statics that are handed out once, as exclusive references: this guest's substitute for an allocator.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A static that its first taker owns for ever.
pub struct Once<T> {
    value: UnsafeCell<T>,
    taken: AtomicBool,
}

// SAFETY: `take` gives out the value a single time, so it is never shared between two users.
unsafe impl<T: Send> Sync for Once<T> {}

impl<T> Once<T> {
    /// A value to be taken.
    pub const fn new(value: T) -> Self {
        Self { value: UnsafeCell::new(value), taken: AtomicBool::new(false) }
    }

    /// Hands the value out. Panics the second time.
    #[expect(clippy::mut_from_ref, reason = "the flag makes the reference exclusive")]
    pub fn take(&'static self) -> &'static mut T {
        assert!(!self.taken.swap(true, Ordering::Relaxed), "a static buffer was taken twice");
        // SAFETY: the flag was clear, so this is the only reference that there will ever be.
        unsafe { &mut *self.value.get() }
    }
}
