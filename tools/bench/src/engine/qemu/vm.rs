//! One QEMU process with its command line and its QMP connection.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use ferry_lab::LabClock;
use serde_json::{Value, json};

use super::qmp::{Event, Qmp, QmpError};
use super::settings::Settings;
use crate::engine::process::Process;
use crate::engine::{EngineError, PairOrder, Place};
use crate::scenario::MemoryBacking;

/// How long QEMU may take to open its socket, and then to run its guest.
const UP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to answer a command.
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

/// A running QEMU.
#[derive(Debug)]
pub(super) struct Vm {
    engine: String,
    side: Side,
    process: Process,
    qmp: Qmp,
    command_line: String,
}

impl Vm {
    /// Starts `program`, connects to it and makes its migration settings.
    pub(super) fn start(
        engine: &str,
        side: Side,
        program: &Path,
        order: &PairOrder<'_>,
        settings: &Settings,
    ) -> Result<Self, EngineError> {
        let place = match side {
            Side::Source => &order.source,
            Side::Target => &order.target,
        };
        let socket = order.folder.join(format!("{}.qmp", side.name()));
        let arguments = arguments(side, place, order, &socket);
        let log = order.folder.join(format!("{}.log", side.name()));
        let mut process = Process::start(place.namespace, program, &arguments, &log)?;
        let qmp = connect(&mut process, &socket).map_err(|what| broken(engine, side, &process, what))?;
        let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        let command_line = format!("{}: {} {}", side.name(), program.display(), words.join(" "));
        let mut vm = Self { engine: engine.to_owned(), side, process, qmp, command_line };
        vm.prefer(settings)?;
        Ok(vm)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Waits until the guest runs.
    pub(super) fn until_running(&mut self) -> Result<(), EngineError> {
        let clock = LabClock::start();
        while !self.is_running()? {
            if clock.now() >= UP_TIMEOUT {
                return Err(self.broken("its guest does not run"));
            }
            thread::sleep(UP_POLL);
        }
        Ok(())
    }

    pub(super) fn is_running(&mut self) -> Result<bool, EngineError> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status.get("status").and_then(Value::as_str) == Some("running"))
    }

    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, EngineError> {
        let answer = self.qmp.execute(command, arguments);
        answer.map_err(|error| self.broken(&in_words(&error)))
    }

    /// Executes `command`, which QEMU may refuse: its words are then what comes back.
    pub(super) fn try_execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Result<Value, String>, EngineError> {
        match self.qmp.execute(command, arguments) {
            Ok(value) => Ok(Ok(value)),
            Err(QmpError::Refused { description, .. }) => Ok(Err(description)),
            Err(error) => Err(self.broken(&in_words(&error))),
        }
    }

    pub(super) fn wait_event(&mut self, timeout: Duration) -> Result<Option<Event>, EngineError> {
        let event = self.qmp.wait_event(timeout);
        event.map_err(|error| self.broken(&in_words(&error)))
    }

    /// The end of what the process said.
    pub(super) fn last_words(&self) -> String {
        self.process.last_words()
    }

    pub(super) fn broken(&self, what: &str) -> EngineError {
        broken(&self.engine, self.side, &self.process, what.to_owned())
    }

    fn prefer(&mut self, settings: &Settings) -> Result<(), EngineError> {
        let commands = [
            ("migrate-set-capabilities", settings.capabilities_argument()),
            ("migrate-set-parameters", Value::Object(settings.parameters.clone())),
        ];
        for (command, argument) in commands {
            // What the setting asks for is right by itself, so this QEMU, or this machine, can't do it.
            self.try_execute(command, argument)?.map_err(|words| EngineError::Unsupported {
                engine: self.engine.clone(),
                what: format!("the {} refuses {command}: {words}", self.side.name()),
            })?;
        }
        Ok(())
    }
}

fn connect(process: &mut Process, socket: &Path) -> Result<Qmp, String> {
    let clock = LabClock::start();
    loop {
        // Asked before the attempt, so that a process that ends after it was refused is tried once more.
        let ended = process.ended();
        match Qmp::connect(socket, ANSWER_TIMEOUT) {
            Ok(qmp) => return Ok(qmp),
            Err(QmpError::Connect { .. }) if ended.is_none() && clock.now() < UP_TIMEOUT => {
                thread::sleep(UP_POLL);
            }
            Err(error) => {
                let ended = ended.map(|status| format!("; it ended with {status}")).unwrap_or_default();
                return Err(format!("{}{ended}", in_words(&error)));
            }
        }
    }
}

fn broken(engine: &str, side: Side, process: &Process, what: String) -> EngineError {
    let words = process.last_words();
    let what = if words.is_empty() { what } else { format!("{what}; it says: {words}") };
    EngineError::Broken { engine: engine.to_owned(), side: side.name(), what }
}

/// An error with its causes on one line.
fn in_words(error: &QmpError) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

/// The command line: both sides have the same machine, only the source has a guest to boot.
fn arguments(side: Side, place: &Place<'_>, order: &PairOrder<'_>, socket: &Path) -> Vec<OsString> {
    // Guests learn of virtio-mmio devices from the command line, which QEMU adds only in the absence of ACPI.
    let acpi = if place.net.is_some() { ",acpi=off" } else { "" };
    let mut words: Vec<OsString> = vec![
        "-M".into(),
        format!("microvm,pit=off,pic=off,rtc=off{acpi}").into(),
        "-accel".into(),
        "kvm".into(),
        // The host's capabilities register can't be set on every back end of KVM.
        "-cpu".into(),
        "host,-arch-capabilities".into(),
        "-m".into(),
        order.scenario.memory_mib.to_string().into(),
        "-smp".into(),
        order.scenario.cpus.to_string().into(),
        "-nodefaults".into(),
        "-no-user-config".into(),
        "-display".into(),
        "none".into(),
        "-name".into(),
        format!("ferry-bench-{},debug-threads=on", side.name()).into(),
        "-qmp".into(),
        with_path("unix:", &doubled(socket), ",server=on,wait=off"),
        "-kernel".into(),
        order.guest.kernel.clone().into(),
        "-append".into(),
        order.guest.cmdline.clone().into(),
    ];
    if let Some(initrd) = &order.guest.initrd {
        words.extend(["-initrd".into(), initrd.clone().into()]);
    }
    let serial = match side {
        Side::Source => order.guest.serial.clone(),
        Side::Target => order.folder.join("target-serial.log"),
    };
    words.extend(["-serial".into(), with_path("file:", &serial, "")]);
    if let Some((tap, mac)) = place.net {
        words.extend([
            "-netdev".into(),
            format!("tap,id=n0,ifname={tap},script=no,downscript=no").into(),
            "-device".into(),
            format!("virtio-net-device,netdev=n0,mac={mac}").into(),
        ]);
    }
    if order.setting.memory == MemoryBacking::Shared {
        words.extend([
            "-object".into(),
            format!("memory-backend-memfd,id=ram,share=on,size={}M", order.scenario.memory_mib).into(),
            "-machine".into(),
            "memory-backend=ram".into(),
        ]);
    }
    if side == Side::Target {
        words.extend(["-incoming".into(), "defer".into()]);
    }
    words
}

fn with_path(before: &str, path: &Path, after: &str) -> OsString {
    let mut word = OsString::from(before);
    word.push(path);
    word.push(after);
    word
}

/// A path as QEMU's options take it, where a comma ends a value.
fn doubled(path: &Path) -> PathBuf {
    path.to_str().map_or_else(|| path.to_owned(), |text| text.replace(',', ",,").into())
}
