//! Results as a suite could have found them, made up by a small model with a seed: for tests of everything that reads
//! results. Nothing in them was measured, and their title says so.
//!
//! They have what makes reports hard: sweeps, engines that are absent, fail, do not converge or can't do what is asked,
//! a guest that was harmed, a noisy machine, measures that are missing, and names with markup in them.

use std::collections::BTreeMap;

use ferry_bench::results::{
    Check, ClientSeen, EngineInfo, Idleness, MachineInfo, Measures, Outcome, Part, ProcessCost, ProcessRole,
    Results, Round, Run, SCHEMA, ScenarioResult, ThreadCost, Timeline,
};
use ferry_bench::scenario::{Compression, EngineKind, Guest, Link, Scenario, file};
use ferry_bench::stats;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp, LogNormal};

const PAGE_BYTES: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;

/// A name that must never reach a page, a file or a terminal as it is.
pub(crate) const ODD: &str = "<script>alert(\"1\")</script> & 'more'";

/// What is made up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub(crate) seed: u64,
    /// How much longer ferry takes for everything than it otherwise would.
    pub(crate) ferry_factor: f64,
    /// How much longer everything takes: a slower machine.
    pub(crate) machine_factor: f64,
}

impl Recipe {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, ferry_factor: 1.0, machine_factor: 1.0 }
    }

    pub(crate) fn results(self) -> Results {
        let suite = file::parse("standard", include_str!("sample.toml")).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut at_s = 2.0;
        let mut scenarios: Vec<Scenario> = suite.scenarios.clone();
        let last = scenarios.last_mut().unwrap();
        last.engines.push(last.engines[0].clone());
        last.engines.last_mut().unwrap().engine = ODD.to_owned();
        let mut odd = scenarios[0].clone();
        odd.name = "odd".to_owned();
        odd.title = format!("A title like {ODD}");
        odd.sweep = None;
        scenarios.push(odd);
        let mut engines: Vec<EngineInfo> =
            suite.engines.iter().map(|engine| info(&engine.name, engine.kind)).collect();
        engines.push(info(ODD, EngineKind::Qemu));
        let mut results = Results {
            schema: SCHEMA,
            suite: suite.name,
            title: "Sample data of a test, not measured".to_owned(),
            summary: "Made up to see what a report looks like. No machine has migrated anything for it."
                .to_owned(),
            began_unix_s: 1_780_000_000,
            took_s: 1432.0,
            command: ["ferry-bench", "suite", "standard", "--out", "/tmp/a & b"].map(str::to_owned).to_vec(),
            machine: MachineInfo {
                cpu: "A processor that does not exist".to_owned(),
                cores: 2,
                memory_bytes: 24 << 30,
                kernel: "6.0.0-sample".to_owned(),
                kvm: "kvm_pvm".to_owned(),
                ferry: "0.1.0".to_owned(),
            },
            scenarios: scenarios
                .into_iter()
                .map(|scenario| self.scenario(scenario, &engines, &mut at_s, &mut random))
                .collect(),
            engines,
            limits: Vec::new(),
        };
        results.limits = stats::limits::judge(&suite.limits, &results.scenarios, &results.engines);
        results
    }

    fn scenario(
        self,
        scenario: Scenario,
        engines: &[EngineInfo],
        at_s: &mut f64,
        random: &mut ChaCha8Rng,
    ) -> ScenarioResult {
        let mut runs = Vec::new();
        for repetition in 0..scenario.repetitions {
            for setting in &scenario.engines {
                let info = engines.iter().find(|engine| engine.name == setting.engine).unwrap();
                if info.absent.is_some() {
                    continue;
                }
                let model = Model::of(self, &scenario, info, setting.compression, random);
                let mut run = model.run(&scenario, &setting.engine, repetition, random);
                spoil(&mut run, &scenario.name);
                run.at_s = *at_s;
                *at_s += 2.0 + run.measures.total_ms.unwrap_or(0.0) / 1e3;
                runs.push(run);
            }
        }
        let (engines, ratios) = stats::summarise(&runs);
        ScenarioResult { scenario, runs, engines, ratios }
    }
}

fn info(name: &str, kind: EngineKind) -> EngineInfo {
    let absent = (kind == EngineKind::CloudHypervisor)
        .then(|| "no cloud-hypervisor in the search path; install it or name it with `binary`".to_owned());
    EngineInfo {
        name: name.to_owned(),
        kind,
        version: absent.is_none().then(|| "version <1> & later".to_owned()),
        binary: absent.is_none().then(|| format!("/usr/bin/{}", name.split('-').next().unwrap_or(name))),
        absent,
    }
}

/// What goes wrong in single runs.
fn spoil(run: &mut Run, scenario: &str) {
    let lose = |run: &mut Run| {
        run.measures = Measures::default();
        run.timeline = Timeline::default();
    };
    match (scenario, run.engine.as_str(), run.repetition) {
        ("gigabit-idle", "ferry-lz4", _) => {
            run.outcome = Outcome::Unsupported { reason: "lz4 with <these> & those".to_owned() };
            lose(run);
        }
        ("mixed-idle", "qemu-multifd", 1) => {
            let reason =
                "migrate: can't connect to 10.0.0.2:4444: Connection refused (os error 111)".to_owned();
            run.outcome = Outcome::Failed { reason };
            lose(run);
        }
        ("dirty-rate-1000", "qemu-multifd", _) | ("budget-30", "qemu", 1 | 3) => {
            run.outcome = Outcome::NotConverged;
            run.measures.downtime_guest_ms = None;
        }
        // The guest waited for a core, long before it was stopped.
        ("dirty-rate-100", "qemu", _) => run.timeline.standstill = Some((3.0, 41.0)),
        ("zero-idle", "qemu", 2) => run.measures.check.errors = Some(3),
        ("web", "qemu", 1) => {
            run.measures.idleness =
                Idleness { others_before: 0.02, others_during: 0.31, steal_during: 0.0, quiet: false };
        }
        ("random-idle-256", "qemu-multifd", 0) => {
            run.measures.wire_bytes = None;
            run.measures.processes.pop();
        }
        _ => {}
    }
}

/// One migration as a few numbers.
struct Model {
    link_bytes_per_s: f64,
    sent_bytes: f64,
    dirty_bytes_per_s: f64,
    set_bytes: f64,
    budget_ms: f64,
    fixed_ms: f64,
    kind: EngineKind,
    noise: f64,
    cpu_factor: f64,
}

impl Model {
    fn of(
        recipe: Recipe,
        scenario: &Scenario,
        info: &EngineInfo,
        compression: Compression,
        random: &mut ChaCha8Rng,
    ) -> Self {
        let mut noise = LogNormal::new(0.0, 0.06).unwrap().sample(random);
        // Now and then a run is slow.
        if Exp::new(1.0).unwrap().sample(random) > 2.7 {
            noise *= 1.6;
        }
        let is_ferry = info.kind == EngineKind::Ferry;
        let streams = scenario
            .engines
            .iter()
            .find(|setting| setting.engine == info.name)
            .map_or(1, |it| it.streams.fixed().unwrap_or(2));
        let speed = match (is_ferry, streams) {
            (true, 1) => 2.7e9,
            (true, _) => 3.3e9,
            (false, 1) => 2.0e9,
            (false, _) => 2.6e9,
        };
        let slower = if is_ferry { recipe.ferry_factor } else { 1.0 } * recipe.machine_factor * noise;
        let packed = if compression == Compression::None { 1.0 } else { 0.6 };
        let memory = f64::from(scenario.memory_mib) * MIB;
        let words = match &scenario.guest {
            Guest::Workload(words) => words.as_str(),
            Guest::Linux(_) => "",
        };
        let number = |key: &str| {
            let word = words.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            word.and_then(|value| value.parse().ok()).unwrap_or(0.0)
        };
        let zero = if words == "idle" { 0.998 } else { number("zero") / 100.0 };
        let link = match scenario.link {
            Link::Loopback => speed,
            Link::Veth => 0.7 * speed,
            Link::Tbf { rate_mbit_s, .. } => rate_mbit_s * 1e6 / 8.0 / packed,
        };
        Self {
            link_bytes_per_s: link / slower,
            sent_bytes: memory * (1.0 - zero) * 0.96,
            dirty_bytes_per_s: if words.starts_with("http") { 20.0 * MIB } else { number("rate") * MIB },
            set_bytes: number("set").max(8.0) * MIB,
            budget_ms: scenario.downtime_ms,
            fixed_ms: if is_ferry { 4.0 } else { 8.0 } * slower,
            kind: info.kind,
            noise,
            cpu_factor: slower * if compression == Compression::None { 1.0 } else { 4.0 },
        }
    }

    /// Rounds with beginning, length and bytes each; the last is what is sent while the guest stands still.
    fn rounds(&self) -> (Vec<(f64, f64, f64)>, f64) {
        let (mut at_ms, mut left) = (0.0, self.sent_bytes);
        let mut rounds = Vec::new();
        let fits = |left: f64| left / self.link_bytes_per_s * 1e3 + self.fixed_ms <= 0.6 * self.budget_ms;
        while rounds.is_empty() || !fits(left) {
            let ms = left / self.link_bytes_per_s * 1e3;
            rounds.push((at_ms, ms, left));
            at_ms += ms;
            left = (self.dirty_bytes_per_s * ms / 1e3).min(self.set_bytes);
            if rounds.len() > 40 {
                break;
            }
        }
        (rounds, left)
    }

    fn run(&self, scenario: &Scenario, engine: &str, repetition: u32, random: &mut ChaCha8Rng) -> Run {
        let (rounds, left) = self.rounds();
        let before_ms: f64 = rounds.iter().map(|round| round.1).sum();
        let last_ms = left / self.link_bytes_per_s * 1e3;
        let stop_ms = last_ms + self.fixed_ms;
        let total_ms = before_ms + stop_ms + 2.0 * self.noise;
        let moved = rounds.len() <= 40 && total_ms < scenario.timeout_s * 1e3;
        let jitter = LogNormal::new(0.0, 0.3).unwrap().sample(random);
        let seen_ms = stop_ms + 1.5 * jitter;
        let bytes = rounds.iter().map(|round| round.2).sum::<f64>() + left;
        let mut measures = Measures {
            total_ms: Some(total_ms),
            wire_bytes: Some(whole(bytes * 1.03)),
            wire_bytes_engine: Some(whole(bytes * 1.01)),
            processes: self.processes(bytes, scenario),
            rounds: rounds.iter().zip(1..).map(|(round, number)| self.round(number, *round)).collect(),
            round_count: u32::try_from(rounds.len()).ok(),
            check: Check { alive: moved, errors: Some(0), pages_checked: Some(1000), digest_equal: None },
            idleness: Idleness { others_before: 0.01, others_during: 0.02, steal_during: 0.0, quiet: true },
            more: BTreeMap::from([("engine <setup> ms".to_owned(), 3.5)]),
            ..Measures::default()
        };
        if moved {
            measures.downtime_guest_ms = Some(seen_ms);
            measures.downtime_engine_ms = Some(stop_ms);
            if self.kind == EngineKind::Ferry {
                measures.check.digest_equal = Some(true);
                measures.downtime_parts = self.parts(last_ms);
                measures.downtime_forecast_ms = Some(stop_ms * 2.0);
            } else {
                measures.rounds.clear();
            }
            if scenario.client.is_some() {
                measures.client = Some(client(seen_ms, jitter));
            }
        }
        if self.dirty_bytes_per_s > 0.0 && scenario.client == ferry_bench::scenario::Client::default() {
            let rate = self.dirty_bytes_per_s / PAGE_BYTES;
            measures.guest_pages_per_s_before = Some(rate);
            measures.guest_pages_per_s_during = Some(rate * (1.0 - seen_ms / total_ms) * 0.9);
            measures.guest_pages_per_s_after = Some(rate * 0.99);
        }
        Run {
            engine: engine.to_owned(),
            repetition,
            at_s: 0.0,
            outcome: if moved { Outcome::Moved } else { Outcome::NotConverged },
            timeline: self.timeline(scenario, &rounds, before_ms, stop_ms, moved, random),
            measures,
            flags: vec!["-machine <microvm>".to_owned(), format!("--downtime {} ms", scenario.downtime_ms)],
        }
    }

    fn round(&self, number: u32, (from_ms, ms, bytes): (f64, f64, f64)) -> Round {
        Round {
            round: number,
            from_ms: Some(from_ms),
            ms: Some(ms),
            dirty_pages: Some(whole(bytes / PAGE_BYTES)),
            sent_pages: Some(whole(bytes / PAGE_BYTES)),
            wire_bytes: Some(whole(bytes * 1.01)),
            forecast_upper_ms: None,
        }
    }

    fn parts(&self, last_ms: f64) -> Vec<Part> {
        let shares = [
            ("pause vCPUs and devices", 0.08),
            ("read the last dirty log", 0.02),
            ("last pages and state", 0.25),
            ("compare digests, restore", 0.15),
            ("commit, recorded", 0.2),
            ("target <records> & starts", 0.3),
        ];
        let part = |(name, share): (&str, f64)| {
            let pages = if name.starts_with("last pages") { last_ms } else { 0.0 };
            Part { name: name.to_owned(), ms: share * self.fixed_ms + pages }
        };
        shares.into_iter().map(part).collect()
    }

    fn processes(&self, bytes: f64, scenario: &Scenario) -> Vec<ProcessCost> {
        let cpu_s = bytes / 2.2e9 * self.cpu_factor;
        let side = |role, share: f64| ProcessCost {
            role,
            cpu_s: cpu_s * share + 0.4,
            cpu_engine_s: cpu_s * share,
            threads: vec![
                ThreadCost { name: "send".to_owned(), cpu_s: cpu_s * share, vcpu: false },
                ThreadCost { name: "CPU 0/KVM".to_owned(), cpu_s: 0.4, vcpu: true },
            ],
            peak_memory_bytes: whole(f64::from(scenario.memory_mib) * MIB + 4e7 * self.noise),
            guest_memory_bytes: Some(whole(f64::from(scenario.memory_mib) * MIB)),
        };
        vec![side(ProcessRole::Source, 0.6), side(ProcessRole::Target, 0.4)]
    }

    fn timeline(
        &self,
        scenario: &Scenario,
        rounds: &[(f64, f64, f64)],
        before_ms: f64,
        stop_ms: f64,
        moved: bool,
        random: &mut ChaCha8Rng,
    ) -> Timeline {
        let wobble = LogNormal::new(0.0, 0.1).unwrap();
        let end_ms = before_ms + stop_ms;
        let watch_ms = scenario.watch_ms as f64;
        let standstill = moved.then_some((before_ms, end_ms));
        let mut timeline = Timeline { done_ms: Some(end_ms + 2.0), standstill, ..Timeline::default() };
        let step_ms = 20.0;
        let mut t_ms = -watch_ms;
        while t_ms < end_ms + watch_ms {
            let busy = (0.0..end_ms).contains(&t_ms);
            let still = standstill.is_some_and(|(from, to)| (from..to).contains(&t_ms));
            let link = if busy { self.link_bytes_per_s * wobble.sample(random) } else { 0.0 };
            timeline.link_bytes_per_s.push((t_ms, link));
            let slow = if busy { 0.9 } else { 1.0 };
            let active = if still { 0.0 } else { slow * wobble.sample(random) };
            if scenario.client.is_some() {
                timeline.client_bytes_per_s.push((t_ms, 9e7 * active));
            } else if self.dirty_bytes_per_s > 0.0 {
                timeline.guest_pages_per_s.push((t_ms, self.dirty_bytes_per_s / PAGE_BYTES * active));
            }
            t_ms += step_ms;
        }
        for (from_ms, ms, bytes) in rounds {
            let dirty = |share: f64| (from_ms + ms * share, bytes * (1.0 - share) / PAGE_BYTES);
            timeline.dirty_pages.extend([0.0, 0.25, 0.5, 0.75, 0.99].map(dirty));
        }
        timeline
    }
}

fn client(seen_ms: f64, jitter: f64) -> ClientSeen {
    ClientSeen {
        udp_gap_ms: Some(seen_ms + 1.2 * jitter),
        udp_send_gap_ms: Some(1.1),
        udp_sent: Some(3000),
        udp_lost: Some(whole(seen_ms)),
        tcp_stall_ms: Some((seen_ms + 4.0 * jitter).max(12.0)),
        tcp_broken: Some(false),
        http_gap_ms: Some(seen_ms + 3.0 * jitter),
        http_ok: Some(1605),
        http_failed: Some(0),
        http_latency_ms: vec![(0.5, 2.1), (0.99, 9.0), (1.0, seen_ms + 9.0)],
    }
}

/// The whole number of something that can't be less than nothing.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made-up figures are small")]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}
