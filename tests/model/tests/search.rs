//! The handover holds in every order of events, and every mistake that is built in is found.

use ferry_model::{Mistake, Settings, search};

fn settings(faults: u8, witness: bool, mistake: Option<Mistake>) -> Settings {
    Settings { attempts: 1, faults, witness, mistake, ..Settings::default() }
}

/// With a data stream, over which the guest writes its memory once more, and links that are made again.
fn with_streams(faults: u8, writes: u8, mistake: Option<Mistake>) -> Settings {
    Settings { streams: true, writes, ..settings(faults, false, mistake) }
}

fn holds(settings: Settings) {
    let summary = search(settings, 1);
    println!("{summary}");
    let first = summary.breaches.first().map(|breach| (breach.property, breach.steps.clone()));
    assert_eq!(first, None);
    assert!(summary.complete && summary.states > 10_000, "{summary}");
}

/// In worlds in which everything holds without the mistake.
fn is_found(mistake: Mistake, faults: u8, witness: bool) {
    let summary = search(settings(faults, witness, Some(mistake)), 1);
    println!("{mistake:?}: {summary}");
    assert!(!summary.breaches.is_empty(), "{mistake:?} was not found: {summary}");
}

/// The same with a data stream, by this property.
fn is_found_by(property: &str, mistake: Mistake, writes: u8) {
    let summary = search(with_streams(1, writes, Some(mistake)), 1);
    println!("{mistake:?}: {summary}");
    let broken: Vec<&str> = summary.breaches.iter().map(|breach| breach.property).collect();
    assert!(broken.contains(&property), "{mistake:?} was not found: {summary}, {broken:?}");
}

const UP_TO_DATE: &str = "runs on what the guest last wrote";

const NO_FAULT_FOUND: &str = "neither side finds fault with the other";

#[test]
fn a_link_that_breaks_at_any_moment_before_the_commit_leaves_one_owner_with_all_that_was_written() {
    holds(with_streams(0, 1, None));
    holds(with_streams(1, 0, None));
}

#[test]
fn data_streams_of_before_the_break_that_are_let_in_are_found() {
    is_found_by(NO_FAULT_FOUND, Mistake::LetOldStreamsIn, 0);
}

#[test]
fn pages_of_the_round_under_way_that_are_not_sent_again_are_found() {
    is_found_by(NO_FAULT_FOUND, Mistake::ForgetTheRound, 0);
}

#[test]
fn lost_pages_that_are_taken_for_known_are_found() {
    is_found_by(NO_FAULT_FOUND, Mistake::TakeLostForKnown, 0);
}

#[test]
fn a_log_that_is_lost_with_the_link_is_found() {
    is_found_by(UP_TO_DATE, Mistake::ForgetTheLog, 1);
}

#[test]
fn a_state_that_is_not_replaced_by_a_later_one_is_found() {
    is_found_by(UP_TO_DATE, Mistake::KeepTheFirstState, 0);
}

#[test]
fn two_faults_of_any_kind_leave_one_owner_who_runs() {
    holds(settings(2, false, None));
}

#[test]
fn a_witness_that_any_of_the_two_may_lose_decides_once() {
    holds(settings(1, true, None));
}

#[test]
fn a_commit_that_is_sent_before_it_is_durable_is_found() {
    is_found(Mistake::CommitBeforeFsync, 2, false);
}

#[test]
fn a_target_that_resumes_before_its_record_is_found() {
    is_found(Mistake::RunBeforeRecord, 2, false);
}

#[test]
fn a_source_that_resumes_on_a_timeout_is_found() {
    is_found(Mistake::ResumeOnTimeout, 2, false);
}

#[test]
fn a_discarding_that_is_said_before_it_is_durable_is_found() {
    is_found(Mistake::DiscardedBeforeFsync, 2, false);
}

#[test]
fn a_vm_that_is_started_against_its_record_is_found() {
    is_found(Mistake::StartAgainstTheRecord, 2, false);
}

#[test]
fn a_target_that_takes_silence_of_its_witness_for_leave_is_found() {
    is_found(Mistake::RunWithoutWitness, 1, true);
}

#[test]
fn a_source_that_takes_silence_of_its_witness_for_leave_is_found() {
    is_found(Mistake::TakeBackWithoutWitness, 1, true);
}
