//! The bandwidth cap: all data streams of a migration together stay under a rate, exactly and smoothly.
//!
//! Counted are the bytes that ferry writes to its data streams, frame headers included; TCP and IP headers (about 3 %
//! at an MTU of 1500) come on top. While a stream wants to send, any second has between 97 and 103 % of the rate.
//!
//! [`Pacer`] decides and is a pure function of time; [`Bandwidth`] sleeps. What goes out is cut into pieces of at most
//! [`PIECE`] at the rate, and each piece has its slot behind the one before, whichever stream it belongs to. A thread
//! that comes too late for its slot in the middle of a round, because it was woken late or its last write took long, finds
//! the next ones moved up by as much, but never by more than [`LATENESS_MADE_UP`]: what is lost beyond is lost, so that no
//! second makes up for another.
//!
//! The cap does not apply while the guest stands still. Not here: fairness between streams.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ferry_protocol::layout::PAGE_BYTES_U64;
use ferry_protocol::{PageRange, Timestamp};
use tokio::sync::watch;

use crate::ports::Clock;

/// The rate that a migration may use, to be changed while it runs. Clones are handles to the same cap.
#[derive(Debug, Clone)]
pub struct BandwidthCap {
    bytes_per_s: Arc<watch::Sender<Option<u64>>>,
}

impl BandwidthCap {
    /// A cap of so many bytes/s on all data streams together, or none. A rate of zero counts as one byte/s.
    #[must_use]
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: Arc::new(watch::channel(bytes_per_s).0) }
    }

    /// Changes the rate, for a migration under way too.
    pub fn set(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s.send_replace(bytes_per_s);
    }

    /// The rate now, in bytes/s.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<u64> {
        *self.bytes_per_s.borrow()
    }
}

impl Default for BandwidthCap {
    /// No cap.
    fn default() -> Self {
        Self::new(None)
    }
}

/// A piece takes this long at the rate, unless that is less than a page.
const PIECE: Duration = Duration::from_millis(2);

/// How much of a time in which nobody asked may still be used: a burst of this length at the rate.
const BURST: Duration = Duration::from_millis(3);

/// How late a thread may come in the middle of a round without anything being lost.
const LATENESS_MADE_UP: Duration = Duration::from_millis(16);

/// Gives out slots, one behind the other, at a rate.
#[derive(Debug)]
struct Pacer {
    /// When everything that was given out is sent at exactly the rate.
    free_at: Timestamp,
    bytes_per_s: u64,
}

impl Pacer {
    const fn new(bytes_per_s: u64, now: Timestamp) -> Self {
        Self { free_at: now, bytes_per_s }
    }

    /// When `bytes` may be sent that are asked for at `now` by a thread that is in the middle of a round, or has
    /// had nothing to send before. The slot may lie in the past.
    fn slot(&mut self, bytes: u64, mid_round: bool, now: Timestamp) -> Timestamp {
        let unused_max = if mid_round { LATENESS_MADE_UP } else { BURST };
        let earliest = Timestamp::from_origin(now.since(Timestamp::from_origin(unused_max)));
        let at = self.free_at.max(earliest);
        self.free_at = at + Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.bytes_per_s);
        at
    }
}

/// The most bytes that go out in one piece at that rate.
fn piece_bytes(bytes_per_s: u64) -> u64 {
    let millis = u64::try_from(PIECE.as_millis()).expect("a few");
    (bytes_per_s.saturating_mul(millis) / 1_000).max(PAGE_BYTES_U64)
}

/// Delays streams so that together they stay under the cap.
pub(crate) struct Bandwidth {
    clock: Arc<dyn Clock>,
    cap: BandwidthCap,
    pacer: Mutex<Pacer>,
    stopped: AtomicBool,
}

/// The longest a stream sleeps before it looks again whether the cap has changed.
const SLEEP_MAX: Duration = Duration::from_millis(20);

/// What a stream remembers from piece to piece.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    /// Whether it has sent something in this round.
    mid_round: bool,
    /// How long it has waited for the cap.
    pub(crate) total: Duration,
}

impl Bandwidth {
    pub(crate) fn new(cap: BandwidthCap, clock: Arc<dyn Clock>) -> Self {
        let pacer = Mutex::new(Pacer::new(1, clock.now()));
        Self { clock, cap, pacer, stopped: AtomicBool::new(false) }
    }

    /// The most bytes that may go out in one piece now; `None` without a cap.
    pub(crate) fn piece_bytes(&self) -> Option<u64> {
        let stopped = self.stopped.load(Ordering::Relaxed);
        self.cap.bytes_per_s().filter(|_| !stopped).map(piece_bytes)
    }

    /// Waits until `bytes` more may be sent.
    pub(crate) fn wait_for(&self, bytes: u64, waits: &mut Waits) {
        let asked_at = self.clock.now();
        while let Some(bytes_per_s) = self.cap.bytes_per_s() {
            let now = self.clock.now();
            let slot = {
                let mut pacer = self.pacer.lock().unwrap_or_else(PoisonError::into_inner);
                if pacer.bytes_per_s != bytes_per_s.max(1) {
                    // What was given out at the old rate is a few pieces; the new one holds from now on.
                    *pacer = Pacer::new(bytes_per_s.max(1), now);
                }
                pacer.slot(bytes, waits.mid_round, now)
            };
            if self.sleep_until(slot, bytes_per_s) {
                break;
            }
        }
        waits.mid_round = true;
        waits.total += self.clock.now().since(asked_at);
    }

    /// False if the cap has changed meanwhile.
    fn sleep_until(&self, slot: Timestamp, bytes_per_s: u64) -> bool {
        loop {
            let wait = slot.since(self.clock.now());
            if wait.is_zero() || self.stopped.load(Ordering::Relaxed) {
                return true;
            }
            thread::sleep(wait.min(SLEEP_MAX));
            if self.cap.bytes_per_s() != Some(bytes_per_s) {
                return false;
            }
        }
    }

    /// The cap applies again: the migration goes on.
    pub(crate) fn go_on(&self) {
        self.stopped.store(false, Ordering::Relaxed);
    }

    /// Lets everybody through: the streams are being closed.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// One frame's bytes cut into pieces: some of what stands before the pages, then pages.
pub(crate) struct Pieces<'a> {
    header: &'a [u8],
    ranges: &'a [PageRange],
    /// Pages of the first of `ranges` that are gone already.
    taken: u64,
}

/// A piece: bytes, pages, and how many bytes both are.
pub(crate) struct Piece<'a> {
    pub(crate) header: &'a [u8],
    pub(crate) ranges: Vec<PageRange>,
    pub(crate) bytes: u64,
}

impl<'a> Pieces<'a> {
    pub(crate) const fn new(header: &'a [u8], ranges: &'a [PageRange]) -> Self {
        Self { header, ranges, taken: 0 }
    }

    /// The next piece of at most `bytes_max` (or one page), or all that is left without a limit.
    pub(crate) fn next(&mut self, bytes_max: Option<u64>) -> Option<Piece<'a>> {
        let bytes_max = bytes_max.unwrap_or(u64::MAX);
        let header_bytes = usize::try_from(bytes_max).unwrap_or(usize::MAX).min(self.header.len());
        let (header, rest) = self.header.split_at(header_bytes);
        self.header = rest;
        let mut bytes = u64::try_from(header_bytes).expect("usize fits u64");
        let mut ranges = Vec::new();
        while let Some(range) = self.ranges.first().filter(|_| rest.is_empty()) {
            let room = (bytes_max - bytes.min(bytes_max)) / PAGE_BYTES_U64;
            // A header and one page may be a little more than a page.
            let room = if bytes < PAGE_BYTES_U64 { room.max(1) } else { room };
            let Some(part) = range.part(self.taken, room) else { break };
            ranges.push(part);
            bytes += part.count() * PAGE_BYTES_U64;
            self.taken += part.count();
            if self.taken == range.count() {
                self.ranges = &self.ranges[1..];
                self.taken = 0;
            }
        }
        (bytes > 0).then_some(Piece { header, ranges, bytes })
    }
}

#[cfg(test)]
mod tests;
