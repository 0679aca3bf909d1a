//! What a guest feels of dirty tracking: its longest gap between two heartbeats when the log is switched on, read and
//! cleared for the first time, read again, and switched off.
//!
//! `cargo bench -p ferry-benches --bench tracking [-- RUNS [MIB]]` boots a guest that writes a word a page all over its
//! memory as fast as it can, on 4 KiB pages and on transparent huge pages, and prints medians with their spread. The gap
//! without any tracking is shown beside them: other work on the machine makes gaps, too. Nothing is asserted.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ferry_guest_abi::Report;
use ferry_tests::guest::{Guest, boot_logging_gaps, config, has_kvm};
use ferry_vmm::{Backing, HugePages, Machine};

/// Shorter gaps are not logged: writing to 16 protected pages, between two heartbeats, may take a third of that.
const GAP_LOG_US: u64 = 300;

/// Memory that the guest does not write: itself and its page tables.
const OVERHEAD_MIB: u64 = 64;

/// How long a step is watched for gaps, beyond the time it takes.
const WATCHED: Duration = Duration::from_millis(60);

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` does not, and wants no measurement.
    if !std::env::args().any(|argument| argument == "--bench") || !has_kvm() {
        return;
    }
    let mut numbers = std::env::args().filter_map(|argument| argument.parse().ok());
    let runs: u64 = numbers.next().unwrap_or(7);
    let mib: u64 = numbers.next().unwrap_or(4096);
    for huge_pages in [HugePages::Off, HugePages::Transparent] {
        let mut config = config(mib + OVERHEAD_MIB, 1, Backing::PrivateAnonymous);
        config.memory.huge_pages = huge_pages;
        let guest = boot_logging_gaps(&format!("dirty rate=max set={mib} verify=0"), &config, GAP_LOG_US);
        println!("{mib} MiB, {}: {runs} runs", guest.machine.machine().memory_kind());
        // The first pass has its own costs: the guest's memory is mapped for KVM page by page.
        while guest.healthy().passes < 1 {
            sleep(Duration::from_millis(100));
        }
        let mut steps: Vec<Step> = STEPS.iter().map(|name| Step { name, ..Step::default() }).collect();
        for _ in 0..runs {
            track(&guest, &mut steps);
        }
        steps.into_iter().for_each(Step::show);
    }
}

const STEPS: [&str; 6] = ["nothing", "switch on", "first read and clear", "second", "third", "switch off"];

#[derive(Default)]
struct Step {
    name: &'static str,
    took_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    pages: Vec<f64>,
}

fn track(guest: &Guest, steps: &mut [Step]) {
    let machine = guest.machine.machine();
    let mut words = vec![0; usize::try_from(machine.ram().page_count().div_ceil(64)).expect("it fits")];
    let mut collect = |machine: &Machine| {
        words.fill(0);
        machine.collect_dirty(&mut words).expect("the log can be read")
    };
    let mut steps = steps.iter_mut();
    let mut next = |work: &mut dyn FnMut() -> u64| steps.next().expect("a name each").watch(guest, work);
    next(&mut || 0);
    next(&mut || machine.start_dirty_log().map(|()| 0).expect("it can be switched on"));
    (0..3).for_each(|_| next(&mut || collect(machine)));
    next(&mut || machine.stop_dirty_log().map(|()| 0).expect("it can be switched off"));
}

impl Step {
    #[expect(clippy::disallowed_methods, reason = "a bench measures real time")]
    fn watch(&mut self, guest: &Guest, work: &mut dyn FnMut() -> u64) {
        sleep(WATCHED);
        let since = guest.healthy().heartbeat_tsc;
        let began = Instant::now();
        self.pages.push(work() as f64);
        self.took_ms.push(began.elapsed().as_secs_f64() * 1e3);
        sleep(WATCHED);
        self.gap_ms.push(longest_gap_ms(&guest.healthy(), since));
    }

    fn show(self) {
        let Self { name, took_ms, gap_ms, pages } = self;
        println!(
            "  {name:<21} took {} ms, guest's longest gap {} ms, {} pages",
            spread(took_ms),
            spread(gap_ms),
            spread(pages)
        );
    }
}

fn longest_gap_ms(report: &Report, since_tsc: u64) -> f64 {
    let ticks = report.largest_gap_since(since_tsc).map_or(0, |gap| gap.length_ticks);
    report.gap_ms(ticks).unwrap_or_default()
}

fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    format!("{:.3} ({least:.3} to {most:.3})", values[values.len() / 2])
}
