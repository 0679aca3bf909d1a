//! The source's data streams: their connections, the rounds that they are handed, and what they share. What each does
//! with a round is in [`super::sender`].

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_protocol::admission::{JoinKey, Place};
use ferry_protocol::frame::Join;
use ferry_protocol::page::Compression;
use ferry_protocol::source::RoundSent;
use ferry_protocol::streams::StreamTuner;
use ferry_protocol::{ChunkIndex, Epoch, MemoryDigest, MigrationId, PageBitmap, PageMask, StreamIndex, VmId};
use ferry_vmm::confine::{self, Role};

use super::encoders::{Encoders, Tools};
use super::sender::Sender;
use super::sent::SentMemory;
use super::whole::WholeDigest;
use crate::bandwidth::Bandwidth;
use crate::ports::{Clock, GuestPages};
use crate::report::StreamWork;
use crate::transport::security::Dialer;

/// How long a stream may be unable to write before it counts as stalled.
pub(super) const STALL_MAX: Duration = Duration::from_secs(10);

/// How long a stream that is not to work sleeps before it asks again.
const IDLE_FOR: Duration = Duration::from_millis(1);

/// What all streams of a migration share.
pub(crate) struct SenderOptions {
    /// How many threads pack, which a data thread could not find out.
    pub(super) packers: usize,
    /// Makes the connections.
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) migration: MigrationId,
    vm: VmId,
    epoch: Epoch,
    pub(crate) streams: u16,
    pub(crate) compression: Compression,
    pub(crate) pages: Arc<dyn GuestPages>,
    pub(crate) bandwidth: Arc<Bandwidth>,
    pub(crate) counters: Arc<TransferCounters>,
    pub(crate) clock: Arc<dyn Clock>,
    /// What the target has.
    pub(super) sent: Arc<SentMemory>,
    /// Started when first needed.
    encoders: Mutex<Option<Arc<Encoders>>>,
    /// How many streams work, if that is to be found out.
    tuner: Option<Mutex<StreamTuner>>,
    working: AtomicU16,
}

/// What the engine decides about the streams.
pub(crate) struct StreamSettings {
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) migration: MigrationId,
    pub(crate) vm: VmId,
    /// The epoch in which it runs here.
    pub(crate) epoch: Epoch,
    pub(crate) streams: u16,
    /// Whether only as many of them work as pay.
    pub(crate) adapt_streams: bool,
    pub(crate) compression: Compression,
}

impl SenderOptions {
    pub(crate) fn new(
        settings: StreamSettings,
        pages: Arc<dyn GuestPages>,
        bandwidth: Arc<Bandwidth>,
        counters: Arc<TransferCounters>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let StreamSettings { dialer, migration, vm, epoch, streams, adapt_streams, compression } = settings;
        let tuner = adapt_streams.then(|| Mutex::new(StreamTuner::new(streams, clock.now())));
        let working = AtomicU16::new(if adapt_streams { 1 } else { streams });
        let sent = Arc::new(SentMemory::new(pages.layout().page_count()));
        Self {
            dialer,
            migration,
            vm,
            epoch,
            streams,
            compression,
            pages,
            bandwidth,
            counters,
            clock,
            sent,
            packers: Encoders::threads(),
            encoders: Mutex::new(None),
            tuner,
            working,
        }
    }

    fn place(&self, session: u32, stream: u16) -> Place {
        Place { vm: self.vm, epoch: self.epoch, migration: self.migration, session, stream }
    }

    /// Whether it is this stream's turn to work.
    fn works(&self, stream: StreamIndex) -> bool {
        let Some(tuner) = &self.tuner else { return true };
        // Whoever does not get the lock goes by what the other decides.
        if let Ok(mut tuner) = tuner.try_lock() {
            let working = tuner.step(self.clock.now(), self.counters.wire_bytes.load(Ordering::Relaxed));
            self.working.store(working, Ordering::Relaxed);
        }
        stream.number() < self.working.load(Ordering::Relaxed)
    }

    /// A round begins.
    fn interrupt_tuning(&self) {
        if let Some(tuner) = &self.tuner {
            let mut tuner = tuner.lock().unwrap_or_else(PoisonError::into_inner);
            tuner.interrupt(self.clock.now(), self.counters.wire_bytes.load(Ordering::Relaxed));
        }
    }

    /// Ends the threads that pack, once they have done what they were given: nobody waits for it any more.
    fn end_encoders(&self) {
        let encoders = self.encoders.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(encoders);
    }

    /// The threads that pack.
    pub(super) fn encoders(&self) -> io::Result<Arc<Encoders>> {
        let mut encoders = self.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(encoders) = &*encoders {
            return Ok(Arc::clone(encoders));
        }
        let (pages, sent, clock) = (Arc::clone(&self.pages), Arc::clone(&self.sent), Arc::clone(&self.clock));
        let started = Arc::new(Encoders::start(Tools { pages, sent, clock }, self.packers)?);
        Ok(Arc::clone(encoders.insert(started)))
    }
}

/// What has been sent so far, for showing while a round is under way.
#[derive(Debug, Default)]
pub(crate) struct TransferCounters {
    pub(crate) pages: AtomicU64,
    pub(crate) wire_bytes: AtomicU64,
    streams: Mutex<Vec<StreamWork>>,
}

impl TransferCounters {
    /// What each stream has done in the rounds that it has finished.
    pub(crate) fn streams(&self) -> Vec<StreamWork> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn add(&self, stream: StreamIndex, work: &StreamWork) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::from(stream.number());
        if streams.len() <= index {
            streams.resize(index + 1, StreamWork::default());
        }
        streams[index].add(work);
    }
}

/// What the streams report.
pub(crate) trait Done: Fn(Result<RoundSent, String>) + Send + Sync + 'static {}
impl<F: Fn(Result<RoundSent, String>) + Send + Sync + 'static> Done for F {}

pub(super) struct Round {
    pub(super) pages: PageBitmap,
    /// The number of the next chunk that no stream has taken.
    next: AtomicU64,
    pub(super) fence: u32,
    pub(super) paused: bool,
    /// Whether no round has reached the target yet.
    pub(super) first: bool,
    /// The streams are being closed: there is nothing more to do.
    closed: Arc<AtomicBool>,
    pub(super) gathered: Mutex<Gathered>,
}

impl Round {
    /// The next chunk that has pages, for `stream`, once it is its turn to work; `None` when there is none left.
    pub(super) fn next(
        &self,
        stream: StreamIndex,
        options: &SenderOptions,
    ) -> Option<(ChunkIndex, PageMask)> {
        let page_count = self.pages.page_count();
        while !self.closed.load(Ordering::Relaxed) {
            if !options.works(stream) {
                // Only the first round is long enough to change one's mind in it. In any other a stream that waits would
                // only keep the rest waiting for its fence.
                if !self.first || self.paused {
                    return None;
                }
                ChunkIndex::new(self.next.load(Ordering::Relaxed), page_count)?;
                thread::sleep(IDLE_FOR);
                continue;
            }
            let chunk = ChunkIndex::new(self.next.fetch_add(1, Ordering::Relaxed), page_count)?;
            let mask = self.pages.chunk(chunk);
            if !mask.is_empty() {
                return Some((chunk, mask));
            }
        }
        None
    }
}

pub(super) struct Gathered {
    pub(super) streams_left: u16,
    pub(super) sum: RoundSent,
    /// How long every stream has waited for the cap, at least.
    waited_min: Duration,
    /// How long the link was busy meanwhile, at most: as if the streams' pieces never overlapped.
    busy_max: Duration,
    /// The digest of all of memory, if it is wanted.
    whole: Option<WholeDigest>,
}

impl Gathered {
    pub(super) fn add(&mut self, sent: &RoundSent, waited: Duration, busy: Duration) {
        self.streams_left -= 1;
        self.sum = add(&self.sum, sent);
        self.waited_min = self.waited_min.min(waited);
        self.busy_max += busy;
        if self.streams_left == 0 {
            self.sum.link_idle = self.waited_min.saturating_sub(self.busy_max);
            self.sum.whole_digest = self.whole.take().and_then(WholeDigest::finish);
        }
    }
}

/// How a round is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// Whether the guest stands still.
    pub(crate) paused: bool,
    /// Whether no round has reached the target yet.
    pub(crate) first: bool,
    /// Whether the digest of all of memory is wanted.
    pub(crate) whole: bool,
}

/// How a set of streams begins.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Whether digests are taken.
    pub(crate) verify: bool,
    /// The number in each stream's join.
    pub(crate) session: u32,
    /// What the streams are let in with.
    pub(crate) key: JoinKey,
    /// Pages that were sent by streams before and have not arrived.
    pub(crate) lacking: Option<PageBitmap>,
}

/// The threads of a migration's data streams.
pub(crate) struct Senders {
    options: Arc<SenderOptions>,
    queues: Vec<mpsc::Sender<Arc<Round>>>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
    closed: Arc<AtomicBool>,
}

impl Senders {
    /// Connects all streams and starts their threads. `done` hears of every finished round and failure. Streams that were
    /// open before must have been dropped.
    pub(crate) fn open(
        options: &Arc<SenderOptions>,
        opening: &Opening,
        done: &Arc<impl Done>,
    ) -> io::Result<Self> {
        let &Opening { verify, session, ref lacking, ref key } = opening;
        let mut digest = MemoryDigest::ZERO;
        if let Some(lacking) = lacking {
            // What they still pack was never sent, but would count as sent.
            options.end_encoders();
            options.sent.forget(lacking);
            digest = options.sent.digest();
            options.bandwidth.go_on();
        }
        let mut senders = Self {
            options: Arc::clone(options),
            queues: Vec::new(),
            sockets: Vec::new(),
            threads: Vec::new(),
            closed: Arc::default(),
        };
        for number in 0..options.streams {
            // Should one fail, dropping `senders` closes the others and ends their threads.
            let stream = StreamIndex::new(number, options.streams).expect("numbered below their count");
            let mut writer = options.dialer.data(STALL_MAX).map_err(io::Error::other)?;
            let proof = key.prove(&options.place(session, number));
            let join = Join { migration: options.migration, stream: number, session, proof };
            writer.write_all(&join.encode())?;
            senders.sockets.push(writer.socket().try_clone()?);
            let (queue, rounds) = mpsc::channel::<Arc<Round>>();
            senders.queues.push(queue);
            // One of them takes over what all have sent before.
            let digest = std::mem::take(&mut digest);
            let mut sender = Sender::new(options, writer, stream, verify, digest);
            let done = Arc::clone(done);
            let thread = thread::Builder::new().name(format!("ferry-send-{number}")).spawn(move || {
                confine::enter(Role::Data);
                sender.run(&rounds, &*done);
            })?;
            senders.threads.push(thread);
        }
        Ok(senders)
    }

    /// Hands a round to all streams.
    ///
    /// # Errors
    /// If a thread for the digest of all of memory can't be started, where that is wanted.
    pub(crate) fn send(&self, pages: PageBitmap, fence: u32, how: How) -> io::Result<()> {
        let How { paused, first, whole } = how;
        let whole = whole.then(|| WholeDigest::start(&self.options.pages)).transpose()?;
        let streams_left = u16::try_from(self.queues.len()).expect("bounded by STREAMS_MAX");
        let gathered = Mutex::new(Gathered {
            streams_left,
            sum: RoundSent::default(),
            waited_min: Duration::MAX,
            busy_max: Duration::ZERO,
            whole,
        });
        let round = Arc::new(Round {
            pages,
            next: AtomicU64::new(0),
            fence,
            paused,
            first,
            closed: Arc::clone(&self.closed),
            gathered,
        });
        self.options.interrupt_tuning();
        for queue in &self.queues {
            // A thread that has ended has said why through `done`.
            let _ = queue.send(Arc::clone(&round));
        }
        Ok(())
    }
}

impl Drop for Senders {
    /// Shuts the sockets, which ends whatever the threads are doing, and waits for them.
    fn drop(&mut self) {
        self.queues.clear();
        self.closed.store(true, Ordering::Relaxed);
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn add(a: &RoundSent, b: &RoundSent) -> RoundSent {
    RoundSent {
        raw_pages: a.raw_pages + b.raw_pages,
        zero_pages: a.zero_pages + b.zero_pages,
        packed_pages: a.packed_pages + b.packed_pages,
        delta_pages: a.delta_pages + b.delta_pages,
        unchanged_pages: a.unchanged_pages + b.unchanged_pages,
        untouched_pages: a.untouched_pages + b.untouched_pages,
        wire_bytes: a.wire_bytes + b.wire_bytes,
        link_idle: Duration::ZERO,
        digest: a.digest.combine(b.digest),
        whole_digest: None,
    }
}
