//! The target's engine: [`Receiver`] listens and takes in one VM.
//!
//! Whatever knocks is sorted by its first bytes: a control connection, a data stream of the migration under way,
//! or neither. Garbage, strangers and failed attempts leave the receiver as it was, ready for the next one.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::frame::Join;
use ferry_protocol::message::{Abort, AbortCode, Hello, NetworkIdentity};
use ferry_protocol::target::{Action, Config, Event, Outcome, Progress, Target};
use ferry_protocol::witness::Claim;
use ferry_protocol::{MemoryDigest, MemoryLayout, Message, Record, VmId, VmName};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::connection::{Connection, connect};
use super::door::{Door, Joining, Knock, Link, sort};
use super::incoming::{Admission, Streams};
use super::lobby::{STRANGERS_MAX, TurnedAway};
use super::origin::Origin;
use super::vm_worker::VmWorker;
use super::witness::{self, Agreed, Known, known_of};
use super::{CLOSE_TIMEOUT, PANICKED, cancelled, sleep_until, store_record};
use crate::announce;
use crate::fault;
use crate::ports::{BuildRefusal, Clock, PortError, RecordStore, TargetHost, TargetVm, in_words, timed};
use crate::transport::endpoint::ListenAddress;
use crate::transport::security::Security;
use crate::witness::Witness;

/// What the caller of [`Receiver::bind`] chooses.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// Where to listen.
    pub listen: ListenAddress,
    /// Who is let in. Without TLS and without [`Security::Insecure`] only what comes from this very host.
    pub security: Security,
    /// This host's name, shown at the source.
    pub host: String,
    /// The only VM that is taken, if the operator said one.
    pub name: Option<VmName>,
    /// Who decides what is in doubt, if this host has a witness. The source must have the same.
    pub witness: Option<Arc<dyn Witness>>,
}

/// The guest that a receiver took in.
#[derive(Clone)]
pub struct Received {
    /// Its machine, running unless its operator had paused it.
    pub vm: Arc<dyn TargetVm>,
    /// What it is.
    pub outcome: Outcome,
    /// The digest on which both sides agreed.
    pub digest: MemoryDigest,
}

impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Received").field("outcome", &self.outcome).finish_non_exhaustive()
    }
}

/// A bound listener that takes in one VM.
pub struct Receiver {
    door: Door,
    options: ReceiveOptions,
    host: Arc<dyn TargetHost>,
    records: Arc<dyn RecordStore>,
    clock: Arc<dyn Clock>,
    updates: mpsc::UnboundedSender<Progress>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Receiver {
    /// Binds the listener. `updates` hears of what happens from then on.
    ///
    /// # Errors
    /// What the operating system says of the address, and `PermissionDenied` with the ways out for one that is open to
    /// a network without TLS.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(
        options: ReceiveOptions,
        host: Arc<dyn TargetHost>,
        records: Arc<dyn RecordStore>,
        clock: Arc<dyn Clock>,
        updates: mpsc::UnboundedSender<Progress>,
    ) -> std::io::Result<Self> {
        let door = Door::open(&options.listen, &options.security)?;
        Ok(Self { door, options, host, records, clock, updates })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_address(&self) -> std::io::Result<ListenAddress> {
        self.door.address()
    }

    /// Whom it has turned away so far.
    #[must_use]
    pub fn turned_away(&self) -> Arc<TurnedAway> {
        self.door.turned_away()
    }

    /// Waits for a VM, through as many failed attempts as there are, until one runs here and its source knows.
    /// `None` once `cancel` is true and nothing is under way that can't be given up.
    ///
    /// # Errors
    /// Only if this host is at its end: no thread can be started.
    pub async fn receive(&mut self, mut cancel: watch::Receiver<bool>) -> std::io::Result<Option<Received>> {
        let (strangers, mut sorted) = mpsc::channel(STRANGERS_MAX);
        let mut waiting = None;
        loop {
            let (hello, connection) = match waiting.take() {
                Some(newer) => newer,
                None => tokio::select! {
                    biased;
                    () = cancelled(&mut cancel) => return Ok(None),
                    Some(knock) = sorted.recv() => match knock {
                        Knock::Hello(hello, connection) => (hello, connection),
                        // Late streams of an attempt that is over.
                        Knock::Join(..) => continue,
                    },
                    arrival = self.door.accept() => {
                        sort(arrival, &strangers);
                        continue;
                    }
                },
            };
            let witness = self.options.witness.as_ref();
            let known = match known_of(&hello, &*self.records, witness, &mut cancel).await {
                Ok(known) => known,
                Err(abort) => {
                    connection.refuse(abort).await;
                    continue;
                }
            };
            let attempt = Attempt::begin(self, *hello, connection, known)?;
            match attempt.run(&self.door, &strangers, &mut sorted, cancel.clone()).await {
                Ended::Received(received) => return Ok(Some(received)),
                Ended::Discarded { reason, newer } => {
                    tracing::info!("the migration was given up: {reason}");
                    let _ = self.updates.send(Progress::GivenUp { reason });
                    waiting = newer;
                }
            }
        }
    }
}

enum Ended {
    Received(Received),
    Discarded { reason: String, newer: Option<Newer> },
}

/// The next attempt, which waits until this one is over.
type Newer = (Box<Hello>, Link);

pub(super) struct BuiltMachine {
    vm: Arc<dyn TargetVm>,
    layout: MemoryLayout,
    streams: u16,
    verify: bool,
}

pub(super) enum Happened {
    Core(Event),
    /// Of the connection with this number. The permit bounds how many wait.
    Link(u64, Event, Option<OwnedSemaphorePermit>),
    /// Guest memory came over the connection with this number; the message that says so follows.
    Memory(u64, OwnedFd),
    Built(Result<BuiltMachine, BuildRefusal>),
}

/// One migration from `Hello` to its end.
struct Attempt {
    core: Target,
    vm: VmId,
    admission: Admission,
    host: Arc<dyn TargetHost>,
    records: Arc<dyn RecordStore>,
    clock: Arc<dyn Clock>,
    updates: mpsc::UnboundedSender<Progress>,
    worker: VmWorker,
    turned_away: Arc<TurnedAway>,
    events: mpsc::UnboundedSender<Happened>,
    inbox: mpsc::UnboundedReceiver<Happened>,
    connection: Option<Connection>,
    connection_number: u64,
    origin: Origin,
    /// What the source has handed over, until a machine is built on it.
    memory: Option<OwnedFd>,
    streams: Option<Streams>,
    newer: Option<Newer>,
    witness: Option<Agreed>,
    outcome: Option<Outcome>,
}

impl Attempt {
    fn begin(receiver: &Receiver, hello: Hello, link: Link, known: Known) -> std::io::Result<Self> {
        let config = Config {
            host: receiver.options.host.clone(),
            source: link.peer.clone(),
            carries_descriptors: link.reader.carries_descriptors(),
            name: receiver.options.name.clone(),
            record: known.record,
            witness: known.witness.as_ref().map(|agreed| agreed.id),
        };
        let now = receiver.clock.now();
        let vm = hello.vm;
        let admission = Admission::new(&hello)?;
        let origin = Origin { name: hello.name.clone(), identity: link.identity.clone() };
        let mut core = Target::new(config, now).with_admission(admission.secret.clone());
        let greeted = Event::Message(Message::Hello(hello));
        fault::target_event(&greeted);
        core.handle(now, greeted);
        let (events, inbox) = mpsc::unbounded_channel();
        let connection = connect(link, 0, &events);
        Ok(Self {
            core,
            vm,
            admission,
            host: Arc::clone(&receiver.host),
            records: Arc::clone(&receiver.records),
            clock: Arc::clone(&receiver.clock),
            updates: receiver.updates.clone(),
            worker: VmWorker::start()?,
            turned_away: receiver.door.turned_away(),
            events,
            inbox,
            connection: Some(connection),
            connection_number: 0,
            origin,
            memory: None,
            streams: None,
            newer: None,
            witness: known.witness,
            outcome: None,
        })
    }

    async fn run(
        mut self,
        door: &Door,
        strangers: &mpsc::Sender<Knock>,
        sorted: &mut mpsc::Receiver<Knock>,
        mut cancel: watch::Receiver<bool>,
    ) -> Ended {
        loop {
            while let Some(action) = self.core.poll_action() {
                fault::target_action(&action);
                self.perform(action);
            }
            if let Some(outcome) = self.outcome.take() {
                return self.close(outcome).await;
            }
            let timeout = self.core.poll_timeout();
            let event = tokio::select! {
                Some(happened) = self.inbox.recv() => self.digest(happened),
                () = sleep_until(&*self.clock, timeout) => Some(Event::Timeout),
                () = cancelled(&mut cancel) => {
                    cancel = watch::channel(false).1;
                    Some(Event::Cancel)
                }
                Some(knock) = sorted.recv() => self.knock(knock).await,
                arrival = door.accept() => {
                    sort(arrival, strangers);
                    None
                }
            };
            if let Some(event) = event {
                fault::target_event(&event);
                self.core.handle(self.clock.now(), event);
            }
        }
    }

    fn digest(&mut self, happened: Happened) -> Option<Event> {
        match happened {
            Happened::Core(event) => Some(event),
            Happened::Link(number, event, permit) => {
                drop(permit);
                (number == self.connection_number).then_some(event)
            }
            Happened::Memory(number, memory) => {
                self.memory = Some(memory).filter(|_| number == self.connection_number);
                None
            }
            Happened::Built(Ok(BuiltMachine { vm, .. })) if self.core.is_ending() => {
                vm.discard();
                None
            }
            Happened::Built(Ok(BuiltMachine { vm, layout, streams: count, verify })) => {
                if vm.pages().layout() != layout {
                    vm.discard();
                    let sentence = "the machine that was built has another memory layout than the source's";
                    return Some(Event::BuildFailed {
                        code: AbortCode::CannotBuild,
                        sentence: sentence.to_owned(),
                    });
                }
                self.streams = Some(Streams::new(vm, count, verify, self.admission.clone()));
                Some(Event::MachineBuilt)
            }
            Happened::Built(Err(refusal)) => {
                Some(Event::BuildFailed { code: refusal.code, sentence: refusal.to_string() })
            }
        }
    }

    /// What a further connection means for the migration under way.
    async fn knock(&mut self, knock: Knock) -> Option<Event> {
        match knock {
            Knock::Join(join, stream) => self.join(join, stream),
            Knock::Hello(hello, link)
                if self.core.resumed_by(&hello) && self.origin.is_host_of(link.identity.as_ref()) =>
            {
                self.connection_number += 1;
                self.origin.identity.clone_from(&link.identity);
                let connection = connect(link, self.connection_number, &self.events);
                if let Some(old) = self.connection.replace(connection) {
                    old.reader.abort();
                }
                Some(Event::Reconnected)
            }
            Knock::Hello(hello, link) if self.newer.is_none() && self.gives_way_to(&hello, &link) => {
                self.newer = Some((hello, link));
                Some(Event::Cancel)
            }
            Knock::Hello(hello, link) => {
                let text = format!(
                    "this target is busy ({}); VM '{}' needs a target of its own",
                    self.core.phase(),
                    hello.name
                );
                link.refuse(Abort::new(AbortCode::Occupied, text)).await;
                None
            }
        }
    }

    /// Whether this migration is over for another.
    fn gives_way_to(&self, hello: &Hello, link: &Link) -> bool {
        let newer = || self.core.superseded_by(hello) && self.origin.yields_to(link.identity.as_ref());
        self.core.is_ending() || newer()
    }

    /// Takes a data stream, if it belongs to this migration, comes from its source and has not joined before.
    fn join(&mut self, join: Join, joining: Joining) -> Option<Event> {
        let same = self.origin.is_same(joining.identity.as_ref());
        let peer = joining.peer.clone();
        let streams = self.streams.as_mut().filter(|_| same);
        let events = self.events.clone();
        let report = move |event| drop(events.send(Happened::Core(event)));
        match streams.map_or(Ok(false), |streams| streams.take(&join, joining, report)) {
            Ok(true) => None,
            Ok(false) => {
                self.turned_away.stream(&peer, "its data stream is none that is waited for");
                None
            }
            Err(error) => Some(Event::StreamFailed {
                code: AbortCode::Internal,
                sentence: format!("data stream {} can't be taken: {error}", join.stream),
            }),
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                if let Some(connection) = &self.connection {
                    connection.writer.send(&message);
                }
            }
            Action::EndStreams => self.interrupt_streams(),
            Action::ExpectStreams { session, digest } => {
                if let Some(streams) = &mut self.streams {
                    streams.expect(session, digest);
                }
            }
            Action::HangUp => self.hang_up(),
            Action::WriteRecord(record) => self.write_record(record),
            Action::RehearseRecord(record) => self.rehearse_record(record),
            Action::ProbeWitness => self.probe_witness(),
            Action::AskWitness(claim) => self.ask_witness(claim),
            Action::BuildMachine { description, layout, streams, verify } => {
                self.build(layout, (streams, verify), move |host, vm, layout| {
                    host.build(vm, &description, layout)
                });
            }
            Action::AdoptMemory { description, layout } => {
                let memory = self.memory.take();
                self.build(layout, (0, false), move |host, vm, layout| {
                    let memory = memory.ok_or_else(|| BuildRefusal {
                        code: AbortCode::Protocol,
                        cause: "no descriptor of guest memory came".into(),
                    })?;
                    host.adopt(vm, &description, layout, memory)
                });
            }
            Action::DropStaleFrames => self.on_vm(
                |vm| {
                    vm.drop_stale_frames();
                    None
                },
                Event::RestoreFailed,
            ),
            Action::RestoreState(state) => {
                let clock = Arc::clone(&self.clock);
                let restore = move |vm: &dyn TargetVm| {
                    let (restored, took) = timed(&*clock, || vm.restore(&state));
                    let failed = |error: PortError| Event::RestoreFailed(in_words(&*error));
                    Some(restored.map_or_else(failed, |()| Event::StateRestored { took }))
                };
                self.on_vm(restore, Event::RestoreFailed);
            }
            Action::RunVm { runs } => {
                let clock = Arc::clone(&self.clock);
                let run = move |vm: &dyn TargetVm| {
                    let (running, took) = timed(&*clock, || vm.run(runs));
                    let failed = |error: PortError| Event::RunFailed(in_words(&*error));
                    Some(running.map_or_else(failed, |()| Event::VmRunning { took }))
                };
                // A panic may have come after the first vCPU had been started.
                self.on_vm(run, Event::RunBroke);
            }
            Action::Announce(network) => self.announce(network),
            Action::DiscardMachine => self.discard(),
            Action::Report(progress) => drop(self.updates.send(progress)),
            Action::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    /// Has `build` make the machine, for `streams` data streams.
    fn build(
        &self,
        layout: MemoryLayout,
        (streams, verify): (u16, bool),
        build: impl FnOnce(&dyn TargetHost, VmId, &MemoryLayout) -> Result<Arc<dyn TargetVm>, BuildRefusal>
        + Send
        + 'static,
    ) {
        let (host, vm, events) = (Arc::clone(&self.host), self.vm, self.events.clone());
        let panicked = self.events.clone();
        self.worker.run(
            move || {
                let built = build(&*host, vm, &layout).map(|vm| BuiltMachine { vm, layout, streams, verify });
                let _ = events.send(Happened::Built(built));
            },
            move || {
                let refusal = BuildRefusal { code: AbortCode::Internal, cause: PANICKED.into() };
                let _ = panicked.send(Happened::Built(Err(refusal)));
            },
        );
    }

    fn probe_witness(&self) {
        let events = self.events.clone();
        witness::probe(self.witness.as_ref(), &self.clock, move |probed| {
            let event = probed.map_or_else(Event::WitnessSilent, |took| Event::WitnessProbed { took });
            let _ = events.send(Happened::Core(event));
        });
    }

    fn ask_witness(&self, claim: Claim) {
        let events = self.events.clone();
        witness::ask(self.witness.as_ref(), claim, move |ruled| {
            let _ = events.send(Happened::Core(ruled.map_or_else(Event::WitnessSilent, Event::WitnessSays)));
        });
    }

    fn write_record(&self, record: Record) {
        self.store(record, |written| match written {
            Ok(took) => Event::RecordWritten { took },
            Err(reason) => Event::RecordFailed(reason),
        });
    }

    fn rehearse_record(&self, record: Record) {
        self.store(record, |written| match written {
            Ok(took) => Event::RecordRehearsed { took },
            Err(reason) => Event::RehearsalFailed(reason),
        });
    }

    fn store(&self, record: Record, event: fn(Result<Duration, String>) -> Event) {
        let (records, events) = (Arc::clone(&self.records), self.events.clone());
        let report = move |written| drop(events.send(Happened::Core(event(written))));
        store_record(&self.worker, &self.clock, move || records.store(&record), report);
    }

    /// Runs `job` on the VM's thread and hands its event, `failed` for a panic, to the core.
    fn on_vm(
        &self,
        job: impl FnOnce(&dyn TargetVm) -> Option<Event> + Send + 'static,
        failed: fn(String) -> Event,
    ) {
        let Some(streams) = &self.streams else { return };
        let (vm, events, panicked) = (Arc::clone(&streams.vm), self.events.clone(), self.events.clone());
        self.worker.run(
            move || {
                if let Some(event) = job(&*vm) {
                    let _ = events.send(Happened::Core(event));
                }
            },
            move || drop(panicked.send(Happened::Core(failed(PANICKED.to_owned())))),
        );
    }

    fn announce(&self, network: NetworkIdentity) {
        let Some(streams) = &self.streams else { return };
        tokio::spawn(announce::announce(Arc::clone(&streams.vm), network));
    }

    /// Closes the control connection behind what was sent on it; what comes on it no longer counts.
    fn hang_up(&mut self) {
        self.connection_number += 1;
        if let Some(Connection { writer, reader }) = self.connection.take() {
            reader.abort();
            drop(writer);
        }
    }

    /// Ends the streams and finds out what they have brought.
    fn interrupt_streams(&mut self) {
        let Some(streams) = &mut self.streams else { return };
        let interrupt = streams.interrupt();
        let (events, panicked) = (self.events.clone(), self.events.clone());
        self.worker.run(
            move || drop(events.send(Happened::Core(interrupt()))),
            move || drop(panicked.send(Happened::Core(Event::RestoreFailed(PANICKED.to_owned())))),
        );
    }

    /// Ends the streams: nothing a peer sends from now on may reach guest memory. Jobs on the VM that are queued
    /// afterwards find their threads gone.
    fn end_streams(&mut self) {
        if let Some(streams) = &mut self.streams {
            let end = streams.end();
            self.worker.run(
                move || {
                    end();
                },
                || {},
            );
        }
    }

    fn discard(&mut self) {
        self.end_streams();
        if let Some(Streams { vm, .. }) = self.streams.take() {
            // Its memory is freed with it, before the next attempt asks how much there is.
            self.worker.run(move || vm.discard(), || {});
        }
    }

    async fn close(mut self, outcome: Outcome) -> Ended {
        self.end_streams();
        let streams = self.streams.take();
        self.worker.finish().await;
        // A machine that was still being built when the attempt was given up.
        while let Ok(happened) = self.inbox.try_recv() {
            if let Happened::Built(Ok(BuiltMachine { vm, .. })) = happened {
                vm.discard();
            }
        }
        if let Some(Connection { writer, reader }) = self.connection {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, writer.finish()).await;
            reader.abort();
        }
        match (outcome, streams) {
            (Outcome::Discarded { reason }, _) => Ended::Discarded { reason, newer: self.newer },
            (outcome @ Outcome::Running { digest, .. }, Some(streams)) => {
                Ended::Received(Received { vm: streams.vm, outcome, digest })
            }
            (Outcome::Running { .. }, None) => unreachable!("a guest that runs has a machine"),
        }
    }
}
