//! Holds results against the limits of their suite.
//!
//! Of several engines the one with the lowest median counts, on either side. Ratios are medians of the ratios within each
//! repetition, as everywhere; against another scenario, whose runs were not made beside these, they are ratios of
//! medians with the interval of two samples.

use super::Interval;
use super::interval::{median, of_difference, of_figures, of_median};
use crate::results::{EngineInfo, LimitResult, Metric, Outcome, Run, ScenarioResult, Verdict};
use crate::scenario::{Base, EngineKind, Limit, Link, Quantity, Rate, Streams};

/// What became of `limits` in `scenarios`, which `engines` ran.
#[must_use]
pub fn judge(limits: &[Limit], scenarios: &[ScenarioResult], engines: &[EngineInfo]) -> Vec<LimitResult> {
    let results = Found { scenarios, engines };
    limits.iter().map(|limit| results.judge(limit)).collect()
}

/// A figure with its interval, from so many runs or pairs.
struct Reached {
    value: f64,
    ci95: Option<(f64, f64)>,
    count: usize,
}

impl Reached {
    fn of(value: Option<f64>, interval: Option<Interval>, count: usize) -> Option<Self> {
        Some(Self { value: value?, ci95: interval.map(|found| (found.low, found.high)), count })
    }
}

/// Everything that was found.
#[derive(Clone, Copy)]
struct Found<'a> {
    scenarios: &'a [ScenarioResult],
    engines: &'a [EngineInfo],
}

impl<'a> Found<'a> {
    fn judge(self, limit: &Limit) -> LimitResult {
        let mut result = LimitResult {
            limit: limit.clone(),
            engine: None,
            over: None,
            value: None,
            ci95: None,
            count: 0,
            verdict: Verdict::NotMeasured,
            is_sure: false,
            aim_reached: None,
            note: None,
        };
        let Some(scenario) = self.scenario(&limit.scenario) else {
            result.note = Some("its scenario was not run".to_owned());
            return result;
        };
        let mut notes = Vec::from_iter(left_out(scenario, &limit.engines));
        if let Some(engine) = best(scenario, &limit.engines, limit.best_by) {
            result.engine = Some(engine.to_owned());
            match self.reached(limit, scenario, engine, &mut notes) {
                Ok((over, reached)) => {
                    result.over = over;
                    decide(&mut result, &reached, unsound(scenario, engine), &mut notes);
                }
                Err(why) => notes.push(why),
            }
        } else if moved_nothing(scenario, &limit.engines) {
            // There is no figure since no guest arrived: that is no want of measuring.
            result.verdict = Verdict::Missed;
        } else {
            notes.push("there is no such figure".to_owned());
        }
        result.note = (!notes.is_empty()).then(|| notes.join("; "));
        result
    }

    fn scenario(self, name: &str) -> Option<&'a ScenarioResult> {
        self.scenarios.iter().find(|scenario| scenario.scenario.name == name)
    }

    /// What `engine` reached, with the name of the engine that it is held against; or why that is not known.
    fn reached(
        self,
        limit: &Limit,
        scenario: &ScenarioResult,
        engine: &str,
        notes: &mut Vec<String>,
    ) -> Result<(Option<String>, Reached), String> {
        let values = || self.values(scenario, engine, limit.quantity);
        let nothing = || format!("{engine} has no such figure");
        match &limit.base {
            Base::Nothing => {
                let values = values();
                let reached = Reached::of(median(&values), of_figures(&values), values.len());
                Ok((None, reached.ok_or_else(nothing)?))
            }
            Base::Link => {
                let once_ms = link_ms(scenario).ok_or("the link's time is not known")?;
                let values: Vec<f64> = values().into_iter().map(|total_ms| total_ms / once_ms).collect();
                let reached = Reached::of(median(&values), of_figures(&values), values.len());
                Ok((None, reached.ok_or_else(nothing)?))
            }
            Base::Engines(over) => self.beside(limit, scenario, (engine, over), notes),
            Base::EnginesOfSameStreams(over) => {
                let streams = streams_of(scenario, engine);
                let same = over.iter().filter(|name| {
                    streams.and_then(Streams::fixed).is_none() || streams_of(scenario, name) == streams
                });
                let same: Vec<String> = same.cloned().collect();
                self.beside(limit, scenario, (engine, &same), notes)
            }
            Base::Scenario(name) => {
                let sibling = self.scenario(name).ok_or_else(|| format!("{name} was not run"))?;
                let below = self.values(sibling, engine, limit.quantity);
                let reached = apart(&values(), &below);
                Ok((None, reached.ok_or_else(|| format!("{engine} has no such figure in both scenarios"))?))
            }
        }
    }

    /// `engine` beside the best of `over`.
    fn beside(
        self,
        limit: &Limit,
        scenario: &ScenarioResult,
        (engine, over): (&str, &[String]),
        notes: &mut Vec<String>,
    ) -> Result<(Option<String>, Reached), String> {
        notes.extend(left_out(scenario, over));
        let best = best(scenario, over, limit.best_by).ok_or("there is nothing to hold it against")?;
        let beside = |run: &Run| {
            let mut others = sound(scenario, best);
            self.value(scenario, others.find(|other| other.repetition == run.repetition)?, limit.quantity)
        };
        let pairs = sound(scenario, engine)
            .filter_map(|run| Some((self.value(scenario, run, limit.quantity)?, beside(run)?)));
        let logs: Vec<f64> = pairs
            .filter(|(above, below)| *above > 0.0 && *below > 0.0)
            .map(|(above, below)| (above / below).ln())
            .collect();
        let interval = of_median(&logs).map(|found| found.map(f64::exp));
        let reached = Reached::of(median(&logs).map(f64::exp), interval, logs.len());
        Ok((Some(best.to_owned()), reached.ok_or("no two runs lie beside each other")?))
    }

    fn values(self, scenario: &ScenarioResult, engine: &str, quantity: Quantity) -> Vec<f64> {
        sound(scenario, engine).filter_map(|run| self.value(scenario, run, quantity)).collect()
    }

    fn value(self, scenario: &ScenarioResult, run: &Run, quantity: Quantity) -> Option<f64> {
        match quantity {
            Quantity::Metric(metric) => metric.of(&run.measures),
            Quantity::Rate(Rate::ThroughputBytesPerS) => {
                let engine = self.engines.iter().find(|engine| engine.name == run.engine)?;
                let bytes = match engine.kind {
                    EngineKind::Tcp => scenario.scenario.tcp_bytes(),
                    EngineKind::Ferry | EngineKind::Qemu | EngineKind::CloudHypervisor => {
                        scenario.scenario.page_bytes()?
                    }
                };
                let total_ms = run.measures.total_ms.filter(|total_ms| *total_ms > 0.0)?;
                Some(bytes as f64 / total_ms * 1e3)
            }
        }
    }
}

/// How long the link of `scenario` needs for the guest's pages once, in ms.
fn link_ms(scenario: &ScenarioResult) -> Option<f64> {
    let Link::Tbf { rate_mbit_s, .. } = scenario.scenario.link else { return None };
    let bytes = scenario.scenario.page_bytes().filter(|bytes| *bytes > 0)?;
    Some(bytes as f64 * 8.0 / (rate_mbit_s * 1e3))
}

/// The ratio of the medians of two samples.
fn apart(above: &[f64], below: &[f64]) -> Option<Reached> {
    let value = median(above).zip(median(below)).filter(|(_, below)| *below > 0.0);
    let logs = |values: &[f64]| values.iter().map(|value| value.ln()).collect::<Vec<_>>();
    let positive = above.iter().chain(below).all(|value| *value > 0.0);
    let difference = if positive { of_difference(&logs(below), &logs(above)) } else { None };
    let interval = difference.map(|found| found.interval.map(f64::exp));
    Reached::of(value.map(|(above, below)| above / below), interval, above.len().min(below.len()))
}

/// Fills in the verdict on what was `reached`.
fn decide(result: &mut LimitResult, reached: &Reached, failed: usize, notes: &mut Vec<String>) {
    let bound = result.limit.bound;
    result.value = Some(reached.value);
    result.ci95 = reached.ci95;
    result.count = u32::try_from(reached.count).unwrap_or(u32::MAX);
    let is_within = bound.admits(reached.value, bound.value());
    if failed > 0 {
        notes.push(format!("{failed} of its runs did not move their guest unharmed"));
    }
    result.verdict = if is_within && failed == 0 { Verdict::Met } else { Verdict::Missed };
    result.is_sure = reached.ci95.is_some_and(|(low, high)| {
        bound.admits(low, bound.value()) == is_within && bound.admits(high, bound.value()) == is_within
    });
    result.aim_reached = result.limit.aim.map(|aim| bound.admits(reached.value, aim));
}

/// The best of `names` by the median of `metric`: of those all of whose runs were sound, if there is one.
fn best<'a>(scenario: &ScenarioResult, names: &'a [String], by: Metric) -> Option<&'a str> {
    let mut candidates: Vec<(bool, f64, &str)> = names
        .iter()
        .filter_map(|name| {
            let values: Vec<f64> = sound(scenario, name).filter_map(|run| by.of(&run.measures)).collect();
            Some((unsound(scenario, name) > 0, median(&values)?, name.as_str()))
        })
        .collect();
    candidates.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    candidates.first().map(|(_, _, name)| *name)
}

fn sound<'a>(scenario: &'a ScenarioResult, engine: &'a str) -> impl Iterator<Item = &'a Run> {
    scenario.runs.iter().filter(move |run| run.engine == engine && run.is_sound())
}

fn unsound(scenario: &ScenarioResult, engine: &str) -> usize {
    scenario.runs.iter().filter(|run| run.engine == engine && !run.is_sound()).count()
}

/// Whether `engines` have tried, and not one guest arrived unharmed.
fn moved_nothing(scenario: &ScenarioResult, engines: &[String]) -> bool {
    let tried = |run: &&Run| match run.outcome {
        Outcome::Moved | Outcome::NotConverged | Outcome::Failed { .. } => true,
        Outcome::Unsupported { .. } => false,
    };
    let mut tries = scenario.runs.iter().filter(|run| engines.contains(&run.engine)).filter(tried).peekable();
    tries.peek().is_some() && tries.all(|run| !run.is_sound())
}

fn streams_of(scenario: &ScenarioResult, engine: &str) -> Option<Streams> {
    let setting = scenario.scenario.engines.iter().find(|setting| setting.engine == engine);
    setting.map(|setting| setting.streams)
}

/// Those of `names` without a figure, in words.
fn left_out(scenario: &ScenarioResult, names: &[String]) -> Option<String> {
    let without = |name: &&String| sound(scenario, name).next().is_none();
    let told: Vec<String> = names.iter().filter(without).map(|name| why_out(scenario, name)).collect();
    (!told.is_empty()).then(|| format!("without {}", told.join(", ")))
}

fn why_out(scenario: &ScenarioResult, name: &str) -> String {
    let run = scenario.runs.iter().find(|run| run.engine == name);
    let why = match run.map(|run| &run.outcome) {
        None => "did not run",
        Some(Outcome::Moved) => "harmed its guest",
        Some(Outcome::NotConverged) => "did not converge",
        Some(Outcome::Unsupported { .. }) => "can't do it",
        Some(Outcome::Failed { .. }) => "failed",
    };
    format!("{name} ({why})")
}

#[cfg(test)]
mod tests;
