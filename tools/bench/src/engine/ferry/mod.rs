//! ferry, through its library, in two processes as its users have them ([`crate::worker::ferry`]).

pub mod words;

use std::net::SocketAddr;
use std::time::Duration;

use ferry_lab::LabClock;
use ferry_migrate::report::MigrationReport;

use self::words::{MoveOrder, Said, SourceOrder, TargetOrder};
use super::worker::Worker;
use super::{Ending, Engine, EngineError, EngineReport, Pair, PairOrder};
use crate::results::{EngineInfo, Part, Round};
use crate::scenario::{EngineConfig, EngineKind, EngineSetting, MemoryBacking, Strategy};

/// How long a worker may take to boot or to listen.
const UP_TIMEOUT: Duration = Duration::from_secs(30);

/// What ferry itself may need after its own timeout to say how it ended.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(60);

/// ferry as this program was built with it.
#[derive(Debug)]
pub struct Ferry {
    info: EngineInfo,
}

impl Ferry {
    /// It is always there.
    #[must_use]
    pub fn find(config: &EngineConfig) -> Self {
        let binary = std::env::current_exe().ok().map(|path| path.display().to_string());
        let info = EngineInfo {
            name: config.name.clone(),
            kind: EngineKind::Ferry,
            version: Some(format!("ferry {}", env!("CARGO_PKG_VERSION"))),
            binary,
            absent: None,
        };
        Self { info }
    }

    /// How many streams `setting` asks for (`None` leaves it to ferry), if ferry can do all that it asks for.
    fn streams_of(&self, setting: &EngineSetting) -> Result<Option<u16>, EngineError> {
        let EngineSetting {
            engine: _,
            strategy,
            streams,
            compression,
            bandwidth_mbit_s: _,
            verify: _,
            memory,
            local,
        } = setting;
        let lacks =
            |what: &str| EngineError::Unsupported { engine: self.info.name.clone(), what: what.to_owned() };
        match strategy {
            Strategy::PreCopy => {}
            Strategy::AutoConverge => return Err(lacks("it does not throttle vCPUs")),
            Strategy::PostCopy => return Err(lacks("it has no post-copy")),
        }
        words::packing(*compression).map_err(lacks)?;
        if *local && *memory != MemoryBacking::Shared {
            return Err(lacks("it hands only shared memory over within a host (memory = \"shared\")"));
        }
        Ok(streams.fixed())
    }
}

impl Engine for Ferry {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        let streams = self.streams_of(order.setting)?;
        let boot = order.guest;
        let source_order = SourceOrder {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            cmdline: boot.cmdline.clone(),
            memory_mib: order.scenario.memory_mib,
            backing: order.setting.memory,
            cpus: order.scenario.cpus,
            net: order.source.net.map(|(tap, mac)| (tap.to_owned(), mac.octets())),
            serial: boot.serial.clone(),
            folder: order.folder.join("source"),
        };
        let source =
            Worker::start((&self.info.name, "ferry", "source"), &order.source, order, &source_order)?;
        source.expect(UP_TIMEOUT, |said| matches!(said, Said::Up).then_some(()))?;
        let target_order = TargetOrder {
            listen: if order.setting.local {
                // The two hosts share the file system.
                format!("unix:{}", order.folder.join("target.socket").display())
            } else {
                SocketAddr::new(order.target.address, 0).to_string()
            },
            tap: order.target.net.map(|(tap, _)| tap.to_owned()),
            folder: order.folder.join("target"),
        };
        let target =
            Worker::start((&self.info.name, "ferry", "target"), &order.target, order, &target_order)?;
        let address = target.expect(UP_TIMEOUT, |said| match said {
            Said::Listening { address } => Some(address),
            Said::Up
            | Said::RoundStarted { .. }
            | Said::Stopping { .. }
            | Said::RoundDone { .. }
            | Said::Sent { .. }
            | Said::Handed
            | Said::Moved { .. }
            | Said::Stayed { .. } => None,
        })?;
        let order_backing = order.setting.memory;
        let order = MoveOrder {
            target: address,
            streams,
            compression: order.setting.compression,
            verify: order.setting.verify,
            bandwidth_bytes_per_s: order.setting.bandwidth_mbit_s.map(bytes_per_s),
            downtime_ms: order.scenario.downtime_ms,
            timeout_ms: order.scenario.timeout_s * 1e3,
        };
        Ok(Box::new(FerryPair { source, target, backing: order_backing, order }))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate above zero, in whole bytes"
)]
fn bytes_per_s(mbit_s: f64) -> u64 {
    (mbit_s * 1e6 / 8.0) as u64
}

#[derive(Debug)]
struct FerryPair {
    source: Worker<Said>,
    target: Worker<Said>,
    order: MoveOrder,
    backing: MemoryBacking,
}

impl Pair for FerryPair {
    fn source_pid(&self) -> u32 {
        self.source.pid()
    }

    fn target_pid(&self) -> u32 {
        self.target.pid()
    }

    fn flags(&self) -> Vec<String> {
        let MoveOrder {
            target,
            streams,
            compression,
            verify,
            bandwidth_bytes_per_s,
            downtime_ms,
            timeout_ms,
        } = &self.order;
        vec![
            format!("target={target} streams={streams:?} compression={compression:?}"),
            format!(
                "bandwidth_bytes_per_s={bandwidth_bytes_per_s:?} downtime_ms={downtime_ms} timeout_ms={timeout_ms}"
            ),
            format!("verify={} memory={}", if *verify { "on" } else { "off" }, self.backing.name()),
        ]
    }

    fn has_guest(&self) -> bool {
        true
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("vcpu")
    }

    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError> {
        let ordered = clock.now();
        self.source.tell(&self.order)?;
        let mut report = EngineReport { ordered, ..EngineReport::default() };
        let since = |now: Duration| now.saturating_sub(ordered).as_secs_f64() * 1e3;
        let patience = Duration::from_secs_f64(self.order.timeout_ms / 1e3) + LAST_WORD_TIMEOUT;
        let (mut starts, mut pages_of_round) = (Vec::new(), 0);
        loop {
            let said = self.source.next(patience)?;
            let now = clock.now();
            match said {
                Said::RoundStarted { pages, .. } | Said::Stopping { pages } => {
                    starts.push(since(now));
                    pages_of_round = pages;
                    report.dirty_pages.push((since(now), count(pages)));
                }
                Said::RoundDone { round } => {
                    report.dirty_pages.push((since(now), 0.0));
                    report.rounds.push(in_results(&round, starts.last().copied()));
                }
                Said::Sent { .. } if starts.is_empty() => {}
                Said::Sent { round_pages } => {
                    let left = pages_of_round.saturating_sub(round_pages);
                    report.dirty_pages.push((since(now), count(left)));
                }
                Said::Handed => report.done = now,
                Said::Moved { report: numbers } => {
                    fill_in(&mut report, &numbers, &starts);
                    return Ok(report);
                }
                Said::Stayed { timeout, reason } => {
                    report.done = now;
                    report.ending = if timeout { Ending::NotConverged } else { Ending::Failed(reason) };
                    return Ok(report);
                }
                Said::Up | Said::Listening { .. } => {}
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages stay far below 2^53")]
fn count(pages: u64) -> f64 {
    pages as f64
}

fn fill_in(report: &mut EngineReport, numbers: &MigrationReport, starts: &[f64]) {
    let parts = &numbers.downtime_parts;
    let part = |name: &str, ms: f64| Part { name: name.to_owned(), ms };
    report.ending = Ending::Moved;
    report.downtime_ms = Some(numbers.downtime_ms);
    report.downtime_parts = vec![
        part("pause", parts.pause_ms),
        part("dirty log", parts.dirty_log_ms),
        part("copy", parts.copy_ms),
        part("prepare", parts.prepare_ms),
        part("record", parts.record_ms),
        part("commit", parts.commit_ms),
    ];
    report.forecast_ms = Some(numbers.forecast.expected_ms);
    report.wire_bytes = Some(numbers.wire_bytes);
    report.round_count = u32::try_from(numbers.rounds.len()).ok();
    report.rounds = numbers
        .rounds
        .iter()
        .enumerate()
        .map(|(index, round)| in_results(round, starts.get(index).copied()))
        .collect();
    report.digest_equal = numbers.digest_equal;
    report.more = vec![
        ("total_own_ms".to_owned(), numbers.total_ms),
        ("forecast_upper_ms".to_owned(), numbers.forecast.upper_ms),
        ("within_save_ms".to_owned(), parts.within_save_ms),
        ("within_wait_ms".to_owned(), parts.within_wait_ms),
        ("within_restore_ms".to_owned(), parts.within_restore_ms),
        ("within_target_record_ms".to_owned(), parts.within_target_record_ms),
        ("within_run_ms".to_owned(), parts.within_run_ms),
    ];
}

fn in_results(round: &ferry_migrate::report::Round, from_ms: Option<f64>) -> Round {
    Round {
        round: round.round,
        from_ms,
        ms: Some(round.ms),
        dirty_pages: Some(round.dirty_pages),
        sent_pages: Some(round.sent_pages),
        wire_bytes: Some(round.wire_bytes),
        forecast_upper_ms: round.forecast.map(|forecast| forecast.upper_ms),
    }
}
