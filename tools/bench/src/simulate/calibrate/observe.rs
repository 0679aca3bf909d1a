//! What a real run says of single costs: each observation is a time that was measured, and a formula of the parameters
//! that should give it.
//!
//! Only parts whose inputs were measured with them are used (a round's own pages, say), so that one wrong parameter does
//! not spoil what is learnt of the others.

use ferry_migrate::protocol::PageBitmap;
use ferry_migrate::protocol::page::Compression;

use super::super::costs::{RoundLoad, RoundWork, float};
use super::super::guest::dirty_pages;
use super::super::hardware::Hardware;
use super::super::real::RealOrder;
use crate::results::{ProcessRole, Round, Run};

const GIB: f64 = 1_073_741_824.0;

/// Last rounds with more pages take longer than saving the state, which they hide.
const PAGES_BESIDE_SAVING_MAX: u64 = 64;

/// Processes use CPU time for more than pages, so that runs must have moved many of them to say what one costs.
const PAGES_FOR_CPU_MIN: u64 = 100_000;

/// Something that was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Observation {
    pub(super) what: Observed,
    /// In µs, or in bytes for [`Observed::RoundBytes`].
    pub(super) value: f64,
    /// Which scenario and engine it comes from.
    pub(super) group: usize,
}

/// What scatters on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scatter {
    /// What a step costs.
    Fixed,
    /// What the pages of a round cost.
    Pages,
}

/// What was measured, with all that it depends on.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Observed {
    /// From the order to the first round.
    SetUp { gib: f64, cpus: f64, streams: f64 },
    /// A round while the guest ran.
    Round(Box<RoundInput>),
    /// Its bytes on the data streams.
    RoundBytes(Box<RoundInput>),
    /// The source's CPU time for all rounds.
    SourceCpu(Vec<RoundInput>),
    /// The target's.
    TargetCpu(Vec<RoundInput>),
    /// Stopping the guest.
    Pause { cpus: f64 },
    /// Reading the last dirty log.
    DirtyLog { gib: f64, pages: f64 },
    /// Saving the state.
    Save { cpus: f64 },
    /// Restoring the state.
    Restore { cpus: f64 },
    /// From the last dirty log to `Prepared`: the last round, with saving and restoring.
    LastRound(Box<RoundInput>, f64),
    /// From `Prepare` to `Prepared` where no pages were left on the way.
    Prepare { cpus: f64 },
    /// A record at the source.
    SourceRecord,
    /// A record at the target.
    TargetRecord,
    /// Starting the guest.
    Start { cpus: f64 },
    /// From `Commit` to `Running`.
    Commit { cpus: f64 },
}

/// A round and the way that it took.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RoundInput {
    pub(super) load: RoundLoad,
    pub(super) link_bytes_per_s: f64,
    pub(super) rate_max: f64,
    pub(super) cores: f64,
    /// How many pages the guest writes a second meanwhile, and the most processors that it gets for that.
    pub(super) guest: (f64, f64),
    pub(super) switched: bool,
}

impl Observation {
    /// What the parameters make of it, in the unit of the value.
    pub(super) fn predicted(&self, by: &Hardware) -> f64 {
        let prepare = |cpus: f64| by.restore_us + by.restore_us_per_vcpu * cpus;
        let start = |cpus: f64| by.run_us + by.run_us_per_vcpu * cpus;
        match &self.what {
            Observed::SetUp { gib, cpus, streams } => {
                // Hello, Welcome, Describe and Ready, a connection for control and one for each stream, and the same
                // record at both ends.
                by.overhead_us
                    + by.message_us * (5.0 + streams)
                    + by.target_record_us
                    + by.build_us
                    + by.build_us_per_vcpu * cpus
                    + by.source_record_us
                    + by.log_start_us_per_gib * gib
                    + by.log_read_us
                    + by.log_read_us_per_gib * gib
            }
            Observed::Round(round) => round.took_us(by),
            Observed::RoundBytes(round) => float(round.work(by).sent.wire_bytes),
            Observed::SourceCpu(rounds) => rounds.iter().map(|round| round.work(by).source_cpu_s * 1e6).sum(),
            Observed::TargetCpu(rounds) => rounds.iter().map(|round| round.work(by).target_cpu_s * 1e6).sum(),
            Observed::Pause { cpus } => by.pause_us + by.pause_us_per_vcpu * cpus,
            Observed::DirtyLog { gib, pages } => {
                by.log_read_us + by.log_read_us_per_gib * gib + by.log_clear_page_us * pages
            }
            Observed::Save { cpus } => by.save_us + by.save_us_per_vcpu * cpus,
            Observed::Restore { cpus } => prepare(*cpus),
            Observed::LastRound(round, cpus) => {
                let save = by.save_us + by.save_us_per_vcpu * cpus;
                round.took_us(by).max(save) + by.message_us + prepare(*cpus)
            }
            Observed::Prepare { cpus } => 2.0 * by.message_us + prepare(*cpus),
            Observed::SourceRecord => by.source_record_us,
            Observed::TargetRecord => by.target_record_us,
            Observed::Start { cpus } => start(*cpus),
            Observed::Commit { cpus } => 2.0 * by.message_us + by.target_record_us + start(*cpus),
        }
    }

    /// Whose scatter it shows, if it is a single cost.
    pub(super) fn scatter(&self) -> Option<Scatter> {
        match &self.what {
            // A link that is full hides how long pages took.
            Observed::Round(round) => round.link_bytes_per_s.is_infinite().then_some(Scatter::Pages),
            Observed::Pause { .. }
            | Observed::DirtyLog { .. }
            | Observed::Save { .. }
            | Observed::Restore { .. }
            | Observed::SourceRecord
            | Observed::TargetRecord
            | Observed::Start { .. } => Some(Scatter::Fixed),
            Observed::SetUp { .. }
            | Observed::RoundBytes(_)
            | Observed::SourceCpu(_)
            | Observed::TargetCpu(_)
            | Observed::LastRound(..)
            | Observed::Prepare { .. }
            | Observed::Commit { .. } => None,
        }
    }
}

impl RoundInput {
    fn new(pages: &PageBitmap, first: bool, order: &RealOrder) -> Self {
        let how = (order.settings.streams, order.settings.compression);
        Self {
            load: RoundLoad::new((pages, 1), first, &order.guest, how),
            link_bytes_per_s: order.pair.link_bytes_per_s,
            rate_max: order.settings.bandwidth_bytes_per_s.unwrap_or(f64::INFINITY),
            cores: order.pair.cores,
            guest: (order.guest.pages_per_s(), order.guest_cores_max()),
            switched: order.pair.switched,
        }
    }

    fn work(&self, by: &Hardware) -> RoundWork {
        let by = if self.switched { by.behind_switch() } else { *by };
        self.load.work(&by)
    }

    /// How long such a round takes when nothing else is under way.
    fn took_us(&self, by: &Hardware) -> f64 {
        let work = self.work(by);
        let bytes = float(work.sent.wire_bytes);
        let guest_cores = (self.guest.0 * by.logged_write_us / 1e6).min(self.guest.1);
        let on_processors_s = (work.source_cpu_s + work.target_cpu_s) / (self.cores - guest_cores);
        let on_link_s = bytes * by.wire_overhead / self.link_bytes_per_s;
        let took_s = work.slowest_s.max(on_processors_s).max(on_link_s).max(bytes / self.rate_max);
        took_s * 1e6 + by.round_us + by.message_us
    }
}

/// All that a run says.
pub(super) fn observations(run: &Run, order: &RealOrder, group: usize) -> Vec<Observation> {
    let mut seen = Vec::new();
    let mut add = |what: Observed, value: Option<f64>| {
        if let Some(value) = value.filter(|value| value.is_finite() && *value > 0.0) {
            seen.push(Observation { what, value, group });
        }
    };
    let measures = &run.measures;
    let cpus = f64::from(order.guest.cpus);
    let gib = float(order.guest.memory_bytes) / GIB;
    let us = |ms: f64| ms * 1e3;
    let streams = f64::from(order.settings.streams);
    let first_at = measures.rounds.first().and_then(|round| round.from_ms);
    add(Observed::SetUp { gib, cpus, streams }, first_at.map(us));

    let inputs = round_inputs(run, order);
    for (round, input) in measures.rounds.iter().zip(&inputs).take(inputs.len().saturating_sub(1)) {
        add(Observed::Round(Box::new(input.clone())), round.ms.map(us));
        add(Observed::RoundBytes(Box::new(input.clone())), round.wire_bytes.map(float));
    }
    let last = inputs.last().map(|last| RoundInput { guest: (0.0, 0.0), ..last.clone() });
    let sent: u64 = measures.rounds.iter().filter_map(|round| round.wire_bytes).sum();
    if sent / 4096 >= PAGES_FOR_CPU_MIN && order.settings.compression == Compression::None {
        let cpu_of = |role| {
            let process = measures.processes.iter().find(|process| process.role == role);
            process.map(|process| process.cpu_engine_s * 1e6)
        };
        add(Observed::SourceCpu(inputs.clone()), cpu_of(ProcessRole::Source));
        add(Observed::TargetCpu(inputs), cpu_of(ProcessRole::Target));
    }

    let part =
        |name: &str| measures.downtime_parts.iter().find(|part| part.name == name).map(|part| us(part.ms));
    let more = |name: &str| measures.more.get(name).map(|ms| us(*ms));
    let left = measures.rounds.last().and_then(|round| round.dirty_pages).unwrap_or(0);
    let little_left = left <= PAGES_BESIDE_SAVING_MAX;
    add(Observed::Pause { cpus }, part("pause"));
    add(Observed::DirtyLog { gib, pages: float(left) }, part("dirty log"));
    let save = more("within_save_ms").or_else(|| part("copy").filter(|_| little_left));
    add(Observed::Save { cpus }, save);
    add(Observed::Restore { cpus }, more("within_restore_ms"));
    if let (Some(last), false) = (last, little_left) {
        let both = part("copy").zip(part("prepare")).map(|(copy, prepare)| copy + prepare);
        add(Observed::LastRound(Box::new(last), cpus), both);
    }
    add(Observed::Prepare { cpus }, part("prepare").filter(|_| little_left));
    add(Observed::SourceRecord, part("record"));
    add(Observed::TargetRecord, more("within_target_record_ms"));
    add(Observed::Start { cpus }, more("within_run_ms"));
    add(Observed::Commit { cpus }, part("commit"));
    seen
}

/// Each round's load; of later rounds only the number of pages is known, so they are put where the guest writes most.
fn round_inputs(run: &Run, order: &RealOrder) -> Vec<RoundInput> {
    let guest = &order.guest;
    let busiest = guest.sets.len().saturating_sub(1);
    let input = |(index, round): (usize, &Round)| {
        let first = index == 0;
        let pages = if first {
            PageBitmap::full(guest.page_count(1))
        } else {
            dirty_pages(guest, busiest, round.dirty_pages.unwrap_or(0))
        };
        RoundInput::new(&pages, first, order)
    };
    run.measures.rounds.iter().enumerate().map(input).collect()
}
