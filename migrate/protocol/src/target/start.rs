//! The record that the guest runs here is durable, and it is started; and what is done if that fails.
//!
//! ```text
//!  Begun --VmRunning--> Running
//!    |  ^
//!    |  | again in a while
//!    v  |
//!  Waiting -- the source lives --> Recording --durable--> Discarded
//!                '-- with a witness: GivingUp (witness.rs)
//! ```
//!
//! No instruction of the guest has run, and the source still has all of it, so it can go back; but only to a source that has
//! just shown that it is there to take it, and only once it is durable that it never runs here. A source that was lost
//! leaves this as the only copy, and starting it is tried again.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::message::{AtEpoch, Message};
use crate::record::Standing;
use crate::time::Timestamp;

use super::handover::{ReadyGuest, tell};
use super::{Action, Context, Event, Outcome, Phase, Progress, RECORD_RETRY, RUN_RETRY, witness};

/// What the source is asked with whether it is there.
const LIFE_TOKEN: u64 = 0;

/// Whether the source has shown that it is there since it was asked. That it is connected again shows nothing: it may have
/// been lost since, with all that it had sent still to be read here.
pub(super) const fn shows_life(event: &Event) -> bool {
    matches!(event, Event::Message(Message::Pong(LIFE_TOKEN)))
}

/// Asks the source whether it is there.
pub(super) fn ask_for_life(context: &mut Context) {
    context.send(Message::Ping(LIFE_TOKEN));
}

/// The guest is being started.
#[derive(Debug, Clone)]
pub(super) struct Starting {
    pub(super) ready: ReadyGuest,
    /// How long the record took.
    record: Duration,
    step: Step,
}

#[derive(Debug, Clone)]
enum Step {
    /// It is being started.
    Begun,
    /// It could not be started. The source is asked whether it is there.
    Waiting { reason: String, retry_at: Timestamp },
    /// It is being recorded that it never runs here.
    Recording { reason: String, retry_at: Option<Timestamp> },
}

pub(super) fn begin(ready: ReadyGuest, record: Duration, context: &mut Context) -> Phase {
    context.act(Action::RunVm { runs: ready.runs });
    Phase::Starting(Starting { ready, record, step: Step::Begun })
}

impl Starting {
    /// When something is tried again.
    pub(super) const fn wake(&self) -> Option<Timestamp> {
        match &self.step {
            Step::Begun => None,
            Step::Waiting { retry_at, .. } => Some(*retry_at),
            Step::Recording { retry_at, .. } => *retry_at,
        }
    }

    /// The step in words.
    pub(super) const fn word(&self) -> &'static str {
        match &self.step {
            Step::Begun => "starting",
            Step::Waiting { .. } => "waiting to start again",
            Step::Recording { .. } => "giving the guest back",
        }
    }

    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match self.step {
            Step::Begun => self.on_begun(now, event, context),
            Step::Waiting { ref reason, retry_at } => match event {
                Event::Timeout if now >= retry_at => begin(self.ready, self.record, context),
                Event::Reconnected => {
                    ask_for_life(context);
                    Phase::Starting(self)
                }
                event if shows_life(&event) => {
                    let reason = reason.clone();
                    self.give_up(reason, context)
                }
                _ => Phase::Starting(self),
            },
            Step::Recording { ref reason, retry_at } => {
                let reason = reason.clone();
                self.on_recording(reason, retry_at, now, event, context)
            }
        }
    }

    fn on_begun(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::VmRunning { took } => {
                context.act(Action::Announce(self.ready.network.clone()));
                context.act(Action::Report(Progress::Running));
                tell(self.ready, self.record, took, context)
            }
            // What has run here can't go back. The machine is kept for the operator, and the source is told the truth:
            // the guest is here.
            Event::RunBroke(reason) => {
                context.act(Action::Report(Progress::CannotRun { reason }));
                tell(self.ready, self.record, Duration::ZERO, context)
            }
            Event::RunFailed(reason) => {
                ask_for_life(context);
                self.wait(reason, now, context)
            }
            _ => Phase::Starting(self),
        }
    }

    fn wait(mut self, reason: String, now: Timestamp, context: &mut Context) -> Phase {
        context.act(Action::Report(Progress::CannotRun { reason: reason.clone() }));
        self.step = Step::Waiting { reason, retry_at: now + RUN_RETRY };
        Phase::Starting(self)
    }

    /// Gives the guest back, as far as the witness lets it.
    fn give_up(mut self, reason: String, context: &mut Context) -> Phase {
        let guest = &mut self.ready.guest;
        guest.standing = guest.standing.not_started().expect("it was to run");
        if context.config.witness.is_some() {
            return witness::not_started(self.ready, reason, context);
        }
        self.give_back(reason, context)
    }

    fn give_back(mut self, reason: String, context: &mut Context) -> Phase {
        context.act(Action::WriteRecord(self.ready.guest.record(Standing::Discarded)));
        self.step = Step::Recording { reason, retry_at: None };
        Phase::Starting(self)
    }

    fn on_recording(
        mut self,
        reason: String,
        retry_at: Option<Timestamp>,
        now: Timestamp,
        event: Event,
        context: &mut Context,
    ) -> Phase {
        match event {
            Event::RecordWritten { .. } => {
                let standing = self.ready.guest.standing.returned().expect("it was to go back");
                context.act(Action::DiscardMachine);
                context.send(Message::Discarded(AtEpoch { epoch: standing.epoch() }));
                let reason = format!("the target could not start the guest: {reason}");
                context.act(Action::Finish(Outcome::Discarded { reason }));
                return Phase::Finished;
            }
            // By the disk the guest may be this host's, and the source would be told so by whoever reads it. So nothing
            // is said before the disk says what is true.
            Event::RecordFailed(_) => {
                self.step = Step::Recording { reason, retry_at: Some(now + RECORD_RETRY) };
            }
            Event::Timeout if retry_at.is_some_and(|at| now >= at) => return self.give_back(reason, context),
            _ => {}
        }
        Phase::Starting(self)
    }
}
