//! What a host process asks of the C library's allocator, where that is glibc's.

// UNSAFETY: mallopt and malloc_trim are calls of C.
#![expect(unsafe_code, reason = "mallopt and malloc_trim are foreign functions")]

use std::hint::black_box;
use std::thread::{self, available_parallelism};

/// As many for each processor as glibc allows by default, which it would otherwise find out from a file when many threads allocate.
const ARENAS_PER_PROCESSOR: usize = 8;

/// What makes a thread's arena grow and shrink: more than glibc keeps for later, in pieces that it does not map one by one.
const PIECES: usize = 64;
const PIECE_BYTES: usize = 64 << 10;

/// Has it read the files that it asks once in a process, before threads that may not open any need memory. Where another
/// version asks for more, a thread is refused once, and goes on.
pub(crate) fn settle() {
    let arenas = available_parallelism().map_or(1, usize::from).saturating_mul(ARENAS_PER_PROCESSOR);
    let arenas = libc::c_int::try_from(arenas).unwrap_or(libc::c_int::MAX);
    // SAFETY: it takes two numbers, and may be called at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    // Whether the host overcommits memory is asked when the arena of a thread shrinks for the first time.
    let shrinking = thread::spawn(|| drop(black_box([(); PIECES].map(|()| vec![1_u8; PIECE_BYTES]))));
    // It does nothing that could fail.
    let _ = shrinking.join();
}

/// Gives memory that was freed back to the host, of which the allocator otherwise keeps some tens of MiB for later: a migration's
/// buffers are large, and the next one may be days away. It may take milliseconds.
pub fn give_back() {
    // SAFETY: it takes a number, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}
