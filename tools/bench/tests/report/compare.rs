//! Comparisons of results, as a library and as a command.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ferry_bench::compare::agree::agree;
use ferry_bench::compare::{Comparison, METRICS, Options, Verdict, compare};
use ferry_bench::results::{Metric, Outcome, Results};
use ferry_bench::stats;

use crate::sample::Recipe;

/// Results whose runs all move their guests: failures have tests of their own.
fn calm(recipe: Recipe) -> Results {
    let mut results = recipe.results();
    results.scenarios.retain(|scenario| scenario.runs.iter().all(ferry_bench::results::Run::is_sound));
    results
}

fn count(comparison: &Comparison, verdict: Verdict) -> usize {
    comparison.changes.iter().filter(|change| change.verdict == verdict).count()
}

fn summarised(mut results: Results) -> Results {
    for scenario in &mut results.scenarios {
        (scenario.engines, scenario.ratios) = stats::summarise(&scenario.runs);
    }
    results
}

#[test]
fn the_same_engines_show_no_change() {
    let (a, b) = (calm(Recipe::new(11)), calm(Recipe::new(12)));
    let found = compare(&a, &b, &Options::default());
    assert!(found.changes.len() > 60, "{}", found.changes.len());
    assert_eq!(
        (count(&found, Verdict::Worse), count(&found, Verdict::NotComparable)),
        (0, 0),
        "{:#?}",
        found.changes
    );
    assert_eq!(found.exit_code(), 0);
    let same = compare(&a, &a, &Options::default());
    assert_eq!(count(&same, Verdict::NoChangeShown), same.changes.len());
}

#[test]
fn an_engine_that_became_slower_is_found_and_others_are_not_blamed() {
    let before = calm(Recipe::new(11));
    let after = calm(Recipe { ferry_factor: 1.6, ..Recipe::new(12) });
    let found = compare(&before, &after, &Options::default());
    let worse: Vec<_> = found.changes.iter().filter(|change| change.verdict == Verdict::Worse).collect();
    assert!(worse.len() > 8, "{}", worse.len());
    // One in twenty of those that are called changed may be none.
    let blamed = worse.iter().filter(|change| !change.engine.starts_with("ferry")).count();
    assert!(blamed * 20 <= worse.len(), "{blamed} of {}: {worse:#?}", worse.len());
    // Idle guests take just so much longer; others take more rounds as well.
    let idle = |change: &&&ferry_bench::compare::Change| change.scenario.starts_with("random-idle");
    for change in worse.iter().filter(idle).filter(|change| change.metric == Metric::TotalMs) {
        let (low, high) = change.ci95.unwrap();
        assert!(low > 1.0 && low < 1.6 && high > 1.4, "{change:?}");
    }
    assert_eq!(found.exit_code(), 1);
    // The other way round it is as much better.
    let back = compare(&after, &before, &Options::default());
    assert!(count(&back, Verdict::Better).abs_diff(worse.len()) <= 1);
    assert_eq!(back.exit_code(), 0);
    // What is allowed is no change.
    let allowing = compare(&before, &after, &Options { allow_percent: 200.0, ..Options::default() });
    assert_eq!(count(&allowing, Verdict::Worse), 0);
}

#[test]
fn a_slower_machine_is_seen_by_metrics_and_not_by_ratios() {
    let before = calm(Recipe::new(11));
    let slow = calm(Recipe { machine_factor: 1.5, ..Recipe::new(12) });
    assert_eq!(compare(&before, &slow, &Options::default()).exit_code(), 1);
    let found = agree(&before, &slow, &METRICS);
    assert!(found.ratios.len() > 40, "{}", found.ratios.len());
    assert_eq!(found.exit_code(), 0, "{}", found.to_terminal());
    assert!(found.ratios.iter().all(|ratio| ratio.to == "qemu"));
}

#[test]
fn ratios_that_moved_are_apart() {
    let before = calm(Recipe::new(11));
    let after = calm(Recipe { ferry_factor: 2.0, ..Recipe::new(12) });
    let found = agree(&before, &after, &METRICS);
    assert_eq!(found.exit_code(), 1, "{}", found.to_terminal());
    let apart: Vec<_> = found.ratios.iter().filter(|ratio| !ratio.agrees).collect();
    let blamed = apart.iter().filter(|ratio| ratio.engine.starts_with("ferry")).count();
    assert!(blamed * 10 > apart.len() * 8, "{}", found.to_terminal());
}

/// The same engines measured twice, again and again: how often is anything called changed, how often do ratios agree?
#[test]
fn false_alarms_are_rare_and_equal_ratios_agree() {
    let (mut called, mut compared, mut agreed, mut ratios) = (0, 0, 0, 0);
    for seed in 0..12 {
        let (a, b) = (calm(Recipe::new(100 + 2 * seed)), calm(Recipe::new(101 + 2 * seed)));
        let found = compare(&a, &b, &Options::default());
        called += count(&found, Verdict::Worse) + count(&found, Verdict::Better);
        compared += found.changes.len();
        let found = agree(&a, &b, &METRICS);
        agreed += found.agreed;
        ratios += found.ratios.len();
    }
    assert!(compared > 800 && ratios > 500, "{compared} {ratios}");
    assert!(called * 200 <= compared, "{called} of {compared} are called changed");
    assert!(agreed * 100 >= ratios * 95, "{agreed} of {ratios} agree");
}

#[test]
fn what_is_not_the_same_scenario_is_not_compared() {
    let before = calm(Recipe::new(11));
    let mut after = calm(Recipe::new(12));
    after.scenarios[0].scenario.memory_mib += 1;
    after.scenarios[1].scenario.engines[0].streams = 7.into();
    after.scenarios[2].runs.retain(|run| run.repetition < 2);
    let gone = after.scenarios.pop().unwrap().scenario.name;
    let after = summarised(after);
    let found = compare(&before, &after, &Options::default());
    let why = |scenario: &str, engine: &str| {
        let of =
            |change: &&ferry_bench::compare::Change| change.scenario == scenario && change.engine == engine;
        let change = found.changes.iter().find(of).unwrap();
        assert_eq!(change.verdict, Verdict::NotComparable, "{change:?}");
        change.note.clone().unwrap()
    };
    let name = |index: usize| before.scenarios[index].scenario.name.as_str();
    let engine = before.scenarios[1].scenario.engines[0].engine.as_str();
    assert!(why(name(0), "qemu").contains("memory_mib"));
    assert!(why(name(1), engine).contains("settings"));
    assert!(why(name(2), "qemu").contains("3 runs each"));
    assert!(why(&gone, "ferry").contains("first file only"));
    assert_eq!(found.exit_code(), 2);
}

#[test]
fn failures_that_are_new_are_worse_and_machines_that_differ_are_said() {
    let before = calm(Recipe::new(11));
    let mut after = before.clone();
    after.scenarios[0].runs[0].outcome = Outcome::Failed { reason: "no".to_owned() };
    after.machine.kernel = "another".to_owned();
    let after = summarised(after);
    let found = compare(&before, &after, &Options::default());
    assert_eq!(found.failures.iter().map(|failures| failures.verdict).collect::<Vec<_>>(), [Verdict::Worse]);
    assert_eq!(found.exit_code(), 1);
    assert!(found.warnings.iter().any(|warning| warning.contains("kernel")), "{:?}", found.warnings);
    assert_eq!(compare(&after, &before, &Options::default()).exit_code(), 0);
}

fn written(folder: &Path, name: &str, results: &Results) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, serde_json::to_string(results).unwrap()).unwrap();
    path
}

fn bench(arguments: &[&str], files: &[&PathBuf]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_ferry-bench")).args(arguments).args(files).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_command_says_it_and_ends_with_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let before = written(folder.path(), "a.json", &calm(Recipe::new(11)));
    let again = written(folder.path(), "b.json", &calm(Recipe::new(12)));
    let worse = written(folder.path(), "c.json", &calm(Recipe { ferry_factor: 1.6, ..Recipe::new(12) }));
    let (code, text, _) = bench(&["compare"], &[&before, &again]);
    assert_eq!(code, Some(0), "{text}");
    let (code, text, _) = bench(&["compare", "--metric", "total_ms"], &[&before, &worse]);
    assert_eq!(code, Some(1), "{text}");
    println!("{text}");
    assert!(text.contains("WORSE") && text.contains("total_ms") && !text.contains("cpu_s"), "{text}");
    assert_eq!(bench(&["compare", "--allow", "300"], &[&before, &worse]).0, Some(0));
    let (code, text, _) = bench(&["compare", "--ratios"], &[&before, &again]);
    println!("{text}");
    assert_eq!(code, Some(0), "{text}");
    let (code, json, _) = bench(&["compare", "--json"], &[&before, &worse]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, json["changes"][0]["scenario"].is_string()), (Some(1), true));
    let missing = folder.path().join("missing.json");
    let (code, _, error) = bench(&["compare"], &[&before, &missing]);
    assert!(code == Some(2) && error.contains("missing.json"), "{error}");
    let (code, _, error) = bench(&["compare", "--metric", "speed"], &[&before, &again]);
    assert!(code == Some(2) && error.contains("total_ms"), "{error}");
}

#[test]
fn the_command_writes_reports() {
    let folder = tempfile::tempdir().unwrap();
    let results = written(folder.path(), "a.json", &Recipe::new(1).results());
    let (html, csv) = (folder.path().join("a.html"), folder.path().join("a.csv"));
    let (code, text, error) =
        bench(&["report", "--html", html.to_str().unwrap(), "--csv", csv.to_str().unwrap()], &[&results]);
    assert_eq!(code, Some(0), "{error}");
    assert!(text.contains("GUEST HARMED"), "{text}");
    assert!(std::fs::read_to_string(html).unwrap().ends_with("</html>"));
    assert!(std::fs::read_to_string(csv).unwrap().lines().count() > 200);
}
