//! ferry, through its library, in two processes as its users have them ([`crate::worker::ferry`]).

pub mod words;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use ferry_lab::LabClock;
use ferry_migrate::report::MigrationReport;
use serde::Serialize;

use self::words::{MoveOrder, Said, SourceOrder, TargetOrder};
use super::process::Process;
use super::{Ending, Engine, EngineError, EngineReport, Pair, PairOrder, Place};
use crate::results::{EngineInfo, Part, Round};
use crate::scenario::{Compression, EngineConfig, EngineKind, EngineSetting, Strategy};

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

    fn supports(&self, setting: &EngineSetting) -> Result<(), EngineError> {
        let lacks = |what: &str| {
            Err(EngineError::Unsupported { engine: self.info.name.clone(), what: what.to_owned() })
        };
        match setting.strategy {
            Strategy::PreCopy => {}
            Strategy::AutoConverge => return lacks("it does not throttle vCPUs"),
            Strategy::PostCopy => return lacks("it has no post-copy"),
        }
        match setting.compression {
            Compression::None | Compression::Lz4 => Ok(()),
            Compression::Auto => lacks("it does not choose by itself whether to pack"),
            Compression::Zstd => lacks("it has no zstd"),
            Compression::Xbzrle => lacks("it sends no differences"),
        }
    }
}

impl Engine for Ferry {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn start(&self, order: &PairOrder<'_>) -> Result<Box<dyn Pair>, EngineError> {
        self.supports(order.setting)?;
        let boot = order.guest;
        let source_order = SourceOrder {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            cmdline: boot.cmdline.clone(),
            memory_mib: order.scenario.memory_mib,
            cpus: order.scenario.cpus,
            net: order.source.net.map(|(tap, mac)| (tap.to_owned(), mac.octets())),
            serial: boot.serial.clone(),
            folder: order.folder.join("source"),
        };
        let mut source = Worker::start(&self.info.name, "source", &order.source, order, &source_order)?;
        source.expect(UP_TIMEOUT, |said| matches!(said, Said::Up).then_some(()))?;
        let target_order = TargetOrder {
            listen: SocketAddr::new(order.target.address, 0),
            tap: order.target.net.map(|(tap, _)| tap.to_owned()),
            folder: order.folder.join("target"),
        };
        let mut target = Worker::start(&self.info.name, "target", &order.target, order, &target_order)?;
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
        let order = MoveOrder {
            target: address.to_string(),
            streams: order.setting.streams,
            lz4: order.setting.compression == Compression::Lz4,
            bandwidth_bytes_per_s: order.setting.bandwidth_mbit_s.map(bytes_per_s),
            downtime_ms: order.scenario.downtime_ms,
            timeout_ms: order.scenario.timeout_s * 1e3,
        };
        Ok(Box::new(FerryPair { source, target, order }))
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

/// A source or a target.
#[derive(Debug)]
struct Worker {
    engine: String,
    side: &'static str,
    process: Process,
    stdin: ChildStdin,
    said: Receiver<Said>,
}

impl Worker {
    fn start(
        engine: &str,
        side: &'static str,
        place: &Place<'_>,
        order: &PairOrder<'_>,
        to_do: &impl Serialize,
    ) -> Result<Self, EngineError> {
        let broken = |what: String| EngineError::Broken { engine: engine.to_owned(), side, what };
        let program = crate::worker::program().map_err(|error| broken(format!("where is it? {error}")))?;
        let text = serde_json::to_string(to_do).map_err(|error| broken(error.to_string()))?;
        let arguments: Vec<OsString> =
            vec![crate::worker::WORD.into(), format!("ferry-{side}").into(), text.into()];
        let log = order.folder.join(format!("{side}.log"));
        let (process, stdin, stdout) = Process::start_piped(place.namespace, &program, &arguments, &log)?;
        Ok(Self { engine: engine.to_owned(), side, process, stdin, said: listen(stdout) })
    }

    /// Waits until it says what `wanted` takes.
    fn expect<T>(&mut self, timeout: Duration, wanted: impl Fn(Said) -> Option<T>) -> Result<T, EngineError> {
        match self.said.recv_timeout(timeout) {
            Ok(said) => {
                let words = format!("it said {said:?}");
                wanted(said).ok_or_else(|| self.broken(words))
            }
            Err(error) => Err(self.silent(error)),
        }
    }

    fn silent(&self, error: RecvTimeoutError) -> EngineError {
        self.broken(match error {
            RecvTimeoutError::Timeout => "it says nothing".to_owned(),
            RecvTimeoutError::Disconnected => "it ended".to_owned(),
        })
    }

    fn broken(&self, what: String) -> EngineError {
        let words = self.process.last_words();
        let what = if words.is_empty() { what } else { format!("{what}: {words}") };
        EngineError::Broken { engine: self.engine.clone(), side: self.side, what }
    }
}

/// Reads what a worker says, until it ends.
fn listen(stdout: ChildStdout) -> Receiver<Said> {
    let (sender, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let Ok(words) = serde_json::from_str(&line) else { continue };
            if sender.send(words).is_err() {
                return;
            }
        }
    });
    said
}

#[derive(Debug)]
struct FerryPair {
    source: Worker,
    target: Worker,
    order: MoveOrder,
}

impl Pair for FerryPair {
    fn source_pid(&self) -> u32 {
        self.source.process.pid()
    }

    fn target_pid(&self) -> u32 {
        self.target.process.pid()
    }

    fn flags(&self) -> Vec<String> {
        let MoveOrder { target, streams, lz4, bandwidth_bytes_per_s, downtime_ms, timeout_ms } = &self.order;
        vec![
            format!("target={target} streams={streams} compression={}", if *lz4 { "lz4" } else { "none" }),
            format!(
                "bandwidth_bytes_per_s={bandwidth_bytes_per_s:?} downtime_ms={downtime_ms} timeout_ms={timeout_ms}"
            ),
            "verify=on memory=anonymous,thp".to_owned(),
        ]
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("vcpu")
    }

    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError> {
        let mut line =
            serde_json::to_string(&self.order).map_err(|error| self.source.broken(error.to_string()))?;
        line.push('\n');
        let ordered = clock.now();
        let written = self.source.stdin.write_all(line.as_bytes());
        written.map_err(|error| self.source.broken(format!("it takes no order: {error}")))?;
        let mut report = EngineReport { ordered, ..EngineReport::default() };
        let since = |now: Duration| now.saturating_sub(ordered).as_secs_f64() * 1e3;
        let patience = Duration::from_secs_f64(self.order.timeout_ms / 1e3) + LAST_WORD_TIMEOUT;
        let (mut starts, mut pages_of_round) = (Vec::new(), 0);
        loop {
            let said = self.source.said.recv_timeout(patience).map_err(|error| self.source.silent(error))?;
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
