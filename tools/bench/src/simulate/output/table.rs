//! Plain tables for a terminal: aligned columns, numbers to the right, no lines.

use comfy_table::{CellAlignment, ContentArrangement, presets};

/// A table that is being filled.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

impl Table {
    /// A table with these headings.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(headings);
        Self(table)
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.0.add_row(cells);
    }

    /// The table's lines.
    #[must_use]
    pub fn to_text(mut self) -> String {
        for index in 0..self.0.column_count() {
            let is_number =
                |text: String| text.starts_with(|c: char| c.is_ascii_digit() || "+-−∞".contains(c));
            let column = |row: &comfy_table::Row| row.cell_iter().nth(index).map(comfy_table::Cell::content);
            let numbers = self.0.row_iter().filter_map(column).filter(|text| is_number(text.clone())).count();
            if numbers * 2 > self.0.row_count()
                && let Some(column) = self.0.column_mut(index)
            {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let lines = self.0.lines().map(|line| line.trim_end().to_owned() + "\n");
        lines.collect()
    }
}

/// Values with their names in front, a line each.
#[must_use]
pub fn named(facts: &[(String, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    facts.iter().map(|(name, value)| format!(" {name:<width$}  {value}\n")).collect()
}

/// A share as whole percent, with a decimal where it is small.
#[must_use]
pub fn percent(share: f64) -> String {
    if share.abs() < 0.0995 { format!("{:.1} %", share * 100.0) } else { format!("{:.0} %", share * 100.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_lines_have_no_ends() {
        let mut table = Table::new(&["name", "ms"]);
        table.row(vec!["a".into(), "1.0".into()]);
        table.row(vec!["long name".into(), "100.0".into()]);
        let text = table.to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("  1.0") && lines[2].ends_with("100.0"), "{text}");
        assert!(lines.iter().all(|line| !line.ends_with(' ')));
    }

    #[test]
    fn shares_are_short() {
        assert_eq!([percent(0.0512), percent(0.256), percent(1.5)], ["5.1 %", "26 %", "150 %"]);
    }
}
