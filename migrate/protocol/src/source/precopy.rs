//! Pre-copy: rounds of reading the dirty log and sending what it names, until stopping the guest fits the
//! downtime budget.
//!
//! ```text
//!  Rehearsing --RecordRehearsed--> Starting
//!
//!  Starting --DirtyLogStarted--> Reading --DirtyLogRead--> decide --> Sending --RoundSent, FenceReached--.
//!                                   ^                        |                                          |
//!                                   |                        '--> Stopping (stop.rs)                    |
//!                                   '------------------- Resting (short rounds) <----------------------'
//! ```
//!
//! Where the link breaks, `reconnect.rs` takes over and comes back to Reading with the pages that the target lacks.
//!
//! The rehearsal writes the record that stands already once more: it measures what the commit's record will cost
//! within the downtime, and finds a full disk while that costs nothing. Round trip, dirty log and both sides' records
//! are measured again in the rounds, the records at most once in each ([`is_rehearsal_due`]): one slow measurement
//! must not stand in the way of stopping for ever.

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::liveness::Liveness;
use crate::message::{FenceReached, Message, Rehearse, Rehearsed};
use crate::negotiation::Features;
use crate::policy::{Decision, Forecast, decide, is_rehearsal_due};
use crate::record::Standing;
use crate::time::Timestamp;

use super::negotiate::stay_or_undo;
use super::reconnect::{self, Left, Log};
use super::undo::undo;
use super::{Action, Context, Event, Failure, OnTimeout, Phase, Progress, RoundReport, RoundSent};
use super::{interruption, stop};

/// The shortest time between two rounds: when the budget can't be met although little is dirty, more rounds
/// a second would only burn CPU.
const ROUND_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// What that time grows to, by a quarter a round, while the fixed costs alone don't fit the budget: then no round can
/// help, only better measurements of them.
const ROUND_INTERVAL_MAX: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub(super) struct PreCopy {
    step: Step,
    /// When the last dirty log was read: pages dirtied since make the dirty rate.
    log_read_at: Timestamp,
    /// The smallest downtime that was forecast, for the error message.
    best_forecast: Option<Duration>,
    /// The token and time of the last `Ping`, until it is answered.
    ping: Option<(u64, Timestamp)>,
    /// Whether this host's record is being written once more.
    rehearsing: bool,
    /// Whether the target's is.
    target_rehearsing: bool,
    /// The shortest time between two rounds now.
    interval: Duration,
}

#[derive(Debug, Clone)]
enum Step {
    Rehearsing,
    Starting,
    /// The log is being read.
    Reading(Behind),
    Sending {
        started: Timestamp,
        pages: PageBitmap,
        fence: u32,
        sent: Option<RoundSent>,
        fence_reached: bool,
    },
    Resting {
        until: Timestamp,
        last: Arrived,
    },
}

/// What stands behind the log that is being read.
#[derive(Debug, Clone)]
enum Behind {
    /// A round that has just arrived.
    Round(Arrived),
    /// These pages are to be sent, whatever the log says: at the start, and after the link broke.
    Pages(PageBitmap),
}

#[derive(Debug, Clone, Copy)]
struct Arrived {
    dirty_pages: u64,
    sent: RoundSent,
    took: Duration,
}

pub(super) fn begin(context: &mut Context, now: Timestamp) -> Phase {
    let mut phase = PreCopy::new(Step::Rehearsing, now);
    phase.rehearse(context);
    Phase::PreCopy(phase)
}

/// Goes on after the link broke: `lacking` and what the log names meanwhile are the next round.
pub(super) fn go_on(lacking: PageBitmap, logging: bool, now: Timestamp, context: &mut Context) -> Phase {
    context.liveness = context.liveness.map(|_| Liveness::new(now));
    if !logging {
        return begin(context, now);
    }
    context.act(Action::ReadDirtyLog);
    Phase::PreCopy(PreCopy::new(Step::Reading(Behind::Pages(lacking)), now))
}

impl PreCopy {
    const fn new(step: Step, now: Timestamp) -> Self {
        Self {
            step,
            log_read_at: now,
            best_forecast: None,
            ping: None,
            rehearsing: false,
            target_rehearsing: false,
            interval: ROUND_INTERVAL_MIN,
        }
    }

    /// When this phase wants to be woken. With [`OnTimeout::Stop`] the end of the round under way is awaited
    /// even where the time is over: a wake-up at the deadline would find nothing to do and be due again at once.
    pub(super) fn wake(&self, context: &Context) -> Option<Timestamp> {
        match (&self.step, context.config.on_timeout) {
            (Step::Resting { until, .. }, _) => Some((*until).min(context.deadline())),
            (_, OnTimeout::Cancel) => Some(context.deadline()),
            (_, OnTimeout::Stop) => None,
        }
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return reconnect::begin((failure, &event), self.left(context), now, context);
        }
        if now >= context.deadline() && context.config.on_timeout == OnTimeout::Cancel {
            return undo(self.not_converged(context), context);
        }
        self.measure(now, &event, context);
        match (std::mem::replace(&mut self.step, Step::Starting), event) {
            (Step::Rehearsing, Event::RecordRehearsed { .. }) => {
                context.act(Action::StartDirtyLog);
                context.logging = true;
                self.step = Step::Starting;
                Phase::PreCopy(self)
            }
            (Step::Starting, Event::DirtyLogStarted) => {
                context.act(Action::ReadDirtyLog);
                // The target has nothing yet.
                self.step = Step::Reading(Behind::Pages(PageBitmap::full(context.layout.page_count())));
                Phase::PreCopy(self)
            }
            (Step::Reading(Behind::Pages(mut lacking)), Event::DirtyLogRead { pages, .. }) => {
                self.log_read_at = now;
                lacking.union(&pages);
                self.send_round(lacking, now, context)
            }
            (Step::Reading(Behind::Round(last)), Event::DirtyLogRead { pages, .. }) => {
                self.after_round(last, pages, now, context)
            }
            (Step::Resting { last, .. }, Event::Timeout) => {
                context.act(Action::ReadDirtyLog);
                self.step = Step::Reading(Behind::Round(last));
                Phase::PreCopy(self)
            }
            (Step::Sending { started, pages, fence, sent: None, fence_reached }, Event::RoundSent(sent)) => {
                self.step = Step::Sending { started, pages, fence, sent: Some(sent), fence_reached };
                self.round_complete(now, context)
            }
            (
                Step::Sending { started, pages, fence, sent, fence_reached: false },
                Event::Message(Message::FenceReached(FenceReached { fence: reached })),
            ) if reached == fence => {
                context.reached = fence;
                self.step = Step::Sending { started, pages, fence, sent, fence_reached: true };
                self.round_complete(now, context)
            }
            // They have been measured.
            (step, Event::Message(Message::Pong(_) | Message::Rehearsed(_))) => {
                self.step = step;
                Phase::PreCopy(self)
            }
            (step, other) => {
                self.step = step;
                stay_or_undo(&other, "pre-copy", Phase::PreCopy(self), context)
            }
        }
    }

    /// What is left to do, should the link have broken now.
    fn left(self, context: &Context) -> Left {
        let none = PageBitmap::empty(context.layout.page_count());
        let full = || PageBitmap::full(context.layout.page_count());
        let (round, dirty, log) = match self.step {
            Step::Rehearsing => (None, full(), Log::Off),
            Step::Starting => (None, full(), Log::Starting),
            Step::Reading(Behind::Pages(pages)) => (None, pages, Log::Reading),
            Step::Reading(Behind::Round(_)) => (None, none, Log::Reading),
            Step::Sending { fence_reached: true, .. } | Step::Resting { .. } => (None, none, Log::On),
            Step::Sending { pages, fence_reached: false, .. } => (Some(pages), none, Log::On),
        };
        Left { round, dirty, log, paused: false }
    }

    /// Takes in whatever the event says of the costs of a standstill.
    fn measure(&mut self, now: Timestamp, event: &Event, context: &mut Context) {
        match event {
            Event::RecordRehearsed { took } if std::mem::take(&mut self.rehearsing) => {
                context.costs.source_record.add(*took);
            }
            Event::Message(Message::Rehearsed(Rehearsed { record_us }))
                if std::mem::take(&mut self.target_rehearsing) =>
            {
                context.costs.target_record.add(Duration::from_micros(*record_us));
            }
            Event::Message(Message::Pong(token)) => {
                // A late answer to an earlier round's says nothing of this round trip.
                if let Some((_, sent_at)) = self.ping.take_if(|(asked, _)| asked == token) {
                    context.costs.round_trip.add(now.since(sent_at));
                }
            }
            // The first log of all is only reset: reading it is no measure for the last one.
            Event::DirtyLogRead { took, .. } if matches!(self.step, Step::Reading(Behind::Round(_))) => {
                context.costs.dirty_log.add(*took);
            }
            _ => {}
        }
    }

    /// Writes the record that stands already once more.
    fn rehearse(&mut self, context: &mut Context) {
        self.rehearsing = true;
        context.act(Action::RehearseRecord(context.record(context.config.epoch, Standing::Running)));
    }

    /// Has the records measured anew behind a round of `pages`, where that is due.
    fn rehearse_in_round(&mut self, pages: u64, context: &mut Context) {
        let round = context.link.time_for(pages).expected;
        let fixed = Forecast::new(0, &context.link, &context.costs);
        let blocked = decide(&fixed, context.config.downtime_budget) == Decision::Round;
        self.interval =
            if blocked { (self.interval * 5 / 4).min(ROUND_INTERVAL_MAX) } else { ROUND_INTERVAL_MIN };
        if !self.rehearsing && is_rehearsal_due(&context.costs.source_record, round, blocked) {
            self.rehearse(context);
        }
        if context.features.contains(Features::REHEARSAL)
            && !self.target_rehearsing
            && is_rehearsal_due(&context.costs.target_record, round, blocked)
        {
            self.target_rehearsing = true;
            context.send(Message::Rehearse(Rehearse));
        }
    }

    fn send_round(mut self, pages: PageBitmap, now: Timestamp, context: &mut Context) -> Phase {
        let fence = context.next_fence();
        let dirty_pages = pages.count();
        context.report(Progress::RoundStarted { round: fence, pages: dirty_pages });
        let token = u64::from(fence);
        context.send(Message::Ping(token));
        self.ping = Some((token, now));
        self.rehearse_in_round(dirty_pages, context);
        let first = context.reached == 0;
        context.act(Action::SendPages { pages: pages.clone(), fence, paused: false, first, whole: false });
        self.step = Step::Sending { started: now, pages, fence, sent: None, fence_reached: false };
        Phase::PreCopy(self)
    }

    /// Once a round is written and has arrived, the next log is read, at once or after a rest.
    fn round_complete(mut self, now: Timestamp, context: &mut Context) -> Phase {
        let Step::Sending { started, pages, sent: Some(sent), fence_reached: true, .. } = &self.step else {
            return Phase::PreCopy(self);
        };
        let (started, sent, dirty_pages) = (*started, *sent, pages.count());
        if context.config.verify_whole && context.fence == 1 {
            // What the guest touches later is hardly more than what it has touched so far.
            context.costs.expect_whole(context.layout.page_count().saturating_sub(sent.untouched_pages));
        }
        let took = now.since(started);
        context.link.add_round(
            sent.pages() - sent.zero_pages,
            sent.wire_bytes,
            took.saturating_sub(sent.link_idle),
        );
        let last = Arrived { dirty_pages, sent, took };
        let until = started + self.interval;
        self.step = if until > now && context.fence > 1 {
            Step::Resting { until, last }
        } else {
            context.act(Action::ReadDirtyLog);
            Step::Reading(Behind::Round(last))
        };
        Phase::PreCopy(self)
    }

    fn after_round(
        mut self,
        last: Arrived,
        pages: PageBitmap,
        now: Timestamp,
        context: &mut Context,
    ) -> Phase {
        let pages_left = pages.count();
        let forecast = Forecast::new(pages_left, &context.link, &context.costs);
        let elapsed = now.since(self.log_read_at).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let dirtied_per_s = if elapsed > 0.0 { Some(pages_left as f64 / elapsed) } else { None };
        self.log_read_at = now;
        let report = RoundReport {
            round: context.fence,
            dirty_pages: last.dirty_pages,
            sent: last.sent,
            took: last.took,
            dirtied_per_s,
            forecast: Some(forecast),
        };
        context.rounds.push(report);
        context.report(Progress::RoundDone(report));
        let best = self.best_forecast.unwrap_or(Duration::MAX).min(forecast.total().upper());
        self.best_forecast = Some(best);
        // With `OnTimeout::Cancel` the deadline has been dealt with before.
        let forced = now >= context.deadline();
        let decision = match decide(&forecast, context.config.downtime_budget) {
            // Restoring there would wait for the disk, which is then a slow one.
            Decision::Stop if self.target_rehearsing => Decision::Round,
            decision => decision,
        };
        match decision {
            Decision::Round if !forced => self.send_round(pages, now, context),
            Decision::Round | Decision::Stop => stop::begin(pages, forecast, forced, now, context),
        }
    }

    fn not_converged(&self, context: &Context) -> Failure {
        let after = format!(
            "after {} s and {} rounds stopping the guest still did not fit the downtime budget of {} ms",
            context.config.timeout.as_secs_f64(),
            context.rounds.len(),
            context.config.downtime_budget.as_millis(),
        );
        let dirtied = context.rounds.last().and_then(|round| round.dirtied_per_s).unwrap_or_default();
        let hint = match self.best_forecast {
            Some(best) => format!(
                "the guest dirties {:.0} MiB/s, the link takes {:.0} MiB/s, the best forecast was {} ms; \
                 allow that downtime, a faster link, more time, or --on-timeout stop",
                dirtied / 256.0,
                context.link.bytes_per_s() / 1_048_576.0,
                best.as_millis() + 1,
            ),
            None => "the first round was not done; allow more time or a faster link".to_owned(),
        };
        Failure::Timeout(format!("{after}: {hint}"))
    }
}
