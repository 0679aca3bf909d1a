//! Comparisons as text for the terminal.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::agree::Agreements;
use super::{Change, Comparison, Verdict};
use crate::report::number::{self, with_unit};
use crate::report::terminal::plain;
use crate::results::Metric;
use crate::stats::metric::Against;

impl Comparison {
    /// What changed, what can't be compared, and how much did neither; with `all`, every comparison.
    #[must_use]
    pub fn to_terminal(&self, all: bool) -> String {
        let mut text = String::new();
        for warning in &self.warnings {
            let _ = writeln!(text, "Note: {}.", plain(warning));
        }
        let count = |verdict| self.changes.iter().filter(|change| change.verdict == verdict).count();
        let is_shown =
            |change: &&Change| all || change.verdict != Verdict::NoChangeShown || change.note.is_some();
        let mut shown: Vec<&Change> = self.changes.iter().filter(is_shown).collect();
        shown.sort_by_key(|change| order(change.verdict));
        if !shown.is_empty() {
            text.push_str(&changes(&shown));
        }
        for failures in &self.failures {
            let ((then, of_then), (now, of_now)) = (failures.before, failures.after);
            let _ = writeln!(
                text,
                "{}: {} in {}: {now} of {of_now} runs moved their guest unharmed; then {then} of {of_then}.",
                word(failures.verdict),
                plain(&failures.engine),
                plain(&failures.scenario)
            );
        }
        let compared = self.changes.len() - count(Verdict::NotComparable);
        let _ = writeln!(
            text,
            "{compared} comparisons: {} worse, {} better, {} without a change shown; {} could not be compared.\n\
             Intervals are 95 % of each comparison alone; verdicts take all together (at most 1 in 20 of the changes\n\
             called so is expected to be none).",
            count(Verdict::Worse),
            count(Verdict::Better),
            count(Verdict::NoChangeShown),
            count(Verdict::NotComparable),
        );
        text
    }
}

fn order(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Worse => 0,
        Verdict::NotComparable => 1,
        Verdict::Better => 2,
        Verdict::NoChangeShown => 3,
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Worse => "WORSE",
        Verdict::Better => "better",
        Verdict::NoChangeShown => "no change shown",
        Verdict::NotComparable => "not comparable",
    }
}

fn table(headings: &[&str], right_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.to_vec());
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index >= right_from {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn lines(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn changes(shown: &[&Change]) -> String {
    let mut table = table(&["verdict", "scenario", "engine", "metric", "then", "now", "change", "95 %"], 4);
    let mut notes = String::new();
    for change in shown {
        let median =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| with_unit(change.metric, value));
        table.add_row(vec![
            word(change.verdict).to_owned(),
            plain(&change.scenario),
            plain(&change.engine),
            change.metric.name().to_owned(),
            median(change.medians.map(|medians| medians.0)),
            median(change.medians.map(|medians| medians.1)),
            change.change.map_or("-".to_owned(), |value| by(change.metric, value)),
            change.ci95.map_or("-".to_owned(), |(low, high)| {
                format!("{} to {}", by(change.metric, low), by(change.metric, high))
            }),
        ]);
        if let Some(note) = &change.note {
            let place = format!("{} / {} / {}", change.scenario, change.engine, change.metric.name());
            let _ = writeln!(notes, "{}: {}.", plain(&place), plain(note));
        }
    }
    lines(&table) + &notes
}

/// A change as people say it: in percent, or in the metric's own unit where it has no ratio.
fn by(metric: Metric, change: f64) -> String {
    let (sign, size) = match metric.against() {
        Against::Ratio => {
            let percent = (change - 1.0) * 100.0;
            (percent, format!("{:.1} %", percent.abs()))
        }
        Against::Difference => (change, with_unit(metric, change.abs())),
    };
    if sign < 0.0 { format!("−{size}") } else { format!("+{size}") }
}

impl Agreements {
    /// Every ratio in both results, and how many agree; those that do not come first.
    #[must_use]
    pub fn to_terminal(&self) -> String {
        let mut sorted: Vec<_> = self.ratios.iter().collect();
        sorted.sort_by_key(|ratio| ratio.agrees);
        let mut table = table(&["", "scenario", "engine", "metric", "first", "95 %", "second", "95 %"], 4);
        let range = |(low, high): (f64, f64)| format!("{} to {}", number::ratio(low), number::ratio(high));
        for ratio in sorted {
            table.add_row(vec![
                if ratio.agrees { "agree" } else { "APART" }.to_owned(),
                plain(&ratio.scenario),
                plain(&ratio.engine),
                ratio.metric.name().to_owned(),
                number::ratio(ratio.before.0),
                range(ratio.before.1),
                number::ratio(ratio.after.0),
                range(ratio.after.1),
            ]);
        }
        let to = self.ratios.first().map_or("another engine", |ratio| ratio.to.as_str());
        let apart = self.ratios.len() - self.agreed;
        let verdict = match self.exit_code() {
            0 => "as they should",
            1 => "MORE APART THAN CHANCE EXPLAINS",
            _ => "nothing to compare",
        };
        format!(
            "{}{} of {} ratios to {} agree within their intervals, {apart} are apart; up to {} would be by chance: \
             {verdict}.\n",
            lines(&table),
            self.agreed,
            self.ratios.len(),
            plain(to),
            self.apart_max,
        )
    }
}
