//! What an engine must be able to do to be measured. One file or folder an engine.
//!
//! ```text
//!  Engine::find ──> info            what was found, or why not
//!  Engine::start ─> Pair            source with the running guest, target waiting; two processes
//!  Pair::migrate ─> EngineReport    the one timed step; the engine's own words, nothing measured
//!  drop(Pair)                       both processes end
//! ```
//!
//! Engines only start, order and listen. What things cost and how long they took is measured from outside
//! ([`crate::measure`]), the same way for all.

pub mod cloud_hypervisor;
pub mod ferry;
pub mod process;
pub mod program;
pub mod qemu;
pub mod tcp;
mod worker;

use std::fmt::Debug;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_lab::{LabClock, Mac, Namespace};

use crate::results::{EngineInfo, Part, Round};
use crate::scenario::{EngineConfig, EngineKind, EngineSetting, Guest, Scenario};

/// Why a pair could not be started, or a migration not be ordered.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine can't do what is asked for.
    #[error("{engine} can't do this: {what}")]
    Unsupported {
        /// The engine.
        engine: String,
        /// What it lacks.
        what: String,
    },
    /// A process could not be started.
    #[error("can't start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A process ended or did not answer when it should have.
    #[error("{engine}, {side}: {what}")]
    Broken {
        /// The engine.
        engine: String,
        /// `source` or `target`.
        side: &'static str,
        /// What was tried and what came, with the process's last words.
        what: String,
    },
}

/// A program that migrates VMs, with its settings in this suite.
pub trait Engine: Debug + Send + Sync {
    /// What was found of it. It is not used if [`EngineInfo::absent`] says why.
    fn info(&self) -> &EngineInfo;

    /// Starts a source and waits until it runs its guest's kernel, and a target that waits for it. The guest's own
    /// readiness is awaited by the caller.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is left running then.
    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError>;
}

/// What to start.
#[derive(Debug)]
pub struct PairOrder<'a> {
    /// The scenario.
    pub scenario: &'a Scenario,
    /// The engine's settings in it.
    pub setting: &'a EngineSetting,
    /// The guest with its network addresses filled in.
    pub guest: &'a GuestBoot,
    /// Where the source runs.
    pub source: Place<'a>,
    /// Where the target runs.
    pub target: Place<'a>,
    /// An empty folder for sockets, logs and records. It goes away after the run.
    pub folder: &'a Path,
}

/// A host.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Its network namespace; all processes of this host are started in it.
    pub namespace: &'a Namespace,
    /// The address under which the other host reaches it.
    pub address: IpAddr,
    /// Its tap and the guest's MAC, if the guest has a network.
    pub net: Option<(&'a str, Mac)>,
}

/// What both engines boot: files, since peers take nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestBoot {
    /// What it was made from.
    pub guest: Guest,
    /// An ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// Where the source's serial console is to be written.
    pub serial: PathBuf,
}

/// A running source and a waiting target. Dropping it ends both processes and waits for them.
pub trait Pair: Send {
    /// The source's process id.
    fn source_pid(&self) -> u32;

    /// The target's process id.
    fn target_pid(&self) -> u32;

    /// Command lines and settings, for the record.
    fn flags(&self) -> Vec<String>;

    /// Whether the source runs the scenario's guest. What has none is only a baseline.
    fn has_guest(&self) -> bool;

    /// Whether a thread of that name runs a vCPU.
    fn is_vcpu(&self, thread: &str) -> bool;

    /// Migrates the guest; returns once the engine says that it runs at the target, or that it has given up, or
    /// cancels it after the scenario's timeout. Whatever can be prepared has been prepared by [`Engine::start`].
    ///
    /// # Errors
    /// [`EngineError`] if an order is not taken or a process breaks.
    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError>;
}

/// The engine's own words on a migration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineReport {
    /// How it ended, by the engine's word.
    pub ending: Ending,
    /// When the order was given and when the engine said that it was done, on the lab's clock.
    pub ordered: Duration,
    /// See [`EngineReport::ordered`].
    pub done: Duration,
    /// Its word on the downtime, in ms.
    pub downtime_ms: Option<f64>,
    /// The downtime by part.
    pub downtime_parts: Vec<Part>,
    /// What it had forecast.
    pub forecast_ms: Option<f64>,
    /// Bytes that it says it sent.
    pub wire_bytes: Option<u64>,
    /// Its rounds, with times since the order.
    pub rounds: Vec<Round>,
    /// How many rounds there were.
    pub round_count: Option<u32>,
    /// Pages left to send, each with its time since the order in ms.
    pub dirty_pages: Vec<(f64, f64)>,
    /// Whether it compared digests of all memory and found them equal.
    pub digest_equal: Option<bool>,
    /// Figures that only this engine has, by name with its unit.
    pub more: Vec<(String, f64)>,
}

/// How a migration ended, by the engine's word.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Ending {
    /// The guest runs at the target.
    #[default]
    Moved,
    /// The timeout came first.
    NotConverged,
    /// It failed.
    Failed(String),
}

/// A number that is meant to be whole and not below zero.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is rounded, and what is below is 0"
)]
fn whole(value: f64) -> u64 {
    value.round() as u64
}

/// The engine that `config` names.
#[must_use]
pub fn find(config: &EngineConfig) -> Box<dyn Engine> {
    match config.kind {
        EngineKind::Ferry => Box::new(ferry::Ferry::find(config)),
        EngineKind::Qemu => Box::new(qemu::Qemu::find(config)),
        EngineKind::CloudHypervisor => Box::new(cloud_hypervisor::CloudHypervisor::find(config)),
        EngineKind::Tcp => Box::new(tcp::Tcp::find(config)),
    }
}
