//! All runs as CSV: one row a run, one column a measure, for spreadsheets and statistics programs.
//!
//! Empty cells are what was not measured or does not apply. Numbers are as in the JSON, in the same units. The columns
//! are [`COLUMNS`]; `docs/bench-results.md` lists them, which a test checks. Not here: timelines, rounds, threads and
//! parts of the downtime, which have no place in one row; the JSON has them.

use std::io::Write;

use crate::results::{Measures, Metric, Outcome, ProcessCost, ProcessRole, Results, Run, ScenarioResult};
use crate::scenario::{Compression, Guest, Link, Strategy};

/// What a cell is made from.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    results: &'a Results,
    scenario: &'a ScenarioResult,
    run: &'a Run,
}

/// A column: its name, what is in it, and how it is filled.
#[derive(Clone, Copy)]
pub struct Column {
    /// Its name, in the header.
    pub name: &'static str,
    /// What is in it, with its unit.
    pub what: &'static str,
    cell: fn(Row<'_>) -> Option<String>,
}

impl std::fmt::Debug for Column {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Column").field("name", &self.name).finish_non_exhaustive()
    }
}

const fn column(name: &'static str, what: &'static str, cell: fn(Row<'_>) -> Option<String>) -> Column {
    Column { name, what, cell }
}

/// Writes all runs of `results`, with a header.
///
/// # Errors
/// If `to` takes no more.
pub fn write(results: &Results, to: impl Write) -> Result<(), csv::Error> {
    let mut writer = csv::Writer::from_writer(to);
    writer.write_record(COLUMNS.iter().map(|column| column.name))?;
    for scenario in &results.scenarios {
        for run in &scenario.runs {
            let row = Row { results, scenario, run };
            writer.write_record(COLUMNS.iter().map(|column| (column.cell)(row).unwrap_or_default()))?;
        }
    }
    writer.flush()?;
    Ok(())
}

/// The columns, in order.
pub const COLUMNS: &[Column] = &[
    column("suite", "The suite's name.", |row| Some(row.results.suite.clone())),
    column("began_unix_s", "When the suite began, s since 1970, UTC.", |row| text(row.results.began_unix_s)),
    column("scenario", "The scenario's name.", |row| Some(row.scenario.scenario.name.clone())),
    column("title", "The scenario's heading.", |row| Some(row.scenario.scenario.title.clone())),
    column("guest", "The workload guest's words, or a Linux kernel's path.", guest),
    column("memory_mib", "The VM's memory, MiB.", |row| text(row.scenario.scenario.memory_mib)),
    column("cpus", "Its vCPUs.", |row| text(row.scenario.scenario.cpus)),
    column("link", "`loopback`, `veth` or `tbf`.", link),
    column("link_mbit_s", "The link's rate if it is limited, Mbit/s.", link_rate),
    column("budget_ms", "The downtime that is allowed, ms.", |row| text(row.scenario.scenario.downtime_ms)),
    column("sweep", "The sweep that the scenario is a point of.", |row| {
        Some(row.scenario.scenario.sweep.as_ref()?.name.clone())
    }),
    column("sweep_value", "Where on its axis.", |row| text(row.scenario.scenario.sweep.as_ref()?.value)),
    column("engine", "The engine's name.", |row| Some(row.run.engine.clone())),
    column("strategy", "`pre-copy`, `auto-converge` or `post-copy`.", strategy),
    column("streams", "Connections that carry pages, or `auto`.", |row| text(setting(row)?.streams)),
    column("compression", "`none`, `auto`, `lz4`, `zstd` or `xbzrle`.", compression),
    column("verify", "Whether the engine was to check all of memory.", |row| text(setting(row)?.verify)),
    column("memory", "What holds guest memory: `private`, `shared` or `hugepages`.", |row| {
        Some(setting(row)?.memory.name().to_owned())
    }),
    column("local", "Whether memory was to be handed over within one host.", |row| text(setting(row)?.local)),
    column("repetition", "From 0.", |row| text(row.run.repetition)),
    column("at_s", "When the run began, s since the suite did.", |row| text(row.run.at_s)),
    column("outcome", "`moved`, `not-converged`, `unsupported` or `failed`.", |row| {
        Some(outcome(row).to_owned())
    }),
    column("reason", "Why not, if not `moved`.", reason),
    column("total_ms", "Start to end, ms.", |row| metric(row, Metric::TotalMs)),
    column("downtime_guest_ms", "Downtime by the guest's heartbeat, ms.", |row| {
        metric(row, Metric::DowntimeGuestMs)
    }),
    column("downtime_engine_ms", "Downtime by the engine's word, ms.", |row| {
        metric(row, Metric::DowntimeEngineMs)
    }),
    column("downtime_untold_ms", "The guest's less the engine's, ms.", |row| {
        metric(row, Metric::DowntimeUntoldMs)
    }),
    column("downtime_forecast_ms", "What the engine had forecast, ms.", |row| {
        text(measures(row).downtime_forecast_ms?)
    }),
    column("udp_gap_ms", "The longest time without an echo, ms.", |row| metric(row, Metric::UdpGapMs)),
    column("udp_send_gap_ms", "So much of it may be the probe's own, ms.", |row| {
        text(measures(row).client.as_ref()?.udp_send_gap_ms?)
    }),
    column("udp_sent", "Datagrams sent.", |row| text(measures(row).client.as_ref()?.udp_sent?)),
    column("udp_lost", "Datagrams that did not come back.", |row| {
        text(measures(row).client.as_ref()?.udp_lost?)
    }),
    column("tcp_stall_ms", "The longest silence of a TCP connection, ms.", |row| {
        metric(row, Metric::TcpStallMs)
    }),
    column("tcp_broken", "Whether that connection broke.", |row| {
        text(measures(row).client.as_ref()?.tcp_broken?)
    }),
    column("http_gap_ms", "The longest time without any answer, ms.", |row| metric(row, Metric::HttpGapMs)),
    column("http_ok", "Requests answered rightly.", |row| text(measures(row).client.as_ref()?.http_ok?)),
    column("http_failed", "All others.", |row| text(measures(row).client.as_ref()?.http_failed?)),
    column("wire_bytes", "Bytes between the hosts, from interface counters.", |row| {
        text(measures(row).wire_bytes?)
    }),
    column("wire_bytes_engine", "Bytes by the engine's word.", |row| text(measures(row).wire_bytes_engine?)),
    column("round_count", "Rounds over memory.", |row| text(measures(row).round_count?)),
    column("cpu_s", "CPU time of both VMMs without vCPUs, s.", |row| metric(row, Metric::CpuS)),
    column("cpu_source_s", "The source's share of it, s.", |row| {
        text(side(row, ProcessRole::Source)?.cpu_engine_s)
    }),
    column("cpu_target_s", "The target's, s.", |row| text(side(row, ProcessRole::Target)?.cpu_engine_s)),
    column("cpu_source_all_s", "All CPU time of the source, vCPUs included, s.", |row| {
        text(side(row, ProcessRole::Source)?.cpu_s)
    }),
    column("cpu_target_all_s", "The same of the target, s.", |row| {
        text(side(row, ProcessRole::Target)?.cpu_s)
    }),
    column("peak_memory_source_bytes", "The source's peak memory, bytes.", |row| {
        text(side(row, ProcessRole::Source)?.peak_memory_bytes)
    }),
    column("peak_memory_target_bytes", "The target's, bytes.", |row| {
        text(side(row, ProcessRole::Target)?.peak_memory_bytes)
    }),
    column("memory_overhead_source_bytes", "The source's less the guest's, bytes.", |row| {
        metric(row, Metric::MemoryOverheadSourceBytes)
    }),
    column("memory_overhead_target_bytes", "The target's less the guest's, bytes.", |row| {
        metric(row, Metric::MemoryOverheadTargetBytes)
    }),
    column("guest_pages_per_s_before", "Pages that the guest wrote a second before the order.", |row| {
        text(measures(row).guest_pages_per_s_before?)
    }),
    column("guest_pages_per_s_during", "The same while it was migrated.", |row| {
        text(measures(row).guest_pages_per_s_during?)
    }),
    column("guest_pages_per_s_after", "The same at the target.", |row| {
        text(measures(row).guest_pages_per_s_after?)
    }),
    column("slow_down", "1 less the rate during over that before.", |row| metric(row, Metric::SlowDown)),
    column("alive", "Whether the guest reported from the target.", |row| text(measures(row).check.alive)),
    column("errors", "Pages that the guest found changed or lost.", |row| text(measures(row).check.errors?)),
    column("pages_checked", "Pages that it has checked after it had moved.", |row| {
        text(measures(row).check.pages_checked?)
    }),
    column("digest_equal", "Whether the engine found the digests of memory equal.", |row| {
        text(measures(row).check.digest_equal?)
    }),
    column("quiet", "Whether the machine was idle enough.", |row| text(measures(row).idleness.quiet)),
    column("others_before", "The share of CPU time of others before the order, 0 to 1.", |row| {
        text(measures(row).idleness.others_before)
    }),
    column("others_during", "The same during the migration.", |row| {
        text(measures(row).idleness.others_during)
    }),
    column("steal_during", "The share that the hypervisor below took, 0 to 1.", |row| {
        text(measures(row).idleness.steal_during)
    }),
];

fn measures(row: Row<'_>) -> &Measures {
    &row.run.measures
}

#[expect(clippy::unnecessary_wraps, reason = "a cell is optional")]
fn text(value: impl ToString) -> Option<String> {
    Some(value.to_string())
}

fn metric(row: Row<'_>, metric: Metric) -> Option<String> {
    text(metric.of(measures(row))?)
}

fn side(row: Row<'_>, role: ProcessRole) -> Option<&ProcessCost> {
    measures(row).processes.iter().find(|process| process.role == role)
}

fn setting(row: Row<'_>) -> Option<&crate::scenario::EngineSetting> {
    row.scenario.scenario.engines.iter().find(|setting| setting.engine == row.run.engine)
}

fn guest(row: Row<'_>) -> Option<String> {
    match &row.scenario.scenario.guest {
        Guest::Workload(words) => Some(words.clone()),
        Guest::Linux(linux) => Some(linux.kernel.display().to_string()),
    }
}

fn link(row: Row<'_>) -> Option<String> {
    let name = match row.scenario.scenario.link {
        Link::Loopback => "loopback",
        Link::Veth => "veth",
        Link::Tbf { .. } => "tbf",
    };
    Some(name.to_owned())
}

fn link_rate(row: Row<'_>) -> Option<String> {
    match row.scenario.scenario.link {
        Link::Loopback | Link::Veth => None,
        Link::Tbf { rate_mbit_s, .. } => text(rate_mbit_s),
    }
}

fn strategy(row: Row<'_>) -> Option<String> {
    let name = match setting(row)?.strategy {
        Strategy::PreCopy => "pre-copy",
        Strategy::AutoConverge => "auto-converge",
        Strategy::PostCopy => "post-copy",
    };
    Some(name.to_owned())
}

fn compression(row: Row<'_>) -> Option<String> {
    let name = match setting(row)?.compression {
        Compression::None => "none",
        Compression::Auto => "auto",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
        Compression::Xbzrle => "xbzrle",
    };
    Some(name.to_owned())
}

fn outcome(row: Row<'_>) -> &'static str {
    match &row.run.outcome {
        Outcome::Moved => "moved",
        Outcome::NotConverged => "not-converged",
        Outcome::Unsupported { .. } => "unsupported",
        Outcome::Failed { .. } => "failed",
    }
}

fn reason(row: Row<'_>) -> Option<String> {
    match &row.run.outcome {
        Outcome::Moved | Outcome::NotConverged => None,
        Outcome::Unsupported { reason } | Outcome::Failed { reason } => Some(reason.clone()),
    }
}
