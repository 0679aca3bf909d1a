//! A source and a target, and the migration between them.

use std::path::Path;
use std::time::Duration;

use std::net::SocketAddr;

use ferry_lab::LabClock;
use serde_json::{Value, json};

use super::progress::{Progress, Status};
use super::settings::Settings;
use super::vm::{Side, Vm};
use crate::engine::{Ending, EngineError, EngineReport, Pair, PairOrder};

/// How often the source is asked how far it is, besides when it says that something happened.
const LOOK_EVERY: Duration = Duration::from_millis(8);

/// How long a cancelled migration may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the target may take to run its guest once the source has done its part.
const RESUME_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the target is listened to before it is asked whether its guest runs.
const RESUME_POLL: Duration = Duration::from_millis(100);

/// How often the source is asked for its last figures; it computes them right after it has said that it is done.
const FIGURES_TRIES: u32 = 100;

/// See [`FIGURES_TRIES`].
const FIGURES_POLL: Duration = Duration::from_millis(2);

/// A running source and a waiting target.
#[derive(Debug)]
pub(super) struct QemuPair {
    source: Vm,
    target: Vm,
    settings: Settings,
    address: SocketAddr,
    timeout: Duration,
    flags: Vec<String>,
}

impl QemuPair {
    pub(super) fn start(
        engine: &str,
        program: &Path,
        order: &PairOrder<'_>,
        settings: Settings,
    ) -> Result<Self, EngineError> {
        let mut source = Vm::start(engine, Side::Source, program, order, &settings)?;
        let mut target = Vm::start(engine, Side::Target, program, order, &settings)?;
        let address = listen(&mut target, order)?;
        source.until_running()?;
        let mut flags = vec![source.command_line().to_owned(), target.command_line().to_owned()];
        flags.extend(preferences(&mut source)?);
        let timeout = Duration::from_secs_f64(order.scenario.timeout_s);
        Ok(Self { source, target, settings, address, timeout, flags })
    }

    /// Follows the source to the end of its migration; what it said at last, and how that is.
    fn follow(&mut self, progress: &mut Progress, clock: LabClock) -> Result<(Status, Value), EngineError> {
        let mut give_up = clock.now() + self.timeout;
        let (mut cancelled, mut post_copy_asked) = (false, !self.settings.post_copy);
        loop {
            self.listen_until(clock.now() + LOOK_EVERY, progress, clock)?;
            let info = self.source.execute("query-migrate", json!({}))?;
            let status = progress.look(&info, clock.now());
            match status {
                Status::Completed | Status::Cancelled | Status::Failed => return Ok((status, info)),
                Status::Active if !post_copy_asked && progress.passes() > 1 => {
                    // It may just have ended by itself, which the next look shows.
                    let refused = self.source.try_execute("migrate-start-postcopy", json!({}))?;
                    post_copy_asked = refused.is_ok();
                }
                Status::UnderWay | Status::Active | Status::PostCopy => {}
            }
            if clock.now() < give_up {
                continue;
            }
            // Once the guest runs at the target there is no way back.
            if cancelled || status == Status::PostCopy {
                return Ok((status, info));
            }
            self.source.execute("migrate_cancel", json!({}))?;
            cancelled = true;
            give_up = clock.now() + CANCEL_TIMEOUT;
        }
    }

    /// Takes events of the source until `until`, or until one makes a look worth while.
    fn listen_until(
        &mut self,
        until: Duration,
        progress: &mut Progress,
        clock: LabClock,
    ) -> Result<(), EngineError> {
        loop {
            let left = until.saturating_sub(clock.now());
            let Some(event) = self.source.wait_event(left)? else { return Ok(()) };
            if progress.source_event(&event, clock.now()) {
                return Ok(());
            }
        }
    }

    /// Waits until the target says that its guest runs; whether it did.
    fn until_resumed(&mut self, progress: &mut Progress) -> Result<bool, EngineError> {
        let clock = LabClock::start();
        while clock.now() < RESUME_TIMEOUT {
            let is_running = self.target.is_running()?;
            // QEMU reports the event first. If it runs, the event is there already.
            let patience = if is_running { Duration::ZERO } else { RESUME_POLL };
            while let Some(event) = self.target.wait_event(patience)? {
                if event.name == "RESUME" {
                    progress.target_resumed(event.at);
                    return Ok(true);
                }
            }
            if is_running {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The source's last figures on a migration that is completed.
    fn figures(&mut self) -> Result<Value, EngineError> {
        for _ in 0..FIGURES_TRIES {
            let info = self.source.execute("query-migrate", json!({}))?;
            if info.get("total-time").and_then(Value::as_u64).is_some_and(|time| time > 0) {
                return Ok(info);
            }
            std::thread::sleep(FIGURES_POLL);
        }
        Err(self.source.broken("it completed, but never said how long it took"))
    }

    fn failure(&self, info: &Value) -> Ending {
        let why = info.get("error-desc").and_then(Value::as_str).unwrap_or("it does not say why");
        let sides = [("source", &self.source), ("target", &self.target)];
        let words = sides.map(|(side, vm)| (side, vm.last_words()));
        let said = words.iter().filter(|(_, words)| !words.is_empty());
        Ending::Failed(
            said.fold(why.to_owned(), |text, (side, words)| format!("{text}; the {side} says: {words}")),
        )
    }
}

impl Pair for QemuPair {
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
        thread.starts_with("CPU ") && thread.ends_with("/KVM")
    }

    fn migrate(&mut self, clock: LabClock) -> Result<EngineReport, EngineError> {
        let ordered = clock.now();
        self.source.execute("migrate", json!({ "uri": format!("tcp:{}", self.address) }))?;
        let mut progress = Progress::new(clock, ordered);
        let (status, info) = self.follow(&mut progress, clock)?;
        let mut done = clock.now();
        let ending = match status {
            Status::Completed => {
                let resumed = self.until_resumed(&mut progress)?;
                done = clock.now();
                // A look may have shown the end before all events of it were read.
                while let Some(event) = self.source.wait_event(Duration::ZERO)? {
                    progress.source_event(&event, done);
                }
                progress.look(&self.figures()?, done);
                let silent = "the source is done, but the target does not run the guest";
                if resumed { Ending::Moved } else { Ending::Failed(silent.to_owned()) }
            }
            Status::Cancelled | Status::UnderWay | Status::Active | Status::PostCopy => Ending::NotConverged,
            Status::Failed => self.failure(&info),
        };
        Ok(EngineReport { ending, ..progress.report(done) })
    }
}

/// Makes the target wait for the source, at a port that the kernel chooses; the address with that port.
fn listen(target: &mut Vm, order: &PairOrder<'_>) -> Result<SocketAddr, EngineError> {
    let any_port = SocketAddr::new(order.target.address, 0);
    target.execute("migrate-incoming", json!({ "uri": format!("tcp:{any_port}") }))?;
    let info = target.execute("query-migrate", json!({}))?;
    let told = info.pointer("/socket-address/0/port").and_then(Value::as_str);
    let port = told.and_then(|port| port.parse().ok());
    let port = port.ok_or_else(|| target.broken(&format!("it does not say where it listens: {info}")))?;
    Ok(SocketAddr::new(order.target.address, port))
}

/// The migration settings, as QEMU says that it has them.
fn preferences(vm: &mut Vm) -> Result<Vec<String>, EngineError> {
    let capabilities = vm.execute("query-migrate-capabilities", json!({}))?;
    let on = capabilities.as_array().into_iter().flatten().filter(|entry| entry["state"] == json!(true));
    let names: Vec<_> = on.filter_map(|entry| entry["capability"].as_str()).collect();
    let parameters = vm.execute("query-migrate-parameters", json!({}))?;
    Ok(vec![format!("capabilities: {}", names.join(" ")), format!("parameters: {parameters}")])
}
