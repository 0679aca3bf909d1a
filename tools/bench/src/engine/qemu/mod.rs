//! QEMU, through QMP.
//!
//! ```text
//!   start    source: -kernel ...          target: -incoming defer, migrate-incoming tcp:ADDR:0 ──> port
//!            both:   capabilities and parameters, the same on either side
//!   migrate  source: migrate tcp:ADDR:PORT ─ MIGRATION_PASS, query-migrate ... ─ MIGRATION completed
//!            target: RESUME
//! ```
//!
//! Written against 7.2 and tried with 10.0; names that changed since 4.0 are not used. Left out: disks, TLS,
//! zero-copy and RDMA, and tuning beyond what a scenario asks for.

mod pair;
mod progress;
pub mod qmp;
mod settings;
mod vm;

use std::path::PathBuf;

use self::pair::QemuPair;
use self::settings::Settings;
use super::{Engine, EngineError, Pair, PairOrder, program};
use crate::results::EngineInfo;
use crate::scenario::EngineConfig;

/// The usual name of its binary.
const BINARY: &str = "qemu-system-x86_64";

/// QEMU as it was found.
#[derive(Debug)]
pub struct Qemu {
    info: EngineInfo,
    version: Option<(u32, u32)>,
}

impl Qemu {
    /// Looks for the binary that `config` names, or for the usual one in PATH.
    #[must_use]
    pub fn find(config: &EngineConfig) -> Self {
        let info = program::look_for(config, BINARY);
        let version = info.version.as_deref().and_then(program::major_minor);
        Self { info, version }
    }
}

impl Engine for Qemu {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        let unsupported = |what| EngineError::Unsupported { engine: self.info.name.clone(), what };
        if let Some(why) = &self.info.absent {
            return Err(unsupported(why.clone()));
        }
        let settings = Settings::of(order.scenario, order.setting, self.version)
            .map_err(|what| unsupported(format!("QEMU has no support for {what}")))?;
        let program = PathBuf::from(self.info.binary.as_deref().unwrap_or(BINARY));
        Ok(Box::new(QemuPair::start(&self.info.name, &program, order, settings)?))
    }
}
