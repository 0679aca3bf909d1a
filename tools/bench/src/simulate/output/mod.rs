//! How the model shows what it found: tables for the terminal, charts and pages of HTML. Each of them says that it is a
//! model, and how far off that has been seen to be.

pub mod chart;
pub mod page;
pub mod table;

use super::hardware::{Calibration, HardwareFile};
use table::percent;

/// The sentences that stand with everything the model says.
#[must_use]
pub fn note(file: &HardwareFile) -> String {
    let model = "A model, not a measurement: the production protocol core in virtual time, with links as fluid and \
                 costs as parameters.";
    match &file.calibration {
        None => format!("{model} The parameters are defaults that were not checked against real runs."),
        Some(Calibration { machine, runs_fitted, runs_predicted, total, downtime, .. }) => format!(
            "{model} Parameters from {runs_fitted} real runs on {machine}; {runs_predicted} others were predicted with \
             a median error of {} for the total time (nine in ten within {}) and {} for the downtime (within {}).",
            percent(total.median),
            percent(total.p90),
            percent(downtime.median),
            percent(downtime.p90),
        ),
    }
}
