//! The drawing for a terminal: columns of eighth blocks, an axis, and markers below it.
//!
//! ```text
//!  MiB/s
//!   600 ┤▆▇▇▆▇▇▅▄▄▅▄▄▅    ▇▇▆▇
//!     0 ┼─────▲────────▼──▲─────
//!       0.0 s     1.0 s     2.0 s
//! ```
//!
//! No colours: the text may go to a file as well.

use super::{Extent, MigrationPlot, axis};

/// The narrowest drawing; a terminal that is narrower wraps it.
const COLUMNS_MIN: usize = 30;

/// Rows of the plot itself.
const ROWS: usize = 10;

/// Room left of the axis for its labels.
const LABEL_COLUMNS: usize = 7;

const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl MigrationPlot {
    /// Draws into `columns` columns. The lines end with line feeds and have no trailing spaces.
    #[must_use]
    pub fn to_terminal(&self, columns: usize) -> String {
        let width = columns.max(COLUMNS_MIN) - LABEL_COLUMNS - 2;
        let extent = self.extent();
        let top = axis::round_top(extent.mib_per_s_max);
        let heights = self.column_heights(extent, top, width);
        let mut lines = vec![self.title.clone(), format!("{:>LABEL_COLUMNS$}", "MiB/s")];
        for row in (0..ROWS).rev() {
            let cells: String = heights.iter().map(|height| EIGHTHS[eighths_in_row(*height, row)]).collect();
            let value = top * (row + 1) as f64 / ROWS as f64;
            let label =
                if row % 2 == 1 { axis::label(value, top / ROWS as f64 * 2.0) } else { String::new() };
            let tick = if row % 2 == 1 { '┤' } else { '│' };
            lines.push(format!("{label:>LABEL_COLUMNS$} {tick}{cells}"));
        }
        lines.push(self.axis_line(extent, width));
        lines.push(time_labels(extent, width));
        lines.push(self.legend());
        lines.push(String::new());
        let name_columns = self.facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in &self.facts {
            let padding = " ".repeat(name_columns - name.chars().count());
            lines.push(format!("  {name}{padding}  {value}"));
        }
        let mut text: String = lines.iter().map(|line| format!("{}\n", line.trim_end())).collect();
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    }

    /// The height of each column in eighths of a row: the mean of the samples that fall into it. A
    /// column between two samples shows the earlier one.
    fn column_heights(&self, extent: Extent, top: f64, width: usize) -> Vec<usize> {
        let mut sums = vec![(0.0, 0u32); width];
        for (t_ms, rate) in self.points() {
            let (sum, count) = &mut sums[column(extent, t_ms, width)];
            *sum += rate;
            *count += 1;
        }
        let mut last = 0.0;
        let last_sample_ms = self.points().map(|(t_ms, _)| t_ms).fold(f64::NEG_INFINITY, f64::max);
        let last_column = if last_sample_ms.is_finite() { column(extent, last_sample_ms, width) } else { 0 };
        let mean = |(index, (sum, count)): (usize, (f64, u32))| {
            if count > 0 {
                last = sum / f64::from(count);
            } else if index > last_column {
                last = 0.0;
            }
            let share = (last / top).clamp(0.0, 1.0);
            let eighths = rounded(share * (ROWS * 8) as f64, ROWS * 8);
            // Little is not nothing.
            if last > 0.0 { eighths.max(1) } else { 0 }
        };
        sums.into_iter().enumerate().map(mean).collect()
    }

    fn axis_line(&self, extent: Extent, width: usize) -> String {
        let mut cells = vec!['─'; width];
        let mut set = |t_ms: f64, mark: char| cells[column(extent, t_ms, width)] = mark;
        if let Some(start_ms) = self.migration_start_ms() {
            set(start_ms, '├');
        }
        if let Some((from_ms, to_ms)) = self.downtime {
            // The end first: where both fall into one column, the stop is what matters.
            set(to_ms, '▲');
            set(from_ms, '▼');
        }
        let cells: String = cells.into_iter().collect();
        format!("{:>LABEL_COLUMNS$} ┼{cells}", "0")
    }

    fn legend(&self) -> String {
        let mut parts = Vec::new();
        if let Some(start_ms) = self.migration_start_ms() {
            parts.push(format!("├ migration starts ({start_ms:.0} ms)"));
        }
        if let Some((from_ms, to_ms)) = self.downtime {
            parts.push(format!("▼ stop-and-copy ({from_ms:.0} ms)"));
            parts.push(format!("▲ resumed ({to_ms:.0} ms)"));
        }
        format!("{:LABEL_COLUMNS$}  {}", "", parts.join("   "))
    }
}

fn eighths_in_row(height: usize, row: usize) -> usize {
    height.saturating_sub(row * 8).min(8)
}

fn column(extent: Extent, t_ms: f64, width: usize) -> usize {
    let share = (t_ms - extent.from_ms) / (extent.to_ms - extent.from_ms);
    rounded((share * width as f64).floor(), width - 1)
}

/// `value` as a whole number of 0..=`most`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before the cast")]
fn rounded(value: f64, most: usize) -> usize {
    value.round().clamp(0.0, most as f64) as usize
}

fn time_labels(extent: Extent, width: usize) -> String {
    let marks = axis::marks(extent.from_ms / 1e3, extent.to_ms / 1e3, width / 12);
    let step = if let [first, second, ..] = marks[..] { second - first } else { 1.0 };
    let mut line = String::new();
    for mark in marks {
        let text = format!("{} s", axis::label(mark, step));
        let at = LABEL_COLUMNS + 2 + column(extent, mark * 1e3, width);
        let used = line.chars().count();
        // The label starts under its mark; one that has no room before the last is left out.
        if at >= used && at + text.len() <= LABEL_COLUMNS + 2 + width {
            line.push_str(&" ".repeat(at - used));
            line.push_str(&text);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::super::Band;
    use super::*;

    fn plot() -> MigrationPlot {
        let rate = |t_ms: f64| if (600.0..650.0).contains(&t_ms) { 0.0 } else { 400.0 };
        MigrationPlot {
            title: "A migration".into(),
            samples: (0..100).map(|index| f64::from(index) * 10.0).map(|t_ms| (t_ms, rate(t_ms))).collect(),
            bands: vec![Band { from_ms: 200.0, to_ms: 600.0, label: "round 0".into() }],
            downtime: Some((600.0, 650.0)),
            facts: vec![("downtime".into(), "50 ms".into()), ("total".into(), "450 ms".into())],
        }
    }

    #[test]
    fn every_line_fits_the_width_and_the_stop_shows() {
        for columns in [30, 80, 200] {
            let text = plot().to_terminal(columns);
            let drawing = text.lines().skip(2).take(ROWS + 2);
            assert!(drawing.clone().all(|line| line.chars().count() <= columns), "{text}");
            let bottom: Vec<char> = drawing.clone().nth(ROWS - 1).unwrap().chars().collect();
            let axis: Vec<char> = drawing.clone().nth(ROWS).unwrap().chars().collect();
            let stop = axis.iter().position(|cell| *cell == '▼').unwrap();
            let start = axis.iter().position(|cell| *cell == '├').unwrap();
            assert!(start < stop, "{text}");
            if columns >= 80 {
                assert_eq!((bottom[stop + 1], bottom[stop - 1]), (' ', '█'), "{text}");
            }
        }
    }

    #[test]
    fn half_the_scale_is_half_the_height() {
        let flat = MigrationPlot { samples: vec![(0.0, 1000.0), (500.0, 500.0)], ..MigrationPlot::default() };
        let text = flat.to_terminal(40);
        let last = |row: usize| text.lines().nth(2 + row).unwrap().chars().count() == 40;
        assert!(!last(ROWS / 2 - 1) && last(ROWS / 2), "{text}");
    }

    #[test]
    fn nothing_to_draw_is_drawn_as_nothing() {
        let text = MigrationPlot::default().to_terminal(0);
        assert!(!text.contains('█') && text.contains("MiB/s"), "{text}");
    }
}
