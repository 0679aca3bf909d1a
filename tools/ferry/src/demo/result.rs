//! What the demo found, for people, for scripts and as a plot.

use ferry_lab::{Band, MigrationPlot};
use ferry_migrate::report::MigrationReport;
use serde::Serialize;

use super::Seen;
use crate::quantity::{show_bytes, show_ms};

/// What went into a result.
pub(super) struct Demo {
    pub(super) title: &'static str,
    pub(super) y_label: &'static str,
    pub(super) seen: Seen,
    pub(super) http: Option<HttpFigures>,
    pub(super) guest_gap_ms: f64,
    pub(super) self_check_errors: u64,
    pub(super) samples: Vec<(f64, f64)>,
}

/// What the client saw.
#[derive(Debug, Serialize)]
pub(super) struct HttpFigures {
    /// Requests answered rightly.
    pub(super) http_ok: u64,
    /// All others.
    pub(super) http_failed: u64,
    /// The first few failures.
    pub(super) http_failures: Vec<String>,
    /// The longest time in which the client received nothing, in ms.
    pub(super) client_gap_ms: f64,
    /// TCP connections that the load made; as many as it keeps open if none broke.
    pub(super) client_connections_opened: u64,
    /// Whether the switch knows the VM behind host B's port.
    pub(super) switch_learned: bool,
}

/// The JSON of `ferry demo --json`: the migration's report and what was seen from outside.
#[derive(Debug, Serialize)]
pub(super) struct DemoResult {
    /// Whether there was a network with a client; if not, the `http_` figures are absent.
    network: bool,
    #[serde(flatten)]
    http: Option<HttpFigures>,
    /// The longest gap between two heartbeats of the guest, in ms.
    guest_gap_ms: f64,
    /// Pages that the guest found changed or lost.
    self_check_errors: u64,
    #[serde(flatten)]
    migration: MigrationReport,
    #[serde(skip)]
    pub(super) plot: MigrationPlot,
}

impl DemoResult {
    pub(super) fn new(demo: Demo) -> Self {
        let Demo { title, y_label, seen, http, guest_gap_ms, self_check_errors, samples } = demo;
        let mut result = Self {
            network: http.is_some(),
            http,
            guest_gap_ms,
            self_check_errors,
            migration: seen.report.clone(),
            plot: MigrationPlot::default(),
        };
        result.plot = MigrationPlot {
            title: title.to_owned(),
            samples,
            bands: bands(&seen),
            // As long as the report says, ending when the source had the target's word.
            downtime: Some((seen.handed_ms - seen.report.downtime_ms, seen.handed_ms)),
            facts: [vec![("Shown".to_owned(), y_label.to_owned())], result.facts()].concat(),
        };
        result
    }

    /// The main figures, as name and value.
    fn facts(&self) -> Vec<(String, String)> {
        let migration = &self.migration;
        let mut facts = vec![
            (
                "Downtime".to_owned(),
                format!(
                    "{} of {} allowed",
                    show_ms(migration.downtime_ms),
                    show_ms(migration.downtime_budget_ms)
                ),
            ),
            (
                "Seen by the guest".to_owned(),
                format!("{} between two heartbeats", show_ms(self.guest_gap_ms)),
            ),
        ];
        if let Some(http) = &self.http {
            let gap = format!("{} without any data", show_ms(http.client_gap_ms));
            facts.push(("Seen by the client".to_owned(), gap));
            let connections = http.client_connections_opened;
            let requests =
                format!("{} right, {} failed, {connections} connections", http.http_ok, http.http_failed);
            facts.push(("Requests".to_owned(), requests));
            let learned = if http.switch_learned { "behind host B" } else { "still behind host A" };
            facts.push(("The switch has it".to_owned(), learned.to_owned()));
        }
        let equal = if migration.digest_equal == Some(true) { "equal" } else { "DIFFERENT" };
        let rounds = migration.rounds.len();
        facts.extend([
            ("Total".to_owned(), format!("{} in {rounds} rounds", show_ms(migration.total_ms))),
            ("Sent".to_owned(), show_bytes(migration.wire_bytes)),
            ("Self-check".to_owned(), format!("{} errors in the guest", self.self_check_errors)),
            ("Digest".to_owned(), format!("{} ({equal})", migration.digest.as_deref().unwrap_or("none"))),
        ]);
        facts
    }

    pub(super) fn print(&self, columns: usize) {
        println!("\n{}", self.plot.to_terminal(columns));
        if self.migration.downtime_ms > self.migration.downtime_budget_ms {
            println!("\nthe downtime was longer than allowed; is the machine busy?");
        }
    }

    /// Whether nothing was lost and the downtime was as asked.
    pub(super) fn kept_its_promises(&self) -> bool {
        self.http.as_ref().is_none_or(|http| http.http_failed == 0)
            && self.migration.digest_equal == Some(true)
            && self.self_check_errors == 0
            && self.migration.downtime_ms <= self.migration.downtime_budget_ms
    }
}

fn bands(seen: &Seen) -> Vec<Band> {
    let mut from_ms = seen.began_ms;
    (1..)
        .zip(&seen.rounds_ended_ms)
        .map(|(round, &to_ms)| {
            let band = Band { from_ms, to_ms, label: format!("round {round}") };
            from_ms = to_ms;
            band
        })
        .collect()
}
