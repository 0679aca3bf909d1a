//! `simulate one`: a single migration with its rounds.

use maud::html;
use serde::Serialize;

use super::hardware::HardwareFile;
use super::output::chart::{Chart, Series};
use super::output::note;
use super::output::page::{Page, captioned, table};
use super::output::table::{Table, named};
use super::run::{Ending, MigrationRun, RoundLine};
use crate::report::number::{digits, short_ms, whole};

const MIB: f64 = 1_048_576.0;

/// One simulated migration, as it is shown.
#[derive(Debug, Serialize)]
pub struct One {
    /// That it is a model, and how good it is.
    pub note: String,
    /// What was simulated.
    pub facts: Vec<(String, String)>,
    /// The parameters, and what they were checked against.
    pub parameters: HardwareFile,
    /// How it ended.
    pub ending: Ending,
    /// From the order to the end, in ms.
    pub took_ms: f64,
    /// How long the guest stood still, in ms.
    pub standstill_ms: Option<f64>,
    /// What was allowed, in ms.
    pub budget_ms: f64,
    /// Bytes on the wire.
    pub wire_bytes: f64,
    /// CPU time for pages at source and target, in s.
    pub cpu_s: (f64, f64),
    /// Every round.
    pub rounds: Vec<RoundLine>,
    /// What ferry itself would report, if the guest moved.
    pub report: Option<ferry_migrate::report::MigrationReport>,
}

impl One {
    /// `run` of what `facts` describe.
    #[must_use]
    pub fn new(
        run: MigrationRun,
        budget_ms: f64,
        facts: Vec<(String, String)>,
        parameters: HardwareFile,
    ) -> Self {
        Self {
            note: note(&parameters),
            facts,
            parameters,
            ending: run.ending,
            took_ms: run.took.as_secs_f64() * 1e3,
            standstill_ms: run.standstill.map(|still| still.as_secs_f64() * 1e3),
            budget_ms,
            wire_bytes: run.wire_bytes,
            cpu_s: (run.source_cpu_s, run.target_cpu_s),
            rounds: run.rounds,
            report: run.report,
        }
    }

    /// For a terminal.
    #[must_use]
    pub fn terminal(&self) -> String {
        let mut rounds = Table::new(&ROUND_HEADINGS);
        self.round_rows().into_iter().for_each(|row| rounds.row(row));
        let facts: Vec<(String, String)> = self.facts.iter().cloned().chain(self.outcome()).collect();
        format!("{}\n{}\n{}\n", rounds.to_text(), named(&facts), self.note)
    }

    fn outcome(&self) -> Vec<(String, String)> {
        let fact = |name: &str, value: String| (name.to_owned(), value);
        let ending = match &self.ending {
            Ending::Moved => "the guest runs at the target".to_owned(),
            Ending::Stayed { reason, .. } => format!("the guest goes on at the source: {reason}"),
        };
        let mut facts = vec![
            fact("ending", ending),
            fact("total", format!("{} s", digits(self.took_ms / 1e3))),
            fact("on the wire", format!("{} MiB", digits(self.wire_bytes / MIB))),
            fact("CPU time for pages", format!("{} s + {} s", digits(self.cpu_s.0), digits(self.cpu_s.1))),
        ];
        if let Some(report) = &self.report {
            let parts = &report.downtime_parts;
            let parts = [
                ("pause", parts.pause_ms),
                ("dirty log", parts.dirty_log_ms),
                ("copy", parts.copy_ms),
                ("prepare", parts.prepare_ms),
                ("record", parts.record_ms),
                ("commit", parts.commit_ms),
            ];
            let parts = parts.map(|(name, ms)| format!("{name} {}", short_ms(ms))).join(", ");
            facts.push(fact(
                "downtime",
                format!("{} ms of {} allowed ({parts})", digits(report.downtime_ms), digits(self.budget_ms)),
            ));
            let forecast = &report.forecast;
            facts.push(fact(
                "forecast when it was stopped",
                format!("{} ms, at most {}", digits(forecast.expected_ms), digits(forecast.upper_ms)),
            ));
        }
        if let Some(standstill_ms) = self.standstill_ms {
            facts.push(fact("as the guest sees it", format!("{} ms", digits(standstill_ms))));
        }
        facts
    }

    fn round_rows(&self) -> Vec<Vec<String>> {
        let optional = |value: Option<f64>| value.map_or("–".to_owned(), digits);
        let row = |round: &RoundLine| {
            vec![
                round.round.to_string(),
                digits(round.from_ms / 1e3),
                digits(round.ms),
                whole(round.dirty_pages as f64),
                whole(round.zero_pages as f64),
                digits(round.wire_bytes as f64 / MIB),
                digits(round.wire_bytes as f64 / MIB / (round.ms / 1e3)),
                optional(round.dirtied_pages_per_s.map(|pages| pages / 256.0)),
                optional(round.forecast_upper_ms),
            ]
        };
        self.rounds.iter().map(row).collect()
    }

    /// As a page.
    #[must_use]
    pub fn html(&self) -> String {
        let over_time = |of: &dyn Fn(&RoundLine) -> Option<f64>| {
            self.rounds.iter().filter_map(|round| Some((round.from_ms / 1e3, Some(of(round)?)))).collect()
        };
        let dirty = Chart {
            describe: "Pages to send at the beginning of each round".to_owned(),
            x: "time since the order, s".to_owned(),
            y: "to send, MiB".to_owned(),
            series: vec![Series {
                name: "dirty when the round began".to_owned(),
                points: over_time(&|round| Some(round.dirty_pages as f64 / 256.0)),
                joined: true,
            }],
            line: None,
            diagonal: false,
        };
        let forecast = Chart {
            describe: "The forecast downtime after each round, beside the budget".to_owned(),
            y: "downtime if it stopped then, at most, ms".to_owned(),
            series: vec![Series {
                name: "forecast".to_owned(),
                points: over_time(&|round| round.forecast_upper_ms),
                joined: true,
            }],
            line: Some((self.budget_ms, "budget".to_owned())),
            ..dirty.clone()
        };
        let sections = html! {
            h2 { "Rounds" }
            div class="grid" {
                (captioned("What was left", "Memory to send when each round began.", &dirty.draw()))
                (captioned("The core's forecast", "It stops the guest once this is below the budget.", &forecast.draw()))
            }
            (table(&ROUND_HEADINGS, &self.round_rows()))
        };
        let page = Page {
            title: "A simulated migration".to_owned(),
            lead: match &self.ending {
                Ending::Moved => format!(
                    "{} s in all, {} ms of downtime.",
                    digits(self.took_ms / 1e3),
                    digits(self.standstill_ms.unwrap_or_default())
                ),
                Ending::Stayed { reason, .. } => format!("The guest stays: {reason}."),
            },
            note: self.note.clone(),
            facts: self.facts.iter().cloned().chain(self.outcome()).collect(),
            sections,
        };
        page.to_html(self)
    }
}

const ROUND_HEADINGS: [&str; 9] = [
    "round",
    "from s",
    "took ms",
    "pages",
    "zero",
    "sent MiB",
    "link MiB/s",
    "dirtied MiB/s",
    "forecast at most ms",
];
