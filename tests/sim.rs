//! Tier 3: the seeded simulation. A seed that fails is printed with the command that plays it again.
//!
//! `cargo xtask sim --seeds 5000` plays more, `cargo xtask sim --seed N` one of them with a trace.

use ferry_tests::sim::{Bug, Ending, Plan, Played};

/// With those of the bugs a minute of one core, which all cores share.
const SEEDS: u64 = 4000;
const BUG_SEEDS: u64 = 100;

/// Plays the seeds on all cores.
fn play(seeds: u64, plan: Plan) -> Played {
    let played = ferry_tests::sim::play(0..seeds, plan);
    if let Some(seed) = played.failed.first() {
        let bug = plan.bug.map_or_else(String::new, |bug| format!(" --bug {}", bug.word()));
        let whole = if plan.whole == Some(true) { " --whole" } else { "" };
        panic!(
            "{} of {seeds} seeds failed: {:?}. Play the first again with\n  cargo xtask sim --seed {seed}{bug}{whole}",
            played.failed.len(),
            played.failed
        );
    }
    played
}

#[test]
fn whatever_goes_wrong_exactly_one_host_runs_the_guest_on_the_right_bytes() {
    let played = play(SEEDS, Plan::default());
    let (endings, seeds) = (played.endings(), played.reports.len());
    let doubted = played.count(|report| report.doubted);
    let reconnected = played.count(|report| report.reconnections > 0);
    println!("{seeds} seeds, {doubted} in doubt for a while, {reconnected} reconnected: {endings:#?}");
    // A simulation in which nothing ever goes wrong, or nothing ever succeeds, checks nothing.
    let at_least = |ending: &str, count| {
        let seen = endings.get(ending).copied().unwrap_or_default();
        assert!(seen >= count, "{ending}: {seen}, expected at least {count}");
    };
    at_least("moved", seeds * 3 / 4);
    at_least("reclaimed", seeds / 100);
    at_least("stayed: cancelled", seeds / 100);
    at_least("stayed: link", seeds / 20);
    at_least("stayed: local", seeds / 50);
    at_least("stayed: timeout", 1);
    assert!(doubted * 50 >= seeds, "in doubt: {doubted}");
    assert!(reconnected * 20 >= seeds, "reconnected: {reconnected}");
    assert!(!endings.contains_key("stayed: digests differ"), "a false alarm");
}

/// Plays a bug that must be caught: `run` panics where the guest would run on wrong bytes.
fn caught(bug: Bug, whole: Option<bool>, ending: &str, harmful_min_percent: usize) {
    let played = play(BUG_SEEDS, Plan { bug: Some(bug), whole });
    let harmful: Vec<_> = played.reports.iter().filter(|report| report.harmful).collect();
    println!("{bug:?}: {} seeds, {} harmful, all caught", played.reports.len(), harmful.len());
    for report in &harmful {
        assert!(report.struck && report.caught, "{report:?}");
        // The attempt with the bug fails, and the next one, without it, has nothing left of it.
        assert_eq!(report.endings[0], Ending::Stayed(ending.to_owned()));
    }
    assert!(
        harmful.len() * 100 >= played.reports.len() * harmful_min_percent,
        "the bug did harm in {} of {} seeds only",
        harmful.len(),
        played.reports.len()
    );
}

#[test]
fn a_dropped_page_is_caught() {
    caught(Bug::DroppedPage, None, "digests differ", 50);
}

#[test]
fn a_misplaced_page_is_caught() {
    caught(Bug::MisplacedPage, None, "digests differ", 50);
}

#[test]
fn a_corrupt_page_is_caught() {
    caught(Bug::CorruptPage, None, "digests differ", 50);
}

#[test]
fn a_stale_page_is_caught() {
    caught(Bug::StalePage, None, "digests differ", 50);
}

#[test]
fn a_frame_of_a_broken_stream_that_lands_late_is_caught() {
    caught(Bug::LateFrame, None, "digests differ", 5);
}

#[test]
fn a_source_that_takes_what_was_lost_as_known_is_caught() {
    caught(Bug::KeptKnown, None, "digests differ", 5);
}

#[test]
fn a_target_that_claims_a_page_that_it_has_not_is_caught() {
    caught(Bug::OverclaimedPage, None, "digests differ", 20);
}

#[test]
fn a_lost_dirty_bit_is_caught_by_reading_all_of_memory() {
    caught(Bug::LostDirtyBit, Some(true), "log broken", 20);
}

#[test]
fn a_forgotten_device_log_is_caught_by_reading_all_of_memory() {
    caught(Bug::ForgottenDeviceLog, Some(true), "log broken", 20);
}

/// What the digest of pages as they were sent is blind to, on record. A page that the guest wrote after it was last read, and
/// that no log names, was never read again, so both digests speak of its old bytes and agree. Reading all of memory once
/// more (`--verify full`) shows it.
fn unseen(bug: Bug) {
    let played = play(BUG_SEEDS, Plan { bug: Some(bug), whole: Some(false) });
    let harmful = played.count(|report| report.harmful);
    let caught = played.count(|report| report.caught);
    println!("{bug:?}: {} seeds, {harmful} harmful, {caught} of them caught", played.reports.len());
    assert!(harmful * 5 >= played.reports.len(), "the bug did harm in {harmful} seeds only");
    assert!(
        caught * 2 < harmful,
        "the digest sees this now: {caught} of {harmful}; say so in docs/protocol.md"
    );
}

#[test]
fn a_dirty_bit_lost_at_the_source_is_unseen_by_the_digest_of_what_was_sent() {
    unseen(Bug::LostDirtyBit);
}

#[test]
fn a_forgotten_device_log_is_unseen_by_the_digest_of_what_was_sent() {
    unseen(Bug::ForgottenDeviceLog);
}
