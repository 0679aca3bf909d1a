//! The command `ferry` over a real network: two hosts, a client and a switch in namespaces of their own.
//!
//! What counts here is what the rest of the network sees: connections that hold, announcements that arrive, a switch
//! that learns, and never a frame of the guest from two hosts. Times are printed, and bounded only loosely: they
//! belong to the benches.

mod cable;
mod demo;
mod moves;
mod taps;

/// The program under test.
const FERRY: &str = env!("CARGO_BIN_EXE_ferry");

/// Whether this tier can run, and the turn to do so.
fn turn() -> Option<std::sync::MutexGuard<'static, ()>> {
    let possible = ferry_tests::tier::has_kvm("lab") && ferry_tests::tier::is_root("lab");
    possible.then(ferry_tests::tier::one_at_a_time)
}
