//! The harness: migrates real guests with ferry and its peers, and measures from outside what that does to the
//! guest, to its clients and to the machine.
//!
//! ```text
//!  scenario/ (TOML) ──> runner ──> engine/ (ferry, QEMU, Cloud Hypervisor: two processes each)
//!                          │            ▲
//!                          │            │ /proc, guest memory, interface counters, clients
//!                          └──> measure/ ┘
//!                                  │
//!                                  ▼
//!                        results/ (JSON) ──> stats, report/ (HTML, CSV, terminal), compare
//!                                  └──────> simulate/ (the same core in virtual time)
//! ```

pub mod cli;
pub mod compare;
pub mod engine;
pub mod hosts;
pub mod measure;
pub mod report;
pub mod results;
pub mod runner;
pub mod scenario;
pub mod simulate;
pub mod stats;
pub mod worker;
