//! One data stream's thread: takes rounds, goes through its own chunks in order, and writes frames.
//!
//! ```text
//!              .--lent in place-----------------------------.
//!  its chunks -+                                            +--> socket
//!              '--encoders (threads of their own) --> ready-'
//! ```
//!
//! On a fast link pages are looked at in groups that mostly stay in the processor's cache until the socket reads them.
//! On a slow one encoders pack beside it, and while they are busy and the link would run dry, pages are sent unpacked.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ferry_protocol::encode::choose::Chooser;
use ferry_protocol::encode::pack::Method;
use ferry_protocol::encode::{Encoded, Encoder, Piece, Way};
use ferry_protocol::frame::Frame;
use ferry_protocol::layout::PAGE_BYTES_U64;
use ferry_protocol::page::Compression;
use ferry_protocol::source::RoundSent;
use ferry_protocol::{ChunkIndex, MemoryDigest, PageMask, PageRange, StreamIndex, Timestamp};

use ferry_vmm::tcp_busy_time;
use socket2::SockRef;

use super::encoders::{Done, Job};
use super::send::{Round, STALL_MAX, SenderOptions};
use crate::bandwidth::{Pieces, Waits};
use crate::fault::{self, SourceStep, Step};
use crate::report::{PackingWork, StreamWork};
use crate::transport::data::DataWriter;
use crate::transport::tcp;

/// Chunks with fewer pages are not worth another thread's while.
const PAGES_TO_SHARE_MIN: u64 = 32;

/// The link's rate is measured over at least so many bytes.
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// When less than this is left in the socket's buffer, the link counts as running dry.
const DRY: Duration = Duration::from_millis(2);

/// The most that a socket's buffer is taken to hold, when it is known only that it was full.
const BUFFERED_MAX: Duration = Duration::from_millis(50);

pub(super) struct Sender {
    options: Arc<SenderOptions>,
    writer: DataWriter,
    stream: StreamIndex,
    encoder: Option<Encoder>,
    chooser: Chooser,
    round: RoundSent,
    /// The digest of all pages that this stream sent, each as last sent, less what others sent of them before.
    digest: MemoryDigest,
    /// Whether the bandwidth cap applies.
    capped: bool,
    /// Whether anybody wants digests.
    verify: bool,
    waits: Waits,
    /// How long this round's writes have taken.
    in_socket: Duration,
    packing: PackingWork,
    window: Window,
    /// What the socket's buffer holds.
    buffer_bytes: usize,
    /// When the link will have sent what was written.
    busy_until: Timestamp,
    reply: mpsc::Sender<Done>,
    ready: mpsc::Receiver<Done>,
    under_way: usize,
    under_way_max: usize,
}

/// What was written since the link's rate was last taken.
#[derive(Debug, Clone, Copy)]
struct Window {
    began: Timestamp,
    bytes: u64,
    writing: Duration,
}

/// What to do with a chunk.
enum Plan {
    Here(Way),
    Encoders(Way),
}

impl Sender {
    pub(super) fn new(
        options: &Arc<SenderOptions>,
        writer: DataWriter,
        stream: StreamIndex,
        verify: bool,
        digest: MemoryDigest,
    ) -> Self {
        let now = options.clock.now();
        let streams = usize::from(options.streams);
        let packers = options.packers.div_ceil(streams);
        let (reply, ready) = mpsc::channel();
        let within_host = tcp::is_within_host(writer.socket());
        Self {
            options: Arc::clone(options),
            writer,
            stream,
            encoder: Some(Encoder::default()),
            chooser: Chooser::new(
                options.compression,
                u16::try_from(packers).unwrap_or(u16::MAX),
                within_host,
            ),
            round: RoundSent::default(),
            digest,
            capped: true,
            verify,
            waits: Waits::default(),
            in_socket: Duration::ZERO,
            packing: PackingWork::default(),
            window: Window { began: now, bytes: 0, writing: Duration::ZERO },
            buffer_bytes: 0,
            busy_until: now,
            reply,
            ready,
            under_way: 0,
            under_way_max: packers + 1,
        }
    }

    pub(super) fn run(
        &mut self,
        rounds: &mpsc::Receiver<Arc<Round>>,
        done: &dyn Fn(Result<RoundSent, String>),
    ) {
        while let Ok(round) = rounds.recv() {
            match self.send_round(&round) {
                Ok(busy) => {
                    let mut gathered = round.gathered.lock().unwrap_or_else(PoisonError::into_inner);
                    gathered.add(&self.round, self.waits.total, busy);
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

    /// Sends a round, and says how long the link was busy in the time that the stream waited for the cap.
    fn send_round(&mut self, round: &Round) -> io::Result<Duration> {
        let began = self.options.clock.now();
        self.round = RoundSent::default();
        self.capped = !round.paused;
        self.waits = Waits::default();
        self.in_socket = Duration::ZERO;
        self.packing = PackingWork::default();
        let busy_before = tcp_busy_time(self.writer.socket().as_fd());
        self.window = Window { began: self.options.clock.now(), bytes: 0, writing: Duration::ZERO };
        let again = !round.first;
        if again && self.stream.number() == 0 && self.options.sent.is_short() {
            self.make_room(round);
        }
        while let Some((chunk, mask)) = round.next(self.stream, &self.options) {
            let mask = if again { mask } else { self.touched(chunk, mask) };
            if !mask.is_empty() {
                fault::try_point(Step::Source(SourceStep::ChunkSends))?;
                self.send_chunk(chunk, mask, again)?;
            }
        }
        while self.under_way > 0 {
            // A group takes milliseconds: one that does not come is lost with its thread.
            let done = self.ready.recv_timeout(STALL_MAX);
            self.write_done(&done.map_err(|_| io::Error::other("a packing thread has ended"))?)?;
        }
        self.write(&Frame::Fence(round.fence).encode(), &[])?;
        self.round.digest = self.digest;
        let busy = tcp_busy_time(self.writer.socket().as_fd()).zip(busy_before);
        // Without a word of the system the link may have been busy all the time.
        let busy = busy.map_or(Duration::MAX, |(after, before)| after.saturating_sub(before));
        self.report_work(began);
        Ok(busy.min(self.waits.total))
    }

    /// Adds the round to what the stream has done in all.
    fn report_work(&self, began: Timestamp) {
        let took = self.options.clock.now().since(began);
        let RoundSent {
            raw_pages, zero_pages, packed_pages, delta_pages, unchanged_pages, wire_bytes, ..
        } = self.round;
        let work = StreamWork {
            raw_pages,
            zero_pages,
            packed_pages,
            delta_pages,
            unchanged_pages,
            wire_bytes,
            in_socket: self.in_socket,
            in_cap: self.waits.total,
            encoding: took.saturating_sub(self.in_socket + self.waits.total),
            packing: self.packing,
            link_bytes_per_s: self.chooser.link_bytes_per_s(),
        };
        self.options.counters.add(self.stream, &work);
    }

    /// The pages of the first round (and of what is left of it if the link broke) that need to travel: what was never touched is zero on both sides. The round's
    /// dirty log has been read, and thereby reset, before, so that a page that is touched from now on comes again.
    fn touched(&mut self, chunk: ChunkIndex, mask: PageMask) -> PageMask {
        let touched = self.options.pages.touched(chunk);
        let mut left = mask;
        left.0.iter_mut().zip(touched.0).for_each(|(word, touched)| *word &= touched);
        let skipped = mask.count() - left.count();
        self.round.untouched_pages += skipped;
        self.count(skipped);
        left
    }

    /// Signatures are short: those of pages that the guest has left alone make room for those that it writes.
    fn make_room(&self, round: &Round) {
        let page_count = round.pages.page_count();
        let chunks = (0..).map_while(|number| ChunkIndex::new(number, page_count));
        for chunk in chunks {
            self.options.sent.chunk(chunk).keep_only(&round.pages.chunk(chunk));
        }
    }

    fn send_chunk(&mut self, chunk: ChunkIndex, mask: PageMask, again: bool) -> io::Result<()> {
        self.take_window();
        match self.plan(&mask, again)? {
            Plan::Here(way) => self.encode_here(chunk, &mask, way),
            Plan::Encoders(way) => {
                let encoders = self.options.encoders()?;
                encoders.submit(Job { chunk, mask, way, reply: self.reply.clone() });
                self.under_way += 1;
                Ok(())
            }
        }
    }

    /// Decides about the next chunk, once there is room for it; writes what becomes ready meanwhile.
    fn plan(&mut self, mask: &PageMask, again: bool) -> io::Result<Plan> {
        let verify = self.verify;
        let way = |method, chooser: &Chooser| Way { method, remember: chooser.remembers(again), verify };
        let unpacked = Plan::Here(way(Method::None, &self.chooser));
        if mask.count() < PAGES_TO_SHARE_MIN {
            return Ok(unpacked);
        }
        let method = self.chooser.choose();
        if method == Method::None {
            return Ok(unpacked);
        }
        loop {
            match self.ready.try_recv() {
                Ok(done) => self.write_done(&done)?,
                Err(TryRecvError::Empty | TryRecvError::Disconnected)
                    if self.under_way < self.under_way_max =>
                {
                    return Ok(Plan::Encoders(way(method, &self.chooser)));
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                    match self.ready.recv_timeout(self.until_dry()) {
                        Ok(done) => self.write_done(&done)?,
                        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                            self.packing.filled_pages += mask.count();
                            return Ok(unpacked);
                        }
                    }
                }
            }
        }
    }

    /// How long the link has something to send. Who asks for a packing gets it, whatever the link does meanwhile.
    fn until_dry(&self) -> Duration {
        match self.options.compression {
            Compression::Auto => self.busy_until.since(self.options.clock.now() + DRY),
            Compression::None | Compression::Lz4 | Compression::Zstd(_) => STALL_MAX,
        }
    }

    fn encode_here(&mut self, chunk: ChunkIndex, mask: &PageMask, way: Way) -> io::Result<()> {
        let options = Arc::clone(&self.options);
        let mut encoder = self.encoder.take().unwrap_or_default();
        let read = |range, visit: &mut dyn FnMut(u64, &_)| options.pages.for_each_page(range, visit);
        let encoded =
            encoder.encode((chunk, mask), way, &mut options.sent.chunk(chunk), &read, &mut |piece| {
                match piece {
                    Piece::Bytes(bytes) => self.write(bytes, &[]),
                    Piece::Lent(chunk, mask) => {
                        let ranges: Vec<PageRange> = chunk.ranges(&mask).collect();
                        self.write(&Frame::Raw { chunk, mask }.encode(), &ranges)
                    }
                }
            })?;
        self.encoder = Some(encoder);
        self.account(&encoded);
        Ok(())
    }

    fn write_done(&mut self, done: &Done) -> io::Result<()> {
        self.under_way -= 1;
        let Done { method, bytes, encoded, took } = done;
        if encoded.delta_pages == 0 {
            let pages = encoded.raw_pages + encoded.packed_pages;
            self.chooser.packed(*method, pages * PAGE_BYTES_U64, length(bytes), *took);
        }
        self.packing.add(*method, encoded, *took);
        self.account(encoded);
        self.write(bytes, &[])
    }

    fn account(&mut self, encoded: &Encoded) {
        let Encoded { raw_pages, zero_pages, packed_pages, delta_pages, unchanged_pages, .. } = *encoded;
        self.digest = self.digest.combine(encoded.digest);
        self.chooser.came_again(delta_pages + unchanged_pages, encoded.whole_again_pages);
        let before = self.round.pages();
        self.round.raw_pages += raw_pages;
        self.round.zero_pages += zero_pages;
        self.round.packed_pages += packed_pages;
        self.round.delta_pages += delta_pages;
        self.round.unchanged_pages += unchanged_pages;
        self.count(self.round.pages() - before);
    }

    fn write(&mut self, header: &[u8], ranges: &[PageRange]) -> io::Result<()> {
        let options = Arc::clone(&self.options);
        let bandwidth = &options.bandwidth;
        let mut pieces = Pieces::new(header, ranges);
        while let Some(piece) = pieces.next(bandwidth.piece_bytes().filter(|_| self.capped)) {
            let began = options.clock.now();
            if self.capped {
                bandwidth.wait_for(piece.bytes, &mut self.waits);
            }
            let writing_since = options.clock.now();
            self.writer.send(&*options.pages, piece.header, &piece.ranges)?;
            let ended = options.clock.now();
            self.in_socket += ended.since(writing_since);
            self.wrote(piece.bytes, began, ended);
            self.round.wire_bytes += piece.bytes;
            options.counters.wire_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Keeps count of what the socket still has to send.
    fn wrote(&mut self, bytes: u64, began: Timestamp, ended: Timestamp) {
        self.window.bytes += bytes;
        self.window.writing += ended.since(began);
        let Some(link) = self.chooser.link_bytes_per_s().filter(|link| *link > 0.0) else { return };
        let takes = |bytes: f64| Duration::from_secs_f64((bytes / link).min(STALL_MAX.as_secs_f64()));
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let (bytes, buffer) = (bytes as f64, self.buffer_bytes as f64);
        // Whoever had to wait has filled the buffer.
        let waited = ended.since(began) > takes(bytes) / 2;
        let left = if waited { ended + takes(buffer) } else { self.busy_until.max(began) + takes(bytes) };
        self.busy_until = left.min(ended + BUFFERED_MAX);
    }

    fn take_window(&mut self) {
        if self.window.bytes >= WINDOW_BYTES_MIN {
            let now = self.options.clock.now();
            let Window { began, bytes, writing } = self.window;
            self.chooser.wrote(bytes, writing, now.since(began));
            self.window = Window { began: now, bytes: 0, writing: Duration::ZERO };
            // The system makes it larger as it sees fit. A third is free when it wakes the writer, and some is overhead.
            self.buffer_bytes = SockRef::from(self.writer.socket()).send_buffer_size().unwrap_or(0) / 5 * 3;
        }
    }

    fn count(&self, pages: u64) {
        self.options.counters.pages.fetch_add(pages, Ordering::Relaxed);
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("usize fits u64")
}
