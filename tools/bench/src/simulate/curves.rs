//! `simulate curves`: time and downtime along one quantity, for what can't be run here: guests to 16 TiB and 512 vCPUs,
//! links from 100 Mbit/s to 400 Gbit/s, latencies to 200 ms.
//!
//! The guest of all curves writes to a fiftieth of its memory every 30 s and to a tenth of it every 15 minutes, a mixture
//! that grows with its size, unless its rate is what is varied.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::costs::{float, round};
use super::guest::{GuestError, GuestModel, Order, WorkingSet};
use super::hardware::{Hardware, HardwareFile};
use super::order::{Settings, streams_for};
use super::output::chart::{Chart, Series};
use super::output::note;
use super::output::page::{Page, captioned, table};
use super::output::table::Table;
use super::run::{Ending, Pair, migrate_one};
use crate::report::number::digits;
use maud::html;

const GIB: f64 = 1_073_741_824.0;

/// What is varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Varied {
    /// The guest's size, to 16 TiB.
    Size,
    /// How fast it writes, against the link's rate.
    Dirty,
    /// The link's rate, from 100 Mbit/s to 400 Gbit/s.
    Link,
    /// The link's latency, to 200 ms.
    Latency,
    /// The guest's vCPUs, to 512.
    Cpus,
}

impl Varied {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Size, Self::Dirty, Self::Link, Self::Latency, Self::Cpus];

    const fn axis(self) -> &'static str {
        match self {
            Self::Size => "guest memory, GiB",
            Self::Dirty => "written, share of what the link takes",
            Self::Link => "link, Gbit/s",
            Self::Latency => "latency one way, ms",
            Self::Cpus => "vCPUs",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Size => "Against the guest's size",
            Self::Dirty => "Against the guest's dirty rate",
            Self::Link => "Against the link's rate",
            Self::Latency => "Against the link's latency",
            Self::Cpus => "Against the number of vCPUs",
        }
    }

    const fn caption(self) -> &'static str {
        match self {
            Self::Size => {
                "A vCPU for every 8 GiB, 512 at most, budget 1 s. The guest writes to a fiftieth of its memory every \
                 30 s and to a tenth every 15 min, whatever its size."
            }
            Self::Dirty => {
                "64 GiB and 8 vCPUs on 10 Gbit/s. Written is uniformly within 8 GiB, as fast as the axis says. Curves \
                 are budgets."
            }
            Self::Link => "A vCPU for every 8 GiB, budget 1 s, 0.05 ms one way. Curves are guests.",
            Self::Latency => {
                "16 GiB and 2 vCPUs, a budget of 2 s, since handing over takes two round trips. As many streams as \
                 fill the link and can be opened in time, 64 at most."
            }
            Self::Cpus => {
                "64 GiB on 25 Gbit/s, budget 100 ms. What stopping, saving, restoring and starting cost is not \
                 measured before the guest is stopped, so that the core's forecast does not know how many there are."
            }
        }
    }
}

/// One figure's worth of curves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// What is varied.
    pub varied: Varied,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// One curve.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Its points, in order.
    pub points: Vec<Point>,
}

/// One migration of a curve.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// Where it lies on the axis.
    pub at: f64,
    /// How it ended.
    pub ending: Ending,
    /// Start to end, in s, if the guest moved.
    pub total_s: Option<f64>,
    /// The downtime by ferry's own word, in ms, if it moved.
    pub downtime_ms: Option<f64>,
    /// The budget, in ms.
    pub budget_ms: f64,
    /// Its rounds.
    pub rounds: usize,
    /// Data streams.
    pub streams: u16,
    /// Bytes on the wire over the guest's memory.
    pub wire_share: f64,
}

/// All figures, as they are shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curves {
    /// That it is a model, and how good it is.
    pub note: String,
    /// The parameters, and what they were checked against.
    pub parameters: HardwareFile,
    /// The figures.
    pub figures: Vec<Figure>,
}

/// A point that is still to be simulated.
#[derive(Debug, Clone)]
struct Wanted {
    curve: String,
    at: f64,
    guest: GuestModel,
    link_gbit_s: f64,
    latency: Duration,
    budget: Duration,
}

/// Simulates all curves of `varied`, several at a time. `progress` hears of each point that is done.
///
/// # Errors
/// [`GuestError`] if a guest can't be, which none of these is.
pub fn simulate(
    varied: &[Varied],
    parameters: HardwareFile,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Curves, GuestError> {
    let wanted: Vec<(Varied, Wanted)> = varied
        .iter()
        .flat_map(|&varied| points(varied).into_iter().map(move |wanted| (varied, wanted)))
        .collect();
    let done: Mutex<Vec<(usize, Result<Point, GuestError>)>> = Mutex::default();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(wanted.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((_, wanted)) = wanted.get(index) else { return };
                    let point = wanted.simulate(&parameters.hardware);
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    done.push((index, point));
                    progress(done.len());
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    let mut figures: Vec<Figure> =
        varied.iter().map(|&varied| Figure { varied, curves: Vec::new() }).collect();
    for ((varied, wanted), (_, point)) in wanted.iter().zip(done) {
        let figure = figures.iter_mut().find(|figure| figure.varied == *varied);
        let Some(curves) = figure.map(|figure| &mut figure.curves) else { continue };
        match curves.iter_mut().find(|curve| curve.name == wanted.curve) {
            Some(curve) => curve.points.push(point?),
            None => curves.push(Curve { name: wanted.curve.clone(), points: vec![point?] }),
        }
    }
    Ok(Curves { note: note(&parameters), parameters, figures })
}

/// How many points there are in all.
#[must_use]
pub fn count(varied: &[Varied]) -> usize {
    varied.iter().map(|&varied| points(varied).len()).sum()
}

/// The guest of all curves, of `gib`.
fn typical(gib: f64) -> GuestModel {
    let memory = gib * GIB;
    let cpus = round(gib / 8.0).clamp(1, 512);
    let set = |share: f64, every_s: f64| WorkingSet {
        bytes: round(memory * share),
        pages_per_s: memory * share / 4096.0 / every_s,
        order: Order::Uniform,
        packable_share: 0.0,
    };
    GuestModel {
        sets: vec![set(0.02, 30.0), set(0.1, 900.0)],
        ..GuestModel::idle(round(memory), u16::try_from(cpus).unwrap_or(u16::MAX))
    }
}

const BUDGET: Duration = Duration::from_secs(1);
const NEAR: Duration = Duration::from_micros(50);

fn points(varied: Varied) -> Vec<Wanted> {
    let wanted = |curve: String, at: f64, guest: GuestModel, link_gbit_s: f64| Wanted {
        curve,
        at,
        guest,
        link_gbit_s,
        latency: NEAR,
        budget: BUDGET,
    };
    let link_name = |gbit_s: f64| format!("{gbit_s} Gbit/s");
    let mut points = Vec::new();
    match varied {
        Varied::Size => {
            for link in [1.0, 10.0, 25.0, 100.0, 400.0] {
                for exponent in 0..=14 {
                    let gib = f64::from(1 << exponent);
                    points.push(wanted(link_name(link), gib, typical(gib), link));
                }
            }
        }
        Varied::Dirty => {
            for budget_ms in [50, 300, 1000] {
                for step in 0..=24 {
                    let share = f64::from(step) / 16.0;
                    let mut guest = typical(64.0);
                    guest.sets = vec![WorkingSet {
                        bytes: round(8.0 * GIB),
                        // 10 Gbit/s are 1.25 GB/s, less headers.
                        pages_per_s: 1.25e9 / 1.049 / 4096.0 * share,
                        order: Order::Uniform,
                        packable_share: 0.0,
                    }];
                    let budget = Duration::from_millis(budget_ms);
                    let name = format!("budget {budget_ms} ms");
                    points.push(Wanted { budget, ..wanted(name, share, guest, 10.0) });
                }
            }
        }
        Varied::Link => {
            for gib in [4.0, 64.0, 1024.0, 16_384.0] {
                for link in [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 40.0, 100.0, 200.0, 400.0] {
                    points.push(wanted(format!("{} GiB", digits(gib)), link, typical(gib), link));
                }
            }
        }
        Varied::Latency => {
            for link in [1.0, 10.0, 100.0] {
                for latency_ms in [0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0] {
                    let latency = Duration::from_secs_f64(latency_ms / 1e3);
                    let budget = Duration::from_secs(2);
                    let point = wanted(link_name(link), latency_ms, typical(16.0), link);
                    points.push(Wanted { latency, budget, ..point });
                }
            }
        }
        Varied::Cpus => {
            for exponent in 0..=9 {
                let cpus = 1 << exponent;
                let guest = GuestModel { cpus, ..typical(64.0) };
                let budget = Duration::from_millis(100);
                points.push(Wanted { budget, ..wanted("64 GiB".to_owned(), f64::from(cpus), guest, 25.0) });
            }
        }
    }
    points
}

impl Wanted {
    fn simulate(&self, hardware: &Hardware) -> Result<Point, GuestError> {
        let pair = Pair {
            link_bytes_per_s: self.link_gbit_s * 1e9 / 8.0,
            latency: self.latency,
            queue: Duration::from_millis(1),
            cores: 32.0,
            one_machine: false,
            switched: false,
            page_scale: None,
        };
        let streams = streams_for(&pair, hardware);
        // Long enough for memory to be sent twice over, and for rounds to settle. More would change nothing.
        let bytes = float(self.guest.memory_bytes);
        let timeout = Duration::from_secs_f64(
            2.0 * bytes / pair.link_bytes_per_s + 60.0 + 1000.0 * self.latency.as_secs_f64(),
        );
        let settings = Settings { downtime_budget: self.budget, timeout, streams, ..Settings::default() };
        let run = migrate_one(&self.guest, settings, pair, hardware, 1)?;
        let moved = run.ending == Ending::Moved;
        Ok(Point {
            at: self.at,
            total_s: moved.then_some(run.took.as_secs_f64()),
            downtime_ms: run.report.as_ref().map(|report| report.downtime_ms),
            budget_ms: self.budget.as_secs_f64() * 1e3,
            ending: run.ending,
            rounds: run.rounds.len(),
            streams,
            wire_share: run.wire_bytes / bytes,
        })
    }
}

const HEADINGS: [&str; 8] =
    ["", "at", "total s", "downtime ms", "budget ms", "rounds", "streams", "sent / memory"];

impl Curves {
    /// For a terminal.
    #[must_use]
    pub fn terminal(&self) -> String {
        let mut text = String::new();
        for figure in &self.figures {
            let mut table = Table::new(&HEADINGS);
            figure.rows().into_iter().for_each(|row| table.row(row));
            let (title, axis) = (figure.varied.title(), figure.varied.axis());
            text.push_str(&format!("{title} ({axis})\n{}\n", table.to_text()));
        }
        text + &self.note + "\n"
    }

    /// As a page.
    #[must_use]
    pub fn html(&self) -> String {
        let sections = html! {
            @for figure in &self.figures {
                h2 { (figure.varied.title()) }
                p { (figure.varied.caption()) " A cross above a figure: the guest does not move there." }
                div class="grid" {
                    (captioned("Total time", "", &figure.chart("total time, s", &|point| point.total_s).draw()))
                    (captioned("Downtime", "", &figure.chart("downtime, ms", &|point| point.downtime_ms).draw()))
                }
                details { summary { "The numbers" } (table(&HEADINGS, &figure.rows())) }
            }
        };
        let page = Page {
            title: "What can't be run here".to_owned(),
            lead: "Migrations of guests to 16 TiB and 512 vCPUs, over links from 100 Mbit/s to 400 Gbit/s and latencies \
                   to 200 ms."
                .to_owned(),
            note: self.note.clone(),
            facts: Vec::new(),
            sections,
        };
        page.to_html(self)
    }
}

impl Figure {
    fn rows(&self) -> Vec<Vec<String>> {
        let row = |curve: &Curve, point: &Point| {
            let optional = |value: Option<f64>| value.map_or("stays".to_owned(), digits);
            vec![
                curve.name.clone(),
                digits(point.at),
                optional(point.total_s),
                optional(point.downtime_ms),
                digits(point.budget_ms),
                point.rounds.to_string(),
                point.streams.to_string(),
                format!("{:.2}", point.wire_share),
            ]
        };
        self.curves.iter().flat_map(|curve| curve.points.iter().map(move |point| row(curve, point))).collect()
    }

    fn chart(&self, quantity: &str, of: &dyn Fn(&Point) -> Option<f64>) -> Chart {
        let budgets = || self.curves.iter().flat_map(|curve| &curve.points).map(|point| point.budget_ms);
        let budget = budgets().next().filter(|first| budgets().all(|budget| budget == *first));
        Chart {
            describe: format!("{quantity} {}", self.varied.title()),
            x: self.varied.axis().to_owned(),
            y: quantity.to_owned(),
            series: self
                .curves
                .iter()
                .map(|curve| Series {
                    name: curve.name.clone(),
                    points: curve.points.iter().map(|point| (point.at, of(point))).collect(),
                    joined: true,
                })
                .collect(),
            line: budget.filter(|_| quantity.contains("downtime")).map(|ms| (ms, "budget".to_owned())),
            diagonal: false,
        }
    }
}
