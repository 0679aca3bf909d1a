//! The page in Chromium: it renders without complaint or network, and what it draws is what the JSON says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ferry_bench::report::limits::LimitWords;
use ferry_bench::report::{html, median_run, number, reference};
use ferry_bench::results::{Metric, Results, Run, ScenarioResult};
use ferry_bench::stats::{interval, ratio_of};

use crate::browser::{self, Browser};
use crate::drawn::{Drawn, Figure};
use crate::sample::{ODD, Recipe};

/// How far a mark may lie off its value, in the SVG's units, which are drawn to two decimals.
const OFF_MAX: f64 = 0.05;

fn write(name: &str, page: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, page).unwrap();
    path
}

/// Whatever a page complained of, and where it went besides itself.
fn complaints(browser: &Browser) -> Vec<String> {
    let told = browser.events.iter().filter_map(|(method, told)| match method.as_str() {
        "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded" => {
            Some(format!("{method} {told}"))
        }
        "Network.requestWillBeSent" => {
            let url = told["request"]["url"].as_str().unwrap_or_default();
            let own = url.starts_with("file://") && url.ends_with(".html") || url.starts_with("data:");
            (!own).then(|| format!("asks for {url}"))
        }
        _ => None,
    });
    told.collect()
}

fn gathered(browser: &mut Browser, page: &Path) -> Drawn {
    browser.open(&format!("file://{}", page.display()));
    let drawn = browser.evaluate(include_str!("gather.js"));
    serde_json::from_value(drawn).unwrap()
}

#[test]
fn the_page_draws_what_the_json_says() {
    if !browser::available("the_page_draws_what_the_json_says") {
        return;
    }
    let results = Recipe::new(1).results();
    let path = write("report.html", &html::page(&results));
    let mut browser = Browser::start();
    let mut papers = BTreeSet::new();
    for (width, scheme) in [(1240, "light"), (1240, "dark"), (390, "light")] {
        browser.look(width, scheme);
        let drawn = gathered(&mut browser, &path);
        assert_eq!(complaints(&browser), Vec::<String>::new(), "{width} {scheme}");
        assert_eq!(drawn.clashes, Vec::<String>::new(), "{width} {scheme}");
        assert!(drawn.overflow <= 0.0, "{width} {scheme}: {} too wide", drawn.overflow);
        assert_eq!(drawn.scripts, 0);
        papers.insert(drawn.paper.clone());
        if width == 1240 && scheme == "light" {
            check(&drawn, &results);
        }
    }
    assert_eq!(papers.len(), 2, "light and dark differ: {papers:?}");
}

#[test]
fn whatever_is_missing_the_page_renders() {
    if !browser::available("whatever_is_missing_the_page_renders") {
        return;
    }
    let mut browser = Browser::start();
    let mut nothing = Recipe::new(2).results();
    for scenario in &mut nothing.scenarios {
        scenario.runs.clear();
        scenario.engines.clear();
        scenario.ratios.clear();
    }
    let mut bare = Recipe::new(3).results();
    for scenario in &mut bare.scenarios {
        for run in &mut scenario.runs {
            run.measures = ferry_bench::results::Measures::default();
            run.timeline = ferry_bench::results::Timeline::default();
        }
        (scenario.engines, scenario.ratios) = ferry_bench::stats::summarise(&scenario.runs);
    }
    let mut single = Recipe::new(4).results();
    for scenario in &mut single.scenarios {
        scenario.runs.retain(|run| run.repetition == 0);
        (scenario.engines, scenario.ratios) = ferry_bench::stats::summarise(&scenario.runs);
    }
    let mut empty = nothing.clone();
    empty.scenarios.clear();
    empty.engines.clear();
    for (name, results) in [("nothing", nothing), ("bare", bare), ("single", single), ("empty", empty)] {
        let path = write(&format!("report-{name}.html"), &html::page(&results));
        browser.look(1240, "light");
        let drawn = gathered(&mut browser, &path);
        assert_eq!(complaints(&browser), Vec::<String>::new(), "{name}");
        assert_eq!(drawn.clashes, Vec::<String>::new(), "{name}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("NaN") && !text.contains(">inf"), "{name}");
    }
}

#[test]
fn a_page_that_complains_or_calls_out_would_be_seen() {
    if !browser::available("a_page_that_complains_or_calls_out_would_be_seen") {
        return;
    }
    let mut browser = Browser::start();
    for bad in [
        "<img src='http://127.0.0.1:9/x.png'>",
        "<script>console.error('no')</script>",
        "<script>nothing()</script>",
    ] {
        let path = write("bad.html", &format!("<!doctype html><link rel=icon href='data:,'>{bad}"));
        browser.open(&format!("file://{}", path.display()));
        browser.evaluate("1");
        assert!(!complaints(&browser).is_empty(), "{bad}");
    }
}

fn check(drawn: &Drawn, results: &Results) {
    assert_eq!(drawn.title, results.title);
    assert_eq!(drawn.results, html::drawn(results), "the page holds the results");
    let kinds: BTreeSet<&str> = drawn.figures.iter().map(|figure| figure.kind.as_str()).collect();
    assert_eq!(kinds, BTreeSet::from(["boxes", "curve", "forest", "parts", "timeline", "witness"]));
    for figure in &drawn.figures {
        match figure.kind.as_str() {
            "boxes" => check_boxes(figure, results),
            "witness" => check_places(figure, results, Along::X),
            "curve" => check_places(figure, results, Along::Y),
            "forest" => check_ratios(figure, results),
            "timeline" => check_timeline(figure, results),
            "parts" => check_parts(figure),
            other => panic!("nobody checks figures of the kind {other}"),
        }
    }
    check_all_drawn(drawn, results);
    check_medians(drawn, results);
    check_failures(drawn, results);
    check_limits(drawn, results);
    check_looks(drawn);
}

fn scenario<'a>(results: &'a Results, name: &str) -> &'a ScenarioResult {
    results.scenarios.iter().find(|scenario| scenario.scenario.name == name).unwrap()
}

/// Values of sound runs with their repetitions.
fn values(scenario: &ScenarioResult, engine: &str, metric: Metric) -> Vec<(u32, f64)> {
    let runs = scenario.runs.iter().filter(|run| run.engine == engine && run.is_sound());
    runs.filter_map(|run| Some((run.repetition, metric.of(&run.measures)?))).collect()
}

/// Which axis a figure's values lie along.
#[derive(Clone, Copy)]
enum Along {
    X,
    Y,
}

fn check_boxes(figure: &Figure, results: &Results) {
    let scenario = scenario(results, figure.scenario.as_ref().unwrap());
    let metric = Metric::from_name(figure.metric.as_ref().unwrap()).unwrap();
    let mut expected: Vec<(String, u32, f64)> = Vec::new();
    for summary in &scenario.engines {
        let values = values(scenario, &summary.engine, metric).into_iter();
        expected.extend(values.map(|(repetition, value)| (summary.engine.clone(), repetition, value)));
    }
    let mut found: Vec<(String, u32, f64)> = figure
        .values
        .iter()
        .map(|drawn| (drawn.engine.clone(), drawn.repetition.unwrap(), drawn.value))
        .collect();
    let order = |a: &(String, u32, f64), b: &(String, u32, f64)| (&a.0, a.1).cmp(&(&b.0, b.1));
    expected.sort_by(order);
    found.sort_by(order);
    assert_eq!(found, expected, "{} {metric:?}", scenario.scenario.name);
    check_places(figure, results, Along::X);
}

/// Every drawn value is one of the results', and lies where its axis says.
fn check_places(figure: &Figure, results: &Results, along: Along) {
    assert!(!figure.values.is_empty());
    let factor = figure.factor.unwrap();
    for drawn in &figure.values {
        let scenario = scenario(results, drawn.scenario.as_ref().unwrap());
        let metric = Metric::from_name(&drawn.metric).unwrap();
        let known = values(scenario, &drawn.engine, metric);
        assert!(known.iter().any(|(_, value)| *value == drawn.value), "{drawn:?}");
        let (ticks, place) = match along {
            Along::X => (figure.x.as_ref().unwrap(), drawn.place.0),
            Along::Y => (figure.y.as_ref().unwrap(), drawn.place.1),
        };
        let expected = ticks.place_of(drawn.value * factor).expect("an axis has two marks");
        assert!((expected - place).abs() < OFF_MAX, "{drawn:?}: at {place}, not {expected}, {ticks:?}");
    }
}

fn check_ratios(figure: &Figure, results: &Results) {
    let to = reference(results).unwrap().name.as_str();
    assert_eq!(to, "qemu");
    assert_eq!(figure.columns.len(), Metric::MAIN.len());
    for column in &figure.columns {
        let metric = Metric::from_name(&column.metric).unwrap();
        let known: usize = results
            .scenarios
            .iter()
            .map(|scenario| {
                let engines = scenario.engines.iter().filter(|summary| summary.engine != to);
                engines.filter(|summary| ratio_of(scenario, metric, &summary.engine, to).is_some()).count()
            })
            .sum();
        assert_eq!(column.points.len(), known, "{metric:?}");
        for point in &column.points {
            let view = ratio_of(scenario(results, &point.scenario), metric, &point.engine, to).unwrap();
            assert_eq!((point.ratio, point.low.zip(point.high)), (view.ratio, view.ci95), "{point:?}");
            if let Some(expected) = column.x.place_of(view.ratio) {
                assert!((expected - point.place.0).abs() < OFF_MAX, "{point:?}: not at {expected}");
            }
        }
    }
}

fn check_timeline(figure: &Figure, results: &Results) {
    let scenario = scenario(results, figure.scenario.as_ref().unwrap());
    let engine = figure.engine.as_ref().unwrap();
    let run = median_run(scenario, engine).unwrap();
    assert_eq!(figure.repetition, Some(run.repetition));
    let mut totals: Vec<f64> =
        values(scenario, engine, Metric::TotalMs).into_iter().map(|(_, total_ms)| total_ms).collect();
    totals.sort_by(f64::total_cmp);
    assert_eq!(
        run.measures.total_ms,
        Some(totals[(totals.len() - 1) / 2]),
        "{engine}: the median run is drawn"
    );
    let standstill: Vec<(f64, f64)> =
        figure.spans.iter().filter(|span| span.round.is_none()).map(|span| (span.from, span.to)).collect();
    assert_eq!(standstill, run.timeline.standstill.into_iter().collect::<Vec<_>>());
    let rounds: Vec<(u32, f64)> =
        figure.spans.iter().filter_map(|span| Some((span.round?, span.from))).collect();
    let told: Vec<(u32, f64)> =
        run.measures.rounds.iter().map(|round| (round.round, round.from_ms.unwrap())).collect();
    assert_eq!(rounds, told);
    let (ticks, factor) = (figure.x.as_ref().unwrap(), figure.factor.unwrap());
    for span in &figure.spans {
        let left = ticks.place_of(span.from * factor).unwrap();
        let right = ticks.place_of(span.to * factor).unwrap();
        assert!((left - span.left).abs() < OFF_MAX, "{span:?}: not from {left}");
        // A standstill that is a hair's breadth wide is drawn a little wider.
        let right = if span.round.is_none() { right.max(left + 2.0) } else { right };
        assert!((right - span.right).abs() < OFF_MAX, "{span:?}: not to {right}");
    }
}

fn check_parts(figure: &Figure) {
    let whole: f64 = figure.parts.iter().map(|part| part.value).sum();
    let height: f64 = figure.parts.iter().map(|part| part.height).sum();
    for part in &figure.parts {
        let expected = part.value / whole * height;
        assert!((expected - part.height).abs() < OFF_MAX, "{part:?}: not {expected}");
    }
}

/// Nothing that could be drawn is missing.
fn check_all_drawn(drawn: &Drawn, results: &Results) {
    let shown = |kind: &str, scenario: &str, engine: &str| {
        drawn.figures.iter().any(|figure| {
            figure.kind == kind
                && figure.scenario.as_deref() == Some(scenario)
                && figure.engine.as_deref() == Some(engine)
        })
    };
    let mut parts: Vec<&Run> = Vec::new();
    for scenario in &results.scenarios {
        let name = &scenario.scenario.name;
        for metric in Metric::MAIN {
            let of = |figure: &&Figure| {
                figure.kind == "boxes"
                    && figure.scenario.as_ref() == Some(name)
                    && figure.metric.as_deref() == Some(metric.name())
            };
            assert_eq!(drawn.figures.iter().filter(of).count(), 1, "{name} {metric:?}");
        }
        for summary in &scenario.engines {
            let Some(run) = median_run(scenario, &summary.engine) else { continue };
            assert!(shown("timeline", name, &summary.engine), "{name} {}", summary.engine);
            parts.push(run);
        }
    }
    // Bars of parts stand in the order of timelines, engines of a scenario in that of the legend.
    let bars: Vec<&Figure> = drawn.figures.iter().filter(|figure| figure.kind == "parts").collect();
    assert_eq!(bars.len(), parts.len());
    for run in parts {
        let told = run.measures.downtime_parts.iter().map(|part| (part.name.as_str(), part.ms));
        let told: Vec<(&str, f64)> = told.collect();
        let has = |bar: &&&Figure| {
            let drawn: Vec<(&str, f64)> =
                bar.parts.iter().map(|part| (part.name.as_str(), part.value)).collect();
            bar.engine.as_ref() == Some(&run.engine) && drawn.starts_with(&told)
        };
        assert!(bars.iter().any(|bar| has(&bar)), "{} {told:?}", run.engine);
    }
    let sweeps: BTreeSet<&str> = drawn.figures.iter().filter_map(|figure| figure.sweep.as_deref()).collect();
    assert_eq!(sweeps, BTreeSet::from(["random-idle", "dirty-rate", "budget"]));
}

fn check_medians(drawn: &Drawn, results: &Results) {
    let in_figures = drawn.figures.iter().flat_map(|figure| &figure.medians);
    let mut count = 0;
    for found in in_figures.chain(&drawn.cells) {
        let scenario = scenario(results, &found.scenario);
        let metric = Metric::from_name(&found.metric).unwrap();
        let summary = scenario.engines.iter().find(|summary| summary.engine == found.engine).unwrap();
        let distribution = summary.metrics.iter().find(|(of, _)| *of == metric).unwrap().1;
        assert_eq!(found.value, distribution.p50, "{found:?}");
        let values: Vec<f64> =
            values(scenario, &found.engine, metric).into_iter().map(|(_, value)| value).collect();
        assert_eq!(interval::median(&values), Some(found.value));
        assert_eq!(found.text, number::value_of(metric, found.value), "{found:?}");
        count += 1;
    }
    let known: usize = results.scenarios.iter().map(|scenario| scenario.engines.len()).sum();
    assert!(count > known * Metric::MAIN.len() * 2, "{count} medians of {known} engines");
}

fn check_failures(drawn: &Drawn, results: &Results) {
    let mut known: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for scenario in &results.scenarios {
        for run in scenario.runs.iter().filter(|run| !run.is_sound()) {
            *known.entry((&scenario.scenario.name, &run.engine)).or_default() += 1;
        }
    }
    let found: BTreeMap<(&str, &str), usize> =
        drawn.failures.iter().map(|row| ((row.scenario.as_str(), row.engine.as_str()), row.count)).collect();
    assert_eq!(found, known);
}

/// Every limit has its row, with its figures and its verdict.
fn check_limits(drawn: &Drawn, results: &Results) {
    assert!(results.limits.len() > 6 && drawn.limits.len() == results.limits.len());
    let mut verdicts = BTreeSet::new();
    for (row, result) in drawn.limits.iter().zip(&results.limits) {
        assert_eq!((&row.title, &row.scenario), (&result.limit.title, &result.limit.scenario));
        assert_eq!(row.value, result.value, "{row:?}");
        let words = LimitWords::of(result);
        let [what, bound, reached, verdict] = &row.text[..] else { panic!("{row:?}") };
        assert!(what.contains(&words.what) && bound.contains(&words.bound), "{row:?}");
        assert!(reached.contains(&words.reached), "{row:?}");
        assert_eq!(verdict, words.verdict);
        verdicts.insert(words.verdict);
    }
    assert!(verdicts.len() > 2, "{verdicts:?}");
}

/// An engine has one look everywhere, and no other has it.
fn check_looks(drawn: &Drawn) {
    let mut looks: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for mark in &drawn.looks {
        looks.entry(&mark.engine).or_default().insert(&mark.look);
    }
    assert!(looks.contains_key(ODD) && looks.len() > 5, "{looks:?}");
    assert!(looks.values().all(|looks| looks.len() == 1), "{looks:?}");
    let distinct: BTreeSet<&str> = looks.values().flatten().copied().collect();
    assert_eq!(distinct.len(), looks.len(), "{looks:?}");
}
