//! Finds the parameters that explain observations best: the sum of the logarithms of how far each is off, where large
//! misses count no more than in proportion, so that a few runs on a busy machine do not decide.
//!
//! The search goes along one parameter after another, by factors that shrink. A weak pull to the defaults keeps what the
//! observations say nothing about where it was.

use super::super::hardware::Hardware;
use super::observe::{Observation, Scatter};

/// A parameter that is looked for.
type Handle = fn(&mut Hardware) -> &mut f64;

/// All that runs of ferry say something about.
const FITTED: [Handle; 30] = [
    |h| &mut h.source_page_us,
    |h| &mut h.target_page_us,
    |h| &mut h.first_touch_page_us,
    |h| &mut h.dirtied_page_us,
    |h| &mut h.extent_us,
    |h| &mut h.switch_page_us,
    |h| &mut h.logged_write_us,
    |h| &mut h.source_zero_page_us,
    |h| &mut h.target_zero_page_us,
    |h| &mut h.pack_page_us,
    |h| &mut h.pack_vain_page_us,
    |h| &mut h.unpack_page_us,
    |h| &mut h.pack_ratio,
    |h| &mut h.round_us,
    |h| &mut h.wire_overhead,
    |h| &mut h.log_read_us,
    |h| &mut h.log_read_us_per_gib,
    |h| &mut h.log_clear_page_us,
    |h| &mut h.pause_us,
    |h| &mut h.pause_us_per_vcpu,
    |h| &mut h.save_us,
    |h| &mut h.save_us_per_vcpu,
    |h| &mut h.restore_us,
    |h| &mut h.restore_us_per_vcpu,
    |h| &mut h.source_record_us,
    |h| &mut h.target_record_us,
    |h| &mut h.run_us,
    |h| &mut h.run_us_per_vcpu,
    |h| &mut h.message_us,
    |h| &mut h.overhead_us,
];

/// The first factor that is tried, and the last, as logarithms.
const STEP_FIRST: f64 = 0.8;
const STEP_LAST: f64 = 0.002;

/// How much a parameter that is off its default by a factor of e weighs, in observations.
const PULL: f64 = 0.1;

/// Misses far below this logarithm are as good as none.
const SMOOTH: f64 = 0.02;

/// Added to both sides before they are compared, in µs: below, nobody cares for factors.
const FLOOR_US: f64 = 20.0;

/// A factor that shows in every prediction that has anything to do with a parameter, however small its part.
const TELLING: f64 = 1e4;

/// The parameters that explain `observations` best, looked for from `start`.
pub(super) fn fit(observations: &[Observation], start: Hardware) -> Hardware {
    let concerned: Vec<Vec<&Observation>> =
        FITTED.iter().map(|handle| concerned(observations, *handle, start)).collect();
    let mut best = start;
    let mut step = STEP_FIRST;
    while step > STEP_LAST {
        let mut moved = false;
        for (handle, concerned) in FITTED.iter().zip(&concerned) {
            let loss = |by: Hardware| {
                let misses: f64 = concerned.iter().map(|seen| smooth(log_miss(seen, &by))).sum();
                let (mut by, mut start) = (by, start);
                misses + PULL * (*handle(&mut by) / *handle(&mut start)).ln().abs()
            };
            let mut least = loss(best);
            for factor in [step.exp(), (-step).exp()] {
                let mut tried = best;
                *handle(&mut tried) *= factor;
                // Neither packed pages nor headers can make anything shorter than it is.
                tried.pack_ratio = tried.pack_ratio.max(1.0);
                tried.wire_overhead = tried.wire_overhead.max(1.0);
                let loss = loss(tried);
                if loss < least - 1e-9 {
                    (best, least, moved) = (tried, loss, true);
                }
            }
        }
        if !moved {
            step /= 2.0;
        }
    }
    let of_kind = |scatter: Scatter| {
        let seen = observations.iter().filter(|seen| seen.scatter() == Some(scatter));
        spread(seen.map(|seen| log_miss(seen, &best)).collect())
    };
    Hardware { jitter: of_kind(Scatter::Fixed), page_jitter: of_kind(Scatter::Pages), ..best }
}

/// The observations that a parameter has anything to do with: only these have to be looked at when it moves.
fn concerned(observations: &[Observation], handle: Handle, start: Hardware) -> Vec<&Observation> {
    let changed = |factor: f64| {
        let mut changed = start;
        *handle(&mut changed) *= factor;
        changed
    };
    let others = [changed(TELLING), changed(1.0 / TELLING)];
    let is_concerned = |seen: &&Observation| {
        let before = seen.predicted(&start);
        others.iter().any(|other| seen.predicted(other).to_bits() != before.to_bits())
    };
    observations.iter().filter(is_concerned).collect()
}

fn log_miss(seen: &Observation, by: &Hardware) -> f64 {
    ((seen.predicted(by) + FLOOR_US) / (seen.value + FLOOR_US)).ln()
}

/// The miss itself, rounded off at zero so that the search does not stick to edges (pseudo-Huber).
fn smooth(miss: f64) -> f64 {
    miss.hypot(SMOOTH) - SMOOTH
}

/// The standard deviation of normal values, by the median of how far they are from theirs: a few wild ones do not
/// matter. Zero for less than three.
fn spread(mut values: Vec<f64>) -> f64 {
    if values.len() < 3 {
        return 0.0;
    }
    let middle = median(&mut values);
    let mut off: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    1.4826 * median(&mut off)
}

/// The median; sorts. Zero for none.
pub(super) fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// The least value that a share of `at` of the values do not exceed; the median of an even number is the mean of its
/// two middle ones. Sorts. Zero for none.
pub(super) fn quantile(values: &mut [f64], at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let count = u32::try_from(last).map_or(f64::MAX, f64::from);
    let place = at * count;
    let low = index(place.floor());
    let rest = place - place.floor();
    values[low] + (values[(low + 1).min(last)] - values[low]) * rest
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a slice")]
fn index(place: f64) -> usize {
    place.max(0.0) as usize
}
