//! One process of Cloud Hypervisor with its API and its events.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use ferry_lab::LabClock;
use serde_json::Value;

use super::api::Api;
use super::events::EventFile;
use crate::engine::process::Process;
use crate::engine::{EngineError, PairOrder, Place};
use crate::scenario::MemoryBacking;

/// How long it may take to answer at its socket, and then to run its guest.
const UP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to answer a question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is looked whether it is up.
const UP_POLL: Duration = Duration::from_millis(5);

/// Which of the two it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// It boots the guest.
    Source,
    /// It waits for it.
    Target,
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// A running process.
#[derive(Debug)]
pub(super) struct Vmm {
    engine: String,
    side: Side,
    process: Process,
    pub(super) api: Api,
    pub(super) events: EventFile,
    pub(super) log: PathBuf,
    command_line: String,
}

impl Vmm {
    /// Starts `program` and waits until it answers.
    pub(super) fn start(
        engine: &str,
        side: Side,
        program: &Path,
        order: &PairOrder<'_>,
    ) -> Result<Self, EngineError> {
        let place = match side {
            Side::Source => &order.source,
            Side::Target => &order.target,
        };
        let file = |ending: &str| order.folder.join(format!("{}.{ending}", side.name()));
        let (socket, events, log) = (file("api"), file("events"), file("log"));
        let arguments = arguments(side, place, order, &socket, &events);
        let process = Process::start(place.namespace, program, &arguments, &log)?;
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        let command_line = format!("{}: {} {}", side.name(), program.display(), words.join(" "));
        let mut vmm = Self {
            engine: engine.to_owned(),
            side,
            process,
            api: Api::at(&socket),
            events: EventFile::at(&events),
            log,
            command_line,
        };
        vmm.until("answers at its socket", |vmm| vmm.api.get("vmm.ping", ANSWER_TIMEOUT).is_ok())?;
        Ok(vmm)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Waits until the guest runs.
    pub(super) fn until_running(&mut self) -> Result<(), EngineError> {
        let runs = |info: Value| info.get("state").and_then(Value::as_str) == Some("Running");
        self.until("runs its guest", |vmm| vmm.api.get("vm.info", ANSWER_TIMEOUT).is_ok_and(runs))
    }

    /// Waits for what comes soon, if the process lives.
    pub(super) fn until(
        &mut self,
        what: &str,
        mut is_so: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), EngineError> {
        let clock = LabClock::start();
        loop {
            let ended = self.process.ended();
            if is_so(self) {
                return Ok(());
            }
            if let Some(status) = ended {
                return Err(self.broken(&format!("it ended with {status} before it {what}")));
            }
            if clock.now() >= UP_TIMEOUT {
                return Err(self.broken(&format!(
                    "after {} s it has not come to where it {what}",
                    UP_TIMEOUT.as_secs()
                )));
            }
            thread::sleep(UP_POLL);
        }
    }

    /// Reads the events that have been written since.
    pub(super) fn read_events(&mut self, clock: LabClock) -> Result<(), EngineError> {
        let read = self.events.read(clock);
        read.map_err(|error| self.broken(&format!("its events can't be read: {error}")))
    }

    /// Whether it has ended. It is not waited for, so that what it used can still be asked.
    pub(super) fn has_ended(&self) -> bool {
        let stat = i32::try_from(self.pid()).ok().map(|pid| procfs::process::Process::new(pid)?.stat());
        !stat.is_some_and(|stat| stat.is_ok_and(|stat| stat.state != 'Z'))
    }

    pub(super) fn last_words(&self) -> String {
        self.process.last_words()
    }

    pub(super) fn broken(&self, what: &str) -> EngineError {
        let words = self.last_words();
        let what = if words.is_empty() { what.to_owned() } else { format!("{what}; it says: {words}") };
        EngineError::Broken { engine: self.engine.clone(), side: self.side.name(), what }
    }
}

/// The command line. The target learns all of its guest from the source.
fn arguments(
    side: Side,
    place: &Place<'_>,
    order: &PairOrder<'_>,
    socket: &Path,
    events: &Path,
) -> Vec<OsString> {
    let with_path = |before: &str, path: &Path| {
        let mut word = OsString::from(before);
        word.push(path);
        word
    };
    // The first level of its log. The second would have the downtime by part, but also a line for every range of
    // dirty pages, and the source would spend its time on that.
    let shared = if order.setting.memory == MemoryBacking::Shared { ",shared=on" } else { "" };
    let mut words: Vec<OsString> = vec![
        "-v".into(),
        "--api-socket".into(),
        with_path("path=", socket),
        "--event-monitor".into(),
        with_path("path=", events),
    ];
    if side == Side::Target {
        return words;
    }
    words.extend([
        "--kernel".into(),
        order.guest.kernel.clone().into(),
        "--cmdline".into(),
        order.guest.cmdline.clone().into(),
        "--memory".into(),
        format!("size={}M,thp=on{shared}", order.scenario.memory_mib).into(),
        "--cpus".into(),
        format!("boot={}", order.scenario.cpus).into(),
        "--serial".into(),
        with_path("file=", &order.guest.serial),
        "--console".into(),
        "off".into(),
    ]);
    if let Some(initrd) = &order.guest.initrd {
        words.extend(["--initramfs".into(), initrd.clone().into()]);
    }
    if let Some((tap, mac)) = place.net {
        words.extend(["--net".into(), format!("tap={tap},mac={mac}").into()]);
    }
    words
}
