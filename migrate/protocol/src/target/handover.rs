//! From `Prepared` to `Running`, or to `Discarded`.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::ident::Epoch;
use crate::message::{AbortCode, AtEpoch, Message, NetworkIdentity, Running as RunningMessage};
use crate::record::Standing;
use crate::time::Timestamp;

use super::receive::{Receiving, micros};
use super::{
    Action, Context, Event, Guest, Outcome, PREPARED_WAIT_MAX, Phase, Progress, RECORD_RETRY, start,
};
use super::{interrupted, witness};

/// How long a source that is connected may leave a guest that is prepared: longer than any of its own standstills. One that
/// hangs would keep the memory for ever.
const PREPARED_MAX: Duration = Duration::from_secs(15 * 60);

/// A guest that could run here.
#[derive(Debug, Clone)]
pub(super) struct ReadyGuest {
    pub(super) guest: Guest,
    pub(super) network: NetworkIdentity,
    pub(super) runs: bool,
    pub(super) digest: MemoryDigest,
}

/// Everything is here; the source decides.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) receiving: Box<Receiving>,
    network: NetworkIdentity,
    runs: bool,
    /// What the streams brought since the source was last told, once they have ended, and the digest of memory then.
    ended: Option<(PageBitmap, MemoryDigest)>,
    /// Sooner while the connection is lost.
    pub(super) discard_at: Timestamp,
    /// The connection is lost.
    lost: bool,
}

pub(super) fn prepared(
    receiving: Box<Receiving>,
    network: NetworkIdentity,
    runs: bool,
    now: Timestamp,
) -> Phase {
    let discard_at = now + PREPARED_MAX;
    Phase::Prepared(Prepared { receiving, network, runs, ended: None, discard_at, lost: false })
}

impl Prepared {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::Message(Message::Commit(AtEpoch { epoch })) => self.committed(epoch, now, context),
            // The source has not committed, or it would not give up: this word alone allows discarding at once.
            Event::Message(Message::Abort(abort)) => {
                discard(self.receiving.guest, None, &abort.sentence, context)
            }
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Prepared(self)
            }
            // It has lost the link before it heard that all is prepared, so it has not committed: the guest runs there, and
            // the state that was restored here is of the past. One that was overtaken by a newer connection says nothing of
            // that: by now the source may have committed.
            Event::Message(Message::Resume(resume)) if self.receiving.is_next(&resume) => {
                interrupted::taken_back(self.receiving, self.ended, resume, now, context)
            }
            Event::StreamsEnded { arrived, digest } => {
                self.ended = Some((arrived, digest));
                Phase::Prepared(self)
            }
            // It may have committed. Waiting a while costs nothing; discarding afterwards is safe, because a
            // source that did commit is answered `Discarded` and takes the guest back.
            Event::Disconnected(_) => {
                if !std::mem::replace(&mut self.lost, true) {
                    context.act(Action::Report(Progress::InDoubt));
                    self.discard_at = now + PREPARED_WAIT_MAX;
                }
                Phase::Prepared(self)
            }
            Event::Reconnected => {
                (self.lost, self.discard_at) = (false, now + PREPARED_MAX);
                Phase::Prepared(self)
            }
            Event::Timeout if now >= self.discard_at => {
                let (code, text) = if self.lost {
                    (None, "the source did not come back after the guest was prepared")
                } else {
                    (Some(AbortCode::Timeout), "the source has not said what becomes of the prepared guest")
                };
                discard(self.receiving.guest, code, text, context)
            }
            Event::Cancel => {
                let text = "the target was told to give up";
                discard(self.receiving.guest, Some(AbortCode::Cancelled), text, context)
            }
            _ => Phase::Prepared(self),
        }
    }

    fn committed(self, epoch: Epoch, now: Timestamp, context: &mut Context) -> Phase {
        let standing = self.receiving.guest.standing;
        let asks = context.config.witness.is_some();
        let next = if asks { standing.ask(epoch) } else { standing.commit(epoch) };
        // A commit for another epoch is a peer's error and changes nothing.
        let Ok(standing) = next else { return Phase::Prepared(self) };
        let Self { receiving, network, runs, ended: _, discard_at: _, lost: _ } = self;
        let digest = receiving.digest();
        let ready = ReadyGuest { guest: Guest { standing, ..receiving.guest }, network, runs, digest };
        if asks { witness::ask(ready, now, context) } else { record(ready, Duration::ZERO, context) }
    }
}

/// Begins to record that the guest runs here. Asking the witness for leave has taken `asked`.
pub(super) fn record(ready: ReadyGuest, asked: Duration, context: &mut Context) -> Phase {
    context.act(Action::WriteRecord(ready.guest.record(Standing::Running)));
    Phase::Recording(Recording { ready, asked })
}

/// `Commit` came; the record that the guest runs here is being written.
#[derive(Debug, Clone)]
pub(super) struct Recording {
    pub(super) ready: ReadyGuest,
    asked: Duration,
}

impl Recording {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        let guest = &mut self.ready.guest;
        match event {
            Event::RecordWritten { took } => {
                guest.standing = guest.standing.recorded().expect("it was being recorded");
                start::begin(self.ready, self.asked + took, context)
            }
            Event::RecordFailed(reason) => {
                let text = format!("the target could not record that it runs the guest: {reason}");
                if context.config.witness.is_some() {
                    guest.standing = guest.standing.withheld().expect("it was being recorded");
                    return witness::not_recorded(self.ready, text, now, context);
                }
                guest.standing = guest.standing.failed().expect("it was being recorded");
                discard_over(OnDisk::PerhapsRunning, self.ready.guest, None, &text, context)
            }
            // Until the disk has answered nothing else can be decided. A repeated `Commit` is answered by
            // `Running`, a lost connection by the source's return.
            _ => Phase::Recording(self),
        }
    }
}

/// The guest runs here; the source may not know it yet. It is answered for as long as it may come back to ask: until it
/// confirms that it has let go, or this process ends.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub(super) guest: Guest,
    digest: MemoryDigest,
    said: RunningMessage,
}

/// The guest runs here, or is here to stay: the source is told. The record took `record` and starting it `took`.
pub(super) fn tell(ready: ReadyGuest, record: Duration, took: Duration, context: &mut Context) -> Phase {
    let ReadyGuest { guest, digest, .. } = ready;
    let said =
        RunningMessage { epoch: guest.standing.epoch(), record_us: micros(record), run_us: micros(took) };
    context.send(Message::Running(said.clone()));
    Phase::Running(Running { guest, digest, said })
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
#[derive(Debug, Clone)]
pub(super) struct Discarding {
    guest: Guest,
    reason: String,
    /// What the disk may hold until then.
    on_disk: OnDisk,
    /// Set while it is waited before writing again.
    pub(super) retry_at: Option<Timestamp>,
}

/// What this host's disk may say of a guest that it gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDisk {
    /// `Receiving`, which allows running as little as `Discarded` does.
    Receiving,
    /// Perhaps `Running`, because writing that has failed half-way. The source must not be answered from it.
    PerhapsRunning,
}

/// Gives up a migration that has been recorded here, telling the source `code` if it is to be told.
pub(super) fn discard(guest: Guest, code: Option<AbortCode>, reason: &str, context: &mut Context) -> Phase {
    discard_over(OnDisk::Receiving, guest, code, reason, context)
}

/// The same, where the disk may hold more.
pub(super) fn discard_over(
    on_disk: OnDisk,
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
    Phase::Discarding(Discarding { guest, reason: reason.to_owned(), on_disk, retry_at: None })
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
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::RecordWritten { .. } => {
                let epoch = self.guest.standing.epoch();
                context.send(Message::Discarded(AtEpoch { epoch }));
                context.act(Action::Finish(Outcome::Discarded { reason: self.reason }));
                Phase::Finished
            }
            // A later attempt, or this process after a restart, would answer the source that the guest runs here, and the
            // source would let go of the only copy. So nothing ends before the disk says what is true.
            Event::RecordFailed(_) if self.on_disk == OnDisk::PerhapsRunning => {
                self.retry_at = Some(now + RECORD_RETRY);
                Phase::Discarding(self)
            }
            Event::Timeout if self.retry_at.is_some_and(|at| now >= at) => {
                self.retry_at = None;
                context.act(Action::WriteRecord(self.guest.record(Standing::Discarded)));
                Phase::Discarding(self)
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
