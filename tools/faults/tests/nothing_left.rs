//! Twenty attempts to move one guest fail, each for another reason and at another step; nothing of them is left on either side, and the
//! attempt after them is as good as the first.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ferry_faults::host::{Host, NAME};
use ferry_faults::leaks::{Census, is_locked, kept, left_behind};
use ferry_faults::plan::{Cut, Load, Side};
use ferry_faults::process::{PATIENCE, Process, wait_for};
use ferry_faults::watch::Watch;
use ferry_faults::{link, program};
use ferry_lab::Lab;
use ferry_migrate::protocol::record::Standing;
use nix::sys::signal::Signal;

/// How an attempt is made to fail.
enum Fails {
    /// By a fault in the source's process.
    AtSource(&'static str),
    /// By one in the target's.
    AtTarget(&'static str),
    /// The target's process is killed by a fault of its own.
    TargetDies(&'static str),
    /// Nobody listens.
    NobodyListens,
    /// The target has no tap for the guest.
    NoTap,
    /// It does not converge in its time.
    TimedOut,
    /// By what is done once pages move.
    UnderWay(UnderWay),
}

/// How long a target that was cut off may keep what has arrived: what its source asked for, and a margin.
const KEEPS_PATIENCE: Duration = Duration::from_secs(20);

enum UnderWay {
    Cancel,
    Interrupt,
    StopTarget,
    CutLink,
}

use Fails::{AtSource, AtTarget, NoTap, NobodyListens, TargetDies, TimedOut, UnderWay as While};

/// The attempts, with a word of what ferry must say of each.
const ATTEMPTS: [(Fails, &str); 20] = [
    (NobodyListens, "refused"),
    (NoTap, "tap"),
    (AtTarget("record-receiving-begins:1:fail"), "No space left"),
    (AtTarget("record-receiving-synced:2:fail"), "No space left"),
    (AtSource("record-running-written:1:fail"), "No space left"),
    (AtSource("record-committed-created:1:fail"), "No space left"),
    (AtSource("record-committed-renamed:1:fail"), "No space left"),
    (AtTarget("record-running-begins:1:fail"), "discarded"),
    (AtTarget("record-running-durable:1:fail"), "discarded"),
    (AtTarget("target-frame-arrives:1:damage"), "digest"),
    (AtSource("source-chunk-sends:3:fail"), "data stream"),
    (While(UnderWay::Cancel), "cancel"),
    (While(UnderWay::Interrupt), "cancel"),
    (TimedOut, "downtime budget"),
    (While(UnderWay::StopTarget), ""),
    (While(UnderWay::CutLink), ""),
    (TargetDies("target-built:1:kill"), ""),
    (TargetDies("receives-state:1:kill"), ""),
    (TargetDies("sent-prepared:1:kill"), ""),
    // Last, so that the target after it is a new one, which has everything before it still to go through.
    (TargetDies("record-running-written:1:kill"), "discarded"),
];

struct World<'a> {
    lab: &'a Lab,
    source: Host<'a>,
    target: Host<'a>,
    watch: Watch,
    plans: [PathBuf; 2],
    attempt: usize,
    /// What the target's process held when it began to wait.
    fresh_target: Census,
}

impl<'a> World<'a> {
    fn new(lab: &'a Lab, program: &Path, folder: &Path) -> anyhow::Result<Self> {
        let disk = folder.join("disk.img");
        std::fs::File::create(&disk)?.set_len(1 << 20)?;
        let plans = [folder.join("plan-a"), folder.join("plan-b")];
        plans.iter().try_for_each(|plan| std::fs::write(plan, ""))?;
        let mut source = Host::new(Side::Source, &lab.host_a, program, folder, &disk)?;
        let mut target = Host::new(Side::Target, &lab.host_b, program, folder, &disk)?;
        source.run(Load::Memory, true, &format!("@{}", plans[0].display()))?;
        target.receive(&format!("@{}", plans[1].display()))?;
        wait_for("the guest to be ready", PATIENCE, || {
            Ok(source.get("/api/v1/guest").ok().filter(|report| report["ready"] == true))
        })?;
        let watch = Watch::start()?;
        watch.add(Side::Source, source.process()?.id());
        watch.add(Side::Target, target.process()?.id());
        let fresh_target = Census::of(target.process()?.id())?;
        Ok(Self { lab, source, target, watch, plans, attempt: 0, fresh_target })
    }

    fn plan(&self, side: Side, faults: &str) -> anyhow::Result<()> {
        let plan = match side {
            Side::Source => &self.plans[0],
            Side::Target => &self.plans[1],
        };
        Ok(std::fs::write(plan, format!("{faults} # attempt {}", self.attempt))?)
    }

    /// Waits for a guest anew, in a process of its own.
    fn new_target(&mut self) -> anyhow::Result<()> {
        self.plan(Side::Target, "")?;
        self.target.receive(&format!("@{}", self.plans[1].display()))?;
        let pid = self.target.process()?.id();
        self.watch.add(Side::Target, pid);
        self.fresh_target = Census::of(pid)?;
        Ok(())
    }

    /// A migration that takes long enough for something to be done meanwhile.
    fn slowly(&self) -> anyhow::Result<Process> {
        let target = self.target.listens_on();
        let slow = ["--bandwidth", "10M/s", "--downtime", "1ms", "--timeout", "2s"];
        let slow: &[&str] = if matches!(ATTEMPTS[self.attempt].0, TimedOut) { &slow } else { &slow[..4] };
        let words =
            [&["migrate", NAME, "--to", &target, "--insecure", "--reconnect", "1s", "--json"][..], slow]
                .concat();
        self.source.start(&words)
    }

    fn fails(&mut self, how: &Fails) -> anyhow::Result<Process> {
        self.plan(Side::Source, "")?;
        self.plan(Side::Target, "")?;
        let target = self.target.listens_on();
        // Broken links are not made again here: that they are is another test's business.
        let attempt = |world: &Self| world.source.migrate(&target, "0s");
        let mut migrating = match how {
            AtSource(fault) => {
                self.plan(Side::Source, fault)?;
                attempt(self)?
            }
            AtTarget(fault) => {
                self.plan(Side::Target, fault)?;
                attempt(self)?
            }
            TargetDies(fault) => {
                self.plan(Side::Target, fault)?;
                let migrating = attempt(self)?;
                self.target.process()?.end(PATIENCE)?;
                self.new_target()?;
                migrating
            }
            NobodyListens => self.source.migrate("10.77.0.12:4445", "0s")?,
            NoTap => self.with_a_target_without_a_tap()?,
            TimedOut => self.slowly()?,
            While(what) => self.under_way(what)?,
        };
        migrating.end(PATIENCE)?;
        Ok(migrating)
    }

    fn with_a_target_without_a_tap(&mut self) -> anyhow::Result<Process> {
        let listen = "10.77.0.12:4445";
        let words =
            ["receive", "--name", "other", "--listen", listen, "--insecure", "--json", "--exit-with-stdin"];
        let mut other = self.target.start(&words)?;
        other.until("listening")?;
        let mut migrating = self.source.migrate(listen, "0s")?;
        migrating.end(PATIENCE)?;
        let (code, said) = self.target.ferry(&["stop", "other"])?;
        ensure!(code == Some(0), "{said}");
        other.end(PATIENCE)?;
        let record = |name: &str| name.starts_with("other.");
        for file in std::fs::read_dir(&self.target.state)?.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            // A lock is never removed, or it could be taken twice.
            ensure!(!record(&name) || name == "other.lock" || name.ends_with(".record"), "{name} is left");
            if record(&name) {
                std::fs::remove_file(file.path())?;
            }
        }
        Ok(migrating)
    }

    fn under_way(&mut self, what: &UnderWay) -> anyhow::Result<Process> {
        let mut migrating = self.slowly()?;
        migrating.until("transferred")?;
        match what {
            UnderWay::Cancel => {
                let (code, said) = self.source.ferry(&["migrate", NAME, "--cancel"])?;
                ensure!(code == Some(0), "{said}");
            }
            UnderWay::Interrupt => migrating.signal(Signal::SIGINT)?,
            UnderWay::StopTarget => {
                let (code, said) = self.target.ferry(&["stop", NAME])?;
                ensure!(code == Some(0), "{said}");
                self.target.process()?.end(PATIENCE)?;
                migrating.end(PATIENCE)?;
                self.new_target()?;
            }
            UnderWay::CutLink => {
                link::cut(self.lab, Cut::CableOfTarget)?;
                let ended = migrating.end(PATIENCE);
                link::mend(self.lab, Cut::CableOfTarget)?;
                ended?;
            }
        }
        Ok(migrating)
    }

    /// The attempt has failed, says why, and has cost the guest nothing.
    fn nothing_lost(&mut self, migrating: &Process, word: &str) -> anyhow::Result<()> {
        let events = migrating.events();
        let error = events.last().and_then(|event| event["error"].as_str()).context("no error is told")?;
        ensure!(error.contains("goes on here") && error.contains(word), "'{word}' is missing in: {error}");
        self.source.until_state(&["running"], PATIENCE)?;
        let pid = self.source.process()?.id();
        let beats = |watch: &Watch| watch.report(pid).map_or(0, |report| report.heartbeat_count);
        let before = beats(&self.watch);
        wait_for("heartbeats at the source", PATIENCE, || {
            Ok((beats(&self.watch) > before + 5).then_some(()))
        })?;
        if let Some(doubled) = self.watch.doubled() {
            bail!("{doubled}");
        }
        // One that was cut off keeps what it has for a while, for a source that comes again.
        self.target.until_state(&["waiting", "receiving"], PATIENCE)?;
        Ok(())
    }

    fn arrives(&mut self) -> anyhow::Result<()> {
        self.plan(Side::Source, "")?;
        self.plan(Side::Target, "")?;
        let mut migrating = self.source.migrate(&self.target.listens_on(), "0s")?;
        let status = migrating.end(PATIENCE)?;
        ensure!(status.success(), "{}", migrating.last_words());
        let report = migrating.events().pop().context("no report")?;
        ensure!(report["digest_equal"] == true && report["verified"] == true, "{report}");
        self.target.until_state(&["running"], PATIENCE)?;
        let report = wait_for("heartbeats at the target", PATIENCE, || {
            Ok(self
                .target
                .get("/api/v1/guest")
                .ok()
                .filter(|report| report["pages_checked"].as_u64() > Some(0)))
        })?;
        ensure!(report["errors"] == 0 && report["fault"].is_null(), "{report}");
        self.watch.doubled().map_or(Ok(()), |doubled| bail!("{doubled}"))
    }
}

fn twenty_attempts(lab: &Lab, folder: &Path) -> anyhow::Result<()> {
    let program = program::with_fault_points()?;
    let mut world = World::new(lab, &program, folder)?;
    // Once it has touched all the memory that it ever will.
    wait_for("the guest to check its memory", PATIENCE, || {
        let report = world.source.get("/api/v1/guest").ok();
        Ok(report.filter(|report| report["pages_checked"].as_u64() > Some(0)))
    })?;
    let source = Census::of(world.source.process()?.id())?;
    let mut asked = 0;
    for (number, (how, word)) in ATTEMPTS.iter().enumerate() {
        world.attempt = number;
        let failed = world.fails(how).and_then(|migrating| world.nothing_lost(&migrating, word));
        failed.with_context(|| format!("attempt {number}"))?;
        println!("attempt {number} failed as it was to");
        // The target that has gone through most of them is asked before its process ends.
        let ends = |how: &Fails| matches!(how, TargetDies(_) | While(UnderWay::StopTarget));
        if ATTEMPTS.get(number + 1).is_none_or(|(how, _)| ends(how)) {
            world.target.until_state(&["waiting"], KEEPS_PATIENCE)?;
            let kept = kept(world.target.process()?.id(), &world.fresh_target);
            ensure!(kept.is_empty(), "the target keeps {kept:?} after attempt {number}");
            asked += 1;
        }
    }
    ensure!(asked == 6, "the target was asked {asked} times what it keeps");
    let kept = kept(world.source.process()?.id(), &source);
    ensure!(kept.is_empty(), "the source keeps {kept:?} of {} attempts", ATTEMPTS.len());
    let records = world.source.records()?;
    ensure!(records.len() == 1 && records[0].standing == Standing::Running, "{records:?}");

    world.arrives().context("the attempt after them")?;
    let (code, said) = world.target.ferry(&["stop", NAME])?;
    ensure!(code == Some(0), "{said}");
    for host in [&mut world.source, &mut world.target] {
        let status = host.process()?.end(PATIENCE)?;
        ensure!(status.success(), "{status}");
        let left = left_behind(host)?;
        ensure!(left.is_empty(), "{left:?} is left");
    }
    ensure!(!is_locked(&folder.join("disk.img"))?, "the disk is still locked");
    Ok(())
}

#[test]
fn twenty_failed_attempts_leave_nothing_behind() {
    if !ferry_tests::tier::has_kvm("faults") || !ferry_tests::tier::is_root("faults") {
        return;
    }
    let lab = Lab::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    if let Err(error) = twenty_attempts(&lab, folder.path()) {
        panic!("{error:#}");
    }
}
