//! Bare TCP: what the machine and the link can carry, measured in the same rotation as the engines.
//!
//! ```text
//!   source: 1 MiB writes from a warm buffer ── N connections ──> target: reads into a warm buffer, discards
//!   source <── how much it has read ── target, on each connection
//! ```
//!
//! Two processes ([`crate::worker::tcp`]) on the same hosts and the same link. There is no guest: nothing is read from
//! memory, kept, packed or checked, which is what makes it a bound and not a competitor.

pub mod words;

use std::net::SocketAddr;
use std::time::Duration;

use ferry_lab::LabClock;

use self::words::{Said, SendOrder, SourceOrder, TargetOrder};
use super::worker::Worker;
use super::{Ending, Engine, EngineError, EngineReport, Pair, PairOrder};
use crate::results::EngineInfo;
use crate::scenario::{
    Compression, EngineConfig, EngineKind, EngineSetting, MemoryBacking, Scenario, Strategy,
};

/// How long a worker may take to be ready.
const UP_TIMEOUT: Duration = Duration::from_secs(10);

/// The most connections: each has two threads.
const STREAMS_MAX: u16 = 64;

/// Bare TCP as this program does it.
#[derive(Debug)]
pub struct Tcp {
    info: EngineInfo,
}

impl Tcp {
    /// It is always there.
    #[must_use]
    pub fn find(config: &EngineConfig) -> Self {
        let binary = std::env::current_exe().ok().map(|path| path.display().to_string());
        let info = EngineInfo {
            name: config.name.clone(),
            kind: EngineKind::Tcp,
            version: Some(format!("ferry-bench {}", env!("CARGO_PKG_VERSION"))),
            binary,
            absent: None,
        };
        Self { info }
    }
}

/// The connections that `setting` asks for; in words what it can't do.
fn streams_of(setting: &EngineSetting) -> Result<u16, String> {
    let EngineSetting {
        engine: _,
        strategy,
        streams,
        compression,
        bandwidth_mbit_s,
        // There is no memory that could be checked.
        verify: _,
        memory,
        local,
    } = setting;
    let has_more = *strategy != Strategy::PreCopy
        || *compression != Compression::None
        || *memory != MemoryBacking::Private
        || bandwidth_mbit_s.is_some()
        || *local;
    if has_more {
        return Err("it sends bytes over connections and knows no other setting".to_owned());
    }
    match streams.fixed() {
        Some(count) if (1..=STREAMS_MAX).contains(&count) => Ok(count),
        Some(_) => Err(format!("it has at most {STREAMS_MAX} streams")),
        None => Err("it does not choose the number of streams".to_owned()),
    }
}

impl Engine for Tcp {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        let name = &self.info.name;
        let streams = streams_of(order.setting)
            .map_err(|what| EngineError::Unsupported { engine: name.clone(), what })?;
        let bytes = Scenario::tcp_bytes(order.scenario);
        let to_do = SourceOrder { bytes, streams };
        let source = Worker::start((name, "tcp", "source"), &order.source, order, &to_do)?;
        source.expect(UP_TIMEOUT, |said| (said == Said::Ready).then_some(()))?;
        let to_do = TargetOrder { listen: order.target.address, streams };
        let target = Worker::start((name, "tcp", "target"), &order.target, order, &to_do)?;
        let address = target.expect(UP_TIMEOUT, |said| match said {
            Said::Listening { address } => Some(address),
            Said::Ready | Said::Sent { .. } | Said::Failed { .. } => None,
        })?;
        let timeout = Duration::from_secs_f64(order.scenario.timeout_s);
        Ok(Box::new(TcpPair { source, target, address, bytes, streams, timeout }))
    }
}

#[derive(Debug)]
struct TcpPair {
    source: Worker<Said>,
    target: Worker<Said>,
    address: SocketAddr,
    bytes: u64,
    streams: u16,
    timeout: Duration,
}

impl Pair for TcpPair {
    fn source_pid(&self) -> u32 {
        self.source.pid()
    }

    fn target_pid(&self) -> u32 {
        self.target.pid()
    }

    fn flags(&self) -> Vec<String> {
        vec![format!("target={} streams={} bytes={}", self.address, self.streams, self.bytes)]
    }

    fn has_guest(&self) -> bool {
        false
    }

    fn is_vcpu(&self, _thread: &str) -> bool {
        false
    }

    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError> {
        let ordered = clock.now();
        self.source.tell(&SendOrder { target: self.address })?;
        let said = self.source.hear(self.timeout)?;
        let done = clock.now();
        let (ending, wire_bytes) = match said {
            Some(Said::Sent { bytes }) if bytes == self.bytes => (Ending::Moved, Some(bytes)),
            Some(Said::Sent { bytes }) => {
                (Ending::Failed(format!("{bytes} of {} bytes arrived", self.bytes)), Some(bytes))
            }
            Some(Said::Failed { reason }) => (Ending::Failed(reason), None),
            Some(said @ (Said::Ready | Said::Listening { .. })) => {
                (Ending::Failed(format!("the source said {said:?}")), None)
            }
            None => (Ending::NotConverged, None),
        };
        Ok(EngineReport { ending, ordered, done, wire_bytes, ..EngineReport::default() })
    }
}
