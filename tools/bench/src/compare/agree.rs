//! Whether two runs of one suite agree: is each ratio of engines the same in both, within what both state?
//!
//! Two ratios agree if they are no further apart than the interval of their difference reaches, which of two
//! independent estimates is the root of the summed squares of their intervals' halves, on a logarithmic scale. Of
//! ratios that are truly the same, at most one in twenty is expected not to agree.

use serde::Serialize;

use crate::report::reference;
use crate::results::{Metric, Results};
use crate::stats::{RatioView, ratio_of};

/// The share of equal ratios that may be apart by chance.
const APART_BY_CHANCE: f64 = 0.05;

/// One ratio in both results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// The scenario's name.
    pub scenario: String,
    /// The engine above the line.
    pub engine: String,
    /// The engine below it.
    pub to: String,
    /// What is compared.
    pub metric: Metric,
    /// The ratio and its interval, then.
    pub before: (f64, (f64, f64)),
    /// The same now.
    pub after: (f64, (f64, f64)),
    /// Whether the two agree.
    pub agrees: bool,
}

/// All ratios that both results have.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreements {
    /// One by one.
    pub ratios: Vec<Agreement>,
    /// How many agree.
    pub agreed: usize,
    /// The most that may not, of so many, before it takes more than chance (in 19 of 20 such comparisons).
    pub apart_max: usize,
}

impl Agreements {
    /// 0 if no more are apart than chance explains, 1 if more are, 2 if there was nothing to compare.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.ratios.is_empty() { 2 } else { u8::from(self.ratios.len() - self.agreed > self.apart_max) }
    }
}

/// Holds the ratios of all engines to the reference engine in `a` against those in `b`, where the scenario is the same
/// and both have an interval.
#[must_use]
pub fn agree(a: &Results, b: &Results, metrics: &[Metric]) -> Agreements {
    let mut ratios = Vec::new();
    let Some(to) = reference(a).map(|engine| engine.name.as_str()) else {
        return Agreements { ratios, agreed: 0, apart_max: 0 };
    };
    for before in &a.scenarios {
        let Some(after) = b.scenarios.iter().find(|other| other.scenario.name == before.scenario.name) else {
            continue;
        };
        for engine in
            before.engines.iter().map(|summary| summary.engine.as_str()).filter(|engine| *engine != to)
        {
            let same = |engine| super::definition::same(&before.scenario, &after.scenario, engine).is_ok();
            if !same(engine) || !same(to) {
                continue;
            }
            for metric in metrics {
                let views = ratio_of(before, *metric, engine, to).zip(ratio_of(after, *metric, engine, to));
                let Some((then, now)) = views.and_then(|(then, now)| known(then).zip(known(now))) else {
                    continue;
                };
                ratios.push(Agreement {
                    scenario: before.scenario.name.clone(),
                    engine: engine.to_owned(),
                    to: to.to_owned(),
                    metric: *metric,
                    before: then,
                    after: now,
                    agrees: do_agree(then, now),
                });
            }
        }
    }
    let agreed = ratios.iter().filter(|ratio| ratio.agrees).count();
    let apart_max = apart_by_chance_max(ratios.len());
    Agreements { ratios, agreed, apart_max }
}

fn known(view: RatioView) -> Option<(f64, (f64, f64))> {
    Some((view.ratio, view.ci95?))
}

fn do_agree(a: (f64, (f64, f64)), b: (f64, (f64, f64))) -> bool {
    let (lower, upper) = if a.0 <= b.0 { (a, b) } else { (b, a) };
    // The halves that face each other.
    let (above, below) = ((lower.1.1 / lower.0).ln(), (upper.0 / upper.1.0).ln());
    // Ratios without any scatter are equal but for rounding.
    (upper.0 / lower.0).ln() <= above.hypot(below) + 1e-9
}

/// The most of `count` that are apart in 19 of 20 cases if each is by chance of [`APART_BY_CHANCE`]: the binomial
/// distribution, summed up.
fn apart_by_chance_max(count: usize) -> usize {
    let (mut term, mut sum) = ((1.0 - APART_BY_CHANCE).powf(count as f64), 0.0);
    for apart in 0..=count {
        sum += term;
        if sum >= 0.95 {
            return apart;
        }
        term *= (count - apart) as f64 / (apart + 1) as f64 * APART_BY_CHANCE / (1.0 - APART_BY_CHANCE);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facing_halves_decide() {
        let (a, near, far) = ((1.0, (0.5, 1.1)), (1.1, (1.06, 9.0)), (1.3, (1.25, 9.0)));
        assert!(do_agree(a, near) && do_agree(near, a));
        assert!(!do_agree(a, far) && !do_agree(far, a));
        assert!(do_agree((0.7, (0.7, 0.7)), (0.7, (0.7, 0.7))));
    }

    #[test]
    fn chance_is_binomial() {
        // From tables of the binomial distribution with p = 0.05.
        assert_eq!([0, 1, 20, 100].map(apart_by_chance_max), [0, 0, 3, 9]);
    }
}
