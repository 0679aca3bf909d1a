//! How the values of several runs are spread.
//!
//! Values are few, so quantiles are taken from all of them, sorted: a histogram would only round them. Where there
//! are thousands, as with the latencies of requests, the lab keeps histograms (hdrhistogram) instead.

use super::interval;
use crate::results::Distribution;

impl Distribution {
    /// The distribution of `values`; `None` of none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            count: u32::try_from(sorted.len()).unwrap_or(u32::MAX),
            min: first,
            p50: interval::median(&sorted)?,
            p90: not_above(&sorted, 0.9),
            p99: not_above(&sorted, 0.99),
            max: last,
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50_ci95: interval::of_figures(&sorted).map(|found| (found.low, found.high)),
        })
    }
}

/// The least of `sorted` that a `share` of them is not above.
pub(crate) fn not_above(sorted: &[f64], share: f64) -> f64 {
    // A product such as 0.9 * 10 must not be rounded up to the next rank.
    let rank = (sorted.len() as f64 * share - 1e-9).ceil().max(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank within the length")]
    let index = rank as usize - 1;
    sorted[index.min(sorted.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let found = Distribution::of(&values).unwrap();
        assert_eq!((found.count, found.min, found.p50, found.p90), (100, 1.0, 50.5, 90.0));
        assert_eq!((found.p99, found.max, found.mean), (99.0, 100.0, 50.5));
        let (low, high) = found.p50_ci95.unwrap();
        assert!(low < 50.5 && high > 50.5 && low > 30.0 && high < 70.0, "{low} {high}");
    }

    #[test]
    fn few_values_have_no_interval_but_all_else() {
        let found = Distribution::of(&[3.0, 1.0]).unwrap();
        assert_eq!((found.min, found.p50, found.p90, found.max), (1.0, 2.0, 3.0, 3.0));
        assert_eq!(found.p50_ci95, None);
        assert_eq!(Distribution::of(&[]), None);
    }

    #[test]
    fn values_below_zero_are_taken_as_they_are() {
        let found = Distribution::of(&[-0.2, 0.1, 0.4, 0.3]).unwrap();
        assert!((found.p50 - 0.2).abs() < 1e-12);
        let (low, high) = found.p50_ci95.unwrap();
        assert!(low <= -0.2 && high >= 0.4, "{low} {high}");
    }
}
