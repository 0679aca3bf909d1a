//! A migration away, as the control API shows it: started once, followed by any number of readers, cancelled.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferry_migrate::protocol::MigrationId;
use ferry_migrate::protocol::ident::STREAMS_MAX;
use ferry_migrate::protocol::page::UnknownCompression;
use ferry_migrate::protocol::source::{OnTimeout, Outcome, Progress, Resolution};
use ferry_migrate::report::{MigrationReport, ReportKind, StreamWork};
use ferry_migrate::tls::identity::Role;
use ferry_migrate::{
    BandwidthCap, Endpoint, EndpointError, MigrateOptions, Resolver, Security, Update, migrate,
};
use tokio::sync::{mpsc, watch};

use super::{Here, Life, Refused, VmHost};
use crate::api::{MigrationEvent, MigrationRequest, OnTimeoutWord};

/// Events beyond this are not kept for late readers; a migration of sane length stays far below.
const EVENTS_MAX: usize = 100_000;

/// One migration, under way or over.
#[derive(Debug)]
pub(crate) struct MigrationTask {
    cancel: watch::Sender<bool>,
    /// How the guest ended, if that is why it was cancelled.
    guest_ended: OnceLock<String>,
    bandwidth: BandwidthCap,
    resolver: Resolver,
    log: Mutex<Log>,
    /// Grows with every change of the log.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<MigrationEvent>,
    /// The newest count of what is sent: only the newest matters.
    transferred: (u64, u64),
    /// What each stream did, once it is over.
    streams: Vec<StreamWork>,
    in_doubt: bool,
    over: bool,
}

impl MigrationTask {
    fn new(bandwidth: BandwidthCap) -> Arc<Self> {
        Arc::new(Self {
            cancel: watch::channel(false).0,
            guest_ended: OnceLock::new(),
            bandwidth,
            resolver: Resolver::default(),
            log: Mutex::default(),
            changes: watch::channel(0).0,
        })
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, event: MigrationEvent) {
        {
            let mut log = self.log();
            log.in_doubt = matches!(event, MigrationEvent::InDoubt { .. });
            log.over |= event.is_last();
            if log.events.len() < EVENTS_MAX || event.is_last() {
                log.events.push(event);
            }
        }
        self.changes.send_modify(|change| *change += 1);
    }

    /// Whether it has ended, one way or the other.
    pub(crate) fn is_over(&self) -> bool {
        self.log().over
    }

    /// Whether it is not known here who runs the guest.
    pub(crate) fn in_doubt(&self) -> bool {
        self.log().in_doubt
    }

    /// Whether it moved the guest with its memory compared on both sides, or handed the memory over, so that there was
    /// nothing to compare; as far as is known yet.
    pub(crate) fn is_verified(&self) -> bool {
        let unverified = |event: &MigrationEvent| matches!(event, MigrationEvent::Moved(report) if report.kind == ReportKind::Live && !report.verified);
        !self.log().events.last().is_some_and(unverified)
    }

    /// What there is to know about it in a sentence.
    pub(crate) fn note(&self) -> Option<String> {
        self.log().events.iter().rev().find_map(|event| match event {
            MigrationEvent::Failed { reason } => Some(format!("the last migration failed: {reason}")),
            MigrationEvent::InDoubt { reason } => Some(format!(
                "in doubt: the handover is recorded, but the target can't be reached ({reason}); it is asked \
                 again until it answers; 'ferry resolve' decides without it"
            )),
            MigrationEvent::Reconnecting { reason } => {
                Some(format!("the link to the target broke ({reason}); it is being made again"))
            }
            MigrationEvent::Started { target, .. } => Some(format!("migrating to {target}")),
            MigrationEvent::Negotiated { .. }
            | MigrationEvent::RoundStarted { .. }
            | MigrationEvent::Transferred { .. }
            | MigrationEvent::RoundDone(_)
            | MigrationEvent::Stopping { .. }
            | MigrationEvent::Paused
            | MigrationEvent::Handed
            | MigrationEvent::Reconnected(_)
            | MigrationEvent::Undoing { .. }
            | MigrationEvent::LetGo { .. }
            | MigrationEvent::Moved(_) => None,
        })
    }

    /// Changes the most that it may send while the guest runs.
    pub(crate) fn set_bandwidth(&self, bytes_per_s: Option<u64>) -> Result<(), Refused> {
        check_bandwidth(bytes_per_s)?;
        if self.is_over() {
            return Err(Refused("the migration is over".into()));
        }
        self.bandwidth.set(bytes_per_s);
        Ok(())
    }

    /// Asks for it to be given up. Whether that still works shows in its events.
    pub(crate) fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Decides it, if it is in doubt.
    pub(crate) fn resolve(&self, resolution: Resolution) {
        self.resolver.resolve(resolution);
    }

    /// Gives it up because there is no guest any more that could move.
    pub(crate) fn cancel_ended(&self, how: &str) {
        // The first end counts; a guest has only one.
        let _ = self.guest_ended.set(how.to_owned());
        self.cancel();
    }

    /// The events from number `from` on, and what is sent so far; waits until there is something new.
    pub(crate) async fn next_events(
        &self,
        from: usize,
        seen: (u64, u64),
    ) -> (Vec<MigrationEvent>, (u64, u64)) {
        let mut changes = self.changes.subscribe();
        loop {
            {
                let log = self.log();
                if log.events.len() > from || log.transferred != seen {
                    return (log.events.get(from..).unwrap_or_default().to_vec(), log.transferred);
                }
            }
            // The sender lives as long as `self`.
            let _ = changes.changed().await;
        }
    }

    fn update(&self, update: Update) {
        match update {
            Update::Transferred { round_pages, wire_bytes } => {
                self.log().transferred = (round_pages, wire_bytes);
                self.changes.send_modify(|change| *change += 1);
            }
            Update::Progress(progress) => self.add(event(&progress)),
            Update::Streams(streams) => self.log().streams = streams,
        }
    }
}

fn event(progress: &Progress) -> MigrationEvent {
    match progress {
        Progress::Negotiated { version, host } => {
            MigrationEvent::Negotiated { version: *version, host: host.clone() }
        }
        Progress::RoundStarted { round, pages } => {
            MigrationEvent::RoundStarted { round: *round, pages: *pages }
        }
        Progress::RoundDone(report) => MigrationEvent::RoundDone(report.into()),
        Progress::Stopping { pages, forecast, forced } => {
            MigrationEvent::Stopping { pages: *pages, forecast: forecast.into(), forced: *forced }
        }
        Progress::Reconnecting { reason } => MigrationEvent::Reconnecting { reason: reason.clone() },
        Progress::Reconnected(reconnection) => MigrationEvent::Reconnected(reconnection.into()),
        Progress::Paused => MigrationEvent::Paused,
        Progress::Handed => MigrationEvent::Handed,
        Progress::InDoubt { reason } => MigrationEvent::InDoubt { reason: reason.clone() },
        Progress::Undoing { failure } => MigrationEvent::Undoing { reason: failure.to_string() },
    }
}

/// Starts migrating the VM of `host` away.
pub(crate) fn start(host: &Arc<VmHost>, request: MigrationRequest) -> Result<Arc<MigrationTask>, Refused> {
    let task = MigrationTask::new(BandwidthCap::new(request.bandwidth_bytes_per_s));
    let _change = host.change();
    let here = {
        let here = host.not_migrating("migrate")?;
        let mut life = host.life();
        // Between the two locks somebody may have been faster.
        let Life::Here(now) = &mut *life else {
            return Err(Refused(format!("'{}' is no longer here", host.name)));
        };
        if now.migration.as_ref().is_some_and(|other| !other.is_over()) {
            return Err(Refused(format!("'{}' is migrating already", host.name)));
        }
        now.migration = Some(Arc::clone(&task));
        here
    };
    let options = match options(host, &here, &request, &task) {
        Ok(options) => options,
        Err(refused) => {
            task.add(MigrationEvent::Failed { reason: refused.0.clone() });
            return Err(refused);
        }
    };
    let memory_bytes = here.machine.machine().ram().page_count() * 4096;
    task.add(MigrationEvent::Started { target: request.target, memory_bytes });
    tokio::spawn(drive(Arc::clone(host), here, options, Arc::clone(&task)));
    Ok(task)
}

fn options(
    host: &VmHost,
    here: &Here,
    request: &MigrationRequest,
    task: &MigrationTask,
) -> Result<MigrateOptions, Refused> {
    let duration = |ms: f64, what: &str| {
        let sane = (0.0..1e10).contains(&ms);
        let refused = || Refused(format!("{what} of {ms} ms makes no sense"));
        if sane { Ok(Duration::from_secs_f64(ms / 1e3)) } else { Err(refused()) }
    };
    let target = request.target.parse().map_err(|error: EndpointError| Refused(error.to_string()))?;
    if !(1..=STREAMS_MAX).contains(&request.streams) {
        return Err(Refused(format!("{} data streams, not 1 to {STREAMS_MAX}", request.streams)));
    }
    check_bandwidth(request.bandwidth_bytes_per_s)?;
    let security = security_for(&target, host, request)?;
    Ok(MigrateOptions {
        migration: MigrationId(random_id()?),
        vm: here.vm,
        name: host.name.clone(),
        epoch: here.epoch,
        target,
        security,
        streams: request.streams,
        adapt_streams: request.adapt_streams,
        compression: request
            .compress
            .parse()
            .map_err(|error: UnknownCompression| Refused(error.to_string()))?,
        bandwidth: task.bandwidth.clone(),
        witness: host.witness.clone(),
        resolver: task.resolver.clone(),
        verify: request.verify,
        verify_whole: request.verify_whole,
        downtime_budget: duration(request.downtime_ms, "a downtime")?,
        timeout: duration(request.timeout_ms, "a timeout")?,
        on_timeout: match request.on_timeout {
            OnTimeoutWord::Cancel => OnTimeout::Cancel,
            OnTimeoutWord::Stop => OnTimeout::Stop,
        },
        reconnect: duration(request.reconnect_ms, "reconnecting for")?,
    })
}

/// How to speak to `target`. What this host's certificate does not allow is refused before anything is tried.
fn security_for(target: &Endpoint, host: &VmHost, request: &MigrationRequest) -> Result<Security, Refused> {
    let own = host.tls_folder.get().map(PathBuf::as_path);
    let folder = crate::security::asked_for(request.tls_dir.as_deref(), own);
    let security = match target {
        Endpoint::Tcp(_) => crate::security::security(folder.as_deref(), request.insecure),
        // The kernel says who is at the other end.
        Endpoint::Unix(_) => Ok(Security::LoopbackOnly),
    };
    let security = security.map_err(|error| Refused(format!("{error:#}")))?;
    let allowed = security.tls().map_or(Ok(()), |tls| tls.current().own().check(Role::Source, &host.name));
    allowed.map_err(|forbidden| Refused(forbidden.to_string()))?;
    Ok(security)
}

fn check_bandwidth(bytes_per_s: Option<u64>) -> Result<(), Refused> {
    if bytes_per_s == Some(0) {
        return Err(Refused("a bandwidth of 0 would never send anything".into()));
    }
    Ok(())
}

/// 16 random bytes.
pub(crate) fn random_id() -> Result<[u8; 16], Refused> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Refused(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

async fn drive(host: Arc<VmHost>, here: Here, options: MigrateOptions, task: Arc<MigrationTask>) {
    let (updates, mut inbox) = mpsc::unbounded_channel();
    let follower = {
        let task = Arc::clone(&task);
        tokio::spawn(async move {
            while let Some(update) = inbox.recv().await {
                task.update(update);
            }
        })
    };
    let (name, target, budget) =
        (options.name.to_string(), options.target.to_string(), options.downtime_budget);
    let records = Arc::clone(&host.records);
    let vm = Arc::new(here.machine.clone());
    let cancel = task.cancel.subscribe();
    let outcome = migrate(vm, records, Arc::clone(&host.clock), options, cancel, updates).await;
    let _ = follower.await;
    // Before anybody hears that it is over, and beside everything else.
    let _ = tokio::task::spawn_blocking(ferry_vmm::heap::give_back).await;
    match outcome {
        Ok(Outcome::Moved(summary)) => {
            // First, so that nobody finds a VM here whose migration is over.
            host.set_life(Life::Gone { target, last: Arc::clone(&task) });
            let streams = std::mem::take(&mut task.log().streams);
            let report = MigrationReport { streams, ..MigrationReport::new(&name, budget, &summary) };
            task.add(MigrationEvent::Moved(report));
        }
        Ok(Outcome::LetGo { epoch }) => {
            let reason = format!("the operator has decided that it is {target}'s, in epoch {epoch}");
            host.set_life(Life::Gone { target, last: Arc::clone(&task) });
            task.add(MigrationEvent::LetGo { reason });
        }
        Ok(Outcome::Stayed { failure, epoch }) => {
            if let Life::Here(now) = &mut *host.life() {
                now.epoch = epoch;
            }
            let reason = match task.guest_ended.get() {
                Some(how) => format!("{how} while it was moving; it has ended here"),
                None => failure.to_string(),
            };
            task.add(MigrationEvent::Failed { reason });
        }
        Err(error) => {
            task.add(MigrationEvent::Failed { reason: format!("no thread could be started: {error}") })
        }
    }
}
