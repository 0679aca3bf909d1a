//! Cloud Hypervisor, through its API socket.
//!
//! ```text
//!   start    source: --kernel ...         target: vm.receive-migration tcp:ADDR:PORT
//!   migrate  source: vm.send-migration tcp:ADDR:PORT ─ (events) ─ migration-finished, and the process ends
//!            target: (events) ─ migration-receive-finished
//! ```
//!
//! The API tells nothing of a migration that is under way, and from version 53 on not even when it has ended. So its
//! moments are taken from the files of both event monitors, and its figures from the source's log.
//!
//! Left out: local migration over a Unix socket, which shares memory instead of moving it, disks and TLS.

pub mod api;
mod events;
mod pair;
mod rounds;
mod vmm;
mod words;

use std::path::PathBuf;

use self::pair::CloudHypervisorPair;
use super::{Engine, EngineError, Pair, PairOrder, program};
use crate::results::EngineInfo;
use crate::scenario::{Compression, EngineConfig, EngineSetting, Guest, MemoryBacking, Strategy};

/// The usual name of its binary.
const BINARY: &str = "cloud-hypervisor";

/// The first version that takes a downtime budget, a timeout and a number of connections.
const BUDGET_SINCE: u32 = 52;

/// The first version with post-copy.
const POST_COPY_SINCE: u32 = 53;

/// The most connections that it makes.
const CONNECTIONS_MAX: u16 = 128;

/// Cloud Hypervisor as it was found.
#[derive(Debug)]
pub struct CloudHypervisor {
    info: EngineInfo,
    /// Unknown where it does not say so in the usual way; it is then taken for the newest.
    major: Option<u32>,
}

impl CloudHypervisor {
    /// Looks for the binary that `config` names, or for the usual one in PATH.
    #[must_use]
    pub fn find(config: &EngineConfig) -> Self {
        let info = program::look_for(config, BINARY);
        let major = info.version.as_deref().and_then(program::major_minor).map(|(major, _)| major);
        Self { info, major }
    }

    fn supports(&self, order: &PairOrder<'_>) -> Result<(), String> {
        let EngineSetting {
            engine: _,
            strategy,
            streams,
            compression,
            bandwidth_mbit_s,
            // It has no check to leave out.
            verify: _,
            memory,
            local,
        } = order.setting;
        let Some(streams) = streams.fixed() else {
            return Err("choosing the number of its connections".to_owned());
        };
        if *local {
            return Err("handing memory over within one host in a way that is measured here".to_owned());
        }
        if *memory == MemoryBacking::Hugepages {
            return Err("huge pages in a way that is measured here".to_owned());
        }
        if self.is_before(BUDGET_SINCE) {
            return Err(format!("a downtime budget before version {BUDGET_SINCE}"));
        }
        match strategy {
            Strategy::PreCopy => {}
            Strategy::AutoConverge => return Err("slowing vCPUs down".to_owned()),
            Strategy::PostCopy if self.is_before(POST_COPY_SINCE) => {
                return Err(format!("post-copy before version {POST_COPY_SINCE}"));
            }
            Strategy::PostCopy if streams > 1 => return Err("post-copy over several streams".to_owned()),
            Strategy::PostCopy => {}
        }
        if streams > CONNECTIONS_MAX {
            return Err(format!("more than {CONNECTIONS_MAX} streams"));
        }
        match compression {
            Compression::None => {}
            Compression::Auto | Compression::Lz4 | Compression::Zstd | Compression::Xbzrle => {
                return Err("packing pages".to_owned());
            }
        }
        if bandwidth_mbit_s.is_some() {
            return Err("a limit on its bandwidth".to_owned());
        }
        if order.source.net.is_some() && matches!(order.guest.guest, Guest::Workload(_)) {
            return Err("virtio-mmio, and the workload guest's network for virtio-pci".to_owned());
        }
        Ok(())
    }

    fn is_before(&self, major: u32) -> bool {
        self.major.is_some_and(|own| own < major)
    }
}

impl Engine for CloudHypervisor {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        let unsupported = |what| EngineError::Unsupported { engine: self.info.name.clone(), what };
        if let Some(why) = &self.info.absent {
            return Err(unsupported(why.clone()));
        }
        self.supports(order)
            .map_err(|what| unsupported(format!("Cloud Hypervisor has no support for {what}")))?;
        let program = PathBuf::from(self.info.binary.as_deref().unwrap_or(BINARY));
        let answers_at_once = !self.is_before(POST_COPY_SINCE);
        Ok(Box::new(CloudHypervisorPair::start(&self.info.name, &program, order, answers_at_once)?))
    }
}
