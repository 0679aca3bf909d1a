//! A calibration as people read it: in a terminal, and as a page with what was predicted against what was measured.

use std::fmt::Write as _;

use maud::html;

use super::fit::median;
use super::{Calibrated, GroupErrors, HoldOut, Measured};
use crate::report::number::digits;
use crate::simulate::hardware::{ErrorFigures, Hardware};
use crate::simulate::output::chart::{Chart, Series};
use crate::simulate::output::note;
use crate::simulate::output::page::{Page, captioned, table};
use crate::simulate::output::table::{Table, percent};

const GROUP_HEADINGS: [&str; 9] =
    ["scenario", "engine", "runs", "total ms", "model", "off by", "downtime ms", "model", "off by"];

const ERROR_HEADINGS: [&str; 6] =
    ["error of the prediction", "median", "p90", "largest", "bias", "spread of the runs themselves"];

const PARAMETER_HEADINGS: [&str; 3] = ["parameter", "value", "default"];

/// The whole report.
#[must_use]
pub fn terminal(calibrated: &Calibrated) -> String {
    let mut text = to_text(&GROUP_HEADINGS, group_rows(&calibrated.groups));
    let _ = write!(text, "\n{}{}\n", to_text(&ERROR_HEADINGS, error_rows(calibrated)), basis(calibrated));
    let _ =
        write!(text, "\n{}", to_text(&PARAMETER_HEADINGS, parameter_rows(&calibrated.file.hardware, false)));
    for left_out in &calibrated.left_out {
        let _ = writeln!(text, "not used: {left_out}");
    }
    text
}

fn to_text(headings: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new(headings);
    rows.into_iter().for_each(|row| table.row(row));
    table.to_text()
}

/// The same as a page.
#[must_use]
pub fn html(calibrated: &Calibrated) -> String {
    let total = against(
        calibrated,
        "total time, s",
        |run| run.total_ms / 1e3,
        |group| group.total_ms.map(|ms| ms / 1e3),
    );
    let downtime = against(calibrated, "downtime, ms", |run| run.downtime_ms, |group| group.downtime_ms);
    let sections = html! {
        h2 { "How far off" }
        (table(&ERROR_HEADINGS, &error_rows(calibrated)))
        p { (basis(calibrated)) }
        div class="grid" {
            (captioned("Total time", "Each mark is a run that was predicted; on the line it was predicted right.", &total.draw()))
            (captioned("Downtime", "By ferry's own word.", &downtime.draw()))
        }
        h2 { "Scenarios" }
        p { "Medians of the runs that were predicted, beside the prediction." }
        (table(&GROUP_HEADINGS, &group_rows(&calibrated.groups)))
        h2 { "Parameters" }
        (table(&["parameter", "value", "default", "where the default comes from"],
            &parameter_rows(&calibrated.file.hardware, true)))
        @if !calibrated.left_out.is_empty() {
            details {
                summary { "What was not used" }
                ul { @for left_out in &calibrated.left_out { li { (left_out) } } }
            }
        }
    };
    let machine = calibrated.file.calibration.as_ref().map(|calibration| calibration.machine.clone());
    let page = Page {
        title: "The model against real runs".to_owned(),
        lead: "Parameters from one part of ferry's runs, and how well they predict the others.".to_owned(),
        note: note(&calibrated.file),
        facts: machine.into_iter().map(|machine| ("machine".to_owned(), machine)).collect(),
        sections,
    };
    page.to_html(calibrated)
}

/// What was predicted against what was measured, a series for each engine.
fn against(
    calibrated: &Calibrated,
    quantity: &str,
    measured: impl Fn(&Measured) -> f64,
    predicted: impl Fn(&GroupErrors) -> Option<f64>,
) -> Chart {
    let mut series: Vec<Series> = Vec::new();
    for group in &calibrated.groups {
        let Some(prediction) = predicted(group) else { continue };
        let points = group.measured.iter().map(|run| (measured(run), Some(prediction)));
        match series.iter_mut().find(|series| series.name == group.engine) {
            Some(known) => known.points.extend(points),
            None => {
                series.push(Series { name: group.engine.clone(), points: points.collect(), joined: false })
            }
        }
    }
    Chart {
        describe: format!("Predicted against measured {quantity}"),
        x: format!("measured {quantity}"),
        y: format!("predicted {quantity}"),
        series,
        line: None,
        diagonal: true,
        linear: (false, false),
    }
}

fn group_rows(groups: &[GroupErrors]) -> Vec<Vec<String>> {
    let row = |group: &GroupErrors| {
        let middle = |of: &dyn Fn(&Measured) -> f64| {
            digits(median(&mut group.measured.iter().map(of).collect::<Vec<_>>()))
        };
        let show = |value: Option<f64>| value.map_or("stays".to_owned(), digits);
        vec![
            group.scenario.clone(),
            group.engine.clone(),
            group.measured.len().to_string(),
            middle(&|run| run.total_ms),
            show(group.total_ms),
            signed_percent(group.errors.total.bias),
            middle(&|run| run.downtime_ms),
            show(group.downtime_ms),
            signed_percent(group.errors.downtime.bias),
        ]
    };
    groups.iter().map(row).collect()
}

fn signed_percent(share: f64) -> String {
    format!("{:+.0} %", share * 100.0).replace('-', "−")
}

/// What the model is off by over all runs.
fn error_rows(calibrated: &Calibrated) -> Vec<Vec<String>> {
    let errors = &calibrated.errors;
    let row = |(what, figures): (&str, ErrorFigures)| {
        let ErrorFigures { median, p90, max, bias, spread } = figures;
        vec![
            what.to_owned(),
            percent(median),
            percent(p90),
            percent(max),
            signed_percent(bias),
            percent(spread),
        ]
    };
    [
        ("total time", errors.total),
        ("downtime, by ferry's word", errors.downtime),
        ("downtime, as the guest saw it", errors.downtime_guest),
    ]
    .map(row)
    .to_vec()
}

/// What the errors are based on.
fn basis(calibrated: &Calibrated) -> String {
    let kept_back = match calibrated.hold_out {
        HoldOut::Repetitions => "every other repetition was kept back",
        HoldOut::Scenarios => "each scenario was predicted from all others",
    };
    calibrated.file.calibration.as_ref().map_or(String::new(), |calibration| {
        format!(
            "{} runs fitted, {} predicted ({kept_back}; {} of all on a machine that was not quiet).",
            calibration.runs_fitted, calibration.runs_predicted, calibrated.runs_not_quiet
        )
    })
}

/// Parameters beside their defaults, with where these come from if asked.
fn parameter_rows(hardware: &Hardware, sources: bool) -> Vec<Vec<String>> {
    let row = |(parameter, value): (&crate::simulate::hardware::Parameter, f64)| {
        let mut row = vec![parameter.name.to_owned(), digits(value), digits(parameter.default)];
        if sources {
            row.push(parameter.source.to_owned());
        }
        row
    };
    Hardware::PARAMETERS.iter().zip(hardware.values()).map(row).collect()
}
