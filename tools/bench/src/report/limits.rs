//! Limits in words, the same for the page and the terminal.

use super::number::{self, digits, with_unit};
use crate::results::{LimitResult, Verdict};
use crate::scenario::{Base, Bound, Limit, Quantity, Rate};

/// A limit with what was reached, ready to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitWords {
    /// What is limited, of which engine, held against what.
    pub what: String,
    /// The bound, with its direction.
    pub bound: String,
    /// The aim, if there is one.
    pub aim: Option<String>,
    /// What was reached.
    pub reached: String,
    /// Its interval.
    pub interval: Option<String>,
    /// Whether the limit was met.
    pub verdict: &'static str,
}

impl LimitWords {
    /// `result` in words.
    #[must_use]
    pub fn of(result: &LimitResult) -> Self {
        let limit = &result.limit;
        let show = |value: f64| in_unit(limit, value);
        let sign = match limit.bound {
            Bound::AtMost(_) => '≤',
            Bound::AtLeast(_) => '≥',
        };
        let count = if result.count == 1 { " (one)" } else { "" };
        Self {
            what: what(result),
            bound: format!("{sign} {}", show(limit.bound.value())),
            aim: limit.aim.map(|aim| format!("{sign} {}", show(aim))),
            reached: result.value.map_or("–".to_owned(), |value| show(value) + count),
            interval: result.ci95.map(|(low, high)| format!("{} to {}", show(low), show(high))),
            verdict: match (result.verdict, result.aim_reached, result.is_sure) {
                (Verdict::Met, Some(true), _) => "met, and the aim",
                (Verdict::Met, _, true) => "met for sure",
                (Verdict::Met, _, false) => "met",
                (Verdict::Missed, _, true) => "MISSED for sure",
                (Verdict::Missed, _, false) => "MISSED",
                (Verdict::NotMeasured, _, _) => "not measured",
            },
        }
    }
}

/// How many limits were met, missed and not measured.
#[must_use]
pub fn counts(limits: &[LimitResult]) -> String {
    let count = |verdict| limits.iter().filter(|limit| limit.verdict == verdict).count();
    format!(
        "{} of {} met, {} missed, {} not measured",
        count(Verdict::Met),
        limits.len(),
        count(Verdict::Missed),
        count(Verdict::NotMeasured)
    )
}

/// What is limited, of which engine, held against what.
fn what(result: &LimitResult) -> String {
    let limit = &result.limit;
    let quantity = match limit.quantity {
        Quantity::Metric(metric) => metric.title(),
        Quantity::Rate(Rate::ThroughputBytesPerS) => "throughput",
    };
    let best = |names: &[String]| match names {
        [one] => one.clone(),
        several => format!("the best of {}", several.join(", ")),
    };
    let engine = result.engine.clone().unwrap_or_else(|| best(&limit.engines));
    let over = match &limit.base {
        Base::Nothing => String::new(),
        Base::Engines(names) | Base::EnginesOfSameStreams(names) => {
            format!(" over {}", result.over.clone().unwrap_or_else(|| best(names)))
        }
        Base::Scenario(name) => format!(" over {name}"),
        Base::Link => " over the link's time".to_owned(),
    };
    format!("{quantity}, {engine}{over}")
}

/// A value of `limit`: a ratio, or in the unit in which its metric is shown.
fn in_unit(limit: &Limit, value: f64) -> String {
    match (&limit.base, limit.quantity) {
        (Base::Nothing, Quantity::Metric(metric)) => with_unit(metric, value),
        (Base::Nothing, Quantity::Rate(Rate::ThroughputBytesPerS)) => {
            format!("{} MiB/s", digits(value / number::MIB))
        }
        (Base::Engines(_) | Base::EnginesOfSameStreams(_) | Base::Scenario(_) | Base::Link, _) => {
            number::ratio(value)
        }
    }
}
