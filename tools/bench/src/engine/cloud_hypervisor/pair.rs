//! A source and a target, and the migration between them.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use ferry_lab::LabClock;
use procfs::net::{TcpNetEntry, TcpState};
use serde_json::{Map, Value, json};

use super::api::ApiError;
use super::rounds::rounds;
use super::vmm::{Side, Vmm};
use super::words::Figures;
use crate::engine::{Ending, EngineError, EngineReport, Pair, PairOrder, whole};
use crate::scenario::Strategy;

/// How often the events are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How long Cloud Hypervisor may take beyond its own timeout to give up.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(20);

/// How often another port is tried, should somebody have taken the one that was free.
const PORT_TRIES: u32 = 3;

/// A running source and a waiting target.
#[derive(Debug)]
pub(super) struct CloudHypervisorPair {
    source: Vmm,
    target: Vmm,
    order: Value,
    timeout: Duration,
    /// Whether the source answers before it has sent anything.
    answers_at_once: bool,
    flags: Vec<String>,
}

impl CloudHypervisorPair {
    pub(super) fn start(
        engine: &str,
        program: &Path,
        order: &PairOrder<'_>,
        answers_at_once: bool,
    ) -> Result<Self, EngineError> {
        let mut source = Vmm::start(engine, Side::Source, program, order)?;
        let mut target = Vmm::start(engine, Side::Target, program, order)?;
        let post_copy = order.setting.strategy == Strategy::PostCopy;
        let address = listen(&mut target, order, post_copy)?;
        source.until_running()?;
        let timeout_s = whole(order.scenario.timeout_s.ceil().max(1.0));
        let mut send = json!({
            "destination_url": format!("tcp:{address}"),
            "downtime_ms": whole(order.scenario.downtime_ms.max(1.0)),
            "timeout_s": timeout_s,
            "timeout_strategy": "Cancel",
            "connections": order.setting.streams.fixed().unwrap_or(1),
        });
        if post_copy {
            send["memory_mode"] = json!("Postcopy");
        }
        let flags = vec![
            source.command_line().to_owned(),
            target.command_line().to_owned(),
            format!("vm.send-migration: {send}"),
        ];
        let timeout = Duration::from_secs(timeout_s);
        Ok(Self { source, target, order: send, timeout, answers_at_once, flags })
    }

    /// Waits for the end of the migration; how it ended.
    fn follow(
        &mut self,
        answer: &Receiver<Result<Value, ApiError>>,
        clock: LabClock,
    ) -> Result<Ending, EngineError> {
        let until = clock.now() + self.timeout;
        let mut sent = false;
        loop {
            // Asked first, so that its last events are read after its end.
            let ended = [self.source.has_ended(), self.target.has_ended()];
            self.source.read_events(clock)?;
            self.target.read_events(clock)?;
            match answer.try_recv() {
                Ok(Err(error)) if !ended[0] => return Ok(Ending::Failed(self.told(&in_words(&error)))),
                Ok(Ok(_)) if !self.answers_at_once => sent = true,
                // The source ends with its work, maybe before it has answered.
                Ok(_) | Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
            let late = clock.now() >= until;
            sent |= self.source.events.has("migration-finished");
            if sent && self.target.events.has("migration-receive-finished") {
                return Ok(Ending::Moved);
            }
            if self.source.events.has("migration-failed")
                || self.target.events.has("migration-receive-failed")
            {
                let what = "the migration failed";
                return Ok(if late { Ending::NotConverged } else { Ending::Failed(self.told(what)) });
            }
            if ended[1] || (ended[0] && !sent) {
                return Ok(Ending::Failed(self.told("a process ended")));
            }
            if clock.now() >= until + GIVE_UP_TIMEOUT {
                return Ok(Ending::NotConverged);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// `what`, with what both sides say.
    fn told(&self, what: &str) -> String {
        format!(
            "{what}; the source says: {}; the target says: {}",
            self.source.last_words(),
            self.target.last_words()
        )
    }

    fn report(&self, ordered: Duration, done: Duration, ending: Ending) -> EngineReport {
        let log = fs::read(&self.source.log).unwrap_or_default();
        let Figures { downtime_ms, memory } = Figures::read(&String::from_utf8_lossy(&log));
        let more = memory.map(|memory| ("sent_memory_mib".to_owned(), memory.total_mib));
        EngineReport {
            ending,
            ordered,
            done,
            downtime_ms,
            forecast_ms: memory.and_then(|memory| memory.forecast_ms),
            rounds: memory.map_or_else(Vec::new, |memory| rounds(&self.source.events, &memory, ordered)),
            round_count: memory.and_then(|memory| u32::try_from(whole(memory.passes)).ok()),
            more: more.into_iter().collect(),
            ..EngineReport::default()
        }
    }
}

impl Pair for CloudHypervisorPair {
    fn source_pid(&self) -> u32 {
        self.source.pid()
    }

    fn target_pid(&self) -> u32 {
        self.target.pid()
    }

    fn flags(&self) -> Vec<String> {
        self.flags.clone()
    }

    fn has_guest(&self) -> bool {
        true
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.strip_prefix("vcpu").is_some_and(|number| number.parse::<u32>().is_ok())
    }

    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError> {
        let ordered = clock.now();
        let answer = self.source.api.put("vm.send-migration", &self.order);
        let answer = answer.map_err(|error| self.source.broken(&in_words(&error)))?;
        let ending = self.follow(&answer, clock)?;
        Ok(self.report(ordered, clock.now(), ending))
    }
}

/// Makes the target wait for the source; where.
fn listen(target: &mut Vmm, order: &PairOrder<'_>, post_copy: bool) -> Result<SocketAddr, EngineError> {
    let mut refused = String::new();
    for _ in 0..PORT_TRIES {
        let address = free_address(order).map_err(|why| target.broken(&why))?;
        let mut receive = Map::new();
        receive.insert("receiver_url".to_owned(), json!(format!("tcp:{address}")));
        if post_copy {
            receive.insert("memory_mode".to_owned(), json!("Postcopy"));
        }
        // It answers when the migration has ended, or if it can't listen.
        let answer = target.api.put("vm.receive-migration", &Value::Object(receive));
        let answer = answer.map_err(|error| target.broken(&in_words(&error)))?;
        let mut listens = false;
        target.until("listens", |target| {
            refused = match answer.try_recv() {
                Ok(Err(error)) => in_words(&error),
                Ok(Ok(_)) | Err(TryRecvError::Disconnected) => "it does not wait".to_owned(),
                Err(TryRecvError::Empty) => String::new(),
            };
            listens = is_listening(target.pid(), address.port());
            listens || !refused.is_empty()
        })?;
        if listens {
            return Ok(address);
        }
    }
    Err(target.broken(&format!("it can't listen: {refused}")))
}

/// An address of the target's host that nobody uses. The kernel does not give out the same port again soon.
fn free_address(order: &PairOrder<'_>) -> Result<SocketAddr, String> {
    let bind = || TcpListener::bind((order.target.address, 0))?.local_addr();
    let bound = order.target.namespace.run(bind).map_err(|error| error.to_string())?;
    bound.map_err(|error| format!("there is no free port at {}: {error}", order.target.address))
}

/// Whether anybody listens at `port` in the namespace of process `pid`. To connect would be to migrate.
fn is_listening(pid: u32, port: u16) -> bool {
    let Some(process) = i32::try_from(pid).ok().and_then(|pid| procfs::process::Process::new(pid).ok())
    else {
        return false;
    };
    let listens = |entry: &TcpNetEntry| entry.state == TcpState::Listen && entry.local_address.port() == port;
    let (tcp, tcp6) = (process.tcp().unwrap_or_default(), process.tcp6().unwrap_or_default());
    tcp.iter().chain(&tcp6).any(listens)
}

/// An error with its causes on one line.
fn in_words(error: &ApiError) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}
