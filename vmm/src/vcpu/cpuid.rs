//! What CPUID tells a guest: what KVM supports on this host, with the vCPU's own place in the machine.
//!
//! Features are not narrowed to a profile yet, except nested virtualisation, which is hidden: its
//! state is not saved.

use kvm_bindings::CpuId;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX1_VMX: u32 = 1 << 5;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const ECX_AMD_SVM: u32 = 1 << 2;

/// The leaves for vCPU `index` of `cpus`.
pub(crate) fn for_vcpu(supported: &CpuId, index: u8, cpus: u8, tsc_deadline_timer: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = u32::from(index);
    let cpus = u32::from(cpus);
    // Bits of an APIC id that tell vCPUs of the one package apart.
    let id_bits = cpus.next_power_of_two().trailing_zeros();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            LEAF_FEATURES => {
                leaf.ebx = (leaf.ebx & 0xffff) | (apic_id << 24) | (cpus << 16);
                leaf.ecx = (leaf.ecx & !ECX1_VMX) | ECX1_HYPERVISOR;
                if tsc_deadline_timer {
                    leaf.ecx |= ECX1_TSC_DEADLINE;
                }
                leaf.edx = if cpus > 1 { leaf.edx | EDX1_HTT } else { leaf.edx & !EDX1_HTT };
            }
            LEAF_CACHES if leaf.eax & 0x1f != 0 => {
                // Caches of the first two levels are a vCPU's own, the last is everybody's.
                let level = (leaf.eax >> 5) & 7;
                let sharing = if level >= 3 { (1 << id_bits) - 1 } else { 0 };
                let cores = (1_u32 << id_bits) - 1;
                leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14) | (cores.min(63) << 26);
            }
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
                let (shift, count, kind) = match leaf.index {
                    0 => (0, 1, 1),
                    1 => (id_bits, cpus, 2),
                    _ => (0, 0, 0),
                };
                leaf.eax = shift;
                leaf.ebx = count;
                leaf.ecx = (leaf.index & 0xff) | (kind << 8);
                leaf.edx = apic_id;
            }
            LEAF_AMD_FEATURES => leaf.ecx &= !ECX_AMD_SVM,
            LEAF_AMD_SIZES => leaf.ecx = (leaf.ecx & !0xf0ff) | (cpus - 1) | (id_bits << 12),
            LEAF_AMD_TOPOLOGY => leaf.eax = apic_id,
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn each_vcpu_has_its_own_place_and_no_nested_virtualisation() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ecx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        let supported =
            CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(LEAF_AMD_FEATURES, 0)])
                .unwrap();
        let cpuid = for_vcpu(&supported, 2, 3, true);
        let [features, threads, cores, amd] = cpuid.as_slice() else { panic!("four leaves") };
        assert_eq!(features.ebx, (2 << 24) | (3 << 16));
        assert_eq!(features.ecx & ECX1_VMX, 0);
        assert_ne!(features.edx & EDX1_HTT, 0);
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 2));
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!(amd.ecx & ECX_AMD_SVM, 0);
    }
}
