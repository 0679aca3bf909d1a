//! MSRs that a guest can't reach because its profile hides the feature that they belong to.
//!
//! KVM refuses most of them by itself, by the table of CPUID. The filter holds where it doesn't, and only takes away what
//! this host's KVM would have shown; MSRs are saved and restored past it.

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::words::Feature;
use crate::capability::KvmCallError;

/// The MSRs of a feature: first and how many, at most 16.
const OF_FEATURE: [(&str, u32, u32); 7] = [
    ("arch_capabilities", 0x10a, 1),
    ("core_capabilities", 0xcf, 1),
    ("pdcm", 0x345, 1),
    ("tsc_adjust", 0x3b, 1),
    ("xsaves", 0xda0, 1),
    ("perfctr_core", 0xc001_0200, 12),
    ("osvw", 0xc001_0140, 2),
];

/// Intel's performance counters, which leaf 0xa speaks of: counters, events, fixed ones, and their control.
const LEAF_COUNTERS: u32 = 0xa;
const COUNTERS: [(u32, u32); 4] = [(0xc1, 8), (0x186, 8), (0x309, 4), (0x38d, 4)];

/// What is taken away from a guest that is shown `shown` where KVM supports `supported`.
fn hidden(supported: &[kvm_cpuid_entry2], shown: &[kvm_cpuid_entry2]) -> Vec<(u32, u32)> {
    let has = |leaves: &[kvm_cpuid_entry2], name| {
        Feature::named(name).is_some_and(|feature| feature.word.of(leaves) & feature.mask() != 0)
    };
    let by_feature = OF_FEATURE.iter().filter(|(name, _, _)| has(supported, name) && !has(shown, name));
    let mut ranges: Vec<_> = by_feature.map(|(_, first, count)| (*first, *count)).collect();
    let counts = |leaves: &[kvm_cpuid_entry2]| {
        leaves.iter().any(|leaf| leaf.function == LEAF_COUNTERS && leaf.eax & 0xff != 0)
    };
    if counts(supported) && !counts(shown) {
        ranges.extend(COUNTERS);
    }
    ranges
}

/// Denies the guest what its profile hides, where KVM has filters.
pub(crate) fn hide_msrs(
    vm: &VmFd,
    supported: &[kvm_cpuid_entry2],
    shown: &[kvm_cpuid_entry2],
) -> Result<(), KvmCallError> {
    let ranges = hidden(supported, shown);
    if ranges.is_empty() || !vm.check_extension(Cap::X86MsrFilter) {
        return Ok(());
    }
    // A zero denies; no range has more MSRs than these bits.
    let denied = [0; 2];
    let ranges = ranges.iter().map(|(base, msr_count)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: *base,
        msr_count: *msr_count,
        bitmap: &denied,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges.collect::<Vec<_>>())
        .map_err(KvmCallError::new("hide MSRs from the guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_has_and_the_guest_is_not_shown_is_hidden() {
        let leaf =
            |function, eax, edx| kvm_cpuid_entry2 { function, eax, edx, ..kvm_cpuid_entry2::default() };
        let supported = [leaf(7, 0, 1 << 29), leaf(0xa, 2, 0)];
        assert_eq!(hidden(&supported, &supported), []);
        assert_eq!(hidden(&supported, &[leaf(7, 0, 0), leaf(0xa, 2, 0)]), [(0x10a, 1)]);
        assert_eq!(hidden(&supported, &[leaf(7, 0, 1 << 29)]), COUNTERS);
        assert_eq!(hidden(&[], &supported), []);
        let most = OF_FEATURE.len() + COUNTERS.len();
        assert!(most <= 16, "KVM takes 16 ranges");
        assert!(OF_FEATURE.iter().all(|(_, _, count)| *count <= 16));
    }
}
