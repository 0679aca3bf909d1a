//! Round numbers for the marks of an axis.

/// The marks of an axis over `from..=to`: multiples of 1, 2 or 5 times a power of ten, at most
/// `marks_max` of them (but at least one step is made).
#[must_use]
pub fn marks(from: f64, to: f64, marks_max: usize) -> Vec<f64> {
    let step = round_step((to - from) / marks_max.max(1) as f64);
    let first = (from / step).ceil();
    (0..=marks_max)
        .map(|index| (first + index as f64) * step)
        // Sums of steps miss a round end by rounding alone.
        .take_while(|mark| *mark <= to + step * 1e-9)
        .collect()
}

/// The least of 1, 2, 5, 10, ... times a power of ten that is not below `least`.
#[must_use]
pub fn round_step(least: f64) -> f64 {
    let least = least.max(f64::MIN_POSITIVE);
    let power = 10f64.powf(least.log10().floor());
    let multiple =
        [1.0, 2.0, 5.0, 10.0].into_iter().find(|multiple| multiple * power >= least * (1.0 - 1e-9));
    multiple.unwrap_or(10.0) * power
}

/// The end of an axis from zero that has room for `most` and whose fifths are short numbers.
#[must_use]
pub fn round_top(most: f64) -> f64 {
    let power = 10f64.powf(most.max(f64::MIN_POSITIVE).log10().floor());
    let multiples = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0];
    let multiple = multiples.into_iter().find(|multiple| multiple * power >= most * (1.0 - 1e-9));
    multiple.unwrap_or(10.0) * power
}

/// A mark as text: with the decimals that tell marks `step` apart, six at most.
#[must_use]
pub fn label(mark: f64, step: f64) -> String {
    let is_whole = |decimals: &i32| {
        let scaled = step * 10f64.powi(*decimals);
        (scaled - scaled.round()).abs() < 1e-6
    };
    let decimals = (0..6).find(is_whole).unwrap_or(6);
    let text = format!("{mark:.*}", usize::try_from(decimals).unwrap_or(0));
    // Negative zero comes from rounding.
    if text.trim_matches(['-', '0', '.']).is_empty() { "0".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_inside() {
        assert_eq!(marks(0.0, 100.0, 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(marks(130.0, 990.0, 5), [200.0, 400.0, 600.0, 800.0]);
        assert_eq!(marks(-3.0, 3.0, 4), [-2.0, 0.0, 2.0]);
        let fine: Vec<_> = marks(0.0, 0.3, 3).into_iter().map(|mark| label(mark, 0.1)).collect();
        assert_eq!(fine, ["0", "0.1", "0.2", "0.3"]);
    }

    #[test]
    fn labels_have_the_decimals_of_the_step() {
        assert_eq!(label(1500.0, 500.0), "1500");
        assert_eq!(label(0.25, 0.05), "0.25");
        assert_eq!(label(-0.0, 0.5), "0");
    }

    #[test]
    fn a_top_has_room_and_short_fifths() {
        for (most, top) in [(210.0, 250.0), (1.0, 1.0), (999.0, 1000.0), (0.13, 0.15), (600.0, 600.0)] {
            assert!((round_top(most) - top).abs() < 1e-9, "{most} {}", round_top(most));
        }
    }

    #[test]
    fn an_empty_range_has_no_endless_marks() {
        assert!(marks(5.0, 5.0, 4).len() <= 5);
    }
}
