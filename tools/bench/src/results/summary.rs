//! Runs taken together: distributions, and engines against each other.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The runs of one engine in one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EngineSummary {
    /// The engine's name.
    pub engine: String,
    /// Its runs that ended in `moved`.
    pub moved: u32,
    /// All its runs.
    pub runs: u32,
    /// The distribution of each metric over the runs that moved their guest unharmed and have it.
    pub metrics: Vec<(Metric, Distribution)>,
}

/// A figure that runs are compared by. Less is better in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Start to end.
    TotalMs,
    /// Downtime by the guest's heartbeat.
    DowntimeGuestMs,
    /// Downtime by the engine's own word.
    DowntimeEngineMs,
    /// The guest's less the engine's.
    DowntimeUntoldMs,
    /// Downtime by a client's echoes.
    UdpGapMs,
    /// Downtime by a client's TCP connection.
    TcpStallMs,
    /// Downtime by a client's web requests.
    HttpGapMs,
    /// Failed web requests.
    HttpFailed,
    /// Bytes on the wire.
    WireBytes,
    /// CPU time of both processes without vCPUs.
    CpuS,
    /// Peak memory of both processes.
    PeakMemoryBytes,
    /// The source's peak memory less the guest's.
    MemoryOverheadSourceBytes,
    /// The target's peak memory less the guest's.
    MemoryOverheadTargetBytes,
    /// By how much the guest was slowed down meanwhile: 1 less the rate during over that before.
    SlowDown,
}

/// How the values of several runs are spread. Quantiles are values that were measured, but for the median of an even
/// number, which lies midway between two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Distribution {
    /// How many there are.
    pub count: u32,
    /// The least.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// Nine in ten are not above.
    pub p90: f64,
    /// Ninety-nine in a hundred are not above; the largest unless there are many.
    pub p99: f64,
    /// The largest.
    pub max: f64,
    /// The arithmetic mean.
    pub mean: f64,
    /// The 95 % confidence interval of the median, from three values on.
    pub p50_ci95: Option<(f64, f64)>,
}

/// One engine's metric over another's, in one scenario, from runs beside each other: those of one repetition.
///
/// Every two engines are here once; the ratio the other way round is one over this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ratio {
    /// What is compared. Only metrics that are above zero by nature have ratios.
    pub metric: Metric,
    /// The engine above the line.
    pub engine: String,
    /// The engine below it.
    pub to: String,
    /// How many repetitions have a value of both.
    pub pairs: u32,
    /// The median of the ratios within each repetition. It need not be the ratio of the two medians.
    pub ratio: f64,
    /// Its 95 % confidence interval, from three pairs on.
    pub ci95: Option<(f64, f64)>,
}
