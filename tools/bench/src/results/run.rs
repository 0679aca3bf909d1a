//! One migration, as everybody saw it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Run {
    /// The engine's name.
    pub engine: String,
    /// Which repetition this was, from 0; every engine makes one run in each.
    pub repetition: u32,
    /// When it began, in s since the suite did.
    pub at_s: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// What was measured. Runs that did not end in [`Outcome::Moved`] have what there was.
    pub measures: Measures,
    /// How it went over time.
    pub timeline: Timeline,
    /// The engine's command lines and settings, as they were given.
    pub flags: Vec<String>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the target.
    Moved,
    /// The timeout came first; it was cancelled.
    NotConverged,
    /// The engine can't do what the scenario asks for.
    Unsupported {
        /// What it lacks.
        reason: String,
    },
    /// It failed.
    Failed {
        /// What was tried and why it failed.
        reason: String,
    },
}

/// Figures of one run. Those from outside the engine come first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Measures {
    /// From the order to migrate to the engine's word that it is done, by the harness's clock.
    pub total_ms: Option<f64>,
    /// The longest gap between two heartbeats of the guest since the order: the downtime as the guest saw it, with
    /// the heartbeat's period (1 ms) included.
    pub downtime_guest_ms: Option<f64>,
    /// The engine's own word on the downtime.
    pub downtime_engine_ms: Option<f64>,
    /// The engine's downtime by part, in order, where it tells.
    pub downtime_parts: Vec<Part>,
    /// What the engine had forecast when it stopped the guest.
    pub downtime_forecast_ms: Option<f64>,
    /// What clients saw.
    pub client: Option<ClientSeen>,
    /// Bytes on the wire in both directions, headers of all layers included, from interface counters; a client's
    /// traffic is taken off by the counters of the VM's tap.
    pub wire_bytes: Option<u64>,
    /// The engine's own word on what it sent.
    pub wire_bytes_engine: Option<u64>,
    /// CPU time and memory of each process.
    pub processes: Vec<ProcessCost>,
    /// Pages that the guest wrote per second before, during and after, where its job is to write.
    pub guest_pages_per_s_before: Option<f64>,
    /// While it was being migrated, the standstill included.
    pub guest_pages_per_s_during: Option<f64>,
    /// After it ran at the target.
    pub guest_pages_per_s_after: Option<f64>,
    /// The engine's rounds over memory, where it tells more than their number.
    pub rounds: Vec<Round>,
    /// The number of rounds.
    pub round_count: Option<u32>,
    /// Whether what arrived is what left.
    pub check: Check,
    /// What else used the machine.
    pub idleness: Idleness,
    /// Figures of a kind that only one engine has, by name with its unit.
    pub more: BTreeMap<String, f64>,
}

/// A part of a downtime.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Part {
    /// What happened in it.
    pub name: String,
    /// How long it took.
    pub ms: f64,
}

/// What clients saw: gaps, stalls and latencies since the order, counts of the whole run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClientSeen {
    /// The longest time without an echo, of datagrams sent every millisecond.
    pub udp_gap_ms: Option<f64>,
    /// The longest time in which the probe itself did not send: so much of the gap may be its own.
    pub udp_send_gap_ms: Option<f64>,
    /// Datagrams sent.
    pub udp_sent: Option<u64>,
    /// Datagrams that did not come back.
    pub udp_lost: Option<u64>,
    /// The longest silence of one TCP connection while an answer was due.
    pub tcp_stall_ms: Option<f64>,
    /// Whether that connection broke.
    pub tcp_broken: Option<bool>,
    /// The longest time in which no connection received any byte of an answer, while all of them asked.
    pub http_gap_ms: Option<f64>,
    /// Requests answered rightly.
    pub http_ok: Option<u64>,
    /// All others.
    pub http_failed: Option<u64>,
    /// Quantiles of how long requests took, as `[quantile, ms]`.
    pub http_latency_ms: Vec<(f64, f64)>,
}

/// Which side a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessRole {
    /// The VMM that the guest leaves.
    Source,
    /// The VMM that the guest goes to.
    Target,
}

/// What one process used, from the order to migrate to its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessCost {
    /// Which side it is.
    pub role: ProcessRole,
    /// CPU time of all its threads, those included that have ended.
    pub cpu_s: f64,
    /// CPU time without that of the vCPU threads: what the migration cost. Exits of the guest are with the vCPUs.
    pub cpu_engine_s: f64,
    /// CPU time by thread, largest first. Threads that ended between two looks are `(ended)`.
    pub threads: Vec<ThreadCost>,
    /// The most memory that it had in use at once, guest memory included, bytes.
    pub peak_memory_bytes: u64,
    /// How much of that was the guest's memory: at the source right before the order, at the target after the end,
    /// bytes; `null` without a guest.
    #[serde(default)]
    pub guest_memory_bytes: Option<u64>,
}

/// What one thread used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ThreadCost {
    /// Its name, as the kernel has it.
    pub name: String,
    /// CPU time.
    pub cpu_s: f64,
    /// Whether it runs a vCPU.
    pub vcpu: bool,
}

/// One round over memory, as the engine tells it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Round {
    /// Counted from 1.
    pub round: u32,
    /// When it began, on the timeline's clock.
    pub from_ms: Option<f64>,
    /// How long it took.
    pub ms: Option<f64>,
    /// Pages that were dirty when it began.
    pub dirty_pages: Option<u64>,
    /// Pages that were sent.
    pub sent_pages: Option<u64>,
    /// Bytes that were sent.
    pub wire_bytes: Option<u64>,
    /// The downtime that the engine would not have expected to exceed, had it stopped the guest after this round.
    #[serde(default)]
    pub forecast_upper_ms: Option<f64>,
}

/// Whether what arrived is what left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// Whether the guest reported from the target, its heart beating.
    pub alive: bool,
    /// Pages that the guest found changed or lost; `null` if it does not check itself.
    pub errors: Option<u64>,
    /// Pages that it has checked after it had moved.
    pub pages_checked: Option<u64>,
    /// Whether the engine compared digests of all memory and found them equal; `null` if it does not.
    pub digest_equal: Option<bool>,
}

/// What else used the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Idleness {
    /// The share of all CPU time, 0 to 1, that others than the two VMMs and the harness used before the order.
    pub others_before: f64,
    /// The same during the migration.
    pub others_during: f64,
    /// The share of CPU time that the hypervisor below took away during the migration.
    pub steal_during: f64,
    /// Whether the machine was idle enough for the figures to count.
    pub quiet: bool,
}

/// How a run went over time. All times are ms since the order to migrate; what came before is negative.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timeline {
    /// When the engine said that it was done.
    pub done_ms: Option<f64>,
    /// The guest's longest standstill since the order, by its heartbeat: from, to.
    pub standstill: Option<(f64, f64)>,
    /// The rate on the wire, bytes/s, each for the time that ends there.
    pub link_bytes_per_s: Vec<(f64, f64)>,
    /// Pages that the guest wrote a second, each for the time that ends there.
    pub guest_pages_per_s: Vec<(f64, f64)>,
    /// What clients received, bytes/s, each for the time that begins there.
    pub client_bytes_per_s: Vec<(f64, f64)>,
    /// Pages left to send, as the engine tells while it runs.
    pub dirty_pages: Vec<(f64, f64)>,
}
