//! The link broke before the source knew that the guest was prepared: what has arrived is kept for a while, so that a source
//! that comes back need only send the rest.
//!
//! ```text
//!  Receiving --lost--> Interrupted --Resume, all streams' threads ended, nothing being restored--> Receiving
//!                       ^  '-- nobody came, or either side gives up --> Discarding
//!  Prepared --Resume----'
//! ```
//!
//! Nothing that an old connection sent may land in guest memory once the source has been told what is there. So the streams are
//! ended first ([`Action::EndStreams`]), the answer waits until they have ended, and the streams that are let in
//! afterwards carry a number of their own.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::message::{AbortCode, Arrived, Message, RUNS_MAX, Resume, Run};
use crate::time::Timestamp;

use super::handover::discard;
use super::receive::{Receiving, failure};
use super::{Action, Context, Event, Phase, Progress};

/// The longest that a source can have what it sent kept.
pub const KEEP_MAX: Duration = Duration::from_secs(600);

/// So much longer than it was asked to does a target keep it: the source may have noticed the loss later.
pub const KEEP_MARGIN: Duration = Duration::from_secs(10);

/// How long the control connection is left open when only a data stream broke: if the source is giving up, its word comes
/// this way. Then it is closed, so that the source notices too.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);

/// What has arrived is kept; the source is awaited.
#[derive(Debug, Clone)]
pub(super) struct Interrupted {
    pub(super) receiving: Box<Receiving>,
    discard_at: Timestamp,
    /// Set while the control connection stands although a data stream broke.
    hang_up_at: Option<Timestamp>,
    /// What the last streams brought since the last fence, once they have ended.
    arrived: Option<PageBitmap>,
    /// The state was being restored. Memory stays as it is until that is over; then it is void.
    restoring: bool,
    /// What the source has asked and was not answered yet.
    asked: Option<Resume>,
    reason: String,
}

/// How the link broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// The control connection is gone.
    Control,
    /// A data stream is gone; the control connection stands.
    Stream,
    /// The source has come back on a new connection before anybody noticed.
    Replaced,
}

/// Whether the event is a loss of the link, which need not be the end; gives the event back if not.
pub(super) fn loss(event: Event) -> Result<(Loss, String), Event> {
    match event {
        Event::Disconnected(reason) => {
            Ok((Loss::Control, format!("the connection to the source was lost: {reason}")))
        }
        Event::Reconnected => Ok((Loss::Replaced, "the source has connected anew".to_owned())),
        // Only the connection: a stream that sent what it must not says so by another code.
        Event::StreamFailed { code: AbortCode::Internal, sentence } => Ok((Loss::Stream, sentence)),
        other => Err(other),
    }
}

/// Keeps what has arrived, or discards it where it can't be taken up.
pub(super) fn begin(
    mut receiving: Box<Receiving>,
    loss: Loss,
    reason: String,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    let Some(keep_for) = receiving.keep_for() else {
        let code = (loss == Loss::Stream).then_some(AbortCode::Internal);
        return discard(receiving.guest, code, &reason, context);
    };
    context.act(Action::EndStreams);
    context.act(Action::Report(Progress::Interrupted { reason: reason.clone() }));
    let restoring = receiving.is_restoring();
    receiving.forget_standstill();
    Phase::Interrupted(Box::new(Interrupted {
        receiving,
        discard_at: now + keep_for,
        hang_up_at: (loss == Loss::Stream).then(|| now + LAST_WORD_MAX),
        arrived: None,
        restoring,
        asked: None,
        reason,
    }))
}

/// The source takes up what is prepared here, because it has not heard that it is. Its streams are being ended; if they
/// have, `ended` is what they had brought.
pub(super) fn taken_back(
    mut receiving: Box<Receiving>,
    ended: Option<(PageBitmap, MemoryDigest)>,
    resume: Resume,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    let reason = "the link broke before the source heard that the guest was prepared".to_owned();
    let standing = receiving.guest.standing.taken_back(resume.epoch);
    let (Some(keep_for), Ok(standing)) = (receiving.keep_for(), standing) else {
        let text = format!("{reason}, and this migration can't be taken up; begin it again");
        return discard(receiving.guest, Some(AbortCode::Protocol), &text, context);
    };
    receiving.guest.standing = standing;
    receiving.forget_standstill();
    context.act(Action::Report(Progress::Interrupted { reason: reason.clone() }));
    let arrived = ended.map(|(arrived, digest)| {
        receiving.rebase(digest);
        arrived
    });
    let interrupted = Interrupted {
        receiving,
        discard_at: now + keep_for,
        hang_up_at: None,
        arrived,
        restoring: false,
        asked: None,
        reason,
    };
    Box::new(interrupted).on(now, Event::Message(Message::Resume(resume)), context)
}

impl Interrupted {
    /// When this phase wants to be woken.
    pub(super) fn wake(&self) -> Timestamp {
        self.hang_up_at.map_or(self.discard_at, |at| at.min(self.discard_at))
    }

    pub(super) fn on(mut self: Box<Self>, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::Disconnected(_) => {
                (self.hang_up_at, self.asked) = (None, None);
                Phase::Interrupted(self)
            }
            Event::Reconnected => {
                (self.hang_up_at, self.asked) = (None, None);
                Phase::Interrupted(self)
            }
            // The ends of the old streams, and what they had brought before.
            Event::StreamFailed { .. } => Phase::Interrupted(self),
            Event::FenceReached { stream, fence, digest } if self.arrived.is_none() => {
                match self.receiving.fence(stream, fence, digest, now) {
                    Ok(_) => Phase::Interrupted(self),
                    Err(reason) => self.give_up(Some(AbortCode::Protocol), &reason, context),
                }
            }
            Event::StreamsEnded { arrived, digest } if self.arrived.is_none() => {
                self.receiving.rebase(digest);
                self.arrived = Some(arrived);
                self.answer_if_asked(now, context)
            }
            Event::StateRestored { .. } => {
                self.restoring = false;
                self.answer_if_asked(now, context)
            }
            Event::Message(Message::Resume(resume)) => {
                if resume.epoch != self.receiving.guest.standing.epoch() {
                    let text = "the source takes up another migration than the one that was interrupted";
                    return self.give_up(Some(AbortCode::Protocol), text, context);
                }
                // It came late, by a connection that the source has given up, and was overtaken by one that was answered
                // already. The source finds that one closed, and asks anew.
                if !self.receiving.is_next(&resume) {
                    return Phase::Interrupted(self);
                }
                self.asked = Some(resume);
                self.answer_if_asked(now, context)
            }
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Interrupted(self)
            }
            Event::Message(Message::Abort(abort)) => self.give_up(None, &abort.sentence, context),
            // What the source had sent before it noticed.
            Event::Message(_) => Phase::Interrupted(self),
            Event::RecordRehearsed { .. } | Event::WitnessProbed { .. } | Event::WitnessSilent(_) => {
                self.receiving.rehearsed();
                Phase::Interrupted(self)
            }
            Event::Timeout if now >= self.discard_at => {
                let text = format!("{}; and its source did not come back in time", self.reason);
                self.give_up(None, &text, context)
            }
            Event::Timeout => {
                if self.hang_up_at.take_if(|at| now >= *at).is_some() {
                    context.act(Action::HangUp);
                }
                Phase::Interrupted(self)
            }
            other => match failure(&other) {
                Some((code, reason)) => self.give_up(code, &reason, context),
                None => Phase::Interrupted(self),
            },
        }
    }

    fn give_up(self, code: Option<AbortCode>, reason: &str, context: &mut Context) -> Phase {
        discard(self.receiving.guest, code, reason, context)
    }

    /// Answers with a part of what has arrived, and lets new streams in once it was the last.
    fn answer_if_asked(mut self: Box<Self>, now: Timestamp, context: &mut Context) -> Phase {
        let (Some(arrived), Some(resume), false) = (&self.arrived, &self.asked, self.restoring) else {
            return Phase::Interrupted(self);
        };
        let mut arrived = arrived.clone();
        // If the source has not begun another round since it was told last, that still stands.
        if let Some((_, told)) = self.receiving.told.as_ref().filter(|(round, _)| *round == resume.round) {
            arrived.union(told);
        }
        let answer = part(&arrived, resume.from, self.receiving.reached());
        let (session, round, complete) = (resume.session, resume.round, answer.next.is_none());
        if complete {
            context.act(Action::ExpectStreams { session, digest: self.receiving.digest() });
            context.admit(session);
        }
        context.send(Message::Arrived(answer));
        self.asked = None;
        if !complete {
            return Phase::Interrupted(self);
        }
        context.act(Action::Report(Progress::Receiving));
        self.receiving.resumed(session, (round, arrived));
        context.restart_liveness(now);
        Phase::Receiving(self.receiving)
    }
}

/// As much of `arrived` as one message takes, from page `from` on.
fn part(arrived: &PageBitmap, from: u64, reached: u32) -> Arrived {
    let mut runs = Vec::new();
    let mut next = None;
    for range in arrived.ranges() {
        let end = range.first() + range.count();
        if end <= from {
            continue;
        }
        let first = range.first().max(from);
        if runs.len() == RUNS_MAX {
            next = Some(first);
            break;
        }
        runs.push(Run { first, count: end - first });
    }
    Arrived { reached, runs, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_in_parts_names_every_page_once() {
        // Every other page, so that there are more runs than fit.
        let page_count = 4 * u64::try_from(RUNS_MAX).unwrap();
        let mut arrived = PageBitmap::empty(page_count);
        (0..page_count).step_by(2).for_each(|page| arrived.insert(page));
        let (mut from, mut parts, mut seen) = (0, 0, PageBitmap::empty(page_count));
        loop {
            let answer = part(&arrived, from, 3);
            assert!(answer.runs.len() <= RUNS_MAX && answer.reached == 3);
            for run in &answer.runs {
                assert!(run.first >= from && !seen.contains(run.first));
                (run.first..run.first + run.count).for_each(|page| seen.insert(page));
            }
            parts += 1;
            match answer.next {
                Some(next) => from = next,
                None => break,
            }
        }
        assert_eq!((seen, parts), (arrived, 2));
    }
}
