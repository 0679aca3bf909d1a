//! Forecasts that recover: one slow measurement must not stand in the way of stopping the guest for ever.

use std::time::Duration;

use ferry_protocol::source::{Failure, Outcome, Summary};

use crate::disk::DiskFault;
use crate::world::{MS, PAGES, Pair, config};

/// More rounds than this and a single slow measurement was not forgotten.
const ROUNDS_MAX: usize = 16;

/// A guest that dirties ten pages a round: nothing but the fixed costs can keep it from being stopped.
fn quiet_pair() -> Pair {
    let mut pair = Pair::new(config());
    pair.dirty_pages = vec![PAGES, 10];
    pair
}

fn moved(pair: &mut Pair) -> Summary {
    pair.run_to_end();
    match pair.source_outcome.take() {
        Some(Outcome::Moved(summary)) => *summary,
        other => panic!("{other:?}"),
    }
}

fn must_converge(pair: &mut Pair) {
    let summary = moved(pair);
    assert!(summary.rounds.len() <= ROUNDS_MAX, "{} rounds", summary.rounds.len());
    assert!(summary.forecast.total().upper() <= 50 * MS, "{:?}", summary.forecast);
}

#[test]
fn a_target_whose_first_record_was_slow_gets_the_guest_within_some_rounds() {
    let mut pair = quiet_pair();
    pair.target_disk.slow.extend([300 * MS]);
    must_converge(&mut pair);
}

#[test]
fn a_source_whose_first_record_was_slow_gives_the_guest_away_within_some_rounds() {
    let mut pair = quiet_pair();
    pair.source_disk.slow.extend([300 * MS]);
    must_converge(&mut pair);
}

#[test]
fn slow_answers_to_the_first_pings_are_forgotten() {
    let mut pair = quiet_pair();
    pair.slow_pongs.extend([30 * MS, 200 * MS, 100 * MS]);
    must_converge(&mut pair);
}

#[test]
fn everything_may_be_slow_at_first() {
    let mut pair = quiet_pair();
    pair.target_disk.slow.extend([300 * MS, 150 * MS]);
    pair.source_disk.slow.extend([200 * MS, 100 * MS]);
    pair.slow_pongs.extend([30 * MS]);
    must_converge(&mut pair);
}

#[test]
fn records_are_rehearsed_at_most_once_a_round() {
    let mut pair = quiet_pair();
    pair.target_disk.slow.extend([300 * MS]);
    let rounds = moved(&mut pair).rounds.len();
    assert!(pair.target_disk.rehearsals >= 2, "{}", pair.target_disk.rehearsals);
    assert!(pair.target_disk.rehearsals < rounds, "the last round has none");
    assert!(pair.source_disk.rehearsals <= rounds, "one before the first, none in the last");
}

#[test]
fn a_disk_that_stays_slow_costs_few_rounds_and_an_honest_word() {
    let mut pair = quiet_pair();
    pair.target_disk.slow = [300 * MS].repeat(10_000).into();
    pair.run_to_end();
    let Some(Outcome::Stayed { failure: Failure::Timeout(text), .. }) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome)
    };
    assert!(text.contains("did not fit"), "{text}");
    let seconds = pair.now.since(ferry_protocol::Timestamp::default()).as_secs();
    assert!(seconds >= 60);
    let rounds = pair.source_progress.iter().filter(|p| format!("{p:?}").starts_with("RoundDone")).count();
    assert!(rounds <= 620, "{rounds} rounds in {seconds} s are busy waiting");
    assert!(pair.target_disk.rehearsals <= 201, "they wait for each other: {}", pair.target_disk.rehearsals);
}

#[test]
fn the_guest_is_not_stopped_while_the_targets_disk_is_busy_with_a_rehearsal() {
    let mut pair = quiet_pair();
    // The record for receiving is quick; its rehearsal hangs far into the rounds that follow.
    pair.target_disk.slow.extend([MS, 500 * MS]);
    let summary = moved(&mut pair);
    assert!(summary.total > 500 * MS, "it would have been restored behind that write");
    assert!(summary.downtime.total() < 50 * MS, "{:?}", summary.downtime);
    assert!(summary.total < Duration::from_secs(2), "{:?}", summary.total);
}

#[test]
fn a_target_whose_disk_fails_at_a_rehearsal_leaves_the_guest_at_the_source() {
    let mut pair = quiet_pair();
    pair.target_disk.rehearsal_faults.push_back(DiskFault::Lost);
    pair.run_to_end();
    assert!(matches!(pair.source_outcome, Some(Outcome::Stayed { .. })), "{:?}", pair.source_outcome);
    assert!(pair.source_guest.runs && !pair.target_guest.exists);
    assert_eq!(pair.target_disk.standing(), Some(("discarded", 2)));
}

#[test]
fn a_bandwidth_cap_does_not_count_against_the_last_round_which_has_none() {
    let mut pair = Pair::new(config());
    // 1,000 pages take 10 ms over the link, and 200 ms under the cap.
    pair.slowed_by_cap = 20;
    pair.dirty_pages = vec![PAGES, 1_000];
    let summary = moved(&mut pair);
    assert_eq!(summary.rounds.len(), 2, "stopped as soon as the log was read");
    assert!(summary.forecast.copy.expected < 12 * MS, "{:?}", summary.forecast);
    assert!(summary.downtime.total() <= 50 * MS, "{:?}", summary.downtime);
}
