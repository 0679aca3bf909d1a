//! Migrations within one host, whose memory is handed over: a guest of 4 GiB, idle and dirtying.
//!
//! `cargo bench -p ferry-benches --bench local [-- RUNS]` prints the total, the downtime by part as the source saw it, the
//! standstill that the guest saw, and how much of its pace the guest has right afterwards, while its new machine's page
//! tables fill. Medians with their spread; nothing is asserted. Both machines are in one process here.

use std::time::{Duration, Instant};

use ferry_migrate::protocol::source::Summary;
use ferry_tests::guest::{Guest, boot, config, has_kvm, move_locally, runtime};
use ferry_vmm::Backing;
use tokio::runtime::Runtime;

const GUEST_MIB: u64 = 4096;

/// Guests that have all their memory in use.
const WORKLOADS: [(&str, &str); 2] = [
    ("idle", "fill mib=4000 random=100 verify=0"),
    ("dirtying 500 MiB/s over 256 MiB", "dirty rate=500 set=256 fill=3700 random=100 verify=0"),
];

/// How long the guest's pace is watched after a move.
const PACE: Duration = Duration::from_millis(100);

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` does not, and wants no measurement.
    if !std::env::args().any(|argument| argument == "--bench") || !has_kvm() {
        return;
    }
    let runs = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(7);
    let runtime = runtime();
    for (name, workload) in WORKLOADS {
        println!("{name}, {GUEST_MIB} MiB, {runs} moves");
        let mut guest = boot(workload, &config(GUEST_MIB, 1, Backing::SharedMemfd));
        let mut seen = Vec::new();
        // One more than is counted: the first finds nothing warm.
        for run in 0..=runs {
            let (moved, what) = measure(&runtime, guest);
            guest = moved;
            if run > 0 {
                seen.push(what);
            }
        }
        show_all(&seen);
    }
}

struct Seen {
    summary: Summary,
    gap_ms: f64,
    /// Pages that the guest wrote right after the move, per page that it wrote in the same time before.
    pace: f64,
}

fn measure(runtime: &Runtime, guest: Guest) -> (Guest, Seen) {
    let before = pages_per_s(&guest);
    let since = guest.healthy().heartbeat_tsc;
    let (guest, summary) = runtime.block_on(move_locally(guest, |_| {}));
    let after = pages_per_s(&guest);
    let report = guest.goes_on();
    let gap = report.largest_gap_since(since).map_or(0, |gap| gap.length_ticks);
    let gap_ms = report.gap_ms(gap).unwrap_or_default();
    // What faults left undone is made up for by a guest with a set rate, so that it may be above 1 as well.
    (guest, Seen { summary, gap_ms, pace: after / before })
}

#[expect(clippy::disallowed_methods, reason = "a bench measures real time")]
fn pages_per_s(guest: &Guest) -> f64 {
    let (began, first) = (Instant::now(), guest.healthy().pages_written);
    std::thread::sleep(PACE);
    (guest.healthy().pages_written - first) as f64 / began.elapsed().as_secs_f64()
}

fn show_all(seen: &[Seen]) {
    let show = |what: &str, of: &dyn Fn(&Seen) -> f64| {
        let mut values: Vec<f64> = seen.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (values[0], values[values.len() - 1]);
        println!("  {what:<34} {:>8.2} ({least:.2} to {most:.2})", values[values.len() / 2]);
    };
    let ms = |of: fn(&Summary) -> Duration| move |seen: &Seen| of(&seen.summary).as_secs_f64() * 1e3;
    show("total, ms", &ms(|summary| summary.total));
    show("downtime, as the source saw it, ms", &ms(|summary| summary.downtime.total()));
    show("  pause", &ms(|summary| summary.downtime.pause));
    show("  save", &ms(|summary| summary.downtime.copy));
    show("  prepare", &ms(|summary| summary.downtime.prepare));
    show("    of it: restore", &ms(|summary| summary.downtime.within_restore));
    show("  record", &ms(|summary| summary.downtime.record));
    show("  commit", &ms(|summary| summary.downtime.commit));
    show("    of it: record at the target", &ms(|summary| summary.downtime.within_target_record));
    show("    of it: starting", &ms(|summary| summary.downtime.within_run));
    show("standstill, as the guest saw it, ms", &|seen| seen.gap_ms);
    if seen.iter().all(|seen| seen.pace.is_finite()) {
        show("pace in the first 100 ms", &|seen| seen.pace);
    }
}
