//! What a guest was shown of its processor, and whether another host can go on showing it.
//!
//! Everything here is a pure function of tables; who reads them from KVM is in [`super`].

use kvm_bindings::kvm_cpuid_entry2;

use super::profile::CpuProfile;
use super::words::{Feature, LEAF_SIZES, LEAF_XSAVE, WORDS, settled};

/// KVM's default tolerance (its module parameter `tsc_tolerance_ppm`), below which it doesn't scale.
const TSC_TOLERANCE_PPM: u64 = 250;

pub(crate) const MSR_ARCH_CAPABILITIES: u32 = 0x10a;

/// What IA32_ARCH_CAPABILITIES promises, bit by bit (Intel SDM, volume 4, table 2-2). Bits that only warn are left out:
/// a guest does not rely on them.
const PROMISES: [(u32, &str); 20] = [
    (0, "rdcl_no"),
    (1, "ibrs_all"),
    (3, "skip_l1dfl_vmentry"),
    (4, "ssb_no"),
    (5, "mds_no"),
    (6, "if_pschange_mc_no"),
    (7, "tsx_ctrl"),
    (8, "taa_no"),
    (10, "misc_package_ctls"),
    (11, "energy_filtering_ctl"),
    (12, "doitm"),
    (13, "sbdr_ssdp_no"),
    (14, "fbsdp_no"),
    (15, "psdp_no"),
    (17, "fb_clear"),
    (20, "bhi_no"),
    (23, "overclocking_status"),
    (24, "pbrsb_no"),
    (26, "gds_no"),
    (27, "rfds_no"),
];

/// A processor as a guest sees it, or as a host can show it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Processor {
    /// CPUID as it is given to KVM.
    pub(crate) leaves: Vec<kvm_cpuid_entry2>,
    /// What a guest sees beyond that, because KVM lets the host's own show through: features only.
    pub(crate) leaked: Vec<kvm_cpuid_entry2>,
    /// IA32_ARCH_CAPABILITIES, if there is one.
    pub(crate) arch_capabilities: Option<u64>,
    /// The frequency of the TSC, where it is known.
    pub(crate) tsc_khz: Option<u32>,
    /// Whether KVM can give a guest's TSC another frequency than the host's.
    pub(crate) scales_tsc: bool,
}

/// Something that a guest was shown and a host can't offer, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingFeature(String);

impl std::fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Everything that the guest was shown and that is not offered: by its table, or because it shows through.
pub(crate) fn compare(shown: &Processor, offered: &Processor) -> Vec<MissingFeature> {
    let mut missing = Vec::new();
    let mut tell = |what: String| missing.push(MissingFeature(what));
    if let (Some(theirs), Some(ours)) = (vendor(&shown.leaves), vendor(&offered.leaves))
        && theirs != ours
    {
        tell(format!("a processor of {theirs} (this host's is of {ours})"));
    }
    for word in &WORDS {
        let wanted = word.of(&shown.leaves) & settled(word);
        let seen = word.of(&shown.leaked) & settled(word);
        let table = word.of(&offered.leaves);
        let real = table | word.of(&offered.leaked);
        let bits = |mask: u32| (0..32).filter(move |bit| mask & (1 << bit) != 0);
        bits(wanted & !table).for_each(|bit| tell(Feature { word, bit }.to_string()));
        for bit in bits(seen & !wanted & !real) {
            tell(format!("{}, which the source's KVM let show through", Feature { word, bit }));
        }
    }
    compare_sizes(shown, offered, &mut tell);
    compare_promises(shown, offered, &mut tell);
    if let (Some(theirs), Some(ours)) = (shown.tsc_khz, offered.tsc_khz)
        && !offered.scales_tsc
        && !is_same_tsc(ours, theirs)
    {
        tell(format!("a TSC of {theirs} kHz (this host's runs at {ours} kHz, and its KVM can't scale it)"));
    }
    missing
}

/// The first of ferry's own profiles, the richest first, with which the guest could have come: one that both hosts can show
/// in full, and of which nothing would be missing.
pub(crate) fn profile_that_fits(shown: &Processor, offered: &Processor) -> Option<CpuProfile> {
    CpuProfile::portable().into_iter().find(|profile| {
        let started = Processor { leaves: profile.apply(&shown.leaves), ..shown.clone() };
        let started = Processor { arch_capabilities: promises_shown(&started), ..started };
        lacking(profile, shown).is_empty()
            && lacking(profile, offered).is_empty()
            && compare(&started, offered).is_empty()
    })
}

/// What a processor lacks to show a profile in full.
pub(crate) fn lacking(profile: &CpuProfile, processor: &Processor) -> Vec<MissingFeature> {
    let has = |feature: &Feature| {
        let bits = feature.word.of(&processor.leaves) | feature.word.of(&processor.leaked);
        bits & feature.mask() != 0
    };
    let lacking = profile.needed().into_iter().filter(|feature| !has(feature));
    lacking.map(|feature| MissingFeature(feature.to_string())).collect()
}

/// Whether two frequencies differ by no more than KVM tolerates without scaling.
pub(crate) fn is_same_tsc(host_khz: u32, guest_khz: u32) -> bool {
    u64::from(host_khz.abs_diff(guest_khz)) * 1_000_000 <= u64::from(guest_khz) * TSC_TOLERANCE_PPM
}

/// IA32_ARCH_CAPABILITIES, if the guest is told that there is one.
pub(crate) fn promises_shown(processor: &Processor) -> Option<u64> {
    let feature = Feature::named("arch_capabilities").expect("it is named");
    let table = feature.word.of(&processor.leaves) | feature.word.of(&processor.leaked);
    processor.arch_capabilities.filter(|_| table & feature.mask() != 0)
}

fn compare_sizes(shown: &Processor, offered: &Processor, tell: &mut impl FnMut(String)) {
    let find = |processor: &Processor, function, index| {
        let leaf = processor.leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        leaf.copied().unwrap_or_default()
    };
    let (theirs, ours) = (find(shown, LEAF_SIZES, 0).eax, find(offered, LEAF_SIZES, 0).eax);
    for (what, shift) in [("physical", 0), ("linear", 8)] {
        let (theirs, ours) = ((theirs >> shift) & 0xff, (ours >> shift) & 0xff);
        if theirs > ours {
            tell(format!("{what} addresses of {theirs} bits (leaf 0x80000008, eax; {ours} here)"));
        }
    }
    for leaf in
        shown.leaves.iter().filter(|leaf| leaf.function == LEAF_XSAVE && leaf.index >= 2 && leaf.eax != 0)
    {
        let ours = find(offered, LEAF_XSAVE, leaf.index);
        if ours.eax != 0 && (ours.eax, ours.ebx) != (leaf.eax, leaf.ebx) {
            tell(format!(
                "extended state {} of {} bytes at {} (leaf 0xd.{}; {} bytes at {} here)",
                leaf.index, leaf.eax, leaf.ebx, leaf.index, ours.eax, ours.ebx
            ));
        }
    }
}

fn compare_promises(shown: &Processor, offered: &Processor, tell: &mut impl FnMut(String)) {
    let missing = promises_shown(shown).unwrap_or(0) & !offered.arch_capabilities.unwrap_or(0);
    for (bit, name) in PROMISES.iter().filter(|(bit, _)| missing & (1 << bit) != 0) {
        tell(format!("{name} (IA32_ARCH_CAPABILITIES bit {bit})"));
    }
}

/// `GenuineIntel`, or what else leaf 0 spells.
fn vendor(leaves: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = leaves.iter().find(|leaf| leaf.function == 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    let readable = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' };
    Some(bytes.iter().map(readable).collect())
}

#[cfg(test)]
mod tests;
