//! A short run of every target in the ordinary tests: the corpus, and bytes as proptest makes and shrinks them.

use std::collections::BTreeSet;

use ferry_fuzz::bytes::sealed_messages;
use ferry_fuzz::machines::{is_decoded, is_restored};
use ferry_fuzz::mutate::bend;
use ferry_fuzz::seeds::{repository, seeds};
use ferry_fuzz::targets::TARGETS;
use ferry_fuzz::{source_side, target_side};
use ferry_protocol::wire::Decoder;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
    assert!(count("target") > 60 && count("source") > 60 && count("delta") > 5);
}

/// The phases that a state machine comes to by its seeds, and by so many of them bent.
fn phases(name: &str, play: fn(&[u8]) -> Vec<&'static str>) -> BTreeSet<&'static str> {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = seeds(target).unwrap();
    let mut seen: BTreeSet<_> = seeds.iter().flat_map(|seed| play(seed)).collect();
    println!("{name}: seeds {seen:?}");
    let mut random = ChaCha8Rng::seed_from_u64(0);
    for _ in 0..2000 {
        let mut input = seeds[random.random_range(0..seeds.len())].clone();
        bend(&mut input, &seeds[random.random_range(0..seeds.len())], &mut random);
        seen.extend(play(&input));
    }
    println!("{name}: bent {seen:?}");
    seen
}

#[test]
fn the_state_machines_come_to_every_phase() {
    let target = phases("target", target_side::play);
    for phase in [
        "greeting",
        "building",
        "receiving",
        "interrupted",
        "prepared",
        "asking the witness",
        "recording that it runs",
        "waiting to record again",
        "recording that it does not run",
        "giving up at the witness",
        "starting",
        "waiting to start again",
        "giving the guest back",
        "running",
        "discarding",
        "finished",
    ] {
        assert!(target.contains(phase), "no target is {phase}");
    }
    let source = phases("source", source_side::play);
    for phase in [
        "connecting",
        "greeting",
        "describing",
        "opening streams",
        "offering memory",
        "pre-copy",
        "reconnecting",
        "stop-and-copy",
        "preparing",
        "recording the commit",
        "committed",
        "releasing",
        "reclaiming",
        "letting go",
        "undoing",
        "finished",
    ] {
        assert!(source.contains(phase), "no source is {phase}");
    }
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
