//! A migration within one host: the target maps the very memory that the guest runs on, so there are no streams, no
//! dirty log and no rounds. What is left to do before the guest stops is to measure what its standstill will cost.
//!
//! ```text
//!  Measuring --Ready, RecordWritten, Pong--> decide --> Stopping (stop.rs)
//!      ^                                       |
//!      '------ Resting (does not fit) <--------'
//! ```
//!
//! The record is rehearsed and the round trip measured while the target builds its machine: neither waits for the other.

use std::time::Duration;

use crate::message::{HandOver, Message};
use crate::policy::{Cost, Decision, Estimate, FixedCosts, Forecast, decide};
use crate::record::Standing;
use crate::time::Timestamp;

use super::negotiate::{stay_or_undo, too_slow};
use super::undo::undo;
use super::{Action, Context, Event, Failure, NEGOTIATION_TIMEOUT, OnTimeout, Phase, interruption, stop};

/// How long it waits before it measures again, when stopping did not fit the budget.
const REST: Duration = Duration::from_millis(10);

/// The token of the only `Ping` under way.
const PING: u64 = 1;

/// The memory is offered, or mapped by the target already.
#[derive(Debug, Clone)]
pub(super) struct Offering {
    step: Step,
    /// When the target must have built its machine.
    ready_by: Timestamp,
    ready: bool,
    /// The smallest downtime that was forecast, for the error message.
    best_forecast: Duration,
}

#[derive(Debug, Clone)]
enum Step {
    Measuring { asked_at: Timestamp, recorded: bool, answered: bool },
    Resting { until: Timestamp },
}

const fn us(expected: u64, error: u64) -> Cost {
    Cost::assumed(Estimate::new(Duration::from_micros(expected), Duration::from_micros(error)))
}

pub(super) fn begin(context: &mut Context, now: Timestamp) -> Phase {
    // There is no log to read. What only the standstill itself can measure is taken to cost what it does on a host of
    // its day: a machine with a few vCPUs saves and restores in half a millisecond each.
    context.costs = FixedCosts {
        pause: us(300, 200),
        dirty_log: us(0, 0),
        state: us(1000, 500),
        resume: us(300, 200),
        ..FixedCosts::default()
    };
    context.act(Action::SendMemory(Message::HandOver(HandOver {
        description: context.config.description.clone(),
        regions: context.layout.regions().to_vec(),
    })));
    let step = measure(context, now);
    let ready_by = now + NEGOTIATION_TIMEOUT;
    Phase::Offering(Offering { step, ready_by, ready: false, best_forecast: Duration::MAX })
}

/// Writes the record that stands already once more, and asks the target for a sign.
fn measure(context: &mut Context, now: Timestamp) -> Step {
    let record = context.record(context.config.epoch, Standing::Running);
    context.act(Action::WriteRecord(record));
    context.send(Message::Ping(PING));
    Step::Measuring { asked_at: now, recorded: false, answered: false }
}

impl Offering {
    /// When this phase wants to be woken.
    pub(super) fn wake(&self) -> Timestamp {
        match self.step {
            Step::Measuring { .. } => self.ready_by,
            Step::Resting { until } => until,
        }
    }

    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return undo(failure, context);
        }
        match (&mut self.step, event) {
            (_, Event::Message(Message::Ready(ready))) if !self.ready => {
                let record = Duration::from_micros(ready.record_us);
                context.costs.target_record.add(record);
                self.ready = true;
                self.decide_if_measured(now, context)
            }
            (Step::Measuring { recorded, .. }, Event::RecordWritten { took }) => {
                context.costs.source_record.add(took);
                *recorded = true;
                self.decide_if_measured(now, context)
            }
            (Step::Measuring { asked_at, answered, .. }, Event::Message(Message::Pong(PING))) => {
                context.costs.round_trip.add(now.since(*asked_at));
                *answered = true;
                self.decide_if_measured(now, context)
            }
            (Step::Measuring { .. }, Event::Timeout) => undo(too_slow("to take the memory over"), context),
            (Step::Resting { .. }, Event::Timeout) => {
                self.step = measure(context, now);
                self.ready_by = now + NEGOTIATION_TIMEOUT;
                Phase::Offering(self)
            }
            (_, other) => stay_or_undo(&other, "offering memory", Phase::Offering(self), context),
        }
    }

    fn decide_if_measured(mut self, now: Timestamp, context: &mut Context) -> Phase {
        let Step::Measuring { recorded: true, answered: true, .. } = self.step else {
            return Phase::Offering(self);
        };
        if !self.ready {
            return Phase::Offering(self);
        }
        let forecast = Forecast::new(0, &context.link, &context.costs);
        self.best_forecast = self.best_forecast.min(forecast.total().upper());
        let over = now >= context.deadline();
        match (decide(&forecast, context.config.downtime_budget), context.config.on_timeout) {
            (Decision::Stop, _) => stop::begin_handed_over(forecast, false, now, context),
            (Decision::Round, OnTimeout::Stop) if over => {
                stop::begin_handed_over(forecast, true, now, context)
            }
            (Decision::Round, OnTimeout::Cancel) if over => undo(self.does_not_fit(context), context),
            (Decision::Round, OnTimeout::Stop | OnTimeout::Cancel) => {
                self.step = Step::Resting { until: now + REST };
                Phase::Offering(self)
            }
        }
    }

    fn does_not_fit(&self, context: &Context) -> Failure {
        Failure::Timeout(format!(
            "after {} s handing the guest over still did not fit the downtime budget of {} ms: the best forecast was \
             {:.1} ms; allow that downtime, put the records on a faster disk, or use --on-timeout stop",
            context.config.timeout.as_secs_f64(),
            context.config.downtime_budget.as_millis(),
            self.best_forecast.as_secs_f64() * 1e3,
        ))
    }
}
