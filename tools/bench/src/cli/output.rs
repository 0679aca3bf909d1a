//! Writes results where people and programs look for them.

use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;

use anyhow::Context;

use crate::report::{csv, html, terminal};
use crate::results::Results;

/// Columns of a summary that does not go to a terminal.
const COLUMNS_DEFAULT: usize = 120;

/// Writes the page to `path`.
pub(super) fn write_html(path: &Path, results: &Results) -> anyhow::Result<()> {
    write_text(path, &html::page(results))
}

/// Writes the table to `path`.
pub(super) fn write_csv(path: &Path, results: &Results) -> anyhow::Result<()> {
    let failed = || format!("can't write {}", path.display());
    let file = File::create(path).with_context(failed)?;
    csv::write(results, file).with_context(failed)?;
    println!("{}", path.display());
    Ok(())
}

/// Writes `text` to `path` and says so.
pub(super) fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// Prints the summary, as wide as the terminal is, within reason.
pub(super) fn print(results: &Results) {
    let terminal = std::io::stdout().is_terminal();
    let width = if terminal { usize::from(console::Term::stdout().size().1) } else { COLUMNS_DEFAULT };
    println!("{}", terminal::summary(results, width.clamp(80, 160)));
}
