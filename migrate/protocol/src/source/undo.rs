//! What happens when an attempt fails before the commit: streams closed, dirty log off, the guest as it was
//! before, the target told. It ends in [`Outcome::Stayed`].

use crate::handover::SourceStanding;
use crate::ident::Epoch;
use crate::message::Message;
use crate::record::Standing;

use super::{Action, Context, Event, Failure, Outcome, Phase, Progress};

#[derive(Debug, Clone)]
pub(super) struct Undoing {
    failure: Failure,
    epoch: Epoch,
}

/// Gives up an attempt whose commit is not durable.
pub(super) fn undo(failure: Failure, context: &mut Context) -> Phase {
    if let Some(abort) = failure.abort() {
        context.send(Message::Abort(abort));
    }
    let epoch = match context.standing {
        SourceStanding::Owner(epoch) => epoch,
        SourceStanding::Committing(_) | SourceStanding::Committed(_) | SourceStanding::Released(_) => {
            unreachable!("an attempt is only undone by the owner")
        }
    };
    if epoch != context.config.epoch {
        // A commit record may have reached the disk before writing it failed.
        context.act(Action::WriteRecord(context.record(epoch, Standing::Running)));
    }
    give_back(failure, epoch, context)
}

/// Makes the guest what it was before the attempt, in `epoch`.
pub(super) fn give_back(failure: Failure, epoch: Epoch, context: &mut Context) -> Phase {
    context.report(Progress::Undoing { failure: failure.clone() });
    context.act(Action::CloseStreams);
    // Resuming comes first: the guest's standstill is worth more than a tidy log.
    context.act(Action::ResumeVm);
    if context.logging {
        context.act(Action::StopDirtyLog);
    }
    Phase::Undoing(Undoing { failure, epoch })
}

impl Undoing {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::VmResumed => {
                context.act(Action::Finish(Outcome::Stayed { failure: self.failure, epoch: self.epoch }));
                Phase::Finished
            }
            // Nothing more can be done here than to say so.
            Event::ResumeFailed(reason) => {
                let failure = Failure::Local(format!("{}; then {reason}", self.failure));
                context.act(Action::Finish(Outcome::Stayed { failure, epoch: self.epoch }));
                Phase::Finished
            }
            // The late ends of what was under way.
            Event::Connected
            | Event::Disconnected(_)
            | Event::Message(_)
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
            | Event::Cancel
            | Event::WitnessSays(_)
            | Event::WitnessSilent(_)
            | Event::Resolve(_)
            | Event::Timeout => Phase::Undoing(self),
        }
    }
}
