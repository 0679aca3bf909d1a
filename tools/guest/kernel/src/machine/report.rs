//! Stores into the report page. Its layout is `ferry_guest_abi::report`'s.

use super::tsc;
use ferry_guest_abi::REPORT_GPA;
use ferry_guest_abi::report::{MAGIC, Stage, VERSION, offset};

fn field<T>(at: usize) -> *mut T {
    debug_assert!(at + size_of::<T>() <= ferry_guest_abi::PAGE_SIZE && at.is_multiple_of(align_of::<T>()));
    (REPORT_GPA as usize + at) as *mut T
}

/// Marks the page as a report. The magic comes last, so that a host never sees a half-made one.
pub fn begin() {
    set_u32(offset::VERSION, VERSION);
    set_u32(offset::STAGE, Stage::Booting as u32);
    set(offset::BOOT_TSC, tsc());
    set(offset::MAGIC, MAGIC);
}

/// Stores a counter.
#[inline]
pub fn set(at: usize, value: u64) {
    // SAFETY: the linker script puts the report page at REPORT_GPA, mapped and writable, and no Rust
    // object lives in it. Volatile, because the reader is the host.
    unsafe { field::<u64>(at).write_volatile(value) }
}

/// Stores a 32-bit field.
pub fn set_u32(at: usize, value: u32) {
    // SAFETY: as in `set`.
    unsafe { field::<u32>(at).write_volatile(value) }
}

/// Stores one byte of the text.
pub fn set_byte(at: usize, value: u8) {
    // SAFETY: as in `set`.
    unsafe { field::<u8>(at).write_volatile(value) }
}

/// Reads a field back: ring 0 leaves the details of an exception there.
pub fn get(at: usize) -> u64 {
    // SAFETY: as in `set`.
    unsafe { field::<u64>(at).read_volatile() }
}

/// Adds to a counter.
#[inline]
pub fn add(at: usize, count: u64) {
    set(at, get(at).wrapping_add(count));
}
