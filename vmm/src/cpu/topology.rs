//! Where in its machine a vCPU says that it is: one package of as many cores as there are vCPUs, each with one thread.
//!
//! It also hides nested virtualisation, whose state is not saved.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_HIGHEST: u32 = 0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_SVM: u32 = 0x8000_000a;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
/// Another form of the topology, which KVM does not fill in.
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX1_VMX: u32 = 1 << 5;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const ECX_AMD_CMP_LEGACY: u32 = 1 << 1;
const ECX_AMD_SVM: u32 = 1 << 2;

/// What levels of the topology leaves are called (Intel SDM, volume 2, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A package of `cpus` cores.
#[derive(Clone, Copy)]
struct Package {
    cpus: u32,
    /// Bits of an APIC id that tell its cores apart.
    id_bits: u32,
}

/// The leaves for vCPU `index` of `cpus`.
pub(crate) fn for_vcpu(leaves: &[kvm_cpuid_entry2], index: u8, cpus: u8) -> Vec<kvm_cpuid_entry2> {
    let apic_id = u32::from(index);
    let cpus = u32::from(cpus);
    let package = Package { cpus, id_bits: cpus.next_power_of_two().trailing_zeros() };
    let mut leaves: Vec<_> = leaves.to_vec();
    let is_amd = leaves.iter().any(|leaf| leaf.function == LEAF_AMD_TOPOLOGY);
    for leaf in &mut leaves {
        match leaf.function {
            LEAF_FEATURES => {
                leaf.ebx = (leaf.ebx & 0xffff) | (apic_id << 24) | (cpus << 16);
                leaf.ecx = (leaf.ecx & !ECX1_VMX) | ECX1_HYPERVISOR;
                leaf.edx = if cpus > 1 { leaf.edx | EDX1_HTT } else { leaf.edx & !EDX1_HTT };
            }
            LEAF_CACHES if leaf.eax & 0x1f != 0 => {
                let cores = (1_u32 << package.id_bits) - 1;
                leaf.eax = (package.shares_cache(leaf.eax) & !(0x3f << 26)) | (cores.min(63) << 26);
            }
            LEAF_AMD_CACHES if leaf.eax & 0x1f != 0 => leaf.eax = package.shares_cache(leaf.eax),
            LEAF_AMD_FEATURES => {
                leaf.ecx &= !ECX_AMD_SVM;
                if is_amd {
                    let several = if cpus > 1 { ECX_AMD_CMP_LEGACY } else { 0 };
                    leaf.ecx = (leaf.ecx & !ECX_AMD_CMP_LEGACY) | several;
                }
            }
            LEAF_AMD_SIZES => leaf.ecx = (leaf.ecx & !0xf0ff) | (cpus - 1) | (package.id_bits << 12),
            LEAF_AMD_TOPOLOGY => {
                (leaf.eax, leaf.ebx, leaf.ecx) = (apic_id, apic_id, 0);
            }
            LEAF_SVM | LEAF_AMD_TOPOLOGY_V2 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    replace_topology(&mut leaves, apic_id, package);
    leaves
}

/// KVM lists only the first of these leaves' levels, and that empty.
fn replace_topology(leaves: &mut Vec<kvm_cpuid_entry2>, apic_id: u32, package: Package) {
    let highest = leaves.iter().find(|leaf| leaf.function == LEAF_HIGHEST).map_or(0, |leaf| leaf.eax);
    let levels = |function| {
        let at = [(0, 1, LEVEL_THREAD), (package.id_bits, package.cpus, LEVEL_CORE), (0, 0, 0)];
        (0..).zip(at).map(move |(index, (shift, count, kind))| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | (kind << 8),
            edx: apic_id,
            ..kvm_cpuid_entry2::default()
        })
    };
    for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
        let listed = leaves.iter().any(|leaf| leaf.function == function);
        leaves.retain(|leaf| leaf.function != function);
        if listed && function <= highest {
            leaves.extend(levels(function));
        }
    }
}

impl Package {
    /// Caches of the first two levels are a vCPU's own, the last is everybody's. Both vendors have the level in bits 5 to
    /// 7 and the number of sharers, less one, in bits 14 to 25.
    fn shares_cache(self, eax: u32) -> u32 {
        let level = (eax >> 5) & 7;
        let sharers = if level >= 3 { (1 << self.id_bits) - 1 } else { 0 };
        (eax & !(0xfff << 14)) | (sharers << 14)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let highest = if function == 0 { 0x1f } else { 0 };
        kvm_cpuid_entry2 { function, index, eax: highest, ecx: u32::MAX, ..kvm_cpuid_entry2::default() }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_place_and_no_nested_virtualisation() {
        let supported = [leaf(0, 0), leaf(1, 0), leaf(0xb, 0), leaf(0x1f, 0), leaf(LEAF_AMD_FEATURES, 0)];
        let leaves = for_vcpu(&supported, 2, 3);
        let features = find(&leaves, 1, 0);
        assert_eq!(features.ebx, (2 << 24) | (3 << 16));
        assert_eq!(features.ecx & ECX1_VMX, 0);
        assert_ne!(features.edx & EDX1_HTT, 0);
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
            let levels: Vec<_> = leaves.iter().filter(|leaf| leaf.function == function).collect();
            assert_eq!(levels.len(), 3, "{levels:x?}");
            let words = |at: usize| (levels[at].eax, levels[at].ebx, levels[at].ecx, levels[at].edx);
            assert_eq!(words(0), (0, 1, 0x100, 2));
            assert_eq!(words(1), (2, 3, 0x201, 2));
            assert_eq!(words(2), (0, 0, 2, 2));
            assert!(levels.iter().all(|leaf| leaf.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
        }
        assert_eq!(find(&leaves, LEAF_AMD_FEATURES, 0).ecx & ECX_AMD_SVM, 0);
    }

    #[test]
    fn all_leaves_agree_on_one_package_of_as_many_cores() {
        let cache = |function, index, level: u32| kvm_cpuid_entry2 {
            eax: 1 | (level << 5) | (0xfff << 14),
            ..leaf(function, index)
        };
        let supported = [
            leaf(0, 0),
            leaf(1, 0),
            leaf(0xb, 0),
            cache(LEAF_CACHES, 0, 1),
            cache(LEAF_CACHES, 3, 3),
            cache(LEAF_AMD_CACHES, 2, 2),
            cache(LEAF_AMD_CACHES, 3, 3),
            leaf(LEAF_AMD_FEATURES, 0),
            leaf(LEAF_AMD_SIZES, 0),
            leaf(LEAF_AMD_TOPOLOGY, 0),
        ];
        for (cpus, bits) in [(1_u8, 0), (2, 1), (4, 2), (5, 3)] {
            for index in 0..cpus {
                let leaves = for_vcpu(&supported, index, cpus);
                let id = u32::from(index);
                let count = u32::from(cpus);
                assert_eq!((find(&leaves, 1, 0).ebx >> 16) & 0xff, count);
                assert_eq!(find(&leaves, 0xb, 1).ebx, count);
                assert_eq!(find(&leaves, 0xb, 1).eax, bits);
                assert_eq!(id >> bits, 0, "all are of package 0");
                assert_eq!(find(&leaves, LEAF_AMD_SIZES, 0).ecx & 0xff, count - 1);
                assert_eq!((find(&leaves, LEAF_AMD_SIZES, 0).ecx >> 12) & 0xf, bits);
                let place = find(&leaves, LEAF_AMD_TOPOLOGY, 0);
                assert_eq!((place.eax, place.ebx, place.ecx), (id, id, 0));
                let sharers = |function, index| (find(&leaves, function, index).eax >> 14) & 0xfff;
                assert_eq!((sharers(LEAF_CACHES, 0), sharers(LEAF_AMD_CACHES, 2)), (0, 0));
                let everybody = (1 << bits) - 1;
                assert_eq!((sharers(LEAF_CACHES, 3), sharers(LEAF_AMD_CACHES, 3)), (everybody, everybody));
                assert_eq!(find(&leaves, LEAF_CACHES, 0).eax >> 26, everybody);
                let several = find(&leaves, LEAF_AMD_FEATURES, 0).ecx & ECX_AMD_CMP_LEGACY != 0;
                assert_eq!(several, cpus > 1);
            }
        }
    }

    #[test]
    fn a_leaf_beyond_the_highest_is_not_shown() {
        let mut highest = leaf(0, 0);
        highest.eax = 0xd;
        let leaves = for_vcpu(&[highest, leaf(0xb, 0), leaf(0x1f, 0)], 0, 2);
        assert_eq!(leaves.iter().filter(|leaf| leaf.function == LEAF_TOPOLOGY).count(), 3);
        assert!(!leaves.iter().any(|leaf| leaf.function == LEAF_TOPOLOGY_V2));
    }
}
