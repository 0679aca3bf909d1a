//! Measuring from outside the engines, the same way for all: nothing here asks an engine anything.
//!
//! - [`guest`]: the guest's own report, read out of a VMM's memory
//! - [`cost`]: CPU time by thread and peak memory of a process
//! - [`counters`]: bytes that crossed an interface
//! - [`idle`]: who else used the machine
//! - [`warm`]: memory that the host below has to give first
//! - [`sampler`]: all of that over time
//! - [`clients`]: what users of the guest see

pub mod clients;
pub mod cost;
pub mod counters;
pub mod guest;
pub mod idle;
pub mod sampler;
pub mod warm;

use std::io;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The kernel's files on a process could not be read.
    #[error("can't read {what} of process {pid}; it may have ended, or it takes root")]
    Process {
        /// What was to be read.
        what: &'static str,
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No mapping of the process has a guest's report.
    #[error("process {pid} has no guest memory with the workload guest's report page")]
    NoReport {
        /// The process.
        pid: u32,
    },
    /// An interface's counters could not be read.
    #[error("can't read the counters of interface '{interface}'")]
    Counters {
        /// The interface.
        interface: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The machine's own statistics could not be read.
    #[error("can't read /proc/stat")]
    Machine {
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A load or a probe could not start.
    #[error("can't start {what}")]
    Client {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The sampling thread could not start.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
}
