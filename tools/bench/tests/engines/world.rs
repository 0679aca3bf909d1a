//! Hosts, a guest and an engine for one test.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use ferry_bench::engine::{self, Engine, EngineError, EngineReport, GuestBoot, Pair, PairOrder};
use ferry_bench::hosts::{self, Hosts};
use ferry_bench::measure::guest::GuestWindow;
use ferry_bench::scenario::{EngineKind, Guest, Link, Scenario, Suite, file};
use ferry_bench::worker;
use ferry_guest_abi::Report;
use ferry_guest_abi::report::Stage;
use ferry_guest_image::WORKLOAD_GUEST;
use ferry_lab::{LabClock, Namespace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long a guest may take for anything: this is patience, not a measure.
const PATIENCE: Duration = Duration::from_secs(120);

/// Says that `test` can't run here, which fails under CI.
pub(crate) fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} can't run under CI: {why}");
    say_skipped(test, why);
}

fn say_skipped(test: &str, why: &str) {
    // Written past the test harness, which would swallow what a passing test prints.
    let _ = writeln!(std::io::stderr(), "SKIPPED ({why}): {test}");
}

/// Everything that a pair is started from.
pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) hosts: Hosts,
    folder: TempDir,
    boot: GuestBoot,
}

impl World {
    /// A world with the one engine and the one scenario that `engine` and `scenario` describe, as in a suite's TOML.
    /// `None`, said aloud, if that can't be had on this machine.
    pub(crate) fn new(test: &str, engine: &str, scenario: &str) -> Option<Self> {
        worker::use_program(PathBuf::from(env!("CARGO_BIN_EXE_ferry-bench")));
        let suite = suite(engine, scenario);
        let engine = engine::find(&suite.engines[0]);
        if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            skip(test, &format!("/dev/kvm can't be used: {error}"));
            return None;
        }
        if let Some(why) = &engine.info().absent {
            match engine.info().kind {
                EngineKind::Ferry | EngineKind::Qemu | EngineKind::Tcp => skip(test, why),
                // No distribution has it, so the gate can't install it: it is tested where somebody has.
                EngineKind::CloudHypervisor => say_skipped(test, why),
            }
            return None;
        }
        if let Err(error) = Namespace::new("tier") {
            skip(test, &error.to_string());
            return None;
        }
        let scenario = suite.scenarios[0].clone();
        let hosts = Hosts::make(scenario.link).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let boot = boot(&scenario, folder.path());
        Some(Self { scenario, engine, hosts, folder, boot })
    }

    /// Boots another kernel instead.
    pub(crate) fn use_kernel(&mut self, kernel: PathBuf) {
        self.boot.kernel = kernel;
    }

    pub(crate) fn start(&self) -> Result<Box<dyn Pair>, EngineError> {
        let serves = matches!(&self.scenario.guest, Guest::Workload(words) if words.starts_with("http"));
        let has_net = serves && self.scenario.link != Link::Loopback;
        self.engine.start(&PairOrder {
            scenario: &self.scenario,
            setting: &self.scenario.engines[0],
            guest: &self.boot,
            source: self.hosts.source(has_net),
            target: self.hosts.target(has_net),
            folder: self.folder.path(),
        })
    }

    /// Starts a pair and waits until the guest does its job.
    pub(crate) fn ready(&self) -> Box<dyn Pair> {
        let pair = self.start().unwrap();
        self.until(pair.source_pid(), "do its job", |report| report.stage == Stage::Ready);
        pair
    }

    /// Starts a pair, moves the guest, and sees it go on at the target with nothing lost.
    pub(crate) fn moved(&self) -> (Box<dyn Pair>, EngineReport) {
        let mut pair = self.ready();
        let before = self.until(pair.source_pid(), "write", |report| report.heartbeat_count > 20);
        let report = pair.migrate(LabClock::start()).unwrap();
        self.goes_on(pair.target_pid(), &before);
        (pair, report)
    }

    /// Sees the guest of process `pid` live on after `before`, its memory as it left it.
    pub(crate) fn goes_on(&self, pid: u32, before: &Report) -> Report {
        let now = self.until(pid, "go on", |report| report.heartbeat_count > before.heartbeat_count);
        let then = self.until(pid, "check itself", |report| {
            report.heartbeat_count > now.heartbeat_count + 50 && report.pages_checked > now.pages_checked
        });
        assert_eq!(
            (then.boot_tsc, then.errors),
            (before.boot_tsc, 0),
            "{:?} {}",
            then.first_bad,
            then.text()
        );
        then
    }

    /// Waits until the guest of process `pid` reports what is `wanted`.
    pub(crate) fn until(&self, pid: u32, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        let clock = LabClock::start();
        let mut window = None;
        loop {
            if window.is_none() {
                window = GuestWindow::find(pid, self.scenario.memory_mib).ok();
            }
            let report = window.as_ref().and_then(GuestWindow::report);
            match report {
                Some(report) if wanted(&report) => return report,
                last if clock.now() >= PATIENCE => panic!("the guest does not {what}: {last:?}"),
                Some(_) | None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

fn suite(engine: &str, scenario: &str) -> Suite {
    let text = format!(
        "title = 't'\nsummary = 's'\n[engines.peer]\n{engine}\n[[scenarios]]\nname = 'one'\ntitle = 'one'\n\
         engines = ['peer']\n{scenario}"
    );
    file::parse("test", &text).unwrap()
}

fn boot(scenario: &Scenario, folder: &Path) -> GuestBoot {
    let kernel = folder.join("guest.elf");
    fs::write(&kernel, WORKLOAD_GUEST).unwrap();
    let Guest::Workload(words) = &scenario.guest else { panic!("these tests boot the workload guest") };
    let words = file::with_network(words, &hosts::guest_address());
    GuestBoot {
        guest: scenario.guest.clone(),
        kernel,
        initrd: None,
        cmdline: format!("workload {words}"),
        serial: folder.join("serial.log"),
    }
}

/// Ends process `pid` and everything that it has open.
pub(crate) fn end(pid: u32) {
    let id = i32::try_from(pid).unwrap();
    kill(Pid::from_raw(id), Signal::SIGKILL).unwrap();
    let clock = LabClock::start();
    let is_gone = || {
        procfs::process::Process::new(id)
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.state == 'Z')
    };
    while !is_gone() {
        assert!(clock.now() < PATIENCE, "process {pid} does not end");
        thread::sleep(Duration::from_millis(5));
    }
}
