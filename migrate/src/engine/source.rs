//! The source's engine: [`migrate`] moves one VM away.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry_protocol::page::Compression;
use ferry_protocol::record::Standing;
use ferry_protocol::source::{Action, Event, Failure, OnTimeout, Outcome, Progress, Source};
use ferry_protocol::witness::Claim;
use ferry_protocol::{Epoch, Message, MigrationId, PageBitmap, Record, VmId, VmName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use super::begin::begin;
use super::resolver::Resolver;
use super::vm_worker::VmWorker;
use super::witness::{self, Agreed};
use super::{CLOSE_TIMEOUT, PANICKED, cancelled, sleep_until, store_record};
use crate::bandwidth::{Bandwidth, BandwidthCap};
use crate::fault;
use crate::ports::{Clock, PortError, RecordStore, SourceVm, in_words, timed};
use crate::report::StreamWork;
use crate::stream::{How, Opening, SenderOptions, Senders, StreamSettings, TransferCounters};
use crate::transport::control::{ControlReader, ControlStream, ControlWriter, UNHANDLED_MAX, split};
use crate::transport::endpoint::Endpoint;
use crate::transport::security::{Dialer, Security};
use crate::witness::Witness;

/// What the caller of [`migrate`] chooses.
#[derive(Debug, Clone)]
pub struct MigrateOptions {
    /// This attempt: 16 random bytes.
    pub migration: MigrationId,
    /// The VM's identity.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// The epoch in which it runs here.
    pub epoch: Epoch,
    /// The target. Through a Unix socket guest memory is handed over ([`ferry_protocol::source::MemoryPath::HandedOver`]): no page is copied, and
    /// streams, compression and bandwidth have no meaning.
    pub target: Endpoint,
    /// Whom the connections to it can be trusted to reach, and who may read along.
    pub security: Security,
    /// How many data streams, 1 to [`ferry_protocol::ident::STREAMS_MAX`].
    pub streams: u16,
    /// Whether only as many of them work as make the migration faster.
    pub adapt_streams: bool,
    /// How pages are packed.
    pub compression: Compression,
    /// The most that ferry sends while the guest runs. Keep a clone to change it meanwhile.
    pub bandwidth: BandwidthCap,
    /// Whether both sides take digests of memory and compare them before the guest resumes. Without, nothing proves
    /// that the two memories are the same: meant for measuring what that costs.
    pub verify: bool,
    /// Whether the source also reads all of the paused guest's memory once more, which finds pages that no dirty log has
    /// named. The guest stands still meanwhile.
    pub verify_whole: bool,
    /// The downtime that is allowed.
    pub downtime_budget: Duration,
    /// How long it may take until the guest is stopped.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// Who decides what is in doubt, if this host has a witness. The target must have the same.
    pub witness: Option<Arc<dyn Witness>>,
    /// Keep a clone to decide what is in doubt without one.
    pub resolver: Resolver,
    /// How long the target is tried to be reached again if the link breaks before the commit, each time; zero for not at all.
    pub reconnect: Duration,
}

impl MigrateOptions {
    /// How many streams to connect where nobody has said how many are to work: one for each processor, but no more than
    /// what was found to pay anywhere.
    #[must_use]
    pub fn streams_to_choose_from() -> u16 {
        const MOST: usize = 8;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        u16::try_from(processors.min(MOST)).unwrap_or(1)
    }
}

/// What [`migrate`] tells while it runs.
#[derive(Debug, Clone)]
pub enum Update {
    /// Something happened.
    Progress(Box<Progress>),
    /// How far the pages are, several times a second.
    Transferred {
        /// Pages of the current round that are sent.
        round_pages: u64,
        /// Bytes of the whole migration that are sent.
        wire_bytes: u64,
    },
    /// What each data stream has done in all; comes once, last of all.
    Streams(Vec<StreamWork>),
}

/// No set of data streams has this number: a migration reconnects some dozen times at most.
const NO_SESSION: u32 = u32::MAX;

/// How often [`Update::Transferred`] comes.
const TRANSFERRED_EVERY: Duration = Duration::from_millis(100);

/// Migrates `vm` away and says how it ended. Set `cancel` to true to give up, which works until the commit.
///
/// A VM whose memory can't be handed over stays before anything is tried, where the target is a Unix socket.
///
/// On [`Outcome::Stayed`] the VM is what it was before. On [`Outcome::Moved`] it has been released. The future
/// must be polled to its end: dropping it half-way leaves the VM as it is at that moment.
///
/// # Errors
/// Only if a thread can't be started; nothing has happened to the VM then.
pub async fn migrate(
    vm: Arc<dyn SourceVm>,
    records: Arc<dyn RecordStore>,
    clock: Arc<dyn Clock>,
    options: MigrateOptions,
    mut cancel: watch::Receiver<bool>,
    updates: mpsc::UnboundedSender<Update>,
) -> std::io::Result<Outcome> {
    let memory = match &options.target {
        Endpoint::Tcp(_) => None,
        Endpoint::Unix(_) => match vm.memory_descriptor() {
            Ok(memory) => Some(memory),
            Err(error) => {
                let failure = Failure::Local(in_words(&*error));
                return Ok(Outcome::Stayed { failure, epoch: options.epoch });
            }
        },
    };
    let (events, inbox) = mpsc::unbounded_channel();
    let pages = vm.pages();
    let layout = pages.layout();
    let bandwidth = Arc::new(Bandwidth::new(options.bandwidth.clone(), Arc::clone(&clock)));
    let counters = Arc::new(TransferCounters::default());
    let dialer = Dialer::new(options.security.clone(), options.target.clone(), options.name.clone());
    let settings = StreamSettings {
        dialer: Arc::new(dialer),
        migration: options.migration,
        vm: options.vm,
        epoch: options.epoch,
        streams: options.streams,
        adapt_streams: options.adapt_streams,
        compression: options.compression,
    };
    let sender_options =
        Arc::new(SenderOptions::new(settings, pages, bandwidth, Arc::clone(&counters), Arc::clone(&clock)));
    let (resolver, epoch) = (options.resolver.clone(), options.epoch);
    let stayed = |failure| Ok(Outcome::Stayed { failure, epoch });
    let witness = match witness::of_source(&options, &mut cancel).await {
        Ok(witness) => witness,
        Err(failure) => return stayed(failure),
    };
    let witness_id = witness.as_ref().map(|agreed| agreed.id);
    let core = match begin(&*vm, &*records, options, layout, witness_id, &*clock) {
        Ok(core) => core,
        Err(error) => return stayed(Failure::Local(in_words(&*error))),
    };
    let worker = VmWorker::start()?;
    let engine = Engine {
        core,
        vm,
        records,
        clock,
        worker,
        events,
        updates,
        counters,
        sender_options,
        memory,
        connection: None,
        connection_number: 0,
        senders: None,
        session: 0,
        closing: None,
        witness,
        outcome: None,
    };
    Ok(engine.run(inbox, cancel, resolver).await)
}

/// What reaches the engine's loop.
enum Happened {
    Core(Event),
    /// Of the connection with this number; an older one's events no longer count. The permit bounds how many wait.
    Link(u64, LinkEvent, Option<OwnedSemaphorePermit>),
    /// A set of data streams, by its number.
    Opened(u32, std::io::Result<Senders>),
    /// Of the set of data streams with this number; an older one's events no longer count.
    Stream(u32, Event),
}

enum LinkEvent {
    Up(ControlStream),
    Event(Event),
}

struct Connection {
    writer: ControlWriter,
    reader: JoinHandle<()>,
}

struct Engine {
    core: Source,
    vm: Arc<dyn SourceVm>,
    records: Arc<dyn RecordStore>,
    clock: Arc<dyn Clock>,
    worker: VmWorker,
    events: mpsc::UnboundedSender<Happened>,
    updates: mpsc::UnboundedSender<Update>,
    counters: Arc<TransferCounters>,
    sender_options: Arc<SenderOptions>,
    /// Guest memory, if it is to be handed over.
    memory: Option<OwnedFd>,
    connection: Option<Connection>,
    connection_number: u64,
    senders: Option<Senders>,
    /// The number of the set of data streams that is open, or was last.
    session: u32,
    /// The end of the streams that were closed last.
    closing: Option<JoinHandle<()>>,
    witness: Option<Agreed>,
    outcome: Option<Outcome>,
}

impl Engine {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Happened>,
        mut cancel: watch::Receiver<bool>,
        resolver: Resolver,
    ) -> Outcome {
        let mut resolutions = resolver.subscribe();
        let mut show = tokio::time::interval(TRANSFERRED_EVERY);
        loop {
            while let Some(action) = self.core.poll_action() {
                fault::source_action(&action);
                self.perform(action);
            }
            if let Some(outcome) = self.outcome.take() {
                self.close().await;
                return outcome;
            }
            let timeout = self.core.poll_timeout();
            let event = tokio::select! {
                Some(happened) = inbox.recv() => match self.digest(happened) {
                    Some(event) => event,
                    None => continue,
                },
                () = sleep_until(&*self.clock, timeout) => Event::Timeout,
                () = cancelled(&mut cancel) => {
                    // Said once is enough; the sender may live on.
                    cancel = watch::channel(false).1;
                    Event::Cancel
                }
                resolution = Resolver::next(&mut resolutions) => Event::Resolve(resolution),
                _ = show.tick() => {
                    self.show_counters();
                    continue;
                }
            };
            fault::source_event(&event);
            self.core.handle(self.clock.now(), event);
        }
    }

    /// Turns what happened into the core's event, taking over connections and streams.
    fn digest(&mut self, happened: Happened) -> Option<Event> {
        match happened {
            Happened::Core(event) => Some(event),
            Happened::Link(number, event, permit) if number == self.connection_number => {
                drop(permit);
                self.link_event(number, event)
            }
            Happened::Link(..) => None,
            Happened::Stream(session, event) => (session == self.session).then_some(event),
            // Streams that came too late are shut again.
            Happened::Opened(session, opened) if session != self.session => {
                tokio::task::spawn_blocking(move || drop(opened));
                None
            }
            Happened::Opened(_, Ok(senders)) => {
                self.senders = Some(senders);
                Some(Event::StreamsOpened)
            }
            Happened::Opened(_, Err(error)) => {
                Some(Event::StreamFailed(format!("the data streams can't be opened: {error}")))
            }
        }
    }

    fn link_event(&mut self, number: u64, event: LinkEvent) -> Option<Event> {
        match event {
            LinkEvent::Up(stream) => {
                let (reader, writer) = split(stream);
                let reader = tokio::spawn(read(reader, number, self.events.clone()));
                self.connection = Some(Connection { writer, reader });
                Some(Event::Connected)
            }
            LinkEvent::Event(event) => Some(event),
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect { delay } => self.connect(delay),
            Action::Send(message) => {
                if let Some(connection) = &self.connection {
                    connection.writer.send(&message);
                }
            }
            Action::SendMemory(message) => self.send_memory(&message),
            Action::OpenStreams { verify } => {
                self.open_streams((verify, 0, None));
            }
            Action::ReopenStreams { verify, session, lacking } => {
                self.open_streams((verify, session, Some(lacking)));
            }
            Action::CloseStreams => {
                self.sender_options.bandwidth.stop();
                // Whatever they have still to say no longer counts.
                self.session = NO_SESSION;
                if let Some(senders) = self.senders.take() {
                    // Joining their threads may take a moment in which the guest should already run again.
                    self.closing = Some(tokio::task::spawn_blocking(move || drop(senders)));
                }
            }
            Action::SendPages { pages, fence, paused, first, whole } => {
                self.counters.pages.store(0, Ordering::Relaxed);
                let sent = self.senders.as_ref().map(|s| s.send(pages, fence, How { paused, first, whole }));
                if let Some(Err(error)) = sent {
                    let reason = format!("no thread to check memory can be started: {error}");
                    let _ = self.events.send(Happened::Core(Event::VmFailed(reason)));
                }
            }
            Action::StartDirtyLog => self.on_vm(|vm| vm.start_dirty_log().map(|()| Event::DirtyLogStarted)),
            Action::ReadDirtyLog => self.read_dirty_log(),
            Action::StopDirtyLog => self.worker_only(|vm| {
                if let Err(error) = vm.stop_dirty_log() {
                    tracing::warn!("the dirty log can't be switched off: {}", in_words(&*error));
                }
            }),
            Action::PauseVm => self.on_vm(|vm| vm.pause().map(|()| Event::Paused)),
            Action::SaveState => self.save_state(),
            Action::ResumeVm => {
                self.on_vm_or(|vm| vm.resume().map(|()| Event::VmResumed), Event::ResumeFailed);
            }
            Action::ReleaseVm => self.worker_only(|vm| vm.release()),
            Action::WriteRecord(record) => self.write_record(record),
            Action::RehearseRecord(record) => self.rehearse_record(record),
            Action::AskWitness(claim) => self.ask_witness(claim),
            Action::Report(progress) => self.update(Update::Progress(Box::new(progress))),
            Action::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn connect(&mut self, delay: Duration) {
        if let Some(Connection { reader, .. }) = self.connection.take() {
            reader.abort();
        }
        self.connection_number += 1;
        let (number, events) = (self.connection_number, self.events.clone());
        let dialer = Arc::clone(&self.sender_options.dialer);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let event = match dialer.control().await {
                Ok(stream) => LinkEvent::Up(stream),
                Err(error) => LinkEvent::Event(Event::Disconnected(format!(
                    "can't connect to {}: {error}",
                    dialer.address()
                ))),
            };
            let _ = events.send(Happened::Link(number, event, None));
        });
    }

    fn send_memory(&self, message: &Message) {
        let Some(connection) = &self.connection else { return };
        let memory = self.memory.as_ref().map(OwnedFd::try_clone).transpose();
        match memory {
            Ok(memory) => connection.writer.send_beside(message, memory),
            Err(error) => {
                let reason = format!("guest memory's descriptor can't be duplicated: {error}");
                let _ = self.events.send(Happened::Core(Event::VmFailed(reason)));
            }
        }
    }

    fn open_streams(&mut self, (verify, session, lacking): (bool, u32, Option<PageBitmap>)) {
        self.session = session;
        let Some(key) = self.core.join_key(session) else {
            // An older one, which would let anybody join.
            let reason =
                "the target has not said what data streams are let in with; update ferry there".to_owned();
            let _ = self.events.send(Happened::Core(Event::StreamFailed(reason)));
            return;
        };
        let opening = Opening { verify, session, lacking, key };
        let closing = self.closing.take();
        let (options, events) = (Arc::clone(&self.sender_options), self.events.clone());
        let done = events.clone();
        let done = Arc::new(move |result: Result<_, String>| {
            let event = match result {
                Ok(sent) => Event::RoundSent(sent),
                Err(reason) => Event::StreamFailed(reason),
            };
            let _ = done.send(Happened::Stream(session, event));
        });
        tokio::spawn(async move {
            if let Some(closing) = closing {
                // Its threads must have ended. A panic of one has ended it, too.
                let _ = closing.await;
            }
            tokio::task::spawn_blocking(move || {
                let _ = events.send(Happened::Opened(session, Senders::open(&options, &opening, &done)));
            });
        });
    }

    /// Runs `job` on the VM's thread and hands its event to the core.
    fn on_vm(&self, job: impl FnOnce(&dyn SourceVm) -> Result<Event, PortError> + Send + 'static) {
        self.on_vm_or(job, Event::VmFailed);
    }

    /// The same, where a failure is `failed`.
    fn on_vm_or(
        &self,
        job: impl FnOnce(&dyn SourceVm) -> Result<Event, PortError> + Send + 'static,
        failed: fn(String) -> Event,
    ) {
        let (vm, events, panicked) = (Arc::clone(&self.vm), self.events.clone(), self.events.clone());
        self.worker.run(
            move || {
                let event = job(&*vm).unwrap_or_else(|error| failed(in_words(&*error)));
                let _ = events.send(Happened::Core(event));
            },
            move || drop(panicked.send(Happened::Core(failed(PANICKED.to_owned())))),
        );
    }

    fn worker_only(&self, job: impl FnOnce(&dyn SourceVm) + Send + 'static) {
        let vm = Arc::clone(&self.vm);
        self.worker.run(move || job(&*vm), || tracing::error!("{PANICKED}"));
    }

    fn read_dirty_log(&self) {
        let clock = Arc::clone(&self.clock);
        self.on_vm(move |vm| {
            let (pages, took) = timed(&*clock, || vm.read_dirty_log());
            Ok(Event::DirtyLogRead { pages: pages?, took })
        });
    }

    fn save_state(&self) {
        let clock = Arc::clone(&self.clock);
        self.on_vm(move |vm| {
            let (saved, took) = timed(&*clock, || vm.save());
            let saved = saved?;
            Ok(Event::StateSaved { state: saved.state, network: saved.network, runs: saved.runs, took })
        });
    }

    fn write_record(&self, record: Record) {
        let (vm, records) = (Arc::clone(&self.vm), Arc::clone(&self.records));
        let is_commit = matches!(record.standing, Standing::Committed { .. });
        let job = move || {
            records.store(&record)?;
            // Not before, for until now any failure ends with the guest running here; and not later, for the target takes
            // what is let go of as soon as it hears of the commit.
            if is_commit {
                vm.let_go();
            }
            Ok(())
        };
        self.store(job, |written| match written {
            Ok(took) => Event::RecordWritten { took },
            Err(reason) => Event::RecordFailed(reason),
        });
    }

    fn rehearse_record(&self, record: Record) {
        let (vm, records) = (Arc::clone(&self.vm), Arc::clone(&self.records));
        // What is brought to the storage now need not be while the guest stands still, and how long it takes is what that will
        // take then: whatever the guest writes in the meantime.
        let job = move || vm.settle().and_then(|()| records.store(&record));
        self.store(job, |written| match written {
            Ok(took) => Event::RecordRehearsed { took },
            Err(reason) => Event::RehearsalFailed(reason),
        });
    }

    fn store(
        &self,
        job: impl FnOnce() -> Result<(), PortError> + Send + 'static,
        event: fn(Result<Duration, String>) -> Event,
    ) {
        let events = self.events.clone();
        let report = move |written| drop(events.send(Happened::Core(event(written))));
        store_record(&self.worker, &self.clock, job, report);
    }

    fn ask_witness(&self, claim: Claim) {
        let events = self.events.clone();
        witness::ask(self.witness.as_ref(), claim, move |ruled| {
            let _ = events.send(Happened::Core(ruled.map_or_else(Event::WitnessSilent, Event::WitnessSays)));
        });
    }

    fn show_counters(&self) {
        self.update(Update::Transferred {
            round_pages: self.counters.pages.load(Ordering::Relaxed),
            wire_bytes: self.counters.wire_bytes.load(Ordering::Relaxed),
        });
    }

    fn update(&self, update: Update) {
        // A caller that does not listen has dropped the receiver.
        let _ = self.updates.send(update);
    }

    /// Waits for what is under way: jobs on the VM, threads of streams, queued messages.
    async fn close(mut self) {
        self.show_counters();
        if let Some(senders) = self.senders.take() {
            let _ = tokio::task::spawn_blocking(move || drop(senders)).await;
        }
        if let Some(closing) = self.closing.take() {
            let _ = closing.await;
        }
        self.update(Update::Streams(self.counters.streams()));
        self.worker.finish().await;
        if let Some(Connection { writer, reader }) = self.connection.take() {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, writer.finish()).await;
            reader.abort();
        }
    }
}

async fn read(mut reader: ControlReader, number: u64, events: mpsc::UnboundedSender<Happened>) {
    let unhandled = Arc::new(Semaphore::new(UNHANDLED_MAX));
    loop {
        let event = match reader.next().await {
            Ok(incoming) => Event::Message(incoming.message),
            Err(error) => Event::Disconnected(error.to_string()),
        };
        let ended = matches!(event, Event::Disconnected(_));
        let permit = unhandled.clone().acquire_owned().await.ok();
        if events.send(Happened::Link(number, LinkEvent::Event(event), permit)).is_err() || ended {
            return;
        }
    }
}
