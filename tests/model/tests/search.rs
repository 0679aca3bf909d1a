//! The handover holds in every order of events, and every mistake that is built in is found.

use ferry_model::{Mistake, Settings, search};

fn settings(faults: u8, witness: bool, mistake: Option<Mistake>) -> Settings {
    Settings { attempts: 1, faults, witness, steps: None, mistake }
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
