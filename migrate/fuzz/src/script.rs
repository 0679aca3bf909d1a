//! Inputs for the state machines: scripts of one byte a step, so that whatever is inserted or cut leaves the steps behind it
//! what they were. The lower five bits say what happens, the upper three how.
//!
//! Messages go through the wire's encoding and decoding, as a peer's do. Most are made by their step with what would be right
//! in its place, or not quite; step 0 has a type, a length and a body of any bytes.

use std::sync::OnceLock;
use std::time::Duration;

use ferry_protocol::message::AbortCode;
use ferry_protocol::record::Record;
use ferry_protocol::wire::{BODY_BYTES_MAX, Decoder, encode};
use ferry_protocol::witness::{Claim, Entry, Ruling, WitnessId, judge};
use ferry_protocol::{Epoch, MemoryDigest, Message, MigrationId, PAGE_BYTES, PageBitmap, PageDigest, VmId};

use crate::bytes::{Taker, sealed_messages};

/// The attempt that a script is about.
pub const MIGRATION: MigrationId = MigrationId([1; 16]);
/// Its VM.
pub const VM: VmId = VmId([2; 16]);
/// The epoch in which its source runs it.
pub const EPOCH: Epoch = Epoch::new(4);
/// The witness of a side that has one.
pub const WITNESS: WitnessId = WitnessId([5; 16]);

/// How long a host takes for whatever it is asked to do.
pub const WORK: Duration = Duration::from_micros(100);

/// More that a core wants done for one event would be without bounds.
pub const ACTIONS_MAX: usize = 16;

/// More steps without a word from outside mean that a core goes round in circles.
pub const ROUNDS_MAX: usize = 64;

/// Steps of a script at most: nothing is new behind them.
pub const STEPS_MAX: usize = 2000;

/// What happens, and how.
#[must_use]
pub const fn split(step: u8) -> (u8, u8) {
    (step & 0x1f, step >> 5)
}

/// The byte of a step.
#[must_use]
pub const fn step(what: u8, how: u8) -> u8 {
    what | how << 5
}

/// A message of any bytes; `None` if they are none.
#[must_use]
pub fn raw(taker: &mut Taker<'_>) -> Option<Message> {
    let (number, length) = (taker.byte(), taker.byte());
    let body = taker.some(length.into());
    let mut bytes = b"FRRY\x01\x00".to_vec();
    bytes.extend([number, 0]);
    bytes.extend(u32::try_from(body.len()).unwrap_or_default().to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    read(&sealed_messages(&bytes))
}

/// The message as the other side reads it; `None` if it refuses it.
#[must_use]
pub fn carried(message: &Message) -> Option<Message> {
    read(&encode(message))
}

fn read(bytes: &[u8]) -> Option<Message> {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    decoder.next_message().ok().flatten()
}

/// What a core wants sent is read at the other side as what it is.
///
/// # Panics
/// If it is not.
pub fn check_sent(message: &Message) {
    let bytes = encode(message);
    assert!(bytes.len() <= BODY_BYTES_MAX, "a message of {} bytes", bytes.len());
    assert_eq!(read(&bytes).as_ref(), Some(message), "what is sent can be read");
}

/// An epoch that is right, or not.
#[must_use]
pub fn epoch(right: Epoch, how: u8) -> Epoch {
    match how {
        0..=3 => right,
        4 => Epoch::new(right.number() - 1),
        5 => right.next(),
        6 => Epoch::FIRST,
        _ => Epoch::MAX,
    }
}

/// A code with which something is given up.
#[must_use]
pub const fn code(how: u8) -> AbortCode {
    match how {
        0..=3 => AbortCode::Internal,
        4 => AbortCode::Protocol,
        5 => AbortCode::NoMemory,
        6 => AbortCode::CannotBuild,
        _ => AbortCode::Cancelled,
    }
}

/// Digests of this and that, number 0 being that of nothing.
#[must_use]
pub fn digest(number: usize) -> MemoryDigest {
    static DIGESTS: OnceLock<[MemoryDigest; 8]> = OnceLock::new();
    let of = |number: u64| {
        let digest = PageDigest::of(number, &[7; PAGE_BYTES]).alone();
        if number == 0 { MemoryDigest::ZERO } else { digest }
    };
    DIGESTS.get_or_init(|| std::array::from_fn(|number| of(u64::try_from(number).unwrap_or_default())))
        [number % 8]
}

/// Some pages: none, all, one, every other one, or a run.
#[must_use]
pub fn pages(page_count: u64, how: u8) -> PageBitmap {
    let mut pages = PageBitmap::empty(page_count);
    match how {
        0 => {}
        1 => return PageBitmap::full(page_count),
        2 => pages.insert(page_count - 1),
        3 => (0..page_count).step_by(2).take(1000).for_each(|page| pages.insert(page)),
        other => (0..page_count).skip(usize::from(other) * 3).take(40).for_each(|page| pages.insert(page)),
    }
    pages
}

/// What a host's disk holds of a VM: one of these, more than one after a write that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk(Vec<Option<Record>>);

impl Disk {
    /// A disk with this record, or none.
    #[must_use]
    pub fn new(record: Option<Record>) -> Self {
        Self(vec![record])
    }

    /// `record` is written durably, or perhaps not.
    pub fn write(&mut self, record: Record, fails: bool) {
        if !fails {
            self.0.clear();
        }
        self.0.retain(|held| held.as_ref() != Some(&record));
        self.0.push(Some(record));
        assert!(self.0.len() < 16, "so many different records of one migration");
    }

    /// Whether `of` is true of whatever the disk may hold.
    pub fn certainly(&self, of: impl Fn(&Record) -> bool) -> bool {
        self.0.iter().all(|record| record.as_ref().is_some_and(&of))
    }

    /// Whether the disk holds just this record.
    #[must_use]
    pub fn holds(&self, record: &Record) -> bool {
        self.certainly(|held| held == record)
    }
}

/// A witness that decides as the real ones do.
#[derive(Debug, Default)]
pub struct Witness(pub Option<Entry>);

impl Witness {
    /// Hears a claim. `None` if it can't decide.
    pub fn hear(&mut self, claim: &Claim) -> Option<Ruling> {
        let judgement = judge(claim, self.0.as_ref()).ok()?;
        self.0 = judgement.entry.or(self.0);
        Some(judgement.ruling)
    }
}

/// Adds a phase that was seen.
pub fn see(seen: &mut Vec<&'static str>, phase: &'static str) {
    if !seen.contains(&phase) {
        seen.push(phase);
    }
}
