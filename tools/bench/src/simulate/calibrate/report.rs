//! A calibration as people read it in a terminal.

use std::fmt::Write as _;

use super::fit::median;
use super::{Calibrated, GroupErrors, HoldOut};
use crate::simulate::hardware::{ErrorFigures, Hardware};
use crate::simulate::output::table::{Table, percent};

/// The whole report.
#[must_use]
pub fn terminal(calibrated: &Calibrated) -> String {
    let mut text = groups(&calibrated.groups);
    text.push('\n');
    text.push_str(&summary(calibrated));
    text.push('\n');
    text.push_str(&parameters(&calibrated.file.hardware));
    for left_out in &calibrated.left_out {
        let _ = writeln!(text, "not used: {left_out}");
    }
    text
}

fn groups(groups: &[GroupErrors]) -> String {
    let mut table = Table::new(&[
        "scenario",
        "engine",
        "runs",
        "total ms",
        "model",
        "off by",
        "downtime ms",
        "model",
        "off by",
    ]);
    for group in groups {
        let middle = |of: &dyn Fn(&super::Measured) -> f64| {
            median(&mut group.measured.iter().map(of).collect::<Vec<_>>())
        };
        let show = |value: Option<f64>| value.map_or("stays".to_owned(), |value| format!("{value:.1}"));
        table.row(vec![
            group.scenario.clone(),
            group.engine.clone(),
            group.measured.len().to_string(),
            format!("{:.1}", middle(&|run| run.total_ms)),
            show(group.total_ms),
            signed_percent(group.errors.total.bias),
            format!("{:.1}", middle(&|run| run.downtime_ms)),
            show(group.downtime_ms),
            signed_percent(group.errors.downtime.bias),
        ]);
    }
    table.to_text()
}

fn signed_percent(share: f64) -> String {
    format!("{:+.0} %", share * 100.0)
}

/// What the model is off by over all runs.
fn summary(calibrated: &Calibrated) -> String {
    let mut table = Table::new(&[
        "error of the prediction",
        "median",
        "p90",
        "largest",
        "bias",
        "spread of the runs themselves",
    ]);
    let errors = &calibrated.errors;
    for (what, figures) in [
        ("total time", errors.total),
        ("downtime, by ferry's word", errors.downtime),
        ("downtime, as the guest saw it", errors.downtime_guest),
    ] {
        let ErrorFigures { median, p90, max, bias, spread } = figures;
        table.row(vec![
            what.to_owned(),
            percent(median),
            percent(p90),
            percent(max),
            signed_percent(bias),
            percent(spread),
        ]);
    }
    let mut text = table.to_text();
    if let Some(calibration) = &calibrated.file.calibration {
        let kept_back = match calibrated.hold_out {
            HoldOut::Repetitions => "every other repetition was kept back",
            HoldOut::Scenarios => "each scenario was predicted from all others",
        };
        let _ = writeln!(
            text,
            "{} runs fitted, {} predicted ({kept_back}; {} of all on a machine that was not quiet)",
            calibration.runs_fitted, calibration.runs_predicted, calibrated.runs_not_quiet
        );
    }
    text
}

/// Parameters beside their defaults.
fn parameters(hardware: &Hardware) -> String {
    let mut table = Table::new(&["parameter", "value", "default"]);
    for (parameter, value) in Hardware::PARAMETERS.iter().zip(hardware.values()) {
        table.row(vec![parameter.name.to_owned(), short(value), short(parameter.default)]);
    }
    table.to_text()
}

/// A value with three digits that count.
fn short(value: f64) -> String {
    if value.abs() >= 1000.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}
