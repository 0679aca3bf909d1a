//! What a target with a witness does besides: it asks for leave to run, and gives that back if it can't use it.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::message::{AtEpoch, Hello, Message, Rehearsed};
use crate::negotiation::Features;
use crate::record::Standing;
use crate::time::Timestamp;
use crate::witness::{Ruling, Wish, WitnessId};

use super::handover::{OnDisk, ReadyGuest, discard, discard_over, record};
use super::receive::micros;
use super::start::{ask_for_life, shows_life};
use super::{Action, Context, Event, Phase, Progress, RECORD_RETRY, WITNESS_RETRY};

/// The source has committed; the witness is asked. Until it rules, the guest is neither run nor discarded here: the claim
/// may have been heard even where the answer is lost.
#[derive(Debug, Clone)]
pub(super) struct Asking {
    pub(super) ready: ReadyGuest,
    asked_at: Timestamp,
    /// Set while it is waited before asking again.
    pub(super) retry_at: Option<Timestamp>,
}

pub(super) fn ask(ready: ReadyGuest, now: Timestamp, context: &mut Context) -> Phase {
    context.ask_witness(&ready.guest, Wish::Run);
    Phase::Asking(Asking { ready, asked_at: now, retry_at: None })
}

impl Asking {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::WitnessSays(ruling) => {
                let guest = &mut self.ready.guest;
                guest.standing = guest.standing.ruled(ruling).expect("the witness was asked");
                match ruling {
                    Ruling::Target => record(self.ready, now.since(self.asked_at), context),
                    Ruling::Source => {
                        let text = "the witness gave the guest back to the source";
                        discard(self.ready.guest, None, text, context)
                    }
                }
            }
            // The source has let go for good: the witness has told it that the guest is this target's.
            Event::Message(Message::Released(AtEpoch { epoch }))
                if epoch == self.ready.guest.standing.epoch() =>
            {
                self.on(now, Event::WitnessSays(Ruling::Target), context)
            }
            Event::WitnessSilent(reason) => {
                context.act(Action::Report(Progress::WitnessSilent { reason }));
                self.retry_at = Some(now + WITNESS_RETRY);
                Phase::Asking(self)
            }
            Event::Timeout if self.retry_at.is_some_and(|at| now >= at) => {
                self.retry_at = None;
                context.ask_witness(&self.ready.guest, Wish::Run);
                Phase::Asking(self)
            }
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Asking(self)
            }
            _ => Phase::Asking(self),
        }
    }
}

/// The witness has given leave, but the guest can't be recorded or started here. The leave is given back if the source is
/// there to take the guest; otherwise it is tried again, for without the source this is the only copy there may be.
///
/// ```text
///  Again --the source lives--> Withdrawing: the disk must not say any more that the guest may be started here
///    ^                              |
///    |                              v
///    '-- the source has let go -- Asking --> Discarding
/// ```
#[derive(Debug, Clone)]
pub(super) struct GivingUp {
    pub(super) ready: ReadyGuest,
    reason: String,
    step: Step,
    /// When something is tried again.
    pub(super) retry_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is waited to write the record again.
    Again,
    /// It is being recorded that the guest does not run here. A host that was started anew would go by its disk, whatever
    /// the witness says. If the source has let go meanwhile, the guest is this host's all the same.
    Withdrawing { released: bool },
    /// The witness is asked to take its leave back.
    Asking,
}

/// The record that the guest runs here could not be written.
pub(super) fn not_recorded(
    ready: ReadyGuest,
    reason: String,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    ask_for_life(context);
    Phase::GivingUp(GivingUp { ready, reason, step: Step::Again, retry_at: Some(now + RECORD_RETRY) })
}

/// It could not be started, and the source has shown that it is there to take it.
pub(super) fn not_started(ready: ReadyGuest, reason: String, context: &mut Context) -> Phase {
    GivingUp { ready, reason, step: Step::Again, retry_at: None }.withdraw(context)
}

impl GivingUp {
    /// The step in words.
    pub(super) const fn word(&self) -> &'static str {
        match self.step {
            Step::Again => "waiting to record again",
            Step::Withdrawing { .. } => "recording that it does not run",
            Step::Asking => "giving up at the witness",
        }
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        let released = matches!(&event, Event::Message(Message::Released(AtEpoch { epoch }))
            if *epoch == self.ready.guest.standing.epoch());
        let due = event == Event::Timeout && self.retry_at.is_some_and(|at| now >= at);
        match (self.step, event) {
            (Step::Again, Event::Timeout) if due => self.keep(context),
            (Step::Again, Event::Reconnected) => {
                ask_for_life(context);
                Phase::GivingUp(self)
            }
            (Step::Again, event) if shows_life(&event) => self.withdraw(context),
            // One that is being written must not be taken for the next.
            (Step::Withdrawing { .. }, _) if released => {
                self.step = Step::Withdrawing { released };
                Phase::GivingUp(self)
            }
            (Step::Withdrawing { released: true }, Event::RecordWritten { .. } | Event::RecordFailed(_)) => {
                self.keep(context)
            }
            (Step::Withdrawing { released: true }, Event::Timeout) if due => self.keep(context),
            (Step::Withdrawing { released: false }, Event::Timeout) if due => self.withdraw(context),
            (Step::Withdrawing { .. }, Event::RecordWritten { .. }) => self.ask(context),
            (Step::Withdrawing { .. }, Event::RecordFailed(_)) => {
                self.retry_at = Some(now + RECORD_RETRY);
                Phase::GivingUp(self)
            }
            (Step::Asking, Event::WitnessSays(Ruling::Source)) => self.discard(context),
            // The source has let go already: there is nobody to give it back to.
            (Step::Asking, Event::WitnessSays(Ruling::Target)) => self.keep(context),
            (Step::Asking | Step::Again, _) if released => self.keep(context),
            (Step::Asking, Event::WitnessSilent(reason)) => {
                context.act(Action::Report(Progress::WitnessSilent { reason }));
                self.retry_at = Some(now + WITNESS_RETRY);
                Phase::GivingUp(self)
            }
            (Step::Asking, Event::Timeout) if due => self.ask(context),
            _ => Phase::GivingUp(self),
        }
    }

    fn withdraw(mut self, context: &mut Context) -> Phase {
        let standing = Standing::Receiving { source: context.config.source.clone() };
        context.act(Action::WriteRecord(self.ready.guest.record(standing)));
        (self.step, self.retry_at) = (Step::Withdrawing { released: false }, None);
        Phase::GivingUp(self)
    }

    fn ask(mut self, context: &mut Context) -> Phase {
        context.ask_witness(&self.ready.guest, Wish::GiveUp);
        (self.step, self.retry_at) = (Step::Asking, None);
        Phase::GivingUp(self)
    }

    /// Records once more that the guest runs here, to start it then.
    fn keep(mut self, context: &mut Context) -> Phase {
        let guest = &mut self.ready.guest;
        guest.standing = guest.standing.keep().expect("it was to go back");
        record(self.ready, Duration::ZERO, context)
    }

    fn discard(mut self, context: &mut Context) -> Phase {
        let guest = &mut self.ready.guest;
        guest.standing = guest.standing.returned().expect("it was to go back");
        discard_over(OnDisk::PerhapsRunning, self.ready.guest, None, &self.reason, context)
    }
}

/// What this target can do.
pub(super) fn features(context: &Context) -> Features {
    let ours = Features::ours_on(context.config.carries_descriptors);
    if context.config.witness.is_some() { ours.and(Features::WITNESS) } else { ours }
}

/// Both sides have a witness or neither: what one of them asks a witness, the other must hear of.
pub(super) fn has_witness_as(hello: &Hello, context: &Context) -> Result<(), String> {
    match (hello.features.contains(Features::WITNESS), context.config.witness) {
        (true, Some(_)) | (false, None) => Ok(()),
        (true, None) => {
            Err("the source has a witness, but this target has none; start 'ferry receive' with the \
             source's --witness"
                .to_owned())
        }
        (false, Some(_)) => {
            Err("this target has a witness, but the source has none; start 'ferry receive' without \
             --witness, or the VM with it"
                .to_owned())
        }
    }
}

/// Whether the source has this target's witness.
pub(super) fn is_same(own: Option<WitnessId>, theirs: WitnessId) -> Result<(), String> {
    if own == Some(theirs) {
        return Ok(());
    }
    let own = own.map_or_else(|| "none".to_owned(), |own| own.to_string());
    Err(format!("the source has the witness {theirs}, this target {own}: give both the same --witness"))
}

pub(super) fn no_witness(reason: &str) -> String {
    format!("this target can't reach the witness that both sides have agreed on: {reason}")
}

/// What the target's part of the commit costs is measured anew.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rehearsing {
    /// The record is being written once more.
    Record,
    /// The witness is being asked for nothing; the record took so long.
    Witness(Duration),
}

impl Rehearsing {
    /// What is under way took so long: goes on with the witness, if there is one, or tells the source.
    pub(super) fn measured(self, took: Duration, context: &mut Context) -> Option<Self> {
        let record = match self {
            Self::Record if context.config.witness.is_some() => {
                context.act(Action::ProbeWitness);
                return Some(Self::Witness(took));
            }
            Self::Record => Duration::ZERO,
            Self::Witness(record) => record,
        };
        context.send(Message::Rehearsed(Rehearsed { record_us: micros(record + took) }));
        None
    }
}
