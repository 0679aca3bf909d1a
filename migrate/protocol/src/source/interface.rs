//! What passes between the source's state machine and its caller: configuration, events, actions, progress and
//! the outcome. Plain data; nothing here decides anything.

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::ident::{Epoch, MigrationId, VmId, VmName};
use crate::message::{Abort, AbortCode, Message, NetworkIdentity};
use crate::page::Compression;
use crate::policy::Forecast;
use crate::record::Record;
use crate::witness::{Claim, Ruling, WitnessId};

/// What the operator decides of a handover that is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The guest goes on at the source. If the target runs it too, there are two. Where there is a witness it is asked, and
    /// decides: it may yet give the target leave.
    Resume,
    /// The same, whatever the witness may yet decide.
    ResumeAlone,
    /// The VM is the target's, and the source lets go of it. If the target does not run it, it is lost.
    Discard,
}

/// What to do when the time allowed is over before the guest could be stopped within its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnTimeout {
    /// Give up; the guest goes on at the source.
    #[default]
    Cancel,
    /// Stop the guest whatever the downtime.
    Stop,
}

/// How the guest's memory gets to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryPath {
    /// Page by page over data streams.
    #[default]
    Streams,
    /// As a descriptor: source and target are processes of one host and map the same memory. No page is copied.
    HandedOver,
}

/// What the caller asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This attempt; random.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// The epoch in which this host runs it.
    pub epoch: Epoch,
    /// The migration that brought it to this host, if one did ([`Record::arrived_by`]); this host's records keep it.
    pub arrived_by: Option<MigrationId>,
    /// The target as the operator gave it; goes into the commit record.
    pub target: String,
    /// The witness that both sides must have, if this host has one.
    pub witness: Option<WitnessId>,
    /// The machine in the machine monitor's own format.
    pub description: Vec<u8>,
    /// How memory gets there. With [`MemoryPath::HandedOver`] streams and compression have no meaning.
    pub memory: MemoryPath,
    /// How many data streams.
    pub streams: u16,
    /// What pages may be packed with.
    pub compression: Compression,
    /// Whether both sides take digests of memory and compare them. A target that can't do without does so anyway.
    pub verify: bool,
    /// Whether the source also reads all of the paused guest's memory once more, so that a page that was written and that no
    /// dirty log has named is found. The guest stands still meanwhile. Has no meaning without `verify`.
    pub verify_whole: bool,
    /// The downtime that is allowed.
    pub downtime_budget: Duration,
    /// How long it may take until the guest is stopped.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// How long a target whose connection broke before the commit is tried to be reached again; zero for not at all.
    pub reconnect: Duration,
}

/// How long connecting, greeting and building may each take.
pub const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the guest may stand still before the attempt is given up, for a budget: long enough not to throw
/// away a slightly late migration, short enough that a stuck one costs seconds at most.
#[must_use]
pub fn standstill_max(budget: Duration) -> Duration {
    (budget * 4).max(Duration::from_secs(2))
}

/// How long it may stand still once the caller has asked to stop whatever the downtime.
pub const STANDSTILL_FORCED_MAX: Duration = Duration::from_secs(600);

/// How a round went.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RoundSent {
    /// Pages that travelled as they are.
    pub raw_pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that travelled packed.
    pub packed_pages: u64,
    /// Pages of which only the changed blocks travelled.
    pub delta_pages: u64,
    /// Dirty pages that the target was known to have already.
    pub unchanged_pages: u64,
    /// Pages that were never touched, so that the target need not hear of them.
    pub untouched_pages: u64,
    /// Bytes written to the data streams.
    pub wire_bytes: u64,
    /// How long the link stood idle for the bandwidth cap alone: a round without the cap would have been shorter by it.
    pub link_idle: Duration,
    /// The digest of all pages sent so far, each as last sent.
    pub digest: MemoryDigest,
    /// The digest of memory itself, if [`Action::SendPages`] asked for it.
    pub whole_digest: Option<MemoryDigest>,
}

impl RoundSent {
    /// All pages of the round that the streams looked at.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.raw_pages + self.zero_pages + self.packed_pages + self.delta_pages + self.unchanged_pages
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The control connection stands, for the first time or again.
    Connected,
    /// It could not be made, or is lost.
    Disconnected(String),
    /// A message arrived.
    Message(Message),
    /// All data streams stand.
    StreamsOpened,
    /// A data stream is lost or could not be opened.
    StreamFailed(String),
    /// The dirty log is on.
    DirtyLogStarted,
    /// The dirty log was read and cleared.
    DirtyLogRead {
        /// What it named.
        pages: PageBitmap,
        /// How long that took.
        took: Duration,
    },
    /// All pages of the round and its fence are written.
    RoundSent(RoundSent),
    /// The guest stands still.
    Paused,
    /// The state of the paused guest.
    StateSaved {
        /// In the machine monitor's own format.
        state: Vec<u8>,
        /// What to announce at the target.
        network: NetworkIdentity,
        /// Whether the guest ran before the migration paused it.
        runs: bool,
        /// How long that took.
        took: Duration,
    },
    /// The record is durable.
    RecordWritten {
        /// How long that took.
        took: Duration,
    },
    /// The record could not be written.
    RecordFailed(String),
    /// The record that stands already is written once more.
    RecordRehearsed {
        /// How long that took.
        took: Duration,
    },
    /// It could not be written once more.
    RehearsalFailed(String),
    /// An action on the VM other than resuming failed, or the guest ended by itself.
    VmFailed(String),
    /// The guest runs again (or is as it was before the migration).
    VmResumed,
    /// It could not be resumed.
    ResumeFailed(String),
    /// The operator wants it cancelled.
    Cancel,
    /// The witness has ruled on what [`Action::AskWitness`] claimed.
    WitnessSays(Ruling),
    /// The witness can't be reached, or can't decide; the claim may have been heard all the same.
    WitnessSilent(String),
    /// The operator decides what is in doubt.
    Resolve(Resolution),
    /// [`super::Source::poll_timeout`]'s time has come.
    Timeout,
}

/// What is to be done.
#[expect(clippy::large_enum_variant, reason = "the large one, a report, comes once a round")]
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the control connection, not before `delay` has passed.
    Connect {
        /// How long to wait first.
        delay: Duration,
    },
    /// Send a message on it; if there is no connection, drop it.
    Send(Message),
    /// The same, and the descriptor of guest memory beside it.
    SendMemory(Message),
    /// Open the data streams.
    OpenStreams {
        /// Whether they take digests of what they send.
        verify: bool,
    },
    /// Shut all data streams, whatever they are doing.
    CloseStreams,
    /// Open data streams anew. Before that everything that the old ones were doing has ended, the packing threads' work
    /// included, and whatever was known of the target's `lacking` pages is forgotten.
    ReopenStreams {
        /// Whether they take digests of what they send.
        verify: bool,
        /// The number in each stream's join.
        session: u32,
        /// Pages that were sent, or were about to be, and have not arrived.
        lacking: PageBitmap,
    },
    /// Switch the dirty log on.
    StartDirtyLog,
    /// Read and clear it.
    ReadDirtyLog,
    /// Switch it off.
    StopDirtyLog,
    /// Send these pages, then the fence.
    SendPages {
        /// Which pages.
        pages: PageBitmap,
        /// The fence behind them.
        fence: u32,
        /// Whether the guest stands still, so that the bandwidth cap does not apply.
        paused: bool,
        /// Whether the target has no complete round yet: what was never touched is zero there too, and need not travel.
        first: bool,
        /// Whether the digest of all of memory is to be taken, too, from memory itself.
        whole: bool,
    },
    /// Stop vCPUs and devices.
    PauseVm,
    /// Save the paused guest's state.
    SaveState,
    /// Make the guest what it was before the pause; nothing to do if it was never paused.
    ResumeVm,
    /// Let go of the guest: its memory, its tap, its threads.
    ReleaseVm,
    /// Write the record durably.
    WriteRecord(Record),
    /// Write durably once more the record that stands already, to measure what that costs.
    RehearseRecord(Record),
    /// Make this claim at the witness. It must not wait for the actions on the VM, nor they for it.
    AskWitness(Claim),
    /// Tell the caller.
    Report(Progress),
    /// It is over.
    Finish(Outcome),
}

impl Action {
    /// Whether it works on the VM or its record, so that its order among such actions matters.
    #[must_use]
    pub const fn on_vm(&self) -> bool {
        match self {
            Self::StartDirtyLog
            | Self::ReadDirtyLog
            | Self::StopDirtyLog
            | Self::PauseVm
            | Self::SaveState
            | Self::ResumeVm
            | Self::ReleaseVm
            | Self::WriteRecord(_)
            | Self::RehearseRecord(_) => true,
            Self::Connect { .. }
            | Self::Send(_)
            | Self::SendMemory(_)
            | Self::OpenStreams { .. }
            | Self::CloseStreams
            | Self::ReopenStreams { .. }
            | Self::SendPages { .. }
            | Self::AskWitness(_)
            | Self::Report(_)
            | Self::Finish(_) => false,
        }
    }
}

/// What the caller may want to show.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Both sides agree; the target is building.
    Negotiated {
        /// The protocol version.
        version: u16,
        /// The target's host name.
        host: String,
    },
    /// A round begins.
    RoundStarted {
        /// Counted from 1.
        round: u32,
        /// How many pages it has.
        pages: u64,
    },
    /// A round has arrived at the target.
    RoundDone(RoundReport),
    /// The link broke before the commit. The guest runs here, and the target is tried to be reached again.
    Reconnecting {
        /// What broke.
        reason: String,
    },
    /// The target was reached again, and pre-copy goes on.
    Reconnected(Reconnection),
    /// The guest is being stopped with this forecast.
    Stopping {
        /// Pages left to send.
        pages: u64,
        /// The downtime that is expected.
        forecast: Forecast,
        /// Whether the budget was given up because the time was over.
        forced: bool,
    },
    /// The guest stands still.
    Paused,
    /// The target runs the guest.
    Handed,
    /// The commit is recorded but the target can't be reached: who runs the guest is unknown here.
    InDoubt {
        /// Why it can't be reached.
        reason: String,
    },
    /// The attempt failed; the guest goes on here.
    Undoing {
        /// Why.
        failure: Failure,
    },
}

/// One round as it went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundReport {
    /// Counted from 1; the last is the one sent while the guest stood still.
    pub round: u32,
    /// Pages that were dirty when it began.
    pub dirty_pages: u64,
    /// What was sent.
    pub sent: RoundSent,
    /// From the first page to the fence's arrival at the target.
    pub took: Duration,
    /// Pages that the guest dirtied per second meanwhile; `None` for the last round.
    pub dirtied_per_s: Option<f64>,
    /// The downtime that stopping right after it would cause; `None` for the last round.
    pub forecast: Option<Forecast>,
}

/// A link that broke before the commit and was made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconnection {
    /// The round that was under way or had just arrived.
    pub round: u32,
    /// Of the round under way, pages that had arrived.
    pub arrived_pages: u64,
    /// Pages that were put back as dirty, to be sent with the next round: those of the round under way that had not arrived,
    /// and what the guest is known to have written since. In the first round pages that were never touched count too.
    pub again_pages: u64,
    /// From the loss until pre-copy went on.
    pub took: Duration,
}

/// The downtime by part; they follow each other and add up to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Downtime {
    /// Stopping vCPUs and devices.
    pub pause: Duration,
    /// Reading the last dirty log.
    pub dirty_log: Duration,
    /// Sending the last pages while the state is saved.
    pub copy: Duration,
    /// Until the target has everything, agrees on the digest and has restored the state.
    pub prepare: Duration,
    /// The commit record at the source.
    pub record: Duration,
    /// From `Commit` to `Running`: round trip, record at the target, starting the vCPUs.
    pub commit: Duration,
    /// Of `copy`: saving the state.
    pub within_save: Duration,
    /// Of `prepare`: until the last pages had arrived at the target.
    pub within_wait: Duration,
    /// Of `prepare`: restoring the state at the target.
    pub within_restore: Duration,
    /// Of `commit`: the record at the target.
    pub within_target_record: Duration,
    /// Of `commit`: starting the vCPUs.
    pub within_run: Duration,
}

impl Downtime {
    /// The whole, as the source sees it: from asking the vCPUs to stop until the target's word that the guest
    /// runs has arrived. That is at least what the guest sees.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.pause + self.dirty_log + self.copy + self.prepare + self.record + self.commit
    }
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The operator cancelled it.
    #[error("it was cancelled")]
    Cancelled,
    /// The target refused or gave up.
    #[error("the target refused: {}", .0.sentence)]
    Refused(Abort),
    /// The connection could not be made or broke.
    #[error("the connection to the target failed: {0}")]
    Link(String),
    /// Something at the source failed.
    #[error("the source failed: {0}")]
    Local(String),
    /// The target sent what has no place in the protocol.
    #[error("the target broke the protocol: {0}")]
    Protocol(String),
    /// A step took too long.
    #[error("{0}")]
    Timeout(String),
}

impl Failure {
    pub(super) fn abort(&self) -> Option<Abort> {
        let code = match self {
            Self::Refused(_) => return None,
            Self::Cancelled => AbortCode::Cancelled,
            Self::Link(_) | Self::Local(_) => AbortCode::Internal,
            Self::Protocol(_) => AbortCode::Protocol,
            Self::Timeout(_) => AbortCode::Timeout,
        };
        Some(Abort::new(code, self.to_string()))
    }
}

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The target runs the guest.
    Moved(Box<Summary>),
    /// The operator has decided that the VM is the target's: the source has let go of it without knowing that it runs.
    LetGo {
        /// The epoch that was given away.
        epoch: Epoch,
    },
    /// The guest goes on at the source, in `epoch`.
    Stayed {
        /// Why.
        failure: Failure,
        /// The epoch in which it goes on.
        epoch: Epoch,
    },
}

/// A successful migration in numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The epoch in which the target runs it.
    pub epoch: Epoch,
    /// The target's host name.
    pub host: String,
    /// How memory got there.
    pub memory: MemoryPath,
    /// Every round, the last included; none if memory was handed over.
    pub rounds: Vec<RoundReport>,
    /// Every loss of the link before the commit.
    pub reconnections: Vec<Reconnection>,
    /// The downtime by part.
    pub downtime: Downtime,
    /// What was forecast when the guest was stopped.
    pub forecast: Forecast,
    /// From the start to the target's word that it runs.
    pub total: Duration,
    /// Whether digests of memory were taken and found equal; if not, nobody has checked that the two memories are. There
    /// are none if memory was handed over: it is one memory, so there is nothing to compare.
    pub verified: bool,
    /// The digest of the guest's memory as the source sent it; zero if nothing was verified.
    pub digest: MemoryDigest,
    /// The digest of the memory as the target has it.
    pub target_digest: MemoryDigest,
}
