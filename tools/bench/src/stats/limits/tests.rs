//! Limits of made-up results whose figures are known.

use super::*;
use crate::results::{Measures, Timeline};
use crate::scenario::{Suite, file};

const SUITE: &str = r#"
    title = "t"
    summary = "s"
    [engines.ferry]
    kind = "ferry"
    [engines.ferry-2]
    kind = "ferry"
    streams = 2
    [engines.qemu]
    kind = "qemu"
    [engines.tcp]
    kind = "tcp"
    [engines.tcp-2]
    kind = "tcp"
    streams = 2
    [[scenarios]]
    name = "large"
    title = "large"
    guest = "fill mib=100 zero=50 random=50"
    memory_mib = 128
    engines = ["ferry", "ferry-2", "qemu", "tcp", "tcp-2"]
    link = { kind = "tbf", rate_mbit_s = 1000, queue_ms = 10 }
    [[scenarios]]
    name = "small"
    title = "small"
    guest = "idle"
    memory_mib = 64
    engines = ["ferry", "ferry-2"]
"#;

/// The suite with one limit, whose keys besides title and scenario are given.
fn suite(limit: &str) -> Suite {
    let text = format!("{SUITE}\n[[limits]]\ntitle = \"l\"\nscenario = \"large\"\n{limit}");
    file::parse("test", &text).unwrap()
}

/// Three repetitions of each engine in `large`, with the machine becoming slower, and of ferry in `small`.
fn results(suite: &Suite) -> Vec<ScenarioResult> {
    let run = |engine: &str, repetition: u32, total_ms: f64| Run {
        engine: engine.to_owned(),
        repetition,
        at_s: 0.0,
        outcome: Outcome::Moved,
        measures: Measures { total_ms: Some(total_ms), ..Measures::default() },
        timeline: Timeline::default(),
        flags: Vec::new(),
    };
    let of = |index: usize, totals: &[(&str, f64)]| {
        let runs: Vec<Run> = (0..3_u32)
            .flat_map(|n| {
                totals.iter().map(move |(engine, ms)| run(engine, n, ms * (1.0 + 0.1 * f64::from(n))))
            })
            .collect();
        let (engines, ratios) = crate::stats::summarise(&runs);
        ScenarioResult { scenario: suite.scenarios[index].clone(), runs, engines, ratios }
    };
    let large = [("ferry", 1000.0), ("ferry-2", 800.0), ("qemu", 1600.0), ("tcp", 500.0), ("tcp-2", 600.0)];
    vec![of(0, &large), of(1, &[("ferry", 400.0), ("ferry-2", 200.0)])]
}

fn judged(limit: &str, spoil: impl FnOnce(&mut Vec<ScenarioResult>)) -> LimitResult {
    let suite = suite(limit);
    let mut scenarios = results(&suite);
    spoil(&mut scenarios);
    let engines: Vec<EngineInfo> = suite
        .engines
        .iter()
        .map(|engine| EngineInfo {
            name: engine.name.clone(),
            kind: engine.kind,
            version: None,
            binary: None,
            absent: None,
        })
        .collect();
    judge(&suite.limits, &scenarios, &engines).remove(0)
}

fn is_close(value: Option<f64>, expected: f64) -> bool {
    value.is_some_and(|value| (value - expected).abs() < 1e-9 * expected.abs())
}

const OVER_QEMU: &str =
    "metric = \"total_ms\"\nengine = \"ferry*\"\nover = \"qemu\"\nat_most = 0.6\naim = 0.4";

#[test]
fn the_best_of_each_side_is_held_against_the_other() {
    let found = judged(OVER_QEMU, |_| {});
    assert_eq!((found.engine.as_deref(), found.over.as_deref()), (Some("ferry-2"), Some("qemu")));
    assert!(is_close(found.value, 0.5), "{found:?}");
    assert_eq!((found.verdict, found.is_sure, found.aim_reached), (Verdict::Met, true, Some(false)));
    assert_eq!((found.count, found.note), (3, None));
}

#[test]
fn a_limit_that_is_not_reached_is_missed() {
    let found = judged(&OVER_QEMU.replace("0.6", "0.45"), |_| {});
    assert_eq!((found.verdict, found.is_sure), (Verdict::Missed, true));
    // Whose interval reaches beyond the bound is not sure.
    let found = judged(OVER_QEMU, |scenarios| {
        let slow = scenarios[0].runs.iter_mut().find(|run| run.engine == "ferry-2").unwrap();
        slow.measures.total_ms = Some(3000.0);
    });
    assert_eq!((found.verdict, found.is_sure), (Verdict::Met, false));
}

#[test]
fn a_guest_that_does_not_arrive_is_a_miss_and_an_engine_that_can_not_is_none() {
    let spoil = |engine: &'static str, outcome: Outcome, count: usize| {
        move |scenarios: &mut Vec<ScenarioResult>| {
            let runs = scenarios[0].runs.iter_mut().filter(|run| run.engine.starts_with(engine));
            runs.take(count).for_each(|run| run.outcome = outcome.clone());
        }
    };
    let one = judged(&OVER_QEMU.replace("ferry*", "ferry-2"), spoil("ferry-2", Outcome::NotConverged, 1));
    assert_eq!(one.verdict, Verdict::Missed);
    assert!(one.note.unwrap().contains("1 of its runs"));
    // A variant whose guests all arrive is better than a faster one.
    let other = judged(OVER_QEMU, spoil("ferry-2", Outcome::NotConverged, 1));
    assert_eq!((other.engine.as_deref(), other.verdict), (Some("ferry"), Verdict::Missed));
    let all = judged(OVER_QEMU, spoil("ferry", Outcome::NotConverged, 9));
    assert_eq!((all.verdict, all.value), (Verdict::Missed, None));
    let can_not = Outcome::Unsupported { reason: "no".to_owned() };
    let unable = judged(OVER_QEMU, spoil("ferry", can_not, 9));
    assert_eq!(unable.verdict, Verdict::NotMeasured);
    assert!(unable.note.unwrap().contains("ferry-2 (can't do it)"));
    let alone = judged(OVER_QEMU, spoil("qemu", Outcome::NotConverged, 9));
    assert_eq!(alone.verdict, Verdict::NotMeasured);
    assert!(alone.note.unwrap().contains("qemu (did not converge)"));
    let gone = judged(OVER_QEMU, |scenarios| drop(scenarios.remove(0)));
    assert_eq!((gone.verdict, gone.engine), (Verdict::NotMeasured, None));
}

#[test]
fn throughput_is_of_the_same_streams_and_of_pages_that_are_there() {
    let limit = "metric = \"throughput_bytes_per_s\"\nengine = \"ferry*\"\nover = \"tcp*\"\nsame_streams = true\n\
                 at_least = 0.7";
    let found = judged(limit, |_| {});
    assert_eq!((found.engine.as_deref(), found.over.as_deref()), (Some("ferry-2"), Some("tcp-2")));
    assert!(is_close(found.value, 0.75), "{found:?}");
    assert_eq!(found.verdict, Verdict::Met);
    let any = judged(&limit.replace("same_streams = true", ""), |_| {});
    assert_eq!((any.over.as_deref(), any.verdict), (Some("tcp"), Verdict::Missed));
    let alone = judged("metric = \"throughput_bytes_per_s\"\nengine = \"ferry\"\nat_least = 1", |_| {});
    // 50 MiB that are not zero in 1.1 s, the median.
    assert!(is_close(alone.value, f64::from(50 << 20) / 1.1), "{alone:?}");
}

#[test]
fn siblings_links_and_bare_values() {
    let sibling = "metric = \"total_ms\"\nengine = \"ferry\"\nover_scenario = \"small\"\nat_most = 2.6";
    let found = judged(sibling, |_| {});
    assert!(is_close(found.value, 2.5) && found.verdict == Verdict::Met, "{found:?}");
    let (low, high) = found.ci95.unwrap();
    assert!(low < 2.5 && high > 2.5 && !found.is_sure, "{low} {high}");
    // 50 MiB over 1 Gbit/s take 419.43 ms; the median of ferry is 1,100 ms.
    let link = judged("metric = \"total_ms\"\nengine = \"ferry\"\nover_link = true\nat_most = 1.1", |_| {});
    assert!(is_close(link.value, 1100.0 / 419.4304) && link.verdict == Verdict::Missed, "{link:?}");
    let bare = judged("metric = \"total_ms\"\nengine = \"ferry\"\nat_most = 1100", |_| {});
    assert!(is_close(bare.value, 1100.0) && bare.verdict == Verdict::Met, "{bare:?}");
    let missing = judged("metric = \"cpu_s\"\nengine = \"ferry\"\nat_most = 1", |_| {});
    assert_eq!((missing.verdict, missing.value), (Verdict::NotMeasured, None));
}
