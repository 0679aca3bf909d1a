//! The command `ferry` as its users meet it: real processes, real guests, and above all what goes wrong.
//!
//! Whatever is refused must say what and why, and must cost nothing: the guest goes on where it was, and the next
//! attempt is as good as the first. What moves over a real network is in `tests/lab/`.

mod certificates;
mod confined;
mod console;
mod control;
mod cpus;
mod disks;
mod doubt;
#[cfg(not(feature = "fault-points"))]
mod fault_points;
mod hostile;
mod link;
mod local;
mod machines;
mod names;
#[path = "../../vmm/tests/support/power_button.rs"]
mod power_button;
mod requests;
mod shutdown;
mod starts;
mod targets;
#[path = "../../vmm/tests/support/elf.rs"]
mod tiny_kernel;
mod tls;
mod under_way;

/// The program under test.
const FERRY: &str = env!("CARGO_BIN_EXE_ferry");

/// Whether this tier can run, and the turn to do so.
fn turn() -> Option<std::sync::MutexGuard<'static, ()>> {
    ferry_tests::tier::has_kvm("command").then(ferry_tests::tier::one_at_a_time)
}
