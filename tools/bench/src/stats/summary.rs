//! The runs of a scenario taken together: each engine's distributions, and every two engines' ratios.

use super::interval;
use super::metric::Against;
use crate::results::{Distribution, EngineSummary, Metric, Outcome, Ratio, Run, ScenarioResult};

/// Each engine's runs, in the order in which the engines first ran, and every two engines against each other.
#[must_use]
pub fn summarise(runs: &[Run]) -> (Vec<EngineSummary>, Vec<Ratio>) {
    let engines = engines_of(runs);
    let summaries = engines.iter().map(|engine| summary_of(runs, engine)).collect();
    let mut ratios = Vec::new();
    for (index, engine) in engines.iter().enumerate() {
        for to in &engines[index + 1..] {
            ratios
                .extend(Metric::ALL.into_iter().filter_map(|metric| ratio_between(runs, metric, engine, to)));
        }
    }
    (summaries, ratios)
}

fn engines_of(runs: &[Run]) -> Vec<&str> {
    let mut engines: Vec<&str> = Vec::new();
    for run in runs {
        if !engines.contains(&run.engine.as_str()) {
            engines.push(&run.engine);
        }
    }
    engines
}

fn summary_of(runs: &[Run], engine: &str) -> EngineSummary {
    let count = |is: &dyn Fn(&Run) -> bool| {
        let runs = runs.iter().filter(|run| run.engine == engine && is(run)).count();
        u32::try_from(runs).unwrap_or(u32::MAX)
    };
    EngineSummary {
        engine: engine.to_owned(),
        moved: count(&|run| run.outcome == Outcome::Moved),
        runs: count(&|_| true),
        metrics: Metric::ALL
            .into_iter()
            .filter_map(|metric| Some((metric, Distribution::of(&values_of(runs, engine, metric))?)))
            .collect(),
    }
}

/// The values of `metric` in the sound runs of `engine`, in the order in which they were made.
#[must_use]
pub(crate) fn values_of(runs: &[Run], engine: &str, metric: Metric) -> Vec<f64> {
    sound(runs, engine).filter_map(|run| metric.of(&run.measures)).collect()
}

/// Values of two engines from the same repetitions, those without both left out.
#[must_use]
pub fn paired(runs: &[Run], metric: Metric, engine: &str, to: &str) -> Vec<(f64, f64)> {
    let value = |run: &Run| metric.of(&run.measures);
    let beside = |run: &Run| sound(runs, to).find(|other| other.repetition == run.repetition).and_then(value);
    sound(runs, engine).filter_map(|run| value(run).zip(beside(run))).collect()
}

/// The sound runs of `engine`.
fn sound<'a>(runs: &'a [Run], engine: &'a str) -> impl Iterator<Item = &'a Run> {
    runs.iter().filter(move |run| run.engine == engine && run.is_sound())
}

fn ratio_between(runs: &[Run], metric: Metric, engine: &str, to: &str) -> Option<Ratio> {
    if metric.against() == Against::Difference {
        return None;
    }
    let pairs = paired(runs, metric, engine, to);
    // A measure of exactly nothing, as of bytes where nothing was sent, has no ratio.
    let logs: Vec<f64> = pairs
        .iter()
        .filter(|(above, below)| *above > 0.0 && *below > 0.0)
        .map(|(above, below)| (above / below).ln())
        .collect();
    let found = interval::of_median(&logs).map(|found| found.map(f64::exp));
    Some(Ratio {
        metric,
        engine: engine.to_owned(),
        to: to.to_owned(),
        pairs: u32::try_from(logs.len()).unwrap_or(u32::MAX),
        ratio: interval::median(&logs)?.exp(),
        ci95: found.map(|found| (found.low, found.high)),
    })
}

/// A ratio, the way round that was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatioView {
    /// The median of the ratios within each repetition.
    pub ratio: f64,
    /// Its 95 % confidence interval.
    pub ci95: Option<(f64, f64)>,
    /// Of how many pairs.
    pub pairs: u32,
}

impl RatioView {
    /// Whether less is shown, more is shown, or neither.
    #[must_use]
    pub fn shows(&self) -> Option<std::cmp::Ordering> {
        let (low, high) = self.ci95?;
        if high < 1.0 {
            Some(std::cmp::Ordering::Less)
        } else if low > 1.0 {
            Some(std::cmp::Ordering::Greater)
        } else {
            Some(std::cmp::Ordering::Equal)
        }
    }
}

/// The ratio of `engine` to `to`, whichever way round `result` has it.
#[must_use]
pub fn ratio_of(result: &ScenarioResult, metric: Metric, engine: &str, to: &str) -> Option<RatioView> {
    let of = |above: &str, below: &str| {
        let mut ratios = result.ratios.iter().filter(|ratio| ratio.metric == metric);
        ratios.find(|ratio| ratio.engine == above && ratio.to == below)
    };
    let view = |ratio: &Ratio| RatioView { ratio: ratio.ratio, ci95: ratio.ci95, pairs: ratio.pairs };
    of(engine, to).map(view).or_else(|| {
        let back = view(of(to, engine)?);
        let ci95 = back.ci95.map(|(low, high)| (1.0 / high, 1.0 / low));
        Some(RatioView { ratio: 1.0 / back.ratio, ci95, pairs: back.pairs })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Measures, Timeline};

    fn run(engine: &str, repetition: u32, total_ms: f64) -> Run {
        Run {
            engine: engine.to_owned(),
            repetition,
            at_s: 0.0,
            outcome: Outcome::Moved,
            measures: Measures { total_ms: Some(total_ms), ..Measures::default() },
            timeline: Timeline::default(),
            flags: Vec::new(),
        }
    }

    #[test]
    fn runs_of_one_repetition_are_compared_whatever_drifts() {
        // The machine becomes eight times slower meanwhile; b always takes twice as long.
        let slow = [1.0, 2.0, 4.0, 8.0];
        let each =
            |engine: &'static str, ms: f64| (0..).zip(slow).map(move |(n, slow)| run(engine, n, ms * slow));
        // The order in which they lie in the results must not matter.
        let mut runs: Vec<Run> = each("a", 100.0).collect();
        runs.extend(each("b", 200.0).collect::<Vec<_>>().into_iter().rev());
        runs[4].outcome = Outcome::NotConverged;
        let (engines, ratios) = summarise(&runs);
        assert_eq!(
            engines.iter().map(|engine| (engine.moved, engine.runs)).collect::<Vec<_>>(),
            [(4, 4), (3, 4)]
        );
        assert_eq!(engines[0].metrics[0].1.p50, 300.0);
        let [ratio] = &ratios[..] else { panic!("{ratios:?}") };
        assert_eq!((ratio.engine.as_str(), ratio.to.as_str(), ratio.pairs), ("a", "b", 3));
        let (low, high) = ratio.ci95.unwrap();
        assert!((ratio.ratio - 0.5).abs() < 1e-9 && (low - 0.5).abs() < 1e-9 && (high - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_ratio_can_be_asked_for_either_way_round() {
        let runs: Vec<Run> = (0..3)
            .flat_map(|repetition| {
                let noise = 1.0 + 0.1 * f64::from(repetition);
                [run("a", repetition, 100.0), run("b", repetition, 200.0 * noise)]
            })
            .collect();
        let (engines, ratios) = summarise(&runs);
        let suite = crate::scenario::file::load("smoke").unwrap();
        let result = ScenarioResult { scenario: suite.scenarios[0].clone(), runs, engines, ratios };
        let there = ratio_of(&result, Metric::TotalMs, "a", "b").unwrap();
        let back = ratio_of(&result, Metric::TotalMs, "b", "a").unwrap();
        assert!((there.ratio * back.ratio - 1.0).abs() < 1e-9);
        assert!((there.ci95.unwrap().0 * back.ci95.unwrap().1 - 1.0).abs() < 1e-9);
        assert_eq!(there.shows(), Some(std::cmp::Ordering::Less));
        assert_eq!(back.shows(), Some(std::cmp::Ordering::Greater));
        assert_eq!(ratio_of(&result, Metric::CpuS, "a", "b"), None);
    }

    #[test]
    fn harmed_guests_do_not_count() {
        let mut runs: Vec<Run> = (0..3).map(|repetition| run("a", repetition, 100.0)).collect();
        runs[0].measures.check.errors = Some(1);
        let (engines, _) = summarise(&runs);
        assert_eq!((engines[0].moved, engines[0].metrics[0].1.count), (3, 2));
    }
}
