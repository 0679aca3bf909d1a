//! Each scenario in full: what it is, box plots, witnesses of the downtime, timelines.

use maud::{Markup, html};

use super::{Page, anchor};
use crate::report::median_run;
use crate::report::plots::parts::{self, Tones};
use crate::report::plots::timeline::{self, Tops};
use crate::report::plots::{boxes, witness};
use crate::results::{Metric, Run, ScenarioResult};
use crate::scenario::{Client, Compression, EngineSetting, Guest, Link, MemoryBacking, Scenario, Strategy};

/// All scenarios.
pub(super) fn section(page: &Page<'_>) -> Markup {
    let tones = Tones::of(page.results);
    html! {
        section id="scenarios" {
            h2 { "Scenarios" }
            nav class="toc" {
                ol {
                    @for scenario in &page.results.scenarios {
                        li {
                            a href=(format!("#s-{}", anchor(&scenario.scenario.name))) { (scenario.scenario.title) }
                        }
                    }
                }
            }
            @for scenario in &page.results.scenarios {
                article id=(format!("s-{}", anchor(&scenario.scenario.name))) {
                    h3 { (scenario.scenario.title) " " span class="name" { (scenario.scenario.name) } }
                    (setup(&scenario.scenario))
                    (box_plots(page, scenario))
                    (witnesses(page, scenario))
                    (timelines(page, scenario, &tones))
                    (commands(scenario))
                }
            }
        }
    }
}

/// The definition in a sentence or two.
fn setup(scenario: &Scenario) -> Markup {
    let guest = match &scenario.guest {
        Guest::Workload(words) => format!("workload guest, {words}"),
        Guest::Linux(linux) => format!("Linux, {}", linux.kernel.display()),
    };
    let link = match scenario.link {
        Link::Loopback => "loopback".to_owned(),
        Link::Veth => "two hosts on a switch".to_owned(),
        Link::Tbf { rate_mbit_s, queue_ms } => {
            format!("{rate_mbit_s} Mbit/s, queue of {queue_ms} ms")
        }
    };
    html! {
        p class="setup" {
            b { "Guest " } (guest) "; " (scenario.memory_mib) " MiB, " (scenario.cpus) " vCPU. "
            b { "Link " } (link) ". "
            b { "Budget " } (scenario.downtime_ms) " ms. "
            b { "Given up after " } (scenario.timeout_s) " s. "
            @if scenario.client.is_some() { b { "Clients " } (clients(scenario.client)) ". " }
            b { "Repetitions " } (scenario.repetitions) ", engines in turn. "
            b { "Engines " }
            @for (index, setting) in scenario.engines.iter().enumerate() {
                @if index > 0 { "; " }
                (setting.engine) ": " (settings(setting))
            }
            "."
        }
    }
}

fn clients(client: Client) -> String {
    let mut parts = Vec::new();
    if client.http_connections > 0 {
        parts.push(format!("{} web connections", client.http_connections));
    }
    if client.udp {
        parts.push("a datagram every ms".to_owned());
    }
    if client.tcp {
        parts.push("one watched TCP connection".to_owned());
    }
    parts.join(", ")
}

fn settings(setting: &EngineSetting) -> String {
    let strategy = match setting.strategy {
        Strategy::PreCopy => "pre-copy",
        Strategy::AutoConverge => "auto-converge",
        Strategy::PostCopy => "post-copy",
    };
    let compression = match setting.compression {
        Compression::None => "",
        Compression::Auto => ", encoding as it sees fit",
        Compression::Lz4 => ", lz4",
        Compression::Zstd => ", zstd",
        Compression::Xbzrle => ", xbzrle",
    };
    let streams = match setting.streams.fixed() {
        Some(1) => "1 stream".to_owned(),
        Some(count) => format!("{count} streams"),
        None => "streams as it sees fit".to_owned(),
    };
    let verify = if setting.verify { "" } else { ", memory not checked" };
    let memory = match setting.memory {
        MemoryBacking::Private => "",
        MemoryBacking::Shared => ", memory in a memfd",
        MemoryBacking::Hugepages => ", memory of huge pages",
    };
    let local = if setting.local { ", handed over within the host" } else { "" };
    let cap = setting.bandwidth_mbit_s.map_or(String::new(), |rate| format!(", at most {rate} Mbit/s"));
    format!("{strategy}, {streams}{compression}{cap}{verify}{memory}{local}")
}

fn box_plots(page: &Page<'_>, scenario: &ScenarioResult) -> Markup {
    let plots: Vec<Markup> =
        Metric::MAIN.into_iter().filter_map(|metric| boxes::plot(scenario, metric, &page.cast)).collect();
    html! {
        @if !plots.is_empty() {
            figure class="wide" {
                figcaption {
                    b { "Engines side by side. " }
                    "Every run is a mark; box: quartiles; line and figure: median; whiskers: least and largest. No box of \
                     fewer than five runs. Downtime as the guest saw it."
                }
                div class="grid" {
                    @for plot in plots { div class="scroll" { (plot) } }
                }
            }
        }
    }
}

fn witnesses(page: &Page<'_>, scenario: &ScenarioResult) -> Markup {
    html! {
        @if let Some(plot) = witness::plot(scenario, &page.cast) {
            figure class="wide" {
                figcaption {
                    b { "The downtime as everybody saw it. " }
                    "Median as a mark and in figures, runs as dots, range as a line."
                }
                div class="scroll" { (plot) }
            }
        }
    }
}

fn timelines(page: &Page<'_>, scenario: &ScenarioResult, tones: &Tones) -> Markup {
    let runs: Vec<&Run> = boxes::engines(scenario, &page.cast)
        .into_iter()
        .filter_map(|engine| median_run(scenario, engine))
        .collect();
    let tops = Tops::of(runs.iter().copied());
    let shown: Vec<(&Run, Markup)> = runs
        .into_iter()
        .filter_map(|run| Some((run, timeline::plot(&scenario.scenario.name, run, &tops, &page.cast)?)))
        .collect();
    html! {
        @if !shown.is_empty() {
            figure class="wide" {
                figcaption {
                    b { "The median run of each engine over time. " }
                    "Rounds are bands where the engine tells them; the standstill is shaded, the dashed line is the \
                     engine's word that it is done. Beside it, what the downtime was made of. Heights can be compared \
                     between engines, times and bars can't."
                }
                @for (run, plot) in shown {
                    div class="timeline" {
                        h4 {
                            (run.engine) " "
                            small { "repetition " (run.repetition + 1) (totals(run)) }
                        }
                        div class="scroll over-time" { (plot) }
                        @if let Some(bar) = parts::plot(run, tones, tops.height()) {
                            div class="scroll parts" { (bar) }
                        }
                    }
                }
            }
        }
    }
}

/// The run's main figures, for its heading.
fn totals(run: &Run) -> String {
    let measures = &run.measures;
    let mut text = String::new();
    for metric in [Metric::TotalMs, Metric::WireBytes, Metric::CpuS] {
        if let Some(value) = metric.of(measures) {
            text += &format!(" · {} {}", metric.title(), crate::report::number::with_unit(metric, value));
        }
    }
    if let Some(rounds) = measures.round_count {
        text += &format!(" · {rounds} round{}", if rounds == 1 { "" } else { "s" });
    }
    text
}

/// How engines were told, for those who want to repeat it.
fn commands(scenario: &ScenarioResult) -> Markup {
    let mut told: Vec<&Run> = Vec::new();
    for run in scenario.runs.iter().filter(|run| !run.flags.is_empty()) {
        if told.iter().all(|other| other.engine != run.engine) {
            told.push(run);
        }
    }
    html! {
        @if !told.is_empty() {
            details {
                summary { "Commands and settings, as given" }
                @for run in told {
                    p { b { (run.engine) } }
                    pre { (run.flags.join("\n")) }
                }
            }
        }
    }
}
