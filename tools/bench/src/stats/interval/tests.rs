//! Draws cases whose truth is known, and counts how often the intervals hold it.

use proptest::prelude::*;
use rand_distr::{Distribution, Exp, StandardNormal, StudentT};

use super::*;

/// Cases of each kind and size. Their share is then right to about 0.7 %.
const CASES: u32 = 1000;

/// The least share of intervals that must hold the truth.
const COVERAGE_MIN: f64 = 0.93;

const SIZES: [usize; 5] = [3, 4, 5, 7, 10];

/// Noise of a figure's logarithm, whose median is zero unless it says otherwise.
#[derive(Debug, Clone, Copy)]
enum Noise {
    Normal,
    /// Student's with two degrees of freedom: its variance is infinite.
    HeavyTailed,
    /// One run in seven is slow, on average by a factor of 4.5.
    Contaminated,
}

impl Noise {
    const ALL: [Self; 3] = [Self::Normal, Self::HeavyTailed, Self::Contaminated];

    fn draw(self, random: &mut ChaCha8Rng) -> f64 {
        let normal: f64 = StandardNormal.sample(random);
        match self {
            Self::Normal => 0.1 * normal,
            Self::HeavyTailed => 0.1 * StudentT::new(2.0).unwrap().sample(random),
            Self::Contaminated => {
                let slow = if random.random_range(0..7) == 0 {
                    Exp::new(1.0 / 1.5).unwrap().sample(random)
                } else {
                    0.0
                };
                0.05 * normal + slow
            }
        }
    }

    fn many(self, count: usize, random: &mut ChaCha8Rng) -> Vec<f64> {
        (0..count).map(|_| self.draw(random)).collect()
    }

    /// The true median, from many draws.
    fn truth(self) -> f64 {
        median(&self.many(200_000, &mut ChaCha8Rng::seed_from_u64(7))).unwrap()
    }
}

/// The share of `CASES` intervals that hold `truth`.
fn coverage(truth: f64, mut interval: impl FnMut(&mut ChaCha8Rng) -> (f64, f64)) -> f64 {
    let mut random = ChaCha8Rng::seed_from_u64(42);
    let held = (0..CASES).filter(|_| {
        let (low, high) = interval(&mut random);
        low <= truth && truth <= high
    });
    held.count() as f64 / f64::from(CASES)
}

#[test]
fn ratios_of_pairs_are_covered_for_3_to_10_pairs_of_any_noise() {
    // Drift that hits both runs of a pair must not count.
    let truth: f64 = 0.7f64.ln();
    for noise in Noise::ALL {
        for size in SIZES {
            let share = coverage(truth, |random| {
                let pairs: Vec<f64> = (0..size)
                    .map(|index| {
                        let drift = index as f64;
                        let above = truth + drift + noise.draw(random);
                        let below = drift + noise.draw(random);
                        above - below
                    })
                    .collect();
                let found = of_median(&pairs).unwrap();
                (found.low, found.high)
            });
            assert!(share >= COVERAGE_MIN, "{noise:?}, {size} pairs: {share}");
        }
    }
}

#[test]
fn medians_are_covered_for_3_to_10_values_of_any_noise() {
    for noise in Noise::ALL {
        let truth = 100.0 * noise.truth().exp();
        for size in SIZES {
            let share = coverage(truth, |random| {
                let values: Vec<f64> =
                    noise.many(size, random).iter().map(|value| 100.0 * value.exp()).collect();
                let found = of_figures(&values).unwrap();
                (found.low, found.high)
            });
            assert!(share >= COVERAGE_MIN, "{noise:?}, {size} values: {share}");
        }
    }
}

#[test]
fn differences_of_two_samples_are_covered_for_3_to_10_values_of_any_noise() {
    for noise in Noise::ALL {
        for size in SIZES {
            let share = coverage(0.2, |random| {
                let a = noise.many(size, random);
                let b: Vec<f64> = noise.many(size, random).iter().map(|value| value + 0.2).collect();
                let found = of_difference(&a, &b).unwrap().interval;
                (found.low, found.high)
            });
            assert!(share >= COVERAGE_MIN, "{noise:?}, {size} and {size} values: {share}");
        }
    }
}

#[test]
fn the_bootstrap_alone_would_promise_too_much() {
    for size in [3, 4] {
        let share = coverage(0.0, |random| {
            let values = Noise::Normal.many(size, random);
            let mut resampled: Vec<f64> =
                (0..RESAMPLES).map(|_| resampled_median(&values, random, &mut Vec::new())).collect();
            ends(&mut resampled)
        });
        assert!(share < 0.9, "{size}: {share}");
    }
}

#[test]
fn a_p_value_is_small_just_where_the_interval_ends() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for noise in Noise::ALL {
        for size in SIZES {
            let found =
                of_difference(&noise.many(size, &mut random), &noise.many(size, &mut random)).unwrap();
            let Interval { low, high, .. } = found.interval;
            let width = high - low;
            for outside in [low - 0.01 * width, high + 0.01 * width] {
                assert!(found.p_value(outside) < 0.05, "{noise:?} {size}: {}", found.p_value(outside));
            }
            for inside in [low + 0.01 * width, high - 0.01 * width] {
                assert!(found.p_value(inside) > 0.045, "{noise:?} {size}: {}", found.p_value(inside));
            }
        }
    }
}

#[test]
fn values_without_scatter_have_an_interval_without_width() {
    let found = of_figures(&[5.0; 4]).unwrap();
    assert!((found.low - 5.0).abs() < 1e-9 && (found.high - 5.0).abs() < 1e-9, "{found:?}");
    let difference = of_difference(&[1.0; 3], &[2.0; 3]).unwrap();
    assert_eq!(difference.interval, Interval { estimate: 1.0, low: 1.0, high: 1.0 });
    assert!(difference.p_value(0.0) < 0.01);
    assert!(difference.p_value(1.0) > 0.99);
}

#[test]
fn too_few_values_have_none() {
    assert_eq!(of_median(&[1.0, 2.0]), None);
    assert!(of_difference(&[1.0, 2.0], &[1.0, 2.0, 3.0]).is_none());
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[4.0, 1.0]), Some(2.5));
}

proptest! {
    #[test]
    fn an_estimate_is_within_its_interval(values in prop::collection::vec(-1e3f64..1e3, 3..11)) {
        let found = of_figures(&values).unwrap();
        prop_assert!(found.low <= found.estimate && found.estimate <= found.high, "{found:?}");
    }

    #[test]
    fn the_other_way_round_is_the_negative(
        a in prop::collection::vec(-1e3f64..1e3, 3..8),
        b in prop::collection::vec(-1e3f64..1e3, 3..8),
    ) {
        let (there, back) = (of_difference(&a, &b).unwrap(), of_difference(&b, &a).unwrap());
        prop_assert!((there.interval.estimate + back.interval.estimate).abs() < 1e-9);
    }
}
