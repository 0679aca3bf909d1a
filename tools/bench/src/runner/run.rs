//! One run: one engine migrates one guest once, watched from outside.

use std::path::Path;
use std::time::Duration;

use ferry_guest_abi::Workload;
use ferry_guest_abi::cmdline::WORKLOAD_WORD;
use ferry_guest_abi::report::Stage;
use ferry_lab::LabClock;

use crate::engine::{Engine, EngineError, EngineReport, GuestBoot, Pair, PairOrder};
use crate::hosts::{self, Hosts};
use crate::measure::clients::Clients;
use crate::measure::cost::{self, CostSnapshot, ThreadClock};
use crate::measure::guest::GuestWindow;
use crate::measure::idle::{self, MachineTime};
use crate::measure::sampler::{Sampler, Watched};
use crate::measure::warm::WarmMemory;
use crate::results::{Idleness, Measures, Outcome, ProcessRole, Run, Timeline};
use crate::scenario::{EngineSetting, Guest, Scenario, file};

mod assemble;

/// The guest's kernel in the suite's folder.
pub(super) const KERNEL: &str = "workload-guest.elf";

/// How long a guest may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(180);

/// How long the machine may take to become quiet; it is measured then, and said.
const QUIET_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one look at the machine takes.
const QUIET_LOOK: Duration = Duration::from_millis(200);

/// How long the guest may take to show a sign of life at the target.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// After so many failures of an engine in a scenario, and no success, it is not tried again.
const FAILURES_MAX: usize = 2;

/// Whether `engine` has shown in `runs` that it will not make it.
pub(super) fn is_hopeless(runs: &[Run], engine: &str) -> bool {
    let mine: Vec<_> = runs.iter().filter(|run| run.engine == engine).map(|run| &run.outcome).collect();
    let unsupported = mine.iter().any(|outcome| matches!(outcome, Outcome::Unsupported { .. }));
    unsupported || (mine.len() >= FAILURES_MAX && mine.iter().all(|outcome| **outcome != Outcome::Moved))
}

/// One run that is to be made.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) setting: &'a EngineSetting,
    pub(super) engine: &'a dyn Engine,
    pub(super) repetition: u32,
    pub(super) folder: &'a Path,
    pub(super) clock: LabClock,
}

/// What was seen of a migration, raw.
struct Seen {
    engine: EngineReport,
    costs: [(CostSnapshot, CostSnapshot); 2],
    machine: (MachineTime, MachineTime),
    own_cpu: Duration,
    others_before: f64,
    wire_bytes: Option<u64>,
    guest_memory: [Option<u64>; 2],
    heartbeat_before: Option<u64>,
}

impl Attempt<'_> {
    /// Makes it. What goes wrong is its outcome.
    pub(super) fn run(&self) -> Run {
        let mut run = Run {
            engine: self.setting.engine.clone(),
            repetition: self.repetition,
            at_s: self.clock.now().as_secs_f64(),
            outcome: Outcome::Moved,
            measures: Measures::default(),
            timeline: Timeline::default(),
            flags: Vec::new(),
        };
        if let Err(error) = self.measure(&mut run) {
            run.outcome = match error.downcast_ref() {
                Some(EngineError::Unsupported { what, .. }) => Outcome::Unsupported { reason: what.clone() },
                Some(EngineError::Spawn { .. } | EngineError::Broken { .. }) | None => {
                    Outcome::Failed { reason: format!("{error:#}") }
                }
            };
        }
        run
    }

    fn measure(&self, run: &mut Run) -> anyhow::Result<()> {
        let folder = tempfile::Builder::new().prefix("run.").tempdir_in(self.folder)?;
        let hosts = Hosts::make(self.scenario.link)?;
        let boot = self.boot(folder.path());
        let has_net = matches!(hosts, Hosts::Two(_)) && self.guest_has_net();
        let mut pair = self.engine.start(&PairOrder {
            scenario: self.scenario,
            setting: self.setting,
            guest: &boot,
            source: hosts.source(has_net),
            target: hosts.target(has_net),
            folder: folder.path(),
        })?;
        run.flags = pair.flags();
        let window = if pair.has_guest() { self.until_ready(&*pair, &boot)? } else { None };
        let clients = match hosts.client() {
            Some(namespace) if self.scenario.client.is_some() && pair.has_guest() => {
                Some(Clients::start(self.scenario.client, namespace, self.clock)?)
            }
            _ => None,
        };
        let in_use = |pair: &dyn Pair, pid| pair.has_guest().then(|| cost::guest_memory_bytes(pid)).flatten();
        let at_source = in_use(&*pair, pair.source_pid());
        let warm = WarmMemory::hold(self.scenario.in_use_mib());
        let others_before = until_quiet(&*pair, self.clock)?;
        let (wire, tap) = hosts.counters()?;
        let watched = Watched {
            wire,
            tap,
            source: window,
            source_pid: pair.source_pid(),
            vcpus: vcpus(&*pair)?,
            target_pid: pair.target_pid(),
            memory_mib: self.scenario.memory_mib,
            shared_memory: self.setting.local,
        };
        let sampler = Sampler::start(watched, self.clock)?;
        let watch = Duration::from_millis(self.scenario.watch_ms);
        std::thread::sleep(watch);
        drop(warm);
        if let Some(clients) = &clients {
            clients.order_is_near();
        }
        let mut seen = self.migrate(&mut *pair, &hosts)?;
        seen.others_before = others_before;
        std::thread::sleep(watch);
        self.until_alive(&*pair, &seen);
        let samples = sampler.stop();
        seen.guest_memory = [at_source, in_use(&*pair, pair.target_pid())];
        let clients =
            clients.map(|clients| clients.stop(self.clock, seen.engine.ordered.as_secs_f64() * 1e3));
        for ((_, after), threads) in seen.costs.iter_mut().zip(&samples.threads) {
            after.keep_ended(threads);
        }
        assemble::fill_in(run, &seen, &samples, clients, &*pair);
        Ok(())
    }

    fn guest_has_net(&self) -> bool {
        match &self.scenario.guest {
            Guest::Workload(words) => words.trim_start().starts_with("http"),
            Guest::Linux(_) => true,
        }
    }

    fn boot(&self, folder: &Path) -> GuestBoot {
        let (kernel, initrd, cmdline) = match &self.scenario.guest {
            Guest::Workload(words) => {
                let words = file::with_network(words, &hosts::guest_address());
                // In its canonical form, whatever the suite wrote.
                let words = Workload::parse(&words).map_or(words, |workload| workload.to_string());
                (self.folder.join(KERNEL), None, format!("{WORKLOAD_WORD} {words}"))
            }
            Guest::Linux(linux) => (linux.kernel.clone(), linux.initrd.clone(), linux.cmdline.clone()),
        };
        GuestBoot {
            guest: self.scenario.guest.clone(),
            kernel,
            initrd,
            cmdline,
            serial: folder.join("serial.log"),
        }
    }

    /// Waits until the guest does its job.
    fn until_ready(&self, pair: &dyn Pair, boot: &GuestBoot) -> anyhow::Result<Option<GuestWindow>> {
        let until = self.clock.now() + READY_TIMEOUT;
        let mut window = None;
        while self.clock.now() < until {
            match &self.scenario.guest {
                Guest::Workload(_) => {
                    if window.is_none() {
                        window = GuestWindow::find(pair.source_pid(), self.scenario.memory_mib).ok();
                    }
                    if let Some(report) = window.as_ref().and_then(GuestWindow::report) {
                        if report.stage == Stage::Ready {
                            return Ok(window);
                        }
                        if !report.text().is_empty() {
                            anyhow::bail!("the guest gave up: {}", report.text());
                        }
                    }
                }
                Guest::Linux(linux) => {
                    let said = std::fs::read(&boot.serial).unwrap_or_default();
                    if String::from_utf8_lossy(&said).contains(&linux.ready) {
                        return Ok(None);
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::bail!("the guest was not ready after {} s", READY_TIMEOUT.as_secs())
    }

    /// The one timed step, with everything read right before and right after it.
    fn migrate(&self, pair: &mut dyn Pair, hosts: &Hosts) -> anyhow::Result<Seen> {
        let pids = [pair.source_pid(), pair.target_pid()];
        pids.into_iter().for_each(cost::forget_peak);
        let (wire, tap) = hosts.counters()?;
        let wire_without_tap =
            || Some(wire.bytes().ok()?.saturating_sub(tap.as_ref().map_or(Ok(0), |tap| tap.bytes()).ok()?));
        let window = pair.has_guest().then(|| GuestWindow::find(pids[0], self.scenario.memory_mib).ok());
        let window = window.flatten();
        let heartbeat_before = window.and_then(|window| window.report()).map(|report| report.heartbeat_tsc);
        let own = std::process::id();
        let (own_before, machine_before) = (cost::snapshot(own)?, idle::now()?);
        let before = [cost::snapshot(pids[0])?, cost::snapshot(pids[1])?];
        let wire_before = wire_without_tap();
        let engine = pair.migrate(self.clock)?;
        let wire_after = wire_without_tap();
        let after = pids.map(cost::snapshot);
        let machine = (machine_before, idle::now()?);
        let own_cpu = cost::snapshot(own)?.cpu().saturating_sub(own_before.cpu());
        let [source_before, target_before] = before;
        let [source_after, target_after] = after;
        // A process that has ended has nothing more to show.
        let costs = [
            (source_before.clone(), source_after.unwrap_or(source_before)),
            (target_before.clone(), target_after.unwrap_or(target_before)),
        ];
        let wire_bytes = wire_after.zip(wire_before).map(|(after, before)| after.saturating_sub(before));
        Ok(Seen {
            engine,
            costs,
            machine,
            own_cpu,
            others_before: 0.0,
            wire_bytes,
            guest_memory: [None; 2],
            heartbeat_before,
        })
    }

    /// Gives the guest the time to show that it lives at the target.
    fn until_alive(&self, pair: &dyn Pair, seen: &Seen) {
        let until = self.clock.now() + ALIVE_TIMEOUT;
        let Some(before) = seen.heartbeat_before else { return };
        while self.clock.now() < until {
            let window = GuestWindow::find(pair.target_pid(), self.scenario.memory_mib).ok();
            if window.and_then(|window| window.report()).is_some_and(|report| report.heartbeat_tsc > before) {
                // The sampler looks as well, a few times more.
                std::thread::sleep(Duration::from_millis(50));
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The clocks of the source's vCPU threads.
fn vcpus(pair: &dyn Pair) -> anyhow::Result<Vec<ThreadClock>> {
    let pid = pair.source_pid();
    let threads = cost::snapshot(pid)?;
    let clocks = threads.threads(|name| pair.is_vcpu(name)).filter_map(|id| ThreadClock::of(pid, id));
    Ok(clocks.collect())
}

/// Waits until nobody but the two VMMs uses the machine, for a while; returns the share that others still use.
fn until_quiet(pair: &dyn Pair, clock: LabClock) -> anyhow::Result<f64> {
    let until = clock.now() + QUIET_TIMEOUT;
    let own = || -> anyhow::Result<Duration> {
        let pids = [pair.source_pid(), pair.target_pid(), std::process::id()];
        Ok(pids.into_iter().filter_map(|pid| cost::snapshot(pid).ok()).map(|cost| cost.cpu()).sum())
    };
    loop {
        let (machine, used) = (idle::now()?, own()?);
        std::thread::sleep(QUIET_LOOK);
        let used = own()?.saturating_sub(used);
        let (others, _) = idle::shares(machine, idle::now()?, used);
        if others <= idle::QUIET_OTHERS_MAX || clock.now() >= until {
            return Ok(others);
        }
    }
}

impl Seen {
    fn idleness(&self) -> Idleness {
        let own = self
            .costs
            .iter()
            .map(|(before, after)| after.cpu().saturating_sub(before.cpu()))
            .sum::<Duration>();
        let (others, steal) = idle::shares(self.machine.0, self.machine.1, own + self.own_cpu);
        let quiet =
            self.others_before.max(others) <= idle::QUIET_OTHERS_MAX && steal <= idle::QUIET_STEAL_MAX;
        Idleness { others_before: self.others_before, others_during: others, steal_during: steal, quiet }
    }

    fn role(index: usize) -> ProcessRole {
        if index == 0 { ProcessRole::Source } else { ProcessRole::Target }
    }
}
