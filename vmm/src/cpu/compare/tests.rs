//! Comparisons of made-up hosts.

use super::*;
use crate::cpu::{CpuError, check};

fn vendor_leaf(name: &[u8; 12]) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..kvm_cpuid_entry2::default() }
}

/// A processor of a table that has every named feature.
fn with(names: &[&str]) -> Processor {
    let mut leaves = vec![vendor_leaf(b"GenuineIntel")];
    for name in names {
        set(&mut leaves, name);
    }
    let size = leaves.iter_mut().find(|leaf| leaf.function == LEAF_SIZES);
    match size {
        Some(leaf) => leaf.eax = 0x3027,
        None => {
            leaves.push(kvm_cpuid_entry2 { function: LEAF_SIZES, eax: 0x3027, ..kvm_cpuid_entry2::default() })
        }
    }
    Processor { leaves, ..Processor::default() }
}

fn set(leaves: &mut Vec<kvm_cpuid_entry2>, name: &str) {
    let feature = Feature::named(name).unwrap();
    let at = leaves.iter().position(|leaf| feature.word.is_in(leaf)).unwrap_or_else(|| {
        let (function, index) = (feature.word.function, feature.word.index);
        leaves.push(kvm_cpuid_entry2 { function, index, ..kvm_cpuid_entry2::default() });
        leaves.len() - 1
    });
    *feature.word.register.of_mut(&mut leaves[at]) |= feature.mask();
}

fn told(shown: &Processor, offered: &Processor) -> Vec<String> {
    compare(shown, offered).iter().map(ToString::to_string).collect()
}

const V2: [&str; 7] = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];
const V3: [&str; 9] = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];

#[test]
fn every_missing_feature_is_named_and_more_is_no_harm() {
    let shown = with(&["avx2", "aes", "lm", "fsrm"]);
    assert_eq!(told(&shown, &shown), [""; 0]);
    assert_eq!(told(&shown, &with(&["avx2", "aes", "lm", "fsrm", "avx512f", "gfni"])), [""; 0]);
    assert_eq!(
        told(&shown, &with(&["lm"])),
        ["aes (leaf 1, ecx bit 25)", "avx2 (leaf 7, ebx bit 5)", "fsrm (leaf 7, edx bit 4)"]
    );
    // What the guest itself turns on and off says nothing.
    assert_eq!(told(&with(&["osxsave", "ospke", "apic"]), &with(&[])), [""; 0]);
}

#[test]
fn what_shows_through_counts_as_far_as_the_real_processor_goes() {
    let leaking = |table: &[&str], leaked: &[&str]| {
        let mut processor = with(table);
        leaked.iter().for_each(|name| set(&mut processor.leaked, name));
        processor
    };
    let shown = leaking(&["lm"], &["avx512f"]);
    assert_eq!(told(&shown, &leaking(&["lm"], &["avx512f"])), [""; 0]);
    assert_eq!(told(&shown, &with(&["lm", "avx512f"])), [""; 0], "another back end may show it openly");
    let missing = told(&shown, &with(&["lm"]));
    assert_eq!(missing, ["avx512f (leaf 7, ebx bit 16), which the source's KVM let show through"]);
    // What was promised must be promised again: that it shows through is no promise.
    assert_eq!(told(&with(&["avx512f"]), &leaking(&[], &["avx512f"])).len(), 1);
}

#[test]
fn vendors_sizes_state_promises_and_clocks_are_compared() {
    let shown = with(&["lm"]);
    let mut other = shown.clone();
    other.leaves[0] = vendor_leaf(b"AuthenticAMD");
    assert_eq!(told(&shown, &other), ["a processor of GenuineIntel (this host's is of AuthenticAMD)"]);

    let mut narrow = shown.clone();
    narrow.leaves.last_mut().unwrap().eax = 0x3024;
    assert!(told(&narrow, &shown).is_empty());
    assert_eq!(told(&shown, &narrow), ["physical addresses of 39 bits (leaf 0x80000008, eax; 36 here)"]);

    let state =
        |ebx| kvm_cpuid_entry2 { function: LEAF_XSAVE, index: 9, eax: 8, ebx, ..kvm_cpuid_entry2::default() };
    let (mut near, mut far) = (shown.clone(), shown.clone());
    near.leaves.push(state(832));
    far.leaves.push(state(2688));
    assert!(told(&near, &far)[0].contains("8 bytes at 832"), "{:?}", told(&near, &far));
    assert!(told(&near, &near).is_empty());

    let mut safe = with(&["arch_capabilities"]);
    safe.arch_capabilities = Some(0b1101);
    let mut less = safe.clone();
    less.arch_capabilities = Some(0b1000);
    // Bit 2 only warns.
    assert_eq!(told(&safe, &less), ["rdcl_no (IA32_ARCH_CAPABILITIES bit 0)"]);

    let clock = |tsc_khz, scales_tsc| Processor { tsc_khz: Some(tsc_khz), scales_tsc, ..shown.clone() };
    assert!(told(&clock(3_000_000, false), &clock(3_000_700, false)).is_empty());
    assert!(told(&clock(3_000_000, false), &clock(2_000_000, true)).is_empty());
    let missing = told(&clock(3_000_000, false), &clock(2_000_000, false));
    assert!(missing[0].contains("3000000 kHz") && missing[0].contains("2000000 kHz"), "{missing:?}");
}

#[test]
fn the_richest_profile_that_both_can_show_is_advised() {
    let all: Vec<_> = V2.iter().chain(&V3).copied().chain(["avx512f", "aes"]).collect();
    let shown = with(&all);
    let fits = |offered: &Processor| profile_that_fits(&shown, offered).map(|profile| profile.to_string());
    let v3: Vec<_> = V2.iter().chain(&V3).copied().collect();
    assert_eq!(fits(&with(&v3)).as_deref(), Some("x86-64-v3"));
    assert_eq!(fits(&with(&V2)).as_deref(), Some("x86-64-v2"));
    let without_movbe: Vec<_> = v3.iter().copied().filter(|name| *name != "movbe").collect();
    assert_eq!(fits(&with(&without_movbe)).as_deref(), Some("x86-64-v2"));
    assert_eq!(fits(&with(&["pni"])), None);
    // A source that is itself too old for a profile could not have used it.
    assert_eq!(profile_that_fits(&with(&["pni"]), &with(&v3)), None);

    let limit = "x86-64-v2".parse().unwrap();
    let error = check(&shown, &with(&V2), "host", &limit).unwrap_err();
    let CpuError::Missing { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing.len(), 11);
    for word in
        ["CPU profile host", "limited to x86-64-v2", "avx512f (leaf 7, ebx bit 16)", "--cpu x86-64-v2"]
    {
        assert!(error.to_string().contains(word), "'{word}' is missing in {error}");
    }
}
