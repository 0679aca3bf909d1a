//! Stop-and-copy: the guest stands still from here to the commit, and every step is timed.
//!
//! ```text
//!  Pausing --Paused--> ReadingLog --DirtyLogRead--> Copying --RoundSent and StateSaved--> Preparing
//! ```
//!
//! Memory that was handed over has no log and no last pages: Pausing --Paused--> Copying, and only the state is sent.
//!
//! Saving the state runs beside sending the last pages. A failure still ends with the guest running here.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::message::{AtEpoch, Message, Prepare, Prepared, State};
use crate::policy::Forecast;
use crate::time::Timestamp;

use super::negotiate::stay_or_undo;
use super::reconnect::{self, Left, Log};
use super::undo::undo;
use super::{Action, Context, Downtime, Event, Failure, Phase, Progress, RoundReport, RoundSent};
use super::{MemoryPath, STANDSTILL_FORCED_MAX, commit, interruption, standstill_max};

/// What is known of the standstill so far.
#[derive(Debug, Clone)]
pub(super) struct Standstill {
    pub(super) began: Timestamp,
    /// When the part that is under way began.
    pub(super) part_began: Timestamp,
    pub(super) deadline: Timestamp,
    pub(super) downtime: Downtime,
    pub(super) forecast: Forecast,
}

impl Standstill {
    /// Ends the part under way and gives its length.
    pub(super) fn lap(&mut self, now: Timestamp) -> Duration {
        let took = now.since(self.part_began);
        self.part_began = now;
        took
    }
}

#[derive(Debug, Clone)]
pub(super) struct Stopping {
    standstill: Standstill,
    step: Step,
}

#[derive(Debug, Clone)]
enum Step {
    /// With the pages that are left, unless the target has the memory itself.
    Pausing {
        carried: Option<PageBitmap>,
    },
    ReadingLog {
        carried: PageBitmap,
    },
    Copying(Copying),
}

#[derive(Debug, Clone)]
struct Copying {
    started: Timestamp,
    pages: PageBitmap,
    sent: Option<RoundSent>,
    state_sent: bool,
}

/// Stops the guest whose pages `carried` are left to send.
pub(super) fn begin(
    carried: PageBitmap,
    forecast: Forecast,
    forced: bool,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    pause(Some(carried), forecast, forced, now, context)
}

/// Stops the guest whose memory the target has mapped.
pub(super) fn begin_handed_over(
    forecast: Forecast,
    forced: bool,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    pause(None, forecast, forced, now, context)
}

fn pause(
    carried: Option<PageBitmap>,
    forecast: Forecast,
    forced: bool,
    now: Timestamp,
    context: &mut Context,
) -> Phase {
    let allowed = if forced { STANDSTILL_FORCED_MAX } else { standstill_max(context.config.downtime_budget) };
    context.report(Progress::Stopping {
        pages: carried.as_ref().map_or(0, PageBitmap::count),
        forecast,
        forced,
    });
    context.act(Action::PauseVm);
    let standstill = Standstill {
        began: now,
        part_began: now,
        deadline: now + allowed,
        downtime: Downtime::default(),
        forecast,
    };
    Phase::Stopping(Stopping { standstill, step: Step::Pausing { carried } })
}

impl Stopping {
    pub(super) const fn deadline(&self) -> Timestamp {
        self.standstill.deadline
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return reconnect::begin((failure, &event), self.left(context), now, context);
        }
        match (self.step, event) {
            (Step::Pausing { carried }, Event::Paused) => {
                self.standstill.downtime.pause = self.standstill.lap(now);
                context.report(Progress::Paused);
                context.send(Message::Stopping(AtEpoch { epoch: context.config.epoch }));
                self.step = if let Some(carried) = carried {
                    context.act(Action::ReadDirtyLog);
                    Step::ReadingLog { carried }
                } else {
                    context.act(Action::SaveState);
                    let sent = Some(RoundSent::default());
                    let pages = PageBitmap::empty(context.layout.page_count());
                    Step::Copying(Copying { started: now, pages, sent, state_sent: false })
                };
                Phase::Stopping(self)
            }
            (Step::ReadingLog { mut carried }, Event::DirtyLogRead { pages, .. }) => {
                self.standstill.downtime.dirty_log = self.standstill.lap(now);
                carried.union(&pages);
                let fence = context.next_fence();
                context.act(Action::SendPages {
                    pages: carried.clone(),
                    fence,
                    paused: true,
                    first: context.reached == 0,
                    whole: context.verifies_whole(),
                });
                context.act(Action::SaveState);
                self.step =
                    Step::Copying(Copying { started: now, pages: carried, sent: None, state_sent: false });
                Phase::Stopping(self)
            }
            (Step::Copying(copying), Event::RoundSent(sent)) if copying.sent.is_none() => {
                self.step = Step::Copying(Copying { sent: Some(sent), ..copying });
                self.copy_complete(now, context)
            }
            (Step::Copying(copying), Event::StateSaved { state, network, runs, took })
                if !copying.state_sent =>
            {
                self.standstill.downtime.within_save = took;
                self.step = Step::Copying(Copying { state_sent: true, ..copying });
                context.send(Message::State(State { state, network, runs }));
                self.copy_complete(now, context)
            }
            (_, Event::Timeout) => undo(too_long(now.since(self.standstill.began)), context),
            (step, other) => {
                self.step = step;
                // Answers to what pre-copy asked may still be under way.
                if matches!(&other, Event::Message(message) if message.is_late_measurement()) {
                    return Phase::Stopping(self);
                }
                stay_or_undo(&other, "stop-and-copy", Phase::Stopping(self), context)
            }
        }
    }

    fn copy_complete(mut self, now: Timestamp, context: &mut Context) -> Phase {
        let Step::Copying(Copying { started, pages, sent: Some(sent), state_sent: true }) = self.step else {
            return Phase::Stopping(self);
        };
        if context.verifies_whole() {
            match sent.whole_digest {
                Some(whole) if whole == sent.digest => {}
                Some(whole) => return undo(log_broken(whole, sent.digest), context),
                None => return undo(Failure::Local(NOT_CHECKED.to_owned()), context),
            }
        }
        let dirty_pages = pages.count();
        self.standstill.downtime.copy = self.standstill.lap(now);
        match context.config.memory {
            MemoryPath::Streams => {
                let report = RoundReport {
                    round: context.fence,
                    dirty_pages,
                    sent,
                    took: now.since(started),
                    dirtied_per_s: None,
                    forecast: None,
                };
                context.rounds.push(report);
                context.report(Progress::RoundDone(report));
            }
            MemoryPath::HandedOver => {}
        }
        context.send(Message::Prepare(Prepare {
            epoch: context.config.epoch.next(),
            fence: context.fence,
            digest: sent.digest,
        }));
        Phase::Preparing(Preparing { standstill: self.standstill, pages, sent })
    }

    /// What is left to do, should the link have broken now.
    fn left(self, context: &Context) -> Left {
        let none = || PageBitmap::empty(context.layout.page_count());
        let (round, dirty, log) = match self.step {
            Step::Pausing { carried } => (None, carried.unwrap_or_else(none), Log::On),
            Step::ReadingLog { carried } => (None, carried, Log::Reading),
            Step::Copying(Copying { pages, .. }) => (Some(pages), none(), Log::On),
        };
        Left { round, dirty, log, paused: true }
    }
}

/// What each side has named.
#[derive(Debug, Clone, Copy)]
pub(super) struct Digests {
    pub(super) source: MemoryDigest,
    pub(super) target: MemoryDigest,
}

/// `Prepare` is sent.
#[derive(Debug, Clone)]
pub(super) struct Preparing {
    standstill: Standstill,
    /// The pages of the last round.
    pages: PageBitmap,
    sent: RoundSent,
}

impl Preparing {
    pub(super) const fn deadline(&self) -> Timestamp {
        self.standstill.deadline
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            let dirty = PageBitmap::empty(context.layout.page_count());
            let left = Left { round: Some(self.pages), dirty, log: Log::On, paused: true };
            return reconnect::begin((failure, &event), left, now, context);
        }
        match event {
            Event::Message(Message::Prepared(prepared)) => {
                self.standstill.downtime.prepare = self.standstill.lap(now);
                self.standstill.downtime.within_wait = Duration::from_micros(prepared.wait_us);
                self.standstill.downtime.within_restore = Duration::from_micros(prepared.restore_us);
                if let Err(failure) = self.check(&prepared, context) {
                    return undo(failure, context);
                }
                let digests = Digests { source: self.sent.digest, target: prepared.digest };
                commit::begin(self.standstill, digests, context)
            }
            // The last fence is answered by `Prepared`; an earlier one may still be under way.
            Event::Message(message) if message.is_late_measurement() => Phase::Preparing(self),
            Event::Timeout => undo(too_long(now.since(self.standstill.began)), context),
            other => stay_or_undo(&other, "preparing", Phase::Preparing(self), context),
        }
    }

    fn check(&self, prepared: &Prepared, context: &Context) -> Result<(), Failure> {
        let epoch = context.config.epoch.next();
        if prepared.epoch != epoch {
            let text = format!("it prepared epoch {} where epoch {epoch} was asked for", prepared.epoch);
            return Err(Failure::Protocol(text));
        }
        if prepared.digest != self.sent.digest {
            let text = format!(
                "the target's memory differs from the guest's (digest {} there, {} here); \
                 please report this with both sides' logs",
                prepared.digest, self.sent.digest
            );
            return Err(Failure::Protocol(text));
        }
        Ok(())
    }
}

const NOT_CHECKED: &str =
    "all of memory was to be read once more (--verify full), and that could not be done; the log says why";

/// Memory is not what was sent of it: a page was written that no log has named.
fn log_broken(whole: MemoryDigest, sent: MemoryDigest) -> Failure {
    let text = format!(
        "memory holds other bytes than what was sent of it (digest {whole} now, {sent} as sent): the dirty log has missed \
         a page, so the guest can't be moved; please report this with the host's kernel version"
    );
    Failure::Local(text)
}

fn too_long(standstill: Duration) -> Failure {
    let text = format!(
        "the guest stood still for {} ms without being handed over, far beyond its budget, so it goes on here",
        standstill.as_millis()
    );
    Failure::Timeout(text)
}
