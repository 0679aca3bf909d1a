//! The messages of the control connection. Their order is drawn at the top of this crate.
//!
//! A type's number never changes its meaning; a new field is a new message type or a new protocol version.

use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::admission::JoinKey;
use crate::digest::MemoryDigest;
use crate::ident::{Epoch, MigrationId, VmId, VmName};
use crate::layout::Region;
use crate::negotiation::Features;
use crate::witness::WitnessId;
use crate::words::{on_one_line, shown};

/// The longest sentence that a peer may give as a reason, in bytes; longer ones are cut.
pub const SENTENCE_BYTES_MAX: usize = 4096;

/// The largest machine description, in bytes.
pub const DESCRIPTION_BYTES_MAX: usize = 256 << 10;

/// The largest machine state, in bytes: what a message's body holds, less room for the other fields.
pub const STATE_BYTES_MAX: usize = crate::wire::BODY_BYTES_MAX - 4096;

/// The most addresses of one kind that are announced for a guest.
pub const ADDRESSES_MAX: usize = 64;

/// The source introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version that it speaks.
    pub version_oldest: u16,
    /// The newest version that it speaks.
    pub version_newest: u16,
    /// What it can do.
    pub features: Features,
    /// This attempt.
    pub migration: MigrationId,
    /// The VM that is to move.
    pub vm: VmId,
    /// Its name, for people.
    pub name: VmName,
    /// The epoch in which the source runs it.
    pub epoch: Epoch,
    /// Whether this connection takes up an attempt whose connection was lost.
    pub resumes: bool,
}

/// The target accepts to talk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both will speak.
    pub version: u16,
    /// What both can do.
    pub features: Features,
    /// The target host's name, for people and for the commit record.
    #[serde(deserialize_with = "shown")]
    pub host: String,
}

/// What the target is to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// The machine, in the machine monitor's own versioned format.
    pub description: Vec<u8>,
    /// The guest's RAM; see [`crate::MemoryLayout`].
    pub regions: Vec<Region>,
    /// How many data streams the source is about to open.
    pub streams: u16,
}

/// What the target is to build on the memory whose descriptor comes beside this message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The machine, in the machine monitor's own versioned format.
    pub description: Vec<u8>,
    /// The guest's RAM, which the descriptor's file holds end to end from its beginning; see [`crate::MemoryLayout`].
    pub regions: Vec<Region>,
}

/// The target has built an empty machine and waits for pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// How long its durable record took to write, in µs: a part of every downtime forecast.
    pub record_us: u64,
}

/// The target is to write its record once more as it stands, to measure anew what that costs. Only sent where both have
/// [`Features::REHEARSAL`], and not again before it was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearse;

/// The record is written once more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsed {
    /// How long that took, in µs.
    pub record_us: u64,
}

/// All streams have delivered everything before this fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceReached {
    /// The fence's number, counted from 1 within a migration.
    pub fence: u32,
}

/// How long the target is to keep what has arrived if the connection breaks before the commit, so that the source can take
/// the migration up again. Only sent where both have [`Features::RESUMPTION`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepFor {
    /// In ms. The target bounds it.
    pub wait_ms: u32,
}

/// The source is back and takes the migration up where it was: which pages of the round under way have arrived? It comes
/// behind the `Hello` of a new connection, and again for each further part of the answer. Whatever the target was told of the
/// guest's standstill does not count any more: the guest runs at the source, and no commit was recorded there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The epoch that the target receives.
    pub epoch: Epoch,
    /// The number of the data streams that are to come: larger with each connection, and in the join of each stream.
    pub session: u32,
    /// The last fence of which the source knows that it was reached.
    pub reached: u32,
    /// The fence behind the round that was under way; the same if none was.
    pub round: u32,
    /// The answer is to begin with this page.
    pub from: u64,
}

/// What the target has of the round that was under way when the connection broke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// The last fence that was reached: everything before it is here.
    pub reached: u32,
    /// Runs of pages that have arrived since, ascending, at most [`RUNS_MAX`].
    pub runs: Vec<Run>,
    /// Where the answer goes on, if it is not complete; it is to be asked for.
    pub next: Option<u64>,
}

/// The most runs in one message.
pub const RUNS_MAX: usize = 1 << 16;

/// Consecutive pages. What a peer names is checked against the guest's memory before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What lets the data streams of one session in: sent before `Ready`, and before the last part of each `Arrived`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admit {
    /// The number in the streams' joins.
    pub session: u32,
    /// What their proofs are made with.
    pub key: JoinKey,
}

/// What a guest is known by on its network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkIdentity {
    /// The MAC address of its interface, if it has one.
    pub mac: Option<[u8; 6]>,
    /// IPv4 addresses, at most [`ADDRESSES_MAX`].
    pub ipv4: Vec<Ipv4Addr>,
    /// IPv6 addresses, at most [`ADDRESSES_MAX`].
    pub ipv6: Vec<Ipv6Addr>,
}

/// The guest is paused and this is everything of it but its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// vCPUs, interrupt controllers, clocks and devices, in the machine monitor's own versioned format.
    pub state: Vec<u8>,
    /// What to announce.
    pub network: NetworkIdentity,
    /// Whether the guest ran before the migration paused it. One that the operator had paused arrives paused.
    pub runs: bool,
}

/// The target is to make itself able to run the guest, without running it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The epoch in which the target would run it.
    pub epoch: Epoch,
    /// The fence behind the last page.
    pub fence: u32,
    /// The digest of the paused guest's memory.
    pub digest: MemoryDigest,
}

/// The target could run the guest now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The epoch of the `Prepare` that this answers.
    pub epoch: Epoch,
    /// The digest of the memory as the target has it.
    pub digest: MemoryDigest,
    /// How long it waited for pages after the `Prepare`, in µs.
    pub wait_us: u64,
    /// How long it took to restore the state, in µs.
    pub restore_us: u64,
}

/// An epoch with nothing else: the body of `Commit`, `Discarded` and `Released`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtEpoch {
    /// The epoch meant.
    pub epoch: Epoch,
}

/// The target runs the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The epoch in which it runs.
    pub epoch: Epoch,
    /// How long its durable record took, in µs.
    pub record_us: u64,
    /// How long starting the vCPUs took, in µs.
    pub run_us: u64,
}

/// One side gives up. Only valid before the source has recorded its commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// What kind of reason.
    pub code: AbortCode,
    /// The reason in a sentence, at most [`SENTENCE_BYTES_MAX`].
    #[serde(deserialize_with = "shown")]
    pub sentence: String,
}

impl Abort {
    /// An abort for `code`; the sentence is cut at its limit, and what would move a terminal's cursor becomes spaces.
    #[must_use]
    pub fn new(code: AbortCode, sentence: impl Into<String>) -> Self {
        let mut sentence = on_one_line(sentence.into());
        let mut end = SENTENCE_BYTES_MAX.min(sentence.len());
        while !sentence.is_char_boundary(end) {
            end -= 1;
        }
        sentence.truncate(end);
        Self { code, sentence }
    }
}

/// Why a side gives up, as a number that scripts can rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
#[repr(u16)]
pub enum AbortCode {
    /// The operator asked for it.
    Cancelled = 1,
    /// No common protocol version.
    Version = 2,
    /// The target already has a VM or another migration under way.
    Occupied = 3,
    /// The target can't build this machine.
    CannotBuild = 4,
    /// The target has too little memory.
    NoMemory = 5,
    /// The target can't restore the state.
    CannotRestore = 6,
    /// The two memories differ.
    DigestDiffers = 7,
    /// A message or a page that has no place here.
    Protocol = 8,
    /// It took longer than allowed.
    Timeout = 9,
    /// A side failed within itself (disk, KVM).
    Internal = 10,
    /// The other side stands in the way of this host's records.
    Epoch = 11,
    /// By its certificate, or for lack of one, a side may not do this.
    Forbidden = 12,
    /// The two sides don't have the same witness, or it can't be reached.
    Witness = 20,
}

const ABORT_CODES: [AbortCode; 13] = [
    AbortCode::Cancelled,
    AbortCode::Version,
    AbortCode::Occupied,
    AbortCode::CannotBuild,
    AbortCode::NoMemory,
    AbortCode::CannotRestore,
    AbortCode::DigestDiffers,
    AbortCode::Protocol,
    AbortCode::Timeout,
    AbortCode::Internal,
    AbortCode::Epoch,
    AbortCode::Forbidden,
    AbortCode::Witness,
];

impl From<AbortCode> for u16 {
    fn from(code: AbortCode) -> Self {
        code as Self
    }
}

impl TryFrom<u16> for AbortCode {
    type Error = String;

    fn try_from(number: u16) -> Result<Self, String> {
        ABORT_CODES
            .into_iter()
            .find(|&code| u16::from(code) == number)
            .ok_or_else(|| format!("abort code {number} is unknown"))
    }
}

/// Builds the message enum, its numbered types and its body codec from one table.
macro_rules! messages {
    ($($(#[$doc:meta])* $number:literal $name:ident($body:ty)),+ $(,)?) => {
        /// A message of the control connection.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Message { $($(#[$doc])* $name($body)),+ }

        /// A message's type as the header has it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum MessageType { $($(#[$doc])* $name = $number),+ }

        impl MessageType {
            /// The number in the header.
            #[must_use]
            pub const fn number(self) -> u16 {
                self as u16
            }

            /// The type of that number.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }

        impl Message {
            /// Which type it is.
            #[must_use]
            pub const fn message_type(&self) -> MessageType {
                match self { $(Self::$name(_) => MessageType::$name),+ }
            }

            /// Appends the body.
            pub(crate) fn encode_body(&self, to: &mut Vec<u8>) {
                let body = match self { $(Self::$name(body) => postcard::to_stdvec(body)),+ };
                to.extend(body.expect("our own types have a postcard form"));
            }

            /// Reads a body of `message_type`; every byte must be used and every bound kept.
            pub(crate) fn decode_body(message_type: MessageType, body: &[u8]) -> Result<Self, String> {
                let message = match message_type {
                    $(MessageType::$name => Self::$name(whole(body)?)),+
                };
                message.check_bounds()?;
                Ok(message)
            }
        }
    };
}

messages! {
    /// Source: who I am and what is to move.
    1 Hello(Hello),
    /// Target: let us talk.
    2 Welcome(Welcome),
    /// Source: what to build.
    3 Describe(Describe),
    /// Target: built.
    4 Ready(Ready),
    /// Target: everything before the fence has arrived.
    5 FenceReached(FenceReached),
    /// Source: the guest stands still from now on. Stale frames in the tap can go.
    6 Stopping(AtEpoch),
    /// Source: the guest's state.
    7 State(State),
    /// Source: get ready to run it.
    8 Prepare(Prepare),
    /// Target: ready to run it.
    9 Prepared(Prepared),
    /// Source: it is yours; run it.
    10 Commit(AtEpoch),
    /// Target: it runs.
    11 Running(Running),
    /// Target: I never ran it and never shall.
    12 Discarded(AtEpoch),
    /// Source: I have let go of it.
    13 Released(AtEpoch),
    /// Either: I give up.
    14 Abort(Abort),
    /// Source: are you there?
    15 Ping(u64),
    /// Target: I am.
    16 Pong(u64),
    /// Source, instead of `Describe`, within one host: what to build, on the memory that comes beside it.
    17 HandOver(HandOver),
    /// Source: how long does your record take now?
    20 Rehearse(Rehearse),
    /// Target: this long.
    21 Rehearsed(Rehearsed),
    /// Source: if the connection breaks, keep what you have for this long.
    30 KeepFor(KeepFor),
    /// Source: I am back; what of the round under way has arrived?
    31 Resume(Resume),
    /// Target: this.
    32 Arrived(Arrived),
    /// Target: the data streams are let in with this.
    40 Admit(Admit),
    /// Source, after `Welcome` and where both have one: this is my witness.
    41 Witness(WitnessId),
}

fn whole<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, String> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(format!("{} bytes too many", rest.len())),
        Err(error) => Err(error.to_string()),
    }
}

impl Message {
    /// Whether it answers what the source asked in pre-copy, and may still be under way when the guest is stopped.
    pub(crate) const fn is_late_measurement(&self) -> bool {
        matches!(self, Self::Pong(_) | Self::FenceReached(_) | Self::Rehearsed(_))
    }

    fn check_bounds(&self) -> Result<(), String> {
        let bound = |what: &str, length: usize, max: usize| {
            if length > max {
                Err(format!("{what} has {length} entries, above the limit of {max}"))
            } else {
                Ok(())
            }
        };
        match self {
            Self::Hello(Hello { epoch, .. }) if *epoch > Epoch::MAX => {
                Err(format!("epoch {epoch} is above the limit of {}", Epoch::MAX))
            }
            Self::Welcome(Welcome { host, .. }) => bound("the host name", host.len(), 256),
            Self::Describe(Describe { description, regions, streams }) => {
                bound("the description", description.len(), DESCRIPTION_BYTES_MAX)?;
                bound("the region list", regions.len(), crate::layout::REGIONS_MAX)?;
                let streams = *streams;
                if (1..=crate::ident::STREAMS_MAX).contains(&streams) {
                    Ok(())
                } else {
                    Err(format!("{streams} data streams, not 1 to {}", crate::ident::STREAMS_MAX))
                }
            }
            Self::HandOver(HandOver { description, regions }) => {
                bound("the description", description.len(), DESCRIPTION_BYTES_MAX)?;
                bound("the region list", regions.len(), crate::layout::REGIONS_MAX)
            }
            Self::State(State { state, network, runs: _ }) => {
                bound("the state", state.len(), STATE_BYTES_MAX)?;
                bound("the IPv4 list", network.ipv4.len(), ADDRESSES_MAX)?;
                bound("the IPv6 list", network.ipv6.len(), ADDRESSES_MAX)
            }
            Self::Arrived(Arrived { runs, .. }) => bound("the list of runs", runs.len(), RUNS_MAX),
            Self::Abort(Abort { sentence, .. }) => bound("the reason", sentence.len(), SENTENCE_BYTES_MAX),
            Self::Hello(_)
            | Self::Ready(_)
            | Self::FenceReached(_)
            | Self::Stopping(_)
            | Self::Prepare(_)
            | Self::Prepared(_)
            | Self::Commit(_)
            | Self::Running(_)
            | Self::Discarded(_)
            | Self::Released(_)
            | Self::Ping(_)
            | Self::Rehearse(_)
            | Self::Rehearsed(_)
            | Self::KeepFor(_)
            | Self::Resume(_)
            | Self::Admit(_)
            | Self::Witness(_)
            | Self::Pong(_) => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::admission::JoinSecret;

    /// A message of every type, with fixed contents: the golden vectors are made of these.
    pub(crate) fn one_of_each() -> Vec<Message> {
        let epoch = Epoch::new(7);
        vec![
            Message::Hello(Hello {
                version_oldest: 1,
                version_newest: 1,
                features: Features::OURS,
                migration: MigrationId([1; 16]),
                vm: VmId([2; 16]),
                name: "web".parse().unwrap(),
                epoch,
                resumes: false,
            }),
            Message::Welcome(Welcome { version: 1, features: Features::OURS, host: "b".into() }),
            Message::Describe(Describe {
                description: vec![1, 2, 3],
                regions: vec![Region { gpa: 0, bytes: 0x8000 }],
                streams: 2,
            }),
            Message::Ready(Ready { record_us: 300 }),
            Message::FenceReached(FenceReached { fence: 3 }),
            Message::Stopping(AtEpoch { epoch }),
            Message::State(State {
                state: vec![9, 8],
                network: NetworkIdentity {
                    mac: Some([2, 0, 0, 0, 0, 1]),
                    ipv4: vec![Ipv4Addr::new(10, 77, 0, 2)],
                    ipv6: vec![Ipv6Addr::LOCALHOST],
                },
                runs: true,
            }),
            Message::Prepare(Prepare { epoch, fence: 4, digest: MemoryDigest::ZERO }),
            Message::Prepared(Prepared { epoch, digest: MemoryDigest::ZERO, wait_us: 1, restore_us: 2 }),
            Message::Commit(AtEpoch { epoch }),
            Message::Running(Running { epoch, record_us: 3, run_us: 4 }),
            Message::Discarded(AtEpoch { epoch }),
            Message::Released(AtEpoch { epoch }),
            Message::Abort(Abort::new(AbortCode::Cancelled, "the operator cancelled it")),
            Message::Ping(5),
            Message::Pong(5),
            Message::HandOver(HandOver {
                description: vec![1, 2, 3],
                regions: vec![Region { gpa: 0, bytes: 0x8000 }],
            }),
            Message::Rehearse(Rehearse),
            Message::Rehearsed(Rehearsed { record_us: 6 }),
            Message::KeepFor(KeepFor { wait_ms: 30_000 }),
            Message::Resume(Resume { epoch, session: 1, reached: 2, round: 3, from: 4 }),
            Message::Arrived(Arrived {
                reached: 2,
                runs: vec![Run { first: 4, count: 600 }, Run { first: 1000, count: 1 }],
                next: Some(2000),
            }),
            Message::Admit(Admit { session: 1, key: JoinSecret([7; 32]).key(1) }),
            Message::Witness(WitnessId([5; 16])),
        ]
    }

    #[test]
    fn there_is_one_of_each_type() {
        let numbers: Vec<u16> = one_of_each().iter().map(|m| m.message_type().number()).collect();
        let all: Vec<u16> = (0..100).filter(|&n| MessageType::from_number(n).is_some()).collect();
        assert_eq!(numbers, all);
    }

    #[test]
    fn bodies_beyond_their_bounds_are_refused() {
        for streams in [0, crate::ident::STREAMS_MAX + 1] {
            let bad = Message::Describe(Describe { description: vec![], regions: vec![], streams });
            let mut body = Vec::new();
            bad.encode_body(&mut body);
            assert!(Message::decode_body(MessageType::Describe, &body).unwrap_err().contains("streams"));
        }
        let mut body = Vec::new();
        Message::Ping(1).encode_body(&mut body);
        body.push(0);
        assert!(Message::decode_body(MessageType::Ping, &body).unwrap_err().contains("too many"));
    }

    #[test]
    fn an_epoch_that_can_not_be_counted_on_is_refused() {
        // A target takes the epoch after it, which must not overflow whatever a peer says.
        for (number, fits) in
            [(1 << 62, true), (u64::MAX / 2, true), (u64::MAX / 2 + 1, false), (u64::MAX, false)]
        {
            let Some(Message::Hello(hello)) = one_of_each().into_iter().next() else {
                panic!("Hello is first")
            };
            let mut body = Vec::new();
            Message::Hello(Hello { epoch: Epoch::new(number), ..hello }).encode_body(&mut body);
            assert_eq!(Message::decode_body(MessageType::Hello, &body).is_ok(), fits, "{number}");
        }
    }

    #[test]
    fn a_long_sentence_is_cut_between_characters() {
        let abort = Abort::new(AbortCode::Internal, "é".repeat(SENTENCE_BYTES_MAX));
        assert_eq!(abort.sentence.len(), SENTENCE_BYTES_MAX);
        let abort = Abort::new(AbortCode::Internal, format!("x{}", "é".repeat(SENTENCE_BYTES_MAX)));
        assert_eq!(abort.sentence.len(), SENTENCE_BYTES_MAX - 1);
    }
}
