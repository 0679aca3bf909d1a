//! Two results held against each other: has anything changed for real?
//!
//! ```text
//!  a.json ─┐   scenario by scenario, engine by engine, metric by metric      better, worse,
//!          ├─> two samples, their difference with its interval          ──>  no change shown,
//!  b.json ─┘   all verdicts together (Benjamini and Hochberg 1995)           not comparable
//! ```
//!
//! Runs of two files were not made beside each other: a machine that has changed looks like a program that has. Where
//! both files have a second engine, [`agree`] holds the ratios of engines against each other, in which the machine
//! cancels out.
//!
//! With many comparisons some would stand out by chance. So a verdict needs both: the interval of its own comparison
//! excludes no change, and among all comparisons at most one in twenty of those called changed is expected not to be.

pub mod agree;
mod definition;
mod show;

use serde::Serialize;

use crate::results::{Metric, Outcome, Results, Run, ScenarioResult};
use crate::stats::interval::{self, VALUES_MIN};
use crate::stats::metric::Against;
use crate::stats::values_of;

/// At most this share of the changes that are called so are expected to be none.
const FALSE_SHARE_MAX: f64 = 0.05;

/// The metrics that are compared unless others are asked for.
pub const METRICS: [Metric; 7] = [
    Metric::TotalMs,
    Metric::DowntimeGuestMs,
    Metric::CpuS,
    Metric::WireBytes,
    Metric::UdpGapMs,
    Metric::TcpStallMs,
    Metric::HttpGapMs,
];

/// How to compare.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to compare.
    pub metrics: Vec<Metric>,
    /// Changes of up to so many percent of the former median are as good as none.
    pub allow_percent: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { metrics: METRICS.to_vec(), allow_percent: 0.0 }
    }
}

/// What became of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is better, for certain.
    Better,
    /// It is worse, for certain.
    Worse,
    /// The runs do not show that anything changed.
    NoChangeShown,
    /// It can't be told.
    NotComparable,
}

/// One metric of one engine in one scenario, then and now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The scenario's name.
    pub scenario: String,
    /// The engine's.
    pub engine: String,
    /// What is compared.
    pub metric: Metric,
    /// The medians, then and now.
    pub medians: Option<(f64, f64)>,
    /// How many values there are of each.
    pub counts: (usize, usize),
    /// Now over then, or for metrics that can be zero now less then; of the medians.
    pub change: Option<f64>,
    /// Its 95 % confidence interval, of this comparison alone.
    pub ci95: Option<(f64, f64)>,
    /// How likely so large a change beyond what is allowed would be by chance, in this comparison alone.
    pub p: Option<f64>,
    /// What became of it, all comparisons taken together.
    pub verdict: Verdict,
    /// Why it can't be compared; or that it would be called changed if it had been the only question.
    pub note: Option<String>,
}

/// How often an engine moved its guest unharmed, then and now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// The scenario's name.
    pub scenario: String,
    /// The engine's.
    pub engine: String,
    /// Runs that moved their guest unharmed, of all runs, then.
    pub before: (usize, usize),
    /// The same now.
    pub after: (usize, usize),
    /// Worse if now more fail than then, better if fewer do. No statistics: a failure is one.
    pub verdict: Verdict,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Metric by metric.
    pub changes: Vec<Change>,
    /// Engines that fail more or less often.
    pub failures: Vec<Failures>,
    /// What one should know before believing any of it.
    pub warnings: Vec<String>,
}

impl Comparison {
    /// 1 if anything is worse; else 2 if anything could not be compared, or there was nothing to compare; else 0.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let verdicts = || {
            let failures = self.failures.iter().map(|failures| failures.verdict);
            self.changes.iter().map(|change| change.verdict).chain(failures)
        };
        if verdicts().any(|verdict| verdict == Verdict::Worse) {
            1
        } else if self.changes.is_empty() || verdicts().any(|verdict| verdict == Verdict::NotComparable) {
            2
        } else {
            0
        }
    }
}

/// Compares `b`, now, to `a`, then.
#[must_use]
pub fn compare(a: &Results, b: &Results, options: &Options) -> Comparison {
    let mut found =
        Comparison { changes: Vec::new(), failures: Vec::new(), warnings: definition::warnings(a, b) };
    for before in &a.scenarios {
        let name = &before.scenario.name;
        let after = b.scenarios.iter().find(|other| other.scenario.name == *name);
        for summary in &before.engines {
            let pair = Pair { before, engine: &summary.engine, options };
            match after {
                Some(after) => pair.compare(after, &mut found),
                None => {
                    found.changes.push(pair.refused(options.metrics.first(), "it is in the first file only"))
                }
            }
        }
    }
    decide(&mut found.changes);
    found
}

/// An engine in a scenario, then.
struct Pair<'a> {
    before: &'a ScenarioResult,
    engine: &'a str,
    options: &'a Options,
}

impl Pair<'_> {
    fn compare(&self, after: &ScenarioResult, found: &mut Comparison) {
        if let Err(why) = definition::same(&self.before.scenario, &after.scenario, self.engine) {
            found.changes.push(self.refused(self.options.metrics.first(), &why));
            return;
        }
        let (then, now) = (moved(self.before, self.engine), moved(after, self.engine));
        if now.1 == 0 {
            found.changes.push(
                self.refused(self.options.metrics.first(), "the engine did not run in the second file"),
            );
            return;
        }
        if (then.1 - then.0, now.1 - now.0) != (0, 0) {
            found.failures.push(self.failures(then, now));
        }
        let changes = self.options.metrics.iter().filter_map(|metric| self.change(after, *metric));
        found.changes.extend(changes);
    }

    fn failures(&self, then: (usize, usize), now: (usize, usize)) -> Failures {
        // As shares, without dividing: more of one product than of the other.
        let (failed_then, failed_now) = ((then.1 - then.0) * now.1, (now.1 - now.0) * then.1);
        let verdict = match failed_now.cmp(&failed_then) {
            std::cmp::Ordering::Greater => Verdict::Worse,
            std::cmp::Ordering::Less => Verdict::Better,
            std::cmp::Ordering::Equal => Verdict::NoChangeShown,
        };
        Failures {
            scenario: self.before.scenario.name.clone(),
            engine: self.engine.to_owned(),
            before: then,
            after: now,
            verdict,
        }
    }

    /// The change of one metric, before all are looked at together; `None` if neither file has it.
    fn change(&self, after: &ScenarioResult, metric: Metric) -> Option<Change> {
        let values = |result: &ScenarioResult| values_of(&result.runs, self.engine, metric);
        let (then, now) = (values(self.before), values(after));
        if then.is_empty() && now.is_empty() {
            return None;
        }
        let mut change = self.refused(Some(&metric), "");
        change.counts = (then.len(), now.len());
        change.medians = interval::median(&then).zip(interval::median(&now));
        let as_ratio = metric.against() == Against::Ratio;
        let usable = |values: &[f64]| !as_ratio || values.iter().all(|value| *value > 0.0);
        if !usable(&then) || !usable(&now) {
            change.note = Some("some values are zero, of which there is no ratio".to_owned());
            return Some(change);
        }
        let scaled = |values: &[f64]| -> Vec<f64> {
            values.iter().map(|value| if as_ratio { value.ln() } else { *value }).collect()
        };
        let Some(difference) = interval::of_difference(&scaled(&then), &scaled(&now)) else {
            change.note =
                Some(format!("it takes {VALUES_MIN} runs each; there are {} and {}", then.len(), now.len()));
            return Some(change);
        };
        let allowed = match metric.against() {
            Against::Ratio => (self.options.allow_percent / 100.0).ln_1p(),
            Against::Difference => {
                change.medians.map_or(0.0, |(then, _)| then.abs()) * self.options.allow_percent / 100.0
            }
        };
        let found = difference.interval;
        change.p = Some(if found.estimate > allowed {
            difference.p_value(allowed)
        } else if found.estimate < -allowed {
            difference.p_value(-allowed)
        } else {
            1.0
        });
        change.verdict = if found.low > allowed {
            Verdict::Worse
        } else if found.high < -allowed {
            Verdict::Better
        } else {
            Verdict::NoChangeShown
        };
        let shown = if as_ratio { found.map(f64::exp) } else { found };
        change.change = Some(shown.estimate);
        change.ci95 = Some((shown.low, shown.high));
        change.note = None;
        Some(change)
    }

    fn refused(&self, metric: Option<&Metric>, why: &str) -> Change {
        Change {
            scenario: self.before.scenario.name.clone(),
            engine: self.engine.to_owned(),
            metric: metric.copied().unwrap_or(Metric::TotalMs),
            medians: None,
            counts: (0, 0),
            change: None,
            ci95: None,
            p: None,
            verdict: Verdict::NotComparable,
            note: Some(why.to_owned()),
        }
    }
}

/// Runs of `engine` that moved their guest unharmed, and all of them, without those that were not supported.
fn moved(result: &ScenarioResult, engine: &str) -> (usize, usize) {
    let is_unsupported = |run: &&Run| matches!(run.outcome, Outcome::Unsupported { .. });
    let runs = || result.runs.iter().filter(|run| run.engine == engine).filter(|run| !is_unsupported(run));
    (runs().filter(|run| run.is_sound()).count(), runs().count())
}

/// Takes back verdicts that are to be expected by chance among so many (Benjamini and Hochberg, "Controlling the False
/// Discovery Rate", 1995: with the p values in order, those up to the last that is not above its rank's share stay).
fn decide(changes: &mut [Change]) {
    let mut sorted: Vec<f64> = changes.iter().filter_map(|change| change.p).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let stays = |(index, p): &(usize, &f64)| **p <= (*index as f64 + 1.0) / count * FALSE_SHARE_MAX;
    let most = sorted.iter().enumerate().filter(stays).map(|(_, p)| *p).fold(0.0, f64::max);
    for change in changes.iter_mut() {
        let called = matches!(change.verdict, Verdict::Better | Verdict::Worse);
        if called && change.p.is_some_and(|p| p > most) {
            change.verdict = Verdict::NoChangeShown;
            change.note = Some(format!("would stand out alone, but not among {count} comparisons"));
        }
    }
}
