//! The time-stamp counter.
//!
//! Left out: what its rate is. Whoever compares it with a clock measures that.

// UNSAFETY: reading the counter is an intrinsic, which no crate of this workspace wraps.
#![expect(unsafe_code, reason = "see above")]

/// Reads the counter once every load before it is done, so that it can't be older than what those have seen.
#[must_use]
pub(crate) fn read() -> u64 {
    // SAFETY: LFENCE is part of SSE2, which every x86-64 processor has.
    unsafe { std::arch::x86_64::_mm_lfence() };
    // SAFETY: RDTSC is part of x86-64; Linux lets user space use it unless a task asks otherwise, which this does not.
    unsafe { std::arch::x86_64::_rdtsc() }
}
