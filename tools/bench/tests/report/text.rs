//! The summary for the terminal, and CSV.

use ferry_bench::report::csv::COLUMNS;
use ferry_bench::report::{csv, number, terminal};
use ferry_bench::results::{Metric, Outcome};

use crate::sample::{ODD, Recipe};

#[test]
fn csv_has_a_row_a_run_with_the_values_of_the_json() {
    let results = Recipe::new(1).results();
    let mut written = Vec::new();
    csv::write(&results, &mut written).unwrap();
    let mut reader = ::csv::Reader::from_reader(&written[..]);
    let names: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    assert_eq!(names, COLUMNS.iter().map(|column| column.name).collect::<Vec<_>>());
    let records: Vec<::csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let runs: Vec<_> = results
        .scenarios
        .iter()
        .flat_map(|result| result.runs.iter().map(move |run| (result, run)))
        .collect();
    assert_eq!(records.len(), runs.len());
    for (record, (scenario, run)) in records.iter().zip(runs) {
        let cell = |name: &str| record.get(names.iter().position(|it| it == name).unwrap()).unwrap();
        assert_eq!(cell("scenario"), scenario.scenario.name);
        assert_eq!(cell("engine"), run.engine);
        assert_eq!(cell("repetition"), run.repetition.to_string());
        assert_eq!(cell("outcome") == "moved", run.outcome == Outcome::Moved);
        for metric in
            [Metric::TotalMs, Metric::DowntimeGuestMs, Metric::CpuS, Metric::WireBytes, Metric::SlowDown]
        {
            assert_eq!(cell(metric.name()).parse().ok(), metric.of(&run.measures), "{}", metric.name());
        }
    }
    assert!(records.iter().any(|record| record.iter().any(|cell| cell == ODD)));
}

#[test]
fn the_summary_fits_and_says_what_failed() {
    let mut results = Recipe::new(1).results();
    for columns in [80, 120] {
        let text = terminal::summary(&results, columns);
        println!("{text}");
        let tables = text.lines().filter(|line| !line.contains('[') && !line.contains(": "));
        let longest = tables.map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= columns, "{longest} in {columns}");
        for said in [
            "4 of 5 moved",
            "GUEST HARMED",
            "Connection refused",
            "not supported",
            "did not converge",
            "was absent",
            "5 runs the machine",
            "Limits: ",
            "A downtime that nobody reaches",
            "MISSED for sure",
            "not measured",
        ] {
            assert!(text.contains(said), "{said} is missing:\n{text}");
        }
        let first = &results.scenarios[0];
        let total = first.engines[0].metrics.iter().find(|(metric, _)| *metric == Metric::TotalMs).unwrap();
        assert!(text.contains(&number::value_of(Metric::TotalMs, total.1.p50)));
        assert!(text.contains("▼0."));
    }
    results.title = "steer\u{1b}[31m".to_owned();
    assert!(!terminal::summary(&results, 80).contains('\u{1b}'));
}
