//! The functions. Each takes any bytes; what it must hold is asserted in it.

use ferry_migrate::tls::identity::HostIdentity;
use ferry_protocol::admission::JoinSecret;
use ferry_protocol::encode::delta;
use ferry_protocol::encode::pack::{Packed, Unpacker};
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, GROUP_PAGES_MAX, JOIN_BYTES, Join};
use ferry_protocol::record::Record;
use ferry_protocol::wire::{Decoder, encode};
use ferry_protocol::witness::Entry;
use ferry_protocol::{Epoch, Message, PAGE_BYTES, StreamIndex, VmId};
use ferry_vmm::{CpuProfile, LocalChoices, Machine, MemoryChoices, SerialTarget};

use crate::bytes::{Taker, filled, seal, sealed_messages, sealed_record};
use crate::{machines, source_side, target_side};

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

/// The target's whole state machine: see [`target_side`].
pub fn target_core(bytes: &[u8]) {
    let _ = target_side::play(bytes);
}

/// The source's whole state machine: see [`source_side`].
pub fn source_core(bytes: &[u8]) {
    let _ = source_side::play(bytes);
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
