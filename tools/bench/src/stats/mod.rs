//! Runs taken together.

use crate::results::{EngineSummary, Ratio, Run};

/// Each engine's runs, and engines against each other.
#[must_use]
pub fn summarise(_runs: &[Run]) -> (Vec<EngineSummary>, Vec<Ratio>) {
    (Vec::new(), Vec::new())
}
