//! Migrations within one host, whose memory is handed over: nothing but the way of memory differs, and who may run is
//! decided as ever.

use std::time::Duration;

use ferry_protocol::message::{AbortCode, MessageType, Prepare};
use ferry_protocol::source::{self, Failure, MemoryPath, OnTimeout, Outcome, Progress};
use ferry_protocol::{Epoch, MemoryDigest, Message, target};

use crate::disk::DiskFault;
use crate::world::{MS, Pair, config};

fn local() -> source::Config {
    source::Config { memory: MemoryPath::HandedOver, ..config() }
}

const BEFORE_THE_COMMIT: [&str; 5] =
    ["connecting", "greeting", "offering memory", "stop-and-copy", "preparing"];

fn stayed(pair: &Pair) -> &Failure {
    let Some(Outcome::Stayed { failure, epoch }) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert_eq!(epoch.number(), 1);
    assert!(pair.source_guest.runs, "the guest goes on at the source");
    assert_eq!(pair.source_disk.standing(), Some(("running", 1)));
    assert!(!pair.target_guest.exists && !pair.adopted, "the target has let go of the memory");
    assert!(pair.target.is_none(), "the target is ready for the next one");
    assert!(matches!(pair.target_disk.standing(), None | Some(("discarded", 2))));
    failure
}

fn moved(pair: &Pair) -> &source::Summary {
    let Some(Outcome::Moved(summary)) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert!(pair.target_guest.runs && !pair.source_guest.exists);
    assert_eq!(pair.source_disk.standing(), Some(("released", 2)));
    assert_eq!(pair.target_disk.standing(), Some(("running", 2)));
    summary
}

#[test]
fn memory_is_handed_over_without_streams_log_or_rounds() {
    let mut pair = Pair::new(local());
    pair.run_to_end();
    let summary = moved(&pair);
    assert_eq!(summary.memory, MemoryPath::HandedOver);
    assert!(summary.rounds.is_empty());
    assert_eq!((summary.digest, summary.target_digest), (MemoryDigest::ZERO, MemoryDigest::ZERO));
    let downtime = summary.downtime;
    assert_eq!(downtime.dirty_log, Duration::ZERO);
    for part in [downtime.pause, downtime.copy, downtime.prepare, downtime.record, downtime.commit] {
        assert!(!part.is_zero(), "{downtime:?}");
    }
    // 50 ms are allowed: what is asserted is that nothing in it grows with memory, in a world of fixed times.
    assert!(downtime.total() < 10 * MS, "{downtime:?}");
    assert!(!pair.dirty_pages.is_empty() && pair.dirty_pages.len() == 4, "no dirty log was read");
}

#[test]
fn the_messages_come_in_the_order_that_is_drawn_in_the_protocol() {
    let mut pair = Pair::new(local());
    pair.run_to_end();
    let chatter = [MessageType::Ping, MessageType::Pong];
    let order: Vec<_> =
        pair.delivered.iter().map(|(_, message)| *message).filter(|m| !chatter.contains(m)).collect();
    use MessageType::{
        Commit, HandOver, Hello, Prepare, Prepared, Ready, Released, Running, State, Stopping, Welcome,
    };
    let drawn =
        [Hello, Welcome, HandOver, Ready, Stopping, State, Prepare, Prepared, Commit, Running, Released];
    assert_eq!(order, drawn);
}

#[test]
fn whatever_fails_before_the_commit_leaves_the_guest_at_the_source() {
    for phase in BEFORE_THE_COMMIT {
        let mut cancelled = Pair::new(local());
        cancelled.run_to_source_phase(phase);
        cancelled.tell_source(source::Event::Cancel);
        cancelled.run_to_end();
        assert_eq!(stayed(&cancelled), &Failure::Cancelled, "in {phase}");

        let mut cut = Pair::new(local());
        cut.run_to_source_phase(phase);
        cut.cut_control(Duration::from_secs(3600));
        cut.run_to_end();
        assert!(matches!(stayed(&cut), Failure::Link(_)), "in {phase}");

        let mut broken = Pair::new(local());
        broken.run_to_source_phase(phase);
        broken.tell_source(source::Event::VmFailed("KVM said no".to_owned()));
        broken.run_to_end();
        assert!(stayed(&broken).to_string().contains("KVM said no"), "in {phase}");
    }
    for phase in ["building", "receiving"] {
        let mut given_up = Pair::new(local());
        given_up.run_to_target_phase(phase);
        given_up.tell_target(target::Event::Cancel);
        given_up.run_to_end();
        let failure = stayed(&given_up);
        assert!(
            matches!(failure, Failure::Refused(abort) if abort.code == AbortCode::Cancelled),
            "in {phase}"
        );
    }
}

#[test]
fn a_link_that_breaks_at_any_message_leaves_one_owner() {
    use MessageType::{
        Commit, HandOver, Hello, Prepare, Prepared, Ready, Released, Running, State, Stopping, Welcome,
    };
    for message in [Hello, Welcome, HandOver, Ready, Stopping, State, Prepare, Prepared] {
        let mut pair = Pair::new(local());
        pair.cut_at = Some(message);
        pair.run_to_end();
        assert!(matches!(stayed(&pair), Failure::Link(_)), "cut at {message:?}");
    }
    for message in [Commit, Running, Released] {
        let mut pair = Pair::new(local());
        pair.cut_at = Some(message);
        pair.run_to_end();
        assert_eq!(moved(&pair).memory, MemoryPath::HandedOver, "cut at {message:?}");
    }
}

#[test]
fn a_target_that_dies_after_the_commit_gives_the_guest_back_with_its_memory() {
    let mut pair = Pair::new(local());
    pair.cut_at = Some(MessageType::Commit);
    assert!(pair.run_until(|pair| pair.cut_at.is_none()));
    pair.restart_target();
    pair.run_to_end();
    assert!(matches!(&pair.source_outcome, Some(Outcome::Stayed { epoch, .. }) if epoch.number() == 3));
    assert!(pair.source_guest.runs && pair.source_guest.exists);
    assert_eq!(pair.target_disk.standing(), Some(("discarded", 2)));
}

#[test]
fn a_record_that_the_target_can_not_write_gives_the_guest_back() {
    let mut pair = Pair::new(local());
    pair.target_disk.faults = [DiskFault::None, DiskFault::Lost].into();
    pair.run_to_end();
    assert!(matches!(&pair.source_outcome, Some(Outcome::Stayed { epoch, .. }) if epoch.number() == 3));
    assert!(pair.source_guest.runs && !pair.adopted);
}

#[test]
fn a_target_that_can_not_carry_descriptors_is_told_so_before_anything_is_offered() {
    let mut pair = Pair::new(local());
    pair.target_carries_descriptors = false;
    pair.run_to_end();
    assert!(stayed(&pair).to_string().contains("by descriptor"), "{:?}", stayed(&pair));
    assert!(!pair.delivered.contains(&(true, MessageType::HandOver)));
}

#[test]
fn memory_that_is_handed_over_where_no_descriptor_can_come_is_refused() {
    let mut pair = Pair::new(config());
    pair.run_to_target_phase("building");
    let Message::HandOver(hand_over) = hand_over() else { unreachable!("it is one") };
    pair.tell_target(target::Event::Message(Message::HandOver(hand_over)));
    pair.run_to_end();
    let failure = stayed(&pair);
    assert!(matches!(failure, Failure::Refused(abort) if abort.code == AbortCode::Protocol), "{failure:?}");
}

fn hand_over() -> Message {
    let regions = crate::world::layout().regions().to_vec();
    Message::HandOver(ferry_protocol::message::HandOver { description: vec![1, 2, 3], regions })
}

#[test]
fn a_fence_or_a_digest_of_pages_that_never_come_is_refused() {
    let epoch = Epoch::FIRST.next();
    let digest_of_a_page = ferry_protocol::PageDigest::of(0, &[1; ferry_protocol::PAGE_BYTES]).alone();
    for (fence, digest) in [(1, MemoryDigest::ZERO), (0, digest_of_a_page)] {
        let mut pair = Pair::new(local());
        pair.run_to_target_phase("receiving");
        pair.tell_target(target::Event::Message(Message::Prepare(Prepare { epoch, fence, digest })));
        pair.run_to_end();
        let failure = stayed(&pair);
        assert!(
            matches!(failure, Failure::Refused(abort) if abort.code == AbortCode::Protocol),
            "{failure:?}"
        );
    }
}

#[test]
fn a_budget_that_can_not_be_met_ends_as_was_asked_for() {
    let tight = |on_timeout| {
        let timeout = Duration::from_millis(200);
        let mut pair = Pair::new(source::Config { downtime_budget: MS, timeout, on_timeout, ..local() });
        pair.run_to_end();
        pair
    };
    let pair = tight(OnTimeout::Cancel);
    let text = stayed(&pair).to_string();
    assert!(text.contains("downtime budget of 1 ms") && text.contains("the best forecast"), "{text}");
    let pair = tight(OnTimeout::Stop);
    moved(&pair);
    assert!(pair.source_progress.iter().any(|p| matches!(p, Progress::Stopping { forced: true, .. })));
}
