//! What a campaign has come to, for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::campaign::Judged;
use crate::plan::Before;
use crate::verdict::Ending;

/// A row for each place: what happened there, and how it ended.
#[must_use]
pub fn table(judged: &[Judged]) -> String {
    let mut rows: BTreeMap<(String, String), BTreeMap<String, usize>> = BTreeMap::new();
    for Judged { fault, verdict, .. } in judged {
        let after =
            if fault.before == Before::Nothing { String::new() } else { format!(" ({:?})", fault.before) };
        let row = rows.entry((fault.side.to_string(), format!("{}{after}", fault.step))).or_default();
        let ending = verdict.ending.map_or_else(|| "?".to_owned(), |ending| ending.to_string());
        let bad = if verdict.is_good() { "" } else { " FAILED" };
        *row.entry(format!("{}: {ending}{bad}", fault.effect.kind())).or_default() += 1;
    }
    let width = rows.keys().map(|(_, place)| place.len()).max().unwrap_or_default();
    let mut text = String::new();
    for ((side, place), cells) in rows {
        let cells = cells
            .into_iter()
            .map(|(cell, count)| if count == 1 { cell } else { format!("{cell} ({count})") });
        let cells: Vec<String> = cells.collect();
        // Writing to a String can't fail.
        let _ = writeln!(text, "{side}  {place:width$}  {}", cells.join(", "));
    }
    text
}

/// How many ended how, in a line.
#[must_use]
pub fn endings(judged: &[Judged]) -> String {
    let mut counts: BTreeMap<Ending, usize> = BTreeMap::new();
    judged
        .iter()
        .filter_map(|judged| judged.verdict.ending)
        .for_each(|ending| *counts.entry(ending).or_default() += 1);
    let parts: Vec<String> = counts.iter().map(|(ending, count)| format!("{count} {ending}")).collect();
    parts.join(", ")
}

/// The last line.
#[must_use]
pub fn last_line(judged: &[Judged]) -> String {
    let count = |is: fn(&Judged) -> bool| judged.iter().filter(|judged| is(judged)).count();
    let doubled = count(|judged| judged.verdict.doubled.is_some());
    let lost = count(|judged| judged.verdict.lost.is_some());
    let leaked = count(|judged| !judged.verdict.leaked.is_empty());
    let wrong = count(|judged| judged.verdict.wrong.is_some());
    let else_wrong = if wrong == 0 { String::new() } else { format!(", {wrong} otherwise wrong") };
    format!("{} faults: {doubled} doubled, {lost} lost, {leaked} leaked{else_wrong}", judged.len())
}
