//! What a suite expects of its figures, as data. Reports hold results against it ([`crate::stats::limits`]); it is no test.
//!
//! ```toml
//! [[limits]]
//! title = "4 GiB of random pages: time beside QEMU"
//! scenario = "random-*"            # a `*` at the end stands for anything: one limit for each
//! metric = "total_ms"              # or any other, or "throughput_bytes_per_s"
//! engine = ["ferry", "ferry-2"]    # of several the best, by the median of `best_by`
//! over = "qemu*"                   # or over_scenario = "small", or over_link = true, or nothing
//! at_most = 0.85                   # or at_least
//! aim = 0.75
//! ```

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Guest, Link, Scenario};
use crate::results::Metric;

/// A figure and what it must not be beyond.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Limit {
    /// One line for a table.
    pub title: String,
    /// The scenario that it is about.
    pub scenario: String,
    /// The figure.
    pub quantity: Quantity,
    /// The engines of which the best one counts.
    pub engines: Vec<String>,
    /// What the figure is held against.
    pub base: Base,
    /// What the best engine of several is chosen by: that with the lowest median.
    pub best_by: Metric,
    /// What the figure must not be beyond: a ratio, or a value in the metric's own unit.
    pub bound: Bound,
    /// A value that would be better still.
    pub aim: Option<f64>,
}

/// What is limited: a metric, of which less is better, or a throughput.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "give a metric, or \"throughput_bytes_per_s\"")]
pub enum Quantity {
    /// A metric.
    Metric(Metric),
    /// Something of which more is better.
    Rate(Rate),
}

/// Figures of which more is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Bytes of the guest's pages, each counted once, over the total time.
    ThroughputBytesPerS,
}

/// What a figure is held against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// Nothing: the value itself is limited.
    Nothing,
    /// The best of these engines in the same scenario, by ratios of runs beside each other.
    Engines(Vec<String>),
    /// The same, of those with as many streams as the engine has.
    EnginesOfSameStreams(Vec<String>),
    /// The same engine in another scenario.
    Scenario(String),
    /// The time that the link needs for the guest's pages once, without any header.
    Link,
}

/// What a figure must not be beyond.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Bound {
    /// The number.
    #[must_use]
    pub fn value(self) -> f64 {
        match self {
            Self::AtMost(value) | Self::AtLeast(value) => value,
        }
    }

    /// Whether `value` is within `than`, in the direction of this bound.
    #[must_use]
    pub fn admits(self, value: f64, than: f64) -> bool {
        match self {
            Self::AtMost(_) => value <= than,
            Self::AtLeast(_) => value >= than,
        }
    }
}

/// A limit as a suite's file has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitFile {
    title: String,
    scenario: String,
    metric: Quantity,
    engine: Names,
    over: Option<Names>,
    #[serde(default)]
    same_streams: bool,
    over_scenario: Option<String>,
    #[serde(default)]
    over_link: bool,
    best_by: Option<Metric>,
    at_most: Option<f64>,
    at_least: Option<f64>,
    /// So much of the guest's size is added to `at_most`.
    #[serde(default)]
    plus_guest_share: f64,
    aim: Option<f64>,
}

/// One name or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "give a name, or a list of names")]
enum Names {
    One(String),
    Several(Vec<String>),
}

impl Names {
    fn patterns(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }

    /// The engines of `scenario` that have one of these names, in the scenario's order.
    fn engines_of(&self, scenario: &Scenario) -> Result<Vec<String>, String> {
        let all: Vec<&str> = scenario.engines.iter().map(|setting| setting.engine.as_str()).collect();
        if let Some(nobody) =
            self.patterns().iter().find(|pattern| !all.iter().any(|name| matches(pattern, name)))
        {
            let (name, all) = (&scenario.name, all.join(", "));
            return Err(format!("no engine of scenario {name} is called '{nobody}'; it has {all}"));
        }
        let named = |name: &&str| self.patterns().iter().any(|pattern| matches(pattern, name));
        Ok(all.into_iter().filter(named).map(str::to_owned).collect())
    }
}

/// Whether `name` is called `pattern`, at whose end a `*` stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

/// A limit for each of `scenarios` that it is about.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn expand(file: &LimitFile, scenarios: &[Scenario]) -> Result<Vec<Limit>, String> {
    let about: Vec<&Scenario> =
        scenarios.iter().filter(|scenario| matches(&file.scenario, &scenario.name)).collect();
    if about.is_empty() {
        return Err(format!("no scenario is called '{}'", file.scenario));
    }
    about.into_iter().map(|scenario| limit(file, scenario, scenarios)).collect()
}

fn limit(file: &LimitFile, scenario: &Scenario, scenarios: &[Scenario]) -> Result<Limit, String> {
    let guest_bytes = f64::from(scenario.memory_mib) * f64::from(1 << 20);
    let bound = match (file.at_most, file.at_least) {
        (Some(most), None) => Bound::AtMost(most + file.plus_guest_share * guest_bytes),
        (None, Some(least)) if file.plus_guest_share == 0.0 => Bound::AtLeast(least),
        _ => return Err("give at_most, or at_least; plus_guest_share goes with at_most".to_owned()),
    };
    if !(bound.value().is_finite() && bound.value() > 0.0) {
        return Err(format!("{}: give a number above zero", bound.value()));
    }
    let base = match (&file.over, &file.over_scenario, file.over_link) {
        (None, None, false) => Base::Nothing,
        (Some(over), None, false) if file.same_streams => {
            Base::EnginesOfSameStreams(over.engines_of(scenario)?)
        }
        (Some(over), None, false) => Base::Engines(over.engines_of(scenario)?),
        (None, Some(other), false) => {
            let found = scenarios.iter().find(|scenario| scenario.name == *other);
            let sibling = found.ok_or_else(|| format!("no scenario is called '{other}'"))?;
            file.engine.engines_of(sibling)?;
            Base::Scenario(other.clone())
        }
        (None, None, true) => {
            if !matches!((scenario.link, &scenario.guest), (Link::Tbf { .. }, Guest::Workload(_))) {
                return Err("over_link needs link.kind \"tbf\" and a workload guest".to_owned());
            }
            Base::Link
        }
        _ => return Err("give one of over, over_scenario and over_link, or none".to_owned()),
    };
    let best_by = file.best_by.unwrap_or(match file.metric {
        Quantity::Metric(metric) => metric,
        Quantity::Rate(Rate::ThroughputBytesPerS) => Metric::TotalMs,
    });
    Ok(Limit {
        title: file.title.clone(),
        scenario: scenario.name.clone(),
        quantity: file.metric,
        engines: file.engine.engines_of(scenario)?,
        base,
        best_by,
        bound,
        aim: file.aim,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Suite;
    use crate::scenario::file::{self, SuiteError};

    const SUITE: &str = r#"
        title = "t"
        summary = "s"
        [engines.ferry]
        kind = "ferry"
        [engines.ferry-2]
        kind = "ferry"
        [engines.tcp]
        kind = "tcp"
        [[scenarios]]
        name = "link"
        title = "{}"
        guest = "fill mib=64 random=100"
        memory_mib = 100
        engines = ["ferry", "ferry-2", "tcp"]
        link = { kind = "tbf", rate_mbit_s = 1000, queue_ms = 10 }
        sweep = { axis = "link_mbit_s", values = [300, 1000] }
        [[scenarios]]
        name = "small"
        title = "small"
        guest = "idle"
        memory_mib = 64
        engines = ["ferry"]
        [[limits]]
        title = "first"
        scenario = "link-*"
        metric = "total_ms"
        engine = "ferry*"
        over = ["tcp"]
        at_most = 0.85
        aim = 0.75
    "#;

    fn parsed(from: &str, to: &str) -> Result<Suite, SuiteError> {
        file::parse("test", &SUITE.replace(from, to))
    }

    #[test]
    fn a_star_stands_for_scenarios_and_engines() {
        let limits = parsed("", "").unwrap().limits;
        let about: Vec<&str> = limits.iter().map(|limit| limit.scenario.as_str()).collect();
        assert_eq!(about, ["link-300", "link-1000"]);
        assert_eq!(limits[0].engines, ["ferry", "ferry-2"]);
        assert_eq!(limits[0].base, Base::Engines(vec!["tcp".to_owned()]));
        assert_eq!((limits[0].bound, limits[0].aim), (Bound::AtMost(0.85), Some(0.75)));
        assert_eq!(limits[0].best_by, Metric::TotalMs);
    }

    #[test]
    fn every_kind_of_base_can_be_said() {
        let base = |to: &str| parsed("over = [\"tcp\"]", to).unwrap().limits[0].base.clone();
        assert_eq!(base(""), Base::Nothing);
        assert_eq!(base("over_link = true"), Base::Link);
        let same = base("over = \"tcp\"\nsame_streams = true");
        assert_eq!(same, Base::EnginesOfSameStreams(vec!["tcp".to_owned()]));
        let sibling = SUITE.replace("over = [\"tcp\"]", "over_scenario = \"small\"");
        let suite = file::parse("test", &sibling.replace("\"ferry*\"", "\"ferry\"")).unwrap();
        assert_eq!(suite.limits[0].base, Base::Scenario("small".to_owned()));
    }

    #[test]
    fn a_share_of_the_guest_is_added_and_rates_are_known() {
        let memory = "metric = \"memory_overhead_source_bytes\"\nplus_guest_share = 0.5";
        let suite = parsed("metric = \"total_ms\"", memory).unwrap();
        assert_eq!(suite.limits[0].bound, Bound::AtMost(0.85 + f64::from(50 << 20)));
        let suite = parsed("metric = \"total_ms\"", "metric = \"throughput_bytes_per_s\"").unwrap();
        assert_eq!(suite.limits[0].quantity, Quantity::Rate(Rate::ThroughputBytesPerS));
        assert_eq!(suite.limits[0].best_by, Metric::TotalMs);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("scenario = \"link-*\"", "scenario = \"nowhere\"", "nowhere"),
            ("over = [\"tcp\"]", "over = [\"vmotion\"]", "vmotion"),
            ("engine = \"ferry*\"", "engine = \"xen*\"", "xen"),
            ("over = [\"tcp\"]", "over = [\"tcp\"]\nover_link = true", "one of"),
            ("over = [\"tcp\"]", "over_scenario = \"large\"", "large"),
            ("over = [\"tcp\"]", "over_link = true\nengines = 1", "engines"),
            ("at_most = 0.85", "", "at_most"),
            ("at_most = 0.85", "at_most = -1", "above zero"),
            ("metric = \"total_ms\"", "metric = \"speed\"", "throughput"),
            ("aim = 0.75", "aims = 0.75", "aims"),
        ];
        for (from, to, word) in cases {
            let text = SUITE.replace(from, to);
            assert_ne!(text, SUITE);
            let error = file::parse("test", &text).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            assert!(format!("{error} {source}").contains(word), "{error} {source}");
        }
    }
}
