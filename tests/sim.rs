//! Tier 3: the seeded simulation. A seed that fails is printed with the command that plays it again.
//!
//! `FERRY_SIM_SEEDS=N` sets how many seeds each test plays, `FERRY_SIM_SEED=N` plays that one only, with a trace.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ferry_tests::sim::{Bug, Ending, Report, run};

const SEEDS: u64 = 500;
const BUG_SEEDS: u64 = 100;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Plays the seeds on all cores.
fn play(test: &str, seeds: u64, bug: Option<Bug>) -> Vec<Report> {
    if let Some(seed) = number("FERRY_SIM_SEED") {
        return vec![run(seed, bug, true)];
    }
    let seeds = number("FERRY_SIM_SEEDS").unwrap_or(seeds);
    let (next, reports, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed, bug, false))) {
                        Ok(report) => reports.lock().unwrap().push(report),
                        Err(_) => failed.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort_unstable();
    if let Some(seed) = failed.first() {
        panic!(
            "{} of {seeds} seeds failed: {failed:?}. Play the first again with\n  \
             FERRY_SIM_SEED={seed} cargo test -p ferry-tests --test sim {test} -- --exact --nocapture",
            failed.len()
        );
    }
    reports.into_inner().unwrap()
}

#[test]
fn whatever_goes_wrong_exactly_one_host_runs_the_guest_on_the_right_bytes() {
    let test = "whatever_goes_wrong_exactly_one_host_runs_the_guest_on_the_right_bytes";
    let reports = play(test, SEEDS, None);
    let mut endings = BTreeMap::<String, usize>::new();
    for ending in reports.iter().flat_map(|report| &report.endings) {
        *endings.entry(ending.to_string()).or_default() += 1;
    }
    let doubted = reports.iter().filter(|report| report.doubted).count();
    println!("{} seeds, {doubted} in doubt for a while: {endings:#?}", reports.len());
    // A simulation in which nothing ever goes wrong, or nothing ever succeeds, checks nothing.
    if reports.len() >= 500 {
        let at_least = |ending: &str, count| {
            let seen = endings.get(ending).copied().unwrap_or_default();
            assert!(seen >= count, "{ending}: {seen}, expected at least {count}");
        };
        at_least("moved", reports.len() * 3 / 4);
        at_least("reclaimed", reports.len() / 100);
        at_least("stayed: cancelled", reports.len() / 100);
        at_least("stayed: link", reports.len() / 10);
        at_least("stayed: local", reports.len() / 50);
        at_least("stayed: timeout", 1);
        assert!(doubted * 50 >= reports.len(), "in doubt: {doubted}");
        assert!(!endings.contains_key("stayed: digests differ"), "a false alarm");
    }
}

/// Plays a bug that the digests must catch: `run` panics where the guest would run on wrong bytes.
fn caught(test: &str, bug: Bug) {
    let reports = play(test, BUG_SEEDS, Some(bug));
    let harmful: Vec<_> = reports.iter().filter(|report| report.harmful).collect();
    println!("{bug:?}: {} seeds, {} harmful, all caught", reports.len(), harmful.len());
    for report in &harmful {
        assert!(report.struck && report.caught, "{report:?}");
        // The attempt with the bug fails, and the next one, without it, has nothing left of it.
        assert_eq!(report.endings[0], Ending::Stayed("digests differ".to_owned()));
    }
    let enough = reports.len() < 100 || harmful.len() * 2 >= reports.len();
    assert!(enough, "the bug did harm in {} of {} seeds only", harmful.len(), reports.len());
}

#[test]
fn a_dropped_page_is_caught() {
    caught("a_dropped_page_is_caught", Bug::DroppedPage);
}

#[test]
fn a_misplaced_page_is_caught() {
    caught("a_misplaced_page_is_caught", Bug::MisplacedPage);
}

#[test]
fn a_corrupt_page_is_caught() {
    caught("a_corrupt_page_is_caught", Bug::CorruptPage);
}

#[test]
fn a_stale_page_is_caught() {
    caught("a_stale_page_is_caught", Bug::StalePage);
}

/// What the digest is blind to, on record: it compares the pages as the source last read them with the pages as the
/// target has them. A page that the guest wrote afterwards, and that no log names, was never read again, so both
/// digests speak of its old bytes and agree. Only comparing the bytes, as this simulation does, shows it. The dirty
/// logs are therefore tested on their own, with the workload guest that checks its own writes.
fn unseen(test: &str, bug: Bug) {
    let reports = play(test, BUG_SEEDS, Some(bug));
    let harmful = reports.iter().filter(|report| report.harmful).count();
    let caught = reports.iter().filter(|report| report.caught).count();
    println!("{bug:?}: {} seeds, {harmful} harmful, {caught} of them caught", reports.len());
    if reports.len() >= 100 {
        assert!(
            harmful * 5 >= reports.len(),
            "the bug did harm in {harmful} of {} seeds only",
            reports.len()
        );
        assert!(
            caught * 2 < harmful,
            "the digest sees this now: {caught} of {harmful}; say so in docs/protocol.md"
        );
    }
}

#[test]
fn a_dirty_bit_lost_at_the_source_is_unseen_by_the_digest() {
    unseen("a_dirty_bit_lost_at_the_source_is_unseen_by_the_digest", Bug::LostDirtyBit);
}

#[test]
fn a_forgotten_device_log_is_unseen_by_the_digest() {
    unseen("a_forgotten_device_log_is_unseen_by_the_digest", Bug::ForgottenDeviceLog);
}
