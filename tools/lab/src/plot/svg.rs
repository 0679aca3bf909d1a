//! One chart as an SVG element: axes, bands, the throughput as steps, the downtime, tooltips.

use std::fmt::Write as _;

use super::{Band, Extent, MigrationPlot, axis};

const WIDTH: f64 = 920.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
/// Room above the plot: one row for the downtime's name, one for those of the bands.
const ABOVE: f64 = 42.0;
const BELOW: f64 = 46.0;

/// The most columns that have a tooltip. Each costs about 150 bytes.
const TOOLTIPS_MAX: usize = 300;

/// The most marks on either axis.
const TIME_MARKS_MAX: usize = 10;
const RATE_MARKS_MAX: usize = 5;

/// The downtime is drawn at least this wide, to be seen in a long run.
const STOP_WIDTH_MIN: f64 = 2.0;

/// About how wide a character of the charts' font is, to tell which names have room.
const CHARACTER_WIDTH: f64 = 6.4;

/// A chart that is still to be drawn. Lengths are in the SVG's own units.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    pub(super) plot: &'a MigrationPlot,
    pub(super) extent: Extent,
    /// The upper end of the y axis, in MiB/s.
    pub(super) top: f64,
    pub(super) height: f64,
    /// Unique in the document.
    pub(super) id: &'a str,
    /// Whether the time axis is in seconds. Otherwise it is in milliseconds.
    pub(super) time_in_s: bool,
}

impl Chart<'_> {
    pub(super) fn draw(&self) -> String {
        let (id, height) = (self.id, self.height);
        let (x, y, w, h) = (LEFT, ABOVE, self.inner_width(), self.inner_height());
        let title = escape(&self.plot.title);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n\
             <title>{title}</title>\n\
             <clipPath id=\"clip-{id}\"><rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\"/></clipPath>\n"
        );
        svg.push_str(&self.grid());
        svg.push_str(&self.bands());
        svg.push_str(&self.steps());
        svg.push_str(&self.tooltips());
        svg.push_str(&self.stop());
        svg.push_str(&self.axes());
        svg.push_str("</svg>\n");
        svg
    }

    fn inner_width(&self) -> f64 {
        WIDTH - LEFT - RIGHT
    }

    fn inner_height(&self) -> f64 {
        self.height - ABOVE - BELOW
    }

    fn bottom(&self) -> f64 {
        self.height - BELOW
    }

    fn x(&self, t_ms: f64) -> f64 {
        let share = (t_ms - self.extent.from_ms) / (self.extent.to_ms - self.extent.from_ms);
        LEFT + share * self.inner_width()
    }

    fn y(&self, mib_per_s: f64) -> f64 {
        self.bottom() - mib_per_s / self.top * self.inner_height()
    }

    fn grid(&self) -> String {
        let mut svg = String::new();
        let marks = axis::marks(0.0, self.top, RATE_MARKS_MAX);
        let step = marks.get(1).copied().unwrap_or(1.0);
        for mark in marks {
            let (y, label) = (self.y(mark), axis::label(mark, step));
            let (right, before) = (WIDTH - RIGHT, LEFT - 8.0);
            // Writing to a string can't fail; so it is everywhere below.
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{before}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                y + 4.0
            );
        }
        svg
    }

    fn bands(&self) -> String {
        let mut svg = String::new();
        for (index, band) in self.plot.bands.iter().enumerate() {
            let Some((left, right)) = self.clipped(band.from_ms, band.to_ms) else { continue };
            let odd = if index % 2 == 1 { " odd" } else { "" };
            let (top, width, height) = (ABOVE - 18.0, right - left, self.inner_height() + 18.0);
            let _ = writeln!(
                svg,
                "<g><title>{}</title><rect class=\"band{odd}\" x=\"{left:.2}\" y=\"{top}\" width=\"{width:.2}\" \
                 height=\"{height}\"/>",
                escape(&describe(band)),
            );
            if band.label.chars().count() as f64 * CHARACTER_WIDTH + 6.0 <= width {
                let (middle, label) = ((left + right) / 2.0, escape(&band.label));
                let baseline = ABOVE - 5.0;
                let _ = writeln!(
                    svg,
                    "<text class=\"name\" x=\"{middle:.1}\" y=\"{baseline}\" text-anchor=\"middle\">{label}</text>"
                );
            }
            svg.push_str("</g>\n");
        }
        svg
    }

    /// The samples as steps: each holds from its own time to that of the next.
    fn steps(&self) -> String {
        let points: Vec<_> = self.plot.points().collect();
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
        let last_step_ms = if let [.., before, last] = points[..] { last.0 - before.0 } else { 0.0 };
        let end = self.x(last.0 + last_step_ms);
        let mut line = format!("M{:.1} {:.1}", self.x(first.0), self.y(first.1));
        for (t_ms, rate) in &points[1..] {
            let _ = write!(line, "H{:.1}V{:.1}", self.x(*t_ms), self.y(*rate));
        }
        let _ = write!(line, "H{end:.1}");
        let (bottom, begin, id) = (self.bottom(), self.x(first.0), self.id);
        format!(
            "<g clip-path=\"url(#clip-{id})\"><path class=\"area\" d=\"{line}V{bottom:.1}H{begin:.1}Z\"/>\
             <path class=\"line\" d=\"{line}\"/></g>\n"
        )
    }

    /// Columns that show, when pointed at, the mean throughput of their stretch of time.
    fn tooltips(&self) -> String {
        let inside = |(t_ms, _): &(f64, f64)| (self.extent.from_ms..=self.extent.to_ms).contains(t_ms);
        let points: Vec<_> = self.plot.points().filter(inside).collect();
        let per_column = points.len().div_ceil(TOOLTIPS_MAX).max(1);
        let mut svg = String::new();
        for (index, column) in points.chunks(per_column).enumerate() {
            let from_ms = column[0].0;
            let to_ms = points.get((index + 1) * per_column).map_or(self.extent.to_ms, |next| next.0);
            let Some((left, right)) = self.clipped(from_ms, to_ms) else { continue };
            let mean = column.iter().map(|(_, rate)| rate).sum::<f64>() / column.len() as f64;
            let (width, height) = (right - left, self.inner_height());
            let _ = writeln!(
                svg,
                "<rect class=\"hover\" x=\"{left:.1}\" y=\"{ABOVE}\" width=\"{width:.1}\" height=\"{height}\">\
                 <title>{}: {mean:.1} MiB/s</title></rect>",
                self.time(from_ms)
            );
        }
        svg
    }

    fn stop(&self) -> String {
        let Some((from_ms, to_ms)) = self.plot.downtime else { return String::new() };
        let Some((left, right)) = self.clipped(from_ms, to_ms) else { return String::new() };
        let width = (right - left).max(STOP_WIDTH_MIN);
        let (top, height) = (ABOVE - 18.0, self.inner_height() + 18.0);
        let name = format!("downtime {:.1} ms", to_ms - from_ms);
        let described = format!("{name}, from {} to {}", self.time(from_ms), self.time(to_ms));
        let half = name.chars().count() as f64 * CHARACTER_WIDTH / 2.0;
        let middle = (left + width / 2.0).clamp(LEFT + half, WIDTH - RIGHT - half);
        format!(
            "<g><title>{described}</title><rect class=\"stop\" x=\"{left:.2}\" y=\"{top}\" width=\"{width:.2}\" \
             height=\"{height}\"/><text class=\"stop-name\" x=\"{middle:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{name}</text></g>\n",
            top - 7.0
        )
    }

    fn axes(&self) -> String {
        let scale = if self.time_in_s { 1e-3 } else { 1.0 };
        let (from, to) = (self.extent.from_ms * scale, self.extent.to_ms * scale);
        let marks = axis::marks(from, to, TIME_MARKS_MAX);
        let step = if let [first, second, ..] = marks[..] { second - first } else { 1.0 };
        let (bottom, right) = (self.bottom(), WIDTH - RIGHT);
        let mut svg =
            format!("<line class=\"rule\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\n");
        for mark in marks {
            let (x, label) = (self.x(mark / scale), axis::label(mark, step));
            let (tick, below) = (bottom + 5.0, bottom + 19.0);
            let _ = writeln!(
                svg,
                "<line class=\"rule\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{tick}\"/>\
                 <text x=\"{x:.1}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>"
            );
        }
        let unit = if self.time_in_s { "s" } else { "ms" };
        let (middle_x, middle_y) = (LEFT + self.inner_width() / 2.0, ABOVE + self.inner_height() / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{middle_x}\" y=\"{:.1}\" text-anchor=\"middle\">Time ({unit})</text>\n\
             <text transform=\"translate(14 {middle_y}) rotate(-90)\" text-anchor=\"middle\">\
             Throughput (MiB/s)</text>",
            self.height - 8.0
        );
        svg
    }

    /// The part of a stretch of time that is in the chart, as left and right ends.
    fn clipped(&self, from_ms: f64, to_ms: f64) -> Option<(f64, f64)> {
        let left_ms = from_ms.max(self.extent.from_ms);
        let right_ms = to_ms.min(self.extent.to_ms);
        // Comparing this way round, what is not a number is in no chart.
        (left_ms <= right_ms).then(|| (self.x(left_ms), self.x(right_ms)))
    }

    fn time(&self, t_ms: f64) -> String {
        if self.time_in_s { format!("{:.3} s", t_ms / 1e3) } else { format!("{t_ms:.1} ms") }
    }
}

fn describe(band: &Band) -> String {
    let (from, to, ms) = (band.from_ms / 1e3, band.to_ms / 1e3, band.to_ms - band.from_ms);
    format!("{}: {from:.3} s to {to:.3} s ({ms:.1} ms)", band.label)
}

/// `text` as it can stand in an element or an attribute's value.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}
