//! A summary for the terminal: medians with their range and ratios, by scenario; what failed, and who was absent.
//!
//! Plain text without colours, since it goes to files and pipes as well: what is shown for certain has an arrow.

use std::cmp::Ordering;
use std::fmt::Write as _;

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};

use super::cast::Cast;
use super::limits::{LimitWords, counts};
use super::number::{self, heading, value_of};
use super::plots::boxes;
use super::reference;
use crate::results::{Distribution, EngineSummary, Metric, Outcome, Results, ScenarioResult};
use crate::stats::{RatioView, ratio_of};

/// The narrowest summary; narrower terminals wrap it.
pub const COLUMNS_MIN: usize = 80;

/// From this width on a range stands beside its median, and not below it.
const WIDE_FROM: usize = 116;

/// Room for a limit's bound, what was reached, and the verdict.
const LIMIT_COLUMNS: [u16; 3] = [13, 18, 17];

/// Room for the engine's name.
const NAME_COLUMNS: u16 = 16;

/// The whole summary in lines of at most `columns`, but for names that have no room.
#[must_use]
pub fn summary(results: &Results, columns: usize) -> String {
    let columns = columns.max(COLUMNS_MIN);
    let cast = Cast::of(results);
    let reference = reference(results).map(|engine| engine.name.as_str());
    let mut text = format!("{}\n", plain(&results.title));
    for scenario in &results.scenarios {
        let _ = writeln!(text, "\n{}  [{}]", plain(&scenario.scenario.title), plain(&scenario.scenario.name));
        text.push_str(&table(scenario, &cast, reference, columns));
    }
    text.push_str(&failures(results));
    text.push_str(&limits(results, columns));
    if let Some(reference) = reference {
        let _ = writeln!(
            text,
            "\nEach cell: the median, the least to the largest, the ratio to {} with its 95 % confidence\n\
             interval. ▼ less and ▲ more: the interval excludes 1. Less is better everywhere.",
            plain(reference)
        );
    }
    text
}

fn table(scenario: &ScenarioResult, cast: &Cast, reference: Option<&str>, columns: usize) -> String {
    let wide = columns >= WIDE_FROM;
    let metrics = Metric::MAIN.len();
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let headings = Metric::MAIN.into_iter().map(heading);
    table.set_header(std::iter::once("engine".to_owned()).chain(headings));
    for engine in boxes::engines(scenario, cast) {
        if let Some(summary) = scenario.engines.iter().find(|summary| summary.engine == engine) {
            table.add_row(row(scenario, summary, reference, wide));
        }
    }
    let room = (columns.min(132) - usize::from(NAME_COLUMNS)) / metrics;
    let room = u16::try_from(room).unwrap_or(NAME_COLUMNS);
    for (index, column) in table.column_iter_mut().enumerate() {
        let width = if index == 0 { NAME_COLUMNS } else { room };
        column.set_constraint(ColumnConstraint::Absolute(Width::Fixed(width))).set_padding((0, 1));
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n") + "\n"
}

fn row(
    scenario: &ScenarioResult,
    summary: &EngineSummary,
    reference: Option<&str>,
    wide: bool,
) -> Vec<String> {
    let mut name = cut(&plain(&summary.engine), usize::from(NAME_COLUMNS) - 1);
    if summary.moved < summary.runs {
        let _ = write!(name, "\n{} of {} moved", summary.moved, summary.runs);
    }
    let mut cells = vec![name];
    for metric in Metric::MAIN {
        let found = summary.metrics.iter().find(|(of, _)| *of == metric).map(|(_, found)| found);
        let Some(found) = found else {
            cells.push("-".to_owned());
            continue;
        };
        let ratio = reference
            .filter(|reference| *reference != summary.engine)
            .and_then(|reference| ratio_of(scenario, metric, &summary.engine, reference));
        let mut cell = spread(metric, found, wide);
        if let Some(view) = ratio {
            cell.push('\n');
            cell.push_str(&verdict(view));
        }
        cells.push(cell);
    }
    cells
}

fn spread(metric: Metric, found: &Distribution, wide: bool) -> String {
    let range = format!("{}–{}", value_of(metric, found.min), value_of(metric, found.max));
    let middle = value_of(metric, found.p50);
    match (found.count, wide) {
        (1, _) => format!("{middle} (one)"),
        (_, true) => format!("{middle} ({range})"),
        (_, false) => format!("{middle}\n{range}"),
    }
}

fn verdict(view: RatioView) -> String {
    let sign = match view.shows() {
        Some(Ordering::Less) => "▼",
        Some(Ordering::Greater) => "▲",
        Some(Ordering::Equal) | None => "",
    };
    let ratio = number::ratio(view.ratio);
    match view.ci95 {
        Some((low, high)) => format!("{sign}{ratio} {}–{}", number::ratio(low), number::ratio(high)),
        None => ratio,
    }
}

/// The suite's limits: a line of figures each, and below it what they are of.
fn limits(results: &Results, columns: usize) -> String {
    if results.limits.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["limit", "bound", "reached", "met?"]);
    for result in &results.limits {
        let words = LimitWords::of(result);
        let mut what = format!("{}\n  {} [{}]", result.limit.title, words.what, result.limit.scenario);
        if let Some(note) = &result.note {
            let _ = write!(what, "\n  {note}");
        }
        let what: Vec<String> = what.lines().map(plain).collect();
        let aim = words.aim.map_or(String::new(), |aim| format!("\naim {aim}"));
        let interval = words.interval.map_or(String::new(), |interval| format!("\n{interval}"));
        let cells =
            [what.join("\n"), words.bound + &aim, words.reached + &interval, words.verdict.to_owned()];
        table.add_row(cells);
    }
    let figures: usize = LIMIT_COLUMNS.iter().map(|columns| usize::from(*columns)).sum();
    let room = u16::try_from(columns.min(132) - figures).unwrap_or(LIMIT_COLUMNS[0]);
    for (column, width) in table.column_iter_mut().zip([room].into_iter().chain(LIMIT_COLUMNS)) {
        column.set_constraint(ColumnConstraint::Absolute(Width::Fixed(width))).set_padding((0, 1));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    format!("\nLimits: {}\n{}\n", counts(&results.limits), lines.join("\n"))
}

fn failures(results: &Results) -> String {
    let mut text = String::new();
    for scenario in &results.scenarios {
        for run in &scenario.runs {
            let (what, reason) = match &run.outcome {
                Outcome::Moved => match run.harm() {
                    Some(harm) => ("GUEST HARMED", harm),
                    None => continue,
                },
                Outcome::NotConverged => ("did not converge", String::new()),
                Outcome::Unsupported { reason } => ("not supported", reason.clone()),
                Outcome::Failed { reason } => ("FAILED", reason.clone()),
            };
            let colon = if reason.is_empty() { "" } else { ": " };
            let place = format!("{} / {} / {}", scenario.scenario.name, run.engine, run.repetition + 1);
            let _ = writeln!(text, "{}: {what}{colon}{}", plain(&place), plain(&reason));
        }
    }
    for engine in &results.engines {
        if let Some(reason) = &engine.absent {
            let _ = writeln!(text, "{} was absent: {}", plain(&engine.name), plain(reason));
        }
    }
    let noisy = results.scenarios.iter().flat_map(|scenario| &scenario.runs);
    let noisy = noisy.filter(|run| !run.measures.idleness.quiet).count();
    if noisy > 0 {
        let _ = writeln!(text, "In {noisy} runs the machine was not quiet.");
    }
    if text.is_empty() { text } else { format!("\n{text}") }
}

/// `text` without characters that would steer the terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '·' } else { character }).collect()
}

fn cut(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    text.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}
