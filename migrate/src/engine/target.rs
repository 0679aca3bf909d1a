//! The target's engine: [`Receiver`] listens and takes in one VM.
//!
//! Whatever knocks is sorted by its first bytes: a control connection, a data stream of the migration under way,
//! or neither. Garbage, strangers and failed attempts leave the receiver as it was, ready for the next one.

use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::frame::{DATA_MAGIC, JOIN_BYTES, Join};
use ferry_protocol::message::{Abort, AbortCode, Hello, NetworkIdentity};
use ferry_protocol::target::{Action, Config, Event, Outcome, Progress, Target};
use ferry_protocol::{MemoryDigest, MemoryLayout, Message, MigrationId, Record, StreamIndex, VmName};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::vm_worker::VmWorker;
use super::{CLOSE_TIMEOUT, sleep_until};
use crate::announce;
use crate::ports::{BuildRefusal, Clock, RecordStore, TargetHost, TargetVm, in_words, timed};
use crate::stream::{StreamEvent, receive_stream};
use crate::transport::control::{ControlError, ControlReader, ControlWriter, split};
use crate::transport::tcp;

/// How long a connection may take to say what it is.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that have not said yet what they are; more are closed at once.
const STRANGERS_MAX: usize = 128;

/// What the caller of [`Receiver::bind`] chooses.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// This host's name, shown at the source.
    pub host: String,
    /// The only VM that is taken, if the operator said one.
    pub name: Option<VmName>,
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
    listener: TcpListener,
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
    /// What the operating system says of the address.
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
        let listener = tcp::listen(options.listen)?;
        Ok(Self { listener, options, host, records, clock, updates })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for a VM, through as many failed attempts as there are, until one runs here and its source knows.
    /// `None` once `cancel` is true and nothing is under way that can't be given up.
    ///
    /// # Errors
    /// Only if this host is at its end: no thread can be started.
    pub async fn receive(&mut self, cancel: watch::Receiver<bool>) -> std::io::Result<Option<Received>> {
        let (strangers, mut sorted) = mpsc::channel(STRANGERS_MAX);
        let mut waiting = None;
        loop {
            let (hello, connection) = match waiting.take() {
                Some(newer) => newer,
                None => tokio::select! {
                    biased;
                    () = cancelled(cancel.clone()) => return Ok(None),
                    Some(knock) = sorted.recv() => match knock {
                        Knock::Hello(hello, connection) => (hello, connection),
                        // Late streams of an attempt that is over.
                        Knock::Join(..) => continue,
                    },
                    accepted = self.listener.accept() => {
                        sort(accepted, &strangers);
                        continue;
                    }
                },
            };
            let record = match self.records.load() {
                Ok(record) => record,
                Err(error) => {
                    let text = in_words(&*error);
                    connection.refuse(Abort::new(AbortCode::Epoch, text)).await;
                    continue;
                }
            };
            let attempt = Attempt::begin(self, *hello, connection, record)?;
            match attempt.run(&self.listener, &strangers, &mut sorted, cancel.clone()).await {
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

async fn cancelled(mut cancel: watch::Receiver<bool>) {
    if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A connection that has said what it is.
enum Knock {
    Hello(Box<Hello>, Link),
    Join(Join, TcpStream),
}

struct Link {
    peer: String,
    reader: ControlReader,
    writer: ControlWriter,
}

impl Link {
    async fn refuse(self, abort: Abort) {
        self.writer.send(&Message::Abort(abort));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.writer.finish()).await;
    }
}

/// Has a task of its own find out what a new connection is.
fn sort(accepted: std::io::Result<(TcpStream, SocketAddr)>, sorted: &mpsc::Sender<Knock>) {
    let (stream, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return tracing::warn!("a connection could not be accepted: {error}"),
    };
    let Ok(slot) = sorted.clone().try_reserve_owned() else {
        return tracing::warn!("{peer} was turned away: too many connections say nothing");
    };
    tokio::spawn(async move {
        match tokio::time::timeout(FIRST_BYTES_TIMEOUT, introduce(stream, peer)).await {
            Ok(Some(knock)) => drop(slot.send(knock)),
            Ok(None) => {}
            Err(_) => tracing::warn!("{peer} was turned away: it did not say what it wants"),
        }
    });
}

async fn introduce(mut stream: TcpStream, peer: SocketAddr) -> Option<Knock> {
    tcp::set_up(&stream).ok()?;
    let mut magic = [0; 4];
    while stream.peek(&mut magic).await.ok()? < magic.len() {
        // Fewer than four bytes are there yet; they come together or not at all, so this hardly repeats.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if magic == DATA_MAGIC {
        let mut join = [0; JOIN_BYTES];
        stream.read_exact(&mut join).await.ok()?;
        return match Join::decode(&join) {
            Ok(join) => Some(Knock::Join(join, stream)),
            Err(error) => {
                tracing::warn!("{peer} was turned away: {error}");
                None
            }
        };
    }
    let (mut reader, writer) = split(stream);
    let abort = match reader.next().await {
        Ok(Message::Hello(hello)) => {
            let link = Link { peer: peer.to_string(), reader, writer };
            return Some(Knock::Hello(Box::new(hello), link));
        }
        Ok(message) => {
            Abort::new(AbortCode::Protocol, format!("a {:?} came before Hello", message.message_type()))
        }
        Err(error @ ControlError::Wire(ferry_protocol::wire::WireError::Version(_))) => {
            Abort::new(AbortCode::Version, error.to_string())
        }
        Err(error) => Abort::new(AbortCode::Protocol, error.to_string()),
    };
    tracing::warn!("{peer} was turned away: {}", abort.sentence);
    writer.send(&Message::Abort(abort));
    writer.finish().await;
    None
}

enum Ended {
    Received(Received),
    Discarded { reason: String, newer: Option<Newer> },
}

/// The next attempt, which waits until this one is over.
type Newer = (Box<Hello>, Link);

enum Happened {
    Core(Event),
    Link(u64, Event),
    Built(Result<(Arc<dyn TargetVm>, MemoryLayout, u16), BuildRefusal>),
}

struct Connection {
    writer: ControlWriter,
    reader: JoinHandle<()>,
}

/// The data streams that the migration under way expects.
struct Streams {
    vm: Arc<dyn TargetVm>,
    count: u16,
    joined: Vec<bool>,
    sockets: Vec<std::net::TcpStream>,
}

/// One migration from `Hello` to its end.
struct Attempt {
    core: Target,
    migration: MigrationId,
    host: Arc<dyn TargetHost>,
    records: Arc<dyn RecordStore>,
    clock: Arc<dyn Clock>,
    updates: mpsc::UnboundedSender<Progress>,
    worker: VmWorker,
    events: mpsc::UnboundedSender<Happened>,
    inbox: mpsc::UnboundedReceiver<Happened>,
    connection: Connection,
    connection_number: u64,
    streams: Option<Streams>,
    newer: Option<Newer>,
    outcome: Option<Outcome>,
}

impl Attempt {
    fn begin(receiver: &Receiver, hello: Hello, link: Link, record: Option<Record>) -> std::io::Result<Self> {
        let config = Config {
            host: receiver.options.host.clone(),
            source: link.peer.clone(),
            name: receiver.options.name.clone(),
            record,
        };
        let now = receiver.clock.now();
        let mut core = Target::new(config, now);
        let migration = hello.migration;
        core.handle(now, Event::Message(Message::Hello(hello)));
        let (events, inbox) = mpsc::unbounded_channel();
        let connection = connect(link, 0, &events);
        Ok(Self {
            core,
            migration,
            host: Arc::clone(&receiver.host),
            records: Arc::clone(&receiver.records),
            clock: Arc::clone(&receiver.clock),
            updates: receiver.updates.clone(),
            worker: VmWorker::start()?,
            events,
            inbox,
            connection,
            connection_number: 0,
            streams: None,
            newer: None,
            outcome: None,
        })
    }

    async fn run(
        mut self,
        listener: &TcpListener,
        strangers: &mpsc::Sender<Knock>,
        sorted: &mut mpsc::Receiver<Knock>,
        mut cancel: watch::Receiver<bool>,
    ) -> Ended {
        loop {
            while let Some(action) = self.core.poll_action() {
                self.perform(action);
            }
            if let Some(outcome) = self.outcome.take() {
                return self.close(outcome).await;
            }
            let timeout = self.core.poll_timeout();
            let event = tokio::select! {
                Some(happened) = self.inbox.recv() => self.digest(happened),
                () = sleep_until(&*self.clock, timeout) => Some(Event::Timeout),
                () = cancelled(cancel.clone()) => {
                    cancel = watch::channel(false).1;
                    Some(Event::Cancel)
                }
                Some(knock) = sorted.recv() => self.knock(knock).await,
                accepted = listener.accept() => {
                    sort(accepted, strangers);
                    None
                }
            };
            if let Some(event) = event {
                self.core.handle(self.clock.now(), event);
            }
        }
    }

    fn digest(&mut self, happened: Happened) -> Option<Event> {
        match happened {
            Happened::Core(event) => Some(event),
            Happened::Link(number, event) => (number == self.connection_number).then_some(event),
            Happened::Built(Ok((vm, ..))) if self.core.is_ending() => {
                vm.discard();
                None
            }
            Happened::Built(Ok((vm, layout, count))) => {
                if vm.pages().layout() != layout {
                    vm.discard();
                    let sentence = "the machine that was built has another memory layout than the source's";
                    return Some(Event::BuildFailed {
                        code: AbortCode::CannotBuild,
                        sentence: sentence.to_owned(),
                    });
                }
                let joined = vec![false; usize::from(count)];
                self.streams = Some(Streams { vm, count, joined, sockets: Vec::new() });
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
            Knock::Hello(hello, link) if self.core.resumed_by(&hello) => {
                self.connection_number += 1;
                let connection = connect(link, self.connection_number, &self.events);
                std::mem::replace(&mut self.connection, connection).reader.abort();
                Some(Event::Reconnected)
            }
            Knock::Hello(hello, link)
                if self.newer.is_none() && (self.core.is_ending() || self.core.superseded_by(&hello)) =>
            {
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

    /// Takes a data stream, if it belongs to this migration and has not joined before.
    fn join(&mut self, join: Join, stream: TcpStream) -> Option<Event> {
        let streams = self.streams.as_mut().filter(|_| join.migration == self.migration)?;
        let index = StreamIndex::new(join.stream, streams.count)?;
        let joined = streams.joined.get_mut(usize::from(join.stream))?;
        if std::mem::replace(joined, true) {
            return None;
        }
        match receive_on(stream, Arc::clone(&streams.vm), index, streams.count, self.events.clone()) {
            Ok(socket) => {
                streams.sockets.push(socket);
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
            Action::Send(message) => self.connection.writer.send(&message),
            Action::WriteRecord(record) => self.write_record(record),
            Action::BuildMachine { description, layout, streams } => {
                let (host, events) = (Arc::clone(&self.host), self.events.clone());
                self.worker.run(move || {
                    let built = host.build(&description, &layout).map(|vm| (vm, layout, streams));
                    let _ = events.send(Happened::Built(built));
                });
            }
            Action::DropStaleFrames => self.on_vm(|vm| {
                vm.drop_stale_frames();
                None
            }),
            Action::RestoreState(state) => {
                let clock = Arc::clone(&self.clock);
                self.on_vm(move |vm| {
                    let (restored, took) = timed(&*clock, || vm.restore(&state));
                    Some(match restored {
                        Ok(()) => Event::StateRestored { took },
                        Err(error) => Event::RestoreFailed(in_words(&*error)),
                    })
                });
            }
            Action::RunVm { runs } => {
                let clock = Arc::clone(&self.clock);
                self.on_vm(move |vm| {
                    let (running, took) = timed(&*clock, || vm.run(runs));
                    Some(match running {
                        Ok(()) => Event::VmRunning { took },
                        Err(error) => Event::RunFailed(in_words(&*error)),
                    })
                });
            }
            Action::Announce(network) => self.announce(network),
            Action::DiscardMachine => self.discard(),
            Action::Report(progress) => {
                let _ = self.updates.send(progress);
            }
            Action::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn write_record(&self, record: Record) {
        let (records, clock) = (Arc::clone(&self.records), Arc::clone(&self.clock));
        let events = self.events.clone();
        self.worker.run(move || {
            let (written, took) = timed(&*clock, || records.store(&record));
            let event = match written {
                Ok(()) => Event::RecordWritten { took },
                Err(error) => Event::RecordFailed(in_words(&*error)),
            };
            let _ = events.send(Happened::Core(event));
        });
    }

    fn on_vm(&self, job: impl FnOnce(&dyn TargetVm) -> Option<Event> + Send + 'static) {
        let Some(streams) = &self.streams else { return };
        let (vm, events) = (Arc::clone(&streams.vm), self.events.clone());
        self.worker.run(move || {
            if let Some(event) = job(&*vm) {
                let _ = events.send(Happened::Core(event));
            }
        });
    }

    fn announce(&self, network: NetworkIdentity) {
        let Some(streams) = &self.streams else { return };
        tokio::spawn(announce::announce(Arc::clone(&streams.vm), network));
    }

    fn discard(&mut self) {
        let Some(streams) = self.streams.take() else { return };
        close_sockets(&streams.sockets);
        self.worker.run(move || streams.vm.discard());
    }

    async fn close(mut self, outcome: Outcome) -> Ended {
        let streams = self.streams.take();
        if let Some(streams) = &streams {
            close_sockets(&streams.sockets);
        }
        self.worker.finish().await;
        // A machine that was still being built when the attempt was given up.
        while let Ok(happened) = self.inbox.try_recv() {
            if let Happened::Built(Ok((vm, ..))) = happened {
                vm.discard();
            }
        }
        let Connection { writer, reader } = self.connection;
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, writer.finish()).await;
        reader.abort();
        match (outcome, streams) {
            (Outcome::Discarded { reason }, _) => Ended::Discarded { reason, newer: self.newer },
            (outcome @ Outcome::Running { digest, .. }, Some(streams)) => {
                Ended::Received(Received { vm: streams.vm, outcome, digest })
            }
            (Outcome::Running { .. }, None) => unreachable!("a guest that runs has a machine"),
        }
    }
}

fn close_sockets(sockets: &[std::net::TcpStream]) {
    for socket in sockets {
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn connect(link: Link, number: u64, events: &mpsc::UnboundedSender<Happened>) -> Connection {
    let Link { mut reader, writer, .. } = link;
    let events = events.clone();
    let reader = tokio::spawn(async move {
        loop {
            let event = match reader.next().await {
                Ok(message) => Event::Message(message),
                Err(error) => Event::Disconnected(error.to_string()),
            };
            let ended = matches!(event, Event::Disconnected(_));
            if events.send(Happened::Link(number, event)).is_err() || ended {
                return;
            }
        }
    });
    Connection { writer, reader }
}

/// Starts a stream's thread; gives the socket back for shutting it.
fn receive_on(
    stream: TcpStream,
    vm: Arc<dyn TargetVm>,
    index: StreamIndex,
    count: u16,
    events: mpsc::UnboundedSender<Happened>,
) -> std::io::Result<std::net::TcpStream> {
    let socket = stream.into_std()?;
    tcp::set_up_data(&socket, None)?;
    let handle = socket.try_clone()?;
    let pages = vm.pages();
    std::thread::Builder::new().name(format!("ferry-recv-{}", index.number())).spawn(move || {
        let report = |event| {
            let event = match event {
                StreamEvent::Fence { fence, digest } => Event::FenceReached { stream: index, fence, digest },
                StreamEvent::Failed(error) => Event::StreamFailed {
                    code: error.code(),
                    sentence: format!("data stream {}: {error}", index.number()),
                },
            };
            let _ = events.send(Happened::Core(event));
        };
        receive_stream(socket, pages, index, count, &report);
    })?;
    Ok(handle)
}
