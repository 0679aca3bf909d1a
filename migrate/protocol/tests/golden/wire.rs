//! Every message, frame, join and record as bytes, one golden file each: what is in the field can't change.

use std::net::{Ipv4Addr, Ipv6Addr};

use ferry_protocol::WitnessId;
use ferry_protocol::admission::{JoinSecret, Place};
use ferry_protocol::frame::{FRAME_HEADER_BYTES, Frame, JOIN_BYTES, Join};
use ferry_protocol::message::{
    Abort, AbortCode, Admit, Arrived, AtEpoch, Describe, FenceReached, HandOver, Hello, KeepFor, MessageType,
    NetworkIdentity, Prepare, Prepared, Ready, Rehearse, Rehearsed, Resume, Run, Running, State, Welcome,
};
use ferry_protocol::negotiation::Features;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::wire::{Decoder, encode};
use ferry_protocol::{
    ChunkIndex, Epoch, MemoryDigest, Message, MigrationId, PAGE_BYTES, PageDigest, PageMask, Region, VmId,
};

use crate::files::{check, check_bytes, check_complete};

/// The digest of one page of ones at page 7: a fixed number that is not zero.
fn digest() -> MemoryDigest {
    PageDigest::of(7, &[1; PAGE_BYTES]).alone()
}

fn messages() -> Vec<Message> {
    let epoch = Epoch::new(300);
    let network = NetworkIdentity {
        mac: Some([2, 0, 0, 0, 0, 1]),
        ipv4: vec![Ipv4Addr::new(10, 77, 0, 2)],
        ipv6: vec![Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)],
    };
    vec![
        Message::Hello(Hello {
            version_oldest: 1,
            version_newest: 1,
            features: Features::LZ4,
            migration: MigrationId([0xa1; 16]),
            vm: VmId([0xb2; 16]),
            name: "web-1".parse().unwrap(),
            epoch,
            resumes: false,
        }),
        Message::Welcome(Welcome { version: 1, features: Features::LZ4, host: "host-b".into() }),
        Message::Describe(Describe {
            description: vec![1, 2, 3],
            regions: vec![
                Region { gpa: 0, bytes: 0x8000_0000 },
                Region { gpa: 0x1_0000_0000, bytes: 0x4000_0000 },
            ],
            streams: 2,
        }),
        Message::Ready(Ready { record_us: 1_500 }),
        Message::FenceReached(FenceReached { fence: 3 }),
        Message::Stopping(AtEpoch { epoch }),
        Message::State(State { state: vec![9, 8, 7], network, runs: true }),
        Message::Prepare(Prepare { epoch, fence: 4, digest: digest() }),
        Message::Prepared(Prepared { epoch, digest: digest(), wait_us: 1, restore_us: 70_000 }),
        Message::Commit(AtEpoch { epoch }),
        Message::Running(Running { epoch, record_us: 3, run_us: 4 }),
        Message::Discarded(AtEpoch { epoch }),
        Message::Released(AtEpoch { epoch }),
        Message::Abort(Abort::new(AbortCode::DigestDiffers, "the two memories differ")),
        Message::Ping(5),
        Message::Pong(5),
        Message::HandOver(HandOver {
            description: vec![1, 2, 3],
            regions: vec![Region { gpa: 0, bytes: 0x8000_0000 }],
        }),
        Message::Rehearse(Rehearse),
        Message::Rehearsed(Rehearsed { record_us: 6 }),
        Message::KeepFor(KeepFor { wait_ms: 30_000 }),
        Message::Resume(Resume { epoch, session: 1, reached: 2, round: 3, from: 40_000 }),
        Message::Arrived(Arrived {
            reached: 2,
            runs: vec![Run { first: 4, count: 600 }, Run { first: 1000, count: 1 }],
            next: Some(40_000),
        }),
        Message::Admit(Admit { session: 1, key: JoinSecret([0xc3; 32]).key(1) }),
        Message::Witness(WitnessId([5; 16])),
    ]
}

#[test]
fn messages_have_the_bytes_that_they_always_had() {
    let mut files = Vec::new();
    for message in messages() {
        let kind = message.message_type();
        let name = format!("{:02}-{}", kind.number(), format!("{kind:?}").to_lowercase());
        files.push(format!("{name}.hex"));
        let golden = check_bytes(&format!("message/{name}"), &format!("{message:?}"), &encode(&message));
        let mut decoder = Decoder::default();
        decoder.push(&golden);
        assert_eq!(decoder.next_message(), Ok(Some(message)));
    }
    check_complete("message", files);
}

#[test]
fn there_is_a_golden_message_of_every_type() {
    let all: Vec<u16> = (0..=u16::MAX).filter(|&number| MessageType::from_number(number).is_some()).collect();
    let golden: Vec<u16> = messages().iter().map(|message| message.message_type().number()).collect();
    assert_eq!(golden, all);
}

fn mask(offsets: impl IntoIterator<Item = u64>) -> PageMask {
    let mut mask = PageMask::EMPTY;
    offsets.into_iter().for_each(|offset| mask.insert(offset));
    mask
}

#[test]
fn frames_have_the_bytes_that_they_always_had() {
    let pages = 4 * 512;
    let chunk = ChunkIndex::new(3, pages).unwrap();
    let mut files = Vec::new();
    for (name, frame) in [
        ("1-raw", Frame::Raw { chunk, mask: mask([0, 9, 511]) }),
        ("2-zero", Frame::Zero { chunk, mask: mask(64..128) }),
        ("3-lz4", Frame::Lz4 { chunk, mask: mask(0..64), body_bytes: 100_000 }),
        ("4-fence", Frame::Fence(17)),
        ("5-zstd", Frame::Zstd { chunk, mask: mask(0..128), body_bytes: 100_000 }),
        ("6-delta", Frame::Delta { chunk, mask: mask([1, 300]), body_bytes: 8 + 3 * 128 }),
    ] {
        files.push(format!("{name}.hex"));
        let golden = check_bytes(&format!("frame/{name}"), &format!("{frame:?}"), &frame.encode());
        let header: [u8; FRAME_HEADER_BYTES] = golden.try_into().unwrap();
        assert_eq!(Frame::decode(&header, pages), Ok(frame));
    }
    check_complete("frame", files);
}

#[test]
fn a_join_has_the_bytes_that_it_always_had() {
    let (migration, stream, session) = (MigrationId([0xa1; 16]), 5, 1);
    let place = Place { vm: VmId([0xb2; 16]), epoch: Epoch::new(300), migration, session, stream };
    // The proof too: both ends must agree for ever.
    let proof = JoinSecret([0xc3; 32]).key(session).prove(&place);
    let join = Join { migration, stream, session, proof };
    let golden = check_bytes("join-proved", &format!("{join:?}"), &join.encode());
    let bytes: [u8; JOIN_BYTES] = golden.try_into().unwrap();
    assert_eq!(Join::decode(&bytes), Ok(join));
}

#[test]
fn records_have_the_bytes_that_they_always_had() {
    let mut files = Vec::new();
    let peer = || "10.0.0.2:4444".to_owned();
    for standing in [
        Standing::Running,
        Standing::Committed { target: peer() },
        Standing::Released { target: peer() },
        Standing::Receiving { source: peer() },
        Standing::Discarded,
        Standing::Stopped,
    ] {
        let name = standing.word().to_owned();
        let given = matches!(standing, Standing::Committed { .. } | Standing::Released { .. });
        let coming = matches!(standing, Standing::Receiving { .. } | Standing::Discarded);
        let record = Record {
            vm: VmId([0xb2; 16]),
            name: "web-1".parse().unwrap(),
            epoch: Epoch::new(300),
            standing,
            migration: (given || coming).then_some(MigrationId([0xc3; 16])),
            arrived_by: (!coming).then_some(MigrationId([0xd4; 16])),
        };
        files.push(format!("{name}.hex"));
        let golden = check_bytes(&format!("record/{name}"), &format!("{record:?}"), &record.encode());
        assert_eq!(Record::decode(&golden), Ok(record));
    }
    check_complete("record", files);
}

#[test]
fn numbers_on_the_wire_are_what_they_always_were() {
    use ferry_protocol::{frame, ident, layout, message, record, wire};
    let mut text = String::from("# name number\n");
    let mut line = |name: &str, number: u64| text.push_str(&format!("{name} {number}\n"));
    for number in 0..=u16::MAX {
        if let Some(kind) = MessageType::from_number(number) {
            line(&format!("message {kind:?}"), number.into());
        }
        if let Ok(code) = AbortCode::try_from(number) {
            line(&format!("abort {code:?}"), number.into());
        }
    }
    line("feature lz4", Features::LZ4.bits());
    line("feature rehearsal", Features::REHEARSAL.bits());
    line("feature unverified", Features::UNVERIFIED.bits());
    line("feature hand over", Features::HAND_OVER.bits());
    let of = |bytes: usize| u64::try_from(bytes).unwrap();
    line("protocol version newest", wire::VERSION_NEWEST.into());
    line("protocol version oldest", wire::VERSION_OLDEST.into());
    line("record version", record::RECORD_VERSION.into());
    line("control magic", u32::from_be_bytes(wire::CONTROL_MAGIC).into());
    line("data magic", u32::from_be_bytes(frame::DATA_MAGIC).into());
    line("record magic", u32::from_be_bytes(record::RECORD_MAGIC).into());
    line("message header bytes", of(wire::HEADER_BYTES));
    line("message body bytes max", of(wire::BODY_BYTES_MAX));
    line("frame header bytes", of(FRAME_HEADER_BYTES));
    line("join bytes", of(JOIN_BYTES));
    line("page bytes", of(PAGE_BYTES));
    line("pages a chunk", ferry_protocol::CHUNK_PAGES);
    line("pages a packed or delta frame max", frame::GROUP_PAGES_MAX);
    line("streams max", ident::STREAMS_MAX.into());
    line("regions max", of(layout::REGIONS_MAX));
    line("memory bytes max", layout::MEMORY_BYTES_MAX);
    line("vm name bytes max", of(ident::VM_NAME_BYTES_MAX));
    line("sentence bytes max", of(message::SENTENCE_BYTES_MAX));
    line("description bytes max", of(message::DESCRIPTION_BYTES_MAX));
    line("state bytes max", of(message::STATE_BYTES_MAX));
    line("addresses max", of(message::ADDRESSES_MAX));
    line("epoch max", Epoch::MAX.number());
    check("numbers.txt", &text);
}

/// A page's digest, at two places and of two contents: both ends must agree for ever.
#[test]
fn page_digests_are_what_they_always_were() {
    let mut text = String::from("# page, its bytes, its digest\n");
    let counted: [u8; PAGE_BYTES] = std::array::from_fn(|at| u8::try_from(at % 251).unwrap());
    for (page, what, bytes) in
        [(0, "zero", [0; PAGE_BYTES]), (7, "zero", [0; PAGE_BYTES]), (7, "counted", counted)]
    {
        let digest = PageDigest::of(page, &bytes).alone();
        text.push_str(&format!("{page} {what} {}\n", digest));
    }
    check("page-digests.txt", &text);
}
