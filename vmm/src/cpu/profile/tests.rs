//! Profiles applied to a made-up host, and profiles that can't be.

use super::*;
use crate::cpu::words::WORDS;

/// A host with every feature, AVX-512 state and 52 bits of addresses.
fn everything() -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<kvm_cpuid_entry2> = Vec::new();
    for word in &WORDS {
        let at = leaves.iter().position(|leaf| word.is_in(leaf)).unwrap_or_else(|| {
            let (function, index) = (word.function, word.index);
            leaves.push(kvm_cpuid_entry2 { function, index, ..kvm_cpuid_entry2::default() });
            leaves.len() - 1
        });
        *word.register.of_mut(&mut leaves[at]) = u32::MAX;
    }
    for leaf in &mut leaves {
        match (leaf.function, leaf.index) {
            (LEAF_XSAVE, 0) => (leaf.eax, leaf.ebx, leaf.ecx) = (0xe7, 2432, 2432),
            (LEAF_XSAVE, 1) => leaf.ecx = 0,
            (LEAF_SIZES, 0) => leaf.eax = 0x3934,
            _ => {}
        }
    }
    for (index, eax, ebx) in [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408)] {
        leaves.push(kvm_cpuid_entry2 {
            function: LEAF_XSAVE,
            index,
            eax,
            ebx,
            ..kvm_cpuid_entry2::default()
        });
    }
    leaves.push(kvm_cpuid_entry2 { function: 0xa, eax: 5, ..kvm_cpuid_entry2::default() });
    leaves
}

fn has(leaves: &[kvm_cpuid_entry2], name: &str) -> bool {
    let feature = Feature::named(name).unwrap();
    feature.word.of(leaves) & feature.mask() != 0
}

fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
}

#[test]
fn levels_show_what_the_psabi_says_and_no_more() {
    let host = everything();
    assert_eq!(CpuProfile::default().apply(&host), host);
    let v2 = "x86-64-v2".parse::<CpuProfile>().unwrap().apply(&host);
    let v3 = "x86-64-v3".parse::<CpuProfile>().unwrap().apply(&host);
    for name in ["sse2", "lm", "nx", "ssse3", "popcnt", "cx16", "lahf_lm", "kvm_clocksource", "nonstop_tsc"] {
        assert!(has(&v2, name) && has(&v3, name), "{name}");
    }
    for name in ["avx2", "bmi1", "fma", "movbe", "abm", "xsave"] {
        assert!(!has(&v2, name) && has(&v3, name), "{name}");
    }
    for name in ["avx512f", "aes", "vmx", "svm", "arch_capabilities", "pku", "gfni", "xsaves", "kvm_async_pf"]
    {
        assert!(!has(&v2, name) && !has(&v3, name), "{name}");
    }
    assert_eq!(leaf(&v2, LEAF_XSAVE, 0).eax, 3);
    let (main, avx) = (leaf(&v3, LEAF_XSAVE, 0), leaf(&v3, LEAF_XSAVE, 2));
    assert_eq!((main.eax, main.ecx, avx.eax), (7, 832, 256));
    assert_eq!(leaf(&v3, LEAF_XSAVE, 6).eax, 0);
    assert_eq!(leaf(&v3, 0xa, 0).eax, 0, "counters are the host's own");
    assert_eq!(leaf(&v3, LEAF_SIZES, 0).eax, 0x392e, "46 bits");
}

#[test]
fn what_a_profile_needs_it_shows() {
    for profile in CpuProfile::portable() {
        let shown = profile.apply(&everything());
        let needed = profile.needed();
        assert!(needed.len() >= 7);
        for feature in needed {
            assert_ne!(feature.word.of(&shown) & feature.mask(), 0, "{profile}: {feature}");
        }
    }
}

#[test]
fn a_file_adds_and_removes_by_name() {
    let text = "base = 'x86-64-v2'\nadd = ['aes', 'avx', 'xsave', 'avx512f']\nremove = ['popcnt']\n\
                physical_address_bits = 40";
    let profile = CpuProfile::from_toml("fleet.toml", text).unwrap();
    assert_eq!(profile.to_string(), "fleet.toml");
    let shown = profile.apply(&everything());
    for (name, expected) in [("aes", true), ("avx512f", true), ("popcnt", false), ("avx2", false)] {
        assert_eq!(has(&shown, name), expected, "{name}");
    }
    assert_eq!(leaf(&shown, LEAF_XSAVE, 0).eax, 0xe7, "AVX-512 has its state");
    assert_eq!(leaf(&shown, LEAF_SIZES, 0).eax & 0xff, 40);
    let needed: Vec<_> = profile.needed().iter().map(ToString::to_string).collect();
    assert!(needed.iter().any(|name| name.starts_with("aes ")), "{needed:?}");
    assert!(!needed.iter().any(|name| name.starts_with("popcnt ")), "{needed:?}");
}

#[test]
fn bad_profiles_are_refused_by_name() {
    let error = "x86-64-v9".parse::<CpuProfile>().unwrap_err().to_string();
    assert!(error.contains("x86-64-v9") && error.contains("x86-64-v3"), "{error}");
    for (text, word) in [
        ("", "base"),
        ("base = 'z80'", "z80"),
        ("base = 'host'\nadd = ['warp_drive']", "warp_drive"),
        ("base = 'host'\nadd = ['aes']\nremove = ['aes']", "both"),
        ("base = 'host'\nremove = ['hypervisor']", "hypervisor"),
        ("base = 'host'\nphysical_address_bits = 12", "12"),
        ("base = 'host'\ncolour = 'red'", "colour"),
        ("\u{0}", "not a CPU profile"),
    ] {
        let error = CpuProfile::from_toml("bad.toml", text).unwrap_err().to_string();
        assert!(error.contains("bad.toml") && error.contains(word), "{text:?}: {error}");
    }
    let long = "#".repeat(CPU_PROFILE_BYTES_MAX + 1);
    assert!(CpuProfile::from_toml("long", &long).is_err());
}
