//! What was measured, and how it is kept: the JSON of a suite, documented field by field.
//!
//! Times are milliseconds, sizes bytes, rates a second, and names end in the unit. What was not measured or does
//! not apply is `null`. Fields are only ever added; [`SCHEMA`] rises if one changes its meaning.

mod file;
mod limit;
mod run;
mod summary;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use file::{LoadError, load};
pub use limit::{LimitResult, Verdict};
pub use run::{
    Check, ClientSeen, Idleness, Measures, Outcome, Part, ProcessCost, ProcessRole, Round, Run, ThreadCost,
    Timeline,
};
pub use summary::{Distribution, EngineSummary, Metric, Ratio};

use crate::scenario::{EngineKind, Scenario};

/// The version of this schema.
pub const SCHEMA: u32 = 1;

/// Everything that one `ferry-bench suite` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The suite's name.
    pub suite: String,
    /// Its heading.
    pub title: String,
    /// What it is for.
    pub summary: String,
    /// When it began, in seconds since 1970, UTC.
    pub began_unix_s: u64,
    /// How long it took, in s.
    pub took_s: f64,
    /// The command line that ran it.
    pub command: Vec<String>,
    /// Where it ran.
    pub machine: MachineInfo,
    /// The engines, those included that were not found.
    pub engines: Vec<EngineInfo>,
    /// What came out of each scenario.
    pub scenarios: Vec<ScenarioResult>,
    /// What became of the suite's limits.
    #[serde(default)]
    pub limits: Vec<LimitResult>,
}

/// The machine that a suite ran on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MachineInfo {
    /// The processor's name.
    pub cpu: String,
    /// How many processors there are to use.
    pub cores: u32,
    /// Main memory, bytes.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
    /// What backs /dev/kvm: `kvm_intel`, `kvm_amd`, `kvm_pvm`, or unknown.
    pub kvm: String,
    /// ferry's own version and the commit, where it is known.
    pub ferry: String,
}

/// An engine as it was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EngineInfo {
    /// Its name in this suite.
    pub name: String,
    /// What it is.
    pub kind: EngineKind,
    /// Its own words on its version.
    pub version: Option<String>,
    /// Where its binary is.
    pub binary: Option<String>,
    /// Why it took no part, if it did not.
    pub absent: Option<String>,
}

/// What came out of one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScenarioResult {
    /// The scenario as it was run.
    pub scenario: Scenario,
    /// Every migration, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Each engine's runs taken together.
    pub engines: Vec<EngineSummary>,
    /// Engines against each other, from runs beside each other.
    pub ratios: Vec<Ratio>,
}
