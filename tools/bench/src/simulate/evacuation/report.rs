//! What is shown of an evacuation: time to empty, the distribution of downtimes, what stayed and why.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use maud::{Markup, html};
use serde::Serialize;

use super::conduct::{AttemptLine, Evacuation, VmEnd, VmLine};
use super::site::Site;
use crate::report::number::{digits, span, whole};
use crate::simulate::costs::{float, round};
use crate::simulate::hardware::HardwareFile;
use crate::simulate::output::chart::{Chart, Series};
use crate::simulate::output::note;
use crate::simulate::output::page::{Page, captioned, table};
use crate::simulate::output::table::{Table, named};

const GIB: f64 = 1_073_741_824.0;

/// Quantiles that are shown.
const QUANTILES: [f64; 5] = [0.5, 0.9, 0.99, 0.999, 1.0];

/// The most points of a curve; more can't be told apart.
const POINTS_MAX: usize = 400;

/// An evacuation, as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvacuationReport {
    /// That it is a model, and how good it is.
    pub note: String,
    /// The parameters, and what they were checked against.
    pub parameters: HardwareFile,
    /// What was given.
    pub site: Site,
    /// The seed that VMs and chances were drawn with.
    pub seed: u64,
    /// All VMs together, then each kind.
    pub groups: Vec<Group>,
    /// Why VMs stayed, with how many did.
    pub stayed: BTreeMap<String, usize>,
    /// As it went.
    pub evacuation: Evacuation,
}

/// VMs taken together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// The kind's name, or `all`.
    pub name: String,
    /// How many there are.
    pub vms: usize,
    /// How many moved.
    pub moved: usize,
    /// Of these: not by the first attempt.
    pub moved_later: usize,
    /// How many stayed after all attempts.
    pub stayed: usize,
    /// How many had nowhere to go.
    pub no_room: usize,
    /// Memory of all, in GiB.
    pub memory_gib: f64,
    /// Downtimes of those that moved, as (quantile, ms).
    pub downtime_ms: Vec<(f64, f64)>,
    /// How long each of those took from the beginning of its last attempt, as (quantile, s).
    pub took_s: Vec<(f64, f64)>,
}

impl EvacuationReport {
    /// The report of `evacuation` of `site`.
    #[must_use]
    pub fn new(site: &Site, seed: u64, evacuation: Evacuation, parameters: HardwareFile) -> Self {
        let mut groups = vec![Group::of("all", &evacuation.vms, |_| true)];
        groups.extend(
            site.vms
                .iter()
                .enumerate()
                .map(|(index, kind)| Group::of(&kind.name, &evacuation.vms, |vm| vm.kind == index)),
        );
        let mut stayed = BTreeMap::new();
        for vm in &evacuation.vms {
            if let VmEnd::Stayed { reason } = &vm.end {
                // The words up to the first figure are alike for all.
                let reason =
                    reason.split(|c: char| c == ':' || c.is_ascii_digit()).next().unwrap_or_default();
                *stayed.entry(reason.trim().to_owned()).or_insert(0) += 1;
            }
        }
        Self { note: note(&parameters), parameters, site: site.clone(), seed, groups, stayed, evacuation }
    }

    fn facts(&self) -> Vec<(String, String)> {
        let Self { site, evacuation, .. } = self;
        let fact = |name: &str, value: String| (name.to_owned(), value);
        let racks = |racks: &super::site::Racks| {
            format!(
                "{} racks of {} hosts, {} Gbit/s a host, {} Gbit/s a rack",
                racks.racks,
                racks.hosts_per_rack,
                digits(racks.host_gbit_s),
                digits(racks.uplink_gbit_s)
            )
        };
        let shared = site
            .between
            .gbit_s
            .map_or(String::new(), |gbit_s| format!("{} Gbit/s that all share, ", digits(gbit_s)));
        let memory = self.groups.first().map_or(0.0, |all| all.memory_gib);
        vec![
            fact("time to empty", format!("{} ({} s)", span(evacuation.took_s), digits(evacuation.took_s))),
            fact("from", racks(&site.source)),
            fact("to", racks(&site.target)),
            fact("between", format!("{shared}{} ms one way", digits(site.between.latency_ms))),
            fact(
                "limits of each host",
                format!(
                    "{} out, {} in, {} processors",
                    site.host.out_max,
                    site.host.in_max,
                    digits(site.host.cores)
                ),
            ),
            fact(
                "at once in all",
                site.plan.at_once_max.map_or("no limit".to_owned(), |most| most.to_string()),
            ),
            fact("memory of all VMs", format!("{} GiB", digits(memory))),
            fact(
                "on the wire",
                format!(
                    "{} GiB, {} Gbit/s on average",
                    digits(evacuation.wire_bytes / GIB),
                    digits(evacuation.wire_bytes * 8.0 / 1e9 / evacuation.took_s.max(1e-9))
                ),
            ),
            fact("CPU time for pages", format!("{} s over all hosts", digits(evacuation.cpu_s))),
        ]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |group: &Group| {
            let quantile = |of: &[(f64, f64)], at: f64| {
                of.iter()
                    .find(|(quantile, _)| *quantile == at)
                    .map_or("–".to_owned(), |(_, value)| digits(*value))
            };
            let mut row = vec![
                group.name.clone(),
                whole(float(group.vms as u64)),
                whole(float(group.moved as u64)),
                whole(float(group.moved_later as u64)),
                whole(float(group.stayed as u64)),
                whole(float(group.no_room as u64)),
                digits(group.memory_gib),
                quantile(&group.took_s, 0.5),
                quantile(&group.took_s, 1.0),
            ];
            row.extend(QUANTILES.map(|at| quantile(&group.downtime_ms, at)));
            row
        };
        self.groups.iter().map(row).collect()
    }

    /// For a terminal.
    #[must_use]
    pub fn terminal(&self) -> String {
        let mut table = Table::new(&HEADINGS);
        self.rows().into_iter().for_each(|row| table.row(row));
        let stayed: String =
            self.stayed.iter().map(|(reason, count)| format!(" {count} stayed: {reason} ...\n")).collect();
        let Site { title, summary, .. } = &self.site;
        format!(
            "{title}\n{summary}\n\n{}\n{}{stayed}\n{}\n",
            table.to_text(),
            named(&self.facts()),
            self.note
        )
    }

    /// As a page.
    #[must_use]
    pub fn html(&self) -> String {
        let sections = html! {
            h2 { "VMs" }
            (table(&HEADINGS, &self.rows()))
            @if !self.stayed.is_empty() {
                p { "Why VMs stayed:" }
                ul {
                    @for (reason, count) in &self.stayed { li { (count) " × " (reason) " …" } }
                }
            }
            (self.figures())
        };
        let all = self.groups.first();
        let (vms, moved) = all.map_or((0, 0), |all| (all.vms, all.moved));
        let page = Page {
            title: self.site.title.clone(),
            lead: format!(
                "{} {} of {} VMs moved in {}.",
                self.site.summary,
                moved,
                vms,
                span(self.evacuation.took_s)
            ),
            note: self.note.clone(),
            facts: self.facts(),
            sections,
        };
        page.to_html(self)
    }

    fn figures(&self) -> Markup {
        let left = Chart {
            describe: "VMs that are left over time".to_owned(),
            x: "time, s".to_owned(),
            y: "VMs left".to_owned(),
            series: vec![Series {
                name: "left".to_owned(),
                points: thinned(
                    self.evacuation.left.iter().map(|(at, left)| (*at, Some(float(*left as u64)))),
                ),
                joined: true,
            }],
            line: None,
            diagonal: false,
        };
        let downtimes = Chart {
            describe: "The share of VMs with at most a downtime".to_owned(),
            x: "downtime, ms".to_owned(),
            y: "share of VMs with at most that, %".to_owned(),
            series: self.by_kind(|vms| cumulative(vms.iter().filter_map(|vm| vm.downtime_ms))),
            ..left.clone()
        };
        let by_size = |of: fn(&VmLine) -> Option<f64>| {
            self.by_kind(move |vms| thinned(vms.iter().map(|vm| (vm.memory_gib, of(vm)))))
        };
        let points = |series: Vec<Series>| {
            let loose = |series: Series| Series { joined: false, ..series };
            series.into_iter().map(loose).collect::<Vec<_>>()
        };
        let took = Chart {
            describe: "How long VMs took by their size".to_owned(),
            x: "memory, GiB".to_owned(),
            y: "last attempt, s".to_owned(),
            series: points(by_size(|vm| vm.attempts.last().map(AttemptLine::took_s))),
            ..left.clone()
        };
        let downtime_by_size = Chart {
            describe: "Downtimes of VMs by their size".to_owned(),
            y: "downtime, ms".to_owned(),
            series: points(by_size(|vm| vm.downtime_ms)),
            ..took.clone()
        };
        html! {
            div class="grid" {
                (captioned("VMs left", "On the source hosts, over time.", &left.draw()))
                (captioned("Downtime", "By ferry's own word.", &downtimes.draw()))
                (captioned("Time by size", "Each VM a mark; a sample where there are many.", &took.draw()))
                (captioned("Downtime by size", "The same VMs.", &downtime_by_size.draw()))
            }
        }
    }

    fn by_kind(&self, points: impl Fn(&[&VmLine]) -> Vec<(f64, Option<f64>)>) -> Vec<Series> {
        let of_kind = |index: usize| {
            let vms = self.evacuation.vms.iter();
            vms.filter(|vm| vm.kind == index && vm.end == VmEnd::Moved).collect::<Vec<_>>()
        };
        let series = |(index, kind): (usize, &super::site::VmKind)| Series {
            name: kind.name.clone(),
            points: points(&of_kind(index)),
            joined: true,
        };
        self.site.vms.iter().enumerate().map(series).collect()
    }
}

const HEADINGS: [&str; 14] = [
    "",
    "VMs",
    "moved",
    "later",
    "stayed",
    "no room",
    "GiB",
    "took s p50",
    "max",
    "downtime ms p50",
    "p90",
    "p99",
    "p99.9",
    "max",
];

/// At most [`POINTS_MAX`] points, evenly chosen, the last included.
fn thinned(points: impl Iterator<Item = (f64, Option<f64>)>) -> Vec<(f64, Option<f64>)> {
    let points: Vec<_> = points.collect();
    let every = points.len().div_ceil(POINTS_MAX).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points.into_iter().enumerate().filter(|(index, _)| index % every == 0 || *index == last);
    kept.map(|(_, point)| point).collect()
}

/// Values with the percentage of values that are not above each.
fn cumulative(values: impl Iterator<Item = f64>) -> Vec<(f64, Option<f64>)> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let all = float(values.len() as u64);
    let place = |(index, value): (usize, f64)| (value, Some(float(index as u64 + 1) / all * 100.0));
    thinned(values.into_iter().enumerate().map(place))
}

impl Group {
    fn of(name: &str, vms: &[VmLine], belongs: impl Fn(&VmLine) -> bool) -> Self {
        let vms: Vec<&VmLine> = vms.iter().filter(|vm| belongs(vm)).collect();
        let moved: Vec<&VmLine> = vms.iter().copied().filter(|vm| vm.end == VmEnd::Moved).collect();
        let ended = |end: fn(&VmEnd) -> bool| vms.iter().filter(|vm| end(&vm.end)).count();
        let took = |vm: &&VmLine| vm.attempts.last().map(AttemptLine::took_s);
        Self {
            name: name.to_owned(),
            vms: vms.len(),
            moved: moved.len(),
            moved_later: moved.iter().filter(|vm| vm.attempts.len() > 1).count(),
            stayed: ended(|end| matches!(end, VmEnd::Stayed { .. })),
            no_room: ended(|end| *end == VmEnd::NoRoom),
            memory_gib: vms.iter().map(|vm| vm.memory_gib).sum(),
            downtime_ms: quantiles(moved.iter().filter_map(|vm| vm.downtime_ms)),
            took_s: quantiles(moved.iter().filter_map(took)),
        }
    }
}

/// The values at [`QUANTILES`], to three digits; none for no values.
fn quantiles(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    let mut histogram: Histogram<u64> =
        Histogram::new_with_bounds(1, HIGHEST, 3).expect("bounds and digits that a histogram takes");
    for value in values {
        // Thousandths, so that small values keep their digits.
        histogram.saturating_record(round(value * 1e3).clamp(1, HIGHEST));
    }
    if histogram.is_empty() {
        return Vec::new();
    }
    QUANTILES.map(|at| (at, float(histogram.value_at_quantile(at)) / 1e3)).to_vec()
}

/// The largest value that a histogram keeps, in thousandths.
const HIGHEST: u64 = 1_000_000_000_000;
