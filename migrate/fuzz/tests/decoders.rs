//! A short run of every target in the ordinary tests: the corpus, and bytes as proptest makes and shrinks them.

use ferry_fuzz::bytes::sealed_messages;
use ferry_fuzz::machines::{is_decoded, is_restored};
use ferry_fuzz::seeds::{repository, seeds};
use ferry_fuzz::targets::TARGETS;
use ferry_protocol::wire::Decoder;
use proptest::prelude::*;

#[test]
fn what_was_worth_keeping_gets_the_better_of_nobody() {
    for target in &TARGETS {
        for seed in seeds(target).unwrap() {
            (target.run)(&seed);
        }
    }
}

#[test]
fn the_seeds_are_real() {
    let count = |name: &str| {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        seeds(target).unwrap().len()
    };
    assert!(count("control") > 20 && count("frame") > 6 && count("packed") > 2 && count("description") > 2);
}

#[test]
fn every_target_is_there_for_libfuzzer_too() {
    let folder = repository().join("migrate/fuzz/libfuzzer");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    for target in &TARGETS {
        assert!(manifest.contains(&format!("name = \"{}\"\n", target.name)), "{}", target.name);
        assert!(folder.join(format!("fuzz_targets/{}.rs", target.name)).is_file(), "{}", target.name);
    }
}

#[test]
fn what_is_sealed_is_read() {
    let mut bytes = b"FRRY\x01\x00\x0f\x00\x01\x00\x00\x00\x00\x00\x00\x00".to_vec();
    bytes.push(7);
    let mut decoder = Decoder::default();
    decoder.push(&sealed_messages(&bytes));
    assert!(decoder.next_message().unwrap().is_some());
}

#[test]
fn states_are_taken_as_they_are_and_bent_ones_reach_every_answer() {
    assert!(is_decoded(&[2]) && !is_decoded(&[0]));
    // Without its first section, which says what machine it is of.
    assert!(!is_decoded(&[2, 0, 0, 0, 8, 0]));
    for with_devices in [0, 1] {
        let Some(restored) = is_restored(&[2 + with_devices]) else { return };
        assert!(restored, "a machine that was restored as it was saved");
        assert_eq!(is_restored(&[2 + with_devices, 0, 0, 0, 8, 0]), Some(false));
    }
}

proptest! {
    #[test]
    fn no_bytes_get_the_better_of_a_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        for target in &TARGETS {
            (target.run)(&bytes);
        }
    }
}
