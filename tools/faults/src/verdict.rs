//! Whose the guest must be after a fault, whether it is there, and whether all is as good as before.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::Lab;
use ferry_migrate::protocol::Record;
use ferry_migrate::protocol::record::Standing;
use serde_json::Value;

use crate::host::NAME;
use crate::leaks::{is_locked, kept, left_behind};
use crate::neighbours;
use crate::plan::{Fault, Load, Side};
use crate::process::{PATIENCE, wait_for};
use crate::trial::Trial;

/// How it ended for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ending {
    /// It runs at the target.
    Moved,
    /// It has never stopped being the source's.
    Stayed,
    /// It was given away, and the source has it back.
    Returned,
    /// It was lost with the process that owned it, as it must be.
    OwnerKilled(Side),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::Returned => "returned",
            Self::OwnerKilled(Side::Source) => "owner killed (source)",
            Self::OwnerKilled(Side::Target) => "owner killed (target)",
        })
    }
}

/// What became of a fault.
#[derive(Debug, Default)]
pub struct Verdict {
    /// How it ended, if it came so far.
    pub ending: Option<Ending>,
    /// What shows that the guest ran twice.
    pub doubled: Option<String>,
    /// What shows that it is lost though its owner lives.
    pub lost: Option<String>,
    /// What was left behind.
    pub leaked: Vec<String>,
    /// What else is not as it must be.
    pub wrong: Option<String>,
}

impl Verdict {
    /// Whether the promise was kept.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let Self { ending: _, doubled, lost, leaked, wrong } = self;
        doubled.is_none() && lost.is_none() && leaked.is_empty() && wrong.is_none()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ending, doubled, lost, leaked, wrong } = self;
        let mut parts: Vec<String> = ending.iter().map(ToString::to_string).collect();
        parts.extend(doubled.iter().map(|why| format!("DOUBLED: {why}")));
        parts.extend(lost.iter().map(|why| format!("LOST: {why}")));
        parts.extend(leaked.iter().map(|what| format!("LEAKED: {what}")));
        parts.extend(wrong.iter().map(|why| format!("WRONG: {why}")));
        f.write_str(&parts.join("; "))
    }
}

/// How long a guest that runs may take to show it.
const BEATS_PATIENCE: Duration = Duration::from_secs(10);

/// How long is waited for a heart that must not beat; one that beats does so about every millisecond.
const NO_BEATS_PATIENCE: Duration = Duration::from_millis(300);

/// Beats by which a guest shows that it runs.
const BEATS: u64 = 5;

/// Has `fault` happen in `lab`, and judges what comes of it.
#[must_use]
pub fn judge(fault: &Fault, lab: &Lab, program: &std::path::Path) -> Verdict {
    let mut verdict = Verdict::default();
    if let Err(error) = go_through(fault, lab, program, &mut verdict) {
        verdict.wrong = Some(format!("{error:#}"));
    }
    verdict
}

fn go_through(
    fault: &Fault,
    lab: &Lab,
    program: &std::path::Path,
    verdict: &mut Verdict,
) -> anyhow::Result<()> {
    let mut trial = Trial::set_up(fault, lab, program).context("before the fault")?;
    let went = (|| {
        trial.strike()?;
        trial.settle()
    })();
    let seen = trial.watch.doubled();
    if let Err(error) = went {
        verdict.doubled = seen;
        let words = [Side::Source, Side::Target].map(|side| match trial.host(side).process.as_ref() {
            Some(process) => process.last_words(),
            None => String::new(),
        });
        bail!("{error:#} || {}", words.join(" || "));
    }
    let owner = trial.owner()?;
    verdict.ending = owner.ending;
    let beats = trial.beating(owner.side)?;
    verdict.doubled = trial
        .watch
        .doubled()
        .or(owner.doubled)
        .or_else(|| (beats.len() > 1).then(|| "its heart beats on both sides".to_owned()));
    match (owner.side, beats.as_slice()) {
        (None, []) => {}
        (Some(side), [beating]) if side == *beating => {}
        (Some(side), []) => verdict.lost = Some(format!("it is the {side}'s and does not run there")),
        (side, beating) => {
            verdict.wrong = Some(format!("by the records it is {side:?}'s, and it runs at {beating:?}"));
        }
    }
    if owner.ending.is_none() && beats.is_empty() {
        verdict.lost = Some(format!("nobody has it: {}", owner.records));
    }
    // One that is lost while the migration is being arranged ends it: there is nothing yet that could be taken up.
    let arranging = trial.ended_at_once && fault.is_arranging();
    let gets_over = fault.effect.is_passing() && fault.before.is_passing() && !arranging;
    if gets_over && owner.ending != Some(Ending::Moved) {
        verdict.wrong = Some("a disturbance that passed has cost the migration".to_owned());
    }
    if !verdict.is_good() {
        return Ok(());
    }
    verdict.leaked = trial.kept_by_survivors(owner.side)?;
    let last = trial.again(owner.side).context("the next attempt")?;
    verdict.doubled = trial.watch.doubled();
    verdict.leaked.extend(trial.clean_up(last).context("cleaning up")?);
    Ok(())
}

/// Whose the guest must be.
struct Owner {
    ending: Option<Ending>,
    side: Option<Side>,
    doubled: Option<String>,
    records: String,
}

impl Trial<'_> {
    /// Whose the guest is by the records and by who was killed.
    fn owner(&mut self) -> anyhow::Result<Owner> {
        let (at_source, at_target) = (self.record(Side::Source)?, self.record(Side::Target)?);
        let runs = |record: &Option<Record>| {
            record.as_ref().is_some_and(|record| record.standing == Standing::Running)
        };
        let epoch = |record: &Option<Record>| record.as_ref().map_or(0, |record| record.epoch.number());
        let released = matches!(at_source, Some(Record { standing: Standing::Released { .. }, .. }));
        let killed = self.killed;
        let ending = match (runs(&at_source), runs(&at_target)) {
            (true, true) => None,
            (_, true) if killed == Some(Side::Target) => Some(Ending::OwnerKilled(Side::Target)),
            (_, true) => Some(Ending::Moved),
            // The source knew that the target runs it, so the target's record must say so.
            (false, false) if released => None,
            (_, false) if killed == Some(Side::Source) => Some(Ending::OwnerKilled(Side::Source)),
            (true, false) if epoch(&at_source) > 1 => Some(Ending::Returned),
            (true, false) => Some(Ending::Stayed),
            (false, false) => None,
        };
        let side = match ending {
            Some(Ending::Moved) => Some(Side::Target),
            Some(Ending::Stayed | Ending::Returned) => Some(Side::Source),
            Some(Ending::OwnerKilled(_)) | None => None,
        };
        let show = |record: &Option<Record>| match record {
            Some(record) => format!("{} in epoch {}", record.standing.word(), record.epoch.number()),
            None => "no record".to_owned(),
        };
        let records = format!("source: {}, target: {}", show(&at_source), show(&at_target));
        let both = runs(&at_source) && runs(&at_target);
        let doubled = both.then(|| format!("both records say that it runs here ({records})"));
        Ok(Owner { ending, side, doubled, records })
    }

    /// The sides on which its heart beats now.
    fn beating(&mut self, expected: Option<Side>) -> anyhow::Result<Vec<Side>> {
        let mut sides = Vec::new();
        let mut first = Vec::new();
        for side in [Side::Source, Side::Target] {
            let pid = match self.host(side).is_down()? {
                true => None,
                false => Some(self.host(side).process()?.id()),
            };
            first.push((side, pid, self.count_of(pid)));
        }
        let watch = &self.watch;
        let advanced = |pid: Option<u32>, from: u64| {
            let now = pid.and_then(|pid| watch.report(pid)).map_or(0, |report| report.heartbeat_count);
            now >= from + BEATS
        };
        // One that runs shows it soon, and so does the other; one that does not can only be waited for.
        let patience = if expected.is_some() { BEATS_PATIENCE } else { NO_BEATS_PATIENCE };
        let _ = wait_for("a heart", patience, || {
            Ok(first.iter().any(|(_, pid, from)| advanced(*pid, *from)).then_some(()))
        });
        std::thread::sleep(Duration::from_millis(50));
        for (side, pid, from) in first {
            if advanced(pid, from) {
                sides.push(side);
            }
        }
        Ok(sides)
    }

    fn count_of(&self, pid: Option<u32>) -> u64 {
        pid.and_then(|pid| self.watch.report(pid)).map_or(0, |report| report.heartbeat_count)
    }

    /// What the processes that were there before still hold beyond what they held then.
    fn kept_by_survivors(&mut self, owner: Option<Side>) -> anyhow::Result<Vec<String>> {
        let mut all = Vec::new();
        let before = self.before.clone();
        for (side, before) in [Side::Source, Side::Target].into_iter().zip(before) {
            // Who is at rest as it was: the source with its guest, the target without.
            let as_before = match side {
                Side::Source => owner == Some(Side::Source),
                Side::Target => self.target.vm_state().as_deref() == Some("waiting"),
            };
            if as_before && !self.host(side).is_down()? && self.killed != Some(side) {
                let pid = self.host(side).process()?.id();
                all.extend(kept(pid, &before).into_iter().map(|what| format!("{what} at the {side}")));
            }
        }
        Ok(all)
    }

    /// Migrates the guest, or a new one where it was lost with its owner, to the other side; says where it is then.
    fn again(&mut self, owner: Option<Side>) -> anyhow::Result<Side> {
        let from = owner.unwrap_or(Side::Source);
        if owner.is_none() {
            self.start_another()?;
        }
        let to = from.peer();
        if to == Side::Source {
            let patience = PATIENCE;
            if self.killed != Some(Side::Source) {
                self.source.process()?.end(patience)?;
            }
            self.source.receive("")?;
            let pid = self.source.process()?.id();
            self.watch.add(Side::Source, pid);
        }
        let address = self.host(to).listens_on();
        let mut migrating = self.host(from).migrate(&address, "20s")?;
        let status = migrating.end(PATIENCE)?;
        let report = migrating.events().pop().unwrap_or_default();
        if !status.success() || report["event"] != "moved" {
            bail!("{}", migrating.last_words());
        }
        if report["digest_equal"] != true || report["verified"] != true {
            bail!("the digests are not equal: {report}");
        }
        self.is_well(to)?;
        Ok(to)
    }

    /// A guest in place of the one that was lost with its owner.
    fn start_another(&mut self) -> anyhow::Result<()> {
        self.watch.restart();
        let in_doubt = self
            .source
            .records()?
            .into_iter()
            .find(|record| matches!(record.standing, Standing::Committed { .. }));
        if let Some(record) = in_doubt {
            // Whether the target runs it can't be known here, so no guest of the name may be started.
            let refused = self.source.run(self.fault.load, self.fault.disk, "");
            let text = refused.err().map(|error| format!("{error:#}"));
            if !text.as_ref().is_some_and(|text| text.contains("in doubt")) {
                bail!("a name in doubt was not refused: {text:?}");
            }
            std::fs::remove_file(self.source.state.join(format!("{NAME}.{}.record", record.vm)))?;
        }
        self.source.run(self.fault.load, self.fault.disk, "")?;
        self.until_ready()?;
        let pids = [self.source.process()?.id(), self.target.process()?.id()];
        self.watch.add(Side::Source, pids[0]);
        self.watch.add(Side::Target, pids[1]);
        Ok(())
    }

    /// The guest at `side` goes on, has found no error in its memory, and is the only one that answers for its address.
    fn is_well(&mut self, side: Side) -> anyhow::Result<()> {
        let host = self.host(side);
        host.until_state(&["running"], PATIENCE)?;
        let refused = &host.get("/api/v1/vm")?["refused_system_calls"];
        if refused.as_array().is_some_and(|calls| !calls.is_empty()) {
            bail!("ferry's own filters refused what it needs: {refused}");
        }
        let report = |host: &crate::host::Host<'_>| host.get("/api/v1/guest");
        let first = report(host)?["heartbeats"].as_u64().context("no heartbeats")?;
        let last: Value = wait_for("heartbeats", PATIENCE, || {
            let now = report(host)?;
            Ok((now["heartbeats"].as_u64() > Some(first + BEATS)).then_some(now))
        })?;
        if last["errors"] != 0 || !last["fault"].is_null() {
            bail!("the guest found its memory changed: {last}");
        }
        match self.fault.load {
            Load::Network => neighbours::only_one_answers(self.lab, side),
            Load::Memory => Ok(()),
        }
    }

    /// Ends the guest at `side` and with it everything; gives what is left.
    fn clean_up(&mut self, side: Side) -> anyhow::Result<Vec<String>> {
        let host = self.host(side);
        let (code, said) = host.ferry(&["stop", NAME])?;
        if code != Some(0) {
            bail!("{said}");
        }
        for side in [Side::Source, Side::Target] {
            let process = self.host(side).process()?;
            let status = process.end(PATIENCE)?;
            if !status.success() {
                bail!("{status}: {}", process.last_words());
            }
        }
        let mut left = left_behind(&self.source)?;
        left.extend(left_behind(&self.target)?);
        if is_locked(&self.disk)? {
            left.push("the lock of the disk".to_owned());
        }
        Ok(left)
    }
}
