//! From values to places: linear and logarithmic scales with round marks.

use ferry_lab::plot::axis;

use crate::report::number;

/// Values that span more than this factor are drawn on a logarithmic scale.
const LOGARITHMIC_FROM: f64 = 15.0;

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Evenly.
    Linear,
    /// By their logarithms.
    Logarithmic,
}

impl Kind {
    /// For `data-scale`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Logarithmic => "log",
        }
    }
}

/// A scale from values to places, in an SVG's units.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// How values become places.
    pub(crate) kind: Kind,
    /// The value at the beginning and the one at the end.
    pub(crate) values: (f64, f64),
    /// The places of the two.
    pub(crate) places: (f64, f64),
}

impl Scale {
    /// A scale that shows all `values`: from zero, or logarithmic if they are all above zero and span much.
    pub(crate) fn showing(values: impl IntoIterator<Item = f64>, places: (f64, f64)) -> Self {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.is_empty() {
            return Self { kind: Kind::Linear, values: (0.0, 1.0), places };
        }
        if least > 0.0 && most / least > LOGARITHMIC_FROM {
            return Self::logarithmic((least, most), places);
        }
        Self::from_zero((least, most), places)
    }

    /// A linear scale that shows zero and both ends.
    pub(crate) fn from_zero((least, most): (f64, f64), places: (f64, f64)) -> Self {
        let top = if most > 0.0 { axis::round_top(most * 1.02) } else { 0.0 };
        let bottom = if least < 0.0 { -axis::round_top(-least * 1.02) } else { 0.0 };
        let top = if top > bottom { top } else { bottom + 1.0 };
        Self { kind: Kind::Linear, values: (bottom, top), places }
    }

    /// A linear scale of just these ends.
    pub(crate) fn exactly(values: (f64, f64), places: (f64, f64)) -> Self {
        Self { kind: Kind::Linear, values, places }
    }

    /// A logarithmic scale with some room at both ends, which must be above zero.
    pub(crate) fn logarithmic((least, most): (f64, f64), places: (f64, f64)) -> Self {
        // Room of a tenth of a decade, and at least a factor of two in all, so that there is a mark to read it by.
        let room = 1.26;
        let (low, high) = (least / room, most * room);
        let widen = (4.0 / (high / low)).sqrt().max(1.0);
        Self { kind: Kind::Logarithmic, values: (low / widen, high * widen), places }
    }

    /// The place of `value`.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let share = match self.kind {
            Kind::Linear => (value - self.values.0) / (self.values.1 - self.values.0),
            Kind::Logarithmic => {
                let low = self.values.0.ln();
                (value.max(f64::MIN_POSITIVE).ln() - low) / (self.values.1.ln() - low)
            }
        };
        self.places.0 + share * (self.places.1 - self.places.0)
    }

    /// The same, not beyond the ends.
    pub(crate) fn clamped(&self, value: f64) -> f64 {
        self.at(value.clamp(self.values.0, self.values.1))
    }

    /// Whether `value` lies on it.
    pub(crate) fn shows(&self, value: f64) -> bool {
        value.is_finite() && self.values.0 <= value && value <= self.values.1
    }

    /// At most about `marks_max` round marks with their labels.
    pub(crate) fn marks(&self, marks_max: usize) -> Vec<(f64, String)> {
        match self.kind {
            Kind::Linear => {
                let marks = axis::marks(self.values.0, self.values.1, marks_max);
                let step = if let [first, second, ..] = marks[..] { second - first } else { 1.0 };
                marks.into_iter().map(|mark| (mark, linear_label(mark, step))).collect()
            }
            Kind::Logarithmic => logarithmic_marks(self.values, marks_max)
                .into_iter()
                .map(|mark| (mark, short(mark)))
                .collect(),
        }
    }
}

fn linear_label(mark: f64, step: f64) -> String {
    let label = axis::label(mark, step);
    if mark.abs() >= 1000.0 { number::whole(mark) } else { label.replace('-', "−") }
}

fn short(mark: f64) -> String {
    if mark >= 1000.0 { number::whole(mark) } else { mark.to_string() }
}

/// Powers of ten, with multiples of each where there is room, or powers of more than ten where there is none.
fn logarithmic_marks((low, high): (f64, f64), marks_max: usize) -> Vec<f64> {
    let (first, last) = (low.log10().floor(), high.log10().ceil());
    let steps: [&[f64]; 4] = [&[1.0, 1.5, 2.0, 3.0, 5.0, 7.0], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]];
    let inside = |mark: &f64| *mark >= low * (1.0 - 1e-9) && *mark <= high * (1.0 + 1e-9);
    let decades = || std::iter::successors(Some(first), move |power| (*power < last).then_some(power + 1.0));
    for step in steps {
        let marks: Vec<f64> = decades()
            .flat_map(|power| step.iter().map(move |multiple| round(*multiple, power)))
            .filter(inside)
            .collect();
        if marks.len() <= marks_max && marks.len() > 1 {
            return marks;
        }
    }
    let every = ((last - first) / marks_max.max(1) as f64).ceil().max(1.0);
    decades()
        .filter(|power| (power - first) % every == 0.0)
        .map(|power| round(1.0, power))
        .filter(inside)
        .collect()
}

/// `multiple` times ten to the `power`, as the number that is written so.
fn round(multiple: f64, power: f64) -> f64 {
    format!("{multiple}e{power}").parse().unwrap_or(multiple * 10f64.powf(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_follows_the_spread() {
        let near = Scale::showing([3.0, 7.2, 9.0], (0.0, 100.0));
        assert_eq!((near.kind, near.values), (Kind::Linear, (0.0, 10.0)));
        let far = Scale::showing([3.0, 300.0], (0.0, 100.0));
        assert_eq!(far.kind, Kind::Logarithmic);
        assert!(far.at(3.0) > 0.0 && far.at(300.0) < 100.0);
        assert_eq!(Scale::showing([0.0, 300.0], (0.0, 1.0)).kind, Kind::Linear);
        assert_eq!(Scale::showing([], (0.0, 1.0)).values, (0.0, 1.0));
        let below = Scale::showing([-2.0, 4.0], (0.0, 1.0));
        assert!(below.values.0 <= -2.0 && below.at(0.0) > 0.0);
    }

    #[test]
    fn marks_are_round_few_and_on_the_scale() {
        for (low, high) in [(3.0, 300.0), (0.5, 2.0), (1.0, 1e9), (0.013, 0.05), (40.0, 90.0)] {
            let scale = Scale::logarithmic((low, high), (0.0, 100.0));
            let marks = scale.marks(7);
            assert!(marks.len() <= 8 && !marks.is_empty(), "{low} {high}: {marks:?}");
            assert!(marks.iter().all(|(mark, _)| (0.0..=100.0).contains(&scale.at(*mark))), "{marks:?}");
        }
        let labels: Vec<String> = Scale::logarithmic((20.0, 3000.0), (0.0, 1.0))
            .marks(8)
            .into_iter()
            .map(|(_, label)| label)
            .collect();
        assert_eq!(labels, ["20", "50", "100", "200", "500", "1,000", "2,000"]);
    }

    #[test]
    fn equal_values_have_a_scale() {
        for value in [0.0, 5.0, -5.0] {
            let scale = Scale::showing([value, value], (0.0, 100.0));
            assert!(scale.at(value).is_finite() && scale.shows(value), "{value}");
        }
    }
}
