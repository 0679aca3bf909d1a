//! From `Prepared` to `Running`, or to `Discarded`.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::digest::MemoryDigest;
use crate::message::{AbortCode, AtEpoch, Message, NetworkIdentity, Running as RunningMessage};
use crate::record::Standing;
use crate::time::Timestamp;

use super::receive::micros;
use super::{Action, Context, Event, Guest, Outcome, PREPARED_WAIT_MAX, Phase, Progress, RELEASE_WAIT_MAX};

/// Everything is here; the source decides.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) guest: Guest,
    network: NetworkIdentity,
    runs: bool,
    digest: MemoryDigest,
    /// Set while the connection is lost.
    pub(super) discard_at: Option<Timestamp>,
}

pub(super) fn prepared(guest: Guest, network: NetworkIdentity, runs: bool, digest: MemoryDigest) -> Phase {
    Phase::Prepared(Prepared { guest, network, runs, digest, discard_at: None })
}

impl Prepared {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::Message(Message::Commit(AtEpoch { epoch })) => {
                // A commit for another epoch is a peer's error and changes nothing.
                let Ok(standing) = self.guest.standing.commit(epoch) else {
                    return Phase::Prepared(self);
                };
                self.guest.standing = standing;
                context.act(Action::WriteRecord(self.guest.record(Standing::Running)));
                let Self { guest, network, runs, digest, .. } = self;
                Phase::Recording(Recording { guest, network, runs, digest })
            }
            // The source has not committed, or it would not give up: this word alone allows discarding at once.
            Event::Message(Message::Abort(abort)) => discard(self.guest, None, &abort.sentence, context),
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Prepared(self)
            }
            // It has lost the link before it heard that all is prepared, so it has not committed. The state is restored
            // here and can't be taken back, so this attempt is over.
            Event::Message(Message::Resume(_)) => {
                let text =
                    "the guest's state was restored here already when the link broke; migrate it again";
                discard(self.guest, Some(AbortCode::Internal), text, context)
            }
            // It may have committed. Waiting a while costs nothing; discarding afterwards is safe, because a
            // source that did commit is answered `Discarded` and takes the guest back.
            Event::Disconnected(_) => {
                if self.discard_at.is_none() {
                    context.act(Action::Report(Progress::InDoubt));
                    self.discard_at = Some(now + PREPARED_WAIT_MAX);
                }
                Phase::Prepared(self)
            }
            Event::Reconnected => {
                self.discard_at = None;
                Phase::Prepared(self)
            }
            Event::Timeout if self.discard_at.is_some_and(|at| now >= at) => {
                let text = "the source did not come back after the guest was prepared";
                discard(self.guest, None, text, context)
            }
            Event::Cancel => {
                let text = "the target was told to give up";
                discard(self.guest, Some(AbortCode::Cancelled), text, context)
            }
            _ => Phase::Prepared(self),
        }
    }
}

/// `Commit` came; the record that the guest runs here is being written.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) guest: Guest,
    network: NetworkIdentity,
    runs: bool,
    digest: MemoryDigest,
}

impl Recording {
    pub(super) fn on(mut self, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::RecordWritten { took } => {
                self.guest.standing = self.guest.standing.recorded().expect("it was being recorded");
                context.act(Action::RunVm { runs: self.runs });
                let Self { guest, network, digest, .. } = self;
                Phase::Starting(Starting { guest, network, digest, record: took, failed: None })
            }
            Event::RecordFailed(reason) => {
                self.guest.standing = self.guest.standing.failed().expect("it was being recorded");
                let text = format!("the target could not record that it runs the guest: {reason}");
                discard(self.guest, None, &text, context)
            }
            // Until the disk has answered nothing else can be decided. A repeated `Commit` is answered by
            // `Running`, a lost connection by the source's return.
            _ => Phase::Recording(self),
        }
    }
}

/// The record is durable; the guest is being started.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) guest: Guest,
    network: NetworkIdentity,
    digest: MemoryDigest,
    record: Duration,
    /// Why the guest could not be started, while it is recorded that it never runs here.
    failed: Option<String>,
}

impl Starting {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(reason) = self.failed.take() {
            return self.on_not_started(reason, now, event, context);
        }
        match event {
            Event::VmRunning { took } => {
                context.act(Action::Announce(self.network.clone()));
                context.act(Action::Report(Progress::Running));
                self.tell(took, now, context)
            }
            // What has run here can't go back. The machine is kept for the operator, and the source is told the truth:
            // the guest is here.
            Event::RunBroke(reason) => {
                context.act(Action::Report(Progress::CannotRun { reason }));
                self.tell(Duration::ZERO, now, context)
            }
            // No instruction of it has run and the source still has all of it, so it can go back; but only once it is
            // durable that it never runs here.
            Event::RunFailed(reason) => {
                context.act(Action::WriteRecord(self.guest.record(Standing::Discarded)));
                self.failed = Some(reason);
                Phase::Starting(self)
            }
            _ => Phase::Starting(self),
        }
    }

    fn on_not_started(
        mut self,
        reason: String,
        now: Timestamp,
        event: Event,
        context: &mut Context,
    ) -> Phase {
        match event {
            Event::RecordWritten { .. } => {
                let standing = self.guest.standing.not_started().expect("it was to run");
                context.act(Action::DiscardMachine);
                context.send(Message::Discarded(AtEpoch { epoch: standing.epoch() }));
                let reason = format!("the target could not start the guest: {reason}");
                context.act(Action::Finish(Outcome::Discarded { reason }));
                Phase::Finished
            }
            // The guest is still this host's by both records, so it can't go back. Its machine is kept, stopped, for
            // the operator, and the source is told the truth: the guest is here.
            Event::RecordFailed(_) => {
                context.act(Action::Report(Progress::CannotRun { reason }));
                self.tell(Duration::ZERO, now, context)
            }
            _ => {
                self.failed = Some(reason);
                Phase::Starting(self)
            }
        }
    }

    fn tell(self, took: Duration, now: Timestamp, context: &mut Context) -> Phase {
        let Self { guest, network: _, digest, record, failed: _ } = self;
        let said =
            RunningMessage { epoch: guest.standing.epoch(), record_us: micros(record), run_us: micros(took) };
        context.send(Message::Running(said.clone()));
        Phase::Running(Running { guest, digest, said, deadline: now + RELEASE_WAIT_MAX })
    }
}

/// The guest runs here; the source may not know it yet.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) guest: Guest,
    digest: MemoryDigest,
    said: RunningMessage,
    pub(super) deadline: Timestamp,
}

impl Running {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        let released = match event {
            Event::Message(Message::Commit(AtEpoch { epoch })) => {
                if epoch == self.said.epoch {
                    context.send(Message::Running(self.said.clone()));
                }
                false
            }
            Event::Message(Message::Released(AtEpoch { epoch })) => epoch == self.said.epoch,
            Event::Timeout => true,
            _ => false,
        };
        if !released {
            return Phase::Running(self);
        }
        let Guest { vm, name, standing, .. } = self.guest;
        let outcome = Outcome::Running { vm, name, epoch: standing.epoch(), digest: self.digest };
        context.act(Action::Finish(outcome));
        Phase::Finished
    }
}

/// The record that this epoch never runs here is being written.
#[derive(Debug)]
pub(super) struct Discarding {
    guest: Guest,
    reason: String,
}

/// Gives up a migration that has been recorded here, telling the source `code` if it is to be told.
pub(super) fn discard(
    mut guest: Guest,
    code: Option<AbortCode>,
    reason: &str,
    context: &mut Context,
) -> Phase {
    guest.standing = guest.standing.discard().expect("only what was not recorded as running is discarded");
    if let Some(code) = code {
        context.abort(code, reason);
    }
    context.act(Action::DiscardMachine);
    context.act(Action::WriteRecord(guest.record(Standing::Discarded)));
    Phase::Discarding(Discarding { guest, reason: reason.to_owned() })
}

/// Gives up a migration of which nothing has been recorded.
pub(super) fn refuse(code: Option<AbortCode>, reason: &str, context: &mut Context) -> Phase {
    if let Some(code) = code {
        context.abort(code, reason);
    }
    context.act(Action::Finish(Outcome::Discarded { reason: reason.to_owned() }));
    Phase::Finished
}

impl Discarding {
    pub(super) fn on(self, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::RecordWritten { .. } => {
                let epoch = self.guest.standing.epoch();
                context.send(Message::Discarded(AtEpoch { epoch }));
                context.act(Action::Finish(Outcome::Discarded { reason: self.reason }));
                Phase::Finished
            }
            // Without a durable record `Discarded` must not be said; the old record says `Receiving`, which
            // never runs either, but a source that committed stays in doubt until this host can write again.
            Event::RecordFailed(failure) => {
                let reason = format!("{}; and recording that failed: {failure}", self.reason);
                context.act(Action::Finish(Outcome::Discarded { reason }));
                Phase::Finished
            }
            _ => Phase::Discarding(self),
        }
    }
}
