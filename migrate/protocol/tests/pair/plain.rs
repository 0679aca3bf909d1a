//! Migrations in which nothing fails.

use ferry_protocol::message::MessageType;
use ferry_protocol::source::{self, Progress};
use ferry_protocol::{MemoryDigest, Message, target};

use crate::world::{MS, PAGES, Pair, config};

/// The summary of a migration that must have succeeded.
fn moved(pair: &Pair) -> &source::Summary {
    match &pair.source_outcome {
        Some(source::Outcome::Moved(summary)) => summary,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_migration_ends_with_the_guest_at_the_target_in_the_next_epoch() {
    let mut pair = Pair::new(config());
    pair.run_to_end();
    let summary = moved(&pair);
    assert_eq!(summary.epoch.number(), 2);
    assert_eq!(summary.digest, summary.target_digest);
    assert_eq!(summary.host, "b");
    assert!(matches!(
        pair.target_outcomes.as_slice(),
        [target::Outcome::Running { epoch, .. }] if epoch.number() == 2
    ));
    assert!(pair.target_guest.runs && !pair.source_guest.exists);
    assert_eq!(pair.source_disk.standing(), Some(("released", 2)));
    assert_eq!(pair.target_disk.standing(), Some(("running", 2)));
    assert!(pair.target.is_none(), "the target is done as well");
}

#[test]
fn the_summary_counts_every_round_and_every_part_of_the_downtime() {
    let mut pair = Pair::new(config());
    pair.run_to_end();
    let summary = moved(&pair);
    let dirty: Vec<u64> = summary.rounds.iter().map(|round| round.dirty_pages).collect();
    assert_eq!(dirty.first(), Some(&PAGES), "the first round has all pages");
    assert!(dirty.len() >= 2, "{dirty:?}");
    let numbers: Vec<u32> = summary.rounds.iter().map(|round| round.round).collect();
    assert_eq!(numbers, (1..=u32::try_from(dirty.len()).unwrap()).collect::<Vec<_>>());
    let downtime = summary.downtime;
    for part in [
        downtime.pause,
        downtime.dirty_log,
        downtime.copy,
        downtime.prepare,
        downtime.record,
        downtime.commit,
        downtime.within_save,
        downtime.within_restore,
        downtime.within_target_record,
        downtime.within_run,
    ] {
        assert!(!part.is_zero(), "{downtime:?}");
    }
    assert!(downtime.total() <= 50 * MS, "{downtime:?}");
    assert!(downtime.total() < summary.total);
}

#[test]
fn the_messages_come_in_the_order_that_is_drawn_in_the_protocol() {
    let mut pair = Pair::new(config());
    pair.run_to_end();
    let chatter = [
        MessageType::Ping,
        MessageType::Pong,
        MessageType::FenceReached,
        MessageType::Rehearse,
        MessageType::Rehearsed,
    ];
    let order: Vec<_> =
        pair.delivered.iter().map(|(_, message)| *message).filter(|m| !chatter.contains(m)).collect();
    use MessageType::{
        Admit, Commit, Describe, Hello, KeepFor, Prepare, Prepared, Ready, Released, Running, State,
        Stopping, Welcome,
    };
    let drawn = [
        Hello, Welcome, Describe, Admit, Ready, KeepFor, Stopping, State, Prepare, Prepared, Commit, Running,
        Released,
    ];
    assert_eq!(order, drawn);
}

#[test]
fn a_late_pong_does_not_shorten_the_round_trip() {
    let mut pair = Pair::new(config());
    pair.dirty_pages = vec![PAGES, PAGES, 10];
    let second = |p: &Progress| matches!(p, Progress::RoundStarted { round: 2, .. });
    assert!(pair.run_until(|pair| pair.source_progress.iter().any(second)));
    pair.tell_source(source::Event::Message(Message::Pong(1)));
    pair.run_to_end();
    // Half of the state's 2 ms and a round trip of twice 0.5 ms.
    assert_eq!(moved(&pair).forecast.prepare.expected, 2 * MS, "{:?}", moved(&pair).forecast);
}

#[test]
fn a_migration_that_is_not_to_be_verified_takes_no_digest_on_either_side() {
    let mut pair = Pair::new(source::Config { verify: false, ..config() });
    // Without digests nobody sees it.
    pair.memory_differs = true;
    pair.run_to_end();
    assert_eq!(pair.streams_verify, (false, false));
    assert!(!moved(&pair).verified && pair.target_guest.runs);
    assert_eq!((moved(&pair).digest, moved(&pair).target_digest), (MemoryDigest::ZERO, MemoryDigest::ZERO));
}

#[test]
fn digests_are_taken_on_both_sides_unless_the_operator_says_otherwise() {
    let mut pair = Pair::new(config());
    pair.run_to_end();
    assert_eq!(pair.streams_verify, (true, true));
    assert!(moved(&pair).verified && moved(&pair).digest != MemoryDigest::ZERO);
}

#[test]
fn a_target_that_always_verifies_is_not_talked_out_of_it() {
    let mut pair = Pair::new(source::Config { verify: false, ..config() });
    pair.target_always_verifies = true;
    pair.run_to_end();
    assert_eq!(pair.streams_verify, (true, true));
    assert!(moved(&pair).verified);
}
