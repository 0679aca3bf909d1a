//! Cloud Hypervisor, through its API socket.

use super::{Engine, EngineError, Pair, PairOrder, program};
use crate::results::EngineInfo;
use crate::scenario::EngineConfig;

/// The usual name of its binary.
const BINARY: &str = "cloud-hypervisor";

/// Cloud Hypervisor as it was found.
#[derive(Debug)]
pub struct CloudHypervisor {
    info: EngineInfo,
}

impl CloudHypervisor {
    /// Looks for the binary that `config` names, or for the usual one in PATH.
    #[must_use]
    pub fn find(config: &EngineConfig) -> Self {
        Self { info: program::look_for(config, BINARY) }
    }
}

impl Engine for CloudHypervisor {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, _order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        Err(EngineError::Unsupported { engine: self.info.name.clone(), what: "being driven".to_owned() })
    }
}
