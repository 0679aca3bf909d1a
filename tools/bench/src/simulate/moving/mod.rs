//! One migration under way: the production cores of both sides, and the hosts around them as far as they take time.
//!
//! ```text
//!  source.rs   actions of the source's core ──> jobs on its VM, rounds as flows
//!  target.rs   actions of the target's core ──> jobs on its VM
//!  control.rs  messages between them
//! ```
//!
//! The engine's shape is kept: jobs on a VM and its record follow each other on one thread; each stream has a thread at
//! both ends; the control connection keeps its order.

mod control;
mod source;
mod target;

use std::time::Duration;

use ferry_migrate::protocol::source::{self as source_core, Outcome, Source};
use ferry_migrate::protocol::target::Target;
use ferry_migrate::protocol::{MemoryLayout, Message, Timestamp};
use ferry_migrate::report::MigrationReport;
use rand::SeedableRng;
use rand_distr::{Distribution, LogNormal};
use rand_xoshiro::Xoshiro256PlusPlus;

use super::costs::{RoundWork, float};
use super::guest::GuestMemory;
use super::hardware::Hardware;
use super::network::{FlowId, FlowRequest, Milestone, Network};
use super::order::{MigrationOrder, guest_cores_max};
use super::run::{Ending, MigrationRun, RoundLine};
use super::world::Agenda;

use control::Lane;

/// What comes due for one migration.
#[derive(Debug)]
pub(super) enum Due {
    /// The order is carried out.
    Begin,
    /// Something happened at the source.
    Source(source_core::Event),
    /// Something happened at the target.
    Target(ferry_migrate::protocol::target::Event),
    /// A message arrives.
    ToSource(Message),
    /// A message arrives.
    ToTarget(Message),
    /// The source's core may want to be woken.
    SourceTimer(Timestamp),
    /// The target's core may want to be woken.
    TargetTimer(Timestamp),
    /// The pages of a round begin to flow.
    Flow {
        /// What flows.
        request: Box<FlowRequest>,
        /// The fence behind it.
        fence: u32,
    },
}

/// What a flow is for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Purpose {
    /// A round's pages, ending in this fence.
    Pages(u32),
    /// A message to the target that is too large to be for free.
    Message(Box<Message>),
}

/// What a migration may reach into.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    pub(super) now: Duration,
    pub(super) index: usize,
    pub(super) agenda: &'a mut Agenda,
    pub(super) network: &'a mut Network,
    pub(super) hardware: &'a Hardware,
}

impl Stage<'_> {
    fn at(&mut self, at: Duration, due: Due) {
        self.agenda.add(at.max(self.now), self.index, due);
    }

    fn timestamp(&self) -> Timestamp {
        Timestamp::from_origin(self.now)
    }
}

/// A host's part of a migration.
#[derive(Debug)]
struct Side {
    /// When the jobs on its VM that are known by now are done.
    worker_free_at: Duration,
    /// Messages to it.
    lane: Lane,
    timer: Option<Timestamp>,
}

/// One migration.
#[derive(Debug)]
pub(super) struct Moving {
    order: MigrationOrder,
    layout: MemoryLayout,
    ordered_at: Duration,
    source: Option<Source>,
    target: Option<Target>,
    source_side: Side,
    target_side: Side,
    memory: GuestMemory,
    /// What the guest takes of the migration's processors while it runs.
    guest_load: f64,
    random: Xoshiro256PlusPlus,
    /// The round whose pages are on their way.
    round: Option<RoundWork>,
    flow: Option<(FlowId, Purpose)>,
    message_flow: Option<(FlowId, Purpose)>,
    rounds: Vec<RoundLine>,
    round_began: Duration,
    stopped_at: Option<Duration>,
    runs_at: Option<Duration>,
    wire_bytes: f64,
    /// CPU time for pages at source and target, in s.
    cpu_s: (f64, f64),
    outcome: Option<Outcome>,
}

impl Moving {
    /// A migration that is ordered now; `seed` decides all of its chances.
    pub(super) fn new(order: MigrationOrder, layout: MemoryLayout, seed: u64, stage: &mut Stage<'_>) -> Self {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let write_s = stage.hardware.logged_write_us / 1e6;
        let shared = order.route.guest_on_cpu;
        let cores = if shared {
            let cores = stage.network.capacity(order.route.source_cpu);
            guest_cores_max(&order.guest, cores)
        } else {
            f64::from(order.guest.cpus)
        };
        let memory = GuestMemory::new(
            &order.guest,
            order.page_scale,
            cores / write_s,
            Xoshiro256PlusPlus::from_rng(&mut random),
        );
        let guest_load = if shared { (order.guest.pages_per_s() * write_s).min(cores) } else { 0.0 };
        stage.network.reserve(order.route.source_cpu, guest_load);
        let side = || Side { worker_free_at: Duration::ZERO, lane: Lane::default(), timer: None };
        stage.at(stage.now + us(stage.hardware.overhead_us), Due::Begin);
        Self {
            order,
            layout,
            ordered_at: stage.now,
            source: None,
            target: None,
            source_side: side(),
            target_side: side(),
            memory,
            guest_load,
            random,
            round: None,
            flow: None,
            message_flow: None,
            rounds: Vec::new(),
            round_began: Duration::ZERO,
            stopped_at: None,
            runs_at: None,
            wire_bytes: 0.0,
            cpu_s: (0.0, 0.0),
            outcome: None,
        }
    }

    /// Takes in what came due, and does what follows from it.
    pub(super) fn happen(&mut self, due: Due, stage: &mut Stage<'_>) {
        let now = stage.timestamp();
        match due {
            Due::Begin => {
                let config = self.order.config();
                self.source = Some(Source::new(config, self.layout.clone(), now));
            }
            Due::Source(event) => self.tell_source(now, event),
            Due::Target(event) => self.tell_target(now, event),
            Due::ToSource(message) => self.tell_source(now, source_core::Event::Message(message)),
            Due::ToTarget(message) => self.message_to_target(now, message),
            Due::SourceTimer(at) => {
                self.source_side.timer = None;
                if self.source.as_ref().and_then(Source::poll_timeout) == Some(at) {
                    self.tell_source(now, source_core::Event::Timeout);
                }
            }
            Due::TargetTimer(at) => {
                self.target_side.timer = None;
                if self.target.as_ref().and_then(Target::poll_timeout) == Some(at) {
                    self.tell_target(now, ferry_migrate::protocol::target::Event::Timeout);
                }
            }
            Due::Flow { request, fence } => self.begin_flow(*request, fence, stage),
        }
        self.settle(stage);
    }

    /// Takes in what one of its flows has come to.
    pub(super) fn reach(&mut self, flow: FlowId, milestone: Milestone, stage: &mut Stage<'_>) {
        if self.flow.as_ref().is_some_and(|(id, _)| *id == flow) {
            self.pages_reach(milestone, stage);
        } else if self.message_flow.as_ref().is_some_and(|(id, _)| *id == flow) {
            self.message_has_gone(stage);
        }
        self.settle(stage);
    }

    /// Whether `flow` is its own.
    pub(super) fn has_flow(&self, flow: FlowId) -> bool {
        [&self.flow, &self.message_flow].into_iter().flatten().any(|(id, _)| *id == flow)
    }

    /// Takes what is left of it off the network.
    pub(super) fn leave(&mut self, network: &mut Network) {
        for (flow, _) in [self.flow.take(), self.message_flow.take()].into_iter().flatten() {
            network.remove_flow(flow);
        }
        self.free_processors(network);
    }

    /// The guest needs no processor any more.
    fn free_processors(&mut self, network: &mut Network) {
        network.reserve(self.order.route.source_cpu, -std::mem::take(&mut self.guest_load));
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.outcome.is_some()
    }

    fn tell_source(&mut self, now: Timestamp, event: source_core::Event) {
        if let Some(source) = &mut self.source {
            source.handle(now, event);
        }
    }

    fn tell_target(&mut self, now: Timestamp, event: ferry_migrate::protocol::target::Event) {
        if let Some(target) = &mut self.target {
            target.handle(now, event);
        }
    }

    /// Does all that both cores want done, and sets their timers.
    fn settle(&mut self, stage: &mut Stage<'_>) {
        loop {
            if let Some(action) = self.source.as_mut().and_then(Source::poll_action) {
                self.perform_source(action, stage);
            } else if let Some(action) = self.target.as_mut().and_then(Target::poll_action) {
                self.perform_target(action, stage);
            } else {
                break;
            }
        }
        if let Some(at) = self.source.as_ref().and_then(Source::poll_timeout)
            && self.source_side.timer != Some(at)
        {
            self.source_side.timer = Some(at);
            stage.at(at.since(Timestamp::default()), Due::SourceTimer(at));
        }
        if let Some(at) = self.target.as_ref().and_then(Target::poll_timeout)
            && self.target_side.timer != Some(at)
        {
            self.target_side.timer = Some(at);
            stage.at(at.since(Timestamp::default()), Due::TargetTimer(at));
        }
    }

    /// `cost_us` as it turns out this time.
    fn scattered(&mut self, cost_us: f64, hardware: &Hardware) -> Duration {
        us(cost_us * factor(hardware.jitter, &mut self.random))
    }

    /// What it came to.
    pub(super) fn into_run(self, now: Duration) -> MigrationRun {
        let stopped_for = |until: Duration| self.stopped_at.map(|stopped| until.saturating_sub(stopped));
        let (ending, report) = match &self.outcome {
            Some(Outcome::Moved(summary)) => {
                let budget = self.order.settings.downtime_budget;
                let mut report = MigrationReport::new("guest", budget, summary);
                in_real_pages(&mut report, self.order.page_scale);
                (Ending::Moved, Some(report))
            }
            Some(Outcome::LetGo { .. }) => unreachable!("nobody decides anything here"),
            Some(Outcome::Stayed { failure, .. }) => {
                let timeout = matches!(failure, source_core::Failure::Timeout(_));
                let scale = self.order.page_scale;
                let counted = if scale > 1 && timeout {
                    format!(
                        " (the model's pages stand for {scale} real ones: it dirties {scale} times as much)"
                    )
                } else {
                    String::new()
                };
                (Ending::Stayed { reason: format!("{failure}{counted}"), timeout }, None)
            }
            None => (Ending::Stayed { reason: "it never ended".to_owned(), timeout: false }, None),
        };
        MigrationRun {
            ending,
            took: now.saturating_sub(self.ordered_at),
            standstill: stopped_for(self.runs_at.unwrap_or(now)),
            wire_bytes: self.wire_bytes,
            source_cpu_s: self.cpu_s.0,
            target_cpu_s: self.cpu_s.1,
            rounds: self.rounds,
            report,
        }
    }
}

/// Counts pages of a report as the real ones that each stands for.
fn in_real_pages(report: &mut MigrationReport, scale: u64) {
    for round in &mut report.rounds {
        round.dirty_pages *= scale;
        round.sent_pages *= scale;
        round.zero_pages *= scale;
        round.packed_pages *= scale;
        round.dirtied_pages_per_s = round.dirtied_pages_per_s.map(|pages| pages * float(scale));
    }
}

/// A factor around 1 whose logarithm has the standard deviation `spread`.
fn factor(spread: f64, random: &mut Xoshiro256PlusPlus) -> f64 {
    if spread <= 0.0 {
        return 1.0;
    }
    LogNormal::new(0.0, spread).map_or(1.0, |factors| factors.sample(random))
}

pub(super) fn us(us: f64) -> Duration {
    Duration::from_secs_f64((us / 1e6).clamp(0.0, 1e9))
}
