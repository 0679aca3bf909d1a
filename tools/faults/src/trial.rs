//! One fault, from two fresh hosts to what is left of them.
//!
//! ```text
//!  setup      target waits, guest runs at the source, its heart is watched
//!  strike     the migration comes to the fault's place, and it happens
//!  mend       what stands still goes on, the link is mended, who was killed is started again
//!  settle     both sides come to rest; whose the guest is by the records, and where its heart beats
//!  again      the guest, or a new one if its owner was killed, migrates; digests, self-check, neighbours
//!  clean up   everything ends in good order, and nothing is left
//! ```

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::Lab;
use ferry_migrate::protocol::{Record, VmId};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::certificates::certify;
use crate::hold::{Held, Hold};
use crate::host::Host;
use crate::leaks::Census;
use crate::link;
use crate::plan::{Before, Cut, Effect, Fault, Side};
use crate::process::{PATIENCE, Process, wait_for};
use crate::watch::Watch;

/// How long it may take until the place is reached.
const STRIKE_PATIENCE: Duration = Duration::from_secs(30);

/// How long both sides may take to notice that the link is cut.
const NOTICE_PATIENCE: Duration = Duration::from_secs(45);

/// How long a target whose source is gone may keep what it has before it is told to give up. It would by itself after 30 s.
const KEEPS_PATIENCE: Duration = Duration::from_millis(1500);

/// How long the link is cut for a source that is making it again: longer than an attempt, shorter than its patience.
const CUT_WHILE_RECONNECTING: Duration = Duration::from_secs(6);

/// How long a process is held before it is killed.
const HELD_FOR: Duration = Duration::from_millis(25);

/// How long the target's side is waited for when the source's has noticed that the link is cut.
const TARGET_NOTICE: Duration = Duration::from_secs(3);

const DISK_BYTES: u64 = 1 << 20;

/// A fault under way.
#[derive(Debug)]
pub(crate) struct Trial<'a> {
    pub(crate) fault: &'a Fault,
    pub(crate) lab: &'a Lab,
    pub(crate) source: Host<'a>,
    pub(crate) target: Host<'a>,
    pub(crate) watch: Watch,
    pub(crate) vm: VmId,
    pub(crate) disk: PathBuf,
    /// What both processes held before.
    pub(crate) before: [Census; 2],
    /// Whose process was killed.
    pub(crate) killed: Option<Side>,
    migrating: Option<Process>,
    cancelling: Option<Process>,
    hold: Hold,
    /// The migration ended with the link, without being taken up again: right only while it is still being arranged.
    pub(crate) ended_at_once: bool,
    hold_for_cancel: Hold,
    cut: Option<Cut>,
    /// Removed last.
    _folder: TempDir,
}

impl<'a> Trial<'a> {
    /// Two hosts, a guest at the source, and a target that waits.
    pub(crate) fn set_up(fault: &'a Fault, lab: &'a Lab, program: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let disk = folder.path().join("disk.img");
        std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
        let hold = Hold::new(folder.path().join("hold"))?;
        let hold_for_cancel = Hold::new(folder.path().join("cancel"))?;
        let mut source = Host::new(Side::Source, &lab.host_a, program, folder.path(), &disk)?;
        let mut target = Host::new(Side::Target, &lab.host_b, program, folder.path(), &disk)?;
        if fault.tls {
            certify([&mut source, &mut target], folder.path())?;
        }
        let faults = |side| faults_of(fault, side, &hold, &hold_for_cancel);
        target.receive(&faults(Side::Target))?;
        source.run(fault.load, fault.disk, &faults(Side::Source))?;
        let watch = Watch::start()?;
        let pids = [source.process()?.id(), target.process()?.id()];
        watch.add(Side::Source, pids[0]);
        watch.add(Side::Target, pids[1]);
        let vm = source.records()?.first().context("no record of a guest that runs")?.vm;
        let mut trial = Self {
            fault,
            lab,
            before: [Census::of(pids[0])?, Census::of(pids[1])?],
            source,
            target,
            watch,
            vm,
            disk,
            killed: None,
            migrating: None,
            cancelling: None,
            hold,
            ended_at_once: false,
            hold_for_cancel,
            cut: None,
            _folder: folder,
        };
        trial.until_ready()?;
        trial.before = [Census::of(pids[0])?, Census::of(pids[1])?];
        Ok(trial)
    }

    /// Waits until the guest at the source does its job.
    pub(crate) fn until_ready(&mut self) -> anyhow::Result<()> {
        let source = &mut self.source;
        wait_for("the guest to be ready", PATIENCE, || {
            if source.is_down()? {
                bail!("{}", source.process()?.last_words());
            }
            Ok(source.get("/api/v1/guest").ok().filter(|report| report["ready"] == true))
        })?;
        Ok(())
    }

    /// The host at `side`.
    pub(crate) const fn host(&mut self, side: Side) -> &mut Host<'a> {
        match side {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        }
    }

    /// Its process's record of the guest.
    pub(crate) fn record(&mut self, side: Side) -> anyhow::Result<Option<Record>> {
        let vm = self.vm;
        Ok(self.host(side).records()?.into_iter().find(|record| record.vm == vm))
    }

    /// Migrates until the fault's place is reached, and has the fault happen. Afterwards nothing stands still and the link
    /// is whole; who was killed is down.
    pub(crate) fn strike(&mut self) -> anyhow::Result<()> {
        self.migrating = Some(self.source.migrate(&self.target.listens_on(), self.reconnects_for())?);
        if self.fault.before == Before::Cancelled {
            self.cancel()?;
        }
        let side = self.fault.side;
        let held = self.reached().with_context(|| {
            let words = self.migrating.as_ref().map(Process::last_words).unwrap_or_default();
            format!("{side} {}:{} was not reached; {words}", self.fault.step, self.fault.nth)
        })?;
        let happened = self.happen(held);
        // Whatever went wrong, the lab is for the next one too.
        if let Some(cut) = self.cut.take() {
            link::mend(self.lab, cut)?;
        }
        happened
    }

    /// How long the source may try to reach the target again: a link that is cut for long is to be given up soon.
    const fn reconnects_for(&self) -> &'static str {
        match self.fault.effect {
            Effect::CutForLong(_) => "2s",
            Effect::Kill
            | Effect::HoldAndKill
            | Effect::KillPeer
            | Effect::Stall(_)
            | Effect::StallPeer(_)
            | Effect::Cut(..)
            | Effect::CutUntilNoticed(_) => "20s",
        }
    }

    /// Cancels the migration when its first round is over.
    fn cancel(&mut self) -> anyhow::Result<()> {
        let hold = &mut self.hold_for_cancel;
        let held = wait_for("the end of the first round", STRIKE_PATIENCE, || hold.held())?;
        let mut cancelling = self.source.cancel()?;
        // It has asked as soon as it hears of what has happened so far.
        let asked =
            wait_for("the cancellation", PATIENCE, || Ok((!cancelling.lines().is_empty()).then_some(())));
        asked.with_context(|| cancelling.last_words())?;
        drop(held);
        let _ = cancelling.ended()?;
        self.cancelling = Some(cancelling);
        Ok(())
    }

    /// Waits until the process is at the place.
    fn reached(&mut self) -> anyhow::Result<Option<Held>> {
        let (effect, side) = (self.fault.effect, self.fault.side);
        wait_for("the place", STRIKE_PATIENCE, || match effect {
            Effect::Kill => Ok(self.host(side).is_down()?.then_some(None)),
            Effect::Stall(_) => Ok(self.host(side).process()?.is_stopped().then_some(None)),
            Effect::HoldAndKill
            | Effect::KillPeer
            | Effect::StallPeer(_)
            | Effect::Cut(..)
            | Effect::CutForLong(_)
            | Effect::CutUntilNoticed(_) => Ok(self.hold.held()?.map(Some)),
        })
    }

    fn happen(&mut self, held: Option<Held>) -> anyhow::Result<()> {
        let side = self.fault.side;
        match self.fault.effect {
            Effect::Kill => {
                let status = self.host(side).process()?.end(PATIENCE)?;
                // It must not have ended of something else.
                let killed = std::os::unix::process::ExitStatusExt::signal(&status);
                if killed != Some(nix::libc::SIGKILL) {
                    bail!("{status}: {}", self.host(side).process()?.last_words());
                }
                self.killed = Some(side);
            }
            Effect::HoldAndKill => {
                thread::sleep(HELD_FOR);
                self.host(side).process()?.kill()?;
                self.killed = Some(side);
            }
            Effect::KillPeer => {
                self.host(side.peer()).process()?.kill()?;
                self.killed = Some(side.peer());
            }
            Effect::Stall(time) => {
                thread::sleep(time);
                self.host(side).process()?.signal(Signal::SIGCONT)?;
            }
            Effect::StallPeer(time) => {
                self.host(side.peer()).process()?.signal(Signal::SIGSTOP)?;
                drop(held);
                thread::sleep(time);
                self.host(side.peer()).process()?.signal(Signal::SIGCONT)?;
            }
            Effect::Cut(how, time) => {
                self.cut(how)?;
                drop(held);
                thread::sleep(time);
            }
            Effect::CutForLong(how) => {
                self.cut(how)?;
                drop(held);
                self.until_noticed()?;
            }
            Effect::CutUntilNoticed(how) => {
                self.cut(how)?;
                drop(held);
                self.until_reconnecting()?;
            }
        }
        Ok(())
    }

    fn cut(&mut self, how: Cut) -> anyhow::Result<()> {
        self.cut = Some(how);
        link::cut(self.lab, how)
    }

    /// Waits until the source tries to reach the target again, for whatever reason.
    fn until_reconnecting(&mut self) -> anyhow::Result<()> {
        let (source, migrating) = (&mut self.source, self.migrating.as_mut().context("no migration")?);
        // Once before the cut does not count.
        let tries = |process: &Process| {
            process.events().iter().filter(|event| event["event"] == "reconnecting").count()
        };
        let before = tries(migrating);
        if before > 0 {
            // It is at it already, and won't say so again.
            thread::sleep(CUT_WHILE_RECONNECTING);
            return Ok(());
        }
        wait_for("the source to make the link again", NOTICE_PATIENCE, || {
            let in_doubt = source.vm_state().as_deref() == Some("in-doubt");
            Ok((in_doubt || tries(migrating) > before || migrating.ended()?.is_some()).then_some(()))
        })?;
        self.ended_at_once = tries(migrating) == before && migrating.ended()?.is_some();
        Ok(())
    }

    /// Waits until the source knows how the migration has ended, or that it can't know; then gives the target some time.
    fn until_noticed(&mut self) -> anyhow::Result<()> {
        let (source, migrating) = (&mut self.source, self.migrating.as_mut().context("no migration")?);
        wait_for("the source to notice that the link is cut", NOTICE_PATIENCE, || {
            let in_doubt = source.vm_state().as_deref() == Some("in-doubt");
            Ok((in_doubt || migrating.ended()?.is_some()).then_some(()))
        })
        .with_context(|| format!("it says {:?}", source.vm_state()))?;
        let target = &self.target;
        let still_receiving = || Ok((target.vm_state().as_deref() != Some("receiving")).then_some(()));
        // One that is prepared waits for much longer, and may.
        let _ = wait_for("the target to notice it", TARGET_NOTICE, still_receiving);
        Ok(())
    }

    /// Starts again who was killed, and waits until both sides are at rest.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        match self.killed {
            Some(Side::Source) => self.settle_without_source()?,
            Some(Side::Target) => {
                self.target.receive("")?;
                let pid = self.target.process()?.id();
                self.watch.add(Side::Target, pid);
                self.settle_both()?;
            }
            None => self.settle_both()?,
        }
        for process in [self.migrating.take(), self.cancelling.take()].into_iter().flatten() {
            let mut process = process;
            process.end(PATIENCE)?;
        }
        Ok(())
    }

    fn settle_both(&mut self) -> anyhow::Result<()> {
        let (source, target) = (&mut self.source, &mut self.target);
        let mut last = None;
        wait_for("both sides to come to rest", PATIENCE, || {
            let gone = source.is_down()?;
            let now = (source.vm_state(), target.vm_state(), gone);
            let at_rest = match (now.0.as_deref(), now.1.as_deref()) {
                // A target that is cut off while it is prepared waits for its source, which may come again.
                (Some("running"), Some("waiting" | "receiving")) => true,
                (_, Some("running" | "waiting")) => gone,
                _ => false,
            };
            last = Some(now);
            Ok(at_rest.then_some(()))
        })
        .with_context(|| format!("they are {last:?}"))
    }

    /// The target's source is dead: it runs the guest, or gives up, if need be because it is told to.
    fn settle_without_source(&mut self) -> anyhow::Result<()> {
        let at_rest = self.target.until_state(&["running", "waiting"], KEEPS_PATIENCE);
        if at_rest.is_ok() {
            return Ok(());
        }
        self.target.until_state(&["receiving"], Duration::ZERO)?;
        let (code, said) = self.target.ferry(&["stop", crate::host::NAME])?;
        if code == Some(0) {
            let status = self.target.process()?.end(PATIENCE)?;
            if !status.success() {
                bail!("a target that was told to stop: {status}: {}", self.target.process()?.last_words());
            }
            self.target.receive("")?;
            // Another process, which has held nothing yet.
            self.before[1] = Census::of(self.target.process()?.id())?;
            return Ok(());
        }
        // At the last moment the guest has arrived all the same.
        self.target.until_state(&["running"], PATIENCE).map(drop).context(said)
    }
}

/// What `FERRY_FAULT` says to the process at `side`.
fn faults_of(fault: &Fault, side: Side, hold: &Hold, hold_for_cancel: &Hold) -> String {
    let mut faults = Vec::new();
    if let Some((_, before)) = fault.before.fault().filter(|(at, _)| *at == side) {
        faults.push(before.to_owned());
    }
    if fault.before == Before::Cancelled && side == Side::Source {
        faults.push(format!("receives-fence-reached:1:hold={}", hold_for_cancel.path().display()));
    }
    if side == fault.side {
        let action = match fault.effect {
            Effect::Kill => "kill".to_owned(),
            Effect::Stall(_) => "stop".to_owned(),
            Effect::HoldAndKill
            | Effect::KillPeer
            | Effect::StallPeer(_)
            | Effect::Cut(..)
            | Effect::CutForLong(_)
            | Effect::CutUntilNoticed(_) => {
                format!("hold={}", hold.path().display())
            }
        };
        faults.push(format!("{}:{}:{action}", fault.step, fault.nth));
    }
    faults.join(",")
}
