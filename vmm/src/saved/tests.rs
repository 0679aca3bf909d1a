//! Envelopes, whole and damaged.

use proptest::prelude::*;

use super::sections::{Clock, HostInstant, MachineShape, Pit};
use super::*;

fn shape() -> MachineShape {
    MachineShape { memory_bytes: 64 << 20, shared_memory: false, cpus: 2, net_mac: Some([2, 0, 0, 0, 0, 7]) }
}

fn envelope() -> Vec<u8> {
    let mut writer = Writer::new();
    writer.add(&shape()).unwrap();
    writer.add(&Pit { state: vec![1, 2, 3] }).unwrap();
    let host = Some(HostInstant { realtime_ns: 6, tsc: 7 });
    writer.add(&Clock { guest_ns: 5, host, host_tsc_khz: Some(8), realtime_ns: Some(6) }).unwrap();
    writer.finish().unwrap()
}

/// Appends a section by hand and repairs the header.
fn with_section(kind: u16, version: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = envelope();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(version.to_le_bytes());
    bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    bytes.extend(crc32c::crc32c(body).to_le_bytes());
    bytes.extend(body);
    bytes[6..8].copy_from_slice(&4_u16.to_le_bytes());
    let total = u32::try_from(bytes.len()).unwrap();
    bytes[8..12].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// One fixed envelope, byte for byte: the format must not change unnoticed.
#[test]
fn the_format_is_fixed() {
    let mut writer = Writer::new();
    writer.add(&shape()).unwrap();
    let expected = [
        b'F', b'V', b'M', b'S', 1, 0, 1, 0, 37, 0, 0, 0, // header
        1, 0, 1, 0, 13, 0, 0, 0, 169, 65, 74, 97, // section header
        128, 128, 128, 32, 0, 2, 1, 2, 0, 0, 0, 0, 7,
    ];
    assert_eq!(writer.finish().unwrap(), expected);
}

#[test]
fn sections_read_back() {
    let bytes = envelope();
    let reader = Reader::new(&bytes).unwrap();
    assert_eq!(reader.one::<MachineShape>().unwrap(), shape());
    assert_eq!(reader.one::<Pit>().unwrap().state, [1, 2, 3]);
    let error = reader.one::<sections::Serial>().unwrap_err();
    assert!(error.to_string().contains("0 serial sections where 1 belong"), "{error}");
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = envelope();
    for length in 0..bytes.len() {
        assert!(Reader::new(&bytes[..length]).is_err(), "{length} bytes");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(matches!(Reader::new(&longer), Err(StateError::Damaged { .. })));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = envelope();
    for position in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[position / 8] ^= 1 << (position % 8);
        let noticed = match Reader::new(&damaged) {
            Err(_) => true,
            Ok(reader) => {
                reader.one::<MachineShape>().is_err()
                    || reader.one::<Pit>().is_err()
                    || reader.one::<Clock>().is_err()
            }
        };
        assert!(noticed, "bit {position}");
    }
}

#[test]
fn an_unknown_section_is_skipped_or_refused_by_its_top_bit() {
    let optional = with_section(0x8123, 1, b"later");
    assert_eq!(Reader::new(&optional).unwrap().one::<MachineShape>().unwrap(), shape());
    let mandatory = with_section(0x0123, 1, b"later");
    let error = Reader::new(&mandatory).unwrap_err();
    assert!(error.to_string().contains("section 0x123"), "{error}");
}

#[test]
fn a_newer_section_and_a_newer_format_are_refused_by_number() {
    let bytes = with_section(sections::Serial::KIND, 9, b"");
    let error = Reader::new(&bytes).unwrap().one::<sections::Serial>().unwrap_err();
    assert!(matches!(error, StateError::SectionVersion { found: 9, oldest: 1, known: 1, .. }), "{error}");
    assert!(error.to_string().starts_with("serial (section 0x20) has version 9"), "{error}");
    let mut newer = envelope();
    newer[4] = 2;
    assert!(matches!(Reader::new(&newer), Err(StateError::Format { found: 2 })));
}

#[test]
fn the_version_before_is_read_and_the_one_before_that_is_not() {
    let error = |version: u16| {
        let kind = Clock::KIND;
        let mut bytes = Writer::new().finish().unwrap();
        let body = postcard::to_stdvec(&(5_u64, None::<(u64, u64)>, Some(8_u32))).unwrap();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(version.to_le_bytes());
        bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        bytes.extend(crc32c::crc32c(&body).to_le_bytes());
        bytes.extend(body);
        bytes[6..8].copy_from_slice(&1_u16.to_le_bytes());
        let total = u32::try_from(bytes.len()).unwrap();
        bytes[8..12].copy_from_slice(&total.to_le_bytes());
        Reader::new(&bytes).unwrap().one::<Clock>()
    };
    let previous = error(Clock::VERSION - 1).unwrap();
    assert_eq!(previous, Clock { guest_ns: 5, host: None, host_tsc_khz: Some(8), realtime_ns: None });
    let refused = error(Clock::VERSION - 2).unwrap_err().to_string();
    assert!(
        refused.contains("clock (section 0x13) has version 1") && refused.contains("reads 2 and 3"),
        "{refused}"
    );
    assert!(refused.contains("in between"), "{refused}");
    let newer = error(Clock::VERSION + 1).unwrap_err().to_string();
    assert!(newer.contains("update ferry here"), "{newer}");
}

#[test]
fn what_a_state_will_have_is_refused_before_it_comes() {
    let announced = |kind, version, name: &str| sections::StateSections {
        sections: vec![
            sections::SectionVersion { kind: Pit::KIND, version: Pit::VERSION, name: "pit".into() },
            sections::SectionVersion { kind, version, name: name.into() },
        ],
    };
    for (kind, version) in [(Clock::KIND, Clock::VERSION), (Clock::KIND, Clock::VERSION - 1), (0x8fff, 77)] {
        check_announced(&announced(kind, version, "later")).unwrap();
    }
    let error = check_announced(&announced(0x0fff, 1, "virtio-gpu\u{1b}[1m")).unwrap_err().to_string();
    assert!(error.contains("virtio-gpu[1m (section 0xfff)") && error.contains("update ferry"), "{error}");
    let error = check_announced(&announced(Clock::KIND, 9, "clock")).unwrap_err().to_string();
    assert!(error.contains("clock (section 0x13) has version 9"), "{error}");
    let many =
        sections::StateSections { sections: vec![announced(1, 1, "machine").sections[0].clone(); 2000] };
    assert!(matches!(check_announced(&many), Err(StateError::Invalid { .. })));
}

#[test]
fn a_section_that_was_not_announced_is_not_written() {
    let mut writer = Writer::of_announced(vec![Announced::of::<Pit>()]);
    writer.add(&Pit { state: vec![1] }).unwrap();
    let error = writer.add(&shape()).unwrap_err();
    assert!(
        matches!(error, StateError::Unannounced { .. })
            && error.to_string().contains("machine (section 0x01)")
    );
}

#[test]
fn a_second_section_where_one_belongs_is_refused() {
    let body = postcard::to_stdvec(&shape()).unwrap();
    let bytes = with_section(MachineShape::KIND, 1, &body);
    let error = Reader::new(&bytes).unwrap().one::<MachineShape>().unwrap_err();
    assert!(matches!(error, StateError::SectionCount { found: 2, .. }), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Reader::new(&bytes);
        let mut with_header = envelope()[..12].to_vec();
        with_header.extend(&bytes);
        let total = u32::try_from(with_header.len()).unwrap();
        with_header[8..12].copy_from_slice(&total.to_le_bytes());
        let _ = Reader::new(&with_header);
    }
}

/// A vCPU's section whose sequence of CPUID leaves says to have so many, each of which takes a byte here and 24 once it is read.
fn vcpu_with_leaves(count: usize) -> Vec<u8> {
    let golden =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/state-vcpu-v1.bin")).unwrap();
    let mut vcpu: sections::Vcpu = Reader::new(&golden).unwrap().one().unwrap();
    vcpu.cpuid = vec![Vec::new(); count];
    let mut writer = Writer::new();
    writer.add(&vcpu).unwrap();
    writer.finish().unwrap()
}

#[test]
fn what_a_peer_counts_is_bounded_before_it_takes_memory() {
    let whole = vcpu_with_leaves(256);
    assert_eq!(Reader::new(&whole).unwrap().one::<sections::Vcpu>().unwrap().cpuid.len(), 256);
    for count in [257, 1 << 20] {
        let bytes = vcpu_with_leaves(count);
        let error = Reader::new(&bytes).unwrap().one::<sections::Vcpu>().unwrap_err();
        assert!(matches!(error, StateError::Decode { section: "vcpu", .. }), "{error}");
    }
    let mut writer = Writer::new();
    (0..9).for_each(|_| writer.add(&Pit { state: Vec::new() }).unwrap());
    let bytes = writer.finish().unwrap();
    let reader = Reader::new(&bytes).unwrap();
    assert_eq!(reader.at_most::<Pit>(9).unwrap().len(), 9);
    let error = reader.at_most::<Pit>(8).unwrap_err().to_string();
    assert!(error.contains("there are 9 of it, and no machine has more than 8"), "{error}");
}
