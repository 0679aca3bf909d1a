//! Links, disks and processes that fail around the commit: never two runners, and the records say who it is.

use std::time::Duration;

use ferry_protocol::message::{Hello, MessageType};
use ferry_protocol::negotiation::Features;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::source::{self, Outcome};
use ferry_protocol::{Epoch, MigrationId, VmId, target};

use crate::disk::DiskFault;
use crate::world::{Pair, config};

fn moved(pair: &Pair) -> bool {
    let moved = matches!(pair.source_outcome, Some(Outcome::Moved(_)));
    if moved {
        assert!(pair.target_guest.runs && !pair.source_guest.exists);
        assert_eq!(pair.source_disk.standing(), Some(("released", 2)));
        assert_eq!(pair.target_disk.standing(), Some(("running", 2)));
    }
    moved
}

/// The source took the guest back after having committed: in epoch 3, for 2 was given away.
fn reclaimed(pair: &Pair) -> bool {
    let reclaimed =
        matches!(&pair.source_outcome, Some(Outcome::Stayed { epoch, .. }) if epoch.number() == 3);
    if reclaimed {
        assert!(pair.source_guest.runs && !pair.target_guest.exists);
        assert_eq!(pair.source_disk.standing(), Some(("running", 3)));
        assert_eq!(pair.target_disk.standing(), Some(("discarded", 2)));
    }
    reclaimed
}

fn doubted(pair: &Pair) -> bool {
    pair.source_progress.iter().any(|p| matches!(p, source::Progress::InDoubt { .. }))
}

#[test]
fn a_link_that_breaks_at_any_message_around_the_commit_is_made_again() {
    for message in [MessageType::Commit, MessageType::Running] {
        let mut pair = Pair::new(config());
        pair.cut_at = Some(message);
        pair.run_to_end();
        assert!(moved(&pair), "cut at {message:?}: {:?}", pair.source_outcome);
        assert!(doubted(&pair), "the caller hears that it is in doubt");
    }
}

#[test]
fn a_released_that_is_lost_changes_nothing() {
    let mut pair = Pair::new(config());
    pair.cut_at = Some(MessageType::Released);
    pair.run_to_end();
    assert!(moved(&pair));
    assert!(!doubted(&pair));
}

#[test]
fn a_link_that_breaks_while_the_commit_is_recorded_leaves_the_guest_here_at_once() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("recording the commit");
    pair.cut_control(target::PREPARED_WAIT_MAX * 2);
    pair.run_to_end();
    // No `Commit` was sent, so there is nothing to be in doubt about; epoch 2 is skipped all the same.
    assert!(matches!(&pair.source_outcome, Some(Outcome::Stayed { epoch, .. }) if epoch.number() == 3));
    assert!(pair.source_guest.runs && !pair.target_guest.runs && !doubted(&pair));
    assert_eq!(pair.source_disk.standing(), Some(("running", 3)));
    assert!(!pair.delivered.iter().any(|(_, message)| *message == MessageType::Commit));
}

#[test]
fn a_link_that_breaks_while_the_target_records_or_starts_is_made_again() {
    for phase in ["recording that it runs", "starting", "running"] {
        let mut pair = Pair::new(config());
        pair.run_to_target_phase(phase);
        pair.cut_all(Duration::from_secs(5));
        pair.run_to_end();
        assert!(moved(&pair), "in {phase}: {:?}", pair.source_outcome);
    }
}

#[test]
fn a_commit_that_is_repeated_runs_the_guest_once() {
    let mut pair = Pair::new(config());
    pair.cut_at = Some(MessageType::Running);
    pair.run_to_end();
    let count = |wanted| pair.delivered.iter().filter(|(_, message)| *message == wanted).count();
    assert!(count(MessageType::Commit) >= 2, "{:?}", pair.delivered);
    assert!(moved(&pair));
    let ran = pair.target_progress.iter().filter(|p| **p == target::Progress::Running).count();
    assert_eq!(ran, 1);
}

#[test]
fn a_target_that_waited_too_long_discards_and_the_source_takes_the_guest_back() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("committed");
    pair.cut_control(target::PREPARED_WAIT_MAX * 2);
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
    assert!(doubted(&pair));
}

#[test]
fn a_target_that_is_told_to_give_up_while_prepared_gives_the_guest_back() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("recording the commit");
    pair.tell_target(target::Event::Cancel);
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
}

#[test]
fn a_target_that_is_restarted_before_it_recorded_gives_the_guest_back() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("committed");
    pair.restart_target();
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
}

#[test]
fn a_target_that_can_not_record_that_it_runs_gives_the_guest_back() {
    let mut pair = Pair::new(config());
    pair.target_disk.faults.extend([DiskFault::None, DiskFault::Lost]);
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
}

#[test]
fn a_target_whose_disk_fails_for_a_while_leaves_the_source_in_doubt_not_in_two() {
    let mut pair = Pair::new(config());
    // Receiving is recorded; running is not, nor is discarding at the first attempts.
    let lost = [DiskFault::Lost; 8];
    pair.target_disk.faults.push_back(DiskFault::None);
    pair.target_disk.faults.extend(lost);
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
    assert!(doubted(&pair));
}

#[test]
fn a_source_whose_guest_has_lived_on_is_told_so() {
    let mut pair = Pair::new(config());
    pair.cut_at = Some(MessageType::Running);
    pair.run_to_target_phase("running");
    // By the time the source can ask again, the guest has moved on to a third host.
    pair.target = None;
    let record = pair.target_disk.record.as_mut().unwrap();
    record.epoch = Epoch::new(3);
    record.standing = Standing::Released { target: "c:4444".to_owned() };
    pair.run_to_end();
    assert!(matches!(pair.source_outcome, Some(Outcome::Moved(_))), "{:?}", pair.source.phase());
    assert_eq!(pair.source_disk.standing(), Some(("released", 2)));
}

#[test]
fn a_source_is_not_answered_from_the_record_of_another_attempt() {
    for standing in [
        Standing::Receiving { source: "a:1".to_owned() },
        Standing::Discarded,
        Standing::Running,
        Standing::Stopped,
    ] {
        let mut pair = Pair::new(config());
        pair.run_to_target_phase("starting");
        let other = Some(MigrationId([8; 16]));
        let record = pair.target_disk.record.take().unwrap();
        // The answer comes from a host that knows only of another attempt at the same epoch.
        pair.target = None;
        pair.target_disk.record =
            Some(Record { standing: standing.clone(), migration: other, arrived_by: other, ..record });
        pair.cut_all(Duration::ZERO);
        let start = pair.now;
        pair.run_until(|pair| pair.now.since(start) > Duration::from_secs(60));
        assert_eq!(pair.source.phase(), "committed", "{standing:?}");
        assert!(!pair.source_guest.runs && pair.source_guest.exists);
        assert!(doubted(&pair));
    }
}

#[test]
fn a_host_keeps_by_which_migration_a_guest_came_while_it_gives_it_away() {
    let came = Some(MigrationId([9; 16]));
    let mut pair = Pair::new(source::Config { arrived_by: came, ..config() });
    let mut seen = std::collections::BTreeSet::new();
    pair.run_until(|pair| {
        let record = pair.source_disk.record.as_ref().unwrap();
        // The first is this world's own.
        if pair.source.phase() != "connecting" && record.arrived_by.is_some() {
            let given = record.standing != Standing::Running;
            assert_eq!(record.migration, given.then_some(config().migration));
            seen.insert(record.standing.word());
            assert_eq!(record.arrived_by, came);
        }
        false
    });
    assert!(moved(&pair));
    assert_eq!(Vec::from_iter(seen), ["committed", "released", "running"]);
    let record = pair.target_disk.record.unwrap();
    assert_eq!((record.migration, record.arrived_by), (None, Some(config().migration)));
}

#[test]
fn an_epoch_that_ran_here_is_not_taken_from_another_host() {
    for epoch in [1, 2] {
        let mut pair = Pair::new(config());
        let record = pair.source_disk.record.clone().unwrap();
        pair.target_disk.record = Some(Record { epoch: Epoch::new(epoch), ..record });
        pair.run_to_end();
        assert!(!moved(&pair), "running here in epoch {epoch}, at the source in 1");
        assert!(pair.source_guest.runs);
    }
}

#[test]
fn a_record_is_not_taken_over_under_another_name() {
    for (name, comes) in [("web", true), ("db", false)] {
        let mut pair = Pair::new(config());
        let record = Record {
            name: name.parse().unwrap(),
            standing: Standing::Released { target: "b:1".to_owned() },
            ..pair.source_disk.record.clone().unwrap()
        };
        pair.target_disk.record = Some(record.clone());
        pair.run_to_end();
        assert_eq!(moved(&pair), comes, "known here as '{name}'");
        if !comes {
            assert_eq!(pair.target_disk.record, Some(record));
            assert!(pair.source_guest.runs);
            let said = format!("{:?}", pair.target_outcomes);
            assert!(
                said.contains("knows this VM as 'db'") && said.contains("ferry receive --name"),
                "{said}"
            );
        }
    }
}

#[test]
fn a_prepared_target_does_not_discard_before_its_time() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("prepared");
    // As the engine may hand it in when a deadline and a message come together.
    pair.tell_target(target::Event::Timeout);
    pair.run_to_end();
    assert!(moved(&pair), "{:?}", pair.target_outcomes);
}

#[test]
fn a_source_that_can_not_record_its_release_has_released_all_the_same() {
    let mut pair = Pair::new(config());
    // The commit is recorded.
    pair.source_disk.faults.extend([DiskFault::None, DiskFault::Lost]);
    pair.run_to_end();
    assert!(matches!(pair.source_outcome, Some(Outcome::Moved(_))));
    assert!(pair.target_guest.runs && !pair.source_guest.exists);
    assert_eq!(pair.source_disk.standing(), Some(("committed", 2)));
}

fn fail_to_start(pair: &mut Pair) {
    pair.run_to_target_phase("starting");
    pair.target_guest.runs = false;
    pair.tell_target(target::Event::RunFailed("KVM said no".to_owned()));
}

#[test]
fn a_guest_that_can_not_be_started_goes_back() {
    let mut pair = Pair::new(config());
    fail_to_start(&mut pair);
    let said = pair.delivered.iter().any(|(_, message)| *message == MessageType::Discarded);
    assert!(!said, "not before it is durable");
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
}

#[test]
fn a_guest_of_which_some_may_have_run_never_goes_back() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("starting");
    pair.target_guest.runs = false;
    pair.tell_target(target::Event::RunBroke("a panic".to_owned()));
    pair.run_to_end();
    assert!(matches!(pair.source_outcome, Some(Outcome::Moved(_))));
    assert!(pair.target_guest.exists && !pair.source_guest.exists);
}

#[test]
fn a_target_that_drops_every_connection_is_asked_ever_more_rarely() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("starting");
    pair.cut_all(Duration::ZERO);
    pair.run_to_source_phase("committed");
    for _ in 0..10 {
        pair.tell_source(source::Event::Connected);
        pair.tell_source(source::Event::Disconnected("closed".to_owned()));
    }
    let last = pair.connect_delays.iter().copied().rev().take(3).collect::<Vec<_>>();
    assert_eq!(last, [Duration::from_secs(1); 3], "{:?}", pair.connect_delays);
}

#[test]
fn a_cancellation_while_the_commit_is_recorded_keeps_the_guest_here() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("recording the commit");
    pair.tell_source(source::Event::Cancel);
    pair.run_to_end();
    let sent = pair.delivered.iter().any(|(_, message)| *message == MessageType::Commit);
    assert!(!sent, "the target must never hear of it");
    assert!(
        matches!(&pair.source_outcome, Some(Outcome::Stayed { failure: source::Failure::Cancelled, epoch }) if epoch.number() == 3),
        "{:?}",
        pair.source_outcome
    );
    assert!(pair.source_guest.runs && !pair.target_guest.exists);
    assert_eq!(pair.source_disk.standing(), Some(("running", 3)));
}

#[test]
fn a_guest_that_can_not_be_started_goes_back_as_soon_as_that_can_be_recorded() {
    let mut pair = Pair::new(config());
    // Receiving and running are recorded, discarding is not at the first attempts.
    pair.target_disk.faults.extend([DiskFault::None, DiskFault::None]);
    pair.target_disk.faults.extend([DiskFault::Lost; 3]);
    fail_to_start(&mut pair);
    pair.run_to_end();
    assert!(reclaimed(&pair), "{:?} {:?}", pair.source_outcome, pair.target_disk.standing());
    let told = target::Progress::CannotRun { reason: "KVM said no".to_owned() };
    assert!(pair.target_progress.contains(&told));
}

#[test]
fn a_guest_that_can_not_be_started_is_not_given_back_to_a_source_that_was_lost() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("starting");
    pair.cut_all(Duration::from_secs(100_000));
    pair.tell_target(target::Event::RunFailed("KVM said no".to_owned()));
    let start = pair.now;
    pair.run_until(|pair| pair.now.since(start) > Duration::from_secs(30));
    let discards = |pair: &Pair| pair.target_disk.standing().is_some_and(|(word, _)| word == "discarded");
    assert!(pair.target_guest.exists && !discards(&pair), "it may be the only copy");
    assert!(pair.target_guest.runs, "starting it was tried again");
}

#[test]
fn a_lasting_partition_after_the_commit_stays_in_doubt_and_never_runs_two() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("starting");
    pair.cut_all(Duration::from_secs(100_000));
    let start = pair.now;
    pair.run_until(|pair| pair.now.since(start) > Duration::from_secs(1000));
    assert_eq!(pair.source.phase(), "committed");
    assert!(pair.target_guest.runs && !pair.source_guest.runs && pair.source_guest.exists);
    assert!(doubted(&pair));
    let doubts = pair.source_progress.iter().filter(|p| matches!(p, source::Progress::InDoubt { .. }));
    assert_eq!(doubts.count(), 1, "said once, not at every attempt");
}

#[test]
fn a_source_that_comes_anew_shows_that_it_has_given_up_the_attempt_before() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("prepared");
    let hello = |epoch| Hello {
        version_oldest: 1,
        version_newest: 1,
        features: Features::OURS,
        migration: MigrationId([8; 16]),
        vm: config().vm,
        name: config().name,
        epoch: Epoch::new(epoch),
        resumes: false,
    };
    let superseded = |pair: &Pair, hello: &Hello| pair.target.as_ref().unwrap().superseded_by(hello);
    // Epoch 2 is prepared. A source in epoch 3 failed to record its commit of 2; one in 0 is an old copy.
    assert_eq!([0, 1, 2, 3].map(|epoch| superseded(&pair, &hello(epoch))), [false, true, true, true]);
    assert!(!superseded(&pair, &Hello { resumes: true, ..hello(1) }));
    assert!(!superseded(&pair, &Hello { vm: VmId([9; 16]), ..hello(1) }), "another VM");
    assert!(!superseded(&pair, &Hello { migration: config().migration, ..hello(1) }), "this attempt");
    pair.run_to_target_phase("starting");
    assert!(!superseded(&pair, &hello(3)), "what is recorded as running is not given up");
}
