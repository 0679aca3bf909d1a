//! The functions. Each takes any bytes; what it must hold is asserted in it.

use std::time::Duration;

use ferry_migrate::tls::identity::HostIdentity;
use ferry_protocol::admission::JoinSecret;
use ferry_protocol::encode::delta;
use ferry_protocol::encode::pack::{Packed, Unpacker};
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, GROUP_PAGES_MAX, JOIN_BYTES, Join};
use ferry_protocol::page::Compression;
use ferry_protocol::record::Record;
use ferry_protocol::source::{self, MemoryPath, OnTimeout, Source};
use ferry_protocol::target::{self, Target};
use ferry_protocol::wire::{Decoder, encode};
use ferry_protocol::witness::{Entry, Ruling, WitnessId};
use ferry_protocol::{
    Epoch, MemoryDigest, MemoryLayout, Message, MigrationId, PAGE_BYTES, PageBitmap, Region, StreamIndex,
    Timestamp, VmId,
};
use ferry_vmm::{CpuProfile, LocalChoices, Machine, MemoryChoices, SerialTarget};

use crate::bytes::{Taker, filled, seal, sealed_messages, sealed_record};
use crate::machines;

/// A decoder, or what stands behind one.
#[derive(Debug, Clone, Copy)]
pub struct FuzzTarget {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Takes the bytes, and panics if they get the better of it.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [FuzzTarget; 13] = [
    FuzzTarget { name: "control", run: control },
    FuzzTarget { name: "join", run: join },
    FuzzTarget { name: "frame", run: frame },
    FuzzTarget { name: "packed", run: packed },
    FuzzTarget { name: "delta", run: delta },
    FuzzTarget { name: "target", run: target_core },
    FuzzTarget { name: "source", run: source_core },
    FuzzTarget { name: "description", run: description },
    FuzzTarget { name: "certificate", run: certificate },
    FuzzTarget { name: "record", run: record },
    FuzzTarget { name: "witness", run: witness },
    FuzzTarget { name: "state", run: state },
    FuzzTarget { name: "restore", run: restore },
];

/// Messages as they come out of a stream of bytes, in pieces.
fn messages(bytes: &[u8], piece_bytes: usize) -> Vec<Message> {
    let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece_bytes.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    assert!(error.to_string().len() < 1000, "what a peer is told is short");
                    return messages;
                }
            }
        }
    }
    messages
}

/// The control connection's framing and every message.
pub fn control(bytes: &[u8]) {
    let mut taker = Taker(bytes);
    let (fix, piece) = (taker.byte() % 4 != 0, usize::from(taker.byte()) + 1);
    let bytes = if fix { sealed_messages(taker.0) } else { taker.0.to_vec() };
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    if let Ok(Some(first)) = decoder.next_within(4096) {
        assert!(encode(&first).len() <= 4096 + 16);
    }
    let read = messages(&bytes, piece);
    assert_eq!(read, messages(&bytes, usize::MAX), "in whatever pieces they come");
    for message in read {
        // What was read can be written, and is then read as the same.
        assert_eq!(messages(&encode(&message), usize::MAX), [message]);
    }
}

/// What opens a data stream.
pub fn join(bytes: &[u8]) {
    let mut taker = Taker(bytes);
    let fix = taker.byte() % 4 != 0;
    let mut join: [u8; JOIN_BYTES] = filled(taker.0);
    if fix {
        join[..6].copy_from_slice(b"FRRJ\x01\x00");
        seal(&mut join, JOIN_BYTES - 4);
    }
    if let Ok(read) = Join::decode(&join) {
        assert_eq!(read.encode(), join);
        // Nobody guesses a proof.
        let place = ferry_protocol::admission::Place {
            vm: VmId([1; 16]),
            epoch: Epoch::FIRST,
            migration: read.migration,
            session: read.session,
            stream: read.stream,
        };
        assert!(!JoinSecret([0x5a; 32]).key(read.session).admits(&place, &read.proof));
        let _ = StreamIndex::new(read.stream, 8);
    }
}

/// A frame's header, for guests of all sizes.
pub fn frame(bytes: &[u8]) {
    let mut taker = Taker(bytes);
    let (fix, page_count) = (taker.byte() % 4 != 0, taker.number() % (1 << 34) + 1);
    let mut header: [u8; FRAME_HEADER_BYTES] = filled(taker.0);
    if fix {
        (header[0], header[1], header[2], header[3]) = (0xF7, header[1] % 8, 0, 0);
        // Most chunks and pages are beyond most guests.
        let chunk = u64::from_le_bytes(filled(&header[8..16])) % (page_count.div_ceil(512) + 1);
        header[8..16].copy_from_slice(&chunk.to_le_bytes());
        seal(&mut header, FRAME_HEADER_BYTES - 4);
    }
    let Ok(read) = Frame::decode(&header, page_count) else { return };
    assert_eq!(read.encode(), header);
    let (chunk, mask, body_bytes) = match read {
        Frame::Raw { chunk, mask } | Frame::Zero { chunk, mask } => (chunk, mask, 0),
        Frame::Lz4 { chunk, mask, body_bytes }
        | Frame::Zstd { chunk, mask, body_bytes }
        | Frame::Delta { chunk, mask, body_bytes } => (chunk, mask, body_bytes),
        Frame::Fence(_) => return,
    };
    for range in chunk.ranges(&mask) {
        assert!(range.count() > 0 && range.first() + range.count() <= page_count);
    }
    assert!(body_bytes <= 516 << 10, "the largest buffer of a stream");
}

/// The bodies of packed frames.
pub fn packed(bytes: &[u8]) {
    let mut taker = Taker(bytes);
    let how = if taker.byte() % 2 == 0 { Packed::Lz4 } else { Packed::Zstd };
    let count = u64::from(taker.byte()) % GROUP_PAGES_MAX + 1;
    let mut unpacker = Unpacker::default();
    if let Ok(pages) = unpacker.unpack(taker.0, how, count) {
        let pages = u64::try_from(pages.count()).unwrap_or(u64::MAX);
        assert_eq!(pages, count);
    }
}

/// The bodies of delta frames.
pub fn delta(bytes: &[u8]) {
    let mut taker = Taker(bytes);
    let count = u64::from(taker.byte()) % GROUP_PAGES_MAX + 1;
    let Ok(changes) = delta::changes(taker.0, count) else { return };
    for change in changes {
        assert!(u64::try_from(change.nth_page).is_ok_and(|nth| nth < count));
        assert!(change.at + change.bytes.len() <= PAGE_BYTES);
    }
}

/// The witness of a side that has one.
const WITNESS: WitnessId = WitnessId([5; 16]);

/// How long one step of a core takes here.
const STEP: Duration = Duration::from_millis(300);

fn at(step: u32) -> Timestamp {
    Timestamp::from_origin(STEP * step)
}

/// The target's whole state machine against a source that sends what it likes, while its own host does its work. It must
/// never run the guest without a commit and a record of that.
pub fn target_core(bytes: &[u8]) {
    let config = target::Config {
        host: "b".to_owned(),
        source: "a".to_owned(),
        carries_descriptors: bytes.first().is_some_and(|byte| byte % 2 == 1),
        name: None,
        record: None,
        witness: bytes.first().is_some_and(|byte| byte % 4 >= 2).then_some(WITNESS),
    };
    let mut core = Target::new(config, at(0)).with_admission(JoinSecret([1; 32]));
    let (mut committed, mut pending) = (false, Vec::new());
    for (step, message) in
        (1..).zip(messages(&sealed_messages(bytes.get(1..).unwrap_or_default()), usize::MAX))
    {
        committed |= matches!(message, Message::Commit(_));
        core.handle(at(step), target::Event::Message(message));
        while let Some(action) = core.poll_action() {
            pending.extend(done_by_target(&action));
            assert!(!matches!(action, target::Action::RunVm { .. }) || committed, "{action:?}");
        }
        for event in pending.drain(..) {
            core.handle(at(step), event);
        }
        while core.poll_action().is_some() {}
        if core.poll_timeout().is_some_and(|due| due <= at(step)) {
            core.handle(at(step), target::Event::Timeout);
        }
        assert!(!core.may_run() || committed);
    }
}

/// What the target's host says when it has done what it was asked to.
fn done_by_target(action: &target::Action) -> Option<target::Event> {
    use target::{Action, Event};
    match action {
        Action::WriteRecord(_) => Some(Event::RecordWritten { took: STEP }),
        Action::RehearseRecord(_) => Some(Event::RecordRehearsed { took: STEP }),
        Action::BuildMachine { layout, .. } | Action::AdoptMemory { layout, .. } => {
            assert!(layout.page_count() > 0);
            Some(Event::MachineBuilt)
        }
        Action::ProbeWitness => Some(Event::WitnessProbed { took: STEP }),
        Action::AskWitness(_) => Some(Event::WitnessSays(Ruling::Target)),
        Action::RestoreState(_) => Some(Event::StateRestored { took: STEP }),
        Action::RunVm { .. } => Some(Event::VmRunning { took: STEP }),
        Action::EndStreams => {
            Some(Event::StreamsEnded { arrived: PageBitmap::empty(512), digest: MemoryDigest::ZERO })
        }
        Action::Send(message) => {
            // Whatever is said fits a message.
            assert!(encode(message).len() <= ferry_protocol::wire::BODY_BYTES_MAX);
            None
        }
        Action::ExpectStreams { .. }
        | Action::HangUp
        | Action::DropStaleFrames
        | Action::Announce(_)
        | Action::DiscardMachine
        | Action::Report(_)
        | Action::Finish(_) => None,
    }
}

/// The source's whole state machine against a target that answers what it likes.
pub fn source_core(bytes: &[u8]) {
    let layout = MemoryLayout::new(vec![Region { gpa: 0, bytes: 512 * 4096 }]).expect("a layout");
    let config = source::Config {
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        name: "web".parse().expect("a name"),
        epoch: Epoch::FIRST,
        arrived_by: None,
        target: "b:1".to_owned(),
        witness: bytes.last().is_some_and(|byte| byte % 2 == 1).then_some(WITNESS),
        description: vec![1],
        memory: MemoryPath::Streams,
        streams: 2,
        compression: Compression::None,
        verify: true,
        verify_whole: false,
        downtime_budget: Duration::from_secs(1),
        timeout: Duration::from_secs(100),
        on_timeout: OnTimeout::Stop,
        reconnect: Duration::from_secs(10),
    };
    let mut core = Source::new(config, layout, at(0));
    let mut pending = Vec::new();
    let messages = messages(&sealed_messages(bytes), usize::MAX).into_iter().map(source::Event::Message);
    for (step, event) in (1..).zip(std::iter::once(source::Event::Connected).chain(messages)) {
        core.handle(at(step), event);
        while let Some(action) = core.poll_action() {
            pending.extend(done_by_source(action));
        }
        for event in pending.drain(..) {
            core.handle(at(step), event);
        }
    }
}

/// What the source's host says when it has done what it was asked to.
fn done_by_source(action: source::Action) -> Option<source::Event> {
    use source::{Action, Event};
    match action {
        Action::Connect { .. } => Some(Event::Connected),
        Action::OpenStreams { .. } => Some(Event::StreamsOpened),
        Action::ReopenStreams { lacking, .. } => {
            assert_eq!(lacking.page_count(), 512);
            Some(Event::StreamsOpened)
        }
        Action::StartDirtyLog => Some(Event::DirtyLogStarted),
        Action::ReadDirtyLog => Some(Event::DirtyLogRead { pages: PageBitmap::empty(512), took: STEP }),
        Action::SendPages { .. } => Some(Event::RoundSent(source::RoundSent::default())),
        Action::AskWitness(_) => Some(Event::WitnessSilent("nobody answers".to_owned())),
        Action::PauseVm => Some(Event::Paused),
        Action::SaveState => Some(Event::StateSaved {
            state: vec![1],
            network: ferry_protocol::message::NetworkIdentity::default(),
            runs: true,
            took: STEP,
        }),
        Action::ResumeVm => Some(Event::VmResumed),
        Action::WriteRecord(_) => Some(Event::RecordWritten { took: STEP }),
        Action::RehearseRecord(_) => Some(Event::RecordRehearsed { took: STEP }),
        Action::Send(_)
        | Action::SendMemory(_)
        | Action::CloseStreams
        | Action::StopDirtyLog
        | Action::ReleaseVm
        | Action::Report(_)
        | Action::Finish(_) => None,
    }
}

/// What a target is told to build.
pub fn description(bytes: &[u8]) {
    let local = LocalChoices {
        tap: None,
        disks: Vec::new(),
        serial: SerialTarget::Null,
        memory: MemoryChoices::default(),
        cpu: CpuProfile::default(),
    };
    let _ = Machine::config_from_description(bytes, local);
}

/// What a peer's certificate says.
pub fn certificate(bytes: &[u8]) {
    if let Ok(identity) = HostIdentity::of(&bytes.into()) {
        assert!(identity.host().len() <= 256);
    }
}

/// What stands on this host's disk, torn or bent.
pub fn record(bytes: &[u8]) {
    for bytes in [bytes, &sealed_record(bytes)] {
        if let Ok(record) = Record::decode(bytes) {
            assert_eq!(Record::decode(&record.encode()), Ok(record));
        }
    }
}

/// What a witness holds, on storage that others write too.
pub fn witness(bytes: &[u8]) {
    for bytes in [bytes, &sealed_record(bytes)] {
        if let Ok(entry) = Entry::decode(bytes) {
            assert_eq!(Entry::decode(&entry.encode()), Ok(entry));
        }
    }
}

/// A saved state, decoded without a machine.
pub fn state(bytes: &[u8]) {
    let _ = machines::is_decoded(bytes);
}

/// A saved state, restored into a machine that then goes away.
pub fn restore(bytes: &[u8]) {
    let _ = machines::is_restored(bytes);
}
