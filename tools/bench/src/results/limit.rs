//! What became of a suite's limits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::scenario::Limit;

/// A limit, and what was reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LimitResult {
    /// The limit.
    pub limit: Limit,
    /// The engine that counts: the best of those that it is about.
    pub engine: Option<String>,
    /// The engine that it is held against, where that is one.
    pub over: Option<String>,
    /// What was reached: a ratio, or a value in the metric's own unit.
    pub value: Option<f64>,
    /// Its 95 % confidence interval, from three values on.
    pub ci95: Option<(f64, f64)>,
    /// How many runs, or pairs of runs, it is made from.
    pub count: u32,
    /// Whether the limit was met.
    pub verdict: Verdict,
    /// Whether the interval lies on one side of the bound as a whole.
    pub is_sure: bool,
    /// Whether the aim was reached, if there is one.
    pub aim_reached: Option<bool>,
    /// What else has to be known: who could not take part, or which runs failed.
    pub note: Option<String>,
}

/// Whether a limit was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// What was reached is within the bound, and every run of the engine moved its guest unharmed.
    Met,
    /// It is not.
    Missed,
    /// There is nothing to judge by.
    NotMeasured,
}
