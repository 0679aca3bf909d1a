//! Fault points that do something, for test builds.
//!
//! `FERRY_FAULT` names what shall happen, several parted by commas: `STEP:NTH:ACTION`, where the NTH time (from 1) that this
//! process comes to STEP
//!
//! | action | what happens |
//! |---|---|
//! | `kill` | SIGKILL |
//! | `stop` | SIGSTOP; whoever watches continues it |
//! | `hold=PATH` | the step's name goes to the Unix socket PATH, and the thread waits for a byte or the end; it is connected to at the first step of all, because not every thread may |
//! | `fail` | the step fails with "no space left on device", where it can |
//! | `damage` | a page that has just arrived is changed, at `target-frame-arrives` |
//!
//! `@FILE` in its place has the faults in a file, which is read when a migration begins; if it says something new, counting begins
//! anew (from a `#` on it is a remark). `FERRY_FAULT_LOG` names a file to which every step is appended as it is reached.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use ferry_protocol::message::MessageType;
use ferry_protocol::wire::Decoder;
use ferry_protocol::{source, target};
use nix::errno::Errno;
use nix::sys::signal::{Signal, raise};

use super::step::{SourceStep, Step, TargetStep};

const FAULTS: &str = "FERRY_FAULT";
const LOG: &str = "FERRY_FAULT_LOG";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Hold(PathBuf),
    Fail,
    Damage,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    step: Step,
    nth: u64,
    action: Action,
}

fn parse(text: &str) -> Result<Vec<Fault>, String> {
    let text = text.split('#').next().unwrap_or_default().trim();
    text.split(',').filter(|fault| !fault.is_empty()).map(parse_one).collect()
}

fn parse_one(text: &str) -> Result<Fault, String> {
    let mut words = text.splitn(3, ':');
    let (Some(step), Some(nth), Some(action)) = (words.next(), words.next(), words.next()) else {
        return Err(format!("'{text}' is not STEP:NTH:ACTION"));
    };
    let action = match action.split_once('=') {
        None if action == "kill" => Action::Kill,
        None if action == "stop" => Action::Stop,
        None if action == "fail" => Action::Fail,
        None if action == "damage" => Action::Damage,
        Some(("hold", path)) => Action::Hold(path.into()),
        None | Some(_) => return Err(format!("'{action}' is no action")),
    };
    let step = step.parse().map_err(|error| format!("{error}"))?;
    let nth = nth.parse().map_err(|error| format!("'{nth}': {error}"))?;
    Ok(Fault { step, nth, action })
}

/// What shall happen, and what has been reached.
#[derive(Debug, Default)]
struct Plan {
    text: String,
    faults: Vec<Fault>,
    reached: HashMap<Step, u64>,
}

impl Plan {
    fn read(text: String) -> Result<Self, String> {
        Ok(Self { faults: parse(text.trim())?, text, reached: HashMap::new() })
    }

    /// Counts that `step` is reached, and says how often it was and what shall happen.
    fn reach(&mut self, step: Step) -> (u64, Option<Action>) {
        let reached = self.reached.entry(step).or_default();
        *reached += 1;
        let nth = *reached;
        let fault = self.faults.iter().find(|fault| fault.step == step && fault.nth == nth);
        (nth, fault.map(|fault| fault.action.clone()))
    }
}

#[derive(Debug, Default)]
struct Points {
    /// Where the plan is read anew for each migration.
    file: Option<PathBuf>,
    plan: Mutex<Plan>,
    /// Connections to those who will hold this process.
    holders: Mutex<HashMap<PathBuf, UnixStream>>,
    log: Option<File>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Points {
    fn from_environment() -> Result<Self, String> {
        let text = std::env::var(FAULTS).unwrap_or_default();
        let open = |path| OpenOptions::new().append(true).create(true).open(path);
        let log = std::env::var_os(LOG).map(open).transpose().map_err(|error| error.to_string())?;
        let points = Self { log, ..Self::default() };
        match text.strip_prefix('@') {
            Some(file) => Ok(Self { file: Some(file.into()), ..points }),
            None => {
                points.follow(text)?;
                Ok(points)
            }
        }
    }

    /// Follows another plan from now on, and counts anew.
    fn follow(&self, text: String) -> Result<(), String> {
        let plan = Plan::read(text)?;
        for fault in &plan.faults {
            if let Action::Hold(path) = &fault.action {
                let stream =
                    UnixStream::connect(path).map_err(|error| format!("{}: {error}", path.display()))?;
                locked(&self.holders).insert(path.clone(), stream);
            }
        }
        *locked(&self.plan) = plan;
        Ok(())
    }

    /// Reads the plan's file, if there is one, when a migration begins; the same plan goes on counting.
    fn look(&self, step: Step) -> Result<(), String> {
        let begins = [Step::Source(SourceStep::Connects), Step::Receives(MessageType::Hello)].contains(&step);
        let Some(file) = self.file.as_ref().filter(|_| begins) else { return Ok(()) };
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let is_new = locked(&self.plan).text != text;
        if is_new { self.follow(text) } else { Ok(()) }
    }

    /// Counts that `step` is reached, and says what shall happen.
    fn reach(&self, step: Step) -> Option<Action> {
        self.look(step).unwrap_or_else(|why| give_up(&why));
        let (nth, action) = locked(&self.plan).reach(step);
        if let Some(mut log) = self.log.as_ref() {
            // One write a line, so that lines of several threads don't mix.
            let _ = log.write_all(format!("{step}:{nth}\n").as_bytes());
        }
        action
    }
}

/// A test that names a fault that there is not must not pass because nothing happens.
fn give_up(why: &str) -> ! {
    eprintln!("ferry: {FAULTS}: {why}");
    std::process::abort();
}

fn points() -> &'static Points {
    static POINTS: OnceLock<Points> = OnceLock::new();
    POINTS.get_or_init(|| Points::from_environment().unwrap_or_else(|why| give_up(&why)))
}

fn signal(signal: Signal) {
    // raise() is for the calling thread, and these signals are for the whole process whoever gets them.
    raise(signal).expect("a process may signal itself");
}

fn hold(path: &PathBuf, step: Step) {
    let holder = locked(&points().holders).remove(path);
    let Some(mut holder) = holder else { return };
    let mut hold = || holder.write_all(format!("{step}\n").as_bytes()).and_then(|()| holder.read(&mut [0]));
    // Only what comes to the step is held, not the connections that the same thread of the runtime looks after.
    if let Err(error) = tokio::task::block_in_place(&mut hold) {
        tracing::warn!("nobody holds this process at {step} through {}: {error}", path.display());
    }
}

/// A step is reached.
pub(crate) fn point(step: Step) {
    let _ = try_point(step);
}

/// A step is reached that can fail.
pub(crate) fn try_point(step: Step) -> io::Result<()> {
    match points().reach(step) {
        Some(Action::Kill) => signal(Signal::SIGKILL),
        Some(Action::Stop) => signal(Signal::SIGSTOP),
        Some(Action::Hold(path)) => hold(&path, step),
        Some(Action::Fail) => return Err(Errno::ENOSPC.into()),
        Some(Action::Damage) | None => {}
    }
    Ok(())
}

/// A step is reached; whether what it has done shall be damaged.
pub(crate) fn damages(step: Step) -> bool {
    match points().reach(step) {
        Some(Action::Damage) => return true,
        Some(Action::Kill) => signal(Signal::SIGKILL),
        Some(Action::Stop) => signal(Signal::SIGSTOP),
        Some(Action::Hold(path)) => hold(&path, step),
        Some(Action::Fail) | None => {}
    }
    false
}

/// A message was written to its connection.
pub(crate) fn sent(bytes: &[u8]) {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    if let Ok(Some(message)) = decoder.next_message() {
        point(Step::Sent(message.message_type()));
    }
}

/// The source's core is about to hear of an event.
pub(crate) fn source_event(event: &source::Event) {
    use source::Event;
    let step = match event {
        Event::Message(message) => return point(Step::Receives(message.message_type())),
        Event::Connected => SourceStep::Connected,
        Event::Disconnected(_) => SourceStep::Disconnected,
        Event::StreamsOpened => SourceStep::StreamsOpened,
        Event::StreamFailed(_) => SourceStep::StreamFailed,
        Event::DirtyLogStarted => SourceStep::DirtyLogStarted,
        Event::DirtyLogRead { .. } => SourceStep::DirtyLogRead,
        Event::RoundSent(_) => SourceStep::RoundEnds,
        Event::Paused => SourceStep::Paused,
        Event::StateSaved { .. } => SourceStep::Saved,
        Event::WitnessSays(_) => SourceStep::WitnessSays,
        Event::WitnessSilent(_) => SourceStep::WitnessSilent,
        Event::Resolve(_) => SourceStep::Resolved,
        Event::VmResumed => SourceStep::Resumed,
        Event::Cancel => SourceStep::Cancelled,
        // Records have points of their own, and the rest is what nothing was done for.
        Event::RecordWritten { .. }
        | Event::RecordFailed(_)
        | Event::RecordRehearsed { .. }
        | Event::RehearsalFailed(_)
        | Event::VmFailed(_)
        | Event::ResumeFailed(_)
        | Event::Timeout => return,
    };
    point(Step::Source(step));
}

/// The source is about to carry out an action.
pub(crate) fn source_action(action: &source::Action) {
    use source::Action;
    let step = match action {
        Action::Send(message) | Action::SendMemory(message) => {
            return point(Step::Sends(message.message_type()));
        }
        Action::Connect { .. } => SourceStep::Connects,
        Action::OpenStreams { .. } => SourceStep::OpensStreams,
        Action::CloseStreams => SourceStep::ClosesStreams,
        Action::ReopenStreams { .. } => SourceStep::ReopensStreams,
        Action::StartDirtyLog => SourceStep::StartsDirtyLog,
        Action::ReadDirtyLog => SourceStep::ReadsDirtyLog,
        Action::StopDirtyLog => SourceStep::StopsDirtyLog,
        Action::SendPages { .. } => SourceStep::RoundStarts,
        Action::PauseVm => SourceStep::Pauses,
        Action::SaveState => SourceStep::Saves,
        Action::ResumeVm => SourceStep::Resumes,
        Action::AskWitness(_) => SourceStep::AsksWitness,
        Action::ReleaseVm => SourceStep::Releases,
        Action::Finish(_) => SourceStep::Finishes,
        Action::WriteRecord(_) | Action::RehearseRecord(_) | Action::Report(_) => return,
    };
    point(Step::Source(step));
}

/// The target's core is about to hear of an event.
pub(crate) fn target_event(event: &target::Event) {
    use target::Event;
    let step = match event {
        Event::Message(message) => return point(Step::Receives(message.message_type())),
        Event::Disconnected(_) => TargetStep::Disconnected,
        Event::Reconnected => TargetStep::Reconnected,
        Event::MachineBuilt => TargetStep::Built,
        Event::FenceReached { .. } => TargetStep::FenceReached,
        Event::StreamFailed { .. } => TargetStep::StreamFailed,
        Event::StreamsEnded { .. } => TargetStep::StreamsEnded,
        Event::StateRestored { .. } => TargetStep::Restored,
        Event::WitnessProbed { .. } => TargetStep::WitnessProbed,
        Event::WitnessSays(_) => TargetStep::WitnessSays,
        Event::WitnessSilent(_) => TargetStep::WitnessSilent,
        Event::VmRunning { .. } => TargetStep::Running,
        Event::Cancel => TargetStep::Cancelled,
        Event::BuildFailed { .. }
        | Event::RestoreFailed(_)
        | Event::RecordWritten { .. }
        | Event::RecordFailed(_)
        | Event::RecordRehearsed { .. }
        | Event::RehearsalFailed(_)
        | Event::RunFailed(_)
        | Event::RunBroke(_)
        | Event::Timeout => return,
    };
    point(Step::Target(step));
}

/// The target is about to carry out an action.
pub(crate) fn target_action(action: &target::Action) {
    use target::Action;
    let step = match action {
        Action::Send(message) => return point(Step::Sends(message.message_type())),
        Action::BuildMachine { .. } | Action::AdoptMemory { .. } => TargetStep::Builds,
        Action::EndStreams => TargetStep::EndsStreams,
        Action::ExpectStreams { .. } => TargetStep::ExpectsStreams,
        Action::HangUp => TargetStep::HangsUp,
        Action::DropStaleFrames => TargetStep::DropsStaleFrames,
        Action::RestoreState(_) => TargetStep::Restores,
        Action::ProbeWitness => TargetStep::ProbesWitness,
        Action::AskWitness(_) => TargetStep::AsksWitness,
        Action::RunVm { .. } => TargetStep::Runs,
        Action::Announce(_) => TargetStep::Announces,
        Action::DiscardMachine => TargetStep::Discards,
        Action::Finish(_) => TargetStep::Finishes,
        Action::WriteRecord(_) | Action::RehearseRecord(_) | Action::Report(_) => return,
    };
    point(Step::Target(step));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_as_they_are_documented() {
        let faults = parse("sends-commit:1:kill,target-frame-arrives:3:hold=/run/a:b").unwrap();
        assert_eq!(faults.len(), 2);
        assert_eq!(faults[1].step, Step::Target(TargetStep::FrameArrives));
        assert_eq!((faults[1].nth, &faults[1].action), (3, &Action::Hold("/run/a:b".into())));
        assert_eq!(parse("").unwrap(), []);
        for bad in
            ["sends-commit", "sends-commit:1", "sends-commit:x:kill", "sends:1:kill", "sends-commit:1:maim"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fault_happens_once() {
        let points = Points::default();
        points.follow("source-pauses:2:fail".to_owned()).unwrap();
        let step = Step::Source(SourceStep::Pauses);
        let happens: Vec<bool> = (0..4).map(|_| points.reach(step).is_some()).collect();
        assert_eq!(happens, [false, true, false, false]);
        assert_eq!(points.reach(Step::Source(SourceStep::Paused)), None);
    }

    #[test]
    fn a_new_plan_counts_for_the_next_migration() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |text: &str| std::fs::write(file.path(), text).unwrap();
        let points = Points { file: Some(file.path().to_owned()), ..Points::default() };
        let (connects, pauses) = (Step::Source(SourceStep::Connects), Step::Source(SourceStep::Pauses));
        write("source-pauses:1:fail # first");
        assert_eq!(points.reach(connects), None);
        write("source-pauses:1:kill # second");
        assert_eq!(points.reach(pauses), Some(Action::Fail));
        assert_eq!(points.reach(pauses), None);
        // The next migration begins.
        assert_eq!(points.reach(connects), None);
        assert_eq!(points.reach(pauses), Some(Action::Kill));
        // It connects again, and the plan is the same.
        assert_eq!(points.reach(connects), None);
        assert_eq!(points.reach(pauses), None);
    }
}
