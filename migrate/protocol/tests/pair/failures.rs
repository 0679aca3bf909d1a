//! Migrations that fail before the commit: whatever it is, the guest goes on at the source, in its old epoch,
//! and the target ends as empty as it was.

use std::time::Duration;

use ferry_protocol::message::AbortCode;
use ferry_protocol::source::{self, Failure, OnTimeout, Outcome, Progress};
use ferry_protocol::target;

use crate::disk::DiskFault;
use crate::world::{MS, PAGES, Pair, config};

/// The source's phases before the commit, in order.
const BEFORE_THE_COMMIT: [&str; 7] =
    ["connecting", "greeting", "describing", "opening streams", "pre-copy", "stop-and-copy", "preparing"];

/// The contract of every failure before the commit. Gives the failure back.
fn stayed(pair: &Pair, epoch: u64) -> &Failure {
    let Some(Outcome::Stayed { failure, epoch: own }) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert_eq!(own.number(), epoch);
    assert!(pair.source_guest.runs, "the guest goes on at the source");
    assert!(!pair.source_guest.dirty_log, "its dirty log is off");
    assert_eq!(pair.source_disk.standing(), Some(("running", epoch)));
    assert!(!pair.target_guest.exists, "the target has nothing left");
    assert!(pair.target.is_none(), "the target is ready for the next one");
    for outcome in &pair.target_outcomes {
        assert!(matches!(outcome, target::Outcome::Discarded { .. }), "{outcome:?}");
    }
    assert!(
        matches!(pair.target_disk.standing(), None | Some(("discarded", _))),
        "{:?}",
        pair.target_disk.standing()
    );
    failure
}

#[test]
fn a_cancellation_in_any_phase_before_the_commit_leaves_the_guest_at_the_source() {
    for phase in BEFORE_THE_COMMIT {
        let mut pair = Pair::new(config());
        pair.run_to_source_phase(phase);
        pair.tell_source(source::Event::Cancel);
        pair.run_to_end();
        assert_eq!(stayed(&pair, 1), &Failure::Cancelled, "in {phase}");
    }
}

#[test]
fn a_cancellation_once_the_commit_is_sent_comes_too_late() {
    for phase in ["committed", "releasing"] {
        let mut pair = Pair::new(config());
        pair.run_to_source_phase(phase);
        pair.tell_source(source::Event::Cancel);
        pair.run_to_end();
        assert!(matches!(pair.source_outcome, Some(Outcome::Moved(_))), "in {phase}");
        assert!(pair.target_guest.runs);
    }
}

#[test]
fn a_link_that_stays_broken_in_any_phase_before_the_commit_leaves_the_guest_at_the_source() {
    for phase in BEFORE_THE_COMMIT {
        for all in [false, true] {
            let mut pair = Pair::new(config());
            pair.run_to_source_phase(phase);
            if all {
                pair.cut_all(Duration::from_secs(3600));
            } else {
                pair.cut_control(Duration::from_secs(3600));
            }
            pair.run_to_end();
            let failure = stayed(&pair, 1);
            assert!(matches!(failure, Failure::Link(_)), "in {phase}: {failure:?}");
        }
    }
}

#[test]
fn a_failing_vm_ends_the_attempt() {
    for phase in ["pre-copy", "stop-and-copy", "preparing"] {
        let mut pair = Pair::new(config());
        pair.run_to_source_phase(phase);
        pair.tell_source(source::Event::VmFailed("KVM said no".to_owned()));
        pair.run_to_end();
        let failure = stayed(&pair, 1);
        assert!(failure.to_string().contains("KVM said no"), "in {phase}: {failure}");
    }
}

/// The refusal's code at the source.
fn refused(pair: &Pair) -> AbortCode {
    let failure = stayed(pair, 1);
    let Failure::Refused(abort) = failure else {
        panic!("{failure:?}");
    };
    abort.code
}

#[test]
fn a_target_that_refuses_is_quoted() {
    let mut pair = Pair::new(config());
    pair.target_name = Some("another".to_owned());
    pair.run_to_end();
    assert_eq!(refused(&pair), AbortCode::CannotBuild);
    let failure = stayed(&pair, 1).to_string();
    assert!(failure.contains("this target waits for VM 'another', not for 'web'"), "{failure}");
}

#[test]
fn a_target_without_memory_is_quoted() {
    let mut pair = Pair::new(config());
    pair.build_refusal = Some((AbortCode::NoMemory, "it has 1 GiB, the guest needs 2"));
    pair.run_to_end();
    assert_eq!(refused(&pair), AbortCode::NoMemory);
}

#[test]
fn a_target_that_gives_up_ends_the_attempt() {
    for phase in ["building", "receiving", "prepared"] {
        let mut pair = Pair::new(config());
        pair.run_to_target_phase(phase);
        pair.tell_target(target::Event::Cancel);
        pair.run_to_end();
        if phase == "prepared" {
            // The source may have committed by the time it hears of it; then the target's word gives it back.
            assert!(pair.source_guest.runs && !pair.target_guest.exists);
            assert!(matches!(pair.source_outcome, Some(Outcome::Stayed { .. })));
        } else {
            assert_eq!(refused(&pair), AbortCode::Cancelled, "in {phase}");
        }
    }
}

#[test]
fn a_state_that_can_not_be_restored_ends_the_attempt() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("stop-and-copy");
    pair.tell_target(target::Event::RestoreFailed("unknown device".to_owned()));
    pair.run_to_end();
    assert_eq!(refused(&pair), AbortCode::CannotRestore);
}

#[test]
fn different_memories_are_found_before_the_guest_moves() {
    let mut pair = Pair::new(config());
    pair.memory_differs = true;
    pair.run_to_end();
    assert_eq!(refused(&pair), AbortCode::DigestDiffers);
    let failure = stayed(&pair, 1).to_string();
    assert!(failure.contains("the two memories differ"), "{failure}");
}

#[test]
fn a_guest_that_dirties_too_fast_is_left_alone_when_the_time_is_over() {
    let mut config = config();
    config.timeout = Duration::from_secs(3);
    let mut pair = Pair::new(config);
    pair.dirty_pages = vec![PAGES];
    pair.run_to_end();
    let failure = stayed(&pair, 1);
    assert!(matches!(failure, Failure::Timeout(_)), "{failure:?}");
    for part in ["3 s", "downtime budget of 50 ms", "--on-timeout stop"] {
        assert!(failure.to_string().contains(part), "{failure}");
    }
    assert!(!pair.source_progress.iter().any(|p| matches!(p, Progress::Paused)));
}

#[test]
fn a_guest_that_dirties_too_fast_is_stopped_if_the_caller_wants_that() {
    let mut config = config();
    config.timeout = Duration::from_secs(3);
    config.on_timeout = OnTimeout::Stop;
    let mut pair = Pair::new(config);
    pair.dirty_pages = vec![PAGES];
    pair.run_to_end();
    let Some(Outcome::Moved(summary)) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert!(summary.total >= Duration::from_secs(3) && summary.total < Duration::from_secs(4));
    let forced = pair
        .source_progress
        .iter()
        .any(|p| matches!(p, Progress::Stopping { forced: true, pages: PAGES, .. }));
    assert!(forced, "the caller is told that the budget was given up");
    assert!(summary.downtime.total() > 40 * MS);
}

#[test]
fn a_commit_that_can_not_be_recorded_leaves_the_guest_at_the_source_in_a_fresh_epoch() {
    for fault in [DiskFault::Lost, DiskFault::Landed] {
        let mut pair = Pair::new(config());
        // The rehearsal works.
        pair.source_disk.faults.push_back(fault);
        pair.run_to_end();
        // Epoch 2 was almost given away, so it is skipped.
        assert!(matches!(stayed(&pair, 3), Failure::Local(_)), "{fault:?}");
    }
}

#[test]
fn a_source_that_can_not_write_records_finds_out_before_the_guest_is_stopped() {
    let mut pair = Pair::new(config());
    pair.source_disk.rehearsal_faults.push_back(DiskFault::Lost);
    pair.run_to_end();
    // No commit was tried, so no epoch is skipped.
    assert!(matches!(pair.source_outcome, Some(Outcome::Stayed { failure: Failure::Local(_), .. })));
    assert!(pair.source_guest.runs && !pair.source_progress.contains(&Progress::Paused));
}

#[test]
fn a_target_that_can_not_record_that_it_receives_refuses() {
    let mut pair = Pair::new(config());
    pair.target_disk.faults.push_back(DiskFault::Lost);
    pair.run_to_end();
    assert_eq!(refused(&pair), AbortCode::Internal);
}

#[test]
fn a_silent_target_is_given_up() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("describing");
    // It hangs: the machine is never built.
    pair.target = None;
    pair.run_to_end();
    let failure = stayed(&pair, 1);
    assert!(failure.to_string().contains("the target has said nothing for 5 s"), "{failure:?}");
    assert!(pair.now.since(ferry_protocol::Timestamp::default()) < Duration::from_secs(8));
}

#[test]
fn a_guest_that_stands_still_too_long_goes_on() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("preparing");
    pair.target = None;
    pair.target_guest = crate::world::Guest::default();
    pair.target_disk.record = None;
    pair.run_to_end();
    let failure = stayed(&pair, 1);
    assert!(failure.to_string().contains("far beyond its budget"), "{failure}");
    assert!(pair.now.since(ferry_protocol::Timestamp::default()) < Duration::from_secs(5));
}

#[test]
fn an_attempt_ends_only_when_the_guest_runs_again() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("preparing");
    pair.tell_source(source::Event::Cancel);
    // The late end of something else on the VM says nothing of resuming.
    pair.tell_source(source::Event::VmFailed("KVM said no".to_owned()));
    assert_eq!(pair.source_outcome, None);
    pair.run_to_end();
    assert_eq!(stayed(&pair, 1), &Failure::Cancelled);
}

#[test]
fn a_guest_that_can_not_be_resumed_is_reported() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("preparing");
    pair.tell_source(source::Event::Cancel);
    pair.tell_source(source::Event::ResumeFailed("KVM said no".to_owned()));
    let Some(Outcome::Stayed { failure, .. }) = &pair.source_outcome else { panic!("it ends") };
    assert!(failure.to_string().contains("KVM said no"), "{failure}");
}

/// The operator has asked for more than the digest of what was sent: without it nothing moves.
#[test]
fn a_check_of_all_memory_that_was_not_made_is_no_check() {
    let mut pair = Pair::new(source::Config { verify_whole: true, ..config() });
    pair.run_to_end();
    let Failure::Local(reason) = stayed(&pair, 1) else { panic!("{:?}", pair.source_outcome) };
    assert!(reason.contains("--verify full"), "{reason}");
}

#[test]
fn a_source_that_hangs_does_not_keep_a_prepared_guests_memory_for_ever() {
    let mut pair = Pair::new(config());
    assert!(pair.run_until(|pair| pair.target.as_ref().is_some_and(|target| target.phase() == "prepared")));
    // The connection stands; neither side hears anything.
    let mut target = pair.target.clone().unwrap();
    let due = target.poll_timeout().expect("it does not wait for ever");
    target.handle(due, target::Event::Timeout);
    assert_eq!(target.phase(), "discarding");
    assert!(due.since(pair.now) > source::STANDSTILL_FORCED_MAX, "no source stands still for longer");
}
