//! What the page draws, as `gather.js` reads it.

use serde::Deserialize;

use ferry_bench::results::Results;

#[derive(Debug, Deserialize)]
pub(crate) struct Drawn {
    pub(crate) title: String,
    pub(crate) results: Results,
    pub(crate) figures: Vec<Figure>,
    pub(crate) cells: Vec<Median>,
    pub(crate) failures: Vec<FailureRow>,
    pub(crate) limits: Vec<LimitRow>,
    /// Labels that lie on each other or are cut off.
    pub(crate) clashes: Vec<String>,
    pub(crate) looks: Vec<EngineLook>,
    /// By how much the page is wider than the window.
    pub(crate) overflow: f64,
    pub(crate) paper: String,
    /// Scripts that would run.
    pub(crate) scripts: u32,
}

/// A row of the table of limits, with the text of its cells.
#[derive(Debug, Deserialize)]
pub(crate) struct LimitRow {
    pub(crate) title: String,
    pub(crate) scenario: String,
    pub(crate) value: Option<f64>,
    pub(crate) text: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Figure {
    pub(crate) kind: String,
    pub(crate) scenario: Option<String>,
    pub(crate) engine: Option<String>,
    pub(crate) metric: Option<String>,
    pub(crate) repetition: Option<u32>,
    pub(crate) sweep: Option<String>,
    pub(crate) factor: Option<f64>,
    pub(crate) x: Option<Ticks>,
    pub(crate) y: Option<Ticks>,
    pub(crate) values: Vec<DrawnValue>,
    pub(crate) medians: Vec<Median>,
    pub(crate) parts: Vec<DrawnPart>,
    pub(crate) spans: Vec<Span>,
    pub(crate) columns: Vec<RatioColumn>,
}

/// The marks of an axis: value and place.
#[derive(Debug, Deserialize)]
pub(crate) struct Ticks {
    scale: String,
    marks: Vec<(f64, f64)>,
}

impl Ticks {
    /// Where a reader of the axis finds `value`: on the straight line through its outermost marks. `None` if it has
    /// too few.
    pub(crate) fn place_of(&self, value: f64) -> Option<f64> {
        let read = |value: f64| if self.scale == "log" { value.ln() } else { value };
        let (first, last) = (self.marks.first()?, self.marks.last()?);
        if self.marks.len() < 2 {
            return None;
        }
        let share = (read(value) - read(first.0)) / (read(last.0) - read(first.0));
        Some(first.1 + share * (last.1 - first.1))
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct DrawnValue {
    pub(crate) scenario: Option<String>,
    pub(crate) engine: String,
    pub(crate) metric: String,
    pub(crate) repetition: Option<u32>,
    pub(crate) value: f64,
    pub(crate) place: (f64, f64),
}

#[derive(Debug, Deserialize)]
pub(crate) struct Median {
    pub(crate) scenario: String,
    pub(crate) engine: String,
    pub(crate) metric: String,
    pub(crate) value: f64,
    /// As it is written.
    pub(crate) text: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct DrawnPart {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) height: f64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Span {
    /// The round; a standstill has none.
    pub(crate) round: Option<u32>,
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) left: f64,
    pub(crate) right: f64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RatioColumn {
    pub(crate) metric: String,
    pub(crate) x: Ticks,
    pub(crate) points: Vec<RatioPoint>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RatioPoint {
    pub(crate) scenario: String,
    pub(crate) engine: String,
    pub(crate) ratio: f64,
    pub(crate) low: Option<f64>,
    pub(crate) high: Option<f64>,
    pub(crate) place: (f64, f64),
}

#[derive(Debug, Deserialize)]
pub(crate) struct FailureRow {
    pub(crate) scenario: String,
    pub(crate) engine: String,
    pub(crate) count: usize,
}

#[derive(Debug, Deserialize)]
pub(crate) struct EngineLook {
    pub(crate) engine: String,
    pub(crate) look: String,
}
