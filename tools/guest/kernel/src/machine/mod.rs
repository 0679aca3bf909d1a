//! The machine as ring 3 sees it: ports, interrupt controllers, memory, the report page.

pub mod apic;
pub mod memory;
pub mod once;
pub mod port;
pub mod report;
pub mod runtime;
pub mod serial;
pub mod start_info;
pub mod trap;

/// The time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: rdtsc has no preconditions where CR4.TSD is clear, and boot.s leaves it clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}
