//! Suites as TOML.
//!
//! ```toml
//! title = "Page mixes"
//! summary = "What a page's content costs."
//!
//! [engines.ferry]                 # every engine by a name of its own
//! kind = "ferry"
//! [engines.qemu-multifd]
//! kind = "qemu"
//! streams = 4                     # settings here beat those of scenarios
//!
//! [defaults]                      # any key of a scenario
//! repetitions = 5
//! engines = ["ferry", "qemu-multifd"]
//!
//! [[scenarios]]
//! name = "text"
//! title = "1 GiB of text, idle"
//! guest = "fill mib=1024 text=100"
//! memory_mib = 1088
//!
//! [[scenarios]]
//! name = "rate"
//! title = "Dirtying {} MiB/s"
//! guest = "dirty rate={} set=256" # {} is the value of the sweep
//! memory_mib = 1088
//! sweep = { axis = "dirty_rate_mib_s", values = [100, 500] }
//! ```
//!
//! Unknown keys, engines and words are refused by name, before anything is started. Not here: paths are taken as
//! they are, and whether binaries exist is found out by their engines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ferry_guest_abi::Workload;
use serde::Deserialize;

use super::limit::{self, LimitFile};
use super::{
    Axis, Client, Compression, EngineConfig, EngineKind, EngineSetting, Guest, Link, LinuxGuest,
    MemoryBacking, Scenario, Strategy, Streams, Suite, SweepPoint,
};

/// The suites that come along, by name.
pub const BUILT_IN: [(&str, &str); 4] = [
    ("standard", include_str!("suites/standard.toml")),
    ("memory", include_str!("suites/memory.toml")),
    ("smoke", include_str!("suites/smoke.toml")),
    ("calibration", include_str!("suites/calibration.toml")),
];

/// The most scenarios of a suite, sweeps expanded.
pub const SCENARIOS_MAX: usize = 500;

/// Memory that stays free of the sweep's value when [`Axis::MemoryMib`] is swept, in MiB.
const SWEPT_MEMORY_EXTRA_MIB: u32 = 64;

/// Why a suite can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// The file can't be read.
    #[error("there is no suite '{name}': it is neither one that comes along ({built_in}) nor a file")]
    Missing {
        /// What was asked for.
        name: String,
        /// The names that come along.
        built_in: String,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML, or has keys that do not belong there.
    #[error("suite '{name}' can't be read")]
    Toml {
        /// The suite.
        name: String,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Something in it can't be.
    #[error("suite '{name}', {place}: {what}")]
    Wrong {
        /// The suite.
        name: String,
        /// The scenario or engine.
        place: String,
        /// What is wrong and what would be right.
        what: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    title: String,
    summary: String,
    #[serde(default)]
    defaults: toml::Table,
    engines: BTreeMap<String, EngineFile>,
    scenarios: Vec<toml::Table>,
    #[serde(default)]
    limits: Vec<toml::Table>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EngineFile {
    kind: EngineKind,
    binary: Option<PathBuf>,
    strategy: Option<Strategy>,
    streams: Option<Streams>,
    compression: Option<Compression>,
    verify: Option<bool>,
    memory: Option<MemoryBacking>,
    local: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum GuestFile {
    Words(String),
    Linux { linux: LinuxGuest },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    axis: Axis,
    values: Vec<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScenarioFile {
    name: String,
    title: String,
    guest: GuestFile,
    memory_mib: u32,
    tcp_mib: Option<u32>,
    #[serde(default = "one_cpu")]
    cpus: u8,
    #[serde(default = "loopback")]
    link: Link,
    #[serde(default)]
    client: Client,
    #[serde(default = "budget")]
    downtime_ms: f64,
    #[serde(default = "timeout")]
    timeout_s: f64,
    #[serde(default = "watch")]
    watch_ms: u64,
    #[serde(default = "repetitions")]
    repetitions: u32,
    engines: Vec<String>,
    #[serde(default)]
    strategy: Strategy,
    #[serde(default = "one_stream")]
    streams: Streams,
    #[serde(default)]
    compression: Compression,
    bandwidth_mbit_s: Option<f64>,
    #[serde(default = "checked")]
    verify: bool,
    #[serde(default)]
    memory: MemoryBacking,
    sweep: Option<SweepFile>,
}

const fn one_cpu() -> u8 {
    1
}
const fn one_stream() -> Streams {
    Streams::Fixed(1)
}
const fn checked() -> bool {
    true
}
const fn loopback() -> Link {
    Link::Loopback
}
const fn budget() -> f64 {
    300.0
}
const fn timeout() -> f64 {
    30.0
}
const fn watch() -> u64 {
    500
}
const fn repetitions() -> u32 {
    5
}

/// The suite that comes along as `name`, or that of the file of that name.
///
/// # Errors
/// [`SuiteError`], naming the place.
pub fn load(name: &str) -> Result<Suite, SuiteError> {
    if let Some((name, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return parse(name, text);
    }
    let text = std::fs::read_to_string(name).map_err(|source| SuiteError::Missing {
        name: name.to_owned(),
        built_in: BUILT_IN.map(|(name, _)| name).join(", "),
        source,
    })?;
    let stem = Path::new(name).file_stem().map_or(name.into(), |stem| stem.to_string_lossy());
    parse(&stem, &text)
}

/// Parses the suite `name`.
///
/// # Errors
/// [`SuiteError`], naming the place.
pub fn parse(name: &str, text: &str) -> Result<Suite, SuiteError> {
    let toml_error =
        |source: toml::de::Error| SuiteError::Toml { name: name.to_owned(), source: Box::new(source) };
    let file: SuiteFile = toml::from_str(text).map_err(toml_error)?;
    let mut scenarios = Vec::new();
    for mut table in file.scenarios {
        for (key, value) in &file.defaults {
            table.entry(key.clone()).or_insert_with(|| value.clone());
        }
        let place = table.get("name").and_then(toml::Value::as_str).unwrap_or("without a name").to_owned();
        let scenario: ScenarioFile =
            table.try_into().map_err(|error: toml::de::Error| SuiteError::Wrong {
                name: name.to_owned(),
                place: format!("scenario {place}"),
                what: error.to_string(),
            })?;
        scenarios.extend(expand(scenario, &file.engines).map_err(|what| SuiteError::Wrong {
            name: name.to_owned(),
            place: format!("scenario {place}"),
            what,
        })?);
    }
    let mut limits = Vec::new();
    for (index, table) in file.limits.into_iter().enumerate() {
        let wrong = |what: String| SuiteError::Wrong {
            name: name.to_owned(),
            place: format!("limit {}", index + 1),
            what,
        };
        let limit: LimitFile = table.try_into().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
        limits.extend(limit::expand(&limit, &scenarios).map_err(wrong)?);
    }
    let suite = Suite {
        limits,
        name: name.to_owned(),
        title: file.title,
        summary: file.summary,
        engines: file
            .engines
            .into_iter()
            .map(|(name, engine)| EngineConfig { name, kind: engine.kind, binary: engine.binary })
            .collect(),
        scenarios,
    };
    check_suite(&suite).map_err(|(place, what)| SuiteError::Wrong { name: name.to_owned(), place, what })?;
    Ok(suite)
}

fn check_suite(suite: &Suite) -> Result<(), (String, String)> {
    let whole = |what: String| Err(("as a whole".to_owned(), what));
    if suite.scenarios.is_empty() || suite.scenarios.len() > SCENARIOS_MAX {
        return whole(format!("it has {} scenarios; give 1 to {SCENARIOS_MAX}", suite.scenarios.len()));
    }
    let mut names: Vec<&str> = suite.scenarios.iter().map(|scenario| scenario.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return whole(format!("two scenarios are named '{}'", pair[0]));
    }
    Ok(())
}

/// A scenario, or one for each value of its sweep.
fn expand(file: ScenarioFile, engines: &BTreeMap<String, EngineFile>) -> Result<Vec<Scenario>, String> {
    let Some(SweepFile { axis, values }) = &file.sweep else {
        return Ok(vec![scenario(&file, engines, None)?]);
    };
    if values.is_empty() {
        return Err("a sweep needs values".to_owned());
    }
    values.iter().map(|&value| scenario(&file, engines, Some((*axis, value)))).collect()
}

fn scenario(
    file: &ScenarioFile,
    engines: &BTreeMap<String, EngineFile>,
    point: Option<(Axis, f64)>,
) -> Result<Scenario, String> {
    let fill_in =
        |text: &str| point.map_or(text.to_owned(), |(_, value)| text.replace("{}", &value.to_string()));
    let mut scenario = Scenario {
        name: file.name.clone(),
        title: fill_in(&file.title),
        guest: match &file.guest {
            GuestFile::Words(words) => Guest::Workload(fill_in(words)),
            GuestFile::Linux { linux } => Guest::Linux(linux.clone()),
        },
        memory_mib: file.memory_mib,
        tcp_mib: file.tcp_mib,
        cpus: file.cpus,
        link: file.link,
        client: file.client,
        downtime_ms: file.downtime_ms,
        timeout_s: file.timeout_s,
        watch_ms: file.watch_ms,
        repetitions: file.repetitions,
        engines: file.engines.iter().map(|name| setting(name, file, engines)).collect::<Result<_, _>>()?,
        sweep: None,
    };
    if let Some((axis, value)) = point {
        scenario.name = format!("{}-{value}", file.name);
        move_to(&mut scenario, axis, value)?;
        scenario.sweep = Some(SweepPoint { name: file.name.clone(), axis, value });
    }
    check(&scenario)?;
    Ok(scenario)
}

fn setting(
    name: &str,
    file: &ScenarioFile,
    engines: &BTreeMap<String, EngineFile>,
) -> Result<EngineSetting, String> {
    let Some(engine) = engines.get(name) else {
        let known: Vec<&str> = engines.keys().map(String::as_str).collect();
        return Err(format!("there is no engine '{name}' in this suite; it has {}", known.join(", ")));
    };
    Ok(EngineSetting {
        engine: name.to_owned(),
        strategy: engine.strategy.unwrap_or(file.strategy),
        streams: engine.streams.unwrap_or(file.streams),
        compression: engine.compression.unwrap_or(file.compression),
        bandwidth_mbit_s: file.bandwidth_mbit_s,
        verify: engine.verify.unwrap_or(file.verify),
        memory: engine.memory.unwrap_or(file.memory),
        local: engine.local.unwrap_or(false),
    })
}

fn move_to(scenario: &mut Scenario, axis: Axis, value: f64) -> Result<(), String> {
    match axis {
        // The guest's words name it.
        Axis::DirtyRateMibS => {}
        Axis::MemoryMib => scenario.memory_mib = whole_mib(value)? + SWEPT_MEMORY_EXTRA_MIB,
        Axis::DowntimeMs => scenario.downtime_ms = value,
        Axis::LinkMbitS => match &mut scenario.link {
            Link::Tbf { rate_mbit_s, .. } => *rate_mbit_s = value,
            Link::Loopback | Link::Veth => {
                return Err("the link's rate can be swept only where link.kind is \"tbf\"".to_owned());
            }
        },
    }
    Ok(())
}

fn whole_mib(value: f64) -> Result<u32, String> {
    let text = value.to_string();
    text.parse().map_err(|_| format!("{text} is no whole number of MiB"))
}

fn check(scenario: &Scenario) -> Result<(), String> {
    let name_is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if scenario.name.is_empty() || !scenario.name.chars().all(name_is_plain) {
        return Err("a name has only letters, digits, '-', '_' and '.'".to_owned());
    }
    let positive = [
        ("downtime_ms", scenario.downtime_ms),
        ("timeout_s", scenario.timeout_s),
        ("repetitions", f64::from(scenario.repetitions)),
        ("cpus", f64::from(scenario.cpus)),
        ("tcp_mib", scenario.tcp_mib.map_or(1.0, f64::from)),
    ];
    if let Some((key, value)) = positive.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
        return Err(format!("{key} = {value}: give a number above zero"));
    }
    if let Some(setting) = scenario.engines.iter().find(|setting| setting.streams.fixed() == Some(0)) {
        return Err(format!("{}: streams = 0: give at least one, or \"auto\"", setting.engine));
    }
    if scenario.engines.is_empty() {
        return Err("engines is empty: name at least one".to_owned());
    }
    let mut serves = false;
    if let Guest::Workload(words) = &scenario.guest {
        let words = with_network(words, "ip=10.0.0.2/24");
        let workload = Workload::parse(&words).map_err(|error| format!("guest = \"{words}\": {error}"))?;
        let least = workload.memory_mib_min();
        if scenario.memory_mib < least {
            return Err(format!("memory_mib = {}: its guest needs {least}", scenario.memory_mib));
        }
        serves = matches!(workload, Workload::Http(_));
    }
    if scenario.client.is_some() && !serves && matches!(scenario.guest, Guest::Workload(_)) {
        return Err("only guests with the job 'http' have clients".to_owned());
    }
    if scenario.client.is_some() && scenario.link == Link::Loopback {
        return Err("a client needs link.kind \"veth\" or \"tbf\"".to_owned());
    }
    if let Link::Tbf { rate_mbit_s, queue_ms } = scenario.link
        && !(rate_mbit_s > 0.0 && queue_ms > 0.0)
    {
        return Err("link: rate_mbit_s and queue_ms must be above zero".to_owned());
    }
    Ok(())
}

/// The guest's words with `address` in front of the keys of the job `http`, which the harness adds; other jobs
/// have no network.
#[must_use]
pub fn with_network(words: &str, address: &str) -> String {
    match words.trim().strip_prefix("http") {
        Some(rest) => format!("http {address}{rest}"),
        None => words.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        title = "t"
        summary = "s"
        [engines.ferry]
        kind = "ferry"
        [engines.qemu-4]
        kind = "qemu"
        streams = 4
        [defaults]
        engines = ["ferry", "qemu-4"]
        memory_mib = 512
        [[scenarios]]
        name = "rate"
        title = "{} MiB/s"
        guest = "dirty rate={} set=64"
        sweep = { axis = "dirty_rate_mib_s", values = [10, 500] }
    "#;

    #[test]
    fn the_suites_that_come_along_are_right() {
        for (name, _) in BUILT_IN {
            load(name).unwrap();
        }
    }

    #[test]
    fn a_sweep_becomes_scenarios_and_engines_keep_their_settings() {
        let suite = parse("small", SMALL).unwrap();
        let names: Vec<&str> = suite.scenarios.iter().map(|scenario| scenario.name.as_str()).collect();
        assert_eq!(names, ["rate-10", "rate-500"]);
        let scenario = &suite.scenarios[1];
        assert_eq!(scenario.guest, Guest::Workload("dirty rate=500 set=64".to_owned()));
        assert_eq!(scenario.title, "500 MiB/s");
        assert_eq!(
            scenario.engines.iter().map(|engine| engine.streams).collect::<Vec<_>>(),
            [1.into(), 4.into()]
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("set=64", "set=9999", "needs"),
            ("dirty rate", "dirty speed", "speed"),
            ("\"ferry\", \"qemu-4\"", "\"vmotion\"", "vmotion"),
            ("memory_mib = 512", "memory_mib = 512\nmemori = 1", "memori"),
            ("values = [10, 500]", "values = []", "values"),
            ("values = [10, 500]", "values = [10, 10]", "two scenarios"),
            ("kind = \"qemu\"", "kind = \"xen\"", "xen"),
            ("memory_mib = 512", "memory_mib = 512\nclient = { udp = true }", "http"),
            ("memory_mib = 512", "memory_mib = 512\ntimeout_s = 0", "timeout_s"),
            ("streams = 4", "streams = 0", "streams"),
            ("streams = 4", "streams = \"many\"", "auto"),
            ("streams = 4", "memory = \"cold\"", "hugepages"),
            ("memory_mib = 512", "memory_mib = 512\ntcp_mib = 0", "tcp_mib"),
        ];
        for (from, to, word) in cases {
            let text = SMALL.replace(from, to);
            assert_ne!(text, SMALL);
            let error = parse("small", &text).unwrap_err();
            let words = format!(
                "{error}: {}",
                std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
            );
            assert!(words.contains(word), "{words}");
        }
        assert!(load("/nowhere").unwrap_err().to_string().contains("standard"));
    }
}
