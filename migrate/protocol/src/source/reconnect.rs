//! A link that broke before the commit: the guest runs again at once if it stood still, everything is closed, and the
//! target is reached anew. It says what has arrived; only the rest is sent.
//!
//! ```text
//!  Listening    .---------------- lost again, no answer -----------------.
//!        |      v                                                        |
//!        '-> Connecting --Connected--> Asking --Arrived (in parts)--> Opening --StreamsOpened--> Open --> PreCopy
//! ```
//!
//! No dirty bit is lost on the way: pages of the round under way that have not arrived are put back, and so is what a log
//! names that is still being read. What the target may lack is forgotten by the encoders too ([`Action::ReopenStreams`]), so
//! that nothing is left out as known, or sent as a delta against it.
//!
//! Where links are not made again (`--reconnect 0s`), only the first step remains if a data stream broke: the target may say why.
//!
//! It ends with the guest going on here if the target is not reached in the time allowed, or has nothing of the migration
//! any more. A target that had restored the guest's state forgets it and restores what comes later.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::bitmap::{PageBitmap, PageRange};
use crate::message::{Arrived, Message, Resume};
use crate::negotiation::Features;
use crate::time::Timestamp;

use super::negotiate::{hello, stay_or_undo};
use super::undo::undo;
use super::{Action, Context, Event, Failure, MemoryPath, OnTimeout, Phase, Progress, Reconnection};
use super::{interruption, precopy};

/// Reconnections of one migration; a link that breaks more often is no link.
pub const RECONNECTIONS_MAX: usize = 64;

/// How long the control connection is kept when only a data stream broke: if the target is giving up, its word comes this
/// way. The guest does not wait for it.
const LAST_WORD_MAX: Duration = Duration::from_millis(500);

/// How long the target may take to answer on a new connection, and to take the data streams.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The wait before the second attempt to connect; the first is made at once.
const RETRY_DELAY_FIRST: Duration = Duration::from_millis(50);

/// What it grows to, by doubling.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(1);

/// How far the dirty log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Log {
    Off,
    Starting,
    On,
    /// What it names is on its way and must not be lost.
    Reading,
}

/// What the phase that lost the link leaves.
#[derive(Debug, Clone)]
pub(super) struct Left {
    /// Pages of the round that is not known to have arrived, if there is one.
    pub(super) round: Option<PageBitmap>,
    /// Pages that are to be sent beside it.
    pub(super) dirty: PageBitmap,
    pub(super) log: Log,
    /// Whether the guest stands still, or is about to.
    pub(super) paused: bool,
}

/// The target is being reached again.
#[derive(Debug, Clone)]
pub(super) struct Reconnecting {
    step: Step,
    left: Left,
    /// Whether the guest is being resumed.
    resuming: bool,
    since: Timestamp,
    /// Set where the link is made again.
    deadline: Option<Timestamp>,
    next_delay: Duration,
    /// Why the last attempt failed.
    reason: String,
    /// Of the round's pages, those that have arrived.
    arrived_pages: u64,
}

#[derive(Debug, Clone)]
enum Step {
    /// The old control connection still stands.
    Listening {
        until: Timestamp,
    },
    Connecting,
    Asking {
        answer_by: Timestamp,
        from: u64,
        arrived: PageBitmap,
    },
    Opening {
        open_by: Timestamp,
    },
    Open,
}

/// Whether a lost link is made again.
fn may_reconnect(context: &Context) -> bool {
    context.config.memory == MemoryPath::Streams
        && context.features.contains(Features::RESUMPTION)
        && !context.config.reconnect.is_zero()
        && context.reconnections.len() < RECONNECTIONS_MAX
}

/// Something failed by `event`. A lost link is made again where it may be; everything else ends the attempt.
pub(super) fn begin(
    (failure, event): (Failure, &Event),
    left: Left,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    let control_stands = matches!(event, Event::StreamFailed(_));
    let reconnects = may_reconnect(context);
    let reason = match failure {
        Failure::Link(reason) if reconnects || control_stands => reason,
        failure => return undo(failure, context),
    };
    context.act(Action::CloseStreams);
    let resuming = left.paused;
    if resuming {
        context.act(Action::ResumeVm);
    }
    if reconnects {
        context.report(Progress::Reconnecting { reason: reason.clone() });
    }
    let step = if control_stands {
        Step::Listening { until: now + LAST_WORD_MAX }
    } else {
        context.act(Action::Connect { delay: Duration::ZERO });
        Step::Connecting
    };
    Phase::Reconnecting(Box::new(Reconnecting {
        step,
        left,
        resuming,
        since: now,
        deadline: reconnects.then(|| now + context.config.reconnect),
        next_delay: RETRY_DELAY_FIRST,
        reason,
        arrived_pages: 0,
    }))
}

impl Reconnecting {
    /// When this phase wants to be woken.
    pub(super) fn wake(&self, context: &Context) -> Timestamp {
        let step = match self.step {
            Step::Connecting | Step::Open => None,
            Step::Listening { until: by }
            | Step::Asking { answer_by: by, .. }
            | Step::Opening { open_by: by } => Some(by),
        };
        let timeout = match context.config.on_timeout {
            OnTimeout::Cancel => Some(context.deadline()),
            OnTimeout::Stop => None,
        };
        let due = [step, self.deadline, timeout].into_iter().flatten().min();
        due.expect("where there is no deadline there is a step that has one")
    }

    pub(super) fn on(mut self: Box<Self>, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match (&self.step, event) {
            (Step::Listening { .. }, Event::Disconnected(_)) => self.connect(context),
            // It says why, or it knows nothing yet.
            (Step::Listening { .. }, Event::Message(message)) if !matches!(message, Message::Abort(_)) => {
                Phase::Reconnecting(self)
            }
            (_, Event::Disconnected(reason)) => self.again(reason, context),
            (Step::Opening { .. } | Step::Open, Event::StreamFailed(reason)) => self.again(reason, context),
            // The late end of a stream that was closed.
            (Step::Listening { .. } | Step::Connecting | Step::Asking { .. }, Event::StreamFailed(_)) => {
                Phase::Reconnecting(self)
            }
            (Step::Connecting, Event::Connected) => {
                context.send(hello(context, true));
                context.session += 1;
                self.ask(0, PageBitmap::empty(context.layout.page_count()), now, context)
            }
            (Step::Asking { .. }, Event::Message(Message::Arrived(answer))) => {
                self.take_in(&answer, now, context)
            }
            (_, Event::Message(Message::Discarded(_))) => {
                let text = format!("{}; and the target has nothing of the migration any more", self.reason);
                undo(Failure::Link(text), context)
            }
            // Answers to what pre-copy asked may still come, on this connection too.
            (_, Event::Message(message)) if message.is_late_measurement() => Phase::Reconnecting(self),
            (Step::Opening { .. }, Event::StreamsOpened) => {
                self.step = Step::Open;
                self.go_on_if_ready(now, context)
            }
            (_, Event::VmResumed) => {
                self.resuming = false;
                self.go_on_if_ready(now, context)
            }
            (_, Event::DirtyLogStarted) => {
                self.left.log = Log::On;
                self.go_on_if_ready(now, context)
            }
            (_, Event::DirtyLogRead { pages, .. }) => {
                self.left.dirty.union(&pages);
                self.left.log = Log::On;
                self.go_on_if_ready(now, context)
            }
            (_, Event::Timeout) => self.timed_out(now, context),
            (_, other) => match interruption(&other) {
                Some(failure) => undo(failure, context),
                None => stay_or_undo(&other, "reconnecting", Phase::Reconnecting(self), context),
            },
        }
    }

    /// The old control connection has nothing more to say.
    fn connect(mut self: Box<Self>, context: &mut Context) -> Phase {
        if self.deadline.is_none() {
            return undo(Failure::Link(self.reason), context);
        }
        self.step = Step::Connecting;
        context.act(Action::Connect { delay: Duration::ZERO });
        Phase::Reconnecting(self)
    }

    fn again(mut self: Box<Self>, reason: String, context: &mut Context) -> Phase {
        if !matches!(self.step, Step::Connecting) {
            context.act(Action::CloseStreams);
        }
        self.reason = reason;
        self.step = Step::Connecting;
        context.act(Action::Connect { delay: self.next_delay });
        self.next_delay = (self.next_delay * 2).min(RETRY_DELAY_MAX);
        Phase::Reconnecting(self)
    }

    fn timed_out(self: Box<Self>, now: Timestamp, context: &mut Context) -> Phase {
        let forced = context.config.on_timeout == OnTimeout::Stop;
        let over = self.deadline.is_some_and(|deadline| now >= deadline);
        if over || (now >= context.deadline() && !forced) {
            let text = format!(
                "{}; and the migration could not be taken up again within {:.0} s (--reconnect)",
                self.reason,
                now.since(self.since).as_secs_f64(),
            );
            return undo(Failure::Link(text), context);
        }
        match self.step {
            Step::Listening { .. } => self.connect(context),
            Step::Connecting | Step::Asking { .. } | Step::Opening { .. } | Step::Open => {
                self.again("the target does not answer".to_owned(), context)
            }
        }
    }

    fn ask(
        mut self: Box<Self>,
        from: u64,
        arrived: PageBitmap,
        now: Timestamp,
        context: &mut Context,
    ) -> Phase {
        let round = if self.left.round.is_some() { context.fence } else { context.reached };
        context.send(Message::Resume(Resume {
            epoch: context.config.epoch.next(),
            session: context.session,
            reached: context.reached,
            round,
            from,
        }));
        self.step = Step::Asking { answer_by: now + ANSWER_TIMEOUT, from, arrived };
        Phase::Reconnecting(self)
    }

    fn take_in(mut self: Box<Self>, answer: &Arrived, now: Timestamp, context: &mut Context) -> Phase {
        let Step::Asking { from, mut arrived, .. } = std::mem::replace(&mut self.step, Step::Connecting)
        else {
            unreachable!("an answer is only taken in where one was asked for");
        };
        let complete = answer.reached == context.fence && self.left.round.is_some();
        let checked = (complete || answer.reached == context.reached)
            .then(|| add_runs(&mut arrived, answer, from, context))
            .flatten();
        if checked.is_none() {
            let text = "its answer to what has arrived names pages or fences that can't be".to_owned();
            return undo(Failure::Protocol(text), context);
        }
        match answer.next {
            Some(next) => self.ask(next, arrived, now, context),
            None => self.reopen(complete, &arrived, now, context),
        }
    }

    /// The answer is complete: what has not arrived is put back among the dirty pages.
    fn reopen(
        mut self: Box<Self>,
        complete: bool,
        arrived: &PageBitmap,
        now: Timestamp,
        context: &mut Context,
    ) -> Phase {
        let mut lacking = PageBitmap::empty(context.layout.page_count());
        if let Some(round) = &mut self.left.round {
            if complete {
                self.arrived_pages = round.count();
            } else {
                lacking = round.clone();
                lacking.subtract(arrived);
                self.arrived_pages = round.count() - lacking.count();
            }
        }
        if complete {
            context.reached = context.fence;
            self.left.round = None;
        }
        context.act(Action::ReopenStreams {
            verify: context.verifies(),
            session: context.session,
            lacking: lacking.clone(),
        });
        self.left.dirty.union(&lacking);
        self.step = Step::Opening { open_by: now + ANSWER_TIMEOUT };
        Phase::Reconnecting(self)
    }

    /// Takes pre-copy up once the streams stand, the guest runs and no log is under way.
    fn go_on_if_ready(self: Box<Self>, now: Timestamp, context: &mut Context) -> Phase {
        let quiet = matches!(self.left.log, Log::Off | Log::On) && !self.resuming;
        if !quiet || !matches!(self.step, Step::Open) {
            return Phase::Reconnecting(self);
        }
        let reconnection = Reconnection {
            round: context.fence,
            arrived_pages: self.arrived_pages,
            again_pages: self.left.dirty.count(),
            took: now.since(self.since),
        };
        context.reconnections.push(reconnection);
        context.report(Progress::Reconnected(reconnection));
        precopy::go_on(self.left.dirty, self.left.log == Log::On, now, context)
    }
}

/// Adds the pages of an answer that was to begin with page `from`; `None` if it is not in order.
fn add_runs(arrived: &mut PageBitmap, answer: &Arrived, from: u64, context: &Context) -> Option<()> {
    let mut at = from;
    for run in &answer.runs {
        let range =
            PageRange::new(run.first, run.count, &context.layout).filter(|range| range.first() >= at)?;
        at = range.first() + range.count();
        arrived.insert_range(range);
    }
    // Each part must bring it nearer to the end.
    answer
        .next
        .is_none_or(|next| next > from && next >= at && next < context.layout.page_count())
        .then_some(())
}
