//! The commit: the one point of no return. Before the record is durable the guest is the source's, afterwards
//! only the target's `Running` or `Discarded` decides, however long that takes; or the witness, if there is one, or the
//! operator.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::ident::Epoch;
use crate::message::{AtEpoch, Message, Running};
use crate::record::Standing;
use crate::time::Timestamp;
use crate::witness::{Claim, Ruling, Wish};

use super::negotiate::hello;
use super::stop::{Digests, Standstill};
use super::undo::{give_back, undo};
use super::{Action, Context, Event, Failure, MemoryPath, Outcome, Phase, Progress, Resolution, Summary};

/// How long an answer to `Commit` may take before the connection counts as lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits between attempts to reach the target again grow to this.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(1);

const RETRY_DELAY_FIRST: Duration = Duration::from_millis(50);

const DISCARDED: &str = "the target discarded the guest instead of running it";

const TAKEN_BACK: &str = "the target did not answer the handover, and the witness gave the guest back";

const RESOLVED: &str = "the target did not answer the handover, and the operator took the guest back";

/// The commit record is being written.
#[derive(Debug, Clone)]
pub(super) struct Recording {
    standstill: Standstill,
    digests: Digests,
    /// Why the target will not get a `Commit` any more: the connection was lost meanwhile, or either side has given up.
    lost: Option<Failure>,
}

/// The record is durable; the target has been told, or is about to be.
#[derive(Debug, Clone)]
pub(super) struct Committed {
    standstill: Standstill,
    digests: Digests,
    epoch: Epoch,
    connection: Connection,
    /// How long the next attempt to connect will wait. It only grows, or a target that takes every connection and then
    /// closes it would be asked twenty times a second.
    next_delay: Duration,
    /// Whether the caller has been told that it is in doubt.
    doubted: bool,
    /// Whether the witness has been asked and has not answered.
    asking: bool,
}

#[derive(Debug, Clone, Copy)]
enum Connection {
    Up { answer_by: Timestamp },
    Down,
}

/// The target runs it; the last record is being written.
#[derive(Debug, Clone)]
pub(super) struct Releasing {
    summary: Box<Summary>,
}

/// The target never ran it; the record of the new epoch is being written.
#[derive(Debug, Clone)]
pub(super) struct Reclaiming {
    epoch: Epoch,
    failure: Failure,
}

/// The operator has said that the VM is the target's; the last record is being written.
#[derive(Debug, Clone)]
pub(super) struct LettingGo {
    epoch: Epoch,
}

pub(super) fn begin(standstill: Standstill, digests: Digests, context: &mut Context) -> Phase {
    context.standing = context.standing.commit().expect("only an owner reaches the commit");
    let epoch = context.config.epoch.next();
    let target = context.config.target.clone();
    context.act(Action::WriteRecord(context.record(epoch, Standing::Committed { target })));
    Phase::Recording(Recording { standstill, digests, lost: None })
}

impl Recording {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::RecordWritten { .. } => {
                if let Some(failure) = self.lost {
                    // No `Commit` has left this host and none will, so the target can't run what it has: the guest
                    // need not stand still until the target can be asked.
                    context.standing = context.standing.failed().expect("a commit was being recorded");
                    return undo(failure, context);
                }
                self.standstill.downtime.record = self.standstill.lap(now);
                context.standing = context.standing.recorded().expect("a commit was being recorded");
                let epoch = context.config.epoch.next();
                context.send(Message::Commit(AtEpoch { epoch }));
                let connection = Connection::Up { answer_by: now + ANSWER_TIMEOUT };
                let Self { standstill, digests, lost: _ } = self;
                let next_delay = RETRY_DELAY_FIRST;
                Phase::Committed(Committed {
                    standstill,
                    digests,
                    epoch,
                    connection,
                    next_delay,
                    doubted: false,
                    asking: false,
                })
            }
            Event::RecordFailed(reason) => {
                context.standing = context.standing.failed().expect("a commit was being recorded");
                undo(Failure::Local(format!("the commit could not be recorded: {reason}")), context)
            }
            // The record is on its way to the disk and can't be called back, so these are dealt with once it is
            // there.
            Event::Cancel => {
                self.lost.get_or_insert(Failure::Cancelled);
                Phase::Recording(self)
            }
            Event::Disconnected(reason) => {
                self.lost = Some(Failure::Link(reason));
                Phase::Recording(self)
            }
            Event::Message(Message::Abort(abort)) => {
                self.lost = Some(Failure::Refused(abort));
                Phase::Recording(self)
            }
            Event::Message(Message::Discarded(_)) => {
                self.lost.get_or_insert(Failure::Link(DISCARDED.to_owned()));
                Phase::Recording(self)
            }
            Event::Connected
            | Event::Message(_)
            | Event::StreamsOpened
            | Event::StreamFailed(_)
            | Event::DirtyLogStarted
            | Event::DirtyLogRead { .. }
            | Event::RoundSent(_)
            | Event::Paused
            | Event::StateSaved { .. }
            | Event::RecordRehearsed { .. }
            | Event::RehearsalFailed(_)
            | Event::VmFailed(_)
            | Event::VmResumed
            | Event::ResumeFailed(_)
            | Event::WitnessSays(_)
            | Event::WitnessSilent(_)
            | Event::Resolve(_)
            | Event::Timeout => Phase::Recording(self),
        }
    }
}

impl Committed {
    pub(super) const fn is_doubted(&self) -> bool {
        self.doubted
    }

    pub(super) const fn deadline(&self) -> Option<Timestamp> {
        match self.connection {
            Connection::Up { answer_by } => Some(answer_by),
            Connection::Down => None,
        }
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::Message(Message::Running(running)) => self.running(now, &running, context),
            Event::Message(Message::Discarded(AtEpoch { epoch })) => {
                self.take_back(epoch, Failure::Link(DISCARDED.to_owned()), context)
            }
            Event::WitnessSays(Ruling::Target) => self.let_target_have_it(now, context),
            Event::WitnessSays(Ruling::Source) => {
                let epoch = self.epoch;
                self.take_back(epoch, Failure::Link(TAKEN_BACK.to_owned()), context)
            }
            // It is asked again when the target does not answer again.
            Event::WitnessSilent(reason) => {
                self.asking = false;
                context.report(Progress::InDoubt { reason });
                Phase::Committed(self)
            }
            // Nothing is in doubt yet: the target is about to answer.
            Event::Resolve(_) if !self.doubted => Phase::Committed(self),
            Event::Resolve(Resolution::Resume) if context.config.witness.is_some() => {
                self.ask_witness(context);
                Phase::Committed(self)
            }
            Event::Resolve(Resolution::Resume | Resolution::ResumeAlone) => {
                // Nobody waits for what it says, but if it hears this the target gets no leave any more.
                self.ask_witness(context);
                let epoch = self.epoch;
                self.take_back(epoch, Failure::Link(RESOLVED.to_owned()), context)
            }
            Event::Resolve(Resolution::Discard) => self.let_go(context),
            Event::Connected => {
                context.send(hello(context, true));
                context.send(Message::Commit(AtEpoch { epoch: self.epoch }));
                self.connection = Connection::Up { answer_by: now + ANSWER_TIMEOUT };
                Phase::Committed(self)
            }
            Event::Disconnected(reason) => self.reconnect(reason, context),
            Event::Timeout => self.reconnect("the target does not answer".to_owned(), context),
            // A target that could not start the guest gives it back only to a source that is there.
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Committed(self)
            }
            // What it has given up it discards, and says so on this connection as soon as that is durable. If it does
            // not, the timeout asks again.
            Event::Message(Message::Abort(abort)) => {
                self.doubt(abort.sentence, context);
                Phase::Committed(self)
            }
            // Nothing else can change who owns the guest; a cancellation comes too late.
            Event::Message(_)
            | Event::StreamsOpened
            | Event::StreamFailed(_)
            | Event::DirtyLogStarted
            | Event::DirtyLogRead { .. }
            | Event::RoundSent(_)
            | Event::Paused
            | Event::StateSaved { .. }
            | Event::RecordWritten { .. }
            | Event::RecordFailed(_)
            | Event::RecordRehearsed { .. }
            | Event::RehearsalFailed(_)
            | Event::VmFailed(_)
            | Event::VmResumed
            | Event::ResumeFailed(_)
            | Event::Cancel => Phase::Committed(self),
        }
    }

    fn reconnect(mut self, reason: String, context: &mut Context) -> Phase {
        let delay = self.next_delay;
        self.next_delay = (delay * 2).min(RETRY_DELAY_MAX);
        // The target is given one chance to answer by itself: a connection that broke may be back at once.
        if self.doubted {
            self.ask_witness(context);
        }
        self.doubt(reason, context);
        context.act(Action::Connect { delay });
        self.connection = Connection::Down;
        Phase::Committed(self)
    }

    /// Asks the witness, if there is one and it is not being asked, to give the VM back.
    fn ask_witness(&mut self, context: &mut Context) {
        if context.config.witness.is_some() && !std::mem::replace(&mut self.asking, true) {
            let (vm, migration) = (context.config.vm, context.config.migration);
            let claim = Claim { vm, epoch: self.epoch, migration, wish: Wish::TakeBack };
            context.act(Action::AskWitness(claim));
        }
    }

    /// Tells the caller, once, that it is not known here who runs the guest.
    fn doubt(&mut self, reason: String, context: &mut Context) {
        if !std::mem::replace(&mut self.doubted, true) {
            context.report(Progress::InDoubt { reason });
        }
    }

    fn running(mut self, now: Timestamp, running: &Running, context: &mut Context) -> Phase {
        // An answer for another epoch is a peer's error and changes nothing.
        let Ok(standing) = context.standing.running(running.epoch) else {
            return Phase::Committed(self);
        };
        context.standing = standing;
        let downtime = &mut self.standstill.downtime;
        downtime.within_target_record = Duration::from_micros(running.record_us);
        downtime.within_run = Duration::from_micros(running.run_us);
        self.release(now, context)
    }

    /// The witness says that the target has it. What the parts of its commit took is then not known here.
    fn let_target_have_it(self, now: Timestamp, context: &mut Context) -> Phase {
        context.standing = context.standing.running(self.epoch).expect("this epoch was given away");
        self.release(now, context)
    }

    fn release(mut self, now: Timestamp, context: &mut Context) -> Phase {
        self.standstill.downtime.commit = self.standstill.lap(now);
        context.report(Progress::Handed);
        let target = context.config.target.clone();
        context.act(Action::WriteRecord(context.record(self.epoch, Standing::Released { target })));
        let summary = Box::new(Summary {
            epoch: self.epoch,
            host: context.host.clone(),
            memory: context.config.memory,
            rounds: std::mem::take(&mut context.rounds),
            reconnections: std::mem::take(&mut context.reconnections),
            downtime: self.standstill.downtime,
            forecast: self.standstill.forecast,
            total: now.since(context.started),
            verified: context.verifies() && context.config.memory == MemoryPath::Streams,
            digest: self.digests.source,
            target_digest: self.digests.target,
        });
        Phase::Releasing(Releasing { summary })
    }

    fn take_back(self, epoch: Epoch, failure: Failure, context: &mut Context) -> Phase {
        let Ok(standing) = context.standing.discarded(epoch) else {
            return Phase::Committed(self);
        };
        context.standing = standing;
        let epoch = epoch.next();
        context.act(Action::WriteRecord(context.record(epoch, Standing::Running)));
        Phase::Reclaiming(Reclaiming { epoch, failure })
    }

    fn let_go(self, context: &mut Context) -> Phase {
        context.standing = context.standing.running(self.epoch).expect("this epoch was given away");
        let target = context.config.target.clone();
        context.act(Action::WriteRecord(context.record(self.epoch, Standing::Released { target })));
        Phase::LettingGo(LettingGo { epoch: self.epoch })
    }
}

impl LettingGo {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        match event {
            // As with `Releasing`: a record that still says `Committed` only means that it is in doubt once more.
            Event::RecordWritten { .. } | Event::RecordFailed(_) => {
                context.act(Action::CloseStreams);
                context.act(Action::ReleaseVm);
                context.act(Action::Finish(Outcome::LetGo { epoch: self.epoch }));
                Phase::Finished
            }
            _ => Phase::LettingGo(self),
        }
    }
}

impl Releasing {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        match event {
            // A `Released` record that can't be written changes nothing: the guest runs at the target, and
            // `Committed` on disk only means that the target has to be asked once more after a restart.
            Event::RecordWritten { .. } | Event::RecordFailed(_) => {
                context.send(Message::Released(AtEpoch { epoch: self.summary.epoch }));
                context.act(Action::CloseStreams);
                context.act(Action::ReleaseVm);
                context.act(Action::Finish(Outcome::Moved(self.summary)));
                Phase::Finished
            }
            _ => Phase::Releasing(self),
        }
    }
}

impl Reclaiming {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        match event {
            // Owning it again is already certain: that the target never runs it is durable elsewhere.
            Event::RecordWritten { .. } | Event::RecordFailed(_) => {
                give_back(self.failure, self.epoch, context)
            }
            _ => Phase::Reclaiming(self),
        }
    }
}
