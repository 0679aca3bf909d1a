//! The smoke suite, as a user runs it: real guests, real networks, every engine that is installed. Nothing here looks
//! at how long anything took.

use std::path::Path;
use std::process::Command;

use ferry_bench::results::{Metric, Outcome, ProcessRole, Results, Run, ScenarioResult, Verdict};
use ferry_tests::tier;

fn suite(folder: &Path, arguments: &[&str]) -> Results {
    let out = folder.join("smoke");
    let said = Command::new(env!("CARGO_BIN_EXE_ferry-bench"))
        .args(["suite", "smoke", "--out"])
        .arg(&out)
        .args(arguments)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{words}");
    let text = std::fs::read_to_string(out.with_extension("json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Everything that must have been measured from outside, whatever the engine says.
fn check_moved(scenario: &str, run: &Run) {
    let (name, measures) = (format!("{scenario}, {}", run.engine), &run.measures);
    assert_eq!(run.outcome, Outcome::Moved, "{name}");
    assert!(measures.check.alive, "{name}: the guest was not seen at the target");
    assert_eq!(measures.check.errors, Some(0), "{name}");
    let gap = measures.downtime_guest_ms.unwrap();
    let total = measures.total_ms.unwrap();
    assert!(gap > 0.0 && total > 0.0, "{name}: {gap} of {total}");
    let (from, to) = run.timeline.standstill.unwrap();
    assert!(to - from > 0.0, "{name}");
    // 64 MiB of memory were filled, of which a quarter may be zeroes.
    assert!(measures.wire_bytes.unwrap() > 20 << 20, "{name}: {:?} bytes", measures.wire_bytes);
    let roles: Vec<_> = measures.processes.iter().map(|process| process.role).collect();
    assert_eq!(roles, [ProcessRole::Source, ProcessRole::Target], "{name}");
    for process in &measures.processes {
        assert!(process.cpu_s > 0.0 && process.cpu_engine_s <= process.cpu_s, "{name}: {process:?}");
        assert!(process.peak_memory_bytes > 64 << 20, "{name}: {process:?}");
        // 64 MiB were filled, a quarter of which the target may leave out.
        let guest = process.guest_memory_bytes.unwrap();
        assert!((45 << 20..=128 << 20).contains(&guest), "{name}: {process:?}");
        assert!(process.threads.iter().any(|thread| thread.vcpu), "{name}: {process:?}");
    }
    for metric in [Metric::MemoryOverheadSourceBytes, Metric::MemoryOverheadTargetBytes] {
        let overhead = metric.of(measures).unwrap();
        assert!(overhead > 1e6, "{name}: {metric:?} {overhead}");
    }
    assert!(run.timeline.link_bytes_per_s.iter().any(|(_, rate)| *rate > 0.0), "{name}");
}

/// A baseline without a guest carries as many bytes as the guest's pages have, and costs something.
fn check_carried(result: &ScenarioResult, run: &Run) {
    let (name, measures) = (format!("{}, {}", result.scenario.name, run.engine), &run.measures);
    assert_eq!(run.outcome, Outcome::Moved, "{name}");
    assert_eq!(measures.wire_bytes_engine, Some(64 << 20), "{name}");
    assert!(measures.wire_bytes.unwrap() > 64 << 20, "{name}: {:?} bytes", measures.wire_bytes);
    assert!(measures.total_ms.unwrap() > 0.0, "{name}");
    assert!(measures.processes.iter().all(|process| process.cpu_s > 0.0), "{name}: {measures:?}");
    assert_eq!((measures.downtime_guest_ms, measures.check.alive), (None, false), "{name}");
}

/// What only some scenarios have.
fn check_job(scenario: &str, run: &Run) {
    let measures = &run.measures;
    match scenario {
        "dirty" => {
            assert!(measures.guest_pages_per_s_before.unwrap() > 0.0, "{scenario}");
            assert!(measures.guest_pages_per_s_after.unwrap() > 0.0, "{scenario}");
        }
        "web" => {
            let client = measures.client.as_ref().unwrap();
            assert!(client.http_ok.unwrap() > 0 && client.udp_sent.unwrap() > 0, "{client:?}");
            assert_eq!(client.tcp_broken, Some(false), "{client:?}");
            assert!(!run.timeline.client_bytes_per_s.is_empty());
        }
        _ => {}
    }
}

/// Each of the limits has been judged by figures, whatever they are.
fn check_limits(results: &Results) {
    assert_eq!(results.limits.len(), 5);
    for result in &results.limits {
        let value = result.value.unwrap_or_else(|| panic!("{result:?}"));
        assert!(value > 0.0 && result.count == 1 && result.engine.is_some(), "{result:?}");
        assert_ne!(result.verdict, Verdict::NotMeasured, "{result:?}");
    }
}

#[test]
fn every_scenario_of_the_smoke_suite_is_measured_from_all_sides() {
    if !tier::has_kvm("bench") || !tier::is_root("bench") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let results = suite(folder.path(), &[]);
    assert_eq!(results.scenarios.len(), 4);
    for info in &results.engines {
        tier::runs(&format!("bench, {}", info.name), info.absent.clone().map_or(Ok(()), Err));
    }
    check_limits(&results);
    for result in &results.scenarios {
        let name = result.scenario.name.as_str();
        let engines: Vec<_> = result.runs.iter().map(|run| run.engine.as_str()).collect();
        assert!(engines.contains(&"ferry"), "{name}: {engines:?}");
        for run in &result.runs {
            if run.engine.starts_with("tcp") {
                check_carried(result, run);
            } else {
                check_moved(name, run);
                check_job(name, run);
            }
        }
        if name == "limits" {
            for engine in ["ferry-2", "tcp", "tcp-2"] {
                assert!(engines.contains(&engine), "{name}: {engines:?}");
            }
        }
        for run in result.runs.iter().filter(|run| run.engine.starts_with("ferry")) {
            assert_eq!(run.measures.check.digest_equal, Some(true), "{name}");
            let parts: f64 = run.measures.downtime_parts.iter().map(|part| part.ms).sum();
            assert!((parts - run.measures.downtime_engine_ms.unwrap()).abs() < 0.01, "{name}");
        }
    }
}

#[test]
fn nonsense_is_refused_in_words() {
    let cases: [(&[&str], &str); 3] = [
        (&["suite", "/nowhere.toml"], "standard"),
        (&["suite", "smoke", "--only", "nothing-like-it"], "no scenario"),
        (&["bench-worker", "dance"], "dance"),
    ];
    for (arguments, word) in cases {
        let said = Command::new(env!("CARGO_BIN_EXE_ferry-bench")).args(arguments).output().unwrap();
        let words = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && words.contains(word), "{arguments:?}: {words}");
    }
}
