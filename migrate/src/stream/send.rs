//! Sending: each stream's thread takes rounds, goes through its own chunks in order, and writes frames.
//!
//! Pages are read once for their digest and for being zero, in groups that mostly stay in the processor's cache until
//! the socket reads them again.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_protocol::digest::DigestTable;
use ferry_protocol::frame::{Frame, Join};
use ferry_protocol::page::{Compression, Packer, is_zero};
use ferry_protocol::source::RoundSent;
use ferry_protocol::{
    ChunkIndex, MemoryDigest, MigrationId, PageBitmap, PageDigest, PageMask, PageRange, StreamIndex,
};

use super::{belongs, digest_slot, digest_slots};
use crate::bandwidth::{Bandwidth, Pieces, Waits};
use crate::ports::GuestPages;
use crate::report::StreamWork;
use crate::transport::tcp;

/// How long a stream may be unable to write before it counts as stalled.
const STALL_MAX: Duration = Duration::from_secs(10);

/// Words of a chunk's mask, of 64 pages each, that are looked at and sent together. Larger groups mean fewer system
/// calls and frames, smaller ones that pages are still in the processor's cache when the socket reads them.
const RAW_GROUP_WORDS: usize = 4;

/// A packed group has at most [`ferry_protocol::frame::LZ4_PAGES_MAX`] pages: one word.
const PACKED_GROUP_WORDS: usize = 1;

/// What all streams of a migration share.
pub(crate) struct SenderOptions {
    /// The target as the operator gave it.
    pub(crate) target: String,
    /// Where the first control connection led.
    pub(crate) pinned: OnceLock<SocketAddr>,
    pub(crate) migration: MigrationId,
    pub(crate) streams: u16,
    pub(crate) compression: Compression,
    pub(crate) pages: Arc<dyn GuestPages>,
    pub(crate) bandwidth: Arc<Bandwidth>,
    pub(crate) counters: Arc<TransferCounters>,
}

impl SenderOptions {
    /// Where to connect: to the host that was reached first, once there is one.
    pub(crate) fn address(&self) -> String {
        self.pinned.get().map_or_else(|| self.target.clone(), ToString::to_string)
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

    fn add(&self, stream: StreamIndex, work: &StreamWork) {
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

struct Round {
    pages: PageBitmap,
    fence: u32,
    paused: bool,
    gathered: Mutex<Gathered>,
}

struct Gathered {
    streams_left: u16,
    sum: RoundSent,
    /// How long every stream has waited for the cap, at least.
    waited_min: Duration,
    /// How long the link was busy meanwhile, at most: as if the streams' pieces never overlapped.
    busy_max: Duration,
}

impl Gathered {
    fn add(&mut self, sent: &RoundSent, waited: Duration, busy: Duration) {
        self.streams_left -= 1;
        self.sum = add(&self.sum, sent);
        self.waited_min = self.waited_min.min(waited);
        self.busy_max += busy;
        if self.streams_left == 0 {
            self.sum.link_idle = self.waited_min.saturating_sub(self.busy_max);
        }
    }
}

/// The threads of a migration's data streams.
pub(crate) struct Senders {
    queues: Vec<mpsc::Sender<Arc<Round>>>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Senders {
    /// Connects all streams and starts their threads, which take digests if `verify` says so. `done` hears of every
    /// finished round and failure.
    pub(crate) fn open(
        options: &Arc<SenderOptions>,
        verify: bool,
        done: &Arc<impl Done>,
    ) -> io::Result<Self> {
        let mut senders = Self { queues: Vec::new(), sockets: Vec::new(), threads: Vec::new() };
        for number in 0..options.streams {
            // Should one fail, dropping `senders` closes the others and ends their threads.
            let stream = StreamIndex::new(number, options.streams).expect("numbered below their count");
            let mut socket = tcp::connect(&options.address())?;
            tcp::set_up_data(&socket, Some(STALL_MAX))?;
            socket.write_all(&Join { migration: options.migration, stream: number }.encode())?;
            senders.sockets.push(socket.try_clone()?);
            let (queue, rounds) = mpsc::channel::<Arc<Round>>();
            senders.queues.push(queue);
            let slots = digest_slots(options.pages.layout().page_count(), options.streams);
            let mut sender = Sender {
                options: Arc::clone(options),
                socket,
                stream,
                digests: verify.then(|| DigestTable::new(slots)),
                packer: Packer::default(),
                round: RoundSent::default(),
                capped: true,
                waits: Waits::default(),
                in_socket: Duration::ZERO,
                busy_while_waiting: Duration::ZERO,
            };
            let done = Arc::clone(done);
            let thread = thread::Builder::new()
                .name(format!("ferry-send-{number}"))
                .spawn(move || sender.run(&rounds, &*done))?;
            senders.threads.push(thread);
        }
        Ok(senders)
    }

    /// Hands a round to all streams.
    pub(crate) fn send(&self, pages: PageBitmap, fence: u32, paused: bool) {
        let streams_left = u16::try_from(self.queues.len()).expect("bounded by STREAMS_MAX");
        let gathered = Mutex::new(Gathered {
            streams_left,
            sum: RoundSent::default(),
            waited_min: Duration::MAX,
            busy_max: Duration::ZERO,
        });
        let round = Arc::new(Round { pages, fence, paused, gathered });
        for queue in &self.queues {
            // A thread that has ended has said why through `done`.
            let _ = queue.send(Arc::clone(&round));
        }
    }
}

impl Drop for Senders {
    /// Shuts the sockets, which ends whatever the threads are doing, and waits for them.
    fn drop(&mut self) {
        self.queues.clear();
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Sender {
    options: Arc<SenderOptions>,
    socket: TcpStream,
    stream: StreamIndex,
    /// Of the stream's pages as last sent, if anybody wants to compare them.
    digests: Option<DigestTable>,
    packer: Packer,
    round: RoundSent,
    /// Whether the bandwidth cap applies.
    capped: bool,
    waits: Waits,
    /// How long this round's writes have taken.
    in_socket: Duration,
    /// Of the time in this round in which the stream waited for the cap: how long its link was busy all the same.
    busy_while_waiting: Duration,
}

impl Sender {
    fn run(&mut self, rounds: &mpsc::Receiver<Arc<Round>>, done: &impl Done) {
        while let Ok(round) = rounds.recv() {
            match self.send_round(&round) {
                Ok(sent) => {
                    let mut gathered = round.gathered.lock().unwrap_or_else(PoisonError::into_inner);
                    gathered.add(&sent, self.waits.total, self.busy_while_waiting);
                    if gathered.streams_left == 0 {
                        done(Ok(gathered.sum));
                    }
                }
                Err(error) => {
                    let stalled = matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock);
                    let what = if stalled {
                        format!("the target took nothing for {} s", STALL_MAX.as_secs())
                    } else {
                        error.to_string()
                    };
                    return done(Err(format!("data stream {}: {what}", self.stream.number())));
                }
            }
        }
    }

    fn send_round(&mut self, round: &Round) -> io::Result<RoundSent> {
        let began = self.options.bandwidth.now();
        self.round = RoundSent::default();
        self.in_socket = Duration::ZERO;
        self.capped = !round.paused;
        self.waits = Waits::default();
        let busy_before = tcp::busy_time(&self.socket);
        for (chunk, mask) in round.pages.chunks() {
            if belongs(chunk, self.stream, self.options.streams) {
                self.send_chunk(chunk, mask)?;
            }
        }
        self.write(&Frame::Fence(round.fence).encode(), &[])?;
        self.round.digest = self.digests.as_ref().map_or(MemoryDigest::ZERO, DigestTable::sum);
        let busy = tcp::busy_time(&self.socket).zip(busy_before);
        // Without a word of the system the link may have been busy all the time.
        let busy = busy.map_or(Duration::MAX, |(after, before)| after.saturating_sub(before));
        self.busy_while_waiting = busy.min(self.waits.total);
        let took = self.options.bandwidth.now().since(began);
        self.options.counters.add(
            self.stream,
            &StreamWork {
                raw_pages: self.round.raw_pages,
                zero_pages: self.round.zero_pages,
                packed_pages: self.round.packed_pages,
                wire_bytes: self.round.wire_bytes,
                in_socket: self.in_socket,
                in_cap: self.waits.total,
                encoding: took.saturating_sub(self.in_socket + self.waits.total),
            },
        );
        Ok(self.round)
    }

    fn send_chunk(&mut self, chunk: ChunkIndex, mask: PageMask) -> io::Result<()> {
        let mut zero = PageMask::EMPTY;
        let words = match self.options.compression {
            Compression::None => RAW_GROUP_WORDS,
            Compression::Lz4 => PACKED_GROUP_WORDS,
        };
        for first in (0..mask.0.len()).step_by(words) {
            let mut group = PageMask::EMPTY;
            group.0[first..first + words].copy_from_slice(&mask.0[first..first + words]);
            if group.is_empty() {
                continue;
            }
            let group_zero = self.look_at(chunk, &group);
            for index in first..first + words {
                zero.0[index] = group_zero.0[index];
                group.0[index] &= !group_zero.0[index];
            }
            if !group.is_empty() {
                self.send_group(chunk, group)?;
            }
        }
        if zero.is_empty() {
            return Ok(());
        }
        self.round.zero_pages += zero.count();
        self.count(zero.count());
        self.write(&Frame::Zero { chunk, mask: zero }.encode(), &[])
    }

    /// Takes the digest of each page of the group if it is wanted, and says which are zero.
    fn look_at(&mut self, chunk: ChunkIndex, group: &PageMask) -> PageMask {
        let mut zero = PageMask::EMPTY;
        let (digests, streams) = (&mut self.digests, self.options.streams);
        self.packer.clear();
        let mut packer = (self.options.compression == Compression::Lz4).then_some(&mut self.packer);
        for range in chunk.ranges(group) {
            self.options.pages.for_each_page(range, &mut |page, bytes| {
                if let Some(digests) = digests.as_mut() {
                    digests.set(digest_slot(page, streams), PageDigest::of(page, bytes));
                }
                if is_zero(bytes) {
                    zero.insert(page - chunk.first_page());
                } else if let Some(packer) = &mut packer {
                    packer.add(bytes);
                }
            });
        }
        zero
    }

    fn send_group(&mut self, chunk: ChunkIndex, mask: PageMask) -> io::Result<()> {
        let count = mask.count();
        self.count(count);
        if self.options.compression == Compression::Lz4 {
            debug_assert_eq!(self.packer.page_count(), count, "the group that was looked at");
            let mut packer = std::mem::take(&mut self.packer);
            let packed = packer.pack().map(|packed| self.send_packed(chunk, mask, packed));
            self.packer = packer;
            if let Some(sent) = packed {
                self.round.packed_pages += count;
                return sent;
            }
        }
        self.round.raw_pages += count;
        let ranges: Vec<PageRange> = chunk.ranges(&mask).collect();
        self.write(&Frame::Raw { chunk, mask }.encode(), &ranges)
    }

    fn send_packed(&mut self, chunk: ChunkIndex, mask: PageMask, packed: &[u8]) -> io::Result<()> {
        let body_bytes = u32::try_from(packed.len()).expect("a group has at most 256 KiB");
        let header = Frame::Lz4 { chunk, mask, body_bytes }.encode();
        self.write(&[&header, packed].concat(), &[])
    }

    fn write(&mut self, header: &[u8], ranges: &[PageRange]) -> io::Result<()> {
        let bandwidth = &self.options.bandwidth;
        let mut pieces = Pieces::new(header, ranges);
        while let Some(piece) = pieces.next(bandwidth.piece_bytes().filter(|_| self.capped)) {
            if self.capped {
                bandwidth.wait_for(piece.bytes, &mut self.waits);
            }
            let writing_since = bandwidth.now();
            self.options.pages.send(self.socket.as_fd(), piece.header, &piece.ranges)?;
            self.in_socket += bandwidth.now().since(writing_since);
            self.round.wire_bytes += piece.bytes;
            self.options.counters.wire_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    fn count(&self, pages: u64) {
        self.options.counters.pages.fetch_add(pages, Ordering::Relaxed);
    }
}

fn add(a: &RoundSent, b: &RoundSent) -> RoundSent {
    RoundSent {
        raw_pages: a.raw_pages + b.raw_pages,
        zero_pages: a.zero_pages + b.zero_pages,
        packed_pages: a.packed_pages + b.packed_pages,
        wire_bytes: a.wire_bytes + b.wire_bytes,
        link_idle: Duration::ZERO,
        digest: a.digest.combine(b.digest),
    }
}
