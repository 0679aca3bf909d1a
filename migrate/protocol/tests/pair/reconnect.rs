//! Links that break before the commit and come back: the migration goes on with what the target lacks.

use std::time::Duration;

use ferry_protocol::message::Resume;
use ferry_protocol::source::{self, Failure, Outcome, Progress};
use ferry_protocol::target;
use ferry_protocol::{Epoch, Message, PageBitmap};

use crate::world::{MS, PAGES, Pair, config};

const PHASES: [&str; 3] = ["pre-copy", "stop-and-copy", "preparing"];

fn moved(pair: &Pair) -> &source::Summary {
    let Some(Outcome::Moved(summary)) = &pair.source_outcome else { panic!("{:?}", pair.source_outcome) };
    assert!(pair.target_guest.runs && !pair.source_guest.exists);
    summary
}

#[test]
fn a_migration_goes_on_after_the_link_broke() {
    for phase in PHASES {
        for all in [false, true] {
            let mut pair = Pair::new(config());
            pair.run_to_source_phase(phase);
            if all {
                pair.cut_all(200 * MS);
            } else {
                pair.cut_control(200 * MS);
            }
            assert!(pair.run_until(|pair| pair.source.phase() == "reconnecting"), "{phase}");
            assert!(pair.run_until(|pair| pair.source_guest.runs), "the guest runs again at once");
            pair.run_to_end();
            let summary = moved(&pair);
            assert_eq!(summary.reconnections.len(), 1, "in {phase}");
        }
    }
}

#[test]
fn a_lost_data_stream_alone_is_made_again() {
    for phase in PHASES {
        for at_source in [true, false] {
            let mut pair = Pair::new(config());
            pair.run_to_source_phase(phase);
            if at_source {
                pair.tell_source(source::Event::StreamFailed("reset".to_owned()));
            } else {
                let (code, sentence) = (ferry_protocol::message::AbortCode::Internal, "reset".to_owned());
                pair.tell_target(target::Event::StreamFailed { code, sentence });
            }
            pair.run_to_end();
            assert!(moved(&pair).reconnections.len() <= 1, "in {phase}");
        }
    }
}

/// The state that was restored is of the past then: the guest has run since, and comes again with what it has written.
#[test]
fn a_link_that_breaks_while_the_state_is_restored_or_just_has_been_costs_nothing() {
    for phase in ["receiving", "prepared"] {
        let mut pair = Pair::new(config());
        let reached = |pair: &Pair| pair.target.as_ref().is_some_and(|target| target.phase() == phase);
        assert!(pair.run_until(|pair| pair.restores == 1 && reached(pair)));
        let sent = pair.sent.len();
        pair.cut_all(200 * MS);
        assert!(pair.run_until(|pair| pair.source_guest.runs), "the guest runs again at once");
        pair.run_to_end();
        assert!(pair.sent.len() > sent, "what it has written since is sent");
        assert_eq!(pair.restores, 2, "{phase}");
        assert_eq!(moved(&pair).reconnections.len(), 1);
    }
}

/// The first set of pages that is sent after the link broke in the middle of round `round`, and the round's own.
fn next_after_a_break_in(round: usize) -> (PageBitmap, PageBitmap, Pair) {
    let mut pair = Pair::new(config());
    assert!(pair.run_until(|pair| pair.sent.len() == round));
    pair.cut_all(20 * MS);
    assert!(pair.run_until(|pair| pair.sent.len() == round + 1));
    (pair.sent[round - 1].clone(), pair.sent[round].clone(), pair)
}

#[test]
fn only_what_has_not_arrived_and_what_was_written_is_sent_again() {
    for round in [1, 2] {
        let (before, after, mut pair) = next_after_a_break_in(round);
        // The target of this world has the lower half of the round. Round 2 is the last, of 900 and 100 pages.
        let half = before.count() / 2;
        let logged = [900, 10][round - 1];
        let mut expected = PageBitmap::empty(PAGES);
        let pages = before.ranges().flat_map(|r| r.first()..r.first() + r.count());
        pages.skip(usize::try_from(half).unwrap()).chain(0..logged).for_each(|page| expected.insert(page));
        assert_eq!(after, expected, "round {round}");
        assert_eq!(pair.lacking[0].count(), before.count() - half);
        pair.run_to_end();
        assert_eq!(moved(&pair).reconnections[0].arrived_pages, half);
    }
}

#[test]
fn a_log_that_is_being_read_when_the_link_breaks_is_not_lost() {
    let mut pair = Pair::new(config());
    pair.dirty_pages = vec![0, 900, 2000, 10];
    assert!(pair.run_until(|pair| pair.dirty_pages.len() == 1), "the log of the standstill is being read");
    assert!(!pair.source_guest.runs);
    pair.cut_all(20 * MS);
    let sent = pair.sent.len();
    assert!(pair.run_until(|pair| pair.sent.len() > sent));
    assert_eq!(pair.sent[sent].count(), 2000, "what that log named is in the next round");
    pair.run_to_end();
    moved(&pair);
}

#[test]
fn a_link_that_breaks_again_and_again_is_made_again_and_again() {
    let mut pair = Pair::new(config());
    pair.dirty_pages = vec![PAGES, 900, 900, 900, 900, 900, 900, 900, 10];
    for _ in 0..5 {
        pair.run_to_source_phase("pre-copy");
        assert!(pair.run_until(|pair| pair.source.phase() == "pre-copy"));
        pair.cut_all(60 * MS);
        assert!(pair.run_until(|pair| pair.source.phase() == "reconnecting"));
        // Once more while it is asked what has arrived.
        assert!(pair.run_until(|pair| pair.source.phase() != "reconnecting" || pair.connect_delays.len() % 3 == 2));
        pair.cut_all(5 * MS);
    }
    pair.run_to_end();
    assert!(moved(&pair).reconnections.len() >= 3);
}

/// A connection that the source has given up may be read after the next one: what it asks is of the past.
#[test]
fn a_connection_that_comes_late_is_no_reason_to_give_up() {
    for phase in ["receiving", "interrupted", "prepared"] {
        let mut pair = Pair::new(config());
        pair.run_to_source_phase("pre-copy");
        pair.cut_all(20 * MS);
        pair.run_to_source_phase("reconnecting");
        pair.run_to_source_phase("pre-copy");
        if phase == "interrupted" {
            pair.cut_all(200 * MS);
        }
        pair.run_to_target_phase(phase);
        let session = 1;
        let late = Resume { epoch: Epoch::FIRST.next(), session, reached: 0, round: 1, from: 0 };
        pair.tell_target(target::Event::Reconnected);
        pair.tell_target(target::Event::Message(Message::Resume(late)));
        // It has taken the place of the newer connection.
        pair.cut_control(20 * MS);
        pair.run_to_end();
        assert!(!moved(&pair).reconnections.is_empty(), "{phase}");
    }
}

/// By then the source may have committed, so it must not make the target anything but prepared.
#[test]
fn a_connection_that_comes_late_does_not_undo_what_is_prepared() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("pre-copy");
    pair.cut_all(20 * MS);
    pair.run_to_source_phase("reconnecting");
    pair.run_to_source_phase("committed");
    pair.run_to_target_phase("prepared");
    let late = Resume { epoch: Epoch::FIRST.next(), session: 1, reached: 0, round: 1, from: 0 };
    pair.tell_target(target::Event::Reconnected);
    pair.tell_target(target::Event::Message(Message::Resume(late)));
    assert!(pair.target.as_ref().is_some_and(|target| target.phase() == "prepared"));
    pair.run_to_end();
    moved(&pair);
}

#[test]
fn a_target_that_was_restarted_ends_the_attempt_by_name() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("pre-copy");
    pair.restart_target();
    pair.run_to_end();
    let Some(Outcome::Stayed { failure: Failure::Link(reason), .. }) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert!(reason.contains("nothing of the migration any more"), "{reason}");
    assert!(pair.source_guest.runs && !pair.source_guest.dirty_log);
}

#[test]
fn without_reconnecting_a_broken_link_ends_the_attempt_at_once() {
    for phase in PHASES {
        let mut pair = Pair::new(source::Config { reconnect: Duration::ZERO, ..config() });
        pair.run_to_source_phase(phase);
        let began = pair.now;
        pair.cut_all(20 * MS);
        assert!(pair.run_until(|pair| pair.source_outcome.is_some()));
        assert!(pair.now.since(began) < Duration::from_secs(1));
        assert!(matches!(&pair.source_outcome, Some(Outcome::Stayed { failure: Failure::Link(_), .. })));
        pair.run_to_end();
        assert!(pair.target_outcomes.len() == 1 && pair.target.is_none(), "in {phase}");
    }
}

#[test]
fn a_target_that_breaks_a_stream_and_says_why_is_heard_though_links_are_not_made_again() {
    let mut pair = Pair::new(source::Config { reconnect: Duration::ZERO, ..config() });
    pair.run_to_source_phase("pre-copy");
    pair.tell_source(source::Event::StreamFailed("reset".to_owned()));
    let sentence = "its disk is full".to_owned();
    pair.tell_target(target::Event::RehearsalFailed(sentence));
    pair.run_to_end();
    let Some(Outcome::Stayed { failure: Failure::Refused(abort), .. }) = &pair.source_outcome else {
        panic!("{:?}", pair.source_outcome);
    };
    assert!(abort.sentence.contains("its disk is full"), "{abort:?}");
    assert!(pair.source_guest.runs && !pair.source_guest.dirty_log);
    let told = |p: &Progress| matches!(p, Progress::Reconnecting { .. });
    assert!(!pair.source_progress.iter().any(told), "it is not tried");
}

#[test]
fn a_cancellation_while_reconnecting_is_heeded_at_once() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("pre-copy");
    pair.cut_all(Duration::from_secs(3600));
    pair.run_to_source_phase("reconnecting");
    let began = pair.now;
    pair.tell_source(source::Event::Cancel);
    assert!(pair.run_until(|pair| pair.source_outcome.is_some()));
    assert!(pair.now.since(began) < 10 * MS);
    pair.run_to_end();
    assert!(matches!(&pair.source_outcome, Some(Outcome::Stayed { failure: Failure::Cancelled, .. })));
    assert!(pair.target.is_none(), "the target does not wait for ever");
}

#[test]
fn either_side_notices_when_the_other_falls_silent() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("pre-copy");
    let began = pair.now;
    pair.silent = true;
    assert!(pair.run_until(|pair| pair.source.phase() == "reconnecting"));
    assert!(
        pair.run_until(|pair| pair.target.as_ref().is_some_and(|target| target.phase() == "interrupted"))
    );
    let noticed = pair.now.since(began);
    assert!((5..8).contains(&noticed.as_secs()), "{noticed:?}");
    pair.silent = false;
    pair.run_to_end();
    assert_eq!(moved(&pair).reconnections.len(), 1);
}

#[test]
fn progress_tells_of_the_break_and_of_going_on() {
    let mut pair = Pair::new(config());
    pair.run_to_source_phase("pre-copy");
    pair.cut_all(20 * MS);
    pair.run_to_end();
    let told = |wanted: fn(&Progress) -> bool| pair.source_progress.iter().filter(|p| wanted(p)).count();
    assert_eq!(told(|p| matches!(p, Progress::Reconnecting { .. })), 1);
    assert_eq!(told(|p| matches!(p, Progress::Reconnected(_))), 1);
    let interrupted = |p: &target::Progress| matches!(p, target::Progress::Interrupted { .. });
    assert_eq!(pair.target_progress.iter().filter(|p| interrupted(p)).count(), 1);
}

#[test]
fn a_link_is_made_again_after_the_time_is_over_where_the_guest_is_to_be_stopped_then() {
    let timeout = Duration::from_secs(2);
    let mut pair = Pair::new(source::Config { timeout, on_timeout: source::OnTimeout::Stop, ..config() });
    // It never converges, and its last round takes long.
    pair.dirty_pages = vec![PAGES];
    assert!(pair.run_until(|pair| pair.now.since(Default::default()) > timeout));
    pair.tell_source(source::Event::StreamFailed("reset".to_owned()));
    pair.run_to_end();
    assert_eq!(moved(&pair).reconnections.len(), 1);
}
