//! Calibration on runs that the model made itself, with other parameters and noise: it must find these parameters again
//! and predict what it was not shown. Nothing here was measured.

use std::collections::BTreeMap;

use super::*;
use crate::results::{
    Check, EngineInfo, Idleness, MachineInfo, Measures, Part, ProcessCost, ProcessRole, Round,
    ScenarioResult, Timeline,
};
use crate::scenario::file;
use crate::simulate::run::MigrationRun;

const CORES: u32 = 2;

/// What the made-up machine costs: everything else than the defaults, and scattering.
fn truth() -> Hardware {
    Hardware {
        source_page_us: 0.7,
        target_page_us: 1.9,
        dirtied_page_us: 2.4,
        extent_us: 3.0,
        switch_page_us: 1.7,
        target_zero_page_us: 0.5,
        pack_page_us: 9.0,
        pack_ratio: 2.2,
        log_read_us: 120.0,
        pause_us: 400.0,
        save_us: 350.0,
        restore_us: 600.0,
        source_record_us: 1500.0,
        target_record_us: 2500.0,
        message_us: 160.0,
        overhead_us: 9000.0,
        logged_write_us: 3.0,
        jitter: 0.2,
        page_jitter: 0.06,
        ..Hardware::default()
    }
}

fn results(repetitions: u32, by: &Hardware) -> Results {
    let suite = file::load("calibration").unwrap();
    let scenarios = suite.scenarios.iter().enumerate().map(|(index, scenario)| {
        let runs = (0..repetitions).flat_map(|repetition| {
            scenario.engines.iter().map(move |setting| {
                let RealOrder { guest, settings, pair } = real::order(scenario, setting, CORES).unwrap();
                let seed = u64::try_from(index).unwrap() * 1000 + u64::from(repetition);
                let run = migrate_one(&guest, settings, pair, by, seed).unwrap();
                as_measured(&setting.engine, repetition, &run, by)
            })
        });
        ScenarioResult {
            scenario: scenario.clone(),
            runs: runs.collect(),
            engines: Vec::new(),
            ratios: Vec::new(),
        }
    });
    Results {
        schema: crate::results::SCHEMA,
        suite: suite.name.clone(),
        title: suite.title.clone(),
        summary: "made by the model".to_owned(),
        began_unix_s: 0,
        took_s: 0.0,
        command: Vec::new(),
        machine: MachineInfo { cores: CORES, ..MachineInfo::default() },
        engines: suite
            .engines
            .iter()
            .map(|engine| EngineInfo {
                name: engine.name.clone(),
                kind: engine.kind,
                version: None,
                binary: None,
                absent: None,
            })
            .collect(),
        scenarios: scenarios.collect(),
        limits: Vec::new(),
    }
}

/// The run as the harness would have written it down.
fn as_measured(engine: &str, repetition: u32, run: &MigrationRun, by: &Hardware) -> Run {
    let report = run.report.as_ref().expect("the suite's guests converge");
    let parts = &report.downtime_parts;
    let part = |name: &str, ms: f64| Part { name: name.to_owned(), ms };
    let process = |role, cpu_s| ProcessCost {
        role,
        cpu_s,
        cpu_engine_s: cpu_s,
        threads: Vec::new(),
        peak_memory_bytes: 0,
        guest_memory_bytes: None,
    };
    let more = [
        ("within_save_ms", parts.within_save_ms),
        ("within_restore_ms", parts.within_restore_ms),
        ("within_target_record_ms", parts.within_target_record_ms),
        ("within_run_ms", parts.within_run_ms),
    ];
    let rounds = run.rounds.iter().map(|round| Round {
        round: round.round,
        from_ms: Some(round.from_ms),
        ms: Some(round.ms),
        dirty_pages: Some(round.dirty_pages),
        sent_pages: Some(round.dirty_pages),
        wire_bytes: Some(round.wire_bytes),
        forecast_upper_ms: None,
    });
    let measures = Measures {
        total_ms: Some(report.total_ms + by.overhead_us / 1e3),
        downtime_guest_ms: run.standstill.map(|still| still.as_secs_f64() * 1e3 + 0.5),
        downtime_engine_ms: Some(report.downtime_ms),
        downtime_parts: vec![
            part("pause", parts.pause_ms),
            part("dirty log", parts.dirty_log_ms),
            part("copy", parts.copy_ms),
            part("prepare", parts.prepare_ms),
            part("record", parts.record_ms),
            part("commit", parts.commit_ms),
        ],
        processes: vec![
            process(ProcessRole::Source, run.source_cpu_s),
            process(ProcessRole::Target, run.target_cpu_s),
        ],
        rounds: rounds.collect(),
        check: Check::default(),
        idleness: Idleness { quiet: true, ..Idleness::default() },
        more: BTreeMap::from(more.map(|(name, ms)| (name.to_owned(), ms))),
        ..Measures::default()
    };
    Run {
        engine: engine.to_owned(),
        repetition,
        at_s: 0.0,
        outcome: Outcome::Moved,
        measures,
        timeline: Timeline::default(),
        flags: Vec::new(),
    }
}

#[test]
fn the_parameters_that_made_the_runs_are_found_again() {
    let results = [("made".to_owned(), results(8, &truth()))];
    let calibrated = calibrate(&results, HoldOut::Repetitions, false, Hardware::default()).unwrap();
    let found = calibrated.file.hardware;
    let truth = truth();
    let close = |name: &str, found: f64, truth: f64, allowed: f64| {
        assert!((found / truth).ln().abs() < allowed, "{name}: {found}, not {truth}");
    };
    close("source_page_us", found.source_page_us, truth.source_page_us, 0.1);
    close("target_page_us", found.target_page_us + found.first_touch_page_us, 2.15, 0.1);
    close("dirtied_page_us", found.dirtied_page_us, truth.dirtied_page_us, 0.25);
    close("extent_us", found.extent_us, truth.extent_us, 0.3);
    close("pack_page_us", found.pack_page_us, truth.pack_page_us, 0.1);
    close("pack_ratio", found.pack_ratio, truth.pack_ratio, 0.01);
    close("source_record_us", found.source_record_us, truth.source_record_us, 0.15);
    close("target_record_us", found.target_record_us, truth.target_record_us, 0.15);
    close("message_us", found.message_us, truth.message_us, 0.4);
    close("overhead_us", found.overhead_us, truth.overhead_us, 0.2);
    let of_one = |h: &Hardware| [h.pause_us + h.pause_us_per_vcpu, h.save_us + h.save_us_per_vcpu];
    for (found, truth) in of_one(&found).into_iter().zip(of_one(&truth)) {
        close("pausing or saving one vCPU", found, truth, 0.15);
    }
    close("jitter", found.jitter, truth.jitter, 0.3);
    close("page_jitter", found.page_jitter, truth.page_jitter, 0.6);

    let Errors { total, downtime, downtime_guest } = calibrated.errors;
    assert!(total.median < 0.06 && total.bias.abs() < 0.03, "{total:?}");
    assert!(downtime.median < 0.12 && downtime.bias.abs() < 0.06, "{downtime:?}");
    assert!(downtime_guest.median < 0.15, "{downtime_guest:?}");
    let calibration = calibrated.file.calibration.unwrap();
    assert_eq!((calibration.runs_fitted, calibration.runs_predicted), (92, 92));
}

#[test]
fn predictions_with_wrong_parameters_are_said_to_be_wrong() {
    // The same runs, each of them twice as long: fitted and predicted parts differ.
    let mut results = results(4, &truth());
    for scenario in &mut results.scenarios {
        for run in scenario.runs.iter_mut().filter(|run| run.repetition % 2 == 1) {
            run.measures.total_ms = run.measures.total_ms.map(|ms| ms * 2.0);
        }
    }
    let files = [("made".to_owned(), results)];
    let errors = calibrate(&files, HoldOut::Repetitions, false, Hardware::default()).unwrap().errors;
    assert!((errors.total.bias + 0.5).abs() < 0.04, "{errors:?}");
    assert!(errors.total.median > 0.4 && errors.total.max < 0.7, "{errors:?}");
    assert!(errors.downtime.median < 0.15, "{errors:?}");
}

#[test]
fn a_scenario_can_be_predicted_from_the_others() {
    let files = [("made".to_owned(), results(3, &truth()))];
    let calibrated = calibrate(&files, HoldOut::Scenarios, false, Hardware::default()).unwrap();
    assert_eq!(calibrated.groups.iter().map(|group| group.measured.len()).sum::<usize>(), 69);
    assert!(calibrated.errors.total.median < 0.1, "{:?}", calibrated.errors);
}

#[test]
fn what_can_not_be_used_is_said() {
    let mut results = results(4, &truth());
    for run in &mut results.scenarios[0].runs {
        run.measures.idleness.quiet = false;
    }
    let files = [("made".to_owned(), results.clone())];
    let calibrated = calibrate(&files, HoldOut::Repetitions, false, Hardware::default()).unwrap();
    let first = results.scenarios[0].scenario.name.clone();
    assert!(calibrated.left_out.iter().any(|line| line.contains(&first)), "{:?}", calibrated.left_out);
    assert!(calibrated.groups.iter().all(|group| group.scenario != first));
    results.scenarios.truncate(1);
    let files = [("made".to_owned(), results)];
    let error = calibrate(&files, HoldOut::Repetitions, false, Hardware::default()).unwrap_err();
    assert!(error.to_string().contains("too few") && error.to_string().contains(&first), "{error}");
}
